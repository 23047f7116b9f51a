"""Preference data: read it by its columns, render it, turn it into token ids and explicit masks.

    python data.py SOURCE                what was detected, kept and dropped, how long it is, two rows
    python data.py SOURCE --model M      the same in M's tokens and chat template

SOURCE is a .jsonl, .json, .csv or .parquet file, or a hub name written OWNER/NAME[/CONFIG][:SPLIT].

Rows of prompts alone do for fully online runs, rows of dialogues for sft. How a pair becomes text:
  - the tokenizer has a chat template: the template renders it (a string counts as one user message);
  - it has none: strings stay as they are; messages become "\\n\\nHuman: …\\n\\nAssistant:", as in hh-rlhf.
"""
import ast
import csv
import io
import json
import math
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

try:
    import torch
    from torch.nn.utils.rnn import pad_sequence
except ImportError as missing:
    sys.exit(f"{Path(sys.argv[0]).name}: error: {missing}: pip install -r requirements.txt, or run ./run.sh")

from runtime.command_line import InputError, Parser, command_line, first_line, format_counts, time_limit
from runtime.run_directory import DATA_FILES

SIDES = ("chosen", "rejected")


@dataclass
class Pair:
    """A pair of responses to one prompt, from the file to the loss."""
    # of the data, or, where the policy responds, of `generate.roll_out` and `reward.label_by_reward`
    prompt: str | list                       # a text, or messages {role, content}
    chosen: str | None                       # the preferred response; None if the data lacks it
    rejected: str | None
    # of `encode`; the responses' ids end with an end token, unless they were cut
    prompt_ids: list = field(default_factory=list)
    chosen_ids: list = field(default_factory=list)
    rejected_ids: list = field(default_factory=list)
    # of `sail.draw_pairs`
    on_policy: bool = False                  # both responses are sampled from the policy: T2
    self_labelled: bool = False              # the policy labels the pair: T3
    label_draw: float = 0.0                  # uniform in [0, 1): draws the label if it is not summed out
    # of `generate.roll_out`
    samples: int = 0                         # how many of the two responses were sampled
    sampled_tokens: int = 0                  # their length
    unfinished: int = 0                      # how many of them have no end token
    # of `reward.label_by_reward`
    preference: float = 1.0                  # P(chosen ≻ rejected)
    rewards: tuple = ()                      # of chosen, of rejected


class BadRow(ValueError):
    """One row that cannot be used: its text is the reason under which it is counted."""


# --- messages -----------------------------------------------------------------------------------------------

NO_TEXT, TIE = "null or malformed text", "no preference between the responses"
ROLES = {"user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
         "bot": "assistant", "ai": "assistant",
         "system": "system", "developer": "system"}
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")         # a system turn beside the prompt
# What a row or a message may carry beside its text, and no format here can render.
NOT_RENDERED = ("tools", "functions", "tool_calls", "function_call", "tool_call_id", "reasoning_content",
                "reasoning", "thinking", "images", "image", "audio", "audios", "video", "videos", "documents")


def as_messages(turns):
    """A dialogue as role/content or from/value turns, plain, in typed parts, or as JSON in a string ->
    [{role, content}], the roles system, user and assistant. Raises BadRow for what could not be rendered
    whole."""
    turns = unquoted(turns)
    if isinstance(turns, dict):
        turns = [turns]
    messages = []
    for turn in turns:
        refuse_unread(turn, "message")
        role = turn.get("role") or turn.get("from")
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            content = joined_parts(content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRow(NO_TEXT)
        if role.strip().lower() not in ROLES:
            raise BadRow(f"message of the role {role[:20]!r}")
        messages.append({"role": ROLES[role.strip().lower()], "content": content})
    return messages


def joined_parts(parts):
    """The text of a message in typed parts, [{type: "text", text or value}]."""
    texts = []
    for part in parts:
        if part["type"] != "text":
            raise BadRow("message part that is not text")
        texts.append(part.get("text") or part["value"])
    return "".join(texts)


def unquoted(value):
    """A list or a dict that stands in a string, as .csv files hold it: JSON, or as Python prints it. Raises
    BadRow for another string."""
    if not isinstance(value, str):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, (list, dict)):
            return found
    raise BadRow("a dialogue in a string that is no JSON")


def text_or_messages(value):
    """A column that holds a text, or messages: these as a list. A string is taken for messages in JSON only
    where all of it says so."""
    if isinstance(value, (list, dict)):
        return as_messages(value)
    if isinstance(value, str) and re.match(r"\s*(\[\s*)?\{\s*['\"](role|content|from|value)['\"]\s*:", value):
        return as_messages(value)
    return value


