"""Preference data: read it by its columns, render it, turn it into token ids and explicit masks.

    python data.py SOURCE                what was detected, kept and dropped, how long it is, two rows
    python data.py SOURCE --model M      the same in M's tokens and chat template

SOURCE is a .jsonl, .json, .csv or .parquet file, or a hub name written OWNER/NAME[/CONFIG][:SPLIT].

A pair is a dict {prompt, chosen, rejected}. Responses are strings, or None where the data lacks them: rows of
prompts, for fully online runs, or of dialogues, for sft. The prompt is a string, or a list of {role, content}
messages where the data is a dialogue. How a pair becomes text:
  - the tokenizer has a chat template: the template renders it (a string counts as one user message);
  - it has none: strings stay as they are; messages become "\\n\\nHuman: …\\n\\nAssistant:", as in hh-rlhf.
"""
import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

try:
    import torch
    from torch.nn.utils.rnn import pad_sequence
except ImportError as missing:
    sys.exit(f"{Path(sys.argv[0]).name}: error: {missing}: pip install -r requirements.txt, or run ./run.sh")

# --- what every script shares -------------------------------------------------------------------------------


class InputError(ValueError):
    """Bad input from the user: its text says what is wrong, where, and what to do."""


class BadRow(ValueError):
    """One row that cannot be used: its text is the reason under which it is counted."""


class Parser(argparse.ArgumentParser):
    """argparse with short help and one-line errors; `shared` adds flags that several scripts have."""

    def __init__(self, description, arguments=""):
        super().__init__(description=description, usage=f"%(prog)s [flags]{arguments}",
                         formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=35))

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def shared(self, *flags, add=None):
        for flag in flags:
            (add or self.add_argument)(flag, **SHARED[flag])


def number(kind, low, high=math.inf):
    """An argparse type: an int or float from `low` to `high`, and finite."""
    def convert(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not in {low:g} … {high:g}")
        return value

    convert.__name__ = kind.__name__           # argparse names it where `text` is no number at all
    return convert


COUNT = dict(metavar="N", type=number(int, 1))
SHARED = {
    "--data": dict(default="toy", help="a .jsonl, .json, .csv or .parquet file, a hub name, or toy (toy)"),
    "--eval-data": dict(help="held-out pairs (one prompt in twenty of --data; toy: toy:test)"),
    "--prefer": dict(choices=["better", "safer"], default="better", help="label of PKU-SafeRLHF (better)"),
    "--limit": dict(COUNT, help="use the first N pairs only"),
    "--max-prompt-length": dict(COUNT, help="tokens; cut on the left (training: 512, toy 8)"),
    "--max-response-length": dict(COUNT, help="tokens; cut on the right (training: 512, toy 24)"),
    "--seed": dict(type=number(int, 0), default=0, help="random seed (0)"),
    "--trust-remote-code": dict(action="store_true", help="run code that comes with a hub model")}


def command_line(main):
    """Run a script's `main`; bad input, a file that fails, or an optional package that is not there, becomes
    one line on stderr and exit status 2."""
    try:
        main()
    except (InputError, OSError, ModuleNotFoundError) as error:
        # InputError is raised by all processes alike, and one speaks; other errors may be one's own.
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, InputError):
            path = getattr(error, "filename2", None) or getattr(error, "filename", None)     # 2: renamed to
            message = f"{path}: {error.strerror}" if path else error
            message = f"needs a package: pip install {error.name}" if hasattr(error, "name") else message
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)


def first_line(error):
    """The first line of an exception's text."""
    return str(error).strip().split("\n")[0].rstrip(".")


def counted(counter):
    """{'empty response': 4} -> '4 empty response'."""
    return ", ".join(f"{times} {what}" for what, times in counter.items()) or "none"


def seeded(purpose, *numbers):
    """The seed of one stream of random numbers: a hash into the 32 bits that torch keeps on a CPU."""
    return int.from_bytes(hashlib.sha256(repr((purpose, *numbers)).encode()).digest()[:4], "big")


# --- formats: told apart by their columns; a converter takes a row and returns (prompt, chosen, rejected) ---

ROLES = {"human": "user", "gpt": "assistant", "Human": "user", "Assistant": "assistant"}
SIDES = ("chosen", "rejected")
NO_TEXT, TIE = "null or malformed text", "no preference between the responses"


