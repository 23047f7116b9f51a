"""Evaluate policies side by side on held-out data, every figure with its 95 % interval.

    python evaluate.py runs/mine/*                       # runs of sail.py: their own data, reward, lengths
    python evaluate.py MODEL … --data D --reward R       # any checkpoints
    python evaluate.py --compare runs/mine/*             # what finished runs have measured: table and picture

On held-out pairs: DPO loss, margin and accuracy against the reference. On responses sampled to their prompts,
at temperature 1 as in training: reward, length, unfinished, KL(π‖π_ref), `objective`, which is reward − β·KL,
and the win rate against the data's chosen responses, a tie counting ½, raw and length-controlled.
"""
import io
import json
import math
import re
from argparse import Namespace
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from statistics import mean

from runtime.command_line import InputError, Parser, command_line, format_counts, number, seeded
from runtime.intervals import few, format_figure, mean_of, over_seeds, prefers_chosen, share_of, win_figures
from runtime.processes import computing_in, default_dtype, progress
from runtime.run_directory import (
    fingerprint_files, is_run_directory, read_json, refuse_output, write_bytes, write_text)
from runtime.training import micro_batches

import torch
import torch.nn.functional as F

from data import collate, encode, end_token_ids, response_text
from formats import read_rows, train_and_held_out
from generate import load_frozen, sample, sequence_logps
from reward import drop_unscorable, load_reward

# --- figures, each as (value, low, high) --------------------------------------------------------------------


@torch.no_grad()
def response_logps(model, examples, responses, dtype):
    """log π(y|x) of a response (ids) to each example's prompt, (n,)."""
    rows = []
    for example, ids in zip(examples, responses, strict=True):
        rows.append((example.prompt_ids, ids))
    logps = []
    for micro in progress(micro_batches(rows, lambda row: len(row[1]), model, 32), "scoring, batches"):
        batch = collate(*zip(*micro, strict=True))
        with computing_in(dtype, model):
            logps.append(sequence_logps(model, *batch))
    return torch.cat(logps).cpu()


def log_ratios(policy, reference, examples, responses, dtype):
    """log π(y|x) − log π_ref(y|x) of a response (ids) to each example's prompt, (n,)."""
    ours = response_logps(policy, examples, responses, dtype)
    return ours - response_logps(reference, examples, responses, dtype)


def evaluate_policy(policy, reference, tokenizer, examples, reward, args):
    """Figures of a policy on held-out examples: ({name: (value, low, high)}, samples).

    reference, reward: None leaves out what they measure; so do examples without responses. Without a
    reference, as in SFT, loss is −log π per token of the data's chosen responses. args: beta, dtype,
    max_response_length, sample_batch_size, and the seed of the samples. KL is estimated from the samples, as
    log π(y) − log π_ref(y) summed over y's tokens, in nats per response; the reward decides on wins over the
    chosen responses."""
    torch.manual_seed(seeded("held-out samples", args.seed))
    with computing_in(args.dtype, policy):
        responses, finished = sample(policy, tokenizer, [example.prompt_ids for example in examples],
                                     args.max_response_length, batch_size=args.sample_batch_size)
    responses = [ids for ids, in responses]                 # one of each prompt
    texts = texts_of(examples, responses, tokenizer)
    columns = pair_columns(policy, reference, examples, args)              # name: a number per example
    if reference is not None:
        columns["kl"] = log_ratios(policy, reference, examples, responses, args.dtype).tolist()
    prompts = [example.prompt for example in examples]
    if reward is not None:
        columns["reward"] = reward(prompts, texts)
    if reward is not None and reference is not None:
        kl = torch.tensor(columns["kl"])
        columns["objective"] = (torch.tensor(columns["reward"]) - args.beta * kl).tolist()
    columns["length"] = [float(len(ids)) for ids in responses]
    columns["unfinished"] = [float(not done) for done, in finished]
    figures = {}
    for name, values in columns.items():
        if name in ("accuracy", "unfinished"):
            figures[name] = share_of(values)
        else:
            figures[name] = mean_of(values)
    samples = []
    for prompt, text in zip(prompts, texts):
        samples.append({"prompt": prompt, "response": text})
    for sample_, score in zip(samples, columns.get("reward", [])):
        sample_["reward"] = score
    if reward is not None and examples[0].chosen is not None:
        figures.update(wins_over_chosen(examples, texts, columns["reward"], reward, tokenizer))
    return figures, samples


