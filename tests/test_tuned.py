"""The tuned toy: RLOO's loss, which learning rates are tried, how many steps fit into a time."""
from pathlib import Path

import pytest
import rloo
import torch
import tuned

import sail
from toy import toy_prompts

ROOT = Path(sail.__file__).parent


def test_rloo_has_the_gradient_of_reinforce_with_the_other_sample_as_its_baseline():
    """R_i = r_i − β log(π/π_ref); the estimate for two samples is the mean of (R_i − R_j) ∇log π(y_i)."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs, rewards = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    ours.requires_grad_()
    preference, pair = torch.sigmoid(rewards[0] - rewards[1]), torch.ones(5, dtype=torch.bool)
    losses, metrics = rloo.rloo_loss(*ours, *theirs, preference, pair, ~pair, beta=0.3, loss_type="sigmoid")
    gradient, = torch.autograd.grad(losses.sum(), ours)
    regularised = rewards - 0.3 * (ours.detach() - theirs)
    advantages = regularised - regularised.flip(0)
    assert torch.allclose(gradient, -advantages / 2)
    assert metrics.keys() == sail.sail_loss(*ours, *theirs, preference)[1].keys()


def test_rloo_trains_through_the_whole_loop(base, tmp_path, monkeypatch):
    monkeypatch.setattr(sail, "sail_loss", sail.sail_loss)             # which the script replaces
    flags = ("--steps 2 --batch-size 4 --max-prompt-length 8 --max-response-length 8 --eval-every 0 "
             "--eval-limit 2")
    rloo.main(["--model", base, "--data", f"{base}/toy-pairs.jsonl", "--reward", f"{ROOT}/toy.py:toy_reward",
               *flags.split(), "--out", str(tmp_path / "run")])
    assert (tmp_path / "run/model").is_dir()


def made_up(method, **objectives):
    """Rows of the tuning seeds: a learning rate's mean of reward − β·KL, as rate_0.0004=1.5."""
    rows = []
    for rate, mean in objectives.items():
        for seed in tuned.TUNING_SEEDS:
            figures = {"objective": [mean + 0.1 * (seed - 1), None, None]}
            rows.append(dict(world=f"rate-{rate[1:]}", method=method, seed=seed, figures=figures))
    return rows


@pytest.mark.parametrize("objectives, following, best", [
    ({}, tuned.RATES, None),
    ({"r0.0004": 1.0, "r0.0008": 1.5, "r0.0016": 1.2, "r0.0032": 0.5}, (), 8e-4),
    ({"r0.0004": 1.0, "r0.0008": 0.5, "r0.0016": 0.2, "r0.0032": 0.1}, (2e-4,), 4e-4),
    ({"r0.0004": 1.0, "r0.0008": 1.5, "r0.0016": 1.7, "r0.0032": 1.8}, (6.4e-3,), 3.2e-3),
    ({"r0.0001": 2.0, "r0.0002": 1.5, "r0.0004": 1.0, "r0.0008": 0.9}, (), 1e-4)],
    ids=["none", "inside", "lowest", "highest", "no further"])
def test_rates_beyond_the_best_are_tried_until_it_is_not_the_last(monkeypatch, objectives, following, best):
    monkeypatch.setattr(tuned, "METHODS", {"dpo": tuned.METHODS["dpo"]})
    rows = made_up("dpo", **objectives)
    assert tuned.rates_to_try(rows) == [("dpo", rate) for rate in following]
    assert tuned.best_rates(rows).get("dpo") == best


def test_steps_in_equal_time_are_by_the_median_of_the_rounds(monkeypatch):
    """Online DPO's 188 steps take 376, 376 and 752 s. In the first round DPO's 188 steps of 1.5 s take 282 s;
    of a longer run the scoring takes 188 · 0.5 s, and 282 steps of 1 s are left."""
    monkeypatch.setattr(tuned, "METHODS", {"dpo": None, "online-dpo": None, "pr": None})
    seconds = {"dpo": ((1.5, 1.0), (1.5, 1.0), (9.0, 9.0)),
               "online-dpo": ((2.0, 1.0), (2.0, 1.0), (4.0, 4.0)),
               "pr": ((4.0, 1.0), (1.0, 1.0), (2.0, 1.0))}
    rows = [dict(world="timing", method=method, round=each, first=first, later=later)
            for method, rounds in seconds.items() for each, (first, later) in enumerate(rounds)]
    assert tuned.steps_in_equal_time(rows) == {"dpo": 282, "online-dpo": 188, "pr": 376}


def test_the_prompts_that_choose_learning_rates_occur_nowhere_else(tmp_path):
    tuned.tuning_prompts(tmp_path / "prompts.jsonl")
    prompts = {row["prompt"] for row in tuned.read_rows(tmp_path / "prompts.jsonl")}
    others = {prompt for held_out in (False, True) for prompt, _ in toy_prompts(held_out)}
    assert len(prompts) == 80 and not prompts & others
