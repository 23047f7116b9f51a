"""What people's checkpoints do: tied and unreached weights, missing rows, lengths, clocks, channels."""
import json
import shutil

import pytest
import torch
from conftest import END, EOS, TEMPLATE, byte_tokenizer, sail_main, tiny_model
from safetensors.torch import load_file
from test_scale import largest_difference, rows_of

import data
import evaluate
import generate
import reward
import sail
from data import Pair, encode, load_tokenizer, render, response_text
from formats import Account, BadRow
from runtime.command_line import InputError
from runtime import processes
from runtime.processes import process_group
from runtime.run_directory import state_of
from generate import load_policy, positions_of, sample
from reward import drop_unscorable, load_classifier, load_reward
from sail import sequence_logps

SHORT = ["--steps", "4", "--batch-size", "4", "--limit", "40", "--eval-limit", "2", "--eval-every", "0",
         "--max-response-length", "6", "--save-every", "2"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- weights

@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("lora", [None, 2])
def test_a_checkpoint_holds_each_trained_storage_once_and_nothing_frozen(shard, lora):
    if lora:
        pytest.importorskip("peft")
    with process_group(shard):
        model = tiny_model("tied")
        if lora:
            generate.add_adapter(model, lora)
        if shard:
            processes.shard(model)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
        processes.sum_gradients(model)
        optimizer.step()
        state = state_of(model, optimizer)
        names = {name.removeprefix("model.") for name in state if name.startswith("model.model.")}
        assert names == {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert not any("lm_head" in name for name in state)
        assert len(state) == 4 * len(names)                            # weight, two moments, step
        assert lora is None or all("lora" in name for name in names)


class WithSpare(torch.nn.Module):
    """A part of a model that the loss does not reach."""

    def __init__(self):
        super().__init__()
        self.spare = torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("more", [[], ["--shard"]], ids=["one process", "shard"])
def test_a_parameter_that_gets_no_gradient_is_trained_around_saved_and_continued(base, tmp_path, monkeypatch,
                                                                                 more):
    load = generate.load_policy

    def with_spare(*inputs, **options):
        model, tokenizer = load(*inputs, **options)
        model.model.layers[0].projector = WithSpare()
        return model, tokenizer

    monkeypatch.setattr(generate, "load_policy", with_spare)
    argv = ["--variant", "dpo", "--model", base, *SHORT, *more]
    sail_main([*argv, "--out", str(tmp_path / "whole")])
    out = shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    shutil.rmtree(out / "checkpoints/4")
    shutil.rmtree(out / "model")
    sail_main([*argv, "--out", str(out), "--resume"])
    assert rows_of(out) == rows_of(tmp_path / "whole")
    one, other = (load_file(path / "model/model.safetensors") for path in (out, tmp_path / "whole"))
    assert largest_difference(one, other) == 0 and any("projector" in name for name in one)


def test_gradients_that_are_missing_become_zeros_and_frozen_weights_get_none():
    model = tiny_model()
    model.spare, model.frozen = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), False)
    model(torch.tensor([[5, 6]])).logits.sum().backward()
    processes.sum_gradients(model)
    assert model.spare.grad.tolist() == [0, 0] and model.frozen.grad is None
    assert model.lm_head.weight.grad.abs().sum() > 0


# --- lengths

ROPE = {"longrope": dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[8.0] * 4, rope_theta=1e4,
                         original_max_position_embeddings=24),
        "dynamic": dict(rope_type="dynamic", factor=4.0, rope_theta=1e4, original_max_position_embeddings=24)}


@pytest.mark.parametrize("kind, limit", [("longrope", 24), ("dynamic", 24), ("default", 256)])
def test_a_model_whose_positions_depend_on_the_length_is_used_up_to_where_they_do(kind, limit, tmp_path):
    rope = ROPE.get(kind, dict(rope_type="default", rope_theta=1e4))
    tiny_model(rope_parameters=rope).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = load_policy(str(tmp_path), lengths=(limit - 8, 8))
    assert positions_of(model) == limit
    with pytest.raises(InputError, match=f"takes {limit} tokens"):
        load_policy(str(tmp_path), lengths=(limit - 7, 8))


def test_longrope_scores_what_was_sampled_within_its_limit_and_not_beyond():
    model, tokenizer = tiny_model(rope_parameters=ROPE["longrope"]), byte_tokenizer()
    differences = []
    for length in (12, 30):                                            # 10 tokens of prompt, then
        torch.manual_seed(0)
        logps = []
        seen = model.lm_head.register_forward_hook(
            lambda _, __, logits, logps=logps: logps.append(logits[0, -1].log_softmax(-1)))
        (response,), *_ = sample(model, tokenizer, [[5] * 10], length)
        seen.remove()
        sampled = sum(each[token] for each, token in zip(logps, response[0], strict=True))
        ids = torch.tensor([[5] * 10 + response[0]])
        mask = torch.tensor([[0] * 10 + [1] * len(response[0])])
        with torch.no_grad():
            scored = sequence_logps(model, ids, torch.ones_like(ids), mask)
            differences.append((scored - sampled).abs().item())
    assert differences[0] < 1e-4 < 1e-2 < differences[1]


