"""Preference data: read it by its columns, render it, turn it into token ids and explicit masks.

    python data.py SOURCE                what was detected, kept and dropped, how long it is, two pairs
    python data.py SOURCE --model M      the same in M's tokens and chat template

SOURCE is a .jsonl, .json, .csv or .parquet file, or a hub name written OWNER/NAME[/CONFIG][:SPLIT].

A pair is a dict {prompt, chosen, rejected}. The responses are strings; the prompt is a string, or a list of
{role, content} messages where the data is a dialogue. How a pair becomes text:
  - the tokenizer has a chat template: the template renders it (a string counts as one user message);
  - it has none: strings stay as they are; messages become "\\n\\nHuman: …\\n\\nAssistant:", as in hh-rlhf.
"""
import argparse
import csv
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

# --- the command line: what every script shares -------------------------------------------------------------


class InputError(ValueError):
    """Bad input from the user: its text says what is wrong, where, and what to do."""


class BadRow(ValueError):
    """One row that cannot be used: its text is the reason under which the row is counted."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, like every other error here."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def shared(self, *flags):
        """Add flags that several scripts have."""
        for flag in flags:
            self.add_argument(flag, **SHARED[flag])


def number(kind, low, high=math.inf):
    """An argparse type: an int or float from `low` to `high`, and finite."""
    def convert(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not in {low:g} … {high:g}")
        return value

    convert.__name__ = kind.__name__           # argparse names it where `text` is no number at all
    return convert


SHARED = {
    "--data": dict(default="toy", help="toy (default), a .jsonl, .json, .csv or .parquet file, or a hub name "
                   "OWNER/NAME[/CONFIG][:SPLIT]; see data.py"),
    "--eval-data": dict(help="held-out pairs (toy:test for the toy, else one prompt in twenty of --data)"),
    "--prefer": dict(choices=["better", "safer"], default="better", help="PKU-SafeRLHF's label"),
    "--limit": dict(type=number(int, 1), help="use at most so many pairs"),
    "--max-prompt-length": dict(type=number(int, 1), help="tokens; cut from the left (512; toy 8)"),
    "--max-response-length": dict(type=number(int, 1), help="tokens; cut from the right (512; toy 24)"),
    "--seed": dict(type=number(int, 0, 2**20), default=0, help="of all that is drawn (0)"),
    "--trust-remote-code": dict(action="store_true", help="run code that comes with a hub model")}


def command_line(main):
    """Run a script's `main`; bad input, or a file that cannot be read or written, becomes one line on stderr
    and exit status 2."""
    try:
        main()
    except (InputError, OSError) as error:
        # InputError is raised by all processes alike, and one speaks; other errors may be one's own.
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, InputError):
            message = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)


def first_line(error):
    """The first line of an exception's text, for one-line messages."""
    return str(error).strip().split("\n")[0].rstrip(".")


def counted(counter):
    """{'empty response': 4} -> '4 empty response', for messages."""
    return ", ".join(f"{times} {what}" for what, times in counter.items()) or "none"


# --- formats: told apart by their columns; a converter takes a row and returns (prompt, chosen, rejected) ---

ROLES = {"human": "user", "gpt": "assistant", "Human": "user", "Assistant": "assistant"}
NO_TEXT, TIE = "null or malformed text", "no preference between the responses"


