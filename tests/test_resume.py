"""Stopped, killed, starved: a run says what happened, loses nothing that was saved, and continues as if
unbroken."""
import fcntl
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_errors import fails
from test_scale import largest_difference, rows_of, weights

import sail
from sail import parse_args, train

ROOT = Path(sail.__file__).parent
COMMON = ["--variant", "pr", "--mix", "0.5", "--steps", "6", "--save-every", "2", "--batch-size", "6",
          "--limit", "60", "--eval-limit", "4", "--eval-every", "3", "--max-response-length", "10"]


def arguments(base, out, *more):
    return ["--model", base, *COMMON, "--out", str(out), *more]


def run(base, out, *more):
    train(parse_args(arguments(base, out, *more)))


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory):
    """The directory of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run(base, out)
    return out


@pytest.fixture
def stopped(unbroken, tmp_path):
    """The same as it was left after step 5, one step past its last checkpoint."""
    out = shutil.copytree(unbroken, tmp_path / "stopped")
    shutil.rmtree(out / "checkpoints/6")
    shutil.rmtree(out / "model")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:5]))
    return out


def same(out, unbroken):
    """Whether two runs left the same weights and logs, bit for bit."""
    names = ("model/model.safetensors", "eval.jsonl", "samples.jsonl", "skipped.jsonl")
    return (all((out / name).read_bytes() == (unbroken / name).read_bytes() for name in names)
            and rows_of(out) == rows_of(unbroken))


def launched(base, out, *more, ranks=1, **options):
    """The command line in a process of its own, or on several ranks."""
    start = (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
             if ranks > 1 else [])
    return subprocess.run([sys.executable, *start, ROOT / "sail.py", *arguments(base, out, *more)], text=True,
                          capture_output=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          **options)


# --- resume

@pytest.mark.parametrize("more", [
    [], ["--optimizer", "rmsprop", "--schedule", "cosine", "--warmup-steps", "3"], ["--lora", "4"],
    ["--shard"]], ids=["adamw", "rmsprop", "lora", "shard"])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(base, tmp_path, more):
    if "--lora" in more:
        pytest.importorskip("peft")
    run(base, tmp_path / "whole", *more)
    out = shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(out / "checkpoints/6")
    shutil.rmtree(out / "model")
    run(base, out, *more, "--resume")
    assert rows_of(out) == rows_of(tmp_path / "whole")
    assert largest_difference(weights(out / "model"), weights(tmp_path / "whole/model")) == 0
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["4", "6"]


def test_resume_without_a_checkpoint_starts_and_with_the_last_only_saves(base, unbroken, tmp_path):
    run(base, tmp_path, "--resume")
    assert same(tmp_path, unbroken)
    shutil.rmtree(tmp_path / "model")
    run(base, tmp_path, "--resume")
    assert same(tmp_path, unbroken)


def test_a_run_is_continued_on_another_number_of_ranks_and_sharded(base, stopped, unbroken):
    finished = launched(base, stopped, "--resume", "--shard", ranks=2)
    assert finished.returncode == 0, finished.stderr
    ours, theirs = rows_of(stopped), rows_of(unbroken)
    assert [row["step"] for row in ours] == [1, 2, 3, 4, 5, 6] and ours[:4] == theirs[:4]
    assert ours[4]["learning_rate"] == theirs[4]["learning_rate"] and ours[4]["skipped"] == 0
    # The ranks' samples are others than one process's, but the offline half of the batch is the same.
    assert ours[4]["chosen_logps"] == pytest.approx(theirs[4]["chosen_logps"], rel=0.5)


def test_killed_runs_resume_to_the_same_bits(tmp_path):
    """Twenty: python tests/kill.py."""
    finished = subprocess.run([sys.executable, ROOT / "tests/kill.py", "--kills", "2", "--seed", "2",
                               "--out", tmp_path], text=True, capture_output=True, timeout=280)
    assert finished.returncode == 0 and "2 of 2 equal" in finished.stdout, finished.stdout + finished.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_exits_cleanly_and_loses_nothing(base, tmp_path, monkeypatch, ranks):
    mine = tmp_path / "mine.py"
    mine.write_text("import os, signal\ncalls = []\ndef score(prompts, responses):\n"
                    "    calls.append(1)\n"
                    "    if len(calls) == 3 and os.environ.get('TERMINATE') == os.environ.get('RANK', '0'):\n"
                    "        os.kill(os.getpid(), signal.SIGTERM)\n"
                    "    return [float(len(r)) for r in responses]\n")
    more = ["--reward", f"{mine}:score", "--save-every", "100", "--eval-every", "0"]
    monkeypatch.setenv("TERMINATE", str(ranks - 1))                    # the last rank alone
    finished = launched(base, tmp_path / "run", *more, ranks=ranks)
    assert finished.returncode == 0 and "Traceback" not in finished.stderr, finished.stderr
    assert "stopped by SIGTERM after step 3, which is saved; --resume continues" in finished.stdout
    assert len(rows_of(tmp_path / "run")) == 3 and not (tmp_path / "run/model").exists()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["3"]
    if ranks == 1:                                                     # kill.py compares two ranks' runs
        monkeypatch.delenv("TERMINATE")
        assert launched(base, tmp_path / "run", *more, "--resume").returncode == 0
        assert launched(base, tmp_path / "whole", *more).returncode == 0
        assert same(tmp_path / "run", tmp_path / "whole")


# --- checkpoints that are not whole

@pytest.mark.parametrize("harm, said", [
    (lambda path: os.truncate(next(path.glob("*.safetensors")), 1000), "has 1000 bytes and should have"),
    (lambda path: next(path.glob("*.safetensors")).unlink(), "No such file"),
    (lambda path: os.truncate(path / "progress.json", 20), "is not whole"),
    (lambda path: path.rename(path.with_name("6.writing")), "continuing after step 4")],
    ids=["cut", "missing", "cut progress", "not renamed"])
def test_a_checkpoint_cut_short_is_passed_over_for_the_one_before(base, unbroken, tmp_path, capsys, harm,
                                                                  said):
    out = shutil.copytree(unbroken, tmp_path / "run")
    harm(out / "checkpoints/6")
    run(base, out, "--resume")
    spoken = capsys.readouterr().out
    assert said in spoken and "continuing after step 4" in spoken and same(out, unbroken)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["4", "6"]
    assert sail.newest_checkpoint(out, print).name == "6"              # whole again


def test_without_a_whole_checkpoint_one_line_says_so(base, unbroken, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(unbroken, tmp_path / "run")
    for path in (out / "checkpoints").glob("*"):
        (path / "progress.json").unlink()
    message = fails_here(base, out, monkeypatch, capsys, "--resume")
    assert "none of 2 is whole" in message and rows_of(out) == rows_of(unbroken)


def test_a_checkpoint_of_the_right_size_with_other_bytes_is_named(base, unbroken, tmp_path, monkeypatch,
                                                                  capsys):
    out = shutil.copytree(unbroken, tmp_path / "run")
    file = next((out / "checkpoints/6").glob("*.safetensors"))
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert "checkpoints/6 cannot be read" in fails_here(base, out, monkeypatch, capsys, "--resume")


def test_half_a_line_in_a_log_is_cut_off(base, stopped, unbroken):
    for name in ("metrics", "eval", "samples"):
        with open(stopped / f"{name}.jsonl", "a") as file:
            file.write('{"step": 6, "lo')
    run(base, stopped, "--resume")
    assert same(stopped, unbroken)


def test_a_checkpoint_is_safetensors_and_json_and_nothing_is_unpickled(base, stopped, unbroken, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    names = {path.suffix for path in (stopped / "checkpoints/4").iterdir()}
    assert names == {".safetensors", ".json"}
    for name in ("torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"):
        monkeypatch.setattr(name, refuse)
    run(base, stopped, "--resume")
    assert same(stopped, unbroken)


# --- faults

def fails_here(base, out, monkeypatch, capsys, *more):
    """The one line of complaint of a run in this process."""
    capsys.readouterr()
    return fails(lambda: train(parse_args()), ["sail.py", *arguments(base, out, *more)], monkeypatch, capsys)


def test_a_disk_that_is_full_while_saving_leaves_the_last_checkpoint(base, stopped, unbroken):
    def limit():
        import resource
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)                  # writes then fail like on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    finished = launched(base, stopped, "--resume", preexec_fn=limit)
    assert finished.returncode == 2 and "Traceback" not in finished.stderr, finished.stderr
    assert re.fullmatch(r"sail.py: error: .*checkpoints/6 cannot be written \(.*File too large.*\); "
                        r"earlier checkpoints are untouched\n", finished.stderr), finished.stderr
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["4"]
    run(base, stopped, "--resume")
    assert same(stopped, unbroken)


def test_a_disk_that_is_full_while_logging_ends_the_run_with_one_line(base, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(sail, "log", full)
    assert "metrics.jsonl: No space left on device" in fails_here(base, tmp_path, monkeypatch, capsys)


REWARD = """import os, time
calls = []
def score(prompts, responses):
    calls.append(1)
    if os.path.exists({sick!r}) and len(calls) >= 5 and {where}:
        {harm}
    return [float(len(response)) for response in responses]
