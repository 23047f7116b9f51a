"""Preference data as texts: read a file by its columns, and make pairs of responses out of its rows.

SOURCE is a .jsonl, .json, .csv or .parquet file, or a hub name written OWNER/NAME[/CONFIG][:SPLIT].
Rows of prompts alone do for fully online runs, rows of dialogues for sft.
"""
import ast
import csv
import io
import json
import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from runtime.command_line import DATA_FILES, InputError, first_line, format_counts


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