def pair_columns(policy, reference, examples, args):
    """{name: a number per example} of what is measured on the data's responses."""
    if examples[0].chosen is None:
        return {}
    chosen_ids = [example.chosen_ids for example in examples]
    if reference is None:                                   # nats per token, as in SFT
        logps = response_logps(policy, examples, chosen_ids, args.dtype)
        lengths = torch.tensor([len(ids) for ids in chosen_ids])
        return {"loss": (-logps / lengths).tolist()}
    if examples[0].rejected is None:
        return {}
    chosen = log_ratios(policy, reference, examples, chosen_ids, args.dtype)
    rejected = log_ratios(policy, reference, examples, [example.rejected_ids for example in examples],
                          args.dtype)
    margin = args.beta * (chosen - rejected)
    return {"loss": (-F.logsigmoid(margin)).tolist(), "margin": margin.tolist(),
            "accuracy": prefers_chosen(margin).tolist()}


def wins_over_chosen(examples, texts, rewards, reward, tokenizer):
    """The win rates of the texts over the data's chosen responses, by the reward."""
    opponents = texts_of(examples, [example.chosen_ids for example in examples], tokenizer)
    prompts = [example.prompt for example in examples]
    ours = torch.tensor(rewards)
    theirs = torch.tensor(reward(prompts, opponents))
    wins = prefers_chosen(ours - theirs).tolist()
    return win_figures(wins, texts, opponents)


def texts_of(examples, responses, tokenizer):
    """The texts of responses (ids), each to its example's prompt."""
    texts = []
    for example, ids in zip(examples, responses):
        texts.append(response_text(tokenizer, ids, example.prompt_ids))
    return texts


# --- tables, files ------------------------------------------------------------------------------------------

COLUMNS = {"reward": "reward", "kl": "KL", "objective": "reward − β·KL", "gap": "below the best",
           "win_rate": "win rate", "lc_win_rate": "LC win rate", "length": "length"}           # of the tables


