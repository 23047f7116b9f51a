"""Rewards: a callable (prompts, responses) -> floats, one per response; higher is better.

    python reward.py --reward R --responses responses.jsonl --out scored.jsonl # adds a "reward" to every line

R is `toy`; `FILE.py:FUNCTION`, your own callable; or the directory or hub name of a sequence classifier with
one logit. A prompt is what data.py gives: a string, or a list of {role, content} messages.
"""
import importlib.util
import math
import random
import sys
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from data import (BadRow, InputError, Parser, apply_template, command_line, counted, load_tokenizer,
                  read_rows, render, response_text, seeded, write_rows)
from distributed import progress
from generate import load_policy, load_weights, sample
from toy import TOY_DEFAULTS, toy_pair, toy_prompts, toy_reward

# --- rewards ------------------------------------------------------------------------------------------------


def load_reward(name, device="cpu", trust_remote_code=False, date=None):
    """reward(prompts, responses) -> list of floats, of the reward called `name` (see the top of this file).
    Raises InputError where there is nothing to load; a call does where the scores are not one finite number
    per response, and, below the traceback, where it fails. reward.ids_of is a classifier's `ids_of` (see
    `load_classifier`), None for a function. date: as in `load_tokenizer`."""
    ids_of = None
    if name == "toy":
        score = toy_reward
    elif ".py:" in name:
        score = load_function(name)
    elif name.endswith(".py"):
        raise InputError(f"reward {name}: which of its functions? want {name}:FUNCTION")
    else:
        model, _, ids_of = load_classifier(name, trust_remote_code, date=date)
        model.to(device)

        def score(prompts, responses):
            return classifier_scores(model, [ids for ids, _ in map(ids_of, prompts, responses)])

    def reward(prompts, responses):
        with users_code(f"reward {name}: failed, as shown above"):
            scores = [float(value) for value in score(prompts, responses)]
        if len(scores) != len(responses) or not all(map(math.isfinite, scores)):
            raise InputError(f"reward {name}: returned {len(scores)} scores for {len(responses)} responses, "
                             f"{str(scores)[:60]}…; want a finite one each")
        return scores

    reward.ids_of = ids_of
    return reward


def drop_unscorable(pairs, reward):
    """(the pairs that a reward can score, counts by reason): without those whose prompt a classifier's chat
    template refuses. The counts also have the data's dialogues that lose their start to its length limit."""
    if reward is None or reward.ids_of is None:
        return pairs, Counter()
    kept, counts = [], Counter()
    for pair in pairs:
        try:
            cuts = [reward.ids_of(pair["prompt"], response)[1]
                    for response in (pair["chosen"] or "answer", pair["rejected"] or "answer")]
        except BadRow as reason:
            counts[f"for the reward model {reason}"] += 1
            continue
        counts["dialogues_cut_for_the_reward_model"] += any(cuts)
        kept.append(pair)
    if not kept:
        raise InputError(f"the reward model can score none of {len(pairs)} pairs: {counted(+counts)}")
    return kept, +counts


@contextmanager
def users_code(problem):
    """Around code that the user wrote, from which anything can come: its traceback, then one line."""
    try:
        yield
    except InputError:
        raise
    except BadRow as reason:
        raise InputError(f"{problem.partition(':')[0]}: a dialogue is {reason}") from None
    except (Exception, SystemExit):
        traceback.print_exc()
        raise InputError(problem) from None


