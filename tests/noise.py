"""How noisy, and how biased, estimators of ∇J are: one pair of responses at a time, sigmoid utility, PP and PR.

    python tests/noise.py                       # minutes on one core; prints two tables, writes JSON and the picture
    python tests/noise.py --groups 400          # quicker, with wider intervals

∇J is the whole gradient, T1 + T2 + T3 with coefficients 1. With s_1, s_2 the scores ∇log π(y) of a pair's
responses, F its utility and c the weight that T1 and T3 put on s_1 − s_2, every estimator is

    (F − b_1)·s_1 + (F − b_2)·s_2 + c·(s_1 − s_2).

Rows. "Label drawn": F and c are those of a drawn label, else their mean over both. T2's baseline b is
  none                     0. With the label drawn this is the paper's letter
  other 7 pairs            the mean F of the other pairs in a batch of 8
  running mean             of the F of past steps, rate 0.1, 15 pairs a step, as sail.py does it; "best constant": the
                           constant of least variance
  prompt's other pair      F of a second pair to the same prompt
  per token                for token t of a response, the F that the pair would have if that response ended before t;
                           PR does not know the label then and takes both as equally likely
  3 or 4 responses         the mean over all their pairs, --num-responses. "Own pairs left out": the baseline of s_i is
                           the mean F of the pairs without i. "Per token" is averaged over the opponents
  antithetic pair          y_2 by the inverse CDF at 1 − v, y_1's being at v. The two are no longer independent: biased
  T2 as F/log π            the authors' public code adds T2 with the weight F/log π(y), without a baseline: biased
A std is that of one pair's gradient, of two responses' worth: that of K responses' mean over pairs, times √(K/2).

Two policies. *Enumerated*: the fifteen-response GPT-2 of test_enumeration.py, unrelated to its reference, β 0.7, soft
labels; sums over all pairs, triples, quadruples and labels, so nothing is estimated. *Toy*: the toy's SFT model as
reference, and as policy that model after 40 steps of online DPO, β 0.1, labels by the toy's reward; and the SFT model
itself, where u = 0, so that PP has no gradient and a constant baseline leaves T2 without noise. Four responses per
prompt are sampled; the truth is the mean, over another and larger sample, of four responses with baselines per token.
Intervals: 95 %, jackknife over ten blocks of both samples. Cosine and bias of the mean are corrected for the
sampling noise in the squared norms, so a cosine may pass 1; it is left out where the mean's norm is within its noise.
"""
import argparse
import itertools
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
PAPER, DEFAULT = "no baseline, label drawn", "running mean"
COLOURS = {"none": "#D55E00", "pairs": "#0072B2", "token": "#009E73", "biased": "#CC79A7"}          # Okabe and Ito
DRAWN = {                                                           # rows of the picture: text, family
    PAPER: ("no baseline, label drawn: the paper's letter", "none"),
    "no baseline": ("no baseline", "none"),
    "other 7 pairs, label drawn": ("mean of the other 7 pairs, label drawn", "pairs"),
    "other 7 pairs": ("mean of the other 7 pairs", "pairs"),
    DEFAULT: ("running mean: the default", "pairs"),
    "best constant": ("best constant", "pairs"),
    "prompt's other pair": ("prompt's other pair", "pairs"),
    "per token": ("per token", "token"),
    "4 responses, running mean": ("4 responses, running mean", "pairs"),
    "4 responses, own pairs left out": ("4 responses, own pairs left out", "pairs"),
    "4 responses, per token": ("4 responses, per token", "token"),
    "antithetic pair, running mean": ("antithetic pair, running mean", "biased"),
    "T2 as F/log π, label drawn": ("T2 as F / log π(y), label drawn", "biased")}


