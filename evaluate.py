"""Evaluate policies side by side on held-out data, every figure with its 95 % interval.

    python evaluate.py runs/toy/*                        # runs of sail.py: their own data, reward, lengths
    python evaluate.py MODEL … --data D --reward R       # any checkpoints
    python evaluate.py MODEL --against FILE …            # win rates against responses of generate.py's
    python evaluate.py --compare runs/toy/*              # what finished runs have measured: table and picture

On held-out pairs: DPO loss, margin and accuracy against the reference. On responses sampled to their prompts,
at temperature 1 as in training: reward, length, unfinished, KL(π‖π_ref), and the win rate against the data's
chosen responses or another model's, a tie counting ½, raw and length-controlled.
"""
import json
import math
import re
from argparse import Namespace
from collections import Counter, defaultdict
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import InputError, Parser, command_line, encode, end_token_ids, number, read_rows
from distributed import in_turns, shown
from generate import load_models, load_policy, micro_batches, pair_logps, response_text, sample
from reward import TEMPLATES, bootstrap, load_judge, load_reward, mean, prefers_chosen, verdicts_of
from toy import TOY_DEFAULTS, train_and_held_out

# --- figures, each as (value, low, high) --------------------------------------------------------------------


def length_controlled(verdicts, lengths):
    """The win rate that is left at equal lengths, (R, n) × 2 -> (R,), as in AlpacaEval 2 (arXiv 2404.04475).

    verdicts: 1, ½ or 0. lengths: how much longer the response is than its opponent, within ±1. P(win) = σ(quality +
    bias · length) is fitted by Newton's method; the rate is σ(quality), or the raw one where no length differs. A
    trace of ridge keeps both finite, and weighs a thousand times more on quality: what the two explain equally
    well, as when all wins are longer, counts as length. (AlpacaEval's term for the instruction's difficulty needs
    many models.)
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
    """What Verdicts on the texts `ours` against `theirs` come to: the win rate, raw and length-controlled, and, of
    a model's verdicts, the shares of flipped and of unparsable ones."""
    wins = [verdict.win for verdict in verdicts]
    notes = {name: [getattr(verdict, name) for verdict in verdicts] for name in ("flipped", "unparsable")}
    return {"win_rate": bootstrap(mean, wins),
            "lc_win_rate": bootstrap(length_controlled, wins, scaled_lengths(ours, theirs)),
            **{name: bootstrap(mean, values) for name, values in notes.items() if None not in values}}


def over_seeds(values):
    """(mean, low, high) of one figure of several runs: the 95 % t-interval; nan with fewer than two."""
    values = torch.tensor(values, dtype=torch.float64)
    n, middle = len(values), values.mean().item()
    quantile = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13]
    t = quantile[n - 2] if 2 <= n <= 16 else 1.96 + 2.5 / max(n - 1, 1)
    half = t * values.std().item() / math.sqrt(n) if n > 1 else math.nan
    return middle, middle - half, middle + half


@torch.no_grad()
def evaluate_policy(policy, reference, tokenizer, examples, reward, args, judge=None, opponents=None):
    """Figures of a policy on held-out examples: ({name: (value, low, high)}, samples).

    reference, reward: None leaves out what they measure. judge: None lets the reward judge. opponents: a text
    for each example (the chosen ones). args: beta, dtype, max_response_length, and the seed of the samples.
    KL is estimated from the samples, log π(y) − log π_ref(y) summed over y's tokens, in nats per response.
    """
    torch.manual_seed(args.seed)
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        responses, finished = sample(policy, tokenizer, [example["prompt_ids"] for example in examples],
                                     args.max_response_length)
    samples = [{"prompt": example["prompt"], "response": response_text(tokenizer, ids)}
               for example, (ids,) in zip(examples, responses)]
    prompts, texts = ([row[key] for row in samples] for key in ("prompt", "response"))
    columns = {}
    opponents = opponents or [response_text(tokenizer, example["chosen_ids"]) for example in examples]
    if reference is not None:
        columns = {"loss": [], "margin": [], "accuracy": [], "kl": []}
        drawn = [{**example, "sample_ids": ids} for example, (ids,) in zip(examples, responses)]
        for batch in tqdm(micro_batches(drawn, policy, 32), "scoring", leave=False,
                          disable=None if len(drawn) > 256 else True):
            both = batch + [{**pair, "chosen_ids": pair["sample_ids"], "rejected_ids": pair["sample_ids"]}
                            for pair in batch]
            ratio = pair_logps(policy, both, args.dtype) - pair_logps(reference, both, args.dtype)
            margin = args.beta * (ratio[0] - ratio[1])[:len(batch)]
            columns["loss"] += (-F.logsigmoid(margin)).tolist()
            columns["margin"] += margin.tolist()
            columns["accuracy"] += prefers_chosen(margin).tolist()
            columns["kl"] += ratio[0, len(batch):].tolist()
    if reward is not None:
        columns["reward"] = reward(prompts, texts)
        for row, score in zip(samples, columns["reward"]):
            row["reward"] = score
    columns["length"] = [float(len(ids)) for ids, in responses]
    columns["unfinished"] = [float(not done) for done, in finished]
    figures = {name: bootstrap(mean, values) for name, values in columns.items()}
    if judge is not None:
        figures.update(win_figures(judge(prompts, texts, opponents), texts, opponents))
    elif reward is not None:
        verdicts = verdicts_of(columns["reward"], reward(prompts, opponents))
        figures.update(win_figures(verdicts, texts, opponents))
    return figures, samples


