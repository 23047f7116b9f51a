"""How noisy, and how biased, estimators of ∇J are, from one pair: PP and PR, sigmoid utility.

    python experiments/noise.py                 # seconds on one core: a table; raw rows in noise.jsonl

∇J is the whole gradient, T1 + T2 + T3 with coefficients 1. With s_1, s_2 the scores ∇log π(y) of a pair's
responses, f its utility and c what T1 and T3 give to s_1 − s_2, an estimator is

    (f − b) · (s_1 + s_2) + c · (s_1 − s_2).

f and c are means over both labels or, "label drawn", those of one, as in the paper's text. The rows are T2's
baselines b:
  no baseline                      0
  mean f of the other 7 pairs      in a batch of 8
  running mean of f                of past steps, at the rate 0.1 with 29 pairs a step, as in sail.py
  best constant                    the one of least variance
The last row is biased: the authors' public code adds T2 as f / log π(y), without a baseline.

The policy is the fifteen-response GPT-2 of test_enumeration.py, unrelated to its reference, β 0.7, soft
labels. All sums are over all pairs of responses and both labels: nothing is estimated. The rows go to
experiments/noise.jsonl.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from runtime.run_directory import write_rows
from test_enumeration import BETA, World, flat_gradient

ROWS = ROOT / "experiments/noise.jsonl"


@dataclass
class Outcome:
    """What an estimator gives for one label, or for both summed up; one number a pair, each (R, R)."""
    probability: torch.Tensor         # of this label
    first: torch.Tensor               # coefficient of s_1
    second: torch.Tensor              # coefficient of s_2


def estimators(world, route):
    """{row: (outcomes before the baseline is taken off, baseline b, variance of b)}; b None: the best."""
    u = world.margin("sigmoid").detach()
    logps = world.logps.detach()
    weight = world.pair_probability("pp").detach()
    p = world.label_probability(route, "sigmoid").detach()
    T3 = 1 if route == "pp" else 0
    f_first, f_second = F.logsigmoid(u), F.logsigmoid(-u)           # utility if y_1 wins, if y_2 does
    c_first = BETA * (1 + T3 * f_first) * torch.sigmoid(-u)
    c_second = -BETA * (1 + T3 * f_second) * torch.sigmoid(u)
    f = p * f_first + (1 - p) * f_second
    c = p * c_first + (1 - p) * c_second
    summed = [Outcome(torch.ones_like(p), f + c, f - c)]
    drawn = [Outcome(p, f_first + c_first, f_first - c_first),
             Outcome(1 - p, f_second + c_second, f_second - c_second)]
    theirs = [Outcome(p, f_first / logps[:, None] + c_first, f_first / logps - c_first),
              Outcome(1 - p, f_second / logps[:, None] + c_second, f_second / logps - c_second)]
    b = (weight * f).sum()
    variance = (weight * f**2).sum() - b**2
    variance_drawn = (weight * (p * f_first**2 + (1 - p) * f_second**2)).sum() - b**2
    running = 0.1 / 1.9 / 29                                        # Var(running mean) / Var(f)
    return {
        "no baseline, label drawn: the paper's text": (drawn, 0, 0),
        "no baseline": (summed, 0, 0),
        "mean f of the other 7 pairs, label drawn": (drawn, b, variance_drawn / 7),
        "mean f of the other 7 pairs": (summed, b, variance / 7),
        "running mean of f: the default": (summed, b, running * variance),
        "best constant": (summed, None, 0),
        "T2 as f / log π(y), label drawn: the authors' code": (theirs, 0, 0)}


def measure(world, scores, route):
    """{row: (standard deviation of one pair's gradient, cosine of its mean with ∇J)}. scores: of every
    response, (R, parameters)."""
    weight = world.pair_probability("pp").detach()
    gram = scores @ scores.T                                        # (R, R)
    norms = gram.diag()

    def square(first, second):
        """|first · s_1 + second · s_2|² of every pair, (R, R)."""
        return first**2 * norms[:, None] + second**2 * norms + 2 * first * second * gram

    truth = world.exact_gradient(route, "sigmoid")
    both = square(torch.ones_like(gram), torch.ones_like(gram))     # |s_1 + s_2|², which b multiplies
    results = {}
    for name, (outcomes, b, variance) in estimators(world, route).items():
        first = sum(each.probability * each.first for each in outcomes)
        second = sum(each.probability * each.second for each in outcomes)
        if b is None:                                               # E[g · (s_1 + s_2)] / E[|s_1 + s_2|²]
            product = first * norms[:, None] + second * norms + (first + second) * gram
            b = (weight * product).sum() / (weight * both).sum()
        mean = (weight * (first - b)).sum(1) @ scores + (weight * (second - b)).sum(0) @ scores
        squares = variance * both
        for each in outcomes:
            squares = squares + each.probability * square(each.first - b, each.second - b)
        std = ((weight * squares).sum() - mean.square().sum()).sqrt()
        results[name] = std.item(), F.cosine_similarity(mean, truth, dim=0).item()
    return results


def table(rows):
    """Markdown: a line for each estimator, with its standard deviation and its cosine on both routes."""
    lines = ["| one pair's gradient | standard deviation, PP | PR | cosine of its mean with ∇J, PP | PR |",
             "|---|---|---|---|---|"]
    for name in dict.fromkeys(row["estimator"] for row in rows):
        of_name = {row["route"]: row for row in rows if row["estimator"] == name}
        cells = [f"{of_name[route]['std']:.1f}" for route in ("pp", "pr")]
        cells += [f"{of_name[route]['cosine']:.2f}" for route in ("pp", "pr")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    """`python experiments/noise.py`."""
    torch.set_num_threads(1)
    world = World()
    scores = torch.stack([flat_gradient(logp, world.policy) for logp in world.logps])
    rows = []
    for route in ("pp", "pr"):
        for name, (std, cosine) in measure(world, scores, route).items():
            rows.append({"route": route, "estimator": name, "std": std, "cosine": cosine})
    write_rows(ROWS, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
