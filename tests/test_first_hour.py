"""What a new user meets in the first hour: what is said, how long it takes, what is kept."""
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TOY_REWARD, as_settings, byte_tokenizer, sail_main
from test_errors import fails
from test_scale import rows_of

import evaluate
import generate
import reward
import sail
from runtime.command_line import command_line
from runtime.compare import print_samples
from runtime.processes import StopSignals
from runtime.training import print_how_long

ROOT = Path(sail.__file__).parent
SHORT = ["--steps", "2", "--batch-size", "4", "--limit", "40", "--eval-limit", "3",
         "--max-response-length", "8"]


@pytest.fixture(scope="module")
def two_runs(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for variant in ("sft", "pr"):
        sail_main(["--variant", variant, "--model", base, *SHORT, "--out", str(out / variant)])
    return out


def test_resume_with_nothing_to_resume_says_so_and_keeps_the_old_logs(two_runs, base, tmp_path, capsys):
    out = shutil.copytree(two_runs / "pr", tmp_path / "run")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    shutil.rmtree(out / "model")
    before = {name: (out / f"{name}.jsonl").read_bytes() for name in ("metrics", "eval", "samples")}
    sail_main(["--variant", "pr", "--model", base, *SHORT, "--out", str(out), "--resume"])
    said = capsys.readouterr().out
    assert "has no checkpoint, so the run starts from the beginning" in said
    assert "metrics.jsonl of an earlier run is kept as metrics.jsonl.old" in said
    assert {name: (out / f"{name}.jsonl.old").read_bytes() for name in before} == before
    assert len(rows_of(out)) == 2


SCORES = """
def fails(prompts, responses):
    raise RuntimeError("no such key")

def short(prompts, responses):
    return [0.0]

def unsure(prompts, firsts, seconds):
    return [2.0] * len(prompts)

def good(prompts, *responses):
    return [0.5] * len(prompts) * len(responses[:1])
"""


@pytest.mark.parametrize("script, more, message", [
    ("sail", ["--out", "RUN"], "holds a finished run"),
    ("reward", ["--out", "RUN"], "holds a finished run"),
    ("sail", ["--out", "HERE"], "model exists and belongs to no run"),
    ("sail", ["--variant", "pr", *SHORT, "--out", "RESUMED", "--resume", "--batch-size", "3"],
     "--batch-size has changed since"),
    ("sail", ["--reward", "FILE:fails"], "failed, as shown above"),
    ("sail", ["--reward", "FILE:short"], "returned 1 scores for a batch of 2"),
    ("sail", ["--preference", "FILE:unsure"], r"give a finite score from 0 to 1 for each"),
    ("sail", ["--preference", "FILE:missing"], "defines no function missing"),
    ("evaluate", ["--reward", "FILE:short"], "returned 1 scores for a batch of 2"),
    ("evaluate", ["--preference", "FILE:unsure"], "from 0 to 1 for each")])
def test_what_cannot_work_is_refused_before_a_model_is_loaded(
        script, more, message, two_runs, base, tmp_path, monkeypatch, capfd):
    (tmp_path / "mine.py").write_text(SCORES)
    (tmp_path / "here/model").mkdir(parents=True)
    resumed = shutil.copytree(two_runs / "pr", tmp_path / "resumed")
    shutil.rmtree(resumed / "model")
    (resumed / "checkpoints/2").mkdir(parents=True)
    names = {"RUN": two_runs / "sft", "HERE": tmp_path / "here", "RESUMED": resumed}
    argv = [str(names.get(word, word)).replace("FILE", f"{tmp_path}/mine.py") for word in more]
    if "--out" not in argv:
        argv += ["--out", str(tmp_path / "new.json")]
    pairs = f"{base}/toy-pairs.jsonl"
    if script == "evaluate":
        argv = [base, "--eval-data", pairs, *argv]
    elif script == "reward":
        argv = ["--train", "--model", base, "--data", pairs, *argv]
    elif "--resume" in argv:
        argv = ["--model", base, *argv]
    else:
        argv = ["--variant", "relabelled-dpo", "--model", base, "--data", pairs, *argv]
        if "--preference" not in argv and "--reward" not in argv:
            argv += ["--reward", f"{tmp_path}/mine.py:good"]

    def loads(*_, **__):
        raise AssertionError("a model is loaded")

    main = {"sail": sail, "reward": reward, "evaluate": evaluate}[script]
    for name in ("load_policy", "load_models", "load_frozen", "load_trainee"):
        if hasattr(main, name):
            monkeypatch.setattr(main, name, loads)
    assert message in complaint(main.main, [f"{script}.py", *argv], monkeypatch, capfd)
    assert (two_runs / "sft/model").is_dir() and not (tmp_path / "new.json").exists()


def complaint(main, argv, monkeypatch, capfd):
    """The last line that a script writes, below the traceback of a user's function."""
    flags, chosen = as_settings(argv[1:])
    monkeypatch.setattr("sys.argv", [argv[0], *flags])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        command_line(lambda: main(**(chosen if argv[0] != "evaluate.py" else {})))
    assert stop.value.code == 2
    return capfd.readouterr().err.strip().split("\n")[-1]


def test_a_signal_is_acknowledged_at_once(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 0)):
        with StopSignals() as stop:
            assert stop.exit_status is None
            os.kill(os.getpid(), number)
            assert stop.exit_status == status
        said = capfd.readouterr().err
        assert f"{number.name}: the run saves its steps and ends; a second signal ends it now" in said
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_the_held_out_loss_of_sft_is_that_of_its_training(base, tmp_path):
    """Nats per token of the held-out chosen responses: a run that evaluates on what it trains on, in one
    step, before the first update, sees its own loss."""
    rows = [dict(prompt=f"review the soup : {i}", chosen="the soup was good .", rejected="bad")
            for i in range(4)]
    rows[0]["chosen"] += " the service was bad ."              # lengths differ, and so would other means
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sail_main(["--variant", "sft", "--model", base, "--data", str(path), "--eval-data", str(path), "--steps",
               "1", "--batch-size", "4", "--max-prompt-length", "20", "--max-response-length", "20", "--out",
               str(tmp_path / "run"), "--eval-every", "1"])
    held_out = rows_of(tmp_path / "run", "eval")[0]
    assert held_out["loss"] == pytest.approx(rows_of(tmp_path / "run")[0]["loss"], abs=1e-5)
    low, high = held_out["loss_interval"]
    assert low <= held_out["loss"] <= high
    assert held_out["prompts"] == 4