def as_messages(turns):
    """A dialogue as role/content or from/value turns, plain or in typed parts -> [{role, content}]."""
    messages = []
    for turn in turns:
        role, content = turn.get("role") or turn.get("from"), turn.get("content", turn.get("value"))
        if isinstance(content, list):
            if {part["type"] for part in content} - {"text"}:
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


def from_dialogues(*dialogues):
    """Two whole dialogues, which must share their prompt."""
    (prompt, chosen), (other, rejected) = map(split_dialogue, dialogues)
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


def from_scores(prompt, scored):
    """(score, response)s: the best against the worst."""
    ranked = sorted(((float(score), text) for score, text in scored if score is not None), key=lambda s: s[0])
    if not ranked or ranked[0][0] == ranked[-1][0] or not all(math.isfinite(score) for score, _ in ranked):
        raise BadRow(TIE)
    return prompt, ranked[-1][1], ranked[0][1]


REDDIT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"    # as in arXiv 2009.01325
FORMATS = {  # name: (the columns that identify it, converter of (row, prefer)); the first that fits is taken
    "ShareGPT": ("conversations chosen rejected", lambda row, _: (
        as_messages(row["conversations"]), *(split_dialogue([row[side]])[1] for side in SIDES))),
    "prompt, chosen, rejected": ("prompt chosen rejected", lambda row, _: from_prompt(
        row["prompt"], row["chosen"], row["rejected"])),
    "whole dialogues": ("chosen rejected", lambda row, _: from_dialogues(row["chosen"], row["rejected"])),
    "whole dialogues as messages": ("chosen_messages rejected_messages", lambda row, _: from_dialogues(
        row["chosen_messages"], row["rejected_messages"])),
    "PKU-SafeRLHF": ("prompt response_0 response_1 better_response_id safer_response_id", lambda row, prefer:
        from_scores(row["prompt"], [(float(row[f"{prefer}_response_id"]) == i, row[f"response_{i}"])
                                    for i in (0, 1)])),
    "UltraFeedback": ("instruction completions", lambda row, _: from_scores(
        row["instruction"], [(c["overall_score"], c["response"]) for c in row["completions"]])),
    "summarize_from_feedback": ("info summaries choice", lambda row, _: from_scores(
        REDDIT.format_map({**row["info"], "post": row["info"].get("post") or row["info"]["article"]}),
        [(float(row["choice"]) == i, summary["text"]) for i, summary in enumerate(row["summaries"])])),
    "webgpt_comparisons": ("question answer_0 answer_1 score_0 score_1", lambda row, _: from_scores(
        row["question"]["full_text"], [(row[f"score_{i}"], row[f"answer_{i}"]) for i in (0, 1)])),
    "dialogues": ("messages", lambda row, _: split_dialogue(as_messages(row["messages"]))),
    "prompts": ("prompt", lambda row, _: from_prompt(row["prompt"], None, None)[:1]),
}


# --- loading ------------------------------------------------------------------------------------------------

def read_rows(source):
    """The raw rows of `source`, an iterable of dicts. Raises InputError where it cannot be read."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".csv", ".parquet") and not path.is_file():
        raise InputError(f"{source}: no such file")
    if path.suffix in (".jsonl", ".json", ".csv"):
        return read_text(path)
    import datasets                              # slow to import, and not needed for JSON and CSV
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)    # its errors are told below, in one line
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        name, _, split = str(source).partition(":")
        name, *config = (name,) if path.exists() or name.count("/") < 2 else name.rsplit("/", 1)
        return datasets.load_dataset(name or "(no name)", *config, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{source}: cannot be read as a data set ({first_line(error.__cause__ or error)}); "
                         "want a .jsonl, .json, .csv, .parquet file or OWNER/NAME[/CONFIG][:SPLIT]") from None


def read_text(path):
    """The rows of a .csv file, or of one with a JSON object on each line, or an array of them."""
    rows, line = [], 1
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            csv.field_size_limit(2**31 - 1)                 # a long text is no error
            return list(csv.DictReader(io.StringIO(text, newline=""), restkey=""))
        array = text.lstrip().startswith("[")               # not splitlines: U+2028 may stand in a string
        for line, each in enumerate([text] if array else text.split("\n"), 1):
            rows += json.loads(each) if array else [json.loads(each)] if each.strip() else []
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{path}:{line + getattr(error, 'lineno', 1) - 1}: not {path.suffix[1:]} "
                         f"({first_line(error)}); want an object per line, or an array of objects") from None
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: a row is not an object with columns")
    return rows


def read_json(path):
    """The object in a file that sail.py wrote. Raises InputError where it is cut short."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); it was cut short, or edited") from None


