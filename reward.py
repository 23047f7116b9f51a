"""Rewards, and the labels that follow from them.

    python reward.py --reward R --responses FILE --out scored.jsonl      # adds a "reward" to every line
    python reward.py --reward R --responses FILE --pairs pairs.jsonl     # also pairs the best and worst of n
    python reward.py --train --model M --data PAIRS --out DIR            # trains a reward model, DIR/model

A reward is a callable (prompts, responses) -> floats, one per response; higher is better. R is your own
callable, `FILE.py:FUNCTION`, or the directory or hub name of a sequence classifier with one logit. A prompt
is what formats.py gives: a string, or a list of {role, content} messages. M is such a classifier, or a causal
language model, which gets a random score head. M is trained by Bradley-Terry's likelihood.

A label does not need a reward. A preference is a callable (prompts, firsts, seconds) -> P(first ≻ second),
which asks a judge, a preference model or a person (`sail.py --preference FILE.py:FUNCTION`). Preferences may
be cyclic.
"""
import copy
import importlib.util
import math
import os
import signal
import sys
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from inspect import signature
from itertools import groupby
from pathlib import Path
from typing import Callable

from runtime.command_line import InputError, command_line, format_counts, seeded
from runtime.intervals import along_label, mean_of, share_of
from runtime.optimizer import make_optimizer, optimizer_step
from runtime.processes import (
    all_sum, computing_in, default_dtype, divided, fails_together, own_device, print0, process_group,
    progress, share_of_process, sum_gradients, with_equal_counts, world_size)
from runtime.run_directory import (
    fingerprint, fingerprint_files, refuse_output_of_rows, run_directory, run_of_checkpoint, write_rows)
from runtime.saved_model import save_model
from runtime.settings import Parser, Settings, flag_of, read_settings, setting, settings_to_resume
from runtime.training import NOT_MEASURED, micro_batches, refuse_before_loading, steps, training

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import apply_template, length_table, load_tokenizer, render
from formats import (
    BEYOND, Account, BadRow, best_and_worst, finished_in, is_text, read_answers, train_and_held_out)
from generate import (
    add_adapter, compute_in_float32, has_weights, heads_of, hold_frozen_in_bfloat16, load_model, place,
    switch_dropout_off, with_trained)

# --- rewards ------------------------------------------------------------------------------------------------


@dataclass
class Reward:
    """A reward as a callable: reward(prompts, responses, finished=None) -> a list of finite floats. finished:
    as in `scores_of`. A call raises InputError if the scores are invalid, and also if scoring fails, after
    printing the traceback."""
    name: str
    score: Callable                       # the user's function, or a classifier's
    ids_of: Callable | None = None        # only for a classifier: see `load_classifier`
    cut: list = field(default_factory=list)  # for each dialogue of the last call, whether a classifier cut it

    def __call__(self, prompts, responses, finished=None):
        return scores_of(f"reward {self.name}", self.score, finished, prompts, responses)


def scores_of(name, function, finished, prompts, *responses, low=-math.inf, high=math.inf):
    """Call function(prompts, *responses) and return a list of finite floats from `low` to `high`, one for
    each prompt. The function gets copies, so it may change its arguments. If it has a parameter `finished`,
    it is told which responses ended by themselves (see `load_reward`); finished=None means all of them.
    Raises InputError if the scores are invalid, and also if the function fails, as in `users_code`."""
    inputs, options = copy.deepcopy([prompts, *responses]), {}
    if finished is None:
        finished = [True] * len(prompts)
    with users_code(f"{name}: failed, as shown above"):
        if "finished" in signature(function).parameters:
            options["finished"] = copy.deepcopy(finished)
        scores = function(*inputs, **options)
        if scores is None or isinstance(scores, (dict, set, str, bytes, int, float)):
            raise InputError(f"{name}: returned a {type(scores).__name__}; it must return a list of floats, "
                             "one for each prompt that it gets")
        scores = [float(value) for value in scores]
    possible = [low <= score <= high and math.isfinite(score) for score in scores]
    if len(scores) != len(prompts) or not all(possible):
        between = "" if high == math.inf else f" from {low:g} to {high:g}"
        raise InputError(f"{name}: returned {len(scores)} scores for a batch of {len(prompts)}, "
                         f"{str(scores)[:60]}…; give a finite score{between} for each")
    return scores


