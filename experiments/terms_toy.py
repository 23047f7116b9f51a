"""What the terms T1, T2 and T3 do when responses are sampled: reward at equal KL on the toy world.

    python experiments/terms_toy.py              # both groups, five seeds: 75 minutes on two cores; resumes
    python experiments/terms_toy.py --group online    # a quarter of an hour
    python experiments/terms_toy.py --plot terms.png  # … and draws it, beside what terms_exact.py found

Two groups of runs of sail.py. `mixed`: the authors' mix of offline and own pairs, two epochs of the offline
pairs, 48 pairs a step. `online`: no offline pair at all, 192 fresh pairs a step, 60 steps.

A run is a curve of reward against KL(π‖π_ref) as it trains. The regression reward = a + b·√KL + c·KL is laid
through its points with KL below 6 (the form of Gao et al., arXiv 2210.10760) and read at a KL that the run
has reached. Training prompts: the step's own samples, every step. Held out: 256 samples on nouns that no
training prompt names, every 20 or 10 steps. Figures are means over seeds ± the half-width of the 95 %
t-interval; differences are taken seed by seed.
"""
import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from terms_exact import summary
from toy import SFT_MODEL

KLS = (0.5, 1.0, 2.0, 3.0)
COEFFICIENTS = (0.03, 0.1, 0.3, 1)
MIXED = {  # name: (the run it is compared with, flags)
    "DPO": ("DPO", "--variant dpo"),
    "online DPO": ("online DPO", "--variant pr --response-coef 0"),
    **{f"PR {c}": ("online DPO", f"--variant pr --response-coef {c}") for c in COEFFICIENTS},
    **{f"PR {c}, no baseline": ("online DPO", f"--variant pr --response-coef {c} --baseline none")
       for c in COEFFICIENTS},
    **{f"DP {c}": ("DPO", f"--variant dp --label-coef {c}") for c in (0, *COEFFICIENTS)},
    **{f"PP {c}": ("DPO", f"--variant pp --label-coef {c} --response-coef {c} --revkl-coef 0")
       for c in COEFFICIENTS},
    "PP 0.3, no baseline": ("DPO", "--variant pp --label-coef 0.3 --response-coef 0.3 --revkl-coef 0 "
                                   "--baseline none"),
    **{f"PP 0.3, RevKL {c}": ("DPO", f"--variant pp --label-coef 0.3 --response-coef 0.3 --revkl-coef {c}")
       for c in (0.1, 0.3, 1)}}
ONLINE = {
    "online DPO": ("online DPO", "--response-coef 0"),
    **{f"PR {c}": ("online DPO", f"--response-coef {c}") for c in (0.1, 0.3, 1)},
    "PR 0.3, no baseline": ("online DPO", "--response-coef 0.3 --baseline none")}
GROUPS = {"mixed": (MIXED, "--epochs 2 --batch-size 48 --eval-every 20"),
          "online": (ONLINE, "--variant pr --mix 1 --steps 60 --batch-size 192 --eval-every 10")}
PROMPTS = {"training prompts": "metrics.jsonl", "held out": "eval.jsonl"}
DRAWN = {"PR 0.1": "#0072B2", "PR 0.3": "#009E73", "PR 1": "#D55E00"}                # colours: Okabe and Ito


def train(job):
    """One run of sail.py, unless it is there already."""
    out, flags = job
    if not (out / "model").is_dir():                      # which is the last that a run writes
        flags = [*flags.split(), "--eval-limit", "256", "--out", out]
        subprocess.run([sys.executable, ROOT / "sail.py", *flags], check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})


def directory(runs, name, seed):
    return runs / f"{name.lower().replace(',', '').replace(' ', '-')}-s{seed}"


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


