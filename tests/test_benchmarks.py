"""Answer files of AlpacaEval, MT-Bench and Arena-Hard: their judges' columns, dialogues, temperatures."""
import json
from argparse import Namespace

import benchmarks
import pytest
from conftest import TEMPLATE, byte_tokenizer, tiny_model
from test_errors import fails

import generate
from data import Pair, encode, end_token_ids
from runtime.command_line import InputError

CATEGORIES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
              "reasoning": 0.0, "stem": 0.1, "humanities": 0.1, "law": 0.7}    # the last is not MT-Bench's
QUESTIONS = {
    "MT-Bench": [{"question_id": 81 + i, "category": category, "turns": [f"ask {i}", f"then {i}"]}
                 for i, category in enumerate(CATEGORIES)],
    "Arena-Hard": [{"uid": f"4{i}e5", "category": "hard", "prompt": f"ask {i} é\u2028"} for i in range(3)],
    "AlpacaEval": [{"instruction": f"ask {i}", "output": "theirs", "dataset": "koala"} for i in range(3)]}
MODEL = tiny_model()                               # in the tests whose `sample` is a stand-in


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answer_file(benchmark, model, tmp_path, monkeypatch, *more):
    """The rows that the command line writes for a benchmark's questions."""
    out = tmp_path / ("out.json" if benchmark == "AlpacaEval" else "out.jsonl")
    questions = write(tmp_path / "questions.jsonl", QUESTIONS[benchmark])
    monkeypatch.setattr("sys.argv", [
        "benchmarks.py", "--model", str(model), "--questions", questions, "--out", str(out),
        "--max-prompt-length", "200", "--max-response-length", "8", *more])
    benchmarks.main()
    text = out.read_text()
    return json.loads(text) if out.suffix == ".json" else [json.loads(line) for line in text.split("\n")[:-1]]


def answers(turns, tokenizer, benchmark="MT-Bench", limit=200, model="m", temperature=None):
    """The rows of the answers to these turns."""
    args = Namespace(model=model, temperature=temperature, max_prompt_length=limit, max_response_length=8,
                     sample_batch_size=64, dtype="float32")
    rows = QUESTIONS[benchmark][:len(turns)]
    return benchmarks.answer_benchmark(MODEL, tokenizer, benchmark, rows, turns, args)


@pytest.fixture
def calls(monkeypatch):
    """What `sample` is asked, (text, ids, temperature) of each prompt; it says `answer n` to the n-th."""
    seen = []

    def record(model, tokenizer, prompt_ids, max_response_length, num_responses, temperature, batch_size):
        texts = [f"answer {len(seen) + place}" for place in range(len(prompt_ids))]
        seen.extend((tokenizer.decode(ids), ids, temperature) for ids in prompt_ids)
        return [[tokenizer(text)["input_ids"]] for text in texts], [[True]] * len(texts), None

    monkeypatch.setattr(generate, "sample", record)
    return seen


def test_alpaca_eval_gets_the_array_of_its_model_outputs(checkpoint, tmp_path, monkeypatch, calls):
    assert answer_file("AlpacaEval", checkpoint, tmp_path, monkeypatch) == [
        {"dataset": "koala", "instruction": f"ask {i}", "output": f"answer {i}", "generator": checkpoint.name}
        for i in range(3)]


def test_mt_bench_gets_the_rows_of_fastchats_model_answers(checkpoint, tmp_path, monkeypatch, calls):
    rows = answer_file("MT-Bench", checkpoint, tmp_path, monkeypatch, "--temperature", "1")
    assert len({row.pop("answer_id") for row in rows}) == 9 and all(row.pop("tstamp") > 1.7e9 for row in rows)
    assert rows == [{"question_id": 81 + i, "model_id": checkpoint.name, "choices": [
        {"index": 0, "turns": [f"answer {i}", f"answer {9 + i}"]}]} for i in range(9)]


def test_arena_hard_gets_the_rows_of_its_model_answers(checkpoint, tmp_path, monkeypatch, calls):
    rows = answer_file("Arena-Hard", checkpoint, tmp_path, monkeypatch)
    assert len({row.pop("ans_id") for row in rows}) == 3 and all(row.pop("tstamp") > 1.7e9 for row in rows)
    assert rows == [{"uid": f"4{i}e5", "model": checkpoint.name, "messages": [
        {"role": "user", "content": f"ask {i} é\u2028"},
        {"role": "assistant", "content": {"answer": f"answer {i}"}}]} for i in range(3)]


@pytest.mark.parametrize("template, first, second", [
    (TEMPLATE, "<|user|>Q1<|end|><|assistant|>", "answer 0<|end|><|user|>Q2<|end|><|assistant|>"),
    (None, "\n\nHuman: Q1\n\nAssistant:", " answer 0\n\nHuman: Q2\n\nAssistant:")])
def test_the_second_turn_is_asked_after_the_models_own_answer_to_the_first(template, first, second, calls):
    answers([["Q1", "Q2"]], byte_tokenizer(template))
    assert [prompt for prompt, *_ in calls] == [first, first + second]


