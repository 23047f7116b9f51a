"""The judge's win rate at equal lengths."""
import pytest
import torch

from judge import length_controlled, scaled_lengths, win_figures


def opponents(lengths):
    """Texts of these lengths, and as many of 500 characters."""
    return ["x" * int(length) for length in lengths], ["y" * 500] * len(lengths)


@pytest.mark.parametrize("n, at_least", [(16, 0), (32, 0.9)])
def test_a_length_controlled_win_rate_is_left_out_where_its_interval_would_be_too_narrow(n, at_least):
    """P(win) = σ(1 + scaled difference of lengths), of which the rate at equal lengths is σ(1) = 0.731."""
    generator, held, tries = torch.Generator().manual_seed(n), 0, 100
    for _ in range(tries):
        difference = (50 * torch.randn(n, generator=generator)).round()
        ours, theirs = opponents(500 + difference)
        wins = torch.rand(n, generator=generator) < torch.sigmoid(1 + scaled_lengths(ours, theirs))
        figures = win_figures(wins.double().tolist(), ours, theirs)
        if at_least == 0:
            assert list(figures) == ["win_rate"]
            return
        _, low, high = figures["lc_win_rate"]
        held += low <= 0.731 <= high
    assert held / tries >= at_least


def test_on_equal_lengths_the_length_controlled_win_rate_is_the_raw_one():
    figures = win_figures([1.0] * 26 + [0.5] * 6 + [0.0] * 8, *opponents([500] * 40))
    assert figures["lc_win_rate"][0] == pytest.approx(29 / 40) and figures["win_rate"][0] == 29 / 40


def test_a_model_that_only_pads_gains_nothing_under_length_control():
    """The same model twice, one pads its answers; the judge loves length, softly or strictly."""
    generator = torch.Generator().manual_seed(0)
    for softness in (30.0, 1e-9):
        for padding in (0, 60):
            difference = (50 * torch.randn(400, generator=generator)).round() + padding
            wins = torch.rand(400, generator=generator) < torch.sigmoid(difference / softness)
            figures = win_figures(wins.double().tolist(), *opponents(500 + difference))
            assert figures["lc_win_rate"][1] < 0.5 < figures["lc_win_rate"][2]
            assert (figures["win_rate"][1] > 0.7) == (padding > 0)
    always = win_figures([1.0] * 50, *opponents(torch.linspace(510, 600, 50)))      # every answer
    assert always["win_rate"][0] == 1 and always["lc_win_rate"][0] < 0.55


def test_quality_is_no_length():
    """P(win) = σ(1 + Δ/50): at Δ 0 that is 0.731, whatever the padding."""
    generator = torch.Generator().manual_seed(0)
    difference = (50 * torch.randn(2000, generator=generator)).round() + 50
    wins = torch.rand(2000, generator=generator) < torch.sigmoid(1 + difference / 50)
    figures = win_figures(wins.double().tolist(), *opponents(500 + difference))
    value, low, high = figures["lc_win_rate"]
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
