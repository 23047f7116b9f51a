"""The toy once more: each method at a learning rate of its own, at equal steps and at equal time.

    python experiments/tuned.py                 # all; tables

Each method's learning rate is the best of four by reward − β·KL, on the models of seeds 0 to 2 and on prompts
whose wordings no other study uses. If the best is the lowest or the highest of the four, rates beyond it are
tried until it is not, as far as 1e-4 and 6.4e-3. At that rate the method is trained from the models of seeds
5 to 9: for 188 steps, and for as many steps as fit into the time of online DPO's 188. How many fit is
measured first, by runs in turn. Worlds, pairs and figures are those of experiments/replicate.py.

A row of a finished run is appended to experiments/tuned.jsonl at once, and no run that has a row there is
run again. So the study can be stopped and goes on, also in another place.
"""
import argparse
import json
import statistics
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from data import encode, end_token_ids
from evaluate import pair_columns
from formats import load_pairs, read_rows
from generate import load_policy
from replicate import (
    BETA, FIRST_SEED, SCHEDULE, STEPS, compared, record, recorded, row_of, run, table, train, with_half)
from runtime.command_line import command_line
from runtime.intervals import mean_of
from runtime.run_directory import read_json, write_rows
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
BEYOND = (1e-4, 2e-4, *RATES, 6.4e-3)      # all that may be tried
SAMPLED = ("online-dpo", "pr", "rloo")
TUNING_SEEDS, SEEDS = (0, 1, 2), tuple(range(FIRST_SEED, FIRST_SEED + 5))
TUNING_PROMPTS = ("review the {} ?", "how was the {} :", "tell me about the {} ?", "what about the {} :")
ROUNDS, TIMED_STEPS, NEW_PAIRS = 3, 48, 1024
WORDS = {method: words for method, (words, _) in METHODS.items()}
COMPARED = (                               # (question, method, its control)
    ("Soft labels instead of drawn ones, offline", "dpo-soft", "dpo"),
    ("Fresh responses instead of the data's, soft labels", "online-dpo", "dpo-soft"),
    ("Online DPO minus DPO", "online-dpo", "dpo"),
    ("T2 × 0.3 (SAIL-PR)", "pr", "online-dpo"),
    ("SAIL-PR minus DPO", "pr", "dpo"),
    ("SAIL-PR minus DPO with soft labels", "pr", "dpo-soft"),
    ("SAIL-DP minus DPO", "dp", "dpo"),
    ("RLOO minus online DPO", "rloo", "online-dpo"))
ROWS = ROOT / "experiments/tuned.jsonl"
LOADING = threading.Lock()                 # transformers' lazy imports are not for several threads


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
    if out.parent.name in ("steps", "time"):
        row["entropy"] = entropies(out)
        with LOADING:
            figures.update(fit_of(out))
    record(ROWS, row)


