"""Multiple choice: the items, the prompts, the log-probabilities and the figures made of them."""
import copy
import json

import pytest
import torch
from conftest import byte_tokenizer, tiny_model

import data
import evaluate
from evaluate import choice_figures, choice_logps, choice_prompt, load_choices
from generate import prepare

ROWS = [  # ARC with options under their labels: four letters, three digits, five letters and no ASCII
    {"question": "What is wet?", "answer": "B", "A": "a stone", "B": "water", "C": "dust", "D": "fire",
     "label": ["A", "B", "C", "D"]},
    {"question": " Which one floats?", "answer": "3", "1": "iron", "2": "lead", "3": "cork",
     "label": ["1", "2", "3"]},
    {"question": "Où?", "answer": "E", "A": "à côté", "B": "là", "C": "ici", "D": "au café", "E": "ailleurs",
     "label": ["A", "B", "C", "D", "E"]}]
HUB = [{"question": row["question"], "answerKey": row["answer"],
        "choices": {"text": [row[label] for label in row["label"]], "label": row["label"]}} for row in ROWS]
MMLU = '"Is it ""so"", or not? ","yes, so",no, maybe,never,C\nWhere?,here,there,up,down,A\n'


def write(path, rows):
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def items(tmp_path):
    return load_choices(write(tmp_path / "arc.json", ROWS))[0]


# --- items and prompts

def test_arc_has_any_labels_and_number_of_options_in_either_form(tmp_path, items):
    assert items == [
        {"question": "Question: What is wet?\nAnswer:", "answer": 1,
         "options": ["a stone", "water", "dust", "fire"]},
        {"question": "Question:  Which one floats?\nAnswer:", "answer": 2,
         "options": ["iron", "lead", "cork"]},
        {"question": "Question: Où?\nAnswer:", "answer": 4,
         "options": ["à côté", "là", "ici", "au café", "ailleurs"]}]
    assert load_choices(write(tmp_path / "hub.json", HUB)) == (items, "", {})


def test_an_arc_prompt_with_two_examples_is_this_text(items):
    assert choice_prompt(items[2], shots=items, n_shot=2) == (
        "Question: What is wet?\nAnswer: water\n\n"
        "Question:  Which one floats?\nAnswer: cork\n\n"
        "Question: Où?\nAnswer:")


def test_no_item_is_an_example_for_itself(items):
    assert choice_prompt(items[0], shots=items, n_shot=1) == (
        "Question:  Which one floats?\nAnswer: cork\n\nQuestion: What is wet?\nAnswer:")


@pytest.mark.parametrize("split", ["_dev", "_val", "_test", ""])
def test_an_mmlu_prompt_names_its_files_subject_and_is_this_text(split, tmp_path):
    path = write(tmp_path / f"moral_disputes{split}.csv", MMLU)
    (first, second), heading, dropped = load_choices(path)
    assert (first["options"], first["answer"], second["answer"]) == ([*"ABCD"], 2, 0) and not dropped
    assert choice_prompt(second, heading, [first], 1) == (
        "The following are multiple choice questions (with answers) about moral disputes.\n\n"
        'Is it "so", or not?\nA. yes, so\nB. no\nC.  maybe\nD. never\nAnswer: C\n\n'
        "Where?\nA. here\nB. there\nC. up\nD. down\nAnswer:")


BAD_ROWS = {
    "answer is not one of the options": [
        {**ROWS[0], "answer": "E"}, {**ROWS[0], "answer": None}, {**ROWS[0], "label": ["B"]},
        {**HUB[0], "choices": {"text": [*"xyz"], "label": [*"AB"]}}, {**ROWS[0], "label": [*"ABB"]}],
    "null or malformed text": [
        {**ROWS[0], "D": None}, {**ROWS[0], "label": [*"ABCDE"]}, {**ROWS[0], "question": 5},
        {**ROWS[0], "A": "\ud800"}, {**HUB[0], "choices": "AB"}, {**ROWS[0], "label": None},
        {"question": "Q"}],
    "empty question or option": [{**ROWS[0], "question": " "}, {**ROWS[0], "C": ""}]}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_malformed_rows_are_dropped_and_counted(reason, tmp_path, items):
    for row in BAD_ROWS[reason]:
        assert load_choices(write(tmp_path / "bad.json", [row, *ROWS])) == (items, "", {reason: 1}), row


