"""Whatever a row holds is used, or named with its number of rows, or drops the row by its reason."""
import gzip
import json
import math

import pytest
from test_real_data import BAD, GOOD, PLAIN, SYSTEM, Q, load, turn

import formats
from formats import NO_TEXT, TextPair, load_pairs
from runtime.command_line import InputError

SUM, FOUR, FIVE = turn("user", "What is 2+2?"), turn("assistant", "4"), turn("assistant", "5")
FIRST, ASKED = [turn("user", "Hi"), turn("assistant", "Hello")], turn("user", "How are you?")


def answered(*before, **more):
    """A row of whole dialogues that share these turns, whose chosen answer has more keys."""
    return dict(chosen=[*before, dict(GOOD, **more)], rejected=[*before, BAD])


# --- what is left is named

@pytest.mark.parametrize("row, unread", [
    (dict(PLAIN, prompt="Translate to French", input="good morning"), {"input"}),
    (dict(question="Why?", chosen="yes", rejected="no", context="It rains."), {"context"}),
    (dict(PLAIN, score_chosen=8.0, score_rejected=2.0), {"score_chosen", "score_rejected"}),
    (dict(messages=[Q, GOOD], prompt="Q"), {"prompt"}),
    (answered(dict(Q, name="Ann")), {"message.name"}),
    (answered(Q, weight=0.5), {"message.weight"}),
    (answered(*FIRST[:1], dict(FIRST[1], train=True), ASKED), {"message.train"}),
    (answered(turn("user", [dict(type="text", text="Q", cache_control="short")])),
     {"message.part.cache_control"}),
    (dict(PLAIN, history=[dict(FIRST[0], id=3), FIRST[1]]), {"message.id"}),
    (dict(conversations=[{"from": "human", "value": "Q", "lang": "en"}], chosen=GOOD, rejected=BAD),
     {"message.lang"}),
    (dict(instruction="Q", completions=[dict(response="bad", overall_score=1, custom_system_prompt="S"),
                                        dict(response="good", overall_score=2)]),
     {"completions.custom_system_prompt"}),
    (dict(info=dict(post="P", title="T", subreddit="s", id="i"), choice=0,
          summaries=[dict(text="good", note="n"), dict(text="bad")]), {"info.id", "summaries.note"}),
    (dict(instruction="Q", input="", chosen="yes", rejected="no", note=None, tags=[]), set())])
def test_what_nothing_reads_is_named(row, unread, tmp_path):
    assert load(tmp_path, row)[1].unread == dict.fromkeys(unread, 1)
    assert load(tmp_path, row, {name: row[name] for name in row if name not in unread}, row)[1].unread == (
        dict.fromkeys(unread, 3 if any("." in name for name in unread) else 2))


@pytest.mark.parametrize("place", [0, 99, 100, 150, 299])
def test_a_column_is_named_wherever_it_first_appears(place, tmp_path):
    rows = [dict(PLAIN) for _ in range(300)]
    rows[place]["persona"] = rows[-1]["persona"] = "pirate"
    assert load(tmp_path, *rows)[1].unread == {"persona": len({place, 299})}


def test_rows_of_columns_count_in_files_of_every_kind(tmp_path):
    import datasets
    rows = [dict(PLAIN, lang="en"), dict(PLAIN, lang=None), dict(PLAIN, lang="")]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(tmp_path / "x.parquet"))
    table.to_csv(str(tmp_path / "x.csv"))
    table.to_parquet(str(tmp_path / "dir/x.parquet"))
    for name in ("x.parquet", "x.csv", "dir"):
        assert load_pairs(str(tmp_path / name))[1].unread == {"lang": 1}


@pytest.mark.parametrize("earlier, counted", [(0, []), (1, [1]), (2, [1]), (5, [1])])
def test_dialogues_of_which_only_the_last_answer_is_trained_are_counted(earlier, counted, tmp_path):
    _, account = load(tmp_path, dict(messages=[*FIRST * earlier, Q, GOOD]), dict(messages=[Q, GOOD]))
    assert list(account.altered.values()) == counted
    assert {*account.altered} <= {"dialogues of which only the last answer is trained"}


