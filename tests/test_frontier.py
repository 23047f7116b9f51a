"""The best that any policy can do, against the exact curve of a policy that can be enumerated."""
import re

import evaluate
import pytest
import torch
from conftest import TOY_REWARD, sail_main
from matplotlib.figure import Figure
from test_enumeration import World
from test_reward_evaluate import run_evaluate, run_measured_on

from formats import read_rows
from runtime.command_line import InputError, seeded
from runtime.compare import draw_best, frontier

TEMPERATURES, SAMPLES, PROMPTS = (0.4, 0.6, 1.0, 2.0), 800, 9


@pytest.fixture(scope="module")
def world():
    """(log π_ref of fifteen responses, their rewards to the prompts, (P, 15), log π of another policy)."""
    made, generator = World(), torch.Generator().manual_seed(5)
    return (made.reference_logps.detach(), torch.randn(PROMPTS, 15, dtype=torch.float64, generator=generator),
            made.logps.detach())


def best_of(t, reference, rewards):
    """(KL, reward, J) of π_t ∝ π_ref·exp(r/t), exact, means over the prompts."""
    logps = (reference + rewards / t).log_softmax(-1)
    kl = (logps.exp() * (logps - reference)).sum(-1).mean().item()
    reward = (logps.exp() * rewards).sum(-1).mean().item()
    return kl, reward, reward - t * kl


def test_the_estimate_equals_the_exact_curve_within_its_error(world):
    reference, rewards, _ = world
    exact = [best_of(t, reference, rewards) for t in TEMPERATURES]
    fine = sorted(best_of(0.1 * 1.02**power, reference, rewards)[:2] for power in range(300))
    kls, heights = torch.tensor(fine, dtype=torch.float64).T
    generator, inside, tries = torch.Generator().manual_seed(0), {"best": 0, "height": 0}, 200
    for _ in range(tries):
        drawn = torch.multinomial(reference.exp(), PROMPTS * SAMPLES, True, generator=generator)
        drawn = drawn.view(PROMPTS, SAMPLES)
        for row, (_, _, best) in zip(frontier(rewards.gather(1, drawn), TEMPERATURES), exact, strict=True):
            place = (kls < row["kl"]).sum()                             # on a line through the fine curve
            share = (row["kl"] - kls[place - 1]) / (kls[place] - kls[place - 1])
            height = heights[place - 1] + share * (heights[place] - heights[place - 1])
            inside["best"] += abs(row["best"] - best) <= row["error"]
            inside["height"] += abs(row["reward"] - height.item()) <= row["error"]
    for name, times in inside.items():
        assert 0.90 < times / tries / len(TEMPERATURES) < 0.999, name   # of 95 % intervals


def test_no_policy_lies_above_the_estimate_but_the_best_one_comes_near(world):
    reference, rewards, other = world
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(reference.exp(), PROMPTS * 20000, True, generator=generator)
    for row in frontier(rewards.gather(1, drawn.view(PROMPTS, -1)), TEMPERATURES):
        t, gaps = row["temperature"], []
        for logps in (reference, other, (reference + rewards / t).log_softmax(-1)):        # the last is π_t
            kl, reward = ((logps.exp() * value).sum(-1).mean() for value in (logps - reference, rewards))
            gaps.append((row["best"] - (reward - t * kl)).item())
        assert min(gaps[:2]) > row["error"] and abs(gaps[2]) < 2 * row["error"] < 0.05


def test_temperatures_that_leave_fewer_than_thirty_samples_are_left_out():
    rewards = [[0.0] * 99 + [1.0], [0.0] * 100]
    assert [row["temperature"] for row in frontier(rewards, [0.1, 10.0])] == [10.0]
    for high, enough in ((29, False), (31, True)):                     # so many share all of the weight
        assert bool(frontier([[0.0] * (100 - high) + [1.0] * high], [0.01])) == enough


def test_a_prompt_weighs_as_often_as_it_is_held_out():
    torch.manual_seed(0)
    rewards = torch.randn(3, 400) + torch.tensor([[0.0], [3.0], [6.0]])
    counted = frontier(rewards, [1.0], [1, 3, 2])[0]
    repeated = frontier(rewards[[0, 1, 1, 1, 2, 2]], [1.0])[0]
    for name in ("reward", "best", "kl"):
        assert counted[name] == pytest.approx(repeated[name])
    alone = [frontier(row[None], [1.0])[0]["error"] for row in rewards]
    shares = torch.tensor([1, 3, 2]) / 6
    assert counted["error"] == pytest.approx((shares * torch.tensor(alone)).norm().item())