def load_function(name):
    """FILE.py:FUNCTION -> the function. The file's code runs: name only files you trust."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"reward {name}: no such file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)              # where dataclasses, for one, look their module up
    with users_code(f"reward {name}: {path} does not import, as shown above"):
        spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise InputError(f"reward {name}: {path} defines no function {function}")
    return getattr(module, function)


def load_classifier(name, trust_remote_code=False, max_length=None, date=None, **trainee):
    """(model, tokenizer, ids_of) of a sequence classifier with one logit, in float32 and eval mode.
    ids_of(prompt, response) -> (the ids that it reads, in scoring and in training, whether they were cut):
    its own tokenizer and chat template render the dialogue, which loses tokens on the left where it is too
    long; BadRow where the template refuses it. trainee: num_labels of a classifier to be trained, which may
    be a causal language model: its score head is then drawn."""
    from transformers import AutoModelForSequenceClassification
    tokenizer = load_tokenizer(name, trust_remote_code, ends=False, date=date)
    model = load_weights(AutoModelForSequenceClassification, name, trust_remote_code,
                         {"score.weight"} if trainee else frozenset(), dtype=torch.float32, **trainee).eval()
    if model.config.num_labels != 1:
        raise InputError(f"{name}: has {model.config.num_labels} logits per response; want a model with one")
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer.truncation_side = "left"
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_length or math.inf)      # saved with it
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 10**9))

    def ids_of(prompt, response):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answered = messages + [{"role": "assistant", "content": response.strip()}]    # stripped, as samples
        if tokenizer.chat_template:
            text = apply_template(tokenizer, answered)
        else:
            text = "".join(render(messages, response))
        encoded = tokenizer(text, add_special_tokens=not tokenizer.chat_template, truncation=True,
                            max_length=limit, return_overflowing_tokens=tokenizer.is_fast)
        ids = encoded["input_ids"]
        ids, cut = (ids[0], len(ids) > 1) if tokenizer.is_fast else (ids, len(ids) == limit)
        if max(ids) >= rows:
            raise InputError(f"{name}: a dialogue has the id {max(ids)}, and the model only {rows} ids; want "
                             "its own tokenizer")
        return ids, cut

    return model, tokenizer, ids_of


def classifier_logits(model, rows):
    """r(x, y) of B lists of ids, (B,), float32, with gradient."""
    # A decoder is scored at its last token that is not config.pad_token_id. Where the checkpoint names none,
    # any id that ends no row of this batch points at every row's true last token.
    own_pad, last = model.config.pad_token_id, {row[-1] for row in rows}
    pad = own_pad if own_pad is not None else next(i for i in range(len(last) + 1) if i not in last)
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    model.config.pad_token_id = pad
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits       # (B, 1)
    model.config.pad_token_id = own_pad
    return logits.float().squeeze(-1)


@torch.no_grad()
def classifier_scores(model, rows, batch_size=32):
    """`classifier_logits` of any number of rows, as a list of floats; like lengths go together."""
    order, scores = sorted(range(len(rows)), key=lambda row: len(rows[row])), [0.0] * len(rows)
    for first in progress(range(0, len(rows), batch_size), "scoring, batches"):
        batch = order[first:first + batch_size]
        for row, value in zip(batch, classifier_logits(model, [rows[row] for row in batch]).tolist()):
            scores[row] = value
    return scores


def label_by_reward(pairs, reward, preference="hard"):
    """Put the sampled pairs into the reward's order and label them, in place: `preference` P(chosen ≻
    rejected) becomes 1, or ½ for a tie; "soft": σ(reward difference). Adds `rewards`, in the new order, and
    `tie`."""
    fresh = [pair for pair in pairs if pair["sampled"]]
    if not fresh:
        return
    scores = iter(reward([pair["prompt"] for pair in fresh for _ in range(2)],
                         [pair[side] for pair in fresh for side in ("chosen", "rejected")]))
    for pair, first, second in zip(fresh, scores, scores):
        if second > first:            # swapping the responses and the label changes nothing but their names
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
            pair["chosen_ids"], pair["rejected_ids"] = pair["rejected_ids"], pair["chosen_ids"]
        gap = abs(first - second)
        soft, hard = 1 / (1 + math.exp(-gap)), 0.5 if gap == 0 else 1.0
        pair.update(preference=soft if preference == "soft" else hard, tie=gap == 0,
                    rewards=[max(first, second), min(first, second)])


def draw_toy_pairs(model, path):
    """Sample 18,000 pairs from the toy's SFT model, label them by the true reward, write them to `path`."""
    policy, tokenizer = load_policy(model)
    rng = random.Random(0)
    prompts = [prompt for prompt, _ in rng.choices(toy_prompts(), k=18000)]
    torch.manual_seed(seeded("toy pairs"))
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    responses, _ = sample(policy, tokenizer, ids, TOY_DEFAULTS["max_response_length"], 2, batch_size=512)
    write_rows(path, [toy_pair(rng, prompt, *(response_text(tokenizer, ids) for ids in both))
                      for prompt, both in zip(prompts, responses)])


