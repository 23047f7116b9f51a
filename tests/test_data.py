"""Reading preference data by its columns, rendering, truncation, masks; the toy's corpus."""
import json
import math
from collections import Counter

import pytest
import torch
from conftest import END, EOS, TEMPLATE, byte_tokenizer, pairs_of

import data
from data import collate, encode, end_token_ids, render
from formats import (
    NO_TEXT, TOO_MANY_CELLS, Account, TextPair, load_pairs, read_rows, train_and_held_out)
from runtime.command_line import InputError
from runtime.run_directory import write_rows
from toy import NOUNS, grammar_pairs, toy_reward

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
TYPED = [{"role": role, "content": [{"type": "text", "value": text}]}
         for role, text in (("user", "Q"), ("assistant", "good"))]
HH = "\n\nHuman: Q\n\nAssistant: A\n\nHuman: more\n\nAssistant:"
HH_PROMPT = [USER, ASSISTANT, {"role": "user", "content": "more"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("row, prompt, chosen, rejected", [
    (dict(prompt="Q", chosen="good", rejected="bad"), "Q", "good", "bad"),
    (dict(prompt="Q", chosen=[USER, GOOD], rejected=[USER, BAD]), [USER], "good", "bad"),
    (dict(prompt="Q", chosen=[GOOD], rejected=[BAD]), [USER], "good", "bad"),
    (dict(prompt=[USER], chosen=[GOOD], rejected=[BAD]), [USER], "good", "bad"),
    (dict(prompt=[USER], chosen=[USER, GOOD], rejected=[USER, BAD]), [USER], "good", "bad"),
    (dict(prompt=[dict(role="system", content="S"), USER], chosen=[USER, GOOD], rejected=[USER, BAD]),
     [dict(role="system", content="S"), USER], "good", "bad"),
    (dict(chosen=[USER, GOOD], rejected=[USER, BAD]), [USER], "good", "bad"),
    (dict(chosen=HH + " good", rejected=HH + " bad"), HH_PROMPT, "good", "bad"),
    (dict(chosen_messages=TYPED, rejected_messages=[USER, BAD]), [USER], "good", "bad"),
    (dict(conversations=[{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}],
          chosen={"from": "gpt", "value": "good"}, rejected={"from": "gpt", "value": "bad"}),
     [{"role": "system", "content": "S"}, USER], "good", "bad"),
    (dict(prompt="Q", response_0="bad", response_1="good", better_response_id=1, safer_response_id=0),
     "Q", "good", "bad"),
    (dict(instruction="Q",
          completions=[dict(response="bad", overall_score=2.0), dict(response="good", overall_score=8.5),
                       dict(response="so so", overall_score=5), dict(response="?", overall_score=None)]),
     "Q", "good", "bad"),
    (dict(info=dict(post="P", title="T", subreddit="s"), summaries=[dict(text=" bad"), dict(text=" good")],
          choice=1), "SUBREDDIT: r/s\n\nTITLE: T\n\nPOST: P\n\nTL;DR:", " good", " bad"),
    (dict(question=dict(full_text="Q"), answer_0="good", answer_1="bad", score_0=0.5, score_1=-0.5),
     "Q", "good", "bad"),
])
def test_every_format_is_told_by_its_columns(tmp_path, row, prompt, chosen, rejected):
    pairs, account = load_pairs(write(tmp_path / "any.jsonl", [row]))
    assert pairs == [TextPair(prompt, chosen, rejected)] and account.rows == 1


@pytest.mark.parametrize("row, prompt, chosen", [
    (dict(prompt="Q"), "Q", None), (dict(prompt=[USER]), [USER], None),
    (dict(messages=[USER, ASSISTANT, USER, GOOD]), [USER, ASSISTANT, USER], "good"),
    (dict(messages=TYPED), [USER], "good")])
def test_rows_of_prompts_and_of_dialogues_are_pairs_that_lack_responses(tmp_path, row, prompt, chosen):
    pairs, account = load_pairs(write(tmp_path / "any.jsonl", [row]))
    assert pairs == [TextPair(prompt, chosen, None)]
    assert account.format == ("dialogues" if chosen else "prompts")


@pytest.mark.parametrize("row", [dict(prompt=""), dict(prompt=None), dict(prompt=3), dict(prompt=[]),
                                 dict(prompt=[dict(role="user", content=" ")]), dict(messages=[USER]),
                                 dict(messages=None), dict(messages=[USER, {**GOOD, "content": ""}])])
def test_prompts_and_dialogues_with_nothing_in_them_are_dropped(tmp_path, row):
    good = dict(prompt="Q") if "prompt" in row else dict(messages=[USER, GOOD])
    pairs, account = load_pairs(write(tmp_path / "any.jsonl", [row, good]))
    assert len(pairs) == 1 and account.dropped.total() == 1


@pytest.mark.parametrize("rows, dropped", [
    ("prompt,chosen,rejected\nQ,good,bad\nQ,good\nQ,g,b\nQ,good,bad 2,more,and more\n",
     {NO_TEXT: 1, f"row with {TOO_MANY_CELLS}": 1}),
    (f"prompt,chosen,rejected\nQ,good,bad\nQ,good,{'long ' * 40_000}\n", {})])
def test_ragged_csv_is_counted_and_long_csv_is_read(tmp_path, rows, dropped):
    (tmp_path / "x.csv").write_text(rows)
    pairs, account = load_pairs(str(tmp_path / "x.csv"))
    assert len(pairs) == 2 and account.dropped == dropped


PKU = dict(prompt="Q", response_0="zero", response_1="one", safer_response_id=0)
WEB = dict(question=dict(full_text="Q"), answer_0="zero", answer_1="one", score_1=0)
ULTRA = dict(instruction="Q")


def completions(*scores):
    return [dict(response=f"{place}", overall_score=score) for place, score in enumerate(scores)]


@pytest.mark.parametrize("row, chosen", [
    ({**PKU, "better_response_id": 1.0}, "one"), ({**PKU, "better_response_id": True}, "one"),
    ({**PKU, "better_response_id": "1"}, "one"), ({**PKU, "better_response_id": False}, "zero"),
    ({**PKU, "better_response_id": None}, None), ({**PKU, "better_response_id": 7}, None),
    ({**PKU, "better_response_id": "one"}, None),
    ({**WEB, "score_0": "0.5"}, "zero"), ({**WEB, "score_0": math.nan}, None),
    ({**WEB, "score_0": "good"}, None), ({**WEB, "score_0": 10**400}, None),
    ({**ULTRA, "completions": completions(1, "9", 3)}, "1"),
    ({**ULTRA, "completions": completions(1, math.inf)}, None),
    ({**ULTRA, "completions": completions([1], 2)}, None), ({**ULTRA, "completions": None}, None)])
def test_a_label_that_is_a_number_is_used_and_one_that_is_none_drops_its_row(tmp_path, row, chosen):
    name, good = str(tmp_path / "x.jsonl"), dict(row, better_response_id=0, score_0=2,
                                                 completions=completions(1, 2))
    pairs, account = load_pairs(write(tmp_path / "x.jsonl", [row, good]))
    assert [pair.chosen for pair in pairs[:-1]] == [chosen] * (chosen is not None), name
    assert len(pairs) + account.dropped.total() == 2


def test_huge_integers_are_read_or_counted(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(dict(prompt="Q", chosen="good", rejected="bad")) + "\n" +
                                      '{"prompt": ' + "9" * 4000 + ', "chosen": "a", "rejected": "b"}\n')
    assert load_pairs(str(tmp_path / "x.jsonl"))[1].dropped == {NO_TEXT: 1}


def test_an_end_token_that_is_written_out_in_a_response_is_counted():
    pairs = [TextPair("Q", "good<eos> never learned", "bad"),
             TextPair("Q<eos>", "good", "bad")]
    examples, account, _ = encode(pairs, byte_tokenizer(), {1}, 90, 90)
    assert account.cut["responses with an end token in their text"] == 1
    assert byte_tokenizer().decode(examples[0].chosen_ids) == "good<eos>"


def test_pku_can_prefer_the_safer_response(tmp_path):
    row = dict(prompt="Q", response_0="zero", response_1="one", better_response_id=1, safer_response_id=0)
    assert load_pairs(write(tmp_path / "x.jsonl", [row]), prefer="safer")[0][0].chosen == "zero"


def test_unusable_rows_are_dropped_and_counted_by_reason(tmp_path):
    rows = [dict(chosen=HH + " good", rejected=HH + " bad"), dict(chosen=HH + " good", rejected=HH + " "),
            dict(chosen=HH + " same", rejected=HH + " same"), dict(chosen=None, rejected=HH + " bad"),
            dict(chosen=HH + " a", rejected="\n\nHuman: other\n\nAssistant: b"),
            dict(chosen="no dialogue", rejected="x"), dict(chosen=3, rejected=[USER, BAD]),
            dict(chosen=[USER, USER], rejected=[USER, BAD])]
    pairs, account = load_pairs(write(tmp_path / "x.jsonl", rows))
    assert len(pairs) == 1 and account.rows == 8
    assert account.dropped == {
        "empty response": 1, "chosen equals rejected": 1, NO_TEXT: 2,
        "last message is not the assistant's": 1, "chosen and rejected have different prompts": 1,
        "not a '\\n\\nHuman: … \\n\\nAssistant: …' dialogue": 1}


def test_ties_and_non_text_parts_are_dropped(tmp_path):
    picture = [{"role": "user", "content": [{"type": "image", "value": "…"}]}, GOOD]
    for row in (dict(question=dict(full_text="Q"), answer_0="a", answer_1="b", score_0=0, score_1=0),
                dict(prompt="Q", response_0="a", response_1="b", better_response_id=-1, safer_response_id=0),
                dict(chosen=picture, rejected=[USER, BAD])):
        with pytest.raises(InputError, match="none of 1 rows can be used"):
            load_pairs(write(tmp_path / "x.jsonl", [row]))


def test_files_of_every_kind_give_the_same_pairs(tmp_path):
    import datasets
    rows = [dict(prompt="line\u2028separator", chosen="a\nb", rejected="c"),
            dict(prompt="Q, 2", chosen="d", rejected="e")]
    jsonl = load_pairs(write(tmp_path / "x.jsonl", rows))[0]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_csv(str(tmp_path / "x.csv"))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "x.parquet"))
    rows = pairs_of(rows)
    assert jsonl == rows
    for kind in ("json", "csv", "parquet"):
        assert load_pairs(str(tmp_path / f"x.{kind}"))[0] == rows