@dataclass
class Groups:
    """G groups of K responses, each group to one prompt, and what the estimators need to know of them.

    A group's gradients are combinations of 5K vectors: for each response its score, and its tokens' scores summed with
    the baseline per token as weights: PP's and PR's against its partner, PP's and PR's averaged over all others."""
    beta: float
    weight: torch.Tensor              # (G,) probability, or 1/G in a sample
    logps: torch.Tensor               # (G, K)
    ratios: torch.Tensor              # (G, K, T) log π/π_ref of each token, 0 where there is none
    mask: torch.Tensor                # (G, K, T)
    preference: torch.Tensor          # (G, K, K) the reward's P(i ≻ j)
    blocks: int = 1
    gram: torch.Tensor = None         # (G, 5K, 5K) inner products of the vectors

    def mean(self, values):
        return (self.weight * values).sum().item()

    def block_means(self, values):                                  # (G,) -> (blocks,)
        return (self.weight * values).view(self.blocks, -1).sum(1) * self.blocks

    def utility_and_weight(self, route, label=None):
        """(F, c) of every pair, (G, K, K) each; label: that of (i ≻ j), None for the mean over both."""
        reward = self.beta * self.ratios.sum(-1)
        u = reward[:, :, None] - reward[:, None, :]
        p = torch.sigmoid(u) if route == "pp" else self.preference
        p = p if label is None else torch.full_like(u, label)
        T3 = float(route == "pp")
        c = p * (1 + T3 * F.logsigmoid(u)) * torch.sigmoid(-u) - (1 - p) * (1 + T3 * F.logsigmoid(-u)) * torch.sigmoid(u)
        return expected_utility(u, p), self.beta * c

    def token_weights(self):
        """The weights of a response's tokens in its five vectors, (G, K, 5, T)."""
        K = self.logps.shape[1]
        partner = F.one_hot(torch.tensor({2: [1, 0], 3: [1, 2, 0], 4: [1, 0, 3, 2]}[K]), K)
        others = (1 - torch.eye(K)) / (K - 1)
        before = self.ratios.cumsum(-1) - self.ratios               # log-ratio of the tokens before t
        u = self.beta * (before[:, :, None] - self.ratios.sum(-1)[:, None, :, None])         # (G, K, K, T)
        known = {"pp": expected_utility(u, torch.sigmoid(u)), "pr": expected_utility(u, torch.full_like(u, 0.5))}
        return torch.stack([self.mask] + [torch.einsum("gijt,ij->git", known[route], opponents.to(u.dtype)) * self.mask
                                          for opponents in (partner, others) for route in ROUTES], 2)


class Estimator(NamedTuple):
    """The gradient Σ coefs·vectors − b·scores, where the constant b has a mean and a variance of its own."""
    groups: object                    # which Groups: 2, 3, 4 or "antithetic"
    outcomes: list                    # [(probability (G,), coefs (G, K, 5))], one for each label
    b: float = 0.0                    # None: the best constant
    variance: float = 0.0


def expected_utility(u, p):
    return p * F.logsigmoid(u) + (1 - p) * F.logsigmoid(-u)


def vectors(scores, token=None, weight=0.0):
    """Coefficients of the scores, (G, K), and one weight for the vectors numbered `token` -> (G, K, 5)."""
    coefs = F.pad(scores[..., None], (0, 4))
    if token is not None:
        coefs[..., token] = weight
    return coefs


def scores_of(groups):
    """What a constant baseline multiplies: the mean over pairs of s_i + s_j, (G, K, 5)."""
    return vectors(torch.full_like(groups.logps, 2 / groups.logps.shape[1]))


def estimators(all_groups, route):
    """{name: Estimator} for those of the rows that all_groups, {2: Groups, …}, has the groups for."""
    found, pp_or_pr = {}, ROUTES.index(route)
    for key, groups in all_groups.items():
        K, always = groups.logps.shape[1], torch.ones_like(groups.weight)
        utility, c = groups.utility_and_weight(route)
        utility = utility * (1 - torch.eye(K))                      # no response is paired with itself
        each, mean = 2 / K * (utility + c).sum(2) / (K - 1), utility.sum((1, 2)) / (K * (K - 1))
        b, variance = groups.mean(mean), groups.mean(mean**2) - groups.mean(mean)**2
        summed = [(always, vectors(each))]
        running = Estimator(key, summed, b, variance / 15 * 0.1 / 1.9)
        if key == "antithetic":
            found["antithetic pair, running mean"] = running
        elif K == 2:
            p = (groups.preference if route == "pr" else expected_label(groups))[:, 0, 1]
            drawn, authors, second = [], [], 0.0
            for label, probability in ((1.0, p), (0.0, 1 - p)):
                f, weight = (x[:, :1, 1] for x in groups.utility_and_weight(route, label))           # (G, 1)
                T1_T3 = torch.cat([weight, -weight], 1)
                drawn.append((probability, vectors(f + T1_T3)))
                authors.append((probability, vectors(f / groups.logps + T1_T3)))
                second += groups.mean(probability * f[:, 0]**2)
            found.update({
                PAPER: Estimator(2, drawn), "no baseline": Estimator(2, summed),
                "other 7 pairs, label drawn": Estimator(2, drawn, b, (second - b**2) / 7),
                "other 7 pairs": Estimator(2, summed, b, variance / 7), DEFAULT: running,
                "best constant": Estimator(2, summed, None),
                "per token": Estimator(2, [(always, vectors(each, 1 + pp_or_pr, -1))]),
                "T2 as F/log π, label drawn": Estimator(2, authors)})
        else:
            left_out = (utility.sum((1, 2))[:, None] - 2 * utility.sum(2)) / ((K - 1) * (K - 2))
            found.update({
                f"{K} responses, running mean": running,
                f"{K} responses, own pairs left out": Estimator(K, [(always, vectors(each - 2 / K * left_out))]),
                f"{K} responses, per token": Estimator(K, [(always, vectors(each, 3 + pp_or_pr, -2 / K))])})
        if key == 4:
            first, second = utility[:, 0, 1, None], utility[:, 2, 3, None]
            weight = torch.stack([c[:, 0, 1], -c[:, 0, 1], c[:, 2, 3], -c[:, 2, 3]], 1)
            T2 = torch.cat([first - second] * 2 + [second - first] * 2, 1)
            found["prompt's other pair"] = Estimator(4, [(always, vectors((T2 + weight) / 2))])
    return found


