"""Controlled sentiment on a pretrained model, after the DPO paper's (arXiv 2305.18290, section 6).

    python experiments/sentiment.py --model DIR --ratings FILE          # needs vaderSentiment

The policy continues the beginnings of film reviews, as plain text without a chat template. The reward is five
times VADER's compound score of what it wrote. FILE is movieReviewSnippets_GroundTruth.txt, 10,605 sentences
of film reviews with the mean of twenty people's ratings each. It is in the source distribution of
vaderSentiment 3.3.2 (additional_resources/). The judge, which no method trains on, is a naive Bayes
classifier of words and pairs of words, trained on 8,605 of the sentences. The others say how often it is
right.

Openings and films of the held-out beginnings occur nowhere in training. Each learning rate is chosen by
reward − β·KL on training beginnings, with a seed that no table uses: one for DPO with soft labels on the
data, and one for online DPO, which SAIL-PR takes over. Then all run for 128 steps with six seeds. This number
was fixed before: the reward of one model, on 768 samples, has a standard error of about 0.08, so that a
difference over six seeds has a 95 % interval of about ±0.12, if seeds add no more. All compute in bfloat16 on
weights in float32.

Best-of-n takes the best by the reward of n samples of the initial model; its KL is at most log n − (n − 1)/n.
A row of a finished run is appended to experiments/sentiment.jsonl at once, and no run that has a row there is
run again. So the study can be stopped and goes on, also in another place.
"""
import argparse
import json
import math
import random
import re
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from data import Pair, encode, end_token_ids, load_tokenizer
from evaluate import evaluate_policy
from formats import read_rows
from generate import load_policy, sample
from replicate import by_seed, compared, record, recorded, table, train
from reward import Reward
from runtime.command_line import command_line, seeded
from runtime.compare import COLOURS
from runtime.intervals import mean_of
from runtime.processes import computing_in
from runtime.run_directory import write_directory, write_rows

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
    "dpo-soft": ("DPO, soft labels", "--variant relabelled-dpo"),
    "online-dpo": ("online DPO, mix 1", "--variant online-dpo --mix 1"),
    "pr": ("SAIL-PR, mix 1, T2 × 0.3", "--variant pr --mix 1")}
RATES, TUNED, TUNING_SEED = (1e-5, 3e-5, 1e-4), ("dpo-soft", "online-dpo"), 100
SEEDS = (0, 1, 2, 3, 4, 5)
BETA, TOKENS, STEPS, BATCH, SAMPLES, START_SAMPLES = 0.1, 24, 128, 16, 32, 96
BEST_OF_N = (1, 2, 4, 8, 16, 32, 64)
DTYPE = "bfloat16"                         # of all computation; weights are in float32
START = "start"                            # the name of the initial model
WORDS = {START: "the initial model", **{method: words for method, (words, _) in METHODS.items()}}
COMPARED = (                               # (question, method, its control)
    ("Fresh responses instead of the data's, soft labels", "online-dpo", "dpo-soft"),
    ("T2 × 0.3 (SAIL-PR)", "pr", "online-dpo"),
    ("SAIL-PR minus DPO with soft labels", "pr", "dpo-soft"))
ROWS = ROOT / "experiments/sentiment.jsonl"
MEASURING = threading.Lock()


# --- texts and the judge ------------------------------------------------------------------------------------

def beginnings():
    """(84 beginnings to train on, 24 held-out ones), which share no opening and no film."""
    train = [opening.format(film) for opening in OPENINGS[:14] for film in FILMS[:6]]
    held_out = [opening.format(film) for opening in OPENINGS[14:] for film in FILMS[6:]]
    random.Random(0).shuffle(train)
    return train, held_out


