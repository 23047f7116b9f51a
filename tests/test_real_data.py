"""What people's files and templates hold: every row is read whole, or dropped and counted by its reason."""
import json

import pytest
from conftest import END, TEMPLATE, byte_tokenizer, pairs_of

from data import Dialogue, encode, end_token_ids, fitting_prompt, render, token_ids
from formats import NO_TEXT, TextPair, load_pairs


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


Q, GOOD, BAD = turn("user", "Q"), turn("assistant", "good"), turn("assistant", "bad")
SYSTEM = turn("system", "S")
PLAIN = dict(prompt="Q0", chosen="yes", rejected="no")


def load(tmp_path, *rows):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_pairs(str(path))


def dropped_of(tmp_path, row):
    """Why this row is dropped; a good one beside it, with the same columns, is kept."""
    pairs, account = load(tmp_path, row, PLAIN)
    assert len(pairs) == 1
    return dict(account.dropped)


def pair_of(row):
    return pairs_of([row])[0]


def encode_one(pair, tokenizer, *limits):
    pair = pair if isinstance(pair, TextPair) else pair_of(pair)
    examples, account, _ = encode([pair], tokenizer, end_token_ids(tokenizer), *(limits or (100, 100)))
    return examples[0], account


# --- where the response begins

SAYS = ("{% for m in messages %}{{ 'USER: ' + m.content + ' ' if m.role == 'user' else "
        "'ASSISTANT: ' + m.content + '<eos>' }}{% endfor %}")       # knows no generation prompt


@pytest.mark.parametrize("answer", ["A", "ASSISTANT", "T: A", ":", "USER", "xANSWERx"])
def test_the_header_is_found_whatever_the_answer_repeats_of_it(answer):
    assert render("Q", answer, byte_tokenizer(SAYS)) == ("USER: Q ASSISTANT:", f" {answer}<eos>")
    assert render(answer, "A", byte_tokenizer(SAYS)) == (f"USER: {answer} ASSISTANT:", " A<eos>")


def test_both_sides_of_a_pair_follow_the_same_prompt():
    tokenizer = byte_tokenizer(SAYS)
    example, _ = encode_one(TextPair("Q", "A", "S"), tokenizer)
    assert tokenizer.decode(example.prompt_ids) == "USER: Q ASSISTANT:"
    assert tokenizer.decode(example.chosen_ids) == " A<eos>"
    assert tokenizer.decode(example.rejected_ids) == " S<eos>"


