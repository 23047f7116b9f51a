"""A reward model of one's own: its loss, its figures, and that what was trained is what is served."""
import gc
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import IDS, TEMPLATE, as_settings, byte_tokenizer, sail_main, tiny_model
from test_errors import fails
from test_scale import rows_of

import reward
from reward import load_classifier, load_reward
from runtime.intervals import along_label, prefers_chosen
from reward import bradley_terry_loss

TRAINEE = dict(num_labels=1)                               # of a classifier that is to be trained


def dialogue(turn):
    return [{"role": "user", "content": turn}]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of pairs, two to each prompt, which a word tells apart, in prompts and responses of many
    lengths."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    return write(path, [{"prompt": f"{i // 2}? " + "so " * (i // 2 % 7), "chosen": "yes" + "!" * (i % 5),
                         "rejected": "no" + "!" * (i % 3)} for i in range(40, 160)])


def trained(monkeypatch, model, pairs, out, *more):
    """What `reward.py --train` makes: the model as it was in memory."""
    models, train = [], reward.train_reward
    monkeypatch.setattr(reward, "train_reward", lambda args: models.append(train(args)))
    flags, chosen = as_settings(["--train", "--model", model, "--data", pairs, "--out", out,
                                 "--learning-rate", "3e-3", "--batch-size", "16", *more])
    reward.main(flags, **chosen)
    monkeypatch.setattr(reward, "train_reward", train)
    return models[0]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_loss_and_its_gradient_equal_hand_computed_values():
    chosen, rejected = (torch.tensor(values, requires_grad=True) for values in ([2.0, 0.0], [1.0, 0.0]))
    losses = bradley_terry_loss(chosen, rejected)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-1)), math.log(2)])
    losses.sum().backward()
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.e), -0.5])      # it goes up
    assert rejected.grad.tolist() == pytest.approx([1 / (1 + math.e), 0.5])


def test_a_tie_is_half_right_and_a_soft_label_agrees_with_its_probability():
    margins = torch.tensor([2.0, 0.0, -1.0])
    assert prefers_chosen(margins).tolist() == [1.0, 0.5, 0.0]
    along, agreeing = along_label(margins, torch.full((3,), 0.75))
    assert along.tolist() == [1.0, 0.0, -0.5] and agreeing.tolist() == [0.75, 0.5, 0.25]


def test_a_file_with_its_responses_exchanged_and_a_preference_of_0_trains_the_same_model(
        monkeypatch, checkpoint, tmp_path):
    rows = [{"prompt": f"Q{i}", "chosen": "yes" + "!" * i, "rejected": "nope" + "." * i} for i in range(8)]
    exchanged = [dict(row, chosen=row["rejected"], rejected=row["chosen"], preference=0) for row in rows]
    logs = []
    for name, source in (("as-it-is", rows), ("exchanged", exchanged)):
        path = write(tmp_path / f"{name}.jsonl", source)
        trained(monkeypatch, checkpoint, path, tmp_path / name, "--eval-data", path)
        metrics = lines(tmp_path / name / "metrics.jsonl")
        logs.append([[(row["loss"], row["accuracy"], row["margin"]) for row in metrics],
                     lines(tmp_path / name / "eval.jsonl")])
    assert logs[0] == logs[1]


def test_training_learns_to_prefer_the_chosen_and_says_so(monkeypatch, checkpoint, pairs, tmp_path, capsys):
    trained(monkeypatch, checkpoint, pairs, tmp_path, "--epochs", "3")
    (before, after), steps = lines(tmp_path / "eval.jsonl"), lines(tmp_path / "metrics.jsonl")
    assert (before["step"], after["step"]) == (0, len(steps)) and after["loss"] < 0.3 < before["loss"]
    assert after["accuracy"] > 0.9 and after["margin"] > 1 and steps[-1]["accuracy"] > 0.9
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=0.3) and steps[-1]["loss"] < 0.3
    rates = [step["learning_rate"] for step in steps]
    assert rates[0] < 3e-3 and rates[-1] == 3e-3 and set(steps[0]) == {
        "step", "loss", "accuracy", "margin", "grad_norm", "learning_rate", "skipped", "seconds"}
    score = load_reward(str(tmp_path / "model"))
    assert score(["7? "], ["yes!"]) > score(["7? "], ["no!"])
    assert f"eval {len(steps)} | accuracy 1.000 [0.68, 1.00] | loss " in capsys.readouterr().out
    assert json.loads((tmp_path / "args.json").read_text())["learning_rate"] == 3e-3


