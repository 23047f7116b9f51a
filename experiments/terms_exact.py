"""Where the objectives end when nothing is sampled: what every variant loses to the best policy, exactly.

    python experiments/terms_exact.py                        # four minutes on one core; a table

A world is one context with 40 responses; reference logits and rewards are standard normal. A policy is a
softmax over 40 logits that starts as the reference. Labels are Bradley-Terry, P(i ≻ j) = σ(r_i − r_j), in the
data and from the reward model alike. Every expectation is a sum over all 40 × 40 pairs, and the optimizer
climbs

    mix · (T1 + c2·T2 + c3·T3 on the variant's route) + (1 − mix) · (T1 on the data) − γ·∇KL(π_ref‖π)

until the gradient has died out. The table has how far E[reward] − β·KL(π‖π_ref) is then below the best, at
β 0.5, and that KL. Its columns are data sets: all pairs with their true preferences; the same with 20 % of
the labels flipped; 3,000 pairs drawn from the reference with a drawn label each, right or flipped; and the
same 3,000 pairs with their true preferences, as a reward gives them. No gradient of the data moves a response
that is in none. The raw rows go to experiments/terms_exact.jsonl.

Drawn labels have no finite end if the responses split into two sets, of which one wins every comparison with
the other (Ford 1957): DPO pushes them apart for ever. Such worlds are counted and left out of the column.
"""
import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from runtime.intervals import mean_of
from runtime.run_directory import write_rows
from sail import utility

RESPONSES, BETA, PAIRS, FLIPPED = 40, 0.5, 3000, 0.2
ROUTES = {"dpo": (False, False), "dp": (False, True), "pp": (True, True), "pr": (True, False)}
METHODS = {                                                         # route, mix, c2, c3, γ
    "DPO": ("dpo", 0.0, 0.0, 0.0, 0.0),
    "DP, T3 × 0.2": ("dp", 0.4, 0.0, 0.2, 0.0),
    "DP, T3 × 1": ("dp", 0.4, 0.0, 1.0, 0.0),
    "online DPO, mix 0.3": ("pr", 0.3, 0.0, 0.0, 0.0),
    "online DPO, mix 1": ("pr", 1.0, 0.0, 0.0, 0.0),
    "PR, mix 0.3, T2 × 0.3": ("pr", 0.3, 0.3, 0.0, 0.0),
    "PR, mix 0.3, T2 × 1": ("pr", 0.3, 1.0, 0.0, 0.0),
    "PR, mix 1, T2 × 0.3": ("pr", 1.0, 0.3, 0.0, 0.0),
    "PR, mix 1, T2 × 1": ("pr", 1.0, 1.0, 0.0, 0.0),
    "PP, mix 0.3, T2 and T3 × 0.2": ("pp", 0.3, 0.2, 0.2, 0.0),
    "PP, the same, RevKL 0.03": ("pp", 0.3, 0.2, 0.2, 0.03),
    "DPO, RevKL 0.03": ("dpo", 0.0, 0.0, 0.0, 0.03)}                # what the anchor does alone
DATA = {                                                            # pairs drawn, share flipped, labels
    "all pairs": (None, 0.0, "soft"),
    f"all, {FLIPPED:.0%} flipped": (None, FLIPPED, "soft"),
    f"{PAIRS:,} pairs, drawn labels": (PAIRS, 0.0, "drawn"),
    f"{PAIRS:,}, drawn, {FLIPPED:.0%} flipped": (PAIRS, FLIPPED, "drawn"),
    f"{PAIRS:,} pairs, soft labels": (PAIRS, 0.0, "soft")}


@dataclass
class Data:
    """Pairs of all worlds."""
    pair: torch.Tensor                # (S, K, K) P(y1 = i, y2 = j)
    label: torch.Tensor               # (S, K, K) P(i ≻ j)
    ends: torch.Tensor                # (S,) whether DPO on it has a finite end


