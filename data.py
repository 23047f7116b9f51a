"""Preference data as tokens: pairs of texts are rendered and become token ids with explicit masks.

    python data.py SOURCE                print the format, what is kept and dropped, lengths, and two pairs
    python data.py SOURCE --model M      print the same in M's tokens and chat template

How a pair becomes text:
  - If the tokenizer has a chat template, the template renders the pair. A string counts as one user message.
  - If it has none, strings stay as they are, and messages become "\\n\\nHuman: …\\n\\nAssistant:", as in
    hh-rlhf.

`encode` replaces the texts of a pair's responses by the texts that `response_text` makes of their token ids.
So everything that reads a response reads exactly the text that is trained.
"""
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from pathlib import Path

from runtime.command_line import InputError, command_line, first_line, foreign, format_counts
from runtime.run_directory import is_run_directory, refuse_missing
from runtime.saved_model import base_of
from runtime.settings import Parser, Settings, flag_of, setting

import torch
from torch.nn.utils.rnn import pad_sequence

from formats import BEYOND, Account, BadRow, load_pairs, prompt_messages, split_system

SIDES = ("chosen", "rejected")


@dataclass
class Pair:
    """A pair of responses to one prompt, in the form in which it is trained. It holds the token ids and the
    texts, and says who wrote the responses and who labels them."""
    # set by `encode`, or by `generate.roll_out` for responses that the policy writes
    prompt: str | list                       # the part of the data's prompt that prompt_ids hold
    chosen: str | None = None                # the text of chosen_ids; None if the data has none
    rejected: str | None = None
    prompt_ids: list = field(default_factory=list)
    chosen_ids: list = field(default_factory=list)
    rejected_ids: list = field(default_factory=list)
    # set by `sail.draw_pairs`
    on_policy: bool = False                  # both responses are sampled from the policy, so T2 applies
    self_labelled: bool = False              # the policy labels the pair, so T3 applies
    label_draw: float = 0.0                  # uniform in [0, 1); it draws the label if labels are sampled
    # set by `generate.roll_out`
    samples: int = 0                         # how many of the two responses were sampled
    sampled_tokens: int = 0                  # the length of the sampled responses together
    unfinished: int = 0                      # how many of the sampled responses have no end token
    sampling_logps: tuple = (0.0, 0.0)       # log π(y|x) of chosen and rejected, computed in sampling
    # set by the functions of reward.py that label pairs; until then, `preference` is the data's label, or 1
    # if a response was sampled
    preference: float = 1.0                  # P(chosen ≻ rejected)
    rewards: tuple = ()                      # of chosen and rejected; empty if no reward has scored them
    cut_for_reward: int = 0                  # how many of the two dialogues a classifier cut on the left
    # set by `encode`, or by `generate.roll_out`
    finished: tuple = (True, True)           # whether chosen_ids and whether rejected_ids have an end token
    # set by `generate.score_once`
    reference_logps: torch.Tensor | None = None       # (2,): log π_ref of chosen and rejected; None: unknown

# --- text to tokens -----------------------------------------------------------------------------------------

