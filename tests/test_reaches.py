"""What is known of a response or a model reaches every place that needs it, or is said."""
import json
import math
import shutil

import pytest
import torch
from conftest import END, EOS, TEMPLATE, as_settings, byte_tokenizer, sail_args, sail_main, tiny_model
from safetensors.torch import load_file, save_file
from test_errors import fails
from transformers import AutoModelForSequenceClassification

import reward
import sail
from data import Pair, encode
from evaluate import evaluate_policy
from formats import TextPair, load_pairs
from generate import load_model, load_policy, prepare, roll_out, switch_dropout_off
from reward import bradley_terry_loss, label_by_preference, label_by_reward, load_preference, load_reward
from runtime.command_line import InputError
from runtime.settings import Settings
from toy import toy_model


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- tensors that a model has no place for

def with_tensors(checkpoint, path, *names):
    """A copy of a checkpoint whose file holds more tensors."""
    shutil.copytree(checkpoint, path)
    weights = load_file(path / "model.safetensors")
    save_file({**weights, **{name: torch.ones(3) for name in names}}, path / "model.safetensors",
              {"format": "pt"})
    return str(path)


LEFT = ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.up_proj.weight_scale", "score.weight",
        "model.layers.7.mlp.up_proj.weight"]


@pytest.mark.parametrize("name", LEFT)
def test_tensors_without_a_place_in_the_model_are_an_error_that_names_them(name, checkpoint, tmp_path):
    path = with_tensors(checkpoint, tmp_path / "model", name)
    with pytest.raises(InputError,
                       match=f"hold 1 tensors for which its configuration has no place, such as {name}"):
        load_policy(path)


def test_three_of_many_are_named_and_those_that_transformers_declares_harmless_are_none(checkpoint, tmp_path):
    path = with_tensors(checkpoint, tmp_path / "many", *LEFT)
    with pytest.raises(InputError, match="hold 4 tensors") as error:
        load_policy(path)
    assert sum(name in str(error.value) for name in LEFT) == 3
    load_policy(with_tensors(checkpoint, tmp_path / "old", "model.layers.0.self_attn.rotary_emb.inv_freq"))


def test_a_language_model_gives_its_output_layer_up_to_become_a_reward_model(tmp_path):
    for part in (tiny_model(), byte_tokenizer()):                      # not tied: it has an output layer
        part.save_pretrained(tmp_path)
    assert reward.load_classifier(str(tmp_path), num_labels=1)[0].score.weight.shape == (1, 32)
    with pytest.raises(InputError, match="lm_head.weight"):
        load_model(AutoModelForSequenceClassification, str(tmp_path), num_labels=1, may_lack={"score.weight"})


def test_a_reward_model_whose_scores_would_have_to_be_normalised_is_refused(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "rm")
    reward.load_classifier(str(path), num_labels=1)[0].save_pretrained(path)
    load_reward(str(path))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(
        {**config, "normalize_reward": True, "mean": 2.0, "std": 3.0}))
    with pytest.raises(InputError, match="normalize_reward"):
        load_reward(str(path))
    (path / "config.json").write_text(json.dumps(config))
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 0}))
    with pytest.raises(InputError, match="takes 0 tokens, by its model_max_length"):
        load_reward(str(path))


# --- which responses ended by themselves