@pytest.mark.parametrize("template, limit", [(None, 200), (None, 6), (TEMPLATE, 200)])
def test_a_single_question_has_the_prompt_ids_that_training_has(template, limit, calls):
    tokenizer = byte_tokenizer(template, bos=True)
    answers([["a long question"]], tokenizer, "AlpacaEval", limit)
    pair = Pair("a long question", "good", "bad")
    (example,), *_ = encode([pair], tokenizer, end_token_ids(tokenizer), limit, 50)
    assert [ids for _, ids, _ in calls] == [example.prompt_ids] and len(example.prompt_ids) <= limit


def test_a_question_that_does_not_fit_is_named(calls):
    message = "none of 1 prompts or pairs can be encoded as tokens: 1 prompt longer than --max-prompt"
    with pytest.raises(InputError, match=message):
        answers([["a long question"]], byte_tokenizer(TEMPLATE), "AlpacaEval", 6)


def test_each_category_is_answered_at_fastchats_temperature(checkpoint, tmp_path, monkeypatch, calls):
    answer_file("MT-Bench", checkpoint, tmp_path, monkeypatch)
    for place, temperature in enumerate(CATEGORIES.values()):
        assert [own for prompt, _, own in calls if f"ask {place}<|end|>" in prompt] == [temperature] * 2


@pytest.mark.parametrize("benchmark, given, temperature", [
    ("MT-Bench", 0.3, 0.3), ("MT-Bench", 0.0, 0.0), ("AlpacaEval", None, 1.0), ("Arena-Hard", None, 1.0)])
def test_a_given_temperature_counts_for_all_and_is_else_1(benchmark, given, temperature, calls):
    answers([["Q"]] * 3, byte_tokenizer(), benchmark, temperature=given)
    assert [own for *_, own in calls] == [temperature] * 3


def test_the_same_seed_gives_the_same_file_but_for_the_time(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 1.8e9)
    one, same, other = (answer_file("Arena-Hard", checkpoint, tmp_path, monkeypatch, "--seed", seed)
                        for seed in "112")
    assert one == same and all(row["ans_id"] != new["ans_id"] for row, new in zip(one, other, strict=True))


@pytest.mark.parametrize("model, name", [
    ("runs/toy/pr/model", "toy-pr"), ("/model", "model"), ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B")])
def test_a_run_is_called_by_its_directory_other_models_by_their_name(model, name, calls):
    assert answers([["Q"]], byte_tokenizer(), "AlpacaEval", model=model)[0]["generator"] == name


BAD = {  # a question file and what must be said about it
    "columns.jsonl": ([{"prompt": "Q"}], "columns prompt fit no benchmark's questions; want one of"),
    "none.jsonl": ([], "columns (no rows) fit no benchmark's questions"),
    "turn.jsonl": ([*QUESTIONS["MT-Bench"], {"question_id": 1, "category": "math"}], "row 10: want"),
    "one.jsonl": ([{"question_id": 1, "category": "math", "turns": ["Q"]}], "row 1: want question_id"),
    "text.jsonl": ([{"question_id": 1, "category": "math", "turns": "QQ"}], "row 1: want"),
    "null.jsonl": ([{"question_id": 1, "category": "math", "turns": ["Q", None]}], "row 1: want"),
    "id.jsonl": ([QUESTIONS["MT-Bench"][0], {"category": "math", "turns": ["Q", "P"]}], "row 2: want"),
    "category.jsonl": ([{"question_id": 1, "category": {}, "turns": ["Q", "P"]}], "row 1: want question_id"),
    "half.jsonl": ([{"uid": "u", "category": "c", "prompt": "\ud800"}], "want uid, category and text in"),
    "empty.jsonl": ([{"uid": "u", "category": "c", "prompt": " "}], "want uid, category and text in prompt"),
    "suffix.jsonl": (QUESTIONS["AlpacaEval"], "AlpacaEval's judge wants a file that ends in .json")}


@pytest.mark.parametrize("name", BAD)
def test_bad_questions_are_named_in_one_line(name, tmp_path, monkeypatch, capsys):
    rows, message = BAD[name]
    out = tmp_path / "out.jsonl"
    argv = ["benchmarks.py", "--model", "m", "--questions", write(tmp_path / name, rows), "--out", str(out)]
    assert message in fails(benchmarks.main, argv, monkeypatch, capsys) and not out.exists()


@pytest.mark.parametrize("template, message", [
    ("{{ raise_exception('not this') }}", "refused by the chat template: not this"),
    ("{{ '' }}", "the chat template leaves the answer out"),
    ("{% if messages[1:] %}{{ messages[-1].content }}{% endif %}", "prompt without tokens")])
def test_a_question_that_cannot_be_asked_is_named(template, message, calls):
    tokenizer = byte_tokenizer("{% if messages[0].content == 'Q' %}" + template + "{% else %}ok"
                               "{% if messages[1:] %}{{ messages[-1].content }}{% endif %}{% endif %}")
    with pytest.raises(InputError, match=f"questions that cannot be asked: .*1 {message}"):
        answers([["P"], ["Q"]], tokenizer)