def test_csv_text_stays_text_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected\n1+1,2,3\nany?,None,NA\n", encoding="utf-8-sig")
    pairs = [dict(prompt="1+1", chosen="2", rejected="3"), dict(prompt="any?", chosen="None", rejected="NA")]
    assert load_pairs(str(tmp_path / "x.csv"))[0] == pairs_of(pairs)
    (tmp_path / "x.jsonl").write_text(json.dumps(pairs[0]) + "\n", encoding="utf-8-sig")
    assert load_pairs(str(tmp_path / "x.jsonl"))[0] == pairs_of(pairs[:1])


def test_half_a_surrogate_pair_is_dropped(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "Q", "chosen": "\\ud83d", "rejected": "b"}\n' + json.dumps(
        dict(prompt="Q", chosen="good", rejected="bad")) + "\n")
    pairs, account = load_pairs(str(tmp_path / "x.jsonl"))
    assert len(pairs) == 1 and account.dropped == {NO_TEXT: 1}


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_failure_while_writing_rows_leaves_the_file_that_was_there(name, tmp_path, monkeypatch):
    write_rows(tmp_path / "new" / name, [{"text": "é\u2028"}])
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError):
        write_rows(tmp_path / "new" / name, [])
    assert read_rows(tmp_path / "new" / name) == [{"text": "é\u2028"}]