def expected_label(groups):
    reward = groups.beta * groups.ratios.sum(-1)
    return torch.sigmoid(reward[:, :, None] - reward[:, None, :])


def expected_coefs(estimator):
    return sum(probability[:, None, None] * coefs for probability, coefs in estimator.outcomes)


def measure(all_groups, project, truth):
    """{route: {name: figures}}. project: a list of (groups' key, coefs) -> mean gradients (list, blocks, D), and the
    Gram matrices are there then; truth: route -> (blocks, D), ∇J or the block means of an estimate of it."""
    rows = {(route, name): row for route in ROUTES for name, row in estimators(all_groups, route).items()}
    wanted = [(row.groups, expected_coefs(row)) for row in rows.values()]
    means = project(wanted + [(key, scores_of(groups)) for key, groups in all_groups.items()])
    scores = dict(zip(all_groups, means[len(rows):]))
    results = {route: {} for route in ROUTES}
    for ((route, name), row), mean in zip(rows.items(), means):
        groups = all_groups[row.groups]

        def inner(one, other):                                      # (G, K, 5) × 2 -> (G,)
            return torch.einsum("gv,gvw,gw->g", one.flatten(1), groups.gram, other.flatten(1))

        constant = scores_of(groups)
        b = row.b if row.b is not None else (groups.mean(inner(expected_coefs(row), constant))
                                             / groups.mean(inner(constant, constant)))
        second = row.variance * inner(constant, constant) + sum(
            probability * inner(coefs - b * constant, coefs - b * constant) for probability, coefs in row.outcomes)
        results[route][name] = {"b": b, **figures(groups.block_means(second), mean - b * scores[row.groups],
                                                  truth(route), math.sqrt(groups.logps.shape[1] / 2))}
    return results


def figures(second, mean, truth, scale):
    """Std, cosine and bias with half-widths, from block means of |g|² (B,), of g (B, D) and of the truth (B, D)."""
    n, blocks = len(mean), torch.cat([mean, truth]).double()
    gram = blocks @ blocks.T

    def square(chosen):                                             # |mean|²; blocks' own noise is in the diagonal
        part = gram[chosen][:, chosen]
        return part if len(chosen) == 1 else (part.sum() - part.trace()) / (len(chosen) * (len(chosen) - 1))

    def of(own, other):                                             # variance, squared norms, cosine, bias²
        own2, truth2, dot = square(own), square(other), gram[own][:, other].mean()
        return torch.stack([x.squeeze() for x in (
            (second[own].mean() - own2).clamp(min=0).sqrt() * scale, own2, dot / (own2 * truth2).sqrt(),
            (own2 + truth2 - 2 * dot) / truth2)])

    ours, theirs = list(range(n)), list(range(n, len(gram)))
    std, own2, cosine, bias2 = of(ours, theirs).tolist()
    half = torch.zeros(4)
    if n > 1:
        without = [torch.stack([of([i for i in ours if i != b], theirs) for b in ours]),
                   torch.stack([of(ours, [i for i in theirs if i != b]) for b in theirs])]
        half = T_QUANTILE * sum((len(x) - 1)**2 / len(x) * x.var(0) for x in without).sqrt()
    error2 = ((mean.mean(0) - truth.mean(0)).double().norm()**2 / square(theirs)).item()
    nothing = square(theirs) < 1e-10                                # ∇J = 0
    return {"std": std if std > 1e-6 else 0.0, "std_half": half[0].item(),
            "cosine": None if nothing or own2 <= half[1] else cosine, "cosine_half": half[2].item(),
            "error": None if nothing else math.sqrt(error2),        # relative, of this sample's mean, …
            "sampling": None if nothing else math.sqrt(max(0, error2 - bias2)),              # … and sampling's part
            "bias": None if nothing else [math.sqrt(max(0, bias2 + sign * half[3].item())) for sign in (-1, 1)]}


