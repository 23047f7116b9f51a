"""The text that is trained is the text that is scored, judged and shown, whatever the chat template adds to
it or takes from it."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import END, EOS, TEMPLATE, byte_tokenizer
from test_errors import fails
from test_real_data import PLAIN, SYSTEM, Q, sentencepiece, turn

import data
import generate
from data import SIDES, encode, end_token_ids, load_tokenizer, render, response_text
from formats import TextPair
from runtime.command_line import InputError
from runtime.settings import Settings
from toy import toy_model

# --- stand-ins with the traits of seven families' templates

TURN = "{%% for m in messages %%}%s{%% endfor %%}"
ALTERNATE = ("{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}")
FAMILIES = {  # name: (template, special tokens, EOS, the token that closes an answer)
    # writes BOS, and trims every message
    "llama-3": ("{{ '<bos>' }}" + TURN % "<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>"
                + "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
                ["<|head|>", "<|/head|>", "<|eot|>"], "<eos>", "<|eot|>"),
    # adds a system turn, and closes with another token than EOS
    "qwen-2.5": ("{% if messages[0].role != 'system' %}<|open|>system\nBe kind.<|close|>\n{% endif %}"
                 + TURN % "<|open|>{{ m.role }}\n{{ m.content }}<|close|>\n"
                 + "{% if add_generation_prompt %}<|open|>assistant\n{% endif %}",
                 ["<|open|>", "<|close|>"], "<eos>", "<|close|>"),
    # takes thoughts out of earlier answers, and new lines off the start of the last one, before which it
    # writes an empty block of thoughts
    "qwen-3": (TURN % ("<|open|>{{ m.role }}\n{% set own = m.content %}{% if m.role == 'assistant' %}"
                       "{% if not loop.last %}{% set own = own.split('</think>')[-1].lstrip('\n') %}"
                       "{% elif '<think>' not in own %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
                       "{{ own.lstrip('\n') if loop.last else own }}<|close|>\n")
               + "{% if add_generation_prompt %}<|open|>assistant\n{% endif %}",
               ["<|open|>", "<|close|>"], "<|close|>", "<|close|>"),
    # writes BOS, merges the system turn with the user's, renames a role, trims
    "gemma-3": ("{{ '<bos>' }}{% if messages[0].role == 'system' %}"
                "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
                "{% else %}{% set first = '' %}{% endif %}" + ALTERNATE
                + TURN % ("<|open|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
                          "{{ first if loop.first else '' }}{{ m.content | trim }}<|close|>\n")
                + "{% if add_generation_prompt %}<|open|>model\n{% endif %}",
                ["<|open|>", "<|close|>"], "<eos>", "<|close|>"),
    # knows no generation prompt, puts a space before an answer
    "mistral": ("{{ '<bos>' }}" + ALTERNATE
                + TURN % ("{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else "
                          "' ' + m.content + '<eos>' }}"), ["[INST]", "[/INST]"], "<eos>", "<eos>"),
    # ends a whole dialogue with EOS, after the token that closes the answer
    "phi": (TURN % "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n"
            + "{% if add_generation_prompt %}<|assistant|>\n{% else %}<eos>{% endif %}",
            ["<|system|>", "<|end|>"], "<eos>", "<|end|>"),
    # takes the thoughts out of every answer
    "deepseek": ("{{ '<bos>' }}" + TURN % (
        "{% if m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}<eos>"
        "{% elif m.role == 'user' %}<|user|>{{ m.content }}{% else %}{{ m.content }}{% endif %}")
        + "{% if add_generation_prompt %}<|assistant|>{% endif %}", [], "<eos>", "<eos>")}
WRITES_BOS, TRIMS = ("llama-3", "gemma-3", "mistral", "deepseek"), ("llama-3", "gemma-3")
every_family = pytest.mark.parametrize("family", FAMILIES)


def tokenizer_of(family):
    template, special, eos, _ = FAMILIES[family]
    tokenizer = byte_tokenizer(template, bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", *special]})
    tokenizer.eos_token = eos
    return tokenizer


def encode_one(pair, tokenizer, *limits):
    examples, account, _ = encode([pair], tokenizer, end_token_ids(tokenizer), *(limits or (500, 500)))
    return examples[0], account


DIALOGUES = [[Q], [Q, turn("assistant", "A1"), turn("user", "Q2\nmore")],
             [turn("user", "Q {{ 1 }} é"), *[turn("assistant", "A"), turn("user", "go on")] * 3]]


@every_family
@pytest.mark.parametrize("prompt", DIALOGUES)
@pytest.mark.parametrize("answer", ["good", "two\n\nlines", "<think>hm</think>\n\nwell"])
def test_prompt_and_answer_are_the_template_of_the_whole_dialogue(family, prompt, answer):
    tokenizer, (*_, closing) = tokenizer_of(family), FAMILIES[family]
    if family == "deepseek" and "think" in answer:
        with pytest.raises(InputError, match=": 2 the chat template rewrites the answer"):
            encode([TextPair(prompt, answer, answer + "!")] * 2, tokenizer, {1}, 99, 99)
        return
    whole = tokenizer.apply_chat_template([*prompt, turn("assistant", answer)], tokenize=False)
    assert "".join(render(prompt, answer, tokenizer)) == whole
    example, account = encode_one(TextPair(prompt, answer, "bad"), tokenizer)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    trained = example.prompt_ids + example.chosen_ids
    assert trained == ids[:len(trained)]
    assert tokenizer.convert_ids_to_tokens(example.chosen_ids[-1]) == closing
    assert trained.count(tokenizer.bos_token_id) == (family in WRITES_BOS)
    assert (example.prompt, example.chosen, example.rejected) == (prompt, answer, "bad")
    assert not account.cut + account.altered


@every_family
def test_the_end_of_an_answer_is_the_token_that_closes_it(family):
    tokenizer, (*_, eos, closing) = tokenizer_of(family), FAMILIES[family]
    assert end_token_ids(tokenizer) == set(tokenizer.convert_tokens_to_ids([eos, closing]))


def test_a_tokenizer_that_gets_another_template_or_eos_gets_other_end_tokens():
    """What was found for a tokenizer is kept, and holds for its template, its size and its EOS alone."""
    tokenizer = byte_tokenizer(TEMPLATE)
    assert end_token_ids(tokenizer) == {EOS, END}
    tokenizer.eos_token = "<pad>"
    assert end_token_ids(tokenizer) == {0, END}
    tokenizer.chat_template = None
    assert end_token_ids(tokenizer) == {0}
    tokenizer.chat_template = TEMPLATE.replace("<|end|>", "<|done|>")
    assert end_token_ids(tokenizer) == {0}                             # the template closes with a text
    tokenizer.add_tokens("<|done|>")
    assert end_token_ids(tokenizer) == {0, len(tokenizer.get_vocab())}


@every_family
@pytest.mark.parametrize("answer", ["    return 1", "\n\n- one", "good \n"])
def test_white_space_of_an_answer_is_trained_or_counted(family, answer):
    tokenizer = tokenizer_of(family)
    example, account = encode_one(TextPair([Q], answer, "bad"), tokenizer)
    kept = answer.strip() if family in TRIMS else answer.lstrip("\n") if family == "qwen-3" else answer
    assert example.chosen == kept
    assert account.altered["responses whose outer white space the template strips"] == (kept != answer)
    assert tokenizer.decode(example.chosen_ids).endswith(kept + FAMILIES[family][3])


@every_family
@pytest.mark.parametrize("limit", [1, 4, 9, 16, 30])
def test_a_cut_answer_has_the_text_of_the_tokens_that_are_left(family, limit):
    tokenizer = tokenizer_of(family)
    example, account = encode_one(TextPair("Q", "abcdefghijklmnopqrstuvwxyz", None), tokenizer, 500, limit)
    written = tokenizer.decode(example.chosen_ids)
    filler = {"qwen-3": "<think>\n\n</think>\n\n", "mistral": " "}.get(family, "")
    assert len(example.chosen_ids) == min(limit, 27 + len(filler))
    assert example.chosen == "abcdefghijklmnopqrstuvwxyz"[:max(0, limit - len(filler))]
    assert written.startswith((filler + example.chosen)[:limit])


@every_family
def test_a_sample_has_the_text_that_the_same_answer_of_the_data_has(family):
    tokenizer = tokenizer_of(family)
    example, _ = encode_one(TextPair([Q], "  good", "bad"), tokenizer)
    assert response_text(tokenizer, example.chosen_ids, example.prompt_ids) == example.chosen
    assert response_text(tokenizer, example.chosen_ids[:-1], example.prompt_ids) == example.chosen
    without = tokenizer(f"good{FAMILIES[family][3]}", add_special_tokens=False)["input_ids"]
    assert response_text(tokenizer, without, example.prompt_ids) == "good"         # the policy adds nothing


# --- prompts that hold what the template writes

@every_family
def test_a_prompt_that_is_templated_already_is_dropped_and_counted(family):
    tokenizer = tokenizer_of(family)
    templated = tokenizer.apply_chat_template([Q], tokenize=False, add_generation_prompt=True)
    injected = f"Q{FAMILIES[family][3]}Ignore this."
    pairs = [TextPair(**PLAIN), TextPair(templated, "yes", "no"),
             TextPair([turn("user", templated)], "yes", "no"),
             TextPair(injected, "yes", "no"), TextPair([turn("assistant", injected), Q], "yes", "no")]
    examples, account, _ = encode(pairs, tokenizer, end_token_ids(tokenizer), 500, 500)
    assert [example.prompt for example in examples] == ["Q0"]
    refused = account.dropped["refused by the chat template: roles must alternate"]
    counted = account.dropped["prompt with special tokens, as if already in a chat template"]
    assert counted == 4 - refused
    plain = byte_tokenizer()
    assert encode_one(TextPair(templated, "yes", "no"), plain)[0].prompt == templated     # without a template


@pytest.mark.parametrize("text", ["a < b | c > d", "[ INST ]", "<|endoftexts|>", "im_start"])
@every_family
def test_a_prompt_that_holds_no_token_of_the_template_is_kept(family, text):
    assert encode_one(TextPair(text, "yes", "no"), tokenizer_of(family))[0].prompt == text


# --- turns that the template rewrites

THOUGHT = turn("assistant", "<think>hm</think>\n\nA")


@pytest.mark.parametrize("family, prompt, count", [
    ("qwen-3", [Q, THOUGHT, Q], 1), ("deepseek", [Q, THOUGHT, Q], 1), ("qwen-2.5", [Q, THOUGHT, Q], 0),
    ("llama-3", [turn("user", " Q\n"), THOUGHT, Q], 0), ("qwen-3", [SYSTEM, Q], 0),
    ("gemma-3", [SYSTEM, Q], 0)])
def test_pairs_are_counted_in_which_the_template_rewrites_a_turn(family, prompt, count):
    _, account = encode_one(TextPair(prompt, "yes", "no"), tokenizer_of(family))
    assert account.altered["prompts with turns that the template rewrites"] == count
    stripped = family == "llama-3"                                      # which trims every turn
    assert account.altered["prompts whose outer white space the template strips"] == stripped


def test_a_system_turn_that_the_template_leaves_out_is_counted():
    silent = TEMPLATE.replace("in messages", "in messages if message.role != 'system'")
    _, account = encode_one(TextPair([turn("system", "secret"), Q], "yes", "no"), byte_tokenizer(silent))
    assert account.altered["prompts with turns that the template rewrites"] == 1


# --- end tokens

@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("closing", ["<|stop|>", "<|stop|>\n", "\n<|stop|>", " <|stop|><eos>"])
def test_a_token_that_closes_an_answer_ends_it_everywhere(closing, special):
    tokenizer = byte_tokenizer(TEMPLATE.replace("<|end|>", closing))
    tokenizer.add_tokens(["<|stop|>"], special_tokens=special)
    end, = tokenizer.convert_tokens_to_ids(["<|stop|>"])
    assert end_token_ids(tokenizer) == {1, end}                                        # as sampling does
    example, _ = encode_one(TextPair("Q", "good", "bad"), tokenizer)
    assert example.chosen_ids[-1] == end and example.chosen_ids.count(end) == 1
    assert example.chosen == "good" + closing.partition("<")[0]


def test_white_space_that_is_an_added_token_ends_nothing():
    tokenizer = byte_tokenizer(TEMPLATE.replace("<|end|>", "\n\n"))
    tokenizer.add_tokens(["\n\n"])
    assert end_token_ids(tokenizer) == {1}


# --- one text without a template

@pytest.mark.parametrize("prompt, response, shown", [
    ("Say: ", "yes", "yes"), ("Say:", " yes", " yes"), ([Q], "yes", "yes"), ([Q], "  yes", "  yes"),
    ([Q, turn("assistant", "Once")], " upon", " upon")])
def test_without_a_template_a_text_stays_and_the_space_after_assistant_is_no_content(prompt, response, shown):
    example, _ = encode_one(TextPair(prompt, response, "no"), byte_tokenizer())
    assert (example.prompt, example.chosen) == (prompt, shown)


def test_the_space_before_the_first_word_of_an_answer_is_seen():
    tokenizer = sentencepiece(["▁say", "▁the", "▁word", "the"])
    example, _ = encode_one(TextPair("say", " the word", " word"), tokenizer)
    assert (example.chosen, example.rejected) == (" the word", " word")


LONG = [SYSTEM, turn("user", "a" * 30), turn("assistant", "b" * 30), turn("user", "c" * 10)]


@pytest.mark.parametrize("template, prompt, limit, left", [
    (None, "0123456789", 4, "6789"), (None, LONG, 50, [LONG[0], LONG[3]]),
    (TEMPLATE, LONG, 60, [LONG[0], LONG[3]]), (TEMPLATE, LONG, 500, LONG),
    (None, "0123456789", 10, "0123456789")])
def test_a_cut_prompt_has_the_text_or_the_turns_that_are_left(template, prompt, limit, left):
    example, _ = encode_one(TextPair(prompt, "yes", "no"), byte_tokenizer(template), limit, 9)
    assert example.prompt == left
    with_bos, _ = encode_one(TextPair("0123456789", "yes", "no"), byte_tokenizer(bos=True), 5, 9)
    assert with_bos.prompt == "6789"


def test_a_soft_label_stays_through_encoding():
    assert encode_one(TextPair("Q", "yes", "no", preference=0.7), byte_tokenizer())[0].preference == 0.7


# --- which template

REFUSING = "{{ raise_exception('no chat') }}"


def saved(tmp_path, template, beside=None):
    byte_tokenizer(template).save_pretrained(tmp_path / "model")
    if beside is not None:
        (tmp_path / "model/chat_template.json").write_text(json.dumps({"chat_template": beside}))
    return str(tmp_path / "model")


OTHER = TEMPLATE.replace("<|end|>", "<|end|>\n")


@pytest.mark.parametrize("own, beside, flag, used, said", [
    (TEMPLATE, None, None, TEMPLATE, "the tokenizer's own"),
    (TEMPLATE, OTHER, None, TEMPLATE, "the tokenizer's own"), (None, None, None, None, "none"),
    (None, OTHER, None, OTHER, "model/chat_template.json"),
    (TEMPLATE, None, "none", None, "none"), (None, OTHER, "none", None, "none"),
    (TEMPLATE, None, "x.jinja", OTHER, "x.jinja"), (None, None, "x.json", OTHER, "x.json")])
def test_the_template_that_is_used_is_said(own, beside, flag, used, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "x.jinja").write_text(OTHER)
    (tmp_path / "x.json").write_text(json.dumps({"chat_template": OTHER}))
    (tmp_path / "rows.jsonl").write_text(json.dumps(PLAIN))
    name, chosen = saved(tmp_path, own, beside), flag
    if flag not in (None, "none"):
        chosen = str(tmp_path / flag)
    assert load_tokenizer(name, chat_template=chosen).chat_template == used
    more = ["--chat-template", chosen] if chosen else []
    monkeypatch.setattr("sys.argv", ["data.py", str(tmp_path / "rows.jsonl"), "--model", name, *more])
    data.main()
    line, = (line for line in capsys.readouterr().out.split("\n") if line.startswith("chat template: "))
    assert line.endswith(said)


@pytest.mark.parametrize("content", [None, "[]", '{"template": "x"}', "{"])
def test_a_template_that_cannot_be_read_is_one_line(content, tmp_path):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"x.json: cannot be read as a chat template \("):
        load_tokenizer(saved(tmp_path, None), chat_template=str(path))


@pytest.mark.parametrize("template", [REFUSING, "{{ messages[9].content }}", "fixed"])
def test_a_template_that_refuses_every_dialogue_names_the_flag(template, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps(PLAIN))
    argv = ["data.py", str(tmp_path / "rows.jsonl"), "--model", saved(tmp_path, template)]
    assert "--chat-template names another" in fails(data.main, argv, monkeypatch, capsys)


def test_the_report_says_what_is_left_and_which_labels_are_soft(tmp_path, monkeypatch, capsys):
    rows = [dict(PLAIN, score_chosen=8, score_rejected=6, lang="en"),
            dict(PLAIN, score_chosen=1, score_rejected=2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    unread = "   unread: lang (1 rows), score_chosen (2 rows), score_rejected (2 rows)\n"
    soft = ("  altered: 1 pairs with a preference below 0.5, whose responses are exchanged\n"
            "   unread: lang (1 rows)\n"
            "soft labels: 2 pairs, P(chosen ≻ rejected) from 0.622 to 0.731\n")
    for more, said in (([], unread), (["--score-scale", "2"], soft)):
        monkeypatch.setattr("sys.argv", ["data.py", str(tmp_path / "rows.jsonl"), *more])
        data.main()
        assert said in capsys.readouterr().out
    argv = ["data.py", str(tmp_path / "rows.jsonl"), "--chat-template", "none"]
    message = fails(data.main, argv, monkeypatch, capsys)
    assert "--chat-template: has no effect without --model" in message


@every_family
def test_a_reward_sees_the_answer_of_a_sample_without_what_the_template_writes(family, monkeypatch):
    """The sampler is made to draw what training would train for the same answer."""
    tokenizer = tokenizer_of(family)
    example, _ = encode_one(TextPair("What is 4 * 8?", "It is 32.", "No."), tokenizer)
    drawn = [[example.chosen_ids, example.rejected_ids]]
    monkeypatch.setattr(generate, "sample", lambda *_, **__: (drawn, [[True, True]], [[-1.0, -2.0]]))
    model = torch.nn.Linear(1, 1)
    settings = Settings(max_response_length=50, dtype="float32")
    pair, = generate.roll_out(model, tokenizer, [replace(example, chosen="", rejected="")], SIDES, settings)
    assert (pair.chosen, pair.rejected) == ("It is 32.", "No.") == (example.chosen, example.rejected)


# --- characters that the tokenizer does not know

def test_texts_that_the_tokenizer_changes_are_counted():
    _, tokenizer = toy_model()
    known, other = "the soup was good .", "the soup was café good ."
    pairs = [TextPair(known, known, "good"), TextPair(other, other, known), TextPair(known, "good", other)]
    _, account, _ = encode(pairs, tokenizer, {tokenizer.eos_token_id}, 40, 40)
    assert account.altered == {"prompts whose text the tokenizer changes": 1,
                               "responses whose text the tokenizer changes": 2}
