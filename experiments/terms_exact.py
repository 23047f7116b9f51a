"""What the terms T1, T2 and T3 do when nothing is sampled: reward lost at equal KL, for every variant.

    python experiments/terms_exact.py                        # two minutes on one core; tables, JSON
    python experiments/terms_exact.py --plot terms.png       # … and draws regret against KL

A world is one context with 40 responses; reference logits and rewards are standard normal. A policy is a
softmax over 40 logits that starts as the reference. Labels are Bradley-Terry, P(i ≻ j) = σ(r_i − r_j), in the
data and from the reward model alike. Offline pairs are two independent draws from the reference: the data's
distribution is π_ref × π_ref. Every expectation is a sum over all 40 × 40 pairs, and the optimizer climbs

    mix · (T1 + c2·T2 + c3·T3 on the variant's route) + (1 − mix) · (T1 on the data) − γ·∇KL(π_ref‖π).

The regret at a KL is the best expected reward at that KL, which π_ref·exp(r/τ)/Z has, minus the policy's when
its KL(π‖π_ref) first reaches it. The methods share their worlds, so differences are taken world by world.

Where the methods end, at β 0.5: the second table has how far E[reward] − β·KL(π‖π_ref) lies below the best,
where the gradient has died out, and the KL there. Its columns are data sets: all pairs with their true
preferences, the same with 20 % of the labels flipped, and 3,000 pairs drawn from the reference with labels
drawn, right or flipped. The reward model's labels are always true. No gradient of the data moves a response
that is in none.

How to read the first: the regret is that of the path, which the optimizer, Adam, shapes as much as the terms
do. PP with mix 1 sees no reward: at the reference its gradient is zero, and Adam blows rounding up into a
direction, which is as arbitrary as it sounds.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from evaluate import COLOURS
from runtime.intervals import over_seeds
from sail import utility

RESPONSES, BETA = 40, 0.1
END_BETA, PAIRS, FLIPPED = 0.5, 3000, 0.2                           # where the methods end
LEARNING_RATE = 0.02                                                # of Adam, on the way
KLS, CURVE = [0.2, 0.5, 1.0, 2.0], [0.05 * 40 ** (i / 30) for i in range(31)]     # of table, picture
ROUTES = {"dpo": (False, False), "dp": (False, True), "pp": (True, True), "pr": (True, False)}
METHODS = {                                                         # route, mix, c2, c3, γ
    "offline DPO": ("dpo", 0.0, 0.0, 0.0, 0.0),
    "online DPO, mix 1": ("pr", 1.0, 0.0, 0.0, 0.0),
    "online DPO, mix 0.4": ("pr", 0.4, 0.0, 0.0, 0.0),
    "online DPO, mix 0.3": ("pr", 0.3, 0.0, 0.0, 0.0),
    **{f"PR, mix 1, T2 × {c:g}": ("pr", 1.0, c, 0.0, 0.0) for c in (0.03, 0.1, 0.3, 1.0)},
    **{f"PR, mix 0.3, T2 × {c:g}": ("pr", 0.3, c, 0.0, 0.0) for c in (0.3, 1.0)},
    **{f"offline DPO, RevKL {g:g}": ("dpo", 0.0, 0.0, 0.0, g) for g in (0.01, 0.03)},     # what it does alone
    **{f"DP, mix 0.4, T3 × {c:g}": ("dp", 0.4, 0.0, c, 0.0) for c in (0.2, 1.0)},
    **{f"PP, mix 0.3, T2 and T3 × {c:g}": ("pp", 0.3, c, c, 0.0) for c in (0.2, 1.0)},
    **{f"PP, mix 0.3, T2 and T3 × 1, RevKL {g:g}": ("pp", 0.3, 1.0, 1.0, g) for g in (0.01, 0.03, 0.1)},
    "PP, mix 1, T2 and T3 × 0.2": ("pp", 1.0, 0.2, 0.2, 0.0),
}
ENDS = {                                                            # route, mix, c2, c3, γ
    "DPO": ("dpo", 0.0, 0.0, 0.0, 0.0),
    **{f"DP, mix 0.4, T3 × {c:g}": ("dp", 0.4, 0.0, c, 0.0) for c in (0.2, 1.0)},
    **{f"online DPO, mix {mix:g}": ("pr", mix, 0.0, 0.0, 0.0) for mix in (0.3, 1.0)},
    **{f"PR, mix {mix:g}, T2 × {c:g}": ("pr", mix, c, 0.0, 0.0) for mix in (0.3, 1.0) for c in (0.3, 1.0)},
    **{f"PP, mix 0.3, T2 and T3 × {c:g}": ("pp", 0.3, c, c, 0.0) for c in (0.2, 1.0)},
    "PP, mix 0.3, T2 and T3 × 0.2, RevKL 0.03": ("pp", 0.3, 0.2, 0.2, 0.03)}
DATA = {                                                            # (pairs, share of them flipped)
    "all pairs": (None, 0.0), f"all, {FLIPPED:.0%} flipped": (None, FLIPPED),
    f"{PAIRS:,} pairs": (PAIRS, 0.0), f"{PAIRS:,}, {FLIPPED:.0%} flipped": (PAIRS, FLIPPED)}
DRAWN = {                                                           # the picture's lines and their colours
    "offline DPO": COLOURS["dpo"], "online DPO, mix 1": COLOURS["online-dpo"],
    "PR, mix 1, T2 × 0.3": COLOURS["pr"], "PR, mix 1, T2 × 1": COLOURS["pr-1"],
    "DP, mix 0.4, T3 × 1": COLOURS["dp"], "PP, mix 0.3, T2 and T3 × 1": COLOURS["pp"]}


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


def surrogate(logps, reference, preference, route, c2, c3, beta=BETA, pairs=None):
    """A number whose gradient is the expectation of T1 + c2·T2 + c3·T3, summed over the worlds.

    J is Σ pair · label · f, and the policy is in each factor. A term is what the product rule makes of one
    factor: that one moves, the other two are held (detached). Where pair or label is the data's or the
    reward's it is a constant, and T2 or T3 has no gradient. pairs: P(y1 = i, y2 = j) in the data, (S, K, K);
    None: two draws from the reference.
    """
    on_policy, self_labelled = ROUTES[route]
    u = beta * pairwise(logps - reference)                          # (S, K, K)
    f, f_swapped = utility(u, beta, "sigmoid"), utility(-u, beta, "sigmoid")
    pair = two_draws(logps) if on_policy else two_draws(reference) if pairs is None else pairs
    label = torch.sigmoid(u) if self_labelled else preference       # P(i ≻ j)

    def expectation(pair, label, f, f_swapped):
        return (pair * (label * f + (1 - label) * f_swapped)).sum()

    held_pair, held_label, held = pair.detach(), label.detach(), (f.detach(), f_swapped.detach())
    T1 = expectation(held_pair, held_label, f, f_swapped)
    T2 = expectation(pair, held_label, *held)                       # ∇pair = pair · ∇log pair, the score
    T3 = expectation(held_pair, label, *held)
    return T1 + c2 * T2 + c3 * T3


def climb(reference, reward, method, steps):
    """Train all worlds by one method, from the reference: (KL(π‖π_ref), expected reward), each (steps, S)."""
    route, mix, c2, c3, gamma = method
    preference = torch.sigmoid(pairwise(reward))
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], LEARNING_RATE, maximize=True)      # elementwise: worlds apart
    kls, rewards, furthest = [], [], torch.zeros(len(reward))
    for _ in range(steps):
        logps = logits.log_softmax(-1)
        kls.append(kl(logps, reference).detach())
        rewards.append((logps.exp() * reward).sum(-1).detach())
        furthest = torch.maximum(furthest, kls[-1])
        if (furthest > KLS[-1]).all():
            break                                                   # every world has passed the last KL read
        objective = -gamma * kl(reference, logps).sum()
        if mix > 0:
            objective = objective + mix * surrogate(logps, reference, preference, route, c2, c3)
        if mix < 1:
            objective = objective + (1 - mix) * surrogate(logps, reference, preference, "dpo", 0, 0)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
    return torch.stack(kls), torch.stack(rewards)


def best_reward(reference, reward, at):
    """The largest expected reward at KL(π‖π_ref) = at, (S,); where even the best response alone is nearer
    than that, its reward."""
    low, high = torch.zeros(len(reward), 1, dtype=reward.dtype), torch.full((len(reward), 1), 1e4).to(reward)
    for _ in range(80):                                             # bisection in 1/τ, in which KL grows
        middle = (low + high) / 2
        logps = (reference + middle * reward).log_softmax(-1)
        near = (kl(logps, reference) < at)[:, None]
        low, high = torch.where(near, middle, low), torch.where(near, high, middle)
    return (logps.exp() * reward).sum(-1)


def reward_at(kls, rewards, at):
    """Reward when the KL first reaches `at`, linear between steps: (steps, S) × 2 -> (S,), nan if never."""
    reached = kls >= at
    after = reached.int().argmax(0, keepdim=True).clamp(min=1)      # (1, S): the first such step
    (kl0, kl1), (reward0, reward1) = [(x.gather(0, after - 1)[0], x.gather(0, after)[0])
                                      for x in (kls, rewards)]
    return torch.where(reached.any(0), reward0 + (reward1 - reward0) * (at - kl0) / (kl1 - kl0), math.nan)


def data_of(reference, preference, size, flipped):
    """A data set: (P(y1 = i, y2 = j), its share of labels i ≻ j), (S, K, K) each. `size` pairs are drawn in
    each world and counted, None: all there are; each label is flipped with the probability `flipped`."""
    label = preference + flipped * (1 - 2 * preference)
    if size is None:
        return two_draws(reference), label
    wins = (two_draws(reference) * label).flatten(1)                # ∝ P(winner i, loser j)
    drawn = torch.multinomial(wins, size, True, generator=torch.Generator().manual_seed(0))
    wins = torch.zeros_like(wins).scatter_add(1, drawn, torch.ones_like(drawn, dtype=wins.dtype))
    wins = wins.view_as(label)
    both = wins + wins.mT
    return both / (2 * size), torch.where(both > 0, wins / both.clamp(min=1), 0.5)


def end_of(reference, preference, data, method, steps=1000):
    """Where a method ends: (log π (S, K), the gradient's norm there (S,)). By Adam, its rate falling to 0."""
    route, mix, c2, c3, gamma = method
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], 0.1, maximize=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pairs, label = data
    for _ in range(steps):
        logps = logits.log_softmax(-1)
        objective = -gamma * kl(reference, logps).sum()
        if mix > 0:
            objective = objective + mix * surrogate(logps, reference, preference, route, c2, c3, END_BETA,
                                                    pairs)
        if mix < 1:
            objective = objective + (1 - mix) * surrogate(logps, reference, label, "dpo", 0, 0, END_BETA,
                                                          pairs)
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        schedule.step()
    return logits.detach().log_softmax(-1), logits.grad.norm(dim=-1)


