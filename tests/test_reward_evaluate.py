"""Rewards of every kind, the label they give, and the figures of an evaluation."""
import json
import math

import pytest
import torch
from conftest import TEMPLATE, byte_tokenizer

import evaluate
import reward as reward_module
from data import InputError, encode
from evaluate import evaluate_policy, mean_and_interval
from generate import toy_model
from reward import label_by_reward, load_reward, toy_reward
from sail import dpo_loss, pair_logps, parse_args, train


@pytest.mark.parametrize("response, expected", [
    ("the soup was very good .", 0.6 * 1.5 + 0.5 + 0.5),
    ("the soup was utterly awful", -1.0 * 1.8 + 0.5),
    ("the tea was good .", 0.6 - 0.5 + 0.5),                                       # another noun
    ("the soup was very good and very good .", 2 * 0.9 + 0.5 - 0.5 * 2 + 0.5),     # said twice
    ("the soup was good . .", 0.6 + 0.5),                                          # two full stops
    ("", 0.0),
    # 12 words
    ("the soup was very good and truly great and rather plain .", 0.9 + 1.2 + 0.5 + 0.5 - 0.3 * 3),
])
def test_the_toy_reward_equals_a_hand_computed_value(response, expected):
    assert toy_reward(["how was the soup ?"], [response])[0] == pytest.approx(expected)


def test_the_toy_reward_refuses_dialogues():
    with pytest.raises(InputError, match="toy's nouns"):
        load_reward("toy")([[{"role": "user", "content": "Q"}]], ["A"])


def fresh_pair(first, second, on_policy=True):
    return {"prompt": "x", "chosen": first, "rejected": second, "chosen_ids": [len(first)],
            "rejected_ids": [len(second)], "preference": 1.0, "on_policy": (on_policy, on_policy),
            "self_labelled": False}


def by_length(prompts, responses):
    return [float(len(response)) for response in responses]


def test_fresh_pairs_are_put_into_the_rewards_order_and_ties_are_a_half():
    pairs = [fresh_pair("a", "bbb"), fresh_pair("ccc", "d"), fresh_pair("ee", "ff"),
             fresh_pair("g", "hhh", False)]
    label_by_reward(pairs, by_length)
    assert [(pair["chosen"], pair["chosen_ids"], pair["rejected"], pair["rejected_ids"])
            for pair in pairs] == [
        ("bbb", [3], "a", [1]), ("ccc", [3], "d", [1]), ("ee", [2], "ff", [2]), ("g", [1], "hhh", [3])]
    assert [pair["preference"] for pair in pairs] == [1.0, 1.0, 0.5, 1.0]
    assert [pair["tie"] for pair in pairs[:3]] == [False, False, True] and pairs[0]["rewards"] == [3.0, 1.0]


def test_a_sample_in_several_pairs_is_scored_once():
    one, two, three = fresh_pair("a", "bbb"), fresh_pair("a", "ee"), fresh_pair("ee", "bbb")
    two["chosen_ids"], three["chosen_ids"], three["rejected_ids"] = (
        one["chosen_ids"], two["rejected_ids"], one["rejected_ids"])
    seen = []
    label_by_reward([one, two, three],
                    lambda prompts, responses: seen.extend(responses) or by_length(prompts, responses))
    assert sorted(seen) == ["a", "bbb", "ee"]
    assert [pair["rewards"] for pair in (one, two, three)] == [[3.0, 1.0], [2.0, 1.0], [3.0, 2.0]]


def test_a_soft_preference_is_the_sigmoid_of_the_reward_difference():
    pairs = [fresh_pair("a", "bbb"), fresh_pair("ee", "ff")]
    label_by_reward(pairs, by_length, "soft")
    assert [pair["preference"] for pair in pairs] == pytest.approx([1 / (1 + math.exp(-2)), 0.5])


