"""What T2 does when responses are sampled: reward at equal KL, and J at the end, on the toy world.

    python experiments/terms_toy.py                   # 30 runs, ten minutes on two cores; resumes
    python experiments/terms_toy.py --plot terms.png  # … and draws it, beside what terms_exact.py found

Two groups of runs of sail.py, each with T2 × 0 (online DPO), × 0.3 and × 1: `mixed`, the authors' mix of
offline and own pairs; `online`, no offline pair at all. They start like those of replicate.py, which has the
mixed ones too: what one of the two has trained the other finds.

A run is a curve of reward against KL(π‖π_ref) as it trains. The regression reward = a + b·√KL + c·KL is laid
through its points with KL below 6 (the form of Gao et al., arXiv 2210.10760) and read at a KL that the run
has reached. Training prompts: the step's own samples, every step. Held out: a sample for each of 1,024
held-out prompts, every 30 steps. J is reward − 0.5·KL, held out, at the end. Figures are means over seeds ±
the half-width of the 95 % t-interval; differences to online DPO are taken seed by seed.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import replicate
from evaluate import COLOURS
from terms_exact import summary
from toy import TOY_DEFAULTS

KLS = (0.25, 0.5, 1.0)
METHODS = {"online-dpo": "T2 × 0", "pr": "T2 × 0.3", "pr-1": "T2 × 1"}             # replicate.py's
# Their worlds in --runs, and what these are made of.
GROUPS = {"mixed": ("toy", "--data toy"), "online": ("toy-online", "--data toy --mix 1")}
PROMPTS = {"training prompts": "metrics.jsonl", "held out": "eval.jsonl"}


def curve_of(path):
    """[(KL, reward)] of a run's metrics.jsonl or eval.jsonl, KL up to 6: beyond, the form does not hold."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(max(row["kl"], 0), row["reward"]) for row in rows
            if row.get("kl") is not None and row.get("reward") is not None and row["kl"] < 6]


def reward_at(curve, at):
    """The regression's reward at that KL; nan where the curve does not get there or has too few points."""
    kl, reward = torch.tensor(curve, dtype=torch.float64).reshape(-1, 2).T
    if len(kl) < 4 or kl.sort().values[-min(3, len(kl) // 3):].mean() < 0.95 * at:
        return math.nan
    form = torch.stack([torch.ones_like(kl), kl.sqrt(), kl], 1)
    a, b, c = torch.linalg.lstsq(form, reward[:, None]).solution[:, 0].tolist()
    return a + b * at**0.5 + c * at


def measure(folder, seeds):
    """{method: {prompts: {KL: {reward, difference}}, end: …}}, each figure a summary over seeds."""
    results = {method: {} for method in METHODS}
    seeds = range(replicate.FIRST_SEED, replicate.FIRST_SEED + seeds)
    for prompts, file in PROMPTS.items():
        rewards = {}                                      # method -> KL -> (seeds,)
        for method in METHODS:
            curves = [curve_of(folder / f"{method}-s{seed}" / file) for seed in seeds]
            rewards[method] = {at: torch.tensor([reward_at(curve, at) for curve in curves]) for at in KLS}
            results[method][prompts] = {
                at: {"reward": summary(rewards[method][at]),
                     "difference": summary(rewards[method][at] - rewards["online-dpo"][at])} for at in KLS}
    ends = {}                                             # method -> (seeds, 3), KL, reward, J
    for method in METHODS:
        texts = [(folder / f"{method}-s{seed}" / "eval.jsonl").read_text() for seed in seeds]
        last = [json.loads(text.splitlines()[-1]) for text in texts]
        ends[method] = torch.tensor([
            [row["kl"], row["reward"], row["reward"] - TOY_DEFAULTS["beta"] * row["kl"]] for row in last])
        results[method]["end"] = {
            **dict(zip(("kl", "reward", "J"), map(summary, ends[method].T))),
            "difference": summary((ends[method] - ends["online-dpo"])[:, 2])}
    return json.loads(json.dumps(results))                # as read back from a file: keys are text


def table(results, seeds, prompts):
    """One group in markdown: reward at each KL, (difference); (n) where only n seeds got there."""
    def cell(figure, sign=""):
        if not figure["worlds"]:
            return "–"
        half = "" if figure["half"] is None else f" ± {figure['half']:.2f}"
        count = f" ({figure['worlds']})" if figure["worlds"] < seeds else ""
        return f"{figure['mean']:{sign}.2f}{half}{count}"

    head = [prompts, *(text for at in KLS for text in (f"KL {at:g}", "difference")), "last KL", "last reward",
            "J", "difference"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method, figures in results.items():
        at_kl = [figures[prompts][str(at)] for at in KLS]
        pairs = [(figure["reward"], figure["difference"]) for figure in at_kl]
        pairs += [(figures["end"]["kl"], None), (figures["end"]["reward"], None),
                  (figures["end"]["J"], figures["end"]["difference"])]
        cells = [text for figure, difference in pairs for text in (
            [cell(figure)] + ([] if difference is None else
                              [""] if method == "online-dpo" else [cell(difference, "+")]))]
        lines.append("| " + " | ".join([METHODS[method], *cells]) + " |")
    return "\n".join(lines)


def draw(axes, results, seeds, prompts):
    """PR's reward minus online DPO's at equal KL, against KL, with intervals; names at the lines' ends."""
    for shift, method in enumerate(["pr", "pr-1"]):
        points = [(float(at), figure["difference"]) for at, figure in results[method][prompts].items()
                  if figure["difference"]["worlds"] == seeds]
        if not points:
            continue
        x = [at * 1.03**shift for at, _ in points]
        halves = [figure["half"] or 0 for _, figure in points]         # a single seed has no interval
        axes.errorbar(x, [figure["mean"] for _, figure in points], halves, color=COLOURS[method], marker="o",
                      capsize=3)
        axes.annotate(METHODS[method], (x[-1], points[-1][1]["mean"]), (8, -3), textcoords="offset points",
                      color=COLOURS[method])
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(KLS, [f"{at:g}" for at in KLS])
    axes.minorticks_off()
    axes.margins(x=0.2)
    axes.set(xlabel="KL(π‖π_ref)", ylabel="reward minus online DPO's", title=f"PR on the toy, {prompts}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main():
    """`python experiments/terms_toy.py`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--group", choices=GROUPS, action="append", help="(default: both)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/replication"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/terms-toy.json"), help="the figures as JSON")
    parser.add_argument("--plot", metavar="PNG", help="draw the group online beside --exact")
    parser.add_argument("--exact", type=Path, default=Path("runs/terms-exact.json"))
    args = parser.parse_args()
    groups, results = args.group or [*GROUPS], {}
    replicate.toy(args.runs, args.seeds, args.jobs, {GROUPS[group][0]: (GROUPS[group][1], METHODS)
                                                     for group in groups})
    for group in groups:
        world, flags = GROUPS[group]
        results[group] = measure(args.runs / world, args.seeds)
        for prompts in PROMPTS:
            print(f"\n{group}: python sail.py {flags} --variant pr …; {args.seeds} seeds\n")
            print(table(results[group], args.seeds, prompts), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        from matplotlib.figure import Figure
        from terms_exact import draw_exact
        figure = Figure(figsize=(9.5, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_exact(left, json.loads(args.exact.read_text()))
        draw(right, results["online"], args.seeds, "training prompts")
        left.set_title("exact gradients, 16 worlds of 40 responses")
        figure.savefig(args.plot, dpi=130, format="png")


if __name__ == "__main__":
    main()
