"""The toy world with controls: what do fresh responses, soft labels, T2, T3 and more gain at equal steps?

    python experiments/replicate.py             # all, five seeds; tables

Tables go to the screen, the raw rows, one line per run, to experiments/replication.jsonl, the picture, if all
of its runs were made here, to experiments/results.png. Runs that are finished are kept, and no run that has a
row is run again, so that the study can be stopped and goes on, also in another place.

Each seed has its own SFT model, which its other runs start from and are measured against, and 18,000 pairs
that this model sampled. A run takes 188 steps of 96 pairs, which is 18,000 once, unless its name says
otherwise. Drawn labels are drawn from Bradley-Terry on the reward, soft ones are its probability. The
objective is reward − β·KL at β 0.5, on 1,024 responses to 20 held-out prompts. The best that any policy can
have is known from samples of the seed's SFT model.
"""
import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from formats import read_rows
from evaluate import best_possible
from runtime.command_line import InputError, command_line, seeded
from runtime.intervals import mean_of
from runtime.run_directory import read_json, write_rows
from toy import draw_toy_pairs, toy_reward, toy_settings, write_world

FIRST_SEED = 5                             # seeds 0 to 4 and 100 to 102 have chosen the toy's learning rate
STEPS, FEW_LABELS = 188, 4500
NEW_PAIRS = {"toy-rounds": [3600] * 5, "toy-few-rounds": [900] * 5}         # of each round
HALVES = {"toy-clear-first": ["clear", "close"], "toy-close-first": ["close", "clear"],
          "toy-halves": ["half", "rest"]}                                   # the file of each round
METHODS = {                                # name: (what it is, flags)
    "sft": ("SFT", "--variant sft"),
    "dpo": ("DPO", "--variant dpo"),
    "dpo-soft": ("DPO, soft labels", "--variant relabelled-dpo"),
    "dpo-soft-0.3": ("DPO, soft labels on 30 %", "--variant relabelled-dpo --mix 0.3"),
    "dp": ("SAIL-DP", "--variant dp"),
    "dp-control": ("SAIL-DP without T3", "--variant dp --label-coef 0"),
    "dp-revkl": ("SAIL-DP, RevKL 0.03", "--variant dp --revkl-coef 0.03"),
    "dp-smoothing": ("SAIL-DP, label smoothing 0.1", "--variant dp"),
    "dp-nll": ("SAIL-DP, NLL 0.1", "--variant dp --nll-coef 0.1"),
    "pp": ("SAIL-PP, RevKL 0.3", "--variant pp --revkl-coef 0.3"),
    "pp-control": ("DPO, RevKL 0.3", "--variant dpo --revkl-coef 0.3"),
    "pp-no-revkl": ("SAIL-PP without RevKL", "--variant pp --revkl-coef 0"),
    "online-dpo": ("online DPO, soft labels", "--variant online-dpo"),
    "online-drawn": ("online DPO, drawn labels", "--variant online-dpo"),
    "pr": ("SAIL-PR, T2 × 0.3", "--variant pr"),
    "pr-1": ("SAIL-PR, T2 × 1", "--variant pr --response-coef 1"),
    "ipo": ("IPO", "--variant dpo --loss-type ipo"),
    "hinge": ("DPO with a hinge", "--variant dpo --loss-type hinge"),
    "online-ipo": ("online IPO, soft labels", "--variant online-dpo --loss-type ipo"),
    "dpo-0.433": ("DPO, β 0.433", "--variant dpo --beta 0.433"),
    "dpo-smoothing": ("DPO, label smoothing 0.05", "--variant dpo"),
    "few-fresh": ("online DPO, 4,500 labels drawn once", "--variant online-dpo --steps 47")}