@pytest.mark.parametrize("echoes, plain", [(1, 2), (3, 4), (10, 90)])
def test_answers_that_repeat_their_prompt_are_counted_where_most_do_not(echoes, plain, tmp_path):
    rows = [dict(prompt=f"question {i}", chosen=f"question {i} yes", rejected=f"question {i} no")
            for i in range(echoes)] + [PLAIN] * plain
    pairs, account = load(tmp_path, *rows)
    assert account.altered == {"prompts repeated in their responses, left in": echoes}
    assert pairs[0].chosen == "question 0 yes"


# --- what cannot be left out drops its row

@pytest.mark.parametrize("mark", [dict(weight=0), dict(train=False), dict(loss=False), dict(weight=0.0),
                                  dict(loss_weight=0.0), dict(train="false")])
def test_an_answer_that_is_not_to_be_trained_drops_its_row(mark, tmp_path):
    name, = mark
    reason = {f"answer that its {name} excludes from training": 1}
    for row in (answered(Q, **mark), dict(prompt="Q", chosen=dict(GOOD, **mark), rejected=BAD),
                dict(conversations=[Q], chosen=dict(GOOD, **mark), rejected=BAD),
                dict(messages=[Q, GOOD, Q, dict(GOOD, **mark)])):
        good = json.loads(json.dumps(row).replace(json.dumps(mark)[1:-1], f'"{name}": null'))
        pairs, account = load(tmp_path, row, good)
        assert len(pairs) == 1 and account.dropped == reason and account.unread == {}
    kept = answered(dict(Q, **mark), dict(FIRST[1], **mark), ASKED, **{name: 1})         # as it should be
    assert load(tmp_path, kept)[1].unread == {}


@pytest.mark.parametrize("row", [
    dict(chosen=[FIRST[1], ASKED, turn("assistant", "Fine")], rejected=BAD),
    dict(chosen=[FIRST[1], ASKED, GOOD], rejected=[FIRST[1], SUM, BAD]),
    dict(chosen=[SYSTEM, GOOD], rejected=[BAD]),
    dict(chosen=[turn("system", "other"), GOOD], rejected=[turn("system", "other"), BAD])])
def test_turns_in_the_answers_that_both_do_not_share_drop_the_row(row, tmp_path):
    start = [SYSTEM, FIRST[0]]
    for prompt in (dict(conversations=start), dict(prompt=start)):
        good = dict(prompt, chosen=[GOOD], rejected=[BAD])
        pairs, account = load(tmp_path, dict(prompt, **row), good)
        assert pairs == [TextPair(start, "good", "bad")] and account.dropped.total() == 1


# --- a turn stands once

@pytest.mark.parametrize("prompt, before, whole", [
    ("What is 2+2?\n", [SUM], [SUM]), ("What is 2+2?", [SYSTEM, SUM], [SYSTEM, SUM]),
    ("What is 2+2?", [*FIRST, SUM], [*FIRST, SUM]), (" What is 2+2?", [*FIRST, SUM, FOUR, Q],
                                                     [*FIRST, SUM, FOUR, Q]),
    ([*FIRST, SUM], [SUM], [*FIRST, SUM]), ([SYSTEM, SUM], [SYSTEM, *FIRST, SUM], [SYSTEM, *FIRST, SUM]),
    ([turn("system", "S\n"), SUM], [SYSTEM, SUM], [turn("system", "S\n"), SUM]),
    ([SYSTEM, FIRST[0]], [FIRST[1], SUM], [SYSTEM, *FIRST, SUM]),
    ([*FIRST, SUM], [], [*FIRST, SUM])])
def test_a_turn_that_the_prompt_and_the_answers_share_stands_once(prompt, before, whole, tmp_path):
    row = dict(chosen=[*before, FOUR], rejected=[*before, FIVE])
    assert load(tmp_path, dict(row, prompt=prompt))[0] == [TextPair(whole, "4", "5")]
    conversations = [turn("user", prompt)] if isinstance(prompt, str) else prompt
    assert load(tmp_path, dict(row, conversations=conversations))[0] == [TextPair(whole, "4", "5")]


