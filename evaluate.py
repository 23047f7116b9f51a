"""Evaluate policies side by side on held-out data, every figure with its 95 % interval.

    python evaluate.py runs/mine/*                       # evaluate runs, with the first run's settings
    python evaluate.py MODEL runs/mine                   # evaluate a run and the model that it started from
    python evaluate.py MODEL … --data D --reward R       # evaluate any checkpoints
    python evaluate.py --compare runs/mine/*             # tabulate and plot the figures of finished runs

The held-out pairs give DPO loss, margin and accuracy against the reference. Responses that are sampled to
their prompts, at temperature 1 as in training, give reward, length, unfinished, KL(π‖π_ref), `objective`,
which is reward − β·KL, and the win rate against the data's chosen responses, in which a tie counts as half a
win.
"""
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from runtime.command_line import InputError, command_line, seeded
from runtime.compare import (
    are_figures, compare, frontier, print_samples, print_table, refuse_comparison, short_names, write_figures)
from runtime.intervals import (
    along_label, few, format_figure, mean_of, means_of_prompts, prefers_chosen, share_of)
from runtime.processes import (
    computing_in, default_dtype, divided, progress, rank, with_equal_counts)
from runtime.run_directory import fingerprint_files, read_json, refuse_output, run_of_checkpoint
from runtime.settings import Objective, Parser, Settings, flag_of, read_run, same_as, setting
from runtime.training import micro_batches

import torch

from data import collate, encode, end_token_ids, load_tokenizer, print_report, response_text
from formats import load_held_out, train_and_held_out
from generate import load_frozen, refuse_other_ids, sample, sequence_logps
from reward import bradley_terry_loss, drop_unscorable, load_preference, load_reward, try_out

# --- figures, each as (value, low, high) --------------------------------------------------------------------


@torch.no_grad()
def response_logps(model, examples, responses, dtype):
    """log π(y|x) of one response y (ids) to each example's prompt x, (n,), on the CPU. All processes call
    this together, each with all examples."""
    def logps_of(rows):
        logps = []
        batches = with_equal_counts(micro_batches(rows, lambda row: len(row[1]), model, 32), model)
        for micro, weight in progress(batches, "batches scored"):
            batch = collate(*zip(*micro, strict=True))
            with computing_in(dtype, model):
                found = sequence_logps(model, *batch)
            if weight:                                      # the weight is 0 for a batch that is repeated
                logps += found.cpu()
        return logps

    rows = []
    for example, ids in zip(examples, responses, strict=True):
        rows.append((example.prompt_ids, ids))
    return torch.stack(divided(logps_of, rows))


def log_ratios(policy, reference, examples, responses, dtype):
    """log π(y|x) − log π_ref(y|x) of one response y (ids) to each example's prompt x, (n,)."""
    policy_logps = response_logps(policy, examples, responses, dtype)
    reference_logps = response_logps(reference, examples, responses, dtype)
    return policy_logps - reference_logps