def test_figures_of_few_prompts_say_that_they_are(base, tmp_path, capsys):
    sail_main(["--variant", "dpo", "--model", base, *SHORT, "--out", str(tmp_path / "few")])
    assert "of 3 prompts only: the intervals are rough" in capsys.readouterr().out
    sail_main(["--variant", "dpo", "--model", base, *SHORT, "--eval-limit", "20", "--out",
               str(tmp_path / "run")])
    assert "the intervals are rough" not in capsys.readouterr().out


def test_the_answers_of_two_runs_are_shown_side_by_side(two_runs, monkeypatch, capsys):
    runs = [str(two_runs / "sft"), str(two_runs / "pr")]
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--compare", *runs, "--show", "2", "--out",
                                     str(two_runs / "figures.json")])
    evaluate.main()
    shown = capsys.readouterr().out
    samples = [[row for row in rows_of(two_runs / name, "samples") if row["step"] == 2]
               for name in ("sft", "pr")]
    assert shown.count("\n>>> ") == 2
    for ours, theirs in list(zip(*samples, strict=True))[:2]:
        block = shown[shown.index(f">>> {ours['prompt']}"):]
        second = block.index("/pr\n")
        assert block.index(ours["response"]) < second < block.index(theirs["response"], second)


def test_an_adapter_directory_is_named_as_one(held_out, tmp_path, monkeypatch, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    flags = ["--model", str(tmp_path), "--data", held_out]
    for main, argv in ((sail.main, ["sail.py", "--variant", "dpo", *flags]),
                       (generate.main, ["generate.py", *flags])):
        assert "is an adapter; merge it into its base first" in fails(main, argv, monkeypatch, capsys)


@pytest.mark.parametrize("seconds, device, told", [
    (70, "cuda", True), (50, "cuda", False), (50, "cpu", True), (1, "cpu", False)])
def test_a_long_run_says_which_flags_make_it_shorter(seconds, device, told, capsys):
    args = SimpleNamespace(eval_every=10, batch_size=31, max_response_length=512, max_prompt_length=512,
                           eval_limit=128, dtype="float32")
    print_how_long(seconds, 30.0, 40, args, torch.device(device))
    said = capsys.readouterr().out
    minutes = (40 * seconds + 4 * 30) / 60
    assert f"about {minutes:.0f} min to go" in said
    assert ("--max-response-length (512), --max-prompt-length" in said) == told


@pytest.mark.parametrize("features, dtype, told", [
    (["avx512_bf16"], "float32", True), (["amx_bf16"], "float32", True), (["avx512_bf16"], "bfloat16", False),
    (["avx512_f"], "float32", False)])
def test_a_processor_that_is_faster_in_bfloat16_is_told_of_it(features, dtype, told, capsys, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True))
    args = SimpleNamespace(eval_every=10, batch_size=31, eval_limit=128, dtype=dtype)
    print_how_long(70, 30.0, 40, args, torch.device("cpu"))
    assert ("--dtype bfloat16, --steps" in capsys.readouterr().out) == told