@pytest.mark.parametrize("row, prompt", [
    (dict(history=[["Hi", "Hello"]], prompt="What is 2+2?"), [*FIRST, SUM]),
    (dict(history=[*FIRST, SUM], prompt="What is 2+2?"), [*FIRST, SUM]),
    (dict(history=[["Hi", "Hello"]], prompt=[*FIRST, SUM]), [*FIRST, SUM]),
    (dict(system="S\n", prompt=[SYSTEM, SUM]), [turn("system", "S\n"), SUM]),
    (dict(system="S", history=[["Hi", "Hello"]], prompt=[SYSTEM, SUM]), [SYSTEM, *FIRST, SUM])])
def test_a_turn_that_the_prompt_and_another_column_share_stands_once(row, prompt, tmp_path):
    assert load(tmp_path, dict(row, chosen="4", rejected="5"))[0] == [TextPair(prompt, "4", "5")]


# --- a name stands once

TWICE = '{"prompt": "Q", "chosen": "a", "rejected": "b", "chosen": "c"}'
NESTED = '{"chosen": [{"role": "user", "content": "Q", "content": "R"}], "rejected": []}'
ONCE = '{"prompt": "Q", "chosen": "a", "rejected": "b"}'


@pytest.mark.parametrize("name, text, said", [
    ("x.csv", "prompt,chosen,rejected,chosen\nQ,a,b,c\n", ":1: the header has the name 'chosen' twice"),
    ("x.csv", "prompt,chosen,rejected,,\nQ,a,b,c,d\n", ":1: the header has the name '' twice"),
    ("x.jsonl", f"{ONCE}\n\n{TWICE}\n", ":3: an object has the name 'chosen' twice"),
    ("x.jsonl", f"{ONCE}\n{NESTED}\n", ":2: an object has the name 'content' twice"),
    ("x.json", f"[{ONCE},\n {ONCE}, {ONCE},\n\n{TWICE}]", ":4: an object has the name 'chosen' twice"),
    ("x.json", f"\n[\n{NESTED}]", ":3: an object has the name 'content' twice")])
def test_a_name_that_stands_twice_is_an_error(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        load_pairs(str(tmp_path / name))
    assert str(error.value) == f"{tmp_path / name}{said}"


def test_a_name_that_stands_twice_in_a_parquet_file_or_a_message_in_a_string(tmp_path):
    import pyarrow.parquet
    names = ["prompt", "chosen", "rejected", "chosen"]
    table = pyarrow.table([["Q"], ["a"], ["b"], ["c"]], names=names)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match="x.parquet: two columns have the name 'chosen'"):
        load_pairs(str(tmp_path / "x.parquet"))
    row = dict(PLAIN, prompt='[{"role": "user", "content": "Q", "content": "R"}]')
    assert load(tmp_path, row, PLAIN)[1].dropped == {"an object has the name 'content' twice": 1}


# --- text is recognised for what it is

HH = "\n\nHuman: hi\n\nAssistant:"
HI = [turn("user", "hi")]


@pytest.mark.parametrize("row, prompt", [
    (dict(prompt=HH, chosen=" good", rejected=" bad"), HI),
    (dict(prompt=HH, chosen=HH + " good", rejected=HH + " bad"), HI),
    (dict(prompt=HH.strip(), chosen="good", rejected="bad"), HI),
    (dict(prompt=HH.strip(), chosen=HH.strip() + " good", rejected=HH.strip() + " bad"), HI),
    (dict(prompt=HH + " ", chosen="good", rejected="bad"), HI),
    (dict(prompt="hi", chosen=HH + " good", rejected=HH + " bad"), HI),
    (dict(question="\n\nHuman: hi\n\nAssistant: Hello\n\nHuman: How are you?\n\nAssistant:", chosen=" good",
          rejected=" bad"), [*HI, FIRST[1], ASKED]),
    (dict(chosen=HH.strip() + " good", rejected=HH.strip() + " bad"), HI)])
def test_a_prompt_in_the_marks_of_hh_becomes_messages(row, prompt, tmp_path):
    assert load(tmp_path, row)[0] == [TextPair(prompt, "good", "bad")]