def evaluate_policy(policy, reference, tokenizer, examples, reward, args, num_responses=1, step=0,
                    preference=None):
    """Evaluate a policy on held-out examples: (figures {name: (value, low, high)}, samples). The samples are
    num_responses to each prompt: the first response to every prompt, then the second to every prompt, and so
    on. Each step of a run draws new samples.

    If the reference or the reward is None, the figures that need it are left out. Figures on the data's
    responses are left out if the examples have none. Without a reference, as in SFT, loss is −log π per token
    of the data's chosen responses, over all their tokens, as in training. args: beta, dtype,
    max_response_length, sample_batch_size, and the seed of the samples. KL is estimated from the samples, as
    log π(y) − log π_ref(y) summed over y's tokens, in nats per response. The reward decides on wins over the
    chosen responses. Without a reward, a preference (see `load_preference`) gives the probability of each
    win.

    All processes call this function together. Each process answers and scores its share of the examples, and
    every process returns the figures and samples of all examples."""
    own = [rank()] if rank() > 0 else []                    # the processes draw different samples
    torch.manual_seed(seeded("held-out samples", args.seed, step, *own))

    def answer(share):
        return judged_answers(policy, tokenizer, share, reward, preference, args)

    asked = examples * num_responses                        # the example of each answer
    answers = divided(answer, asked)
    responses = [answer["ids"] for answer in answers]
    texts = [answer["text"] for answer in answers]
    columns = pair_columns(policy, reference, examples, args)      # {name: a number per example or response}
    if reference is not None:
        columns["kl"] = log_ratios(policy, reference, asked, responses, args.dtype).tolist()
    if reward is not None:
        columns["reward"] = [answer["reward"] for answer in answers]
    if reward is not None and reference is not None:
        kl = torch.tensor(columns["kl"])
        columns["objective"] = (torch.tensor(columns["reward"]) - args.beta * kl).tolist()
    columns["length"] = [float(len(ids)) for ids in responses]
    columns["unfinished"] = [float(not answer["finished"]) for answer in answers]
    if any(answer.get("cut") for answer in answers):
        columns["cut_for_reward"] = [float(answer["cut"]) for answer in answers]
    if "win" in answers[0]:
        columns["win_rate"] = [answer["win"] for answer in answers]
    figures = {}
    for name, values in columns.items():
        values = means_of_prompts(values, len(examples))
        if name in ("accuracy", "unfinished", "cut_for_reward", "win_rate"):
            figures[name] = share_of(values)
        else:
            figures[name] = mean_of(values)
    samples = []
    for nth, (example, text) in enumerate(zip(asked, texts, strict=True)):
        samples.append({"prompt": example.prompt, "response": text})
        for name in ("reward", "kl"):
            if name in columns:
                samples[nth][name] = columns[name][nth]
    return figures, samples


