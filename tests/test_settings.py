"""Settings: declared once. Flags, checks and refusals follow from the declarations."""
import argparse
import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from conftest import sail_args, tiny_model
from test_errors import fails

import data
import evaluate
import reward
import sail
from data import Pair, Reported
from evaluate import Evaluated
from generate import Answers
from reward import Reward, RewardSettings, label_by_reward
from runtime.settings import (
    Parser, converter, flag_of, kind_of, may_change, read_run, read_settings, setting)
from sail import VARIANTS, Arguments, Method, draw_pairs, parse_args, preference_losses, sft_losses

MINE = ["--data", "x.jsonl", "--model", "m", "--reward", "mine.py:score"]
CHANGED = {"preference": "hard", "mix": 0.6, "response_coef": 0.7, "label_coef": 0.9, "beta": 0.3,
           "loss_type": "hinge", "nll_coef": 0.4, "revkl_coef": 0.5}
FLAGS = [field.name for field in dataclasses.fields(Method) if field.metadata["help"]]


def examples():
    """Six encoded pairs of random tokens."""
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for _ in range(6):
        prompt, chosen, rejected = torch.randint(5, 261, (3, 4), generator=generator).tolist()
        pairs.append(Pair("Q", str(chosen), str(rejected), prompt, chosen, rejected))
    return pairs


def gradient(variant, **changed):
    """What a step on the variant back-propagates: pairs drawn, labelled and scored under these settings."""
    declared = VARIANTS[variant]
    method = Method(**{"variant": variant, "mix": declared.mix, "response_coef": declared.response_coef,
                       "label_coef": declared.label_coef, **changed})
    policy, reference = tiny_model(seed=1), tiny_model(seed=2)
    data_pairs, variant_pairs = draw_pairs(examples(), 1, 60, 1, method, 0)      # whole epochs of either kind
    for side in declared.sampled:                          # as a rollout would replace them
        variant_pairs = [replace(pair, **{f"{side}_ids": [len(side), 9, 1]}) for pair in variant_pairs]
    if declared.label == "reward":
        by_length = Reward("length", lambda prompts, responses: [len(each) / 9 for each in responses])
        label_by_reward(variant_pairs, by_length, method.preference)
    pairs = data_pairs + variant_pairs
    if declared.likelihood:
        losses, _ = sft_losses(policy, pairs)
    else:
        losses, _ = preference_losses(policy, reference, pairs, method, baseline=-0.4)
    losses.mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_setting_is_refused_on_a_variant_exactly_if_it_has_no_effect_there(
        variant, name, monkeypatch, capsys):
    has_effect = not torch.allclose(gradient(variant), gradient(variant, **{name: CHANGED[name]}), atol=1e-6)
    argv = ["--variant", variant, *MINE, flag_of(name), str(CHANGED[name])]
    if has_effect:
        assert getattr(parse_args(argv), name) == CHANGED[name]
    else:
        message = fails(sail.main, ["sail.py", *argv], monkeypatch, capsys)
        assert f"argument {flag_of(name)}: has no effect on --variant {variant}" in message


def test_the_settings_of_the_method_are_all_tried():
    assert {*FLAGS} == {*CHANGED, "variant", "reference", "reward"}
    assert "reference" in VARIANTS["sft"].unused and "reward" not in VARIANTS["sft"].unused


def test_there_are_at_most_36_flags():
    flags = [field.name for field in dataclasses.fields(Arguments) if field.metadata["help"]]
    assert len(flags) == len({*flags}) <= 36


def test_flags_may_be_written_with_underscores():
    args = parse_args(["--max_response_length=7", *MINE, "--eval_limit", "3"])
    assert (args.max_response_length, args.eval_limit) == (7, 3)


def test_settings_that_are_no_flags_are_set_by_name(capsys):
    assert parse_args(MINE, warmup_steps=0).warmup_steps == 0
    with pytest.raises(SystemExit):
        parse_args([*MINE, "--warmup-steps", "0"])
    assert "unrecognized arguments: --warmup-steps 0" in capsys.readouterr().err


@pytest.mark.parametrize("more, said", [
    (["--overwrite", "--resume"], "--overwrite: deletes what --resume continues; give only one of"),
    (["--mix", "1", "--nll-coef", "1"], "--nll-coef: has no effect at mix 1"),
    (["--steps", "2", "--epochs", "5"], "--epochs: has no effect with --steps"),
    (["--preference", "loud"], "--preference: loud is neither soft nor hard")])
def test_settings_that_do_not_go_together_are_refused(more, said, monkeypatch, capsys):
    assert said in fails(sail.main, ["sail.py", *MINE, *more], monkeypatch, capsys)


