"""Runs side by side: the table of their figures, the picture, the best that is possible.

What a run has measured is read from its logs, eval.jsonl and samples.jsonl; no model is loaded here. Figures
stand in one table only if they were measured on the same reward, held-out pairs, lengths, β and reference,
as far as each of these played a part. Only runs that differ in their seed may have different references.
"""
import io
import json
import math
import operator
import os
import re
import textwrap
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import mean

import torch

from runtime.command_line import InputError
from runtime.intervals import format_figure, mean_of
from runtime.run_directory import (
    evaluation_of, float_of, is_run_directory, parse_json, read_json, read_log, refuse_output,
    run_that_held_out, write_bytes, write_text)
from runtime.settings import Settings, flag_of

# --- what finished runs have measured -----------------------------------------------------------------------

def read_runs(paths):
    """Read {path: evaluations} of the runs of sail.py or reward.py that have a model and held-out figures.
    For every other path, a line is printed that says why it is left out. Raises InputError if no run is left,
    or if a log has a line that no run has written."""
    runs = {}
    for path in map(Path, paths):
        why = "it is no run; evaluate.py without --compare measures any model"
        if is_run_directory(path):
            why = "it has no model yet, or no eval.jsonl"
        if (path / "model").is_dir() and (path / "eval.jsonl").is_file():
            evaluations = read_log(path / "eval.jsonl", evaluation_of)
            if evaluations:
                runs[path] = evaluations
                continue
            why = ("no pair was held out in it, so it has no figures; evaluate.py without --compare, with "
                   "--eval-data, measures it")
        print(f"{path} is left out: {why}")
    if not runs:
        raise InputError("--compare: the arguments name no finished run with held-out figures")
    return runs


def sample_of(row):
    """A row of samples.jsonl, {"step": 5, "prompt": a text or messages, "response": a text, …}; its `reward`
    becomes a float. Raises KeyError, TypeError, ValueError or OverflowError for another row."""
    operator.index(row["step"])
    prompt = row["prompt"]
    if isinstance(prompt, list):
        prompt = dict(*prompt[-1:])["content"]
    for text in (prompt, row["response"]):
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no text")
    if "reward" in row:
        row["reward"] = float_of(row["reward"])
    return row


def last_samples(path):
    """The rows of samples.jsonl that a run's last evaluation has written."""
    rows = read_log(path / "samples.jsonl", sample_of)
    return [row for row in rows if row["step"] == rows[-1]["step"]]


# --- what may stand side by side ----------------------------------------------------------------------------

MEASURED_ON = ("reward", "pairs", "lengths", "reference", "beta")


@dataclass
class Table:
    """Groups of runs whose figures may stand side by side, since they were measured under the same
    conditions."""
    measured_on: dict[str, str | None]                               # the conditions of MEASURED_ON, in words
    groups: dict[str, list] = field(default_factory=dict)              # name: the evaluations of each run
    paths: list[Path] = field(default_factory=list)                    # the paths of all runs


def measured_on(path):
    """The conditions under which a run's figures were measured, {condition of MEASURED_ON: words}, from its
    args.json. A condition that played no part is None. For example, a run without a reference, such as SFT,
    has no KL and no margin, so β does not matter either."""
    conditions = dict.fromkeys(MEASURED_ON)
    if not (path / "args.json").is_file():
        return conditions
    args = texts_of_settings(path)
    conditions["pairs"] = f"up to {args['eval_limit']} pairs of {held_out_of(args)}"
    for name in ("prefer", "score_scale", "chat_template"):
        if args[name] not in (None, getattr(Settings, name)):
            conditions["pairs"] += f" with {flag_of(name)} {args[name]}"
    if args["max_response_length"] is None:                # this is a reward model
        conditions["lengths"] = f"dialogues of as many tokens as {args['model']} takes"
        if args["max_length"]:
            conditions["lengths"] = f"dialogues of up to {args['max_length']} tokens"
    else:
        conditions["lengths"] = (f"prompts of up to {args['max_prompt_length']} tokens, responses of up to "
                                 f"{args['max_response_length']}")
    if args["reward"]:
        reward = with_fingerprint(args["reward"], args["reward_sha256"])
        conditions["reward"] = f"reward {reward}"
    elif ".py:" in (args["preference"] or ""):
        preference = with_fingerprint(args["preference"], args["preference_sha256"])
        conditions["reward"] = f"preference {preference}"
    if args["reference"]:
        reference = with_fingerprint(args["reference"], args["reference_sha256"])
        conditions["reference"] = f"reference {reference}"
        conditions["beta"] = f"β {args['beta']}"
    return conditions