def load_tokenizer(name, trust_remote_code=False, ends=True, chat_template=None):
    """Load the tokenizer of a directory or hub name. For a run's checkpoint, this is the tokenizer of the
    run's base model with the run's chat template, unless another is given. ends: whether an end-of-sequence
    token is required. chat_template: see `set_chat_template`. Raises InputError if there is no tokenizer, if
    the name is the directory of a run or of an adapter, if a required end-of-sequence token is missing, or if
    the chat template cannot be used."""
    from transformers import AutoTokenizer
    run = base_of(name)
    if run is not None:
        return load_tokenizer(run.model, trust_remote_code, ends, chat_template or run.chat_template)
    refuse_missing(name)
    if is_run_directory(Path(name)):
        raise InputError(f"{name} is the directory of a run; give its model, {name}/model")
    if Path(name, "adapter_config.json").is_file():
        raise InputError(f"{name} is an adapter; merge it into its base first, as sail.py does in OUT/model")
    with foreign(f"{name}: no tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code,
                                                  local_files_only=Path(name).is_dir())
        ids = tokenizer("question")["input_ids"]                       # a broken tokenizer fails here
        tokenizer.decode(tokenizer.all_special_ids + ids)
    if ends and tokenizer.eos_token_id is None:
        raise InputError(f"{name} has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    set_chat_template(tokenizer, name, chat_template)
    return tokenizer


def set_chat_template(tokenizer, name, chat_template):
    """Set the chat template of the tokenizer of the model `name`, and its attribute `template_name`, which
    says where the template comes from. Raises InputError if the template cannot be read or used.

    chat_template: a file, whose template replaces the tokenizer's (a .json file has it under the key
    chat_template); "none", which removes the template; or None, which keeps the tokenizer's template. If the
    tokenizer has no template, None takes the template in the model's chat_template.json, a file that
    multimodal processors have."""
    from transformers.utils import cached_file
    tokenizer.template_name = "the tokenizer's own"
    if chat_template is None and not tokenizer.chat_template:
        with foreign(f"{name}: its files cannot be read"):
            chat_template = cached_file(
                name, "chat_template.json", _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False)
    if chat_template is None and not tokenizer.chat_template or chat_template == "none":
        tokenizer.chat_template, tokenizer.template_name = None, "none"
        return
    if chat_template is not None:
        with foreign(f"{chat_template}: cannot be read as a chat template"):
            text = Path(chat_template).read_text(encoding="utf-8")
            if Path(chat_template).suffix == ".json":
                text = json.loads(text)["chat_template"]
        tokenizer.chat_template, tokenizer.template_name = text, str(chat_template)
    with foreign(f"{name}: its chat template cannot be used"):
        template = tokenizer.get_chat_template()             # the default one of several
        if not isinstance(template, str):
            raise TypeError(f"it is of type {type(template).__name__}")


@dataclass
class Frame:
    """The text and the tokens around every answer in a tokenizer's dialogues, found by rendering one plain
    question."""
    opening: str | None      # the text between question and answer; None if the template refuses the question
    filler: str              # what the template itself writes at the start of the answer
    end_ids: set             # the ids of EOS and of the token that closes an answer
    marks: re.Pattern        # matches special tokens and end tokens, which no turn of a prompt may contain


def frame_of(tokenizer):
    """The Frame of a tokenizer. It is found once for each chat template, number of tokens and EOS."""
    return find_frame(tokenizer, str(tokenizer.chat_template), len(tokenizer), tokenizer.eos_token_id)


@lru_cache(maxsize=8)
def find_frame(tokenizer, template, size, eos_id):
    """Find the Frame of a tokenizer. The template, the number of tokens and the EOS id are arguments because
    they can change, and a changed tokenizer needs another entry of the cache."""
    added, end_ids = tokenizer.added_tokens_decoder, {eos_id}
    opening, filler = None, ""
    try:
        dialogue = Dialogue([{"role": "user", "content": "question"}], tokenizer)
    except BadRow:
        pass                                             # the template refuses a plain question
    else:
        opening, filler = dialogue.head.rpartition("question")[2], dialogue.filler
        for token in tokenizer(dialogue.closing, add_special_tokens=False)["input_ids"]:
            if token in added and added[token].content.strip():
                end_ids.add(token)
                break
    marks = []
    for token, written in added.items():
        if written.special or token in end_ids:
            marks.append(re.escape(written.content))
    return Frame(opening, filler, end_ids, re.compile("|".join(marks) or "(?!)"))


def end_token_ids(tokenizer, model=None):
    """The set of ids that end a response: the tokenizer's EOS, the token with which the chat template closes
    an answer and, if a model is given, the end tokens of its generation_config that are added tokens. A
    default id in generation_config may be an ordinary word, so only added tokens count."""
    ids = set(frame_of(tokenizer).end_ids)
    if model is None:
        return ids
    extra = model.generation_config.eos_token_id
    if not isinstance(extra, list):
        extra = [extra]
    return ids | {token for token in tokenizer.added_tokens_decoder if token in extra}  # bad ids match none


# The date that chat templates get as today's: the one that Llama's own template falls back on. A fixed date
# makes the texts of a run independent of the day on which it is continued or evaluated.
TODAY = date(2024, 7, 26)


def without_clock(template):
    """The chat template with TODAY, as a text, in place of each call strftime_now("FORMAT"). Calls with a
    variable are left as they are."""
    def that_day(call):
        return repr(TODAY.strftime(call[2]))

    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", that_day, template)


def apply_template(tokenizer, messages, **options):
    """Render messages with a tokenizer's chat template and return the text. Raises BadRow if the template
    refuses the messages."""
    template = without_clock(tokenizer.get_chat_template())
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options)
    except Exception as error:                           # a template is foreign code and can raise anything
        raise BadRow(f"refused by the chat template: {first_line(error)[:80]}") from None


