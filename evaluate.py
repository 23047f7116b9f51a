"""Evaluate policies side by side on held-out data, every figure with its 95 % interval.

    python evaluate.py runs/toy/*                        # runs of sail.py: their own data, reward, lengths
    python evaluate.py MODEL … --data D --reward R       # any checkpoints
    python evaluate.py --compare runs/toy/*              # what finished runs have measured: table and picture

On held-out pairs: DPO loss, margin and accuracy against the reference. On responses sampled to their prompts,
at temperature 1 as in training: reward, length, unfinished, KL(π‖π_ref), and the win rate against the data's
chosen responses, a tie counting ½, raw and length-controlled.
"""
import json
import math
import re
from argparse import Namespace
from collections import Counter, defaultdict
from itertools import cycle
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F

from data import (InputError, Parser, command_line, counted, encode, end_token_ids, number, read_json,
                  read_rows, response_text, seeded, write_text)
from distributed import (few, gathered, in_turns, is_sharded, log_figures, progress, rank, say, shown,
                         write_line)
from generate import load_models, load_policy, micro_batches, pair_logps, sample
from reward import bootstrap, drop_unscorable, load_reward, mean_of, prefers_chosen, share_of
from toy import TOY_DEFAULTS, train_and_held_out

# --- figures, each as (value, low, high) --------------------------------------------------------------------


def length_controlled(verdicts, lengths):
    """The win rate that is left at equal lengths, (R, n) × 2 -> (R,), as in AlpacaEval 2 (arXiv 2404.04475).

    verdicts: 1, ½ or 0. lengths: how much longer the response is than its opponent, within ±1. P(win) =
    σ(quality + bias · length) is fitted by Newton's method; the rate is σ(quality), or the raw one where no
    length differs. A trace of ridge keeps both finite, and weighs a thousand times more on quality: what the
    two explain equally well, as when all wins are longer, counts as length."""
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


def win_figures(wins, ours, theirs):
    """The rate of wins (1, ½: tie, 0) of the texts `ours` against `theirs`, raw and length-controlled."""
    lengths = scaled_lengths(ours, theirs)
    return {"win_rate": share_of(wins), "lc_win_rate": bootstrap(length_controlled, wins, lengths)}


def over_seeds(values):
    """(mean, low, high) of one figure of several runs: the 95 % t-interval; nan with fewer than two."""
    values = torch.tensor(values, dtype=torch.float64)
    n, middle = len(values), values.mean().item()
    quantile = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13]
    t = quantile[n - 2] if 2 <= n <= 16 else 1.96 + 2.5 / max(n - 1, 1)
    half = t * values.std().item() / math.sqrt(n) if n > 1 else math.nan
    return middle, middle - half, middle + half