def texts_of_settings(run):
    """The settings of a run as texts, {name: text}; None for a setting that it lacks, or that is null."""
    texts = defaultdict(lambda: None)
    for name, value in read_json(run / "args.json").items():
        if value is not None:
            texts[name] = str(value)
    return texts


def held_out_of(args):
    """Which pairs the run with these settings held out, in words."""
    if args["eval_data"] and is_run_directory(Path(args["eval_data"])):
        args = texts_of_settings(run_that_held_out(args["eval_data"]))
    pairs = args["eval_data"] or str(args["data"])
    if Path(pairs).exists():
        pairs = os.path.relpath(pairs)                     # one text for all spellings of a path
    if args["eval_data"] is None:
        pairs = f"{pairs}, one prompt in twenty of {args['limit'] or 'all'} pairs"
    return pairs


def with_fingerprint(source, sha256):
    """The last two parts of a path or name, or the last one of FILE.py:FUNCTION, since a path may be given in
    several ways, and the beginning of the files' SHA-256."""
    parts = Path(source).parts[-2:]
    if ".py:" in source:
        parts = parts[-1:]
    return f"{'/'.join(parts)} ({str(sha256)[:8]})"


def groups_of(conditions):
    """Group the runs that pass for seeds of one run: {name: paths}, from {path: its `measured_on`}. The paths
    of a group differ at most in their ending -sN, and its conditions at most in the reference; no other
    setting is compared. A name is the end of the path without -sN. If several groups share that path, the
    names of their runs follow it in brackets."""
    groups = defaultdict(list)
    for path, words in conditions.items():
        variant = Path(re.sub(r"-s\d+$", "", str(path)))
        shared = {**words, "reference": None}
        groups[variant, tuple(shared.values())].append(path)
    times = Counter(variant for variant, _ in groups)
    paths = []
    for (variant, _), seeds in groups.items():
        if times[variant] > 1:                             # groups of this name have unlike conditions
            seed_names = ", ".join(path.name for path in seeds)
            variant = variant.with_name(f"{variant.name} ({seed_names})")
        paths.append(variant)
    return dict(zip(short_names(paths), groups.values(), strict=True))


def short_names(paths, length=1):
    """The last parts of different paths: `length` parts of each, or as many as tell the paths apart."""
    names = []
    while len(set(names)) < len(paths):
        names = [str(Path(*path.parts[-length:])) for path in paths]
        length += 1
    return names


def tables_of(found):
    """Sort runs, {path: evaluations}, into tables. Each group of seeds goes into the first table whose runs
    were measured under the same conditions."""
    conditions = {path: measured_on(path) for path in found}
    tables = []
    for name, paths in groups_of(conditions).items():
        words = dict(conditions[paths[0]])
        if words["reference"]:
            references = {conditions[path]["reference"] for path in paths}
            words["reference"] = ", ".join(sorted(references))
        table = table_for(tables, words)
        for what in MEASURED_ON:
            table.measured_on[what] = table.measured_on[what] or words[what]
        table.groups[name] = [found[path] for path in paths]
        table.paths += paths
    return tables


def table_for(tables, words):
    """The first table whose runs were measured under these conditions. If there is none, a new table is
    appended to `tables`."""
    for table in tables:
        if are_alike(table.measured_on, words):
            return table
    table = Table(dict.fromkeys(MEASURED_ON))
    tables.append(table)
    return table


def are_alike(first, second):
    """Whether two sets of conditions are the same, apart from conditions that are None in one of them."""
    for what in MEASURED_ON:
        if None not in (first[what], second[what]) and first[what] != second[what]:
            return False
    return True


def heading_of(table):
    """The line above a table, which says under which conditions its figures were measured."""
    words = filter(None, table.measured_on.values())
    return printable(f"Measured on: {'; '.join(words) or 'unknown'}")


# --- figures ------------------------------------------------------------------------------------------------