def load_reward(name, trust_remote_code=False, dtype="float32"):
    """Load the Reward called `name`, a function or a classifier (see the top of this file). A classifier is
    put on this process's device. A function with a parameter `finished` gets a list of bools: True for a
    response that has its end token, False for one that was cut by the length limit. Raises InputError if
    there is nothing to load."""
    if ".py:" in name:
        return Reward(name, load_function("reward", name))
    if name.endswith(".py"):
        raise InputError(f"reward {name}: name one of its functions, as {name}:FUNCTION")
    model, _, ids_of = load_classifier(name, trust_remote_code)
    model.requires_grad_(False)
    if dtype == "bfloat16":
        hold_frozen_in_bfloat16(model)
    model.to(own_device())

    def score(prompts, responses):
        rows, reward.cut = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            ids, was_cut = ids_of(prompt, response)
            rows.append(ids)
            reward.cut.append(was_cut)
        return classifier_scores(model, rows, dtype)

    reward = Reward(name, score, ids_of)
    return reward


def load_preference(name):
    """Load the preference FILE.py:FUNCTION: preference(prompts, firsts, seconds, finished) -> a list of
    floats, P(first ≻ second). finished: for each pair, whether the first and whether the second response
    ended by itself; the function gets this if it has such a parameter. Raises InputError if there is nothing
    to load. A call raises InputError as a call of a Reward does."""
    function = load_function("preference", name)

    def preference(prompts, firsts, seconds, finished=None):
        if finished is None:
            finished = [(True, True)] * len(prompts)
        return scores_of(f"preference {name}", function, finished, prompts, firsts, seconds, low=0, high=1)

    return preference


def try_out(pair, reward=None, preference=None):
    """Call the user's functions, but no classifier, on one pair of the data, so that a function that fails
    raises its InputError before models are loaded and responses are sampled."""
    chosen, rejected = pair.chosen or "answer", pair.rejected or "answer"
    if reward is not None and reward.ids_of is None:
        reward([pair.prompt] * 2, [chosen, rejected], list(pair.finished))
    if preference is not None:
        preference([pair.prompt], [chosen], [rejected], [pair.finished])


@contextmanager
def users_code(problem):
    """A context for calling code that the user wrote. An exception, SystemExit too, becomes its traceback and
    InputError(problem). Without a traceback, a BadRow becomes an InputError, and an InputError and Ctrl-C
    pass. Afterwards the working directory, torch's gradient mode and os._exit are what they were before.
    Inside, os._exit raises SystemExit in this process, so that a run never ends silently with status 0."""
    directory, gradients, leave, process = os.getcwd(), torch.is_grad_enabled(), os._exit, os.getpid()

    def leave_child_only(status):
        if os.getpid() != process:
            leave(status)
        raise SystemExit(f"os._exit({status}) was called")

    os._exit = leave_child_only
    try:
        yield
    except InputError:
        raise
    except BadRow as reason:
        raise InputError(f"{problem.partition(':')[0]}: a dialogue is {reason}") from None
    except KeyboardInterrupt:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            raise                                          # this is Ctrl-C; in training it raises nothing
        traceback.print_exc()
        raise InputError(problem) from None
    except (Exception, SystemExit):
        traceback.print_exc()
        raise InputError(problem) from None
    finally:
        os._exit = leave
        os.chdir(directory)
        torch.set_grad_enabled(gradients)


