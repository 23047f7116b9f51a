"""Figures with their 95 % intervals, as (value, low, high): over prompts, over seeds, win rates."""
import math

import torch


def student(degrees):
    """The 97.5 % quantile of Student's t with so many degrees of freedom."""
    table = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13]
    if degrees <= len(table):
        return table[degrees - 1]
    return 1.96 + 2.5 / degrees


def mean_of(values):
    """(mean, low, high) of n independent numbers, such as one per prompt or one per seed, with the 95 %
    interval of Student's t. The interval of a single number is nan. A bootstrap would not do: its interval
    contains the true mean only 80 times in 100 at n = 4, and 91 times at n = 16."""
    values = torch.tensor(values, dtype=torch.float64)
    n = len(values)
    mean = values.mean().item()
    if n < 2:
        return mean, math.nan, math.nan
    half = student(n - 1) * values.std().item() / math.sqrt(n)
    return mean, mean - half, mean + half


def means_of_prompts(values, prompts):
    """The mean over the k responses to each prompt. values: k·prompts numbers, first for one response to
    every prompt, then for a second response to every prompt, and so on. Intervals are over prompts, since
    responses to the same prompt are alike."""
    return torch.tensor(values, dtype=torch.float64).view(-1, prompts).mean(0).tolist()


def share_of(values):
    """(share, low, high) of n verdicts 0, ½ or 1, with Wilson's 95 % interval (J. Am. Stat. Assoc. 22, 209).
    Student's t would not do: if all verdicts are 0, its interval has no width. For values that are means over
    several responses to a prompt, Wilson's interval is, if anything, too wide."""
    z = 1.96
    n = len(values)
    p = sum(values) / n
    w = z**2 / n
    centre = p + w / 2
    variance = p * (1 - p) / n
    half = math.sqrt(z**2 * variance + w**2 / 4)
    low = (centre - half) / (1 + w)
    high = (centre + half) / (1 + w)
    if p == 0:                                             # rounding would leave low slightly off 0
        low = 0.0
    return p, low, high


def prefers_chosen(margins):
    """1 if the chosen response has the higher reward, ½ for a tie, else 0; any shape."""
    return (margins > 0) + 0.5 * (margins == 0)


def length_controlled(verdicts, lengths):
    """The win rate at equal lengths, (R, n) × 2 -> (R,), as in AlpacaEval 2 (arXiv 2404.04475).

    verdicts: 1, ½ or 0. lengths: how much longer the response is than its opponent, within ±1. P(win) =
    σ(quality + bias · length) is fitted by Newton's method. The rate is σ(quality), or the raw rate if no
    length differs. A small ridge penalty keeps quality and bias finite. It is a thousand times larger on
    quality, so that what both explain equally well counts as length, for example if all winning responses are
    longer."""
    ones = torch.ones_like(lengths)
    inputs = torch.stack([ones, lengths], -1)                             # (R, n, 2)
    ridge = torch.tensor([0.1, 1e-4]).to(verdicts)
    weights = verdicts.new_zeros(len(verdicts), 2, 1)                     # quality, bias
    for _ in range(100):
        p = torch.sigmoid(inputs @ weights)                               # (R, n, 1)
        errors = verdicts[..., None] - p
        gradient = inputs.mT @ errors - ridge[:, None] * weights          # (R, 2, 1)
        slopes = p * (1 - p)
        curvature = inputs.mT @ (slopes * inputs) + ridge.diag()          # (R, 2, 2)
        step = torch.linalg.solve(curvature, gradient)
        size = step.norm(dim=1, keepdim=True)
        too_long = (size / 5).clamp(min=1)                                # a step is at most 5 long
        weights = weights + step / too_long
        if size.max() < 1e-9:
            break
    rate = torch.sigmoid(weights[:, 0, 0])
    same_lengths = (lengths == 0).all(-1)
    return torch.where(same_lengths, verdicts.mean(-1), rate)


def scaled_lengths(ours, theirs):
    """How much longer each text of `ours` is than its opponent in `theirs`: tanh(difference / root mean
    square of the differences) of the lengths in characters, (n,), within ±1."""
    differences = []
    for our_text, their_text in zip(ours, theirs, strict=True):
        differences.append(len(our_text) - len(their_text))
    difference = torch.tensor(differences).float()
    root_mean_square = difference.square().mean().sqrt()
    return torch.tanh(difference / root_mean_square.clamp(min=1e-9))


def bootstrap(statistic, *columns, prompts, draws=1000):
    """(value, low, high): statistic(*columns) and its 95 % interval, which is nan for a single prompt. The
    interval has the percentiles over `draws` draws of the prompts with replacement, which are the same in
    every call. columns: k·prompts numbers each, in the order of `means_of_prompts`. statistic: takes the
    columns as float64 tensors (R, n), one row per draw, and returns (R,)."""
    data = []
    for column in columns:
        data.append(torch.as_tensor(column).double())
    data = torch.stack(data)                                                               # (columns, n)
    value = statistic(*data[:, None]).item()
    if prompts < 2:
        return value, math.nan, math.nan
    generator = torch.Generator()
    generator.manual_seed(0)
    drawn = torch.randint(prompts, (draws, 1, prompts), generator=generator)
    firsts = torch.arange(0, data.shape[1], prompts)[:, None]
    rows = (firsts + drawn).flatten(1)                                                     # (R, n)
    ends = torch.tensor([0.025, 0.975]).double()
    low, high = statistic(*data[:, rows]).quantile(ends).tolist()
    return value, low, high


# How many prompts a length-controlled win rate needs. Its interval holds the true rate 82 to 90 times in 100
# at 12 or 16 prompts, 92 to 95 times at 32 and more.
ENOUGH = 32


def win_figures(wins, ours, theirs, prompts=None):
    """The win rates of the texts `ours` against `theirs`: raw and, from ENOUGH prompts on, length-controlled.
    wins: 1, ½ for a tie, or 0, or the probability of a win. prompts: the number of prompts, as in
    `bootstrap`; None means one prompt per text."""
    prompts = prompts or len(wins)
    figures = {"win_rate": share_of(means_of_prompts(wins, prompts))}
    if prompts >= ENOUGH:
        lengths = scaled_lengths(ours, theirs)
        figures["lc_win_rate"] = bootstrap(length_controlled, wins, lengths, prompts=prompts)
    return figures


def format_figure(value, low, high):
    """A figure as text: its value ± half its interval. If the value is far from the middle of the interval,
    the interval's ends follow the value instead. A figure without an interval is its value alone."""
    if math.isnan(low):
        return f"{value:.3f}"
    half = (high - low) / 2
    centre = low + half
    if abs(centre - value) > 0.1 * half:
        return f"{value:.3f} [{low:.2f}, {high:.2f}]"
    return f"{value:.3f} ± {half:.3f}"


def few(n, figures):
    """Warnings, as text, about figures that were measured on n prompts; "" if n is enough."""
    said = ""
    if n < 20:
        said += f" | of {n} prompts only: the intervals are rough"
    if "win_rate" in figures and "lc_win_rate" not in figures:
        said += f" | a length-controlled win rate would need {ENOUGH} prompts"
    return said