def figure_of(name, evaluations):
    """(value, low, high) of one figure. The interval of a single evaluation is over pairs. If there are
    several evaluations, one for each seed, the interval is over seeds. None if an evaluation has not measured
    the figure."""
    figures = [evaluation.figures.get(name) for evaluation in evaluations]
    if None in figures:
        return None
    if len(figures) == 1:
        return figures[0]
    return mean_of([value for value, _, _ in figures])


# --- tables, files ------------------------------------------------------------------------------------------

# The figures of the tables, and their heads.
COLUMNS = {"reward": "reward", "kl": "KL", "objective": "reward − β·KL", "gap": "below the best",
           "win_rate": "win rate", "length": "length", "unfinished": "unfinished",
           "cut_for_reward": "cut for the reward", "margin": "margin", "accuracy": "accuracy"}

def printable(text):
    """The text without characters that control a terminal, except newline and tab, and without lone
    surrogates, which cannot be printed. Of an escape sequence, only its visible characters are left."""
    kept = []
    for character in text:
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs"):
            kept.append(character)
    return "".join(kept)


def print_table(results, seeds=None):
    """Print results, {model: {name: figure}}, as a markdown table of the figures that COLUMNS names. seeds,
    {model: number of its runs}, becomes a column."""
    measured = set().union(*results.values())
    columns, heads = [], []
    if seeds:
        heads.append("runs")
    for name, head in COLUMNS.items():
        if name in measured:
            columns.append(name)
            heads.append(head)
    print(f"| | {' | '.join(heads)} |")
    print("|---|" + "---|" * len(heads))
    for model, figures in results.items():
        cells = [printable(model)]
        if seeds:
            cells.append(str(seeds[model]))
        for name in columns:
            if name in figures:
                cells.append(format_figure(*figures[name]))
            else:
                cells.append("")
        print(f"| {' | '.join(cells)} |")


def write_figures(results, path):
    """Write {model: {name: (value, low, high)}} as JSON, triples as objects. A non-finite number is null."""
    written = {}
    for model, figures in results.items():
        written[model] = {}
        for name, figure in figures.items():
            ends = dict(zip(("value", "low", "high"), figure, strict=True))
            for end in ends:
                if not math.isfinite(ends[end]):
                    ends[end] = None
            written[model][name] = ends
    write_text(path, json.dumps(written, indent=1) + "\n")


def are_figures(text):
    """Whether a text has the form of those that `write_figures` writes."""
    try:
        for figures in parse_json(text).values():
            for figure in figures.values():
                if {*figure} != {"value", "low", "high"}:
                    return False
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def print_samples(samples, count):
    """Print the answers of all models, {model: rows of samples}, to the first model's first `count` prompts,
    one prompt after the other."""
    first, *others = samples.values()
    if len(first) < count:
        print(f"\nonly {len(first)} of the {count} prompts have answers")
    for nth, row in enumerate(first[:count]):
        prompt, rows = row["prompt"], [row]
        for theirs in others:
            rows.append({"response": "(this model was not asked this prompt)"})
            for candidate in theirs[nth:nth + 1] + theirs:             # the row in the same place comes first
                if candidate["prompt"] == prompt:
                    rows[-1] = candidate
                    break
        if isinstance(prompt, list):                       # a dialogue is shown by its last message
            prompt = prompt[-1]["content"]
        print(f"\n>>> {printable(prompt)}")
        for model, row in zip(samples, rows, strict=True):
            print(f"--- {printable(model)}")
            if "reward" in row:
                print(f"(reward {row['reward']:.3f})")
            print(printable(row["response"]))


# --- the best possible --------------------------------------------------------------------------------------

