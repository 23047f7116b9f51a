"""The paper's own table in small, on chat data, with a judge that no method trains on. Exploratory.

    python experiments/chat.py --model DIR --data FILE         # hh-rlhf's helpful-base, 2,354 pairs

The pairs whose prompt has at most 256 tokens and whose responses have at most 128 are divided by prompt into
three parts. A judge is trained on 800 pairs, once each, and tested on 512 of the others. The study stops
there if it is right on fewer than 60 % of them, because such a judge cannot compare policies.

Otherwise a reward model is trained in the same way on 800 other pairs. The rest is held out: nothing is
trained on it. DPO, DPO with soft labels, and online DPO are trained for 50 steps of 16 pairs on the reward
model's pairs, one seed each. They are evaluated on the held-out pairs: by the reward model that labelled, and
by the judge, whose win rate is over the data's chosen responses. Rows go to experiments/chat.jsonl as they
are measured, and what has a row there is not measured again.
"""
import argparse
import json
import random
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from data import load_tokenizer
from formats import load_pairs, read_rows
from replicate import record, recorded, run, train
from runtime.command_line import command_line
from runtime.run_directory import read_json, write_rows

PROMPT, RESPONSE = 256, 128                # most tokens
PAIRS, TESTED = 800, 512                   # that a reward model is trained on, and tested on
STEPS, BATCH, RATE, SCORER_RATE, BETA = 50, 16, 2e-5, 5e-5, 0.1
DTYPE = "bfloat16"                         # of the policies; the judge and the reward model are in float32
SCORERS = {"reward": "the reward model", "judge": "the judge"}
METHODS = {                                # name: (what it is, flags)
    "start": ("the model as it was", None),
    "dpo": ("DPO", "--variant dpo"),
    "dpo-soft": ("DPO, soft labels", "--variant relabelled-dpo"),
    "online-dpo": ("online DPO, mix 1", "--variant online-dpo --mix 1")}
ROWS = ROOT / "experiments/chat.jsonl"


def divide(data, tokenizer, runs):
    """Write the three parts, runs/reward.jsonl, runs/judge.jsonl and runs/held-out.jsonl, and for each of the
    two models a file of the pairs that it has not seen. All pairs of a prompt are in one part."""
    by_prompt = defaultdict(list)
    for pair in load_pairs(data)[0]:
        turns = " ".join(turn["content"] for turn in pair.prompt)
        texts = turns, pair.chosen, pair.rejected
        prompt, chosen, rejected = (len(tokenizer(text).input_ids) for text in texts)
        if prompt <= PROMPT and 0 < min(chosen, rejected) and max(chosen, rejected) <= RESPONSE:
            by_prompt[turns].append(
                dict(prompt=pair.prompt, chosen=pair.chosen, rejected=pair.rejected))
    prompts = sorted(by_prompt)
    random.Random(0).shuffle(prompts)
    parts = {"reward": [], "judge": [], "held-out": []}
    for prompt in prompts:
        room = [name for name in SCORERS if len(parts[name]) < PAIRS]
        parts[(room or ["held-out"])[0]] += by_prompt[prompt]
    for name, rows in parts.items():
        write_rows(runs / f"{name}.jsonl", rows)
    for name, other in (("reward", "judge"), ("judge", "reward")):
        write_rows(runs / f"{name}-unseen.jsonl", parts["held-out"] + parts[other])


def train_scorer(name, model, runs):
    """Train the reward model or the judge, unless it is here, test it on pairs that it has not seen, and
    record its row, unless that is there."""
    out = runs / name
    if not (out / "model").is_dir():
        again = ["--resume"] if (out / "args.json").is_file() else []
        run("reward", "--train", "--model", model, "--data", runs / f"{name}.jsonl", "--eval-data",
            runs / f"{name}-unseen.jsonl", "--eval-limit", TESTED, "--eval-every", 0,
            "--batch-size", BATCH, "--learning-rate", SCORER_RATE, "--save-every", 10, *again, "--out", out)
    if name in {row["name"] for row in recorded(ROWS)}:
        return
    figures = json.loads((out / "eval.jsonl").read_text().splitlines()[-1])
    record(ROWS, dict(what="scorer", name=name, pairs=len(read_rows(runs / f"{name}.jsonl")),
                      tested=figures["prompts"], accuracy=figures["accuracy"],
                      interval=figures["accuracy_interval"]))


