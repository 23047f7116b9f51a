"""A file becomes pairs of texts: FORMATS declares each format once, `load_pairs` reads the rows.

A source is a .jsonl, .json or .csv file, which may be compressed as .gz, a .parquet file, a directory that
the library datasets can load, or a hub name written OWNER/NAME[/CONFIG][:SPLIT]. Its columns determine the
format. A fully online run needs only prompts, and sft needs only dialogues.
"""
import ast
import csv
import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import getfullargspec
from pathlib import Path
from typing import Callable

from runtime.command_line import DATA_FILES, InputError, first_line, foreign, format_counts
from runtime.run_directory import is_run_directory, parse_json, run_that_held_out
from runtime.settings import Settings, read_settings


@dataclass
class TextPair:
    """A prompt with two responses, with one, or with none, as a file contains them."""
    prompt: str | list                       # a text, or messages {role, content}
    chosen: str | None = None                # the preferred response; None if the data lacks it
    rejected: str | None = None
    preference: float = 1.0                  # P(chosen ≻ rejected); less than 1 for a soft label
    finished: tuple = (True, True)           # for chosen and rejected: False if it was cut before its end


@dataclass
class Account:
    """What happened to a source's rows before they are trained, measured or answered. The functions that turn
    rows into pairs or tokens return the Account of what they did, and the commands print the sum."""
    format: str = ""
    rows: int = 0                                            # how many rows were read
    dropped: Counter = field(default_factory=Counter)        # counts of dropped rows, by the reason
    cut: Counter = field(default_factory=Counter)            # counts of what was cut, by the reason
    altered: Counter = field(default_factory=Counter)        # counts of what was changed or looks faulty
    unread: Counter = field(default_factory=Counter)     # counts of kept rows, by the name of an unread value

    def add(self, other):
        """Add the counts of another Account of the same source."""
        self.dropped += other.dropped
        self.cut += other.cut
        self.altered += other.altered
        self.unread += other.unread

    def counts(self):
        """The four counts as {name: {what: how often}}, for JSON."""
        return {name: dict(getattr(self, name)) for name in ("dropped", "cut", "altered", "unread")}

    def __str__(self):
        """A line for each kind of count that is not empty, or one that says that all are empty."""
        lines = []
        if self.dropped:
            lines.append(f"  dropped: {self.dropped.total()} ({format_counts(self.dropped)})")
        if self.cut:
            lines.append(f"      cut: {format_counts(self.cut)}")
        if self.altered:
            lines.append(f"  altered: {format_counts(self.altered)}")
        if self.unread:
            columns = ", ".join(f"{name} ({rows} rows)" for name, rows in sorted(self.unread.items()))
            lines.append(f"   unread: {columns}")
        return "\n".join(lines) or "  nothing dropped, cut, altered or unread"


class BadRow(ValueError):
    """One row cannot be used. The exception's text is the reason under which the row is counted."""


NO_TEXT, TIE = "null or malformed text", "no preference between the responses"
BEYOND = "beyond --eval-limit"
TOO_MANY_CELLS = "more cells than the header"              # the name under which csv stores such cells

# --- which values of a row were read ------------------------------------------------------------------------

EMPTY = (None, "", "[]", [], {})                                       # values that count as missing
# A row or a message that has one of these keys would mean something else without it.
NOT_RENDERED = ("tools", "functions", "tool_calls", "function_call", "tool_call_id", "reasoning_content",
                "reasoning", "thinking", "images", "image", "audio", "audios", "video", "videos", "documents",
                TOO_MANY_CELLS)


class Reader:
    """A row of a file, or an object inside it such as a message, that remembers which of its values were
    read.

    Raises BadRow if it holds one of NOT_RENDERED that is not empty. `unread` lists all other values that were
    not read."""

    def __init__(self, values, name="row"):
        self.values = values
        self.name = name
        self.names_read = set()
        self.parts = []
        for key in NOT_RENDERED:
            if values.get(key) not in EMPTY:
                raise BadRow(f"{name} with {key}")

    def __contains__(self, key):
        return key in self.values

    def __getitem__(self, key):
        self.names_read.add(key)
        return self.values[key]

    def get(self, key):
        self.names_read.add(key)
        return self.values.get(key)

    def part(self, values, name):
        """A Reader of `values`, an object inside this row that `unread` and a BadRow call `name`."""
        part = Reader(values, name)
        self.parts.append(part)
        return part

    def unread(self):
        """The names of the values that were not read and are not empty. A name inside a part is written
        PART.NAME."""
        names = set()
        for key, value in self.values.items():
            if key not in self.names_read and value not in EMPTY:
                names.add(key)
        for part in self.parts:
            for key in part.unread():
                names.add(f"{part.name}.{key}")
        return names


