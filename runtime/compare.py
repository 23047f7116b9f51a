"""Runs side by side: the table of their figures, the picture, the best that is possible.

What a run has measured is read from its logs, eval.jsonl and samples.jsonl; no model is loaded here.
"""
import io
import json
import math
import re
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from statistics import mean

import torch

from runtime.command_line import InputError, foreign
from runtime.intervals import format_figure, over_seeds
from runtime.run_directory import is_run_directory, refuse_output, write_bytes, write_text

# --- what finished runs have measured -----------------------------------------------------------------------

def read_runs(paths):
    """{path: rows of eval.jsonl} of the finished runs of sail.py among the paths; InputError without any."""
    runs = {}
    for path in map(Path, paths):
        if not (path / "model").is_dir() or not (path / "eval.jsonl").is_file():
            if is_run_directory(path):
                print(f"{path} is left out: it has no model, or no held-out figures, yet")
            continue
        rows = read_log(path / "eval.jsonl")
        for number_of_row, row in enumerate(rows, 1):
            refuse_edited(f"{path}/eval.jsonl:{number_of_row}", row)
        if rows:
            runs[path] = rows
    if not runs:
        raise InputError("--compare: no finished run with held-out figures among the arguments")
    return runs


def read_log(path):
    """The rows of a log that a run has written, a JSON object on each line. Raises InputError for a line that
    is none."""
    with foreign(f"{path}: not UTF-8 text"):
        text = path.read_text(encoding="utf-8")
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with foreign(f"{path}:{number}: want a JSON object on each line"):
                rows.append(dict(json.loads(line)))
    return rows


def refuse_edited(place, row):
    """Raises InputError for a row of eval.jsonl that no run has written: its figures are numbers or null,
    their intervals two numbers or null."""
    for name, value in row.items():
        values = [value]
        if name.endswith("_interval") and isinstance(value, list) and len(value) == 2:
            values = value
        for each in values:
            if not (each is None or type(each) in (int, float)):
                raise InputError(f"{place}: {name} is {str(value)[:40]!r}; a run has not written this")
    if type(row.get("step")) is not int:
        raise InputError(f"{place}: has no step")


def last_samples(path):
    """The rows of a run's samples.jsonl of its last evaluation."""
    rows = read_log(path / "samples.jsonl")
    last = rows[-1]["step"]
    return [row for row in rows if row["step"] == last]


def groups_of(found):
    """{name: rows of eval.jsonl, a list for each run}: runs whose names differ in -sN alone are seeds."""
    variants = defaultdict(list)
    for path, rows in found.items():
        variant = re.sub(r"-s\d+$", "", str(path))
        variants[Path(variant)].append(rows)
    names = {path.name for path in variants}
    groups = {}
    for path, runs in variants.items():
        name = path.name
        if len(names) < len(variants):                     # runs of one name: with their directory
            name = f"{path.parent.name}/{name}"
        groups[name] = runs
    return groups


def figure_of(name, rows):
    """(value, low, high) of one figure: of one evaluation, with its interval over prompts, or of several
    seeds', with that over seeds; None if it was not measured."""
    values = [row.get(name) for row in rows]
    if None in values:
        return None
    if len(values) > 1:
        return over_seeds(values)
    interval = rows[0].get(f"{name}_interval")
    low, high = interval or (math.nan, math.nan)
    return values[0], low, high


# --- tables, files ------------------------------------------------------------------------------------------

COLUMNS = {"reward": "reward", "kl": "KL", "objective": "reward − β·KL", "gap": "below the best",
           "win_rate": "win rate", "lc_win_rate": "LC win rate", "length": "length"}           # of the tables