def print_table(results, runs=None):
    """The results, {model: {name: figure}}, as a markdown table; runs: how many of each model there are."""
    measured = set().union(*results.values())
    names = [name for name in COLUMNS if name in measured]
    heads = [COLUMNS[name] for name in names]
    if runs:
        heads.insert(0, "runs")
    print(f"| | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for model, figures in results.items():
        cells = [model]
        if runs:
            cells.append(str(runs[model]))
        for name in names:
            cell = ""
            if name in figures:
                cell = format_figure(*figures[name])
            cells.append(cell)
        print(f"| {' | '.join(cells)} |")


def write_figures(results, path):
    """{model: {name: {value, low, high}}} as JSON; what is not a finite number is null."""
    written = {}
    for model, figures in results.items():
        written[model] = {}
        for name, figure in figures.items():
            ends = dict(zip(("value", "low", "high"), figure))
            for end in ends:
                if not math.isfinite(ends[end]):
                    ends[end] = None
            written[model][name] = ends
    write_text(path, json.dumps(written, indent=1) + "\n")


def are_figures(text):
    """Whether a text is what `write_figures` writes."""
    try:
        figures = [figure for model in json.loads(text).values() for figure in model.values()]
        return all({*figure} == {"value", "low", "high"} for figure in figures)
    except (ValueError, TypeError, AttributeError):
        return False


def print_samples(samples, number):
    """The answers of all models, {model: samples}, to the first `number` prompts, one prompt after the other.
    """
    for rows in list(zip(*samples.values()))[:number]:
        prompt = rows[0]["prompt"]
        if isinstance(prompt, list):
            prompt = prompt[-1]["content"]
        print(f"\n>>> {prompt}")
        for name, row in zip(samples, rows):
            print(f"--- {name}")
            if "reward" in row:
                print(f"(reward {row['reward']:.3f})")
            print(row["response"])


# --- models of the command line -----------------------------------------------------------------------------

DEFAULTS = dict(data=None, eval_data=None, prefer="better", reward=None, reference=None, beta=0.1,
                max_prompt_length=512, max_response_length=512, dtype=default_dtype(), date=None,
                sample_batch_size=64, trust_remote_code=False)


def find_run(path, options):
    """(model directory or name, settings) of a run of sail.py, or of a checkpoint with the default settings;
    the command line's options come first. What runs code comes from there alone: a run may be somebody
    else's."""
    settings, model = dict(DEFAULTS), str(path)
    if Path(path, "args.json").is_file() and Path(path, "model").is_dir():
        model = str(Path(path, "model"))
        settings.update(settings_of(Path(path, "args.json")))
    elif is_run_directory(Path(path)):
        raise InputError(f"{path} has no model yet; it is in training, or waits for --resume")
    for name, value in vars(options).items():
        if value is not None:
            settings[name] = value
    if ".py:" in (settings["reward"] or "") and options.reward is None:
        raise InputError(f"{path}: its reward, {settings['reward']}, is code; it runs only if --reward names "
                         "it")
    if options.reference is None and settings["reference"]:
        refuse_replaced(path, settings["reference"])
    return model, Namespace(**settings)


def refuse_replaced(path, reference):
    """Raises InputError if the reference's files are others than the run started with."""
    then = read_json(Path(path, "args.json")).get("reference_sha256")
    if then is not None and then != fingerprint_files(reference):
        raise InputError(f"{path}: the files of its reference {reference} have changed since; give it as "
                         "--reference to measure to what it is now")


def settings_of(file):
    """What a run's args.json says of DEFAULTS. It may have been edited, so the parser that takes such flags
    checks it. Raises InputError for what that refuses."""
    def refuse(message):
        raise InputError(f"{file}: {message}")

    saved, flags = read_json(file), []
    for name in DEFAULTS:
        if saved.get(name) is not None and name != "trust_remote_code":
            flags.append(f"--{name.replace('_', '-')}={saved[name]}")
    parser = make_parser()
    parser.error = refuse
    given = {}
    for name, value in vars(parser.parse_args(flags)).items():
        if name in DEFAULTS and value is not None:
            given[name] = value
    return given


def held_out_pairs(args, reward):
    """(held-out pairs that the reward can score, counts of others). Raises InputError without any."""
    if args.data is None and args.eval_data is None:
        raise InputError("no data: the models are no runs of sail.py; name some with --data or --eval-data")
    _, held_out, _, _ = train_and_held_out(args.data or args.eval_data, args.eval_data, None, args.prefer)
    if not held_out:
        raise InputError(f"{args.data}: no pair is held out; name some with --eval-data")
    return drop_unscorable(held_out, reward)


def evaluate_models(options):
    """Sample from the models of the command line, print a table of their figures, and write these into each
    run's evaluated.json, or all into --out."""
    if not options.models:
        raise InputError("no run or model directory among the arguments")
    if options.out:
        refuse_output(options.out, are_figures)
    runs = [find_run(path, options) for path in options.models]
    names = [Path(path).name or path for path in options.models]
    if len(set(names)) < len(names):
        names = options.models
    args = runs[0][1]                           # the same held-out pairs, lengths and seed for every model
    references = [run.reference for _, run in runs if run.reference]
    reference_name = (references + [runs[0][0]])[0]
    lengths = args.max_prompt_length, args.max_response_length
    reward = None
    if args.reward:
        reward = load_reward(args.reward, args.trust_remote_code, args.date, args.dtype)
    held_out, unscorable = held_out_pairs(args, reward)
    loading = dict(trust_remote_code=args.trust_remote_code, lengths=lengths, date=args.date)
    reference, reference_tokenizer = load_frozen(reference_name, args.dtype, **loading)
    results, samples = {}, {}
    for name, (model, _) in zip(names, runs):
        print(f"{name}: a response of up to {args.max_response_length} tokens to "
              f"{min(len(held_out), args.eval_limit)} prompts …")
        policy, tokenizer = load_frozen(model, args.dtype, **loading)
        if tokenizer.get_vocab() != reference_tokenizer.get_vocab():
            raise InputError(f"{model} has another vocabulary than the reference {reference_name}")
        rows = policy.get_input_embeddings().weight.shape[0]
        examples, counts, _ = encode(held_out, tokenizer, end_token_ids(tokenizer, policy), *lengths, rows,
                                     args.eval_limit)
        results[name], samples[name] = evaluate_policy(policy, reference, tokenizer, examples, reward, args)
        del policy                                         # before the next one is loaded
    print(f"\n{len(examples)} held-out pairs of {args.eval_data or args.data} "
          f"({format_counts(+counts + unscorable)}), "
          f"reference {reference_name}, reward {args.reward}, which also decides on wins over the chosen "
          f"responses; 95 % intervals over prompts, as ± half or as [low, high]{few(len(examples))}\n")
    print_table(results)
    print_samples(samples, options.show)
    files = defaultdict(dict)
    for name, path, (model, _) in zip(names, options.models, runs):
        if options.out:
            file = Path(options.out)
        elif Path(path, "model") == Path(model):
            file = Path(path, "evaluated.json")
        else:
            file = Path("evaluated.json")
        files[file][name] = results[name]
    for file, figures in files.items():
        write_figures(figures, file)
    print(f"\nfigures in {', '.join(map(str, files))}")


# --- finished runs side by side: a table and a picture ------------------------------------------------------

def read_runs(paths):
    """{path: rows of eval.jsonl} of the finished runs of sail.py among the paths; InputError without any."""
    runs = {}
    for path in map(Path, paths):
        if not (path / "model").is_dir() or not (path / "eval.jsonl").is_file():
            if is_run_directory(path):
                print(f"{path} is left out: it has no model, or no held-out figures, yet")
            continue
        rows = read_rows(path / "eval.jsonl")
        for number_of_row, row in enumerate(rows, 1):
            refuse_edited(f"{path}/eval.jsonl:{number_of_row}", row)
        if rows:
            runs[path] = rows
    if not runs:
        raise InputError("--compare: no finished run with held-out figures among the arguments")
    return runs


def refuse_edited(place, row):
    """Raises InputError for a row of eval.jsonl that no run has written: its figures are numbers or null,
    their intervals two numbers or null."""
    for name, value in row.items():
        values = [value]
        if name.endswith("_interval") and isinstance(value, list) and len(value) == 2:
            values = value
        for each in values:
            if not (each is None or type(each) in (int, float)):
                raise InputError(f"{place}: {name} is {str(value)[:40]!r}; a run has not written this")
    if type(row.get("step")) is not int:
        raise InputError(f"{place}: has no step")


def last_samples(path):
    """The rows of a run's samples.jsonl of its last evaluation."""
    rows = read_rows(path / "samples.jsonl")
    last = rows[-1]["step"]
    return [row for row in rows if row["step"] == last]


def figure_of(name, rows):
    """(value, low, high) of one figure: of one evaluation, with its interval over prompts, or of several
    seeds', with that over seeds; None if it was not measured."""
    values = [row.get(name) for row in rows]
    if None in values:
        return None
    if len(values) > 1:
        return over_seeds(values)
    interval = rows[0].get(f"{name}_interval")
    low, high = interval or (math.nan, math.nan)
    return values[0], low, high


def frontier(rewards, temperatures):
    """The best that any policy can do, from the rewards of samples of the reference, (P prompts, n samples):
    for each temperature t the policy π_t ∝ π_ref·exp(r/t), which has the highest reward of all policies of
    its KL.

    The samples are weighted by exp(r/t), self-normalised importance sampling. Rows: kl in nats per response;
    reward; best, the highest reward − t·KL, which is t·log E_ref exp(r/t); error, half the 95 % interval of
    `best` and of the curve's height at that KL; effective, the samples of a prompt that the weights leave,
    (Σw)²/Σw². A row whose poorest prompt has fewer than 30 is left out."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    prompts, n = rewards.shape
    rows = []
    for t in temperatures:
        scaled = rewards / t
        weights = scaled.softmax(-1)                                                       # (P, n)
        effective = 1 / weights.square().sum(-1)                                           # (P,)
        poorest = effective.min().item()
        if poorest < 30:
            continue
        reward = (weights * rewards).sum(-1)
        log_mean = scaled.logsumexp(-1) - math.log(n)          # of exp(r/t)
        variance = 1 / effective - 1 / n
        row = {"temperature": t, "reward": reward.mean().item(), "best": t * log_mean.mean().item()}
        row["kl"] = (row["reward"] - row["best"]) / t
        row["error"] = 1.96 * t * variance.sum().sqrt().item() / prompts
        row["effective"] = poorest
        rows.append(row)
    return rows


def best_possible(options):
    """(the row at β, all rows) of `frontier`, by the first run's reference. InputError for too few
    samples."""
    runs = []
    for path in options.models:
        _, run = find_run(path, options)
        if run.reference and run.reward:
            runs.append(run)
    if not runs:
        raise InputError("--frontier: no run has a reference and a reward")
    args = runs[0]
    lengths = args.max_prompt_length, args.max_response_length
    reference, tokenizer = load_frozen(args.reference, args.dtype, trust_remote_code=args.trust_remote_code,
                                       lengths=lengths, date=args.date)
    reward = load_reward(args.reward, args.trust_remote_code, args.date, args.dtype)
    held_out, _ = held_out_pairs(args, reward)
    held_out, _, _ = encode(held_out, tokenizer, end_token_ids(tokenizer, reference), *lengths,
                            limit=args.eval_limit)
    by_prompt = {str(example.prompt): example for example in held_out}                 # each prompt once
    examples = list(by_prompt.values())
    prompt_ids = [example.prompt_ids for example in examples]
    torch.manual_seed(seeded("frontier", args.seed))
    with computing_in(args.dtype, reference):
        drawn, _ = sample(reference, tokenizer, prompt_ids, args.max_response_length, options.frontier,
                          batch_size=1)
    scores = []
    for example, responses in zip(examples, drawn):
        same = [example] * len(responses)
        texts = texts_of(same, responses, tokenizer)
        scores.append(reward([each.prompt for each in same], texts))
    temperatures = [args.beta * 1.15 ** power for power in range(-12, 40)]
    rows = frontier(scores, temperatures)
    for row in rows:
        if row["temperature"] == args.beta:
            return row, rows
    raise InputError(f"--frontier {options.frontier}: too few samples at β {args.beta:g}; give more")


def groups_of(found):
    """{name: rows of eval.jsonl, a list for each run}: runs whose names differ in -sN alone are seeds."""
    variants = defaultdict(list)
    for path, rows in found.items():
        variant = re.sub(r"-s\d+$", "", str(path))
        variants[Path(variant)].append(rows)
    names = {path.name for path in variants}
    groups = {}
    for path, runs in variants.items():
        name = path.name
        if len(names) < len(variants):                     # runs of one name: with their directory
            name = f"{path.parent.name}/{name}"
        groups[name] = runs
    return groups


def compare(paths, out=None, show=0, best=None, curve=()):
    """Print runs as a markdown table, and their last answers to the first `show` held-out prompts; write
    figures to `out` and a picture beside it. best, curve: see `best_possible`."""
    found = read_runs(paths)
    out = Path(out or next(iter(found)).parent / "results.json")
    groups, results, seeds = groups_of(found), {}, {}
    for name, runs in groups.items():
        results[name] = {}
        seeds[name] = len(runs)
        last = [rows[-1] for rows in runs]
        for column in COLUMNS:
            figure = figure_of(column, last)
            if figure:
                results[name][column] = figure
        if best and "objective" in results[name]:
            value, low, high = results[name]["objective"]
            top = best["best"]
            results[name]["gap"] = top - value, top - high, top - low
    if len(found) == len(groups):
        seeds = None
    print_table(results, seeds)
    if show:
        print_samples({str(path): last_samples(path) for path in found}, show)
    write_figures(results, out)
    plot(groups, results, curve, out.with_suffix(".png"))
    print("\n95 % intervals, as ± half or as [low, high]: over seeds (t) if there are several, else over "
          f"prompts\nfigures in {out}, picture in {out.with_suffix('.png')}")
    if best:
        print(f"the best reward − β·KL at β {best['temperature']:g} is {best['best']:.3f} ± "
              f"{best['error']:.3f}, reward {best['reward']:.2f} at KL {best['kl']:.2f} (effective sample "
              f"size {best['effective']:.0f})")


COLOURS = dict(zip("sft dpo dp pp online-dpo pr pr-1 spin".split(),                       # Okabe and Ito's
                   "#000000 #0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #7F7F7F".split()))


def track_of(runs):
    """The means over seeds of KL and reward at the steps that all runs have measured: (kls, rewards)."""
    points = defaultdict(list)
    for rows in runs:
        for row in rows:
            if row.get("kl") is not None and row.get("reward") is not None:
                points[row["step"]].append((row["kl"], row["reward"]))
    kls, rewards = [], []
    for step in sorted(points):
        if len(points[step]) < len(runs):
            continue
        step_kls, step_rewards = zip(*points[step])
        kls.append(mean(step_kls))
        rewards.append(mean(step_rewards))
    return kls, rewards


def plot(groups, results, curve, path):
    """Held-out reward against KL, as a PNG. A large point is a run's end, or the mean over seeds; a line goes
    there through the evaluations."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, labels = figure.subplots(), []                   # of lines' ends: (reward, kl, name, colour)
    spare = [colour for name, colour in COLOURS.items() if name not in groups]
    spare = cycle(spare or COLOURS.values())
    for name, runs in groups.items():
        if "reward" not in results[name]:
            continue
        colour = COLOURS.get(name) or next(spare)
        reward, low, high = results[name]["reward"]
        kl, left, right = results[name].get("kl", (0.0, 0.0, 0.0))                       # SFT has none
        height = [[reward - low], [high - reward]]
        width = [[kl - left], [right - kl]]
        axes.errorbar(kl, reward, height, width, color=colour, marker="o", capsize=3)
        kls, rewards = track_of(runs)
        axes.plot(kls, rewards, ".-", color=colour)
        labels.append((reward, kl, name, colour))
    axes.set_xlabel("KL(π‖π_ref), nats per response")
    axes.set_ylabel("held-out reward")
    if curve:
        _, right = axes.get_xlim()
        inside = [(row["kl"], row["reward"]) for row in curve if row["kl"] < right]
        kls, rewards = zip(*sorted(inside))
        axes.plot(kls, rewards, color="black", linestyle="--", linewidth=1, scalex=False)
        labels.append((rewards[-1], kls[-1], "best possible", "black"))
    write_labels(axes, labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_bytes(path, picture.getvalue())


def write_labels(axes, labels):
    """The lines' names on the right of a picture, a line's height apart."""
    bottom, top = axes.get_ylim()
    _, right = axes.get_xlim()
    line = 0.05 * (top - bottom)
    place = -math.inf
    for reward, kl, name, colour in sorted(labels):
        place = max(reward, place + line)
        arrow = dict(arrowstyle="-", color=colour, linestyle=":", relpos=(0, 0.5))
        axes.annotate(name, (kl, reward), (right, place), color=colour, va="center", arrowprops=arrow,
                      parse_math=False)


def make_parser():
    """The command line's."""
    parser = Parser("Evaluate runs of sail.py, with their own settings, or any checkpoints.", " RUN …")
    add = parser.add_argument
    add("models", nargs="*", metavar="RUN", help="a run's or a checkpoint's directory, or a hub name")
    add("--compare", action="store_true", help="only read what finished runs have measured, and draw it")
    add("--out", help="the figures as JSON (RUN/evaluated.json; --compare: results.json, .png beside RUN)")
    add("--show", type=number(int, 0), default=0, metavar="N", help="all answers to the first N prompts (0)")
    parser.shared("--data", "--eval-data", "--prefer", "--max-prompt-length", "--max-response-length",
                  "--sample-batch-size", "--date", "--seed", "--trust-remote-code")
    parser.set_defaults(prefer=None, sample_batch_size=None, trust_remote_code=None)         # then the run's
    add("--frontier", type=number(int, 100), metavar="N",
        help="with --compare: the best possible, from N samples of the reference to each held-out prompt")
    add("--eval-limit", type=number(int, 1), default=256, help="held-out pairs (256)")
    add("--reward", help="as in sail.py")
    add("--reference", help="for KL, loss and margin (the first run's that has one, else the first model)")
    add("--beta", type=number(float, 1e-9), help="as in sail.py")
    add("--dtype", choices=["float32", "bfloat16"], help="as in sail.py")
    return parser


def refuse_comparison(out):
    """Raises InputError if the figures, or the picture beside them, cannot be written to these names."""
    if out.suffix != ".json":
        raise InputError(f"--out {out}: want the name of a .json file; the picture stands beside it as .png")
    refuse_output(out, are_figures)
    picture = out.with_suffix(".png")
    if picture.exists() and not out.exists():
        raise InputError(f"{picture} is there without figures of --compare beside it; give another --out")


def main():
    """`python evaluate.py RUN …`."""
    args = make_parser().parse_args()
    args.models = [path for path in args.models if not Path(path).is_file()]     # as runs/mine/results.json
    if args.compare:
        refuse_comparison(Path(args.out or Path(*args.models[:1]).parent / "results.json"))
        best = best_possible(args) if args.frontier else ()
        compare(args.models, args.out, args.show, *best)
    else:
        evaluate_models(args)


if __name__ == "__main__":
    command_line(main)