def test_malformed_lines_of_a_csv_are_dropped_and_counted(tmp_path):
    lines = MMLU + "question,A,B,C,D,answer\n1,2,3\nQ,a,b,c,d,A,7\n\n ,a,b,c,d,A\n"
    rows, _, dropped = load_choices(write(tmp_path / "x_test.csv", lines))
    assert len(rows) == 2 and dropped == {"answer is not one of the options": 1, "null or malformed text": 1,
                                          "more than six columns": 1, "empty question or option": 1}


# --- log-probabilities and figures

def by_hand(model, context, continuation):
    """log π of the continuation's ids, by a plain forward of one row and a softmax, in float64."""
    model, ids = copy.deepcopy(model).double(), context + continuation
    with torch.no_grad():
        weights = model(torch.tensor([ids[:-1]])).logits[0, -len(continuation):].exp()
    return sum((row[token] / row.sum()).log().item() for row, token in zip(weights, continuation))


def spelled(text, tokenizer):
    """The byte tokenizer's ids, by hand."""
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [tokenizer.get_vocab()[letter] for word, _ in words for letter in word]


@pytest.mark.parametrize("bos", [False, True], ids=["", "bos"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])      # the last cannot be packed
@pytest.mark.parametrize("batch_size", [1, 8])
def test_log_probabilities_equal_a_softmax_by_hand(family, bos, batch_size, items):
    tokenizer = byte_tokenizer(bos=bos)
    model = tiny_model(family)
    prompts = [choice_prompt(item, shots=items, n_shot=1) for item in items]
    exact = [[by_hand(model, [4] * bos + spelled(prompt, tokenizer), spelled(" " + option, tokenizer))
              for option in item["options"]] for item, prompt in zip(items, prompts)]
    logps = choice_logps(prepare(model, tokenizer), tokenizer, items, prompts, batch_size=batch_size)
    assert [len(row) for row in logps] == [4, 3, 5]
    for ours, theirs in zip(logps, exact):
        assert ours == pytest.approx(theirs, abs=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_beyond_the_positions_is_cut_from_the_left_to_one_token_more(family, items):
    tokenizer, model = byte_tokenizer(bos=True), tiny_model(family)
    prompts = ["long " * 60 + item["question"] for item in items]              # the model has 256 positions
    exact = [[by_hand(model, spelled(prompt, tokenizer)[-(257 - len(own)):], own)
              for own in (spelled(" " + option, tokenizer) for option in item["options"])]
             for item, prompt in zip(items, prompts)]
    for ours, theirs in zip(choice_logps(prepare(model, tokenizer), tokenizer, items, prompts), exact):
        assert ours == pytest.approx(theirs, abs=2e-4)


def test_an_option_may_fill_all_positions_and_no_more(items):
    tokenizer, model = byte_tokenizer(), prepare(tiny_model("gpt2"), byte_tokenizer())
    full = {**items[0], "options": ["x" * 255, "y"]}
    (sums,) = choice_logps(model, tokenizer, [full], [full["question"]])
    exact = by_hand(model, spelled(":", tokenizer), spelled(" " + "x" * 255, tokenizer))
    assert sums[0] == pytest.approx(exact, abs=2e-3)
    with pytest.raises(data.InputError, match="option 'x+' adds 257 tokens to its prompt; want 1 to .* 256"):
        choice_logps(model, tokenizer, [{**full, "options": ["x" * 256, "y"]}], [full["question"]])


def test_a_tokenizer_that_ends_every_text_changes_nothing(items):
    from tokenizers import processors
    prompts, ending = [item["question"] for item in items], byte_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>",
                                                                            special_tokens=[("<eos>", 1)])
    assert ending("a")["input_ids"][-1] == 1
    model = prepare(tiny_model(), ending)
    assert (choice_logps(model, ending, items, prompts)
            == choice_logps(model, byte_tokenizer(), items, prompts))


