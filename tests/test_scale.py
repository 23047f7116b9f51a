"""Shards, adapters and what saves memory: the same training, in less of it."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from memory import PeakBytes, estimate, sizes_of
from ranks import pairs_of

import generate
import sail
from generate import AdapterReference, load_policy, toy_model, train_adapter
from sail import parse_args, train

ROOT = Path(sail.__file__).parent
COMMON = ["--steps", "20", "--batch-size", "7", "--micro-batch-size", "3", "--limit", "60",
          "--eval-limit", "4", "--eval-every", "0", "--max-response-length", "12", "--learning-rate", "1e-4"]
ONLINE = ["--variant", "pr", "--mix", "0.5", "--steps", "4", "--shard"]
RUNS = {  # one launch of two ranks runs them all
    **{f"{variant} {kind}": ["--variant", variant, "--shard", *more] for variant in ("dpo", "dp")
       for kind, more in (("full", []), ("lora", ["--lora", "4"]))},
    "pr": [*ONLINE], "pr again": [*ONLINE],
    "pr streamed": [*ONLINE, "--shard-rollouts", "--lora", "4", "--num-responses", "3",
                    "--micro-batch-size", "1", "--gradient-checkpointing", "--merge", "--eval-every", "2"],
    "pr bfloat16": [*ONLINE, "--dtype", "bfloat16"],
    "revkl": ["--variant", "pp", "--steps", "2", "--shard", "--revkl-coef", "0.3"],
    "sft": ["--variant", "sft", "--shard", "--steps", "4", "--save-every", "2"],
    "bfloat16": ["--variant", "dpo", "--shard", "--dtype", "bfloat16", "--steps", "4"],
    "precomputed": ["--variant", "dp", "--shard", "--precompute-reference", "--steps", "4"],
    "ddp precomputed": ["--variant", "dp", "--precompute-reference", "--steps", "4"],
    "ddp lora": ["--variant", "dp", "--lora", "4"],
}


def run(base, out, *more):
    """Train in this process; returns metrics.jsonl as rows without their seconds."""
    train(parse_args(["--model", base, *COMMON, "--out", str(out), *more]))
    return rows_of(out)


def rows_of(out):
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("seconds")}
            for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights(path):
    return dict(load_policy(str(path))[0].named_parameters())


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


# --- shards

@pytest.fixture(scope="module")
def on_two_ranks(base, tmp_path_factory):
    """The directory with the results of RUNS."""
    path = tmp_path_factory.mktemp("ranks")
    arguments = [["--model", base, *COMMON, "--out", str(path / name), *more] for name, more in RUNS.items()]
    (path / "runs.json").write_text(json.dumps(arguments))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    ROOT / "tests/ranks.py", "runs", path / "runs.json"], check=True, timeout=300,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    return path


@pytest.mark.parametrize("name", ["dpo full", "dp full", "dpo lora", "dp lora", "ddp lora"])
def test_two_ranks_sharded_or_with_lora_reach_the_parameters_of_one_process(base, on_two_ranks, tmp_path,
                                                                            name):
    if "lora" in name:
        pytest.importorskip("peft")
    more = [word for word in RUNS[name] if word != "--shard"]
    rows = run(base, tmp_path, *more)
    one, two = weights(tmp_path / "model"), weights(on_two_ranks / name / "model")
    assert largest_difference(one, two) < 1e-5
    assert (any((one[key] != value).any() for key, value in weights(base).items() if key in one)
            or "lora" in name)
    assert rows_of(on_two_ranks / name)[-1]["loss"] == pytest.approx(rows[-1]["loss"], abs=1e-4)


def test_sharded_ranks_draw_unlike_lengths_and_samples_and_the_same_on_a_rerun(on_two_ranks):
    drawn = {name: [[json.loads(line) for line in (on_two_ranks / name / f"drawn-{rank}.jsonl").open()]
                    for rank in (0, 1)] for name in ("pr", "pr again", "pr streamed")}
    assert (drawn["pr"] == drawn["pr again"]
            and rows_of(on_two_ranks / "pr") == rows_of(on_two_ranks / "pr again"))
    first, second = drawn["pr"]
    assert all(one and other and one != other for one, other in zip(first, second))    # both ranks sample
    assert any(max(map(len, one), default=0) != max(map(len, other), default=0)
               for one, other in zip(first, second))
    assert len(drawn["pr streamed"][0]) == 4


def test_a_sharded_run_leaves_the_files_of_any_other(on_two_ranks):
    pytest.importorskip("peft")
    out = on_two_ranks / "pr streamed"
    assert [json.loads(line)["step"] for line in (out / "eval.jsonl").open()] == [0, 2, 4]
    adapter, merged = load_policy(str(out / "model"))[0], load_policy(str(out / "merged"))[0]
    ids = torch.tensor([[3, 9, 4, 7]])
    torch.testing.assert_close(adapter(ids).logits, merged(ids).logits, rtol=0, atol=1e-4)
    assert all(math.isfinite(row["loss"])
               for name in ("revkl", "sft") for row in rows_of(on_two_ranks / name))


def test_a_sharded_policy_computes_in_bfloat16_and_keeps_float32(on_two_ranks):
    row = rows_of(on_two_ranks / "bfloat16")[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert {weight.dtype for weight in weights(on_two_ranks / "bfloat16/model").values()} == {torch.float32}


def test_a_sharded_checkpoint_is_continued_by_one_process(base, on_two_ranks):
    sharded = on_two_ranks / "sft"
    before = weights(sharded / "model")
    rows = run(base, sharded, *[word for word in RUNS["sft"] if word != "--shard"], "--resume")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert largest_difference(weights(sharded / "model"), before) == 0


def test_a_sharded_policy_is_whole_for_a_rollout_and_its_layers_never_longer(base):
    sail.join_processes(shard=True)
    try:
        model = load_policy(base)[0]
        generate.shard(model)

        def gathered():
            """After a forward: whether a layer's weights are gathered, and the output layer's."""
            with torch.no_grad():
                model(torch.tensor([[3, 4]]))
            weights = model.model.layers[0].mlp.up_proj.weight, model.lm_head.weight
            return [not hasattr(weight, "full_tensor") for weight in weights]

        assert gathered() == [False, True]
        with generate.in_step(model):
            assert gathered() == [True, True]
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        assert gathered() == [False, True]
        with generate.in_step(model, gather=False):
            assert gathered() == [False, True]
        assert gathered() == [False, True]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "cohere"])
def test_the_decoder_layers_are_found_in_any_architecture(family, monkeypatch):
    sharded = []
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, **_: sharded.append(module))
    model = tiny_model(family)
    generate.shard(model)
    assert [type(module).__name__ for module in sharded[:2]] == [type(sharded[0]).__name__] * 2
    assert "Layer" in type(sharded[0]).__name__ or "Block" in type(sharded[0]).__name__
    assert sharded[2:] == [model]


# --- adapters

def adapter_of(base, path, seed=3, **changes):
    """A LoRA adapter with weights that are not zero, saved."""
    config = pytest.importorskip("peft").LoraConfig(**{**dict(r=4, target_modules="all-linear"), **changes})
    model, tokenizer = load_policy(base)
    model.add_adapter(config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def scored(model):
    pairs = [{"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 1], "rejected_ids": [10, 11, 12, 1]}]
    with torch.no_grad():
        return sail.pair_logps(model, pairs)


def test_lora_starts_at_ln_2_and_leaves_the_base_bit_identical(base, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    seen = []
    make = sail.make_optimizer
    monkeypatch.setattr(sail, "make_optimizer",
                        lambda policy, *rest: seen.append(policy) or make(policy, *rest))
    rows = run(base, tmp_path, "--variant", "pr", "--lora", "4", "--steps", "50", "--mix", "0.5",
               "--learning-rate", "1e-3", "--merge")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and rows[-1]["skipped"] == 0
    start = weights(base)
    after = {name.replace(".base_layer", ""): value
             for name, value in seen[0].named_parameters() if "lora_" not in name}
    assert start.keys() == after.keys() and all(torch.equal(start[name], after[name]) for name in start)
    adapter, merged = load_policy(str(tmp_path / "model"))[0], load_policy(str(tmp_path / "merged"))[0]
    assert (scored(adapter) - scored(load_policy(base)[0])).abs().max() > 0.01
    torch.testing.assert_close(scored(merged), scored(adapter), rtol=0, atol=1e-4)


def test_a_run_continued_from_an_sft_adapter_has_that_adapter_as_its_reference(base, tmp_path):
    start = adapter_of(base, tmp_path / "sft")
    args = parse_args(["--variant", "dpo", "--model", start, "--limit", "60"])
    policy, reference, *_ = sail.load_everything(args, "cpu")
    assert isinstance(reference, AdapterReference)
    expected = scored(load_policy(start)[0])
    assert torch.equal(scored(reference), expected) and torch.equal(scored(policy), expected)
    assert (expected - scored(load_policy(base)[0])).abs().max() > 0.1
    rows = run(start, tmp_path / "run", "--variant", "dpo", "--steps", "8", "--learning-rate", "1e-2")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert torch.equal(scored(load_policy(start)[0]), expected)
    trained = scored(load_policy(str(tmp_path / "run/model"))[0])
    assert (trained - expected).abs().max() > 0.01


@pytest.mark.parametrize("changes", [dict(lora_dropout=0.5), dict(init_lora_weights="pissa")],
                         ids=["dropout", "an initialisation that changes the base"])
def test_a_continued_adapter_starts_as_saved_and_so_does_its_reference(base, tmp_path, changes):
    start = adapter_of(base, tmp_path / "sft", **changes)
    expected = scored(load_policy(start)[0])
    args = parse_args(["--variant", "dpo", "--model", start, "--limit", "60"])
    policy, reference, *_ = sail.load_everything(args, "cpu")
    policy.train()
    assert torch.equal(scored(policy), expected) and torch.equal(scored(reference), expected)


def test_the_adapter_reference_restores_the_policy_also_when_a_call_fails(base):
    pytest.importorskip("peft")
    policy, _ = load_policy(base)
    train_adapter(policy, 4)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    own, reference = scored(policy), AdapterReference(policy)
    assert torch.equal(scored(reference), scored(load_policy(base)[0]))
    with pytest.raises(ValueError):
        reference(use_cache=False)
    assert torch.equal(scored(policy), own) and not torch.equal(scored(reference), own)
    assert trained == {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("changes, message", [
    (dict(modules_to_save=["embed_tokens"]), "modules_to_save"), (dict(bias="all"), "trains bias"),
    (dict(target_modules=["q_proj", "lm_head"]), "trains embeddings"),
    (dict(r=2), "is an adapter of rank 2")])
def test_adapters_that_would_move_the_reference_are_refused(base, tmp_path, changes, message):
    start = adapter_of(base, tmp_path / "sft", **changes)
    args = parse_args(["--variant", "dpo", "--model", start, "--lora", "4", "--limit", "60"])
    with pytest.raises(sail.InputError, match=message):
        sail.load_everything(args, "cpu")


def test_an_adapter_without_a_tokenizer_takes_its_base_s(base, tmp_path):
    start = Path(adapter_of(base, tmp_path / "sft"))
    for file in start.glob("tokenizer*"):
        file.unlink()
    assert load_policy(str(start))[1].get_vocab() == load_policy(base)[1].get_vocab()


def test_without_peft_one_line_says_what_to_install(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    args = parse_args(["--variant", "dpo", "--model", base, "--lora", "4", "--limit", "60"])
    with pytest.raises(sail.InputError, match="--lora needs peft: pip install peft"):
        sail.load_everything(args, "cpu")


# --- memory

@pytest.mark.parametrize("variant", ["dp", "pr"])
def test_precomputed_reference_log_probabilities_change_nothing_and_are_kept(base, tmp_path, variant,
                                                                             monkeypatch):
    more = ["--variant", variant, "--mix", "0.5", "--steps", "4"]
    plain = run(base, tmp_path / "plain", *more)
    rows = run(base, tmp_path / "a", *more, "--precompute-reference")
    for one, other in zip(plain, rows, strict=True):
        finite = {key: value for key, value in one.items() if value is not None}
        assert {key: other[key] for key in finite} == pytest.approx(finite, rel=1e-3, abs=1e-4)
    (file,) = tmp_path.glob("reference-*.safetensors")
    made = file.stat().st_mtime_ns
    assert (run(base, tmp_path / "b", *more, "--precompute-reference") == rows
            and file.stat().st_mtime_ns == made)
    run(base, tmp_path / "c", *more, "--precompute-reference", "--limit", "59")            # other rows
    other = tmp_path / "base2"
    for part in toy_model(seed=6):
        part.save_pretrained(other)
    run(base, tmp_path / "d", *more, "--precompute-reference", "--reference", str(other))  # another reference
    assert len(list(tmp_path.glob("reference-*.safetensors"))) == 3


def test_two_ranks_precompute_what_one_process_does(base, on_two_ranks, tmp_path):
    plain = run(base, tmp_path, *[word for word in RUNS["ddp precomputed"] if "precompute" not in word])
    for name in ("precomputed", "ddp precomputed"):
        assert [row["loss"] for row in rows_of(on_two_ranks / name)] == pytest.approx(
            [row["loss"] for row in plain], abs=1e-4)


def test_the_reference_reads_fresh_samples_and_no_known_response(base):
    reference = tiny_model(seed=2)
    pairs = pairs_of(6, "pr")
    fresh = [place for place, pair in enumerate(pairs) if any(pair["on_policy"])]
    expected = sail.pair_logps(reference, pairs)
    for pair in pairs:
        pair["reference_logps"] = (1.0, 2.0)                           # wrong, so that it shows
    found = sail.reference_logps(reference, pairs)
    torch.testing.assert_close(found[:, fresh], expected[:, fresh])
    offline = [place for place in range(6) if place not in fresh]
    assert found[:, offline].tolist() == [[1.0] * 3, [2.0] * 3] and len(fresh) == 3


@pytest.mark.parametrize("more", [[], ["--lora", "4"]], ids=["full", "lora"])
def test_gradient_checkpointing_trains_the_same_and_samples_with_its_cache(base, tmp_path, more, monkeypatch):
    if more:
        pytest.importorskip("peft")
    more = [*more, "--variant", "pr", "--mix", "0.5", "--steps", "3"]
    plain, modes = run(base, tmp_path / "plain", *more), []
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, *args, **options: (
        modes.append((self.training, torch.is_grad_enabled(), options.get("past_key_values") is not None)),
        forward(self, *args, **options))[1])
    rows = run(base, tmp_path / "b", *more, "--gradient-checkpointing")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in plain], abs=1e-6)
    assert (True, True, False) in modes and (False, False, True) in modes and (True, False, True) not in modes


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_estimate_fits_the_measured_bytes_of_rollout_and_update(checkpointing):
    from functools import partial

    from transformers import LlamaConfig, LlamaForCausalLM
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"w{i}" for i in range(2000 - len(tokenizer))])
    torch.manual_seed(0)
    policy, reference = (generate.prepare(LlamaForCausalLM(LlamaConfig(
        vocab_size=2000, hidden_size=128, intermediate_size=352, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=1,
        pad_token_id=0)).eval(), tokenizer) for _ in range(2))
    args = parse_args(["--variant", "dpo"])
    optimizer, scheduler = sail.make_optimizer(policy, 10, args)

    def ids(length):
        return torch.randint(5, 2000, (length,)).tolist()

    pairs = [{"prompt_ids": ids(64), "chosen_ids": ids(64), "rejected_ids": ids(64), "preference": 1.0,
              "draw": 0.5, "on_policy": (False, False), "self_labelled": False, "weight": 1.0}
             for _ in range(4)]

    def update():
        losses_of = partial(sail.preference_losses, policy, reference, args=args, baseline=-0.6)
        sail.accumulate_gradients(policy, losses_of, sail.micro_batches(pairs, 1), 0.25)
        sail.update(policy, optimizer, scheduler, 1.0, 0.0)

    policy.train()
    if checkpointing:
        sail.recompute_activations(policy)
    update()
    with PeakBytes() as updating:
        update()
    policy.eval()
    prompts = [ids(64) for _ in range(8)]
    with PeakBytes() as sampling:
        responses, _ = generate.sample(policy, tokenizer, prompts, 64, 2)
    assert sum(len(each) for group in responses for each in group) > 900       # hardly one ends early
    wanted = estimate(policy.config, bytes_=4, samples=16, tokens=128, packed=192, scored=128)
    assert sum(p.nbytes for p in policy.parameters()) == wanted["weights"] == wanted["reference"]
    states = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    assert states == pytest.approx(wanted["optimizer"], rel=1e-3)
    assert sampling.peak == pytest.approx(wanted["rollout"], rel=0.1)
    if checkpointing:
        assert updating.peak == pytest.approx(wanted["update"], rel=0.1)
    else:
        assert updating.peak > 1.5 * wanted["update"]


def test_the_estimate_fits_the_bytes_of_two_sharded_ranks(on_two_ranks, base):
    config = load_policy(base)[0].config
    for name, lora, bytes_ in (("pr", 0, 4), ("pr bfloat16", 0, 2), ("dpo full", 0, 4), ("dpo lora", 4, 4)):
        wanted = estimate(config, 2, shard=True, lora=lora, bytes_=bytes_, samples=0)
        for rank in (0, 1):
            found = json.loads((on_two_ranks / name / f"bytes-{rank}.json").read_text())
            assert found["weights"] == pytest.approx(wanted["weights"], rel=0.03)  # norms do not halve evenly
            assert found["optimizer"] == pytest.approx(wanted["optimizer"], rel=0.03)
            if name.startswith("pr"):
                assert found["gathered"] == wanted["rollout"]
    total, outside, layer, lora = sizes_of(config)
    assert total == outside + 2 * layer and lora == 2 * (4 * 2 * 112 + 3 * (112 + 288))


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads Linux's /proc")
def test_memory_is_flat_from_step_20_to_step_200(base, tmp_path):
    """tests/memory.py does this for every variant."""
    arguments = ["--model", base, *COMMON, "--variant", "pr", "--steps", "200", "--out", str(tmp_path)]
    script = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import sail, test_scale
seen, step = [], sail.training_step
def watched(run, nth, args):
    result = step(run, nth, args)
    seen.append(test_scale.resident())
    return result
sail.training_step = watched
sail.train(sail.parse_args({arguments!r}))
print(seen[19], seen[199])
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    early, late = map(int, finished.stdout.split("\n")[-2].split())
    assert late < 1.02 * early
