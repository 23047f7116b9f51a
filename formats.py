"""A file becomes pairs of texts: FORMATS declares each format once, `load_pairs` reads the rows.

A source is a .jsonl, .json, .csv or .parquet file, or a hub name written OWNER/NAME[/CONFIG][:SPLIT]. Its
columns tell the format. Fully online runs need prompts alone; sft needs dialogues alone.
"""
import ast
import csv
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

from runtime.command_line import DATA_FILES, InputError, first_line, format_counts


@dataclass
class Pair:
    """A pair of responses to one prompt, from the file to the loss."""
    # of the data, or, where the policy responds, of `generate.roll_out` and `reward.label_by_reward`
    prompt: str | list                       # a text, or messages {role, content}
    chosen: str | None = None                # the preferred response; None if the data lacks it
    rejected: str | None = None
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
    """One row cannot be used. The exception's text is the reason under which the row is counted."""


NO_TEXT, TIE = "null or malformed text", "no preference between the responses"
TOO_MANY_CELLS = "row with more cells than the header"     # also the name under which csv stores such cells

# --- messages -----------------------------------------------------------------------------------------------

ROLES = {"user": "user", "human": "user", "prompter": "user",
         "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
         "bot": "assistant", "ai": "assistant",
         "system": "system", "developer": "system"}
SYSTEM_COLUMNS = ("system", "system_prompt", "system_message")         # each holds the text of a system turn
HISTORY_COLUMN = "history"                                             # holds the turns before the prompt
# A row or a message that holds one of these cannot be rendered whole.
NOT_RENDERED = ("tools", "functions", "tool_calls", "function_call", "tool_call_id", "reasoning_content",
                "reasoning", "thinking", "images", "image", "audio", "audios", "video", "videos", "documents")
COMMON_COLUMNS = (*SYSTEM_COLUMNS, HISTORY_COLUMN, *NOT_RENDERED)      # every format reads these
EMPTY = (None, "", "[]", [], {})                                       # values that say nothing


