"""Answer files of AlpacaEval, MT-Bench and Arena-Hard: their judges' columns, dialogues, temperatures."""
import json
import shutil

import pytest
import torch
from conftest import TEMPLATE, byte_tokenizer, tiny_model
from test_errors import fails

import generate
from data import InputError, encode
from generate import answer_questions, draw, end_token_ids, load_questions, model_name, prepare

CATEGORIES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
              "reasoning": 0.0, "stem": 0.1, "humanities": 0.1, "law": 0.7}    # the last is not MT-Bench's
QUESTIONS = {
    "MT-Bench": [{"question_id": 81 + i, "category": category, "turns": [f"ask {i}", f"then {i}"],
                  **({"reference": ["r1", "r2"]} if category == "math" else {})}
                 for i, category in enumerate(CATEGORIES)],
    "Arena-Hard": [{"uid": f"4{i}e5", "category": "arena-hard-v0.1", "cluster": "C",
                    "prompt": f"ask {i} é\u2028"} for i in range(3)],
    "AlpacaEval": [{"instruction": f"ask {i}", "output": "theirs", "generator": "text_davinci_003",
                    "dataset": "koala"} for i in range(3)]}


def write(path, rows):
    """Questions as a file: AlpacaEval's are one array, the others' JSON lines."""
    path.write_text(json.dumps(rows) if path.suffix == ".json" else
                    "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answer_file(benchmark, model, tmp_path, monkeypatch, *more):
    """The rows that the command line writes for a benchmark's questions."""
    suffix = ".json" if benchmark == "AlpacaEval" else ".jsonl"
    questions, out = write(tmp_path / f"questions{suffix}", QUESTIONS[benchmark]), tmp_path / f"out{suffix}"
    monkeypatch.setattr("sys.argv", [
        "generate.py", "--model", str(model), "--questions", questions, "--out", str(out),
        "--max-prompt-length", "200", "--max-response-length", "8", *more])
    generate.main()
    text = out.read_text()
    assert not list(tmp_path.glob("*.writing"))
    return json.loads(text) if suffix == ".json" else [json.loads(line) for line in text.split("\n")[:-1]]


@pytest.fixture
def calls(monkeypatch):
    """Record what `sample` is asked, (prompt, temperature) each, in the place of sampling; the n-th answer is
    ` answer n `, and only the first ends by itself."""
    seen = []

    def record(model, tokenizer, prompt_ids, max_response_length, num_responses, temperature, batch_size):
        first = len(seen)
        seen.extend((tokenizer.decode(ids), temperature) for ids in prompt_ids)
        texts = [f" answer {n} " for n in range(first, len(seen))]
        return [[tokenizer(text)["input_ids"]] for text in texts], [[text == " answer 0 "] for text in texts]

    monkeypatch.setattr(generate, "sample", record)
    return seen


def test_alpaca_eval_gets_the_array_of_its_model_outputs(checkpoint, tmp_path, monkeypatch, calls):
    assert answer_file("AlpacaEval", checkpoint, tmp_path, monkeypatch) == [
        {"dataset": "koala", "instruction": f"ask {i}", "output": f"answer {i}", "generator": checkpoint.name}
        for i in range(3)]


def test_mt_bench_gets_the_rows_of_fastchats_model_answers(checkpoint, tmp_path, monkeypatch, calls):
    rows = answer_file("MT-Bench", checkpoint, tmp_path, monkeypatch, "--temperature", "1")
    assert [row["question_id"] for row in rows] == list(range(81, 90))
    for place, row in enumerate(rows):
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert row["choices"] == [{"index": 0, "turns": [f"answer {place}", f"answer {9 + place}"]}]
        assert row["model_id"] == checkpoint.name and row["tstamp"] > 1.7e9
    assert len({row["answer_id"] for row in rows}) == 9


def test_arena_hard_gets_the_rows_of_its_model_answers(checkpoint, tmp_path, monkeypatch, calls):
    rows = answer_file("Arena-Hard", checkpoint, tmp_path, monkeypatch)
    assert len({row["ans_id"] for row in rows}) == 3
    for place, row in enumerate(rows):
        assert set(row) == {"uid", "ans_id", "model", "messages", "tstamp"}
        assert row["uid"] == f"4{place}e5" and row["model"] == checkpoint.name and row["tstamp"] > 1.7e9
        assert row["messages"] == [{"role": "user", "content": f"ask {place} é\u2028"},
                                   {"role": "assistant", "content": {"answer": f"answer {place}"}}]


def test_the_second_turn_is_asked_after_the_first_question_and_the_models_own_answer(calls):
    answers, finished, truncated = answer_questions(
        None, byte_tokenizer(TEMPLATE), [["Q1", "Q2"], ["P1", "P2"]], [0.7, 0.0], 200, 8)
    asked = [prompt for prompt, _ in calls]
    assert asked[:2] == ["<|user|>P1<eos><|assistant|>", "<|user|>Q1<eos><|assistant|>"]     # by temperature
    assert asked[2:] == [
        "<|user|>P1<eos><|assistant|>answer 0<eos><|user|>P2<eos><|assistant|>",
        "<|user|>Q1<eos><|assistant|>answer 1<eos><|user|>Q2<eos><|assistant|>"]
    assert answers == [["answer 1", "answer 3"], ["answer 0", "answer 2"]] and (finished, truncated) == (1, 0)


def test_without_a_template_dialogues_are_human_and_assistant_and_a_single_question_stays_as_it_is(calls):
    answer_questions(None, byte_tokenizer(), [["Q1", "Q2"]], [1.0], 200, 8)
    answer_questions(None, byte_tokenizer(), [["Q"]], [1.0], 200, 8)
    assert [prompt for prompt, _ in calls] == [
        "\n\nHuman: Q1\n\nAssistant:", "\n\nHuman: Q1\n\nAssistant: answer 0\n\nHuman: Q2\n\nAssistant:", "Q"]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_question_has_the_prompt_ids_that_training_has(template, monkeypatch):
    tokenizer, seen = byte_tokenizer(template, bos=True), []

    def record(model, tokenizer, prompt_ids, *more):
        seen.extend(prompt_ids)
        return [[[1]]], [[True]]

    monkeypatch.setattr(generate, "sample", record)
    for limit in (200, 6):
        answer_questions(None, tokenizer, [["a long question"]], [1.0], limit, 8)
        pair = {"prompt": "a long question", "chosen": "good", "rejected": "bad"}
        (example,), _ = encode([pair], tokenizer, end_token_ids(tokenizer), limit, 50)
        assert seen.pop() == example["prompt_ids"]
        assert (example["prompt_ids"][0] == 4) == (template is None)             # no <bos> but the template's


def test_each_category_is_answered_at_fastchats_temperature(checkpoint, tmp_path, monkeypatch, calls):
    answer_file("MT-Bench", checkpoint, tmp_path, monkeypatch)
    for place, temperature in enumerate(CATEGORIES.values()):
        assert [own for prompt, own in calls if f"ask {place}<eos>" in prompt] == [temperature] * 2


@pytest.mark.parametrize("benchmark, argv, temperature", [
    ("MT-Bench", ["--temperature", "0.3"], 0.3), ("MT-Bench", ["--temperature", "0"], 0.0),
    ("AlpacaEval", [], 1.0), ("Arena-Hard", [], 1.0), ("Arena-Hard", ["--temperature", "0"], 0.0)])
def test_a_given_temperature_counts_for_all_and_is_1_for_the_other_benchmarks(
        benchmark, argv, temperature, checkpoint, tmp_path, monkeypatch, calls):
    answer_file(benchmark, checkpoint, tmp_path, monkeypatch, *argv)
    assert {own for _, own in calls} == {temperature}


def test_at_temperature_0_each_token_is_the_likeliest_also_with_masked_ids_and_great_logits():
    model = prepare(tiny_model(vocab_size=300), byte_tokenizer())
    with torch.no_grad():
        model.lm_head.weight *= 1e4
        for seed in range(2):
            torch.manual_seed(seed)
            (response,) = draw(model, [[5, 6, 7]], torch.tensor([1]), 10, 1, 0.0)
            logits = model(torch.tensor([[5, 6, 7] + response])).logits[0, 2:-1]
            assert response == logits.argmax(-1).tolist() and logits.abs().max() > 1e4


def test_the_same_seed_gives_the_same_file_but_for_the_time(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1.8e9)
    one, same, other = (answer_file("MT-Bench", checkpoint, tmp_path, monkeypatch, "--seed", seed)
                        for seed in "112")
    assert one == same
    for place, temperature in enumerate(CATEGORIES.values()):
        changed = one[place]["choices"] != other[place]["choices"]
        assert changed == (one[place]["answer_id"] != other[place]["answer_id"])
        assert changed or temperature < 0.7
        assert not changed or temperature > 0


def test_equal_answers_of_two_questions_or_models_have_their_own_ids():
    rows = [generate.answer_row("Arena-Hard", {**QUESTIONS["Arena-Hard"][0], "uid": uid}, ["same"], name)
            for uid, name in (("a", "m"), ("b", "m"), ("a", "n"), ("a", "m"))]
    ids = [row["ans_id"] for row in rows]
    assert len(set(ids)) == 3 and ids[0] == ids[3]


def test_prompts_over_the_limit_are_cut_from_the_left_and_counted(checkpoint, tmp_path, monkeypatch, calls,
                                                                  capsys):
    answer_file("MT-Bench", checkpoint, tmp_path, monkeypatch, "--max-prompt-length", "8", "--limit", "2")
    assert [prompt for prompt, _ in calls] == [
        "<|user|>ask 0<eos><|assistant|>", "<|user|>ask 1<eos><|assistant|>",
        "then 0<eos><|assistant|>", "then 1<eos><|assistant|>"]              # eight tokens, as the first ones
    assert capsys.readouterr().out == (f"2 questions of MT-Bench answered in {tmp_path}/out.jsonl, 1 of 4 "
                                       "answers finished, 2 prompts cut\n")


@pytest.mark.parametrize("model, name", [
    ("runs/toy/pr/model", "toy-pr"), ("runs/toy/pr/merged/", "toy-pr"), ("/model", "model"),
    ("/a/Qwen2.5-0.5B", "Qwen2.5-0.5B"), ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B"), ("toy", "toy")])
def test_a_run_is_called_by_its_directory_other_models_by_their_name(model, name):
    assert model_name(model) == name


BAD = {  # a question file and what must be said about it
    "columns.jsonl": ([{"prompt": "Q"}], "columns prompt fit no benchmark's questions; want one of: "
                      "question_id, category, turns (MT-Bench); uid, category, prompt (Arena-Hard); "
                      "dataset, instruction (AlpacaEval)"),
    "none.jsonl": ([], "columns (no rows) fit no benchmark's questions"),
    "turn.jsonl": ([*QUESTIONS["MT-Bench"], {"question_id": 1, "category": "math"}], "row 10: turns: want"),
    "one.jsonl": ([{"question_id": 1, "category": "math", "turns": ["Q"]}], "row 1: turns: want two"),
    "text.jsonl": ([{"question_id": 1, "category": "math", "turns": "QQ"}], "row 1: turns: want two"),
    "null.jsonl": ([{"question_id": 1, "category": "math", "turns": ["Q", None]}], "row 1: turns: want two"),
    "id.jsonl": ([QUESTIONS["MT-Bench"][0], {"category": "math", "turns": ["Q", "P"]}],
                 "row 2: question_id is missing"),
    "empty.jsonl": ([{"uid": "u", "category": "c", "prompt": " "}], "row 1: prompt: want a text"),
    "half.json": ([{"dataset": "koala", "instruction": "\ud800"}], "row 1: instruction: want a text")}


@pytest.mark.parametrize("name", BAD)
def test_bad_questions_are_named_in_one_line(name, tmp_path, monkeypatch, capsys):
    rows, message = BAD[name]
    argv = ["generate.py", "--questions", write(tmp_path / name, rows), "--out", str(tmp_path / "out.jsonl")]
    line = fails(generate.main, argv, monkeypatch, capsys)
    assert message in line and name in line and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("benchmark, out, argv, message", [
    ("AlpacaEval", "out.jsonl", [], "AlpacaEval's judge wants a file that ends in .json"),
    ("MT-Bench", "out.json", [], "MT-Bench's judge wants a file that ends in .jsonl"),
    ("MT-Bench", "out.jsonl", ["--data", "toy"], "--data: not allowed with argument --questions")])
def test_arguments_that_do_not_fit_the_benchmark_are_named(benchmark, out, argv, message, tmp_path,
                                                           monkeypatch, capsys):
    argv = ["generate.py", "--questions", write(tmp_path / "q.jsonl", QUESTIONS[benchmark]), *argv]
    assert message in fails(generate.main, [*argv, "--out", str(tmp_path / out)], monkeypatch, capsys)


def test_a_question_that_the_template_refuses_is_named(checkpoint, tmp_path, monkeypatch, capsys):
    path = shutil.copytree(checkpoint, tmp_path / "strict")
    byte_tokenizer("{% if 'ask 1' in messages[0]['content'] %}{{ raise_exception('not this') }}{% endif %}"
                   + TEMPLATE).save_pretrained(path)
    argv = ["generate.py", "--model", str(path), "--max-prompt-length", "64", "--max-response-length", "4",
            "--questions", write(tmp_path / "q.jsonl", QUESTIONS["Arena-Hard"]),
            "--out", str(tmp_path / "out.jsonl")]
    assert "question 2: refused by the chat template: not this" in fails(generate.main, argv, monkeypatch,
                                                                         capsys)


def test_a_question_without_tokens_is_named(calls):
    with pytest.raises(InputError, match="question 1: it has no tokens"):
        answer_questions(None, byte_tokenizer("{{ '' }}"), [["Q"]], [1.0], 200, 8)


def test_a_run_that_fails_while_writing_leaves_the_answers_that_were_there(checkpoint, tmp_path, monkeypatch,
                                                                           calls):
    before = answer_file("AlpacaEval", checkpoint, tmp_path, monkeypatch)
    monkeypatch.setattr(generate.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError):
        answer_file("AlpacaEval", checkpoint, tmp_path, monkeypatch, "--limit", "1")
    assert json.loads((tmp_path / "out.json").read_text()) == before


def test_questions_are_told_by_their_columns_whatever_else_they_hold(tmp_path):
    for benchmark, rows in QUESTIONS.items():
        name, read, turns = load_questions(write(tmp_path / "q.jsonl", [{**row, "x": 1} for row in rows]), 2)
        assert name == benchmark and len(read) == len(turns) == 2
        assert turns[1] == rows[1].get("turns", [rows[1].get("prompt", rows[1].get("instruction"))])