@pytest.mark.parametrize("template, pad, pad_id, kind, positions, flags", [
    (TEMPLATE, "<pad>", 0, "llama", 256, ["--max-length", "48"]), (None, "<pad>", 0, "gpt2", 48, []),
    (TEMPLATE, "<eos>", 1, "gpt2", 256, ["--max-length", "48"]), (TEMPLATE, None, 1, "llama", 48, [])])
def test_scores_served_equal_scores_trained_in_any_company(template, pad, pad_id, kind, positions, flags,
                                                           monkeypatch, pairs, tmp_path):
    """Dialogues are cut to 48 tokens, by the flag or because the model has no more positions."""
    tokenizer, model = byte_tokenizer(template), tiny_model(kind, max_position_embeddings=positions)
    tokenizer.pad_token, model.config.pad_token_id = pad, None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    inside = trained(monkeypatch, tmp_path / "base", pairs, tmp_path / "out", "--limit", "40", *flags)
    assert json.loads((tmp_path / "out/model/config.json").read_text())["pad_token_id"] == pad_id
    prompts = ["Q", dialogue("Q"), "other", "long " * 30, dialogue("Z")]
    responses = ["yes", " yes ", "a longer answer than that", "no way " * 9, "\0\0"]
    served = str(tmp_path / "out/model")
    (_, _, ids_of), score, scores = load_classifier(served), load_reward(served), []
    for prompt, response in zip(prompts, responses, strict=True):
        ids, _ = ids_of(prompt, response)
        assert len(ids) <= 48
        with torch.no_grad():                              # alone: no padding
            scores.append(inside(input_ids=torch.tensor([ids])).logits.item())
    assert score(prompts, responses) == pytest.approx(scores, abs=1e-5)
    assert [score([prompt], [response])[0] for prompt, response in zip(prompts, responses, strict=True)
            ] == pytest.approx(scores, abs=1e-5)
    assert len({round(value, 4) for value in scores}) >= 4


def test_a_space_around_a_response_is_read_as_it_is_trained(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    for template in (TEMPLATE, None):
        (path / "chat_template.jinja").unlink(missing_ok=True)
        byte_tokenizer(template).save_pretrained(path)
        _, tokenizer, ids_of = load_classifier(str(path), **TRAINEE)
        assert tokenizer.chat_template == template
        assert ids_of("Q", "yes") == ids_of(dialogue("Q"), "yes") != ids_of("Q", " yes\n")


def test_a_reward_model_is_trained_and_served_with_the_template_that_is_given(
        checkpoint, pairs, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.jinja").write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    trained(monkeypatch, checkpoint, pairs, tmp_path / "out", "--limit", "40", "--steps", "1",
            "--chat-template", str(tmp_path / "mine.jinja"))
    assert f"chat template: {tmp_path}/mine.jinja" in capsys.readouterr().out
    _, tokenizer, ids_of = load_classifier(str(tmp_path / "out/model"))
    assert tokenizer.decode(ids_of("Q", "yes")[0]) == "<Q><yes>"


def encoder(path):
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(
        vocab_size=IDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, max_position_embeddings=64, initializer_range=0.5)).save_pretrained(path)


@pytest.mark.parametrize("kind", ["decoder", "decoder without pad", "encoder"])
def test_padding_and_batch_mates_do_not_move_the_loss(kind, checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    if kind == "encoder":
        encoder(path)
    torch.manual_seed(0)
    model, *_ = load_classifier(str(path), **TRAINEE)
    if kind == "decoder without pad":
        model.config.pad_token_id = None
    rows = [[5, 6, 7], [5] * 9, [*range(5, 60)], [5, 6, 1], [5, 0]]
    together = reward.classifier_logits(model, rows)
    alone = torch.cat([reward.classifier_logits(model, [row]) for row in rows])
    assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-5)
    if kind == "decoder without pad":                      # a row may end in what pads others
        assert model.config.pad_token_id is None
        each = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])   # at the true end
        assert together.tolist() == pytest.approx(each.tolist(), abs=1e-5)
    head = list(model.parameters())[-1]
    gradients = [torch.autograd.grad(scores.sum(), head)[0] for scores in (together, alone)]
    assert torch.allclose(*gradients, atol=1e-4) and gradients[0].abs().max() > 0.1


def test_one_seed_gives_one_model_bit_for_bit_and_another_seed_another(monkeypatch, checkpoint, pairs,
                                                                       tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        torch.rand(len(name) + int(seed))                  # a global random state of its own
        trained(monkeypatch, checkpoint, pairs, tmp_path / name, "--limit", "40", "--seed", seed)
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in "abc"]
    logs = [rows_of(tmp_path / name) for name in "abc"]
    assert weights[0] == weights[1] != weights[2] and logs[0] == logs[1] != logs[2]


