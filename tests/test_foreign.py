"""What is somebody else's, in a run's directory, a data file, a model's, a reward: it is neither lost nor
obeyed, and if it is nonsense, one line says so."""
import gc
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, sail_args, sail_main, tiny_model
from test_errors import fails

import evaluate
import generate
import sail
import toy
from data import apply_template
from formats import BadRow, load_pairs
from reward import Reward, load_classifier
from runtime.command_line import InputError
from runtime.compare import compare
from runtime.run_directory import NAMES, fingerprint_files, remove, run_directory, start_afresh

SHORT = ["--variant", "dpo", "--batch-size", "4", "--limit", "40", "--eval-limit", "4", "--eval-every", "0",
         "--max-response-length", "6", "--steps", "2"]


def files_of(path):
    return {file: file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


def arguments(base):
    return ["--model", base, "--reference", f"{base}/reference", *SHORT, "--save-every", "1"]


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory):
    """A run of two steps with a checkpoint of each."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    sail_main([*arguments(base), "--out", str(out)])
    return out


@pytest.fixture
def run(base, stopped, tmp_path):
    """A copy of it, and its arguments."""
    out = shutil.copytree(stopped, tmp_path / "run")
    return out, ["sail.py", *arguments(base), "--out", str(out)]


# --- a run's directory

@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "args.json"])
def test_what_is_no_runs_is_refused_by_name_and_stays(name, more, base, tmp_path, monkeypatch, capsys):
    path = tmp_path / name
    if "." in name:
        path.write_text('{"prompt": "Q"}\n')
    else:
        path.mkdir()
        (path / "mine").write_text("mine")
    before = files_of(tmp_path)
    argv = ["sail.py", "--model", base, *SHORT, "--out", str(tmp_path), *more]
    capsys.readouterr()
    assert f"{path} exists and belongs to no run" in fails(sail.main, argv, monkeypatch, capsys)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", [*NAMES, "lock"])
def test_no_link_is_followed(name, run, tmp_path, monkeypatch, capsys):
    out, argv = run
    target = tmp_path / "elsewhere"
    target.write_text("mine")
    if (out / name).is_dir():
        shutil.rmtree(out / name)
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(target)
    message = fails(sail.main, [*argv, "--overwrite"], monkeypatch, capsys)
    assert f"{out / name} is a symbolic link" in message and target.read_text() == "mine"


def test_a_lock_that_is_somebodys_file_keeps_its_text(base, tmp_path):
    (tmp_path / "lock").write_text("mine")
    sail_main(["--model", base, *SHORT, "--out", str(tmp_path)])
    assert (tmp_path / "lock").read_text() == "mine"


def test_what_cannot_be_removed_ends_a_run_before_it_starts(run, monkeypatch, capsys):
    out, argv = run

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", denied)
    message = fails(sail.main, [*argv, "--overwrite"], monkeypatch, capsys)
    assert f"{out / 'model'}: Permission denied" in message


def test_logs_of_an_earlier_try_stay_unless_they_are_to_be_overwritten(tmp_path):
    for overwrite, left in ((False, "mine"), (True, None)):
        out = tmp_path / str(overwrite)
        out.mkdir()
        (out / "metrics.jsonl").write_text("mine")
        start_afresh(out, sail_args(["--overwrite"] if overwrite else []))
        assert (out / "metrics.jsonl").read_text() == ""
        old = out / "metrics.jsonl.old"
        assert (old.read_text() if old.exists() else None) == left


def test_progress_without_a_record_is_refused(run, monkeypatch, capsys):
    out, argv = run
    file = out / "checkpoints/2/progress.json"
    progress = json.loads(file.read_text())
    del progress["record"]
    file.write_text(json.dumps(progress))
    message = fails(sail.main, [*argv, "--resume"], monkeypatch, capsys)
    assert "checkpoints/2/progress.json: no run has written this" in message


def change(path, **more):
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


@pytest.mark.parametrize("more", [
    dict(step=-4), dict(step=1), dict(step="2"), dict(step=2.0), dict(skipped=1000), dict(in_a_row=-1),
    dict(baseline=None), dict(record={}), dict(record={"step": 2, "loss": "low"}),
    dict(logs={"../../elsewhere": 0, "metrics": 0, "eval": 0, "samples": 0}),
    dict(logs={"metrics": -1, "eval": 0, "samples": 0}), dict(logs=[])])
def test_progress_that_no_run_has_written_is_refused(more, run, monkeypatch, capsys):
    out, argv = run
    change(out / "checkpoints/2/progress.json", **more)
    before = files_of(out)
    message = fails(sail.main, [*argv, "--resume"], monkeypatch, capsys)
    assert "checkpoints/2/progress.json: no run has written this" in message and files_of(out) == before


@pytest.mark.parametrize("name", ["²", "٣", "007", "0", "-1"])
def test_a_directory_that_is_named_almost_like_a_checkpoint_is_none(name, run):
    out, argv = run
    (out / "checkpoints" / name).mkdir()
    shutil.rmtree(out / "checkpoints/2")
    sail_main([*argv[1:], "--resume"])                                 # from 1
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"1", "2", name}


def test_settings_that_no_run_has_written_are_refused(run, monkeypatch, capsys):
    out, _ = run
    change(out / "args.json", dtype="float8")
    message = fails(evaluate.main, ["evaluate.py", str(out)], monkeypatch, capsys)
    assert "args.json: argument --dtype: invalid choice: 'float8'" in message


FIGURE = dict(step=2, prompts=4, kl=0.1, kl_interval=None)


@pytest.mark.parametrize("more", [dict(kl="low"), dict(kl_interval=[0, "high"]), dict(step="1"),
                                  dict(step=None), dict(prompts=None), dict(kl=[1]), dict(kl=10**400)])
def test_figures_that_no_run_has_written_are_refused(more, run, monkeypatch, capsys):
    out, _ = run
    (out / "eval.jsonl").write_text(json.dumps({**FIGURE, **more}) + "\n")
    message = fails(evaluate.main, ["evaluate.py", "--compare", str(out)], monkeypatch, capsys)
    assert f"{out}/eval.jsonl:1: " in message


def test_figures_that_no_run_has_written_are_not_continued(run, monkeypatch, capsys):
    out, argv = run
    row, progress = '{"step": 2, "prompts": "many"}\n', out / "checkpoints/2/progress.json"
    (out / "eval.jsonl").write_text(row + "half a line")
    change(progress, logs={**json.loads(progress.read_text())["logs"], "eval": len(row)})
    before = files_of(out)
    message = fails(sail.main, [*argv, "--resume"], monkeypatch, capsys)
    assert f"error: {out}/eval.jsonl:1: no run has written this line" in message and files_of(out) == before


SAMPLE = dict(step=2, prompt="Q", response="A", reward=0.5)


@pytest.mark.parametrize("row", [
    dict(SAMPLE, step=None), dict(SAMPLE, prompt=5), dict(SAMPLE, prompt=[]), dict(SAMPLE, prompt=["Q"]),
    dict(SAMPLE, prompt=[{"content": None}]), dict(SAMPLE, response=["A"]), dict(SAMPLE, reward="high"), {}])
def test_samples_that_no_run_has_written_are_refused(row, run, monkeypatch, capsys):
    out, _ = run
    (out / "eval.jsonl").write_text(json.dumps(FIGURE) + "\n")
    (out / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n" + json.dumps(row) + "\n")
    message = fails(evaluate.main, ["evaluate.py", "--compare", str(out), "--show", "1"], monkeypatch, capsys)
    assert f"{out}/samples.jsonl:2: no run has written this line" in message


@pytest.mark.parametrize("more", [
    dict(preference=5), dict(preference=0.5), dict(reward=["x"]), dict(reward="."), dict(data=5),
    dict(eval_data=["x"]), dict(reference={"a": 1}, beta="warm"), dict(max_length=[5])])
def test_settings_of_any_type_are_shown_beside_figures(more, run, capsys):
    out, _ = run
    (out / "eval.jsonl").write_text(json.dumps(FIGURE) + "\n")
    change(out / "args.json", **more)
    compare([str(out)], out.parent / "results.json")
    assert "Measured on: " in capsys.readouterr().out


@pytest.mark.parametrize("more, said", [
    (dict(data=None), "this run names no data"), (dict(limit="all"), "--limit: invalid literal for int"),
    (dict(eval_data="OUT"), "a run whose pairs are from ")])
def test_a_run_whose_held_out_pairs_cannot_be_found_is_named(more, said, run, base, monkeypatch, capsys):
    out, _ = run
    change(out / "args.json", **more)
    if more.get("eval_data"):
        change(out / "args.json", eval_data=str(out))
    argv = ["sail.py", "--variant", "dpo", "--model", base, "--data", f"{base}/toy-pairs.jsonl",
            "--eval-data", str(out), "--out", str(out.parent / "new")]
    assert said in fails(sail.main, argv, monkeypatch, capsys)


def test_a_run_in_training_is_called_that(run, monkeypatch, capsys):
    out, _ = run
    shutil.rmtree(out / "model")
    message = fails(evaluate.main, ["evaluate.py", str(out)], monkeypatch, capsys)
    assert f"{out} has no model yet; it is in training, or waits for --resume" in message
    assert f"{out}/checkpoints can be evaluated" in message
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--compare", str(out)])
    with pytest.raises(InputError, match="no finished run"):
        evaluate.main()
    assert f"{out} is left out" in capsys.readouterr().out


def test_a_name_with_a_dollar_is_drawn_as_it_is(run):
    out, _ = run
    named = out.rename(out.with_name("lr$10^$x$"))
    link = named.parent / "results.png"
    link.symlink_to(named / "args.json")                               # a picture follows no link
    before = (named / "args.json").read_text()
    row = {**FIGURE, "reward": 0.2, "reward_interval": None}
    (named / "eval.jsonl").write_text(json.dumps(row) + "\n")
    compare([str(named)], named.parent / "results.json")
    assert not link.is_symlink() and link.read_bytes()[1:4] == b"PNG"
    assert (named / "args.json").read_text() == before


def test_of_a_link_to_a_directory_the_link_alone_is_removed(tmp_path):
    (tmp_path / "theirs").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "theirs")
    for _ in range(2):                                                 # the second time nothing is there
        remove(link)
        assert not link.is_symlink() and (tmp_path / "theirs").is_dir()


@pytest.mark.parametrize("source, name", [
    ("toy", "toy"), ("x/pairs.v1.jsonl", "pairs.v1"), ("a/b-v1.0", "a-b-v1.0"), ("a/b-v1.1", "a-b-v1.1"),
    ("a/b/config:test", "a-b-config-test")])
def test_a_runs_directory_is_named_after_its_data(source, name):
    assert run_directory(source) == Path("runs", name)
    assert run_directory("..") == Path("runs", Path("..").resolve().name)


# --- models, rewards that were replaced

def test_files_are_told_apart_by_their_bytes(tmp_path):
    names = ["model.safetensors", "pytorch_model.bin", "config.json", "chat_template.jinja", "merges.txt",
             "tokenizer.model", "modeling.py"]
    for name in names:
        (tmp_path / name).write_bytes(bytes(300_000))
    prints = [fingerprint_files(str(tmp_path))]
    for name in names:
        (tmp_path / name).write_bytes(bytes(299_999) + b"y")
        prints.append(fingerprint_files(str(tmp_path)))
    assert len({*prints}) == len(names) + 1
    before = prints[-1]
    (tmp_path / "toy-pairs.jsonl").write_text("not of the model")
    assert fingerprint_files(str(tmp_path)) == before and fingerprint_files(None) is None
    with pytest.raises(InputError, match="^inf: no such directory, and not found on the hub"):
        fingerprint_files("inf")
    for place in (0, 150_000, 299_999):
        with open(tmp_path / "model.safetensors", "r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert fingerprint_files(str(tmp_path)) != before
        before = fingerprint_files(str(tmp_path))
    (tmp_path / "config.json").rename(tmp_path / "configuration.json")           # it is another file now
    assert fingerprint_files(str(tmp_path)) != before
    code = tmp_path / "mine.py"
    code.write_text("def score(prompts, responses): return [0.0] * len(responses)")
    before = fingerprint_files(f"{code}:score")
    code.write_text("def score(prompts, responses): return [1.0] * len(responses)")
    assert fingerprint_files(f"{code}:score") != before


def replace(model):
    """Other weights under the same name."""
    policy, _ = generate.load_policy(str(model))
    with torch.no_grad():
        next(policy.parameters()).add_(0.1)
    policy.save_pretrained(model)


@pytest.mark.parametrize("name", ["model", "reference", "reward"])
def test_what_was_replaced_under_its_name_is_not_continued(name, run, base, tmp_path, monkeypatch, capsys):
    _, argv = run
    reward = tmp_path / "mine.py"
    models = {"model": shutil.copytree(base, tmp_path / "base"), "reference": tmp_path / "base/reference"}
    reward.write_text("def score(prompts, responses): return [0.0] * len(responses)")
    argv += ["--model", str(models["model"]), "--reference", str(models["reference"]), "--reward",
             f"{reward}:score"]
    sail_main([*argv[1:], "--overwrite"])
    if name == "reward":
        reward.write_text("def score(prompts, responses): return [1.0] * len(responses)")
    else:
        replace(models[name])
    capsys.readouterr()
    message = fails(sail.main, [*argv, "--resume"], monkeypatch, capsys)
    assert f"the files of --{name} have changed since" in message
    assert ("or go on in a new run: --model " in message) == (name != "model")         # its base has changed


def test_a_reference_that_was_replaced_is_not_measured_to(base, tmp_path, monkeypatch, capsys):
    mine = shutil.copytree(f"{base}/reference", tmp_path / "reference")
    sail_main(["--model", base, "--reference", str(mine), *SHORT, "--out", str(tmp_path / "run")])
    argv = ["evaluate.py", str(tmp_path / "run"), "--eval-limit", "2",
            "--reward", f"{toy.__file__}:toy_reward"]
    monkeypatch.setattr("sys.argv", argv)
    evaluate.main()                                                    # as it was
    (tmp_path / "run/evaluated.json").unlink()
    replace(mine)
    capsys.readouterr()
    message = fails(evaluate.main, argv, monkeypatch, capsys)
    assert f"the files of its reference {mine} have changed since" in message
    monkeypatch.setattr("sys.argv", [*argv, "--reference", str(mine)])
    evaluate.main()
    assert (tmp_path / "run/evaluated.json").is_file()
    sail_main(["--model", base, *SHORT, "--out", str(tmp_path / "run"), "--overwrite"])
    assert not (tmp_path / "run/evaluated.json").exists()              # it was the earlier model's


def test_a_path_that_is_not_here_is_no_name_on_the_hub(monkeypatch):
    monkeypatch.setattr("transformers.utils.cached_file", None)
    for name in ("no/such/model", "/no/such", "./no"):
        with pytest.raises(InputError, match=f"^{name}: no such directory here; the paths in a run"):
            fingerprint_files(name)


def test_a_reward_model_that_was_replaced_does_not_measure(base, tmp_path, monkeypatch, capsys):
    model, tokenizer, _ = load_classifier(base, num_labels=1)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "rm")
    sail_main(["--model", base, *SHORT, "--reward", str(tmp_path / "rm"), "--out", str(tmp_path / "run")])
    model.score.weight.data *= 2
    model.save_pretrained(tmp_path / "rm")
    argv = ["evaluate.py", str(tmp_path / "run"), "--eval-limit", "2"]
    capsys.readouterr()
    message = fails(evaluate.main, argv, monkeypatch, capsys)
    assert f"the files of its reward {tmp_path / 'rm'} have changed since" in message


# --- data

def test_a_data_set_opens_nothing_that_it_names(tmp_path, monkeypatch):
    """Columns that are typed as pictures hold paths; here, also one that the format needs."""
    datasets = pytest.importorskip("datasets")
    rows = {"prompt": ["Q1", "Q2"], "chosen": ["a", "b"], "rejected": ["c", "d"],
            "picture": [{"bytes": None, "path": "/etc/hostname"}] * 2}
    features = datasets.Features({name: datasets.Value("string") for name in ("prompt", "chosen", "rejected")}
                                 | {"picture": datasets.Image()})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set/train.parquet")
    opened = []
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: opened.append(1))
    for source in (tmp_path / "set/train.parquet", tmp_path / "set"):
        pairs, account = load_pairs(str(source))
        assert [pair.chosen for pair in pairs] == ["a", "b"] and account.unread == {"picture": 2}
    rows["prompt"] = rows.pop("picture")
    features["prompt"] = features.pop("picture")
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set/train.parquet")
    with pytest.raises(InputError, match="rows can be used"):
        load_pairs(str(tmp_path / "set"))
    assert opened == []


# --- configurations and templates

@pytest.mark.parametrize("more", [
    dict(num_attention_heads=0), dict(num_hidden_layers="two"),
    dict(hidden_act="nonsense"), dict(rope_parameters={"rope_type": "nonsense"}), dict(dtype="float9"),
    dict(_attn_implementation="somebodys/kernel"), dict(quantization_config=3), dict(pad_token_id=10**9)])
def test_a_configuration_that_is_nonsense_is_one_line(more, tmp_path):
    tiny_model("tied").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    change(tmp_path / "config.json", **more)
    with pytest.raises(InputError, match=str(tmp_path)):
        generate.load_policy(str(tmp_path))


def test_a_template_that_raises_anything_refuses_the_row():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 'x' * 10**15 }}"
    with pytest.raises(BadRow, match="refused by the chat template"):
        apply_template(tokenizer, [{"role": "user", "content": "Q"}])


# --- rewards

def test_a_reward_leaves_gradients_and_directory_as_they_were(tmp_path):
    def score(prompts, responses):
        torch.set_grad_enabled(False)
        os.chdir(tmp_path)
        return [1.0 for _ in responses]

    directory = os.getcwd()
    assert Reward("mine", score)(["Q"], ["A"]) == [1.0]
    assert torch.is_grad_enabled() and os.getcwd() == directory


def test_a_child_process_of_a_reward_ends_with_the_status_that_it_gives():
    def score(prompts, responses):
        child = os.fork()
        if child == 0:
            try:
                os._exit(7)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)                   # or it would go on with the tests
        return [float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))]

    assert Reward("mine", score)(["Q"], ["A"]) == [7.0]


@pytest.mark.parametrize("scores", [{"1": 2.0}, {1.0}, "1"])
def test_a_reward_that_returns_no_list_is_named(scores):
    with pytest.raises(InputError, match=f"returned a {type(scores).__name__}; it must return a list"):
        Reward("mine", lambda *_: scores)(["Q"], ["A"])


def test_a_reward_that_raises_keyboard_interrupt_is_one_line_in_training(capsys):
    def score(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):                             # elsewhere it may be the user's
        Reward("mine", score)(["Q"], ["A"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)                       # a run in training has its own
    with pytest.raises(InputError, match="reward mine: failed"):
        Reward("mine", score)(["Q"], ["A"])
    assert capsys.readouterr().err.startswith("Traceback")


# --- disks, pipes

def test_a_closed_output_saves_what_was_reached(base, tmp_path, monkeypatch, capsys):
    def closed(record, _):
        if record["step"] == 4:                                        # the last one, which is printed
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("runtime.training.print_step", closed)
    argv = ["sail.py", "--model", base, *SHORT, "--steps", "4", "--out", str(tmp_path / "run")]
    message = fails(sail.main, argv, monkeypatch, capsys)
    assert "standard output is closed (step 4 is saved; --resume continues with the same inputs)" in message
    assert (tmp_path / "run/checkpoints/4/progress.json").is_file()


def test_a_model_that_cannot_be_written_is_one_line_and_its_steps_stay(base, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", full)
    argv = ["sail.py", "--model", base, *SHORT, "--out", str(tmp_path / "run")]
    message = fails(sail.main, argv, monkeypatch, capsys)
    assert "run/model cannot be written ([Errno 28] No space left on device) (step 2 is saved" in message
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "run/model.writing").exists()
    monkeypatch.undo()
    gc.collect()                                                       # the lock, in the exception's frames
    sail_main([*argv[1:], "--resume"])
    assert (tmp_path / "run/model").is_dir()