# --- messages -----------------------------------------------------------------------------------------------

ROLES = {"user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
         "bot": "assistant", "ai": "assistant",
         "system": "system", "developer": "system"}
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")         # each holds the text of a system turn
HISTORY_COLUMN = "history"                                             # holds the turns before the prompt
TRAINING_MARKS = ("weight", "loss_weight", "train", "training", "trainable", "loss")       # keys of a message
SPELLINGS = {True: ("1", "1.0", "true"), False: ("0", "0.0", "false")}
MESSAGE = re.compile(r"\s*(\[\s*)?\{\s*['\"](role|content|from|value)['\"]\s*:")  # the beginning of a message
HAS_ROLE = re.compile(r"\s*(\[\s*)?\{.*['\"](role|from)['\"]\s*:", re.DOTALL)
HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")
HH_DIALOGUE = re.compile(r"\n\nHuman:.*\n\nAssistant:", re.DOTALL)
HH_PROMPT = re.compile(r"\s*Human:.*\n\nAssistant:\s*\Z", re.DOTALL)


def as_messages(turns, row, is_answer=False):
    """Convert a dialogue in a row to messages {role, content} with the roles system, user and assistant.

    The dialogue is a list of turns, a single turn, or a string that holds one of these as in `parse_literal`.
    A turn has the keys role and content, or from and value, and its text may be divided into typed parts. The
    row is a Reader. is_answer: whether the last turn is to be trained. Raises BadRow if a turn holds
    something that cannot be rendered, or if the last one is marked as not to be trained."""
    turns = parse_literal(turns)
    if isinstance(turns, dict):
        turns = [turns]
    messages = []
    for nth, turn in enumerate(turns, 1):
        message = row.part(turn, "message")
        role = message.get("role") or message.get("from")
        content = message.get("content")
        if content is None:
            content = message.get("value")
        if isinstance(content, list):
            content = join_parts(content, message)
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRow(NO_TEXT)
        if role.strip().lower() not in ROLES:
            raise BadRow(f"message with the role {role[:20]!r}")
        read_training_marks(message, is_answer and nth == len(turns))
        messages.append({"role": ROLES[role.strip().lower()], "content": content})
    return messages


def join_parts(parts, message):
    """The text of a message that is divided into parts {type: "text", text or value}. Raises BadRow for a
    part of another type."""
    texts = []
    for each in parts:
        part = message.part(each, "part")
        if part["type"] != "text":
            raise BadRow("message part that is not text")
        texts.append(part.get("text") or part["value"])
    return "".join(texts)


def read_training_marks(message, is_trained):
    """Read the marks by which a message says whether it is to be trained. A mark counts as read only if it
    agrees with how the message is used here. Raises BadRow if a message that is trained here is marked as not
    to be trained."""
    for mark in TRAINING_MARKS:
        value = str(message.values.get(mark)).lower()
        if is_trained and value in SPELLINGS[False]:
            raise BadRow(f"answer that its {mark} excludes from training")
        if value in SPELLINGS[is_trained]:
            message.get(mark)


def parse_literal(value):
    """The list or dict that a string holds as JSON or as Python prints it, as in .csv files. A value that is
    not a string is returned unchanged. Raises BadRow for any other string."""
    if not isinstance(value, str):
        return value
    for parse in (parse_rows, ast.literal_eval):
        try:
            parsed = parse(value)
        except BadRow:
            raise
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(parsed, (list, dict)):
            return parsed
    raise BadRow("string that holds no list or object, in JSON or in Python")


def parse_rows(text):
    """Parse a JSON text. Raises BadRow if an object has a name twice, since json.loads drops one of them."""
    return parse_json(text, object_pairs_hook=object_of)


def object_of(pairs):
    """The dict of an object's pairs (name, value). Raises BadRow if a name occurs twice."""
    repeated = first_repeated(name for name, _ in pairs)
    if repeated is not None:
        raise BadRow(f"an object has the name {repeated!r} twice")
    return dict(pairs)


