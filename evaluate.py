"""Evaluate policies side by side on held-out data, every figure with its 95 % interval.

    python evaluate.py runs/toy/*                        # runs of sail.py: their own data, reward, lengths
    python evaluate.py MODEL … --data D --reward R       # any checkpoints
    python evaluate.py MODEL --against OTHER …           # win rates against another model's responses
    python evaluate.py --compare runs/toy/*              # what finished runs have measured: table and picture
    python evaluate.py --check-judge FILE --reward R     # does R, or a --judge, say what humans said?
    python evaluate.py MODEL … --choices FILE            # multiple choice: ARC, MMLU

On held-out pairs: DPO loss, margin and accuracy against the reference. On responses sampled to their prompts,
at temperature 1 as in training: reward, length, unfinished, distinct-n, KL(π‖π_ref), and the win rate against
the data's chosen responses or another model's, a tie counting ½, raw and length-controlled. On multiple
choice: accuracy by log-likelihood, with the prompts and figures of lm-evaluation-harness.
"""
import csv
import json
import math
import re
from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (NO_TEXT, BadRow, InputError, Parser, collate, command_line, counted, encode, number,
                  read_rows, train_and_held_out)
from generate import check_lengths, end_token_ids, load_policy, response_text, sample
from reward import TEMPLATES, load_judge, load_reward, prefers_chosen, reward_judge, verdicts_of
from sail import dpo_loss, pair_logps, parse_args, sequence_logps


# --- figures, each with its 95 % bootstrap interval over prompts --------------------------------------------

def bootstrap(statistic, *columns, draws=1000, centred=False):
    """(value, low, high): statistic(*columns), and its 95 % interval when the n rows are drawn anew.

    columns: n numbers each. statistic: takes them as float64 tensors (R, n), one row per draw, and returns
    (R,). The percentile interval of `draws` draws of n rows with replacement, always the same ones; centred:
    moved to have its mean at the value. One row has no interval: nan.
    """
    columns = [torch.as_tensor(column, dtype=torch.float64) for column in columns]
    value, n = statistic(*(column[None] for column in columns)).item(), len(columns[0])
    if n < 2:
        return value, math.nan, math.nan
    rows = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    drawn = statistic(*(column[rows] for column in columns))                                        # (R,)
    drawn += value - drawn.mean() if centred else 0
    return value, *drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def mean(values):
    """(R, n) -> (R,)."""
    return values.mean(-1)


def distinct(texts, n):
    """distinct-n (arXiv 1510.03055), as `bootstrap` returns it: different n-grams of words over all n-grams,
    in all texts together. 0 where no text has n words."""
    words = [text.split() for text in texts]
    grams = [(row, tuple(text[at:at + n]))
             for row, text in enumerate(words) for at in range(len(text) - n + 1)]
    ids = {gram: place for place, gram in enumerate(dict.fromkeys(gram for _, gram in grams))}
    gram_of = torch.tensor([ids[gram] for _, gram in grams], dtype=torch.long)
    row_of = torch.tensor([row for row, _ in grams], dtype=torch.long)

    def ratio(rows):                                                   # (R, n) numbers of texts
        ratios = []
        for drawn in rows.long().split(50):                            # (r, n); all at once may be too large
            times = torch.zeros(len(drawn), len(texts))
            times = times.scatter_add(1, drawn, torch.ones(drawn.shape))[:, row_of]           # (r, n-grams)
            seen = torch.zeros(len(drawn), len(ids)).index_add(1, gram_of, times) > 0
            ratios.append(seen.sum(1) / times.sum(1).clamp(min=1))
        return torch.cat(ratios).double()

    # Centred, since a text that is drawn twice brings nothing new.
    value, low, high = bootstrap(ratio, torch.arange(len(texts)), centred=True)
    return value, low, min(high, 1.0)


def length_controlled(verdicts, lengths):
    """The win rate that is left at equal lengths, (R, n) × 2 -> (R,), as in AlpacaEval 2 (arXiv 2404.04475).

    verdicts: 1, ½ or 0. lengths: how much longer the response is than its opponent, scaled by
    `scaled_lengths`. The model P(win) = σ(quality + bias · length) is fitted by Newton's method; the rate is
    σ(quality); where no length differs, the raw rate. A trace of ridge keeps both finite, and weighs a
    thousand times more on quality: what the two explain equally well, as when all wins are longer, counts
    as length. (AlpacaEval's model also has a term for the instruction's difficulty, which needs the verdicts
    on many models.)
    """
    inputs = torch.stack([torch.ones_like(lengths), lengths], -1)                             # (R, n, 2)
    ridge, weights = torch.tensor([0.1, 1e-4], dtype=verdicts.dtype), verdicts.new_zeros(len(verdicts), 2)
    for _ in range(100):
        p = torch.sigmoid((inputs @ weights[..., None])[..., 0])                              # (R, n)
        gradient = ((verdicts - p)[..., None] * inputs).sum(1) - ridge * weights              # (R, 2)
        hessian = (inputs * (p * (1 - p))[..., None]).mT @ inputs + ridge.diag()              # (R, 2, 2)
        step = torch.linalg.solve(hessian, gradient)
        weights = weights + step / (step.norm(dim=-1, keepdim=True) / 5).clamp(min=1)
        if step.abs().max() < 1e-9:
            break
    return torch.where((lengths == 0).all(-1), verdicts.mean(-1), torch.sigmoid(weights[:, 0]))


