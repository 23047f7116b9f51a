"""Stopped, killed, starved: a run says what happened, loses nothing that was saved, and continues as if
unbroken."""
import fcntl
import gc
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import TOY_REWARD, as_settings, sail_main
from test_errors import fails
from test_scale import largest_difference, rows_of, weights

import data
import reward
import sail
from runtime import processes

ROOT = Path(sail.__file__).parent
COMMON = ["--variant", "pr", "--mix", "0.5", "--steps", "10", "--save-every", "4", "--batch-size", "4",
          "--limit", "60", "--eval-limit", "4", "--eval-every", "5", "--max-response-length", "8"]


def arguments(base, out, *more):
    return ["--model", base, "--reference", f"{base}/reference", *COMMON, "--out", str(out), *more]


def run(base, out, *more):
    gc.collect()                                   # the traceback of a run that failed holds its lock
    sail_main(arguments(base, out, *more))


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory):
    """The directory of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run(base, out)
    return out


@pytest.fixture
def stopped(unbroken, tmp_path):
    """The same as it was left in the middle of logging step 10, past its last checkpoint."""
    out = shutil.copytree(unbroken, tmp_path / "stopped")
    shutil.rmtree(out / "checkpoints/10")
    shutil.rmtree(out / "model")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:9]) + '{"step": 10, "lo')
    return out


def same(out, unbroken):
    """Whether two runs left the same weights and logs, bit for bit."""
    names = ("model/model.safetensors", "eval.jsonl", "samples.jsonl")
    return (all((out / name).read_bytes() == (unbroken / name).read_bytes() for name in names)
            and rows_of(out) == rows_of(unbroken))


def checkpoints(out):
    return sorted((path.name for path in (out / "checkpoints").iterdir()), key=int)


def on_two_ranks(base, out, *more):
    """The finished process of the command line on two ranks."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags, _ = as_settings(arguments(base, out, *more))                # a process has no other settings
    return subprocess.run([*start, ROOT / "sail.py", *flags], text=True, capture_output=True, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def fails_here(base, out, monkeypatch, capsys, *more):
    """The one line of complaint of a run in this process."""
    capsys.readouterr()
    gc.collect()
    return fails(sail.main, ["sail.py", *arguments(base, out, *more)], monkeypatch, capsys)


# --- resume

def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(base, stopped, unbroken):
    run(base, stopped, "--resume")
    assert same(stopped, unbroken) and checkpoints(stopped) == ["8", "10"]


@pytest.mark.parametrize("more", [
    ["--optimizer", "rmsprop", "--schedule", "cosine", "--warmup-steps", "3"], ["--lora", "4"], ["--shard"],
    ["--variant", "dp", "--limit", "20"], ["--variant", "dp", "--limit", "20", "--lora", "4", "--shard"]],
    ids=["rmsprop", "lora", "shard", "reference once", "reference once, lora, shard"])
def test_so_does_one_with_another_optimizer_an_adapter_shards_or_a_reference_that_scores_once(
        base, tmp_path, more):
    if "--lora" in more:
        pytest.importorskip("peft")
        more = [*more, "--reference", base]                            # the policy without its adapter
    run(base, tmp_path / "whole", *more)
    out = shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(out / "checkpoints/10")
    shutil.rmtree(out / "model")
    run(base, out, *more, "--resume")
    assert rows_of(out) == rows_of(tmp_path / "whole")
    assert largest_difference(weights(out / "model"), weights(tmp_path / "whole/model")) == 0


def test_resume_without_a_checkpoint_starts_and_with_the_last_only_saves(base, unbroken, tmp_path):
    run(base, tmp_path, "--resume")
    assert same(tmp_path, unbroken)
    shutil.rmtree(tmp_path / "model")
    run(base, tmp_path, "--resume")
    assert same(tmp_path, unbroken)


def test_killed_runs_resume_to_the_same_bits(tmp_path):
    """Twenty: python experiments/kill.py."""
    finished = subprocess.run([sys.executable, ROOT / "experiments/kill.py", "--kills", "2", "--seed", "2",
                               "--out", tmp_path], text=True, capture_output=True, timeout=900)
    assert finished.returncode == 0 and "2 of 2 equal" in finished.stdout, finished.stdout + finished.stderr


TERMINATING = """import os, signal
calls = []
def score(prompts, responses):
    calls.append(1)
    if len(calls) == 4 and os.environ.get("TERMINATE") == os.environ.get("RANK", "0"):
        os.kill(os.getpid(), signal.SIGTERM)
    return [float(len(response)) for response in responses]
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_exits_cleanly_and_loses_nothing(base, tmp_path, monkeypatch, ranks, capsys):
    mine, out = tmp_path / "mine.py", tmp_path / "run"
    mine.write_text(TERMINATING)
    more = ["--reward", f"{mine}:score", "--save-every", "100", "--eval-every", "0"]
    monkeypatch.setenv("TERMINATE", str(ranks - 1))                    # the last rank alone
    if ranks == 1:
        with pytest.raises(SystemExit, match="0"):
            run(base, out, *more)
        said = capsys.readouterr().out
    else:
        finished = on_two_ranks(base, out, *more)
        assert finished.returncode == 0 and "Traceback" not in finished.stderr, finished.stderr
        said = finished.stdout
    assert f"stopped after step 3, which is saved in {out}/checkpoints/3; the same command with" in said
    assert len(rows_of(out)) == 3 and not (out / "model").exists() and checkpoints(out) == ["3"]
    if ranks == 1:                                                     # kill.py compares two ranks' runs
        monkeypatch.delenv("TERMINATE")
        run(base, out, *more, "--resume")
        run(base, tmp_path / "whole", *more)
        assert same(out, tmp_path / "whole")


# --- checkpoints

def test_a_checkpoint_that_is_not_renamed_yet_is_passed_over(base, unbroken, tmp_path, capsys):
    out = shutil.copytree(unbroken, tmp_path / "run")
    (out / "checkpoints/10").rename(out / "checkpoints/writing")
    run(base, out, "--resume")
    assert "continuing after step 8" in capsys.readouterr().out
    assert same(out, unbroken) and checkpoints(out) == ["8", "10"]


@pytest.mark.parametrize("harm", [
    lambda file: file.write_bytes(b"\xff" * file.stat().st_size), lambda file: os.truncate(file, 1000),
    lambda file: file.unlink()], ids=["other bytes", "cut", "missing"])
def test_a_checkpoint_that_cannot_be_read_is_named(base, stopped, harm, monkeypatch, capsys, caplog):
    harm(next((stopped / "checkpoints/8").glob("*.safetensors")))
    assert "checkpoints/8 cannot be read" in fails_here(base, stopped, monkeypatch, capsys, "--resume")
    assert "Falling back" not in caplog.text                           # as torch says above a traceback


def test_a_checkpoint_is_safetensors_and_json_and_nothing_is_unpickled(base, stopped, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    assert {path.suffix for path in (stopped / "checkpoints/8").iterdir()} == {".safetensors", ".json"}
    for name in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(name, refuse)
    run(base, stopped, "--resume")
    assert checkpoints(stopped) == ["8", "10"]


# --- faults

def test_a_disk_that_is_full_while_saving_leaves_the_last_checkpoint(base, stopped, unbroken, monkeypatch,
                                                                     capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)                 # writes then fail like on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, limits[1]))
    try:
        message = fails_here(base, stopped, monkeypatch, capsys, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"checkpoints/10 cannot be written \(.*File too large.*\); earlier checkpoints are "
                     "untouched", message)
    assert checkpoints(stopped) == ["8"]
    run(base, stopped, "--resume")
    assert same(stopped, unbroken)


def test_a_checkpoint_gets_its_name_last_and_so_never_lacks_its_progress(base, stopped, unbroken, monkeypatch,
                                                                         capsys):
    """The disk is full when all weights are written and progress.json is not."""
    from runtime import run_directory
    write = run_directory.write_json

    def full(path, value):
        if path.name == "progress.json":
            raise OSError(28, "No space left on device", str(path))
        write(path, value)

    monkeypatch.setattr(run_directory, "write_json", full)
    assert "No space left on device" in fails_here(base, stopped, monkeypatch, capsys, "--resume")
    assert run_directory.newest_checkpoint(stopped).name == "8"
    monkeypatch.setattr(run_directory, "write_json", write)
    run(base, stopped, "--resume")
    assert same(stopped, unbroken) and not (stopped / "checkpoints/writing").exists()


def test_a_disk_that_is_full_while_logging_ends_the_run_with_one_line(base, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr("runtime.training.write_line", full)
    assert "metrics.jsonl: No space left on device" in fails_here(base, tmp_path, monkeypatch, capsys)


REWARD = """import os
calls = []
def score(prompts, responses):
    calls.append(1)
    if os.path.exists({sick!r}) and len(calls) >= 6 and os.environ.get("RANK") in (None, {rank!r}):
        {harm}
    return [float(len(response)) for response in responses]
"""


def failing_reward(tmp_path, harm, rank="1"):
    """(the flags of a reward that does harm in the fifth step as long as a file is there, of two ranks on
    this one; the file)."""
    sick, mine = tmp_path / "sick", tmp_path / "mine.py"
    mine.write_text(REWARD.format(sick=str(sick), harm=harm, rank=rank))
    sick.touch()
    return ["--reward", f"{mine}:score", "--eval-every", "0", "--save-every", "100"], sick


@pytest.mark.parametrize("harm, said", [
    ("raise ValueError('not yet mended')", "failed, as shown above"),
    ("return [float('nan')] * len(responses)", "give a finite score for each")], ids=["raises", "nan"])
def test_a_reward_that_fails_stops_the_run_at_a_saved_step(base, tmp_path, monkeypatch, capsys, harm, said):
    more, sick = failing_reward(tmp_path, harm)
    monkeypatch.setattr("sys.argv", ["sail.py"])
    with pytest.raises(SystemExit):
        data.command_line(lambda: sail_main(arguments(base, tmp_path / "run", *more)))
    *above, message = capsys.readouterr().err.strip().split("\n")
    assert message.startswith("sail.py: error: reward ") and "mine.py:score: " in message and said in message
    assert message.endswith("(step 4 is saved; --resume continues with the same inputs)")
    assert ("ValueError: not yet mended" in above) == ("raise" in harm)
    sick.unlink()
    run(base, tmp_path / "run", *more, "--resume")
    run(base, tmp_path / "whole", *more)
    assert same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("rank, harm, said, step", [
    ("1", "raise KeyError('mended')", "KeyError: 'mended'", "4"),
    ("0", "os.remove('LOG'); os.mkdir('LOG')", "metrics.jsonl: Is a directory", "5")],
    ids=["reward", "log"])
def test_what_fails_on_one_rank_stops_all_with_one_line_at_a_saved_step(base, tmp_path, rank, harm, said,
                                                                        step):
    """The log cannot be written after the fifth step, the reward fails before its end."""
    more, _ = failing_reward(tmp_path, harm.replace("LOG", f"{tmp_path}/run/metrics.jsonl"), rank)
    finished = on_two_ranks(base, tmp_path / "run", *more)
    assert finished.returncode != 0 and finished.stderr.count("sail.py: error:") == 1
    assert said in finished.stderr and f"(step {step} is saved" in finished.stderr
    assert 'sail.py", line' not in finished.stderr                     # no rank leaves a traceback
    assert checkpoints(tmp_path / "run") == [step]


def test_the_ranks_meet_after_all_that_may_fail_on_one_of_them(base, tmp_path, monkeypatch):
    met = {}
    monkeypatch.setattr(processes, "raise_together", lambda _, where: met.setdefault(where))
    monkeypatch.chdir(tmp_path)
    run(base, "pr", "--variant", "pr", "--save-every", "4", "--eval-every", "4")
    loaded = {"make_toy", "load_data", "load_parts"}
    before = {"refuse_before_loading", "place", "lock_directory", "begin"}
    after = {"print_how_long", "log_step", "evaluate_step", "make_empty", "finish_checkpoint", "save_model"}
    assert {*met} == loaded | before | {"roll_out", "label_by_reward", "answer", "logps_of"} | after
    met.clear()
    reward.main(["--train", "--model", base, "--data", f"{base}/toy-pairs.jsonl", "--steps", "1",
                 "--save-every", "1", "--out", "rm"])
    assert {*met} == {"load_trainee", "load_reward_data"} | before | after
    met.clear()
    (tmp_path / "mine.py").write_text("def first(prompts, *responses):\n    return [1.0] * len(prompts)\n")
    run(base, "mine", "--variant", "pr", "--preference", "mine.py:first")
    assert "label_by_preference" in met


def test_ten_losses_that_are_not_finite_stop_the_run_at_a_saved_step(base, tmp_path, monkeypatch, capsys):
    original = sail.accumulate_gradients                           # the gradient is finite, the loss is not
    monkeypatch.setattr(sail, "accumulate_gradients",
                        lambda *inputs: Counter({**original(*inputs), "loss": math.inf}))
    message = fails_here(base, tmp_path, monkeypatch, capsys, "--steps", "20")
    assert "steps 1 to 10 had no finite loss or gradient; begin a new run with a lower rate" in message
    assert "(step 10 is saved; --resume continues with the same inputs)" in message
    assert rows_of(tmp_path)[-1]["skipped"] == 10
    assert json.loads((tmp_path / "checkpoints/10/progress.json").read_text())["in_a_row"] == 10


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_data_that_changed_under_a_resume_are_named(flag, base, tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"review the soup {i // 2}", "chosen": f"good {'very ' * (i % 3)}.",
             "rejected": f"bad soup {'very ' * i}"} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--data", f"{base}/toy-pairs.jsonl", "--reward", TOY_REWARD, "--max-prompt-length", "8",
            flag, str(file)]
    run(base, tmp_path / "run", *more)
    assert len(json.loads((tmp_path / "run/args.json").read_text())["data_sha256"]) == 64
    other_label, other_column = {**rows[1], "preference": 0.75}, {**rows[1], "source": "somewhere"}
    changes = [[], [other_label]]                                      # a row is gone, or has another label
    if flag == "--data":
        changes.append([other_column])
    for changed in changes:
        edited = rows[:1] + changed + rows[2:]
        file.write_text("".join(json.dumps(row) + "\n" for row in edited))
        message = fails_here(base, tmp_path / "run", monkeypatch, capsys, *more, "--resume")
        assert "--resume: the data have changed since" in message


def test_an_argument_that_changed_under_a_resume_is_named(base, stopped, monkeypatch, capsys):
    message = fails_here(base, stopped, monkeypatch, capsys, "--resume", "--beta", "0.2")
    assert "--resume: --beta has changed since" in message and "from 0.5 to 0.2" in message


def test_two_runs_do_not_share_a_directory(base, stopped, monkeypatch, capsys):
    with open(stopped / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is in use by another run" in fails_here(base, stopped, monkeypatch, capsys, "--resume")
    assert checkpoints(stopped) == ["8"]
    run(base, stopped, "--resume")                                     # the lock ends with its holder