def write_text(path, text):
    """Write a file aside, under a name of this process alone, and rename it: there is never half a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    aside = Path(f"{path}.{os.getpid()}.writing")
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # a lone surrogate: as in JSON
    aside.replace(path)


def write_rows(path, rows):
    """Write rows as JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def load_pairs(source, limit=None, prefer="better"):
    """Preference pairs from `source` (see the top of this file): ([{prompt, chosen, rejected}], report).

    limit: keep at most so many. prefer: "better" or "safer", for PKU-SafeRLHF. report: a dict {format, rows,
    dropped}, where `dropped` counts rows by reason. Raises InputError where nothing can be used."""
    rows = read_rows(source)
    if len(rows) == 0:
        raise InputError(f"{source}: empty, no rows")
    columns = set().union(*(rows[:100] if isinstance(rows, list) else [rows.column_names]))
    name = next((name for name, (needed, _) in FORMATS.items() if columns.issuperset(needed.split())), None)
    if name is None:
        known = "; ".join(needed.replace(" ", ", ") for needed, _ in FORMATS.values())
        raise InputError(f"{source}: columns {', '.join(sorted(columns))} fit none of: {known}")
    pairs, dropped = [], Counter()
    for row in rows:
        if len(pairs) == limit:
            break
        try:
            pairs.append(checked_pair(*FORMATS[name][1](row, prefer)))
        except BadRow as reason:
            dropped[str(reason)] += 1
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError):
            dropped[NO_TEXT] += 1
    if not pairs:
        raise InputError(f"{source}: no usable pair in {len(rows)} rows ({counted(dropped)})")
    return pairs, {"format": name, "rows": len(pairs) + sum(dropped.values()), "dropped": dropped}