def load_function(what, name):
    """Load the function of FILE.py:FUNCTION. The file's code runs, so name only files that you trust. It may
    import modules that lie beside it. what: what the function is, for error messages. Raises InputError if
    the file or the function is missing, or if the file's code fails, after printing the traceback."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"{what} {name}: no such file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)            # dataclasses, for example, look their module up here
    sys.path.append(str(Path(path).resolve().parent))    # for the modules beside it
    with users_code(f"{what} {name}: {path} cannot be imported, as shown above"):
        spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise InputError(f"{what} {name}: {path} defines no function {function}")
    return getattr(module, function)


def load_classifier(name, trust_remote_code=False, max_length=None, whole=True, chat_template=None,
                    **trainee):
    """Load (model, tokenizer, ids_of), a sequence classifier with one logit, on the CPU, in eval mode.

    ids_of(prompt, response) -> (ids, was_cut): the ids that the classifier reads, the same in scoring and in
    training, and whether tokens are lost on the left because the dialogue is too long. The classifier's own
    tokenizer and chat template render the dialogue. ids_of raises BadRow if the template refuses it or if it
    is no valid text, and InputError if the model lacks an id in it. max_length: the most tokens of a
    dialogue; None stands for the setting of the run, if `name` is a run's checkpoint, or for as many as the
    model takes. whole: see `load_model`; chat_template: see `set_chat_template`. trainee: num_labels=1, given
    only if the model is to be trained; it may then be a causal language model, which gets a random score
    head. Raises InputError as `load_tokenizer` and `load_model` do, if the model has several logits, or if it
    would have to shift and scale its scores (`normalize_reward`)."""
    from transformers import AutoModelForSequenceClassification
    tokenizer = load_tokenizer(name, trust_remote_code, ends=False, chat_template=chat_template)
    may_lack = {"score.weight"} if trainee else frozenset()
    run = run_of_checkpoint(name)
    if run is not None:                                    # the run's base may be a causal language model
        trainee.setdefault("num_labels", 1)
        settings = read_settings(run / "args.json", RewardSettings, "max_length")
        max_length = max_length or settings.get("max_length")
    may_leave = {"lm_head.weight"} if trainee else frozenset()
    model = load_model(AutoModelForSequenceClassification, name, trust_remote_code, may_lack, may_leave,
                       whole, **trainee)
    if getattr(model.config, "normalize_reward", False):
        raise InputError(f"{name}: its config.json sets normalize_reward, so its scores would have to be "
                         "shifted by its mean and divided by its std, which is not supported")
    if model.config.num_labels != 1:
        raise InputError(f"{name} has {model.config.num_labels} logits per response; give a model with one")
    model.config.use_cache = False                       # each dialogue is read once
    for head in heads_of(model):
        compute_in_float32(head)                         # scores that are rounded to bfloat16 would tie
    if trainee:
        # A program that loads the model needs a padding id, and has to use the one that training uses.
        for token in (0, tokenizer.eos_token_id, tokenizer.pad_token_id, model.config.pad_token_id):
            if token is not None:
                pad = token
        model.config.pad_token_id = pad
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer.truncation_side = "left"
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_length or math.inf)   # saved with model
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 10**9))
    if limit < 1:
        raise InputError(f"{name} takes {limit} tokens, by its model_max_length or max_position_embeddings")

    def ids_of(prompt, response):
        text = dialogue_text(prompt, response, tokenizer)
        if not is_text(text):
            raise BadRow("no text, for it holds half of a surrogate pair")
        special = not tokenizer.chat_template              # a template writes special tokens itself
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        cut = len(ids) > limit
        if cut:
            ids = tokenizer(text, add_special_tokens=special, truncation=True, max_length=limit)["input_ids"]
        if max(ids) >= rows:
            raise InputError(f"{name}: a dialogue has the id {max(ids)}, and the model only {rows} ids; "
                             "is this the wrong tokenizer?")
        return ids, cut

    return model, tokenizer, ids_of


def dialogue_text(prompt, response, tokenizer):
    """The text of the whole dialogue, as a reward model reads it. A prompt that is a string counts as one
    user message, also without a chat template. Raises BadRow if the template refuses the dialogue."""
    messages = prompt
    if isinstance(prompt, str):
        messages = [{"role": "user", "content": prompt}]
    if not tokenizer.chat_template:
        return "".join(render(messages, response))
    return apply_template(tokenizer, messages + [{"role": "assistant", "content": response}])


def classifier_logits(model, rows):
    """The rewards r(x, y) of B dialogues, which are given as lists of ids: (B,), float32, with gradient."""
    # transformers scores a decoder at a row's last token that is not config.pad_token_id. If the checkpoint
    # has no such id, an id is taken that ends no row of this batch, so that no row's last token is skipped.
    own_pad, last = model.config.pad_token_id, {row[-1] for row in rows}
    pad = own_pad
    if pad is None:
        pad = 0
        while pad in last:
            pad += 1
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    model.config.pad_token_id = pad
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits       # (B, 1)
    model.config.pad_token_id = own_pad
    return logits.float().squeeze(-1)


@torch.no_grad()
def classifier_scores(model, rows, dtype="float32"):
    """The rewards of any number of dialogues, which are given as lists of ids: a list of floats. Dialogues of
    similar lengths are scored together."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    scores = [0.0] * len(rows)
    for batch in progress(micro_batches(order, lambda row: len(rows[row]), model), "batches scored"):
        with computing_in(dtype, model):
            logits = classifier_logits(model, [rows[row] for row in batch])
        for row, value in zip(batch, logits.tolist(), strict=True):
            scores[row] = value
    return scores