# --- figures: (value, low, high) ----------------------------------------------------------------------------

def prefers_chosen(margins):
    """1 where the chosen response has the higher reward, ½ for a tie, else 0; any shape."""
    return (margins > 0) + 0.5 * (margins == 0)


def bootstrap(statistic, *columns, draws=1000):
    """(value, low, high): statistic(*columns), and its 95 % interval when the n rows are drawn anew: the
    percentiles of `draws` draws with replacement, always the same ones; nan for one row. columns: n numbers
    each. statistic: takes them as float64 tensors (R, n), one row per draw, and returns (R,)."""
    columns = [torch.as_tensor(column).double() for column in columns]
    value, n = statistic(*(column[None] for column in columns)).item(), len(columns[0])
    if n < 2:
        return value, math.nan, math.nan
    rows = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(0))
    drawn = statistic(*(column[rows] for column in columns))                                        # (R,)
    return value, *drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def mean_of(values):
    """(mean, low, high) of n numbers, with its bootstrap interval."""
    return bootstrap(lambda drawn: drawn.mean(-1), values)


def share_of(values):
    """(mean, low, high) of n verdicts 0, ½ or 1, with Wilson's 95 % interval (J. Am. Stat. Assoc. 22, 209):
    what is drawn from zeros alone never shows a one, so a bootstrap's interval would be empty."""
    n, p, w = len(values), sum(values) / len(values), 1.96 / (2 * len(values))
    middle, half = p + 1.96 * w, 1.96 * math.sqrt(p * (1 - p) / n + w * w)     # no rounding between them at 0
    return p, (middle - half) / (1 + 1.96 * 2 * w), (middle + half) / (1 + 1.96 * 2 * w)


# --- the command line ---------------------------------------------------------------------------------------

def main():
    """`python reward.py --reward R --responses FILE --out FILE`."""
    parser = Parser("Score a file of responses, as generate.py writes it.")
    add = parser.add_argument
    add("--reward", default="toy", help="FILE.py:FUNCTION, a one-logit classifier, or toy (toy)")
    add("--responses", default="responses.jsonl", help="lines with prompt and response (responses.jsonl)")
    add("--out", default="scored.jsonl", help="the same lines with their reward (scored.jsonl)")
    parser.shared("--date", "--trust-remote-code")
    args = parser.parse_args()
    rows = read_rows(args.responses)
    if not rows or not all(isinstance(row.get("prompt"), (str, list)) and isinstance(row.get("response"), str)
                           for row in rows):
        raise InputError(f"{args.responses}: want lines with prompt and response, as generate.py writes them")
    reward = load_reward(args.reward, "cuda" if torch.cuda.is_available() else "cpu", args.trust_remote_code,
                         args.date)
    scores = reward([row["prompt"] for row in rows], [row["response"] for row in rows])
    write_rows(args.out, [{**row, "reward": value} for row, value in zip(rows, scores)])
    print(f"{len(rows)} responses scored in {args.out}: mean {sum(scores) / len(scores):.3f}, "
          f"min {min(scores):.3f}, max {max(scores):.3f}")


if __name__ == "__main__":
    command_line(main)
