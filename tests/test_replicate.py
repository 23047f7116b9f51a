"""The report of the replication, on runs made up here."""
import json

import pytest
import replicate

from toy import grammar_pairs, toy_settings


def finished_run(path, *evals, beta=0.5, **more):
    """What sail.py leaves of a run, of which the report reads: (step, KL, reward) per evaluation; more
    figures."""
    (path / "model").mkdir(parents=True)
    rows = [{"step": step, "kl": kl, "kl_interval": [kl - 1, kl + 1], "reward": reward,
             "reward_interval": [reward - 0.5, reward + 0.5], **more} for step, kl, reward in evals]
    (path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "metrics.jsonl").write_text('{"seconds": 1.5}\n' * evals[-1][0])
    (path / "args.json").write_text(json.dumps({"beta": beta}))


def test_a_row_has_a_runs_figures_its_highest_kl_and_its_objective(tmp_path):
    finished_run(tmp_path / "toy" / "dpo-s3", (0, 0.0, 9.0), (1, 5.0, 1.0), (2, 1.0, 2.0))
    assert replicate.rows_of(tmp_path) == [{
        "world": "toy", "method": "dpo", "seed": 3, "steps": 2, "seconds": 3.0, "peak_kl": 5.0,
        "figures": {"kl": [1.0, 0.0, 2.0], "reward": [2.0, 1.5, 2.5], "objective": [1.5, None, None]},
        "curve": [[0, 0.0, 9.0], [1, 5.0, 1.0], [2, 1.0, 2.0]]}]


def test_the_objective_is_the_runs_own_only_where_its_beta_is_the_toys(tmp_path):
    measured = {"objective": 1.25, "objective_interval": [1.0, 1.5]}
    finished_run(tmp_path / "toy" / "dpo-s0", (2, 1.0, 2.0), **measured)
    finished_run(tmp_path / "toy" / "simpo-s0", (2, 1.0, 2.0), beta=2.0, **measured)
    figures = [row["figures"]["objective"] for row in replicate.rows_of(tmp_path)]
    assert figures == [[1.25, 1.0, 1.5], [1.5, None, None]]


def test_the_table_has_means_over_seeds_and_differences_seed_by_seed(tmp_path):
    for seed, (dpo, pr) in enumerate([(1.0, 2.0), (3.0, 4.5)]):
        finished_run(tmp_path / "toy" / f"dpo-s{seed}", (0, 0.0, 9.0), (2, 1.0, dpo))
        finished_run(tmp_path / "toy" / f"pr-s{seed}", (1, 4.0 + seed, 0.0), (2, 2.0, pr))
    table = replicate.table(replicate.rows_of(tmp_path), {
        "reward": ("toy", "figures", "reward"), "minus DPO": ("toy", "figures", "reward-dpo"),
        "objective": ("toy", "figures", "objective"), "highest KL": ("toy", "peak_kl", None),
        "steps": ("toy", "steps", None)})
    assert table.split("\n")[2:] == [
        "| dpo | 2.00 ± 12.71 |  | 1.50 ± 12.71 | 1.00 | 2 |",
        "| pr | 3.25 ± 15.89 | +1.25 ± 3.18 | 2.25 ± 15.89 | 5.00 | 2 |"]


def test_dialogues_have_the_figures_that_evaluate_py_wrote(tmp_path):
    finished_run(tmp_path / "dialogues" / "sft", (2, 0.0, 0.3))
    figures = {"sft": {"reward": {"value": 0.25, "low": 0.0, "high": 0.4}}}
    for name in ("first", "second"):
        (tmp_path / "dialogues" / f"{name}.json").write_text(json.dumps(figures))
    row, = replicate.rows_of(tmp_path)
    assert (row["method"], row["seed"]) == ("sft", 0)
    assert row["figures"] == row["second"] == {"reward": [0.25, 0.0, 0.4]}
    table = replicate.table([row], {"reward": ("dialogues", "second", "reward")})
    assert table.endswith("| sft | 0.25 ± 0.20 |")


def test_a_fifth_of_the_labels_is_flipped_and_nothing_else():
    pairs = grammar_pairs()
    flipped = replicate.flipped_pairs(pairs)
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    assert all(row in (pair, other) for row, pair, other in zip(flipped, pairs, swapped))
    share = sum(row == other for row, other in zip(flipped, swapped)) / len(pairs)
    assert share == pytest.approx(0.2, abs=0.02)


def test_the_toys_settings_that_are_spelled_out_are_those_of_the_toy():
    from sail import parse_args
    data = toy_settings("dpo", "M")["data"]
    own, spelled = (vars(parse_args(f"{data} --variant dpo --model M --eval-every 15".split())) for data in (
        "--data toy", f"--data {data} {replicate.TOY}"))
    assert {**spelled, "out": own["out"], "toy": True, "reward": own["reward"]} == own


def test_the_picture_shows_at_most_seven_methods():
    assert len(replicate.PICTURE) <= 7 and set(replicate.PICTURE) <= {"sft", *replicate.METHODS}


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


def test_a_runs_reward_is_set_beside_the_highest_at_its_kl(tmp_path, monkeypatch):
    curve = [{"kl": 0.0, "reward": 1.0}, {"kl": 2.0, "reward": 3.0}]
    monkeypatch.setattr("evaluate.best_possible", lambda options: ({"best": 2.25 + options.seed}, curve))
    finished_run(tmp_path / "toy" / "dpo-s0", (2, 1.0, 2.0))                   # its interval: 1.5 to 2.5
    finished_run(tmp_path / "toy-quarter" / "pr-s0", (2, 1.5, 3.25))
    finished_run(tmp_path / "toy" / "pr-s1", (2, 5.0, 2.0))                    # beyond what the samples reach
    rows = replicate.rows_of(tmp_path)
    replicate.below_the_best(rows, tmp_path)
    found = {(row["method"], row["seed"]): (row["figures"]["gap"][0], row.get("above")) for row in rows}
    assert found == {("dpo", 0): (0.75, -0.5), ("pr", 0): (-0.25, 0.25), ("pr", 1): (3.75, None)}