def test_prompts_alone_in_the_marks_of_hh_become_messages_and_a_started_answer_stays(tmp_path):
    assert load(tmp_path, dict(prompt=HH))[0] == [TextPair(HI)]
    assert load(tmp_path, dict(prompt=HH + " Sure,"))[0] == [TextPair([*HI, turn("assistant", "Sure,")])]


@pytest.mark.parametrize("text", ["Human: hi", "Write 'Human: hi\n\nAssistant:' thrice.", "Assistant:",
                                  "Human: x\n\nAssistant: y\n\nContinue this."])
def test_text_that_only_speaks_of_hh_stays_text(text, tmp_path):
    row = dict(prompt=text, chosen="Human: hi\n\nAssistant: Hello", rejected="no")
    assert load(tmp_path, row)[0] == [TextPair(**row)]


@pytest.mark.parametrize("keys", [dict(id=1), dict(name="Ann"), dict(content=None, id=1)])
@pytest.mark.parametrize("quote", [json.dumps, repr])
def test_messages_in_a_string_are_messages_whatever_their_first_key_is(keys, quote, tmp_path):
    prompt, chosen, rejected = ({**keys, **turn} for turn in (Q, GOOD, BAD))
    row = dict(prompt=quote([prompt]), chosen=quote([chosen]), rejected=quote(rejected))
    pairs, account = load(tmp_path, row)
    assert pairs == [TextPair([Q], "good", "bad")]
    assert account.unread == {f"message.{key}": 1 for key in keys if key != "content"}


@pytest.mark.parametrize("text", ['{"from": "EUR", "to": "USD"}', '[{"id": 1, "role": "admin"}]',
                                  '{"id": 1, "call": {"role": "user", "content": "Q"}}',
                                  "[INST] {'role': 3}"])
def test_answers_that_are_other_json_stay_text(text, tmp_path):
    assert load(tmp_path, dict(PLAIN, chosen=text))[0][0].chosen == text


@pytest.mark.parametrize("said", ["    return 1", "\treturn 1\n", "\n  - one\n  - two", "  two spaces"])
def test_the_white_space_of_an_answer_is_kept(said, tmp_path):
    for row in (dict(prompt="Q", chosen=said, rejected="no"), dict(chosen=[Q, turn("assistant", said)],
                                                                   rejected=[Q, BAD]),
                dict(chosen=f"{HH} {said}", rejected=f"{HH} no"),
                dict(prompt=HH, chosen=f" {said}", rejected=" no")):
        assert load(tmp_path, row)[0][0].chosen == said


# --- soft labels

@pytest.mark.parametrize("value, preference", [
    (0.75, 0.75), (1, 1.0), (0, 1.0), ("0.25", 0.75), (0.5, 0.5), (1.5, None), (-0.1, None), (math.nan, None),
    (None, None), ("chosen", None), ([0.5], None), (math.inf, None)])
def test_a_column_preference_is_the_probability_that_chosen_is_preferred(value, preference, tmp_path):
    pairs, account = load(tmp_path, dict(PLAIN, preference=value), PLAIN)
    assert [pair.preference for pair in pairs] == [preference] * (preference is not None) + [1.0]
    assert account.dropped.total() == (preference is None) and account.unread == {}
    assert NO_TEXT not in account.dropped


@pytest.mark.parametrize("scores, scale, preference", [
    ((8, 6), 2, 1 / (1 + math.exp(-1))), ((6, 8), 1, 1 / (1 + math.exp(-2))), (("5", 5.0), 3, 0.5),
    ((1e300, -1e300), 1e-3, 1.0), ((None, 2), 1, None), ((math.nan, 2), 1, None)])
def test_scores_are_soft_labels_in_units_of_their_scale(scores, scale, preference, tmp_path):
    row = dict(PLAIN, score_chosen=scores[0], score_rejected=scores[1])
    load(tmp_path, row, PLAIN)
    pairs, account = load_pairs(str(tmp_path / "x.jsonl"), score_scale=scale)
    if preference is None:
        assert len(pairs) == 1 and account.dropped.total() == 1
    else:
        assert [pair.preference for pair in pairs] == [pytest.approx(preference), 1.0]
    assert account.unread == {}