def load_everything(args, device):
    """(policy, reference, tokenizer, reward, examples, held-out examples, counts), fit for each other."""
    train, held_out, report = train_and_held_out(args.data, args.eval_data, args.limit, args.prefer)
    reward = load_reward(args.reward, device, args.trust_remote_code) if args.reward else None
    policy, reference, tokenizer = in_turns(lambda: load_models(args, device))
    lengths = end_token_ids(tokenizer, policy), args.max_prompt_length, args.max_response_length
    examples, counts = encode(train, tokenizer, *lengths)
    held_out = encode(held_out[:args.eval_limit], tokenizer, *lengths)[0] if held_out else []
    counts["dropped"] += sum(report["dropped"].values())
    return policy, reference, tokenizer, reward, examples, held_out, {**counts, **report["dropped"]}


def count(pairs, variant):
    """What a step works on, as sums: pairs, tokens, and the samples' number, length, reward, …"""
    sides, totals = ("chosen", "rejected")[:1 if variant == "sft" else 2], Counter()
    for pair in pairs:
        lengths = {side: len(pair[f"{side}_ids"]) for side in sides}
        totals.update(pairs=1, tokens=len(sides) * len(pair["prompt_ids"]) + sum(lengths.values()),
                      chosen_tokens=lengths["chosen"], fresh=len(pair["sampled"]),
                      fresh_tokens=sum(lengths[side] for side in pair["sampled"]), ties=pair.get("tie", 0),
                      unfinished=pair.get("unfinished", 0), reward=sum(pair.get("rewards", [])))
    return totals


def record_of(step, totals, args, **rest):
    """The step's line in metrics.jsonl: means over all pairs; None for what this step had none of."""
    def mean(name, over="pairs"):
        return totals[name] / totals[over] if name in totals and totals[over] else None

    return {
        "step": step, "loss": mean("loss", "chosen_tokens" if args.variant == "sft" else "pairs"),
        **{name: mean(name) for name in ("margin", "accuracy", "chosen_logps", "rejected_logps")},
        "kl": mean("kl", "on_policy"), "reward": mean("reward", "fresh") if args.variant == "pr" else None,
        "response_length": mean("fresh_tokens", "fresh"), "unfinished": mean("unfinished", "fresh"),
        "on_policy": mean("on_policy"), "self_labelled": mean("self_labelled"),
        "label_reversed": mean("label_reversed", "self_labelled"), "ties": totals["ties"],
        "nll": mean("nll", "offline"), "revkl": mean("revkl") if args.revkl_coef else None,
        "tokens": round(totals["tokens"]), **rest}


COLUMNS = ("reward", "win_rate", "lc_win_rate", "kl", "length", "unfinished", "loss", "margin", "accuracy",
           "flipped", "unparsable")


def print_table(results, runs=None):
    """The results, {model: {name: figure}}, as a markdown table; runs: how many of each model there are."""
    names = [name for name in COLUMNS if any(name in figures for figures in results.values())]
    print(f"| | {'runs | ' if runs else ''}{' | '.join(names)} |\n|---|{'---|' * (len(names) + bool(runs))}")
    for model, figures in results.items():
        cells = [str(runs[model])] if runs else []
        cells += [shown(*figures[name]) if name in figures else "" for name in names]
        print(f"| {model} | {' | '.join(cells)} |")