class Dialogue:
    """A prompt as text, together with the text that the chat template writes around its answer.

    head: the text of the prompt up to the place where a response begins; the policy samples from this text.
    filler: what the template writes between head and answer, such as an empty block of thoughts or the space
    after "Assistant:"; usually "". closing: what the template writes after an answer. Filler and closing are
    found by rendering an answer that occurs in no text.

    If a prompt ends in an assistant's message, this message is the beginning of the answer, and the response
    continues it. Raises BadRow if the template refuses the prompt or leaves the answer out, or if it writes
    the beginning of an answered dialogue differently from a prompt's."""

    def __init__(self, prompt, tokenizer=None):
        self.tokenizer, self.template = tokenizer, tokenizer is not None and bool(tokenizer.chat_template)
        self.messages, self.filler, self.closing = prompt, "", ""
        if not self.template:
            self.head = prompt
            if not isinstance(prompt, str):
                self.head = plain_dialogue(prompt)
                if not self.started:
                    self.filler = " "
            return
        self.messages = prompt_messages(prompt)
        marker = "xANSWERx"
        while marker in str(self.messages):
            marker += "x"
        opening, found, self.closing = self.answered_by(marker).partition(marker)
        if not found:
            raise BadRow("the chat template leaves the answer out")
        self.head = opening
        if not self.started:
            self.head = apply_template(tokenizer, self.messages, add_generation_prompt=True)
            if self.head == apply_template(tokenizer, self.messages):  # the template has no generation prompt
                self.head = opening.rstrip(" ")                      # the answer's first token has the space
        if not opening.startswith(self.head):
            raise BadRow("the chat template's generation prompt does not begin an answered dialogue")
        self.filler = opening[len(self.head):]

    @property
    def started(self):
        return not isinstance(self.messages, str) and self.messages[-1]["role"] == "assistant"

    def answered_by(self, answer):
        """The text that the template makes of the whole dialogue with this answer."""
        messages = list(self.messages)
        if self.started:
            answer = messages.pop()["content"] + answer
        return apply_template(self.tokenizer, messages + [{"role": "assistant", "content": answer}])

    def tail(self, response):
        """The text that follows `head`: the response, with the text that the template writes around it.
        Raises BadRow if the template refuses or changes the response, apart from its outer white space."""
        if not self.template:
            return self.filler + response
        whole = self.answered_by(response)
        answer = whole[len(self.head):len(whole) - len(self.closing)]
        if whole != self.head + answer + self.closing:
            raise BadRow("the chat template rewrites the answer")
        # A template may leave its filler out if the response begins with thoughts, for example.
        if answer.removeprefix(self.filler).strip() != response.strip():
            raise BadRow("the chat template rewrites the answer")
        return answer + self.closing

    def keeps_turns(self, outer_white_space):
        """Whether the prompt has the text of each of its turns, with or without the outer white space of the
        turn. Many templates omit the thoughts in earlier answers, and others trim each turn."""
        if not self.template:
            return True
        for turn in self.messages:
            text = turn["content"]
            if not outer_white_space:
                text = text.strip()
            if text not in self.head:
                return False
        return True


def plain_dialogue(messages):
    """Render a prompt of messages in the format of hh-rlhf, for a tokenizer without a chat template."""
    names, text = {"user": "Human", "assistant": "Assistant", "system": "System"}, ""
    for turn in messages:
        text += f"\n\n{names[turn['role']]}: {turn['content']}"
    if messages[-1]["role"] != "assistant":
        text += "\n\nAssistant:"
    return text


def render(prompt, response, tokenizer=None):
    """Render a prompt and a response: (prompt text, response text), whose concatenation is the whole
    dialogue. Raises BadRow if the chat template refuses the dialogue or rewrites the response."""
    dialogue = Dialogue(prompt, tokenizer)
    return dialogue.head, dialogue.tail(response)


def token_ids(text, tokenizer):
    """The ids of a text that begins with its prompt. The tokenizer adds its special tokens only if there is
    no chat template, since a template writes BOS itself. An EOS that some tokenizers append to every text is
    removed."""
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and not tokenizer.chat_template:
        return ids[:-1]
    return ids