def refuse_unread(record, what):
    """Raises BadRow for a row, or a message, that holds more than can be rendered."""
    for name in NOT_RENDERED:
        if record.get(name) not in (None, "", "[]", [], {}):
            raise BadRow(f"{what} with {name}")


def without_system(messages):
    """The messages after a system turn."""
    if messages and messages[0]["role"] == "system":
        return messages[1:]
    return messages


def split_dialogue(dialogue):
    """A whole dialogue, as messages or as an hh-rlhf string -> (prompt messages, last response)."""
    dialogue = text_or_messages(dialogue)
    if isinstance(dialogue, str):
        return split_hh_dialogue(dialogue)
    if dialogue[-1]["role"] != "assistant":
        raise BadRow("last message is not the assistant's")
    return dialogue[:-1], dialogue[-1]["content"]


def split_hh_dialogue(text):
    """`split_dialogue` of a string as in hh-rlhf; the prompt goes up to the last Assistant."""
    prompt, _, response = text.rpartition("\n\nAssistant:")
    start, *turns = re.split(r"\n\n(Human|Assistant):", prompt)       # speaker, text, speaker, text, …
    if start.strip() or not turns:
        raise BadRow("not a '\\n\\nHuman: … \\n\\nAssistant: …' dialogue")
    messages = []
    for speaker, said in zip(turns[::2], turns[1::2]):
        messages.append({"role": ROLES[speaker.lower()], "content": said.strip()})
    return messages, response


def joined_prompt(prompt, before):
    """The prompt of a row whose responses come with turns in front: these repeat it, or go on from it."""
    turns = without_system(prompt)
    if without_system(before)[:len(turns)] != turns:
        return prompt + before
    system = prompt[:len(prompt) - len(turns)]
    if not system:
        return before
    if without_system(before) != before and before[:1] != system:
        raise BadRow("two system turns")
    return system + without_system(before)


# --- formats: told apart by their columns; a function of a row gives (prompt, chosen, rejected) -------------

def from_sharegpt(row):
    """A dialogue so far, and two last turns."""
    prompt = as_messages(row["conversations"])
    _, chosen = split_dialogue(as_messages(row["chosen"]))
    _, rejected = split_dialogue(as_messages(row["rejected"]))
    return prompt, chosen, rejected


def from_prompt(row):
    """A prompt and responses, as strings or messages; the latter come with or without the prompt in front."""
    prompt = text_or_messages(row["prompt"])
    chosen = text_or_messages(row["chosen"])
    rejected = text_or_messages(row["rejected"])
    if isinstance(chosen, list) and isinstance(rejected, list):
        before, chosen, rejected = from_dialogues(chosen, rejected)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if before:
            prompt = joined_prompt(prompt, before)
    return prompt, chosen, rejected


def from_question(row):
    """As `from_prompt`, the prompt in `question`."""
    return from_prompt({**row, "prompt": row["question"]})


def from_instruction(row):
    """As `from_prompt`, the prompt in `instruction` and `input`, as in Alpaca."""
    prompt = row["instruction"]
    if row.get("input"):
        prompt += "\n" + row["input"]
    return from_prompt({**row, "prompt": prompt})


def from_dialogues(chosen, rejected):
    """Two whole dialogues, which must share their prompt."""
    prompt, chosen = split_dialogue(chosen)
    other, rejected = split_dialogue(rejected)
    if prompt != other:
        raise BadRow("chosen and rejected have different prompts")
    return prompt, chosen, rejected


def from_two_dialogues(row):
    """Two whole dialogues, as messages or as hh-rlhf strings."""
    return from_dialogues(row["chosen"], row["rejected"])


def from_two_message_lists(row):
    """Two whole dialogues as messages, in columns of that name."""
    return from_dialogues(as_messages(row["chosen_messages"]), as_messages(row["rejected_messages"]))


def from_pku(row, prefer="better"):
    """PKU-SafeRLHF (arXiv 2406.15513), whose labels are the number of a response."""
    preferred = float(row[f"{prefer}_response_id"])
    return best_and_worst(row["prompt"], [(preferred == 0, row["response_0"]),
                                          (preferred == 1, row["response_1"])])


def from_pku_safer(row):
    """The same with the label of the safer response."""
    return from_pku(row, "safer")


def from_ultrafeedback(row):
    """UltraFeedback (arXiv 2310.01377): the best and the worst of four by their overall score."""
    scored = []
    for completion in unquoted(row["completions"]):
        scored.append((completion["overall_score"], completion["response"]))
    return best_and_worst(row["instruction"], scored)


