"""The sentiment study: its texts, its judge, the rates that it chooses, best-of-n, its tables."""
import itertools
import math

import pytest
import sentiment

RATED = [(2.0, "a superb and moving film"), (1.5, "superb acting"), (-2.0, "a dull film"),
         (-1.0, "dull, flat")]


def test_held_out_beginnings_share_no_opening_and_no_film_with_the_others():
    train, held_out = sentiment.beginnings()
    assert len(train) == 84 and len(held_out) == 24 and not {*train} & {*held_out}
    films = [{film for film in sentiment.FILMS if any(f" {film}" in text for text in texts)}
             for texts in (train, held_out)]
    assert not films[0] & films[1] and len(films[0] | films[1]) == len(sentiment.FILMS)


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """A judge of sentences that repeat RATED, with a stand-in for VADER."""
    lines = []
    for place in range(2400):
        rating, text = RATED[place % 4]
        lines.append(f"{place}\t{rating}\t{text}")
    (tmp_path / "ratings.txt").write_text("\n".join(lines))
    monkeypatch.setattr(sentiment, "vader", lambda _, texts: [float("superb" in text) for text in texts])
    return sentiment.Judge(tmp_path / "ratings.txt")


def test_the_judge_has_learnt_which_words_people_rate_positive(judge):
    assert judge("superb") > 0 > judge("dull") and judge("unheard of") == 0
    assert judge.accuracy == judge.vader_accuracy == 1.0
    assert judge("flat acting") == pytest.approx(judge("flat") + judge("acting"))


def test_each_method_gets_its_best_rate_and_pr_that_of_online_dpo():
    rows = [dict(world=f"rate-{rate:g}", method=method, rate=rate, figures={"objective": [value, None, None]})
            for method, values in (("dpo-soft", (1.0, 3.0, 2.0)), ("online-dpo", (1.0, 2.0, 3.0)))
            for rate, value in zip(sentiment.RATES, values, strict=True)]
    assert sentiment.best_rates(rows) == {"dpo-soft": 3e-5, "online-dpo": 1e-4, "pr": 1e-4}
    assert sentiment.best_rates([]) == {}


def test_best_of_n_is_the_mean_of_the_best_over_all_ways_to_draw_n(monkeypatch):
    samples = [(-1.0, 3.0), (0.5, 1.0), (2.0, -2.0), (4.0, 0.0)]                   # (reward, judge)
    monkeypatch.setattr(sentiment, "BEST_OF_N", (1, 2, 4))
    rewards, judged = zip(*[samples[k] for k in (3, 1, 2, 0)], strict=True)
    for row in sentiment.best_of_n([rewards, rewards], [judged, judged]):
        drawn = [max(some) for some in itertools.combinations(samples, row["n"])]
        assert row["reward"] == pytest.approx(sum(reward for reward, _ in drawn) / len(drawn))
        assert row["judge"] == pytest.approx(sum(judge for _, judge in drawn) / len(drawn))
        assert row["kl"] == math.log(row["n"]) - (row["n"] - 1) / row["n"]


def test_the_tables_have_best_of_n_beside_each_run_and_the_picture_is_drawn(tmp_path):
    rows = [dict(world="best of n", method="best of n", seed=0, n=n, kl=kl, reward=reward, judge=0.5)
            for n, kl, reward in ((1, 0.0, 1.0), (2, 0.2, 2.0), (4, 0.6, 3.0))]
    for seed in (0, 1):
        for method, reward in (("start", 1.0), ("dpo-soft", 2.5), ("online-dpo", 1.5), ("pr", 3.0)):
            figures = {name: [1.5 + seed, None, None]
                       for name in ("kl", "objective", "judge", "positive", "length")}
            rows.append(dict(world="sentiment", method=method, seed=seed, rate=1e-5,
                             figures={**figures, "reward": [reward, None, None]},
                             samples=[dict(prompt="It", response=f"is {method} {seed} | x")]))
    tables = sentiment.tables(rows)
    lines = [line.split(" | ") for line in tables["What each method reaches"].splitlines()]
    of_method = {cells[0]: cells for cells in lines}
    best = [of_method[f"| {sentiment.WORDS[method]}"][3]
            for method in ("start", "dpo-soft", "online-dpo", "pr")]
    assert best == ["0.00 ± 0.00", "0.40 ± 0.00", "0.10 ± 0.00", "0.60 ± 0.00"]
    assert "| SAIL-PR, mix 1, T2 × 0.3 | is pr 0 \\| x |" in tables["Answers"]
    assert "pr 1" not in tables["Answers"]
    assert tables["Best of n"].splitlines()[2] == "| KL, at most | 0.00 | 0.20 | 0.60 |"
    sentiment.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10000
