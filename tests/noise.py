"""How noisy, and how biased, estimators of ∇J are: routes PP and PR, sigmoid utility, one pair of responses at a time.

    python tests/noise.py                       # minutes on one core; prints two tables, writes JSON and the picture
    python tests/noise.py --groups 400          # quicker, with wider intervals

∇J is the whole gradient, T1 + T2 + T3 with coefficients 1. With s_1, s_2 the scores ∇log π(y) of a pair's responses,
F its utility and c the weight that T1 and T3 give to s_1 − s_2, every estimator is

    (F − b_1)·s_1 + (F − b_2)·s_2 + c·(s_1 − s_2).

F and c are means over both labels, or, "label drawn", those of one label that is drawn. The rows are T2's baselines b:
  none                    0; with the label drawn, the paper's letter
  other 7 pairs           the mean F of the other pairs in a batch of 8
  running mean            of past steps' F, at the rate 0.1 with 15 pairs a step, as in sail.py
  best constant           the one of least variance
  prompt's other pair     F of a second pair of responses to the same prompt
  per token               for token t of a response, the F that there would be had it ended before t; PR, whose label is
                          not known then, takes both labels as equally likely
  4 responses             the mean over all pairs of them, as with --num-responses 4. "Own pairs left out": b_i is the
                          mean F of the pairs without response i. "Per token" is averaged over the opponents
and two that are biased: antithetic pairs, with y_2 by the inverse CDF at 1 − v where y_1's is at v, so that the two are
not independent; and the authors' public code, which adds T2 as F/log π(y) without a baseline.
A std is that of one pair's gradient: that of the mean over four responses, two pairs or all six, times √2.

Enumerated: the fifteen-response GPT-2 of test_enumeration.py, unrelated to its reference, β 0.7, soft labels. All sums
are over all fours and labels: nothing is estimated. Toy: the toy's SFT model is the reference; the policy is what 40
steps of online DPO make of it, or it itself: then u = 0, PP has no gradient, and constant baselines leave T2 no noise.
β 0.1, labels by the toy's reward, fours sampled for random training prompts. "Error" is that of the mean over the
sample, relative to ∇J; "alone" is what sampling alone gives. ∇J there is the mean, over three times as many other fours,
of "4 responses, per token". Intervals: 95 %, jackknife over ten blocks of both samples. Cosines are corrected for the
sampling noise in both norms, so they may pass 1; one that the sample does not determine to ± 0.5 is left out.
"""
import argparse
import itertools
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import collate, encode, load_pairs
from generate import end_token_ids, load_policy, response_text, sample, toy_checkpoint
from reward import toy_reward
from sail import pair_logps
from test_enumeration import BETA, PROMPT, World, flat_gradient, relative_error

ROUTES, BLOCKS, T_QUANTILE = ("pp", "pr"), 10, 2.26                 # of t with nine degrees of freedom
PAPER, DEFAULT, SMOOTHEST = "no baseline, label drawn", "running mean", "4 responses, per token"
TOY_POLICY = Path("runs/noise")                                     # trained on first use
SELF, PARTNER, OTHER = [0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1]     # four responses make the pairs (0, 1) and (2, 3)


@dataclass
class Fours:
    """G groups of four independent responses to one prompt. T: tokens."""
    beta: float
    weight: torch.Tensor              # (G,) the group's probability, or 1/G in a sample
    logps: torch.Tensor               # (G, 4) log π
    ratios: torch.Tensor              # (G, 4, T) log π/π_ref of each token, 0 where there is none
    mask: torch.Tensor                # (G, 4, T)
    preference: torch.Tensor          # (G, 4, 4) the reward's P(i ≻ j)
    gram: torch.Tensor = None         # (G, 20, 20) inner products of the vectors that token_weights defines

    def mean(self, values):
        return (self.weight * values).sum().item()

    def inner(self, one, other):
        """Inner products of two gradients given by coefficients of the vectors, (G, 4, 5) × 2 -> (G,)."""
        return (one.flatten(1) * (self.gram @ other.flatten(1)[..., None])[..., 0]).sum(1)