def first_repeated(names):
    """The first name that occurs a second time; None if each name occurs once."""
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def text_or_messages(value, row, is_answer=False):
    """The value of a column that holds either a text or messages. A string holds messages if `holds_messages`
    says so, or if it is a dialogue of hh-rlhf or, unless is_answer, an open prompt of hh-rlhf; any other
    string is a text. A value that is no string, list or dict is returned unchanged."""
    if isinstance(value, (list, dict)) or holds_messages(value):
        return as_messages(value, row, is_answer)
    if not isinstance(value, str):
        return value
    if is_answer and HH_DIALOGUE.match(value):
        return hh_messages(value)
    if not is_answer and (HH_DIALOGUE.match(value) or HH_PROMPT.match(value)):
        messages = hh_messages(value)
        if not messages[-1]["content"].strip():                       # "Assistant:" opens the response
            messages.pop()
        return messages
    return value


def holds_messages(value):
    """Whether a value is a string that holds messages, as JSON or as Python prints them. A string that cannot
    be parsed counts if it begins like a message."""
    if not isinstance(value, str) or not HAS_ROLE.match(value):
        return False
    try:
        parsed = parse_literal(value)
    except BadRow:
        return MESSAGE.match(value) is not None
    if isinstance(parsed, dict):
        parsed = [parsed]
    for turn in parsed:
        if not isinstance(turn, dict):
            return False
        if turn.keys().isdisjoint(("role", "from")):
            return False
        if turn.keys().isdisjoint(("content", "value")):
            return False
    return True


def prompt_messages(prompt):
    """The prompt as messages. A prompt that is a text becomes one message of the user."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return prompt


def split_system(messages):
    """Split messages: (a list of the system turn, which is empty if there is none, a list of all other
    messages)."""
    if messages and messages[0]["role"] == "system":
        return messages[:1], messages[1:]
    return [], messages


def stripped(messages):
    """Pairs (role, text without outer white space) of messages, by which they are compared."""
    pairs = []
    for message in messages:
        pairs.append((message["role"], message["content"].strip()))
    return pairs


def join_dialogues(first, second):
    """Join two dialogues, of which the second follows the first, into one list of messages. Turns that both
    of them contain occur once in it: the first may be a part of the second, and the second may be the end of
    the first. Raises BadRow if their system turns differ."""
    system, turns = split_system(first)
    second_system, second_turns = split_system(second)
    if system and second_system and stripped(system) != stripped(second_system):
        raise BadRow("two different system turns")
    system = system or second_system
    texts, second_texts = stripped(turns), stripped(second_turns)
    for start in range(len(second_texts) - len(texts) + 1):
        end = start + len(texts)
        if second_texts[start:end] == texts:
            return system + second_turns
    if texts[-len(second_texts):] == second_texts:
        return system + turns
    return system + turns + second_turns


def split_dialogues(dialogues):
    """(prompt, *responses) of whole dialogues. Raises BadRow if their prompts differ, or as `split_dialogue`
    does."""
    prompts, responses = [], []
    for dialogue in dialogues:
        prompt, response = split_dialogue(dialogue)
        prompts.append(prompt)
        responses.append(response)
    if prompts[0] != prompts[-1]:
        raise BadRow("chosen and rejected have different prompts")
    return prompts[0], *responses


def split_dialogue(dialogue):
    """(prompt messages, last response) of a whole dialogue, given as messages or as a string of hh-rlhf.
    Raises BadRow if the last message is not the assistant's, or as `hh_messages` does."""
    if isinstance(dialogue, str):
        dialogue = hh_messages(dialogue)
    if dialogue[-1]["role"] != "assistant":
        raise BadRow("last message is not the assistant's")
    return dialogue[:-1], dialogue[-1]["content"]


def hh_messages(text):
    """The messages of a dialogue of hh-rlhf, a string. The space after "Human:" or "Assistant:" belongs to
    this mark, and all other white space belongs to the message. Raises BadRow for any other string."""
    start, *turns = HH_TURN.split(text)                               # speaker, text, speaker, text, …
    if start.strip() or not turns:
        raise BadRow("not a '\\n\\nHuman: … \\n\\nAssistant: …' dialogue")
    messages = []
    for speaker, said in zip(turns[::2], turns[1::2], strict=True):
        role = ROLES[speaker.lower()]
        messages.append({"role": role, "content": said})
    return messages


# --- formats ------------------------------------------------------------------------------------------------
# A function compute_… returns (prompt, chosen, rejected) for a format whose columns do not hold these texts.
# Its parameters are the row's Reader and the columns that the format needs.

def compute_pku(row, prompt, response_0, response_1, better_response_id, safer_response_id, *,
                prefer="better"):
    """PKU-SafeRLHF (arXiv 2406.15513) has two labels; each is the number of the preferred response."""
    labels = {"better": better_response_id, "safer": safer_response_id}
    preferred = float(labels[prefer])
    return best_and_worst(prompt, [(preferred == 0, response_0), (preferred == 1, response_1)])