def test_a_reward_model_is_trained_on_from_its_own_head(monkeypatch, checkpoint, pairs, tmp_path):
    trained(monkeypatch, checkpoint, pairs, tmp_path / "first", "--epochs", "3")
    last = lines(tmp_path / "first/eval.jsonl")[1]
    for name in ("second", "third"):
        trained(monkeypatch, tmp_path / "first/model", pairs, tmp_path / name, "--seed", str(len(name)))
        assert lines(tmp_path / name / "eval.jsonl")[0] == {**last, "step": 0}
    one, other = (lines(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("second", "third"))
    assert one != other                                    # the seed orders the pairs


def test_the_figures_are_of_the_held_out_pairs(monkeypatch, checkpoint, pairs, tmp_path):
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in lines(Path(pairs))]
    write(tmp_path / "reversed.jsonl", rows)
    trained(monkeypatch, checkpoint, pairs, tmp_path / "out", "--epochs", "3", "--eval-data",
            str(tmp_path / "reversed.jsonl"))
    score, figures = load_reward(str(tmp_path / "out/model")), lines(tmp_path / "out/eval.jsonl")[1]
    ours, theirs = (torch.tensor(score([row["prompt"] for row in rows], [row[side] for row in rows]))
                    for side in ("chosen", "rejected"))
    assert figures["accuracy"] == pytest.approx((ours > theirs).float().mean().item())
    assert figures["accuracy"] < 0.1
    assert figures["margin"] == pytest.approx((ours - theirs).mean().item(), abs=1e-4)
    assert figures["loss"] == pytest.approx(bradley_terry_loss(ours, theirs).mean().item(), abs=1e-4)
    assert all(figures[f"{name}_interval"][0] < figures[name] < figures[f"{name}_interval"][1]
               for name in ("loss", "margin"))


def test_weights_are_float32_whatever_the_checkpoints_are(monkeypatch, checkpoint, pairs, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    tiny_model().bfloat16().save_pretrained(path)
    model = trained(monkeypatch, path, pairs, tmp_path / "out", "--limit", "40")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "out/model/config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("more", [[], ["--gradient-checkpointing"]])   # for which it is in train mode
def test_dropout_is_off(more, monkeypatch, pairs, tmp_path):
    for part in (tiny_model("gpt2", resid_pdrop=0.9, embd_pdrop=0.9, attn_pdrop=0.9), byte_tokenizer()):
        part.save_pretrained(tmp_path / "base")
    model = trained(monkeypatch, tmp_path / "base", pairs, tmp_path / "out", "--epochs", "3", *more)
    assert not model.training and lines(tmp_path / "out/metrics.jsonl")[-1]["loss"] < 0.3


def test_pairs_whose_difference_is_cut_off_are_dropped_and_counted(monkeypatch, checkpoint, tmp_path, capsys):
    rows = [{"prompt": "Q", "chosen": "yes" + "." * 40 * (i < 30), "rejected": "nope" + "." * 40 * (i < 30)}
            for i in range(40)]
    source = write(tmp_path / "x.jsonl", rows)
    trained(monkeypatch, checkpoint, source, tmp_path / "out", "--max-length", "20", "--eval-data", source)
    said = capsys.readouterr().out
    account = ("  dropped: 30 (30 same tokens in both responses)\n"
               "      cut: 60 dialogues longer than the model takes, from the left\n")
    assert f"10 pairs to train on\n{account}" in said
    assert f"10 pairs to evaluate on\n{account}" in said


def test_prompts_without_responses_are_refused(monkeypatch, checkpoint, pairs, tmp_path, capsys):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"{i}?"} for i in range(40)])
    for data, held_out in ((prompts, pairs), (pairs, prompts)):
        argv = ["reward.py", "--train", "--model", str(checkpoint), "--data", data, "--eval-data", held_out]
        assert "a reward model needs pairs" in fails(reward.main, argv, monkeypatch, capsys)


def test_sail_pr_runs_with_what_was_trained_as_its_reward(monkeypatch, base, tmp_path):
    trained(monkeypatch, base, f"{base}/toy-pairs.jsonl", tmp_path / "rm", "--limit", "64")
    sail_main(["--variant", "pr", "--model", base, "--reward", str(tmp_path / "rm/model"), "--steps", "2",
               "--eval-limit", "4", "--out", str(tmp_path / "pr")])
    assert all(math.isfinite(step["reward"]) for step in lines(tmp_path / "pr/metrics.jsonl"))


