"""How noisy, and how biased, estimators of ∇J are: routes PP and PR, sigmoid utility, a pair at a time.

    python experiments/noise.py                 # seconds on one core: two tables

∇J is the whole gradient, T1 + T2 + T3 with coefficients 1. With s_1, s_2 the scores ∇log π(y) of a pair's
responses, f its utility and c the weight that T1 and T3 give to s_1 − s_2, an estimator is

    (f − b_1)·s_1 + (f − b_2)·s_2 + c·(s_1 − s_2),

f and c being means over both labels or, "label drawn", those of one. The rows are T2's baselines b:
  none                 0; with the label drawn, as in the paper's text
  other 7 pairs        the mean f of the other pairs in a batch of 8
  running mean         of past steps' f, at the rate 0.1 with 29 pairs a step, as in sail.py
  best constant        the one of least variance
  prompt's other pair  f of a second pair of responses to the same prompt
  per token            for token t of a response, the f that there would be had it ended before t; PR, whose
                       label is not known then, takes both labels as equally likely
and two that are biased: antithetic pairs, y_2 by the inverse CDF at 1 − v where y_1's is at v, which are not
independent; and the authors' public code, which adds T2 as f / log π(y) without a baseline. A std is that of
one pair's gradient: that of the mean over four responses, as two pairs, times √2.

The policy is the fifteen-response GPT-2 of test_enumeration.py, unrelated to its reference, β 0.7, soft
labels. All sums are over all fours of responses and all labels: nothing is estimated.
"""
import itertools
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_enumeration import BETA, PROMPT, World, flat_gradient

ROUTES = ("pp", "pr")
PARTNER, OTHER = [1, 0, 3, 2], [2, 3, 0, 1]                         # four make the pairs (0, 1) and (2, 3)


@dataclass
class Fours:
    """G groups of four independent responses to one prompt. T: tokens."""
    beta: float
    weight: torch.Tensor              # (G,) the group's probability
    logps: torch.Tensor               # (G, 4) log π
    ratios: torch.Tensor              # (G, 4, T) log π/π_ref of each token, 0 where there is none
    mask: torch.Tensor                # (G, 4, T)
    preference: torch.Tensor          # (G, 4) the reward's P(response ≻ its partner)
    gram: torch.Tensor = None         # (G, 12, 12) inner products of the vectors of token_weights

    def moments(self, values):
        """Mean and variance of values (G,)."""
        mean = (self.weight * values).sum()
        return mean, (self.weight * values**2).sum() - mean**2

    def inner(self, one, other):
        """Inner products of two gradients given by coefficients, (G, 4, 3) × 2 -> (G,)."""
        return (one.flatten(1) * (self.gram @ other.flatten(1)[..., None])[..., 0]).sum(1)


def expected_utility(u, p):
    return p * F.logsigmoid(u) + (1 - p) * F.logsigmoid(-u)


def token_weights(fours):
    """Gradients are combinations of three vectors per response: its score, and its tokens' scores summed with
    the weights of the baseline per token, PP's and PR's. Returns the tokens' weights, (G, 4, 3, T)."""
    before = fours.ratios.cumsum(-1) - fours.ratios                 # log-ratio of the tokens before t
    u = fours.beta * (before - fours.ratios.sum(-1)[:, PARTNER, None])                      # (G, 4, T)
    weights = [torch.ones_like(u), *(expected_utility(u, p) for p in (torch.sigmoid(u), 0.5))]
    return torch.stack(weights, 2) * fours.mask[:, :, None]


def of_scores(coefs, vector=0, weight=0.0):
    """Coefficients of the scores (G, 4), and one weight for the vectors number `vector` -> (G, 4, 3)."""
    coefs = F.pad(coefs[..., None], (0, 2))
    coefs[..., vector] += weight
    return coefs


def estimators(fours, route):
    """{row: (outcomes, b, variance of b)}. outcomes: [(probability (G,), coefficients (G, 4, 3))], one for
    each way to draw the labels, before the constant baseline b is taken off; b None: the best constant."""
    reward, vector, T3 = fours.beta * fours.ratios.sum(-1), 1 + ROUTES.index(route), float(route == "pp")
    u = reward - reward[:, PARTNER]                                 # (G, 4), a response against its partner
    p = torch.sigmoid(u) if route == "pp" else fours.preference

    def utility_and_weight(p):                                      # f and c, on the response's score, (G, 4)
        c = (p * (1 + T3 * F.logsigmoid(u)) * torch.sigmoid(-u)
             - (1 - p) * (1 + T3 * F.logsigmoid(-u)) * torch.sigmoid(u))
        return expected_utility(u, p), fours.beta * c

    def drawn(divisor=1.0):                                         # no baseline; a label for either pair
        halves, first_wins = [], torch.tensor([1.0, 0.0, 1.0, 0.0])
        for label in (first_wins, 1 - first_wins):
            f, c = utility_and_weight(label)
            halves.append(((f / divisor + c) / 2).split(2, 1))      # (G, 2) of either pair
        return [(chance[:, 0] * other[:, 2], of_scores(torch.cat([half, other_half], 1)))
                for (chance, (half, _)), (other, (_, other_half)) in itertools.product(
                    zip((p, 1 - p), halves), repeat=2)]

    def summed(coefs, *per_token):
        return [(torch.ones_like(fours.weight), of_scores(coefs, *per_token))]

    f, c = utility_and_weight(p)
    pairs, (b, variance) = (f + c) / 2, fours.moments(f[:, 0])
    variance_drawn = variance + fours.moments((p * (1 - p) * u**2)[:, 0])[0]                # f(u) − f(−u) = u
    return {
        "no baseline, label drawn": (drawn(), 0, 0),
        "no baseline": (summed(pairs), 0, 0),
        "other 7 pairs, label drawn": (drawn(), b, variance_drawn / 7),
        "other 7 pairs": (summed(pairs), b, variance / 7),
        "prompt's other pair": (summed(pairs - f[:, OTHER] / 2), 0, 0),
        "running mean": (summed(pairs), b, 0.1 / 1.9 / 29 * variance),     # Var(running mean) / Var(f)
        "best constant": (summed(pairs), None, 0),
        "per token": (summed(pairs, vector, -0.5), 0, 0),
        "T2 as f / log π(y), label drawn": (drawn(fours.logps), 0, 0)}


