"""Rewards of every kind, the label they give, and the figures of an evaluation."""
import json
import math

import pytest
import torch
from conftest import TEMPLATE, byte_tokenizer

import evaluate
import reward as reward_module
from data import InputError, encode
from evaluate import (bootstrap, compare, distinct, evaluate_policy, length_controlled, mean, over_seeds,
                      scaled_lengths, win_figures)
from generate import toy_model
from reward import Verdict, label_by_reward, load_reward, toy_reward
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

def test_the_bootstrap_interval_of_a_mean_is_that_of_the_normal_approximation():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3 + 1
    value, low, high = bootstrap(mean, values)
    assert value == pytest.approx(values.mean().item(), abs=1e-6)
    assert value - low == pytest.approx(1.96 * 3 / 20, rel=0.1) == high - value
    assert math.isnan(bootstrap(mean, [1.0])[1])


def test_ninety_five_of_a_hundred_intervals_hold_the_truth():
    generator = torch.Generator().manual_seed(1)
    held = [low <= 0.3 <= high for _, low, high in (
        bootstrap(mean, (torch.rand(200, generator=generator) < 0.3).double()) for _ in range(300))]
    assert 0.91 <= sum(held) / 300 <= 0.98


def test_distinct_n_equals_a_hand_computed_value():
    texts = ["a b a b", "a b", "c", ""]                # bigrams: ab, ba, ab; ab
    assert distinct(texts, 1)[0] == pytest.approx(3 / 7) and distinct(texts, 2)[0] == pytest.approx(2 / 4)
    assert distinct(["a", "b"], 2)[0] == 0
    value, low, high = distinct(["a b c d", "e f"] * 40, 1)
    assert low <= value <= high and value == pytest.approx(6 / 240)


def opponents(lengths):
    """Texts of these lengths, and as many of 500 characters."""
    return ["x" * int(length) for length in lengths], ["y" * 500] * len(lengths)


def test_on_equal_lengths_the_length_controlled_win_rate_is_the_raw_one():
    verdicts = [Verdict(win) for win in [1.0] * 13 + [0.5] * 3 + [0.0] * 4]
    figures = win_figures(verdicts, *opponents([500] * 20))
    assert figures["lc_win_rate"] == pytest.approx(figures["win_rate"])
    assert figures["win_rate"][0] == 14.5 / 20


def test_a_model_that_only_pads_gains_nothing_under_length_control():
    """The same model twice, one pads its answers; the judge loves length, softly or strictly."""
    generator = torch.Generator().manual_seed(0)
    for softness in (30.0, 1e-9):
        for padding in (0, 60):
            difference = (50 * torch.randn(400, generator=generator)).round() + padding
            wins = torch.rand(400, generator=generator) < torch.sigmoid(difference / softness)
            figures = win_figures([Verdict(float(win)) for win in wins], *opponents(500 + difference))
            assert figures["lc_win_rate"][1] < 0.5 < figures["lc_win_rate"][2]
            assert (figures["win_rate"][1] > 0.7) == (padding > 0)
    always = win_figures([Verdict(1.0)] * 50, *opponents(torch.linspace(510, 600, 50)))      # every answer
    assert always["win_rate"][0] == 1 and always["lc_win_rate"][0] < 0.55


def test_quality_is_no_length():
    """P(win) = σ(1 + Δ/50): at Δ 0 that is 0.731, whatever the padding."""
    generator = torch.Generator().manual_seed(0)
    difference = (50 * torch.randn(2000, generator=generator)).round() + 50
    wins = torch.rand(2000, generator=generator) < torch.sigmoid(1 + difference / 50)
    verdicts = [Verdict(float(win)) for win in wins]
    value, low, high = win_figures(verdicts, *opponents(500 + difference))["lc_win_rate"]
    assert value == pytest.approx(0.731, abs=0.05) and low < 0.731 < high and high - low < 0.2