def test_the_limit_counts_kept_pairs(tmp_path):
    rows = [dict(prompt="Q", chosen="a", rejected="")] + [
        dict(prompt="Q", chosen="a", rejected=str(i)) for i in range(9)]
    pairs, account = load_pairs(write(tmp_path / "x.jsonl", rows), limit=3)
    assert [pair.rejected for pair in pairs] == ["0", "1", "2"] and account.rows == 4


def test_held_out_prompts_are_never_trained_on(tmp_path):
    rows = [dict(prompt=f"question {i // 3}", chosen=f"a{i}", rejected=f"b{i}") for i in range(600)]
    train, held_out, *_ = train_and_held_out(write(tmp_path / "x.jsonl", rows))
    assert len(train) + len(held_out) == 600 and 5 < len(held_out) < 60
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
    prompts, others = ({row["prompt"] for row in grammar_pairs(held_out)} for held_out in (False, True))
    assert len(prompts) == 60 and len(others) == 20 and not prompts & others
    assert all(any(noun in prompt for prompt in side) for side in (prompts, others) for noun in NOUNS)


def test_the_toy_corpus_is_the_same_every_time_and_prefers_the_better_review():
    pairs = grammar_pairs()
    assert pairs == grammar_pairs() and len(pairs) == 3000
    gaps = [toy_reward([p["prompt"]], [p["chosen"]])[0] - toy_reward([p["prompt"]], [p["rejected"]])[0]
            for p in pairs]
    agree = [gap > 0 for gap in gaps if gap]
    bradley_terry = torch.sigmoid(torch.tensor(gaps).abs()).mean()
    assert sum(agree) / len(agree) == pytest.approx(bradley_terry.item(), abs=0.03)