def drop_unscorable(pairs, reward):
    """Drop the pairs that a reward cannot score: (the pairs that are left, Account). A classifier cannot
    score a dialogue that its chat template refuses. A dialogue that exceeds its maximum length will be cut
    from the left, which the Account counts. Raises InputError if no pair is left."""
    if reward is None or reward.ids_of is None or not pairs:
        return pairs, Account()
    kept, account = [], Account()
    for pair in pairs:
        try:
            _, chosen_cut = reward.ids_of(pair.prompt, pair.chosen or "answer")
            _, rejected_cut = reward.ids_of(pair.prompt, pair.rejected or "answer")
        except BadRow as reason:
            account.dropped[f"reward model: {reason}"] += 1
            continue
        if chosen_cut or rejected_cut:
            account.cut["pairs longer than the reward model takes, from the left"] += 1
        kept.append(pair)
    if not kept:
        raise InputError(f"the reward model can score none of {len(pairs)} pairs: "
                         f"{format_counts(account.dropped)}")
    return kept, account


# --- labels -------------------------------------------------------------------------------------------------

@fails_together
def label_by_reward(pairs, reward, preference="hard"):
    """Score the pairs and label them, in place: the response with the higher reward becomes `chosen`.
    `rewards` and `cut_for_reward` are set, and `preference`, P(chosen ≻ rejected), becomes σ(reward
    difference) for "soft"; for "hard" it becomes 1, or ½ for a tie. All processes call this together."""
    if not pairs:
        return
    prompts = [pair.prompt for pair in pairs]
    responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    finished = [pair.finished[0] for pair in pairs] + [pair.finished[1] for pair in pairs]
    scores = reward(prompts + prompts, responses, finished)
    cut = reward.cut or [False] * len(scores)
    for nth, pair in enumerate(pairs):
        other = nth + len(pairs)
        chosen, rejected = scores[nth], scores[other]
        pair.cut_for_reward = cut[nth] + cut[other]
        if rejected > chosen:
            chosen, rejected = rejected, chosen
            swap_responses(pair)
        pair.rewards = chosen, rejected
        if preference == "soft":
            pair.preference = 1 / (1 + math.exp(rejected - chosen))
        elif chosen == rejected:
            pair.preference = 0.5
        else:
            pair.preference = 1.0


