"""Rewards of every kind, the label they give, and the figures of an evaluation."""
import json
import math
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.axes
import pytest
import torch
from conftest import IDS, TOY_REWARD, byte_tokenizer, pairs_of, sail_args, sail_main
from test_errors import fails

import evaluate
import generate
import reward as reward_module
import sail
from data import Pair, encode
from formats import load_pairs, read_answers, read_rows
from runtime.command_line import command_line, InputError, seeded
from runtime.intervals import format_figure
from evaluate import evaluate_policy
from runtime.compare import COLOURS, compare, measured_on, read_runs, short_names, tables_of, track_of
from runtime.run_directory import write_rows
from runtime.settings import read_run
from generate import sample
from sail import pair_logps
from reward import Reward, label_by_preference, label_by_reward, load_preference, load_reward
from runtime.intervals import mean_of, share_of
from sail import dpo_loss
from toy import grammar_pairs, toy_model, toy_pair, toy_reward


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
        load_reward(TOY_REWARD)([[{"role": "user", "content": "Q"}]], ["A"])


def fresh_pair(first, second):
    return Pair("x", first, second, [], [len(first)], [len(second)])


def by_length(prompts, responses):
    return [float(len(response)) for response in responses]


def test_fresh_pairs_are_put_into_the_rewards_order_and_ties_are_a_half():
    pairs = [fresh_pair("a", "bbb"), fresh_pair("ccc", "d"), fresh_pair("ee", "ff")]
    label_by_reward(pairs, Reward("length", by_length))
    assert [(pair.chosen, pair.chosen_ids, pair.rejected, pair.rejected_ids) for pair in pairs] == [
        ("bbb", [3], "a", [1]), ("ccc", [3], "d", [1]), ("ee", [2], "ff", [2])]
    assert [pair.preference for pair in pairs] == [1.0, 1.0, 0.5]
    assert [pair.rewards for pair in pairs] == [(3.0, 1.0), (3.0, 1.0), (2.0, 2.0)]
    assert sail.counts_of(pairs, likelihood=False)["ties"] == 1


def test_a_soft_preference_is_the_sigmoid_of_the_reward_difference():
    pairs = [fresh_pair("a", "bbb"), fresh_pair("ee", "ff")]
    label_by_reward(pairs, Reward("length", by_length), "soft")
    assert [pair.preference for pair in pairs] == pytest.approx([1 / (1 + math.exp(-2)), 0.5])


CYCLE = """def beats(prompts, firsts, seconds):        # rock, scissors, paper: no reward orders them
    return [{"rs": 0.9, "sp": 0.9, "pr": 0.9, "sr": 0.1, "ps": 0.1, "rp": 0.1}.get(first[0] + second[0], 0.5)
            for first, second in zip(firsts, seconds)]
"""


def test_a_preference_labels_without_a_reward_and_may_be_cyclic(tmp_path):
    (tmp_path / "mine.py").write_text(CYCLE)
    pairs = [fresh_pair("r", "ss"), fresh_pair("p", "ss"), fresh_pair("pp", "r"), fresh_pair("r", "r")]
    label_by_preference(pairs, load_preference(f"{tmp_path}/mine.py:beats"))
    assert [(pair.chosen, pair.chosen_ids, pair.rejected, pair.rejected_ids) for pair in pairs] == [
        ("r", [1], "ss", [2]), ("ss", [2], "p", [1]), ("pp", [2], "r", [1]), ("r", [1], "r", [1])]
    assert [pair.preference for pair in pairs] == [0.9, 0.9, 0.9, 0.5]
    assert [pair.rewards for pair in pairs] == [()] * 4


def test_what_no_reward_has_measured_is_null_and_is_not_printed(base, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def first(prompts, *responses):\n    return [1.0] * len(prompts)\n")
    sail_main(["--variant", "online-dpo", "--mix", "1", "--model", base, "--preference",
               f"{tmp_path}/mine.py:first", "--data", f"{base}/toy-pairs.jsonl", "--eval-data",
               f"{base}/toy-pairs.jsonl", "--max-prompt-length", "12", "--max-response-length", "6",
               "--batch-size", "4", "--steps", "1", "--eval-every", "0",
               "--eval-limit", "2", "--out", str(tmp_path / "run")])
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert row["reward"] is row["ties"] is row["cut_for_reward"] is None and row["response_length"] > 0
    line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/1")]
    assert "reward" not in line and "response_length" in line
    figures = json.loads((tmp_path / "run/eval.jsonl").read_text().splitlines()[-1])
    assert figures["win_rate"] == 1.0 and "reward" not in figures and "objective" not in figures


def test_without_a_reward_the_preference_says_how_often_a_policy_wins(base, held_out, tmp_path, capsys,
                                                                       monkeypatch):
    """In training, and by evaluate.py where the command line names it. The first of two is the sample."""
    source = tmp_path / "mine.py"
    source.write_text("""def ended(prompts, firsts, seconds, finished):
    return [0.9 * first + 0.05 * second for first, second in finished]
""")
    sail_main(["--variant", "online-dpo", "--model", base, "--preference", f"{source}:ended", "--data",
               held_out, "--eval-data", held_out, "--steps", "1", "--batch-size", "4", "--eval-limit", "6",
               "--max-prompt-length", "12", "--max-response-length", "24", "--out", str(tmp_path / "run")])
    row = json.loads((tmp_path / "run/eval.jsonl").read_text().splitlines()[-1])
    assert 0 < row["unfinished"] and row["win_rate"] == pytest.approx(0.9 * (1 - row["unfinished"]) + 0.05)
    message = fails(evaluate.main, ["evaluate.py", str(tmp_path / "run")], monkeypatch, capsys)
    assert "is code; it runs only if --preference names it" in message
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(tmp_path / "run"), "--eval-limit", "6",
                                     "--preference", f"{source}:ended"])
    evaluate.main()
    said = capsys.readouterr().out
    assert f"preference {source}:ended decides on wins" in said and "win rate" in said
    assert measured_on(tmp_path / "run")["reward"].startswith("preference mine.py:ended (")


@pytest.mark.parametrize("body, message", [
    ("[0.5]", "preference .*returned 1 scores for a batch of 2"),
    ("[0.5, 1.01]", r"\[0.5, 1.01\]…; give a finite score from 0 to 1 for each"),
    ("[-0.01, 0.5]", r"\[-0.01, 0.5\]…; give a finite score from 0 to 1 for each"),
    ("[float('nan'), 0.5]", r"\[nan, 0.5\]…; give a finite score from 0 to 1 for each")])
def test_a_preference_that_is_no_probability_is_refused(tmp_path, body, message):
    (tmp_path / "bad.py").write_text(f"def prefer(prompts, firsts, seconds):\n    return {body}\n")
    with pytest.raises(InputError, match=message):
        load_preference(f"{tmp_path}/bad.py:prefer")(["p"] * 2, ["a", "b"], ["c", "d"])