def test_columns_that_nothing_reads_are_said_before_training(base, tmp_path, capsys):
    rows = [dict(prompt=f"question {i}", chosen="the soup", rejected="the tea", persona="pirate")
            for i in range(40)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sail_main(["--variant", "dpo", "--model", base, "--data", str(path), *SHORT, "--max-prompt-length", "9",
               "--out", str(tmp_path / "run")])
    assert "changes\n   unread: persona (40 rows)\n" in capsys.readouterr().out


def test_run_sh_gives_the_sft_flags_of_its_own(tmp_path):
    """With a Python that prints what it is called with."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> "$CALLS"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "CALLS": str(tmp_path / "calls"),
                   "SFT_FLAGS": "--learning-rate 3e-5"}
    subprocess.run(["bash", ROOT / "run.sh", "--model", "M", "--learning-rate", "1e-6"], cwd=tmp_path,
                   check=True, env=environment, capture_output=True)
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if "--variant" in line]
    rates = {line.split("--variant ")[1].split()[0]: line.split("--learning-rate ")[-1].split()[0]
             for line in calls}
    assert rates == {"sft": "3e-5", "dpo": "1e-6", "dp": "1e-6", "pp": "1e-6", "pr": "1e-6"}
    assert [line for line in calls if "--revkl-coef 0.3" in line] == [calls[3]]       # that of pp
    for flag in ("--variant", "--out=mine"):
        done = subprocess.run(["bash", ROOT / "run.sh", flag, "dpo"], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(f"run.sh: error: {flag[:5]}")


def test_what_a_person_reads_of_samples_has_no_end_token(two_runs):
    assert byte_tokenizer().eos_token == "<eos>"
    for row in rows_of(two_runs / "pr", "samples"):
        assert "<eos>" not in row["response"] and row["response"] == row["response"].strip()


# --- a second round, beside the first

def test_a_run_may_be_measured_on_the_pairs_that_another_has_held_out(base, tmp_path, capsys):
    """--eval-data takes a run; --compare then sets both into one table; without it, nothing is measured, and
    that is said."""
    flags = ["--variant", "dpo", "--model", base, "--steps", "1", "--batch-size", "2", "--max-prompt-length",
             "20", "--max-response-length", "6", "--eval-limit", "4"]
    few = [dict(prompt="a", chosen="the soup", rejected="the tea"),
           dict(prompt="b", chosen="the soup", rejected="the tea")]
    many = [dict(few[0], prompt=f"question {i}") for i in range(200)]
    for name, rows in (("few", few), ("many", many)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, alone, second = (str(tmp_path / name) for name in ("first", "alone", "second"))
    sail_main([*flags, "--data", f"{tmp_path}/many.jsonl", "--out", first])
    assert "so the model is not evaluated" not in capsys.readouterr().out
    sail_main([*flags, "--data", f"{tmp_path}/few.jsonl", "--out", alone])
    assert "no pair is held out, so the model is not evaluated; --eval-data names" in capsys.readouterr().out
    sail_main([*flags, "--data", f"{tmp_path}/few.jsonl", "--eval-data", first, "--out", second])
    asked = [[row["prompt"] for row in rows_of(Path(out), "samples")] for out in (first, second)]
    assert asked[0] == asked[1] and len({*asked[0]}) == 4
    capsys.readouterr()
    evaluate.main(["--compare", first, alone, second, "--out", str(tmp_path / "figures.json")])
    said = capsys.readouterr().out
    assert said.count("Measured on: ") == 1 and "| second |" in said
    assert f"{alone} is left out: no pair was held out in it" in said


def test_generate_answers_the_held_out_prompts_of_a_run_with_another_model(two_runs, base, tmp_path,
                                                                           monkeypatch):
    files = []
    for model in (str(two_runs / "pr"), base):
        files.append(tmp_path / f"{len(files)}.jsonl")
        monkeypatch.setattr("sys.argv", ["generate.py", "--model", model, "--data", str(two_runs / "pr"),
                                         "--limit", "4", "--out", str(files[-1])])
        generate.main()
    ours, theirs = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert [row["prompt"] for row in ours] == [row["prompt"] for row in theirs]
    assert max(row["tokens"] for row in theirs) <= 8                   # the run's length


def test_models_are_set_beside_the_first_prompt_by_prompt(two_runs, base, monkeypatch, capsys):
    """A model that is no run may stand first; the run says what both are measured on. Naming a model twice
    changes nothing."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", base, str(two_runs / "pr"), base, "--reward", TOY_REWARD,
                                     "--eval-limit", "6", "--out", str(two_runs / "beside.json")])
    evaluate.main()
    said = capsys.readouterr().out
    rows = json.loads((two_runs / "beside.json").read_text())
    objectives = [row["objective"]["value"] for row in rows.values()]
    assert [*rows] == [Path(base).name, "pr"]
    heading = f"reward − β·KL less that of {Path(base).name}, paired by prompt:"
    below = said[said.index(heading):].splitlines()[1]
    assert below.startswith("  pr: ") and f"{objectives[1] - objectives[0]:.3f}" in below


