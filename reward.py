"""Rewards: a callable (prompts, responses) -> floats, one per response; higher is better.

    python reward.py --reward R --responses responses.jsonl --out scored.jsonl # adds a "reward" to every line
    python reward.py --train --model M --data PAIRS --out DIR                  # makes R = DIR of preferences

R is `toy`; `FILE.py:FUNCTION`, your own callable; or the directory or hub name of a sequence classifier
with one logit. A prompt is what data.py gives: a string, or a list of {role, content} messages where the
data is a dialogue.
"""
import importlib.util
import json
import math
import signal
import traceback
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import (ADJECTIVES, ADVERBS, NOUNS, InputError, Parser, command_line, counted, number, read_rows,
                  render, train_and_held_out)
from generate import adapter_config, first_line, load_tokenizer, load_weights, toy_checkpoint


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


def load_classifier(name, device="cpu", trust_remote_code=False):
    """A sequence classifier with one logit as a reward; its own tokenizer and chat
    template render the dialogue.

    Dialogues longer than the classifier takes lose tokens on the left. Scores do not depend on batch mates.
    """
    from transformers import AutoModelForSequenceClassification
    tokenizer = load_tokenizer(name, trust_remote_code, ends=False)
    model = load_weights(AutoModelForSequenceClassification, name, trust_remote_code).to(device).eval()
    if model.config.num_labels != 1:
        raise InputError(f"reward {name}: has {model.config.num_labels} logits per response; "
                         "want a model with one")
    ids_of = classifier_ids(model, tokenizer, name)
    return lambda prompts, responses: classifier_scores(model, list(map(ids_of, prompts, responses)))


def classifier_ids(model, tokenizer, name):
    """The function (prompt, response) -> the ids that the classifier reads, in scoring and in training. It
    raises InputError where the chat template refuses the dialogue."""
    from jinja2 import TemplateError
    tokenizer.truncation_side = "left"
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 10**9))

    def ids_of(prompt, response):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not tokenizer.chat_template:
            text = "".join(render(messages, response))
        else:                             # stripped, as samples are: data's responses may begin with a space
            answered = messages + [{"role": "assistant", "content": response.strip()}]
            try:
                text = tokenizer.apply_chat_template(answered, tokenize=False)
            except TemplateError as error:
                raise InputError(f"reward {name}: its chat template refuses a dialogue ({error})") from None
        return tokenizer(text, add_special_tokens=not tokenizer.chat_template, truncation=True,
                         max_length=limit)["input_ids"]

    return ids_of


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
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    scores = [0.0] * len(rows)
    for start in tqdm(range(0, len(rows), batch_size), "scoring", leave=False,
                      disable=None if len(rows) > 4 * batch_size else True):
        batch = order[start:start + batch_size]
        for row, value in zip(batch, classifier_logits(model, [rows[row] for row in batch]).tolist()):
            scores[row] = value
    return scores


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


# --- a reward model of your own -----------------------------------------------------------------------------

def bradley_terry_loss(chosen, rejected):
    """−log P(chosen ≻ rejected), P = σ(r(x, chosen) − r(x, rejected)) (arXiv 1706.03741; 2203.02155, eq. 1).
    Rewards (B,) × 2 -> (B,)."""
    return -F.logsigmoid(chosen - rejected)


def prefers_chosen(margins):
    """1 where the chosen response has the higher reward, ½ for a tie, else 0; any shape."""
    return (margins > 0) + 0.5 * (margins == 0)


def calibration_error(margins):
    """The expected calibration error (arXiv 1706.04599) of P = σ(margin), (R, n) -> (R,).

    As the first response is always the chosen one, the prediction is folded: the confidence that the
    response with the higher reward is the preferred one, max(P, 1 − P), against how often it is. In ten bins
    of equal count, not width: most confidences are close to each other, and no bin is then nearly empty.
    """
    margins = margins.gather(-1, margins.abs().argsort(dim=-1, stable=True))
    gaps = prefers_chosen(margins) - torch.sigmoid(margins.abs())
    return sum(gap.sum(-1).abs() for gap in gaps.tensor_split(10, -1)) / margins.shape[-1]