def test_the_length_model_is_fitted_to_its_maximum():
    generator = torch.Generator().manual_seed(0)
    lengths = scaled_lengths(*opponents(500 + 50 * torch.randn(60, generator=generator)))
    wins = (torch.rand(60, generator=generator) < 0.6).double()
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], lr=0.5, max_iter=200, tolerance_grad=1e-12,
                                  tolerance_change=1e-14)

    def loss():
        optimizer.zero_grad()
        margin = weights[0] + weights[1] * lengths.double()
        value = torch.nn.functional.binary_cross_entropy_with_logits(margin, wins, reduction="sum")
        value.backward()
        return value

    optimizer.step(loss)
    assert length_controlled(wins[None], lengths.double()[None]).item() == pytest.approx(
        torch.sigmoid(weights[0]).item(), abs=2e-3)


def test_the_interval_over_seeds_is_students():
    assert over_seeds([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(     # t(0.975, 4) = 2.776
        (3.0, 3 - 2.776 * (2.5 / 5) ** 0.5, 3 + 2.776 * (2.5 / 5) ** 0.5), abs=5e-3)


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
    assert figures["win_rate"][2] - 0.5 == pytest.approx(1.96 * (1 / 6) ** 0.5 / 60**0.5, rel=0.1)


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


def test_models_are_evaluated_into_a_table_and_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "base"
    for part in toy_model(seed=5):
        part.save_pretrained(base)
    for variant in ("sft", "dpo", "pr"):
        train(parse_args(["--variant", variant, "--model", str(base), "--steps", "2", "--eval-limit", "4"]))
    row = json.loads((tmp_path / "runs/toy/pr/eval.jsonl").read_text().split("\n")[0])
    figures = {name for name in row if not name.endswith("_interval")} - {"step"}
    assert {"kl", "reward", "lc_win_rate", "distinct_2", "loss"} <= figures
    assert all(row[f"{name}_interval"][0] <= row[name] <= row[f"{name}_interval"][1] for name in figures)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "runs/toy/sft", "runs/toy/dpo", "runs/toy/pr",
                                     "--eval-limit", "8"])
    evaluate.main()
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["sft", "dpo", "pr"] and "win_rate" in table and f"reference {base}" in table
    assert all(low <= value <= high for figures in results.values() for value, low, high in figures.values())
    monkeypatch.setattr("sys.argv", ["evaluate.py", "results.json", "runs/toy/dpo/model", "--eval-limit", "8",
                                     "--out", "again.json"])
    evaluate.main()                                    # a bare checkpoint: its own reference, so no KL
    assert json.loads((tmp_path / "again.json").read_text())["model"]["kl"][0] == 0


def finished_run(path, *rows):
    """A directory as sail.py leaves it, with these evaluations: (step, KL, reward)."""
    (path / "model").mkdir(parents=True)
    lines = [{"step": step, "kl": kl, "kl_interval": [kl - 0.1, kl + 0.1], "reward": reward,
              "reward_interval": [reward - 0.2, reward + 0.3]} for step, kl, reward in rows]
    (path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_finished_runs_are_compared_with_their_seeds_together(tmp_path, capsys):
    runs = [finished_run(tmp_path / "pr-s0", (0, 0.0, 0.0), (5, 1.0, 2.0)),
            finished_run(tmp_path / "pr-s1", (0, 0.0, 0.5), (5, 2.0, 3.0)),
            finished_run(tmp_path / "dpo", (0, 0.0, 0.0), (5, 3.0, 1.0)), tmp_path / "results.json", tmp_path,
            finished_run(tmp_path / "unfinished", (0, 0.0, 0.0))]
    (tmp_path / "unfinished" / "model").rmdir()
    compare(runs, tmp_path / "out" / "results.json")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results) == ["pr", "dpo"]
    assert results["dpo"] == {"reward": [1.0, 0.8, 1.3], "kl": [3.0, 2.9, 3.1]}        # its own intervals
    assert results["pr"]["reward"] == pytest.approx([2.5, 2.5 - 12.71 * 0.5, 2.5 + 12.71 * 0.5])
    lines = capsys.readouterr().out.splitlines()
    assert "| pr | 2 | 2.500 ± 6.355 | 1.500 ± 6.355 |" in lines and lines[1].startswith("|---|")
    assert (tmp_path / "out" / "results.png").read_bytes()[:4] == b"\x89PNG"
    compare([runs[2], finished_run(tmp_path / "other" / "dpo", (5, 1.0, 1.0))], tmp_path / "two.json")
    assert list(json.loads((tmp_path / "two.json").read_text())) == [f"{tmp_path.name}/dpo", "other/dpo"]
    with pytest.raises(InputError, match="no finished run"):
        compare([tmp_path / "results.json"], tmp_path / "results.json")


