"""The long study of sentiment: its texts, its judge, the learning rates that it chooses."""
import pytest
import sentiment_long

RATED = [(2.0, "a superb and moving film"), (1.5, "superb acting"), (-2.0, "a dull film"),
         (-1.0, "dull, flat")]


def test_held_out_beginnings_share_no_opening_and_no_film_with_the_others():
    train, held_out = sentiment_long.beginnings()
    assert len(train) == 84 and len(held_out) == 24 and not {*train} & {*held_out}
    films = [{film for film in sentiment_long.FILMS if any(f" {film}" in text for text in texts)}
             for texts in (train, held_out)]
    assert not films[0] & films[1] and len(films[0] | films[1]) == len(sentiment_long.FILMS)


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """A judge of sentences that repeat RATED, with a stand-in for VADER."""
    lines = []
    for place in range(2400):
        rating, text = RATED[place % 4]
        lines.append(f"{place}\t{rating}\t{text}")
    (tmp_path / "ratings.txt").write_text("\n".join(lines))
    monkeypatch.setattr(sentiment_long, "vader", lambda _, texts: [float("superb" in text) for text in texts])
    return sentiment_long.Judge(tmp_path / "ratings.txt")


def test_the_judge_has_learnt_which_words_people_rate_positive(judge):
    assert judge("superb") > 0 > judge("dull") and judge("unheard of") == 0
    assert judge.accuracy == judge.vader_accuracy == 1.0
    assert judge("flat acting") == pytest.approx(judge("flat") + judge("acting"))


def test_each_method_gets_its_best_rate_and_pr_that_of_online_dpo():
    rows = [dict(world=f"rate-{rate:g}", method=method, rate=rate, figures={"objective": [value, None, None]})
            for method, values in (("dpo-soft", (1.0, 3.0, 2.0)), ("online-dpo", (1.0, 2.0, 3.0)))
            for rate, value in zip(sentiment_long.RATES, values, strict=True)]
    assert sentiment_long.best_rates(rows) == {"dpo-soft": 3e-5, "online-dpo": 1e-4, "pr": 1e-4}
    assert sentiment_long.best_rates([]) == {}