@pytest.mark.parametrize("first, second, verdict", [
    ([0.0, 0.1, 0.2], [1.0, 1.1, 1.2], "1.000 ± 0.000: more"), ([1.0, 1.1], [0.0, 0.0], "less"),
    ([0.0, 1.0], [1.0, 0.0], "no difference seen")])
def test_a_difference_is_paired_and_has_a_verdict(first, second, verdict, capsys):
    samples = {name: [dict(reward=value + 0.5, kl=1.0) for value in values]
               for name, values in (("a", first), ("b", second))}
    asked = dict.fromkeys("ab", [f"question {i}" for i in range(len(first))])
    evaluate.print_differences(samples, asked, 0.5)
    assert verdict in capsys.readouterr().out
    evaluate.print_differences({"a": [dict(reward=1.0)] * 2, "b": [dict(reward=1.0)] * 2}, {}, 0.5)
    evaluate.print_differences({"a": samples["a"]}, asked, 0.5)
    assert capsys.readouterr().out == ""
    fewer = {"a": asked["a"], "b": asked["b"][1:]}
    evaluate.print_differences({**samples, "b": samples["b"][1:]}, fewer, 0.5)
    assert f"since its {len(first) - 1} prompts are not the {len(first)} of a" in capsys.readouterr().out
    others = {"a": asked["a"], "b": [*asked["b"][1:], "another question"]}
    evaluate.print_differences(samples, others, 0.5)
    assert f"since its {len(first)} prompts are not the {len(first)} of a" in capsys.readouterr().out


def test_an_answer_is_shown_below_its_own_prompt(capsys):
    """One of the models has a chat template that refuses the first prompt."""
    first = [dict(prompt=f"question {i}", response=f"first's answer {i}") for i in range(3)]
    second = [dict(prompt=f"question {i}", response=f"second's answer {i}") for i in (1, 2)]
    print_samples({"first": first, "second": second}, 3)
    shown = capsys.readouterr().out.split(">>> ")[1:]
    assert "second's answer" not in shown[0] and "was not asked" in shown[0]
    assert "first's answer 1" in shown[1] and "second's answer 1" in shown[1]
    assert "first's answer 2" in shown[2] and "second's answer 2" in shown[2]


# --- going on