def scaled_lengths(ours, theirs):
    """tanh(difference / its root mean square) of the texts' lengths in characters: (n,), within ±1."""
    difference = torch.tensor([float(len(one) - len(other)) for one, other in zip(ours, theirs)])
    return torch.tanh(difference / difference.square().mean().sqrt().clamp(min=1e-9))


def win_figures(verdicts, ours, theirs):
    """What a judge's Verdicts on the texts `ours` against `theirs` come to: win rate, raw and
    length-controlled, and `notes_of`."""
    wins = [verdict.win for verdict in verdicts]
    return {"win_rate": bootstrap(mean, wins),
            "lc_win_rate": bootstrap(length_controlled, wins, scaled_lengths(ours, theirs)),
            **notes_of(verdicts)}


def notes_of(verdicts):
    """Of a model's Verdicts the shares of flipped and of unparsable ones, and the mean grade."""
    columns = {name: [getattr(verdict, name) for verdict in verdicts]
               for name in ("flipped", "unparsable", "grade")}
    return {name: bootstrap(mean, [float(value) for value in values if value is not None])
            for name, values in columns.items() if any(value is not None for value in values)}


@torch.no_grad()
def evaluate_policy(policy, reference, tokenizer, examples, reward, args, judge=None, opponents=None,
                    batch_size=32):
    """Figures of a policy on held-out examples: ({name: (value, low, high)}, samples).

    reference: None leaves out what is measured against it. reward: None leaves out the reward. judge: None
    lets the reward judge; with neither, no win rates. opponents: a text for each example (the chosen ones).
    args: beta, dtype, max_response_length, and the seed that the samples are drawn with. KL is estimated from
    the samples, log π(y) − log π_ref(y) summed over y's tokens, in nats per response.
    """
    torch.manual_seed(args.seed)
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        responses, finished = sample(policy, tokenizer, [example["prompt_ids"] for example in examples],
                                     args.max_response_length)
    samples = [{"prompt": example["prompt"], "response": response_text(tokenizer, ids)}
               for example, (ids,) in zip(examples, responses)]
    prompts, texts = ([row[key] for row in samples] for key in ("prompt", "response"))
    columns, wins = {}, {}
    opponents = opponents or [response_text(tokenizer, example["chosen_ids"]) for example in examples]
    if reference is not None:
        columns = {"loss": [], "margin": [], "accuracy": [], "kl": []}
        for start in tqdm(range(0, len(examples), batch_size), "scoring", leave=False,
                          disable=None if len(examples) > 8 * batch_size else True):
            batch = examples[start:start + batch_size]
            sampled = [{**example, "rejected_ids": ids} for example, (ids,) in zip(batch, responses[start:])]
            ours, theirs = pair_logps(policy, batch, args.dtype), pair_logps(reference, batch, args.dtype)
            margin = args.beta * ((ours[0] - theirs[0]) - (ours[1] - theirs[1]))
            columns["loss"] += dpo_loss(*ours, *theirs, beta=args.beta).tolist()
            columns["margin"] += margin.tolist()
            columns["accuracy"] += prefers_chosen(margin).tolist()
            columns["kl"] += (pair_logps(policy, sampled, args.dtype)[1]
                              - pair_logps(reference, sampled, args.dtype)[1]).tolist()
    if reward is not None:
        columns["reward"] = reward(prompts, texts)
        for row, score in zip(samples, columns["reward"]):
            row["reward"] = score
    if judge is not None:
        wins = win_figures(judge(prompts, texts, opponents), texts, opponents)
    elif reward is not None:
        wins = win_figures(verdicts_of(columns["reward"], reward(prompts, opponents)), texts, opponents)
    columns["length"] = [float(len(ids)) for ids, in responses]
    columns["unfinished"] = [float(not done) for done, in finished]
    return {**{name: bootstrap(mean, values) for name, values in columns.items()}, **wins,
            "distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2)}, samples


def find_run(path, overrides):
    """(name, model directory or name, settings) of a run of sail.py, or of a checkpoint
    with the default settings."""
    path = Path(path)
    saved = {}
    if (path / "args.json").is_file() and (path / "model").is_dir():
        saved = json.loads((path / "args.json").read_text(encoding="utf-8"))
    settings = vars(parse_args(
        ["--variant", "dpo", "--data", overrides.get("data") or saved.get("data", "toy")]))
    settings = {**settings, **saved, **{key: value for key, value in overrides.items() if value is not None}}
    return path.name or str(path), str(path / "model") if saved else str(path), Namespace(**settings)


def runs_of(options):
    """`find_run` of every model of the command line. Raises InputError without any."""
    overrides = {key: value for key, value in vars(options).items() if key not in ("out", "reference")}
    runs = [find_run(path, overrides) for path in options.models]
    if not runs:
        raise InputError("no run or model directory among the arguments, and no --check-judge")
    if len({name for name, *_ in runs}) < len(runs):
        runs = [(path, *rest) for path, (_, *rest) in zip(options.models, runs)]
    return runs


COLUMNS = ("reward", "win_rate", "lc_win_rate", "grade", "kl", "length", "unfinished", "distinct_1",
           "distinct_2", "loss", "margin", "accuracy", "decided", "kappa", "length_bias", "flipped",
           "unparsable", "acc", "acc_norm", "acc_bytes")


def shown(value, low, high):
    """A figure as text, with half the width of its interval."""
    return f"{value:.3f} ± {(high - low) / 2:.3f}"


def print_table(results):
    """The results as an aligned table, a model per line."""
    names = [name for name in COLUMNS if any(name in figures for figures in results.values())]
    rows = [["model", *names]] + [
        [model] + [shown(*figures[name]) if name in figures else "" for name in names]
        for model, figures in results.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                        for column, (cell, width) in enumerate(zip(row, widths))))