def test_a_run_with_a_preference_needs_no_reward_and_refuses_another_function_when_it_goes_on(
        tmp_path, checkpoint, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("""def short(prompts, firsts, seconds):
    return [float(len(first) < len(second)) for first, second in zip(firsts, seconds)]
""")
    rows = [{"prompt": f"question {i}", "chosen": "long " * (i % 3 + 1), "rejected": "no"} for i in range(24)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--variant", "relabelled-dpo", "--model", str(checkpoint), "--data", f"{tmp_path}/x.jsonl",
            "--preference", f"{tmp_path}/mine.py:short", "--max-prompt-length", "40",
            "--max-response-length", "40", "--batch-size", "4", "--steps", "2", "--learning-rate", "1e-3",
            "--save-every", "1", "--out", f"{tmp_path}/out"]
    sail_main(argv)
    *_, last = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert last["margin"] > 0 and last["reward"] is None                 # the short ones are preferred now
    assert last["on_policy"] == 0 and last["rejected_logps"] < last["chosen_logps"]
    (tmp_path / "mine.py").write_text((tmp_path / "mine.py").read_text().replace("<", ">"))
    message = fails(sail.main, ["sail.py", *argv, "--resume"], monkeypatch, capsys)
    assert "preference" in message


def test_the_datas_pairs_are_relabelled_by_the_reward_with_the_probability_itself(tmp_path, checkpoint):
    (tmp_path / "mine.py").write_text("def length(prompts, responses):\n"
                                      "    return [len(response) / 8 for response in responses]\n")
    row = {"prompt": "q", "chosen": "no", "rejected": "longer"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    args = sail_args(["--variant", "relabelled-dpo", "--model", str(checkpoint), "--data",
                       f"{tmp_path}/x.jsonl", "--eval-data", f"{tmp_path}/x.jsonl", "--reward",
                       f"{tmp_path}/mine.py:length", "--out", f"{tmp_path}/out", "--steps", "1",
                       "--max-prompt-length", "20", "--max-response-length", "20"])
    seen, accumulate = [], sail.accumulate_gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sail, "accumulate_gradients", lambda run, pairs, method: (
            seen.extend(pairs), accumulate(run, pairs, method))[1])
        sail.train(args)
    assert {(pair.chosen, pair.rejected, pair.on_policy, pair.self_labelled) for pair in seen} == {
        ("longer", "no", False, False)}
    assert [pair.preference for pair in seen] == pytest.approx([1 / (1 + math.exp(-0.5))] * len(seen))
    assert {pair.rewards for pair in seen} == {(0.75, 0.25)}
    row = json.loads((tmp_path / "out/metrics.jsonl").read_text())
    assert row["reward"] is row["response_length"] is row["unfinished"] is row["sampler_gap"] is None
    assert row["ties"] == 0


@pytest.mark.parametrize("body, message", [
    ("[1.0, float('nan')]", r"a batch of 2, \[1.0, nan\]…; give a finite score for each"),
    ("[1.0, float('inf')]", "give a finite score for each")])
def test_a_reward_that_is_not_one_finite_number_each_is_refused(tmp_path, body, message):
    path = tmp_path / "bad.py"
    path.write_text(f"def score(prompts, responses):\n    return {body}\n")
    with pytest.raises(InputError, match=message):
        load_reward(f"{path}:score")(["p"] * 2, ["a", "b"])


def complaint(tmp_path, monkeypatch, capsys, text):
    """(all of stderr but its last line, that line) where reward.py is given a file with this text."""
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "responses.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["reward.py", "--reward", "mine.py:score"])
    with pytest.raises(SystemExit) as stop:
        command_line(reward_module.main)
    *above, last = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and not (tmp_path / "scored.jsonl").exists()
    return "\n".join(above), last


@pytest.mark.parametrize("line", ["return responses[7]", "import sys; sys.exit(0)"])
def test_a_reward_that_fails_or_exits_shows_its_traceback_and_is_one_line_below(line, tmp_path, monkeypatch,
                                                                              capsys):
    above, last = complaint(tmp_path, monkeypatch, capsys, f"def score(prompts, responses):\n    {line}\n")
    assert above.startswith("Traceback") and line in above
    assert last == "reward.py: error: reward mine.py:score: failed, as shown above"


@pytest.mark.parametrize("line", ["import no_such_package", "raise SystemExit(0)", "def score(p, r"])
def test_a_file_that_fails_or_exits_at_import_shows_its_traceback_and_is_one_line_below(
        line, tmp_path, monkeypatch, capsys):
    above, last = complaint(tmp_path, monkeypatch, capsys, f"{line}\n")
    assert above.startswith("Traceback") and line in above
    assert last == "reward.py: error: reward mine.py:score: mine.py cannot be imported, as shown above"


def test_a_reward_file_may_have_dataclasses_with_postponed_annotations(tmp_path):
    path = tmp_path / "postponed.py"
    path.write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n"
                    "@dataclass\nclass Scale:\n    by: float\n"
                    "def score(prompts, responses):\n    return [Scale(2.0).by] * len(responses)\n")
    assert load_reward(f"{path}:score")(["p"], ["r"]) == [2.0]


def save_classifier(path, num_labels):
    """Write a small classifier with this number of logits."""
    from transformers import LlamaConfig, LlamaForSequenceClassification
    LlamaForSequenceClassification(LlamaConfig(
        vocab_size=IDS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_labels=num_labels)).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


def test_a_classifier_with_two_logits_is_refused(tmp_path):
    save_classifier(tmp_path, num_labels=2)
    with pytest.raises(InputError, match="2 logits"):
        load_reward(str(tmp_path))


def test_a_classifier_does_not_score_half_a_surrogate_pair(tmp_path):
    save_classifier(tmp_path, num_labels=1)
    with pytest.raises(InputError, match="a dialogue is no text, for it holds half of a surrogate pair"):
        load_reward(str(tmp_path))(["how was the soup ?"], ["\ud800 good"])


def test_a_language_model_without_a_trained_head_is_no_reward(checkpoint):
    with pytest.raises(InputError, match="a SequenceClassification model needs, such as score.weight"):
        load_reward(str(checkpoint))


def test_the_reward_command_line_scores_a_responses_file(tmp_path, monkeypatch, capsys):
    source, out = tmp_path / "responses.jsonl", tmp_path / "scored.jsonl"
    source.write_text(json.dumps({"prompt": "how was the soup ?", "response": "the soup was good ."}) + "\n")
    monkeypatch.setattr("sys.argv", ["reward.py", "--reward", TOY_REWARD, "--responses", str(source), "--out",
                                     str(out)])
    reward_module.main()
    assert (json.loads(out.read_text())["reward"] == pytest.approx(1.6)
            and "mean 1.600" in capsys.readouterr().out)


def test_the_best_and_the_worst_of_n_responses_become_pairs_to_train_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def score(prompts, responses, finished):\n"
                               "    return [len(response) - 4 * (not done)\n"
                               "            for response, done in zip(responses, finished)]\n")
    dialogue = [{"role": "user", "content": "q"}]
    answers = [(dialogue, "aa", True), (dialogue, "a", True), (dialogue, "aaa", True),
               (dialogue, "aaaa", False), ("tied", "bb", True), ("tied", "cc", True),
               ("alone", "d", True)]
    write_rows("answers.jsonl", [dict(prompt=prompt, response=response, tokens=1, finished=done)
                                 for prompt, response, done in answers])
    argv = ["reward.py", "--reward", "mine.py:score", "--responses", "answers.jsonl", "--pairs"]
    monkeypatch.setattr("sys.argv", [*argv, "pairs.jsonl"])
    reward_module.main()
    assert read_rows("pairs.jsonl") == [{
        "prompt": dialogue, "chosen": "aaa", "chosen_finished": True, "score_chosen": 3.0, "rejected": "aaaa",
        "rejected_finished": False, "score_rejected": 0.0}]
    assert "1 pairs in pairs.jsonl; dropped: 2 no preference between the responses" in capsys.readouterr().out
    (pair,), _ = load_pairs("pairs.jsonl", score_scale=3.0)
    assert (pair.prompt, pair.finished) == (dialogue, (True, False))
    assert pair.preference == pytest.approx(1 / (1 + math.exp(-1)))
    message = fails(reward_module.main, [*argv, "answers.jsonl"], monkeypatch, capsys)
    assert "--pairs answers.jsonl is a file that this command reads; give another --pairs" in message
    message = fails(reward_module.main, [*argv, "same.jsonl", "--out", "same.jsonl"], monkeypatch, capsys)
    assert "--pairs: names the same file as --out" in message