def print_table(results, runs=None):
    """The results, {model: {name: figure}}, as a markdown table; runs: how many of each model there are."""
    measured = set().union(*results.values())
    names = [name for name in COLUMNS if name in measured]
    heads = [COLUMNS[name] for name in names]
    if runs:
        heads.insert(0, "runs")
    print(f"| | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for model, figures in results.items():
        cells = [model]
        if runs:
            cells.append(str(runs[model]))
        for name in names:
            cell = ""
            if name in figures:
                cell = format_figure(*figures[name])
            cells.append(cell)
        print(f"| {' | '.join(cells)} |")


def write_figures(results, path):
    """{model: {name: {value, low, high}}} as JSON; what is not a finite number is null."""
    written = {}
    for model, figures in results.items():
        written[model] = {}
        for name, figure in figures.items():
            ends = dict(zip(("value", "low", "high"), figure))
            for end in ends:
                if not math.isfinite(ends[end]):
                    ends[end] = None
            written[model][name] = ends
    write_text(path, json.dumps(written, indent=1) + "\n")


def are_figures(text):
    """Whether a text is what `write_figures` writes."""
    try:
        figures = [figure for model in json.loads(text).values() for figure in model.values()]
        return all({*figure} == {"value", "low", "high"} for figure in figures)
    except (ValueError, TypeError, AttributeError):
        return False


def print_samples(samples, number):
    """The answers of all models, {model: samples}, to the first `number` prompts, one prompt after the other.
    """
    for rows in list(zip(*samples.values()))[:number]:
        prompt = rows[0]["prompt"]
        if isinstance(prompt, list):
            prompt = prompt[-1]["content"]
        print(f"\n>>> {prompt}")
        for name, row in zip(samples, rows):
            print(f"--- {name}")
            if "reward" in row:
                print(f"(reward {row['reward']:.3f})")
            print(row["response"])


# --- the best possible --------------------------------------------------------------------------------------

def frontier(rewards, temperatures):
    """The best that any policy can do, from the rewards of samples of the reference, (P prompts, n samples):
    for each temperature t the policy π_t ∝ π_ref·exp(r/t), which has the highest reward of all policies of
    its KL.

    The samples are weighted by exp(r/t), self-normalised importance sampling. Rows: kl in nats per response;
    reward; best, the highest reward − t·KL, which is t·log E_ref exp(r/t); error, half the 95 % interval of
    `best` and of the curve's height at that KL; effective, the samples of a prompt that the weights leave,
    (Σw)²/Σw². A row whose poorest prompt has fewer than 30 is left out."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    prompts, n = rewards.shape
    rows = []
    for t in temperatures:
        scaled = rewards / t
        weights = scaled.softmax(-1)                                                       # (P, n)
        effective = 1 / weights.square().sum(-1)                                           # (P,)
        poorest = effective.min().item()
        if poorest < 30:
            continue
        reward = (weights * rewards).sum(-1)
        log_mean = scaled.logsumexp(-1) - math.log(n)          # of exp(r/t)
        variance = 1 / effective - 1 / n
        row = {"temperature": t, "reward": reward.mean().item(), "best": t * log_mean.mean().item()}
        row["kl"] = (row["reward"] - row["best"]) / t
        row["error"] = 1.96 * t * variance.sum().sqrt().item() / prompts
        row["effective"] = poorest
        rows.append(row)
    return rows


# --- the picture --------------------------------------------------------------------------------------------

COLOURS = dict(zip("sft dpo dp pp online-dpo pr pr-1 spin".split(),                       # Okabe and Ito's
                   "#000000 #0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #7F7F7F".split()))


def plot(groups, results, curve, path):
    """Held-out reward against KL, as a PNG. A large point is a run's end, or the mean over seeds; a line goes
    there through the evaluations."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, labels = figure.subplots(), []                   # of lines' ends: (reward, kl, name, colour)
    spare = [colour for name, colour in COLOURS.items() if name not in groups]
    spare = cycle(spare or COLOURS.values())
    for name, runs in groups.items():
        if "reward" not in results[name]:
            continue
        colour = COLOURS.get(name) or next(spare)
        reward, low, high = results[name]["reward"]
        kl, left, right = results[name].get("kl", (0.0, 0.0, 0.0))                       # SFT has none
        height = [[reward - low], [high - reward]]
        width = [[kl - left], [right - kl]]
        axes.errorbar(kl, reward, height, width, color=colour, marker="o", capsize=3)
        kls, rewards = track_of(runs)
        axes.plot(kls, rewards, ".-", color=colour)
        labels.append((reward, kl, name, colour))
    axes.set_xlabel("KL(π‖π_ref), nats per response")
    axes.set_ylabel("held-out reward")
    if curve:
        _, right = axes.get_xlim()
        inside = [(row["kl"], row["reward"]) for row in curve if row["kl"] < right]
        kls, rewards = zip(*sorted(inside))
        axes.plot(kls, rewards, color="black", linestyle="--", linewidth=1, scalex=False)
        labels.append((rewards[-1], kls[-1], "best possible", "black"))
    write_labels(axes, labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_bytes(path, picture.getvalue())


def track_of(runs):
    """The means over seeds of KL and reward at the steps that all runs have measured: (kls, rewards)."""
    points = defaultdict(list)
    for rows in runs:
        for row in rows:
            if row.get("kl") is not None and row.get("reward") is not None:
                points[row["step"]].append((row["kl"], row["reward"]))
    kls, rewards = [], []
    for step in sorted(points):
        if len(points[step]) < len(runs):
            continue
        step_kls, step_rewards = zip(*points[step])
        kls.append(mean(step_kls))
        rewards.append(mean(step_rewards))
    return kls, rewards


def write_labels(axes, labels):
    """The lines' names on the right of a picture, a line's height apart."""
    bottom, top = axes.get_ylim()
    _, right = axes.get_xlim()
    line = 0.05 * (top - bottom)
    place = -math.inf
    for reward, kl, name, colour in sorted(labels):
        place = max(reward, place + line)
        arrow = dict(arrowstyle="-", color=colour, linestyle=":", relpos=(0, 0.5))
        axes.annotate(name, (kl, reward), (right, place), color=colour, va="center", arrowprops=arrow,
                      parse_math=False)


# --- the comparison -----------------------------------------------------------------------------------------

def compare(paths, out=None, show=0, best=None, curve=()):
    """Print runs as a markdown table, and their last answers to the first `show` held-out prompts; write
    figures to `out` and a picture beside it. best, curve: see `best_possible`."""
    found = read_runs(paths)
    out = Path(out or next(iter(found)).parent / "results.json")
    groups, results, seeds = groups_of(found), {}, {}
    for name, runs in groups.items():
        results[name] = {}
        seeds[name] = len(runs)
        last = [rows[-1] for rows in runs]
        for column in COLUMNS:
            figure = figure_of(column, last)
            if figure:
                results[name][column] = figure
        if best and "objective" in results[name]:
            value, low, high = results[name]["objective"]
            top = best["best"]
            results[name]["gap"] = top - value, top - high, top - low
    if len(found) == len(groups):
        seeds = None
    print_table(results, seeds)
    if show:
        print_samples({str(path): last_samples(path) for path in found}, show)
    write_figures(results, out)
    plot(groups, results, curve, out.with_suffix(".png"))
    print("\n95 % intervals, as ± half or as [low, high]: over seeds (t) if there are several, else over "
          f"prompts\nfigures in {out}, picture in {out.with_suffix('.png')}")
    if best:
        print(f"the best reward − β·KL at β {best['temperature']:g} is {best['best']:.3f} ± "
              f"{best['error']:.3f}, reward {best['reward']:.2f} at KL {best['kl']:.2f} (effective sample "
              f"size {best['effective']:.0f})")


def refuse_comparison(out):
    """Raises InputError if the figures, or the picture beside them, cannot be written to these names."""
    if out.suffix != ".json":
        raise InputError(f"--out {out}: want the name of a .json file; the picture stands beside it as .png")
    refuse_output(out, are_figures)
    picture = out.with_suffix(".png")
    if picture.exists() and not out.exists():
        raise InputError(f"{picture} is there without figures of --compare beside it; give another --out")
