"""Stopped by hand, by NaN or by files cut short, replaced, extended: a run says so in a line and loses
nothing."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import as_settings, sail_args, sail_main
from test_errors import fails

import evaluate
import sail
from generate import load_policy
from runtime.processes import process_group
from runtime.run_directory import fingerprint, write_text

ROOT = Path(sail.__file__).parent
SHORT = ["--variant", "pr", "--mix", "0.5", "--batch-size", "4", "--limit", "40", "--eval-limit", "4",
         "--eval-every", "0", "--max-response-length", "6"]


FLAGS = as_settings(SHORT)[0]                      # for a process of its own, which has no other settings


def arguments(base):
    return ["--model", base, "--reference", f"{base}/reference", *SHORT, "--steps", "4", "--save-every", "2"]


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The directory of a run of four steps, with checkpoints after steps 2 and 4."""
    out = tmp_path_factory.mktemp("finished") / "run"
    sail_main([*arguments(base), "--out", str(out)])
    return out


@pytest.fixture
def run(base, finished, tmp_path):
    """A copy of that run, and the arguments that made it."""
    out = shutil.copytree(finished, tmp_path / "run")
    return out, [*arguments(base), "--out", str(out)]


def refused(argv, monkeypatch, capsys):
    """sail.py's one line of complaint."""
    capsys.readouterr()
    return fails(sail.main, ["sail.py", *argv], monkeypatch, capsys)


def rows_of(out):
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("seconds")}
            for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


# --- what stands in --out

def test_a_finished_run_is_refused_with_what_to_type_and_stays(run, monkeypatch, capsys):
    out, argv = run
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    message = refused(argv, monkeypatch, capsys)
    assert f"{out} holds an earlier run; --overwrite replaces it, --resume continues it" in message
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shutil.rmtree(out / "checkpoints")
    message = refused(argv, monkeypatch, capsys)
    assert "holds a finished run without a checkpoint, which --resume cannot continue" in message
    assert f"--model {out}/model --out ANOTHER trains on from its end, --overwrite replaces it" in message
    assert refused([*argv, "--steps", "8", "--resume"], monkeypatch, capsys) == message


