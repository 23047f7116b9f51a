"""The paper's comparison, on what two CPU cores can train: every method, five seeds, equal offline pairs.

    python tests/replicate.py --part toy              # 110 runs on the toy world
    python tests/replicate.py --part hh --hh FILE     # a small model on real dialogues (hh-rlhf's helpful-base)
    python tests/replicate.py --part report           # table, picture and raw rows again, from finished runs

Runs that are finished are kept, so that it can be stopped and goes on. The tables go to the screen, the raw
rows, one line per run, to assets/replication.jsonl, the pictures beside them.

Toy: the SFT model of each seed is the start and the reference of the others; three data sets: all 3,000
pairs; a quarter of them; all, with 20 % of the labels flipped.
"""
import argparse
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

METHODS = {
    "dpo": "--variant dpo",
    "online-dpo": "--variant pr --response-coef 0",
    "simpo": "--variant dpo --loss-type simpo --beta 2 --target-margin 1",
    "orpo": "--variant dpo --loss-type orpo --nll-coef 10",
    "dp": "--variant dp",
    "pp": "--variant pp --revkl-coef 0.3",
    "pr": "--variant pr"}
# What `--data toy` implies, spelled out for the data set that comes from a file.
TOY = ("--eval-data toy:test --reward toy --epochs 3 --batch-size 48 --learning-rate 2e-4 --max-prompt-length 8 "
       "--max-response-length 24 --eval-every 20 --eval-limit 256")
WORLDS = {"toy": "--data toy", "toy-quarter": "--data toy --limit 750", "toy-flipped": "--data {flipped}"}


def run(script, *flags):
    """One command of the project, on one thread."""
    subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(out, flags):
    """One run of sail.py, unless it is there already."""
    if not (out / "model").is_dir():                                   # which is the last that a run writes
        run("sail.py", *flags.split(), "--out", out)


def flip_labels(path, share=0.2):
    """The toy's pairs, with the labels of `share` of them flipped, as a file."""
    from data import toy_pairs
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for pair in toy_pairs("train"):
            if rng.random() < share:
                pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
            file.write(json.dumps(pair) + "\n")


def toy(runs, seeds, jobs):
    """All runs on the toy world."""
    runs.mkdir(parents=True, exist_ok=True)
    flipped = runs / "toy-flipped.jsonl"
    flip_labels(flipped)
    sft = [(runs / f"toy/sft-s{seed}", f"--variant sft --eval-limit 256 --seed {seed}") for seed in range(seeds)]
    work = [(runs / f"{world}/{method}-s{seed}",
             f"{data.format(flipped=flipped)} {TOY} {flags} --model {runs}/toy/sft-s{seed}/model --seed {seed}")
            for seed in range(seeds) for world, data in WORLDS.items() for method, flags in METHODS.items()]
    with ThreadPoolExecutor(jobs) as pool:
        for name, todo in (("sft", sft), ("toy", work)):
            list(tqdm(pool.map(lambda job: train(*job), todo), name, len(todo)))


def main():
    """`python tests/replicate.py`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/replication"), help="where the runs are kept")
    args = parser.parse_args()
    toy(args.runs, args.seeds, args.jobs)


if __name__ == "__main__":
    main()