def vader(prompts, responses):
    """The reward: 5 × VADER's compound score of a response, −5 to 5."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    analyzer = SentimentIntensityAnalyzer()
    return [5 * analyzer.polarity_scores(response)["compound"] for response in responses]


def words_of(text):
    """The words of a text and its pairs of neighbouring words, each once."""
    words = re.findall(r"[a-z']+", text.lower())
    return {*words, *zip(words, words[1:], strict=False)}


class Judge:
    """A naive Bayes classifier of sentences that people have rated: judge(text) is the log-odds that a text
    is positive. `accuracy` is its share of right signs on sentences that it was not trained on,
    `vader_accuracy` that of VADER on the same sentences."""

    def __init__(self, file):
        rows = []
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            _, rating, text = line.split("\t")
            rows.append((float(rating) > 0, text))
        random.Random(0).shuffle(rows)
        self.counts, self.totals = {True: Counter(), False: Counter()}, {True: 0, False: 0}
        for is_positive, text in rows[2000:]:
            self.counts[is_positive].update(words_of(text))
            self.totals[is_positive] += 1
        signs, texts = zip(*rows[:2000], strict=True)
        self.accuracy = np.mean([(self(text) > 0) == sign for sign, text in rows[:2000]]).item()
        scores = vader(texts, texts)
        right = [(score > 0) == sign for score, sign in zip(scores, signs, strict=True)]
        self.vader_accuracy = np.mean(right).item()

    def __call__(self, text):
        positive, negative = self.counts[True], self.counts[False]
        score = 0.0
        for word in words_of(text):
            if word in negative or word in positive:
                score += math.log((positive[word] + 0.5) / (self.totals[True] + 1))
                score -= math.log((negative[word] + 0.5) / (self.totals[False] + 1))
        return score


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
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    with computing_in(DTYPE, policy):
        responses, _, _ = sample(policy, tokenizer, prompts, TOKENS, n, batch_size=max(1, 256 // n))
    return [[tokenizer.decode(ids, skip_special_tokens=True) for ids in group] for group in responses]


def draw_pairs(model, path, seed):
    """Write as many pairs as a run of 128 steps sees, of the model's own samples to training beginnings. The
    reward labels them in training."""
    policy, tokenizer = load_policy(str(model))
    texts, _ = beginnings()
    prompts = [texts[k % len(texts)] for k in range(STEPS * BATCH)]
    drawn = continuations(policy, tokenizer, prompts, 2, seeded("pairs", seed))
    write_rows(path, [dict(prompt=prompt, chosen=pair[0], rejected=pair[1])
                      for prompt, pair in zip(prompts, drawn, strict=True)])


# --- runs ---------------------------------------------------------------------------------------------------

def measured(model, base, texts, samples, seed, judge):
    """{figures, samples} of a model on beginnings: [mean, low, high] over beginnings, and three answers."""
    policy, tokenizer = load_policy(str(model))
    reference, _ = load_policy(str(base))
    examples, _, _ = encode([Pair(text, None, None) for text in texts], tokenizer,
                            end_token_ids(tokenizer, policy), 128, TOKENS)
    args = argparse.Namespace(seed=seed, dtype=DTYPE, beta=BETA, max_response_length=TOKENS,
                              sample_batch_size=128)
    found, rows = evaluate_policy(policy, reference, tokenizer, examples, Reward("vader", vader), args,
                                  samples)
    figures = {name: list(figure) for name, figure in found.items()}
    scores = [judge(row["response"]) for row in rows]
    figures["judge"] = [float(np.mean(scores)), None, None]
    figures["positive"] = [float(np.mean([score > 0 for score in scores])), None, None]
    return dict(figures=figures, samples=rows[:3])


def train_and_measure(job, runs, judge):
    """One run, (world, method, seed, learning rate, beginnings to measure it on), and its row."""
    world, method, seed, rate, texts = job
    base, out, pairs = runs / "base", runs / f"{world}/{method}-s{seed}", runs / f"pairs-s{seed}.jsonl"
    train((out, f"{METHODS[method][1]} --model {base} --data {pairs} --eval-data {pairs} --eval-every 0 "
                f"--eval-limit 1 --seed {seed} --steps {STEPS} --batch-size {BATCH} --learning-rate {rate} "
                f"--beta {BETA} --max-prompt-length 128 --max-response-length {TOKENS} --save-every 32 "
                f"--dtype {DTYPE} --reward {ROOT}/experiments/sentiment.py:vader", {}))
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    with MEASURING:                        # which draws from torch's one random state
        found = measured(out / "model", base, texts, SAMPLES, seed, judge)
    record(ROWS, dict(world=world, method=method, seed=seed, rate=rate, steps=len(steps),
                      seconds=round(sum(step["seconds"] for step in steps), 1), **found))


def measure_all(jobs, runs, judge, at_a_time):
    """All runs that have no row yet, some at a time."""
    done = {(row["world"], row["method"], row["seed"]) for row in recorded(ROWS)}
    jobs = [job for job in jobs if job[:3] not in done]
    for _, _, seed, _, _ in jobs:
        pairs = runs / f"pairs-s{seed}.jsonl"
        if not pairs.is_file():
            draw_pairs(runs / "base", pairs, seed)
    with ThreadPoolExecutor(at_a_time) as pool:
        list(tqdm(pool.map(lambda job: train_and_measure(job, runs, judge), jobs), "runs", len(jobs)))


def tried(rows, method):
    """{learning rate: figures of the run that tried it} of a method."""
    return {row["rate"]: row["figures"] for row in rows
            if row["method"] == method and row["world"].startswith("rate-")}


def best_rates(rows):
    """{method: the learning rate with the highest reward − β·KL}, of those that were tried."""
    found = {}
    for method in TUNED:
        objectives = {rate: figures["objective"][0] for rate, figures in tried(rows, method).items()}
        if objectives:
            found[method] = max(objectives, key=objectives.get)
    return {**found, "pr": found["online-dpo"]} if "online-dpo" in found else found


def measure_start(runs, judge):
    """The rows of the initial model: its own figures, its best of n, and how good the judge is."""
    if any(row["world"] == "judge" for row in recorded(ROWS)):
        return
    base, (_, held_out) = runs / "base", beginnings()
    record(ROWS, dict(world="sentiment", method=START, seed=SEEDS[0], rate=0.0, steps=0, seconds=0.0,
                      **measured(base, base, held_out, START_SAMPLES, SEEDS[0], judge)))
    rewards, judged = [], []
    for group in continuations(*load_policy(str(base)), held_out, START_SAMPLES, seeded("best of n")):
        rewards.append(vader(group, group))
        judged.append([judge(text) for text in group])
    for row in best_of_n(rewards, judged):
        record(ROWS, row)
    correlation = np.corrcoef(np.ravel(rewards), np.ravel(judged))[0, 1].item()
    record(ROWS, dict(world="judge", method="judge", seed=0, accuracy=judge.accuracy,
                      vader_accuracy=judge.vader_accuracy, correlation=correlation))


def best_of_n(rewards, judged):
    """Rows of n, kl (its upper bound), reward and judge, for the best of n samples by the reward. rewards,
    judged: a list for each beginning, with the scores of its m samples. If they are sorted by the reward, the
    i-th (from 1) is the best of n that are drawn from them with probability C(i−1, n−1) / C(m, n)."""
    pairs = [sorted(zip(*scores, strict=True)) for scores in zip(rewards, judged, strict=True)]
    scores, m = np.array(pairs).mean(0), len(pairs[0])                 # (m, 2)
    rows = []
    for n in BEST_OF_N:
        weights = [math.comb(i, n - 1) / math.comb(m, n) for i in range(m)]
        reward, judge = (weights @ scores).tolist()
        rows.append({"world": "best of n", "method": "best of n", "seed": 0, "n": n,
                     "kl": math.log(n) - (n - 1) / n, "reward": reward, "judge": judge})
    return rows


# --- the report ---------------------------------------------------------------------------------------------

def with_best_of_n(rows):
    """The rows of runs, with figures["best"]: the KL at which the best of n samples has a run's reward, from
    the two neighbouring n in proportion."""
    best = [row for row in rows if "n" in row]
    found = []
    for row in rows:
        if row["world"] == "sentiment":
            kl = np.interp(row["figures"]["reward"][0], [each["reward"] for each in best],
                           [each["kl"] for each in best])
            found.append({**row, "figures": {**row["figures"], "best": [kl.item(), None, None]}})
    return found


def tables(rows):
    """{title: markdown} of all tables, from the rows alone."""
    rates = ["| reward − β·KL (reward, KL), seed 100 | " + " | ".join(f"{rate:g}" for rate in RATES) + " |",
             "|---" * (len(RATES) + 1) + "|"]
    for method in TUNED:
        runs, cells = tried(rows, method), []
        for rate in RATES:
            cell = ""                      # of a rate that has no row yet
            if rate in runs:
                objective, reward, kl = (runs[rate][name][0] for name in ("objective", "reward", "kl"))
                cell = f"{objective:.2f} ({reward:.2f}, {kl:.2f})"
            cells.append(cell)
        rates.append(f"| {WORDS[method]} | {' | '.join(cells)} |")
    best = ["| n | " + " | ".join(str(row["n"]) for row in rows if "n" in row) + " |"]
    best.append("|---" * (best[0].count("|") - 1) + "|")
    for head, name in (("KL, at most", "kl"), ("reward", "reward"), ("judge", "judge")):
        cells = [f"{row[name]:.2f}".replace("-", "−") for row in rows if "n" in row]
        best.append(f"| {head} | {' | '.join(cells)} |")
    judges = ["| | right on the other sentences | correlation with VADER, over samples |", "|---|---|---|"]
    for row in rows:
        if row["world"] == "judge":
            judges += [f"| the judge | {row['accuracy']:.2f} | {row['correlation']:.2f} |",
                       f"| VADER | {row['vader_accuracy']:.2f} | |"]
    heads = {"reward": "reward", "KL": "kl", "KL of best of n with this reward": "best",
             "reward − β·KL": "objective", "judge": "judge", "judged positive": "positive",
             "tokens": "length"}
    gained = {"reward": "reward", "KL": "kl", "judge": "judge", "reward − β·KL": "objective"}
    return {"The judge": "\n".join(judges), "Learning rates": "\n".join(rates),
            "What each method reaches": table(with_best_of_n(rows), heads, "sentiment", WORDS),
            "What gains": compared(rows, [(question, ("sentiment", one), ("sentiment", control))
                                          for question, one, control in COMPARED], gained),
            "Best of n": "\n".join(best), "Answers": answers(rows)}


def answers(rows):
    """Markdown: three held-out beginnings, and how the models of the first seed went on."""
    found = [(WORDS[row["method"]], row["samples"]) for row in rows
             if row["world"] == "sentiment" and row["seed"] == SEEDS[0]]
    heads = [f"“{sample['prompt']} …”" for sample in found[0][1]] if found else []
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, samples in found:
        cells = [" ".join(sample["response"].split()).replace("|", "\\|") for sample in samples]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows, path):
    """Draw the reward, and the judge's score, against KL: each run as a faint point, each method's mean over
    seeds with its intervals, and the best of n samples."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    best = [row for row in rows if "n" in row]
    colours = {**COLOURS, START: "#000000", "dpo-soft": "#E69F00"}
    labels = ("held-out reward, 5 × VADER's compound", "log-odds by a classifier of rated sentences")
    for axes, name, label in zip(panels, ("reward", "judge"), labels, strict=True):
        axes.plot([row["kl"] for row in best], [row[name] for row in best], "k.--", label="best of n")
        for method, words in WORDS.items():
            runs = [[*by_seed(rows, "sentiment", method, each).values()] for each in ("kl", name)]
            kls, heights = (mean_of(values) for values in runs)
            errors = [[[mean - low], [high - mean]] for mean, low, high in (kls, heights)]
            axes.plot(*runs, ".", color=colours[method], alpha=0.35)
            axes.errorbar(kls[0], heights[0], errors[1], errors[0], "o", color=colours[method], label=words)
        axes.set_xlabel("KL(π‖π_ref), nats per response")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=130)


def main():
    """`python experiments/sentiment.py --model DIR --ratings FILE`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a directory or hub name; here SmolLM2-135M-Instruct")
    parser.add_argument("--ratings", required=True, help="movieReviewSnippets_GroundTruth.txt")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/sentiment"), help="where runs are kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(args.ratings)
    plain_model(args.model, args.runs / "base")
    train_texts, held_out = beginnings()
    jobs = [(f"rate-{rate:g}", method, TUNING_SEED, rate, train_texts[:24])
            for method in TUNED for rate in RATES]
    measure_all(jobs, args.runs, judge, args.jobs)
    measure_start(args.runs, judge)
    rates = best_rates(recorded(ROWS))
    jobs = [("sentiment", method, seed, rates[method], held_out) for seed in SEEDS for method in METHODS]
    measure_all(jobs, args.runs, judge, args.jobs)
    draw(read_rows(ROWS), ROWS.with_suffix(".png"))
    for title, markdown in tables(read_rows(ROWS)).items():
        print(f"\n{title}\n\n{markdown}")


if __name__ == "__main__":
    command_line(main)
