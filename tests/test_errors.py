"""Bad input: one line on stderr that names it, exit status 2, no traceback."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import byte_tokenizer, tiny_model

import data
import generate
import reward
import sail
from toy import toy_model

GOOD = {"prompt": "Q", "chosen": "good", "rejected": "bad"}


def fails(main, argv, monkeypatch, capsys):
    """Run a script's main as its command line would; returns its one line of complaint."""
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stop:
        data.command_line(main)
    errors = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith(f"{argv[0]}: error: "), errors
    return errors[0]


FILES = {  # content of a data file, and what must be said about it
    "missing.jsonl": (None, "no such file"),
    "text.jsonl": ('{"prompt": "Q"}\nhello\n', "text.jsonl:2: not JSON"),
    "cut.json": ('[{"prompt": "Q", "cho', "cut.json:1: not JSON"),
    "empty.jsonl": ("", "empty, no rows"),
    "list.json": ("[1, 2]", "a row is not an object"),
    "column.jsonl": ('{"prompt": "Q", "chosen": "a"}\n', "columns chosen, prompt fit no known format"),
    "nulls.jsonl": ('{"prompt": "Q", "chosen": null, "rejected": "b"}\n', "no usable pair in 1 rows (1 null"),
    "same.jsonl": ('{"prompt": "Q", "chosen": "b", "rejected": "b"}\n', "1 chosen equals rejected"),
    "binary.parquet": ("hello", "binary.parquet: cannot be read as a data set"),
    "notes.txt": ("hello", "want a file that ends in .jsonl"),
    "latin.jsonl": (b'{"prompt": "\xe9"}', "not UTF-8"),
    "no-such-folder/no-such-set": (None, "cannot be read as a data set"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_data_is_named(name, tmp_path, monkeypatch, capsys):
    content, message = FILES[name]
    path = str(tmp_path / name) if "." in name else name
    if content is not None:
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in fails(data.main, ["data.py", path], monkeypatch, capsys)
    assert message in fails(sail.main,
                            ["sail.py", "--variant", "dpo", "--data", path, "--out", str(tmp_path / "out")],
                            monkeypatch, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, message", [
    (["--variant", "ppo"], "invalid choice: 'ppo'"), (["--mix", "1.2"], "--mix: 1.2 is not in 0 … 1"),
    (["--seed", "-1"], "--seed: -1 is not in"), (["--eval-every", "-1"], "--eval-every: -1 is not in"),
    (["--response-coef", "nan"], "--response-coef: nan is not in"),
    (["--temperature", "0.9"], "--temperature: T2 is the score"),
    (["--target-margin", "1"], "--target-margin: only --loss-type simpo has one"),
    (["--data", "x.jsonl"], "--reward: pr needs one"), (["--batch-size", "0"], "--batch-size: 0 is not in 1"),
    (["--learning-rate", "nan"], "--learning-rate: nan is not in"),
    (["--steps", "many"], "invalid int value: 'many'"),
    (["--no-such-flag"], "unrecognized arguments")])
def test_bad_flags_are_named(argv, message, monkeypatch, capsys):
    assert message in fails(sail.main, ["sail.py", *argv], monkeypatch, capsys)


def write(path):
    path.write_text("".join(json.dumps({**GOOD, "rejected": f"bad {i}"}) + "\n" for i in range(40)))
    return str(path)


@pytest.mark.parametrize("break_it, message", [
    (lambda path: (path / "model.safetensors").unlink(), "no model for CausalLM to load"),
    (lambda path: (path / "model.safetensors").write_text("version https://git-lfs"),
     "no model for CausalLM to load"),
    (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer to load"),
    (lambda path: shutil.rmtree(path), "no tokenizer to load"),
    (lambda path: byte_tokenizer_without_eos().save_pretrained(path), "no end-of-sequence token"),
    (lambda path: tiny_model(vocab_size=50).save_pretrained(path), "wrong tokenizer?"),
    (lambda path: None, "takes 256 tokens"),
], ids=["no weights", "no real weights", "no tokenizer", "no directory", "no eos", "small vocabulary",
        "too long"])
def test_bad_models_are_named(break_it, message, tmp_path, checkpoint, monkeypatch, capsys):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    break_it(path)
    argv = ["sail.py", "--variant", "dpo", "--model", str(path), "--data", write(tmp_path / "x.jsonl")]
    assert message in fails(sail.main, argv, monkeypatch, capsys)


def byte_tokenizer_without_eos():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize("name, message", [
    ("absent.py:f", "no such file absent.py"), ("{here}/mine.py:absent", "defines no function absent"),
    ("no/such/classifier", "no tokenizer to load"), ("{here}/mine.py:one", "returned 1 scores for"),
    ("{here}/mine.py:nan", "returned nan")])
def test_bad_rewards_are_named_and_what_was_written_stays(name, message, tmp_path, checkpoint, monkeypatch,
                                                          capsys):
    (tmp_path / "mine.py").write_text("def one(p, r): return [1.0]\n"
                                      "def nan(p, r): return [float('nan')] * len(r)\n")
    argv = ["sail.py", "--model", str(checkpoint), "--data", write(tmp_path / "x.jsonl"), "--mix", "0.5",
            "--steps", "2", "--max-prompt-length", "8", "--max-response-length", "8", "--reward",
            name.format(here=tmp_path), "--out", str(tmp_path / "out")]
    assert message in fails(sail.main, argv, monkeypatch, capsys)
    assert name.startswith("{here}/mine.py:") and "absent" not in name or not (tmp_path / "out").exists()


def test_prompts_over_the_limit_a_tokenizer_without_pad_and_one_without_template_are_no_errors(
        tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    for part in (tiny_model(), tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = [{"prompt": "long " * 90 + str(i), "chosen": "good", "rejected": f"bad {i}"} for i in range(40)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text("def score(p, r): return [float(len(x)) for x in r]\n")
    sail.main([
        "--model", str(tmp_path / "model"), "--data", str(tmp_path / "x.jsonl"), "--steps", "2",
        "--reward", f"{tmp_path}/mine.py:score", "--max-prompt-length", "16", "--mix", "0.5",
        "--max-response-length", "8", "--batch-size", "4", "--out", str(tmp_path / "out")])
    last = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert last["truncated_prompts"] > 30 and last["dropped"] == 0 and last["on_policy"] == 0.5


@pytest.mark.parametrize("main, argv, message", [
    (generate.main, ["generate.py", "--model", "/no/such/model"], "no tokenizer to load"),
    (reward.main, ["reward.py", "--responses", "/no/such.jsonl"], "no such file")])
def test_the_companions_complain_in_the_same_way(main, argv, message, monkeypatch, capsys):
    assert message in fails(main, argv, monkeypatch, capsys)


@pytest.mark.parametrize("argv", [
    ["data.py", "DATA", "--model", "/no/such/model"],
    ["evaluate.py", "/no/such/model", "--out", "results.json"],
    ["generate.py", "--model", "MODEL", "--limit", "2", "--out", "/proc/no/file"]])
def test_every_script_gives_one_line_and_status_2(argv, tmp_path, checkpoint):
    names = {"MODEL": str(checkpoint), "DATA": write(tmp_path / "x.jsonl")}
    argv = [names.get(word, word) for word in argv]
    argv += ["--max-prompt-length", "64", "--max-response-length", "4"]
    finished = subprocess.run([sys.executable, Path(sail.__file__).parent / argv[0], *argv[1:]],
                              capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.startswith(f"{argv[0]}: error: ") and finished.stderr.count("\n") == 1


def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distributed.world", lambda: 2)
    for part in toy_model():
        part.save_pretrained(tmp_path / "base")
    argv = ["sail.py", "--variant", "dpo", "--model", str(tmp_path / "base"), "--limit", "3", "--epochs", "1",
            "--batch-size", "2", "--out", str(tmp_path / "out")]
    assert "too few for 2 processes" in fails(sail.main, argv, monkeypatch,
                                                capsys)


def test_the_real_command_line_gives_one_line_and_status_2(tmp_path):
    finished = subprocess.run([sys.executable, Path(sail.__file__), "--variant", "dpo", "--data",
                               "absent.jsonl"], capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 2 and finished.stdout == "" and not list(tmp_path.iterdir())
    assert finished.stderr == ("sail.py: error: absent.jsonl: no such file\n")