def measure_ends(seeds):
    """{method: {data set: summaries of what is lost to the best, of that minus DPO's, of KL; `moving`, how
    many worlds have a gradient that has not died out}}."""
    reference, reward = worlds(seeds)
    preference, lost = torch.sigmoid(pairwise(reward)), {}
    best = END_BETA * (reference + reward / END_BETA).logsumexp(-1)                 # the best, (S,)
    results = {name: {} for name in ENDS}
    for data_name, (size, flipped) in tqdm(DATA.items(), "ends"):
        data = data_of(reference, preference, size, flipped)
        for name, method in ENDS.items():
            logps, gradient = end_of(reference, preference, data, method)
            away = kl(logps, reference)
            lost[name] = best - ((logps.exp() * reward).sum(-1) - END_BETA * away)
            results[name][data_name] = {
                "lost": summary(lost[name]), "minus DPO": summary(lost[name] - lost["DPO"]),
                "kl": summary(away), "moving": int((gradient > 1e-4).sum())}
    return results


def table_of_ends(results):
    """What is lost to the best, of every method and data set in markdown, the difference to DPO in brackets,
    then the KL."""
    def cell(figures, name):
        def of(key, sign=""):
            half = "" if figures[key]["half"] is None else f" ± {figures[key]['half']:.3f}"
            return f"{figures[key]['mean']:{sign}.3f}{half}"
        moving = f", {figures['moving']} still moving" if figures["moving"] else ""
        return of("lost") + f" ({of('minus DPO', '+')})" * (name != "DPO") + (
            f"; KL {figures['kl']['mean']:.2f}{moving}")

    lines = ["| below the best (minus DPO's); KL | " + " | ".join(DATA) + " |"]
    lines += ["|---" * (len(DATA) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cell(found[data], name) for data in DATA) + " |"
              for name, found in results.items()]
    return "\n".join(lines)


