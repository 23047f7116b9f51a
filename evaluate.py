"""Evaluate policies side by side on held-out data, every figure with its 95 % interval.

    python evaluate.py runs/toy/*                        # runs of sail.py: their own data, reward, lengths
    python evaluate.py MODEL … --data D --reward R       # any checkpoints
    python evaluate.py runs/toy/* --plot picture.png     # … and draw it
    python evaluate.py MODEL … --choices FILE            # multiple choice: ARC, MMLU

On held-out pairs: DPO loss, margin and accuracy against the reference. On responses sampled to their prompts,
at temperature 1 as in training: reward, length, unfinished, KL(π‖π_ref), and the win rate against the data's
chosen responses by the reward, a tie counting ½. On multiple choice: accuracy by log-likelihood, with the
prompts and figures of lm-evaluation-harness.
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
from reward import load_reward
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
    grams = [(row, tuple(text[at:at + n])) for row, text in enumerate(words) for at in range(len(text) - n + 1)]
    ids = {gram: place for place, gram in enumerate(dict.fromkeys(gram for _, gram in grams))}
    gram_of = torch.tensor([ids[gram] for _, gram in grams], dtype=torch.long)
    row_of = torch.tensor([row for row, _ in grams], dtype=torch.long)

    def ratio(rows):                                                   # (R, n) numbers of texts
        ratios = []
        for drawn in rows.long():
            times = drawn.bincount(minlength=len(texts))[row_of]       # of each n-gram's text in this draw
            seen = torch.zeros(len(ids), dtype=torch.bool).index_fill_(0, gram_of[times > 0], True)
            ratios.append(seen.sum() / times.sum().clamp(min=1))
        return torch.stack(ratios).double()

    return bootstrap(ratio, torch.arange(len(texts)), centred=True)    # a text drawn twice brings nothing new


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
    return torch.where((lengths == 0).all(-1), verdicts.mean(-1), torch.sigmoid(weights[:, 0]))


def scaled_lengths(ours, theirs):
    """tanh(difference / its root mean square) of the lengths of texts, in characters: (n,), between −1 and 1."""
    difference = torch.tensor([float(len(one) - len(other)) for one, other in zip(ours, theirs)])
    return torch.tanh(difference / difference.square().mean().sqrt().clamp(min=1e-9))


def win_figures(verdicts, ours, theirs):
    """Raw and length-controlled win rate of the responses `ours` against `theirs`; verdicts: 1, ½ (tie), 0."""
    return {"win_rate": bootstrap(mean, verdicts),
            "lc_win_rate": bootstrap(length_controlled, verdicts, scaled_lengths(ours, theirs))}


@torch.no_grad()
def evaluate_policy(policy, reference, tokenizer, examples, reward, args, batch_size=32):
    """Figures of a policy on held-out examples: ({name: (value, low, high)}, samples).

    reference: None leaves out what is measured against it. reward: None leaves out reward and win rate.
    args: beta, dtype, max_response_length, and the seed that the samples are drawn with. KL is estimated from
    the samples, log π(y) − log π_ref(y) summed over y's tokens, in nats per response.
    """
    torch.manual_seed(args.seed)
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        responses, finished = sample(policy, tokenizer, [example["prompt_ids"] for example in examples],
                                     args.max_response_length)
    samples = [{"prompt": example["prompt"], "response": response_text(tokenizer, ids)}
               for example, (ids,) in zip(examples, responses)]
    texts, columns, wins = [row["response"] for row in samples], {}, {}
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
            columns["accuracy"] += ((margin > 0) + 0.5 * (margin == 0)).tolist()
            columns["kl"] += (pair_logps(policy, sampled, args.dtype)[1]
                              - pair_logps(reference, sampled, args.dtype)[1]).tolist()
    if reward is not None:
        prompts = [example["prompt"] for example in examples]
        chosen = [response_text(tokenizer, example["chosen_ids"]) for example in examples]
        columns["reward"] = reward(prompts, texts)
        wins = win_figures([0.5 * (1 + (one > other) - (one < other)) for one, other in zip(
            columns["reward"], reward(prompts, chosen))], texts, chosen)
        for row, score in zip(samples, columns["reward"]):
            row["reward"] = score
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


def shown(value, low, high):
    """A figure as text, with half the width of its interval."""
    return f"{value:.3f} ± {(high - low) / 2:.3f}"


def print_table(results):
    """The results as an aligned table, a model per line."""
    names = [name for name in ("reward", "win_rate", "kl", "length", "unfinished", "loss", "margin",
                               "accuracy", "acc", "acc_norm", "acc_bytes")
             if any(name in figures for figures in results.values())]
    rows = [["model", *names]] + [
        [model] + [shown(*figures[name]) if name in figures else "" for name in names]
        for model, figures in results.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                        for column, (cell, width) in enumerate(zip(row, widths))))


def plot(results, runs, path):
    """Reward against KL, and the held-out reward over training, as a PNG; labels stand
    beside what they name."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    colours = dict(zip(results, ["#000000", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9",
                                 "#D55E00"] * 9))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, figures in results.items():
        if "reward" in figures and "kl" in figures:
            (reward, reward_half), (kl, kl_half) = figures["reward"], figures["kl"]
            left.errorbar(kl, reward, reward_half, kl_half, fmt="o", color=colours[name], capsize=2)
            left.annotate(name, (kl, reward), (6, 6), textcoords="offset points", color=colours[name])
        curve = Path(runs[name], "eval.jsonl")
        rows = [json.loads(line) for line in curve.read_text().split("\n") if line] if curve.is_file() else []
        rows = [row for row in rows if row.get("reward") is not None]
        if rows and "kl" in rows[0]:                       # not SFT, which starts from nothing
            right.plot([row["step"] for row in rows], [row["reward"] for row in rows], color=colours[name])
            right.annotate(name, (rows[-1]["step"], rows[-1]["reward"]), (4, -3), textcoords="offset points",
                           color=colours[name])
    left.set(xlabel="KL(π‖π_ref), nats per response", ylabel="held-out reward",
             title="after training, 95 % intervals")
    left.set_xscale("symlog")
    right.set(xlabel="optimizer step", ylabel="held-out reward", title="during training")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    figure.savefig(path, dpi=130, format="png")


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