@fails_together
def label_by_preference(pairs, preference):
    """Label the pairs, in place, by a preference from `load_preference`: the preferred response becomes
    `chosen`, and the pair's `preference` becomes P(chosen ≻ rejected). All processes call this together."""
    if not pairs:
        return
    prompts = [pair.prompt for pair in pairs]
    firsts = [pair.chosen for pair in pairs]
    seconds = [pair.rejected for pair in pairs]
    finished = [pair.finished for pair in pairs]
    for pair, probability in zip(pairs, preference(prompts, firsts, seconds, finished), strict=True):
        if probability < 0.5:
            probability = 1 - probability
            swap_responses(pair)
        pair.preference = probability


def swap_responses(pair):
    """Exchange the chosen and the rejected response of a pair, in place. `preference` and `rewards` stay as
    they are."""
    pair.chosen, pair.rejected = pair.rejected, pair.chosen
    pair.chosen_ids, pair.rejected_ids = pair.rejected_ids, pair.chosen_ids
    pair.finished = pair.finished[::-1]
    pair.sampling_logps = pair.sampling_logps[::-1]
    if pair.reference_logps is not None:
        pair.reference_logps = pair.reference_logps.flip(0)


# --- training a reward model --------------------------------------------------------------------------------

def bradley_terry_loss(chosen, rejected, preference=1.0):
    """The negative log-likelihood of the Bradley-Terry model (arXiv 1706.03741): −p log σ(d) − (1 − p) log
    σ(−d), (B,). d = r(x, chosen) − r(x, rejected) is a difference of rewards, which are (B,) each, and p is
    the label's P(chosen ≻ rejected)."""
    margin = chosen - rejected
    return -preference * F.logsigmoid(margin) - (1 - preference) * F.logsigmoid(-margin)


def encode_for_reward(pairs, ids_of):
    """Encode pairs for a reward model: ([(chosen ids, rejected ids, preference)], Account, lengths in tokens
    after cutting). A dialogue that is too long is cut from the left. A pair is dropped if ids_of raises
    BadRow, or if its two dialogues have the same tokens, for example because the difference was cut off."""
    encoded, account, lengths = [], Account(), {"chosen": [], "rejected": []}
    for pair in pairs:
        try:
            chosen, chosen_cut = ids_of(pair.prompt, pair.chosen)
            rejected, rejected_cut = ids_of(pair.prompt, pair.rejected)
        except BadRow as reason:
            account.dropped[str(reason)] += 1
            continue
        for is_cut in (chosen_cut, rejected_cut):
            if is_cut:
                account.cut["dialogues longer than the model takes, from the left"] += 1
        lengths["chosen"].append(len(chosen))
        lengths["rejected"].append(len(rejected))
        if chosen == rejected:
            account.dropped["same tokens in both responses"] += 1
        else:
            encoded.append((chosen, rejected, pair.preference))
    return encoded, account, lengths


def evaluate_reward(model, held_out, dtype):
    """Evaluate a reward model on held-out pairs of ids, all processes together: (the figures accuracy, loss
    and margin, the number of pairs as {"prompts": n}, an empty list of samples). Returns None if there are no
    pairs."""
    if not held_out:
        return None
    print0(f"evaluating: the scores of both responses of {len(held_out)} held-out pairs …")
    model.eval()
    chosen_ids, rejected_ids, preference = zip(*held_out, strict=True)

    def score(share):
        return classifier_scores(model, share, dtype)

    chosen = torch.tensor(divided(score, chosen_ids))
    rejected = torch.tensor(divided(score, rejected_ids))
    preference = torch.tensor(preference)
    margin, accuracy = along_label(chosen - rejected, preference)
    figures = {"accuracy": share_of(accuracy.tolist()),
               "loss": mean_of(bradley_terry_loss(chosen, rejected, preference).tolist()),
               "margin": mean_of(margin.tolist())}
    return figures, {"prompts": len(held_out)}, []


