"""Rewards: a callable (prompts, responses) -> floats, one per response; higher is better.

    python reward.py --reward R --responses responses.jsonl --out scored.jsonl # adds a "reward" to every line

R is `toy`; `FILE.py:FUNCTION`, your own callable; or the directory or hub name of a sequence classifier
with one logit. A prompt is what data.py gives: a string, or a list of {role, content} messages where the
data is a dialogue.
"""
import importlib.util
import json
import math
import signal
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import ADJECTIVES, ADVERBS, NOUNS, InputError, Parser, command_line, read_rows, render
from generate import first_line, load_tokenizer, load_weights


def load_reward(name, device="cpu", trust_remote_code=False, timeout=600.0):
    """The reward called `name` (see the top of this file), checked at every call.

    Returns reward(prompts, responses) -> list of floats. Loading raises InputError where there is nothing to
    load; a call raises InputError where the scores are not one finite number per response, and where a
    function of yours raises anything or takes longer than `timeout` seconds.
    """
    if name == "toy":
        score = toy_reward
    elif ".py:" in name:
        score = guarded(load_function(name), name, timeout)
    else:
        score = load_classifier(name, device, trust_remote_code)

    def reward(prompts, responses):
        scores = score(prompts, responses)
        try:
            scores = [float(value) for value in scores]
        except (TypeError, ValueError):
            raise InputError(f"reward {name}: returned {type(scores).__name__}, want a list of "
                             "numbers") from None
        if len(scores) != len(responses):
            raise InputError(f"reward {name}: returned {len(scores)} scores for {len(responses)} responses; "
                             "want one each")
        for value, response in zip(scores, responses):
            if not math.isfinite(value):
                raise InputError(f"reward {name}: returned {value} for the response {response[:60]!r}; "
                                 "want finite numbers")
        return scores

    return reward


