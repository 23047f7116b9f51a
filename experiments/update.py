"""What makes DPO's update faster on a CPU: a reference that has scored its pairs before, and bfloat16.

    python experiments/update.py --model DIR --data FILE

Times four updates on the same four pairs, in turn, so that a busy machine slows all of them: in float32 and
in bfloat16, with the reference's forward, as in a first epoch, and with its log-probabilities known, as in
all later ones. The ratios are medians over rounds of the first update's seconds to each update's.
"""
import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sail
from data import encode, end_token_ids
from formats import load_pairs
from generate import load_models, score_once
from runtime.optimizer import make_optimizer, optimizer_step

TOKENS = 128                                     # of a prompt and of a response, at most


def updates_of(dtype, model, data):
    """{name: a function that makes one update} in this dtype."""
    args = sail.parse_args(["--variant", "dpo", "--model", model, "--data", data, "--dtype", dtype,
                            "--max-prompt-length", str(TOKENS), "--max-response-length", str(TOKENS)])
    policy, reference, tokenizer = load_models(args)
    pairs, _ = load_pairs(data, 100)
    examples, _, _ = encode(pairs, tokenizer, end_token_ids(tokenizer, policy), TOKENS, TOKENS)
    examples = sorted(examples, key=lambda pair: -len(pair.chosen_ids + pair.rejected_ids))[:4]
    known = [replace(example) for example in examples]
    score_once(reference, policy, known, dtype)
    run = sail.Run(policy, reference, tokenizer, None, examples, [], args, progress={"baseline": 0.0})
    run.optimizer, run.scheduler = make_optimizer(policy.parameters(), 1000, args)

    def update(batch):
        totals = sail.accumulate_gradients(run, batch, args)
        optimizer_step(policy, run.optimizer, run.scheduler, args.max_grad_norm, totals["loss"])

    return {f"{dtype}, first epoch": lambda: update(examples),
            f"{dtype}, later epochs": lambda: update(known)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=6, help="the first is left out (6)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    updates = updates_of("float32", args.model, args.data) | updates_of("bfloat16", args.model, args.data)
    seconds = {name: [] for name in updates}
    for _ in range(args.rounds):
        for name, update in updates.items():
            started = time.perf_counter()
            update()
            seconds[name].append(time.perf_counter() - started)
    first = seconds["float32, first epoch"][1:]
    print("| update | seconds, median (range) | times as fast, median (range) |\n|---|---|---|")
    for name, taken in seconds.items():
        taken = taken[1:]
        ratios = [one / other for one, other in zip(first, taken, strict=True)]
        print(f"| {name} | {statistics.median(taken):.1f} ({min(taken):.1f}–{max(taken):.1f}) | "
              f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) |")


if __name__ == "__main__":
    main()