def test_answers_of_another_tool_that_say_not_whether_they_ended_become_pairs_that_did():
    rows = [{"prompt": "q", "response": response, "reward": reward}
            for response, reward in (("worst", 0.0), ("best", 2.0), ("between", 1.0))]
    (row,), dropped = reward_module.best_and_worst_pairs(rows)
    assert (row["chosen"], row["rejected"], sum(dropped.values())) == ("best", "worst", 0)
    assert row["chosen_finished"] is row["rejected_finished"] is True


@pytest.mark.parametrize("done", ["False", "false", 0, False])
def test_an_answer_is_unfinished_in_each_spelling_that_the_data_may_have(done, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def score(prompts, responses, finished):\n    return list(finished)\n")
    write_rows("answers.jsonl", [dict(prompt="q", response="a", finished=done),
                                 dict(prompt="q", response="b", finished=True)])
    monkeypatch.setattr("sys.argv", ["reward.py", "--reward", "mine.py:score", "--responses", "answers.jsonl",
                                     "--pairs", "pairs.jsonl"])
    reward_module.main()
    assert [row["reward"] for row in read_rows("scored.jsonl")] == [0.0, 1.0]
    assert read_rows("pairs.jsonl")[0]["rejected_finished"] is False


def test_a_reward_may_import_a_file_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "beside_it.py").write_text("def words(text):\n    return float(len(text.split()))\n")
    (tmp_path / "mine.py").write_text("from beside_it import words\n\n"
                                      "def score(prompts, responses):\n    return [*map(words, responses)]\n")
    assert load_reward(f"{tmp_path}/mine.py:score")(["q"], ["a b"]) == [2.0]


def test_a_prompt_of_messages_in_a_text_is_no_prompt_of_answers(tmp_path):
    write_rows(tmp_path / "x.jsonl", [dict(prompt='[{"role": "user", "content": "q"}]', response="a")])
    with pytest.raises(InputError, match="row 1 needs prompt and response"):
        read_answers(str(tmp_path / "x.jsonl"))


def test_half_a_surrogate_pair_in_a_response_survives_the_scoring(tmp_path, monkeypatch):
    text = '{"prompt": "p", "response": "\\ud800 \\u00e9"}\n'
    (tmp_path / "responses.jsonl").write_text(text)
    (tmp_path / "mine.py").write_text("def one(prompts, responses):\n    return [1.0] * len(responses)\n")
    monkeypatch.setattr("sys.argv", ["reward.py", "--reward", f"{tmp_path}/mine.py:one", "--responses",
                                     f"{tmp_path}/responses.jsonl", "--out", f"{tmp_path}/scored.jsonl"])
    reward_module.main()
    assert json.loads((tmp_path / "scored.jsonl").read_text()) == {**json.loads(text), "reward": 1.0}


@pytest.mark.parametrize("argv, message", [
    (["--reward", "mine.py"], "reward mine.py: name one of its functions, as mine.py:FUNCTION"),
    (["--reward", "mine.py:f"], "no such file mine.py"),
    (["--reward", TOY_REWARD, "--out", "folder"], "--out folder is a directory"),
    (["--reward", TOY_REWARD, "--out", "x.csv"], "--out x.csv: the name must end in .jsonl"),
    (["--reward", TOY_REWARD, "--pairs", "x.json"], "--pairs x.json: the name must end in .jsonl")])
def test_what_cannot_be_scored_is_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("responses.jsonl").write_text('{"prompt": "how was the soup ?", "response": "good"}\n')
    assert message in fails(reward_module.main, ["reward.py", *argv], monkeypatch, capsys)


# --- evaluation

@pytest.mark.parametrize("n", [4, 16, 40])
def test_the_interval_of_a_mean_holds_the_true_mean_95_times_in_100_also_of_few(n):
    draws = torch.randn(4000, n, generator=torch.Generator().manual_seed(n)) * 3 + 1
    intervals = [mean_of(values)[1:] for values in draws.tolist()]
    assert sum(low <= 1 <= high for low, high in intervals) / 4000 == pytest.approx(0.95, abs=0.011)
    assert math.isnan(mean_of([1.0])[1])


@pytest.mark.parametrize("values, expected", [                         # z² = 3.8416
    ([0.0] * 8, (0.0, 0.0, 3.8416 / 11.8416)), ([1.0] * 8, (1.0, 8 / 11.8416, 1.0)),
    ([1.0, 0.5, 0.5, 0.0], (0.5, 0.5 - 1.96 / 2 / 7.8416**0.5, 0.5 + 1.96 / 2 / 7.8416**0.5)),
    ([1.0], (1.0, 1 / 4.8416, 1.0))])
def test_the_interval_of_a_share_is_wilsons(values, expected):
    assert share_of(values) == pytest.approx(expected)


def test_the_interval_of_no_successes_begins_at_zero_exactly():
    assert {share_of([0.0] * n)[1] for n in range(1, 400)} == {0.0}    # −1e-17 would be shown as -0.00


def test_intervals_of_shares_hold_the_truth_95_times_in_100_even_of_few():
    truths, n = [0.02 + 0.04 * nth for nth in range(25)], 8            # 0.02 … 0.98
    intervals = [share_of([1.0] * wins + [0.0] * (n - wins))[1:] for wins in range(n + 1)]
    coverage = [sum(math.comb(n, wins) * p**wins * (1 - p)**(n - wins)
                    for wins, (low, high) in enumerate(intervals) if low <= p <= high) for p in truths]
    assert 0.94 < sum(coverage) / 25 < 0.97 and min(coverage) > 0.8


@pytest.mark.parametrize("figure, text", [
    ((0.953, 0.51, 0.97), "0.953 [0.51, 0.97]"), ((1.0, 0.676, 1.0), "1.000 [0.68, 1.00]"),
    ((2.0, 1.5, 2.5), "2.000 ± 0.500"), ((2.0, 1.52, 2.5), "2.000 ± 0.490"),         # as good as symmetric
    ((0.5, math.nan, math.nan), "0.500")])
def test_an_interval_is_shown_by_its_ends_unless_they_are_equally_far(figure, text):
    assert format_figure(*figure) == text


@pytest.mark.parametrize("n, t", [(2, 12.706), (5, 2.776), (16, 2.131), (17, 2.120), (41, 2.021)])
def test_the_interval_over_seeds_is_students(n, t):
    """t: the 97.5 % quantile of n − 1 degrees of freedom. The numbers 1 … n have the variance n(n + 1)/12."""
    mean, half = (n + 1) / 2, t * ((n + 1) / 12) ** 0.5
    assert mean_of([float(value) for value in range(1, n + 1)]) == pytest.approx(
        (mean, mean - half, mean + half), abs=0.003 * half)