def reward_step(model, pairs, optimizer, scheduler, args):
    """Take one optimizer step, all processes together, for which each contributes its pairs of ids: (figures
    over all processes, whether the step was finite and so was taken)."""
    model.train(args.gradient_checkpointing)               # checkpointing works in train mode only
    totals = Counter(pairs=len(pairs), loss=0.0, accuracy=0.0, margin=0.0)
    total = all_sum(Counter(pairs=len(pairs)), model.device)["pairs"]
    micros = micro_batches(pairs, lambda pair: len(pair[0]) + len(pair[1]), model, args.micro_batch_size)
    for micro, weight in with_equal_counts(micros, model):
        chosen_ids, rejected_ids, preference = zip(*micro, strict=True)
        with computing_in(args.dtype, model):
            chosen, rejected = classifier_logits(model, chosen_ids + rejected_ids).chunk(2)
        preference = torch.tensor(preference, device=chosen.device)
        losses = bradley_terry_loss(chosen, rejected, preference)
        (weight * losses.sum() / total).backward()
        if weight:
            margins, accuracies = along_label((chosen - rejected).detach(), preference)
            totals.update(loss=losses.sum().item(), accuracy=accuracies.sum().item(),
                          margin=margins.sum().item())
    sum_gradients(model)
    totals = all_sum(totals, model.device)
    figures = {name: totals[name] / total for name in ("loss", "accuracy", "margin")}
    figures["grad_norm"], figures["learning_rate"], finite = optimizer_step(
        model, optimizer, scheduler, args.max_grad_norm, figures["loss"])
    return figures, finite


def load_trainee(args):
    """Load (model, tokenizer, ids_of) of a reward model that is to be trained, as `load_classifier` does.
    Dropout is switched off, and with --lora an adapter is added. The model is on the CPU or, in a process
    that loads no weights, on the meta device."""
    torch.manual_seed(seeded("score head", args.seed))
    model, tokenizer, ids_of = load_classifier(args.model, args.trust_remote_code, args.max_length,
                                               has_weights(args), args.chat_template, num_labels=1)
    switch_dropout_off(model)
    if args.lora:
        add_adapter(model, args.lora, args.seed)
    return model, tokenizer, ids_of


@fails_together
def load_reward_data(args, ids_of):
    """Load and encode the data: (training pairs of ids, held-out pairs of ids, Account of the training pairs,
    Account of the held-out pairs, lengths of the training pairs). At most `eval_limit` pairs are held out.
    Raises InputError if the data lacks chosen or rejected responses, or if no training pair is left."""
    train_pairs, held_out, account, held_out_account = train_and_held_out(
        args.data, args.eval_data, args.limit, args.prefer, args.score_scale)
    for pair in (train_pairs[0], *held_out[:1]):
        if pair.chosen is None or pair.rejected is None:
            raise InputError("a reward model needs pairs of two responses, both in --data and in "
                             "--eval-data")
    pairs, changes, lengths = encode_for_reward(train_pairs, ids_of)
    account.add(changes)
    beyond = len(held_out) - args.eval_limit
    held_out, held_out_changes, _ = encode_for_reward(held_out[:args.eval_limit], ids_of)
    held_out_account.add(held_out_changes)
    if beyond > 0:
        held_out_account.dropped[BEYOND] = beyond
    if not pairs:
        raise InputError(f"{args.data}: none of {len(train_pairs)} pairs can be used for training "
                         f"({format_counts(changes.dropped)})")
    return pairs, held_out, account, held_out_account, lengths


def merged(trained, args):
    """The reward model of a run that has trained an adapter, with the adapter merged into its base. trained:
    {name: trained weight}."""
    base, _, _ = load_trainee(replace(args, lora=None))
    return with_trained(base, trained, args.lora, args.out)