WORLDS = {                                 # name: (what it is, flags of its data, methods)
    "toy": ("18,000 pairs, mix 0.3 where there are own pairs", "--data toy",
            "dpo dpo-soft dpo-soft-0.3 online-dpo online-drawn pr pr-1 dp dp-control pp pp-control "
            "pp-no-revkl ipo hinge dpo-0.433 dpo-smoothing"),
    "toy-online": ("own pairs only, mix 1", "--data toy --mix 1",
                   "online-dpo online-drawn pr pr-1 online-ipo few-fresh"),
    "toy-flipped": ("18,000 pairs, 20 % of the labels flipped", "--data {folder}/flipped.jsonl {toy}",
                    "dpo dp dp-control online-dpo pr pp pp-control"),
    "toy-quarter": ("4,500 pairs, seen four times", "--data toy",
                    "dpo dp dp-control dp-revkl dp-smoothing dp-nll online-dpo pr pp pp-control"),
    "toy-model": ("own pairs only, labels of a reward model of 4,500 pairs",
                  "--data toy --mix 1 --reward {folder}/reward/model", "online-dpo"),
    "toy-rounds": ("five rounds of 38 steps on 3,600 new pairs, labels drawn", None, "dpo"),
    "toy-few-rounds": ("five rounds of 38 steps on 900 new pairs, labels drawn", None, "dpo"),
    "toy-clear-first": ("two rounds of 94 steps: the pairs of the larger differences, then the others", None,
                        "dpo"),
    "toy-close-first": ("two rounds of 94 steps: the pairs of the smaller differences, then the others", None,
                        "dpo"),
    "toy-halves": ("two rounds of 94 steps: a random half of the pairs, then the others", None, "dpo"),
    "toy-half": ("9,000 pairs, seen twice", "--data {folder}/half.jsonl {toy}", "dpo"),
    "toy-clear": ("the 9,000 pairs of the larger differences", "--data {folder}/clear.jsonl {toy}", "dpo"),
    "toy-other": ("18,000 pairs of another seed's model", "--data {other} {toy}", "dpo")}
UNFLAGGED = {                              # settings that are no flags, by method or world
    "dp-smoothing": dict(label_smoothing=0.1), "dpo-smoothing": dict(label_smoothing=0.05),
    "online-drawn": dict(label="sampled"), "few-fresh": dict(label="sampled"),
    "toy-quarter": dict(limit=FEW_LABELS)}
# What is compared: (question, (world, method), (world, its control)).
COMPARED = (
    ("Soft labels instead of drawn ones, offline", ("toy", "dpo-soft"), ("toy", "dpo")),
    ("Soft labels instead of drawn ones, fully online", ("toy-online", "online-dpo"),
     ("toy-online", "online-drawn")),
    ("Fresh responses instead of the data's, drawn labels, fully online",
     ("toy-online", "online-drawn"), ("toy", "dpo")),
    ("Fresh responses instead of the data's, drawn labels, mix 0.3", ("toy", "online-drawn"), ("toy", "dpo")),
    ("Fresh responses instead of the data's, soft labels, fully online",
     ("toy-online", "online-dpo"), ("toy", "dpo-soft")),
    ("Fresh responses instead of the data's, soft labels, mix 0.3",
     ("toy", "online-dpo"), ("toy", "dpo-soft-0.3")),
    ("T2 × 0.3 (SAIL-PR), mix 0.3", ("toy", "pr"), ("toy", "online-dpo")),
    ("T2 × 1, mix 0.3", ("toy", "pr-1"), ("toy", "online-dpo")),
    ("T2 × 0.3, fully online", ("toy-online", "pr"), ("toy-online", "online-dpo")),
    ("T2 × 1, fully online", ("toy-online", "pr-1"), ("toy-online", "online-dpo")),
    ("T3 (SAIL-DP)", ("toy", "dp"), ("toy", "dp-control")),
    ("T3, a quarter of the pairs", ("toy-quarter", "dp"), ("toy-quarter", "dp-control")),
    ("T3, a fifth of the labels flipped", ("toy-flipped", "dp"), ("toy-flipped", "dp-control")),
    ("SAIL-PP minus DPO, both with RevKL 0.3", ("toy", "pp"), ("toy", "pp-control")))
