"""The report of the replication, on runs made up here, and the pages' tables, from the committed rows."""
import json
import math
import random
import statistics
from pathlib import Path

import pytest
import replicate
import torch

from runtime.intervals import student

from sail import parse_args
from toy import grammar_pairs, toy_reward, toy_settings

ROOT = Path(replicate.__file__).parent


def finished_run(path, *evals, **more):
    """What sail.py leaves of a run, of which the report reads: (step, KL, reward) per evaluation; more
    figures."""
    (path / "model").mkdir(parents=True)
    rows = [{"step": step, "prompts": 4, "kl": kl, "kl_interval": [kl - 1, kl + 1], "reward": reward,
             "reward_interval": [reward - 0.5, reward + 0.5], **more} for step, kl, reward in evals]
    (path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "metrics.jsonl").write_text('{"seconds": 1.5}\n' * evals[-1][0])


def test_a_row_has_a_runs_last_figures_and_its_highest_kl(tmp_path):
    measured = {"objective": 1.25, "objective_interval": [1.0, 1.5]}
    finished_run(tmp_path / "toy" / "dpo-s3", (0, 0.0, 9.0), (1, 5.0, 1.0), (2, 1.0, 2.0), **measured)
    assert replicate.rows_of(tmp_path) == [{
        "world": "toy", "method": "dpo", "seed": 3, "steps": 2, "seconds": 3.0, "peak_kl": 5.0,
        "figures": {"kl": [1.0, 0.0, 2.0], "reward": [2.0, 1.5, 2.5], "objective": [1.25, 1.0, 1.5]}}]


def test_an_sft_models_objective_is_its_reward(tmp_path):
    finished_run(tmp_path / "toy" / "sft-s3", (2, 0.0, 2.0))
    row, = replicate.rows_of(tmp_path)
    assert row["figures"]["objective"] == [2.0, 1.5, 2.5]


def test_runs_that_a_reward_model_labelled_have_the_figures_by_the_true_reward(tmp_path):
    finished_run(tmp_path / "toy-model" / "online-dpo-s5", (2, 1.0, 9.0))
    figures = {"online-dpo-s5": {name: {"value": value, "low": 0.0, "high": 4.0}
                                 for name, value in (("reward", 2.0), ("objective", 1.5))}}
    (tmp_path / "toy-model" / "true.json").write_text(json.dumps(figures))
    row, = replicate.rows_of(tmp_path)
    assert row["figures"] == {"reward": [2.0, 0.0, 4.0], "objective": [1.5, 0.0, 4.0]}


def made_up(world, method, *values):
    """Rows of one figure, a seed each."""
    return [{"world": world, "method": method, "seed": seed, "figures": {"reward": [value, None, None]}}
            for seed, value in enumerate(values)]


def test_the_table_has_means_over_the_seeds_of_its_world():
    rows = (made_up("toy", "dpo", 1.0, 3.0) + made_up("toy", "pr", 2.0) + made_up("toy-online", "pr", 7.0)
            + made_up("toy-online", "sft", 7.0))
    table = replicate.table(rows, {"r": "reward", "KL": "kl"}, "toy", {"sft": "S", "dpo": "D", "pr": "P"})
    assert table.split("\n") == ["| | r | KL |", "|---|---|---|", "| D | 2.00 ± 12.71 |  |",
                                 "| P | 2.00 |  |"]


@pytest.mark.parametrize("gains, text, p, verdict", [
    ((0.2, 0.21, 0.22), "+0.21 ± 0.02", "0.002", "gains"),
    ((-0.2, -0.21, -0.22), "−0.21 ± 0.02", "0.002", "costs"),
    ((0.01, 0.0, -0.01), "+0.00 ± 0.02", "1.000", "no effect larger than 0.05"),
    ((0.2, 0.0, -0.1), "+0.03 ± 0.38", "0.845", "not resolved")])