def expected_utility(u, p):
    return p * F.logsigmoid(u) + (1 - p) * F.logsigmoid(-u)


def token_weights(fours):
    """Gradients are combinations of five vectors per response: its score, and the sums of its tokens' scores times the
    baseline per token, PP's and PR's, against its partner and averaged over all others. Returns (G, 4, 5, T)."""
    before = fours.ratios.cumsum(-1) - fours.ratios                 # log-ratio of the tokens before t
    u = fours.beta * (before[:, :, None] - fours.ratios.sum(-1)[:, None, :, None])          # (G, 4, 4, T)
    weights = [torch.ones_like(before)]
    for opponents in (torch.eye(4)[PARTNER], (1 - torch.eye(4)) / 3):
        for p in (torch.sigmoid(u), torch.full_like(u, 0.5)):
            weights.append(torch.einsum("gijt,ij->git", expected_utility(u, p), opponents.to(u.dtype)))
    return torch.stack(weights, 2) * fours.mask[:, :, None]


def estimators(fours, route):
    """{row: (outcomes, b, variance of b)}. outcomes: [(probability (G,), coefficients (G, 4, 5))] for every label that
    can be drawn, without the constant baseline b, which is told apart; b None: the best constant."""
    reward, self_labelled = fours.beta * fours.ratios.sum(-1), float(route == "pp")
    u = reward[:, :, None] - reward[:, None, :]                     # (G, 4, 4)
    preference = torch.sigmoid(u) if self_labelled else fours.preference
    always, slot = torch.ones_like(fours.weight), 1 + ROUTES.index(route)

    def utility_and_weight(p):                                      # F and c of all pairs, c_ij on s_i, (G, 4, 4)
        T3, T3_swapped = self_labelled * F.logsigmoid(u), self_labelled * F.logsigmoid(-u)
        return expected_utility(u, p), fours.beta * (p * (1 + T3) * torch.sigmoid(-u)
                                                     - (1 - p) * (1 + T3_swapped) * torch.sigmoid(u))

    def of_scores(coefs, token=0, weight=0.0):                      # (G, 4), and one weight for the vectors `token`
        coefs = F.pad(coefs[..., None], (0, 4))
        coefs[..., token] += weight
        return coefs

    def drawn(coefs_of):                                            # coefs_of: F, c of the two pairs -> (G, 4)
        coefs = [coefs_of(*(x[:, SELF, PARTNER] for x in utility_and_weight(torch.full_like(u, label))))
                 for label in (0.0, 1.0)]
        chance = torch.stack([1 - preference, preference])          # (2, G, 4, 4)
        return [(chance[i, :, 0, 1] * chance[j, :, 2, 3], of_scores(torch.cat([coefs[i][:, :2], coefs[j][:, 2:]], 1)))
                for i, j in itertools.product((0, 1), repeat=2)]

    def moments(values):
        return fours.mean(values), fours.mean(values**2) - fours.mean(values)**2

    utility, c = utility_and_weight(preference)
    f, weight = utility[:, SELF, PARTNER], c[:, SELF, PARTNER]      # of the two pairs, (G, 4)
    pairs, (b, variance) = (f + weight) / 2, moments(f[:, 0])       # a half: the mean over two pairs
    drawn_f = preference[:, 0, 1] * F.logsigmoid(u[:, 0, 1])**2 + (
        1 - preference[:, 0, 1]) * F.logsigmoid(-u[:, 0, 1])**2     # the mean square
    utility = utility * (1 - torch.eye(4))                          # no response is paired with itself
    all_pairs, (b_of_all, variance_of_all) = (utility + c).sum(2) / 6, moments(utility.sum((1, 2)) / 12)
    left_out = (utility.sum((1, 2))[:, None] - 2 * utility.sum(2)) / 6
    letter, running = drawn(lambda f, c: (f + c) / 2), 0.1 / 1.9 / 15           # Var(running mean) / Var(F)
    return {
        PAPER: (letter, 0.0, 0.0),
        "no baseline": ([(always, of_scores(pairs))], 0.0, 0.0),
        "other 7 pairs, label drawn": (letter, b, (fours.mean(drawn_f) - b**2) / 7),
        "other 7 pairs": ([(always, of_scores(pairs))], b, variance / 7),
        DEFAULT: ([(always, of_scores(pairs))], b, running * variance),
        "best constant": ([(always, of_scores(pairs))], None, 0.0),
        "prompt's other pair": ([(always, of_scores(pairs - f[:, OTHER] / 2))], 0.0, 0.0),
        "per token": ([(always, of_scores(pairs, slot, -0.5))], 0.0, 0.0),
        "4 responses, running mean": ([(always, of_scores(all_pairs))], b_of_all, running * variance_of_all),
        "4 responses, own pairs left out": ([(always, of_scores(all_pairs - left_out / 2))], 0.0, 0.0),
        SMOOTHEST: ([(always, of_scores(all_pairs, slot + 2, -0.5))], 0.0, 0.0),
        "T2 as F / log π(y), label drawn": (drawn(lambda f, c: (f / fours.logps + c) / 2), 0.0, 0.0)}