def write_figures(results, path):
    """{model: {name: [value, low, high]}} as JSON; what is not a finite number is null."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({model: {name: [number if math.isfinite(number) else None for number in figure]
                                              for name, figure in figures.items()}
                                      for model, figures in results.items()}, indent=1) + "\n", encoding="utf-8")


# --- models of the command line -----------------------------------------------------------------------------

DEFAULTS = dict(data="toy", eval_data=None, prefer="better", reward=None, reference=None, beta=0.1,
                max_prompt_length=512, max_response_length=512, dtype="float32", trust_remote_code=False)


def find_run(path, options):
    """(name, model directory or name, settings) of a run of sail.py, or of a checkpoint with the default
    settings; the command line's options come first."""
    path, saved = Path(path), {}
    if (path / "args.json").is_file() and (path / "model").is_dir():
        saved = json.loads((path / "args.json").read_text(encoding="utf-8"))
    given = {key: value for key, value in vars(options).items() if value is not None}
    toy = TOY_DEFAULTS if {**DEFAULTS, **saved, **given}["data"] == "toy" else {}
    saved = {key: saved[key] for key in DEFAULTS if key in saved}
    return (path.name or str(path), str(path / "model") if saved else str(path),
            Namespace(**{**DEFAULTS, **toy, **saved, **given}))


def opponents_of(examples, path):
    """The response to each example's prompt in a file of generate.py's, in turn where the prompt comes more than
    once. Raises InputError where one is missing."""
    texts = defaultdict(list)
    for row in read_rows(path):
        texts[json.dumps(row.get("prompt"))].append(row.get("response"))
    places, opponents = Counter(), []
    for key in (json.dumps(example["prompt"]) for example in examples):
        if not texts[key] or not isinstance(texts[key][0], str):
            raise InputError(f"--against {path}: no response to the prompt {key[:60]}; want the file that "
                             "generate.py writes for the same data")
        opponents.append(texts[key][places[key] % len(texts[key])])
        places[key] += 1
    return opponents


def evaluate_models(options):
    """Sample from the models of the command line, print a table of their figures and write these to --out."""
    runs = [find_run(path, options) for path in options.models]
    if not runs:
        raise InputError("no run or model directory among the arguments")
    if len({name for name, *_ in runs}) < len(runs):
        runs = [(path, *rest) for path, (_, *rest) in zip(options.models, runs)]
    args = runs[0][2]                           # the same held-out pairs, lengths and seed for every model
    reference_name = next((run.reference for *_, run in runs if run.reference), runs[0][1])
    lengths = args.max_prompt_length, args.max_response_length
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held_out = train_and_held_out(args.data, args.eval_data, None, args.prefer)[1][:args.eval_limit]
    if not held_out:
        raise InputError(f"{args.data}: no pair is held out; name some with --eval-data")
    reward = load_reward(args.reward, device, args.trust_remote_code) if args.reward else None
    if bool(options.judge) != bool(options.judge_model):
        raise InputError("--judge: want a URL, http://HOST/v1, together with --judge-model NAME, or neither")
    judge = options.judge and load_judge(options.judge, options.judge_model, options.judge_template,
                                         options.verdicts)
    reference, reference_tokenizer = load_policy(reference_name, device, args.trust_remote_code)
    print(f"{len(held_out)} held-out pairs of {args.eval_data or args.data}, reference {reference_name}, "
          f"reward {args.reward}; wins over {options.against or 'the chosen responses'}, judged by "
          f"{options.judge_model or args.reward}; ± half the 95 % interval over prompts\n")
    results = {}
    for name, model, _ in runs:
        policy, tokenizer = load_policy(model, device, args.trust_remote_code, lengths)
        if tokenizer.get_vocab() != reference_tokenizer.get_vocab():
            raise InputError(f"{model} has another vocabulary than the reference {reference_name}")
        examples, _ = encode(held_out, tokenizer, end_token_ids(tokenizer, policy), *lengths)
        opponents = opponents_of(examples, options.against) if options.against else None
        results[name], _ = evaluate_policy(policy, reference, tokenizer, examples, reward, args, judge,
                                           opponents)
    print_table(results)
    write_figures(results, options.out)
    print(f"\nfigures in {options.out}")


# --- finished runs side by side: a table and a picture ------------------------------------------------------