def test_what_is_compared_is_compared_seed_by_seed(gains, text, p, verdict):
    """There is one more question, whose p is 0.423; Holm doubles the smaller of the two."""
    rows = made_up("toy", "dpo", 1.0, 2.0, 4.0, 9.0) + made_up(
        "toy-online", "pr", *(value + gain for value, gain in zip((1.0, 2.0, 4.0), gains, strict=True)))
    rows += made_up("toy", "pp", 1.0, 2.1, 4.0)
    questions = [("Why?", ("toy-online", "pr"), ("toy", "dpo")), ("No runs?", ("toy", "dp"), ("toy", "dpo")),
                 ("And?", ("toy", "pp"), ("toy", "dpo"))]
    lines = replicate.compared(rows, questions, {"r": "reward"}).split("\n")
    assert lines[:3] == ["| | r | p | |", "|---|---|---|---|", f"| Why? | {text} | {p} | {verdict} |"]
    assert len(lines) == 4


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9])
def test_p_is_the_tail_of_students_t(degrees):
    """By quadrature of its density, and by the quantile that intervals use."""
    values = [math.sin(3.0 * k) + 0.4 for k in range(degrees + 1)]
    t = abs(statistics.mean(values)) / statistics.stdev(values) * math.sqrt(len(values))
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    grid = torch.linspace(0, t, 20001, dtype=torch.float64)
    below = torch.trapezoid(scale * (1 + grid**2 / degrees) ** (-(degrees + 1) / 2), grid).item()
    assert replicate.p_value(values) == pytest.approx(1 - 2 * below, abs=1e-6)
    edge = student(degrees) * statistics.stdev(values) / math.sqrt(len(values))
    shifted = [value - statistics.mean(values) + edge for value in values]
    assert replicate.p_value(shifted) == pytest.approx(0.05, abs=3e-4)


def test_holm_adjusts_the_smallest_most_and_keeps_their_order():
    assert replicate.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert replicate.holm([0.9, 0.8]) == [1.0, 1.0] and replicate.holm([]) == []


def test_what_is_compared_has_been_run():
    for _, one, control in replicate.COMPARED + replicate.ASKED + replicate.EXPLORED:
        for world, method in (one, control):
            assert method in replicate.WORLDS[world][2].split()
    assert {method for _, _, methods in replicate.WORLDS.values() for method in methods.split()} == {
        *replicate.METHODS} - {"sft"}


def test_a_fifth_of_the_labels_is_flipped_and_nothing_else():
    pairs = grammar_pairs()
    flipped = replicate.flipped_pairs(pairs)
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    assert all(row in (pair, other) for row, pair, other in zip(flipped, pairs, swapped, strict=True))
    share = sum(row == other for row, other in zip(flipped, swapped, strict=True)) / len(pairs)
    assert share == pytest.approx(0.2, abs=0.02)


def test_labels_are_flipped_whatever_the_prompt():
    prompts = random.Random(0).choices(range(5), k=5000)               # as `draw_toy_pairs` draws them
    pairs = [dict(prompt=prompt, chosen="good", rejected="bad") for prompt in prompts]
    flipped = [row["prompt"] for row in replicate.flipped_pairs(pairs) if row["chosen"] == "bad"]
    for prompt in range(5):
        assert flipped.count(prompt) / prompts.count(prompt) == pytest.approx(0.2, abs=0.05)


def test_the_clear_half_of_the_pairs_has_the_larger_differences():
    def gap(pair):
        first, second = toy_reward([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]])
        return abs(first - second)

    pairs = grammar_pairs()[:200]
    clear, close = replicate.by_difference(pairs)
    assert clear == [pair for pair in pairs if pair in clear] and len(clear) == 100
    assert close == [pair for pair in pairs if pair not in clear] and len(close) == 100
    assert min(map(gap, clear)) >= sorted(map(gap, pairs))[100]


def test_rounds_go_on_from_the_last_ones_policy_and_are_measured_to_the_first(tmp_path, monkeypatch):
    drawn, trained = [], []
    monkeypatch.setattr(replicate, "draw_toy_pairs",
                        lambda model, path, count, seed: drawn.append((model, count, seed)))
    monkeypatch.setattr(replicate, "train", trained.append)
    replicate.train_rounds(tmp_path, "toy-rounds", 5, "SFT")
    outs = [f"{out}/model" for out, *_ in trained]
    assert drawn == [(model, 3600, k) for k, model in enumerate(["SFT", *outs[:-1]])]
    assert outs[-1] == f"{tmp_path}/toy-rounds/dpo-s5/model" and len(outs) == 5
    for (_, flags, chosen), (model, _, _) in zip(trained, drawn, strict=True):
        assert chosen == {"schedule": "cosine"}
        assert f"--model {model} --reference SFT " in flags and "--steps 38 " in flags