def as_messages(turns):
    """The messages {role, content} of a dialogue, whose roles become system, user and assistant.

    The dialogue is a list of turns, a single turn, or a string that holds one of these as JSON. A turn has
    the keys role and content, or from and value, and its text may be divided into typed parts. Raises BadRow
    if a turn holds something that cannot be rendered."""
    turns = parse_literal(turns)
    if isinstance(turns, dict):
        turns = [turns]
    messages = []
    for turn in turns:
        refuse_not_rendered(turn, "message")
        role = turn.get("role") or turn.get("from")
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):
            content = join_parts(content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRow(NO_TEXT)
        if role.strip().lower() not in ROLES:
            raise BadRow(f"message of the role {role[:20]!r}")
        messages.append({"role": ROLES[role.strip().lower()], "content": content})
    return messages


def join_parts(parts):
    """The text of a message that is divided into parts {type: "text", text or value}."""
    texts = []
    for part in parts:
        if part["type"] != "text":
            raise BadRow("message part that is not text")
        texts.append(part.get("text") or part["value"])
    return "".join(texts)


def parse_literal(value):
    """The list or dict that a string holds as JSON or as Python prints it, as in .csv files. A value that is
    not a string is returned unchanged. Raises BadRow for any other string."""
    if not isinstance(value, str):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(parsed, (list, dict)):
            return parsed
    raise BadRow("a dialogue in a string that is no JSON")


def text_or_messages(value):
    """The value of a column that holds either a text or messages. A string counts as messages only if it
    begins like a message in JSON; any other string is a text."""
    if isinstance(value, (list, dict)):
        return as_messages(value)
    if isinstance(value, str) and re.match(r"\s*(\[\s*)?\{\s*['\"](role|content|from|value)['\"]\s*:", value):
        return as_messages(value)
    return value


def refuse_not_rendered(record, what):
    """Raise BadRow if a row or a message has a value in one of NOT_RENDERED."""
    for name in NOT_RENDERED:
        if record.get(name) not in EMPTY:
            raise BadRow(f"{what} with {name}")


def prompt_messages(prompt):
    """The prompt as messages: a text is one message of the user."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return prompt


def split_system(messages):
    """(a list that holds the system turn, if there is one, all other messages)."""
    if messages and messages[0]["role"] == "system":
        return messages[:1], messages[1:]
    return [], messages


def only_system(first, second):
    """The system turn of a dialogue made of two, each given as a list that holds its system turn, if any."""
    if first and second and first != second:
        raise BadRow("two system turns")
    return first or second


def split_dialogues(dialogues):
    """(prompt, *responses) of whole dialogues, which must have the same prompt."""
    prompts, responses = [], []
    for dialogue in dialogues:
        prompt, response = split_dialogue(dialogue)
        prompts.append(prompt)
        responses.append(response)
    if prompts[0] != prompts[-1]:
        raise BadRow("chosen and rejected have different prompts")
    return prompts[0], *responses


def split_dialogue(dialogue):
    """(prompt messages, last response) of a whole dialogue, given as messages or as a string of hh-rlhf."""
    if isinstance(dialogue, str):
        return split_hh_dialogue(dialogue)
    if dialogue[-1]["role"] != "assistant":
        raise BadRow("last message is not the assistant's")
    return dialogue[:-1], dialogue[-1]["content"]


def split_hh_dialogue(text):
    """`split_dialogue` for a string of hh-rlhf, whose response follows the last "Assistant:"."""
    prompt, _, response = text.rpartition("\n\nAssistant:")
    start, *turns = re.split(r"\n\n(Human|Assistant):", prompt)       # speaker, text, speaker, text, …
    if start.strip() or not turns:
        raise BadRow("not a '\\n\\nHuman: … \\n\\nAssistant: …' dialogue")
    messages = []
    for speaker, said in zip(turns[::2], turns[1::2]):
        messages.append({"role": ROLES[speaker.lower()], "content": said.strip()})
    return messages, response


# --- formats ------------------------------------------------------------------------------------------------
# A function compute_… returns (prompt, chosen, rejected) where no column holds them. Its parameters are the
# columns that the format needs.

def compute_pku(prompt, response_0, response_1, better_response_id, safer_response_id, *, prefer="better"):
    """PKU-SafeRLHF (arXiv 2406.15513) has two labels; each is the number of the preferred response."""
    labels = {"better": better_response_id, "safer": safer_response_id}
    preferred = float(labels[prefer])
    return best_and_worst(prompt, [(preferred == 0, response_0), (preferred == 1, response_1)])


def compute_ultrafeedback(instruction, completions):
    """UltraFeedback (arXiv 2310.01377) has an overall score for each of four responses."""
    scored = []
    for completion in parse_literal(completions):
        scored.append((completion["overall_score"], completion["response"]))
    return best_and_worst(instruction, scored)


def compute_summaries(info, summaries, choice):
    """summarize_from_feedback (arXiv 2009.01325) labels one of two summaries of a post or of an article."""
    info, choice = parse_literal(info), float(choice)
    post = info.get("post") or info["article"]
    prompt = f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {post}\n\nTL;DR:"
    scored = []
    for place, summary in enumerate(parse_literal(summaries)):
        scored.append((choice == place, summary["text"]))
    return best_and_worst(prompt, scored)


def compute_webgpt(question, answer_0, answer_1, score_0, score_1):
    """webgpt_comparisons (arXiv 2112.09332) has a score for each of two answers."""
    prompt = parse_literal(question)["full_text"]
    return best_and_worst(prompt, [(score_0, answer_0), (score_1, answer_1)])


def best_and_worst(prompt, scored):
    """(prompt, the response of the highest score, the response of the lowest) of pairs (score, response). A
    response without a score is left out. Raises BadRow if no response is preferred."""
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
    compute: Callable | None = None          # replaces all of these columns by its parameters

    @property
    def needed(self):
        """The columns by which the format is recognised."""
        if self.compute is not None:
            return getfullargspec(self.compute).args
        return [column for column in (self.prompt, self.chosen, self.rejected) if column is not None]

    @property
    def readable(self):
        """All columns that the format reads if a data set has them."""
        return {*self.needed, self.appended, *COMMON_COLUMNS}


FORMATS = [  # The first format whose needed columns are all there is taken.
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
    """The format of a data set with these columns. Raises InputError if no format fits."""
    for form in FORMATS:
        if columns.issuperset(form.needed):
            return form
    known = "; ".join(", ".join(form.needed) for form in FORMATS)
    raise InputError(f"{source}: columns {', '.join(sorted(columns))} fit none of: {known}")


# --- a row becomes a pair -----------------------------------------------------------------------------------

def pair_of(row, form):
    """The Pair in a row. Raises BadRow if the row cannot be used. A value of an unexpected type may also
    raise Python's own exceptions."""
    if TOO_MANY_CELLS in row:
        raise BadRow(TOO_MANY_CELLS)
    refuse_not_rendered(row, "row")
    prompt, *responses = prompt_and_responses(row, form)
    prompt = add_turns_before(prompt, row)
    json.dumps([prompt, responses], ensure_ascii=False).encode()       # raises for half a surrogate pair
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
    return Pair(prompt, *responses)


def prompt_and_responses(row, form):
    """(prompt, *responses) of a row in this format. The prompt is a text or messages."""
    values = [row.get(column) for column in form.needed]
    if form.compute is not None:
        return form.compute(*values)
    if row.get(form.appended):
        values[0] += "\n" + row[form.appended]                          # values[0] is the prompt's
    values = [form.convert(value) for value in values]
    if form.prompt is None:
        return split_dialogues(values)
    prompt, *responses = values
    if responses and all(isinstance(response, list) for response in responses):
        before, *responses = split_dialogues(responses)
        prompt = join_prompt(prompt_messages(prompt), before)
    return prompt, *responses


def join_prompt(prompt, before):
    """The whole prompt, as messages, of a row whose responses begin with the turns `before`. These either
    repeat the prompt column or follow it."""
    system, turns = split_system(prompt)
    system_before, turns_before = split_system(before)
    if turns_before[:len(turns)] != turns:
        return prompt + before
    return only_system(system, system_before) + turns_before


def add_turns_before(prompt, row):
    """The prompt, preceded by the turns that the row holds in HISTORY_COLUMN and SYSTEM_COLUMNS."""
    history = row.get(HISTORY_COLUMN)
    if history not in EMPTY:
        prompt = history_messages(parse_literal(history)) + prompt_messages(prompt)
    for name in SYSTEM_COLUMNS:
        if row.get(name):
            if not isinstance(row[name], str):
                raise BadRow(NO_TEXT)
            system, turns = split_system(prompt_messages(prompt))
            prompt = only_system([{"role": "system", "content": row[name]}], system) + turns
    return prompt


def history_messages(history):
    """The messages of a history, whose elements are turns or pairs [question, answer]."""
    messages = []
    for turn in history:
        if isinstance(turn, dict):
            messages += as_messages([turn])
        else:
            question, answer = turn
            messages += as_messages([{"role": "user", "content": question},
                                     {"role": "assistant", "content": answer}])
    return messages


# --- a file becomes rows ------------------------------------------------------------------------------------

def read_rows(source):
    """The rows of a source, a list of dicts or a datasets.Dataset. Raises InputError if it cannot be read."""
    path = Path(source)
    if path.suffix in DATA_FILES and not path.is_file():
        raise InputError(f"{source}: no such file")
    if path.suffix in (".jsonl", ".json", ".csv"):
        return read_text(path)
    if path.is_file():
        return read_parquet(path)
    return read_data_set(str(source))


def read_text(path):
    """The rows of a .csv file, of a file with a JSON object on each line, or of a JSON array of objects."""
    rows, nth = [], 1
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            csv.field_size_limit(2**31 - 1)                 # by default, csv refuses a long text
            return list(csv.DictReader(io.StringIO(text, newline=""), restkey=TOO_MANY_CELLS))
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            for nth, line in enumerate(text.split("\n"), 1):      # splitlines would also split at U+2028
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


def read_parquet(path):
    """The rows of a .parquet file. A column that no format reads is None in each row: its paths and URLs are
    never opened."""
    import pyarrow
    import pyarrow.parquet
    known = set()
    for form in FORMATS:
        known.update(form.readable)
    read, unread = [], {}
    try:
        file = pyarrow.parquet.ParquetFile(path)
        for name in file.schema_arrow.names:
            if name in known:
                read.append(name)
            else:
                unread[name] = None
        rows = file.read(read).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, error) from None
    return [unread | row for row in rows]