"""


@pytest.mark.parametrize("harm, more, said", [
    ("raise ValueError('not yet\\nmended')", [],
     r"raised ValueError \(not yet\) at .*mine.py:6, for the response '"),
    ("return [float('nan')] * len(responses)", [], "returned nan for the response"),
    ("return 1", [], "returned int, want a list"),
    ("time.sleep(100)", ["--reward-timeout", "0.5"], "has not answered within 0.5 s, for one of"),
    ("\n        try: time.sleep(100)\n        except Exception: pass", ["--reward-timeout", "0.5"],
     "has not answered")],
    ids=["raises", "nan", "no list", "hangs", "hangs and catches"])
def test_a_reward_that_fails_stops_the_run_at_a_saved_step(base, tmp_path, monkeypatch, capsys, harm, more,
                                                           said):
    sick, mine = tmp_path / "sick", tmp_path / "mine.py"
    mine.write_text(REWARD.format(sick=str(sick), harm=harm, where=True))
    more = [*more, "--reward", f"{mine}:score", "--eval-every", "0", "--save-every", "4"]
    run(base, tmp_path / "well", *more)
    sick.touch()
    message = fails_here(base, tmp_path / "ill", monkeypatch, capsys, *more)
    assert re.search(f"mine.py:score: {said}", message) and "(step 4 is saved; --resume continues)" in message
    sick.unlink()
    run(base, tmp_path / "ill", *more, "--resume")
    assert same(tmp_path / "ill", tmp_path / "well")


def test_a_reward_that_fails_on_one_rank_stops_all_with_one_line(base, tmp_path):
    sick, mine = tmp_path / "sick", tmp_path / "mine.py"
    mine.write_text(REWARD.format(sick=str(sick), harm="raise KeyError('mended')",
                                  where="os.environ['RANK'] == '1'"))
    sick.touch()
    finished = launched(base, tmp_path / "run", "--reward", f"{mine}:score", "--eval-every", "0", ranks=2)
    assert finished.returncode != 0 and finished.stderr.count("sail.py: error:") == 1
    assert "raised KeyError" in finished.stderr and "(step 4 is saved" in finished.stderr
    assert 'sail.py", line' not in finished.stderr                     # no rank leaves a traceback
    assert "4" in {path.name for path in (tmp_path / "run/checkpoints").iterdir()}


@pytest.mark.parametrize("where", ["preference_losses", "clip"])
def test_ten_non_finite_steps_stop_the_run_and_name_their_prompts(base, tmp_path, monkeypatch, capsys, where):
    if where == "clip":                                            # a finite gradient of a loss that is not
        original = sail.accumulate_gradients
        monkeypatch.setattr(sail, "accumulate_gradients",
                            lambda *inputs: sail.Counter({**original(*inputs), "loss": math.inf}))
    else:
        original = sail.preference_losses
        monkeypatch.setattr(sail, where, lambda *inputs, **options: (
            lambda losses, metrics: (losses * math.nan, metrics))(*original(*inputs, **options)))
    message = fails_here(base, tmp_path, monkeypatch, capsys, "--steps", "20")
    assert "steps 1 to 10: loss or gradient not finite ten times in a row" in message
    assert "(step 10 is saved; --resume continues)" in message
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, 11)] and all(len(row["prompts"]) == 6 for row in rows)
    assert rows_of(tmp_path)[-1]["skipped"] == 10
    torch.testing.assert_close(sail.load_file(next((tmp_path / "checkpoints/10").glob("*.safetensors")))[
        "model.model.embed_tokens.weight"], weights(base)["model.embed_tokens.weight"], rtol=0, atol=0)


def test_data_that_changed_under_a_resume_are_named(base, tmp_path, monkeypatch, capsys):
    data = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"review the soup {i}", "chosen": "good .", "rejected": f"bad soup {'very ' * i}"}
            for i in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--data", str(data), "--reward", f"{ROOT}/reward.py:toy_reward", "--max-prompt-length", "8"]
    run(base, tmp_path / "run", *more)
    assert len(json.loads((tmp_path / "run/args.json").read_text())["data_sha256"]) == 64
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:40] + rows[41:]))
    message = fails_here(base, tmp_path / "run", monkeypatch, capsys, *more, "--resume")
    assert "--resume: the data have changed since" in message


def test_an_argument_that_changed_under_a_resume_is_named(base, stopped, monkeypatch, capsys):
    message = fails_here(base, stopped, monkeypatch, capsys, "--resume", "--beta", "0.2")
    assert "--resume: --beta has changed since" in message and "from 0.1 to 0.2" in message


def test_checkpoints_are_not_overwritten_by_a_new_run(base, unbroken, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(unbroken, tmp_path / "run")
    assert "--resume continues it" in fails_here(base, out, monkeypatch, capsys)
    assert same(out, unbroken) and (out / "checkpoints/6/progress.json").is_file()


def test_two_runs_do_not_share_a_directory(base, unbroken, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(unbroken, tmp_path / "run")
    with open(out / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is in use by another run" in fails_here(base, out, monkeypatch, capsys, "--resume")
    assert same(out, unbroken)
    run(base, out, "--resume")                                         # the lock ends with its holder


@pytest.mark.parametrize("argv, message", [
    (["--variant", "sft", "--lora", "4"], "--lora: the toy's SFT model starts from nothing"),
    (["--precompute-reference", "--revkl-coef", "1"], "--precompute-reference: sft has no reference"),
    (["--shard-rollouts"], "--shard-rollouts: only with --shard"),
    (["--lora", "0"], "--lora: 0 is not in 1")])
def test_flags_that_do_not_go_together_are_named(argv, message, monkeypatch, capsys):
    assert message in fails(lambda: train(parse_args()), ["sail.py", *argv], monkeypatch, capsys)


def test_merge_without_an_adapter_is_refused(base, tmp_path, monkeypatch, capsys):
    assert "there is nothing to merge" in fails_here(base, tmp_path, monkeypatch, capsys, "--merge")