def train_reward(args):
    """Train a reward model, save it in OUT/model, and return it, with an adapter unmerged. If pairs are held
    out, it is evaluated at the end and, unless eval_every is 0, before and during training. Raises InputError
    for bad input, and otherwise as `steps` does."""
    out = Path(args.out)
    refuse_before_loading(out, args, "model", "data", "eval_data")
    model, tokenizer, ids_of = fails_together(load_trainee)(args)
    pairs, held_out, account, held_out_account, lengths = load_reward_data(args, ids_of)
    place([model], args)
    generator = torch.Generator().manual_seed(seeded("reward model's order", args.seed))
    epochs = math.ceil(args.epochs if args.steps is None else args.steps * args.batch_size / len(pairs))
    order = torch.cat([torch.randperm(len(pairs), generator=generator) for _ in range(epochs)])
    order = order[:args.steps * args.batch_size if args.steps else int(args.epochs * len(pairs))]
    count = math.ceil(len(order) / args.batch_size)
    batches = order.tensor_split(max(count, 1))                        # their sizes differ by one at most
    if len(batches[-1]) < world_size():
        raise InputError(f"--batch-size: {len(batches[-1])} pairs a step are too few for {world_size()} "
                         "processes; raise it, or --epochs")
    optimizer, scheduler = make_optimizer(model.parameters(), count, args)
    recorded = {**asdict(args), "data_sha256": fingerprint([pairs, held_out]),
                "model_sha256": fingerprint_files(args.model),
                "chat_template_sha256": fingerprint_files(args.chat_template)}
    with training(out, "reward", args, recorded, {}, model, optimizer, scheduler) as loop:
        print0(f"chat template: {tokenizer.template_name}\n"
               f"{args.data}: {len(pairs)} pairs to train on\n{account}\n{length_table(lengths, 'tokens')}\n"
               f"{args.eval_data or f'held out of {args.data}'}: {len(held_out)} pairs to evaluate on\n"
               f"{held_out_account}\n{count} steps of up to {len(batches[0])} pairs -> {out}")
        if not held_out:
            print0(NOT_MEASURED)
        for step in steps(loop, count, lambda: evaluate_reward(model, held_out, args.dtype)):
            places, = share_of_process(batches[step.number - 1].tolist())
            batch = [pairs[place] for place in places]
            figures, step.finite = reward_step(model, batch, optimizer, scheduler, args)
            step.record = {"step": step.number, **figures}
        save_model(model, tokenizer, args, lambda trained: merged(trained, args))
    print0(f"saved {out}/model; sail.py --variant pr --reward {out}/model uses it")
    return model


# --- the command line ---------------------------------------------------------------------------------------

@dataclass
class RewardSettings(Settings):
    """The settings of reward.py. To score, it uses `reward`, `responses`, `pairs`, `out`, `dtype` and
    `trust_remote_code`. With --train it uses the last three and all that are not named here."""
    reward: str | None = setting(None, "FILE.py:FUNCTION, or a one-logit classifier, to score with")
    responses: str = setting("responses.jsonl", "file whose rows have a prompt and a response")
    pairs: str | None = setting(None, "FILE for the best and the worst response to each prompt, as pairs to "
                                      "train on; see generate.py --n", metavar="FILE")
    train: bool = setting(False, "train a reward model instead of scoring responses")
    max_length: int | None = setting(None, "the most tokens of a dialogue, in training and in use; longer "
                                        "ones are cut on the left (as many as the model takes)", low=1)
    learning_rate: float = setting(1e-5, "rate after the warm-up", low=1e-12)
    eval_limit: int = setting(1024, "the most held-out pairs to evaluate on", low=1)
    out: str | None = setting(None, "FILE for the rows with their rewards (scored.jsonl); with --train, the "
                                    "directory for logs and model (runs/DATA-reward)", may_change=True)
    max_prompt_length: None = setting(None)                # a reward model has no use for these three
    max_response_length: None = setting(None)
    sample_batch_size: None = setting(None)