def write_figures(results, path):
    """{model: {name: [value, low, high]}} as JSON; what is not a finite number is null."""
    finite = {model: {name: [number if math.isfinite(number) else None for number in figure]
                      for name, figure in figures.items()} for model, figures in results.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(finite, indent=1) + "\n", encoding="utf-8")


# --- models of the command line -----------------------------------------------------------------------------

def responses_of(name, pairs, args, device):
    """[(prompt, response)] of --against: of a file, as generate.py writes it for data or for AlpacaEval, or
    what a model says to the pairs' prompts."""
    if Path(name).is_file():
        rows = [(row.get("prompt", row.get("instruction")), row.get("response", row.get("output")))
                for row in read_rows(name)]
        if not rows or not all(isinstance(response, str) for _, response in rows):
            raise InputError(f"--against {name}: want rows with prompt and response, or with instruction and "
                             "output, as generate.py writes them")
        return rows
    _, model, _ = find_run(name, {})
    policy, tokenizer = load_policy(model, device, args.trust_remote_code)
    check_lengths(policy, model, args.max_prompt_length, args.max_response_length)
    examples, _ = encode(pairs, tokenizer, end_token_ids(tokenizer, policy), args.max_prompt_length, 10**9)
    torch.manual_seed(args.seed + 1)                     # not the draws of the model that is evaluated
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        responses, _ = sample(policy, tokenizer, [example["prompt_ids"] for example in examples],
                              args.max_response_length)
    return [(example["prompt"], response_text(tokenizer, ids))
            for example, (ids,) in zip(examples, responses)]


def opponents_of(examples, responses, name):
    """The response to each example's prompt, the k-th where the prompt comes for the k-th time."""
    left = {}
    for prompt, response in responses:
        left.setdefault(json.dumps(prompt), []).append(response)
    opponents = []
    for example in examples:
        texts = left.get(json.dumps(example["prompt"]))
        if not texts:
            raise InputError(f"--against {name}: no response to the prompt {str(example['prompt'])[:60]!r}")
        opponents.append(texts[0])
        texts.append(texts.pop(0))                       # in turn, where there are too few
    return opponents


