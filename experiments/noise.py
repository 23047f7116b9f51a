"""How noisy, and how biased, estimators of ∇J are: routes PP and PR, sigmoid utility, a pair at a time.

    python experiments/noise.py                 # three minutes on one core: tables, JSON and the picture
    python experiments/noise.py --groups 400    # one minute, with wider intervals

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

Enumerated: the fifteen-response GPT-2 of test_enumeration.py, unrelated to its reference, β 0.7, soft labels.
All sums are over all fours and labels: nothing is estimated. Toy: the reference is the toy's SFT model, the
policy is what 40 steps of online DPO make of it, or it itself (then u = 0: PP has no gradient, and constant
baselines leave T2 no noise). β 0.5, soft labels by the toy's reward, fours for random training prompts.
"Error" is that of the whole sample's mean, relative to ∇J, and "alone" what sampling alone gives; ∇J is the
mean of "per token" over three times as many other fours. Intervals: 95 %, jackknife over ten blocks of both
samples; the rows share them. Cosines are corrected for the sampling noise in both norms, so they may pass 1;
one that the sample does not determine to ± 0.5 is left out.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from data import collate
from data import response_text
from generate import load_policy, sample
from test_enumeration import BETA, PROMPT, World, flat_gradient
from toy import TOY_DEFAULTS, toy_prompts, toy_reward

ROUTES, BLOCKS, T_QUANTILE = ("pp", "pr"), 10, 2.26                 # of t with nine degrees of freedom
PAPER, DEFAULT, SMOOTHEST = "no baseline, label drawn", "running mean", "per token"
CAPTIONS = {PAPER: "no baseline, label drawn (paper)", DEFAULT: "running mean (default)",
            "T2 as f / log π(y), label drawn": "T2 as f / log π(y) (authors' code)"}
TOY_POLICY = Path("runs/noise")                                     # trained on first use
ONLINE_DPO = "--variant pr --mix 1 --response-coef 0 --steps 40 --seed 0"
WORLDS = ("enumerated", "toy", "policy = reference")
TITLES = {"enumerated": "enumerated policy: exact", "toy": "toy world: sampled, 95 % intervals"}
BIASED = ("antithetic pairs, running mean", "T2 as f / log π(y), label drawn")
PARTNER, OTHER = [1, 0, 3, 2], [2, 3, 0, 1]                         # four make the pairs (0, 1) and (2, 3)


@dataclass
class Fours:
    """G groups of four independent responses to one prompt. T: tokens."""
    beta: float
    weight: torch.Tensor              # (G,) the group's probability, or 1/G in a sample
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
        PAPER: (drawn(), 0, 0),
        "no baseline": (summed(pairs), 0, 0),
        "other 7 pairs, label drawn": (drawn(), b, variance_drawn / 7),
        "other 7 pairs": (summed(pairs), b, variance / 7),
        "prompt's other pair": (summed(pairs - f[:, OTHER] / 2), 0, 0),
        DEFAULT: (summed(pairs), b, 0.1 / 1.9 / 29 * variance),     # Var(running mean) / Var(f)
        "best constant": (summed(pairs), None, 0),
        SMOOTHEST: (summed(pairs, vector, -0.5), 0, 0),
        "T2 as f / log π(y), label drawn": (drawn(fours.logps), 0, 0)}


def rows_of(fours):
    return {(route, name): row for route in ROUTES for name, row in estimators(fours, route).items()}


def expected(outcomes):
    return sum(probability[:, None, None] * coefs for probability, coefs in outcomes)


def measure(fours, rows, project, truth):
    """{(route, row): figures}. project: [coefficients] -> block means of their gradients, [(B, D)]; it sees
    to fours.gram. truth: {route: ∇J (1, D), or block means of an estimate of it (B, D)}."""
    scores = of_scores(torch.full_like(fours.logps, 0.5))           # what a constant baseline multiplies
    *means, mean_score = project([expected(outcomes) for outcomes, _, _ in rows.values()] + [scores])
    scores2, results = fours.inner(scores, scores), {}
    for (key, (outcomes, b, variance)), mean in zip(rows.items(), means):
        if b is None:
            b = fours.moments(fours.inner(expected(outcomes), scores))[0] / fours.moments(scores2)[0]
        square = variance * scores2                                 # E|g|² over the labels, (G,)
        for probability, coefs in outcomes:
            square = square + probability * fours.inner(coefs - b * scores, coefs - b * scores)
        square = (fours.weight * square).view(len(mean), -1).sum(1) * len(mean)         # block means (B,)
        results[key] = figures(square, mean - b * mean_score, truth[key[0]])
        if results[key]["std"][0]**2 < 2e-6 * fours.moments(scores2)[0]:                # float32's rounding
            results[key]["std"] = (0.0, 0.0)
    return results


def figures(square, mean, truth):
    """{figure: (value, half-width)} from block means of |g|² (B,), g and truth (B, D); one block is exact."""
    blocks = torch.cat([mean, truth]).double()
    gram, own, other = blocks @ blocks.T, list(range(len(mean))), list(range(len(mean), len(blocks)))

    def norm2(chosen):                                              # a block's own noise is in the diagonal
        part, n = gram[chosen][:, chosen], len(chosen)
        return part.sum() if n == 1 else (part.sum() - part.trace()) / (n * (n - 1))

    def of(own, other):
        mean2, truth2, dot = norm2(own), norm2(other), gram[own][:, other].mean()
        error2 = (blocks[own].mean(0) - blocks[other].mean(0)).norm()**2
        noise2 = (error2 - (mean2 + truth2 - 2 * dot)).clamp(min=0)
        variance = 2 * (square[own].mean() - mean2).clamp(min=0)    # of a pair: four are two pairs' worth
        return torch.stack([variance.sqrt(), dot / (mean2 * truth2).sqrt(),
                            (error2 / truth2).sqrt(), (noise2 / truth2).sqrt()])

    half = torch.zeros(4)
    if len(own) > 1:
        left_out = ([of([i for i in own if i != b], other) for b in own],
                    [of(own, [i for i in other if i != b]) for b in other])
        half = T_QUANTILE * sum((len(x) - 1)**2 / len(x) * torch.stack(x).var(0) for x in left_out).sqrt()
    found = dict(zip(("std", "cosine", "error", "alone"), zip(of(own, other).tolist(), half.tolist())))
    if norm2(other) < 1e-10:                                        # ∇J = 0: nothing to be relative to
        return {"std": found["std"]}
    if not half[1] < 0.5:
        del found["cosine"]
    return found


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

    def project_with(weight):
        def gradient(coefs):
            of_tokens = torch.einsum("g,gis,gist->git", weight, coefs, tokens).flatten(0, 1)
            of_tokens = torch.zeros_like(ours).index_add(0, drawn.flatten(), of_tokens)     # (R, T)
            return of_tokens.flatten() @ scores.flatten(0, 1)
        return lambda wanted: [gradient(coefs)[None] for coefs in wanted]

    truth = {route: world.exact_gradient(route, "sigmoid")[None] for route in ROUTES}
    results = measure(fours, rows_of(fours), project_with(fours.weight), truth)
    end = logps.exp().cumsum(0)
    start = end - logps.exp()                                       # a response is drawn at v in start … end
    joint = (torch.minimum(end[:, None], 1 - start) - torch.maximum(start[:, None], 1 - end)).clamp(min=0)
    pairs = replace(fours, weight=joint[tuple(drawn.T[:2])] * joint[tuple(drawn.T[2:])])
    antithetic = {(route, "antithetic pairs, running mean"): estimators(pairs, route)[DEFAULT]
                  for route in ROUTES}
    return results | measure(pairs, antithetic, project_with(pairs.weight), truth)


def toy(path, n):
    """{(route, row): figures} of a toy policy, from n sampled fours."""
    (policy, tokenizer), (reference, _) = load_policy(path), load_policy("toy")
    parameters, size = list(policy.parameters()), sum(p.numel() for p in policy.parameters())
    asked = [prompt for prompt, _ in toy_prompts()]
    torch.manual_seed(0)

    def token_logps(model, ids):                                    # (B, T) -> (B, T−1); right-padded
        return model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

    def gradient(value, weights=None):                              # (D,), or of (T,) weighted (3, T): (3, D)
        several = weights is not None
        each = torch.autograd.grad(value, parameters, weights, retain_graph=True, is_grads_batched=several)
        return torch.cat([part.flatten(int(several)) for part in each], -1)

    @torch.no_grad()
    def draw(n):                                                    # (Fours, ids (4n, T))
        chosen = [asked[i] for i in torch.randint(len(asked), (n,)).tolist()]
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in chosen]
        responses, _ = sample(policy, tokenizer, prompt_ids, 24, 4, 1.0, 256)
        ids, _, mask = collate([each for each in prompt_ids for _ in range(4)], sum(responses, []))
        ours, theirs = (torch.cat([token_logps(model, part) for part in ids.split(512)]) * mask[:, 1:]
                        for model in (policy, reference))
        ours, ratios, mask = (x.double().view(n, 4, -1) for x in (ours, ours - theirs, mask[:, 1:]))
        texts = [response_text(tokenizer, y) for four in responses for y in four]
        reward = toy_reward([prompt for prompt in chosen for _ in range(4)], texts)
        reward = torch.tensor(reward).double().view(n, 4)
        return Fours(TOY_DEFAULTS["beta"], torch.full((n,), 1 / n).double(), ours.sum(-1), ratios, mask,
                     torch.sigmoid(reward - reward[:, PARTNER])), ids

    truth, parts = {route: torch.zeros(BLOCKS, size) for route in ROUTES}, math.ceil(3 * n / BLOCKS / 200)
    for part in tqdm(range(BLOCKS * parts), "truth", leave=False, disable=None):
        others, ids = draw(200)
        logps, tokens = token_logps(policy, ids), token_weights(others)
        for route in ROUTES:
            coefs = expected(estimators(others, route)[SMOOTHEST][0])
            weights = torch.einsum("gks,gkst->gkt", coefs, tokens).flatten(0, 1) / 200
            truth[route][part % BLOCKS] += gradient((weights.float() * logps).sum()) / parts

    def project(wanted):
        coefs, tokens, grams = torch.stack(wanted, 1).flatten(2).float(), token_weights(fours).float(), []
        means = torch.zeros(BLOCKS, len(wanted), size)
        for g in tqdm(range(n), "gradients", leave=False, disable=None):
            basis = []
            for k in range(4):
                length = int(fours.mask[g, k].nonzero().max()) + 1
                logps = token_logps(policy, ids[4 * g + k, None, :length + 1])[0]
                basis.append(gradient(logps, tokens[g, k, :, :length]))
            basis = torch.cat(basis)                                # (12, D)
            grams.append(basis @ basis.T)
            means[g * BLOCKS // n].addmm_(coefs[g], basis, alpha=BLOCKS / n)
        fours.gram = torch.stack(grams).double()
        return means.transpose(0, 1)

    fours, ids = draw(n)
    return measure(fours, rows_of(fours), project, truth)


def table(rows):
    """A route's figures, {row: {world: figures}}, in markdown. ×: the paper's std over the row's."""
    def cell(value, half=0.0, form=".2f"):
        return f"{value:{form}}" + (f" ± {half:{form}}" if half else "")

    def cells(world, found):
        if "std" not in found:
            return [""] * 4
        std, paper = found["std"][0], rows[PAPER][world]["std"][0]
        error = cell(*found["error"], ".2g") if "error" in found else ""
        return [cell(*found["std"]), f"{paper / std:.1f}" if std else "∞",
                cell(*found["cosine"]) if "cosine" in found else "",
                error + (f" ({found['alone'][0]:.2g})" if error and world != "enumerated" else "")]

    lines = [sum(([f"{world}: std", "×", "cosine", "error (alone)"] for world in WORLDS), ["estimator"])]
    lines += [["---"] * len(lines[0])]
    lines += [sum((cells(world, worlds.get(world, {})) for world in WORLDS), [name])
              for name, worlds in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_noise(figure, results):
    """A panel for each route and each of two worlds, a row for each estimator; biased ones are hollow."""
    all_axes = figure.subplots(2, 2, sharex="col", sharey=True)
    for (i, route), (j, world) in itertools.product(enumerate(ROUTES), enumerate(WORLDS[:2])):
        axes, rows = all_axes[i, j], results[route]
        for y, (name, worlds) in enumerate(rows.items()):
            if world not in worlds:
                continue
            (std, half), biased = worlds[world]["std"], name in BIASED
            colour = ("#CC79A7" if biased else "#D55E00" if name.startswith("no baseline") else
                      "#009E73" if name.endswith("per token") else "#0072B2")               # Okabe and Ito
            axes.errorbar(std, y, xerr=[[min(half, 0.9 * std)], [half]] if half else None, color=colour,
                          marker="o", markersize=6, markerfacecolor="white" if biased else colour)
            on_white = {"facecolor": "white", "linewidth": 0, "pad": 0.5}
            style = {"va": "center", "fontsize": 9, "color": colour, "bbox": on_white}
            axes.text(1.13 * (std + half), y, f"{std:.1f}" if std >= 10 else f"{std:.2f}", **style)
            if biased and "cosine" in worlds[world]:
                text = f"cosine {worlds[world]['cosine'][0]:.2f}".replace("-", "−")
                axes.text(0.88 * std, y, text, ha="right", **style)
        axes.axvline(rows[DEFAULT][world]["std"][0], color="#0072B2", linewidth=0.8, alpha=0.4, zorder=0)
        stds = [worlds[world]["std"][0] for each in ROUTES for worlds in results[each].values()
                if world in worlds]
        axes.set_xscale("log")
        axes.set_xlim(0.4 * min(stds), 2.2 * max(stds))
        axes.set_xticks([x for x in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if 0.4 * min(stds) < x < 2.2 * max(stds)])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_yticks(range(len(rows)), [CAPTIONS.get(name, name) for name in rows])
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"{route.upper()}, {TITLES[world]}", fontsize=10, loc="left")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("standard deviation of one pair's gradient" if i else None)
    all_axes[0, 0].invert_yaxis()


