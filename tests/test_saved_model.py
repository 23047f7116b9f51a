"""OUT/model, as other tools read it."""
import json
import shlex
import shutil
from dataclasses import asdict, fields, replace

import pytest
import torch
from conftest import END, EOS, TEMPLATE, byte_tokenizer, sail_main, tiny_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import reward
import sail
from generate import load_policy
from runtime import saved_model
from runtime.saved_model import add_keys_of_version_4, last_figures, model_card
from runtime.settings import Settings

LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=8.0, original_max_position_embeddings=16)
LONG = dict(rope_type="longrope", rope_theta=500.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4,
            original_max_position_embeddings=16)
PLAIN, HALF = dict(rope_type="default", rope_theta=500.0), dict(partial_rotary_factor=0.5)
SHORT = ["--variant", "dpo", "--steps", "2", "--batch-size", "2", "--limit", "40", "--eval-limit", "2",
         "--eval-every", "0", "--max-response-length", "6"]
KINDS = dict(full_attention=YARN, sliding_attention=PLAIN)


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


@pytest.mark.parametrize("family, rope, keys", [
    ("llama", PLAIN, dict(rope_theta=500.0, rope_scaling=None)),
    ("llama", LLAMA3, dict(rope_theta=500.0, rope_scaling=without(LLAMA3, "rope_theta"))),
    ("qwen2", YARN, dict(rope_theta=500.0, rope_scaling=without(YARN, "rope_theta"))),
    ("phi3", LONG, dict(rope_theta=500.0, original_max_position_embeddings=16, rope_scaling=dict(
        type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4))),
    ("gemma3", KINDS, dict(rope_theta=500.0, rope_local_base_freq=500.0,
                           rope_scaling=without(YARN, "rope_theta"))),
    ("gpt_neox", {**PLAIN, **HALF}, dict(rotary_emb_base=500.0, rotary_pct=0.5)),
    ("stablelm", {**PLAIN, **HALF}, dict(rope_theta=500.0, partial_rotary_factor=0.5)),
    ("gpt2", None, dict())])
def test_a_saved_configuration_has_the_keys_of_both_versions(family, rope, keys, tmp_path, monkeypatch):
    """That transformers 4.57.6 makes the same logits of these was tried in an environment of its own."""
    monkeypatch.setitem(tiny_model.__globals__["FAMILIES"], "gpt_neox", ("gpt_neox", {}))
    monkeypatch.setitem(tiny_model.__globals__["FAMILIES"], "stablelm", ("stablelm", {}))
    more = {} if rope is None else {"rope_parameters": rope}
    if family == "phi3":
        more["original_max_position_embeddings"] = 16
    model = tiny_model(family, **more)
    model.save_pretrained(tmp_path)
    add_keys_of_version_4(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in keys} == keys
    assert saved["torch_dtype"] == saved["dtype"] == "float32"
    assert ("rope_theta" in saved) == (rope is not None)
    again = getattr(AutoConfig.from_pretrained(tmp_path), "rope_parameters", None)
    before = getattr(model.config, "rope_parameters", None)
    assert again == before or without(again, "type") == before         # version 5 reads what it wrote