def frontier(rewards, temperatures, counts=None):
    """The best that any policy can do, from the rewards of samples of the reference, (P prompts, n samples).
    counts: how often each prompt is among the held-out pairs, once by default. For each temperature t this is
    the policy π_t ∝ π_ref·exp(r/t), which has the highest reward of all policies with the same KL.

    The samples are weighted by exp(r/t), self-normalised importance sampling. Returns a list of rows, dicts:
    temperature, t; kl in nats per response; reward; best, the highest reward − t·KL, which is t·log E_ref
    exp(r/t); error, half the 95 % interval of `best` and of the curve's height at that KL, for these prompts;
    effective, the smallest effective sample size (Σw)²/Σw² of a prompt. A row with less than 30 is left
    out."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    prompts, n = rewards.shape
    shares = torch.as_tensor(counts or [1] * prompts, dtype=torch.float64)
    shares = shares / shares.sum()
    rows = []
    for t in temperatures:
        scaled = rewards / t
        weights = scaled.softmax(-1)                                                       # (P, n)
        effective = 1 / weights.square().sum(-1)                                           # (P,)
        poorest = effective.min().item()
        if poorest < 30:
            continue
        reward = (weights * rewards).sum(-1)
        log_mean = scaled.logsumexp(-1) - math.log(n)          # the log of the mean of exp(r/t)
        variance = (1 / effective - 1 / n).clamp(min=0)        # rounding may leave it a little below 0
        row = {"temperature": t, "reward": (shares @ reward).item(), "best": t * (shares @ log_mean).item()}
        row["kl"] = (row["reward"] - row["best"]) / t
        row["error"] = 1.96 * t * (shares.square() @ variance).sqrt().item()
        row["effective"] = poorest
        rows.append(row)
    return rows


# --- the picture --------------------------------------------------------------------------------------------

COLOURS = dict(zip("sft dpo dp pp online-dpo pr pr-1 spin".split(),             # the colours of Okabe and Ito
                   "#000000 #0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #7F7F7F".split(), strict=True))


def plot(tables, results, curve, best_run, path):
    """Write a PNG of held-out reward against KL, with a panel for each table. A large point is the end of a
    run, or the mean of its seeds. The line to it passes through the earlier evaluations. Groups without a
    reward are left out. results: {group: figures}. The curve, rows of `frontier`, is drawn in the panel of
    the run `best_run`."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8 * len(tables), 5), layout="constrained")
    panels = figure.subplots(1, len(tables), squeeze=False)
    for axes, table in zip(panels[0], tables, strict=True):
        labels = draw_groups(axes, table.groups, results)
        axes.set_xlabel("KL(π‖π_ref), nats per response")
        axes.set_ylabel("held-out reward")
        if len(tables) > 1:
            axes.set_title(textwrap.fill(heading_of(table), 100), fontsize=8, parse_math=False)
        if curve and best_run in table.paths:
            labels.append(draw_best(axes, curve))
        write_labels(axes, labels)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_bytes(path, picture.getvalue())


def draw_groups(axes, groups, results):
    """Draw each group that has a reward; returns where their lines end, [(reward, kl, name, colour)]."""
    ends = []
    spare = [colour for name, colour in COLOURS.items() if name not in groups]
    spare = cycle(spare or COLOURS.values())
    for name, runs in groups.items():
        if "reward" not in results[name]:
            continue
        colour = COLOURS.get(name) or next(spare)
        reward, low, high = results[name]["reward"]
        kl, left, right = results[name].get("kl", (0.0, 0.0, 0.0))     # SFT has no reference
        height = [[reward - low], [high - reward]]
        width = [[kl - left], [right - kl]]
        axes.errorbar(kl, reward, height, width, color=colour, marker="o", capsize=3)
        kls, rewards = track_of(runs)
        axes.plot(kls, rewards, ".-", color=colour)
        ends.append((reward, kl, name, colour))
    return ends


def draw_best(axes, curve):
    """Draw the best possible reward at each KL that the picture shows; returns where the line ends."""
    _, right = axes.get_xlim()
    inside = [(row["kl"], row["reward"]) for row in curve if row["kl"] < right]
    kls, rewards = zip(*sorted(inside), strict=True)
    axes.plot(kls, rewards, color="black", linestyle="--", linewidth=1, scalex=False)
    return rewards[-1], kls[-1], "best possible", "black"


def track_of(runs):
    """(KLs, rewards): their means over seeds at each step at which all runs have measured both."""
    points = defaultdict(list)
    for evaluations in runs:
        for evaluation in evaluations:
            if "kl" in evaluation.figures and "reward" in evaluation.figures:
                kl, _, _ = evaluation.figures["kl"]
                reward, _, _ = evaluation.figures["reward"]
                points[evaluation.step].append((kl, reward))
    kls, rewards = [], []
    for step in sorted(points):
        if len(points[step]) == len(runs):
            step_kls, step_rewards = zip(*points[step], strict=True)
            kls.append(mean(step_kls))
            rewards.append(mean(step_rewards))
    return kls, rewards