def fitting_prompt(prompt, tokenizer, limit, lengths=None):
    """Shorten a prompt to `limit` tokens: (the Dialogue that is left, its ids, its ids within the limit). The
    number of tokens of the whole prompt is appended to lengths["prompt"], if lengths are given.

    Without a chat template, a long text is cut from the left but keeps its BOS token, and only for such a
    text do the last two values differ. With one, a text is one turn. A long dialogue loses its oldest turns,
    except the system's, until it begins with a user's turn and fits. Raises BadRow as `Dialogue` does, if no
    such dialogue fits, if the prompt has no tokens, or if, with a chat template, a turn has special tokens,
    as if the template had already been applied."""
    dialogue = Dialogue(prompt, tokenizer)
    if dialogue.template:
        for turn in dialogue.messages:
            if frame_of(tokenizer).marks.search(turn["content"]):
                raise BadRow("prompt with special tokens, as if already in a chat template")
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
    system, turns = split_system(dialogue.messages)
    for first in range(1, len(turns)):
        if turns[first]["role"] == "user":
            shorter = Dialogue(system + turns[first:], tokenizer)
            ids = token_ids(shorter.head, tokenizer)
            if len(ids) <= limit:
                return shorter, ids, ids
    raise BadRow("prompt longer than --max-prompt-length")


def encode(pairs, tokenizer, end_ids, max_prompt_length, max_response_length, rows=math.inf, limit=None):
    """Encode pairs of texts: (Pairs with ids and the texts of these ids, the Account of what was dropped, cut
    and altered, lengths).

    Both responses follow the same prompt ids. A response that the data lacks has no ids. A response longer
    than max_response_length is cut from the right and then has no end token. lengths: {side: tokens before
    cutting, of each text that could be rendered}. limit: how many pairs are kept at most; the rest are
    dropped. rows: the number of ids that the model has. Raises InputError if the data contains an id that the
    model lacks, or if no pair can be used."""
    encoded, account = [], Account()
    lengths = {"prompt": [], "chosen": [], "rejected": []}
    for place, pair in enumerate(pairs):
        if len(encoded) == limit:
            account.dropped[BEYOND] = len(pairs) - place
            break
        try:
            done, changes = encode_pair(pair, tokenizer, end_ids, max_prompt_length, max_response_length,
                                        lengths)
        except BadRow as reason:
            account.dropped[str(reason)] += 1
            continue
        highest = max(done.prompt_ids + done.chosen_ids + done.rejected_ids)
        if highest >= rows:
            token = tokenizer.convert_ids_to_tokens(highest)
            raise InputError(f"the data hold {token!r}, id {highest}, and the model has only {rows} ids; "
                             "is this the wrong tokenizer?")
        account.add(changes)
        encoded.append(done)
    if not encoded:
        advice = ""
        if frame_of(tokenizer).opening is None:
            advice = "; the chat template refuses every plain dialogue; sail.py --chat-template names another"
        raise InputError(f"none of {len(pairs)} prompts or pairs can be encoded as tokens: "
                         f"{format_counts(account.dropped)}{advice}")
    return encoded, account, lengths