def pair_figures(margins):
    """{name: (value, low, high)} of n reward differences, chosen minus rejected, with 95 % intervals over the
    pairs. A few pairs per bin deviate by chance, so `if_calibrated` is the calibration error that would be
    seen, and its 95 % range, if these confidences were all true."""
    from evaluate import bootstrap, mean                               # which imports this file
    margins = torch.tensor(margins, dtype=torch.float64)
    sizes, shares = margins.abs(), torch.tensor([0.025, 0.975], dtype=torch.float64)
    draws = torch.rand(1000, len(margins), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_chance = calibration_error(torch.where(draws < torch.sigmoid(sizes), sizes, -sizes))        # (1000,)
    return {"accuracy": bootstrap(mean, prefers_chosen(margins)),
            "loss": bootstrap(mean, -F.logsigmoid(margins)), "margin": bootstrap(mean, margins),
            "calibration_error": bootstrap(calibration_error, margins, centred=True),     # draws have more
            "if_calibrated": (by_chance.mean().item(), *by_chance.quantile(shares).tolist())}


def load_trainee(name, seed, max_length=None, trust_remote_code=False):
    """The classifier to train, with float32 weights, and its tokenizer: (model, tokenizer).

    name: a causal language model, whose score head is drawn with `seed`, or a classifier with one logit.
    max_length: in tokens; it goes into the tokenizer, so that a saved model is served with it.
    """
    from transformers import AutoModelForSequenceClassification
    name = toy_checkpoint() if name == "toy" else name
    if adapter_config(name):
        raise InputError(f"{name} is an adapter; merge it into its base first (sail.py --merge)")
    tokenizer = load_tokenizer(name, trust_remote_code, ends=False)
    torch.manual_seed(seed)
    model = load_weights(AutoModelForSequenceClassification, name, trust_remote_code, {"score.weight"},
                         num_labels=1, dtype=torch.float32)
    known, rows = max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().weight.shape[0]
    if rows < known:
        raise InputError(f"{name}: the tokenizer has {known} ids, the model only {rows}; wrong tokenizer?")
    # Others that load the model need an id to pad with. Whichever it is, training sees the same one.
    model.config.pad_token_id = next(token for token in (
        model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, max_length or math.inf)
    return model, tokenizer


def encode_pairs(pairs, ids_of):
    """Pairs as ids, ([(chosen, rejected)], how many were dropped by reason): those that a chat template
    refuses, and those whose difference was cut off."""
    encoded, dropped = [], Counter()
    for pair in pairs:
        try:
            chosen, rejected = (ids_of(pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
        except InputError:
            dropped["refused by the chat template"] += 1
            continue
        if chosen == rejected:
            dropped["same tokens in both responses"] += 1
        else:
            encoded.append((chosen, rejected))
    return encoded, dropped


def train(args):
    """Train a reward model, and evaluate it on held-out pairs before and after. Returns the model.

    args: the command line's, with what sail.make_optimizer reads. Raises InputError on bad input, and where
    loss or gradient is not finite.
    """
    from evaluate import shown                                         # these two import this file
    from sail import log, make_optimizer, run_name, update, write_line
    args.learning_rate = args.learning_rate or (2e-4 if args.data == "toy" else 1e-5)
    train_pairs, held_out, report = train_and_held_out(args.data, args.eval_data, args.limit, args.prefer)
    model, tokenizer = load_trainee(args.model, args.seed, args.max_length, args.trust_remote_code)
    model.to("cuda" if torch.cuda.is_available() else "cpu")           # in eval mode throughout: no dropout
    ids_of = classifier_ids(model, tokenizer, args.model)
    pairs, dropped = encode_pairs(train_pairs, ids_of)
    held_out, dropped_held_out = encode_pairs(held_out, ids_of)
    if not pairs:
        raise InputError(f"{args.data}: none of {len(train_pairs)} pairs can be told apart "
                         f"({counted(dropped)})")
    out = Path(args.out or f"runs/{run_name(args.data)}-reward")
    out.mkdir(parents=True, exist_ok=True)
    (out / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n", encoding="utf-8")
    for name in ("metrics", "eval"):
        (out / f"{name}.jsonl").write_text("")

    generator = torch.Generator().manual_seed(args.seed)
    order = torch.cat([torch.randperm(len(pairs), generator=generator) for _ in range(args.epochs)])
    batches = order.tensor_split(math.ceil(len(order) / args.batch_size))      # they differ by one at most
    optimizer, scheduler = make_optimizer(model, len(batches), args)
    print(f"{args.data}: {len(pairs)} pairs to train on, {len(held_out)} to evaluate on; dropped: "
          f"{counted(report['dropped'] + dropped + dropped_held_out)}\n{len(batches)} steps of "
          f"{len(batches[0])} -> {out}", flush=True)

    def evaluate_at(step):
        if not held_out:
            return
        scores = [classifier_scores(model, side) for side in zip(*held_out)]
        figures, row = pair_figures([one - other for one, other in zip(*scores)]), {"step": step}
        for name, (value, *interval) in figures.items():
            row.update({name: value, f"{name}_interval": interval if math.isfinite(interval[0]) else None})
        write_line(out, "eval", row)
        tqdm.write(f"eval {step} | " + " | ".join(f"{name} {shown(*f)}" for name, f in figures.items()))

    evaluate_at(0)
    for step, batch in enumerate(tqdm(batches, "reward", disable=None), 1):
        sides = zip(*(pairs[place] for place in batch.tolist()))
        chosen, rejected = classifier_logits(model, [row for side in sides for row in side]).chunk(2)
        loss, margins = bradley_terry_loss(chosen, rejected).mean(), (chosen - rejected).detach()
        loss.backward()
        grad_norm, learning_rate, finite = update(model, optimizer, scheduler, 1.0, loss.item())
        log(out, dict(step=step, loss=loss.item(), accuracy=prefers_chosen(margins).mean().item(),
                      margin=margins.mean().item(), grad_norm=grad_norm, learning_rate=learning_rate),
            len(batches), 10)
        if not finite:
            raise InputError(f"step {step}: loss or gradient not finite; try a lower --learning-rate")
    evaluate_at(len(batches))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"saved {out}; sail.py --variant pr --reward {out} uses it")
    return model


def main():
    """`python reward.py --reward R --responses FILE --out FILE`, or with `--train --model M --data D`."""
    parser = Parser(description="Score a file of responses, as generate.py writes it; or, with --train, make "
                    "a reward model of preferences.")
    parser.add_argument("--out", help="the scored lines (scored.jsonl); with --train, a directory for the "
                        "model, args.json, metrics.jsonl and eval.jsonl (runs/DATA-reward)")
    parser.add_argument("--trust-remote-code", action="store_true",
                        help="run code that comes with a hub model")
    add = parser.add_argument_group("score").add_argument
    add("--reward", help="toy (default), FILE.py:FUNCTION, or a classifier's directory or name")
    add("--responses", help="JSON lines with prompt and response (responses.jsonl)")
    add = parser.add_argument_group("train").add_argument
    add("--train", action="store_true", help="Bradley-Terry on the pairs of --data")
    add("--model", default="toy", help="what to start from: the directory or hub name of a causal language "
        "model, or of a classifier with one logit; toy (default): the toy's SFT model")
    add("--data", default="toy", help="as in sail.py (default: toy)")
    add("--eval-data", help="held-out pairs (toy:test for the toy, else one prompt in twenty of --data)")
    add("--prefer", choices=["better", "safer"], default="better", help="PKU-SafeRLHF's label to train on")
    add("--limit", type=number(int, 1), help="use at most so many pairs")
    add("--max-length", type=number(int, 1), help="tokens of a dialogue; cut from the left, also when it is "
        "served (what the model takes)")
    add("--epochs", type=number(int, 1), default=1, help="(1)")
    add("--batch-size", type=number(int, 1), default=32, help="pairs per step and forward (32)")
    add("--learning-rate", type=number(float, 1e-12), help="after a warm-up of a tenth of the steps (1e-5; "
        "toy 2e-4)")
    add("--seed", type=number(int, 0, 2**20), default=0)
    parser.set_defaults(optimizer="adamw", schedule="constant", warmup_steps=None)   # for sail.make_optimizer
    args = parser.parse_args()
    if not args.train:
        score(args.reward or "toy", args.responses or "responses.jsonl", args.out or "scored.jsonl",
              args.trust_remote_code)
    elif args.reward or args.responses:
        parser.error("argument --train: learns from --data; leave --reward and --responses out")
    else:
        train(args)


def score(reward, responses, out, trust_remote_code=False):
    """Write the lines of the file `responses`, each with its reward, into `out`; print a summary."""
    rows = read_rows(responses)
    if not rows or not all(isinstance(row.get("prompt"), (str, list)) and isinstance(row.get("response"), str)
                           for row in rows):
        raise InputError(f"{responses}: want JSON lines with prompt and response, as generate.py writes them")
    reward = load_reward(reward, "cuda" if torch.cuda.is_available() else "cpu", trust_remote_code)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    scores = reward([row["prompt"] for row in rows], [row["response"] for row in rows])
    with open(out, "w", encoding="utf-8") as file:
        for row, value in zip(rows, scores):
            file.write(json.dumps({**row, "reward": value}, ensure_ascii=False) + "\n")
    mean = sum(scores) / len(scores)
    print(f"{len(rows)} responses scored in {out}: mean {mean:.3f}, min {min(scores):.3f}, "
          f"max {max(scores):.3f}")


if __name__ == "__main__":
    command_line(main)