def test_rounds_on_halves_see_each_pair_of_the_data_once(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(replicate, "train", trained.append)
    replicate.train_rounds(tmp_path, "toy-clear-first", 5, "SFT")
    (first, one, _), (last, two, _) = trained
    assert f"/clear.jsonl {replicate.TOY} --model SFT --reference SFT " in one and "--steps 94 " in one
    assert f"/close.jsonl {replicate.TOY} --model {first}/model --reference SFT " in two
    assert last == tmp_path / "toy-clear-first/dpo-s5"


def test_a_finished_run_is_not_run_again_and_keeps_its_model_alone(tmp_path, monkeypatch):
    calls = []

    def run(*command, **_):
        calls.append(command)
        for name in ("model", "checkpoints/8"):
            (tmp_path / name).mkdir(parents=True)

    monkeypatch.setattr(replicate, "run", run)
    (tmp_path / "args.json").touch()                                   # it was stopped
    for _ in range(2):
        replicate.train((tmp_path, "--seed 3", {}))
    assert calls == [("sail", "--seed", "3", "--resume", "--out", tmp_path)]
    assert (tmp_path / "model").is_dir() and not (tmp_path / "checkpoints").exists()


def test_the_toys_settings_that_are_spelled_out_are_those_of_the_toy():
    data = toy_settings("dpo", "runs/toy/M")["data"]
    flags = "--variant dpo --model runs/toy/M".split()
    own = vars(parse_args([*flags, "--data", "toy"]))
    spelled = vars(parse_args([*flags, "--data", data, *replicate.TOY.split()], **replicate.SCHEDULE))
    assert {**spelled, "out": own["out"], "reward": own["reward"]} == own


def test_the_picture_shows_at_most_seven_methods():
    names = [method for _, method in replicate.PICTURE]
    assert len(names) <= 7 and len(set(names)) == len(names)           # one name: one colour
    for world, method in replicate.PICTURE[1:]:                        # the first is SFT
        assert method in replicate.WORLDS[world][2].split()


def test_a_runs_reward_is_set_beside_the_highest_at_its_kl(tmp_path, monkeypatch):
    curve = [{"kl": 0.0, "reward": 1.0}, {"kl": 2.0, "reward": 3.0}]
    monkeypatch.setattr(replicate, "best_possible",
                        lambda _, __, given: ({"best": 2.25 + given["seed"]}, curve, "runs/dpo"))

    def run(name, kl, reward, objective):
        finished_run(tmp_path / name, (2, kl, reward), objective=objective, objective_interval=[0.0, 9.0])

    run("toy/dpo-s0", 1.0, 2.0, 1.5)                                           # its interval: 1.5 to 2.5
    run("toy-quarter/pr-s0", 1.5, 3.25, 2.5)
    run("toy/pr-s1", 5.0, 2.0, -0.5)                                           # beyond what the samples reach
    rows = replicate.rows_of(tmp_path)
    replicate.below_the_best(rows, tmp_path)
    found = {(row["method"], row["seed"]): (row["figures"]["gap"][0], row.get("above")) for row in rows}
    assert found == {("dpo", 0): (0.75, -0.5), ("pr", 0): (-0.25, 0.25), ("pr", 1): (3.75, None)}


def test_all_runs_of_a_seed_are_measured_to_one_best():
    """The best reward − β·KL is a property of a seed's SFT model, so that a row's figure and its distance
    from the best add up to the same number for all methods, whatever β they were trained with."""
    best = {}
    for row in replicate.recorded():
        figures = row["figures"]
        if "gap" in figures:
            best.setdefault(row["seed"], []).append(figures["gap"][0] + figures["objective"][0])
    for sums in best.values():
        assert max(sums) - min(sums) < 1e-6