def compute_ultrafeedback(row, instruction, completions):
    """Choose `best_and_worst` of UltraFeedback's four responses (arXiv 2310.01377) by overall score."""
    scored = []
    for each in parse_literal(completions):
        completion = row.part(each, "completions")
        scored.append((completion["overall_score"], completion["response"]))
    return best_and_worst(instruction, scored)


def compute_summaries(row, info, summaries, choice):
    """summarize_from_feedback (arXiv 2009.01325) labels one of two summaries of a post or of an article."""
    info, choice = row.part(parse_literal(info), "info"), float(choice)
    post = info.get("post") or info["article"]
    prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {post}\n\nTL;DR:"
    scored = []
    for place, summary in enumerate(parse_literal(summaries)):
        scored.append((choice == place, row.part(summary, "summaries")["text"]))
    return best_and_worst(prompt, scored)


def compute_webgpt(row, question, answer_0, answer_1, score_0, score_1):
    """webgpt_comparisons (arXiv 2112.09332) has a score for each of two answers."""
    prompt = row.part(parse_literal(question), "question")["full_text"]
    return best_and_worst(prompt, [(score_0, answer_0), (score_1, answer_1)])


def best_and_worst(prompt, scored):
    """Choose from pairs (score, response): (prompt, the response with the highest score, the response with
    the lowest score). A score None is skipped. Raises BadRow if all others are equal or one is not finite."""
    ranked = []
    for score, response in scored:
        if score is not None:
            ranked.append((float(score), response))
            if not math.isfinite(ranked[-1][0]):
                raise BadRow(TIE)
    ranked.sort(key=lambda pair: pair[0])
    if not ranked or ranked[0][0] == ranked[-1][0]:
        raise BadRow(TIE)
    return prompt, ranked[-1][1], ranked[0][1]


@dataclass
class Format:
    """A data set's format: which columns hold the prompt and the responses, or how they are computed."""
    name: str
    prompt: str | None = None                # a column; if None, the responses are whole dialogues
    chosen: str | None = None                # a column; if None, a row has no response
    rejected: str | None = None              # a column; if None, a row has at most one response
    convert: Callable = text_or_messages     # turns a value of these columns into a text or messages
    appended: str | None = None              # an optional column, whose text is appended to the prompt
    compute: Callable | None = None          # a function; its parameters replace all of these columns

    @property
    def needed(self):
        """The columns by which the format is recognised."""
        if self.compute is not None:
            return getfullargspec(self.compute).args[1:]
        return [column for column in (self.prompt, self.chosen, self.rejected) if column is not None]


FORMATS = [  # The first format whose needed columns all exist is taken.
    #      name                             prompt           chosen      rejected
    Format("ShareGPT",                      "conversations", "chosen",   "rejected", as_messages),
    Format("prompt, chosen, rejected",      "prompt",        "chosen",   "rejected"),
    Format("question, chosen, rejected",    "question",      "chosen",   "rejected"),
    Format("instruction, chosen, rejected", "instruction",   "chosen",   "rejected", appended="input"),
    Format("whole dialogues",               None,            "chosen",   "rejected"),
    Format("whole dialogues as messages",   None, "chosen_messages", "rejected_messages", as_messages),
    Format("PKU-SafeRLHF",                  compute=compute_pku),
    Format("UltraFeedback",                 compute=compute_ultrafeedback),
    Format("summarize_from_feedback",       compute=compute_summaries),
    Format("webgpt_comparisons",            compute=compute_webgpt),
    Format("dialogues",                     None,            "messages", None,       as_messages),
    Format("prompts",                       "prompt"),
]


def format_of(columns, source):
    """The first of FORMATS that fits a data set with these columns, a set. Raises InputError if none fits."""
    for form in FORMATS:
        if columns.issuperset(form.needed):
            return form
    known = "; ".join(", ".join(form.needed) for form in FORMATS)
    raise InputError(f"{source}: columns {', '.join(sorted(columns))} fit none of these formats: {known}")


# --- a row becomes a pair -----------------------------------------------------------------------------------

PREFERENCE_COLUMN = "preference"                                       # P(chosen ≻ rejected)
SCORE_COLUMNS = ("score_chosen", "score_rejected")                     # a soft label, if their scale is given