def load_function(name):
    """FILE.py:FUNCTION -> the function. The file's code runs: name only files you trust."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise InputError(f"reward {name}: no such file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError) as error:
        raise InputError(f"reward {name}: {path} does not import ({error})") from None
    if not callable(getattr(module, function, None)):
        raise InputError(f"reward {name}: {path} defines no function {function}")
    return getattr(module, function)


class TimeIsUp(BaseException):
    """A call took too long; no Exception, lest the called function catch it."""


@contextmanager
def time_limit(seconds):
    """Raise TimeIsUp in the main thread after so many seconds inside."""
    def stop(*_):
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def guarded(function, name, timeout):
    """The user's function, with InputError in the place of whatever it raises, and after `timeout` seconds:
    where, why, and for which response, found by asking for one at a time."""
    def problem_of(prompts, responses):
        try:
            with time_limit(timeout):
                return None, function(prompts, responses)
        except TimeIsUp:
            return f"has not answered within {timeout:g} s", None
        except Exception as error:                       # it is the user's code: anything can come
            place = traceback.extract_tb(error.__traceback__)[:2][-1]     # the function's own line
            what = f"raised {type(error).__name__} ({first_line(error)})"
            return f"{what} at {place.filename}:{place.lineno}", None

    def score(prompts, responses):
        problem, scores = problem_of(prompts, responses)
        if problem is None:
            return scores
        which = f"one of {len(responses)} responses"
        for prompt, response in zip(prompts, responses):
            alone, _ = problem_of([prompt], [response]) if "raised" in problem else (None, None)
            if alone:
                problem, which = alone, f"the response {response[:60]!r}"
                break
        raise InputError(f"reward {name}: {problem}, for {which}")

    return score


def load_classifier(name, device="cpu", trust_remote_code=False, batch_size=32):
    """A sequence classifier with one logit as a reward; its own tokenizer and chat
    template render the dialogue.

    Dialogues longer than the classifier takes lose tokens on the left. Scores do not depend on batch mates.
    """
    from jinja2 import TemplateError
    from transformers import AutoModelForSequenceClassification
    tokenizer = load_tokenizer(name, trust_remote_code, ends=False)
    tokenizer.truncation_side = "left"
    model = load_weights(AutoModelForSequenceClassification, name, trust_remote_code).to(device).eval()
    if model.config.num_labels != 1:
        raise InputError(f"reward {name}: has {model.config.num_labels} logits per response; "
                         "want a model with one")
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 10**9))
    own_pad = model.config.pad_token_id

    def ids_of(prompt, response):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not tokenizer.chat_template:
            text = "".join(render(messages, response))
        else:
            answered = messages + [{"role": "assistant", "content": response}]
            try:
                text = tokenizer.apply_chat_template(answered, tokenize=False)
            except TemplateError as error:
                raise InputError(f"reward {name}: its chat template refuses a dialogue ({error})") from None
        return tokenizer(text, add_special_tokens=not tokenizer.chat_template, truncation=True,
                         max_length=limit)["input_ids"]

    @torch.no_grad()
    def score(prompts, responses):
        rows = [torch.tensor(ids_of(prompt, response)) for prompt, response in zip(prompts, responses)]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        scores = [0.0] * len(rows)
        for start in tqdm(range(0, len(rows), batch_size), "scoring", leave=False,
                          disable=None if len(rows) > 4 * batch_size else True):
            batch = order[start:start + batch_size]
            # A decoder is scored at its last token that is not config.pad_token_id. Where the checkpoint
            # names none, any id that ends no row of this batch points at every row's true last token.
            last = {rows[row][-1].item() for row in batch}
            pad = own_pad if own_pad is not None else next(i for i in range(len(last) + 1) if i not in last)
            model.config.pad_token_id = pad
            ids = pad_sequence([rows[row] for row in batch], batch_first=True, padding_value=pad)
            mask = pad_sequence([torch.ones_like(rows[row]) for row in batch], batch_first=True)
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits       # (B, 1)
            for row, value in zip(batch, logits.float().squeeze(-1).tolist()):
                scores[row] = value
        return scores

    return score


def label_by_reward(pairs, reward, preference="hard"):
    """Put the fresh pairs into the reward's order and label them. Changes the pairs.

    Their `preference` P(chosen ≻ rejected) becomes 1, or ½ for a tie; "soft": σ(reward difference). Adds
    `rewards`, in the new order, and `tie`.
    """
    fresh = [pair for pair in pairs if all(pair["on_policy"])]
    if not fresh:
        return
    # A sample that is in several pairs is scored once.
    samples = {id(pair[f"{side}_ids"]): (pair["prompt"], pair[side])
               for pair in fresh for side in ("chosen", "rejected")}
    scores = dict(zip(samples, reward(*map(list, zip(*samples.values())))))
    for pair in fresh:
        first, second = scores[id(pair["chosen_ids"])], scores[id(pair["rejected_ids"])]
        if second > first:            # swapping the responses and the label changes nothing but their names
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
            pair["chosen_ids"], pair["rejected_ids"] = pair["rejected_ids"], pair["chosen_ids"]
        gap = abs(first - second)
        hard = 0.5 if gap == 0 else 1.0
        pair.update(preference=1 / (1 + math.exp(-gap)) if preference == "soft" else hard, tie=gap == 0,
                    rewards=[max(first, second), min(first, second)])


def toy_reward(prompts, responses):
    """The toy world's ground truth: what a review of the prompt's noun is worth, in reward units.

      opinion     the first two adjectives' valence, times their adverb's intensity
      on topic    +0.5 for the prompt's noun, −0.5 for any other
      repetition  −0.5 for every adjective or adverb said again
      ending      +0.5 for one full stop, at the end
      length      −0.3 for every word past the ninth
    """
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise InputError("reward toy: scores reviews of the toy's nouns; name the reward of your data with "
                         "--reward")
    scores = []
    for prompt, response in zip(prompts, responses):
        words, topic = response.split(), set(prompt.split()) & set(NOUNS)
        opinions = [ADJECTIVES[word] * ADVERBS.get(before, 1.0) for before, word in zip([""] + words, words)
                    if word in ADJECTIVES]
        nouns, described = set(words) & set(NOUNS), [
            word for word in words if word in ADJECTIVES or word in ADVERBS]
        scores.append(sum(opinions[:2])
                      + 0.5 * len(nouns & topic) - 0.5 * len(nouns - topic)
                      - 0.5 * (len(described) - len(set(described)))
                      + 0.5 * (words[-1:] == ["."] and words.count(".") == 1)
                      - 0.3 * max(0, len(words) - 9))
    return scores


def main():
    """`python reward.py --reward R --responses FILE --out FILE`."""
    parser = Parser(description="Score a file of responses, as generate.py writes it.")
    parser.add_argument("--reward", default="toy",
                        help="toy, FILE.py:FUNCTION, or a classifier's directory or name")
    parser.add_argument("--responses", default="responses.jsonl", help="JSON lines with prompt and response")
    parser.add_argument("--out", default="scored.jsonl", help="the same lines with a reward")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run code that comes with a hub model")
    args = parser.parse_args()
    rows = read_rows(args.responses)
    if not rows or not all(isinstance(row.get("prompt"), (str, list)) and isinstance(row.get("response"), str)
                           for row in rows):
        raise InputError(f"{args.responses}: want JSON lines with prompt and response, as generate.py writes "
                         "them")
    reward = load_reward(args.reward, "cuda" if torch.cuda.is_available() else "cpu", args.trust_remote_code)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    scores = reward([row["prompt"] for row in rows], [row["response"] for row in rows])
    with open(args.out, "w", encoding="utf-8") as file:
        for row, value in zip(rows, scores):
            file.write(json.dumps({**row, "reward": value}, ensure_ascii=False) + "\n")
    mean = sum(scores) / len(scores)
    print(f"{len(rows)} responses scored in {args.out}: mean {mean:.3f}, min {min(scores):.3f}, "
          f"max {max(scores):.3f}")


if __name__ == "__main__":
    command_line(main)