ASKED = (
    ("4,500 labels: online DPO with a reward model of them, minus DPO on them",
     ("toy-model", "online-dpo"), ("toy-quarter", "dpo")),
    ("4,500 labels: online DPO that spends each once, minus DPO on them",
     ("toy-online", "few-fresh"), ("toy-quarter", "dpo")),
    ("4,500 labels: online DPO with a reward model of them, minus online DPO that spends each once",
     ("toy-model", "online-dpo"), ("toy-online", "few-fresh")),
    ("Five rounds of DPO on new pairs minus one round, drawn labels", ("toy-rounds", "dpo"), ("toy", "dpo")),
    ("New pairs at each step minus five rounds, drawn labels", ("toy-online", "online-drawn"),
     ("toy-rounds", "dpo")),
    ("The half with the larger reward differences minus a random half",
     ("toy-clear", "dpo"), ("toy-half", "dpo")),
    ("Pairs of another model minus pairs of its own", ("toy-other", "dpo"), ("toy", "dpo")),
    ("DP with RevKL 0.03 minus DP, a quarter of the pairs",
     ("toy-quarter", "dp-revkl"), ("toy-quarter", "dp")),
    ("DP with label smoothing 0.1 minus DP, a quarter of the pairs",
     ("toy-quarter", "dp-smoothing"), ("toy-quarter", "dp")),
    ("DP with NLL 0.1 minus DP, a quarter of the pairs", ("toy-quarter", "dp-nll"), ("toy-quarter", "dp")),
    ("IPO minus DPO", ("toy", "ipo"), ("toy", "dpo")),
    ("A hinge minus DPO's log σ", ("toy", "hinge"), ("toy", "dpo")),
    ("IPO minus DPO, fully online, soft labels", ("toy-online", "online-ipo"), ("toy-online", "online-dpo")))
NEGLIGIBLE = 0.05                          # of reward − β·KL: a fortieth of what the best policy has
# What was asked after rows of these worlds had been seen.
EXPLORED = (
    ("SAIL-PR minus DPO", ("toy", "pr"), ("toy", "dpo")),
    ("SAIL-PR minus DPO with soft labels", ("toy", "pr"), ("toy", "dpo-soft")),
    ("SAIL-DP minus DPO", ("toy", "dp"), ("toy", "dpo")),
    ("SAIL-DP minus DPO at β 0.433", ("toy", "dp"), ("toy", "dpo-0.433")),
    ("DPO with label smoothing 0.05 minus DPO", ("toy", "dpo-smoothing"), ("toy", "dpo")),
    ("4,500 labels: five rounds of DPO on 900 each, minus DPO on all at once",
     ("toy-few-rounds", "dpo"), ("toy-quarter", "dpo")),
    ("4,500 labels: online DPO with a reward model of them, minus five rounds of 900",
     ("toy-model", "online-dpo"), ("toy-few-rounds", "dpo")),
    ("T2 × 0.3 (SAIL-PR), a quarter of the pairs", ("toy-quarter", "pr"), ("toy-quarter", "online-dpo")),
    ("T2 × 0.3, a fifth of the labels flipped", ("toy-flipped", "pr"), ("toy-flipped", "online-dpo")),
    ("SAIL-PP minus DPO, both with RevKL 0.3, a quarter of the pairs",
     ("toy-quarter", "pp"), ("toy-quarter", "pp-control")),
    ("SAIL-PP minus DPO, both with RevKL 0.3, a fifth of the labels flipped",
     ("toy-flipped", "pp"), ("toy-flipped", "pp-control")),
    ("SAIL-PR on a quarter of the pairs minus DPO on all", ("toy-quarter", "pr"), ("toy", "dpo")),
    ("SAIL-PP on a quarter of the pairs minus DPO on all, both with RevKL 0.3",
     ("toy-quarter", "pp"), ("toy", "pp-control")),
    ("Clear pairs first minus random halves", ("toy-clear-first", "dpo"), ("toy-halves", "dpo")),
    ("Close pairs first minus random halves", ("toy-close-first", "dpo"), ("toy-halves", "dpo")))