def pair_of(row, form, score_scale=None):
    """Read the TextPair in a row, which is a Reader. Raises BadRow if the row cannot be used. A value of an
    unexpected type may also raise Python's own exceptions."""
    prompt, *responses = prompt_and_responses(row, form)
    prompt = add_turns_before(prompt, row)
    json.dumps([prompt, responses], ensure_ascii=False).encode()       # this raises for half a surrogate pair
    for response in responses:
        if not isinstance(response, str):
            raise BadRow(NO_TEXT)
        if not response.strip():
            raise BadRow("empty response")
    messages = prompt_messages(prompt)
    if not isinstance(messages, list):
        raise BadRow(NO_TEXT)
    if not messages or not messages[-1]["content"].strip():
        raise BadRow("empty prompt")
    if len(responses) == 2 and responses[0].strip() == responses[1].strip():
        raise BadRow("chosen equals rejected")
    pair = TextPair(prompt, *responses)
    if form.rejected is not None:
        pair.preference = soft_label(row, score_scale)
        pair.finished = finished_in(row, "chosen_finished"), finished_in(row, "rejected_finished")
    return pair


def finished_in(row, column):
    """Whether a response ended by itself, according to a column of a row. It did unless the column says
    false or 0."""
    return str(row.get(column)).lower() not in SPELLINGS[False]


def soft_label(row, score_scale):
    """P(chosen ≻ rejected) of a row: its column `preference`; otherwise σ of the difference of its scores in
    units of `score_scale`, if both are given; otherwise 1. Raises BadRow if the preference is no number from
    0 to 1, or if a score is no finite number."""
    if PREFERENCE_COLUMN in row:
        probability = number_in(row, PREFERENCE_COLUMN)
        if not 0 <= probability <= 1:
            raise BadRow(f"{PREFERENCE_COLUMN} that is not a number from 0 to 1")
        return probability
    if score_scale is None or SCORE_COLUMNS[0] not in row:
        return 1.0
    chosen = number_in(row, SCORE_COLUMNS[0])
    rejected = number_in(row, SCORE_COLUMNS[1])
    margin = (chosen - rejected) / score_scale
    return 0.5 + 0.5 * math.tanh(margin / 2)                          # σ(margin), without overflow