def test_overwrite_removes_the_old_run_as_a_whole_before_the_first_step(run, monkeypatch, capsys):
    """Killed early, it leaves no model that --compare could take for the new run's."""
    out, argv = run
    (out / "adapter").mkdir()
    monkeypatch.setattr(sail, "training_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sail_main([*argv, "--overwrite"])
    assert sorted(path.name for path in out.iterdir()) == ["args.json", "eval.jsonl", "lock", "metrics.jsonl",
                                                           "samples.jsonl"]
    assert rows_of(out) == []
    compare = ["evaluate.py", "--compare", str(out)]
    assert "no finished run" in fails(evaluate.main, compare, monkeypatch, capsys)


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_what_is_no_part_of_a_run_stays_in_its_directory(base, tmp_path, more):
    for name in ("notes.txt", "other/model/weights"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    sail_main(["--model", base, *SHORT, "--steps", "1", "--out", str(tmp_path), *more])
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "other/model/weights").read_text() == "mine"


def test_the_toys_sft_model_lies_where_run_sh_makes_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sail.py"])
    sft, pr = (sail_args(["--variant", variant]) for variant in ("sft", "pr"))
    assert f"{sft.out}/model" == pr.model == "runs/toy/sft/model"
    script = (ROOT / "run.sh").read_text()
    assert 'source=toy' in script and '"$runs/sft/model"' in script


def test_an_interrupted_sft_of_the_toy_is_continued_by_the_run_that_needs_it(tmp_path, monkeypatch):
    """It left a checkpoint and no model."""
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(sail, "train", lambda args: started.append((args.variant, args.resume)))
    monkeypatch.setattr(sail, "draw_toy_pairs", lambda *_: None)
    sail_main(["--variant", "pr"])
    assert started == [("sft", True), ("pr", False)]


# --- signals

def interrupted(base, out):
    """sail.py in a process of its own, whose reward sends it SIGINT in its second call after the trial."""
    mine = out.parent / "mine.py"
    mine.write_text("import os, signal\ncalls = []\ndef score(prompts, responses):\n    calls.append(1)\n"
                    "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGINT)\n"
                    "    return [float(len(r)) for r in responses]\n")
    return [sys.executable, ROOT / "sail.py", "--model", base, *FLAGS, "--steps", "50", "--reward",
            f"{mine}:score", "--out", str(out)]


def test_ctrl_c_finishes_the_step_saves_says_how_to_go_on_and_exits_with_130(base, tmp_path):
    done = subprocess.run(interrupted(base, tmp_path / "run"), text=True, capture_output=True, timeout=100)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    checkpoint = f"{tmp_path}/run/checkpoints/2"
    assert done.stdout.endswith(f"stopped after step 2, which is saved in {checkpoint}; the same command "
                                "with --resume continues, and the checkpoint works wherever a model does\n")
    assert load_policy(checkpoint)
    assert len(rows_of(tmp_path / "run")) == 2 and not (tmp_path / "run/model").exists()
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["2"]


@pytest.mark.parametrize("patience, saved", [("2", False), ("100", True)])
def test_a_step_longer_than_torchruns_patience_is_lost(patience, saved, base, tmp_path):
    """As run.sh and README say: torchrun waits --shutdown-timeout seconds at SIGTERM, then kills."""
    mine, began = tmp_path / "mine.py", tmp_path / "began"
    mine.write_text(f"""import pathlib, time
calls = []
def score(prompts, responses):
    calls.append(1)
    if len(calls) > 1:                                     # the first one is a trial, before the run begins
        pathlib.Path({str(began)!r}).touch()
        time.sleep(8)
    return [float(len(r)) for r in responses]
""")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1",
              "--shutdown-timeout", patience, ROOT / "sail.py", "--model", base, *FLAGS, "--steps", "50",
              "--eval-limit", "1", "--reward", f"{mine}:score", "--out", tmp_path / "run"]
    with subprocess.Popen(launch, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not began.exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(100)
    assert (tmp_path / "run/checkpoints/1").is_dir() == saved


# --- what is not finite

def poison(monkeypatch, at_step):
    """The policy's output layer becomes NaN before the rollout of this step."""
    original, calls = sail.roll_out, []

    def roll_out(policy, *inputs):
        calls.append(1)
        if len(calls) == at_step:
            with torch.no_grad():
                policy.get_output_embeddings().weight.fill_(math.nan)
        return original(policy, *inputs)

    monkeypatch.setattr(sail, "roll_out", roll_out)


def test_logits_that_are_nan_while_sampling_are_named_and_what_was_reached_is_saved(run, monkeypatch, capsys):
    out, argv = run
    poison(monkeypatch, 3)
    message = refused([*argv, "--overwrite", "--save-every", "100"], monkeypatch, capsys)
    assert "the model's logits are not finite; train it at a lower --learning-rate" in message
    assert message.endswith("(step 2 is saved; --resume continues with the same inputs)")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["2"] and len(rows_of(out)) == 2


def test_logits_that_are_nan_in_the_first_rollout_leave_no_checkpoint(run, monkeypatch, capsys):
    out, argv = run
    poison(monkeypatch, 1)
    message = refused([*argv, "--overwrite"], monkeypatch, capsys)
    assert message.endswith("logits are not finite; train it at a lower --learning-rate")
    assert not (out / "checkpoints").exists()


def test_skipped_steps_leave_the_schedule_where_it_was_also_after_a_resume(run, monkeypatch):
    """Steps 2 and 5 are skipped: of 8 steps of warm-up, the last is at 6/8 of the rate."""
    out, argv = run
    argv += ["--steps", "8", "--warmup-steps", "8", "--learning-rate", "8e-4", "--schedule", "constant"]
    original, steps = sail.preference_losses, []

    def losses_of(*inputs, **options):
        steps.append(1)
        losses, metrics = original(*inputs, **options)
        return losses * (math.nan if len(steps) in (2, 5) else 1), metrics

    monkeypatch.setattr(sail, "preference_losses", losses_of)
    sail_main([*argv, "--overwrite"])
    rates = [row["learning_rate"] for row in rows_of(out)]
    assert rates == pytest.approx([1e-4, 2e-4, 2e-4, 3e-4, 4e-4, 4e-4, 5e-4, 6e-4])
    whole = rows_of(out)
    shutil.rmtree(out / "checkpoints/8")
    shutil.rmtree(out / "model")
    sail_main([*argv, "--resume"])
    assert rows_of(out) == whole


# --- files

def test_two_processes_that_write_one_file_do_not_write_the_same_aside(tmp_path, monkeypatch):
    """The other one writes and renames in between."""
    original, pid = Path.write_text, os.getpid()

    def write(path, text, **options):
        original(path, text, **options)
        if text == "ours":
            monkeypatch.setattr(os, "getpid", lambda: pid + 1)
            write_text(tmp_path / "file", "theirs")
            monkeypatch.setattr(os, "getpid", lambda: pid)

    monkeypatch.setattr(Path, "write_text", write)
    write_text(tmp_path / "file", "ours")
    assert (tmp_path / "file").read_text() == "ours" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ['{"step": 4, "log', '{"step": ' + "[" * 100_000 + "]" * 100_000 + "}"])