def judged_answers(policy, tokenizer, examples, reward, preference, args):
    """Sample a response to each example's prompt and judge it: a list of {ids, text, finished}. With a
    reward, each answer also has its `reward`, and `cut`, whether a classifier cut the dialogue on the left to
    score it. If a reward or a preference decides on wins over the data's chosen response, each answer also
    has `win`: 1, ½ for a tie or 0, or the preference's probability."""
    prompts = [example.prompt for example in examples]
    prompt_ids = [example.prompt_ids for example in examples]
    with computing_in(args.dtype, policy):
        drawn, ended, _ = sample(policy, tokenizer, prompt_ids, args.max_response_length,
                                 batch_size=args.sample_batch_size)
    responses = [of_prompt[0] for of_prompt in drawn]       # each prompt has one response
    finished = [of_prompt[0] for of_prompt in ended]
    texts = texts_of(examples, responses, tokenizer)
    columns = {"ids": responses, "text": texts, "finished": finished}
    if reward is not None:
        columns["reward"] = reward(prompts, texts, finished)
        columns["cut"] = reward.cut or [False] * len(texts)
    if examples[0].chosen is not None and (reward is not None or preference is not None):
        opponents = [example.chosen for example in examples]
        opponents_finished = [example.finished[0] for example in examples]
        if reward is not None:
            opponent_rewards = reward(prompts, opponents, opponents_finished)
            differences = torch.tensor(columns["reward"]) - torch.tensor(opponent_rewards)
            columns["win"] = prefers_chosen(differences).tolist()
        else:
            both_finished = list(zip(finished, opponents_finished, strict=True))
            columns["win"] = preference(prompts, texts, opponents, both_finished)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def responses_to_each(prompts, limit):
    """How many responses to draw to each of `prompts` held-out prompts: the most that keep the number of all
    responses within the limit, but at least one."""
    return max(1, limit // prompts)


def pair_columns(policy, reference, examples, args):
    """Measure a policy on the data's responses and labels: {name: a number per example}. It is empty if the
    data has no responses that can be measured. loss, margin and accuracy follow the label's probability p, as
    in `sail.sail_metrics`."""
    if examples[0].chosen is None:
        return {}
    chosen_ids = [example.chosen_ids for example in examples]
    if reference is None:                                   # SFT: nats per token, over all tokens
        nll = -response_logps(policy, examples, chosen_ids, args.dtype)
        lengths = torch.tensor(list(map(len, chosen_ids)))
        loss = nll.sum() / lengths.sum()
        # The mean of these numbers is this ratio, and their spread gives the ratio's standard error (Cochran,
        # 1977, chapter 6).
        return {"loss": (loss + (nll - loss * lengths) / lengths.float().mean()).tolist()}
    if examples[0].rejected is None:
        return {}
    rejected_ids = [example.rejected_ids for example in examples]
    chosen = log_ratios(policy, reference, examples, chosen_ids, args.dtype)
    rejected = log_ratios(policy, reference, examples, rejected_ids, args.dtype)
    u = args.beta * (chosen - rejected)
    p = torch.tensor([example.preference for example in examples])
    loss = bradley_terry_loss(u, 0, p)                      # DPO's loss, since u is the difference of rewards
    margin, accuracy = along_label(u, p)
    return {"loss": loss.tolist(), "margin": margin.tolist(), "accuracy": accuracy.tolist()}


def texts_of(examples, responses, tokenizer):
    """The texts, as `response_text` makes them, of responses (ids), one to each example's prompt."""
    texts = []
    for example, ids in zip(examples, responses, strict=True):
        texts.append(response_text(tokenizer, ids, example.prompt_ids))
    return texts


# --- models of the command line -----------------------------------------------------------------------------

@dataclass
class Evaluated(Settings, Objective):
    """The settings of evaluate.py. For a run, its settings named in OF_A_RUN are the defaults."""
    eval_limit: int = same_as(Settings, "eval_limit", default=256)
    preference: str | None = setting(None, "FILE.py:FUNCTION, which decides on wins if there is no reward",
                                     metavar="FILE.py:FUNCTION")
    out: str | None = setting(None, "JSON file for the figures (RUN/evaluated.json, or evaluated.json here; "
                                    "with --compare: results.json beside RUN, with the picture results.png)")


# The settings that are taken from a run unless the command line gives them.
OF_A_RUN = ("data", "eval_data", "prefer", "score_scale", "reward", "preference", "reference", "beta",
            "max_prompt_length", "max_response_length", "sample_batch_size", "eval_limit", "dtype")


def find_run(path, given):
    """Find a model and its settings: (model directory or name, settings). The path names a run of sail.py,
    one of its checkpoints, or any other model, which has the default settings. Settings that are `given` on
    the command line take precedence. Code that a run's args.json names is never executed: this raises
    InputError if the command line does not name code that is needed, or if the reference or the reward has
    changed since the run began."""
    model, saved = read_run(path, Evaluated, *OF_A_RUN)
    settings = Evaluated(**{"dtype": default_dtype(), **saved, **given})
    for name in ("reward", "preference"):
        source = getattr(settings, name) or ""
        is_needed = name == "reward" or settings.reward is None
        if ".py:" in source and name not in given and is_needed:
            raise InputError(f"{path}: its {name}, {source}, is code; it runs only if --{name} names it")
    run = run_of_checkpoint(path) or Path(path)
    for what in ("reference", "reward"):
        name = getattr(settings, what)
        if name and what not in given and is_another(run, what, name):
            raise InputError(f"{run}: the files of its {what} {name} have changed since the run began; "
                             f"--{what} {name} measures with the changed files")
    return model, settings


def is_another(run, what, name):
    """Whether the files of the model or function `name` are known to differ from those that the run in the
    directory `run` had as its `what`, the reference or the reward."""
    then = read_json(run / "args.json").get(f"{what}_sha256")
    return then is not None and then != fingerprint_files(name)


def held_out_pairs(args):
    """Load (held-out pairs, their Account). If they are a part of --data, the Account is empty, and a report
    on all of --data is printed. Raises InputError if no data is named, or if there is no held-out pair."""
    if args.data is None and args.eval_data is None:
        raise InputError("none of the models is a run of sail.py; name data with --data or --eval-data")
    if args.eval_data:
        held_out, held_out_account = load_held_out(args.eval_data, args.prefer, args.score_scale)
    else:
        train, held_out, account, held_out_account = train_and_held_out(
            args.data, None, None, args.prefer, args.score_scale)
    if not held_out:
        raise InputError(f"{args.eval_data or args.data}: no pair is held out; name held-out pairs with "
                         "--eval-data")
    if not args.eval_data:
        print_report(args.data, train + held_out, account)
    return held_out, held_out_account


def evaluate_models(models, show, given):
    """Sample from the models, print a table of their figures and `show` answers of each, and write the
    figures to the files that `file_of_figures` names. All models are evaluated with the settings of the first
    run among them, so the held-out pairs, the lengths and the seed are the same for all models. The reference
    is that of the first run that has one, or else the first model. Raises InputError for bad input."""
    runs = [find_run(path, given) for path in models]
    files = []
    for path, (model, _) in zip(models, runs, strict=True):
        files.append(file_of_figures(path, model, given.get("out")))
        refuse_output(files[-1], are_figures)
    first_model, args = runs[0]
    for _, settings in runs[::-1]:
        if settings.data or settings.eval_data:
            args = settings
    references = [settings.reference for _, settings in runs if settings.reference]
    reference_name = references[0] if references else first_model
    reward, preference, judge = load_judge(args)
    held_out, account = held_out_pairs(args)
    try_out(held_out[0], reward, preference)
    lengths = args.max_prompt_length, args.max_response_length
    loading = dict(trust_remote_code=args.trust_remote_code, lengths=lengths)
    reference, reference_tokenizer = load_frozen(reference_name, args.dtype, **loading)
    results, samples, prompts, templates = {}, {}, {}, {}
    parts = 3 if any(run_of_checkpoint(path) for path in models) else 1        # 3: as mine/checkpoints/40
    names = short_names([Path(path) for path in models], parts)
    for name, (model, _) in zip(names, runs, strict=True):
        policy, tokenizer = load_frozen(model, args.dtype, **loading)
        refuse_other_ids((model, policy, tokenizer), (reference_name, reference, reference_tokenizer))
        vocabulary = policy.get_input_embeddings().weight.shape[0]
        examples, changes, _ = encode(held_out, tokenizer, end_token_ids(tokenizer, policy), *lengths,
                                      vocabulary, args.eval_limit)
        examples, unscorable = drop_unscorable(examples, reward)
        templates[name] = tokenizer.chat_template, tokenizer.template_name
        prompts[name] = [(tokenizer.chat_template, example.prompt) for example in examples]
        each = responses_to_each(len(examples), args.eval_limit)
        print(f"{name}: {each * len(examples)} responses of up to {args.max_response_length} tokens to "
              f"{len(examples)} prompts …", flush=True)
        results[name], samples[name] = evaluate_policy(policy, reference, tokenizer, examples, reward, args,
                                                       each, preference=preference)
        del policy                                         # frees memory for the next model
    account.add(changes)                                   # the counts of the last model
    account.add(unscorable)
    print(f"\n{args.eval_data or args.data}: {len(examples)} held-out pairs\n{account}\n"
          f"{each * len(examples)} new samples of each model; reference {reference_name}; {judge} "
          "over the chosen responses; 95 % intervals over held-out pairs, as ± half or as [low, high]"
          f"{few(len(examples))}\n")
    if len({template for template, _ in templates.values()}) > 1:
        named = "; ".join(f"{name}: {origin}" for name, (_, origin) in templates.items())
        print(f"the prompts differ, since the models' chat templates do: {named}\n")
    print_table(results)
    print_differences(samples, prompts, args.beta)
    print_samples(samples, show)
    by_file = defaultdict(dict)
    for name, file in zip(results, files, strict=True):
        by_file[file][name] = results[name]
    for file, figures in by_file.items():
        write_figures(figures, file)
    print(f"\nthe figures are in {', '.join(map(str, by_file))}")


def load_judge(args):
    """Load what decides on wins: (reward, preference, its description). A preference, which must be code, is
    loaded only if there is no reward. A reward or preference that is not loaded is None."""
    if args.reward:
        reward = load_reward(args.reward, args.trust_remote_code, args.dtype)
        return reward, None, f"reward {args.reward} decides on wins"
    if ".py:" in (args.preference or ""):
        return None, load_preference(args.preference), f"preference {args.preference} decides on wins"
    return None, None, "nothing decides on wins"


def print_differences(samples, prompts, beta):
    """Print by how much the reward − β·KL of each model exceeds that of the first one: the mean of the
    prompts' differences, which is less noisy than the difference of two rows of the table. A model with
    other prompts is not compared. samples: {model: rows} of `evaluate_policy`; prompts: {model:
    those that it was asked}. Nothing is printed for a single model, or without a reward and a reference."""
    objectives = {}
    for name, rows in samples.items():
        if not {"reward", "kl"} <= rows[0].keys():
            return
        values = [row["reward"] - beta * row["kl"] for row in rows]
        objectives[name] = means_of_prompts(values, len(prompts[name]))
    first, *others = objectives
    if others:
        print(f"\nreward − β·KL less that of {first}, paired by prompt:")
    for name in others:
        if prompts[name] != prompts[first]:
            print(f"  {name}: not compared, since its {len(prompts[name])} prompts are not the "
                  f"{len(prompts[first])} of {first}")
            continue
        differences = []
        for ours, theirs in zip(objectives[name], objectives[first], strict=True):
            differences.append(ours - theirs)
        mean, low, high = mean_of(differences)
        verdict = "more" if mean > 0 else "less"
        if not (low > 0 or high < 0):
            verdict = "no difference seen"
        print(f"  {name}: {format_figure(mean, low, high)}: {verdict}")


def file_of_figures(path, model, out):
    """The file for the figures of a model that the command line calls `path`: `out`, if that is given; for a
    run, evaluated.json in its directory; for other models, checkpoints too, evaluated.json in the working
    directory."""
    if out:
        return Path(out)
    if Path(path, "model") == Path(model):
        return Path(path, "evaluated.json")
    return Path("evaluated.json")


# --- the best possible --------------------------------------------------------------------------------------

def best_possible(models, samples, given):
    """Compute the `frontier` of the first of the paths `models` whose run has a reference and a reward: (the
    row at the run's β, all rows, the path). samples: how many to draw to each prompt. Raises InputError if
    there is no such run or no row at β, as with too few samples, if the run was measured with another reward,
    or as `find_run(path, given)` does."""
    runs = []
    for path in models:
        model, run = find_run(path, given)
        if run.reference and run.reward:
            runs.append((Path(path), model, run))
    if not runs:
        raise InputError("--frontier: no run has a reference and a reward")
    path, model, args = runs[0]
    temperatures = [args.beta * 1.15 ** power for power in range(-12, 40)]
    if is_another(path, "reward", args.reward):
        raise InputError(f"--frontier: {path} was measured with another reward than {args.reward} is now")
    rewards, counts = reference_rewards(args, model, samples)
    rows = frontier(rewards, temperatures, counts)
    for row in rows:
        if row["temperature"] == args.beta:
            return row, rows, path
    raise InputError(f"--frontier {samples}: too few samples at β {args.beta:g}; give more")


def reference_rewards(args, model, count):
    """Sample `count` responses of a run's reference to each different prompt of its held-out pairs, at most
    eval_limit pairs that can be encoded and scored: (their rewards, a list for each prompt, the number of
    pairs with each prompt). The tokenizer of `model`, the run's own, renders the prompts."""
    lengths = args.max_prompt_length, args.max_response_length
    reference, _ = load_frozen(args.reference, args.dtype, trust_remote_code=args.trust_remote_code,
                               lengths=lengths)
    tokenizer = load_tokenizer(model, args.trust_remote_code)
    reward = load_reward(args.reward, args.trust_remote_code, args.dtype)
    held_out, _ = held_out_pairs(args)
    held_out, _, _ = encode(held_out, tokenizer, end_token_ids(tokenizer, reference), *lengths,
                            limit=args.eval_limit)
    held_out, _ = drop_unscorable(held_out, reward)
    by_prompt, counts = {}, Counter()
    for example in held_out:                    # every prompt is sampled once
        by_prompt[str(example.prompt)] = example
        counts[str(example.prompt)] += 1
    examples = list(by_prompt.values())
    prompt_ids = [example.prompt_ids for example in examples]
    torch.manual_seed(seeded("frontier", args.seed))
    with computing_in(args.dtype, reference):
        drawn, finished, _ = sample(reference, tokenizer, prompt_ids, args.max_response_length, count,
                                    batch_size=1)
    rewards = []
    for example, responses, done in zip(examples, drawn, finished, strict=True):
        texts = texts_of([example] * count, responses, tokenizer)
        rewards.append(reward([example.prompt] * count, texts, done))
    return rewards, [counts[prompt] for prompt in by_prompt]


def parse_args(argv=None):
    """Parse a command line: (models, the task as a namespace of compare, show and frontier, the settings that
    were given)."""
    parser = Parser("Evaluate runs of sail.py, all with the settings of the first one, or any checkpoints. "
                    "Defaults without a run in brackets.", " RUN …")
    add = parser.add_argument
    add("models", nargs="*", metavar="RUN", help="a run's or a checkpoint's directory, or a hub name")
    add("--compare", action="store_true", default=False,
        help="print and plot what finished runs have measured; evaluate nothing")
    add("--show", type=int, default=0, metavar="N",
        help="print an answer of each model to the first N prompts (0)")
    add("--frontier", type=int, default=0, metavar="N",
        help="with --compare: estimate the best reward at each KL, from N reference samples per prompt")
    parser.add_settings(Evaluated, *OF_A_RUN, "out", "seed", "trust_remote_code")
    given = vars(parser.parse_args(argv))
    paths = given.pop("models", [])
    paths = {Path(path): path for path in paths}.values()                        # each model once
    models = [path for path in paths if not Path(path).is_file()]                # a results.json is no model
    if not models:
        parser.error("give the directory of a run, or a model")
    task = Namespace(**{name: given.pop(name) for name in ("compare", "show", "frontier")})
    used = {"out"}
    if task.frontier:                           # it samples the reference under the run's own conditions
        used |= {"reward", "seed", "dtype", "sample_batch_size", "trust_remote_code"}
    for name in sorted(given.keys() - used if task.compare else ()):
        parser.error(f"argument {flag_of(name)}: has no effect with --compare")
    if ".py:" not in given.get("preference", ".py:"):
        parser.error(f"argument --preference: {given['preference']} is no FILE.py:FUNCTION")
    if task.show < 0 or task.frontier and not (task.compare and task.frontier >= 100):
        parser.error("argument --show: takes 0 or more; --frontier takes 100 or more, with --compare")
    return models, task, given


def main(argv=None):
    """The command `python evaluate.py RUN …`: evaluate models or, with --compare, set finished runs side by
    side from their logs."""
    models, task, given = parse_args(argv)
    if not task.compare:
        return evaluate_models(models, task.show, given)
    out = Path(given.get("out") or Path(models[0]).parent / "results.json")
    refuse_comparison(out)
    best = best_possible(models, task.frontier, given) if task.frontier else ()
    compare(models, out, task.show, *best)


if __name__ == "__main__":
    command_line(main)