def enumerated():
    """Every figure of the fifteen-response world, exact."""
    world, places, token_logps, token_scores = World(), {}, [], []
    for y in world.responses:                                       # the scores of single tokens, 21 in all
        for t, token in enumerate(y):
            if (*y[:t], token) not in places:
                places[(*y[:t], token)] = len(places)
                logps = [model(torch.tensor([[*PROMPT, *y[:t]]])).logits[0, -1].log_softmax(-1)[token]
                         for model in (world.policy, world.reference)]
                token_scores.append(flat_gradient(logps[0], world.policy))
                token_logps.append(torch.stack(logps).detach())
    logps, scores = torch.stack(token_logps), torch.stack(token_scores).double()             # (21, 2), (21, D)
    used = torch.zeros(len(world.responses), 3, len(places), dtype=torch.float64)             # (R, T, 21)
    for i, y in enumerate(world.responses):
        for t in range(len(y)):
            used[i, t, places[tuple(y[:t + 1])]] = 1
    ours, ratios, mask = (used @ logps[:, 0]).sum(1), used @ (logps[:, 0] - logps[:, 1]), used.sum(-1)
    end = ours.exp().cumsum(0)
    start = end - ours.exp()                                        # response i is drawn where v is in start … end
    antithetic = (torch.minimum(end[:, None], 1 - start) - torch.maximum(start[:, None], 1 - end)).clamp(min=0)
    all_groups, basis = {}, {}
    for key in (2, 3, 4, "antithetic"):
        K = 2 if key == "antithetic" else key
        drawn = torch.tensor(list(itertools.product(range(len(world.responses)), repeat=K)))
        weight = antithetic.flatten() if key == "antithetic" else ours[drawn].exp().prod(1)
        groups = all_groups[key] = Groups(BETA, weight, ours[drawn], ratios[drawn], mask[drawn],
                                          world.preference[drawn[:, :, None], drawn[:, None, :]])
        basis[key] = torch.einsum("gkst,gktv->gksv", groups.token_weights(), used[drawn])    # (G, K, 5, 21)
        tokens = basis[key].flatten(1, 2)
        groups.gram = tokens @ (scores @ scores.T) @ tokens.mT

    def mean(key, coefs, weight=None):
        weight = all_groups[key].weight if weight is None else weight
        return torch.einsum("g,gks,gksv->v", weight, coefs, basis[key]) @ scores             # (D,)

    check_against_the_training_step(world, all_groups, mean)
    return measure(all_groups, lambda wanted: torch.stack([mean(*each)[None] for each in wanted]),
                   lambda route: world.exact_gradient(route, "sigmoid")[None])