def from_summaries(row):
    """As in arXiv 2009.01325; articles stand where posts do."""
    info, choice = unquoted(row["info"]), float(row["choice"])
    post = info.get("post") or info["article"]
    prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {post}\n\nTL;DR:"
    scored = []
    for place, summary in enumerate(unquoted(row["summaries"])):
        scored.append((choice == place, summary["text"]))
    return best_and_worst(prompt, scored)


def from_webgpt(row):
    """webgpt_comparisons (arXiv 2112.09332): two answers and their scores."""
    prompt = unquoted(row["question"])["full_text"]
    return best_and_worst(prompt, [(row["score_0"], row["answer_0"]), (row["score_1"], row["answer_1"])])


def from_dialogue(row):
    """A dialogue, whose last turn is the response; there is no rejected one."""
    return split_dialogue(as_messages(row["messages"]))


def from_prompt_alone(row):
    """A prompt without responses."""
    return text_or_messages(row["prompt"]),


def best_and_worst(prompt, scored):
    """(prompt, best, worst) of (score, response)s; those without a score do not count."""
    ranked = []
    for score, text in scored:
        if score is not None:
            ranked.append((float(score), text))
            if not math.isfinite(ranked[-1][0]):
                raise BadRow(TIE)
    ranked.sort(key=lambda one: one[0])
    if not ranked or ranked[0][0] == ranked[-1][0]:
        raise BadRow(TIE)
    return prompt, ranked[-1][1], ranked[0][1]


FORMATS = [  # name, the columns that identify it, and its function; the first that fits is taken
    ("ShareGPT", "conversations chosen rejected", from_sharegpt),
    ("prompt, chosen, rejected", "prompt chosen rejected", from_prompt),
    ("question, chosen, rejected", "question chosen rejected", from_question),
    ("instruction, chosen, rejected", "instruction chosen rejected", from_instruction),
    ("whole dialogues", "chosen rejected", from_two_dialogues),
    ("whole dialogues as messages", "chosen_messages rejected_messages", from_two_message_lists),
    ("PKU-SafeRLHF", "prompt response_0 response_1 better_response_id safer_response_id", from_pku),
    ("UltraFeedback", "instruction completions", from_ultrafeedback),
    ("summarize_from_feedback", "info summaries choice", from_summaries),
    ("webgpt_comparisons", "question answer_0 answer_1 score_0 score_1", from_webgpt),
    ("dialogues", "messages", from_dialogue),
    ("prompts", "prompt", from_prompt_alone),
]
OPTIONAL_COLUMNS = (*SYSTEM_COLUMNS, "history", "input", *NOT_RENDERED)


def with_turns_before(prompt, row):
    """The prompt with the row's `history` and `system` columns in front."""
    history, systems = row.get("history"), [row[name] for name in SYSTEM_COLUMNS if row.get(name)]
    if history in (None, "", "[]", []) and not systems:
        return prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if history not in (None, "", "[]", []):
        prompt = history_messages(unquoted(history)) + prompt
    for text in systems:
        if not isinstance(text, str):
            raise BadRow(NO_TEXT)
        system = [{"role": "system", "content": text}]
        if prompt[:1] != system and without_system(prompt) != prompt:
            raise BadRow("two system turns")
        prompt = system + without_system(prompt)
    return prompt


def history_messages(history):
    """Turns as messages, or as [question, answer] -> messages."""
    messages = []
    for turn in history:
        if not isinstance(turn, dict):
            question, answer = turn
            messages += as_messages([{"role": "user", "content": question}])
            turn = {"role": "assistant", "content": answer}
        messages += as_messages([turn])
    return messages


# --- loading ------------------------------------------------------------------------------------------------

def read_rows(source):
    """The raw rows of `source`, a list of dicts or a datasets.Dataset. Raises InputError if it cannot be
    read."""
    path = Path(source)
    if path.suffix in DATA_FILES and not path.is_file():
        raise InputError(f"{source}: no such file")
    if path.suffix in (".jsonl", ".json", ".csv"):
        return read_text(path)
    if path.is_file():
        return read_parquet(path)
    import datasets                              # slow to import, and needed for nothing else
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)    # its errors are told below, in one line
    try:
        name, _, split = str(source).partition(":")
        if path.exists():                        # its files may have been replaced since they were cached
            return datasets.load_dataset(str(source), split="train", download_mode="force_redownload")
        name, *config = (name,) if name.count("/") < 2 else name.rsplit("/", 1)
        return datasets.load_dataset(name or "(no name)", *config, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{source}: cannot be read as a data set ({first_line(error.__cause__ or error)}); "
                         "want a .jsonl, .json, .csv, .parquet file or OWNER/NAME[/CONFIG][:SPLIT]") from None