# --- text and tokens

def encode_one(pair, tokenizer, prompt_limit=100, response_limit=100):
    examples, account, _ = encode([pair], tokenizer, end_token_ids(tokenizer), prompt_limit, response_limit)
    return examples[0], account


def test_without_a_template_strings_stay_and_messages_become_the_plain_dialogue():
    tokenizer = byte_tokenizer()
    assert render("Say: ", "yes", tokenizer) == ("Say: ", "yes")
    head, tail = render(HH_PROMPT, "good", tokenizer)
    assert head + tail == HH + " good" and tail == " good"


def test_with_a_template_prompt_and_response_are_the_whole_render():
    tokenizer = byte_tokenizer(TEMPLATE)
    example, _ = encode_one(TextPair("Q", "good", "bad"), tokenizer)
    whole = tokenizer.apply_chat_template([USER, GOOD], tokenize=True, return_dict=False)
    assert example.prompt_ids + example.chosen_ids == whole
    # one end token, the template's
    assert example.chosen_ids.count(END) == 1 and example.chosen_ids[-1] == END and 1 not in whole
    assert 3 not in example.chosen_ids and example.prompt_ids[-1] == 3     # the header is in the prompt


def test_a_template_without_generation_prompt_still_keeps_its_header_out_of_the_response():
    tokenizer = byte_tokenizer(TEMPLATE[:TEMPLATE.index("{% if add")])
    assert render("Q", "good", tokenizer) == ("<|user|>Q<|end|><|assistant|>", "good<|end|>")
    llama = byte_tokenizer("{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' "
                           "else ' ' + m.content + ' <eos>' }}{% endfor %}")
    assert render("Q", "good", llama) == ("[INST] Q [/INST]", " good <eos>")


def test_a_template_whose_generation_prompt_is_no_prefix_is_refused():
    thinking = TEMPLATE.replace("<|assistant|>{% endif", "<|assistant|>think{% endif")
    tokenizer = byte_tokenizer(thinking)
    with pytest.raises(InputError, match="1 the chat template's generation prompt does not begin"):
        encode([TextPair("Q", "good", "bad")], tokenizer, {1}, 90, 90)


@pytest.mark.parametrize("bos", [False, True])
def test_bos_is_there_once_where_the_tokenizer_has_one_and_never_before_the_response(bos):
    """EOS, with which the tokenizer ends every text, is there once too, after the response."""
    example, _ = encode_one(TextPair("Q", "good", "bad"), byte_tokenizer(bos=bos))
    whole = example.prompt_ids + example.chosen_ids
    assert whole.count(4) == int(bos) and whole.count(EOS) == 1
    assert (None not in example.prompt_ids and example.chosen_ids[-1] == 1
            and 4 not in example.chosen_ids)


def test_prompts_are_cut_from_the_left_and_responses_from_the_right_without_an_end_token():
    tokenizer = byte_tokenizer(bos=True)
    pair = TextPair("0123456789", "abcdefgh", "wxyz")          # the last one, with its end token, just fits
    example, account = encode_one(pair, tokenizer, 4, 5)
    assert tokenizer.decode(example.prompt_ids) == "<bos>789"
    assert (tokenizer.decode(example.chosen_ids) == "abcde"
            and tokenizer.decode(example.rejected_ids) == "wxyz<eos>")
    assert list(account.cut.values()) == [1, 1] and not account.dropped
    assert str(account) == ("      cut: 1 prompts longer than --max-prompt-length, 1 responses longer than "
                            "--max-response-length")