def test_a_saved_tokenizer_is_one_that_both_versions_know(tmp_path):
    tokenizer = byte_tokenizer(TEMPLATE)
    tokenizer.save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    add_keys_of_version_4(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["additional_special_tokens"] == ["<|user|>", "<|assistant|>", "<|end|>"]
    assert "extra_special_tokens" not in saved
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|user|> Hello <|end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.all_special_tokens == tokenizer.all_special_tokens


# --- what a run saves

@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The directory of a run of two steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    sail_main(["--model", base, *SHORT, "--out", str(out)])
    return out


def test_what_a_run_saves_has_the_keys_of_both_versions(finished):
    saved = json.loads((finished / "model/config.json").read_text())
    assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] and saved["rope_scaling"] is None
    assert saved["torch_dtype"] == "float32"
    saved = json.loads((finished / "model/tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("more", [[], ["--lora", "2"]])
def test_other_tools_stop_at_the_end_tokens_of_training(checkpoint, held_out, tmp_path, more):
    """The model's own files name the EOS alone; an answer in the template ends with another token."""
    if more:
        pytest.importorskip("peft")
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    shutil.copytree(checkpoint, tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink()
    sail_main(["--model", str(tmp_path / "base"), "--data", held_out, *SHORT, "--max-prompt-length", "60",
               "--chat-template", str(tmp_path / "template.jinja"), *more, "--out", str(tmp_path / "run")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert model.generation_config.eos_token_id == [EOS, END]
    saved = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert not saved.get("_from_model_config")                         # or version 4 takes config.json's
    with torch.no_grad():
        model.get_output_embeddings().weight[END] *= 100               # so that it comes soon
    prompt = torch.tensor([[5, 6, 7]])
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=40)
    assert answer[0, -1] == END and len(answer[0]) < 40


@pytest.mark.parametrize("words", [dict(do_sample=False, temperature=0.6, top_p=0.9), dict(pad_token_id=-1),
                                   dict(top_k=0.5)])
def test_a_generation_config_that_transformers_would_refuse_is_saved_as_it_came(words, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text(json.dumps(words))
    policy, _ = load_policy(str(tmp_path / "base"))
    policy.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/generation_config.json").read_text())
    assert saved == {**saved, **words}


# --- its README.md

def test_the_card_names_base_method_data_command_and_the_last_figures(finished, base):
    card = (finished / "model/README.md").read_text()
    settings = json.loads((finished / "args.json").read_text())
    last = json.loads((finished / "eval.jsonl").read_text().splitlines()[-1])
    assert card.startswith("---\nlibrary_name: transformers\n---\n\n# run\n")   # a directory is no hub name
    assert f"`{base}`, trained with `--variant dpo`" in card and f"on `{settings['data']}`" in card
    assert f"after step {last['step']}, on {last['prompts']} prompts" in card
    assert f"loss {last['loss']:.3f}" in card and f"kl {last['kl']:.3f}" in card
    assert card.count("\n") < 20
    command, = [line.strip() for line in card.splitlines() if line.startswith("    python sail.py")]
    again = sail.parse_args(shlex.split(command)[2:])
    for name, value in vars(again).items():
        if name not in ("schedule", "limit", "out"):                   # only the last one has a flag
            assert value == settings[name], name
    assert "limit 40" in card


def test_the_card_names_the_hub_model_that_the_runs_began_with(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "sft")
    args = sail.Arguments(**{field.name: value for field in fields(sail.Arguments)
                             for value in [json.loads((out / "args.json").read_text())[field.name]]})
    hub = replace(args, model="owner/name", out=str(out))
    assert model_card(hub).startswith("---\nbase_model: owner/name\nlibrary_name: transformers\n---\n")
    (out / "args.json").write_text(json.dumps({**asdict(hub), "may_change": []}))
    later = replace(args, model=f"{out}/model", out=str(finished))     # that run's model was its start
    assert "base_model: owner/name\n" in model_card(later) and f"`{out}/model`, trained" in model_card(later)
    (out / "args.json").write_text(json.dumps({**asdict(later), "may_change": []}))            # a circle
    assert "base_model" not in model_card(later)
    (finished / "eval.jsonl").rename(tmp_path / "eval.jsonl")
    try:
        (finished / "eval.jsonl").write_text("")
        assert "the model was not evaluated" in model_card(args)
    finally:
        (tmp_path / "eval.jsonl").replace(finished / "eval.jsonl")


def test_a_reward_models_card_says_that_it_is_one(checkpoint, held_out, tmp_path):
    reward.main(["--train", "--model", str(checkpoint), "--data", held_out, "--steps", "1", "--batch-size",
                 "4", "--max-length", "60", "--out", str(tmp_path / "rm")])
    card = (tmp_path / "rm/model/README.md").read_text()
    steps = [json.loads(line)["step"] for line in (tmp_path / "rm/eval.jsonl").read_text().splitlines()]
    assert len(steps) > 1 and f"Held-out figures after step {steps[-1]}, on " in card
    assert f"A reward model: `{checkpoint}`, trained with Bradley-Terry's likelihood on `{held_out}`" in card
    assert "    python reward.py --model" in card and "--train" in card and "accuracy" in card


def test_the_card_names_figures_without_an_interval_alone(tmp_path):
    """As those of one prompt. What was not measured is left out."""
    (tmp_path / "eval.jsonl").write_text('{"step": 3, "prompts": 1, "length": 4, "length_interval": null, '
                                         '"reward": null, "reward_interval": null}\n')
    assert last_figures(tmp_path) == (
        "Held-out figures after step 3, on 1 prompts, with 95 % intervals: length 4.000.")


def test_a_buffer_that_belongs_to_a_models_state_is_saved(tmp_path, monkeypatch):
    model = tiny_model()
    model.model.register_buffer("offset", torch.tensor([3.0, 4.0]))
    monkeypatch.setattr(saved_model, "model_card", lambda _: "")
    saved_model.save_model(model, byte_tokenizer(), replace(Settings(), out=str(tmp_path)), None)
    assert load_file(tmp_path / "model/model.safetensors")["model.offset"].tolist() == [3.0, 4.0]
