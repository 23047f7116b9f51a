"""A reward model of one's own: its loss, its calibration, and that what was trained is what is served."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TEMPLATE, byte_tokenizer, tiny_model

import data
import reward
from reward import bradley_terry_loss, calibration_error, load_reward, pair_figures
from sail import parse_args
from sail import train as train_policy


def dialogue(turn):
    return [{"role": "user", "content": turn}]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of pairs, which a word tells apart, in prompts and responses of many lengths."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}? " + "so " * (i % 7), "chosen": "yes" + "!" * (i % 5),
                                        "rejected": "no" + "!" * (i % 3)}) + "\n" for i in range(120)))
    return str(path)


def trained(monkeypatch, model, pairs, out, *more):
    """What `reward.py --train` makes: the model as it was in memory."""
    models, train = [], reward.train
    monkeypatch.setattr(reward, "train", lambda args: models.append(train(args)))
    monkeypatch.setattr("sys.argv", ["reward.py", "--train", "--model", str(model), "--data", pairs, "--out",
                                     str(out), "--learning-rate", "3e-3", "--batch-size", "16", *more])
    reward.main()
    monkeypatch.setattr(reward, "train", train)
    return models[0]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_loss_and_its_gradient_equal_hand_computed_values():
    chosen, rejected = (torch.tensor(values, requires_grad=True) for values in ([2.0, 0.0], [1.0, 0.0]))
    losses = bradley_terry_loss(chosen, rejected)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)])
    losses.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.e), -0.5])      # it goes up
    assert rejected.grad.tolist() == pytest.approx([1 / (1 + math.e), 0.5])


def test_the_calibration_error_equals_a_hand_computed_example():
    # Confidences 0.6 and 0.9, ten times each: bins hold two of the same. Of the ten at 0.6 bins are
    # right 2, 2, 1, 1, 0 times of 2; of those at 0.9 always.
    low, high = math.log(0.6 / 0.4), math.log(0.9 / 0.1)
    margins = [low] * 6 + [-low] * 4 + [high] * 10
    margins[4:8] = [low, -low, low, -low]
    expected = (2 * 0.4 + 2 * 0.1 + 0.6 + 5 * 0.1) / 10
    assert calibration_error(torch.tensor([margins]))[0].item() == pytest.approx(expected, abs=1e-6)
    shuffled = torch.tensor([margins])[:, torch.arange(20).view(2, 10).T.flatten()]
    assert calibration_error(shuffled)[0].item() == pytest.approx(expected, abs=1e-6)
    assert calibration_error(torch.zeros(1, 30))[0] == 0                          # all ties: ½, half the time


def test_confidence_is_folded_so_that_being_wrong_with_certainty_is_an_error_of_one():
    assert calibration_error(torch.full((1, 50), -20.0))[0].item() == pytest.approx(1)
    assert calibration_error(torch.full((1, 50), 20.0))[0].item() == pytest.approx(0, abs=1e-6)


def test_a_calibrated_set_has_nearly_no_calibration_error_and_a_twice_too_sure_one_has():
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randn(3000, generator=generator).abs() * 2
    right = torch.rand(3000, generator=generator) < torch.sigmoid(sizes)
    margins = torch.where(right, sizes, -sizes)
    figures = pair_figures(margins.tolist())
    value, (by_chance, low, high) = figures["calibration_error"][0], figures["if_calibrated"]
    assert low < value < high < 0.03 and 0.01 < by_chance < 0.02
    assert sum(figures["calibration_error"][1:]) / 2 == pytest.approx(value, abs=0.002)     # it is centred
    figures = pair_figures((2 * margins).tolist())
    assert figures["calibration_error"][1] > 0.05 > figures["if_calibrated"][2]


def test_the_figures_of_pairs_equal_hand_computed_values():
    figures = pair_figures([1.0, -1.0, 0.0, 2.0])
    losses = [math.log(1 + math.exp(-margin)) for margin in (1, -1, 0, 2)]
    assert figures["accuracy"][0] == 2.5 / 4 and figures["margin"][0] == 0.5
    assert figures["loss"][0] == pytest.approx(sum(losses) / 4)
    assert all(low <= value <= high for value, low, high in figures.values())


def test_training_learns_to_prefer_the_chosen_and_says_so(monkeypatch, checkpoint, pairs, tmp_path, capsys):
    trained(monkeypatch, checkpoint, pairs, tmp_path, "--epochs", "3")
    (before, after), steps = lines(tmp_path / "eval.jsonl"), lines(tmp_path / "metrics.jsonl")
    assert (before["step"], after["step"]) == (0, len(steps)) and after["loss"] < 0.3 < before["loss"]
    assert after["accuracy"] > 0.9 and after["margin"] > 1 and steps[-1]["accuracy"] > 0.9
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=0.3) and steps[-1]["loss"] < 0.3
    rates = [step["learning_rate"] for step in steps]
    assert rates[0] < 3e-3 and rates[-1] == 3e-3 and set(steps[0]) == {
        "step", "loss", "accuracy", "margin", "grad_norm", "learning_rate"}
    score = load_reward(str(tmp_path))
    assert score(["7? "], ["yes!"]) > score(["7? "], ["no!"])
    assert f"eval {len(steps)} | accuracy {after['accuracy']:.3f} ± " in capsys.readouterr().out
    assert json.loads((tmp_path / "args.json").read_text())["learning_rate"] == 3e-3


@pytest.mark.parametrize("template, pad, pad_id, kind", [
    (TEMPLATE, "<pad>", 0, "llama"), (None, "<pad>", 0, "gpt2"), (TEMPLATE, "<eos>", 1, "gpt2"),
    (TEMPLATE, None, 1, "llama")])
def test_scores_served_equal_scores_trained_in_any_company(template, pad, pad_id, kind, monkeypatch, pairs,
                                                           tmp_path):
    tokenizer, model = byte_tokenizer(template), tiny_model(kind)
    tokenizer.pad_token, model.config.pad_token_id = pad, None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    inside = trained(monkeypatch, tmp_path / "base", pairs, tmp_path / "out", "--limit", "40",
                     "--max-length", "48")
    assert json.loads((tmp_path / "out/config.json").read_text())["pad_token_id"] == pad_id
    prompts = ["Q", dialogue("Q"), "other", "long " * 30, dialogue("Z")]
    responses = ["yes", " yes ", "a longer answer than that", "no way " * 9, "\0\0"]
    ids_of = reward.classifier_ids(inside, tokenizer.from_pretrained(tmp_path / "out"), "out")
    score, scores = load_reward(str(tmp_path / "out")), []
    for prompt, response in zip(prompts, responses):
        ids = ids_of(prompt, response)
        assert len(ids) <= 48
        with torch.no_grad():                              # alone: no padding
            scores.append(inside(input_ids=torch.tensor([ids])).logits.item())
    assert score(prompts, responses) == pytest.approx(scores, abs=1e-5)
    assert [score([prompt], [response])[0] for prompt, response in zip(prompts, responses)
            ] == pytest.approx(scores, abs=1e-5)
    assert len({round(value, 4) for value in scores}) >= 4


def test_a_space_around_a_response_is_not_read_as_samples_have_none(checkpoint):
    for tokenizer in (byte_tokenizer(), byte_tokenizer(TEMPLATE)):
        ids_of = reward.classifier_ids(tiny_model(), tokenizer, "checkpoint")
        assert ids_of("Q", " yes\n") == ids_of(dialogue("Q"), "yes") != ids_of("Q", "no")


def encoder(path):
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(
        vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, max_position_embeddings=64, initializer_range=0.5)).save_pretrained(path)


@pytest.mark.parametrize("kind", ["decoder", "decoder without pad", "encoder"])
def test_padding_and_batch_mates_do_not_move_the_loss(kind, checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    if kind == "encoder":
        encoder(path)
    model, _ = reward.load_trainee(str(path), seed=0)
    if kind == "decoder without pad":
        model.config.pad_token_id = None
    rows = [[5, 6, 7], [5] * 9, [*range(5, 60)], [5, 6, 1], [5, 0]]
    together = reward.classifier_logits(model, rows)
    alone = torch.cat([reward.classifier_logits(model, [row]) for row in rows])
    assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-5)
    if kind == "decoder without pad":                      # a row may end in what padded the others
        assert model.config.pad_token_id is None
    head = list(model.parameters())[-1]
    gradients = [torch.autograd.grad(scores.sum(), head)[0] for scores in (together, alone)]
    assert torch.allclose(*gradients, atol=1e-4) and gradients[0].abs().max() > 0.1


def test_one_seed_gives_one_model_bit_for_bit_and_another_seed_another(monkeypatch, checkpoint, pairs,
                                                                       tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        torch.rand(len(name) + int(seed))                  # a global random state of its own
        trained(monkeypatch, checkpoint, pairs, tmp_path / name, "--limit", "40", "--seed", seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in "abc"]
    assert weights[0] == weights[1] != weights[2] and logs[0] == logs[1] != logs[2]


def test_a_reward_model_is_trained_on_from_its_own_head(monkeypatch, checkpoint, pairs, tmp_path):
    trained(monkeypatch, checkpoint, pairs, tmp_path / "first", "--epochs", "3")
    last = lines(tmp_path / "first/eval.jsonl")[1]
    for name in ("second", "third"):
        trained(monkeypatch, tmp_path / "first", pairs, tmp_path / name, "--seed", str(len(name)))
        assert lines(tmp_path / name / "eval.jsonl")[0] == {**last, "step": 0}
    one, other = (lines(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("second", "third"))
    assert one != other                                    # the seed orders the pairs


def test_the_figures_are_of_the_held_out_pairs(monkeypatch, checkpoint, pairs, tmp_path):
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in lines(Path(pairs))]
    (tmp_path / "reversed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained(monkeypatch, checkpoint, pairs, tmp_path / "out", "--epochs", "3", "--eval-data",
            str(tmp_path / "reversed.jsonl"))
    assert lines(tmp_path / "out/eval.jsonl")[1]["accuracy"] < 0.1


def test_weights_are_float32_whatever_the_checkpoints_are(monkeypatch, checkpoint, pairs, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    tiny_model().bfloat16().save_pretrained(path)
    model = trained(monkeypatch, path, pairs, tmp_path / "out", "--limit", "40")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


def test_dropout_is_off(monkeypatch, pairs, tmp_path):
    for part in (tiny_model("gpt2", resid_pdrop=0.9, embd_pdrop=0.9, attn_pdrop=0.9), byte_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    model = trained(monkeypatch, tmp_path / "base", pairs, tmp_path / "out", "--epochs", "3")
    assert not model.training and lines(tmp_path / "out/metrics.jsonl")[-1]["loss"] < 0.3


def test_pairs_whose_difference_is_cut_off_are_dropped_and_counted(monkeypatch, checkpoint, tmp_path, capsys):
    rows = [{"prompt": "Q", "chosen": "yes" + "." * 40 * (i < 30), "rejected": "nope" + "." * 40 * (i < 30)}
            for i in range(40)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(tmp_path / "x.jsonl", tmp_path / "y.jsonl")
    trained(monkeypatch, checkpoint, str(tmp_path / "x.jsonl"), tmp_path / "out", "--max-length", "20",
            "--eval-data", str(tmp_path / "y.jsonl"))
    said = capsys.readouterr().out
    assert "10 pairs to train on, 10 to evaluate on; dropped: 60 same tokens in both responses" in said


def test_sail_pr_runs_with_the_directory_as_its_reward(monkeypatch, base, tmp_path):
    trained(monkeypatch, base, "toy", tmp_path / "rm", "--limit", "64")
    train_policy(parse_args(["--variant", "pr", "--model", base, "--reward", str(tmp_path / "rm"), "--steps",
                             "2", "--eval-limit", "4", "--out", str(tmp_path / "pr")]))
    assert all(math.isfinite(step["reward"]) for step in lines(tmp_path / "pr/metrics.jsonl"))


def test_the_toys_sft_model_is_a_start(monkeypatch, base, tmp_path):
    monkeypatch.setattr(reward, "toy_checkpoint", lambda: base)
    trained(monkeypatch, "toy", "toy", tmp_path, "--limit", "64")
    assert len(lines(tmp_path / "metrics.jsonl")) == 4 and len(lines(tmp_path / "eval.jsonl")) == 2


def complaint(argv, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["reward.py", *argv])
    with pytest.raises(SystemExit) as stop:
        data.command_line(reward.main)
    errors = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("reward.py: error: "), errors
    return errors[0]


def remove_weight(path):
    from safetensors.torch import load_file, save_file
    weights = load_file(path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def two_logits(path):
    from transformers import AutoModelForSequenceClassification
    AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).save_pretrained(path)


@pytest.mark.parametrize("break_it, message", [
    (remove_weight, "lacks the weights model.norm.weight; want"), (shutil.rmtree, "no tokenizer to load"),
    (two_logits, "no model for SequenceClassification to load"),
    (lambda path: (path / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
     "is an adapter; merge it"),
    (lambda path: tiny_model(vocab_size=50).save_pretrained(path), "wrong tokenizer?"),
    (lambda path: byte_tokenizer("{{ raise_exception('no') }}").save_pretrained(path),
     "none of 115 pairs can be told apart (115 refused by the chat template)")],
    ids=["missing weight", "no directory", "two logits", "adapter", "small vocabulary", "refusing template"])
def test_a_start_that_cannot_be_trained_is_named(break_it, message, checkpoint, pairs, tmp_path, monkeypatch,
                                                 capsys):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    break_it(path)
    argv = ["--train", "--model", str(path), "--data", pairs, "--out", str(tmp_path / "out")]
    assert message in complaint(argv, monkeypatch, capsys) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, message", [
    (["--train", "--data", "absent.jsonl"], "absent.jsonl: no such file"),
    (["--train", "--epochs", "0"], "--epochs: 0 is not in 1"),
    (["--train", "--learning-rate", "nan"], "--learning-rate: nan is not in"),
    (["--train", "--reward", "toy"], "--train: learns from --data; leave --reward"),
    (["--max-length", "many"], "invalid int value: 'many'")])
def test_bad_flags_are_named(argv, message, monkeypatch, capsys):
    assert message in complaint(argv, monkeypatch, capsys)


def test_a_loss_that_is_not_finite_stops_with_one_line_and_saves_nothing(checkpoint, pairs, tmp_path,
                                                                         monkeypatch, capsys):
    monkeypatch.setattr(reward, "bradley_terry_loss", lambda chosen, rejected: (chosen - rejected) * math.nan)
    argv = ["--train", "--model", str(checkpoint), "--data", pairs, "--out", str(tmp_path)]
    assert "step 1: loss or gradient not finite" in complaint(argv, monkeypatch, capsys)
    assert not (tmp_path / "model.safetensors").exists()