def encode_pair(pair, tokenizer, end_ids, max_prompt_length, max_response_length, lengths):
    """Encode one pair for `encode`: (a Pair with ids and the texts of these ids, the Account of what was cut
    and altered). The numbers of tokens before cutting are appended to `lengths`. Raises BadRow if the pair
    cannot be used."""
    dialogue, uncut, prompt_ids = fitting_prompt(pair.prompt, tokenizer, max_prompt_length, lengths)
    cut, altered = Counter(), Counter()
    prompt_is_cut = lengths["prompt"][-1] > len(prompt_ids)
    if not dialogue.keeps_turns(outer_white_space=False):
        altered["prompts with turns that the template rewrites"] += 1
    elif not dialogue.keeps_turns(outer_white_space=True):
        altered["prompts whose outer white space the template strips"] += 1
    if changes_text(tokenizer, uncut, dialogue.head):
        altered["prompts whose text the tokenizer changes"] += 1
    ends = tokenizer.convert_ids_to_tokens(sorted(end_ids))
    encoded = Pair(pair.prompt, prompt_ids=prompt_ids, preference=pair.preference)
    if prompt_is_cut:
        cut["prompts longer than --max-prompt-length"] += 1
        encoded.prompt = prompt_left(pair.prompt, dialogue, prompt_ids)
    finished = []
    for side, ended in zip(SIDES, pair.finished, strict=True):
        response = getattr(pair, side)
        if response is None:
            finished.append(True)
            continue
        text = dialogue.tail(response)
        if not ended:                             # a response that was cut has no closing
            text = text.removesuffix(dialogue.closing)
        whole = token_ids(dialogue.head + text, tokenizer)
        if whole[:len(uncut)] == uncut:
            ids = whole[len(uncut):]
        else:                                            # a token would span prompt and response
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            altered["responses whose first token would merge with the prompt"] += 1
        if changes_text(tokenizer, ids, text):
            altered["responses whose text the tokenizer changes"] += 1
        ids = up_to_end(ids, [tokenizer.eos_token_id] if ended else [], end_ids)
        lengths[side].append(len(ids))
        kept = ids[:max_response_length]
        finished.append(kept[-1] in end_ids)
        setattr(encoded, f"{side}_ids", kept)
        setattr(encoded, side, response_text(tokenizer, kept, prompt_ids))
        if len(ids) > max_response_length:
            cut["responses longer than --max-response-length"] += 1
        if any(end in response for end in ends):
            cut["responses with an end token in their text"] += 1
        if response.removeprefix(dialogue.filler) not in text.removeprefix(dialogue.filler):
            altered["responses whose outer white space the template strips"] += 1
    if encoded.chosen_ids and encoded.chosen_ids == encoded.rejected_ids:
        raise BadRow("same tokens in both responses")
    encoded.finished = tuple(finished)
    return encoded, Account(cut=cut, altered=altered)


def changes_text(tokenizer, ids, text):
    """Whether the tokens of a text say something else than the text, apart from white space, because the
    tokenizer does not know a character or writes it in another way, such as in lower case."""
    said = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return "".join(text.split()) not in "".join(said.split())


def prompt_left(prompt, dialogue, ids):
    """What is left of a prompt that was cut: the messages of its shorter dialogue, or the text of its ids."""
    if not isinstance(prompt, str):
        return dialogue.messages
    if ids[0] == dialogue.tokenizer.bos_token_id:
        ids = ids[1:]
    return dialogue.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def up_to_end(ids, end, end_ids):
    """The ids of a response up to and including its first end token, which is one of `end_ids`. If there is
    no end token, these are all ids, followed by `end`, a list of one id or an empty list."""
    for place, token in enumerate(ids):
        if token in end_ids:
            return ids[:place + 1]
    return ids + end


def response_text(tokenizer, ids, prompt_ids=()):
    """The text of a response as a reward, a judge and a reader see it: without the end token, and without the
    filler that the chat template itself writes at its start. White space is kept. prompt_ids: the ids before
    the response; without them, a filler stays in the text.

    If the tokenizer has a `response_template`, as tokenizers have for models that write in channels, the
    template decides which part of the response is the answer. If it has none, or if the response does not fit
    it, special tokens inside the response stay in the text."""
    ids, prompt_ids, frame = list(ids), list(prompt_ids), frame_of(tokenizer)
    if ids and getattr(tokenizer, "response_template", None):
        try:
            return tokenizer.parse_response(ids, prefix=prompt_ids).get("content") or ""
        except ValueError:
            pass                                         # the response does not fit the template
    if ids and (ids[-1] in frame.end_ids or ids[-1] in tokenizer.all_special_ids):
        ids = ids[:-1]
    text = text_after(tokenizer, ids, prompt_ids)
    prompt = tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False)
    if frame.opening is None or not prompt.endswith(frame.opening):
        return text                                      # the response continues a text or a started answer
    if frame.filler.startswith(text):
        return ""                                        # the response was cut inside the filler
    return text.removeprefix(frame.filler)