def remove_weight(path):
    from safetensors.torch import load_file, save_file
    weights = load_file(path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def two_logits(path):
    from transformers import AutoModelForSequenceClassification
    AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).save_pretrained(path)


@pytest.mark.parametrize("break_it, message", [
    (remove_weight, "model needs, such as model.norm.weight; give"), (shutil.rmtree, "no such directory"),
    (two_logits, "cannot be loaded as a SequenceClassification model"),
    (lambda path: (path / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
     "is an adapter; merge it"),
    (lambda path: tiny_model(vocab_size=50).save_pretrained(path), "and the model only 50 ids"),
    (lambda path: byte_tokenizer("{{ raise_exception('no') }}").save_pretrained(path),
     "none of 112 pairs can be used for training (112 refused by the chat template: no)")],
    ids=["missing weight", "no directory", "two logits", "adapter", "small vocabulary", "refusing template"])
def test_a_start_that_cannot_be_trained_is_named(break_it, message, checkpoint, pairs, tmp_path, monkeypatch,
                                                 capsys):
    path = shutil.copytree(checkpoint, tmp_path / "model")
    break_it(path)
    argv = ["reward.py", "--train", "--model", str(path), "--data", pairs, "--out", str(tmp_path / "out")]
    assert message in fails(reward.main, argv, monkeypatch, capsys) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, message", [
    (["--data", "absent.jsonl"], "absent.jsonl: no such file"),
    (["--epochs", "0"], "--epochs: 0 is not in 1")])
def test_bad_flags_are_named(argv, message, checkpoint, monkeypatch, capsys):
    argv = ["reward.py", "--train", "--model", str(checkpoint), "--data", "d.jsonl", *argv]
    assert message in fails(reward.main, argv, monkeypatch, capsys)


def test_ten_losses_that_are_not_finite_stop_with_one_line_and_no_model(checkpoint, pairs, tmp_path,
                                                                        monkeypatch, capsys):
    monkeypatch.setattr(reward, "bradley_terry_loss", lambda *sides: sides[0] * math.nan)
    argv = ["reward.py", "--train", "--model", str(checkpoint), "--data", pairs, "--out", str(tmp_path),
            "--batch-size", "4", "--limit", "60"]
    message = fails(reward.main, argv, monkeypatch, capsys)
    assert "steps 1 to 10 had no finite loss or gradient" in message
    assert message.endswith("(step 10 is saved; --resume continues with the same inputs)")
    assert not (tmp_path / "model").exists()