def read_parquet(path):
    """The rows of a .parquet file, of those columns that a format may need: what an unused one names, a path
    or an address, is not opened."""
    import pyarrow
    import pyarrow.parquet
    known = {*OPTIONAL_COLUMNS, *" ".join(columns for _, columns, _ in FORMATS).split()}
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        unread = dict.fromkeys(name for name in names if name not in known)            # to be named, not read
        rows = file.read([name for name in names if name in known]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: cannot be read as a data set ({first_line(error)}); want a .jsonl, .json, "
                         ".csv, .parquet file or OWNER/NAME[/CONFIG][:SPLIT]") from None
    return [unread | row for row in rows]


def read_text(path):
    """The rows of a .csv file, or of one with a JSON object on each line, or an array of them."""
    rows, nth = [], 1
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            csv.field_size_limit(2**31 - 1)                 # a long text is no error
            return list(csv.DictReader(io.StringIO(text, newline=""), restkey=TOO_MANY_CELLS))
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            for nth, line in enumerate(text.split("\n"), 1):      # not splitlines: U+2028 may be text
                if line.strip():
                    rows.append(json.loads(line))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None
    except (ValueError, RecursionError, csv.Error) as error:
        line = nth + getattr(error, "lineno", 1) - 1
        raise InputError(f"{path}:{line}: not {path.suffix[1:]} ({first_line(error)}); "
                         "want an object per line, or an array of objects") from None
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: a row is not an object with columns")
    return rows


TOO_MANY_CELLS = "row with more cells than the header"     # the column in which csv puts those beyond it


def load_pairs(source, limit=None, prefer="better"):
    """Preference pairs from `source` (see the top of this file): ([Pair], report).

    limit: keep at most so many. prefer: "better" or "safer", for PKU-SafeRLHF. report: a dict {format, rows,
    dropped, altered, unread}: rows that were dropped and pairs that were altered, by reason, and the columns
    that nothing reads. Raises InputError if nothing can be used."""
    rows = read_rows(source)
    if len(rows) == 0:
        raise InputError(f"{source}: empty, no rows")
    if isinstance(rows, list):
        columns = set().union(*rows[:100])
    else:
        columns = set(rows.column_names)
    name, needed, convert = format_of(columns, source)
    if convert is from_pku and prefer == "safer":
        convert = from_pku_safer
    readable = {*needed, *OPTIONAL_COLUMNS}
    pairs, dropped = [], Counter()
    for row in undecoded(rows, columns & readable):
        if len(pairs) == limit:
            break
        try:
            pairs.append(pair_of(row, convert))
        except BadRow as reason:
            dropped[str(reason)] += 1
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError):
            dropped[NO_TEXT] += 1
    if not pairs:
        raise InputError(f"{source}: no usable pair in {len(rows)} rows ({format_counts(dropped)})")
    return pairs, {"format": name, "rows": len(pairs) + sum(dropped.values()), "dropped": dropped,
                   "altered": take_out_repeated_prompts(pairs),
                   "unread": sorted(columns - readable - {TOO_MANY_CELLS})}


def undecoded(rows, columns):
    """The rows of a list, or, of these columns, of a datasets.Dataset: as they are stored, since to decode a
    picture can be to open a path or an address."""
    if isinstance(rows, list):
        yield from rows
        return
    for table in rows.select_columns(sorted(columns)).with_format("arrow").iter(1000):
        yield from table.to_pylist()


def pair_of(row, convert):
    """The Pair in a row of the format that `convert` reads. Raises BadRow, or, if the row has another form,
    what Python does."""
    if TOO_MANY_CELLS in row:
        raise BadRow(TOO_MANY_CELLS)
    refuse_unread(row, "row")
    prompt, *responses = convert(row)
    prompt = with_turns_before(prompt, row)
    json.dumps([prompt, responses], ensure_ascii=False).encode()            # half a surrogate pair is no text
    for response in responses:
        if not isinstance(response, str):
            raise BadRow(NO_TEXT)
        if not response.strip():
            raise BadRow("empty response")
    last = prompt
    if isinstance(prompt, list) and prompt:
        last = prompt[-1]["content"]
    if not isinstance(prompt, (str, list)):
        raise BadRow(NO_TEXT)
    if not prompt or not last.strip():
        raise BadRow("empty prompt")
    chosen, rejected = (*responses, None, None)[:2]
    if rejected is not None and chosen.strip() == rejected.strip():
        raise BadRow("chosen equals rejected")
    return Pair(prompt, chosen, rejected)