def test_layer_types_may_have_positions_of_their_own():
    model = tiny_model("gemma3")
    assert {*model.config.rope_parameters} >= {"full_attention", "sliding_attention"}
    assert positions_of(model) == 256
    model.config.rope_parameters["full_attention"] = ROPE["longrope"]
    assert positions_of(model) == 24


# --- reward models

@pytest.fixture
def classifier(checkpoint, tmp_path):
    """A directory of a classifier that is stored in bfloat16 and whose template refuses one prompt."""
    path = tmp_path / "classifier"
    model, *_ = load_classifier(str(checkpoint), num_labels=1)
    model.bfloat16().save_pretrained(path)
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('not that') }}{% endif %}" + TEMPLATE
    byte_tokenizer(refusing).save_pretrained(path)
    return str(path)


def test_a_reward_model_in_bfloat16_is_run_in_float32(classifier):
    model, _, ids_of = load_classifier(classifier)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    scores = load_reward(classifier)(["Q"] * 60, [f"answer {i}" for i in range(60)])
    assert len({*scores}) == 60
    one_by_one = [load_reward(classifier)(["Q"], [f"answer {i}"])[0] for i in range(3)]
    assert scores[:3] == pytest.approx(one_by_one, abs=1e-5)


def test_a_row_that_the_reward_models_template_refuses_is_dropped_and_said_before_training_and_evaluation(
        classifier, base, tmp_path, monkeypatch, capsys):
    reward = load_reward(classifier)
    pairs = [Pair(prompt, "good", None) for prompt in ("yes", "no", "yes")]
    kept, account = drop_unscorable(pairs, reward)
    assert [pair.prompt for pair in kept] == ["yes", "yes"]
    assert account.dropped == {"reward model: refused by the chat template: not that": 1}
    assert drop_unscorable(pairs, None) == (pairs, Account()) and drop_unscorable([], reward)[0] == []
    with pytest.raises(InputError, match="^reward .*: a dialogue is refused by the chat template: not that$"):
        reward(["yes", "no"], ["good"] * 2)
    with pytest.raises(InputError, match="none of 1 pairs: 1 reward model: refused"):
        drop_unscorable(pairs[1:2], reward)
    rows = [{"prompt": "no" if i % 4 == 0 else f"q {i}", "chosen": "the soup", "rejected": "the tea"}
            for i in range(40)]
    out = tmp_path / "run"
    held_out = write(tmp_path / "y.jsonl", [{**row, "lang": "en"} for row in rows[:4]])
    sail_main(["--variant", "pr", "--model", base, "--data", write(tmp_path / "x.jsonl", rows), "--eval-data",
               held_out, "--reward", classifier, "--out", str(out), *SHORT, "--max-prompt-length", "40",
               "--eval-limit", "3"])
    reason = "reward model: refused by the chat template: not that"
    altered = ("  altered: {} prompts whose text the tokenizer changes, "                 # it has no "q"
               "{} responses whose text the tokenizer changes\n")
    account = (f"  dropped: 2 (1 beyond --eval-limit, 1 {reason})\n{altered.format(3, 6)}"
               "   unread: lang (4 rows)\n")
    said = capsys.readouterr().out
    assert f"x.jsonl: 30 pairs to train on\n  dropped: 10 (10 {reason})\n{altered.format(40, 80)}" in said
    assert f"y.jsonl: 2 pairs to evaluate on\n{account}" in said
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(out), "--eval-limit", "3"])
    evaluate.main()
    assert f"y.jsonl: 2 held-out pairs\n{account}" in capsys.readouterr().out
    dropped = json.loads((out / "args.json").read_text())["data_counts"]["dropped"]
    assert dropped == {reason: 10}
    assert rows_of(out, "eval")[-1]["prompts"] == 2


def test_dialogues_that_a_reward_model_cuts_are_counted(checkpoint, tmp_path, monkeypatch, capsys):
    model, tokenizer, _ = load_classifier(str(checkpoint), num_labels=1, max_length=12)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    pairs = [Pair("Q", "a" * n, "b" * m) for n, m in ((1, 1), (1, 30), (30, 1), (30, 30))]
    judge = load_reward(str(tmp_path))
    assert drop_unscorable(pairs, judge)[1].cut.total() == 3
    for lengths in ((30, 1), (1, 30), (1, 1)):                         # of the last call alone
        judge(["Q"] * 2, ["a" * length for length in lengths])
        assert judge.cut == [length == 30 for length in lengths]
    write(tmp_path / "answers.jsonl", [dict(prompt="Q", response="a" * n) for n in (1, 30, 30)])
    monkeypatch.setattr("sys.argv", ["reward.py", "--reward", str(tmp_path), "--responses",
                                     f"{tmp_path}/answers.jsonl", "--out", f"{tmp_path}/scored.jsonl"])
    reward.main()
    assert f"2 dialogues were longer than {tmp_path} takes, and were scored" in capsys.readouterr().out