def test_resume_needs_no_flag_but_the_directory_and_code(base, tmp_path):
    (tmp_path / "mine.py").write_text("def score(p, r): return [float(len(x)) for x in r]\n")
    common = ["--variant", "online-dpo", "--mix", "0.5", "--model", base, "--reference", f"{base}/reference",
              "--data", f"{base}/toy-pairs.jsonl", *SHORT, "--learning-rate", "3e-4", "--max-prompt-length",
              "12", "--beta", "0.7", "--reward", f"{tmp_path}/mine.py:score", "--save-every", "1",
              "--gradient-checkpointing"]
    common[common.index("--steps") + 1] = "3"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    sail_main([*common, "--out", str(whole)])
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints/3")
    shutil.rmtree(stopped / "model")
    sail.main(["--resume", "--out", str(stopped), "--reward", f"{tmp_path}/mine.py:score",
               "--gradient-checkpointing"])
    assert rows_of(stopped) == rows_of(whole)


def test_code_that_the_settings_of_a_run_name_is_not_taken_over(base, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("def score(p, r): return [float(len(x)) for x in r]\n")
    shutil.copy(f"{base}/toy-pairs.jsonl", tmp_path / "x.jsonl")
    sail_main(["--variant", "online-dpo", "--mix", "1", "--model", base, "--data", f"{tmp_path}/x.jsonl",
               *SHORT, "--max-prompt-length", "12", "--reward", f"{tmp_path}/mine.py:score", "--save-every",
               "1", "--out", str(tmp_path / "run")])
    message = fails(sail.main, ["sail.py", "--resume", "--out", str(tmp_path / "run")], monkeypatch, capsys)
    assert "argument --reward: online-dpo needs one to label its pairs" in message
    message = fails(sail.main, ["sail.py", "--resume", "--beta", "9", "--reward", f"{tmp_path}/mine.py:score",
                                "--out", str(tmp_path / "run")], monkeypatch, capsys)
    assert "--beta has changed since" in message


def test_a_reward_models_training_goes_on_from_its_directory_alone(base, tmp_path):
    flags = ["--train", "--model", base, "--data", f"{base}/toy-pairs.jsonl", "--steps", "3", "--batch-size",
             "4", "--save-every", "1", "--eval-limit", "4", "--max-length", "20"]
    flags, chosen = as_settings([*flags, "--out", str(tmp_path / "rm")])
    reward.main(flags, **chosen)
    before = rows_of(tmp_path / "rm")
    shutil.rmtree(tmp_path / "rm/checkpoints/3")
    shutil.rmtree(tmp_path / "rm/model")
    reward.main(["--train", "--resume", "--out", str(tmp_path / "rm")])
    assert rows_of(tmp_path / "rm") == before and (tmp_path / "rm/model").is_dir()


@pytest.mark.parametrize("minutes, printed", [(0, [1, 10, 12]), (1, list(range(1, 13)))])
def test_steps_that_take_long_are_printed_each(minutes, printed, base, tmp_path, monkeypatch, capsys):
    """Where there is no bar. The clock goes a minute further at each look, or stands."""
    from runtime import training
    clock = iter(range(10 ** 6))
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock) * 60.0 * minutes)
    sail_main(["--variant", "sft", "--model", base, "--steps", "12", "--batch-size", "4", "--limit", "40",
               "--eval-limit", "2", "--eval-every", "0", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert [int(line.split("/")[0].removeprefix("step ")) for line in said.splitlines()
            if line.startswith("step ")] == printed


def test_several_runs_are_measured_on_what_the_first_of_them_was(base, tmp_path, monkeypatch, capsys):
    lengths = {"short": "5", "long": "9"}
    for name, length in lengths.items():
        sail_main(["--variant", "dpo", "--model", base, "--data", f"{base}/toy-pairs.jsonl", "--eval-data",
                   f"{base}/toy-pairs.jsonl", "--steps", "1", "--batch-size", "2", "--eval-limit", "2",
                   "--max-prompt-length", "12", "--max-response-length", length, "--out",
                   str(tmp_path / name)])
    for order in (["short", "long"], ["long", "short"]):
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["evaluate.py", *(str(tmp_path / name) for name in order), "--out",
                                         str(tmp_path / "figures.json")])
        evaluate.main()
        said = capsys.readouterr().out
        for name in order:
            assert f"{name}: 2 responses of up to {lengths[order[0]]} tokens" in said
