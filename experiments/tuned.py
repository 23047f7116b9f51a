"""The toy once more: each method at a learning rate of its own, at equal steps and at equal time.

    python experiments/tuned.py                 # all; tables

Each method's learning rate is the best of four by reward − β·KL, on the models of seeds 0 to 2 and on prompts
whose wordings no other study uses. At that rate it is trained from the models of seeds 5 to 9: for 188 steps,
and for as many steps as fit into the time of online DPO's 188. How many fit is measured first, by runs in
turn. Worlds, pairs and figures are those of experiments/replicate.py.

A row of a finished run is appended to experiments/tuned.jsonl at once, and no run that has a row there is
run again. So the study can be stopped and goes on, also in another place.
"""
import argparse
import json
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from formats import read_rows
from replicate import BETA, FIRST_SEED, SCHEDULE, STEPS, compared, row_of, run, table, train
from runtime.command_line import command_line
from runtime.intervals import mean_of
from runtime.run_directory import write_rows
from toy import NOUNS, draw_toy_pairs, write_world

METHODS = {                                # name: (what it is, flags)
    "dpo": ("DPO", "--variant dpo"),
    "dpo-soft": ("DPO, soft labels", "--variant relabelled-dpo"),
    "dp": ("SAIL-DP", "--variant dp"),
    "norm": ("length-normalised DPO, β 5", "--variant dpo --loss-type sigmoid_norm --beta 5"),
    "simpo": ("SimPO, β 2", "--variant dpo --loss-type simpo --beta 2"),
    "orpo": ("ORPO, NLL × 10", "--variant dpo --loss-type orpo --nll-coef 10"),
    "online-dpo": ("online DPO, mix 1", "--variant online-dpo --mix 1"),
    "pr": ("SAIL-PR, mix 1, T2 × 0.3", "--variant pr --mix 1"),
    "rloo": ("RLOO, two samples", "")}
RATES = (4e-4, 8e-4, 1.6e-3, 3.2e-3)
TUNING_SEEDS, SEEDS = (0, 1, 2), tuple(range(FIRST_SEED, FIRST_SEED + 5))
TUNING_PROMPTS = ("review the {} ?", "how was the {} :", "tell me about the {} ?", "what about the {} :")
ROUNDS, TIMED_STEPS = 3, 48
WORDS = {method: words for method, (words, _) in METHODS.items()}
COMPARED = (                               # (question, method, its control)
    ("Soft labels for drawn ones, offline", "dpo-soft", "dpo"),
    ("Fresh responses, soft labels", "online-dpo", "dpo-soft"),
    ("Online DPO beside DPO", "online-dpo", "dpo"),
    ("T2 × 0.3 (SAIL-PR)", "pr", "online-dpo"),
    ("SAIL-PR beside DPO", "pr", "dpo"),
    ("SAIL-PR beside DPO, soft labels", "pr", "dpo-soft"),
    ("SAIL-DP beside DPO", "dp", "dpo"),
    ("RLOO beside online DPO", "rloo", "online-dpo"))
ROWS = ROOT / "experiments/tuned.jsonl"
WRITING = threading.Lock()


def recorded():
    """The rows of the runs that are finished."""
    return read_rows(ROWS) if ROWS.is_file() else []


def record(row):
    """Append a row."""
    with WRITING, ROWS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def tuning_prompts(path):
    """Write the prompts by which learning rates are chosen."""
    rows = [dict(prompt=wording.format(noun)) for noun in NOUNS for wording in TUNING_PROMPTS]
    write_rows(path, rows)


def flags_of(method, model, seed, rate, steps):
    """(flags of a run, settings that are no flags, its script)."""
    flags = (f"--data toy --model {model} --seed {seed} --steps {steps} --learning-rate {rate} "
             f"--eval-every 0 --eval-limit 1024 {METHODS[method][1]}")
    return flags, SCHEDULE, "rloo" if method == "rloo" else "sail"


def measure(job):
    """Train one run and record its row. The objective is at the toy's β, whatever a method's own."""
    out, flags, unflagged, script, rate = job
    train((out, flags, unflagged, script))
    row = {**row_of(out), "rate": rate}
    figures = row["figures"]
    figures["objective"] = [figures["reward"][0] - BETA * figures["kl"][0], None, None]
    record(row)


def measure_all(jobs, at_a_time, name):
    """All runs that have no row yet, some at a time."""
    done = {(row["world"], row["method"], row["seed"]) for row in recorded()}
    jobs = [job for job in jobs if (job[0].parent.name, *split(job[0].name)) not in done]
    with ThreadPoolExecutor(at_a_time) as pool:
        list(tqdm(pool.map(measure, jobs), name, len(jobs)))


def split(name):
    """(method, seed) of a run's name."""
    method, _, seed = name.rpartition("-s")
    return method, int(seed)


def start_of(runs, seed):
    """The SFT model of a seed, with the pairs that it has sampled."""
    out = runs / f"toy/sft-s{seed}"
    train((out, f"--variant sft --seed {seed} --eval-limit 1024", {}))
    if not (out / "model/toy-pairs.jsonl").is_file():
        draw_toy_pairs(str(out / "model"), out / "model/toy-pairs.jsonl")
    return out / "model"


