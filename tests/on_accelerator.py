"""Every variant on an accelerator that is none: no tensor stays on the CPU, no micro-batch makes it wait,
and the figures are those of a run without."""
import json
from contextlib import nullcontext

import pytest
import torch
from conftest import IDS, byte_tokenizer, run_of, sail_args, sail_main, tiny_model
from ranks import pairs_of

pytest.importorskip("torch.utils.backend_registration", reason="this torch has no devices in Python")
if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this torch has no devices in Python", allow_module_level=True)

import evaluate
import generate
import reward
import runtime.processes
import sail
from accelerator import accelerator, syncs
from runtime.packing import allow_packing
from runtime.run_directory import write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A Llama, a tied GPT-2, a classifier, pairs: a directory."""
    from transformers import LlamaConfig, LlamaForSequenceClassification
    path, tokenizer = tmp_path_factory.mktemp("world"), byte_tokenizer()
    torch.manual_seed(1)
    classifier = LlamaForSequenceClassification(LlamaConfig(
        vocab_size=IDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, eos_token_id=1, pad_token_id=0))
    models = dict(llama=tiny_model(), gpt2=tiny_model("gpt2", tie_word_embeddings=True), reward=classifier)
    for name, model in models.items():
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    write_rows(path / "pairs.jsonl", [dict(prompt=f"how {n}", chosen=" ab" * (n % 3 + 1),
                                           rejected=" c" * (n % 4 + 1)) for n in range(40)])
    return path


def run(world, out, machine, monkeypatch, name, *more):
    """metrics.jsonl and the last line of eval.jsonl of a run on the machine, without what depends on time."""
    with machine as device:
        for module in (runtime.processes, generate, reward):
            monkeypatch.setattr(module, "own_device", lambda: device or torch.device("cpu"))
        syncs.clear()
        sail_main(["--model", str(world / name), "--data", str(world / "pairs.jsonl"), "--reward",
                   str(world / "reward"), "--batch-size", "6", "--micro-batch-size", "2", "--eval-every", "0",
                   "--eval-limit", "3", "--max-prompt-length", "12", "--max-response-length", "5",
                   "--learning-rate", "1e-3", "--steps", "2", "--out", str(out), *more])
    assert bool(syncs) == (device is not None)                         # it was the machine that computed
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows.append(json.loads((out / "eval.jsonl").read_text().splitlines()[-1]))
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


@pytest.mark.parametrize("name, flags", [
    ("llama", ["--variant", "sft"]),
    ("gpt2", ["--variant", "dpo", "--optimizer", "rmsprop"]),
    ("gpt2", ["--variant", "relabelled-dpo", "--label", "sampled"]),
    ("llama", ["--variant", "dp", "--lora", "2"]),
    ("llama", ["--variant", "pp", "--mix", "0.5", "--revkl-coef", "0.3"]),
    ("gpt2", ["--variant", "pr", "--mix", "0.7", "--gradient-checkpointing"]),
    ("llama", ["--variant", "spin", "--loss-type", "simpo"])])
def test_a_run_has_the_figures_of_one_on_the_cpu(name, flags, world, tmp_path, monkeypatch):
    """But for rounding: attention has other kernels."""
    if "--lora" in flags:
        pytest.importorskip("peft")
    on_cpu = run(world, tmp_path / "cpu", nullcontext(), monkeypatch, name, *flags)
    ours = run(world, tmp_path / "fake", accelerator(), monkeypatch, name, *flags)
    for row, wanted in zip(ours, on_cpu, strict=True):
        for key, value in row.items():
            if value is not None:
                value = pytest.approx(value, rel=1e-2, abs=1e-3)
            assert wanted[key] == value, key


@pytest.mark.parametrize("name, flags", [
    ("llama", ["--variant", "pr", "--mix", "0.7"]), ("gpt2", ["--variant", "pp", "--revkl-coef", "0.3"]),
    ("llama", ["--variant", "pr", "--mix", "0.7", "--lora", "2"])])
def test_bfloat16_runs_and_is_near(name, flags, world, tmp_path, monkeypatch):
    """Autocast of another device rounds elsewhere, so that samples may differ; the first losses are near."""
    if "--lora" in flags:
        pytest.importorskip("peft")
    flags = [*flags, "--dtype", "bfloat16"]
    on_cpu = run(world, tmp_path / "cpu", nullcontext(), monkeypatch, name, *flags)
    ours = run(world, tmp_path / "fake", accelerator(), monkeypatch, name, *flags)
    assert ours[0]["loss"] == pytest.approx(on_cpu[0]["loss"], abs=0.02)


def test_a_run_is_saved_and_continued(world, tmp_path, monkeypatch):
    flags = ["--variant", "pr", "--mix", "0.5", "--save-every", "1"]
    whole = run(world, tmp_path / "run", accelerator(), monkeypatch, "gpt2", *flags)
    for file in (tmp_path / "run/checkpoints/2").iterdir():
        file.unlink()
    (tmp_path / "run/checkpoints/2").rmdir()
    assert run(world, tmp_path / "run", accelerator(), monkeypatch, "gpt2", *flags, "--resume") == whole


@pytest.mark.parametrize("variant", ["sft", "dpo", "pp", "pr"])
def test_no_micro_batch_makes_the_cpu_wait(variant):
    """A step waits for its gradient's norm, and for its metrics, all at once after the last micro-batch."""
    args = sail_args(["--variant", variant])
    data_pairs, variant_pairs = pairs_of(6, variant)
    with accelerator() as device:
        policy, reference = (allow_packing(tiny_model(seed=seed)).to(device) for seed in (1, 2))
        run = run_of(policy, reference, -0.6, micro_batch_size=1)
        syncs.clear()
        sail.accumulate_gradients(run, data_pairs + variant_pairs, args)
    assert list(syncs.values()) == [1] and "torch.stack" in list(syncs)[0]


def test_log_probabilities_are_fetched_once():
    pairs, _ = pairs_of(6, "dpo")
    with accelerator() as device:
        model = tiny_model().to(device)
        syncs.clear()
        evaluate.response_logps(model, pairs, [pair.chosen_ids for pair in pairs], "float32")
    assert sum("evaluate.py" in line or "sequence_logps" in line for line in syncs.elements()) == 1


@pytest.mark.parametrize("mistake", [
    lambda device: torch.ones(3, device=device) + torch.ones(3),
    lambda device: torch.ones(3, 4, device=device) @ torch.ones(4, 3),
    lambda device: torch.ones(3, device=device).gather(0, torch.tensor([1])),
    lambda device: torch.nn.Linear(2, 2).to(device)(torch.ones(1, 2)),
    lambda device: torch.ones(3, device=device).numpy(),
    lambda device: torch.rand(3, device=device, generator=torch.Generator())])
def test_what_an_accelerator_refuses_is_refused(mistake):
    with accelerator() as device, pytest.raises((RuntimeError, TypeError)):
        mistake(device)