def entropies(out):
    """[the first, the last] step's entropy per token of the policy's samples; None if none are drawn."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [row["entropy"] for row in metrics if row.get("entropy") is not None]
    return [found[0], found[-1]] if found else None


def fit_of(out):
    """Figures of DPO's margin, at the toy's β, on the data's first pairs and on new pairs of the same SFT
    model: {name: [mean, low, high]}. No method is trained on the new ones. A method that writes all of its
    pairs is not trained on the first ones either."""
    saved = read_json(out / "args.json")
    policy, tokenizer = load_policy(str(out / "model"))
    reference, _ = load_policy(saved["reference"])
    settings = argparse.Namespace(dtype="float32", beta=BETA)
    found = {}
    for name, file in (("margin_trained", "toy-pairs.jsonl"), ("margin_new", "new-pairs.jsonl")):
        pairs, _ = load_pairs(str(Path(saved["reference"], file)), NEW_PAIRS)
        examples, _, _ = encode(pairs, tokenizer, end_token_ids(tokenizer, policy), 8, 24)
        found[name] = [*mean_of(pair_columns(policy, reference, examples, settings)["margin"])]
    return found


def measure_all(jobs, at_a_time, name):
    """All runs that have no row yet, some at a time."""
    done = {(row["world"], row["method"], row["seed"]) for row in recorded(ROWS)}
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
    if not (out / "model/new-pairs.jsonl").is_file():
        draw_toy_pairs(str(out / "model"), out / "model/new-pairs.jsonl", NEW_PAIRS, seed=1)
    return out / "model"


def mean_objectives(rows, method):
    """{learning rate: the mean of reward − β·KL over the tuning seeds}, of the rates that were tried."""
    found = {}
    for rate in BEYOND:
        values = [row["figures"]["objective"][0] for row in rows
                  if (row["world"], row["method"]) == (f"rate-{rate}", method)]
        if len(values) == len(TUNING_SEEDS):
            found[rate] = statistics.mean(values)
    return found


def best_rates(rows):
    """{method: the learning rate with the highest mean of reward − β·KL}."""
    found = {}
    for method in METHODS:
        means = mean_objectives(rows, method)
        if means:
            found[method] = max(means, key=means.get)
    return found


def rates_to_try(rows):
    """[(method, rate)] of the rates that are to be tried next: the four, or the one beyond the best where the
    best is the lowest or the highest that was tried. None are left in the end."""
    wanted = []
    for method in METHODS:
        tried = [*mean_objectives(rows, method)]
        if not tried:
            wanted += [(method, rate) for rate in RATES]
            continue
        place = BEYOND.index(best_rates(rows)[method])
        if BEYOND[place] in (tried[0], tried[-1]):
            for neighbour in BEYOND[max(0, place - 1):place + 2]:
                if neighbour not in tried:
                    wanted.append((method, neighbour))
    return wanted


def time_all(runs, model, rates):
    """Record the median seconds of a method's step, methods in turn: `first` on pairs that are met for the
    first time, `later` on pairs that are met again, of which the reference's log-probabilities are known."""
    done = {(row["method"], row["round"]) for row in recorded(ROWS) if row["world"] == "timing"}
    for each in range(ROUNDS):
        for method in METHODS:
            if (method, each) in done:
                continue
            seconds = {}
            for name, pairs in (("first", None), ("later", TIMED_STEPS * 96 // 2)):
                flags, unflagged, script = flags_of(method, model, SEEDS[0], rates[method], TIMED_STEPS)
                out = runs / "timing"
                run(script, *flags.replace("--eval-limit 1024", "--eval-limit 20").split(), "--overwrite",
                    "--out", out, limit=pairs, **unflagged)
                steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                seconds[name] = round(statistics.median(step["seconds"] for step in steps), 5)
            record(ROWS, dict(world="timing", method=method, round=each, seed=SEEDS[0], **seconds))


def steps_in_equal_time(rows):
    """{method: how many of its steps take as long as online DPO's 188}, the median over rounds. The first 188
    steps see all pairs once. If a run is longer, the reference scores all pairs before it, which takes
    `first` − `later` for each of 188 steps, and every step takes `later`."""
    seconds = {(row["method"], row["round"]): row for row in rows if row["world"] == "timing"}
    found = {}
    for method in METHODS:
        counts = []
        for each in range(ROUNDS):
            time, own = STEPS * seconds["online-dpo", each]["first"], seconds[method, each]
            first, later = own["first"], min(own["first"], own["later"])
            counts.append(time / first)
            if counts[-1] > STEPS and method not in SAMPLED:
                counts[-1] = (time - STEPS * (first - later)) / later
        found[method] = round(statistics.median(counts))
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
    rates, steps = best_rates(rows), steps_in_equal_time(rows)
    for row in [*rows]:
        if row["world"] == "steps" and steps[row["method"]] == STEPS:
            rows = [*rows, {**row, "world": "time", "figures": {**row["figures"]}}]
    give_gap(rows)
    tried = sorted({row["rate"] for row in rows if row["world"].startswith("rate")})
    lines = ["| reward − β·KL | " + " | ".join(f"{rate:g}" for rate in tried) + " | steps in equal time |",
             "|---" * (len(tried) + 2) + "|"]
    for method, words in WORDS.items():
        cells = []
        means = mean_objectives(rows, method)
        for rate in tried:
            text = f"{means[rate]:.2f}".replace("-", "−") if rate in means else ""
            cells.append(f"**{text}**" if rate == rates[method] else text)
        lines.append(f"| {words} | {' | '.join(cells)} | {steps[method]} |")
    found = {"Learning rates": "\n".join(lines)}
    heads = {"reward": "reward", "KL": "kl", "reward − β·KL": "objective", "below the best": "gap",
             "accuracy": "accuracy", "win rate": "win_rate"}
    for world, title in (("steps", "At equal steps"), ("time", "At equal time")):
        found[title] = table(rows, heads, world, WORDS)
        found[f"{title}, differences"] = compared(
            rows, [(question, (world, one), (world, control)) for question, one, control in COMPARED])
    heads = {"on the data's first pairs": "margin_trained", "on new pairs of the same model": "margin_new"}
    for world, title in (("steps", "Margins, equal steps"), ("time", "Margins, equal time")):
        found[title] = table(rows, heads, world, WORDS)
    lines = ["| entropy per token | first step | last step |", "|---|---|---|"]
    for method, words in WORDS.items():
        pairs = [row["entropy"] for row in rows if row["world"] == "steps" and row["method"] == method]
        if all(pairs):
            first, last = (with_half([pair[nth] for pair in pairs]) for nth in (0, 1))
            lines.append(f"| {words} | {first} | {last} |")
    found["Entropy"] = "\n".join(lines)
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
    while wanted := rates_to_try(recorded(ROWS)):
        jobs = []
        for seed, model in models.items():
            for method, rate in wanted:
                flags, *rest = flags_of(method, model, seed, rate, STEPS)
                jobs.append((args.runs / f"rate-{rate}/{method}-s{seed}", f"{flags} --eval-data {prompts}",
                             *rest, rate))
        measure_all(jobs, args.jobs, "rates")
    rates = best_rates(recorded(ROWS))
    models = {seed: start_of(args.runs, seed) for seed in SEEDS}
    time_all(args.runs, models[SEEDS[0]], rates)
    in_equal_time = steps_in_equal_time(recorded(ROWS))
    for world, steps in (("steps", dict.fromkeys(METHODS, STEPS)), ("time", in_equal_time)):
        jobs = []
        for seed, model in models.items():
            for method in METHODS:
                if world == "time" and steps[method] == STEPS:
                    continue               # it has been run for as many steps
                jobs.append((args.runs / f"{world}/{method}-s{seed}",
                             *flags_of(method, model, seed, rates[method], steps[method]), rates[method]))
        measure_all(jobs, args.jobs, f"equal {world}")
    for title, markdown in tables(recorded(ROWS)).items():
        print(f"\n{title}\n\n{markdown}")


if __name__ == "__main__":
    command_line(main)