def number_in(row, column):
    """The finite number, also one written as a text, in a column of a row. Raises BadRow if there is none."""
    try:
        value = float(row[column])
    except (KeyError, TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise BadRow(f"{column} that is not a finite number")
    return value


def prompt_and_responses(row, form):
    """(prompt, *responses) of a row in the Format `form`. The prompt is a text or messages. The responses are
    the chosen and the rejected one, one alone, or none, depending on the format. Raises BadRow for a row that
    cannot be read so. A value that is missing or no text may be returned as it is; `pair_of` refuses it."""
    values = [row.get(column) for column in form.needed]
    if form.compute is not None:
        return form.compute(row, *values)
    prompt = None
    if form.prompt is not None:
        prompt = values.pop(0)
    if form.appended is not None and row.get(form.appended):
        prompt = "\n".join([prompt, row[form.appended]])
    responses = []
    for value in values:
        if isinstance(prompt, str) and HH_PROMPT.match(prompt):
            value = after_hh_prompt(prompt, value)
        response = form.convert(value, row, is_answer=True)
        responses.append(response)
    if form.prompt is None:
        return split_dialogues(responses)
    prompt = form.convert(prompt, row)
    if responses and all(isinstance(response, list) for response in responses):
        before, *responses = split_dialogues(responses)
        prompt = join_dialogues(prompt_messages(prompt), before)
    return prompt, *responses


def after_hh_prompt(prompt, response):
    """A response to an open prompt of hh-rlhf, without the prompt if the response repeats it, and without the
    space that follows "Assistant:"."""
    if not isinstance(response, str):
        return response
    response = response.removeprefix(prompt).removeprefix(prompt.lstrip())
    if prompt.endswith(":"):
        response = response.removeprefix(" ")
    return response


def add_turns_before(prompt, row):
    """The prompt, preceded by the turns that the row holds in HISTORY_COLUMN and SYSTEM_COLUMNS."""
    history = row.get(HISTORY_COLUMN)
    if history not in EMPTY:
        prompt = join_dialogues(history_messages(parse_literal(history), row), prompt_messages(prompt))
    for name in SYSTEM_COLUMNS:
        system = row.get(name)
        if system and not isinstance(system, str):
            raise BadRow(NO_TEXT)
        if system:
            prompt = join_dialogues([{"role": "system", "content": system}], prompt_messages(prompt))
    return prompt


def history_messages(history, row):
    """The messages of a history, whose elements are turns or pairs [question, answer]."""
    messages = []
    for turn in history:
        if isinstance(turn, dict):
            messages += as_messages([turn], row)
        else:
            question, answer = turn
            messages += as_messages([{"role": "user", "content": question},
                                     {"role": "assistant", "content": answer}], row)
    return messages


# --- a file becomes rows ------------------------------------------------------------------------------------

def read_rows(source):
    """The rows of a source, a list of dicts or a datasets.Dataset. Raises InputError, or OSError for a file
    that cannot be opened, if it cannot be read."""
    path = Path(source)
    kind = path.suffix
    if kind == ".gz":
        kind = Path(path.stem).suffix
    if kind in DATA_FILES and not path.is_file():
        raise InputError(f"{source}: no such file")
    if kind in (".jsonl", ".json", ".csv"):
        return read_text(path, kind)
    if path.is_file():
        return read_parquet(path)
    return read_data_set(str(source))


def read_text(path, kind):
    """The rows, a list of dicts, of a CSV file if `kind` is ".csv", else of a file with a JSON object on each
    line or with an array of them. A path in .gz is unpacked. Raises InputError for any other content."""
    rows, nth = [], 1
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        newline = "" if kind == ".csv" else None               # line ends inside a cell are kept
        with opened(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            text = file.read()
        if kind == ".csv":
            return read_csv(text)
        if text.lstrip().startswith("["):
            rows = parse_rows(text)
        else:
            nth = 0
            for line in text.split("\n"):                          # splitlines would also split at U+2028
                nth += 1
                if line.strip():
                    rows.append(parse_rows(line))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: cannot be unpacked ({first_line(error)})") from None
    except BadRow as repeated:
        if kind != ".csv" and text.lstrip().startswith("["):
            nth = line_of_repeated(text)
        raise InputError(f"{path}:{nth}: {repeated}") from None
    except (ValueError, csv.Error) as error:
        line = nth + getattr(error, "lineno", 1) - 1
        wanted = "write an object on each line, or an array of objects"
        if kind == ".csv":
            wanted = ("in the row that begins here, divide the cells by commas, close each quote, and double "
                      "a quote inside of quotes")
        raise InputError(f"{path}:{line}: not {kind[1:]} ({first_line(error)}); {wanted}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: a row is not an object with columns")
    return rows


def read_csv(text):
    """The rows of a .csv file's text. Raises BadRow if its header has a name twice, and csv.Error, with the
    line on which the row begins as `lineno`, for a quote that is not closed or not doubled, which would make
    one cell of several."""
    csv.field_size_limit(2**31 - 1)                         # by default, csv refuses a long text
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey=TOO_MANY_CELLS, strict=True)
    rows, begins = [], 1
    try:
        repeated = first_repeated(reader.fieldnames or [])
        if repeated is not None:
            raise BadRow(f"the header has the name {repeated!r} twice")
        begins = reader.line_num + 1
        for row in reader:
            rows.append(row)
            begins = reader.line_num + 1
    except csv.Error as error:
        error.lineno = begins
        raise
    return rows


def line_of_repeated(text):
    """The number of the line on which an element of a JSON array begins: the first element in which an object
    has a name twice."""
    decoder, between = json.JSONDecoder(object_pairs_hook=object_of), re.compile(r"[\s,]*")
    place = text.index("[") + 1
    while True:
        place = between.match(text, place).end()
        try:
            _, place = decoder.raw_decode(text, place)
        except BadRow:
            return text.count("\n", 0, place) + 1


def read_parquet(path):
    """The rows of a .parquet file. Paths and URLs in them are text, and never opened. Raises InputError if
    the file cannot be read, or if two columns have the same name."""
    import pyarrow.parquet
    with foreign(unreadable(path)):
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
    repeated = first_repeated(names)
    if repeated is not None:
        raise InputError(f"{path}: two columns have the name {repeated!r}")
    with foreign(unreadable(path)):
        return file.read().to_pylist()


def read_data_set(source):
    """The datasets.Dataset of a directory or of a hub name: its split "train" unless a hub name has another.
    Raises InputError if it cannot be read."""
    import datasets                                         # this import is slow, and is needed only here
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)     # its errors are reported below, in one line
    name, _, split = source.partition(":")
    config, options = None, {"split": split or "train"}
    if Path(source).exists():                               # its files may have changed since their caching
        name, options = source, {"split": "train", "download_mode": "force_redownload"}
    elif name.count("/") >= 2:
        name, config = name.rsplit("/", 1)
    with foreign(unreadable(source)):
        try:
            return datasets.load_dataset(name or "(no name)", config, **options)
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ from None                 # the cause says what failed