@pytest.fixture(scope="module")
def evaluated():
    policy, tokenizer = toy_model(seed=1)
    reference, _ = toy_model(seed=2)
    with torch.no_grad():                              # far enough apart for KL to stand out of its noise
        for parameter in reference.parameters():
            parameter *= 1.5
    pairs = [Pair(f"how was the {noun} ?", f"the {noun} was good .", "the")
             for noun in ("soup", "tea", "cake") * 20]
    examples, *_ = encode(pairs, tokenizer, {tokenizer.eos_token_id}, 16, 16)
    args = sail_args(["--variant", "dpo", "--beta", "0.2"])

    def win_on_first_half(prompts, responses):         # data's responses score 0; samples 1, 0 (a tie) or −1
        win_on_first_half.calls += 1
        third = len(responses) // 3
        return ([0.0] * len(responses) if win_on_first_half.calls == 2
                else [1.0] * third + [0.0] * third + [-1.0] * third)

    win_on_first_half.calls = 0
    reward = Reward("win on first half", win_on_first_half)
    figures, samples = evaluate_policy(policy, reference, tokenizer, examples, reward, args)
    return policy, reference, examples, figures, samples


def test_a_tie_is_half_a_win(evaluated):
    *_, figures, samples = evaluated
    assert figures["win_rate"][0] == 0.5 and figures["reward"][0] == 0 and samples[0]["reward"] == 1.0
    assert figures["win_rate"] == share_of([1.0, 0.5, 0.0] * 20)


def test_the_figures_on_pairs_are_those_of_the_loss(evaluated):
    policy, reference, examples, figures, _ = evaluated
    with torch.no_grad():
        losses = dpo_loss(*pair_logps(policy, examples), *pair_logps(reference, examples), beta=0.2)
    assert figures["loss"][0] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert figures["accuracy"][0] == pytest.approx((losses < math.log(2)).float().mean().item())


def test_kl_and_loss_are_of_each_examples_own_rows_in_its_place(monkeypatch):
    (policy, tokenizer), (reference, _) = toy_model(seed=1), toy_model(seed=2)
    pairs = pairs_of(grammar_pairs(held_out=True))[:70]
    examples, *_ = encode(pairs, tokenizer, {tokenizer.eos_token_id}, 16, 48)
    args = sail_args(["--variant", "dpo", "--beta", "0.2", "--max-response-length", "48"])
    monkeypatch.setattr(evaluate, "mean_of", list)                     # each example's figure, not the mean
    figures, _ = evaluate_policy(policy, reference, tokenizer, examples, None, args)
    torch.manual_seed(seeded("held-out samples", 0, 0))                  # the same samples again
    samples, *_ = sample(policy, tokenizer, [example.prompt_ids for example in examples], 48)
    assert len({len(ids) for ids, in samples}) > 20 and figures["length"] == [len(ids) for ids, in samples]
    for nth, (example, (ids,)) in enumerate(zip(examples, samples, strict=True)):
        with torch.no_grad():
            rows = [example, replace(example, chosen_ids=ids, rejected_ids=ids)]
            ratio = torch.cat([pair_logps(policy, [row]) - pair_logps(reference, [row]) for row in rows], 1)
        assert figures["kl"][nth] == pytest.approx(ratio[0, 1].item(), abs=1e-4)
        assert figures["margin"][nth] == pytest.approx(0.2 * (ratio[0, 0] - ratio[1, 0]).item(), abs=1e-4)


def test_each_process_draws_held_out_samples_of_its_own_and_the_first_those_of_a_single_one(evaluated,
                                                                                            monkeypatch):
    """Otherwise two processes would give one answer where their prompts are the same."""
    policy, reference, examples, _, samples = evaluated
    args = sail_args(["--variant", "dpo", "--beta", "0.2"])
    drawn = []
    for rank in (0, 1, 2):
        monkeypatch.setattr(evaluate, "rank", lambda rank=rank: rank)
        drawn.append(evaluate_policy(policy, reference, toy_model()[1], examples, None, args)[1])
    first, second, third = ([row["response"] for row in rows] for rows in drawn)
    assert first == [row["response"] for row in samples] and first != second != third != first


SMALL = ["--max-prompt-length", "8", "--max-response-length", "24"]