def test_a_variant_that_labels_no_pair_needs_no_reward():
    assert parse_args(["--variant", "pr", "--mix", "0", "--data", "x.jsonl", "--model", "m"]).reward is None


@pytest.mark.parametrize("argv, said", [
    (["--train", "--model", "m", "--data", "d", "--responses", "r"], "--responses: has no effect with "),
    (["--reward", "r", "--epochs", "2"], "--epochs: has no effect without --train"),
    (["--reward", "r", "--sample-batch-size", "2"], "unrecognized arguments: --sample-batch-size")])
def test_flags_of_the_other_half_of_reward_are_refused(argv, said, monkeypatch, capsys):
    assert said in fails(reward.main, ["reward.py", *argv], monkeypatch, capsys)


@pytest.mark.parametrize("main, argv, said", [
    (data.main, ["x.jsonl", "--max-response-length", "3"],
     "--max-response-length: has no effect without --model"),
    (evaluate.main, ["run", "--compare", "--beta", "9"], "--beta: has no effect with --compare"),
    (evaluate.main, ["run", "--preference", "hard"], "--preference: hard is no FILE.py:FUNCTION")])
def test_flags_without_an_effect_are_refused(main, argv, said, monkeypatch, capsys):
    assert said in fails(main, ["x.py", *argv], monkeypatch, capsys)


@pytest.mark.parametrize("name, value, said", [
    ("beta", "warm", "--beta: could not convert string to float: 'warm'"),
    ("beta", -1, "--beta: -1 is not in"),
    ("dtype", "float8", "--dtype: invalid choice: 'float8'"),
    ("eval_limit", 0, "--eval-limit: 0 is not in 1")])
def test_settings_of_a_run_are_read_back_by_the_same_declarations(name, value, said, tmp_path):
    file = tmp_path / "args.json"
    file.write_text(json.dumps({"beta": 0.3, "dtype": "bfloat16", "eval_limit": None, "eval_every": 0,
                                "other": 1}))
    names = ("beta", "dtype", "eval_limit", "eval_every")
    assert read_settings(file, Arguments, *names) == {"beta": 0.3, "dtype": "bfloat16", "eval_every": 0}
    file.write_text(json.dumps({name: value}))
    with pytest.raises(sail.InputError, match=f"args.json: argument {said}"):
        read_settings(file, Arguments, *names)


@pytest.mark.parametrize("cls", [Arguments, RewardSettings, Evaluated, Answers, Reported])
def test_every_number_of_things_is_at_least_one(cls):
    counts = [field for field in dataclasses.fields(cls) if kind_of(cls, field.name) is int
              and field.name not in ("seed", "eval_every", "warmup_steps")]
    assert len(counts) > 2
    for field in counts:
        assert converter(cls, field)("1") == 1
        with pytest.raises(argparse.ArgumentTypeError, match="0 is not in 1"):
            converter(cls, field)("0")


def test_a_directory_without_settings_is_a_model_also_beside_another(tmp_path):
    (tmp_path / "model").mkdir()
    assert read_run(tmp_path, Arguments, "beta") == (str(tmp_path), {})
    (tmp_path / "args.json").write_text('{"beta": 0.3}')
    assert read_run(tmp_path, Arguments, "beta") == (str(tmp_path / "model"), {"beta": 0.3})


def test_the_help_names_each_default_once_from_its_declaration():
    @dataclasses.dataclass
    class Mine:
        rate: float = setting(0.25, "how fast")
        many: int | None = setting(None, "how many (all)", low=1)

    parser = Parser("Mine.")
    parser.add_settings(Mine)
    text = " ".join(parser.format_help().split())
    assert "how fast (0.25)" in text and "how many (all)" in text
    assert vars(parser.parse_args([])) == {}


def test_a_resumed_run_may_change_only_what_changes_no_figure():
    assert set(may_change(Arguments())) == {*may_change(RewardSettings())} == {
        "micro_batch_size", "gradient_checkpointing", "shard", "out", "save_every", "resume", "overwrite",
        "may_change"}


def test_an_underscore_in_a_value_stays():
    given = sail_args(["--variant", "dpo", "--model", "my_model", "--data=my_file.jsonl"])
    assert (given.model, given.data) == ("my_model", "my_file.jsonl")


@pytest.mark.parametrize("more, rate", [
    (["--variant", "sft"], 2e-5), (["--variant", "sft", "--lora", "8"], 2e-5),
    (["--variant", "dpo", "--lora", "8"], 1e-5), (["--variant", "dpo"], 1e-6),
    (["--variant", "dpo", "--lora", "8", "--learning-rate", "0.5"], 0.5)])
def test_an_adapter_has_the_higher_learning_rate_of_its_own_and_the_variants(more, rate):
    assert sail_args([*more, "--model", "M", "--data", "D"]).learning_rate == rate
