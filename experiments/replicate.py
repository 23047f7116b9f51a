"""The paper's comparison, on what two CPU cores can train: every method, five seeds, equal offline pairs.

    python experiments/replicate.py --dialogues FILE    # all; FILE: hh-rlhf's helpful-base, test.jsonl
    python experiments/replicate.py                     # the toy world alone

Runs that are finished are kept, so that it can be stopped and goes on. Tables go to the screen, the raw rows,
one line per run, to experiments/replication.jsonl, the picture of the toy's runs to experiments/results.png.

Toy world: each seed has its own SFT model, and pairs that this model sampled; both are what the seed's other
runs start from. Four data sets: all 18,000 pairs; a quarter of them, and all with 20 % of the labels flipped,
for four methods; and no offline pair at all, for T2 × 0, × 0.3 and × 1. The objective is reward − 0.5·KL on
1,024 held-out prompts; the best that any policy can have comes from the seed's own SFT model. Own pairs come
on top of the data's, so that the variants take more optimizer steps than dpo. "dp-control" is dp without its
term T3, at as many steps; "dpo-longer" has those of online DPO and PR.

Dialogues: a small Llama that has read nothing else is trained on the chosen responses; half of the pairs make
a reward model; on the other half every method starts from the SFT model, with that reward model's labels
where it takes any. A second reward model, of that other half, then judges as well.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import load_pairs, read_rows, render
from runtime.run_directory import write_rows
from toy import draw_toy_pairs, toy_settings

METHODS = {
    "dpo": "--variant dpo",
    "dpo-longer": "--variant dpo --steps 268",                         # as many as online DPO and PR have
    "dp": "--variant dp",
    "dp-control": "--variant dp --label-coef 0",
    "online-dpo": "--variant online-dpo",
    "pr": "--variant pr",
    "pr-1": "--variant pr --response-coef 1",
    "pp": "--variant pp --revkl-coef 0.3",
    "pp-no-revkl": "--variant pp --revkl-coef 0",
    "simpo": "--variant dpo --loss-type simpo --beta 2 --target-margin 1",
    "orpo": "--variant dpo --loss-type orpo --nll-coef 0.3"}
FIRST_SEED = 5                             # seeds 0 to 4 and 100 to 102 have chosen the toy's learning rate
FEW = ("dpo", "dp", "online-dpo", "pr")                                # on fewer pairs, and on wrong ones
# Of the picture, in which nobody could tell more apart.
PICTURE = ("sft", "dpo", "dp", "pp", "online-dpo", "pr", "pr-1")
# What `--data toy` implies, spelled out for the pairs that come from a file.
TOY = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in toy_settings("dpo").items()
               if name not in ("data", "model"))
BETA = toy_settings("dpo")["beta"]
EVALUATION = "--eval-every 30 --eval-limit 1024"
WORLDS = {"toy": ("--data toy", METHODS), "toy-quarter": ("--data toy --limit 4500", FEW),
          "toy-flipped": (f"--data {{flipped}} {TOY}", FEW),
          "toy-online": ("--data toy --mix 1", ("online-dpo", "pr", "pr-1"))}       # no offline pair at all
HH_METHODS = {**{name: METHODS[name] for name in ("dpo", "dp", "pp", "online-dpo", "pr")},
              "pr-hard": "--variant pr --preference hard"}             # for a reward model that is unsure
HH = "--max-prompt-length 128 --max-response-length 64 --micro-batch-size 16 --eval-limit 256"


def run(script, *flags):
    """One command of the project, on one thread."""
    subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(job):
    """One run of sail.py, unless it is there already."""
    out, flags = job
    if not (out / "model").is_dir():                                   # which is the last that a run writes
        run("sail.py", *flags.split(), "--out", out)


def train_all(jobs, at_a_time, name):
    with ThreadPoolExecutor(at_a_time) as pool:
        list(tqdm(pool.map(train, jobs), name, len(jobs)))


# --- the toy world ------------------------------------------------------------------------------------------

def flipped_pairs(pairs, share=0.2):
    """The pairs, `share` of them with the label flipped."""
    rng, flipped = random.Random(0), []
    for pair in pairs:
        flip = rng.random() < share
        flipped.append({**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} if flip else pair)
    return flipped


def toy(runs, seeds, at_a_time, worlds=WORLDS, only=METHODS):
    """SFT models, their pairs, and all runs on worlds of the toy: {name: (flags of the data, methods)}."""
    models = {seed: runs / f"toy/sft-s{seed}/model" for seed in range(FIRST_SEED, FIRST_SEED + seeds)}
    train_all([(model.parent, f"--variant sft --seed {seed} --eval-limit 1024")
               for seed, model in models.items()], at_a_time, "toy sft")
    jobs = []
    for seed, model in tqdm(models.items(), "toy pairs"):              # before two runs at a time need them
        if not (model / "toy-pairs.jsonl").is_file():
            draw_toy_pairs(str(model), model / "toy-pairs.jsonl")
        flipped = runs / f"toy-flipped/pairs-s{seed}.jsonl"
        write_rows(flipped, flipped_pairs(read_rows(model / "toy-pairs.jsonl")))
        for world, (data, methods) in worlds.items():
            jobs += [(runs / f"{world}/{method}-s{seed}",
                      f"{data.format(flipped=flipped)} --model {model} --seed {seed} {EVALUATION} "
                      + METHODS[method]) for method in methods if method in only]
    train_all(jobs, at_a_time, "toy")


# --- dialogues ----------------------------------------------------------------------------------------------

def split_dialogues(source, folder):
    """Files of pairs, told apart by the prompt's CRC-32: an eighth held out, the rest in two halves. Returns
    the texts of that rest."""
    parts = {"held-out": [], "first": [], "second": []}
    for pair in load_pairs(source)[0]:
        crc = zlib.crc32(json.dumps(pair.prompt).encode())
        parts["held-out" if crc % 8 == 0 else "first" if crc // 8 % 2 else "second"].append(pair)
    parts["both"] = parts["first"] + parts["second"]
    for name, pairs in parts.items():
        write_rows(folder / f"{name}.jsonl", [dict(prompt=pair.prompt, chosen=pair.chosen,
                                                   rejected=pair.rejected) for pair in pairs])
    return ["".join(render(pair.prompt, response)) for pair in parts["both"]
            for response in (pair.chosen, pair.rejected)]


def small_model(texts, folder):
    """Save a four-layer Llama of about a million random parameters, and a byte-level BPE of these texts."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=2048, special_tokens=["<pad>", "<eos>"])
    tokenizer.save(str(folder.with_suffix(".json")))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder.with_suffix(".json")), pad_token="<pad>",
                                        eos_token="<eos>", clean_up_tokenization_spaces=False)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=344, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=512, bos_token_id=None, eos_token_id=1,
        pad_token_id=0, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def dialogues(source, runs, seeds, at_a_time):
    """SFT, two reward models, all runs, and what each reward model says of them."""
    folder = runs / "dialogues"
    folder.mkdir(parents=True, exist_ok=True)
    held_out = f"{folder}/held-out.jsonl"
    if not (folder / "base").is_dir():
        small_model(split_dialogues(source, folder), folder / "base")
    train((folder / "sft", f"--variant sft --model {folder}/base --data {folder}/both.jsonl {HH} "
                           f"--eval-data {held_out} --epochs 10 --learning-rate 2e-3 --schedule cosine"))
    for half in ("first", "second"):
        if not (folder / f"reward/{half}/model").is_dir():
            run("reward.py", "--train", "--model", folder / "sft/model", "--data",
                folder / f"{half}.jsonl", "--eval-data", held_out, "--learning-rate", 1e-4, "--max-length",
                192, "--overwrite", "--out", folder / f"reward/{half}")
    jobs = [(folder / f"{method}-s{seed}",
             f"{flags} --model {folder}/sft/model --data {folder}/second.jsonl --eval-data {held_out} {HH} "
             f"--learning-rate 1e-4 --eval-every 0 --reward {folder}/reward/first/model --seed {seed}")
            for seed in range(seeds) for method, flags in HH_METHODS.items()]
    train_all(jobs, at_a_time, "dialogues")

    def judge(half):
        if not (folder / f"{half}.json").is_file():
            run("evaluate.py", folder / "sft", *(out for out, _ in jobs), "--reference", folder / "sft/model",
                "--data", folder / "second.jsonl", "--eval-data", held_out, "--reward",
                folder / f"reward/{half}/model", "--out", folder / f"{half}.json")

    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(judge, ("first", "second")))