def format_of(columns, source):
    """(name, columns, function) of the first of FORMATS whose columns are all there."""
    for name, needed, convert in FORMATS:
        if columns.issuperset(needed.split()):
            return name, needed.split(), convert
    known = "; ".join(needed.replace(" ", ", ") for _, needed, _ in FORMATS)
    raise InputError(f"{source}: columns {', '.join(sorted(columns))} fit none of: {known}")


def take_out_repeated_prompts(pairs):
    """If most pairs' responses begin with their whole prompt, as strings, take it out of them, in place.
    Returns how many were altered, by reason."""
    repeating = [pair for pair in pairs if repeats_its_prompt(pair)]
    if not repeating or 2 * len(repeating) < len(pairs):
        return Counter()
    for pair in repeating:
        pair.chosen = pair.chosen.removeprefix(pair.prompt)
        if pair.rejected is not None:
            pair.rejected = pair.rejected.removeprefix(pair.prompt)
    return Counter({"prompts repeated in their responses, taken out": len(repeating)})


def repeats_its_prompt(pair):
    """Whether the prompt, as a string, stands before something more in each response."""
    if not isinstance(pair.prompt, str) or pair.chosen is None:
        return False
    for response in (pair.chosen, pair.rejected):
        if response is not None and not response.removeprefix(pair.prompt).strip():
            return False
        if response is not None and not response.startswith(pair.prompt):
            return False
    return True


def split_held_out(pairs):
    """(training pairs, held-out pairs): those of one prompt in twenty are held out, told by the prompt's
    CRC-32, so that no prompt is on both sides, in whatever order the pairs come."""
    train, held_out = [], []
    for pair in pairs:
        if zlib.crc32(json.dumps(pair.prompt).encode()) % 20 == 0:
            held_out.append(pair)
        else:
            train.append(pair)
    return train, held_out


def train_and_held_out(data, eval_data=None, limit=None, prefer="better"):
    """(training pairs, held-out pairs, report of `data`, report of `eval_data` or None), the same for every
    script: held out are the pairs of `eval_data`, or some of `data`'s."""
    pairs, report = load_pairs(data, limit, prefer)
    if eval_data:
        held_out, held_out_report = load_pairs(eval_data, None, prefer)
        return pairs, held_out, report, held_out_report
    train, held_out = split_held_out(pairs)
    if not train:
        raise InputError(f"{data}: all {len(pairs)} pairs are held out; give more, or name others with "
                         "--eval-data")
    return train, held_out, report, None


# --- text to tokens -----------------------------------------------------------------------------------------

def load_tokenizer(name, trust_remote_code=False, ends=True, date=None):
    """The tokenizer of a directory or hub name. date: what a chat template that asks for today is told, as
    YYYY-MM-DD; None: today. Raises InputError if there is none, or it has no EOS."""
    from transformers import AutoTokenizer
    if Path(name, "adapter_config.json").is_file():
        raise InputError(f"{name} is an adapter; merge it into its base first, as OUT/model of sail.py is")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code,
                                                  local_files_only=Path(name).is_dir())
    except Exception as error:                           # foreign files: they can raise anything
        raise InputError(f"{name}: no tokenizer ({first_line(error)}); of a run, name its model/") from None
    if ends and tokenizer.eos_token_id is None:
        raise InputError(f"{name}: its tokenizer has no end-of-sequence token; tokenizer_config.json sets it")
    tokenizer.template_date = date
    return tokenizer


def end_token_ids(tokenizer, model=None):
    """The ids that end a response: the tokenizer's EOS, the special token with which the chat template closes
    an answer, and those of generation_config that are special: a config's default id may be any word."""
    special, ids = tokenizer.added_tokens_decoder, {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        try:
            closing = Dialogue("question", tokenizer).closing
            tokens = tokenizer(closing, add_special_tokens=False)["input_ids"]
            ids.update([token for token in tokens if token in special and special[token].special][:1])
        except BadRow:
            pass                                         # a template that refuses this dialogue tells nothing
    extra = model.generation_config.eos_token_id if model is not None else None
    return ids | {token for token in (extra if isinstance(extra, list) else [extra]) if token in special}


def without_clock(template, day):
    """A chat template that asks for today's date, and is told `day` (YYYY-MM-DD) instead, if there is one."""
    if day is None:
        return template

    def that_day(call):
        return repr(date.fromisoformat(day).strftime(call[2]))

    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", that_day, template)


def apply_template(tokenizer, messages, **options):
    """The text that a tokenizer's chat template makes of messages. Raises BadRow where it refuses them."""
    template = without_clock(tokenizer.get_chat_template(), getattr(tokenizer, "template_date", None))
    try:
        with time_limit(20, f"{tokenizer.name_or_path}: its chat template does not end"):
            return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options)
    except InputError:
        raise
    except Exception as error:                           # a template is foreign code: it can raise anything
        raise BadRow(f"refused by the chat template: {first_line(error)[:80]}") from None