def summary(values):
    """Mean, half-width of the 95 % t-interval and count over the worlds that have a value; values (S,)."""
    values = values[values.isfinite()].tolist()
    mean, low, high = over_seeds(values) if values else (None, math.nan, math.nan)
    return {"mean": mean, "half": None if math.isnan(low) else (high - low) / 2, "worlds": len(values)}


def measure(seeds, steps):
    """All methods: settings, regret by world and in summary, paired differences, and the curves to draw."""
    reference, reward = worlds(seeds)
    best = {at: best_reward(reference, reward, at) for at in KLS + CURVE}
    regret = {}                                                     # method -> KL -> (S,)
    for name, method in tqdm(METHODS.items(), "methods"):
        kls, rewards = climb(reference, reward, method, steps)
        regret[name] = {at: best[at] - reward_at(kls, rewards, at) for at in best}
    methods = {}
    for name, method in METHODS.items():
        online = f"online DPO, mix {method[1] or 1:g}"              # of the same mix; offline DPO has none: 1
        methods[name] = {
            "settings": dict(zip(("route", "mix", "c2", "c3", "gamma"), method)),
            "regret": {at: summary(regret[name][at]) for at in KLS},
            "minus online DPO": {at: summary(regret[name][at] - regret[online][at]) for at in KLS},
            "minus offline DPO": {at: summary(regret[name][at] - regret["offline DPO"][at]) for at in KLS},
            "curve": [{"kl": at, **summary(regret[name][at])} for at in CURVE]}
    results = {"seeds": seeds, "steps": steps, "responses": RESPONSES, "beta": BETA,
               "learning_rate": LEARNING_RATE, "methods": methods}
    return json.loads(json.dumps(results))                          # as read back from a file: keys are text


