"""Controlled sentiment on a pretrained model, after the DPO paper's (arXiv 2305.18290, section 6).

    python experiments/sentiment.py --model DIR      # a causal language model; needs vaderSentiment and afinn

The policy continues the beginnings of film reviews, as plain text without a chat template. 200 beginnings
are made from parts below, 64 of them are held out. The reward is five times VADER's compound score of what
the policy wrote; AFINN's is the judge that nobody trains on. Each seed samples 512 pairs from the model. The
data's labels are drawn from Bradley-Terry; "soft" ones are that probability itself. All methods train for as
many steps, on the same pairs or on the same beginnings.

Each run is evaluated on four samples to each held-out beginning. Best-of-n takes the best by the reward of n
samples of the initial model; its KL is at most log n − (n − 1)/n. Runs that are finished are kept, so
that it can be stopped and goes on. Rows, one a run, go to experiments/sentiment.jsonl, the picture to
sentiment.png.
"""
import argparse
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from data import Pair, encode, end_token_ids, load_tokenizer
from formats import read_rows
from evaluate import evaluate_policy
from generate import load_policy, sample
from replicate import compared, table, train_all
from reward import Reward
from runtime.command_line import command_line, seeded
from runtime.compare import COLOURS
from runtime.run_directory import read_json, write_directory, write_rows, write_text

OPENINGS = (
    "I watched {} last night and", "After two hours of {}, I", "My sister took me to {}, which",
    "If you ask me what I thought of {}, I", "The acting in {} is", "The story of {} is",
    "People say that {}", "Having waited a year for {}, I", "The first scene of {} is",
    "By the end of {} the audience",
    "What stays with me from {} is", "The music in {} is", "I saw {} with a friend, and we",
    "The director of {} has", "Compared with the book, {} is", "The camera work of {} is",
    "It took me a week to write about {}, since it", "As a fan of the genre I found {}",
    "The dialogue of {} is",
    "For a rainy evening, {} is")
FILMS = ("this film", "this thriller", "the new comedy", "this documentary", "the remake", "this drama",
         "the sequel", "this western", "the cartoon", "this war film")
METHODS = {                                # name: (what it is, flags)
    "dpo": ("DPO", "--variant dpo"),
    "dpo-soft": ("DPO, soft labels", "--variant relabelled-dpo"),
    "dp": ("SAIL-DP", "--variant dp"),
    "pp": ("SAIL-PP, RevKL 0.3", "--variant pp --revkl-coef 0.3"),
    "online-dpo": ("online DPO, mix 1", "--variant online-dpo --mix 1"),
    "pr": ("SAIL-PR, mix 1", "--variant pr --mix 1")}
START = "start"                            # the name of the initial model
WORDS = {method: words for method, (words, _) in METHODS.items()}
COMPARED = (                               # (question, method, its control)
    ("DPO minus the initial model", "dpo", START),
    ("Online DPO minus the initial model", "online-dpo", START),
    ("Online DPO minus DPO", "online-dpo", "dpo"),
    ("Soft labels instead of drawn ones, offline", "dpo-soft", "dpo"),
    ("Fresh responses instead of the data's, soft labels, fully online", "online-dpo", "dpo-soft"),
    ("T2 × 0.3 (SAIL-PR), fully online", "pr", "online-dpo"),
    ("SAIL-DP minus DPO", "dp", "dpo"),
    ("SAIL-PP minus DPO", "pp", "dpo"))
BETA, TOKENS, PAIRS, STEPS, HELD_OUT, SAMPLES, BEST_OF = 0.1, 24, 512, 32, 64, 4, 32
BEST_OF_N = (1, 2, 4, 8, 16, 32)


def vader(prompts, responses):
    """The reward: 5 × VADER's compound score of a response, −5 to 5."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    analyzer = SentimentIntensityAnalyzer()
    return [5 * analyzer.polarity_scores(response)["compound"] for response in responses]


def afinn(responses):
    """The judge: the sum of AFINN's scores, −5 to 5 a word, of each response."""
    from afinn import Afinn
    scorer = Afinn()
    return [scorer.score(response) for response in responses]


def beginnings():
    """(136 to train on, 64 held-out) beginnings of film reviews."""
    texts = [opening.format(film) for opening in OPENINGS for film in FILMS]
    random.Random(0).shuffle(texts)
    return texts[HELD_OUT:], texts[:HELD_OUT]