def test_a_response_that_the_data_lack_has_no_ids():
    example, account = encode_one(TextPair("Q", None, None), byte_tokenizer(TEMPLATE))
    assert example.chosen_ids == example.rejected_ids == [] and account.dropped.total() == 0
    assert byte_tokenizer(gap=True).decode(example.prompt_ids) == "<|user|>Q<|end|><|assistant|>"
    example, _ = encode_one(TextPair("Q", "good", None), byte_tokenizer(gap=True))
    assert byte_tokenizer(gap=True).decode(example.chosen_ids) == "good<eos>" and example.rejected_ids == []


def test_pairs_that_truncation_makes_equal_are_dropped_and_counted():
    pairs = [TextPair("Q", "same start, good", "same start, bad"),
             TextPair("Q", "good", "bad")]
    examples, account, _ = encode(pairs, byte_tokenizer(), {1}, 9, 9)
    assert len(examples) == 1 and account.dropped == {"same tokens in both responses": 1}


def test_collation_gives_explicit_masks():
    ids, attention, response = collate([[5, 6], [7]], [[1], [8, 9, 1]])
    assert ids.tolist() == [[5, 6, 1, 0], [7, 8, 9, 1]]
    assert attention.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert response.tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]


def test_a_response_as_long_as_the_limit_is_not_longer():
    table = data.length_table(dict(prompt=[], chosen=[3, 4, 5, 6, 9]), "tokens", dict(chosen=5))
    assert table == "   chosen: median 5 tokens, 90th percentile 9, longest 9; 2 of 5 longer than 5"


def test_the_command_line_shows_format_counts_lengths_and_pairs(tmp_path, monkeypatch, capsys, checkpoint):
    path = write(tmp_path / "x.jsonl", [dict(prompt="Q", chosen="good", rejected="bad"),
                                        dict(prompt="Q", chosen="good", rejected="")])
    for more in ([], ["--model", str(checkpoint)]):
        monkeypatch.setattr("sys.argv", ["data.py", path, *more])
        data.main()
        shown = capsys.readouterr().out
        assert "2 rows, 1 kept\n  dropped: 1 (1 empty response)\n" in shown and "good" in shown
        assert ("tokens" in shown and "<|user|>" in shown) if more else "characters" in shown


def test_the_command_line_shows_the_rows_and_the_label_that_are_asked_for(tmp_path, monkeypatch, capsys):
    row = dict(response_0="zero", response_1="one", better_response_id=1, safer_response_id=0)
    path = write(tmp_path / "x.jsonl", [dict(row, prompt=f"Q{nth}") for nth in range(3)])
    for flags, kept, chosen in ((["--limit", "1"], 1, "one"), (["--prefer", "safer"], 3, "zero")):
        monkeypatch.setattr("sys.argv", ["data.py", path, *flags])
        data.main()
        shown = capsys.readouterr().out
        assert f", {kept} kept\n" in shown and f"chosen:   '{chosen}'" in shown


def test_of_a_prompt_that_is_cut_to_one_token_its_last_is_left():
    tokenizer = byte_tokenizer(bos=True)
    example, _ = encode_one(TextPair("789", "good", "bad"), tokenizer, prompt_limit=1)
    assert tokenizer.decode(example.prompt_ids) == "9"


@pytest.mark.parametrize("more", [[], ["--model"]])
@pytest.mark.parametrize("row, told", [
    (dict(prompt="What?"), "prompts"), (dict(prompt=[dict(USER, content="What?")]), "prompts"),
    (dict(messages=[dict(USER, content="What?"), GOOD]), "dialogues")])
def test_the_command_line_shows_rows_that_lack_responses(tmp_path, monkeypatch, capsys, checkpoint, row, told,
                                                         more):
    path = write(tmp_path / "x.jsonl", [row])
    monkeypatch.setattr("sys.argv", ["data.py", path, *more, *[str(checkpoint)] * len(more)])
    data.main()
    shown = capsys.readouterr().out
    assert f"{told}; 1 rows, 1 kept\n  nothing dropped, cut, altered or unread\n" in shown
    assert "What?" in shown
    assert ("good" in shown) == ("chosen" in shown) == (told == "dialogues") and "rejected" not in shown


def test_pairs_beyond_the_limit_are_counted_apart_from_those_that_were_dropped_before_it():
    pairs = pairs_of([dict(prompt="Q", chosen="same", rejected="same"),
                      *[dict(prompt=f"Q{i}", chosen="good", rejected="bad") for i in range(5)]])
    examples, account, _ = encode(pairs, byte_tokenizer(), {1}, 90, 90, limit=2)
    assert [example.prompt for example in examples] == ["Q0", "Q1"]
    assert account.dropped == {"same tokens in both responses": 1, "beyond --eval-limit": 3}