GAINED = {"reward": "reward", "KL": "kl", "reward − β·KL": "objective"}
# Of the picture, in which nobody could tell more apart.
PICTURE = (("toy", "sft"), ("toy", "dpo"), ("toy", "dpo-soft"), ("toy", "dp"), ("toy", "pp"),
           ("toy-online", "online-dpo"), ("toy-online", "pr"))
# What `--data toy` implies, spelled out for the pairs that come from a file.
TOY = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in toy_settings("dpo").items()
               if name not in ("data", "model", "schedule"))
SCHEDULE = dict(schedule=toy_settings("dpo")["schedule"])
BETA = toy_settings("dpo")["beta"]
ROWS = ROOT / "experiments/replication.jsonl"


def run(script, *flags, **chosen):
    """One command of the project, with settings that are no flags, on one thread; InputError if it fails,
    which it has explained itself."""
    flags = [str(flag) for flag in flags]
    code = f"import {script}; {script}.command_line(lambda: {script}.main({flags}, **{chosen}))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL,
                          env={**os.environ, "OMP_NUM_THREADS": "1",
                               "PYTHONPATH": f"{ROOT}:{ROOT}/experiments"})
    if done.returncode:
        raise InputError(f"{script}.py {' '.join(flags)}: ended with status {done.returncode}")


def train(job):
    """One run of sail.py, or of another script with its flags, unless it is there already. A finished run
    keeps its model and not its checkpoints, each of which holds the optimizer's state as well."""
    out, flags, chosen, *script = job
    if not (out / "model").is_dir():                                   # which is the last that a run writes
        again = ["--resume"] if (out / "args.json").is_file() else []  # it was stopped
        run(*(script or ["sail"]), *flags.split(), *again, "--out", out, **chosen)
        if (out / "checkpoints").is_dir():
            shutil.rmtree(out / "checkpoints")


def train_all(jobs, at_a_time, name):
    """All runs, (directory, flags, settings that are no flags) each, some at a time."""
    with ThreadPoolExecutor(at_a_time) as pool:
        list(tqdm(pool.map(train, jobs), name, len(jobs)))


# --- data ---------------------------------------------------------------------------------------------------

def flipped_pairs(pairs, share=0.2):
    """The pairs, `share` of them with the label flipped."""
    rng, flipped = random.Random(seeded("flipped")), []                # not the stream that drew the prompts
    for pair in pairs:
        flip = rng.random() < share
        flipped.append({**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} if flip else pair)
    return flipped


def by_difference(pairs):
    """(the half of the pairs whose toy rewards differ more, the other half), each in the order of `pairs`. Of
    an odd number of pairs the second half has one more."""
    gaps = []
    for pair in pairs:
        first, second = toy_reward([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]])
        gaps.append(abs(first - second))
    widest, half = sorted(range(len(pairs)), key=lambda i: -gaps[i]), len(pairs) // 2
    return [pairs[i] for i in sorted(widest[:half])], [pairs[i] for i in sorted(widest[half:])]