def test_a_model_with_another_vocabulary_than_the_reference_is_refused(tmp_path, monkeypatch, checkpoint):
    for part in toy_model(seed=5):
        part.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(tmp_path), str(checkpoint),
                                     "--out", str(tmp_path / "r.json")])
    with pytest.raises(InputError, match="another vocabulary"):
        evaluate.main()


# --- wins against another model

def run_evaluate(monkeypatch, *argv):
    """The figures that evaluate.py writes for these arguments."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, argv), "--out", "figures.json"])
    evaluate.main()
    return json.loads(open("figures.json").read())


def test_two_identical_models_win_half_raw_and_length_controlled(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    figures, = run_evaluate(monkeypatch, base, "--against", base, "--reward", "toy").values()
    for name in ("win_rate", "lc_win_rate"):
        value, low, high = figures[name]
        assert low < 0.5 < high and high - low < 0.2 and value != 0.5          # other samples, so no draw


def test_wins_are_counted_against_the_responses_of_a_file_each_to_its_prompt(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"how was the {noun} ?", "chosen": "the", "rejected": "was"}
             for noun in ("soup", "tea", "tea", "cake")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    answers = {"cake": ["C"], "tea": ["T1", "T2"], "soup": ["S"]}
    rows = [{"instruction": f"how was the {noun} ?", "output": text, "generator": "g"}
            for noun, texts in answers.items() for text in texts]
    (tmp_path / "answers.json").write_text(json.dumps(rows))
    (tmp_path / "mine.py").write_text(
        "def score(prompts, responses):\n"
        "    with open('seen', 'a') as file:\n"
        "        file.writelines(f'{p} {r}\\n' for p, r in zip(prompts, responses))\n"
        "    return [float(r in ('S', 'T1')) for r in responses]\n")
    figures, = run_evaluate(monkeypatch, base, "--data", "toy", "--eval-data", "pairs.jsonl", "--reward",
                            "mine.py:score", "--against", "answers.json").values()
    assert figures["win_rate"][0] == 0.25                              # two lost, two ties
    seen = (tmp_path / "seen").read_text().splitlines()
    assert seen[-4:] == ["how was the soup ? S", "how was the tea ? T1", "how was the tea ? T2",
                         "how was the cake ? C"]


@pytest.mark.parametrize("rows, message", [
    ([{"prompt": "p", "response": "r"}], "no response to the prompt 'how was the"),
    ([{"prompt": "p"}], "want rows with prompt and response")])
def test_a_file_without_the_responses_is_refused(rows, message, tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(
        {"prompt": "how was the soup ?", "chosen": "the", "rejected": "was"}))
    (tmp_path / "answers.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=message):
        run_evaluate(monkeypatch, base, "--data", "toy", "--eval-data", "pairs.jsonl", "--against",
                     "answers.json")


def test_a_model_as_judge_gives_win_rate_flips_and_grades(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    verdicts = [Verdict(1.0, False, False, 7.0), Verdict(0.5, False, True, None),
                Verdict(0.5, True, False, 4.0)]
    monkeypatch.setattr(evaluate, "load_judge", lambda *_: lambda prompts, *_: (verdicts * 3)[:len(prompts)])
    figures, = run_evaluate(monkeypatch, base, "--eval-limit", "9", "--judge", "http://h/v1", "--judge-model",
                            "m").values()
    assert figures["win_rate"][0] == pytest.approx(2 / 3) and figures["grade"][0] == 5.5
    assert figures["flipped"][0] == figures["unparsable"][0] == pytest.approx(1 / 3)


def test_several_seeds_get_a_line_of_their_own_with_the_interval_over_them(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        (tmp_path / f"pr-s{seed}").symlink_to(base)
    figures = run_evaluate(monkeypatch, "pr-s0", "pr-s1", "--eval-limit", "8", "--reward", "toy")
    assert list(figures) == ["pr-s0", "pr-s1", "pr, 2 seeds"]
    assert figures["pr, 2 seeds"]["reward"] == pytest.approx([figures["pr-s0"]["reward"][0]] * 3)