def evaluate_choices(runs, args, source, shots, n_shot, out):
    """`python evaluate.py MODEL … --choices FILE`: a table and `out`, a model per line."""
    items, heading, dropped = load_choices(source)
    examples, _, more = load_choices(shots) if shots else ([], "", Counter())
    if len(examples) < n_shot:
        raise InputError(f"--n-shot {n_shot}: {shots} has {len(examples)} usable rows" if shots else
                         "--n-shot needs --shots FILE")
    print(f"{len(items)} items of {source}, {n_shot}-shot; dropped: {counted(dropped + more)}; "
          "mean ± half-width of the 95 % interval over items")
    prompts, results = [choice_prompt(item, heading, examples, n_shot) for item in items], {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    for name, path, _ in runs:
        model, tokenizer = load_policy(path, device, args.trust_remote_code)
        results[name] = choice_figures(items, choice_logps(model, tokenizer, items, prompts, args.dtype))
    print_table(results)
    write_figures(results, out)
    print(f"figures in {out}")


def write_figures(results, path):
    """The results as JSON, {model: {name: [value, low, high]}}; what is not finite as null."""
    finite = {name: {key: [value if math.isfinite(value) else None for value in figure]
                     for key, figure in figures.items()} for name, figures in results.items()}
    Path(path).write_text(json.dumps(finite, indent=1) + "\n", encoding="utf-8")


def main():
    """`python evaluate.py RUN …`."""
    parser = Parser(
        description="Evaluate runs of sail.py, or any checkpoints, side by side on held-out data.")
    parser.add_argument("models", nargs="+", metavar="RUN",
                        help="a run's directory, or a checkpoint's directory or name")
    parser.add_argument("--data", help="as in sail.py (default: the run's)")
    parser.add_argument("--eval-data", help="held-out pairs (default: the run's rule)")
    parser.add_argument("--reward", help="as in sail.py (default: the run's)")
    parser.add_argument("--reference", help="for KL, loss and margin (default: the reference of the first "
                        "run that has one, else the first model)")
    parser.add_argument("--beta", type=number(float, 1e-9), help="(default: the run's)")
    parser.add_argument("--eval-limit", type=number(int, 1), default=256,
                        help="held-out pairs (default: 256)")
    parser.add_argument("--max-prompt-length", type=number(int, 1))
    parser.add_argument("--max-response-length", type=number(int, 1))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=number(int, 0, 2**20), default=0)
    parser.add_argument("--trust-remote-code", action="store_true", default=None,
                        help="run code of a hub model")
    parser.add_argument("--choices", metavar="FILE",
                        help="instead of all that: accuracy on multiple choice, ARC's rows or MMLU's .csv")
    parser.add_argument("--n-shot", type=number(int, 0), default=0, metavar="N",
                        help="… after the first N examples (default: 0)")
    parser.add_argument("--shots", metavar="FILE", help="… of this file, a kind that --choices takes")
    parser.add_argument("--out", default="results.json", help="the figures as JSON: [mean, half-width]")
    parser.add_argument("--plot", metavar="PNG", help="draw reward, KL and learning curves")
    overrides = vars(parser.parse_args())
    paths, out, picture, reference = (overrides.pop(key) for key in ("models", "out", "plot", "reference"))
    choices, shots, n_shot = (overrides.pop(key) for key in ("choices", "shots", "n_shot"))
    paths = [path for path in paths if not Path(path).is_file()]       # runs/toy/* also names results.json
    if not paths:
        raise InputError("no run or model directory among the arguments")
    runs = [find_run(path, overrides) for path in paths]
    if len({name for name, *_ in runs}) < len(runs):
        runs = [(path, *rest) for path, (_, *rest) in zip(paths, runs)]
    args = runs[0][2]                           # the same held-out pairs, lengths and seed for every model
    if (shots or n_shot) and not choices:
        raise InputError("--shots and --n-shot need --choices FILE")
    if choices:
        return evaluate_choices(runs, args, choices, shots, n_shot, out)
    reference_name = reference or next((run.reference for _, _, run in runs if run.reference), runs[0][1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, held_out, _ = train_and_held_out(args.data, args.eval_data, args.limit, args.prefer)
    if not held_out:
        raise InputError(f"{args.data}: no pair is held out; name some with --eval-data")
    reward = load_reward(args.reward, device, args.trust_remote_code) if args.reward else None
    reference, reference_tokenizer = load_policy(reference_name, device, args.trust_remote_code)
    for file in filter(None, (out, picture)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    print(f"{min(len(held_out), args.eval_limit)} held-out pairs of {args.eval_data or args.data}, reference "
          f"{reference_name}, reward {args.reward}; mean ± half-width of the 95 % interval over pairs")
    results = {}
    for name, model, _ in runs:
        policy, tokenizer = load_policy(model, device, args.trust_remote_code)
        check_lengths(policy, model, args.max_prompt_length, args.max_response_length)
        if tokenizer.get_vocab() != reference_tokenizer.get_vocab():
            raise InputError(f"{model} has another vocabulary than the reference {reference_name}; "
                             "evaluate it by itself")
        examples, _ = encode(held_out[:args.eval_limit], tokenizer, end_token_ids(tokenizer, policy),
                             args.max_prompt_length, args.max_response_length)
        results[name], _ = evaluate_policy(policy, reference, tokenizer, examples, reward, args)
    print_table(results)
    write_figures(results, out)
    if picture:
        plot(results, {name: path for (name, *_), path in zip(runs, paths)}, picture)
    print(f"figures in {out}" + (f", picture in {picture}" if picture else ""))


if __name__ == "__main__":
    command_line(main)