class Dialogue:
    """A prompt as text, and what the chat template puts around its answer.

    head: the text of the prompt, up to where a response begins, as the policy is given it for sampling.
    filler: what the template itself writes before an answer, as an empty block of thoughts; mostly "".
    closing: what it writes after an answer. Both are found once, with an answer that occurs in no text.
    A prompt that ends in an assistant's message is an answer that was started, and is continued."""

    def __init__(self, prompt, tokenizer=None):
        self.tokenizer, self.template = tokenizer, tokenizer is not None and bool(tokenizer.chat_template)
        self.messages, self.filler, self.closing = prompt, "", ""
        if not self.template:
            self.head = prompt if isinstance(prompt, str) else plain_dialogue(prompt)
            return
        if isinstance(prompt, str):
            self.messages = [{"role": "user", "content": prompt}]
        marker = "xANSWERx"
        while marker in str(self.messages):
            marker += "x"
        opening, found, self.closing = self.answered_by(marker).partition(marker)
        if not found:
            raise BadRow("the chat template leaves the answer out")
        self.head = opening
        if not self.started:
            self.head = apply_template(tokenizer, self.messages, add_generation_prompt=True)
            if self.head == apply_template(tokenizer, self.messages):  # it knows no generation prompt
                self.head = opening.rstrip(" ")                        # a space belongs to the next word
        if not opening.startswith(self.head):
            raise BadRow("the chat template's generation prompt does not begin an answered dialogue")
        self.filler = opening[len(self.head):]

    @property
    def started(self):
        return not isinstance(self.messages, str) and self.messages[-1]["role"] == "assistant"

    def answered_by(self, answer):
        """The template's text of the dialogue with this answer."""
        messages = list(self.messages)
        if self.started:
            answer = messages.pop()["content"] + answer
        return apply_template(self.tokenizer, messages + [{"role": "assistant", "content": answer}])

    def tail(self, response):
        """The text that follows `head`: the response, with what the template writes around it. Raises BadRow
        where the template makes another text of the response."""
        if not self.template:
            between = isinstance(self.messages, list) and not self.started
            return " " + response.strip() if between else response
        answer = response.rstrip() if self.started else response.strip()
        whole = self.answered_by(answer)
        for filler in (self.filler, ""):                 # none where the answer brings its own
            if whole == self.head + filler + answer + self.closing:
                return filler + answer + self.closing
        raise BadRow("the chat template rewrites the answer")


def plain_dialogue(messages):
    """The text of a prompt of messages for a tokenizer without a chat template, as in hh-rlhf."""
    names, text = {"user": "Human", "assistant": "Assistant", "system": "System"}, ""
    for turn in messages:
        text += f"\n\n{names[turn['role']]}: {turn['content']}"
    if messages[-1]["role"] != "assistant":
        text += "\n\nAssistant:"
    return text


def render(prompt, response, tokenizer=None):
    """(prompt text, response text) whose concatenation is the whole dialogue; raises BadRow."""
    dialogue = Dialogue(prompt, tokenizer)
    return dialogue.head, dialogue.tail(response)


def token_ids(text, tokenizer):
    """The ids of a text that begins with its prompt. A chat template writes BOS itself; some tokenizers end
    every text."""
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and not tokenizer.chat_template:
        return ids[:-1]
    return ids


def fitting_prompt(prompt, tokenizer, limit, lengths=None):
    """(Dialogue, its ids, those that are left within `limit`); the whole prompt's length goes to `lengths`.

    A text without turns is cut from the left, but for a BOS token. A dialogue loses whole turns, the oldest
    first, never its system turn, and begins with a user's. Raises BadRow where what is left is too long."""
    dialogue = Dialogue(prompt, tokenizer)
    ids = token_ids(dialogue.head, tokenizer)
    if not ids:
        raise BadRow("prompt without tokens")
    if lengths is not None:
        lengths["prompt"].append(len(ids))
    if len(ids) <= limit:
        return dialogue, ids, ids
    if isinstance(dialogue.messages, str):
        bos = ids[:1] if limit > 1 and ids[0] == tokenizer.bos_token_id else []
        return dialogue, ids, bos + ids[len(ids) - limit + len(bos):]
    turns = without_system(dialogue.messages)
    system = dialogue.messages[:len(dialogue.messages) - len(turns)]
    for first in range(1, len(turns)):
        if turns[first]["role"] == "user":
            shorter = Dialogue(system + turns[first:], tokenizer)
            ids = token_ids(shorter.head, tokenizer)
            if len(ids) <= limit:
                return shorter, ids, ids
    raise BadRow("prompt longer than --max-prompt-length")