@torch.no_grad()
def evaluate_policy(policy, reference, tokenizer, examples, reward, args):
    """Figures of a policy on held-out examples: ({name: (value, low, high)}, samples).

    reference, reward: None leaves out what they measure; so do examples without responses. Without a
    reference, as in SFT, loss is −log π per token of the data's chosen responses. args: beta, dtype,
    max_response_length, and the seed of the samples. KL is estimated from the samples, as log π(y) − log
    π_ref(y) summed over y's tokens, in nats per response; the reward decides on wins over the chosen
    responses."""
    torch.manual_seed(seeded("held-out samples", args.seed))
    with torch.autocast(policy.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        responses, finished = sample(policy, tokenizer, [example["prompt_ids"] for example in examples],
                                     args.max_response_length)
    prompts = [example["prompt"] for example in examples]
    texts = [response_text(tokenizer, ids, example["prompt_ids"])
             for example, (ids,) in zip(examples, responses)]
    columns = {}
    if reference is not None:
        names = "loss margin accuracy kl" if examples[0]["rejected"] else "kl"
        columns = {name: [] for name in names.split()}
        drawn = [{**example, "sample_ids": ids, "chosen_ids": example["chosen_ids"] or ids}    # for its size
                 for example, (ids,) in zip(examples, responses)]
        for batch in progress(micro_batches(drawn, policy, 32), "scoring, batches"):
            own = [dict(row, chosen_ids=row["sample_ids"], rejected_ids=row["sample_ids"]) for row in batch]
            both = own + batch * ("loss" in columns)
            ratio = pair_logps(policy, both, args.dtype) - pair_logps(reference, both, args.dtype)
            margin = args.beta * (ratio[0] - ratio[1])[len(batch):]
            for name, values in dict(kl=ratio[0, :len(batch)], loss=-F.logsigmoid(margin), margin=margin,
                                     accuracy=prefers_chosen(margin)).items():
                columns.get(name, []).extend(values.tolist())
    elif examples[0]["chosen"]:
        columns["loss"] = []
        for batch in progress(micro_batches(examples, policy, 32), "scoring, batches"):
            both = [dict(example, rejected_ids=example["chosen_ids"]) for example in batch]
            for logp, example in zip(pair_logps(policy, both, args.dtype)[0].tolist(), batch):
                columns["loss"].append(-logp / len(example["chosen_ids"]))
    if reward is not None:
        columns["reward"] = reward(prompts, texts)
        if "kl" in columns:                                 # what alignment maximises
            columns["J"] = [score - args.beta * kl for score, kl in zip(columns["reward"], columns["kl"])]
    columns["length"] = [float(len(ids)) for ids, in responses]
    columns["unfinished"] = [float(not done) for done, in finished]
    figures = {name: (share_of if name in ("accuracy", "unfinished") else mean_of)(values)
               for name, values in columns.items()}
    samples = [{"prompt": prompt, "response": text} for prompt, text in zip(prompts, texts)]
    for row, score in zip(samples, columns.get("reward", [])):
        row["reward"] = score
    if reward is not None and examples[0]["chosen"]:
        opponents = [response_text(tokenizer, example["chosen_ids"], example["prompt_ids"])
                     for example in examples]
        lead = torch.tensor(columns["reward"]) - torch.tensor(reward(prompts, opponents))
        figures.update(win_figures(prefers_chosen(lead).tolist(), texts, opponents))
    return figures, samples


def evaluate_run(run, out, step, args):
    """Evaluate the policy of a run in training, and log it. Only a sharded one needs all processes."""
    if not run.held_out or not (rank() == 0 or is_sharded(run.policy)):
        return
    run.policy.eval()
    say(f"evaluating at step {step}: a response of up to {args.max_response_length} tokens to each of "
        f"{len(run.held_out)} held-out prompts …")
    with gathered(run.policy):
        figures, samples = evaluate_policy(run.policy, run.reference, run.tokenizer, run.held_out,
                                           run.reward if rank() == 0 else None, args)
    log_figures(out, step, figures, len(run.held_out))
    for row in samples[:8]:
        write_line(out, "samples", {"step": step, **row})


def load_everything(args, device):
    """(policy, reference, tokenizer, reward, examples, held-out examples, counts, lengths), fit for each
    other. counts: what was dropped, cut and altered among the training pairs; lengths: as in `encode`."""
    train, held_out, report = train_and_held_out(args.data, args.eval_data, args.limit, args.prefer)
    if any(train[0][side] is None for side in args.needs):
        raise InputError(f"{args.data}: {report['format']}, without the {' and '.join(args.needs)} responses "
                         f"that --variant {args.variant} learns from (pp and pr do without at --mix 1)")
    if report["unread"]:
        say(f"{args.data}: columns that nothing reads: {', '.join(report['unread'])}")
    reward = load_reward(args.reward, device, args.trust_remote_code, args.date) if args.reward else None
    train, unscorable = drop_unscorable(train, reward)
    unscorable_held_out = {}
    if held_out:
        held_out, unscorable_held_out = drop_unscorable(held_out, reward)
    policy, reference, tokenizer = in_turns(lambda: load_models(args, device))
    limits = (end_token_ids(tokenizer, policy), args.max_prompt_length, args.max_response_length,
              policy.get_input_embeddings().weight.shape[0])
    examples, counts, lengths = encode(train, tokenizer, *limits)
    if held_out:
        held_out, dropped, _ = encode(held_out, tokenizer, *limits, args.eval_limit)
        dropped.update(unscorable_held_out)
        if +dropped:
            say(f"held-out pairs: {counted(+dropped)}")
    counts["dropped"] += sum(report["dropped"].values())
    counts.update(report["dropped"] + report["altered"] + unscorable)
    return policy, reference, tokenizer, reward, examples, held_out, counts, lengths


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


COLUMNS = {"reward": "reward", "kl": "KL", "J": "J", "gap": "J* − J", "win_rate": "win rate",
           "lc_win_rate": "LC win rate", "length": "length"}                 # of the tables


def print_table(results, runs=None):
    """The results, {model: {name: figure}}, as a markdown table; runs: how many of each model there are."""
    names = [name for name in COLUMNS if any(name in figures for figures in results.values())]
    heads = ["", *["runs"] * bool(runs), *map(COLUMNS.get, names)]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for model, figures in results.items():
        cells = [str(runs[model])] if runs else []
        cells += [shown(*figures[name]) if name in figures else "" for name in names]
        print(f"| {model} | {' | '.join(cells)} |")


def write_figures(results, path):
    """{model: {name: {value, low, high}}} as JSON; what is not a finite number is null."""
    write_text(path, json.dumps({
        model: {name: {end: number if math.isfinite(number) else None
                       for end, number in zip(("value", "low", "high"), figure)}
                for name, figure in figures.items()} for model, figures in results.items()}, indent=1) + "\n")


# --- models of the command line -----------------------------------------------------------------------------

DEFAULTS = dict(data="toy", eval_data=None, prefer="better", reward=None, reference=None, beta=0.1,
                max_prompt_length=512, max_response_length=512, dtype="float32", date=None,
                trust_remote_code=False)


def find_run(path, options):
    """(name, model directory or name, settings) of a run of sail.py, or of a checkpoint with the default
    settings; the command line's options come first. What runs code comes from there alone: a run may be
    somebody else's."""
    path, saved = Path(path), {}
    if (path / "args.json").is_file() and (path / "model").is_dir():
        saved = {key: value for key, value in read_json(path / "args.json").items() if key in DEFAULTS}
    given = {key: value for key, value in vars(options).items() if value is not None}
    args = {**DEFAULTS, **saved, "trust_remote_code": False, **given}
    if ".py:" in (args["reward"] or "") and "reward" not in given:
        raise InputError(f"{path}: its reward, {args['reward']}, is code; it runs where --reward names it")
    toy = TOY_DEFAULTS if args["data"] == "toy" and not saved else {}
    model = path / "model" if saved else path
    return path.name or str(path), str(model), Namespace(**{**args, **toy, **given})


def evaluate_models(options):
    """Sample from the models of the command line, print a table of their figures, and write these into each
    run's evaluated.json, or all into --out."""
    runs = [find_run(path, options) for path in options.models]
    if not runs:
        raise InputError("no run or model directory among the arguments")
    if len({name for name, *_ in runs}) < len(runs):
        runs = [(path, *rest) for path, (_, *rest) in zip(options.models, runs)]
    args = runs[0][2]                           # the same held-out pairs, lengths and seed for every model
    reference_name = next((run.reference for *_, run in runs if run.reference), runs[0][1])
    lengths = args.max_prompt_length, args.max_response_length
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held_out = train_and_held_out(args.data, args.eval_data, None, args.prefer)[1]
    if not held_out:
        raise InputError(f"{args.data}: no pair is held out; name some with --eval-data")
    reward = load_reward(args.reward, device, args.trust_remote_code, args.date) if args.reward else None
    held_out, unscorable = drop_unscorable(held_out, reward)
    options_of_models = device, args.trust_remote_code, lengths, args.date
    reference, reference_tokenizer = load_policy(reference_name, *options_of_models)
    results, samples = {}, {}
    for name, model, _ in runs:
        print(f"{name}: a response of up to {args.max_response_length} tokens to "
              f"{min(len(held_out), args.eval_limit)} prompts …")
        policy, tokenizer = load_policy(model, *options_of_models)
        if tokenizer.get_vocab() != reference_tokenizer.get_vocab():
            raise InputError(f"{model} has another vocabulary than the reference {reference_name}")
        examples, counts, _ = encode(held_out, tokenizer, end_token_ids(tokenizer, policy), *lengths,
                                     policy.get_input_embeddings().weight.shape[0], args.eval_limit)
        results[name], samples[name] = evaluate_policy(policy, reference, tokenizer, examples, reward, args)
    print(f"\n{len(examples)} held-out pairs of {args.eval_data or args.data} "
          f"({counted(+counts + unscorable)}), "
          f"reference {reference_name}, reward {args.reward}, which also decides on wins over the chosen "
          f"responses; 95 % intervals over prompts, as ± half or as [low, high]{few(len(examples))}\n")
    print_table(results)
    print_samples(samples, options.show)
    files = {Path(options.out): results} if options.out else {}
    for (name, model, _), path in zip(runs, options.models if not options.out else ()):
        directory = Path(path) if Path(path, "model") == Path(model) else Path()
        files.setdefault(directory / "evaluated.json", {})[name] = results[name]
    for path, figures in files.items():
        write_figures(figures, path)
    print(f"\nfigures in {', '.join(map(str, files))}")


def print_samples(samples, number):
    """The answers of all models, {model: samples}, to the first `number` prompts, one prompt after the other.
    """
    for rows in list(zip(*samples.values()))[:number]:
        prompt = rows[0]["prompt"]
        print(f"\n>>> {prompt if isinstance(prompt, str) else prompt[-1]['content']}")
        for name, row in zip(samples, rows):
            reward = f" (reward {row['reward']:.3f})" if "reward" in row else ""
            print(f"--- {name}{reward}\n{row['response']}")


# --- finished runs side by side: a table and a picture ------------------------------------------------------

def read_runs(paths):
    """{path: rows of eval.jsonl} of the finished runs of sail.py among the paths; InputError without any."""
    runs = {}
    for path in map(Path, paths):
        file = path / "eval.jsonl"
        if (path / "model").is_dir() and file.is_file() and (rows := read_rows(file)):
            runs[path] = rows
    if not runs:
        raise InputError("--compare: no finished run with held-out figures among the arguments")
    return runs


def last_samples(path):
    """The rows of a run's samples.jsonl of its last evaluation."""
    rows = read_rows(path / "samples.jsonl")
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def figure_of(name, rows):
    """(value, low, high) of one figure: of one evaluation, with its interval over prompts, or of several
    seeds', with that over seeds; None where it was not measured."""
    if any(row.get(name) is None for row in rows):
        return None
    if len(rows) == 1:
        return rows[0][name], *(rows[0].get(f"{name}_interval") or (math.nan, math.nan))
    return over_seeds([row[name] for row in rows])


def frontier(rewards, temperatures):
    """The best that any policy can do, from the rewards of samples of the reference, (P prompts, n samples):
    for each temperature t the policy π_t ∝ π_ref·exp(r/t), which has the highest reward of all policies of
    its KL.

    The samples are weighted by exp(r/t), self-normalised importance sampling. Rows: kl in nats per response;
    reward; best, J* at β = t, the highest reward − t·KL, which is t·log E_ref exp(r/t); error, half the 95 %
    interval of `best` and of the curve's height at that KL; effective, the samples of a prompt that the
    weights leave, (Σw)²/Σw². A row whose poorest prompt has fewer than 30 is left out."""
    rewards, rows = torch.as_tensor(rewards, dtype=torch.float64), []
    prompts, n = rewards.shape
    for t in temperatures:
        weights = (rewards / t).softmax(-1)                                                         # (P, n)
        effective = 1 / weights.square().sum(-1)                                                    # (P,)
        if effective.min() >= 30:
            reward = (weights * rewards).sum(-1).mean().item()
            best = t * ((rewards / t).logsumexp(-1) - math.log(n)).mean().item()
            error = 1.96 * t * (1 / effective - 1 / n).sum().sqrt().item() / prompts
            rows.append({"temperature": t, "kl": (reward - best) / t, "reward": reward, "best": best,
                         "error": error, "effective": effective.min().item()})
    return rows


@torch.no_grad()
def best_possible(options):
    """(J*'s row, all rows) of `frontier`, by the first run's reference. InputError for too few samples."""
    runs = [find_run(path, options)[2] for path in options.models]
    args = next((run for run in runs if run.reference and run.reward), None)
    if args is None:
        raise InputError("--frontier: no run has a reference and a reward")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference, tokenizer = load_policy(args.reference, device, args.trust_remote_code,
                                       (args.max_prompt_length, args.max_response_length), args.date)
    reward = load_reward(args.reward, device, args.trust_remote_code, args.date)
    held_out = train_and_held_out(args.data, args.eval_data, None, args.prefer)[1]
    held_out, _ = drop_unscorable(held_out, reward)
    held_out, *_ = encode(held_out, tokenizer, end_token_ids(tokenizer, reference),
                          args.max_prompt_length, args.max_response_length, limit=args.eval_limit)
    examples = {str(each["prompt"]): each for each in held_out}.values()
    torch.manual_seed(seeded("frontier", args.seed))
    drawn, _ = sample(reference, tokenizer, [each["prompt_ids"] for each in examples],
                      args.max_response_length, options.frontier, batch_size=1)
    scores = [reward([each["prompt"]] * len(group),
                     [response_text(tokenizer, ids, each["prompt_ids"]) for ids in group])
              for each, group in zip(examples, drawn)]
    rows = frontier(scores, [args.beta * 1.15 ** power for power in range(-12, 40)])
    if best := [row for row in rows if row["temperature"] == args.beta]:
        return best[0], rows
    raise InputError(f"--frontier {options.frontier}: too few samples at β {args.beta:g}; give more")


def compare(paths, out=None, show=0, best=None, curve=()):
    """Print runs as a markdown table, and their last answers to the first `show` held-out prompts; write
    figures to `out` and a picture beside it. best, curve: see `best_possible`."""
    found, variants, results = read_runs(paths), defaultdict(list), {}
    out = Path(out or next(iter(found)).parent / "results.json")
    for path in found:                                     # names that differ in -sN alone are seeds
        variants[re.sub(r"-s\d+$", "", str(path))].append(found[path])
    parts = 1 if len({Path(variant).name for variant in variants}) == len(variants) else 2
    groups = {"/".join(Path(variant).parts[-parts:]): runs for variant, runs in variants.items()}
    for name, runs in groups.items():
        figures = {column: figure_of(column, [rows[-1] for rows in runs]) for column in COLUMNS}
        results[name] = {column: figure for column, figure in figures.items() if figure}
        if best and "J" in results[name]:
            value, low, high = results[name]["J"]
            results[name]["gap"] = best["best"] - value, best["best"] - high, best["best"] - low
    seeds = {name: len(runs) for name, runs in groups.items()}
    print_table(results, seeds if len(found) > len(groups) else None)
    print_samples({str(path): last_samples(path) for path in found} if show else {}, show)
    write_figures(results, out)
    plot(groups, results, curve, out.with_suffix(".png"))
    print("\n95 % intervals, as ± half or as [low, high]: over seeds (t) where there are several, else over "
          f"prompts. J: reward − β·KL\nfigures in {out}, picture in {out.with_suffix('.png')}")
    if best:
        print(f"the best at β {best['temperature']:g}: J* {best['best']:.3f} ± {best['error']:.3f}, reward"
              f" {best['reward']:.2f} at KL {best['kl']:.2f} (effective sample size {best['effective']:.0f})")


COLOURS = dict(zip("sft dpo dp pp online-dpo pr pr-1 spin".split(),                       # Okabe and Ito's
                   "#000000 #0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #7F7F7F".split()))


def plot(groups, results, curve, path):
    """Held-out reward against KL, as a PNG. A large point is a run's end, or the mean over seeds; a line goes
    there through the evaluations."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, ends = figure.subplots(), []
    for (name, runs), spare in zip(groups.items(), cycle(COLOURS.values())):
        colour = COLOURS.get(name, spare)
        if "reward" not in results[name]:
            continue
        reward, kl = results[name]["reward"], results[name].get("kl", (0.0, 0.0, 0.0))       # SFT has none
        errors = [[[abs(end - value)] for end in ends] for value, *ends in (reward, kl)]
        axes.errorbar(kl[0], reward[0], *errors, color=colour, marker="o", capsize=3)
        ends.append((reward[0], kl[0], name, colour))
        steps = set.intersection(*(                                           # those that all runs have
            {row["step"] for row in rows if None not in (row.get("kl"), row.get("reward"))} for rows in runs))
        track = [[mean(row[axis] for rows in runs for row in rows if row["step"] == step)
                  for step in sorted(steps)] for axis in ("kl", "reward")]
        axes.plot(*track, ".-", color=colour)
    axes.set(xlabel="KL(π‖π_ref), nats per response", ylabel="held-out reward")
    if curve:
        line = sorted((row["kl"], row["reward"]) for row in curve if row["kl"] < axes.get_xlim()[1])
        axes.plot(*zip(*line), color="black", linestyle="--", linewidth=1, scalex=False)
        ends.append((*line[-1][::-1], "best possible", "black"))
    place, height = -math.inf, 0.05 * (axes.get_ylim()[1] - axes.get_ylim()[0])
    for reward, kl, name, colour in sorted(ends):          # names on the right, a line's height apart
        place = max(reward, place + height)
        axes.annotate(name, (kl, reward), (axes.get_xlim()[1], place), color=colour, va="center", arrowprops={
            "arrowstyle": "-", "color": colour, "linestyle": ":", "relpos": (0, 0.5)})
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130, format="png")


def main():
    """`python evaluate.py RUN …`."""
    parser = Parser("Evaluate runs of sail.py, with their own settings, or any checkpoints.", " RUN …")
    add = parser.add_argument
    add("models", nargs="*", metavar="RUN", help="a run's or a checkpoint's directory, or a hub name")
    add("--compare", action="store_true", help="only read what finished runs have measured, and draw it")
    add("--out", help="the figures as JSON (RUN/evaluated.json; --compare: results.json, .png beside RUN)")
    add("--show", type=number(int, 0), default=0, metavar="N", help="all answers to the first N prompts (0)")
    parser.shared("--data", "--eval-data", "--prefer", "--max-prompt-length", "--max-response-length",
                  "--date", "--seed", "--trust-remote-code")
    parser.set_defaults(data=None, prefer=None, trust_remote_code=None)              # then the run's
    add("--frontier", type=number(int, 100), metavar="N",
        help="with --compare: the best possible, from N samples of the reference to each held-out prompt")
    add("--eval-limit", type=number(int, 1), default=256, help="held-out pairs (256)")
    add("--reward", help="as in sail.py")
    add("--reference", help="for KL, loss and margin (the first run's that has one, else the first model)")
    add("--beta", type=number(float, 1e-9), help="as in sail.py")
    add("--dtype", choices=["float32", "bfloat16"], help="as in sail.py")
    args = parser.parse_args()
    args.models = [path for path in args.models if not Path(path).is_file()]     # runs/toy/* has results.json
    if args.compare:
        compare(args.models, args.out, args.show, *best_possible(args) if args.frontier else ())
    else:
        evaluate_models(args)


if __name__ == "__main__":
    command_line(main)
