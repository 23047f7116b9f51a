"""Evaluate policies side by side on held-out data, every figure with its 95 % interval.

    python evaluate.py runs/toy/*                        # runs of sail.py: their own data, reward, lengths
    python evaluate.py MODEL … --data D --reward R       # any checkpoints
    python evaluate.py runs/toy/* --plot picture.png     # … and draw it
    python evaluate.py --check-judge FILE --reward R     # does R, or a --judge, say what humans said?

On held-out pairs: DPO loss, margin and accuracy against the reference. On responses sampled to their prompts,
at temperature 1 as in training: reward, length, unfinished, KL(π‖π_ref), and the win rate against the data's
chosen responses by the reward, a tie counting ½.
"""
import json
import math
from argparse import Namespace
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from data import (NO_TEXT, BadRow, InputError, Parser, command_line, counted, encode, number, read_rows,
                  train_and_held_out)
from generate import check_lengths, end_token_ids, load_policy, response_text, sample
from reward import TEMPLATES, load_judge, load_reward, reward_judge
from sail import dpo_loss, pair_logps, parse_args


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
                               "accuracy") if any(name in figures for figures in results.values())]
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
            "flipped": bootstrap(mean, [float(verdict.flipped) for verdict in verdicts]),
            "unparsable": bootstrap(mean, [float(verdict.unparsable) for verdict in verdicts]),
            "length_bias": bootstrap(length_bias, ours, human, longer)}


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
    rows = [["judge", *results["longer wins"]]] + [
        [name, *(shown(*figure) for figure in figures.values())] for name, figures in results.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))


def main():
    """`python evaluate.py RUN …`."""
    parser = Parser(
        description="Evaluate runs of sail.py, or any checkpoints, side by side on held-out data.")
    parser.add_argument("models", nargs="*", metavar="RUN",
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
    parser.add_argument("--out", default="results.json", help="the figures as JSON: [mean, half-width]")
    parser.add_argument("--plot", metavar="PNG", help="draw reward, KL and learning curves")
    parser.add_argument("--judge", default="reward", metavar="URL",
                        help="who says which response is better: --reward (default), or the model at an "
                        "OpenAI-compatible http://HOST/v1, with the key in OPENAI_API_KEY")
    parser.add_argument("--judge-model", metavar="NAME", help="the model at that URL")
    parser.add_argument("--judge-template", choices=TEMPLATES, default="helpful",
                        help="what it is asked: which response is more helpful, or safer, or a grade of each")
    parser.add_argument("--verdicts", metavar="FILE", default="verdicts.jsonl",
                        help="its answers; none is asked for twice (default: verdicts.jsonl)")
    parser.add_argument("--check-judge", metavar="FILE",
                        help="compare the judge with the humans in PandaLM's or MT-Bench's file instead")
    args = parser.parse_args()
    if args.check_judge:
        return check_judge(args)
    overrides = vars(args)
    paths, out, picture, reference = (overrides.pop(key) for key in ("models", "out", "plot", "reference"))
    paths = [path for path in paths if not Path(path).is_file()]       # runs/toy/* also names results.json
    if not paths:
        raise InputError("no run or model directory among the arguments, and no --check-judge")
    runs = [find_run(path, overrides) for path in paths]
    if len({name for name, *_ in runs}) < len(runs):
        runs = [(path, *rest) for path, (_, *rest) in zip(paths, runs)]
    args = runs[0][2]                           # the same held-out pairs, lengths and seed for every model
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
    finite = {name: {key: [value if math.isfinite(value) else None for value in figure]
                     for key, figure in figures.items()} for name, figures in results.items()}
    Path(out).write_text(json.dumps(finite, indent=1) + "\n", encoding="utf-8")
    if picture:
        plot(results, {name: path for (name, *_), path in zip(runs, paths)}, picture)
    print(f"figures in {out}" + (f", picture in {picture}" if picture else ""))


if __name__ == "__main__":
    command_line(main)