def expected(outcomes):
    return sum(probability[:, None, None] * coefs for probability, coefs in outcomes)


def measure(fours, rows, project, truth):
    """{row: figures}. project: [coefficients] -> block means of these gradients (rows, B, D); it fills in fours.gram.
    truth: ∇J, (1, D), or block means of an estimate of it (B, D)."""
    scores = F.pad(torch.full_like(fours.logps, 0.5)[..., None], (0, 4))        # what a constant baseline multiplies
    *means, mean_score = project([expected(outcomes) for outcomes, _, _ in rows.values()] + [scores])
    results = {}
    for (name, (outcomes, b, variance)), mean in zip(rows.items(), means):
        if b is None:
            b = fours.mean(fours.inner(expected(outcomes), scores)) / fours.mean(fours.inner(scores, scores))
        square = variance * fours.inner(scores, scores)             # E|g|² over the labels, (G,)
        for probability, coefs in outcomes:
            square = square + probability * fours.inner(coefs - b * scores, coefs - b * scores)
        square = (fours.weight * square).view(len(mean), -1).sum(1) * len(mean)             # block means, (B,)
        results[name] = figures(square, mean - b * mean_score, truth)
    return results


def figures(square, mean, truth):
    """Std, cosine, error and error from sampling alone, and intervals' half-widths, from block means of |g|² (B,),
    of g (B, D) and of the truth (B, D). A single block is exact."""
    both = torch.cat([mean, truth]).double()
    gram = both @ both.T

    def norm2(chosen):                                              # of the mean; a block's own noise is in the diagonal
        part, n = gram[chosen][:, chosen], len(chosen)
        return part.sum() if n == 1 else (part.sum() - part.trace()) / (n * (n - 1))

    def of(own, other):
        dot, size = gram[own][:, other].mean(), norm2(other).clamp(min=1e-30).sqrt()
        error = (both[own].mean(0) - both[other].mean(0)).norm() / size
        bias2 = (norm2(own) + norm2(other) - 2 * dot) / size**2
        return torch.stack([(square[own].mean() - norm2(own)).clamp(min=0).sqrt() * math.sqrt(2),
                            dot / norm2(own).sqrt() / size, error, (error**2 - bias2).clamp(min=0).sqrt()])

    own, other = list(range(len(mean))), list(range(len(mean), len(both)))
    std, cosine, error, alone = of(own, other).tolist()
    half = torch.zeros(4)
    if len(own) > 1:
        left_out = ([of([i for i in own if i != b], other) for b in own],
                    [of(own, [i for i in other if i != b]) for b in other])
        half = T_QUANTILE * sum((len(x) - 1)**2 / len(x) * torch.stack(x).var(0) for x in left_out).sqrt()
    result = {"std": std if std > 1e-6 else 0.0, "std_half": half[0].item()}
    if norm2(other) > 1e-10:                                        # else ∇J = 0
        result.update(error=error, error_half=half[2].item(), alone=alone)
        if half[1] < 0.5:                                           # not so if nan
            result.update(cosine=cosine, cosine_half=half[1].item())
    return result