def table(results):
    """The results in markdown; (n) where only n worlds have reached the KL, in a difference with both."""
    columns = [("regret", at, f"regret at KL {at:g}") for at in KLS] + [
        (f"minus {which} DPO", at, f"− {which} DPO at {at:g}")
        for which in ("online", "offline") for at in (0.5, 1.0)]

    def cell(figure, sign):
        if not figure["worlds"]:
            return "not reached"
        if sign and figure["mean"] == 0:
            return ""                                               # a method against itself
        half = "" if figure["half"] is None else f" ± {figure['half']:.3f}"
        count = "" if figure["worlds"] == results["seeds"] else f" ({figure['worlds']})"
        return f"{figure['mean']:{sign}.3f}{half}{count}"

    rows = [["method", *(title for *_, title in columns)]] + [
        [name] + [cell(method[key][str(at)], "" if key == "regret" else "+") for key, at, _ in columns]
        for name, method in results["methods"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def draw_exact(axes, results):
    """Mean regret against KL, one line for each of DRAWN as far as all worlds get, its name at its end."""
    ends, place = [], -math.inf
    for name, colour in DRAWN.items():
        points = [(point["kl"], point["mean"]) for point in results["methods"][name]["curve"]
                  if point["worlds"] == results["seeds"]]
        if points:
            axes.plot(*zip(*points), color=colour)
            ends.append((points[-1], name, colour))
    axes.set_xscale("log")
    axes.set_xticks(KLS, [f"{at:g}" for at in KLS])
    axes.minorticks_off()
    axes.set(xlabel="KL(π‖π_ref)", ylabel="regret: reward lost at equal KL", ylim=(0, None))
    for (x, y), name, colour in sorted(ends, key=lambda end: end[0][1]):
        place = max(y, place + 0.05 * axes.get_ylim()[1])           # names keep a line's height apart
        axes.annotate(name, (x, y), (1.15 * KLS[-1], place), color=colour, va="center",
                      arrowprops={"arrowstyle": "-", "color": colour, "linestyle": ":", "relpos": (0, 0.5),
                                  "shrinkB": 0})
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main():
    """`python experiments/terms_exact.py`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=16, help="worlds (default: 16)")
    parser.add_argument("--steps", type=int, default=3000, help="at most (default: 3000)")
    parser.add_argument("--out", default="runs/terms-exact.json", help="the figures as JSON")
    parser.add_argument("--plot", metavar="PNG", help="draw regret against KL")
    args = parser.parse_args()
    torch.set_num_threads(1)                                        # small tensors: more threads only wait
    results = {**measure(args.seeds, args.steps), "ends": measure_ends(args.seeds)}
    print(f"{args.seeds} worlds; mean ± half-width of the 95 % interval over worlds; "
          "(n): only n worlds get there\n")
    print(table(results))
    print(f"\nWhere the methods end, at β {END_BETA}:\n")
    print(table_of_ends(results["ends"]))
    for path in filter(None, (args.out, args.plot)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if args.plot:
        from matplotlib.figure import Figure
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        draw_exact(figure.subplots(), results)
        figure.savefig(args.plot, dpi=130, format="png")


if __name__ == "__main__":
    main()