# --- clocks

CLOCK = "{{ strftime_now('%d %b %Y') }}" + TEMPLATE


def test_a_template_that_reads_the_clock_is_told_one_date_on_all_days(tmp_path, checkpoint):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    byte_tokenizer(CLOCK).save_pretrained(path)
    assert render("Q", "A", load_tokenizer(str(path)))[0].startswith("26 Jul 2024<|user|>")


def test_each_script_tells_all_its_models_whether_their_code_may_run(
        classifier, checkpoint, tmp_path, monkeypatch):
    seen, original = [], data.load_tokenizer

    def watched(name, trust_remote_code=False, **options):
        seen.append(trust_remote_code)
        return original(name, trust_remote_code, **options)

    for module in (data, evaluate, generate, reward):
        monkeypatch.setattr(module, "load_tokenizer", watched)
    rows = [{"prompt": f"q {i // 2}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8)]
    pairs, out = write(tmp_path / "x.jsonl", rows), str(tmp_path / "run")
    model, answers = ["--model", str(checkpoint)], str(tmp_path / "answers.jsonl")
    lengths = ["--max-prompt-length", "40", "--max-response-length", "6"]
    for main, models, argv in (
            (sail.main, 2, [
                *model, "--data", pairs, "--eval-data", pairs, "--reward", classifier, *lengths,
                "--steps", "1", "--batch-size", "2", "--beta", "9", "--out", out]),
            (evaluate.main, 3, [out, "--out", str(tmp_path / "figures.json")]),
            (evaluate.main, 3, [out, "--compare", "--frontier", "100"]),
            (generate.main, 1, ["--model", out, "--out", answers]),
            (generate.main, 1, [*model, "--data", pairs, *lengths, "--out", answers]),
            (reward.main, 1, ["--reward", classifier, "--responses", answers, "--out",
                              f"{tmp_path}/scored.jsonl"]),
            (reward.main, 1, [
                "--train", *model, "--data", pairs, "--eval-data", pairs, "--out", str(tmp_path / "rm")])):
        monkeypatch.setattr("sys.argv", ["x.py", *argv, "--trust-remote-code"])
        main()
        assert seen == [True] * models, argv
        seen.clear()


# --- the text of a response

@pytest.mark.parametrize("end", [EOS, END, 2])                         # 2: as generation_config may name
def test_special_tokens_inside_a_response_stay_and_the_end_token_goes(end):
    tokenizer = byte_tokenizer()
    ids = tokenizer("thought<|assistant|> Hello!", add_special_tokens=False)["input_ids"]
    assert response_text(tokenizer, [*ids, end]) == "thought<|assistant|> Hello!"
    assert response_text(tokenizer, ids) == "thought<|assistant|> Hello!"             # unfinished
    assert response_text(tokenizer, []) == response_text(tokenizer, [end]) == ""


def test_a_tokenizer_that_can_parse_channels_says_what_the_answer_is():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>"]})
    tokenizer.response_template = {
        "start_anchor": "<|assistant|>",
        "defaults": {"role": "assistant"},
        "fields": {"thinking": {"open": "<|channel|>analysis<|message|>", "close": "<|assistant|>"},
                   "content": {"open": "<|channel|>final<|message|>", "close": "<eos>"}}}
    text = "<|channel|>analysis<|message|>The user greets.<|assistant|><|channel|>final<|message|>Hello!"
    assert response_text(tokenizer, tokenizer(text)["input_ids"]) == "Hello!"
    assert response_text(tokenizer, []) == ""
    tokenizer.response_template["fields"]["content"]["optional"] = False
    assert response_text(tokenizer, tokenizer("no channel")["input_ids"]) == "no channel"


def test_white_space_around_a_response_is_of_its_text():
    tokenizer = byte_tokenizer()
    assert response_text(tokenizer, tokenizer("\n a  b ")["input_ids"]) == "\n a  b "


# --- templates that cannot answer

def test_any_error_of_a_template_drops_the_row():
    for template in ("{{ 1 // 0 }}", "{{ messages[9].content }}", "{{ messages | first | sum }}"):
        with pytest.raises(BadRow, match="refused by the chat template"):
            render("Q", "A", byte_tokenizer(template))


def test_a_bad_template_is_told_by_the_count_of_its_rows():
    with pytest.raises(InputError, match="none of 2 prompts or .* 2 the chat template leaves"):
        encode([Pair("Q", "a", "b")] * 2, byte_tokenizer("fixed"), {1}, 9, 9)