def test_a_function_of_a_file_is_a_reward(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def length(prompts, responses):\n    return [len(r) for r in responses]\n")
    assert load_reward(f"{path}:length")(["p"] * 2, ["one", "three"]) == [3.0, 5.0]


@pytest.mark.parametrize("body, message", [
    ("[1.0]", "returned 1 scores for 2 responses"),
    ("[1.0, float('nan')]", "returned nan for the response 'b'"),
    ("[1.0, float('inf')]", "returned inf"), ("None", "returned NoneType"), ("['x', 'y']", "returned list")])
def test_a_reward_that_is_not_one_finite_number_each_is_refused(tmp_path, body, message):
    path = tmp_path / "bad.py"
    path.write_text(f"def score(prompts, responses):\n    return {body}\n")
    with pytest.raises(InputError, match=message):
        load_reward(f"{path}:score")(["p"] * 2, ["a", "b"])


@pytest.fixture(scope="module", params=["own pad", "no pad", "pad is eos"])
def classifier(request, tmp_path_factory):
    from transformers import LlamaConfig, LlamaForSequenceClassification
    path = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    LlamaForSequenceClassification(LlamaConfig(
        vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, max_position_embeddings=64, initializer_range=0.5, bos_token_id=None, eos_token_id=1,
        pad_token_id={"own pad": 0, "no pad": None, "pad is eos": 1}[request.param])).save_pretrained(path)
    byte_tokenizer(TEMPLATE).save_pretrained(path)
    return str(path)


def test_batched_scores_of_a_classifier_equal_single_scores(classifier):
    score = load_reward(classifier)
    responses = ["yes", "a much longer answer than that", "", "no way " * 20]
    prompts = ["Q", [{"role": "user", "content": "Q"}], "other", "Q"]
    together = score(prompts, responses)
    alone = [score([prompt], [response])[0] for prompt, response in zip(prompts, responses)]
    assert together == pytest.approx(alone, abs=1e-4) and len(set(together)) == 4


def test_a_classifier_sees_the_prompt_as_one_user_message_in_its_own_template(classifier, monkeypatch):
    score = load_reward(classifier)
    assert score(["Q"], ["yes"]) == score([[{"role": "user", "content": "Q"}]], ["yes"])
    assert score(["Q"], ["yes"]) != score(["Z"], ["yes"])


def test_a_classifier_with_two_logits_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification
    LlamaForSequenceClassification(LlamaConfig(
        vocab_size=261, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=2)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="2 logits"):
        load_reward(str(tmp_path))


def test_a_language_model_without_a_trained_head_is_no_reward(checkpoint):
    with pytest.raises(InputError, match="SequenceClassification it lacks the weights score.weight"):
        load_reward(str(checkpoint))


def test_the_reward_command_line_scores_a_responses_file(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "responses.jsonl", tmp_path / "scored.jsonl"
    source.write_text(json.dumps({"prompt": "how was the soup ?", "response": "the soup was good ."}) + "\n")
    monkeypatch.setattr("sys.argv", ["reward.py", "--responses", str(source), "--out", str(out)])
    reward_module.main()
    assert (json.loads(out.read_text())["reward"] == pytest.approx(1.6)
            and "mean 1.600" in capsys.readouterr().out)


# --- evaluation

def test_the_interval_is_that_of_the_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3 + 1
    mean, half = mean_and_interval(values)
    assert (mean == pytest.approx(values.mean().item(), abs=1e-6)
            and half == pytest.approx(1.96 * 3 / 20, rel=0.1))


@pytest.fixture(scope="module")
def evaluated():
    policy, tokenizer = toy_model(seed=1)
    reference, _ = toy_model(seed=2)
    with torch.no_grad():                              # far enough apart for KL to stand out of its noise
        for parameter in reference.parameters():
            parameter *= 1.5
    pairs = [{"prompt": f"how was the {noun} ?", "chosen": f"the {noun} was good .", "rejected": "the"}
             for noun in ("soup", "tea", "cake") * 20]
    examples, _ = encode(pairs, tokenizer, {tokenizer.eos_token_id}, 16, 16)
    args = parse_args(["--variant", "dpo", "--beta", "0.2"])

    def win_on_first_half(prompts, responses):         # data's responses score 0; samples 1, 0 (a tie) or −1
        win_on_first_half.calls += 1
        third = len(responses) // 3
        return ([0.0] * len(responses) if win_on_first_half.calls == 2
                else [1.0] * third + [0.0] * third + [-1.0] * third)

    win_on_first_half.calls = 0
    figures, samples = evaluate_policy(policy, reference, tokenizer, examples, win_on_first_half, args)
    return policy, reference, examples, figures, samples


def test_a_tie_is_half_a_win(evaluated):
    *_, figures, samples = evaluated
    assert figures["win_rate"][0] == 0.5 and figures["reward"][0] == 0 and samples[0]["reward"] == 1.0
    assert figures["win_rate"][1] == pytest.approx(1.96 * (1 / 6) ** 0.5 / 60**0.5, rel=0.02)


def test_the_figures_on_pairs_are_those_of_the_loss(evaluated):
    policy, reference, examples, figures, _ = evaluated
    with torch.no_grad():
        losses = dpo_loss(*pair_logps(policy, examples), *pair_logps(reference, examples), beta=0.2)
    assert figures["loss"][0] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert figures["accuracy"][0] == pytest.approx((losses < math.log(2)).float().mean().item())


def test_kl_is_positive_and_zero_against_itself(evaluated):
    policy, reference, examples, figures, _ = evaluated
    assert figures["kl"][0] > figures["kl"][1] > 0
    same, _ = evaluate_policy(policy, policy, toy_model()[1], examples[:8], None,
                              parse_args(["--variant", "dpo"]))
    assert (same["kl"][0] == 0 and same["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
            and "reward" not in same)


def test_runs_are_compared_in_a_table_a_file_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    for part in toy_model(seed=5):
        part.save_pretrained(base)
    for variant in ("sft", "dpo", "pr"):
        train(parse_args(["--variant", variant, "--model", str(base), "--steps", "2", "--eval-limit", "4"]))
    monkeypatch.setattr("sys.argv", ["evaluate.py", "runs/toy/sft", "runs/toy/dpo", "runs/toy/pr",
                                     "--eval-limit", "8", "--plot", "picture.png"])
    evaluate.main()
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["sft", "dpo", "pr"] and "win_rate" in table and f"reference {base}" in table
    assert all(len(figure) == 2 for figures in results.values() for figure in figures.values())
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr("sys.argv", ["evaluate.py", "results.json", "runs/toy/dpo/model", "--eval-limit", "8",
                                     "--out", "again.json"])
    evaluate.main()                                    # a bare checkpoint: its own reference, so no KL
    assert json.loads((tmp_path / "again.json").read_text())["model"]["kl"][0] == 0


def test_a_model_with_another_vocabulary_than_the_reference_is_refused(tmp_path, monkeypatch, checkpoint):
    for part in toy_model(seed=5):
        part.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(tmp_path), str(checkpoint),
                                     "--out", str(tmp_path / "r.json")])
    with pytest.raises(InputError, match="another vocabulary"):
        evaluate.main()