def enumerated():
    """{route: {row: figures}} of the fifteen-response world, exact."""
    world, places, logps, scores = World(), {}, [], []
    for y in world.responses:                                       # single tokens after their prefix: 21 in all
        for t in range(len(y)):
            if tuple(y[:t + 1]) not in places:
                places[tuple(y[:t + 1])] = len(places)
                ours, theirs = (model(torch.tensor([[*PROMPT, *y[:t]]])).logits[0, -1].log_softmax(-1)[y[t]]
                                for model in (world.policy, world.reference))
                logps.append((ours.item(), theirs.item()))
                scores.append(flat_gradient(ours, world.policy))
    logps, scores = torch.tensor(logps, dtype=torch.float64), torch.stack(scores)           # (21, 2), (21, D)
    used = torch.zeros(len(world.responses), 3, len(places), dtype=torch.float64)            # (R, T, 21)
    for i, y in enumerate(world.responses):
        used[i, range(len(y)), [places[tuple(y[:t + 1])] for t in range(len(y))]] = 1
    drawn = torch.tensor(list(itertools.product(range(len(used)), repeat=4)))                # (G, 4)
    log_p = (used @ logps[:, 0]).sum(1)
    end, start = log_p.exp().cumsum(0), log_p.exp().cumsum(0) - log_p.exp()     # a response is drawn at v in start … end
    antithetic = (torch.minimum(end[:, None], 1 - start) - torch.maximum(start[:, None], 1 - end)).clamp(min=0)
    fours = Fours(BETA, log_p[drawn].exp().prod(1), log_p[drawn], (used @ (logps[:, 0] - logps[:, 1]))[drawn],
                  used.sum(-1)[drawn], world.preference[drawn[:, :, None], drawn[:, None, :]])
    basis = torch.einsum("gkst,gktv->gksv", token_weights(fours), used[drawn]).flatten(1, 2)          # (G, 20, 21)
    fours.gram = basis @ (scores @ scores.T) @ basis.mT

    def mean(weight, coefs):
        return torch.einsum("g,gi,giv->v", weight, coefs.flatten(1), basis) @ scores        # (D,)

    def project_with(weight):
        return lambda wanted: torch.stack([mean(weight, coefs)[None] for coefs in wanted])

    def of_pairs(probability):                                      # of (0, 1) and (2, 3), independently
        return probability[drawn[:, 0], drawn[:, 1]] * probability[drawn[:, 2], drawn[:, 3]]

    results = {}
    for route in ROUTES:
        check_against_training(world, route, estimators(fours, route), lambda p, coefs: mean(of_pairs(p), coefs))
        truth = world.exact_gradient(route, "sigmoid")[None]
        results[route] = measure(fours, estimators(fours, route), project_with(fours.weight), truth)
        other = replace(fours, weight=of_pairs(antithetic))
        rows = {"antithetic pairs, running mean": estimators(other, route)[DEFAULT]}
        results[route].update(measure(other, rows, project_with(other.weight), truth))
    return results