def write_labels(axes, ends):
    """Write the names of lines, which end at [(reward, kl, name, colour)], on the right of a picture. Names
    are at least the height of a line of text apart."""
    bottom, top = axes.get_ylim()
    _, right = axes.get_xlim()
    line = 0.05 * (top - bottom)
    place = -math.inf
    for reward, kl, name, colour in sorted(ends):
        place = max(reward, place + line)
        arrow = dict(arrowstyle="-", color=colour, linestyle=":", relpos=(0, 0.5))
        axes.annotate(printable(name), (kl, reward), (right, place), color=colour, va="center",
                      arrowprops=arrow, parse_math=False)


# --- the comparison -----------------------------------------------------------------------------------------

def compare(paths, out, show=0, best=None, curve=(), best_run=None):
    """Print finished runs as markdown tables, one for each set of conditions under which they were measured,
    and their last answers to the first `show` held-out prompts. Write the figures to the file `out`, and a
    picture beside them. Raises InputError as `read_runs` does. best, curve, best_run: what `best_possible`
    returns."""
    found = read_runs(paths)
    tables = tables_of(found)
    results = {}
    for nth, table in enumerate(tables):
        best_here = None
        if best_run in table.paths:
            best_here = best
        for name, runs in table.groups.items():
            results[name] = results_of(runs, best_here)
        if nth:
            print()
        print(f"{heading_of(table)}\n")
        print_groups(table.groups, results)
        if show:
            print_samples({str(path): last_samples(path) for path in table.paths}, show)
    write_figures(results, out)
    picture = out.with_suffix(".png")
    plot(tables, results, curve, best_run, picture)
    print("\nwins are over the data's chosen responses, as the reward or the preference decides\n"
          "95 % intervals, written ± half or [low, high], are over seeds if there are several, else over "
          "held-out pairs\n"
          f"the figures are in {out}, the picture is in {picture}")
    if best:
        print(f"the best reward − β·KL at β {best['temperature']:g} is {best['best']:.3f} ± "
              f"{best['error']:.3f}, at reward {best['reward']:.2f}, KL {best['kl']:.2f} (effective sample "
              f"size {best['effective']:.0f})")


def print_groups(groups, results):
    """Print the table of the groups' results. If all runs of a group were evaluated before the first step and
    again later, the first figures are a row above the group. Groups in which they are the same share one row,
    above the first of them."""
    began = {}                                             # name: the figures at step 0
    for name, runs in groups.items():
        first = [evaluations[0] for evaluations in runs]
        trained = min(map(len, runs)) > 1
        if trained and max(evaluation.step for evaluation in first) == 0:
            began[name] = figures_of(first)
    rows, seeds = {}, {}
    for name, runs in groups.items():
        if name in began:
            alike = [other for other in began if began[other] == began[name]]
            before = f"step 0 of {', '.join(alike)}"
            rows[before], seeds[before] = began[name], len(runs)
        rows[name], seeds[name] = results[name], len(runs)
    if max(seeds.values()) == 1:
        seeds = None
    print_table(rows, seeds)


def figures_of(evaluations):
    """{name: figure} of the columns that all evaluations, one of each seed, have measured."""
    figures = {}
    for name in COLUMNS:
        figure = figure_of(name, evaluations)
        if figure:
            figures[name] = figure
    return figures


def results_of(runs, best):
    """{name: (value, low, high)} of the last evaluations of a group's runs. best: the row at β that
    `best_possible` returns, or None if it is not known. If it is known and the runs have an objective, the
    figure `gap` says how far the objective stays below it."""
    results = figures_of([evaluations[-1] for evaluations in runs])
    if best and "objective" in results:
        value, low, high = results["objective"]
        results["gap"] = best["best"] - value, best["best"] - high, best["best"] - low
    return results


def refuse_comparison(out):
    """Raises InputError if `out` is no .json file that --compare may write, or if a picture without figures
    lies where its picture would be; raises OSError if `out` cannot be written."""
    if out.suffix != ".json":
        raise InputError(f"--out {out}: give the name of a .json file; the picture is put beside it as .png")
    refuse_output(out, are_figures)
    picture = out.with_suffix(".png")
    if picture.exists() and not out.exists():
        raise InputError(f"{picture} exists, but no {out.name} of --compare beside it; give another --out")