def evaluate_models(options):
    """Sample from the models of the command line, print a table of their figures and write these to --out."""
    runs, against = runs_of(options), options.against
    args = runs[0][2]                           # the same held-out pairs, lengths and seed for every model
    reference_name = options.reference or next((run.reference for *_, run in runs if run.reference),
                                               runs[0][1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, held_out, _ = train_and_held_out(args.data, args.eval_data, args.limit, args.prefer)
    held_out = held_out[:args.eval_limit]
    if not held_out:
        raise InputError(f"{args.data}: no pair is held out; name some with --eval-data")
    reward = load_reward(args.reward, device, args.trust_remote_code) if args.reward else None
    judge = judge_from(options, reward) if options.judge != "reward" or options.judge_model else None
    reference, reference_tokenizer = load_policy(reference_name, device, args.trust_remote_code)
    responses = responses_of(against, held_out, args, device) if against else None
    print(f"{len(held_out)} held-out pairs of {args.eval_data or args.data}, reference {reference_name}, "
          f"reward {args.reward}; wins over {against or 'the chosen responses'}, judged by "
          f"{options.judge_model or args.reward}; ± half the 95 % interval, over prompts, or over seeds")
    results = {}
    for name, model, _ in runs:
        policy, tokenizer = load_policy(model, device, args.trust_remote_code)
        check_lengths(policy, model, args.max_prompt_length, args.max_response_length)
        if tokenizer.get_vocab() != reference_tokenizer.get_vocab():
            raise InputError(f"{model} has another vocabulary than the reference {reference_name}; "
                             "evaluate it by itself")
        examples, _ = encode(held_out, tokenizer, end_token_ids(tokenizer, policy), args.max_prompt_length,
                             args.max_response_length)
        opponents = opponents_of(examples, responses, against) if against else None
        results[name], _ = evaluate_policy(policy, reference, tokenizer, examples, reward, args, judge,
                                           opponents)
    for variant, names in seeds_of(results).items():
        if len(names) > 1:
            results[f"{variant}, {len(names)} seeds"] = {
                figure: over_seeds([results[name][figure][0] for name in names])
                for figure in results[names[0]]}
    print_table(results)
    write_figures(results, options.out)
    print(f"figures in {options.out}")


# --- finished runs side by side: a table and a picture ------------------------------------------------------

def over_seeds(values):
    """(mean, low, high) of one figure of several runs: the 95 % t-interval; nan with fewer than two."""
    values = torch.tensor(values, dtype=torch.float64)
    n, mean = len(values), values.mean().item()
    quantile = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13]
    t = quantile[n - 2] if 2 <= n <= 16 else 1.96 + 2.5 / max(n - 1, 1)
    half = t * values.std().item() / math.sqrt(n) if n > 1 else math.nan
    return mean, mean - half, mean + half


def seeds_of(names):
    """{variant: its names}: those that differ in their ending -sN alone are a variant's seeds."""
    groups = {}
    for name in names:
        groups.setdefault(re.sub(r"-s\d+$", "", str(name)), []).append(name)
    return groups


def read_runs(paths):
    """{path: rows of eval.jsonl} of finished runs of sail.py; other paths are passed over. Raises InputError
    where there is no such run."""
    runs = {}
    for path in map(Path, paths):
        file = path / "eval.jsonl"
        if (path / "model").is_dir() and file.is_file() and file.stat().st_size:
            runs[path] = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    if not runs:
        raise InputError("--compare: no finished run with held-out figures among the arguments; want "
                         "directories that sail.py wrote, as in runs/toy/*")
    return runs


def figure_of(name, rows):
    """(value, low, high) of one figure: of one evaluation, with its interval over prompts, or of several
    seeds', with that over seeds; None where it was not measured."""
    if any(row.get(name) is None for row in rows):
        return None
    if len(rows) == 1:
        return rows[0][name], *(rows[0].get(f"{name}_interval") or (math.nan, math.nan))
    return over_seeds([row[name] for row in rows])


def compare(paths, out):
    """Print finished runs as one markdown table; write its figures to `out` and a picture beside it."""
    found, results = read_runs(paths), {}
    variants = seeds_of(found)
    parts = 1 if len({Path(variant).name for variant in variants}) == len(variants) else 2
    groups = {"/".join(Path(variant).parts[-parts:]): [found[path] for path in runs]
              for variant, runs in variants.items()}
    for name, runs in groups.items():
        figures = {column: figure_of(column, [rows[-1] for rows in runs]) for column in COLUMNS}
        results[name] = {column: figure for column, figure in figures.items() if figure}
    names = [name for name in COLUMNS if any(name in figures for figures in results.values())]
    print(f"| | runs | {' | '.join(names)} |\n|---|{'---|' * (len(names) + 1)}")
    for model, figures in results.items():
        cells = [shown(*figures[name]) if name in figures else "" for name in names]
        print(f"| {model} | {len(groups[model])} | {' | '.join(cells)} |")
    picture = Path(out).with_suffix(".png")
    write_figures(results, out)
    plot(groups, results, picture)
    print("\n± half the 95 % interval: over seeds (t) where there are several, else over prompts "
          f"(bootstrap)\nfigures in {out}, picture in {picture}")


# Okabe and Ito's colours, which colour-blind readers can tell apart, and a marker each besides.
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F"]
MARKERS = "osD^vPX*"


def put_labels(axes, labels):
    """Write (text, x, y, colour) beside their points, each at the first place where it covers no other."""
    from matplotlib.patheffects import withStroke
    taken = []
    axes.figure.draw_without_rendering()                               # until then no place is known
    for text, x, y, colour in sorted(labels, key=lambda label: -label[2]):
        for dy in (-4, -16, 8, -28, 20, -40, 32):
            label = axes.annotate(text, (x, y), (8, dy), textcoords="offset points", color=colour,
                                  fontsize=12, path_effects=[withStroke(linewidth=3, foreground="white")])
            box = label.get_window_extent()
            if dy == 32 or not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def errors(figure):
    """(value, low, high) as what matplotlib calls yerr."""
    value, low, high = figure
    return [[value - low], [high - value]]


def plot(groups, results, path):
    """Reward against KL, the held-out reward over training, and win rates, as a PNG; names stand beside what
    they name. On the left a small point is one evaluation of one run, a line the mean over runs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("the picture needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(10, 5.6 + 0.33 * len(groups)), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[4.6, 1 + 0.33 * len(groups)])
    left, bars = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, :])
    right = figure.add_subplot(grid[0, 1], sharey=left)
    beside_left, beside_right, points = [], [], []
    for nth, (name, runs) in enumerate(groups.items()):
        colour, marker, last = COLOURS[nth % 8], MARKERS[nth % 8], results[name]
        style = dict(color=colour, marker=marker, markersize=7, capsize=3)
        for key, shift, shade in (("win_rate", -0.17, 1), ("lc_win_rate", 0.17, 0.4)):
            if key in last:
                percent = [100 * number for number in last[key]]
                bars.barh(nth + shift, percent[0], 0.3, color=colour, alpha=shade, linewidth=0)
                bars.errorbar(percent[0], nth + shift, xerr=errors(percent), color="#555555", capsize=2)
        if "reward" not in last:
            continue
        if "kl" not in last:                               # SFT, which has no reference: it is the others'
            left.errorbar(0, last["reward"][0], errors(last["reward"]), **style)
            beside_left.append((name, 0, last["reward"][0], colour))
            continue
        steps = sorted(set.intersection(*({row["step"] for row in rows} for rows in runs)))
        at = [[row for rows in runs for row in rows if row["step"] == step] for step in steps]
        reward, low, high = zip(*[figure_of("reward", rows) for rows in at])
        points += [row["reward"] for rows in at for row in rows]
        left.scatter(*zip(*[(row["kl"], row["reward"]) for rows in at for row in rows]), s=12, color=colour,
                     marker=marker, alpha=0.4, linewidths=0)
        left.plot([figure_of("kl", rows)[0] for rows in at], reward, color=colour)
        left.errorbar(last["kl"][0], last["reward"][0], errors(last["reward"]), errors(last["kl"]), **style)
        right.plot(steps, reward, color=colour)
        right.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        beside_left.append((name, last["kl"][0], last["reward"][0], colour))
        beside_right.append((name, steps[-1], reward[-1], colour))
    left.set_xscale("symlog", linthresh=1)
    left.margins(x=0.2)
    right.margins(x=0.25)
    left.set_xlim(left=-0.1)
    right.set_xlim(left=0)
    if points:                                             # an interval may be wider than the picture is high
        margin = 0.1 * (max(points) - min(points)) + 0.1
        left.set_ylim(min(points) - margin, max(points) + margin)
    left.set(xlabel="KL(π‖π_ref), nats per response", ylabel="held-out reward", title="reward against KL")
    right.set(xlabel="optimizer step", title="during training")
    bars.set(yticks=range(len(groups)), yticklabels=groups, xlim=(0, 100),
             xlabel="wins against the data's chosen responses, %; pale: length-controlled")
    bars.axvline(50, color="black", linewidth=0.8, linestyle=":")
    bars.invert_yaxis()
    for axes in (left, right, bars):
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    put_labels(left, beside_left)
    put_labels(right, beside_right)
    figure.savefig(path, dpi=130, format="png")


# --- judges against humans ----------------------------------------------------------------------------------

def judge_from(args, reward):
    """The judge that --judge, --judge-model, --judge-template and --verdicts name; reward: that of --reward,
    or None. Raises InputError where they name no judge."""
    if (args.judge == "reward") == bool(args.judge_model):
        raise InputError("--judge: want a URL, http://HOST/v1, together with --judge-model NAME, or neither")
    if args.judge != "reward":
        return load_judge(args.judge, args.judge_model, args.judge_template, args.verdicts)
    if reward is None:
        raise InputError("--judge reward: which one? name it with --reward")
    return reward_judge(reward)


def from_pandalm(row):
    """PandaLM's human test set (arXiv 2306.05087): the vote of most annotators, 1, 2, or 0 for a tie."""
    (vote, times), = Counter(int(row[f"annotator{place}"]) for place in (1, 2, 3)).most_common(1)
    if times == 1:
        raise BadRow("annotators without a majority")
    prompt = row["instruction"] + (f"\n\n{row['input']}" if row["input"].strip() else "")
    # the published file has the answer "True" as a boolean
    return prompt, *(str(row[side]) if isinstance(row[side], bool) else row[side]
                     for side in ("response1", "response2")), {1: 1.0, 2: 0.0, 0: 0.5}[vote]


def from_mt_bench(row):
    """MT-Bench's human judgments (arXiv 2306.05685), of which first turns are read: a dialogue's second turn
    follows another first answer on each side."""
    if int(row["turn"]) != 1:
        raise BadRow("second turn")
    (prompt, first), (_, second) = ([turn["content"] for turn in row[f"conversation_{side}"][:2]]
                                    for side in "ab")
    return prompt, first, second, {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}[row["winner"].split(" (")[0]]


HUMANS = {  # name: (the columns that identify it, converter of a row into prompt, two responses, verdict)
    "PandaLM": ("instruction input response1 response2 annotator1 annotator2 annotator3", from_pandalm),
    "MT-Bench": ("model_a model_b winner conversation_a conversation_b turn", from_mt_bench)}


def load_human_verdicts(source):
    """Human verdicts on pairs of responses, as HUMANS says: (prompts, firsts, seconds, verdicts), report.

    A verdict is 1.0 where the first response is better, 0.0 where the second is, 0.5 for a tie. report: a
    dict {format, dropped}, where `dropped` counts rows by reason. Raises InputError where no row can be used.
    """
    rows, kept, dropped = list(read_rows(source)), [], Counter()
    columns = {*rows[0]} if rows else set()
    name = next((name for name, (needed, _) in HUMANS.items() if columns.issuperset(needed.split())), None)
    if name is None:
        known = "; ".join(f"{name}'s {needed.replace(' ', ', ')}" for name, (needed, _) in HUMANS.items())
        raise InputError(f"{source}: no rows with human verdicts; want the columns {known}")
    for row in rows:
        try:
            *texts, verdict = HUMANS[name][1](row)
            if not all(isinstance(text, str) for text in texts):
                raise BadRow(NO_TEXT)
            kept.append((*texts, verdict))
        except BadRow as reason:
            dropped[str(reason)] += 1
        except (KeyError, TypeError, AttributeError, ValueError):
            dropped[NO_TEXT] += 1
    if not kept:
        raise InputError(f"{source}: no usable row in {len(rows)} ({counted(dropped)})")
    return map(list, zip(*kept)), {"format": name, "dropped": dropped}


def kappa(ours, theirs):
    """Cohen's kappa of two columns of wins, ties and losses, (R, n) × 2 -> (R,): of the agreement that chance
    would not bring, with the same shares of each, the part that is there. nan where chance brings all."""
    agreement = (ours == theirs).double().mean(-1)
    chance = sum((ours == value).double().mean(-1) * (theirs == value).double().mean(-1)
                 for value in (0.0, 0.5, 1.0))
    return (agreement - chance) / (1 - chance)


def length_bias(ours, theirs, longer):
    """How much more of its decided verdicts a judge gives to the longer response than humans do of theirs,
    (R, n) × 3 -> (R,): ours the judge's, theirs the humans', longer: 1 where the first response is the longer
    one, 0 where the second is, ½ where both have as many characters; those rows do not count."""
    def share(verdicts):
        decided = (verdicts != 0.5) & (longer != 0.5)
        return (decided & (verdicts == longer)).double().sum(-1) / decided.sum(-1)

    return share(ours) - share(theirs)


def judge_figures(verdicts, human, longer):
    """What a judge's Verdicts are worth against the humans' (1, ½, 0): {name: (value, low, high)}.

    accuracy: share of the same win, tie or loss; decided: the same on rows where humans saw no tie, a tie of
    the judge counting ½; kappa; flipped: share whose two orders disagreed; unparsable; length_bias.
    """
    ours = [verdict.win for verdict in verdicts]
    agreement = [1 - abs(one - other) for one, other in zip(ours, human)]
    decided = [float(verdict != 0.5) for verdict in human]
    return {"accuracy": bootstrap(mean, [float(share == 1) for share in agreement]),
            "decided": bootstrap(lambda share, of: (share * of).sum(-1) / of.sum(-1), agreement, decided),
            "kappa": bootstrap(kappa, ours, human),
            "length_bias": bootstrap(length_bias, ours, human, longer), **notes_of(verdicts)}


def check_judge(args):
    """Print how the judge of the command line agrees with the humans of --check-judge, and how "the longer
    response wins" does."""
    if args.models:
        raise InputError("--check-judge: judges the responses of its file; name no models")
    (prompts, first, second, human), report = load_human_verdicts(args.check_judge)
    reward = None
    if args.judge == "reward" and args.reward:
        reward = load_reward(args.reward, "cuda" if torch.cuda.is_available() else "cpu",
                             args.trust_remote_code)
    judge = judge_from(args, reward)
    by_length = reward_judge(load_reward("length"))(prompts, first, second)
    longer, name = [verdict.win for verdict in by_length], args.judge_model or args.reward
    results = {} if name == "length" else {name: judge_figures(judge(prompts, first, second), human, longer)}
    results["longer wins"] = judge_figures(by_length, human, longer)
    print(f"{len(human)} rows of {args.check_judge} ({report['format']}), {human.count(0.5)} ties among the "
          f"humans, dropped: {counted(report['dropped'])}; value ± half-width of the 95 % interval over rows")
    print_table(results)


# --- multiple choice, scored as lm-evaluation-harness does --------------------------------------------------

def choice_item(row, lettered):
    """A row -> {question: its text up to and with "Answer:", options: what may follow after a blank, answer:
    the place of the right one}. lettered: the text lists the options, and the letters are to choose from."""
    question, choices = row["question"], row.get("choices")
    labels, answer = (choices["label"], row["answerKey"]) if choices else (row["label"], row["answer"])
    texts = choices["text"] if choices else [row[label] for label in labels]
    "".join([question, *texts]).encode()                      # raises where one is no text
    if len(texts) < 2 or len(texts) != len(labels) or labels.count(answer) != 1:
        raise BadRow("answer is not one of the options")
    options, text = texts, f"Question: {question}\nAnswer:"
    if lettered:
        listed = "".join(f"{label}. {option}\n" for label, option in zip(labels, texts))
        options, text = labels, f"{question.strip()}\n{listed}Answer:"
    if not all(each.strip() for each in (question, *options)):
        raise BadRow("empty question or option")
    return {"question": text, "options": options, "answer": labels.index(answer)}


def load_choices(source):
    """Multiple-choice items in the harness's words: (what `choice_item` returns, heading, dropped rows by
    reason).

    A .csv is MMLU's: no header; question, four options, letter; the heading takes the subject from its name.
    Otherwise ARC, told by its columns: question, choices {text, label}, answerKey; or question, answer, label
    and each option under its label. Raises InputError where nothing can be used.
    """
    path, heading = Path(source), ""
    if path.suffix == ".csv" and path.is_file():
        subject = re.sub("_(dev|val|test)$", "", path.stem).replace("_", " ")
        heading = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = [{**row, "label": [*"ABCD"]}
                        for row in csv.DictReader(file, ["question", *"ABCD", "answer"])]
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{source}: not UTF-8 text in columns ({error})") from None
    else:
        rows = read_rows(source)
    items, dropped = [], Counter()
    for row in rows:
        try:
            if None in row:
                raise BadRow("more than six columns")
            items.append(choice_item(row, bool(heading)))
        except BadRow as reason:
            dropped[str(reason)] += 1
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
            dropped[NO_TEXT] += 1
    if not items:
        raise InputError(f"{source}: no usable item in {len(rows)} rows ({counted(dropped)}); want question, "
                         "choices, answerKey; or question, answer, label and the options under their labels; "
                         "or a .csv without header: question, four options, letter")
    return items, heading, dropped


def choice_prompt(item, heading="", shots=(), n_shot=0):
    """What the options follow: the heading, the first n_shot of `shots` with their answers, and the item's
    question. No item is an example for itself."""
    examples = [shot for shot in shots if shot != item][:n_shot]
    return heading + "".join(f"{shot['question']} {shot['options'][shot['answer']]}\n\n"
                             for shot in examples) + item["question"]


@torch.no_grad()
def choice_logps(model, tokenizer, items, prompts, dtype="float32", batch_size=8):
    """log π(option | prompt) of each item's options, summed over tokens: a list of lists, in nats.

    An option's tokens are those that prompt and option together have more than the prompt. Texts get the
    tokenizer's BOS, where it has one, and no chat template. What is longer than the model's positions is cut
    from the left. Raises InputError for an option that has no tokens of its own, or too many.
    """
    def encoded(text):
        ids = tokenizer(text)["input_ids"]
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids    # some tokenizers end every text

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    rows, logps = [], [None] * len(items)             # rows: of each item, its options' (context, ids)
    for item, prompt in zip(items, prompts):
        context = encoded(prompt)
        options = [encoded(f"{prompt} {option}")[len(context):] for option in item["options"]]
        for option, ids in zip(item["options"], options):
            if not 0 < len(ids) <= positions:
                raise InputError(f"option {option[:80]!r} adds {len(ids)} tokens to its prompt; "
                                 f"want 1 to the model's {positions}")
        rows.append([(context[-(positions + 1 - len(ids)):], ids) for ids in options])
    by_length = sorted(range(len(rows)), key=lambda place: max(len(c) + len(ids) for c, ids in rows[place]))
    for start in tqdm(range(0, len(rows), batch_size), "scoring", leave=False,
                      disable=None if len(rows) > 8 * batch_size else True):
        batch = by_length[start:start + batch_size]
        contexts, options = zip(*(row for place in batch for row in rows[place]))
        input_ids, mask, response_mask = collate(contexts, options, model.device)
        mask = F.pad(mask[:, 1:], (0, 1))          # a row's last token predicts nothing and takes no position
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            sums = iter(sequence_logps(model, input_ids, mask, response_mask).tolist())
        for place in batch:
            logps[place] = [next(sums) for _ in rows[place]]
    return logps


def choice_figures(items, logps):
    """How often the right option has the highest log-probability (acc), or that per character (acc_norm) or
    UTF-8 byte (acc_bytes) of its text; of equal ones the first counts. As `bootstrap` returns them."""
    lengths = {"acc": lambda option: 1, "acc_norm": len, "acc_bytes": lambda option: len(option.encode())}
    figures = {}
    for name, length in lengths.items():
        scores = [[logp / length(option) for logp, option in zip(row, item["options"])]
                  for row, item in zip(logps, items)]
        figures[name] = bootstrap(mean, [float(row.index(max(row)) == item["answer"])
                                         for row, item in zip(scores, items)])
    return figures


def evaluate_choices(options):
    """`python evaluate.py MODEL … --choices FILE`: a table and --out, a model per line."""
    items, heading, dropped = load_choices(options.choices)
    examples, _, more = load_choices(options.shots) if options.shots else ([], "", Counter())
    if len(examples) < options.n_shot:
        raise InputError(f"--n-shot {options.n_shot}: {options.shots} has {len(examples)} usable rows"
                         if options.shots else "--n-shot needs --shots FILE")
    runs = runs_of(options)
    print(f"{len(items)} items of {options.choices}, {options.n_shot}-shot; dropped: "
          f"{counted(dropped + more)}; ± half the 95 % interval over items")
    prompts, results = [choice_prompt(item, heading, examples, options.n_shot) for item in items], {}
    for name, path, args in runs:
        model, tokenizer = load_policy(path, "cuda" if torch.cuda.is_available() else "cpu",
                                       args.trust_remote_code)
        results[name] = choice_figures(items, choice_logps(model, tokenizer, items, prompts, args.dtype))
    print_table(results)
    write_figures(results, options.out)
    print(f"figures in {options.out}")


def main():
    """`python evaluate.py RUN …`."""
    parser = Parser(
        description="Evaluate runs of sail.py, or any checkpoints, side by side on held-out data.")
    parser.add_argument("models", nargs="*", metavar="RUN",
                        help="a run's directory, or a checkpoint's directory or name")
    parser.add_argument("--compare", action="store_true",
                        help="only read what finished runs have measured, into one table and one picture")
    parser.add_argument("--out", default="results.json",
                        help="the figures as JSON: [value, low, high]; --compare puts its picture beside it")
    add = parser.add_argument_group("what to evaluate on").add_argument
    add("--data", help="as in sail.py (default: the run's)")
    add("--eval-data", help="held-out pairs (default: the run's rule)")
    add("--eval-limit", type=number(int, 1), default=256, help="held-out pairs (default: 256)")
    add("--reward", help="as in sail.py (default: the run's)")
    add("--reference", help="for KL, loss and margin (default: the reference of the first run that has one, "
        "else the first model)")
    add("--beta", type=number(float, 1e-9), help="(default: the run's)")
    add("--max-prompt-length", type=number(int, 1))
    add("--max-response-length", type=number(int, 1))
    add("--dtype", choices=["float32", "bfloat16"])
    add("--seed", type=number(int, 0, 2**20), default=0)
    add("--trust-remote-code", action="store_true", default=None, help="run code of a hub model")
    add = parser.add_argument_group("win rates").add_argument
    add("--against", metavar="MODEL_OR_FILE", help="whose responses to win against: a run, a checkpoint, or "
        "a file that generate.py has written (default: the data's chosen ones)")
    add("--judge", default="reward", metavar="URL", help="who says which response is better: --reward "
        "(default), or the model at an OpenAI-compatible http://HOST/v1, with the key in OPENAI_API_KEY")
    add("--judge-model", metavar="NAME", help="the model at that URL")
    add("--judge-template", choices=TEMPLATES, default="helpful",
        help="what it is asked: which response is more helpful, or safer, or a grade of each")
    add("--verdicts", metavar="FILE", default="verdicts.jsonl",
        help="its answers; none is asked for twice (default: verdicts.jsonl)")
    add("--check-judge", metavar="FILE",
        help="compare the judge with the humans in PandaLM's or MT-Bench's file instead")
    add = parser.add_argument_group("multiple choice").add_argument
    add("--choices", metavar="FILE", help="instead of all that: accuracy on ARC's rows or MMLU's .csv")
    add("--shots", metavar="FILE", help="examples to put before each question, a kind that --choices takes")
    add("--n-shot", type=number(int, 0), default=0, metavar="N", help="how many of them, the first (0)")
    args = parser.parse_args()
    args.models = [path for path in args.models if not Path(path).is_file()]     # runs/toy/* has results.json
    if (args.shots or args.n_shot) and not args.choices:
        raise InputError("--shots and --n-shot need --choices FILE")
    if args.check_judge:
        check_judge(args)
    elif args.choices:
        evaluate_choices(args)
    elif args.compare:
        compare(args.models, args.out)
    else:
        evaluate_models(args)


if __name__ == "__main__":
    command_line(main)