def unreadable(source):
    """The problem with a source that a library cannot read."""
    return (f"{source}: cannot be read as a data set; give a {', '.join(DATA_FILES)} file, a directory or "
            "OWNER/NAME[/CONFIG][:SPLIT]")


def stored_rows(rows):
    """The rows of a list or of a datasets.Dataset. A Dataset's values stay as they are stored, because
    decoding a picture may open a path or a URL."""
    if isinstance(rows, list):
        yield from rows
        return
    for table in rows.with_format("arrow").iter(1000):
        yield from table.to_pylist()


def read_answers(source):
    """The rows of a file of answers. Each row has a `prompt`, a text or messages, and a `response`, a text.
    Raises InputError if there is no row, or if a row lacks one of them. A text that holds messages, as in
    .csv files, is no prompt."""
    rows = list(stored_rows(read_rows(source)))
    for nth, row in enumerate(rows, 1):
        prompt = row.get("prompt")
        if not is_prompt(prompt) or holds_messages(prompt) or not isinstance(row.get("response"), str):
            raise InputError(f"{source}: row {nth} needs prompt and response, as generate.py writes them")
    if not rows:
        raise InputError(f"{source} has no rows; each needs prompt and response, as generate.py writes them")
    return rows


def is_text(value):
    """Whether a value is a text that can be encoded: it has no half of a surrogate pair."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def is_prompt(value):
    """Whether a value is a prompt as `load_pairs` makes them: a text, or messages {role, content}."""
    if not isinstance(value, list):
        return isinstance(value, str)
    for message in value:
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            return False
        if message["role"] not in ROLES.values() or not isinstance(message["content"], str):
            return False
    return value != []


# --- a file becomes pairs -----------------------------------------------------------------------------------

def load_pairs(source, limit=None, prefer="better", score_scale=None):
    """Load (pairs, Account) of a source. At most the first `limit` pairs are kept. `prefer` chooses
    PKU-SafeRLHF's label, "better" or "safer". `score_scale` makes soft labels of the columns score_chosen and
    score_rejected.

    The Account counts as unread every column, and every key of a message, that holds something in a kept row
    and was not read. Raises InputError if the source cannot be read, if its columns fit no format, or if no
    row can be used."""
    rows = read_rows(source)
    if len(rows) == 0:
        raise InputError(f"{source} has no rows")
    if isinstance(rows, list):
        columns = set().union(*rows)
    else:
        columns = set(rows.column_names)
    form = format_of(columns, source)
    if form.compute is compute_pku:
        form = replace(form, compute=partial(compute_pku, prefer=prefer))
    pairs, account = [], Account(form.name)
    for values in stored_rows(rows):
        if len(pairs) == limit:
            break
        account.rows += 1
        try:
            row = Reader(values)
            pairs.append(pair_of(row, form, score_scale))
            account.unread.update(row.unread())
            if score_scale is not None and SCORE_COLUMNS[0] not in row.names_read:
                account.altered["pairs whose label is not from the scores of --score-scale"] += 1
            if prefer == "safer" and form.name != "PKU-SafeRLHF":
                account.altered["pairs without the label that --prefer safer reads"] += 1
        except BadRow as reason:
            account.dropped[str(reason)] += 1
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError):
            account.dropped[NO_TEXT] += 1
    if not pairs:
        raise InputError(f"{source}: none of {len(rows)} rows can be used ({format_counts(account.dropped)})")
    account.altered += remove_repeated_prompts(pairs) + exchange_responses(pairs)
    if form.name == "dialogues":
        account.altered += count_untrained_answers(pairs)
    return pairs, account


def exchange_responses(pairs):
    """Exchange the two responses, in place, of the pairs whose preference is below ½, so that the chosen
    response is the preferred one in every pair. Returns a Counter with the number of such pairs, if there are
    any."""
    exchanged = 0
    for pair in pairs:
        if pair.preference < 0.5:
            pair.chosen, pair.rejected = pair.rejected, pair.chosen
            pair.finished, pair.preference = pair.finished[::-1], 1 - pair.preference
            exchanged += 1
    return +Counter({"pairs with a preference below 0.5, whose responses are exchanged": exchanged})


def count_untrained_answers(pairs):
    """Count, by the reason, the dialogues that have an answer before their last one. Only the last answer of
    a dialogue is trained."""
    several = 0
    for pair in pairs:
        roles = [message["role"] for message in pair.prompt]
        several += "assistant" in roles
    return +Counter({"dialogues of which only the last answer is trained": several})


def remove_repeated_prompts(pairs):
    """Remove the prompt from responses that begin with it, in place, if at least half of the pairs have such
    responses. Otherwise nothing is changed. Returns a Counter with the number of such pairs, if there are
    any, under a reason that says whether the prompt was removed from them."""
    repeating = []
    for pair in pairs:
        if repeats_its_prompt(pair):
            repeating.append(pair)
    if 2 * len(repeating) < len(pairs):
        return +Counter({"prompts repeated in their responses, left in": len(repeating)})
    for pair in repeating:
        pair.chosen = pair.chosen.removeprefix(pair.prompt)
        if pair.rejected is not None:
            pair.rejected = pair.rejected.removeprefix(pair.prompt)
    return Counter({"prompts repeated in their responses, taken out": len(repeating)})


def repeats_its_prompt(pair):
    """Whether there is a response, and each one begins with the prompt, a string, and goes on after it."""
    if not isinstance(pair.prompt, str) or pair.chosen is None:
        return False
    for response in (pair.chosen, pair.rejected):
        if response is not None:
            rest = response.removeprefix(pair.prompt)
            if rest == response or not rest.strip():
                return False
    return True


def split_held_out(pairs):
    """(training pairs, held-out pairs). The pairs of one prompt in twenty are held out. The prompt's CRC-32
    selects them, so no prompt is on both sides, in whatever order the pairs come."""
    train, held_out = [], []
    for pair in pairs:
        if zlib.crc32(json.dumps(pair.prompt).encode()) % 20 == 0:
            held_out.append(pair)
        else:
            train.append(pair)
    return train, held_out


def shortened(prompt):
    """The texts of a prompt and of what cutting may leave of it: a dialogue may lose its oldest turns, except
    the system's, up to any turn of the user (see `data.fitting_prompt`)."""
    texts = {str(prompt)}
    if not isinstance(prompt, str):
        system, turns = split_system(prompt)
        for first, turn in enumerate(turns):
            if turn["role"] == "user":
                texts.add(str(system + turns[first:]))
    return texts