def sentencepiece(words):
    """A tokenizer that writes the space before a word into its token, and one before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocab = {word: place for place, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def test_the_responses_ids_are_those_of_the_whole_text():
    tokenizer = sentencepiece(["▁say", "▁the", "▁word", "the"])
    pair = TextPair("say", " the word", " word")
    example, account = encode_one(pair, tokenizer)
    whole = tokenizer("say the word")["input_ids"]
    assert example.prompt_ids + example.chosen_ids == whole + [1]
    assert not account.altered["responses whose first token would merge with the prompt"]


def test_a_token_that_would_reach_over_the_boundary_is_counted():
    tokenizer = sentencepiece(["▁say", "▁the", "▁saythe"])
    example, account = encode_one(TextPair("say", "the", " say"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(example.prompt_ids) == ["▁say"]
    assert tokenizer.convert_ids_to_tokens(example.chosen_ids) == ["▁the", "<eos>"]
    assert account.altered["responses whose first token would merge with the prompt"] == 1


# --- turns before the answer

@pytest.mark.parametrize("before", [[turn("assistant", "A1"), turn("user", "Q2")]])
@pytest.mark.parametrize("prompt, first", [([Q], [Q]), ("Q", [Q]), ([SYSTEM, Q], [SYSTEM, Q])])
def test_turns_before_the_answer_follow_the_prompt_or_repeat_it(prompt, first, before, tmp_path):
    for repeated in ([], [Q], first):
        row = dict(prompt=prompt, chosen=repeated + before + [GOOD], rejected=repeated + before + [BAD])
        assert load(tmp_path, row)[0] == [TextPair(first + before, "good", "bad")]


def test_strings_that_begin_with_their_prompt_lose_it_if_most_rows_have_that_form(tmp_path):
    rows = [dict(prompt=f"question {i}", chosen=f"question {i} yes", rejected=f"question {i} no")
            for i in range(9)]
    pairs, account = load(tmp_path, *rows, PLAIN)
    assert pairs[:9] == [TextPair(f"question {i}", " yes", " no") for i in range(9)]
    assert pairs[9] == pair_of(PLAIN)
    assert account.altered == {"prompts repeated in their responses, taken out": 9}
    echo = dict(prompt="Hello", chosen="Hello you", rejected="Hello there")          # an answer, in its file
    pairs, account = load(tmp_path, echo, PLAIN, PLAIN)
    assert pairs[0] == pair_of(echo)
    assert account.altered == {"prompts repeated in their responses, left in": 1}
    assert load(tmp_path, echo, PLAIN)[0][0] == TextPair("Hello", " you", " there")    # at least half do


# --- columns and keys

@pytest.mark.parametrize("row, prompt", [
    (dict(PLAIN, system="S"), [SYSTEM, turn("user", "Q0")]),
    (dict(PLAIN, system_prompt="S", prompt=[Q]), [SYSTEM, Q]),
    (dict(PLAIN, system="S", prompt=[SYSTEM, Q]), [SYSTEM, Q]),
    (dict(PLAIN, system=""), "Q0"), (dict(PLAIN, system=None, tools=None, images=[]), "Q0"),
    (dict(PLAIN, history=[["Q1", "A1"]]), [turn("user", "Q1"), turn("assistant", "A1"), turn("user", "Q0")]),
    (dict(PLAIN, history=[Q, turn("assistant", "A1")]), [Q, turn("assistant", "A1"), turn("user", "Q0")]),
    (dict(PLAIN, history=[["Q1", "A1"]], system="S"),
     [SYSTEM, turn("user", "Q1"), turn("assistant", "A1"), turn("user", "Q0")]),
    (dict(instruction="Do", input="this", chosen="yes", rejected="no"), "Do\nthis"),
    (dict(question="Why?", chosen="yes", rejected="no", system="S"), [SYSTEM, turn("user", "Why?")])])
def test_system_history_and_input_are_part_of_the_prompt(row, prompt, tmp_path):
    assert load(tmp_path, row)[0] == pairs_of([dict(prompt=prompt, chosen="yes", rejected="no")])


@pytest.mark.parametrize("spelling, role", [
    ("User", "user"), ("human", "user"), ("prompter", "user"), ("Assistant", "assistant"),
    ("gpt", "assistant"), ("model", "assistant"), ("System", "system"), ("developer", "system")])
def test_the_usual_spellings_of_roles_are_understood(spelling, role, tmp_path):
    end = [Q] if role != "user" else []
    before = [turn(spelling, "one"), *end]
    pairs, _ = load(tmp_path, dict(chosen=before + [GOOD], rejected=before + [BAD]))
    assert pairs[0].prompt == [turn(role, "one"), *end]


@pytest.mark.parametrize("row, reason", [
    (dict(PLAIN, tools=[{"name": "search"}]), "row with tools"),
    (dict(PLAIN, images=["a.png"]), "row with images"),
    (dict(PLAIN, documents=["text"]), "row with documents"),
    (dict(PLAIN, prompt=[turn("user", "Q", tool_calls=[{"id": 1}])]), "message with tool_calls"),
    (dict(PLAIN, chosen=[turn("assistant", "good", reasoning_content="hm")], rejected=[BAD]),
     "message with reasoning_content"),
    (dict(PLAIN, prompt=[turn("tool", "42")]), "message with the role 'tool'"),
    (dict(PLAIN, prompt=[turn("user", [{"type": "image_url", "image_url": "x"}])]),
     "message part that is not text"),
    (dict(PLAIN, system="other", prompt=[SYSTEM, Q]), "two different system turns"),
    (dict(PLAIN, system=3), NO_TEXT)])
def test_what_cannot_be_rendered_drops_its_row_by_name(row, reason, tmp_path):
    assert dropped_of(tmp_path, row) == {reason: 1}


def test_a_column_that_only_another_format_reads_is_named(tmp_path):
    alpaca = dict(instruction="Add.", input="1 + 1", chosen="2", rejected="3")
    pairs, account = load(tmp_path, alpaca)
    assert pairs[0].prompt == "Add.\n1 + 1" and account.unread == {}
    assert load(tmp_path, dict(PLAIN, input="1 + 1"))[1].unread == {"input": 1}


def test_turns_inside_the_answers_of_sharegpt_are_kept(tmp_path):
    between = [turn("assistant", "A1"), turn("user", "Q2")]
    row = dict(conversations=[Q], chosen=between + [GOOD], rejected=between + [BAD])
    other = dict(row, rejected=BAD)
    pairs, account = load(tmp_path, row, other)
    assert pairs == [TextPair([Q] + between, "good", "bad")]
    assert account.dropped == {"chosen and rejected have different prompts": 1}


@pytest.mark.parametrize("quote", [json.dumps, repr])
def test_messages_in_strings_are_read_as_messages(quote, tmp_path):
    for row in (dict(prompt=quote([SYSTEM, Q]), chosen=quote([GOOD]), rejected=quote([BAD])),
                dict(chosen=quote([SYSTEM, Q, GOOD]), rejected=quote([SYSTEM, Q, BAD])),
                dict(prompt=quote([SYSTEM, Q]), chosen=quote(GOOD), rejected=quote(BAD)),
                dict(conversations=quote([SYSTEM, Q]), chosen=quote(GOOD), rejected=quote(BAD))):
        assert load(tmp_path, row)[0] == pairs_of([dict(prompt=[SYSTEM, Q], chosen="good", rejected="bad")])
    scored = quote([dict(response="bad", overall_score=1), dict(response="good", overall_score=2)])
    assert load(tmp_path, dict(instruction="Q", completions=scored))[0][0].chosen == "good"


@pytest.mark.parametrize("text", ['{"a": 1}', "[1, 2]", '[{"name": "x"}]', "{'role"])
def test_answers_that_are_json_stay_text(text, tmp_path):
    assert load(tmp_path, dict(PLAIN, chosen=text))[0][0].chosen == text


# --- templates

THINKS = TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}")


def test_an_answer_that_the_template_rewrites_drops_its_pair_by_that_reason():
    pairs = [dict(prompt="Q", chosen="<think>yes</think>A", rejected="<think>no</think>A"),
             dict(prompt="Q", chosen="A", rejected="<think>no</think>B"), PLAIN]
    examples, account, _ = encode(pairs_of(pairs), byte_tokenizer(THINKS), {END}, 90, 90)
    assert len(examples) == 1
    assert account.dropped["the chat template rewrites the answer"] == account.dropped.total() == 2


def test_a_template_that_adds_an_empty_block_of_thoughts_keeps_the_answers_own():
    adds = TEMPLATE.replace("{{ message['content'] }}", "{% if message['role'] == 'assistant' and '<think>' "
                            "not in message['content'] %}<think></think>{% endif %}{{ message['content'] }}")
    head, own = "<|user|>Q<|end|><|assistant|>", "<think>hm</think>A"
    assert render("Q", "A", byte_tokenizer(adds)) == (head, "<think></think>A<|end|>")
    assert render("Q", own, byte_tokenizer(adds)) == (head, f"{own}<|end|>")


def test_one_row_that_the_template_refuses_leaves_the_others():
    strict = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
              + TEMPLATE)
    pairs = [PLAIN, dict(PLAIN, prompt=[SYSTEM, Q]), PLAIN]
    examples, account, _ = encode(pairs_of(pairs), byte_tokenizer(strict), {END}, 90, 90)
    assert len(examples) == 2 and account.dropped["refused by the chat template: no system turns"] == 1


def test_a_prompt_that_ends_in_a_started_answer_is_continued():
    tokenizer = byte_tokenizer(TEMPLATE)
    pair = dict(prompt=[Q, turn("assistant", "Once upon")], chosen=" a time", rejected=" no time")
    example, _ = encode_one(pair, tokenizer)
    assert tokenizer.decode(example.prompt_ids) == "<|user|>Q<|end|><|assistant|>Once upon"
    assert tokenizer.decode(example.chosen_ids) == " a time<|end|>"
    assert render(pair["prompt"], " a time") == ("\n\nHuman: Q\n\nAssistant: Once upon", " a time")


# --- white space

def test_a_plain_dialogue_has_one_space_before_each_answer():
    assert render([Q], "good")[1] == " good" and render([Q], "  good")[1] == "   good"


# --- limits

LONG = [SYSTEM, turn("user", "a" * 30), turn("assistant", "b" * 30), turn("user", "c" * 10)]


def kept(prompt, limit):
    tokenizer = byte_tokenizer(TEMPLATE)
    return tokenizer.decode(fitting_prompt(prompt, tokenizer, limit)[2])


def test_too_long_a_dialogue_loses_its_oldest_turns_whole_and_keeps_the_system_turn():
    tokenizer = byte_tokenizer(TEMPLATE)
    whole = tokenizer.decode(fitting_prompt(LONG, tokenizer, 999)[2])
    assert whole == tokenizer.apply_chat_template(LONG, tokenize=False, add_generation_prompt=True)
    short = tokenizer.apply_chat_template([LONG[0], LONG[3]], tokenize=False, add_generation_prompt=True)
    assert kept(LONG, 60) == short
    example, account = encode_one(dict(prompt=LONG, chosen="yes", rejected="no"), tokenizer, 60, 9)
    assert account.cut.total() == 1 and tokenizer.decode(example.prompt_ids) == short


def test_a_dialogue_that_does_not_fit_without_its_older_turns_is_dropped():
    pairs = [dict(prompt=LONG, chosen="yes", rejected="no"), PLAIN, dict(PLAIN, prompt="d" * 50)]
    examples, account, lengths = encode(pairs_of(pairs), byte_tokenizer(TEMPLATE), {END}, 20, 9)
    assert [example.prompt for example in examples] == ["Q0"]
    assert account.dropped["prompt longer than --max-prompt-length"] == account.dropped.total() == 2
    assert max(lengths["prompt"]) > 60                                         # as they were before


def test_lengths_are_those_before_cutting():
    pair = dict(prompt="12345678", chosen="123456789", rejected="1")
    _, account, lengths = encode([pair_of(pair)], byte_tokenizer(), {1}, 4, 5)
    assert lengths == {"prompt": [8], "chosen": [10], "rejected": [2]}
    assert account.cut["prompts longer than --max-prompt-length"] == 1
    assert account.cut["responses longer than --max-response-length"] == 1


# --- files

def test_a_file_that_was_replaced_under_its_name_and_time_is_read_anew(tmp_path):
    import os

    import datasets
    path = tmp_path / "x.parquet"
    for answer in ("one", "two"):
        datasets.Dataset.from_list([dict(PLAIN, chosen=answer)]).to_parquet(str(path))
        os.utime(path, (0, 0))
        assert load_pairs(str(path))[0][0].chosen == answer
    for answer in ("one", "two"):
        datasets.Dataset.from_list([dict(PLAIN, chosen=answer)]).to_parquet(str(tmp_path / "dir/x.parquet"))
        os.utime(tmp_path / "dir/x.parquet", (0, 0))
        assert load_pairs(str(tmp_path / "dir"))[0][0].chosen == answer


# --- the template of the real model has the shape of this one

def test_a_dialogue_knows_what_stands_around_its_answer():
    chatml = byte_tokenizer("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<eos>\n"
                            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    dialogue = Dialogue([SYSTEM, Q], chatml)
    assert dialogue.head == "<|im_start|>system\nS<eos>\n<|im_start|>user\nQ<eos>\n<|im_start|>assistant\n"
    assert dialogue.filler == "" and dialogue.closing == "<eos>\n"
    example, _ = encode_one(dict(prompt=[Q], chosen="yes", rejected="no"), chatml)
    assert chatml.decode(example.chosen_ids) == "yes<eos>"                # nothing is learned after it


def test_a_shortened_dialogue_may_have_just_as_many_tokens_as_the_limit():
    tokenizer = byte_tokenizer(TEMPLATE)
    turns = [turn for word in ("first", "second", "third") for turn in (
        {"role": "user", "content": word}, {"role": "assistant", "content": "ok"})][:-1]
    left = len(token_ids(Dialogue(turns[2:], tokenizer).head, tokenizer))
    for limit, expected in ((left, turns[2:]), (left - 1, turns[4:])):
        example, account = encode_one(TextPair(turns, "yes", "no"), tokenizer, limit, 9)
        assert example.prompt == expected and account.cut.total() == 1


def test_a_response_that_is_nothing_but_its_prompt_is_left_as_it_is(tmp_path):
    rows = [dict(prompt="Say hi", chosen="Say hi", rejected="Say hi then")]
    pairs, account = load(tmp_path, *rows)
    assert pairs == [pair_of(rows[0])] and not account.altered