@pytest.mark.parametrize("name", ["args.json", "checkpoints/4/progress.json"])
def test_a_settings_file_cut_short_or_with_too_many_brackets_is_named_by_resume(run, name, text, monkeypatch,
                                                                               capsys):
    out, argv = run
    (out / name).write_text(text)
    assert f"{out / name}: is damaged" in refused([*argv, "--resume"], monkeypatch, capsys)


def test_a_log_cut_short_is_named_by_resume(run, monkeypatch, capsys):
    out, argv = run
    os.truncate(out / "metrics.jsonl", (out / "metrics.jsonl").stat().st_size - 10)
    assert f"{out}/metrics.jsonl has lost lines" in refused([*argv, "--resume"], monkeypatch, capsys)


def test_the_fingerprint_sees_prompts_chosen_and_rejected_ids():
    pairs = [[1], [2], [3]], [[9], [2], [3]], [[1], [9], [3]], [[1], [2], [9]]
    prints = {fingerprint([ids]) for ids in pairs}
    assert len(prints) == 4


# --- longer, shorter

def test_another_length_is_refused(run, monkeypatch, capsys):
    out, argv = run
    message = refused([*argv, "--steps", "6", "--resume"], monkeypatch, capsys)
    assert f"--resume: --steps has changed since {out}/checkpoints/4 was written" in message


# --- first minutes

def test_without_torch_each_script_says_in_one_line_what_to_type(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")
    for name in ("sail", "data", "generate"):
        done = subprocess.run([sys.executable, ROOT / f"{name}.py", "--help"], text=True, capture_output=True,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60)
        assert done.returncode == 2 and done.stderr == (
            f"{name}.py: error: No module named 'torch'; pip install -r requirements.txt, or run ./run.sh\n")


def test_the_first_lines_say_what_is_trained_on_what_and_the_last_where_the_model_is(base, tmp_path, capsys):
    sail_main(["--model", base, *SHORT, "--steps", "1", "--out", str(tmp_path / "run")])
    lines = capsys.readouterr().out.splitlines()
    size = sum(parameter.numel() for parameter in load_policy(base)[0].parameters())
    assert lines[0] == f"{base} on cpu in float32: {size:,} of {size:,} parameters are trained"
    assert lines.pop(1) == "chat template: none"
    assert lines[1] == f"{base}/toy-pairs.jsonl: 39 pairs to train on"
    assert lines.pop(2).startswith("  dropped: 1 (1 ")
    if lines[2].startswith("      cut: "):
        lines.pop(2)
    assert lines[2] == "   prompt: median 5 tokens, 90th percentile 6, longest 6; 0 of 40 longer than 8"
    assert lines[3].startswith("   chosen: median ")
    assert lines[4].startswith(" rejected: median ")
    assert lines[5] == "runs/toy/world/held-out.jsonl: 4 pairs to evaluate on"
    assert lines.pop(6) == "  dropped: 1020 (1020 beyond --eval-limit)"
    assert re.fullmatch(r"      cut: \d responses longer than --max-response-length", lines.pop(6))
    assert lines[6] == (f"pr: 2 pairs from the data, 2 generated for the data's prompts; "
                        f"1 steps of up to 4 pairs -> "
                        f"{tmp_path}/run")
    assert lines[7].startswith("step 1/1 | loss ")
    assert re.fullmatch(r"the first step took [\d.]+ s: about 0 s of steps to go", lines[8])
    assert lines[9] == "evaluating: 4 responses of up to 6 tokens to the prompts of 4 held-out pairs …"
    assert lines[-1].startswith(f"saved {tmp_path}/run/model; `python evaluate.py {tmp_path}/run --reward ")



def test_a_process_that_does_not_come_is_named_by_one_that_waited():
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                           "2", ROOT / "tests/hang.py"], text=True, capture_output=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("hang.py: error:")]
    assert len(lines) == 1
    assert "for another process at the end of load_data" in lines[0] and "Ranks 1 failed" in lines[0]


@pytest.mark.parametrize("error", [dist.DistBackendError("closed"), RuntimeError("[gloo] closed by peer")])
def test_a_process_that_is_lost_is_one_line_and_other_faults_show_themselves(error):
    with pytest.raises(OSError, match="rank 0 has lost another process .*closed.*--resume goes on"):
        with process_group():
            raise error
    with pytest.raises(RuntimeError, match="^ours$"):
        with process_group():
            raise RuntimeError("ours")