def check_against_the_training_step(world, all_groups, mean):
    """The paper's letter and the default, pair by pair under random weights, are what training back-propagates."""
    weights = torch.rand(len(world.responses)**2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for route in ROUTES:
        rows = estimators(all_groups, route)
        for name, label in ((PAPER, "sampled"), (DEFAULT, "expected")):
            weighted, total = [], 0
            for (probability, coefs), draw in zip(rows[name].outcomes, (0.0, 1 - 1e-12)):
                total = total + mean(2, coefs - rows[name].b * scores_of(all_groups[2]), weights * probability)
                weighted += [(weight, world.pair(i, j, route, draw))
                             for weight, (i, j) in zip(weights * probability, world.all_pairs())]
            trained = world.back_propagated(weighted, "sigmoid", rows[name].b, label)
            assert relative_error(total, trained) < 1e-9, (route, name)


class Toy:
    """Samples of a toy policy, and their gradients."""

    def __init__(self, policy):
        self.policy, self.tokenizer = load_policy(policy)
        self.reference, _ = load_policy(toy_checkpoint())
        self.parameters = list(self.policy.parameters())
        self.examples, _ = encode(load_pairs("toy")[0], self.tokenizer, end_token_ids(self.tokenizer), 8, 24)

    def token_logps(self, model, ids):
        """log π of every token but the first, (B, T−1). Padding stands on the right, where no token sees it."""
        return model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

    def draw(self, n):
        """n groups of four responses to random training prompts: (Groups, ids (4n, T))."""
        chosen = [self.examples[i] for i in torch.randint(len(self.examples), (n,)).tolist()]
        responses, _ = sample(self.policy, self.tokenizer, [each["prompt_ids"] for each in chosen], 24, 4,
                              batch_size=256)
        pairs = [(each, y) for each, four in zip(chosen, responses) for y in four]
        ids, _, mask = collate([each["prompt_ids"] for each, _ in pairs], [y for _, y in pairs])
        with torch.no_grad():
            ours, theirs = (torch.cat([self.token_logps(model, part) for part in ids.split(512)]) * mask[:, 1:]
                            for model in (self.policy, self.reference))
        reward = torch.tensor(toy_reward([each["prompt"] for each, _ in pairs],
                                         [response_text(self.tokenizer, y) for _, y in pairs])).view(n, 4)
        preference = 0.5 + 0.5 * torch.sign(reward[:, :, None] - reward[:, None, :])
        by_group = [x.double().view(n, 4, -1) for x in (ours, ours - theirs, mask[:, 1:])]
        one = {"prompt_ids": chosen[0]["prompt_ids"], "chosen_ids": responses[0][0], "rejected_ids": responses[0][1]}
        with torch.no_grad():                                       # the same log-probabilities as training's
            torch.testing.assert_close(pair_logps(self.policy, [one])[:, 0].double(), by_group[0][0, :2].sum(-1),
                                       rtol=1e-4, atol=1e-4)
        return Groups(0.1, torch.full((n,), 1 / n).double(), by_group[0].sum(-1), *by_group[1:], preference.double(),
                      BLOCKS), ids

    def truth(self, n):
        """{route: block means of an estimate of ∇J, (BLOCKS, D)} from n groups: one backward for many of them."""
        means = {route: [] for route in ROUTES}
        for _ in tqdm(range(BLOCKS), "truth", leave=False, disable=None):
            sums, parts = dict.fromkeys(ROUTES, 0), max(1, n // BLOCKS // 200)
            for _ in range(parts):
                groups, ids = self.draw(n // BLOCKS // parts)
                tokens, logps = groups.token_weights(), self.token_logps(self.policy, ids)
                for route in ROUTES:
                    coefs = expected_coefs(estimators({4: groups}, route)["4 responses, per token"])
                    weights = torch.einsum("gks,gkst->gkt", coefs, tokens).flatten(0, 1) / len(coefs)
                    sums[route] = sums[route] + self.gradient((weights.float() * logps).sum()) / parts
            for route in ROUTES:
                means[route].append(sums[route])
        return {route: torch.stack(means[route]) for route in ROUTES}

    def gradient(self, value, weights=None):
        """∇value, (D,); or for value (T,) and weights (5, T) the five weighted sums' gradients, (5, D)."""
        gradients = torch.autograd.grad(value, self.parameters, weights, retain_graph=True,
                                        is_grads_batched=weights is not None)
        return torch.cat([g.flatten(1) if weights is not None else g.flatten() for g in gradients], -1)

    def measure(self, n):
        """All figures from n groups, 2n pairs, and a truth from as many as three times that."""
        four, ids = self.draw(n)
        in_pairs = [x.unflatten(1, (2, 2)).flatten(0, 1) for x in (four.logps, four.ratios, four.mask)]
        two = Groups(0.1, four.weight.repeat_interleave(2) / 2, *in_pairs, torch.stack(
            [four.preference[:, :2, :2], four.preference[:, 2:, 2:]], 1).flatten(0, 1), BLOCKS)
        all_groups = {2: two, 4: four}

        def project(wanted):
            """Fills in the Gram matrices. A pair's coefficients stand for half a group's."""
            coefs = torch.stack([c if key == 4 else c.view(n, 4, 5) / 2 for key, c in wanted], 1).flatten(2).float()
            tokens, grams = four.token_weights().float(), []
            means = torch.zeros(BLOCKS, len(wanted), sum(p.numel() for p in self.parameters))
            for g in tqdm(range(n), "groups", leave=False, disable=None):
                basis = []
                for k in range(4):
                    length = int(four.mask[g, k].nonzero().max()) + 1
                    logps = self.token_logps(self.policy, ids[4 * g + k, None, :length + 1])[0]
                    basis.append(self.gradient(logps, tokens[g, k, :, :length]))
                basis = torch.cat(basis)                                                    # (20, D)
                grams.append(basis @ basis.T)
                means[g * BLOCKS // n].addmm_(coefs[g], basis, alpha=BLOCKS / n)
            four.gram = torch.stack(grams).double()
            two.gram = torch.stack([four.gram[:, :10, :10], four.gram[:, 10:, 10:]], 1).flatten(0, 1)
            return means.transpose(0, 1)

        return measure(all_groups, project, self.truth(3 * n).__getitem__)
