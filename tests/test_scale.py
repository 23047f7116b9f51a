"""Shards, adapters and what saves memory: the same training, in less of it."""
import copy
import gc
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import IDS, byte_tokenizer, run_of, sail_args, sail_main, tiny_model
from memory import PeakBytes, estimate, estimate_frozen, estimate_reward_training, sizes_of
from ranks import pairs_of
from transformers import GenerationConfig

import evaluate
import generate
import reward
import sail
from data import Pair
from generate import AdapterReference, add_adapter, load_policy, sequence_logps_and_revkl
from runtime import processes
from runtime.processes import computing_in, gathered, process_group, shard, split_layers
from runtime.settings import Settings
from sail import collate_pairs, pair_logps

ROOT = Path(sail.__file__).parent
COMMON = ["--steps", "10", "--batch-size", "7", "--micro-batch-size", "3", "--limit", "60",
          "--eval-limit", "4", "--eval-every", "0", "--max-response-length", "12", "--learning-rate", "1e-4"]
DP = {"full": ["--variant", "dp"], "lora": ["--variant", "dp", "--lora", "4"]}
SFT = ["--variant", "sft", "--steps", "4", "--save-every", "2"]
SHORT = ["--shard", "--steps", "2", "--mix", "0.5"]
RUNS = {  # one launch of two ranks runs them all
    **DP, **{f"{kind} shard": [*more, "--shard"] for kind, more in DP.items()},
    "pr": ["--variant", "pr", *SHORT], "pr bfloat16": ["--variant", "pr", *SHORT, "--dtype", "bfloat16"],
    "revkl": ["--variant", "pp", *SHORT, "--revkl-coef", "0.3", "--eval-every", "1"],
    "lora, checkpointing": ["--variant", "pr", *SHORT, "--lora", "4", "--micro-batch-size", "1",
                            "--gradient-checkpointing", "--eval-every", "1"],
    "lora bfloat16": ["--variant", "pr", *SHORT, "--lora", "4", "--dtype", "bfloat16"],
    "sft": [*SFT, "--shard"], "continued": [*SFT, "--shard", "--resume"],
}


def run(base, out, *more):
    """Train in this process; returns metrics.jsonl as rows without their seconds."""
    sail_main(["--model", base, *COMMON, "--out", str(out), *more])
    return rows_of(out)