def check_against_training(world, route, rows, mean):
    """The paper's letter and the default are, under random weights of the pairs, what the training step
    back-propagates. mean: weights (R, R) and coefficients -> gradient."""
    probability = torch.rand(world.preference.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probability /= probability.sum()
    label = world.label_probability(route, "sigmoid").detach()
    for name, b in ((PAPER, 0.0), (DEFAULT, rows[DEFAULT][1])):
        halves = F.pad(torch.full_like(rows[name][0][0][1][..., :1], 0.5), (0, 4))
        weighted = [(probability[i, j] * chance, world.pair(i, j, route, draw)) for i, j in world.all_pairs()
                    for draw, chance in ((0.0, label[i, j]), (1 - 1e-12, 1 - label[i, j]))]
        trained = world.back_propagated(weighted, "sigmoid", b, "sampled" if name == PAPER else "expected")
        assert relative_error(mean(probability, expected(rows[name][0]) - b * halves), trained) < 1e-9


def toy(path, n):
    """{route: {row: figures}} of a toy policy, from n sampled fours."""
    (policy, tokenizer), (reference, _) = load_policy(path), load_policy(toy_checkpoint())
    parameters = list(policy.parameters())
    examples, _ = encode(load_pairs("toy")[0], tokenizer, end_token_ids(tokenizer), 8, 24)

    def token_logps(model, ids):                                    # (B, T) -> (B, T−1); padding is on the right
        return model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

    def gradient(value, weights=None):                              # (D,); for value (T,), weights (5, T): (5, D)
        several = weights is not None
        gradients = torch.autograd.grad(value, parameters, weights, retain_graph=True, is_grads_batched=several)
        return torch.cat([each.flatten(int(several)) for each in gradients], -1)

    @torch.no_grad()
    def draw(n):                                                    # (Fours, ids (4n, T))
        chosen = [examples[i] for i in torch.randint(len(examples), (n,)).tolist()]
        responses, _ = sample(policy, tokenizer, [each["prompt_ids"] for each in chosen], 24, 4, batch_size=256)
        prompts = [each for each in chosen for _ in range(4)]
        responses = [y for four in responses for y in four]
        ids, _, mask = collate([each["prompt_ids"] for each in prompts], responses)
        ours, theirs = (torch.cat([token_logps(model, part) for part in ids.split(512)]) * mask[:, 1:]
                        for model in (policy, reference))
        pair = {"prompt_ids": prompts[0]["prompt_ids"], "chosen_ids": responses[0], "rejected_ids": responses[1]}
        torch.testing.assert_close(pair_logps(policy, [pair])[:, 0], ours[:2].sum(1), rtol=1e-4, atol=1e-4)
        reward = torch.tensor(toy_reward([each["prompt"] for each in prompts], [
            response_text(tokenizer, y) for y in responses]), dtype=torch.float64).view(n, 4)
        ours, ratios, mask = (x.double().view(n, 4, -1) for x in (ours, ours - theirs, mask[:, 1:]))
        return Fours(0.1, torch.full((n,), 1 / n, dtype=torch.float64), ours.sum(-1), ratios, mask,
                     (1 + torch.sign(reward[:, :, None] - reward[:, None, :])) / 2), ids

    fours, ids = draw(n)
    weights = token_weights(fours).float()

    def project(wanted):
        coefs, grams = torch.stack(wanted, 1).flatten(2).float(), []                        # (G, rows, 20)
        means = torch.zeros(BLOCKS, len(wanted), sum(p.numel() for p in parameters))
        for g in tqdm(range(n), "gradients", leave=False, disable=None):
            basis = []
            for k in range(4):
                length = int(fours.mask[g, k].nonzero().max()) + 1
                logps = token_logps(policy, ids[4 * g + k, None, :length + 1])[0]
                basis.append(gradient(logps, weights[g, k, :, :length]))
            basis = torch.cat(basis)                                                        # (20, D)
            grams.append(basis @ basis.T)
            means[g * BLOCKS // n].addmm_(coefs[g], basis, alpha=BLOCKS / n)
        fours.gram = torch.stack(grams).double()
        return means.transpose(0, 1)

    rows = {(route, name): row for route in ROUTES for name, row in estimators(fours, route).items()}
    truth, parts, size = dict.fromkeys(ROUTES, 0), math.ceil(3 * n / BLOCKS / 200), 200
    truth = {route: torch.zeros(BLOCKS, sum(p.numel() for p in parameters)) for route in ROUTES}
    for block in tqdm(range(BLOCKS * parts), "truth", leave=False, disable=None):
        others, other_ids = draw(size)
        tokens, logps = token_weights(others), token_logps(policy, other_ids)
        for route in ROUTES:
            coefs = expected(estimators(others, route)[SMOOTHEST][0])
            of_tokens = torch.einsum("gks,gkst->gkt", coefs, tokens).flatten(0, 1) / size
            truth[route][block // parts] += gradient((of_tokens.float() * logps).sum()) / parts
    return {route: measure(fours, estimators(fours, route), project, truth[route]) for route in ROUTES}