def plain_model(source, folder):
    """Save a copy of the model whose tokenizer has no chat template."""
    def write(aside):
        model, _ = load_policy(source)
        tokenizer = load_tokenizer(source)
        tokenizer.chat_template = None
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)

    if not folder.is_dir():
        write_directory(folder, write)


def continuations(policy, tokenizer, texts, n, seed):
    """n responses to each text, sampled by the policy, as texts without special tokens: a list of n for each
    text."""
    torch.manual_seed(seed)
    responses, _, _ = sample(policy, tokenizer, [tokenizer(text)["input_ids"] for text in texts], TOKENS, n,
                          batch_size=max(1, 256 // n))
    return [[tokenizer.decode(ids, skip_special_tokens=True) for ids in group] for group in responses]


def draw_pairs(model, path, seed):
    """Write 512 pairs of the model's own samples, with drawn labels."""
    policy, tokenizer = load_policy(str(model))
    rng, (texts, _) = random.Random(seed), beginnings()
    prompts = [texts[k % len(texts)] for k in range(PAIRS)]
    rows = []
    drawn = continuations(policy, tokenizer, prompts, 2, seeded("pairs", seed))
    for prompt, pair in zip(prompts, drawn, strict=True):
        better, worse = vader([prompt] * 2, pair)
        if rng.random() > 1 / (1 + math.exp(worse - better)):
            pair.reverse()
        rows.append(dict(prompt=prompt, chosen=pair[0], rejected=pair[1]))
    write_rows(path, rows)


def best_of(policy, tokenizer):
    """Figures of the best of n of the model's samples by the reward: rows of n, kl (its upper bound), reward,
    judge. Of 32 samples to a beginning, sorted by their reward, the i-th (from 1) is the best of n that are
    drawn from them with probability C(i−1, n−1) / C(32, n)."""
    _, held_out = beginnings()
    rewards, judged = [], []
    for group in continuations(policy, tokenizer, held_out, BEST_OF, seeded("best of n")):
        pairs = sorted(zip(vader(held_out, group), afinn(group), strict=True))
        rewards.append([reward for reward, _ in pairs])
        judged.append([judge for _, judge in pairs])
    rows = []
    for n in BEST_OF_N:
        weights = [math.comb(i, n - 1) / math.comb(BEST_OF, n) for i in range(BEST_OF)]
        rows.append({"world": "best of n", "n": n, "kl": math.log(n) - (n - 1) / n,
                     "reward": (np.array(rewards) @ weights).mean().item(),
                     "judge": (np.array(judged) @ weights).mean().item()})
    return rows


def judged(model, base, seed, path):
    """Figures on held-out beginnings, each [mean, low, high], and three answers of a model; kept in `path`.
    """
    if not path.is_file():
        policy, tokenizer = load_policy(str(model))
        reference, _ = load_policy(str(base))
        examples, _, _ = encode([Pair(text, None, None) for text in beginnings()[1]], tokenizer,
                                end_token_ids(tokenizer, policy), 128, TOKENS)
        args = argparse.Namespace(seed=seed, dtype="float32", beta=BETA, max_response_length=TOKENS,
                                  sample_batch_size=HELD_OUT)
        found, samples = evaluate_policy(policy, reference, tokenizer, examples * SAMPLES,
                                         Reward("vader", vader), args)
        figures = {name: list(figure) for name, figure in found.items()}
        figures["judge"] = [float(np.mean(afinn([row["response"] for row in samples]))), None, None]
        write_text(path, json.dumps(dict(figures=figures, samples=samples[:3])))
    return read_json(path)


def rows_of(runs, base, seeds):
    """One row per model as it was, and per run that is finished: {world, method, seed, steps, seconds,
    figures, samples}."""
    rows = []
    for seed in seeds:
        rows.append(dict(world="sentiment", method=START, seed=seed, steps=0, seconds=0,
                         **judged(base, base, seed, runs / f"base-s{seed}.json")))
        for method in METHODS:
            out = runs / f"{method}-s{seed}"
            if (out / "model").is_dir():
                steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                rows.append(dict(world="sentiment", method=method, seed=seed, steps=len(steps),
                                 seconds=round(sum(step["seconds"] for step in steps), 1),
                                 **judged(out / "model", base, seed, out / "judged.json")))
    return rows


def draw(rows, best, path):
    """Reward, and judge, against KL: a run a point, best-of-n a line as far as the runs go."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    reach = np.linspace(0, 1.2 * max(row["figures"]["kl"][0] for row in rows), 100)
    colours = {**COLOURS, START: "#000000", "dpo-soft": "#E69F00"}
    for axes, name in zip(panels, ("reward", "judge"), strict=True):
        heights = np.interp(reach, [row["kl"] for row in best], [row[name] for row in best])
        axes.plot(reach, heights, "k--", label="best of n")
        for method, words in {START: "the initial model", **WORDS}.items():
            points = [row["figures"] for row in rows if row["method"] == method]
            if points:
                axes.plot([point["kl"][0] for point in points], [point[name][0] for point in points], "o",
                          color=colours[method], label=words)
        axes.set_xlabel("KL(π‖π_ref), nats per response")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("held-out reward, 5 × VADER's compound")
    panels[1].set_ylabel("held-out judge, AFINN")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=130)


def tables(rows):
    """{title: markdown} of all tables, from the rows alone."""
    words = {START: "the initial model", **WORDS}
    runs = [row for row in rows if row["world"] == "sentiment"]
    heads = {"reward": "reward", "KL": "kl", "reward − β·KL": "objective", "AFINN": "judge",
             "tokens": "length"}
    best = ["| n | " + " | ".join(str(row["n"]) for row in rows if "n" in row) + " |"]
    best.append("|---" * (best[0].count("|") - 1) + "|")
    for head, name in (("KL, at most", "kl"), ("reward", "reward"), ("AFINN", "judge")):
        cells = [f"{row[name]:.2f}" for row in rows if "n" in row]
        best.append(f"| {head} | {' | '.join(cells)} |")
    gained = {"reward": "reward", "KL": "kl", "AFINN": "judge", "reward − β·KL": "objective"}
    return {
        "What each method reaches": table(runs, heads, "sentiment", words),
        "What gains": compared(runs, [(question, ("sentiment", one), ("sentiment", control))
                                      for question, one, control in COMPARED], gained),
        "Best of n": "\n".join(best)}


def answers(rows, methods=(START, "dpo", "online-dpo")):
    """Markdown: three held-out beginnings, and how models of the first seed went on."""
    words = {START: "as it was", **WORDS}
    found = [(words[row["method"]], row["samples"]) for method in methods for row in rows
             if row["world"] == "sentiment" and row["seed"] == 0 and row["method"] == method]
    heads = [f"“{sample['prompt']} …”" for sample in found[0][1]]
    lines = [f"| | {' | '.join(heads)} |", "|---|---|---|---|"]
    for name, samples in found:
        cells = [" ".join(sample["response"].split()).replace("|", "\\|") for sample in samples]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(rows):
    """Tables, answers, raw rows and picture."""
    write_rows(ROOT / "experiments/sentiment.jsonl", rows)
    draw([row for row in rows if "n" not in row], [row for row in rows if "n" in row],
         ROOT / "experiments/sentiment.png")
    for title, markdown in {**tables(rows), "Answers": answers(rows)}.items():
        print(f"\n{title}\n\n{markdown}")


def main():
    """`python experiments/sentiment.py --model DIR`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a directory or hub name; here SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=[*METHODS])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/sentiment"), help="where the runs are kept")
    args = parser.parse_args()
    vader([], ["good"])                                                # a package that is missing, now
    afinn(["good"])
    torch.set_num_threads(1)                                           # more wait for the runs' own
    base, held_out = args.runs / "base", args.runs / "held-out.jsonl"
    plain_model(args.model, base)
    write_rows(held_out, [dict(prompt=text) for text in beginnings()[1]])
    for seed in args.seeds:
        pairs = args.runs / f"pairs-s{seed}.jsonl"
        if not pairs.is_file():
            draw_pairs(base, pairs, seed)
        train_all([(args.runs / f"{method}-s{seed}",
                    f"{METHODS[method][1]} --model {base} --data {pairs} --eval-data {held_out} "
                    f"--seed {seed} --steps {STEPS} --batch-size 16 --learning-rate 1e-5 --beta {BETA} "
                    f"--max-prompt-length 128 --max-response-length {TOKENS} --eval-every 0 --eval-limit 1 "
                    f"--reward {ROOT}/experiments/sentiment.py:vader", {}) for method in args.methods],
                  args.jobs, f"seed {seed}")
    best = args.runs / "best-of.jsonl"
    if not best.is_file():
        write_rows(best, best_of(*load_policy(str(base))))
    report(read_rows(best) + rows_of(args.runs, base, args.seeds))


if __name__ == "__main__":
    command_line(main)