def write_data(model, folder):
    """Write the pairs that an SFT model has sampled, and the variations of them that other worlds need."""
    source = model / "toy-pairs.jsonl"
    if not source.is_file():
        draw_toy_pairs(str(model), source)
    pairs = read_rows(source)
    write_rows(folder / "flipped.jsonl", flipped_pairs(pairs))
    write_rows(folder / "half.jsonl", pairs[:len(pairs) // 2])
    write_rows(folder / "rest.jsonl", pairs[len(pairs) // 2:])
    clear, close = by_difference(pairs)
    write_rows(folder / "clear.jsonl", clear)
    write_rows(folder / "close.jsonl", close)


def train_reward(model, out):
    """Train a reward model on the first 4,500 pairs of an SFT model."""
    if not (out / "model").is_dir():
        run("reward", "--train", "--model", model, "--data", model / "toy-pairs.jsonl", "--eval-data",
            toy_settings("dpo")["eval_data"], "--learning-rate", 4e-4, "--epochs", 2, "--max-length", 32,
            "--overwrite", "--out", out, limit=FEW_LABELS)


def train_rounds(runs, world, seed, model):
    """Train DPO in rounds, each of which starts from the policy of the round before. The first one starts
    from `model`, the seed's SFT model, which stays the reference. In a world of NEW_PAIRS the pairs of a
    round are sampled by the policy that it starts from, in a world of HALVES they are those of a file. The
    rounds share the steps of one run. The last round's run is written to runs/WORLD/dpo-sSEED, the others
    beside the seed's data."""
    policy, folder = model, runs / f"data/s{seed}"
    rounds = NEW_PAIRS.get(world) or HALVES[world]
    for k, source in enumerate(rounds):
        out, pairs = folder / f"{world}-{k}", folder / f"{source}.jsonl"
        if k == len(rounds) - 1:
            out = runs / f"{world}/dpo-s{seed}"
        if world in NEW_PAIRS:
            pairs = folder / f"{world}-{k}.jsonl"
            if not pairs.is_file():
                draw_toy_pairs(str(policy), pairs, source, seed=k)
        train((out, f"--variant dpo --data {pairs} {TOY} --model {policy} --reference {model} --seed {seed} "
                    f"--steps {round(STEPS / len(rounds))} --eval-every 0 --eval-limit 1024", SCHEDULE))
        policy = out / "model"


# --- runs ---------------------------------------------------------------------------------------------------

def train_toys(runs, seeds, at_a_time, names):
    """SFT models, their data, and all runs of these worlds."""
    done = {(row["world"], row["method"], row["seed"]) for row in recorded()}
    write_world()                                                      # the held-out prompts
    models = {seed: runs / f"toy/sft-s{seed}/model" for seed in seeds}
    train_all([(model.parent, f"--variant sft --seed {seed} --eval-limit 1024", {})
               for seed, model in models.items()], at_a_time, "sft")
    for seed, model in tqdm(models.items(), "data"):                   # before two runs at a time need them
        write_data(model, runs / f"data/s{seed}")
    for name in names:
        _, data, methods = WORLDS[name]
        every = STEPS // 2 if name == "toy" else 0                     # the picture shows the way there
        jobs = []
        for seed, model in models.items():
            if not data:
                if (name, "dpo", seed) not in done:
                    train_rounds(runs, name, seed, model)
                continue
            if name == "toy-model" and (name, "online-dpo", seed) not in done:
                train_reward(model, runs / f"data/s{seed}/reward")
            other = models[seeds[(seeds.index(seed) + 1) % len(seeds)]] / "toy-pairs.jsonl"
            source = data.format(folder=runs / f"data/s{seed}", toy=TOY, other=other)
            jobs += [(runs / f"{name}/{method}-s{seed}",
                      f"{source} --model {model} --seed {seed} --steps {STEPS} --eval-every {every} "
                      f"--eval-limit 1024 {METHODS[method][1]}",
                      {**SCHEDULE, **UNFLAGGED.get(name, {}), **UNFLAGGED.get(method, {})})
                     for method in methods.split() if (name, method, seed) not in done]
        train_all(jobs, at_a_time, name)
    by_model = sorted((runs / "toy-model").glob("*-s*"))
    if by_model:                                                       # they have seen no true reward yet
        run("evaluate", *by_model, "--eval-limit", 1024, "--reward", toy_settings("dpo")["reward"],
            "--out", runs / "toy-model/true.json")


# --- the report ---------------------------------------------------------------------------------------------

def row_of(out):
    """The row of a finished run: {world, method, seed, steps, seconds, figures, peak_kl}; a figure is
    [value, low, high]. An SFT model is its own reference: its objective is its reward."""
    method, _, seed = out.name.rpartition("-s")
    evals, metrics = ([json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
                      for name in ("eval", "metrics"))
    figures = {name: [value, *evals[-1][f"{name}_interval"]] for name, value in evals[-1].items()
               if value is not None and evals[-1].get(f"{name}_interval")}
    if (out.parent / "true.json").is_file():
        found = read_json(out.parent / "true.json")[out.name]
        figures = {name: list(figure.values()) for name, figure in found.items()}
    figures.setdefault("objective", figures["reward"])
    if method == "dpo-0.433":                                          # it is measured by the toy's β
        figures["objective"] = [figures["reward"][0] - BETA * figures["kl"][0], None, None]
    return {"world": out.parent.name, "method": method, "seed": int(seed), "steps": len(metrics),
            "seconds": round(sum(metric["seconds"] for metric in metrics), 1), "figures": figures,
            "peak_kl": max((each["kl"] for each in evals if each.get("kl") is not None), default=0.0)}


def rows_of(runs):
    """One row per finished run."""
    return [row_of(path.parent) for path in sorted(runs.glob("*/*-s*/model"))]


WRITING = threading.Lock()


def recorded(path=ROWS):
    """The rows of the runs that are finished, here or elsewhere."""
    return read_rows(path) if path.is_file() else []


def record(path, row):
    """Append a row."""
    with WRITING, path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def below_the_best(rows, runs, samples=2000):
    """Give each run figures["gap"], to the best possible, and row["above"]: by how much the low end of its
    reward lies above the highest reward at its KL. Both by the frontier of its own seed's SFT model; a KL
    that the samples do not reach has no "above"."""
    for seed in sorted({row["seed"] for row in rows}):
        ours = [row for row in rows if row["seed"] == seed]
        models = [runs / f"{row['world']}/{row['method']}-s{seed}" for row in ours
                  if row["method"] != "sft" and row["world"] != "toy-model"]
        best, curve, _ = best_possible([*map(str, models)], samples,
                                       {"seed": seed, "reward": toy_settings("dpo")["reward"], "beta": BETA})
        kls, heights = zip(*sorted((point["kl"], point["reward"]) for point in curve), strict=True)
        for row in ours:
            figures = row["figures"]
            figures["gap"] = [best["best"] - figures["objective"][0], None, None]
            kl = figures.get("kl", [0.0])[0]
            if kl <= kls[-1]:
                row["above"] = round(figures["reward"][1] - float(np.interp(kl, kls, heights)), 3)


def by_seed(rows, world, method, name):
    """{seed: a figure's value} of a method's runs."""
    return {row["seed"]: row["figures"][name][0] for row in rows
            if (row["world"], row["method"]) == (world, method) and name in row["figures"]}


def with_half(values, sign=""):
    """"mean ± half the 95 % t-interval" of values, one per seed; sign "+" for differences."""
    mean, low, high = mean_of(values)
    text = f"{mean:{sign}.2f}"
    if len(values) > 1:
        text += f" ± {(high - low) / 2:.2f}"
    return text.replace("-", "−")


def table(rows, columns, world, methods):
    """Markdown: a line per method that has runs in this world, means over seeds. methods: {name: words};
    columns: {head: name of a figure}."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for method, words in methods.items():
        cells = []
        for name in columns.values():
            found = [*by_seed(rows, world, method, name).values()]
            cells.append(with_half(found) if found else "")
        if any(cells):
            lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def p_value(values):
    """The two-sided p of a mean of 0, by Student's t of n independent numbers (Abramowitz and Stegun, 26.7.3
    and 26.7.4, whose sums are exact)."""
    values = torch.tensor(values, dtype=torch.float64)
    degrees = len(values) - 1
    t = values.mean().abs() / values.std() * math.sqrt(len(values))
    angle = math.atan(t / math.sqrt(degrees))
    term, total = 1.0, 0.0                                 # of a series in cos² of the angle
    for k in range(degrees // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * k + 1 + degrees % 2) / (2 * k + 2 + degrees % 2)
    if degrees % 2 == 0:
        return 1 - math.sin(angle) * total
    return 1 - 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)


def holm(p_values):
    """Holm's adjustment of the p of several questions (Scand. J. Stat. 6, 65): the smallest is multiplied by
    their number, the next by one less, and so on; none becomes smaller than one before it, or larger than 1.
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for nth, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = min(1.0, max(least, p_values[place] * (len(p_values) - nth)))
        adjusted[place] = least
    return adjusted


def compared(rows, questions, columns=GAINED, negligible=NEGLIGIBLE):
    """Markdown: a line per question, (text, (world, method), its control), with what the method has more than
    the control, seed by seed. columns: {head: name of a figure}. p and verdict are of the last one. p is that
    of Student's t, adjusted by Holm for all questions of the table. Where it is not below 0.05, there is "no
    effect" larger than `negligible` if the whole interval lies within it; else the question is "not
    resolved". A question needs two seeds."""
    lines = ["| | " + " | ".join(columns) + " | p | |", "|---" * (len(columns) + 3) + "|"]
    found = []
    for question, one, control in questions:
        cells = []
        for name in columns.values():
            ours, theirs = by_seed(rows, *one, name), by_seed(rows, *control, name)
            gains = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            cells.append(with_half(gains, "+") if gains else "")
        if len(gains) > 1:
            found.append((question, cells, gains))
    adjusted = holm([p_value(gains) for _, _, gains in found])
    for (question, cells, gains), p in zip(found, adjusted, strict=True):
        shown = f"{p:.3f}" if p >= 0.001 else "< 0.001"
        lines.append(f"| {question} | {' | '.join(cells)} | {shown} | {verdict(gains, p, negligible)} |")
    return "\n".join(lines)


def verdict(gains, p, negligible):
    """What gains over seeds say, given their adjusted p."""
    mean, low, high = mean_of(gains)
    if p < 0.05:
        return "gains" if mean > 0 else "costs"
    if max(-low, high) <= negligible:
        return f"no effect larger than {negligible:g}"
    return "not resolved"


def tables(rows):
    """{title: markdown} of all tables, from the rows alone."""
    words = {method: text for method, (text, _) in METHODS.items()}
    heads = {"reward": "reward", "KL": "kl", "reward − β·KL": "objective", "below the best": "gap"}
    found = {"What gains": compared(rows, COMPARED), "What else was asked": compared(rows, ASKED),
             "Exploratory": compared(rows, EXPLORED)}
    for world, (title, _, _) in WORLDS.items():
        found[f"{world}: {title}"] = table(rows, heads, world, words)
    return found


def report(runs):
    """Tables, raw rows, picture."""
    old = recorded()
    done = {(row["world"], row["method"], row["seed"]) for row in old}
    new = [row for row in rows_of(runs) if (row["world"], row["method"], row["seed"]) not in done]
    below_the_best(new, runs)
    rows = sorted(old + new, key=lambda row: (row["world"], row["method"], row["seed"]))
    write_rows(ROWS, rows)
    shown = []
    for world, method in PICTURE:
        shown += sorted((runs / world).glob(f"{method}-s[0-9]*"))
    if len(shown) == 5 * len(PICTURE):                                 # all of them were made here
        subprocess.run([sys.executable, ROOT / "evaluate.py", "--compare", *shown, "--frontier", "2000",
                        "--reward", toy_settings("dpo")["reward"], "--out", runs / "toy.json"], check=True)
        shutil.copy(runs / "toy.png", ROOT / "experiments/results.png")
    for title, markdown in tables(rows).items():
        print(f"\n{title}\n\n{markdown}")
    above = [row["above"] for row in rows if "above" in row]
    below = sum(excess <= 0 for excess in above)
    print(f"\n{below} of {len(above)} runs lie below the best possible or within their interval of it; the "
          f"largest excess is {max(above):.3f}")
    for row in rows:
        if row["peak_kl"] > 2:
            print(f"{row['world']} {row['method']} seed {row['seed']}: KL {row['peak_kl']:.1f}")


def main():
    """`python experiments/replicate.py`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--worlds", nargs="*", choices=WORLDS, default=[*WORLDS], help="(default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/replication"), help="where the runs are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_toys(args.runs, range(FIRST_SEED, FIRST_SEED + args.seeds), args.jobs, args.worlds)
    report(args.runs)


if __name__ == "__main__":
    command_line(main)