def test_the_columns_of_all_rows_tell_the_format(tmp_path):
    rows = [{"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    pairs, account = load_pairs(write(tmp_path / "x.jsonl", rows))
    assert pairs == [TextPair("a", "b", "c")] and account.dropped == {NO_TEXT: 1}


def test_the_held_out_pairs_of_a_run_are_those_within_its_limit(tmp_path):
    rows = [dict(prompt=f"question {i}", chosen="yes", rejected="no") for i in range(400)]
    source = write(tmp_path / "x.jsonl", rows)
    (tmp_path / "run").mkdir()
    for limit in (None, 200):
        (tmp_path / "run/args.json").write_text(json.dumps(dict(data=source, limit=limit, may_change=[])))
        _, expected, *_ = train_and_held_out(source, limit=limit)
        train, held_out, account, _ = train_and_held_out(source, str(tmp_path / "run"))
        assert held_out == expected and 4 < len(held_out) < 30
        # The run has not seen these pairs, so that another run on the same data must not see them either.
        assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
        assert len(train) == 400 - len(held_out)
        assert account.dropped == {f"prompt that {tmp_path}/run held out": len(held_out)}
    (tmp_path / "run/args.json").write_text(json.dumps(dict(data=source, eval_data=source, may_change=[])))
    with pytest.raises(InputError, match="all 400 pairs have prompts that .*run held out"):
        train_and_held_out(source, str(tmp_path / "run"))


def test_the_held_out_pairs_of_a_run_keep_the_labels_that_the_run_gave_them(tmp_path):
    rows = [dict(prompt=f"question {i}", chosen="yes", rejected="no", score_chosen=1, score_rejected=3)
            for i in range(60)]
    source = write(tmp_path / "x.jsonl", rows)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.json").write_text(json.dumps(dict(data=source, score_scale=2.0, may_change=[])))
    _, expected, *_ = train_and_held_out(source, score_scale=2.0)
    _, held_out, *_ = train_and_held_out(source, str(tmp_path / "run"))
    assert held_out == expected and {pair.chosen for pair in held_out} == {"no"}       # the preferred one


def test_a_held_out_prompt_is_not_trained_on_after_its_oldest_turns_were_cut(tmp_path):
    turns = [dict(role="system", content="S"), dict(role="user", content="a"),
             dict(role="assistant", content="b")]
    rows = [dict(prompt=[*turns, dict(role="user", content=f"question {i}")], chosen="yes", rejected="no")
            for i in range(60)]
    source = write(tmp_path / "x.jsonl", rows)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.json").write_text(json.dumps(dict(data=source, may_change=[])))
    cut = write(tmp_path / "y.jsonl", [dict(row, prompt=row["prompt"][::3]) for row in rows])
    train, held_out, account, _ = train_and_held_out(cut, str(tmp_path / "run"))
    questions = [{pair.prompt[-1]["content"] for pair in pairs} for pairs in (train, held_out)]
    assert held_out and not questions[0] & questions[1]
    assert account.dropped == {f"prompt that {tmp_path}/run held out": len(held_out)}


def test_accounts_add_up_kind_by_kind():
    account = Account("prompts", 9, *(Counter(a=1) for _ in range(4)))
    account.add(Account("", 0, *(Counter(a=nth, b=1) for nth in range(4))))
    assert account.counts() == {name: dict(a=1 + nth, b=1) for nth, name in enumerate(
        ("dropped", "cut", "altered", "unread"))}
    assert (account.format, account.rows) == ("prompts", 9)


def test_scores_make_soft_labels_of_the_held_out_pairs_of_another_file_too(tmp_path):
    rows = [dict(prompt=f"question {i}", chosen="yes", rejected="no", score_chosen=3, score_rejected=1)
            for i in range(60)]
    source, other = write(tmp_path / "x.jsonl", rows), write(tmp_path / "y.jsonl", rows[:2])
    soft = pytest.approx(1 / (1 + math.exp(-1)))
    for eval_data in (None, other):
        train, held_out, *_ = train_and_held_out(source, eval_data, score_scale=2.0)
        assert held_out and {pair.preference for pair in train + held_out} == {held_out[0].preference}
        assert held_out[0].preference == soft
