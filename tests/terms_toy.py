"""What the terms T1, T2 and T3 do to a language model that is trained on samples: reward at equal KL on the toy world.

    python tests/terms_toy.py                  # both groups, five seeds each: two hours on two cores; resumes
    python tests/terms_toy.py --group online   # 45 minutes

Two groups of runs of sail.py. `mixed`: the toy's data, three quarters of a page of flags left at their defaults but for
the coefficients, two epochs of the offline pairs. `online`: no offline pair at all, 192 fresh pairs a step, 60 steps.
A run is a curve of reward against KL(π‖π_ref) as it trains. Through the points of a curve the regression
reward = a + b·√KL + c·KL is laid (the form in which Gao et al., arXiv 2210.10760, found it), and read at a KL that the run
has reached. `training prompts`: the step's own samples; `held out`: 256 samples on nouns that no training prompt names,
every 20 steps. The mean is over seeds, ± the half-width of the 95 % t-interval; differences are taken seed by seed.
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

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from terms_exact import summary

KLS = (0.5, 1.0, 2.0, 3.0)
COEFFICIENTS = (0.03, 0.1, 0.3, 1)
MIXED = {  # name: (the run it is compared with, flags)
    "DPO": ("DPO", "--variant dpo"),
    "online DPO": ("online DPO", "--variant pr --response-coef 0"),
    **{f"PR {c}": ("online DPO", f"--variant pr --response-coef {c}") for c in COEFFICIENTS},
    **{f"PR {c}, no baseline": ("online DPO", f"--variant pr --response-coef {c} --baseline none")
       for c in COEFFICIENTS},
    **{f"DP {c}": ("DPO", f"--variant dp --label-coef {c}") for c in (0, *COEFFICIENTS)},
    **{f"PP {c}": ("DPO", f"--variant pp --label-coef {c} --response-coef {c}") for c in COEFFICIENTS},
    "PP 0.3, no baseline": ("DPO", "--variant pp --label-coef 0.3 --response-coef 0.3 --baseline none"),
    **{f"PP 0.3, RevKL {c}": ("DPO", f"--variant pp --label-coef 0.3 --response-coef 0.3 --revkl-coef {c}")
       for c in (0.1, 0.3, 1)}}
ONLINE = {
    "online DPO": ("online DPO", "--response-coef 0"),
    **{f"PR {c}": ("online DPO", f"--response-coef {c}") for c in (0.1, 0.3, 1)},
    "PR 0.3, no baseline": ("online DPO", "--response-coef 0.3 --baseline none"),
    "online DPO, 4 responses": ("online DPO", "--response-coef 0 --num-responses 4 --batch-size 96"),
    "PR 0.3, 4 responses": ("online DPO", "--response-coef 0.3 --num-responses 4 --batch-size 96")}
GROUPS = {"mixed": (MIXED, "--epochs 2"), "online": (ONLINE, "--variant pr --mix 1 --steps 60 --batch-size 192")}


def train(job):
    """One run of sail.py, unless it is there already."""
    out, flags = job                                      # (a directory is renamed into model when it is whole)
    if not (out / "model").is_dir():
        command = [sys.executable, ROOT / "sail.py", "--out", out, "--eval-every", "20", "--eval-limit", "256"]
        subprocess.run([*command, *flags.split()], check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})


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
    solved = torch.linalg.lstsq(torch.stack([torch.ones_like(kl), kl.sqrt(), kl], 1), reward[:, None]).solution
    return (solved[0] + solved[1] * at**0.5 + solved[2] * at).item()


def measure(group, runs, seeds):
    """{name: {prompts: {KL: {reward, difference}}, end: …}}, each a summary over seeds."""
    settings, results = GROUPS[group][0], {}
    for prompts, file in (("training prompts", "metrics.jsonl"), ("held out", "eval.jsonl")):
        curves = {name: [curve_of(runs / f"{name}-s{seed}" / file) for seed in range(seeds)] for name in settings}
        for name, (other, _) in settings.items():
            rewards, others = ({at: torch.tensor([reward_at(curve, at) for curve in curves[which]]) for at in KLS}
                               for which in (name, other))
            results.setdefault(name, {"against": other})[prompts] = {
                at: {"reward": summary(rewards[at]), "difference": summary(rewards[at] - others[at])} for at in KLS}
    for name in settings:
        last = [json.loads((runs / f"{name}-s{seed}" / "eval.jsonl").read_text().splitlines()[-1])
                for seed in range(seeds)]
        results[name]["end"] = {key: summary(torch.tensor([row[key] for row in last])) for key in ("kl", "reward")}
    return json.loads(json.dumps(results))


def table(results, seeds, prompts):
    """One group in markdown: reward at each KL, (difference); (n) where only n seeds got there."""
    def cell(figure, sign=""):
        if not figure["worlds"]:
            return "–"
        half = "" if figure["half"] is None else f" ± {figure['half']:.2f}"
        return f"{figure['mean']:{sign}.2f}{half}" + (f" ({figure['worlds']})" if figure["worlds"] < seeds else "")

    lines = [f"| {prompts} | " + " | ".join(f"KL {at:g} | difference" for at in KLS) + " | KL at the end | reward |",
             "|" + "---|" * (2 * len(KLS) + 3)]
    for name, figures in results.items():
        cells = [text for at in KLS for text in (
            cell(figures[prompts][str(at)]["reward"]),
            "" if figures["against"] == name else cell(figures[prompts][str(at)]["difference"], "+"))]
        lines.append("| " + " | ".join([name, *cells, *map(cell, figures["end"].values())]) + " |")
    return "\n".join(lines)


def main():
    """`python tests/terms_toy.py`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--group", choices=GROUPS, action="append", help="(default: both)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/terms"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/terms-toy.json"), help="the figures as JSON")
    args = parser.parse_args()
    from generate import toy_checkpoint
    toy_checkpoint()                                      # trained once, before the runs start side by side
    results = {}
    for group in args.group or GROUPS:
        settings, common = GROUPS[group]
        jobs = [(args.runs / group / f"{name}-s{seed}", f"{common} {flags} --seed {seed}")
                for seed in range(args.seeds) for name, (_, flags) in settings.items()]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(tqdm(pool.map(train, jobs), group, len(jobs)))
        results[group] = measure(group, args.runs / group, args.seeds)
        for prompts in ("training prompts", "held out"):
            print(f"\n{group}: python sail.py {common} …; {args.seeds} seeds\n\n"
                  + table(results[group], args.seeds, prompts), flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