def encode(pairs, tokenizer, end_ids, max_prompt_length, max_response_length, rows=math.inf, limit=None):
    """(copies of the pairs with their ids, counts, lengths).

    Both responses follow the same prompt ids; one that the data lacks has no ids. One longer than
    max_response_length is cut from the right, and then has no end token. counts: what was cut, pairs with an
    end token in their text, which cuts them, and rows dropped. lengths: {side: tokens before cutting, of each
    row that could be rendered}. limit: stop after so many. Raises InputError if the model, of `rows` ids,
    lacks one that occurs."""
    encoded, counts = [], Counter(dropped=0)
    lengths = {"prompt": [], "chosen": [], "rejected": []}
    for pair in pairs:
        if len(encoded) == limit:
            break
        try:
            done, changes = encode_pair(pair, tokenizer, end_ids, max_prompt_length, max_response_length,
                                        lengths)
        except BadRow as reason:
            counts.update({"dropped": 1, str(reason): 1})
            continue
        highest = max(done.prompt_ids + done.chosen_ids + done.rejected_ids)
        if highest >= rows:
            token = tokenizer.convert_ids_to_tokens(highest)
            raise InputError(f"the data hold {token!r}, id {highest}, and the model has only {rows} ids; "
                             "wrong tokenizer?")
        counts.update(changes)
        encoded.append(done)
    if not encoded:
        raise InputError(f"none of {len(pairs)} pairs has anything to learn as tokens: "
                         f"{format_counts(+counts)}")
    return encoded, counts, lengths


def encode_pair(pair, tokenizer, end_ids, max_prompt_length, max_response_length, lengths):
    """(a copy of the pair with its ids, what was changed, by reason) of `encode`, which adds to `lengths`."""
    dialogue, uncut, prompt_ids = fitting_prompt(pair.prompt, tokenizer, max_prompt_length, lengths)
    changes = Counter(truncated_prompts=lengths["prompt"][-1] > len(prompt_ids), truncated_responses=0,
                      end_token_in_text=0, prompt_merges_with_response=0)
    ends = tokenizer.convert_ids_to_tokens(sorted(end_ids))
    ids_of = {"chosen": [], "rejected": []}
    for side in SIDES:
        response = getattr(pair, side)
        if response is None:
            continue
        text = dialogue.tail(response)
        whole = token_ids(dialogue.head + text, tokenizer)
        if whole[:len(uncut)] == uncut:
            ids = whole[len(uncut):]
        else:                                            # a token would reach over the boundary
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            changes["prompt_merges_with_response"] += 1
        ids = up_to_end(ids, tokenizer.eos_token_id, end_ids)
        lengths[side].append(len(ids))
        ids_of[side] = ids[:max_response_length]
        changes["truncated_responses"] += len(ids) > max_response_length
        changes["end_token_in_text"] |= any(end in response for end in ends)
    if ids_of["chosen"] and ids_of["chosen"] == ids_of["rejected"]:
        raise BadRow("same tokens in both responses")
    encoded = replace(pair, prompt_ids=prompt_ids, chosen_ids=ids_of["chosen"],
                      rejected_ids=ids_of["rejected"])
    return encoded, changes


def up_to_end(ids, eos_id, end_ids):
    """A response's ids with one end token: the first of `end_ids` in it, or the EOS appended."""
    for place, token in enumerate(ids):
        if token in end_ids:
            return ids[:place + 1]
    return ids + [eos_id]


def response_text(tokenizer, ids, prompt_ids=()):
    """What a reward, a judge and a reader see of a response: its text without the end token and outer white
    space. A tokenizer that comes with a `response_template`, for models which write in channels, says what of
    it is the answer. Without one, or if the response has not that form, special tokens inside it stay."""
    if ids and getattr(tokenizer, "response_template", None):
        try:
            message = tokenizer.parse_response(list(ids), prefix=list(prompt_ids))
            return (message.get("content") or "").strip()
        except ValueError:
            pass                                         # shown as it was written
    if ids and ids[-1] in tokenizer.all_special_ids:
        ids = ids[:-1]
    return tokenizer.decode(ids).strip()