def text_after(tokenizer, ids, before):
    """The text of `ids` where they follow the ids `before`. If a sentencepiece tokenizer decoded `ids` alone,
    their first space would be lost."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if not ids or not before:
        return text
    first = tokenizer.convert_ids_to_tokens(ids[0])
    if first is None or not first.startswith("▁"):       # None stands for an id that the vocabulary skips
        return text
    last = tokenizer.decode(before[-1:], clean_up_tokenization_spaces=False)
    both = tokenizer.decode(before[-1:] + ids, clean_up_tokenization_spaces=False)
    return both.removeprefix(last)


def collate(prompts, responses, device="cpu"):
    """Turn B lists of prompt ids and B lists of response ids into (input_ids, attention_mask, response_mask),
    each (B, T), padded on the right. The masks follow from the lengths, so the padding id 0 means nothing and
    may equal the id of any real token."""
    rows = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]
    input_ids = pad_sequence(rows, batch_first=True)                               # (B, T)
    places = torch.arange(input_ids.shape[1])
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]      # where each response begins
    ends = torch.tensor([len(row) for row in rows])[:, None]
    attention_mask = (places < ends).long()
    response_mask = attention_mask * (places >= starts)
    return input_ids.to(device), attention_mask.to(device), response_mask.to(device)


# --- the command line ---------------------------------------------------------------------------------------

def length_table(lengths, unit, limits=None):
    """Lines that show how long prompts and responses are, and how many of them exceed a limit."""
    lines = []
    for side, numbers in lengths.items():
        if not numbers:
            continue
        ordered = sorted(numbers)
        n = len(ordered)
        median = ordered[n // 2]
        most = ordered[n * 9 // 10]
        line = f"{side:>9}: median {median} {unit}, 90th percentile {most}, longest {ordered[-1]}"
        if limits:
            over = sum(number > limits[side] for number in numbers)
            line += f"; {over} of {len(numbers)} longer than {limits[side]}"
        lines.append(line)
    return "\n".join(lines)


def print_report(source, pairs, account):
    """Print what `load_pairs` has read: the format, the counts and the range of soft labels."""
    print(f"{source}: {account.format}; {account.rows} rows, {len(pairs)} kept\n{account}")
    soft = []
    for pair in pairs:
        if pair.preference != 1:
            soft.append(pair.preference)
    if soft:
        print(f"soft labels: {len(soft)} pairs, P(chosen ≻ rejected) from {min(soft):.3g} to {max(soft):.3g}")


def print_as_tokens(pairs, tokenizer, limits):
    """Print the counts and lengths that `encode` reports, and the first two pairs as the model sees them."""
    print(f"chat template: {tokenizer.template_name}")
    encoded, account, lengths = encode(pairs, tokenizer, end_token_ids(tokenizer), *limits)
    print(f"{len(encoded)} pairs are encoded as tokens\n{account}")
    prompt_limit, response_limit = limits
    limit_of = dict(prompt=prompt_limit, chosen=response_limit, rejected=response_limit)
    print(length_table(lengths, "tokens", limit_of))
    for nth, pair in enumerate(encoded[:2], 1):
        prompt = tokenizer.decode(pair.prompt_ids)
        chosen = tokenizer.decode(pair.chosen_ids)
        rejected = tokenizer.decode(pair.rejected_ids)
        print_pair(nth, prompt, chosen, rejected)


def print_as_text(pairs):
    """Print how long the pairs' texts are, and the first two pairs without a chat template."""
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
    """Print a pair's texts, one per line. Responses that the data lacks are left out."""
    print(f"--- {nth}\nprompt:   {prompt!r}")
    if chosen:
        print(f"chosen:   {chosen!r}")
    if rejected:
        print(f"rejected: {rejected!r}")


@dataclass
class Reported(Settings):
    """The settings of data.py, of which FLAGS are used."""
    model: str | None = setting(None, "a directory or hub name; texts and lengths are shown in its tokens")
    limit: int | None = setting(None, "use the first N pairs only", low=1, metavar="N")


FLAGS = ("model", "chat_template", "score_scale", "limit", "prefer", "max_prompt_length",
         "max_response_length")


def main(argv=None):
    """The command `python data.py SOURCE [--model M]`: show what a data set holds and how it is read."""
    parser = Parser("Show what a preference data set holds and how it will be read. Defaults in brackets.",
                    " SOURCE")
    parser.add_argument("source", metavar="SOURCE", help="a file or OWNER/NAME[/CONFIG][:SPLIT]")
    parser.add_settings(Reported, *FLAGS)
    given = vars(parser.parse_args(argv))
    source = given.pop("source")
    args = Reported(**given)
    for name in ("chat_template", "max_prompt_length", "max_response_length"):
        if name in given and not args.model:
            parser.error(f"argument {flag_of(name)}: has no effect without --model")
    pairs, account = load_pairs(source, args.limit, args.prefer, args.score_scale)
    print_report(source, pairs, account)
    if args.model:
        tokenizer = load_tokenizer(args.model, chat_template=args.chat_template)
        print_as_tokens(pairs, tokenizer, (args.max_prompt_length, args.max_response_length))
    else:
        print_as_text(pairs)


if __name__ == "__main__":
    command_line(main)
