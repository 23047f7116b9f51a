"""Bad input: one line on stderr that names it, exit status 2, no traceback."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import as_settings, IDS, byte_tokenizer, sail_main, tiny_model

import data
import generate
import reward
import sail
from runtime.command_line import one_line
from toy import toy_model

GOOD = {"prompt": "Q", "chosen": "good", "rejected": "bad"}


def fails(main, argv, monkeypatch, capsys):
    """Run a script's main as its command line would; returns its one line of complaint."""
    chosen = {}
    if main in (sail.main, reward.main):
        flags, chosen = as_settings(argv[1:])
        argv = [argv[0], *flags]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stop:
        data.command_line(lambda: main(**chosen))
    errors = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith(f"{argv[0]}: error: "), errors
    return errors[0]


FILES = {  # content of a data file, and what must be said about it
    "missing.jsonl": (None, "no such file"),
    "text.jsonl": ('{"prompt": "Q"}\nhello\n', "text.jsonl:2: not jsonl"),
    "cut.json": ('[{"prompt": "Q", "cho', "cut.json:1: not json"),
    "empty.jsonl": ("", "empty.jsonl has no rows"),
    "list.json": ("[1, 2]", "a row is not an object"),
    "column.jsonl": ('{"question": "Q", "chosen": "a"}\n', "question fit none of these formats: conv"),
    "nulls.jsonl": ('{"prompt": "Q", "chosen": null, "rejected": "b"}\n', "1 rows can be used (1 null"),
    "same.jsonl": ('{"prompt": "Q", "chosen": "b", "rejected": "b"}\n', "1 chosen equals rejected"),
    "binary.parquet": ("hello", "binary.parquet: cannot be read as a data set"),
    "notes.txt": ("hello", "give a .jsonl, .json, .csv, .parquet file, a directory"),
    "latin.jsonl": (b'{"prompt": "\xe9"}', "not UTF-8"), "latin.csv": (b"prompt\n\xe9\n", "not UTF-8"),
    "deep.jsonl": ("[" * 100_000, "deep.jsonl:1: not jsonl"), "huge.jsonl": ("9" * 9000, "huge.jsonl:1: not"),
    "deep.json": ('{"a":' * 100_000, "deep.json:1: not json"),
    "ragged.csv": ("a,b\n1,2,3\n", "columns a, b, more cells than the header fit none of"),
    ":train": (None, ":train: cannot be read as a data set"),
    "no-such-folder/no-such-set": (None, "cannot be read as a data set"),
    "/": (None, "/: cannot be read as a data set"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_data_is_named(name, tmp_path, monkeypatch, capsys):
    content, message = FILES[name]
    path = str(tmp_path / name) if "." in name else name              # else a hub name, or a whole disk
    if content is not None:
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in fails(data.main, ["data.py", path], monkeypatch, capsys)
    assert message in fails(sail.main,
                            ["sail.py", "--variant", "dpo", "--model", "m", "--data", path, "--out",
                             str(tmp_path / "out")],
                            monkeypatch, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ['{"model": []}', "[]", '{"model": {"vocab": 5}}'])
def test_a_model_without_data_whose_tokenizer_is_nonsense_is_no_toy(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "tokenizer.json").write_text(text)
    argv = ["sail.py", "--variant", "dpo", "--model", str(tmp_path)]
    assert str(tmp_path) in fails(sail.main, argv, monkeypatch, capsys)


def test_a_name_of_half_a_character_is_printed(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({**GOOD, "half \ud800": 1}))
    finished = subprocess.run(
        [sys.executable, data.__file__, "x.jsonl"], cwd=tmp_path, check=False, text=True,
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii:strict"})
    assert finished.returncode == 0 and r"unread: half \ud800 (1 rows)" in finished.stdout


@pytest.mark.parametrize("main, argv, message", [
    (sail.main, ["sail.py", "--variant", "dpo", "--model", "m", "--data", "LOOP"], "no such file"),
    (sail.main, ["sail.py", "--variant", "dpo", "--model", "m", "--data", "DATA", "--out", "LOOP"], "m: no"),
    (reward.main, ["reward.py", "--reward", "m.py:f", "--responses", "LOOP", "--out", "o", "--pairs", "LOOP"],
     "no such file")])
def test_a_link_to_itself_is_named(main, argv, message, tmp_path, monkeypatch, capsys):
    loop = tmp_path / "loop.jsonl"
    loop.symlink_to(loop)
    names = {"LOOP": str(loop), "DATA": write(tmp_path / "x.jsonl")}
    said = fails(main, [names.get(word, word) for word in argv], monkeypatch, capsys)
    assert message in said and loop.is_symlink()


@pytest.mark.parametrize("argv, message", [
    (["--variant", "ppo"], "invalid choice: 'ppo'"), (["--mix", "1.2"], "--mix: 1.2 is not in 0 … 1"),
    (["--seed", "-1"], "--seed: -1 is not in"), (["--eval-every", "-1"], "--eval-every: -1 is not in"),
    (["--response-coef", "nan"], "--response-coef: nan is not in"),
    (["--data", "x.jsonl", "--model", "m"], "--reward: pr needs one"),
    (["--data", "x.jsonl"], "--model: give a directory or hub name"),
    (["--steps", "9" * 400], "is not in 1 "),
    (["--learning-rate", "nan"], "--learning-rate: nan is not in"),
    (["--steps", "many"], "invalid int value: 'many'"),
    (["--variant", "dp", "--label", "sampled"], "label='sampled': dp sums out the policy's labels"),
    (["--variant", "pp", "--label", "sampled"], "label='sampled': pp sums out the policy's labels"),
    (["--no-such-flag"], "unrecognized arguments")])
def test_bad_flags_are_named(argv, message, monkeypatch, capsys):
    assert message in fails(sail.main, ["sail.py", *argv], monkeypatch, capsys)


def write(path):
    """A file of forty pairs, two to each prompt."""
    rows = [dict(prompt=f"Q{i // 2}?", chosen=f"good {i}", rejected=f"bad {i}") for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("break_it, message", [
    (lambda path: (path / "model.safetensors").unlink(), "cannot be loaded as a CausalLM model"),
    (lambda path: (path / "model.safetensors").write_text("version https://git-lfs"),
     "cannot be loaded as a CausalLM model"),
    (lambda path: set_in(path / "config.json", intermediate_size=8), "6 tensors of its files have other"),
    (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer ("),
    (lambda path: set_in(path / "tokenizer_config.json", model_max_length="long"), "no tokenizer ("),
    (lambda path: set_in(path / "tokenizer_config.json", unk_token=""), "no tokenizer ("),
    (lambda path: template_in(path, {"a": "{{ messages }}"}), "cannot be used (This model has multiple"),
    (lambda path: template_in(path, 5), "cannot be used (it is of type int"),
    (lambda path: shutil.rmtree(path), "no such directory"),
    (lambda path: byte_tokenizer_without_eos().save_pretrained(path), "no end-of-sequence token"),
    (lambda path: tiny_model(vocab_size=50).save_pretrained(path), "wrong tokenizer?"),
], ids=["no weights", "no real weights", "other shapes", "no tokenizer", "a length in letters",
        "an empty token", "no default template", "a number", "no directory", "no eos", "small vocabulary"])
def test_bad_models_are_named(break_it, message, tmp_path, checkpoint, monkeypatch, capsys):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    break_it(path)
    capsys.readouterr()                                                # saving has shown its progress
    argv = ["sail.py", "--variant", "dpo", "--model", str(path), "--data", write(tmp_path / "x.jsonl"),
            "--max-prompt-length", "8", "--max-response-length", "8"]
    assert message in fails(sail.main, argv, monkeypatch, capsys)


@pytest.mark.parametrize("short", ["model", "reference"])
def test_lengths_beyond_the_models_positions_are_named(short, tmp_path, checkpoint, monkeypatch, capsys):
    longer = shutil.copytree(checkpoint, tmp_path / "longer")
    tiny_model("tied", max_position_embeddings=1024).save_pretrained(longer)
    names = {"model": longer, "reference": longer, short: checkpoint}
    capsys.readouterr()                                                # saving has shown its progress
    argv = ["sail.py", "--variant", "dpo", "--model", str(names["model"]), "--reference",
            str(names["reference"]), "--data", write(tmp_path / "x.jsonl")]
    message = fails(sail.main, argv, monkeypatch, capsys)
    assert f"{checkpoint} takes 256 tokens, fewer than --max-prompt-length 512" in message


BASE = dict(vocab_size=IDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            bos_token_id=None, eos_token_id=1, pad_token_id=0)
CACHE = r"lacks logits_to_keep, position_ids, or the usual cache, which scoring and sampling need \("


@pytest.mark.parametrize("kind, config, message", [
    ("falcon", dict(alibi=True, new_decoder_architecture=False), CACHE),
    ("mamba", dict(state_size=4), CACHE + "`get_seq_length`"),
    ("mamba2", dict(num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8), CACHE),
    ("lfm2", dict(layer_types=["conv", "full_attention"], intermediate_size=48), CACHE),
    ("qwen3_next", dict(layer_types=["linear_attention", "full_attention"], head_dim=8, num_experts=4,
                        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
                        linear_value_head_dim=8, num_experts_per_tok=2, moe_intermediate_size=16,
                        shared_expert_intermediate_size=16), CACHE),
    ("jamba", dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1,
                   intermediate_size=48, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False), CACHE),
    ("bamba", dict(attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
                   mamba_n_groups=1, mamba_chunk_size=8, intermediate_size=48), CACHE),
    ("recurrent_gemma", dict(head_dim=8, lru_width=32, attention_window_size=16, intermediate_size=48,
                             block_types=["recurrent", "attention"]), CACHE),
    ("rwkv", dict(attention_hidden_size=32), CACHE + "it keeps no cache of its prompt")])
def test_families_with_a_cache_of_another_kind_are_named_in_one_line(kind, config, message):
    from transformers import AutoConfig, AutoModelForCausalLM
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**BASE, **config})).eval()
    with pytest.raises(data.InputError, match=f"^tiny: {type(model).__name__} {message}") as error:
        generate.prepare(model, byte_tokenizer(), "tiny")
    assert "\n" not in str(error.value)


def set_in(path, **more):
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def template_in(path, template):
    (path / "chat_template.jinja").unlink()
    set_in(path / "tokenizer_config.json", chat_template=template)


def byte_tokenizer_without_eos():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize("name, message", [
    ("absent.py:f", "no such file absent.py"), ("{here}/mine.py:absent", "defines no function absent"),
    ("no/such/classifier", "no such directory"), ("{here}/mine.py:nan", "[nan, nan]")])
def test_bad_rewards_are_named_before_anything_is_written(name, message, tmp_path, checkpoint, monkeypatch,
                                                         capsys):
    (tmp_path / "mine.py").write_text("def nan(p, r): return [float('nan')] * len(r)\n")
    argv = ["sail.py", "--model", str(checkpoint), "--data", write(tmp_path / "x.jsonl"), "--mix", "0.5",
            "--steps", "2", "--max-prompt-length", "8", "--max-response-length", "8", "--reward",
            name.format(here=tmp_path), "--out", str(tmp_path / "out")]
    assert message in fails(sail.main, argv, monkeypatch, capsys)
    assert not (tmp_path / "out").exists()


def test_prompts_over_the_limit_a_tokenizer_without_pad_and_one_without_template_are_no_errors(
        tmp_path, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    for part in (tiny_model(), tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = []
    for i in range(40):                                    # their responses begin with the prompt
        prompt = "long " * 90 + str(i // 2)
        rows.append({"prompt": prompt, "chosen": f"{prompt} good {i}", "rejected": f"{prompt} bad"})
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text("def score(p, r): return [float(len(x)) for x in r]\n")
    sail_main([
        "--model", str(tmp_path / "model"), "--data", str(tmp_path / "x.jsonl"), "--steps", "2",
        "--reward", f"{tmp_path}/mine.py:score", "--max-prompt-length", "16", "--mix", "0.5",
        "--max-response-length", "8", "--batch-size", "4", "--out", str(tmp_path / "out")])
    last = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    counts = json.loads((tmp_path / "out/args.json").read_text())["data_counts"]
    assert counts["altered"] == {"prompts repeated in their responses, taken out": 40}
    assert counts["unread"] == {} and set(counts) == {"dropped", "cut", "altered", "unread"}
    assert counts["cut"]["prompts longer than --max-prompt-length"] > 30 and not counts["dropped"]
    assert last["on_policy"] == 0.5
    said = capsys.readouterr().out
    assert "  altered: 40 prompts repeated in their responses, taken out\n" in said
    advice = said.split("`")[1]                            # its code runs only where it is named
    assert advice == f"python evaluate.py {tmp_path}/out --reward {tmp_path}/mine.py:score"


# --- data that lack a response

LACKING = {"string": {"prompt": "Question {}?"},
           "messages": {"prompt": [{"role": "user", "content": "Q {}"}]},
           "dialogues": {"messages": [{"role": "user", "content": "Q {}"},
                                      {"role": "assistant", "content": "A {}"}]}}


def lacking(kind, variant, tmp_path, checkpoint):
    """The arguments of a run of two steps on rows that lack responses."""
    rows = [json.loads(json.dumps(LACKING[kind]).replace("{}", str(i))) for i in range(60)]   # 2 are held out
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text("def score(p, r): return [float(len(x)) for x in r]\n")
    return ["sail.py", "--variant", variant, "--model", str(checkpoint), "--data", str(tmp_path / "x.jsonl"),
            "--steps", "2", "--batch-size", "4", "--max-prompt-length", "32", "--max-response-length", "6",
            "--learning-rate", "1e-3", "--out", str(tmp_path / "out"),
            *(["--reward", f"{tmp_path}/mine.py:score"] if variant == "pr" else [])]


@pytest.mark.parametrize("kind, variant, more", [
    ("string", "pr", ["--mix", "1"]), ("messages", "pr", ["--mix", "1"]), ("string", "pp", ["--mix", "1"]),
    ("messages", "pp", ["--mix", "1"]), ("dialogues", "sft", []), ("dialogues", "spin", []),
    ("dialogues", "pp", ["--mix", "1"])])
def test_rows_train_what_needs_no_more_than_they_have(kind, variant, more, tmp_path, checkpoint):
    sail_main([*lacking(kind, variant, tmp_path, checkpoint)[1:], *more])
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 0] and all(row["loss"] > 0 for row in rows)
    assert rows[0]["on_policy"] == {"pr": 1.0, "pp": 1.0, "spin": 0.0, "sft": None}[variant]
    figures = json.loads((tmp_path / "out/eval.jsonl").read_text().splitlines()[-1])
    assert "margin" not in figures and figures["length"] > 0


@pytest.mark.parametrize("kind, variant, more, message", [
    ("string", "dpo", [], "prompts, without the chosen and rejected responses that --variant dpo learns"),
    ("messages", "pr", ["--mix", "0.5"], "prompts, without the chosen and rejected responses"),
    ("string", "sft", [], "prompts, without the chosen responses that --variant sft learns from"),
    ("dialogues", "dp", [], "dialogues, without the chosen and rejected responses that --variant dp"),
    ("string", "spin", [], "prompts, without the chosen responses")])
def test_rows_that_lack_what_is_learned_from_are_named(kind, variant, more, message, tmp_path, checkpoint,
                                                       monkeypatch, capsys):
    argv = [*lacking(kind, variant, tmp_path, checkpoint), *more]
    assert message in fails(sail.main, argv, monkeypatch, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("main, argv, message", [
    (generate.main, ["generate.py", "--model", "/no/such/model", "--data", "DATA"],
     ": no such directory"),
    (reward.main, ["reward.py", "--reward", "m.py:f", "--responses", "/no/such.jsonl"], "no such file")])
def test_the_companions_complain_in_the_same_way(main, argv, message, tmp_path, monkeypatch, capsys):
    argv = [write(tmp_path / "x.jsonl") if word == "DATA" else word for word in argv]
    assert message in fails(main, argv, monkeypatch, capsys)


@pytest.mark.parametrize("argv", [
    ["data.py", "DATA", "--model", "/no/such/model"],
    ["evaluate.py", "/no/such/model", "--data", "DATA", "--out", "results.json"],
    ["generate.py", "--model", "MODEL", "--data", "DATA", "--limit", "2", "--out", "/proc/no/file"]])
def test_every_script_gives_one_line_and_status_2(argv, tmp_path, checkpoint):
    names = {"MODEL": str(checkpoint), "DATA": write(tmp_path / "x.jsonl")}
    argv = [names.get(word, word) for word in argv]
    argv += ["--max-prompt-length", "64", "--max-response-length", "4"]
    finished = subprocess.run([sys.executable, Path(sail.__file__).parent / argv[0], *argv[1:]],
                              capture_output=True, text=True, cwd=tmp_path, check=False)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.startswith(f"{argv[0]}: error: ") and finished.stderr.count("\n") == 1


def test_a_file_that_cannot_be_renamed_is_told_by_the_name_that_it_was_to_have():
    assert one_line(OSError(28, "No space left", "x.writing", None, "x.jsonl")) == "x.jsonl: No space left"
    assert one_line(OSError(28, "No space left", "x.jsonl")) == "x.jsonl: No space left"
    assert one_line(OSError("one\ntwo")) == "one two"


def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sail, "world_size", lambda: 2)
    for part in toy_model():
        part.save_pretrained(tmp_path / "base")
    argv = ["sail.py", "--data", write(tmp_path / "x.jsonl"), "--variant", "dpo", "--model",
            str(tmp_path / "base"),
            "--limit", "3", "--epochs", "1",
            "--batch-size", "1", "--max-prompt-length", "8", "--max-response-length", "8", "--out",
            str(tmp_path / "out")]
    capsys.readouterr()
    assert "too few for 2 processes" in fails(sail.main, argv, monkeypatch, capsys)
    message = fails(sail.main, [*argv, "--epochs", "0.1"], monkeypatch, capsys)
    assert "--batch-size: 0 pairs a step are too few" in message and not (tmp_path / "out").exists()


def test_the_real_command_line_gives_one_line_and_status_2(tmp_path):
    finished = subprocess.run([sys.executable, Path(sail.__file__), "--variant", "dpo", "--model", "m",
                               "--data", "absent.jsonl"], capture_output=True, text=True, cwd=tmp_path,
                              check=False)
    assert finished.returncode == 2 and finished.stdout == "" and not list(tmp_path.iterdir())
    assert finished.stderr == ("sail.py: error: absent.jsonl: no such file\n")
