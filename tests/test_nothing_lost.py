"""What a user has made stays, and what a run has done is kept, whatever ends it."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TOY_REWARD, sail_main
from test_errors import fails

import evaluate
import generate
import sail
from reward import scores_of
from runtime.processes import StopSignals

ROOT = Path(sail.__file__).parent
SHORT = ["--variant", "pr", "--mix", "0.5", "--batch-size", "4", "--eval-limit", "4",
         "--eval-every", "0", "--max-response-length", "6"]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The directory of a run of four steps that nothing has ended."""
    out = tmp_path_factory.mktemp("whole") / "run"
    sail_main(["--model", base, *SHORT, "--steps", "4", "--eval-every", "2", "--out", str(out)])
    return out


def arguments(base, out, *more):
    return ["--model", base, *SHORT, "--steps", "4", "--eval-every", "2", "--out", str(out), *more]


def files_of(path):
    return {file: file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


def logs(out):
    """The rows of a run's three logs without their seconds."""
    rows = []
    for name in ("metrics", "eval", "samples"):
        for line in (Path(out) / f"{name}.jsonl").read_text().splitlines():
            rows.append({key: value for key, value in json.loads(line).items()
                         if not key.startswith("seconds")})
    return rows


def same(out, whole):
    """Whether two runs ended in the same weights and logs."""
    weights = [(Path(path) / "model/model.safetensors").read_bytes() for path in (out, whole)]
    return weights[0] == weights[1] and logs(out) == logs(whole)


# --- inputs and OUT

@pytest.mark.parametrize("flag, place, more", [
    ("--model", "model", "--overwrite"), ("--model", ".", "--resume"),
    ("--reference", "notes", "--overwrite"), ("--data", "model", "--overwrite"),
    ("--eval-data", ".", "--overwrite"), ("--reward", "model", "--resume"),
    ("--preference", ".", "--overwrite")])
def test_an_input_in_the_directory_of_the_run_is_refused_with_both_paths(
        flag, place, more, base, held_out, whole, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(whole, tmp_path / "run")
    inside = out / place
    inside.mkdir(exist_ok=True)
    if flag in ("--model", "--reference"):
        shutil.copytree(base, inside, dirs_exist_ok=True)
    else:
        is_code = flag in ("--reward", "--preference")
        inside = inside / ("mine.py" if is_code else "pairs.jsonl")
        shutil.copy(ROOT / "toy.py" if is_code else held_out, inside)
    before = files_of(out)
    value = f"{inside}:toy_reward" if inside.suffix == ".py" else str(inside)
    argv = ["sail.py", *arguments(base, out, "--reward", TOY_REWARD, flag, value, more)]
    message = fails(sail.main, argv, monkeypatch, capsys)
    assert f"{flag} {inside} lies in --out {out}" in message and files_of(out) == before


# --- files of other people

@pytest.mark.parametrize("name", ["model.writing", "adapter.writing", "model.1.writing"])
def test_a_file_that_is_named_like_something_unfinished_stays(name, base, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("mine")
    sail_main(["--model", base, *SHORT, "--steps", "1", "--out", str(tmp_path)])
    assert (tmp_path / name / "mine").read_text() == "mine" and (tmp_path / "model").is_dir()


def test_the_logs_of_each_earlier_try_stay(base, tmp_path):
    for nth in range(3):
        sail_main(["--model", base, *SHORT, "--steps", "1", "--seed", str(nth), "--out", str(tmp_path)])
        shutil.rmtree(tmp_path / "model")
    kept = sorted(path.name for path in tmp_path.glob("metrics.jsonl*"))
    assert kept == ["metrics.jsonl", "metrics.jsonl.2.old", "metrics.jsonl.old"]
    assert len({(tmp_path / name).read_text() for name in kept}) == 3


def test_a_backup_by_hard_links_keeps_the_logs_that_a_run_cuts_and_empties(base, tmp_path):
    argv = ["--model", base, *SHORT, "--steps", "2", "--save-every", "1", "--out", str(tmp_path / "run")]
    sail_main(argv)
    (tmp_path / "backup").mkdir()
    for name in ("metrics", "eval", "samples"):
        os.link(tmp_path / f"run/{name}.jsonl", tmp_path / f"backup/{name}.jsonl")
    before = files_of(tmp_path / "backup")
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    for more in ("--resume", "--overwrite"):
        sail_main([*argv, more])
        assert files_of(tmp_path / "backup") == before


@pytest.mark.parametrize("text", ['{"key": "my secret"}', '{"key": "my secret', "{"])
def test_a_file_that_is_none_of_verdicts_is_not_emptied(text, tmp_path):
    from judge import open_verdicts
    (tmp_path / "key.json").write_text(text)
    with pytest.raises(sail.InputError, match="not a file of verdicts"), open_verdicts(tmp_path / "key.json"):
        pass
    assert (tmp_path / "key.json").read_text() == text


@pytest.mark.parametrize("out, said", [
    ("DATA", "this command reads"), ("MODEL/config.json", "command has not written"),
    ("notes.txt", "command has not written"), (".", "is a directory"), ("/proc/no/file", "/proc/no"),
    ("/proc/no.jsonl", "/proc/no.jsonl")])
def test_answers_are_not_written_over_other_files_and_this_is_said_before_sampling(
        out, said, checkpoint, held_out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load_policy", None)
    model = shutil.copytree(checkpoint, tmp_path / "model")
    data = shutil.copy(held_out, tmp_path / "data.jsonl")
    Path("notes.txt").write_text("mine\n")
    before = files_of(tmp_path)
    argv = ["generate.py", "--model", str(model), "--data", str(data), "--out",
            out.replace("DATA", str(data)).replace("MODEL", str(model))]
    assert said in fails(generate.main, argv, monkeypatch, capsys) and files_of(tmp_path) == before


def test_the_held_out_prompts_of_a_run_are_not_written_over(checkpoint, tmp_path, monkeypatch, capsys):
    """They may be the answers of an earlier command."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "run/model")
    Path("mine.jsonl").write_text('{"prompt": "Q", "response": "A"}\n')
    for name in ("data", "eval_data"):
        asked = {"data": "other.jsonl", "eval_data": None, name: "mine.jsonl"}
        Path("run/args.json").write_text(json.dumps({**asked, "may_change": []}))
        argv = ["generate.py", "--model", "run", "--out", "mine.jsonl"]
        assert "is a file that this command reads" in fails(generate.main, argv, monkeypatch, capsys)


@pytest.mark.parametrize("out, said", [("fig.png", "give the name of a .json file"),
                                       ("mine.json", "command has not written"),
                                       ("deep.json", "command has not written"),
                                       ("drawn.json", "drawn.png exists")])
def test_figures_are_not_written_over_other_files(out, said, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text('{"mine": 1}')
    Path("deep.json").write_text("[" * 100_000 + "]" * 100_000)
    Path("drawn.png").write_text("mine")
    before = files_of(tmp_path)
    argv = ["evaluate.py", "--compare", str(whole), "--out", out]
    assert said in fails(evaluate.main, argv, monkeypatch, capsys) and files_of(tmp_path) == before


# --- a full disk

def test_a_tokenizer_that_cannot_be_written_loses_no_step(base, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")       # as the package tokenizers raises it

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
        message = fails(sail.main, ["sail.py", *arguments(base, tmp_path)], patch, capsys)
    assert "model cannot be written (No space left on device (os error 28)) (step 4 is saved" in message
    assert sorted(path.name for path in tmp_path.glob("*model*")) == []
    sail_main(arguments(base, tmp_path, "--resume"))
    assert (tmp_path / "model").is_dir()


# --- a step is done when its outputs exist

@pytest.mark.parametrize("failing", [2, 4])
def test_an_evaluation_that_failed_is_made_up(failing, base, whole, tmp_path, monkeypatch, capsys):
    real, times = sail.evaluate_policy, []

    def evaluate_policy(*inputs):
        times.append(1)
        if len(times) == 1 + failing // 2:                             # steps 0, 2 and 4
            raise sail.InputError("the reward is out of order")
        return real(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(sail, "evaluate_policy", evaluate_policy)
        message = fails(sail.main, ["sail.py", *arguments(base, tmp_path)], patch, capsys)
    assert f"(step {failing} is saved; --resume continues with the same inputs)" in message
    assert not (tmp_path / "model").exists()
    sail_main(arguments(base, tmp_path, "--resume"))
    assert same(tmp_path, whole)


def test_a_line_that_was_half_written_is_cut_off_and_written_whole_by_the_run_that_goes_on(
        base, whole, tmp_path, monkeypatch, capsys):
    from runtime import training
    real = training.write_line

    def write_line(out, name, row):
        if name == "metrics" and row["step"] == 3:
            with open(out / "metrics.jsonl", "a") as file:
                file.write('{"step": 3, "lo')
            raise OSError(28, "No space left on device", "metrics.jsonl")
        real(out, name, row)

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_line", write_line)
        message = fails(sail.main, ["sail.py", *arguments(base, tmp_path)], patch, capsys)
    assert "No space left on device (step 3 is saved; --resume continues with the same inputs)" in message
    sail_main(arguments(base, tmp_path, "--resume"))
    assert same(tmp_path, whole)


# --- signals

MINE = """import multiprocessing, os, signal, time
calls = []
def score(prompts, responses):
    calls.append(1)
    if len(calls) == AT and os.environ.get("SICK"):
        HARM
    return [float(len(response)) for response in responses]
def endless():
    time.sleep(600)
def limited():
    child = multiprocessing.get_context("fork").Process(target=endless)
    child.start()
    time.sleep(0.2)
    child.terminate()
    child.join(20)
    assert child.exitcode == -signal.SIGTERM, child.exitcode
"""


def run_mine(base, out, at, harm):
    """A run in a process of its own, whose reward does harm in its call number `at` after the trial. With
    --eval-every 2 the calls are an evaluation, twice a step, an evaluation (of two calls each), twice a step,
    and so on."""
    mine = out.parent / "mine.py"
    mine.write_text(MINE.replace("AT", str(at + 1)).replace("HARM", harm))
    command = [sys.executable, ROOT / "sail.py", *arguments(base, out, "--reward", f"{mine}:score")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SICK": "1"}
    return subprocess.run(command, text=True, capture_output=True, timeout=50, env=environment)


@pytest.mark.parametrize("name, status, at, reached", [
    ("SIGHUP", 0, 4, 2), ("SIGTERM", 0, 5, 2), ("SIGINT", 130, 5, 2)],
    ids=["in a step", "in an evaluation", "in an evaluation"])
def test_a_signal_saves_before_any_evaluation_and_ends_one(name, status, at, reached, base, tmp_path):
    out, harm = tmp_path / "run", f"os.kill(os.getpid(), signal.{name}); time.sleep(60 * ({at} == 5))"
    done = run_mine(base, out, at, harm)                               # 60 s would be too many for it
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert f"step {reached}, which is saved in {out}/checkpoints/{reached}; the same command" in done.stdout
    assert [row["step"] for row in logs(out) if "prompts" in row] == [0] and not (out / "model").exists()
    more = ["--reward", f"{tmp_path}/mine.py:score"]
    sail_main(arguments(base, out, *more, "--resume"))
    sail_main(arguments(base, tmp_path / "whole", *more))
    assert same(out, tmp_path / "whole")


@pytest.mark.parametrize("first, second", [("SIGINT", "SIGINT"), ("SIGHUP", "SIGTERM")])
def test_a_second_signal_ends_the_process_at_once(first, second, base, tmp_path):
    harm = f"os.kill(os.getpid(), signal.{first}); os.kill(os.getpid(), signal.{second}); time.sleep(60)"
    done = run_mine(base, tmp_path / "run", 3, harm)
    assert done.returncode == -getattr(signal, second) and "Traceback" not in done.stderr


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.exit_status is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_child_process_of_a_reward_can_be_terminated(base, tmp_path):
    done = run_mine(base, tmp_path / "run", 3, "limited()")
    assert done.returncode == 0, done.stderr


def test_ctrl_c_while_a_script_imports_is_one_line(base, tmp_path):
    command = [sys.executable, ROOT / "sail.py", *arguments(base, tmp_path / "run")]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "sail.py: interrupted\n"


def test_ctrl_c_while_a_command_loads_is_one_line(base, tmp_path):
    (tmp_path / "mine.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    command = [sys.executable, ROOT / "sail.py", *arguments(base, tmp_path / "run"), "--reward",
               f"{tmp_path}/mine.py:score"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=60)
    assert done.returncode == 130 and done.stderr == "sail.py: interrupted\n"


# --- rewards

def test_a_reward_gets_copies():
    prompts = [[{"role": "user", "content": "Q"}]]

    def score(dialogues, responses):
        for dialogue, response in zip(dialogues, responses, strict=True):
            dialogue.append({"role": "assistant", "content": response})
        responses.clear()
        return [1.0]

    assert scores_of("reward mine", score, None, prompts, ["A"]) == [1.0]
    assert prompts == [[{"role": "user", "content": "Q"}]]


def test_a_reward_that_ends_the_process_leaves_a_status_and_a_checkpoint(base, tmp_path):
    done = run_mine(base, tmp_path / "run", 4, "os._exit(0)")
    assert done.returncode == 2 and "mine.py:score: failed, as shown above (step 1 is saved" in done.stderr
    assert "os._exit(0) was called" in done.stderr


# --- several processes

def on_two_ranks(script, folder, *arguments):
    """Two ranks of this script; each starts in a directory of its own below the folder."""
    (folder / "rank.py").write_text(script)
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node", "2", folder / "rank.py", *map(str, arguments)],
                          text=True, capture_output=True, timeout=200, cwd=folder,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


APART = """import os, pathlib, sys
here = pathlib.Path("rank-" + os.environ["RANK"])
here.mkdir(exist_ok=True)
os.chdir(here)
import runtime.run_directory as run_directory
wait = run_directory.wait_for
run_directory.wait_for = lambda path: wait(path, 0.5)
import sail
sail.command_line(sail.main)
"""


def test_machines_without_a_common_directory_are_told_so_at_the_start(base, held_out, tmp_path):
    done = on_two_ranks(APART, tmp_path, *arguments(base, "run", "--eval-data", held_out))
    assert done.returncode != 0 and done.stderr.count("rank.py: error: run: rank 1 does not see what") == 1
    assert not (tmp_path / "rank-0/run/metrics.jsonl").exists()
    assert [path.name for path in (tmp_path / "rank-0/run").iterdir()] == ["lock"]