def load_held_out(eval_data, prefer="better", score_scale=None):
    """Load (held-out pairs, their Account) of a file, a hub name or the directory of a run. From a run these
    are the pairs that it held out, with the labels that they had there, and an empty Account. Raises
    InputError as `load_pairs` does, or if the run names no data."""
    if not is_run_directory(Path(eval_data)):
        return load_pairs(eval_data, None, prefer, score_scale)
    file = run_that_held_out(eval_data) / "args.json"
    run = read_settings(file, Settings, "data", "eval_data", "limit", "prefer", "score_scale")
    if "data" not in run:
        raise InputError(f"{file}: this run names no data")
    if "eval_data" in run:                                 # then the training data may be gone
        labels = {name: run[name] for name in ("prefer", "score_scale") if name in run}
        held_out, _ = load_held_out(run["eval_data"], **labels)
    else:
        _, held_out, *_ = train_and_held_out(**run)
    return held_out, Account()


def train_and_held_out(data, eval_data=None, limit=None, prefer="better", score_scale=None):
    """Load (training pairs, held-out pairs, Account of `data`, Account of the held-out pairs), for every
    script. If `eval_data` is a file or a hub name, its pairs are held out, and all pairs of `data` are for
    training. If it is the directory of a run, the pairs that the run held out are held out here too, with an
    empty Account, and pairs of `data` with one of their prompts, or with a `shortened` one, are dropped.
    Otherwise `split_held_out` divides the pairs of `data`, and the Account of `data` covers both parts.
    `limit` is for `data` alone. Raises InputError as `load_pairs` does, or if no training pair is left."""
    pairs, account = load_pairs(data, limit, prefer, score_scale)
    if eval_data:
        held_out, held_out_account = load_held_out(eval_data, prefer, score_scale)
        if not is_run_directory(Path(eval_data)):
            return pairs, held_out, account, held_out_account
        prompts = set().union(*(shortened(pair.prompt) for pair in held_out))
        train = [pair for pair in pairs if str(pair.prompt) not in prompts]
        if len(train) < len(pairs):
            account.dropped[f"prompt that {eval_data} held out"] += len(pairs) - len(train)
        if not train:
            raise InputError(f"{data}: all {len(pairs)} pairs have prompts that {eval_data} held out")
        return train, held_out, account, held_out_account
    train, held_out = split_held_out(pairs)
    if not train:
        raise InputError(f"{data}: all {len(pairs)} pairs are held out; give more pairs, or held-out pairs "
                         "with --eval-data")
    return train, held_out, account, Account()
