"""The report of the replication, on runs made up here."""
import json

import pytest
import replicate
from data import toy_pairs


def finished_run(path, *evals):
    """What sail.py leaves of a run, of which the report reads: (step, KL, reward) per evaluation."""
    (path / "model").mkdir(parents=True)
    rows = [{"step": step, "kl": kl, "kl_interval": [kl - 1, kl + 1], "reward": reward,
             "reward_interval": [reward - 0.5, reward + 0.5]} for step, kl, reward in evals]
    (path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "metrics.jsonl").write_text('{"seconds": 1.5}\n' * evals[-1][0])


def test_the_table_has_means_over_seeds_and_differences_seed_by_seed(tmp_path):
    for seed, (dpo, pr) in enumerate([(1.0, 2.0), (3.0, 4.5)]):
        finished_run(tmp_path / "toy" / f"dpo-s{seed}", (0, 0.0, 9.0), (2, 1.0, dpo))
        finished_run(tmp_path / "toy" / f"pr-s{seed}", (2, 2.0, pr))
    finished_run(tmp_path / "dialogues" / "sft", (2, 0.0, 0.3))
    (tmp_path / "dialogues" / "first.json").write_text(json.dumps({"sft": {"reward": [0.25, 0.0, 0.4]}}))
    rows = replicate.rows_of(tmp_path)
    assert [(row["world"], row["method"], row["seed"], row["steps"], row["seconds"]) for row in rows] == [
        ("dialogues", "sft", 0, 2, 3.0), ("toy", "dpo", 0, 2, 3.0), ("toy", "dpo", 1, 2, 3.0),
        ("toy", "pr", 0, 2, 3.0), ("toy", "pr", 1, 2, 3.0)]
    assert rows[1]["figures"]["kl"] == [1.0, 0.0, 2.0] and rows[1]["curve"] == [[0, 0.0, 9.0], [2, 1.0, 1.0]]
    table = replicate.table(rows, {
        "reward": ("toy", "figures", "reward"), "minus DPO": ("toy", "figures", "reward-dpo"),
        "best": ("toy", "best", "reward"), "dialogues": ("dialogues", "figures", "reward")})
    assert table.split("\n")[2:] == [
        "| sft |  |  |  | 0.25 ± 0.20 |", "| dpo | 2.00 ± 12.71 |  | 9.00 ± 0.00 |  |",
        "| pr | 3.25 ± 15.89 | +1.25 ± 3.18 | 3.25 ± 15.89 |  |"]


def test_a_fifth_of_the_labels_is_flipped_and_nothing_else():
    pairs, flipped = toy_pairs("train"), replicate.flipped_pairs()
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    assert all(row in (pair, other) for row, pair, other in zip(flipped, pairs, swapped))
    share = sum(row == other for row, other in zip(flipped, swapped)) / len(pairs)
    assert share == pytest.approx(0.2, abs=0.02)


def test_dialogues_are_split_by_their_prompts(tmp_path):
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"p{i // 2}", "chosen": f"c{i}", "rejected": "r"}) + "\n"
                              for i in range(400)))
    texts = replicate.split_dialogues(source, tmp_path)
    prompts = {name: {json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").open()}
               for name in ("held-out", "first", "second", "both")}
    assert len(prompts["held-out"] | prompts["first"] | prompts["second"]) == 200 == sum(
        map(len, prompts.values())) - len(prompts["both"])             # no prompt is in two of the three
    assert prompts["both"] == prompts["first"] | prompts["second"] and len(texts) == 4 * len(prompts["both"])
    assert 10 < len(prompts["held-out"]) < 45 and min(len(prompts["first"]), len(prompts["second"])) > 60