def measure(settings, runs, seeds):
    """{name: {prompts: {KL: {reward, difference}}, end: …}}, each figure a summary over seeds."""
    results = {name: {"against": other} for name, (other, _) in settings.items()}
    for prompts, file in PROMPTS.items():
        rewards = {}                                      # name -> KL -> (seeds,)
        for name in settings:
            curves = [curve_of(directory(runs, name, seed) / file) for seed in range(seeds)]
            rewards[name] = {at: torch.tensor([reward_at(curve, at) for curve in curves]) for at in KLS}
        for name, (other, _) in settings.items():
            results[name][prompts] = {
                at: {"reward": summary(rewards[name][at]),
                     "difference": summary(rewards[name][at] - rewards[other][at])} for at in KLS}
    for name in settings:
        evals = [(directory(runs, name, seed) / "eval.jsonl").read_text() for seed in range(seeds)]
        last = [json.loads(text.splitlines()[-1]) for text in evals]
        results[name]["end"] = {
            key: summary(torch.tensor([row[key] for row in last])) for key in ("kl", "reward")}
    return json.loads(json.dumps(results))                # as read back from a file: keys are text


def table(results, seeds, prompts):
    """One group in markdown: reward at each KL, (difference); (n) where only n seeds got there."""
    def cell(figure, sign=""):
        if not figure["worlds"]:
            return "–"
        half = "" if figure["half"] is None else f" ± {figure['half']:.2f}"
        count = f" ({figure['worlds']})" if figure["worlds"] < seeds else ""
        return f"{figure['mean']:{sign}.2f}{half}{count}"

    head = [prompts, *(text for at in KLS for text in (f"KL {at:g}", "difference")), "last KL", "last reward"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, figures in results.items():
        cells = [text for at in KLS for text in (
            cell(figures[prompts][str(at)]["reward"]),
            "" if figures["against"] == name else cell(figures[prompts][str(at)]["difference"], "+"))]
        lines.append("| " + " | ".join([name, *cells, *map(cell, figures["end"].values())]) + " |")
    return "\n".join(lines)


def draw(axes, results, seeds, prompts):
    """PR's reward minus online DPO's at equal KL, against KL, with intervals; names at the lines' ends."""
    for shift, (name, colour) in enumerate(DRAWN.items()):
        points = [(float(at), figure["difference"]) for at, figure in results[name][prompts].items()
                  if figure["difference"]["worlds"] == seeds]
        x = [at * 1.03**shift for at, _ in points]
        axes.errorbar(x, [figure["mean"] for _, figure in points], [figure["half"] for _, figure in points],
                      color=colour, marker="o", capsize=3)
        axes.annotate(f"T2 × {name[3:]}", (x[-1], points[-1][1]["mean"]), (8, -3), textcoords="offset points",
                      color=colour)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(KLS, [f"{at:g}" for at in KLS])
    axes.minorticks_off()
    axes.margins(x=0.25)
    axes.set(xlabel="KL(π‖π_ref)", ylabel="reward minus online DPO's", title=f"PR on the toy, {prompts}")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main():
    """`python experiments/terms_toy.py`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--group", choices=GROUPS, action="append", help="(default: both)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/terms"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/terms-toy.json"), help="the figures as JSON")
    parser.add_argument("--plot", metavar="PNG", help="draw the group online beside --exact")
    parser.add_argument("--exact", type=Path, default=Path("runs/terms-exact.json"))
    args = parser.parse_args()
    if not SFT_MODEL.is_dir():                            # once, before the runs start side by side
        train((SFT_MODEL.parent, "--variant sft"))
    results = {}
    for group in args.group or GROUPS:
        settings, common = GROUPS[group]
        jobs = [(directory(args.runs / group, name, seed), f"{common} {flags} --seed {seed}")
                for seed in range(args.seeds) for name, (_, flags) in settings.items()]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(tqdm(pool.map(train, jobs), group, len(jobs)))
        results[group] = measure(settings, args.runs / group, args.seeds)
        for prompts in PROMPTS:
            print(f"\n{group}: python sail.py {common} …; {args.seeds} seeds\n")
            print(table(results[group], args.seeds, prompts), flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        from matplotlib.figure import Figure
        from terms_exact import draw_exact
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_exact(left, json.loads(args.exact.read_text()))
        draw(right, results["online"], args.seeds, "held out")
        left.set_title("exact gradients, 16 worlds of 40 responses")
        figure.savefig(args.plot, dpi=130, format="png")


if __name__ == "__main__":
    main()