def worlds(seeds):
    """(reference log-probabilities, rewards), each (S, K); a world depends on its own seed only."""
    draws = [torch.randn(2, RESPONSES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
             for seed in range(seeds)]
    logits, reward = torch.stack(draws, 1)                          # (S, K) each
    return logits.log_softmax(-1), reward


def kl(logps, other):
    """KL(p‖q) of log-probabilities, (S, K) × 2 -> (S,)."""
    return (logps.exp() * (logps - other)).sum(-1)


def pairwise(values):
    """values_i − values_j of every pair, (S, K) -> (S, K, K)."""
    return values[:, :, None] - values[:, None, :]


def two_draws(logps):
    """P(y1 = i, y2 = j) of two independent draws, (S, K) -> (S, K, K)."""
    return (logps[:, :, None] + logps[:, None, :]).exp()


def data_of(reference, preference, size, flipped, labels):
    """A data set. `size` pairs are drawn in each world, None: all there are. A label is flipped with the
    probability `flipped`."""
    label = preference + flipped * (1 - 2 * preference)
    if size is None:
        return Data(two_draws(reference), label, torch.ones(len(reference), dtype=torch.bool))
    chance = (two_draws(reference) * label).flatten(1)              # ∝ P(winner i, loser j)
    drawn = torch.multinomial(chance, size, True, generator=torch.Generator().manual_seed(0))
    wins = torch.zeros_like(chance).scatter_add(1, drawn, torch.ones_like(drawn, dtype=chance.dtype))
    wins = wins.view_as(label)
    both = wins + wins.mT
    pair = both / (2 * size)
    if labels == "soft":
        return Data(pair, label, torch.ones(len(reference), dtype=torch.bool))
    return Data(pair, torch.where(both > 0, wins / both.clamp(min=1), 0.5), have_ends(wins))


def have_ends(wins):
    """Whether no set of responses wins all comparisons with the rest (Ford 1957): whether every response
    that is compared is reached from every other one along wins. (S, K, K) -> (S,)."""
    compared = (wins + wins.mT).sum(-1) > 0                         # (S, K)
    reached = (wins > 0).double() + torch.eye(RESPONSES, dtype=torch.float64)
    for _ in range(6):                                              # paths of up to 2⁶ wins
        reached = (reached @ reached > 0).double()
    asked = compared[:, :, None] & compared[:, None, :]
    return ((reached > 0) | ~asked).flatten(1).all(1)


def surrogate(logps, reference, pair, label, route, c2=0.0, c3=0.0):
    """A number whose gradient is the expectation of T1 + c2·T2 + c3·T3, summed over the worlds.

    J is Σ pair · label · f, and the policy is in each factor. A term is what the product rule makes of one
    factor: that one moves, the other two are held (detached). `pair` and `label`, (S, K, K), are the data's
    or the reward's; the policy takes their place on routes that say so. Where it does not, T2 or T3 has no
    gradient.
    """
    on_policy, self_labelled = ROUTES[route]
    u = BETA * pairwise(logps - reference)                          # (S, K, K)
    f, f_swapped = utility(u, BETA, "sigmoid"), utility(-u, BETA, "sigmoid")
    if on_policy:
        pair = two_draws(logps)
    if self_labelled:
        label = torch.sigmoid(u)

    def expectation(pair, label, f, f_swapped):
        return (pair * (label * f + (1 - label) * f_swapped)).sum()

    T1 = expectation(pair.detach(), label.detach(), f, f_swapped)
    T2 = expectation(pair, label.detach(), f.detach(), f_swapped.detach())        # ∇pair = pair · ∇log pair
    T3 = expectation(pair.detach(), label, f.detach(), f_swapped.detach())
    return T1 + c2 * T2 + c3 * T3


def end_of(reference, preference, data, method, steps=1000):
    """Where a method ends: (log π (S, K), the gradient's norm there (S,)). By Adam, its rate falling to 0."""
    route, mix, c2, c3, gamma = method
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], 0.1, maximize=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        logps = logits.log_softmax(-1)
        objective = (1 - mix) * surrogate(logps, reference, data.pair, data.label, "dpo")
        if mix > 0:
            objective = objective + mix * surrogate(logps, reference, data.pair, preference, route, c2, c3)
        objective = objective - gamma * kl(reference, logps).sum()
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        schedule.step()
    return logits.detach().log_softmax(-1), logits.grad.norm(dim=-1)


def measure(seeds):
    """One row per method and data set, over the worlds in which the data have an end: {method, data, lost,
    kl, worlds, moving}. `lost` is how far reward − β·KL lies below the best, {mean, half} as is the KL;
    `worlds` is how many they are, `moving` in how many of them the gradient has not died out."""
    reference, reward = worlds(seeds)
    preference = torch.sigmoid(pairwise(reward))
    best = BETA * (reference + reward / BETA).logsumexp(-1)         # the best reward − β·KL, (S,)
    rows = []
    for data_name, (size, flipped, labels) in tqdm(DATA.items(), "data sets"):
        data = data_of(reference, preference, size, flipped, labels)
        for name, method in METHODS.items():
            logps, gradient = end_of(reference, preference, data, method)
            away = kl(logps, reference)
            lost = best - ((logps.exp() * reward).sum(-1) - BETA * away)
            rows.append(dict(method=name, data=data_name, lost=summary(lost[data.ends]),
                             kl=summary(away[data.ends]), worlds=int(data.ends.sum()),
                             moving=int((gradient[data.ends] > 1e-4).sum())))
    return rows


def summary(values):
    """Mean and half-width of the 95 % t-interval over worlds; values (S,)."""
    mean, low, high = mean_of(values.tolist())
    return {"mean": mean, "half": (high - low) / 2}


def table(rows):
    """Markdown: what is lost to the best, and the KL, of every method and data set."""
    heads = []
    for data_name in DATA:
        some = next(row for row in rows if row["data"] == data_name)
        heads.append(f"{data_name} ({some['worlds']} worlds)")
    lines = ["| below the best; KL | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in METHODS:
        cells = []
        for row in rows:
            if row["method"] == name:
                cell = f"{row['lost']['mean']:.3f} ± {row['lost']['half']:.3f}; {row['kl']['mean']:.2f}"
                if row["moving"]:
                    cell += f", {row['moving']} still moving"
                cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """`python experiments/terms_exact.py`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=16, help="worlds (default: 16)")
    args = parser.parse_args()
    torch.set_num_threads(1)                                        # small tensors: more threads only wait
    rows = measure(args.seeds)
    write_rows(Path(__file__).with_suffix(".jsonl"), rows)
    print("mean ± half-width of the 95 % interval over the worlds in which DPO on the data has an end\n")
    print(table(rows))


if __name__ == "__main__":
    main()