def as_messages(turns):
    """A dialogue as role/content or from/value turns, plain or in typed parts -> [{role, content}]."""
    if not isinstance(turns, list) or not turns:
        raise BadRow(NO_TEXT)
    messages = []
    for turn in turns:
        role, content = turn.get("role") or turn.get("from"), turn.get("content", turn.get("value"))
        if isinstance(content, list):
            if any(part["type"] != "text" for part in content):
                raise BadRow("message part that is not text")
            content = "".join(part.get("text") or part["value"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRow(NO_TEXT)
        messages.append({"role": ROLES.get(role, role), "content": content})
    return messages


def split_dialogue(dialogue):
    """A whole dialogue, as messages or as an hh-rlhf string -> (prompt messages, last response)."""
    if isinstance(dialogue, str):            # the prompt ends with the last "\n\nAssistant:"
        prompt, _, response = dialogue.rpartition("\n\nAssistant:")
        start, *turns = re.split(r"\n\n(Human|Assistant):", prompt)
        if start.strip() or not turns:
            raise BadRow("not a '\\n\\nHuman: … \\n\\nAssistant: …' dialogue")
        messages = [{"from": who, "value": text.strip()} for who, text in zip(turns[::2], turns[1::2])]
        return as_messages(messages), response
    messages = as_messages(dialogue)
    if messages[-1]["role"] != "assistant":
        raise BadRow("last message is not the assistant's")
    return messages[:-1], messages[-1]["content"]


def from_dialogues(chosen, rejected):
    """Two whole dialogues, which must share their prompt."""
    (prompt, chosen), (other, rejected) = split_dialogue(chosen), split_dialogue(rejected)
    if prompt != other:
        raise BadRow("chosen and rejected have different prompts")
    return prompt, chosen, rejected


def from_prompt(prompt, chosen, rejected):
    """A prompt and responses, as strings or messages; the latter come with or without the prompt in front."""
    prompt = as_messages(prompt) if isinstance(prompt, list) else prompt
    if isinstance(chosen, list) and isinstance(rejected, list):
        before, chosen, rejected = from_dialogues(chosen, rejected)
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if before:                             # the prompt again; only a system turn may be missing from it
            prompt = [turn for turn in prompt[:1] if turn["role"] == "system" and turn != before[0]] + before
    return prompt, chosen, rejected


def from_winner(prompt, responses, winner):
    """Two responses and the index of the preferred one."""
    if str(winner) not in ("0", "1"):
        raise BadRow(TIE)
    return prompt, responses[int(winner)], responses[1 - int(winner)]


def from_scores(prompt, scored):
    """(score, response)s: the best against the worst."""
    ranked = sorted(((float(score), text) for score, text in scored if score is not None), key=lambda s: s[0])
    if not ranked or ranked[0][0] == ranked[-1][0]:
        raise BadRow(TIE)
    return prompt, ranked[-1][1], ranked[0][1]


def reddit_prompt(info):
    """The query format of "Learning to summarize from human feedback" (arXiv 2009.01325)."""
    return (f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\n"
            f"POST: {info.get('post') or info.get('article')}\n\nTL;DR:")


FORMATS = {  # name: (the columns that identify it, converter of (row, prefer)); the first that fits is taken
    "ShareGPT": ("conversations chosen rejected", lambda row, _: (
        as_messages(row["conversations"]), *(split_dialogue([row[side]])[1] for side in ("chosen", "rejected")))),
    "prompt, chosen, rejected": ("prompt chosen rejected", lambda row, _: from_prompt(
        row["prompt"], row["chosen"], row["rejected"])),
    "whole dialogues": ("chosen rejected", lambda row, _: from_dialogues(row["chosen"], row["rejected"])),
    "whole dialogues as messages": ("chosen_messages rejected_messages", lambda row, _: from_dialogues(
        row["chosen_messages"], row["rejected_messages"])),
    "PKU-SafeRLHF": ("prompt response_0 response_1 better_response_id safer_response_id", lambda row, prefer:
        from_winner(row["prompt"], [row["response_0"], row["response_1"]], row[f"{prefer}_response_id"])),
    "UltraFeedback": ("instruction completions", lambda row, _: from_scores(
        row["instruction"], [(c["overall_score"], c["response"]) for c in row["completions"]])),
    "summarize_from_feedback": ("info summaries choice", lambda row, _: from_winner(
        reddit_prompt(row["info"]), [summary["text"] for summary in row["summaries"]], row["choice"])),
    "webgpt_comparisons": ("question answer_0 answer_1 score_0 score_1", lambda row, _: from_scores(
        row["question"]["full_text"], [(row["score_0"], row["answer_0"]), (row["score_1"], row["answer_1"])])),
}


# --- loading ------------------------------------------------------------------------------------------------

def read_rows(source):
    """The raw rows of `source`, an iterable of dicts. Raises InputError where it cannot be read."""
    path = Path(source)
    is_file = path.suffix in (".jsonl", ".json", ".csv", ".parquet")
    if is_file and not path.is_file():
        raise InputError(f"{source}: no such file")
    if path.is_file() and not is_file:
        raise InputError(f"{source}: want a file that ends in .jsonl, .json, .csv or .parquet")
    if path.suffix in (".jsonl", ".json"):
        return read_json(path)
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    import datasets                              # slow to import, and not needed for JSON and CSV
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)    # its errors are told below, in one line
    try:
        if is_file:
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        name, _, split = str(source).partition(":")
        name, *config = (name,) if path.exists() or name.count("/") < 2 else name.rsplit("/", 1)
        return datasets.load_dataset(name, *config, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{source}: cannot be read as a data set ({first_line(error.__cause__ or error)}); want "
                         "a .jsonl, .json, .csv or .parquet file, or OWNER/NAME[/CONFIG][:SPLIT]") from None


def read_json(path):
    """The rows of a file with one JSON object per line, or one array of objects."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")         # not splitlines: U+2028 may stand in a string
        for line, each in enumerate([text] if text.lstrip().startswith("[") else text.split("\n"), 1):
            rows += json.loads(each) if each.lstrip().startswith("[") else [json.loads(each)] if each.strip() else []
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{line + error.lineno - 1}: not JSON ({error.msg}); want one object per line, or one "
                         "array of objects") from None
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: a row is not an object with columns")
    return rows


def write_rows(path, rows):
    """Write rows as JSON lines, or as one array into a .json, aside and renamed: there is never half a file."""
    aside = Path(f"{path}.writing")
    aside.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(json.dumps(rows, indent=1) if Path(path).suffix == ".json" else
                     "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    aside.replace(path)


def load_pairs(source, limit=None, prefer="better"):
    """Preference pairs from `source` (see the top of this file): ([{prompt, chosen, rejected}], report).

    limit: keep at most so many pairs. prefer: "better" or "safer", for PKU-SafeRLHF. report: a dict {format,
    rows, dropped}, where `dropped` counts rows by reason. Raises InputError where nothing can be used.
    """
    rows = read_rows(source)
    if len(rows) == 0:
        raise InputError(f"{source}: empty, no rows")
    columns = set().union(*(rows[:100] if isinstance(rows, list) else [rows.column_names]))
    name = next((name for name, (needed, _) in FORMATS.items() if columns.issuperset(needed.split())), None)
    if name is None:
        known = "; ".join(needed.replace(" ", ", ") for needed, _ in FORMATS.values())
        raise InputError(f"{source}: columns {', '.join(sorted(columns))} fit no known format; "
                         f"want one of: {known}")
    pairs, dropped = [], Counter()
    for row in rows:
        if len(pairs) == limit:
            break
        try:
            pairs.append(checked_pair(*FORMATS[name][1](row, prefer)))
        except BadRow as reason:
            dropped[str(reason)] += 1
        except (KeyError, TypeError, AttributeError, IndexError, UnicodeEncodeError):
            dropped[NO_TEXT] += 1
    if not pairs:
        raise InputError(f"{source}: no usable pair in {sum(dropped.values())} rows ({counted(dropped)})")
    return pairs, {"format": name, "rows": len(pairs) + sum(dropped.values()), "dropped": dropped}


def checked_pair(prompt, chosen, rejected):
    """The pair as a dict; raises BadRow, or UnicodeEncodeError, where there is nothing to learn from it."""
    json.dumps([prompt, chosen, rejected], ensure_ascii=False).encode()     # half a surrogate pair is no text
    if not (isinstance(prompt, (str, list)) and isinstance(chosen, str) and isinstance(rejected, str)):
        raise BadRow(NO_TEXT)
    if not prompt or not (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip():
        raise BadRow("empty prompt")
    if not chosen.strip() or not rejected.strip():
        raise BadRow("empty response")
    if chosen.strip() == rejected.strip():
        raise BadRow("chosen equals rejected")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# --- text to tokens -----------------------------------------------------------------------------------------

def load_tokenizer(name, trust_remote_code=False, ends=True):
    """The tokenizer of a Hugging Face directory (without the network) or hub name. Raises InputError where there
    is none, or, with `ends`, where it has no end-of-sequence token."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=Path(name).is_dir())
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: no tokenizer to load ({first_line(error)})") from None
    if ends and tokenizer.eos_token_id is None:
        raise InputError(f"{name}: its tokenizer has no end-of-sequence token; set eos_token in "
                         "tokenizer_config.json")
    return tokenizer


def end_token_ids(tokenizer, model=None):
    """The ids that end a response: the tokenizer's EOS, the special token with which the chat template closes an
    answer, and the special ones among those of the checkpoint's generation_config: a config that was never told
    its tokenizer names a default id, which may be any word."""
    special, ids = tokenizer.added_tokens_decoder, {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        try:
            _, _, closing = render("question", "answer", tokenizer)[1].rpartition("answer")
            tokens = tokenizer(closing, add_special_tokens=False)["input_ids"]
            ids.update([token for token in tokens if token in special and special[token].special][:1])
        except BadRow:
            pass                                         # a template that refuses this dialogue tells nothing
    extra = model.generation_config.eos_token_id if model is not None else None
    extra = extra if isinstance(extra, list) else [extra]
    return ids | {token for token in extra if token in special}


def render(prompt, response, tokenizer=None):
    """(prompt text, response text) whose concatenation is the whole dialogue, as the top of this file says. Raises
    InputError where the chat template's render with the answer does not begin with its generation prompt: then
    training and sampling would see different prompts."""
    if tokenizer is None or not tokenizer.chat_template:
        if isinstance(prompt, str):
            return prompt, response
        names = {"user": "Human", "assistant": "Assistant"}
        turns = [f"\n\n{names.get(turn['role'], turn['role'].title())}: {turn['content']}" for turn in prompt]
        return "".join(turns) + "\n\nAssistant:", " " + response.strip()
    from jinja2 import TemplateError
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        head = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answered = messages + [{"role": "assistant", "content": response}]
        whole = tokenizer.apply_chat_template(answered, tokenize=False)
    except TemplateError as error:
        raise BadRow(f"refused by the chat template: {error}") from None
    if not whole.startswith(head):
        raise InputError(f"{tokenizer.name_or_path}: its chat template renders an answered dialogue otherwise than "
                         "the prompt it generates from; want one whose generation prompt is a prefix")
    header, answer, _ = whole[len(head):].partition(response.strip())
    if answer and header.strip() and head == tokenizer.apply_chat_template(messages, tokenize=False):
        head += header          # the template knows no generation prompt: the answer's header is the prompt's
    return head, whole[len(head):]


def prompt_tokens(head, tokenizer, limit):
    """(the ids of a prompt's text, as `render` returns it, whether they were cut to `limit`): what training and
    sampling condition on. It is cut from the left, but for a BOS token."""
    ids = tokenizer(head, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and not tokenizer.chat_template:
        ids = ids[:-1]                                                    # some tokenizers end every text
    if not ids:
        raise BadRow("prompt without tokens")
    bos = ids[:1] if len(ids) > limit > 1 and ids[0] == tokenizer.bos_token_id else []
    return bos + ids[-(limit - len(bos)):], len(ids) > limit


def encode(pairs, tokenizer, end_ids, max_prompt_length, max_response_length):
    """([{prompt, prompt_ids, chosen, chosen_ids, rejected, rejected_ids}], counts) of pairs.

    Both responses follow the same prompt ids. One longer than max_response_length tokens is cut from the right,
    and then has no end token. counts: truncated prompts and responses, and rows dropped because nothing is left
    to learn."""
    examples, counts = [], Counter({"truncated_prompts": 0, "truncated_responses": 0, "dropped": 0})
    for pair in pairs:
        try:
            (head, chosen), (_, rejected) = (render(pair["prompt"], pair[side], tokenizer)
                                             for side in ("chosen", "rejected"))
            prompt_ids, cut = prompt_tokens(head, tokenizer, max_prompt_length)
            ids = [response_tokens(text, tokenizer, end_ids) for text in (chosen, rejected)]
            chosen_ids, rejected_ids = (each[:max_response_length] for each in ids)
            if chosen_ids == rejected_ids:
                raise BadRow("same tokens in both responses")
        except BadRow as reason:
            counts.update({"dropped": 1, str(reason): 1})
            continue
        counts["truncated_prompts"] += cut
        counts["truncated_responses"] += sum(len(each) > max_response_length for each in ids)
        examples.append({**pair, "prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids})
    if not examples:
        raise InputError(f"none of {len(pairs)} pairs has anything to learn as tokens: {counted(+counts)}")
    return examples, counts


def response_tokens(text, tokenizer, end_ids):
    """The ids of a response's text with one end token: the first of `end_ids` in it, or the EOS appended."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = next((place for place, token in enumerate(ids) if token in end_ids), None)
    return ids + [tokenizer.eos_token_id] if end is None else ids[:end + 1]


def collate(prompts, responses, device="cpu"):
    """Lists of prompt and response ids -> input_ids, attention_mask, response_mask, each (B, T), padded on the right.
    The masks come from lengths, so the padding id (0) means nothing and may equal any real token."""
    def pad(rows):
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)

    return (pad([prompt + response for prompt, response in zip(prompts, responses)]),
            pad([[1] * (len(prompt) + len(response)) for prompt, response in zip(prompts, responses)]),
            pad([[0] * len(prompt) + [1] * len(response) for prompt, response in zip(prompts, responses)]))


def main():
    """`python data.py SOURCE [--model M]`."""
    parser = Parser(description="Show what a preference data set holds and how it will be read.")
    parser.add_argument("source")
    parser.add_argument("--model", help="a Hugging Face directory or name: count and render in its tokens")
    parser.shared("--prefer", "--limit", "--max-prompt-length", "--max-response-length")
    args = parser.parse_args()
    pairs, report = load_pairs(args.source, args.limit, args.prefer)
    print(f"{args.source}: {report['format']}; {report['rows']} rows, {len(pairs)} pairs kept, dropped: "
          f"{counted(report['dropped'])}")
    sides, unit, show = ("prompt", "chosen", "rejected"), "characters", str
    rows = [(*render(pair["prompt"], pair["chosen"]), render(pair["prompt"], pair["rejected"])[1])
            for pair in pairs]
    if args.model:
        tokenizer = load_tokenizer(args.model)
        examples, counts = encode(pairs, tokenizer, end_token_ids(tokenizer), args.max_prompt_length or 512,
                                  args.max_response_length or 512)
        print(f"{len(examples)} encoded; {counted(counts)}")
        unit, show = "tokens", tokenizer.decode
        rows = [[example[f"{side}_ids"] for side in sides] for example in examples]
    for side, texts in zip(sides, zip(*rows)):
        lengths = sorted(map(len, texts))
        low, median, most, high = (lengths[int(share * (len(lengths) - 1))] for share in (0, 0.5, 0.9, 1))
        print(f"{side:>9}: {unit} min {low}, median {median}, 90 % {most}, max {high}")
    for nth, row in enumerate(rows[:2], 1):
        print(f"--- pair {nth}")
        for side, text in zip(sides, row):
            print(f"{side + ':':10}{show(text)!r}")


if __name__ == "__main__":
    command_line(main)