def score_file(args):
    """Write the rows of --responses to --out, each with a `reward`, and with --pairs write the pairs of
    `best_and_worst_pairs`. Raises InputError if a file cannot be used, if the reward fails, or if there is no
    pair."""
    rows = read_answers(args.responses)
    prompts = [row["prompt"] for row in rows]
    responses = [row["response"] for row in rows]
    finished = [finished_in(row, "finished") for row in rows]
    refuse_output_of_rows(args.out, ("prompt", "response", "reward"), args.responses)
    if args.pairs:
        refuse_output_of_rows(args.pairs, ("prompt", "chosen", "rejected", "score_chosen"),
                              args.responses, args.out, flag="--pairs")
    reward = load_reward(args.reward, args.trust_remote_code, args.dtype)
    print(f"scoring {len(rows)} responses of {args.responses} …", flush=True)
    scores = reward(prompts, responses, finished)
    for row, score in zip(rows, scores, strict=True):
        row["reward"] = score
    write_rows(args.out, rows)
    print(f"{len(rows)} responses scored in {args.out}: mean {sum(scores) / len(scores):.3f}, "
          f"min {min(scores):.3f}, max {max(scores):.3f}")
    if any(reward.cut):
        print(f"{sum(reward.cut)} dialogues were longer than {args.reward} takes, and were scored without "
              "their beginning")
    if args.pairs:
        pairs, dropped = best_and_worst_pairs(rows)
        if not pairs:
            raise InputError(f"{args.responses}: no prompt has two responses with different scores; sample "
                             "several responses to each prompt, with generate.py --n 4")
        write_rows(args.pairs, pairs)
        print(f"{len(pairs)} pairs in {args.pairs}; dropped: {format_counts(dropped)}")


def best_and_worst_pairs(rows):
    """Make a pair of the responses with the highest and the lowest reward to each prompt: (rows {prompt,
    chosen, rejected, …}, counts of prompts without a pair, by the reason). The rows of a prompt have to
    follow each other."""
    pairs, dropped = [], Counter()
    for prompt, group in groupby(rows, lambda row: row["prompt"]):
        try:
            prompt, best, worst = best_and_worst(prompt, [(row["reward"], row) for row in group])
        except BadRow as reason:
            dropped[str(reason)] += 1
            continue
        pair = {"prompt": prompt}
        for side, row in (("chosen", best), ("rejected", worst)):
            pair[side] = row["response"]
            pair[f"{side}_finished"] = finished_in(row, "finished")
            pair[f"score_{side}"] = row["reward"]
        pairs.append(pair)
    return pairs, dropped


def parse_args(argv=None, **unflagged):
    """The settings of a command line. unflagged: settings that are no flags, by name."""
    parser = Parser("Score responses or, with --train, train a reward model. Defaults in brackets.")
    parser.add_settings(RewardSettings)
    given = {**vars(parser.parse_args(argv)), **unflagged}
    saved = settings_to_resume(given, RewardSettings)
    args = RewardSettings(**{"dtype": default_dtype(), **saved, **given})
    if args.train and not (args.model and args.data):
        parser.error("argument --train: needs --model and --data")
    if not args.train and not args.reward:
        parser.error("argument --reward: give FILE.py:FUNCTION or a classifier, or train one with --train")
    to_score = {"reward", "responses", "pairs"}
    to_train = {*given} - {"out", "dtype", "trust_remote_code", "train"}
    for name in sorted(to_score & given.keys() if args.train else to_train - to_score):
        parser.error(f"argument {flag_of(name)}: has no effect {'with' if args.train else 'without'} --train")
    if args.pairs and args.out and os.path.realpath(args.pairs) == os.path.realpath(args.out):
        parser.error("argument --pairs: names the same file as --out")
    if args.out is None:
        args.out = f"{run_directory(args.data)}-reward" if args.train else "scored.jsonl"
    return args


def main(argv=None, **unflagged):
    """The command `python reward.py …`, alone or, with --train, under torchrun."""
    args = parse_args(argv, **unflagged)
    if args.train:
        with process_group(args.shard):
            train_reward(args)
    else:
        score_file(args)


if __name__ == "__main__":
    command_line(main)