def best_rates(rows):
    """{method: the learning rate with the highest mean of reward − β·KL over the tuning seeds}."""
    found = {}
    for method in METHODS:
        means = {rate: mean_objective(rows, f"rate-{rate}", method) for rate in RATES}
        found[method] = max(means, key=means.get)
    return found


def mean_objective(rows, world, method):
    values = [row["figures"]["objective"][0] for row in rows
              if (row["world"], row["method"]) == (world, method)]
    return statistics.mean(values)


def time_all(runs, model, rates):
    """Record how long each method trains, in turn: a run on 2,304 pairs for 48 steps, which meets each pair
    twice, less a run of one step. So loading and evaluating do not count, and scoring the reference does."""
    done = {(row["method"], row["round"]) for row in recorded() if row["world"] == "timing"}
    for each in range(ROUNDS):
        for method in METHODS:
            if (method, each) in done:
                continue
            seconds = []
            for steps in (1, 1 + TIMED_STEPS):
                flags, unflagged, script = flags_of(method, model, SEEDS[0], rates[method], steps)
                started = time.perf_counter()
                run(script, *flags.replace("--eval-limit 1024", "--eval-limit 20").split(), "--overwrite",
                    "--out", runs / "timing", limit=TIMED_STEPS * 96 // 2, **unflagged)
                seconds.append(time.perf_counter() - started)
            record(dict(world="timing", method=method, round=each, seed=SEEDS[0],
                        seconds=round(seconds[1] - seconds[0], 2)))


def steps_in_equal_time(rows):
    """{method: how many of its steps take as long as online DPO's 188}, by the median over rounds."""
    seconds = {(row["method"], row["round"]): row["seconds"] for row in rows if row["world"] == "timing"}
    found = {}
    for method in METHODS:
        ratios = [seconds["online-dpo", each] / seconds[method, each] for each in range(ROUNDS)]
        found[method] = round(STEPS * statistics.median(ratios))
    return found


def give_gap(rows):
    """Give each row figures["gap"]: how far its objective lies below the best that is possible from its
    seed's SFT model, which experiments/replicate.py has found."""
    best = {row["seed"]: row["figures"]["gap"][0] + row["figures"]["objective"][0]
            for row in read_rows(ROOT / "experiments/replication.jsonl") if row["method"] == "dpo"}
    for row in rows:
        if row["world"] in ("steps", "time"):
            row["figures"]["gap"] = [best[row["seed"]] - row["figures"]["objective"][0], None, None]


def tables(rows):
    """{title: markdown} of all tables, from the rows alone."""
    give_gap(rows)
    rates, steps = best_rates(rows), steps_in_equal_time(rows)
    lines = ["| reward − β·KL | " + " | ".join(f"{rate:g}" for rate in RATES) + " | steps in equal time |",
             "|---" * (len(RATES) + 2) + "|"]
    for method, words in WORDS.items():
        cells = []
        for rate in RATES:
            values = [row["figures"]["objective"][0] for row in rows
                      if (row["world"], row["method"]) == (f"rate-{rate}", method)]
            mean, low, high = mean_of(values)
            text = f"{mean:.3f} ± {(high - low) / 2:.3f}".replace("-", "−")
            cells.append(f"**{text}**" if rate == rates[method] else text)
        lines.append(f"| {words} | {' | '.join(cells)} | {steps[method]} |")
    found = {"Learning rates": "\n".join(lines)}
    heads = {"reward": "reward", "KL": "kl", "reward − β·KL": "objective", "below the best": "gap",
             "margin": "margin", "accuracy": "accuracy", "win rate": "win_rate"}
    for world, title in (("steps", "At equal steps"), ("time", "At equal time")):
        found[title] = table(rows, heads, world, WORDS)
        found[f"{title}, differences"] = compared(
            rows, [(question, (world, one), (world, control)) for question, one, control in COMPARED])
    return found


def main():
    """`python experiments/tuned.py`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/tuned"), help="where the runs are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    write_world()
    prompts = args.runs / "prompts.jsonl"
    tuning_prompts(prompts)
    models = {seed: start_of(args.runs, seed) for seed in TUNING_SEEDS}
    jobs = []
    for seed, model in models.items():
        for method in METHODS:
            for rate in RATES:
                flags, *rest = flags_of(method, model, seed, rate, STEPS)
                jobs.append((args.runs / f"rate-{rate}/{method}-s{seed}", f"{flags} --eval-data {prompts}",
                             *rest, rate))
    measure_all(jobs, args.jobs, "rates")
    rates = best_rates(recorded())
    models = {seed: start_of(args.runs, seed) for seed in SEEDS}
    time_all(args.runs, models[SEEDS[0]], rates)
    in_equal_time = steps_in_equal_time(recorded())
    for world, steps in (("steps", dict.fromkeys(METHODS, STEPS)), ("time", in_equal_time)):
        jobs = []
        for seed, model in models.items():
            for method in METHODS:
                jobs.append((args.runs / f"{world}/{method}-s{seed}",
                             *flags_of(method, model, seed, rates[method], steps[method]), rates[method]))
        measure_all(jobs, args.jobs, f"equal {world}")
    for title, markdown in tables(recorded()).items():
        print(f"\n{title}\n\n{markdown}")


if __name__ == "__main__":
    command_line(main)