def rows_of(fours):
    return {(route, name): row for route in ROUTES for name, row in estimators(fours, route).items()}


def expected(outcomes):
    return sum(probability[:, None, None] * coefs for probability, coefs in outcomes)


def measure(fours, rows, gradient, truth):
    """{(route, row): (std of one pair's gradient, cosine of its mean with ∇J)}. gradient: coefficients -> the
    mean gradient (D,). truth: {route: ∇J (D,)}."""
    scores = of_scores(torch.full_like(fours.logps, 0.5))           # what a constant baseline multiplies
    scores2, results = fours.inner(scores, scores), {}
    for key, (outcomes, b, variance) in rows.items():
        if b is None:
            b = fours.moments(fours.inner(expected(outcomes), scores))[0] / fours.moments(scores2)[0]
        square = variance * scores2                                 # E|g|² over the labels, (G,)
        for probability, coefs in outcomes:
            square = square + probability * fours.inner(coefs - b * scores, coefs - b * scores)
        mean = gradient(expected(outcomes) - b * scores)
        own_variance = (fours.weight * square).sum() - mean.square().sum()
        std = (2 * own_variance.clamp(min=0)).sqrt().item()         # of a pair: four are two pairs' worth
        results[key] = std, F.cosine_similarity(mean, truth[key[0]], dim=0).item()
    return results


def enumerated():
    """{(route, row): figures} of the fifteen-response world, exact."""
    world = World()
    n, longest = len(world.responses), max(map(len, world.responses))
    ours, theirs = torch.zeros(2, n, longest, dtype=torch.float64)  # log-probabilities of single tokens
    scores = torch.zeros(n, longest, sum(w.numel() for w in world.policy.parameters()), dtype=torch.float64)
    for i, y in enumerate(world.responses):
        for t, token in enumerate(y):
            context = torch.tensor([[*PROMPT, *y[:t]]])
            logp, theirs[i, t] = (model(context).logits[0, -1].log_softmax(-1)[token]
                                  for model in (world.policy, world.reference))
            ours[i, t], scores[i, t] = logp.item(), flat_gradient(logp, world.policy)
    logps, drawn = ours.sum(1), torch.tensor(list(itertools.product(range(n), repeat=4)))   # (R,), (G, 4)
    fours = Fours(BETA, logps[drawn].sum(1).exp(), logps[drawn], (ours - theirs)[drawn],
                  (ours < 0)[drawn].double(), world.preference[drawn, drawn[:, PARTNER]])
    tokens, inner = token_weights(fours), torch.einsum("itd,jud->ijtu", scores, scores)
    inner = inner[drawn[:, :, None], drawn[:, None, :]]                                     # (G, 4, 4, T, T)
    fours.gram = torch.einsum("gist,gijtu,gjru->gisjr", tokens, inner, tokens).flatten(3).flatten(1, 2)

    def gradient_with(weight):
        def gradient(coefs):
            of_tokens = torch.einsum("g,gis,gist->git", weight, coefs, tokens).flatten(0, 1)
            of_tokens = torch.zeros_like(ours).index_add(0, drawn.flatten(), of_tokens)     # (R, T)
            return of_tokens.flatten() @ scores.flatten(0, 1)
        return gradient

    truth = {route: world.exact_gradient(route, "sigmoid") for route in ROUTES}
    results = measure(fours, rows_of(fours), gradient_with(fours.weight), truth)
    end = logps.exp().cumsum(0)
    start = end - logps.exp()                                       # a response is drawn at v in start … end
    joint = (torch.minimum(end[:, None], 1 - start) - torch.maximum(start[:, None], 1 - end)).clamp(min=0)
    pairs = replace(fours, weight=joint[tuple(drawn.T[:2])] * joint[tuple(drawn.T[2:])])
    antithetic = {(route, "antithetic pairs, running mean"): estimators(pairs, route)["running mean"]
                  for route in ROUTES}
    return results | measure(pairs, antithetic, gradient_with(pairs.weight), truth)


def main():
    """`python experiments/noise.py`."""
    torch.set_num_threads(1)
    results = enumerated()
    for route in ROUTES:
        print(f"\n| {route.upper()} | standard deviation of one pair's gradient | cosine with ∇J |")
        print("|---|---|---|")
        for (own, name), (std, cosine) in results.items():
            if own == route:
                print(f"| {name} | {std:.1f} | {cosine:.2f} |")


if __name__ == "__main__":
    main()