FINISHED = """seen = []
def score(prompts, responses, finished):
    seen.append(list(finished))
    finished.clear()
    return [float(done) for done in seen[-1]]
def first(prompts, firsts, seconds, finished):
    return [0.9 if one and not other else 0.1 for one, other in finished]
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(FINISHED)
    return f"{tmp_path}/mine.py:"


def test_a_reward_that_asks_is_told_which_of_datas_responses_were_cut(mine):
    pairs = [TextPair("Q", "short", "far too long an answer"),
             TextPair("Q", "x" * 30, "no", finished=(False, True))]
    examples, *_ = encode(pairs, byte_tokenizer(), {EOS}, 9, 12)
    assert [pair.finished for pair in examples] == [(True, False), (False, True)]
    label_by_reward(examples, load_reward(mine + "score"))
    assert [pair.rewards for pair in examples] == [(1.0, 0.0), (1.0, 0.0)]
    assert [pair.finished for pair in examples] == [(True, False)] * 2           # with the labels' order
    label_by_preference(examples, load_preference(mine + "first"))
    assert [pair.preference for pair in examples] == [0.9, 0.9]
    assert [pair.finished for pair in examples] == [(True, False)] * 2           # the first one was preferred


@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("rejected",)])
def test_so_it_is_of_samples(sides, mine):
    tokenizer = byte_tokenizer()
    model = prepare(tiny_model(), tokenizer)
    torch.manual_seed(0)
    pairs = [Pair("Q", "data", "data", [10, 11], [7, EOS], [8], finished=(True, False), preference=0.7)
             for _ in range(60)]
    rolled = roll_out(model, tokenizer, pairs, sides, Settings(max_response_length=100, dtype="float32"))
    for pair in rolled:
        assert pair.finished == (pair.chosen_ids[-1] == EOS, pair.rejected_ids[-1] == EOS)
        assert (pair.samples, pair.unfinished) == (len(sides), pair.finished[-len(sides):].count(False))
    assert {done for pair in rolled for done in pair.finished} == {True, False}
    assert {pair.preference for pair in rolled} == {1.0}               # the file's was of another response
    label_by_reward(rolled, load_reward(mine + "score"))
    assert all(pair.rewards == tuple(map(float, pair.finished)) for pair in rolled)


def test_so_it_is_in_evaluations_and_of_a_file_of_responses(mine, tmp_path):
    policy, tokenizer = toy_model(seed=1)
    pairs = [TextPair("how was the soup ?", "the soup was good .", "the")] * 40
    examples, *_ = encode(pairs, tokenizer, {tokenizer.eos_token_id}, 16, 6)
    args = sail_args(["--variant", "dpo", "--max-response-length", "6"])
    figures, samples = evaluate_policy(policy, policy, tokenizer, examples, load_reward(mine + "score"), args)
    assert figures["reward"][0] == pytest.approx(1 - figures["unfinished"][0])
    assert 0 < figures["reward"][0] < 1
    rows = [{"prompt": "Q", "response": "A", "finished": True},
            {"prompt": "Q", "response": "A", "finished": False}, {"prompt": "Q", "response": "A"}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward.main(["--reward", mine + "score", "--responses", f"{tmp_path}/r.jsonl",
                 "--out", f"{tmp_path}/s.jsonl"])
    assert [row["reward"] for row in rows_of(tmp_path / "s.jsonl")] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("flag, ended", [
    (False, False), ("false", False), (0, False), (True, True), (None, True)])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_cut_answer_in_a_file_gets_no_end_token(flag, ended, template, tmp_path):
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad", "chosen_finished": flag}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    pairs, account = load_pairs(str(tmp_path / "x.jsonl"))
    assert pairs[0].finished == (ended, True) and account.unread == {}
    tokenizer = byte_tokenizer(template)
    ends = {EOS, END} if template else {EOS}
    example = encode(pairs, tokenizer, ends, 50, 50)[0][0]
    assert tokenizer.decode(example.chosen_ids).startswith("good") and len(example.chosen_ids) == 4 + ended
    assert (example.chosen_ids[-1] in ends) == ended == example.finished[0]
    assert example.rejected_ids[-1] in ends and example.chosen == "good"


# --- noise, soft labels, cut dialogues, templates, the toy

@pytest.mark.parametrize("name", ["router_jitter_noise", "hidden_dropout_prob", "drop_rate"])
def test_noise_of_training_is_switched_off_by_the_name_of_its_attribute(name):
    model = tiny_model()
    setattr(model.model.layers[0].mlp, name, 0.3)
    switch_dropout_off(model)
    assert getattr(model.model.layers[0].mlp, name) == 0.0


def test_a_reward_models_loss_is_the_cross_entropy_with_the_soft_label():
    p, chosen, rejected = 0.3, torch.tensor([0.7, -1.0]), torch.tensor([0.2, 0.4])
    q = torch.sigmoid(chosen - rejected)
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, p),
                               -(p * q.log() + (1 - p) * (1 - q).log()))


def test_a_reward_model_follows_soft_labels_of_the_file(checkpoint, tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": "no", "rejected": "yes", "preference": 0.1} for n in range(60)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags, chosen = as_settings(["--train", "--model", checkpoint, "--data", tmp_path / "x.jsonl",
                                 "--out", tmp_path / "rm", "--learning-rate", "1e-2", "--batch-size", "8",
                                 "--epochs", "4"])
    reward.main(flags, **chosen)
    no, yes = load_reward(f"{tmp_path}/rm/model")(["7?"] * 2, ["no", "yes"])
    assert yes > no
    assert rows_of(tmp_path / "rm/metrics.jsonl")[-1]["margin"] == pytest.approx(0.8 * math.log(9), abs=1)


def test_samples_that_a_classifier_cuts_are_counted(base, tmp_path):
    """The reward model has 12 positions, of which each dialogue needs more."""
    for part in (tiny_model(max_position_embeddings=12), byte_tokenizer()):
        part.save_pretrained(tmp_path / "small")
    reward.load_classifier(str(tmp_path / "small"), num_labels=1)[0].save_pretrained(tmp_path / "rm")
    byte_tokenizer().save_pretrained(tmp_path / "rm")
    sail_main(["--variant", "pr", "--mix", "0.5", "--model", base, "--reward", tmp_path / "rm",
               "--steps", "2", "--batch-size", "8", "--eval-limit", "2", "--eval-every", "0",
               "--out", tmp_path / "run"])
    assert [row["cut_for_reward"] for row in rows_of(tmp_path / "run/metrics.jsonl")] == [8, 8]
    assert rows_of(tmp_path / "run/eval.jsonl")[-1]["cut_for_reward"] == 1.0


@pytest.mark.parametrize("template, said", [("none", "chat template: none"), ("FILE", "chat template: ")])
def test_a_chat_template_of_the_command_line_is_trained_told_and_saved(
        template, said, checkpoint, tmp_path, capsys):
    (tmp_path / "mine.jinja").write_text(TEMPLATE.replace("<|user|>", "<|bos|>"))
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": f"no {n}"} for n in range(60)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = template.replace("FILE", f"{tmp_path}/mine.jinja")
    sail_main(["--variant", "dpo", "--model", checkpoint, "--data", tmp_path / "x.jsonl", "--steps", "1",
               "--batch-size", "2", "--max-prompt-length", "60", "--max-response-length", "20",
               "--eval-limit", "2", "--chat-template", named, "--out", tmp_path / "run"])
    told = capsys.readouterr().out
    assert said in told and (template == "none" or "mine.jinja" in told)
    _, tokenizer = load_policy(f"{tmp_path}/run/model")
    assert tokenizer.chat_template == (None if template == "none" else (tmp_path / "mine.jinja").read_text())


@pytest.mark.parametrize("variant", ["dpo", "sft", "pr"])
def test_a_model_without_data_is_an_error_unless_it_is_the_toys(
        variant, checkpoint, base, monkeypatch, capsys):
    argv = ["sail.py", "--variant", variant, "--model", str(checkpoint)]
    message = fails(sail.main, argv, monkeypatch, capsys)
    assert f"argument --data: is needed; {checkpoint} cannot read the toy's data" in message
    assert sail_args(["--variant", variant, "--model", base]).model == base