def rows_of(out, name="metrics"):
    rows = [json.loads(line) for line in (Path(out) / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def weights(path):
    return dict(load_policy(str(path))[0].named_parameters())


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def scored(model):
    pairs = [Pair("", "", "", [5, 6, 7], [8, 9, 1], [10, 11, 12, 1])]
    with torch.no_grad():
        return pair_logps(model, pairs)


# --- shards

@pytest.fixture(scope="module")
def on_two_ranks(base, tmp_path_factory):
    """The directory with the results of RUNS; `continued` is what one process left after its second step."""
    path = tmp_path_factory.mktemp("ranks")
    base = shutil.copytree(base, path / "base")
    GenerationConfig(eos_token_id=[1, 2]).save_pretrained(base)        # config.json has 1 alone
    run(str(base), path / "continued", *SFT)
    shutil.rmtree(path / "continued/checkpoints/4")
    shutil.copy(path / "continued/metrics.jsonl", path / "continued/before.jsonl")
    arguments = [["--model", str(base), *COMMON, "--out", str(path / name), *more]
                 for name, more in RUNS.items()]
    (path / "runs.json").write_text(json.dumps(arguments))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    ROOT / "tests/ranks.py", "runs", path / "runs.json"], check=True, timeout=300,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    return path


@pytest.fixture(scope="module")
def in_one_process(base, tmp_path_factory):
    """The directory with the results of DP."""
    path = tmp_path_factory.mktemp("one")
    for name, more in DP.items():
        run(base, path / name, *more)
    return path


def test_a_rank_without_weights_does_as_the_first_has_found_out(on_two_ranks):
    """Whether rows can be packed, and what ends a response, of which config.json says less."""
    ranks = [json.loads((on_two_ranks / f"pr/bytes-{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["packed"] for rank in ranks] == [True, True]
    assert [rank["ends"] for rank in ranks] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("family, attention", [("llama", "packed"), ("gemma3", "sdpa")])
def test_only_where_the_first_packs_rows_do_the_others(family, attention):
    models = [generate.prepare(tiny_model(family), byte_tokenizer()), tiny_model(family)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "of_rank_0", lambda _: (attention, models[0].generation_config))
        generate.copy_settings_of_rank_0(models[1])
    assert [model.config._attn_implementation for model in models] == [attention] * 2
    assert models[1].generation_config is models[0].generation_config


@pytest.mark.parametrize("name", ["full", "full shard", "lora", "lora shard"])
def test_two_ranks_reach_the_parameters_of_one_process(base, in_one_process, on_two_ranks, name):
    one, two = in_one_process / name.split()[0], on_two_ranks / name
    assert largest_difference(weights(one / "model"), weights(two / "model")) < 1e-5
    assert largest_difference(weights(one / "model"), weights(base)) > 1e-4
    assert rows_of(two)[-1]["loss"] == pytest.approx(rows_of(one)[-1]["loss"], abs=1e-4)


def test_sharded_ranks_draw_unlike_samples_of_unlike_lengths(on_two_ranks):
    first, second = ([json.loads(line) for line in (on_two_ranks / f"pr/drawn-{rank}.jsonl").open()]
                     for rank in (0, 1))
    assert len(first) == 2 and all(one and other and one != other
                                   for one, other in zip(first, second, strict=True))
    assert any(sorted(map(len, one)) != sorted(map(len, other))
               for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["revkl", "lora, checkpointing"])
def test_a_sharded_run_logs_and_evaluates_like_any_other(on_two_ranks, name):
    assert [row["step"] for row in rows_of(on_two_ranks / name, "eval")] == [0, 1, 2]
    rows = rows_of(on_two_ranks / name)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and rows[1]["skipped"] == 0


@pytest.mark.parametrize("name", ["full", "full shard", "lora", "lora shard"])
def test_processes_divide_an_evaluation_and_find_what_one_finds(in_one_process, on_two_ranks, name):
    one, two = (rows_of(out, "eval")[-1] for out in (in_one_process / name.split()[0], on_two_ranks / name))
    for figure in ("loss", "margin", "accuracy"):
        assert two[figure] == pytest.approx(one[figure], abs=1e-5)
        assert two[f"{figure}_interval"] == pytest.approx(one[f"{figure}_interval"], abs=1e-5)
    answered = [json.loads((on_two_ranks / name / f"bytes-{rank}.json").read_text())["answered"]
                for rank in (0, 1)]
    assert two["prompts"] == one["prompts"] == answered[0][-1] + answered[1][-1] and min(answered[1]) > 0
    assert len(rows_of(on_two_ranks / name, "samples")) % two["prompts"] == 0


@pytest.mark.parametrize("count", [0, 1, 3, 5, 7])
def test_all_processes_get_the_results_of_all_items_in_order(monkeypatch, count):
    items, shares = [10 * place for place in range(count)], []

    def as_text(share):
        shares.append(len(share))
        return [str(item) for item in share]

    def of_all(mine):
        parts = []
        for nth in range(3):
            monkeypatch.setattr(processes, "rank", lambda nth=nth: nth)
            parts.append(as_text(items[nth::3] or items[:1]))
        return parts

    monkeypatch.setattr(processes, "world_size", lambda: 3)
    monkeypatch.setattr(processes, "of_all", of_all)
    monkeypatch.setattr(processes, "raise_together", lambda *_: None)
    assert processes.divided(as_text, items) == [str(item) for item in items]
    assert max(shares) <= max(1, -(-count // 3))


def test_a_sharded_policy_computes_in_bfloat16_and_keeps_float32(on_two_ranks):
    out = on_two_ranks / "pr bfloat16"
    assert rows_of(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows_of(out)[0]["grad_norm"] != rows_of(on_two_ranks / "pr")[0]["grad_norm"]
    assert {weight.dtype for weight in weights(out / "model").values()} == {torch.float32}


def test_a_sharded_adapter_trains_on_a_base_that_is_held_in_bfloat16(on_two_ranks, base, tmp_path):
    flags = [*RUNS["lora bfloat16"], "--out", str(tmp_path)]
    flags.remove("--shard")
    wanted, rows = run(base, tmp_path, *flags), rows_of(on_two_ranks / "lora bfloat16")
    assert rows[0]["loss"] == pytest.approx(wanted[0]["loss"], abs=0.01)
    assert rows[0]["grad_norm"] == pytest.approx(wanted[0]["grad_norm"], rel=0.3)      # of other samples
    held, whole = (json.loads((on_two_ranks / name / "bytes-0.json").read_text())["weights"]
                   for name in ("lora bfloat16", "lora shard"))
    assert held < 0.8 * whole


def test_a_sharded_checkpoint_is_a_whole_model_for_one_process(on_two_ranks):
    whole, last = (weights(on_two_ranks / "sft" / name) for name in ("model", "checkpoints/4"))
    assert largest_difference(whole, last) == 0


def test_a_sharded_checkpoint_is_continued_by_one_process(on_two_ranks):
    sharded = on_two_ranks / "sft"
    before = weights(sharded / "model")
    rows = run(str(on_two_ranks / "base"), sharded, *SFT, "--resume")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert largest_difference(weights(sharded / "model"), before) == 0


def test_a_checkpoint_of_one_process_is_continued_by_two_sharded_ranks(on_two_ranks):
    before, after = ((on_two_ranks / f"continued/{name}.jsonl").read_text().splitlines()
                     for name in ("before", "metrics"))
    assert after[:2] == before[:2] and after[2:] != before[2:] and len(after) == 4      # to the `seconds`
    continued, unbroken = (weights(on_two_ranks / name / "model") for name in ("continued", "sft"))
    assert largest_difference(continued, unbroken) < 1e-5


def test_a_sharded_policy_is_whole_while_gathered_and_its_layers_never_longer(base):
    with process_group(shard=True):
        model = load_policy(base)[0]
        shard(model)

        def is_whole():
            """After a forward: whether a layer's weights are whole, and the output layer's."""
            with torch.no_grad():
                model(torch.tensor([[3, 4]]))
            weights = model.model.layers[0].mlp.up_proj.weight, model.lm_head.weight
            return [not hasattr(weight, "full_tensor") for weight in weights]

        assert is_whole() == [False, True]
        with gathered(model):
            assert is_whole() == [True, True]
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        assert is_whole() == [False, True]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2", "cohere"])
def test_the_decoder_layers_are_found_in_any_architecture(family, monkeypatch):
    sharded = []
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, **_: sharded.append(module))
    model = tiny_model(family)
    split_layers(model, "float32")
    assert [type(module).__name__ for module in sharded[:2]] == [type(sharded[0]).__name__] * 2
    assert "Layer" in type(sharded[0]).__name__ or "Block" in type(sharded[0]).__name__
    assert sharded[2:] == [model]


# --- adapters

@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    """A run that trained an adapter: (its directory, its policy and its reference as they are at the end)."""
    pytest.importorskip("peft")
    out, loaded = tmp_path_factory.mktemp("lora") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        load = sail.load_run
        patch.setattr(sail, "load_run", lambda *inputs: loaded.append(load(*inputs)) or loaded[0])
        run(base, out, "--variant", "pr", "--lora", "4", "--mix", "0.5", "--learning-rate", "1e-3")
    return out, loaded[0][0].policy, loaded[0][0].reference


def test_the_reference_of_an_adapter_is_its_base_bit_for_bit_also_after_training(base, adapted):
    out, policy, reference = adapted
    rows = rows_of(out)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and rows[-1]["skipped"] == 0
    assert torch.equal(scored(reference), scored(load_policy(base)[0]))
    assert (scored(policy) - scored(reference)).abs().max() > 0.001


def test_out_model_of_an_adapter_is_whole_for_pipeline_and_python_without_peft(adapted):
    out, policy, _ = adapted
    script = """
import sys, torch
sys.modules["peft"] = None                       # an import of it fails, and it is not found
from transformers import pipeline
generator = pipeline("text-generation", model=sys.argv[1])
print(generator("review the soup :", max_new_tokens=4, do_sample=False)[0]["generated_text"])
print(generator.model(torch.tensor([[5, 6, 7, 8]])).logits.flatten().tolist())"""
    finished = subprocess.run([sys.executable, "-c", script, out / "model"], capture_output=True, text=True,
                              timeout=100)
    assert finished.returncode == 0, finished.stderr
    *_, text, logits = finished.stdout.splitlines()
    assert text.startswith("review the soup :") and len(text) > 20
    expected = policy(torch.tensor([[5, 6, 7, 8]])).logits.flatten()
    torch.testing.assert_close(torch.tensor(json.loads(logits)), expected, rtol=0, atol=1e-5)


def test_out_adapter_on_its_base_is_the_policy(base, adapted):
    from peft import PeftModel
    out, policy, _ = adapted
    loaded = PeftModel.from_pretrained(load_policy(base)[0], out / "adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == base
    torch.testing.assert_close(scored(loaded), scored(policy), rtol=0, atol=1e-5)


def test_the_adapter_reference_restores_the_policy_also_when_a_call_fails(base):
    pytest.importorskip("peft")
    policy, _ = load_policy(base)
    add_adapter(policy, 4)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    own, reference = scored(policy), AdapterReference(policy)
    with pytest.raises(ValueError):
        reference(use_cache=False)
    assert torch.equal(scored(policy), own) and not torch.equal(scored(reference), own)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_without_peft_one_line_says_what_to_install(base, held_out, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    args = sail_args(["--variant", "dpo", "--model", base, "--lora", "4", "--eval-data", held_out])
    with pytest.raises(ModuleNotFoundError):
        sail.load_run(args)


# --- memory

@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gradient_checkpointing_trains_the_same_and_samples_with_its_cache(base, tmp_path, kind, monkeypatch):
    if kind == "lora":
        pytest.importorskip("peft")
    more = [*DP[kind], "--variant", "pr", "--mix", "0.5", "--steps", "3"]
    plain, modes = run(base, tmp_path / "plain", *more), []
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    forward = LlamaDecoderLayer.forward

    def watched(self, *args, **options):
        cached = any(options.get(name) is not None for name in ("cache", "past_key_values"))
        modes.append((self.training, torch.is_grad_enabled(), cached))
        return forward(self, *args, **options)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", watched)
    rows = run(base, tmp_path / "b", *more, "--gradient-checkpointing")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in plain], abs=1e-6)
    assert (True, True, False) in modes and (False, False, True) in modes and (True, False, True) not in modes


def saved_model(path):
    """(directory of a model whose tensors are large enough to be told apart, a function that draws so many of
    its ids)."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"w{i}" for i in range(2000 - IDS)])
    tokenizer.save_pretrained(path)
    tiny_model(vocab_size=2000, hidden_size=128, intermediate_size=352, num_hidden_layers=6,
               max_position_embeddings=1024, initializer_range=0.02).save_pretrained(path)
    return str(path), lambda length: torch.randint(5, 2000, (length,)).tolist()


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_estimate_fits_the_measured_bytes_of_rollout_and_update(checkpointing, tmp_path):
    name, ids = saved_model(tmp_path)
    args = sail_args(["--variant", "dpo", "--model", name, "--data", "none.jsonl",
                      "--max-prompt-length", "64", "--max-response-length", "64"])
    args.gradient_checkpointing = checkpointing
    policy, reference, tokenizer = generate.load_models(args)
    optimizer, scheduler = sail.make_optimizer(policy.parameters(), 10, Settings(learning_rate=1e-4))
    run = run_of(policy, reference, -0.6, micro_batch_size=1)
    run.settings.gradient_checkpointing = checkpointing

    pairs = [Pair("", "", "", ids(64), ids(64), ids(64)) for _ in range(4)]

    def update():
        sail.accumulate_gradients(run, pairs, args)
        sail.optimizer_step(policy, optimizer, scheduler, 1.0, 0.0)

    policy.train()
    update()
    with PeakBytes() as updating:
        update()
    policy.eval()
    prompts = [ids(64) for _ in range(8)]
    with PeakBytes() as sampling:
        responses, *_ = generate.sample(policy, tokenizer, prompts, 64, 2)
    assert sum(len(each) for group in responses for each in group) > 900       # hardly one ends early
    wanted = estimate(policy.config, bytes_=4, prompts=8, responses=2, prompt=64, response=64)
    assert sum(p.nbytes for p in policy.parameters()) == wanted["weights"] == wanted["reference"]
    states = sum(v.nbytes for s in optimizer.state.values() for v in s.values())
    assert states == pytest.approx(wanted["optimizer"], rel=1e-3)
    assert sampling.peak == pytest.approx(wanted["rollout"], rel=0.1)
    if checkpointing:
        assert updating.peak == pytest.approx(wanted["update"], rel=0.1)
    else:
        assert updating.peak > 1.5 * wanted["update"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimates_fit_the_measured_bytes_of_models_that_are_not_trained(dtype, tmp_path):
    bytes_, (name, ids) = {"float32": 4, "bfloat16": 2}[dtype], saved_model(tmp_path)
    model, tokenizer = generate.load_frozen(name, dtype)
    pairs = [Pair("", "", "", ids(64), ids(64), ids(64)) for _ in range(32)]
    wanted = estimate_frozen(model.config, 2, bytes_=bytes_, prompts=8, responses=2, prompt=64, response=64)
    assert wanted["weights"] == pytest.approx(2 * bytes_of(model), rel=0.01)
    with computing_in(dtype, model), PeakBytes() as sampling:
        generate.sample(model, tokenizer, [pair.prompt_ids for pair in pairs[:8]], 64, 2)
    assert sampling.peak == pytest.approx(wanted["sampling"], rel=0.1)
    evaluate.response_logps(model, pairs[:2], [pair.chosen_ids for pair in pairs[:2]], dtype)
    with PeakBytes() as scoring:
        evaluate.response_logps(model, pairs, [pair.chosen_ids for pair in pairs], dtype)
    assert scoring.peak == pytest.approx(wanted["scoring"], rel=0.1)
    judge, _, _ = reward.load_classifier(name, num_labels=1)
    generate.place([judge.requires_grad_(False)], Settings(dtype=dtype))
    wanted = estimate_frozen(model.config, classifier=True, bytes_=bytes_, prompt=64, response=64)
    assert wanted["weights"] == pytest.approx(bytes_of(judge), rel=0.01)
    with PeakBytes() as scoring:
        reward.classifier_scores(judge, [ids(128) for _ in range(32)], dtype)
    assert scoring.peak == pytest.approx(wanted["scoring"], rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_fits_the_measured_bytes_of_a_reward_model_in_training(dtype, tmp_path):
    bytes_, (name, ids) = {"float32": 4, "bfloat16": 2}[dtype], saved_model(tmp_path)
    args = reward.RewardSettings(model=name, dtype=dtype, gradient_checkpointing=True, micro_batch_size=1)
    model, _, _ = reward.load_trainee(args)
    generate.place([model], args)
    optimizer, scheduler = sail.make_optimizer(model.parameters(), 10, Settings(learning_rate=1e-4))
    pairs = [(ids(128), ids(128), 1.0) for _ in range(3)]
    reward.reward_step(model, pairs, optimizer, scheduler, args)
    with PeakBytes() as updating:
        reward.reward_step(model, pairs, optimizer, scheduler, args)
    wanted = estimate_reward_training(model.config, bytes_=bytes_, prompt=64, response=64)
    assert wanted["weights"] == bytes_of(model)
    assert wanted["optimizer"] == pytest.approx(
        sum(value.nbytes for state in optimizer.state.values() for value in state.values()), rel=1e-3)
    assert updating.peak == pytest.approx(wanted["update"], rel=0.1)


def test_the_estimate_fits_the_bytes_of_two_sharded_ranks(on_two_ranks, base):
    config = load_policy(base)[0].config
    for name, lora, bytes_ in (("pr", 0, 4), ("pr bfloat16", 0, 2), ("lora shard", 4, 4)):
        wanted = estimate(config, 2, shard=True, lora=lora, bytes_=bytes_, prompts=0)
        for rank in (0, 1):
            found = json.loads((on_two_ranks / name / f"bytes-{rank}.json").read_text())
            assert found["weights"] == pytest.approx(wanted["weights"], rel=0.03)  # norms do not halve evenly
            assert found["optimizer"] == pytest.approx(wanted["optimizer"], rel=0.03)
            if name.startswith("pr"):
                assert found["gathered"] == wanted["rollout"]
    total, outside, layer, linear, lora = sizes_of(config)
    assert total == outside + 2 * layer and lora == 2 * (4 * 2 * 64 + 3 * (64 + 160))
    assert linear == 2 * (4 * 64 * 64 + 3 * 64 * 160)                  # not the output layer, which is tied


def test_no_step_leaves_a_tensor_behind(base, tmp_path, monkeypatch):
    """The process's memory after step 200 against step 20: experiments/memory.py --flat."""
    step, alive = sail.training_step, []

    def watched(*inputs):
        result = step(*inputs)
        alive.append(None)
        if len(alive) in (3, 10):
            gc.collect()
            alive[-1] = sum(each.nbytes for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
        return result

    monkeypatch.setattr(sail, "training_step", watched)
    run(base, tmp_path, "--variant", "pr", "--mix", "0.5")
    assert alive[2] == alive[9] > 0


def bytes_of(model):
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "tied", "gpt2", "qwen2", "gemma3"])
def test_frozen_weights_in_bfloat16_score_as_autocast_does_in_fewer_bytes(family):
    """Linear layers' (qwen2's have biases), but not the output layer's, nor an embedding's, which autocast
    leaves in float32."""
    model, pairs = tiny_model(family), sum(pairs_of(6, "dpo"), [])
    held = copy.deepcopy(model).requires_grad_(False)
    generate.hold_frozen_in_bfloat16(held)
    with torch.no_grad():
        assert torch.equal(pair_logps(held, pairs, "bfloat16"), pair_logps(model, pairs, "bfloat16"))
    head = model.get_output_embeddings().weight
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    saved = sum(parameter.nbytes for module in linear for parameter in module.parameters())
    saved -= head.nbytes
    assert bytes_of(held) == bytes_of(model) - saved // 2
    generate.hold_frozen_in_bfloat16(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}    # it is trained


@pytest.mark.parametrize("family", ["llama", "tied", "qwen2"])
def test_an_adapter_on_a_base_in_bfloat16_has_the_gradients_of_one_in_float32(family):
    pytest.importorskip("peft")
    pairs, found = sum(pairs_of(6, "dpo"), []), []
    for hold in (lambda _: None, generate.hold_frozen_in_bfloat16):
        model = tiny_model(family)
        add_adapter(model, 2)
        hold(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.01)
        with computing_in("bfloat16", model):
            logps = torch.stack(sequence_logps_and_revkl(
                model, AdapterReference(model), *collate_pairs(pairs)))
        logps.sum().backward()
        found.append([logps.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(map(torch.equal, *found))