def test_a_stopped_training_goes_on_as_if_unbroken(checkpoint, pairs, tmp_path, monkeypatch, capsys):
    """SIGTERM in the second step: it is finished and saved, and --resume gives the same weights and logs."""
    common = ["--limit", "80", "--micro-batch-size", "3"]
    trained(monkeypatch, checkpoint, pairs, tmp_path / "whole", *common)
    step, calls = reward.reward_step, []

    def signalled(*inputs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*inputs)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(reward, "reward_step", signalled)
            with pytest.raises(SystemExit) as stop:
                trained(patch, checkpoint, pairs, tmp_path / "stopped", *common)
        assert stop.value.code == 0
        del stop
        assert not (tmp_path / "stopped/model").exists()
        said = capsys.readouterr().out
        assert "checkpoints/2; the same command with --resume continues" in said
        gc.collect()                                       # the traceback holds the lock
        trained(monkeypatch, checkpoint, pairs, tmp_path / "stopped", *common, "--resume")
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    whole, stopped = (tmp_path / name / "model/model.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "stopped")
    assert (tmp_path / "whole/eval.jsonl").read_text() == (tmp_path / "stopped/eval.jsonl").read_text()


def test_the_gradient_does_not_depend_on_the_micro_batches(checkpoint, pairs, tmp_path, monkeypatch):
    for name, size in (("one", "1"), ("all", "16")):
        trained(monkeypatch, checkpoint, pairs, tmp_path / name, "--limit", "40", "--micro-batch-size", size)
    one, other = (rows_of(tmp_path / name)[0] for name in ("one", "all"))
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_fraction_of_an_epoch_is_so_many_pairs(monkeypatch, checkpoint, pairs, tmp_path):
    trained(monkeypatch, checkpoint, pairs, tmp_path / "out", "--epochs", "0.5", "--eval-data", pairs,
            "--eval-limit", "4", "--batch-size", "12")
    assert len(lines(tmp_path / "out/metrics.jsonl")) == 5             # 60 of the 120 pairs


def test_held_out_pairs_beyond_the_limit_are_counted(monkeypatch, checkpoint, pairs, tmp_path, capsys):
    trained(monkeypatch, checkpoint, pairs, tmp_path / "out", "--steps", "1", "--eval-data", pairs,
            "--eval-limit", "4")
    said = capsys.readouterr().out
    assert f"{pairs}: 4 pairs to evaluate on\n  dropped: 116 (116 beyond --eval-limit)\n" in said


def test_a_checkpoint_that_is_trained_on_takes_the_length_of_the_command_line(
        monkeypatch, checkpoint, pairs, tmp_path):
    """Its tokenizer needs no end token, as no reward model's does."""
    start, tokenizer = shutil.copytree(checkpoint, tmp_path / "start"), byte_tokenizer(TEMPLATE)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(start)
    trained(monkeypatch, start, pairs, tmp_path / "out", "--steps", "1", "--save-every", "1",
            "--max-length", "40", "--eval-limit", "2")
    saved = str(tmp_path / "out/checkpoints/1")
    for given, length in ((None, 40), (20, 20)):
        _, _, ids_of = load_classifier(saved, max_length=given, **TRAINEE)
        assert len(ids_of("Q" * 90, "yes")[0]) == length


@pytest.mark.parametrize("changed, said", [
    ("start", "the files of --model have"), ("data", "the data have"), ("held-out", "the data have")])
def test_a_training_does_not_go_on_from_another_start_or_on_other_data(
        changed, said, checkpoint, pairs, tmp_path, monkeypatch, capsys):
    start = shutil.copytree(checkpoint, tmp_path / "start")
    data, held_out = (write(tmp_path / f"{name}.jsonl", lines(Path(pairs))) for name in ("data", "held-out"))
    argv = ["reward.py", "--train", "--model", str(start), "--data", data, "--eval-data", held_out, "--steps",
            "1", "--save-every", "1", "--eval-limit", "8", "--out", f"{tmp_path}/out"]
    monkeypatch.setattr("sys.argv", argv)
    reward.main()
    if changed == "start":
        tiny_model("tied", seed=1).save_pretrained(start)
    else:
        write(tmp_path / f"{changed}.jsonl", lines(Path(pairs))[1:])
    message = fails(reward.main, [*argv, "--resume"], monkeypatch, capsys)
    assert f"--resume: {said} changed since" in message


@pytest.mark.parametrize("flag", ["--model", "--data", "--eval-data"])
def test_what_is_read_does_not_lie_where_the_training_writes(
        flag, checkpoint, pairs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(checkpoint, out / "start")
    shutil.copy(pairs, out / "mine.jsonl")
    inside = str(out / ("start" if flag == "--model" else "mine.jsonl"))
    argv = ["reward.py", "--train", "--model", str(checkpoint), "--data", pairs, flag, inside,
            "--out", str(out)]
    assert f"{flag} {inside} lies in --out {out}" in fails(reward.main, argv, monkeypatch, capsys)


def test_the_held_out_loss_is_of_soft_labels_too(checkpoint):
    model, _, ids_of = load_classifier(str(checkpoint), **TRAINEE)
    chosen, rejected = (ids_of("Q", answer)[0] for answer in ("yes", "no way"))
    difference = sum(sign * score for sign, score in zip(
        (1, -1), reward.classifier_scores(model, [chosen, rejected]), strict=True))
    for preference in (1.0, 0.3):
        figures, *_ = reward.evaluate_reward(model, [(chosen, rejected, preference)] * 2, "float32")
        expected = (preference * math.log1p(math.exp(-difference))
                    + (1 - preference) * math.log1p(math.exp(difference)))
        assert figures["loss"][0] == pytest.approx(expected, abs=1e-6)
    assert abs(difference) > 1e-4


def test_a_model_in_shards_may_be_trained_by_one_process_alone(monkeypatch, checkpoint, pairs, tmp_path):
    for name, more in (("whole", []), ("shards", ["--shard"])):
        trained(monkeypatch, checkpoint, pairs, tmp_path / name, "--steps", "2", "--eval-limit", "2", *more)
    one, other = ([row["loss"] for row in lines(tmp_path / name / "metrics.jsonl")]
                  for name in ("whole", "shards"))
    assert one == pytest.approx(other, abs=1e-5)


def test_less_than_one_pair_is_one_line(monkeypatch, checkpoint, tmp_path, capsys):
    source = write(tmp_path / "x.jsonl", [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"}
                                          for i in range(3)])
    argv = ["reward.py", "--train", "--model", checkpoint, "--data", source, "--epochs", "0.2", "--out",
            str(tmp_path / "out")]
    assert "0 pairs a step are too few for 1 processes" in fails(reward.main, argv, monkeypatch, capsys)