def checked_pair(prompt, *responses):
    """The pair as a dict; raises BadRow, or UnicodeEncodeError, where there is nothing to learn from it."""
    json.dumps([prompt, responses], ensure_ascii=False).encode()            # half a surrogate pair is no text
    if not isinstance(prompt, (str, list)) or not all(isinstance(response, str) for response in responses):
        raise BadRow(NO_TEXT)
    if not prompt or not (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip():
        raise BadRow("empty prompt")
    if not all(response.strip() for response in responses):
        raise BadRow("empty response")
    if len(responses) == 2 and responses[0].strip() == responses[1].strip():
        raise BadRow("chosen equals rejected")
    return dict(zip(("prompt", *SIDES), (prompt, *responses, None, None)))


# --- text to tokens -----------------------------------------------------------------------------------------

def load_tokenizer(name, trust_remote_code=False, ends=True):
    """The tokenizer of a directory or hub name. Raises InputError where there is none, or it has no EOS."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code,
                                                  local_files_only=Path(name).is_dir())
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: no tokenizer ({first_line(error)}); of a run, name its model/") from None
    if ends and tokenizer.eos_token_id is None:
        raise InputError(f"{name}: its tokenizer has no end-of-sequence token; tokenizer_config.json sets it")
    return tokenizer


def end_token_ids(tokenizer, model=None):
    """The ids that end a response: the tokenizer's EOS, the special token with which the chat template closes
    an answer, and those of generation_config that are special: a config's default id may be any word."""
    special, ids = tokenizer.added_tokens_decoder, {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        try:
            _, _, closing = render("question", "answer", tokenizer)[1].rpartition("answer")
            tokens = tokenizer(closing, add_special_tokens=False)["input_ids"]
            ids.update([token for token in tokens if token in special and special[token].special][:1])
        except BadRow:
            pass                                         # a template that refuses this dialogue tells nothing
    extra = model.generation_config.eos_token_id if model is not None else None
    return ids | {token for token in (extra if isinstance(extra, list) else [extra]) if token in special}


def render(prompt, response, tokenizer=None):
    """(prompt text, response text) whose concatenation is the whole dialogue. Raises InputError where the
    chat template's render does not begin with its generation prompt: training would see another one than
    sampling."""
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
        raise InputError(f"{tokenizer.name_or_path}: its chat template renders an answered dialogue unlike "
                         "the prompt it generates from; want one whose generation prompt is a prefix")
    header, answer, _ = whole[len(head):].partition(response.strip())
    if answer and header.strip() and head == tokenizer.apply_chat_template(messages, tokenize=False):
        head += header          # the template knows no generation prompt: the answer's header is the prompt's
    return head, whole[len(head):]


def prompt_tokens(head, tokenizer, limit):
    """(the ids of a prompt's text, whether they were cut to `limit`), from the left, but for a BOS token."""
    ids = tokenizer(head, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and not tokenizer.chat_template:
        ids = ids[:-1]                                                    # some tokenizers end every text
    if not ids:
        raise BadRow("prompt without tokens")
    bos = ids[:1] if len(ids) > limit > 1 and ids[0] == tokenizer.bos_token_id else []
    return bos + ids[-(limit - len(bos)):], len(ids) > limit


def encode(pairs, tokenizer, end_ids, max_prompt_length, max_response_length):
    """([{prompt, prompt_ids, chosen, chosen_ids, rejected, rejected_ids}], counts) of pairs.

    Both responses follow the same prompt ids; one that the data lacks has no ids. One longer than
    max_response_length is cut from the right, and then has no end token. counts: what was truncated, pairs
    with an end token in their text, which cuts them, and rows dropped as nothing is left to learn."""
    examples, counts = [], Counter(dropped=0)
    ends = tokenizer.convert_ids_to_tokens(sorted(end_ids))
    for pair in pairs:
        try:
            rendered = [render(pair["prompt"], pair[side] or "answer", tokenizer) for side in SIDES]
            prompt_ids, cut = prompt_tokens(rendered[0][0], tokenizer, max_prompt_length)
            ids = [response_tokens(text, tokenizer, end_ids) if pair[side] else []
                   for side, (_, text) in zip(SIDES, rendered)]
            chosen_ids, rejected_ids = (each[:max_response_length] for each in ids)
            if chosen_ids and chosen_ids == rejected_ids:
                raise BadRow("same tokens in both responses")
        except BadRow as reason:
            counts.update({"dropped": 1, str(reason): 1})
            continue
        counts.update(
            truncated_prompts=cut, truncated_responses=sum(len(each) > max_response_length for each in ids),
            end_token_in_text=any(end in (pair[side] or "") for side in SIDES for end in ends))
        examples.append(dict(pair, prompt_ids=prompt_ids, chosen_ids=chosen_ids, rejected_ids=rejected_ids))
    if not examples:
        raise InputError(f"none of {len(pairs)} pairs has anything to learn as tokens: {counted(+counts)}")
    return examples, counts


def response_tokens(text, tokenizer, end_ids):
    """The ids of a response's text with one end token: the first of `end_ids` in it, or the EOS appended."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    end = next((place for place, token in enumerate(ids) if token in end_ids), None)
    return ids + [tokenizer.eos_token_id] if end is None else ids[:end + 1]


def collate(prompts, responses, device="cpu"):
    """Lists of prompt and response ids -> input_ids, attention_mask, response_mask, each (B, T), padded on
    the right. Masks come from lengths, so the padding id (0) means nothing and may equal any real token."""
    def pad(rows):
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)

    return (pad([prompt + response for prompt, response in zip(prompts, responses)]),
            pad([[1] * (len(prompt) + len(response)) for prompt, response in zip(prompts, responses)]),
            pad([[0] * len(prompt) + [1] * len(response) for prompt, response in zip(prompts, responses)]))


def main():
    """`python data.py SOURCE [--model M]`."""
    parser = Parser("Show what a preference data set holds and how it will be read.", " SOURCE")
    parser.add_argument("source", metavar="SOURCE", help="a file or OWNER/NAME[/CONFIG][:SPLIT]")
    parser.add_argument("--model", help="a directory or hub name: count and render in its tokens")
    parser.shared("--prefer", "--limit", "--max-prompt-length", "--max-response-length")
    args = parser.parse_args()
    pairs, report = load_pairs(args.source, args.limit, args.prefer)
    print(f"{args.source}: {report['format']}; {report['rows']} rows, {len(pairs)} kept, dropped: "
          f"{counted(report['dropped'])}")
    sides, unit, show = [side for side in ("prompt", *SIDES) if pairs[0][side]], "characters", str
    rows = [[render(pair["prompt"], pair[side] if side in SIDES else "")[side in SIDES] for side in sides]
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
        print(f"{side:>9}: {unit} min {lengths[0]}, median {lengths[len(lengths) // 2]}, max {lengths[-1]}")
    for nth, row in enumerate(rows[:2], 1):
        print(f"--- {nth}", *(f"{side + ':':10}{show(text)!r}" for side, text in zip(sides, row)), sep="\n")


if __name__ == "__main__":
    command_line(main)