def run_evaluate(monkeypatch, *argv):
    """The figures that evaluate.py writes for these arguments."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, argv), "--out", "figures.json"])
    evaluate.main()
    return json.loads(Path("figures.json").read_text())


def samples_of(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_each_evaluation_draws_samples_of_its_own(tmp_path, base, held_out):
    """A learning rate of almost 0 leaves the model as it is: the same samples would be drawn again."""
    argv = ["--variant", "dpo", "--model", base, "--steps", "2", "--eval-every", "1", "--eval-limit", "4",
            "--eval-data", held_out, "--learning-rate", "1e-12"]
    for name in ("run", "again"):
        sail_main([*argv, "--out", str(tmp_path / name)])
    by_step = [[row["response"] for row in samples_of(tmp_path / "run") if row["step"] == step]
               for step in (0, 1, 2)]
    assert by_step[0] != by_step[1] != by_step[2] != by_step[0]
    assert samples_of(tmp_path / "run") == samples_of(tmp_path / "again")


def test_a_run_is_evaluated_as_it_was_trained(tmp_path, base):
    asked = {"beta": 0.7, "max_prompt_length": 9, "max_response_length": 11, "sample_batch_size": 3,
             "dtype": "bfloat16", "prefer": "safer", "score_scale": 2.5}
    flags = [text for name, value in asked.items() for text in ("--" + name.replace("_", "-"), str(value))]
    sail_main(["--variant", "dpo", "--model", base, "--steps", "1", "--eval-limit", "2", "--out",
               str(tmp_path / "run"), *flags])
    saved = json.loads((tmp_path / "run/args.json").read_text())
    _, settings = evaluate.find_run(str(tmp_path / "run"), {"reward": saved["reward"]})
    for name in ("data", "eval_data", "reference", *asked):
        assert getattr(settings, name) == saved[name], name
        assert saved[name] == asked.get(name, saved[name])
    _, answered = read_run(tmp_path / "run", generate.Answers, *generate.OF_A_RUN)
    assert answered == {name: saved[name] for name in (
        "data", "eval_data", *{*asked} - {"beta", "prefer", "score_scale"})}


def test_the_held_out_loss_of_sft_is_over_all_tokens_and_its_interval_a_ratios(base):
    policy, _ = generate.load_policy(base)
    examples = [Pair("", "a", prompt_ids=[5, 6], chosen_ids=ids) for ids in ([7, 8], [9, 7, 8, 6, 1])]
    loss = evaluate.pair_columns(policy, None, examples, sail_args(["--variant", "sft"]))["loss"]
    sums = []
    for example in examples:
        with torch.no_grad():
            logits = policy(torch.tensor([example.prompt_ids + example.chosen_ids])).logits[0, 1:-1]
        chosen = torch.tensor(example.chosen_ids)
        sums.append(torch.nn.functional.cross_entropy(logits, chosen, reduction="sum").item())
    ratio = sum(sums) / 7
    assert sum(loss) / 2 == pytest.approx(ratio, abs=1e-5)
    assert loss[0] - ratio == pytest.approx((sums[0] - 2 * ratio) / 3.5, abs=1e-5)


@pytest.mark.parametrize("p", [1.0, 0.7, 0.5])
def test_held_out_figures_follow_the_probability_of_the_label_as_in_training(p, base, held_out):
    policy, tokenizer = generate.load_policy(base)
    reference, _ = generate.load_policy(f"{base}/reference")
    examples, _, _ = encode(load_pairs(held_out, 12)[0], tokenizer, [1], 8, 24)
    examples = [replace(example, preference=p) for example in examples]
    args = sail_args(["--beta", "0.5"])
    found = evaluate.pair_columns(policy, reference, examples, args)
    logps = []
    for model in (policy, reference):
        for side in ("chosen_ids", "rejected_ids"):
            responses = [getattr(example, side) for example in examples]
            logps.append(evaluate.response_logps(model, examples, responses, "float32"))
    losses, metrics = sail.sail_loss(*logps, preference=torch.full((12,), p), beta=0.5)
    assert found["loss"] == pytest.approx(losses.tolist())
    for name in ("margin", "accuracy"):
        assert sum(found[name]) / 12 == pytest.approx(metrics[name].item(), abs=1e-6)
    assert p == 0.5 or abs(metrics["margin"]) > 0


def test_of_few_held_out_prompts_each_is_answered_as_often_as_the_limit_allows(tmp_path, base, capsys):
    rows = grammar_pairs(held_out=True)[:3]
    write_rows(tmp_path / "held-out.jsonl", rows)
    argv = ["--eval-data", f"{tmp_path}/held-out.jsonl", "--eval-limit", "14"]
    sail_main(["--variant", "dpo", "--model", base, "--steps", "1", "--out", str(tmp_path / "run"), *argv])
    said = capsys.readouterr().out
    assert "evaluating: 12 responses of up to 24 tokens to the prompts of 3 held-out pairs" in said
    row = json.loads((tmp_path / "run/eval.jsonl").read_text().splitlines()[0])
    assert (row["prompts"], row["responses"]) == (3, 12)
    assert row["unfinished"] * 12 == pytest.approx(round(row["unfinished"] * 12))
    assert [evaluate.responses_to_each(n, 128) for n in (128, 65, 64, 9)] == [1, 1, 2, 14]
    first = [sample["prompt"] for sample in samples_of(tmp_path / "run") if sample["step"] == 1]
    assert first == [row["prompt"] for row in rows]                    # each once


def test_the_figures_count_all_responses_to_a_prompt(monkeypatch, base):
    policy, tokenizer = generate.load_policy(base)
    examples = [Pair(prompt, "the", "the", [5], [6, 1], [7, 1], finished=(prompt == "a", True))
                for prompt in ("a", "b")]
    drawn = [[[8, 1]], [[8] * 6], [[8] * 4], [[8] * 8]]
    monkeypatch.setattr(evaluate, "sample",
                        lambda *_, **__: (drawn, [[True], [True], [False], [True]], None))
    rewards = []

    def reward(prompts, responses, finished):
        rewards.append((prompts, finished))
        return [0.0, 1.0, 2.0, 3.0] if len(rewards) == 1 else [0.0, 1.0, 0.0, 1.0]

    args = sail_args(["--variant", "dpo"])
    figures, samples = evaluate_policy(policy, policy, tokenizer, examples, Reward("nth", reward), args,
                                       num_responses=2)
    assert figures["length"] == mean_of([3.0, 7.0]) and figures["unfinished"] == share_of([0.5, 0.0])
    assert rewards[0] == (["a", "b", "a", "b"], [True, True, False, True])    # of which the rewards are 0 … 3
    assert rewards[1] == (["a", "b", "a", "b"], [True, False, True, False])   # of the data's chosen responses
    assert figures["reward"] == mean_of([1.0, 2.0])
    assert figures["win_rate"] == share_of([0.75, 0.75])               # 0, 2 against 0 and 1, 3 against 1
    assert [row["prompt"] for row in samples] == ["a", "b", "a", "b"]


def test_models_are_evaluated_into_a_table_and_a_file(tmp_path, monkeypatch, capsys, base):
    monkeypatch.chdir(tmp_path)
    other = f"{base}/reference"
    for variant, more in (("sft", []), ("dpo", ["--reference", other]), ("pr", ["--reference", other])):
        sail_main(["--variant", variant, "--model", base, "--steps", "2", "--eval-limit", "4", *more])
    row = json.loads((tmp_path / "runs/toy/pr/eval.jsonl").read_text().split("\n")[0])
    figures = {name for name in row if not name.endswith("_interval")} - {"step", "prompts", "responses"}
    assert {"kl", "reward", "win_rate", "length", "loss"} <= figures
    assert all(row[f"{name}_interval"][0] <= row[name] <= row[f"{name}_interval"][1] for name in figures)
    results = run_evaluate(monkeypatch, "runs/toy/sft", "runs/toy/dpo", "runs/toy/pr", "--eval-limit", "8",
                           "--reward", TOY_REWARD)
    table = capsys.readouterr().out
    assert list(results) == ["sft", "dpo", "pr"] and "win_rate" in table and f"reference {other}" in table
    assert all(figure["low"] - 1e-9 <= figure["value"] <= figure["high"] + 1e-9
               for figures in results.values() for figure in figures.values())
    again = run_evaluate(monkeypatch, "figures.json", "runs/toy/dpo/model", "--eval-limit", "8", *SMALL,
                         "--eval-data", "runs/toy/world/held-out.jsonl")
    assert again["model"]["kl"]["value"] == 0          # a bare checkpoint: its own reference, so no KL


def test_one_prompt_gives_figures_without_intervals_as_null(monkeypatch, tmp_path, base, held_out):
    monkeypatch.chdir(tmp_path)
    figures, = run_evaluate(monkeypatch, base, "--eval-limit", "1", *SMALL, "--reward", TOY_REWARD,
                            "--eval-data", held_out).values()
    assert set(figures["reward"]) == {"value", "low", "high"} and figures["reward"]["low"] is None


def test_prompts_alone_have_reward_kl_and_lengths_and_no_other_figure(monkeypatch, tmp_path, base):
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "how was the soup ?"}\n{"prompt": "how was the tea ?"}\n')
    figures, = run_evaluate(monkeypatch, base, "--eval-data", "prompts.jsonl", *SMALL, "--reward",
                            TOY_REWARD).values()
    assert set(figures) == {"reward", "kl", "objective", "length", "unfinished"}


# --- runs, which may be somebody else's

def run_of(path, base, **settings):
    """A run of sail.py as evaluate.py finds it: a model, and its settings."""
    shutil.copytree(base, path / "model")
    write_rows(path / "pairs.jsonl", grammar_pairs()[:300])            # of which it holds some out
    (path / "args.json").write_text(json.dumps({
        "data": f"{path}/pairs.jsonl", "reward": None, "max_prompt_length": 8, "max_response_length": 24,
        **settings}))
    return str(path)


def test_figures_are_written_into_the_run_or_beside_it_and_nowhere_else(tmp_path, monkeypatch, base):
    run, here = run_of(tmp_path / "runs/pr", base), tmp_path / "here"
    (tmp_path / "runs/pr/eval.jsonl").write_text(
        '{"step": 1, "prompts": 4, "reward": 1.0, "reward_interval": null}\n')
    here.mkdir()
    monkeypatch.chdir(here)
    files = {"--eval-limit=2": ("pr/evaluated.json", "kl"), "--compare": ("results.json", "reward")}
    for flag, (file, name) in files.items():                           # neither overwrites the other's
        monkeypatch.setattr("sys.argv", ["evaluate.py", run, flag])
        evaluate.main()
        results = tmp_path / "runs" / file
        assert name in json.loads(results.read_text())["pr"] and not list(here.iterdir())
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"pr", "results.json", "results.png"}


def test_models_have_the_last_parts_of_their_paths_as_names_unless_two_are_alike():
    def names_of(*paths, length=1):
        return short_names([Path(path) for path in paths], length)

    assert names_of("a/x", "b/y", "z") == ["x", "y", "z"] and names_of(".") == ["."]
    assert names_of("a/x", "b/x") == ["a/x", "b/x"]
    assert names_of("a/x/checkpoints/4", "y", length=3) == ["x/checkpoints/4", "y"]
    assert evaluate.parse_args(["a/x", "./a/x/", "./y"])[0] == ["./a/x/", "./y"]           # each once


@pytest.mark.parametrize("path, model, out, file", [
    ("runs/one", "runs/one/model", None, "runs/one/evaluated.json"),
    ("runs/one", "runs/one/model", "mine.json", "mine.json"),
    ("owner/name", "owner/name", None, "evaluated.json"),
    ("runs/one/checkpoints/4", "runs/one/checkpoints/4", None, "evaluated.json")])
def test_the_figures_of_a_run_are_for_its_directory_and_those_of_other_models_for_here(
        path, model, out, file):
    assert evaluate.file_of_figures(path, model, out) == Path(file)


def test_another_file_of_the_name_evaluated_json_is_not_overwritten(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("evaluated.json").write_text('{"mine": 1}')
    argv = ["evaluate.py", base, "--data", f"{base}/toy-pairs.jsonl"]
    assert "evaluated.json is a file that this command has not written" in fails(
        evaluate.main, argv, monkeypatch, capsys)
    assert Path("evaluated.json").read_text() == '{"mine": 1}'


def test_compare_writes_where_it_has_looked_even_if_the_first_run_is_left_out(tmp_path, monkeypatch):
    run = finished_run(tmp_path / "theirs/dpo", (5, 1.0, 2.0))
    (tmp_path / "theirs/results.json").write_text('{"theirs": 1}')
    (tmp_path / "mine/unfinished").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--compare", str(tmp_path / "mine/unfinished"), str(run)])
    evaluate.main()
    assert (tmp_path / "theirs/results.json").read_text() == '{"theirs": 1}'
    assert (tmp_path / "mine/results.json").is_file() and (tmp_path / "mine/results.png").is_file()


def test_a_runs_reward_that_is_code_runs_on_the_command_lines_word_alone(tmp_path, monkeypatch, capsys, base):
    monkeypatch.chdir(tmp_path)
    Path("theirs.py").write_text("open('ran', 'w')\n"
                                 "def f(prompts, responses):\n    return [7.0] * len(responses)\n")
    run = run_of(tmp_path / "run", base, reward="theirs.py:f")
    assert ("run: its reward, theirs.py:f, is code; it runs only if --reward names it"
            in fails(evaluate.main, ["evaluate.py", run, "--eval-limit", "2"], monkeypatch, capsys))
    run_evaluate(monkeypatch, run, "--eval-limit", "2", "--reward", TOY_REWARD)
    assert not Path("ran").exists()
    figures = run_evaluate(monkeypatch, run, "--eval-limit", "2", "--reward", "theirs.py:f")
    assert figures["run"]["reward"]["value"] == 7 and Path("ran").exists()


def test_a_models_code_runs_on_the_command_lines_word_alone(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    run = run_of(tmp_path / "run", base, trust_remote_code=True)
    config = json.loads(Path("run/model/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "theirs.Theirs"}
    Path("run/model/config.json").write_text(json.dumps(config))
    Path("run/model/theirs.py").write_text("from transformers import LlamaForCausalLM\nopen('ran', 'w')\n"
                                           "class Theirs(LlamaForCausalLM):\n    pass\n")
    run_evaluate(monkeypatch, run, "--eval-limit", "2")
    assert not Path("ran").exists()
    run_evaluate(monkeypatch, run, "--eval-limit", "2", "--trust-remote-code")
    assert Path("ran").exists()


@pytest.mark.parametrize("name, flags", [("args.json", []), ("eval.jsonl", ["--compare"])])
def test_a_file_cut_short_or_of_another_kind_is_one_line(name, flags, tmp_path, monkeypatch, capsys, base):
    run = run_of(tmp_path / "run", base)
    (tmp_path / "run/eval.jsonl").write_text('{"step": 0, "prompts": 4}\n{"step": 5, "prompts": 4}\n')
    whole = (tmp_path / "run" / name).read_text()
    for content in (whole[:-5], "[1]"):
        (tmp_path / "run" / name).write_text(content)
        assert f"run/{name}:" in fails(evaluate.main, ["evaluate.py", run, *flags], monkeypatch, capsys)


def test_a_run_without_an_evaluation_is_not_compared(tmp_path):
    (finished_run(tmp_path / "empty") / "eval.jsonl").write_text("\n")
    with pytest.raises(InputError, match="no finished run"):
        compare([tmp_path / "empty"], tmp_path / "results.json")


def finished_run(path, *rows):
    """A directory as sail.py leaves it, with these evaluations: (step, KL, reward)."""
    (path / "model").mkdir(parents=True)
    lines = [{"step": step, "prompts": 4, "kl": kl, "kl_interval": [kl - 0.1, kl + 0.1], "reward": reward,
              "reward_interval": reward and [reward - 0.2, reward + 0.3]} for step, kl, reward in rows]
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
    assert results["dpo"] == {"reward": {"value": 1.0, "low": 0.8, "high": 1.3},       # its own intervals
                              "kl": {"value": 3.0, "low": 2.9, "high": 3.1}}
    assert results["pr"]["reward"] == pytest.approx(
        {"value": 2.5, "low": 2.5 - 12.71 * 0.5, "high": 2.5 + 12.71 * 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert "| pr | 2 | 2.500 ± 6.355 | 1.500 ± 6.355 |" in lines
    assert f"{tmp_path} is left out: it is no run; evaluate.py without --compare measures any model" in lines
    assert f"{tmp_path}/unfinished is left out: it is no run; " in "\n".join(lines)
    assert "| dpo | 1 | 1.000 [0.80, 1.30] | 3.000 ± 0.100 |" in lines
    assert (tmp_path / "out" / "results.png").read_bytes()[:4] == b"\x89PNG"
    compare([runs[2], finished_run(tmp_path / "other" / "dpo", (5, 1.0, 1.0))], tmp_path / "two.json")
    assert list(json.loads((tmp_path / "two.json").read_text())) == [f"{tmp_path.name}/dpo", "other/dpo"]
    with pytest.raises(InputError, match="no finished run"):
        compare([tmp_path / "results.json"], tmp_path / "results.json")


def test_each_group_is_drawn_in_a_colour_of_its_own(tmp_path, monkeypatch):
    """Those of the methods are fixed, and no other name gets one that is drawn beside it."""
    drawn, errorbar = [], matplotlib.axes.Axes.errorbar
    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", lambda *inputs, **more: (
        drawn.append(more["color"]), errorbar(*inputs, **more))[1])
    names = ["mine", "sft", "other", "dpo", "third"]
    compare([finished_run(tmp_path / name, (5, 1.0, 2.0)) for name in names], tmp_path / "results.json")
    assert len({*drawn}) == len(names) and [drawn[1], drawn[3]] == [COLOURS["sft"], COLOURS["dpo"]]


def test_a_dollar_in_a_path_begins_no_formula_in_the_picture(tmp_path):
    compare([run_measured_on(tmp_path / name, eval_data=f"{name}$^$x") for name in ("a$^$", "b$_$")],
            tmp_path / "results.json")
    assert (tmp_path / "results.png").is_file()


def test_a_track_goes_through_the_steps_that_all_seeds_have_measured(tmp_path):
    runs = [finished_run(tmp_path / "pr-s9", (0, 0.0, 1.0), (5, 1.0, 2.0), (7, 9.0, 9.0)),
            finished_run(tmp_path / "pr-s10", (0, 0.0, 0.0), (5, 2.0, 3.0))]
    table, = tables_of(read_runs(runs))
    assert list(table.groups) == ["pr"] and track_of(table.groups["pr"]) == ([0.0, 1.5], [0.5, 2.5])


def test_seeds_without_a_common_step_are_compared_at_their_ends(tmp_path, capsys):
    runs = [finished_run(tmp_path / "pr-s0", (5, 1.0, 2.0)), finished_run(tmp_path / "pr-s1", (7, 2.0, 3.0))]
    compare(runs, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["pr"]["reward"]["value"] == 2.5
    assert (tmp_path / "results.png").is_file() and "| pr | 2 | 2.500 ± 6.355 |" in capsys.readouterr().out


def test_runs_without_a_reward_are_compared_in_what_they_have(tmp_path, capsys):
    compare([finished_run(tmp_path / "dpo", (0, 0.0, None), (5, 1.0, None)),
             finished_run(tmp_path / "pr", (0, 0.0, None), (5, 2.0, 3.0))], tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["dpo"]) == ["kl"] and list(results["pr"]) == ["reward", "kl"]
    assert "| dpo |  | 1.000 ± 0.100 |" in capsys.readouterr().out


def test_texts_of_others_have_no_control_over_the_terminal(tmp_path, capsys):
    hostile = ("\x1b[2Jred \x1b[31mtext\x1b[0m \x1b]0;a title\x07\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ "
               "\x1bPsixel\x1b\\\x1bc\x9b1mbell\x07 back\x08 up\rover \x00\x7f\ud800é\tt\n2nd line 👩‍🚀")
    run = finished_run(tmp_path / "p\x1b[1mr", (5, 1.0, 2.0))
    sample = {"step": 5, "prompt": [{"role": "user", "content": hostile}], "response": hostile}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    compare([run], tmp_path / "results.json", show=1)
    shown = capsys.readouterr().out
    assert not set(shown) & {*map(chr, range(32)), *map(chr, range(127, 160)), "\ud800"} - {"\n", "\t"}
    assert shown.count("[2Jred [31mtext[0m ") == 2 and "| p[1mr |" in shown
    assert shown.count("bell back upover é\tt\n2nd line 👩‍🚀") == 2


def table_of(text):
    """The lines of a markdown table as {first cell: {head: cell}}."""
    heads, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
                       if line.startswith("|")]
    return {row[0]: dict(zip(heads, row, strict=True)) for row in rows}


def test_the_table_shows_what_may_hide_behind_a_reward(tmp_path, capsys):
    run = finished_run(tmp_path / "pr", (5, 1.0, 2.0))
    figures = {"unfinished": 0.25, "margin": 0.5, "accuracy": 0.75}
    intervals = {f"{name}_interval": None for name in figures}
    (run / "eval.jsonl").write_text(json.dumps({"step": 5, "prompts": 4, **figures, **intervals}) + "\n")
    compare([run], tmp_path / "results.json")
    assert table_of(capsys.readouterr().out)["pr"] == {
        "": "pr", "unfinished": "0.250", "margin": "0.500", "accuracy": "0.750"}
    assert json.loads((tmp_path / "results.json").read_text())["pr"]["margin"]["value"] == 0.5


def test_the_model_as_it_was_is_a_row_before_the_runs_that_began_from_it(tmp_path, capsys):
    runs = [finished_run(tmp_path / "sft", (5, 9.0, 9.0)),                       # was not evaluated before
            finished_run(tmp_path / "dpo", (0, 0.0, 1.0), (5, 1.0, 2.0)),
            finished_run(tmp_path / "pr", (0, 0.0, 1.0), (5, 2.0, 3.0)),
            finished_run(tmp_path / "dp", (0, 0.0, 4.0), (5, 2.0, 5.0)),         # began elsewhere
            finished_run(tmp_path / "pp", (0, 0.0, 6.0))]                        # took no step
    compare(runs, tmp_path / "results.json")
    table = table_of(capsys.readouterr().out)
    assert list(table) == ["sft", "step 0 of dpo, pr", "dpo", "pr", "step 0 of dp", "dp", "pp"]
    assert table["step 0 of dpo, pr"]["reward"] == "1.000 [0.80, 1.30]" and table["step 0 of dp"]["KL"]
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["sft", "dpo", "pr", "dp", "pp"]


SETTINGS = {"reward": "mine.py:score", "reward_sha256": "1" * 64, "data": "x", "eval_data": "y",
            "eval_limit": 8, "max_prompt_length": 8, "max_response_length": 24,
            "reference": "sft/model", "beta": 0.1, "reference_sha256": "2" * 64}


def run_measured_on(path, **other):
    """A finished run whose figures were measured on SETTINGS, or on others."""
    run = finished_run(path, (5, 1.0, 2.0))
    (run / "args.json").write_text(json.dumps({**SETTINGS, **other}))
    return run


def test_reward_models_are_compared_at_the_lengths_that_they_read(tmp_path, capsys):
    """Without --max-length a reward model reads what its model takes."""
    runs, args = [], dict(data="d", eval_data="e", eval_limit=4, model="base", max_length=None)
    settings = dict(one={}, two={}, other=dict(model="other"), short=dict(max_length=9))
    for name, more in settings.items():
        runs.append(finished_run(tmp_path / name, (5, 1.0, 2.0)))
        (runs[-1] / "args.json").write_text(json.dumps({**args, **more}))
    compare(runs, tmp_path / "results.json")
    shown = capsys.readouterr().out
    assert shown.count("Measured on") == 3 and "dialogues of up to 9 tokens" in shown
    assert "dialogues of as many tokens as base takes" in shown


@pytest.mark.parametrize("other", [
    dict(reward="mine.py:other"), dict(reward_sha256="3" * 64), dict(eval_data="z"), dict(eval_data=None),
    dict(eval_limit=9), dict(max_prompt_length=9), dict(max_response_length=9), dict(reference="dpo/model"),
    dict(reference_sha256="3" * 64), dict(beta=0.2)])
def test_figures_of_unlike_things_are_in_tables_and_panels_of_their_own(other, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axes, text, **_: drawn.append(text))
    runs = [run_measured_on(tmp_path / "sft", reference=None, beta=7.0, reference_sha256=None)]    # has no KL
    runs += [run_measured_on(tmp_path / "dpo", data="its own"), run_measured_on(tmp_path / "pr", **other),
             run_measured_on(tmp_path / "dp", **other)]
    compare(runs, tmp_path / "results.json")
    shown = capsys.readouterr().out.splitlines()
    heads = [nth for nth, line in enumerate(shown) if line.startswith("Measured on: ")]
    assert len(heads) == len(drawn) == 2 and shown[heads[0]] != shown[heads[1]]
    first, second = ["\n".join(part) for part in (shown[heads[0]:heads[1]], shown[heads[1]:])]
    assert list(table_of(first)) == ["sft", "dpo"] and list(table_of(second)) == ["pr", "dp"]
    assert shown[heads[0]] == (
        "Measured on: reward mine.py:score (11111111); up to 8 pairs of y; prompts of up to 8 tokens, "
        "responses of up to 24; reference sft/model (22222222); β 0.1")


def test_the_held_out_pairs_are_told_apart_by_their_file_or_by_the_rows_that_they_are_held_out_of(
        tmp_path, monkeypatch):
    """A path is the same in whatever way it is written."""
    monkeypatch.chdir(tmp_path)
    Path("y").touch()
    for nth, (one, other, tables) in enumerate([
            (dict(eval_data="y"), dict(eval_data=f"{tmp_path}/y"), 1),
            (dict(eval_data="y"), dict(eval_data="x"), 2), (dict(eval_data=None), dict(eval_data="x"), 2),
            (dict(eval_data=None), dict(eval_data=None, limit=5), 2)]):
        runs = [run_measured_on(tmp_path / f"{nth}/{name}", **more)
                for name, more in (("one", one), ("other", other))]
        assert len(tables_of(read_runs(runs))) == tables, other


def test_seeds_that_were_measured_on_unlike_things_are_no_seeds_of_each_other(tmp_path, capsys):
    compare([run_measured_on(tmp_path / "pr-s0"), run_measured_on(tmp_path / "pr-s1", reward="mine.py:other"),
             run_measured_on(tmp_path / "pr-s2")], tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["pr (pr-s0, pr-s2)", "pr (pr-s1)"]
    assert capsys.readouterr().out.count("Measured on") == 2


def test_runs_of_one_name_are_told_apart_by_as_much_of_their_paths_as_that_takes(tmp_path):
    compare([run_measured_on(tmp_path / name) for name in ("a/x/dpo", "b/x/dpo")], tmp_path / "results.json")
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["a/x/dpo", "b/x/dpo"]


def test_the_seeds_of_a_method_may_have_a_reference_each(tmp_path, capsys):
    runs = [run_measured_on(tmp_path / f"{name}-s{seed}", reference=f"sft-s{seed}/model")
            for name in ("dpo", "pr") for seed in (0, 1)]
    compare(runs, tmp_path / "results.json")
    shown = capsys.readouterr().out
    assert shown.count("Measured on") == 1 and {"dpo", "pr"} == {*table_of(shown)}
    assert "sft-s0/model (22222222), reference sft-s1/model (22222222); β 0.1" in shown


def test_a_model_with_another_vocabulary_than_the_reference_is_refused(monkeypatch, base, held_out, tmp_path):
    """One of as many tokens, of which two have changed places."""
    other = shutil.copytree(base, tmp_path / "other")
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["soup"], vocabulary["tea"] = vocabulary["tea"], vocabulary["soup"]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(InputError, match="the reference .* has another vocabulary than "):
        run_evaluate(monkeypatch, base, other, "--eval-limit", "4", *SMALL, "--eval-data", held_out)
    with pytest.raises(InputError, match="the reference .* has another vocabulary than "):
        sail_main(["--variant", "dpo", "--model", base, "--reference", str(other)])


def test_held_out_pairs_need_no_training_data(monkeypatch, base, held_out, tmp_path, capsys):
    data = shutil.copy(f"{base}/toy-pairs.jsonl", tmp_path / "train.jsonl")
    short = ["--variant", "dpo", "--model", base, "--steps", "1", "--batch-size", "2", "--eval-limit", "4"]
    sail_main([*short, *SMALL, "--data", str(data), "--eval-data", held_out, "--out", str(tmp_path / "run")])
    data.unlink()
    monkeypatch.chdir(tmp_path)
    of_run = run_evaluate(monkeypatch, "run")["run"]
    of_model = run_evaluate(monkeypatch, "run/model", "--eval-data", held_out, "--eval-limit", "4", *SMALL)
    assert of_run["length"] == next(iter(of_model.values()))["length"]
    monkeypatch.setattr("sys.argv", ["generate.py", "--model", "run", "--limit", "2", "--out", "a.jsonl"])
    generate.main()
    assert len(read_rows("a.jsonl")) == 2
    found = run_evaluate(monkeypatch, "run/model", "--eval-data", "run", "--eval-limit", "4", *SMALL)
    assert next(iter(found.values()))["length"] == of_run["length"]


def test_a_reference_that_lacks_ids_of_the_policy_is_refused(monkeypatch, base, held_out, tmp_path):
    other = shutil.copytree(f"{base}/reference", tmp_path / "other")
    reference, _ = generate.load_policy(str(other))
    reference.resize_token_embeddings(30)
    reference.save_pretrained(other)
    with pytest.raises(InputError, match="the reference .* has only 30 ids, and "):
        run_evaluate(monkeypatch, base, "--reference", other, "--eval-limit", "4", *SMALL, "--eval-data",
                     held_out)
    with pytest.raises(InputError, match="the reference .* has only 30 ids, and "):
        sail_main(["--variant", "dpo", "--model", base, "--reference", str(other)])


# --- wins

def test_a_model_against_its_own_samples_wins_half(tmp_path, monkeypatch, base, held_out):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["generate.py", "--model", base, "--data", held_out, "--seed", "7",
                                     "--max-prompt-length", "8", "--max-response-length", "24"])
    generate.main()
    rows = [json.loads(line) for line in Path("responses.jsonl").read_text().splitlines()]
    Path("pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": row["prompt"], "chosen": row["response"], "rejected": "the"}) + "\n" for row in rows))
    figures, = run_evaluate(monkeypatch, base, "--eval-data", "pairs.jsonl", *SMALL, "--reward",
                            TOY_REWARD).values()
    value, low, high = figures["win_rate"].values()
    assert low < 0.5 < high and high - low < 0.2 and value != 0.5              # other samples, so no draw


def test_wins_are_counted_against_the_chosen_responses_each_to_its_prompt(tmp_path, monkeypatch, checkpoint):
    """By their texts, without the token that ends them."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": f"how was the {noun} ?", "chosen": noun, "rejected": "was"}) + "\n"
        for noun in ("soup", "tea", "cake", "bread")))
    Path("mine.py").write_text("""def score(prompts, responses):
    data = [response in prompt.split() for prompt, response in zip(prompts, responses)]
    return [0.5] * len(data) if all(data) else [float("tea" in prompt) for prompt in prompts]
""")
    figures, = run_evaluate(monkeypatch, checkpoint, "--eval-data", "pairs.jsonl", "--max-prompt-length",
                            "64", "--max-response-length", "24", "--reward", "mine.py:score").values()
    assert figures["win_rate"]["value"] == 0.25                        # 1 for tea, 0 for others, against 0.5


@pytest.mark.parametrize("argv", [[], ["--compare"], [__file__]])
def test_nothing_to_evaluate_is_one_line(argv, monkeypatch, capsys):
    assert "give the directory of a run, or a model" in fails(
        evaluate.main, ["evaluate.py", *argv], monkeypatch, capsys)


def test_a_row_of_the_toy_says_of_each_response_whether_it_ended():
    """Whichever of the two is drawn as the chosen one; a row says nothing where both have."""
    rng, kept = random.Random(0), set()
    for _ in range(20):
        row = toy_pair(rng, "review the soup :", "the soup was good .", "the soup was bad", (True, False))
        ended = {row["chosen"]: row["chosen_finished"], row["rejected"]: row["rejected_finished"]}
        assert ended == {"the soup was good .": True, "the soup was bad": False}
        kept.add(row["chosen"])
    assert len(kept) == 2
    for done in (True, False):
        row = toy_pair(rng, "review the soup :", "the soup", "the tea", (done, done))
        assert [row.get("chosen_finished", True), row.get("rejected_finished", True)] == [done, done]
        assert ("chosen_finished" in row) == (not done)