def read_data_set(source):
    """The datasets.Dataset of a directory or of a hub name."""
    import datasets                                         # is slow to import, and used nowhere else
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)     # `unreadable` says its errors in one line
    try:
        if Path(source).exists():                           # its files may have changed since their caching
            return datasets.load_dataset(source, split="train", download_mode="force_redownload")
        name, _, split = source.partition(":")
        config = None
        if name.count("/") >= 2:
            name, config = name.rsplit("/", 1)
        return datasets.load_dataset(name or "(no name)", config, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise unreadable(source, error.__cause__ or error) from None


def unreadable(source, error):
    """The InputError for a source that a library cannot read."""
    return InputError(f"{source}: cannot be read as a data set ({first_line(error)}); "
                      f"want a {', '.join(DATA_FILES)} file or OWNER/NAME[/CONFIG][:SPLIT]")


def stored_rows(rows, columns):
    """The rows of a list, or of a datasets.Dataset with these columns alone. A Dataset's values stay as they
    are stored, because decoding a picture may open a path or a URL."""
    if isinstance(rows, list):
        yield from rows
        return
    for table in rows.select_columns(sorted(columns)).with_format("arrow").iter(1000):
        yield from table.to_pylist()


# --- a file becomes pairs -----------------------------------------------------------------------------------

def load_pairs(source, limit=None, prefer="better"):
    """(pairs, report) of a source. At most `limit` pairs are kept. `prefer` chooses PKU-SafeRLHF's label,
    "better" or "safer".

    The report is a dict. `format` is the format's name, and `rows` says how many rows were read. `dropped`
    counts rows and `altered` counts pairs, by reason. `unread` lists the columns that the format does not
    read. Raises InputError if no row can be used."""
    rows = read_rows(source)
    if len(rows) == 0:
        raise InputError(f"{source}: empty, no rows")
    if isinstance(rows, list):
        columns = set().union(*rows[:100])
    else:
        columns = set(rows.column_names)
    form = format_of(columns, source)
    if form.compute is compute_pku:
        form = replace(form, compute=partial(compute_pku, prefer=prefer))
    pairs, dropped = [], Counter()
    for row in stored_rows(rows, columns & form.readable):
        if len(pairs) == limit:
            break
        try:
            pairs.append(pair_of(row, form))
        except BadRow as reason:
            dropped[str(reason)] += 1
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError):
            dropped[NO_TEXT] += 1
    if not pairs:
        raise InputError(f"{source}: no usable pair in {len(rows)} rows ({format_counts(dropped)})")
    return pairs, {"format": form.name, "rows": len(pairs) + sum(dropped.values()), "dropped": dropped,
                   "altered": remove_repeated_prompts(pairs),
                   "unread": sorted(columns - form.readable - {TOO_MANY_CELLS})}