def test_compare_sets_runs_beside_the_best_possible(base, held_out, tmp_path, monkeypatch, capsys):
    sail_main(["--model", base, "--variant", "dpo", "--data", "toy", "--limit", "48", "--steps", "1",
               "--eval-data", held_out, "--eval-limit", "24", "--beta", "4", "--out", str(tmp_path / "dpo")])
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    code = ["--compare", "--reward", TOY_REWARD]
    asked, limits, sample = [], [], evaluate.sample
    monkeypatch.setattr(evaluate, "sample", lambda *inputs, **more: (
        asked.extend(map(tuple, inputs[2])), limits.append((*inputs[3:], torch.initial_seed())),
        sample(*inputs, **more))[2])
    figures = run_evaluate(monkeypatch, "dpo", *code, "--frontier", "200")["dpo"]
    prompts = {row["prompt"] for row in read_rows(held_out)[:24]}
    assert len(asked) == len({*asked}) == len(prompts) < 20            # the prompts of 24 pairs, each once
    assert limits == [(24, 200, seeded("frontier", 0))]                # of tokens, samples, and their seed
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| | reward | KL | reward − β·KL | below the best |")
    assert len(lines[2].split("|")) <= 13
    best = float(re.match(r"the best reward − β·KL at β 4 is (\S+) ± ", lines[-1])[1])
    gap, objective = figures["gap"], figures["objective"]
    assert gap["low"] < gap["value"] < gap["high"]
    for ours, theirs in (("value", "value"), ("low", "high"), ("high", "low")):
        assert gap[ours] == pytest.approx(best - objective[theirs], abs=6e-4)
    assert (tmp_path / "figures.png").is_file()
    run_evaluate(monkeypatch, "dpo", *code, "--frontier", "200", "--seed", "1")
    assert f"is {best:.3f} ±" not in capsys.readouterr().out           # drawn anew
    with pytest.raises(InputError, match="--frontier: dpo was measured with another reward than .*other.py"):
        (tmp_path / "other.py").write_text("def score(prompts, responses): return [0.0] * len(responses)")
        run_evaluate(monkeypatch, "dpo", "--compare", "--reward", "other.py:score", "--frontier", "200")
    monkeypatch.setattr("sys.argv", ["evaluate.py", "dpo", *code, "--frontier", "200", "--beta", "0.1"])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "--beta: has no effect with --compare" in capsys.readouterr().err
    with pytest.raises(InputError, match="--frontier 100: too few samples at β 0.1; give more"):
        evaluate.best_possible(["dpo"], 100, {"beta": 0.1, "reward": TOY_REWARD})


@pytest.mark.parametrize("lacking", ["reward", "reference"])
def test_without_a_run_of_reference_and_reward_there_is_no_best_possible(lacking, base, tmp_path):
    both = {"reward": base, "reference": base, "reference_sha256": None, "reward_sha256": None}
    run = run_measured_on(tmp_path / "run", **{**both, lacking: None})
    with pytest.raises(InputError, match="--frontier: no run has a reference and a reward"):
        evaluate.best_possible([str(run)], 100, {})


def test_the_line_of_the_best_ends_where_the_picture_does():
    axes = Figure().subplots()
    axes.set_xlim(-0.5, 2.0)
    curve = [{"kl": kl, "reward": reward} for kl, reward in ((3.0, 9.0), (1.0, 5.0), (0.5, 4.0), (2.5, 8.0))]
    assert draw_best(axes, curve)[:2] == (5.0, 1.0) and axes.get_xlim() == (-0.5, 2.0)
    assert axes.lines[0].get_xydata().tolist() == [[0.5, 4.0], [1.0, 5.0]]


def test_samples_that_all_weigh_the_same_estimate_without_error():
    """As where all rewards are equal: the best is that reward, however few the samples."""
    for n in range(30, 60):
        row, = frontier([[2.0] * n, [1.0] * n], [0.5])
        assert row["best"] == pytest.approx(1.5) and row["effective"] == pytest.approx(n)
        assert row["error"] == pytest.approx(0, abs=1e-6), n