# --- the report ---------------------------------------------------------------------------------------------

def rows_of(runs):
    """One row per finished run: {world, method, seed, steps, seconds, figures, curve, peak_kl}; a figure is
    [value, low, high], the curve [[step, KL, reward]]; `second`, on dialogues: figures by the other reward
    model."""
    rows = []
    for out in sorted(path.parent for path in runs.glob("*/*/model")):
        method, _, seed = out.name.rpartition("-s")
        if not method:                                                 # the dialogues' one SFT model
            method, seed = out.name, "0"
        evals, metrics = ([json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
                          for name in ("eval", "metrics"))
        row = {"world": out.parent.name, "method": method, "seed": int(seed), "steps": len(metrics),
               "seconds": round(sum(metric["seconds"] for metric in metrics), 1),
               "figures": {name: [value, *evals[-1][f"{name}_interval"]] for name, value in evals[-1].items()
                           if value is not None and evals[-1].get(f"{name}_interval")},
               "curve": [[each["step"], each.get("kl"), each.get("reward")] for each in evals],
               "peak_kl": max((each["kl"] for each in evals if each.get("kl") is not None), default=0.0)}
        if row["world"].startswith("toy"):
            beta = json.loads((out / "args.json").read_text())["beta"]
            row["figures"]["objective"] = objective_of(row["figures"], beta)
        for name, file in (("figures", "first.json"), ("second", "second.json")):
            if (out.parent / file).is_file():
                found = json.loads((out.parent / file).read_text())[out.name]
                row[name] = {key: list(figure.values()) for key, figure in found.items()}
        rows.append(row)
    return rows


def objective_of(figures, beta):
    """[objective, low, high] of a toy run, reward − 0.5·KL: as it was measured, if the run's β is the
    toy's (simpo's is another), else without an interval. An SFT model is its own reference."""
    if "objective" in figures and beta == BETA:
        return figures["objective"]
    kl = figures["kl"][0] if "kl" in figures else 0.0
    return [figures["reward"][0] - BETA * kl, None, None]


def below_the_best(rows, runs, samples=2000):
    """Give each toy run figures["gap"], to the best possible, and row["above"]: by how much the low end of
    its reward lies above the highest reward at its KL. Both by the frontier of its own seed's SFT model; a KL
    that the samples do not reach has no "above"."""
    from evaluate import best_possible
    for seed in sorted({row["seed"] for row in rows if row["world"] == "toy"}):
        ours = [row for row in rows if row["world"].startswith("toy") and row["seed"] == seed]
        models = [runs / row["world"] / f"{row['method']}-s{seed}" for row in ours if row["method"] != "sft"]
        best, curve = best_possible(argparse.Namespace(
            models=models, frontier=samples, eval_limit=256, seed=seed, reward=toy_settings("dpo")["reward"]))
        kls, heights = zip(*sorted((point["kl"], point["reward"]) for point in curve))
        for row in ours:
            figures = row["figures"]
            figures["gap"] = [best["best"] - figures["objective"][0], None, None]
            if figures.get("kl", [0.0])[0] <= kls[-1]:
                height = float(np.interp(figures.get("kl", [0.0])[0], kls, heights))
                row["above"] = round(figures["reward"][1] - height, 3)


def table(rows, columns, methods=("sft", *METHODS)):
    """Markdown: a line per method, mean ± half the 95 % t-interval over seeds, for a single run over prompts;
    columns: {head: (world, key, name)}; "reward-dpo" is the difference to DPO's reward, seed by seed. Without
    a name: the largest row[key] of the seeds."""
    from runtime.intervals import over_seeds

    def cell(method, world, key, name):
        if not name:
            found = [row[key] for row in rows if (row["world"], row["method"]) == (world, method)]
            return "" if not found else f"{max(found)}" if key == "steps" else f"{max(found):.2f}"
        name, _, base = name.partition("-")
        figures = {(row["method"], row["seed"]): row[key][name] for row in rows
                   if row["world"] == world and name in row.get(key, {})}
        seeds = sorted(seed for other, seed in figures if other == method)
        if not seeds or base == method or base and len(seeds) == 1:
            return ""
        value, low, high = figures[method, seeds[0]] if len(seeds) == 1 else over_seeds(
            [figures[method, seed][0] - (figures[base, seed][0] if base else 0) for seed in seeds])
        half = "" if low is None else f" ± {(high - low) / 2:.2f}"     # a single run's may have no interval
        return f"{value:{'+' if base else ''}.2f}{half}"

    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for method in methods:
        cells = [cell(method, *column) for column in columns.values()]
        lines += [f"| {method} | " + " | ".join(cells) + " |"] if any(cells) else []
    return "\n".join(lines)


def report(runs):
    """Tables, raw rows, picture."""
    rows = rows_of(runs)
    below_the_best(rows, runs)
    write_rows(ROOT / "experiments/replication.jsonl", rows)
    shown = [path for method in PICTURE for path in sorted((runs / "toy").glob(f"{method}-s*"))]
    subprocess.run([sys.executable, ROOT / "evaluate.py", "--compare", *shown, "--frontier", "2000",
                    "--reward", toy_settings("dpo")["reward"], "--out",
                    runs / "toy.json"], check=True)
    shutil.copy(runs / "toy.png", ROOT / "experiments/results.png")

    def of(world, *names):
        heads = {"kl": "KL", "objective": "reward − β·KL", "gap": "below the best",
                 "objective-dpo": "minus DPO's", "objective-dpo-longer": "minus longer DPO's",
                 "objective-online-dpo": "minus online DPO's", "reward-dpo": "minus DPO's",
                 "win_rate": "win rate", "lc_win_rate": "length-controlled", "length": "tokens"}
        return {heads.get(name, name): (world, "figures", name) for name in names}

    def ends(world):
        return {"highest KL": (world, "peak_kl", None), "steps": (world, "steps", None)}

    above = [row["above"] for row in rows if "above" in row]
    print(f"\n{sum(excess <= 0 for excess in above)} of {len(above)} toy runs lie below the best possible or "
          f"within their interval of it; the largest excess is {max(above):.3f}")
    print("\nToy world; highest KL: of all seeds and evaluations:\n\n" + table(rows, {
        **of("toy", "reward", "kl", "objective", "gap", "objective-dpo", "objective-dpo-longer",
             "objective-online-dpo"), **ends("toy")}))
    print("\nDP beside its control, and the difference:\n\n" + table(rows, {
        head: ("toy", "figures", name + minus) for name in ("reward", "kl", "margin", "accuracy", "objective")
        for head, minus in ((name, ""), (f"{name}, difference", "-dp-control"))}, ("dp-control", "dp")))
    for world, title in (("toy-quarter", "A quarter of the pairs"),
                         ("toy-flipped", "20 % of the labels flipped")):
        print(f"\n{title}:\n\n" + table(rows, {
            **of(world, "reward", "kl", "objective", "objective-dpo", "objective-online-dpo"),
            **ends(world)}))
    print("\nFully online, T2 × 0, × 0.3 and × 1:\n\n" + table(rows, {
        **of("toy-online", "reward", "kl", "objective", "objective-online-dpo"), **ends("toy-online")}))
    if any(row["world"] == "dialogues" for row in rows):
        print("\nDialogues, by the first reward model, which PR saw, and by the second:\n\n" + table(rows, {
            **of("dialogues", "reward", "reward-dpo", "win_rate", "lc_win_rate"),
            **{f"{head}, second": (world, "second", name) for head, (world, _, name) in of(
                "dialogues", "reward", "reward-dpo", "win_rate", "lc_win_rate").items()},
            **of("dialogues", "kl", "length", "accuracy")}, ("sft", *HH_METHODS)))


def main():
    """`python experiments/replicate.py`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dialogues", metavar="FILE", help="preference pairs, as in data.py")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[*METHODS], help="on the toy (all)")
    parser.add_argument("--worlds", nargs="*", choices=WORLDS, default=[*WORLDS], help="of the toy (all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/replication"), help="where the runs are kept")
    args = parser.parse_args()
    toy(args.runs, args.seeds, args.jobs, {name: WORLDS[name] for name in args.worlds}, args.methods)
    if args.dialogues:
        dialogues(args.dialogues, args.runs, args.seeds, args.jobs)
    report(args.runs)


if __name__ == "__main__":
    main()