def test_pairs_that_lack_what_a_flag_reads_are_counted(tmp_path):
    load(tmp_path, dict(PLAIN, score_chosen=8.0, score_rejected=2.0), PLAIN, PLAIN)
    _, account = load_pairs(str(tmp_path / "x.jsonl"), prefer="safer", score_scale=2.0)
    assert account.altered == {"pairs whose label is not from the scores of --score-scale": 2,
                               "pairs without the label that --prefer safer reads": 3}


def test_the_chosen_response_is_the_preferred_one_in_every_pair(tmp_path):
    pairs, account = load(tmp_path, dict(PLAIN, preference=0.2, chosen_finished=False), PLAIN)
    assert pairs == [TextPair("Q0", "no", "yes", 0.8, (True, False)), TextPair("Q0", "yes", "no")]
    assert account.altered == {"pairs with a preference below 0.5, whose responses are exchanged": 1}


# --- a quote that is not closed would swallow the rows after it

@pytest.mark.parametrize("row, reason", [
    ('"q";"good";"bad"', "',' expected after '\"'"),
    ('q,"not closed,bad', "unexpected end of data"), ('q,"not" doubled,bad', "',' expected after '\"'")])
def test_a_csv_file_whose_quotes_do_not_fit_is_an_error_that_names_the_row(row, reason, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(f'prompt,chosen,rejected\n"two\nlines",a b,c\n{row}\nq,yes,no\n')
    with pytest.raises(InputError, match=rf"x.csv:4: not csv \({reason}\); in the row that begins here"):
        load_pairs(str(path))
    path.write_text('prompt,chosen,rejected\n"two\nlines","a ""b""",c\n')
    assert load_pairs(str(path))[0] == [TextPair("two\nlines", 'a "b"', "c")]
    path.write_text('prompt,chosen,rejected\r\n"two\r\nlines",a,b\r\n', newline="")
    assert load_pairs(str(path))[0] == [TextPair("two\r\nlines", "a", "b")]
    path.write_text("[a,[a\n")
    with pytest.raises(InputError, match=r"x.csv:1: the header has the name '\[a' twice"):
        load_pairs(str(path))


# --- packed files

@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz", "x.csv.gz"])
def test_packed_files_are_read(name, tmp_path):
    text = json.dumps(PLAIN) + "\n"
    if ".csv" in name:
        text = "prompt,chosen,rejected\nQ0,yes,no\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert load_pairs(str(tmp_path / name))[0] == [TextPair(**PLAIN)]


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"{}" * 999)[:-12], b"",
                                     b"\x1f\x8b" + b"x" * 99])
def test_a_packed_file_that_is_broken_is_one_line(content, tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(InputError, match="x.jsonl.gz"):
        load_pairs(str(tmp_path / "x.jsonl.gz"))
    with pytest.raises(InputError, match="y.jsonl.gz: no such file"):
        load_pairs(str(tmp_path / "y.jsonl.gz"))


@pytest.mark.parametrize("text", [
    '[{"role": "user", "content": "Q"}, 5]', '[{"role": "user", "content": "Q"}, {"content": "Q"}]',
    '[{"role": "user", "content": "Q"}, {"role": "user"}]'])
def test_a_list_of_which_a_part_is_no_message_is_a_text(text):
    assert formats.text_or_messages(text, None) == text


@pytest.mark.parametrize("prompt, response, left", [
    ("\n\nHuman: Q\n\nAssistant: ", " yes", " yes"),
    ("\n\nHuman: Q\n\nAssistant:", "Human: Q\n\nAssistant: yes", "yes")])
def test_a_response_to_an_open_prompt_lacks_the_prompt_and_the_one_space_of_its_mark(prompt, response, left):
    assert formats.after_hh_prompt(prompt, response) == left


@pytest.mark.parametrize("source, asked", [
    ("owner/name", ("owner/name", None, "train")), ("owner/name:test", ("owner/name", None, "test")),
    ("owner/name/small:test[:9]", ("owner/name", "small", "test[:9]")), ("name:", ("name", None, "train"))])
def test_a_hub_name_says_its_configuration_and_its_split(source, asked, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: (name, config, split))
    assert formats.read_data_set(source) == asked