def remove_repeated_prompts(pairs):
    """If at least half of the pairs have responses that begin with the prompt, remove it from them, in place.
    Returns how many pairs were altered, by reason."""
    repeating = [pair for pair in pairs if repeats_its_prompt(pair)]
    if not repeating or 2 * len(repeating) < len(pairs):
        return Counter()
    for pair in repeating:
        pair.chosen = pair.chosen.removeprefix(pair.prompt)
        if pair.rejected is not None:
            pair.rejected = pair.rejected.removeprefix(pair.prompt)
    return Counter({"prompts repeated in their responses, taken out": len(repeating)})


def repeats_its_prompt(pair):
    """Whether the prompt is a string, and each response begins with it and continues."""
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


def train_and_held_out(data, eval_data=None, limit=None, prefer="better"):
    """(training pairs, held-out pairs, report of `data`, report of `eval_data` or None), for every script. If
    `eval_data` is given, its pairs are held out; otherwise `split_held_out` divides the pairs of `data`."""
    pairs, report = load_pairs(data, limit, prefer)
    if eval_data:
        held_out, held_out_report = load_pairs(eval_data, None, prefer)
        return pairs, held_out, report, held_out_report
    train, held_out = split_held_out(pairs)
    if not train:
        raise InputError(f"{data}: all {len(pairs)} pairs are held out; give more, or name others with "
                         "--eval-data")
    return train, held_out, report, None