def train_policy(name, model, runs):
    """Train one method, evaluate it by the reward model and by the judge, and record its row."""
    out, steps = runs / name, []
    if METHODS[name][1]:
        train((out, f"{METHODS[name][1]} --model {model} --data {runs}/reward.jsonl --eval-data "
                    f"{runs}/held-out.jsonl --reward {runs}/reward/model --eval-every 0 --eval-limit 1 "
                    f"--steps {STEPS} --batch-size {BATCH} --learning-rate {RATE} --beta {BETA} "
                    f"--max-prompt-length {PROMPT} --max-response-length {RESPONSE} --save-every 10 "
                    f"--dtype {DTYPE}", {}))
        steps = [json.loads(line)["seconds"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    row = dict(what="policy", name=name, seconds=median(steps) if steps else None)
    for scorer in SCORERS:
        measured = runs / f"{name}-{scorer}.json"
        run("evaluate", out if steps else model, "--reference", model, "--eval-data",
            runs / "held-out.jsonl", "--reward", runs / f"{scorer}/model", "--beta", BETA,
            "--eval-limit", len(read_rows(runs / "held-out.jsonl")), "--max-prompt-length", PROMPT,
            "--max-response-length", RESPONSE, "--dtype", DTYPE, "--out", measured)
        row[scorer] = next(iter(read_json(measured).values()))
    record(ROWS, row)


def table(rows):
    """Markdown: accuracy of the two scorers, then the figures of the policies, if there are any."""
    lines = ["| | trained on, pairs | right on pairs that it has not seen |", "|---|---|---|"]
    for row in rows:
        if row["what"] == "scorer":
            low, high = row["interval"]
            lines.append(f"| {SCORERS[row['name']]} | {row['pairs']} | {row['accuracy']:.3f} "
                         f"[{low:.3f}, {high:.3f}] of {row['tested']} |")
    policies = [row for name in METHODS for row in rows if (row["what"], row["name"]) == ("policy", name)]
    if policies:
        heads = ("reward", "KL", "reward − β·KL", "margin", "accuracy", "win rate, reward model",
                 "win rate, judge")
        lines += ["", "| | " + " | ".join(heads) + " | s a step |", "|---" * (len(heads) + 2) + "|"]
    for row in policies:
        cells = []
        for scorer, name in (("reward", "reward"), ("reward", "kl"), ("reward", "objective"),
                             ("reward", "margin"), ("reward", "accuracy"), ("reward", "win_rate"),
                             ("judge", "win_rate")):
            figure = row[scorer][name]
            half = (figure["high"] - figure["low"]) / 2
            cells.append(f"{figure['value']:.2f} ± {half:.2f}".replace("-", "−"))
        seconds = f"{row['seconds']:.0f}" if row["seconds"] else ""
        lines.append(f"| {METHODS[row['name']][0]} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def main():
    """`python experiments/chat.py --model DIR --data FILE`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a directory or hub name; here SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="pairs; here hh-rlhf's helpful-base, its test set")
    parser.add_argument("--runs", type=Path, default=Path("runs/chat"), help="where runs are kept")
    parser.add_argument("--jobs", type=int, default=2, help="policies at a time, a thread each (default: 2)")
    args = parser.parse_args()
    divide(args.data, load_tokenizer(args.model), args.runs)
    done = {row["name"] for row in recorded(ROWS)}
    train_scorer("judge", args.model, args.runs)
    judge = next(row for row in recorded(ROWS) if row["name"] == "judge")
    if judge["accuracy"] < 0.6:
        print(f"the judge is right on {judge['accuracy']:.3f} of pairs that it has not seen, which is too "
              "few to compare policies; no policy is trained")
    else:
        train_scorer("reward", args.model, args.runs)
        with ThreadPoolExecutor(args.jobs) as pool:
            left = [name for name in METHODS if name not in done]
            list(pool.map(lambda name: train_policy(name, args.model, args.runs), left))
    print(table(recorded(ROWS)))


if __name__ == "__main__":
    command_line(main)