def collate(prompts, responses, device="cpu"):
    """Lists of prompt and response ids -> input_ids, attention_mask, response_mask, each (B, T), padded on
    the right. Masks come from lengths, so the padding id (0) means nothing and may equal any real token."""
    input_ids, attention_mask, response_mask = [], [], []
    for prompt, response in zip(prompts, responses):
        ids = torch.tensor(prompt + response)
        in_response = torch.zeros_like(ids)
        in_response[len(prompt):] = 1
        input_ids.append(ids)
        attention_mask.append(torch.ones_like(ids))
        response_mask.append(in_response)
    padded = []
    for rows in (input_ids, attention_mask, response_mask):
        rows = pad_sequence(rows, batch_first=True)                                # (B, T)
        padded.append(rows.to(device))
    return tuple(padded)


# --- the command line ---------------------------------------------------------------------------------------

def length_table(lengths, unit, limits=None):
    """Lines that show how long prompts and responses are, and how many of them a limit cuts or drops."""
    lines = []
    for side, numbers in lengths.items():
        if not numbers:
            continue
        ordered = sorted(numbers)
        n = len(ordered)
        median = ordered[n // 2]
        most = ordered[n * 9 // 10]
        line = f"{side:>9}: {unit} median {median}, 90 % {most}, most {ordered[-1]}"
        if limits:
            over = sum(number > limits[side] for number in numbers)
            line += f"; {over} of {len(numbers)} longer than {limits[side]}"
        lines.append(line)
    return "\n".join(lines)


def print_report(source, pairs, report):
    """What `load_pairs` has found."""
    print(f"{source}: {report['format']}; {report['rows']} rows, {len(pairs)} kept, dropped: "
          f"{format_counts(report['dropped'])}")
    if report["altered"]:
        print(f"altered: {format_counts(report['altered'])}")
    if report["unread"]:
        print(f"columns that nothing reads: {', '.join(report['unread'])}")


def print_as_tokens(pairs, tokenizer, limits):
    """What `encode` makes of the pairs; two of them as the model sees them."""
    encoded, counts, lengths = encode(pairs, tokenizer, end_token_ids(tokenizer), *limits)
    print(f"{len(encoded)} encoded; {format_counts(+counts)}")
    prompt_limit, response_limit = limits
    limit_of = dict(prompt=prompt_limit, chosen=response_limit, rejected=response_limit)
    print(length_table(lengths, "tokens", limit_of))
    for nth, pair in enumerate(encoded[:2], 1):
        prompt = tokenizer.decode(pair.prompt_ids)
        chosen = tokenizer.decode(pair.chosen_ids)
        rejected = tokenizer.decode(pair.rejected_ids)
        print_pair(nth, prompt, chosen, rejected)


def print_as_text(pairs):
    """How long the pairs' texts are; two of them, rendered without a chat template."""
    lengths = {"prompt": [], "chosen": [], "rejected": []}
    for nth, pair in enumerate(pairs, 1):
        dialogue = Dialogue(pair.prompt)
        lengths["prompt"].append(len(dialogue.head))
        texts = {"chosen": "", "rejected": ""}
        for side in SIDES:
            if getattr(pair, side) is not None:
                texts[side] = dialogue.tail(getattr(pair, side))
                lengths[side].append(len(texts[side]))
        if nth <= 2:
            print_pair(nth, dialogue.head, texts["chosen"], texts["rejected"])
    print(length_table(lengths, "characters"))


def print_pair(nth, prompt, chosen, rejected):
    """A pair's texts, each on a line; without the responses that the data lacks."""
    print(f"--- {nth}\nprompt:   {prompt!r}")
    if chosen:
        print(f"chosen:   {chosen!r}")
    if rejected:
        print(f"rejected: {rejected!r}")


def main():
    """`python data.py SOURCE [--model M]`."""
    parser = Parser("Show what a preference data set holds and how it will be read.", " SOURCE")
    parser.add_argument("source", metavar="SOURCE", help="a file or OWNER/NAME[/CONFIG][:SPLIT]")
    parser.add_argument("--model", help="a directory or hub name: count and render in its tokens")
    parser.shared("--prefer", "--limit", "--max-prompt-length", "--max-response-length", "--date")
    args = parser.parse_args()
    pairs, report = load_pairs(args.source, args.limit, args.prefer)
    print_report(args.source, pairs, report)
    if args.model:
        limits = args.max_prompt_length or 512, args.max_response_length or 512
        print_as_tokens(pairs, load_tokenizer(args.model, date=args.date), limits)
    else:
        print_as_text(pairs)


if __name__ == "__main__":
    command_line(main)