def read_runs(paths):
    """{path: rows of eval.jsonl} of finished runs of sail.py among the paths. Raises InputError without
    any."""
    runs = {}
    for path in map(Path, paths):
        file = path / "eval.jsonl"
        if (path / "model").is_dir() and file.is_file() and file.stat().st_size:
            runs[path] = read_rows(file)
    if not runs:
        raise InputError("--compare: no finished run with held-out figures among the arguments, as in runs/toy/*")
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
    found, variants, results = read_runs(paths), defaultdict(list), {}
    for path in found:                                     # names that differ in their ending -sN alone are seeds
        variants[re.sub(r"-s\d+$", "", str(path))].append(found[path])
    parts = 1 if len({Path(variant).name for variant in variants}) == len(variants) else 2
    groups = {"/".join(Path(variant).parts[-parts:]): runs for variant, runs in variants.items()}
    for name, runs in groups.items():
        figures = {column: figure_of(column, [rows[-1] for rows in runs]) for column in COLUMNS}
        results[name] = {column: figure for column, figure in figures.items() if figure}
    print_table(results, {name: len(runs) for name, runs in groups.items()})
    write_figures(results, out)
    plot(groups, results, Path(out).with_suffix(".png"))
    print("\n± half the 95 % interval: over seeds (t) where there are several, else over prompts "
          f"(bootstrap)\nfigures in {out}, picture in {Path(out).with_suffix('.png')}")


COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F"]  # Okabe and Ito's


def plot(groups, results, path):
    """Reward against KL and the held-out reward over training, as a PNG. On the left a small point is one
    evaluation of one run, a line the mean over runs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("the picture needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for (name, runs), colour in zip(groups.items(), cycle(COLOURS)):
        last = results[name]
        if "reward" not in last:
            continue
        reward, kl = last["reward"], last.get("kl", (0.0, 0.0, 0.0))        # SFT's reference is itself
        errors = [[[abs(end - value)] for end in ends] for value, *ends in (reward, kl)]
        left.errorbar(kl[0], reward[0], *errors, color=colour, marker="o", capsize=3)
        left.annotate(name, (kl[0], reward[0]), (6, 4), textcoords="offset points", color=colour)
        if "kl" not in last:
            continue
        steps = sorted(set.intersection(*({row["step"] for row in rows} for rows in runs)))
        at = [[row for rows in runs for row in rows if row["step"] == step] for step in steps]
        curve, low, high = zip(*[figure_of("reward", rows) for rows in at])
        for rows in at:
            left.scatter([row["kl"] for row in rows], [row["reward"] for row in rows], s=8, color=colour, alpha=0.4)
        left.plot([figure_of("kl", rows)[0] for rows in at], curve, color=colour)
        right.plot(steps, curve, color=colour)
        right.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        right.annotate(name, (steps[-1], curve[-1]), (6, -4), textcoords="offset points", color=colour)
    left.set_xscale("symlog", linthresh=1)
    left.set(xlabel="KL(π‖π_ref), nats per response", ylabel="held-out reward", title="reward against KL")
    right.set(xlabel="optimizer step", title="during training")
    for axes in (left, right):
        axes.margins(x=0.15)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")


def main():
    """`python evaluate.py RUN …`."""
    parser = Parser(description="Evaluate runs of sail.py, or any checkpoints, side by side on held-out data.")
    parser.add_argument("models", nargs="*", metavar="RUN", help="a run's or a checkpoint's directory, or a name")
    parser.add_argument("--compare", action="store_true", help="only read what finished runs have measured, into one "
                        "table and one picture")
    parser.add_argument("--out", default="results.json", help="the figures as JSON: [value, low, high]; --compare puts "
                        "its picture beside it")
    parser.shared("--data", "--eval-data", "--prefer", "--max-prompt-length", "--max-response-length", "--seed",
                  "--trust-remote-code")
    parser.set_defaults(data=None, prefer=None, trust_remote_code=None)              # then the run's
    add = parser.add_argument_group("what to evaluate on, by default as the run").add_argument
    add("--eval-limit", type=number(int, 1), default=256, help="held-out pairs (256)")
    add("--reward", help="as in sail.py")
    add("--reference", help="for KL, loss and margin (that of the first run that has one, else the first model)")
    add("--beta", type=number(float, 1e-9))
    add("--dtype", choices=["float32", "bfloat16"])
    add = parser.add_argument_group("win rates").add_argument
    add("--against", metavar="FILE", help="responses of generate.py to win against (the data's chosen ones)")
    add("--judge", metavar="URL", help="who says which response is better: the model at an OpenAI-compatible "
        "http://HOST/v1, with the key in OPENAI_API_KEY (--reward)")
    add("--judge-model", metavar="NAME", help="the model at that URL")
    add("--judge-template", choices=TEMPLATES, default="helpful", help="which response is more helpful, or safer")
    add("--verdicts", metavar="FILE", default="verdicts.jsonl", help="its answers; none is asked for twice "
        "(verdicts.jsonl)")
    args = parser.parse_args()
    args.models = [path for path in args.models if not Path(path).is_file()]     # runs/toy/* has results.json
    if args.compare:
        compare(args.models, args.out)
    else:
        evaluate_models(args)


if __name__ == "__main__":
    command_line(main)
