"""The sentiment study: its data and its figures, and its command with all that is slow left out."""
import itertools
import json
import math

import pytest
import sentiment

from formats import read_rows


def test_no_beginning_is_both_trained_on_and_held_out():
    train, held_out = sentiment.beginnings()
    assert len(train) == 136 and len(held_out) == 64 and len({*train, *held_out}) == 200


def test_best_of_n_is_the_mean_of_the_best_over_all_ways_to_draw_n(monkeypatch):
    rewards = {"a": -1.0, "b": 0.5, "c": 2.0, "d": 4.0}
    judge = {"a": 3.0, "b": 1.0, "c": -2.0, "d": 0.0}
    monkeypatch.setattr(sentiment, "BEST_OF", 4)
    monkeypatch.setattr(sentiment, "BEST_OF_N", (1, 2, 4))
    monkeypatch.setattr(sentiment, "continuations", lambda *_: [list("dbca")])
    monkeypatch.setattr(sentiment, "vader", lambda _, responses: [rewards[each] for each in responses])
    monkeypatch.setattr(sentiment, "afinn", lambda responses: [judge[each] for each in responses])
    for row in sentiment.best_of(None, None):
        drawn = [max(some, key=rewards.get) for some in itertools.combinations("abcd", row["n"])]
        assert row["reward"] == pytest.approx(sum(map(rewards.get, drawn)) / len(drawn))
        assert row["judge"] == pytest.approx(sum(map(judge.get, drawn)) / len(drawn))
        assert row["kl"] == math.log(row["n"]) - (row["n"] - 1) / row["n"]


def test_labels_of_the_pairs_are_drawn_from_bradley_terry(tmp_path, monkeypatch):
    monkeypatch.setattr(sentiment, "load_policy", lambda _: (None, None))
    monkeypatch.setattr(sentiment, "continuations", lambda *args: [["good", "bad"] for _ in args[2]])
    monkeypatch.setattr(sentiment, "vader", lambda _, pair: [1.0 if each == "good" else 0.0 for each in pair])
    monkeypatch.setattr(sentiment, "PAIRS", 4000)
    sentiment.draw_pairs("model", tmp_path / "pairs.jsonl", seed=0)
    share = sum(row["chosen"] == "good" for row in read_rows(tmp_path / "pairs.jsonl")) / 4000
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)


def test_the_command_reports_what_is_finished_and_keeps_the_best_of_n(tmp_path, monkeypatch, capsys):
    def train(jobs, at_a_time, name):
        for out, flags, _ in jobs:
            if "--variant pr" not in flags:                            # which was stopped
                (out / "model").mkdir(parents=True, exist_ok=True)
                (out / "metrics.jsonl").write_text('{"seconds": 1.5}\n' * 2)

    def figures(model, base, seed, path):
        reward = 1.0 + seed + (model != base)
        found = {name: [reward, None, None] for name in ("reward", "kl", "objective", "judge", "length")}
        return dict(figures=found, samples=[{"prompt": "It", "response": f"is {reward}"}] * 3)

    asked = []
    monkeypatch.setattr(sentiment, "ROOT", tmp_path)
    monkeypatch.setattr(sentiment, "plain_model", lambda *_: None)
    monkeypatch.setattr(sentiment, "draw_pairs", lambda *_: None)
    monkeypatch.setattr(sentiment, "load_policy", lambda _: (None, None))
    monkeypatch.setattr(sentiment, "vader", lambda *_: [])
    monkeypatch.setattr(sentiment, "afinn", lambda *_: [])
    monkeypatch.setattr(sentiment, "train_all", train)
    monkeypatch.setattr(sentiment, "judged", figures)
    monkeypatch.setattr(sentiment, "best_of", lambda *_: asked.append(1) or [
        {"world": "best of n", "n": 1, "kl": 0.0, "reward": 0.5, "judge": 0.25}])
    monkeypatch.setattr("sys.argv", f"sentiment.py --model M --runs {tmp_path}/runs --seeds 0 1".split())
    (tmp_path / "experiments").mkdir()
    (tmp_path / "runs").mkdir()
    for _ in range(2):
        sentiment.main()
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "experiments/sentiment.jsonl").read_text().splitlines()]
    assert asked == [1] and [row.get("method") for row in rows[1:7]] == [
        "start", "dpo", "dpo-soft", "dp", "pp", "online-dpo"] and len(rows) == 13
    assert "| DPO | 2.50 ± 6.36 |" in printed and "| as it was | is 1.0 | is 1.0 | is 1.0 |" in printed
    assert "SAIL-PR" not in printed and (tmp_path / "experiments/sentiment.png").is_file()