def main():
    """`python experiments/noise.py`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--groups", type=int, default=4000, help="fours sampled from the toy (4000)")
    parser.add_argument("--out", default="runs/noise.json", help="the figures as JSON")
    parser.add_argument("--plot", metavar="PNG", default="experiments/noise.png", help="the picture")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not (TOY_POLICY / "model").is_dir():
        flags = [*ONLINE_DPO.split(), "--out", TOY_POLICY]
        subprocess.run([sys.executable, ROOT / "sail.py", *flags], check=True)
    groups = max(1, args.groups // 40) * BLOCKS                     # at the reference; the blocks are equal
    found = dict(zip(WORLDS, (enumerated(), toy(TOY_POLICY / "model", 4 * groups),
                              toy("toy", groups))))
    results = {route: {name: {world: found[world][route, name] for world in WORLDS
                              if (route, name) in found[world]}
                       for each, name in found["enumerated"] if each == route} for route in ROUTES}
    for route in ROUTES:
        print(f"\n{route.upper()}; {4 * groups} fours from the toy, {groups} where policy = reference\n")
        print(table(results[route]))
    for path in (args.out, args.plot):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"fours": 4 * groups, **results}, indent=1, ensure_ascii=False)
    Path(args.out).write_text(text + "\n", encoding="utf-8")
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    draw_noise(figure, results)
    figure.savefig(args.plot, dpi=130, format="png")


if __name__ == "__main__":
    main()