@pytest.mark.parametrize("answer, right", [(0, "acc"), (1, "acc_bytes"), (2, "acc_norm")])
def test_figures_are_plain_per_character_and_per_utf_8_byte(answer, right):
    item = {"question": "Q", "options": ["a", "éé", "abcd"], "answer": answer}
    figures = choice_figures([item], [[-2.0, -3.0, -5.0]])       # −2, −1.5, −1.25 or −2, −0.75, −1.25 of each
    assert {name: figure[0] for name, figure in figures.items()} == {
        name: float(name == right) for name in ("acc", "acc_norm", "acc_bytes")}


def test_of_equal_options_the_first_counts():
    item = {"question": "Q", "options": ["a", "b", "c"]}
    for answer, acc in enumerate([0.0, 1.0, 0.0]):
        assert choice_figures([{**item, "answer": answer}], [[-3.0, -1.0, -1.0]])["acc"][0] == acc


# --- the command line

def run(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, argv)])
    data.command_line(evaluate.main)


def test_several_models_are_a_table_and_a_file_and_no_chat_template_is_applied(tmp_path, monkeypatch, capsys,
                                                                               checkpoint):
    other, seen, figures = tmp_path / "other", [], evaluate.choice_figures
    for part in (tiny_model("gpt2", seed=3), byte_tokenizer()):
        part.save_pretrained(other)
    monkeypatch.setattr(evaluate, "choice_figures",
                        lambda items, logps: seen.append(logps) or figures(items, logps))
    source, out = write(tmp_path / "arc.json", [*ROWS, {}]), tmp_path / "out" / "r.json"
    run(monkeypatch, checkpoint, other, "--choices", source, "--n-shot", 1, "--shots",
        write(tmp_path / "shots.json", [{**ROWS[0], "question": "Why?"}]), "--out", out)
    table, results = capsys.readouterr().out.split("\n"), json.loads(out.read_text())
    assert f"3 items of {source}, 1-shot; dropped: 1 null or malformed text" in table[0]
    assert table[1].split() == ["model", "acc", "acc_norm", "acc_bytes"]
    assert list(results) == [checkpoint.name, "other"]
    tokenizer = byte_tokenizer()
    for name, model, logps, line in zip(results, (tiny_model(), tiny_model("gpt2", seed=3)), seen, table[2:]):
        right = []
        for row, sums in zip(ROWS, logps):
            prompt = f"Question: Why?\nAnswer: water\n\nQuestion: {row['question']}\nAnswer:"
            exact = {label: by_hand(model, spelled(prompt, tokenizer), spelled(" " + row[label], tokenizer))
                     for label in row["label"]}
            assert sums == pytest.approx([*exact.values()], abs=2e-4)
            by_byte = {label: sum_ / len(row[label].encode()) for label, sum_ in exact.items()}
            right.append(max(by_byte, key=by_byte.get) == row["answer"])
        value, low, high = results[name]["acc_bytes"]
        assert value == pytest.approx(sum(right) / 3) and low <= value <= high
        assert line.split()[0] == name and line.endswith(f"{value:.3f} ± {(high - low) / 2:.3f}")


def complaint(monkeypatch, capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize("name, content, message", [
    ("missing.csv", None, "missing.csv: no such file"), ("missing.json", None, "missing.json: no such file"),
    ("latin.csv", b"\xe9,a,b,c,d,A\n", "latin.csv: not UTF-8 text in columns"),
    ("text.jsonl", b"hello", "text.jsonl:1: not JSON"), ("empty.csv", b"", "no usable item in 0 rows (none)"),
    ("pairs.jsonl", b'{"prompt": "Q", "chosen": "a", "rejected": "b"}',
     "pairs.jsonl: no usable item in 1 rows (1 null or malformed text); want question, choices")])
def test_a_bad_file_is_one_line(name, content, message, tmp_path, monkeypatch, capsys, checkpoint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in complaint(monkeypatch, capsys, checkpoint, "--choices", tmp_path / name)


def test_missing_examples_are_one_line(tmp_path, monkeypatch, capsys, checkpoint):
    path = write(tmp_path / "x_dev.csv", MMLU)
    for argv, message in [(["--choices", path, "--n-shot", 3], "--n-shot needs --shots FILE"),
                          (["--choices", path, "--n-shot", 3, "--shots", path], "_dev.csv has 2 usable rows"),
                          (["--n-shot", 3], "need --choices"), (["--shots", path], "need --choices")]:
        assert message in complaint(monkeypatch, capsys, checkpoint, *argv)
