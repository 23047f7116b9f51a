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
    """(mean, low, high) of n independent numbers, as of prompts or of runs with other seeds: the 95 %
    interval of Student's t; nan for one number. A bootstrap would not do: its interval holds the true mean
    80 times in 100 at n = 4, and 91 times at n = 16."""
    values = torch.tensor(values, dtype=torch.float64)
    n = len(values)
    mean = values.mean().item()
    if n < 2:
        return mean, math.nan, math.nan
    half = student(n - 1) * values.std().item() / math.sqrt(n)
    return mean, mean - half, mean + half


def p_value(values):
    """The two-sided p of a mean of 0, by Student's t of n independent numbers (Abramowitz and Stegun, 26.7.3
    and 26.7.4, whose sums are exact)."""
    values = torch.tensor(values, dtype=torch.float64)
    degrees = len(values) - 1
    t = values.mean().abs() / values.std() * math.sqrt(len(values))
    angle = math.atan(t / math.sqrt(degrees))
    term, total = 1.0, 0.0                                 # of a series in cos² of the angle
    for k in range(degrees // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * k + 1 + degrees % 2) / (2 * k + 2 + degrees % 2)
    if degrees % 2 == 0:
        return 1 - math.sin(angle) * total
    return 1 - 2 / math.pi * (angle + math.sin(angle) * math.cos(angle) * total)


def holm(p_values):
    """Holm's adjustment of the p of several questions (Scand. J. Stat. 6, 65): the smallest is multiplied by
    their number, the next by one less, and so on; none becomes smaller than one before it, or larger than 1.
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for nth, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = min(1.0, max(least, p_values[place] * (len(p_values) - nth)))
        adjusted[place] = least
    return adjusted


def means_of_prompts(values, prompts):
    """The mean of each prompt's responses, of numbers of k·prompts responses, first one to each prompt, then
    another to each. Intervals are over prompts, since responses to one prompt are alike."""
    return torch.tensor(values, dtype=torch.float64).view(-1, prompts).mean(0).tolist()


def share_of(values):
    """(share, low, high) of n verdicts 0, ½ or 1, with Wilson's 95 % interval (J. Am. Stat. Assoc. 22, 209).
    Student's t would not do: if all verdicts are 0, the interval would be empty. Of n prompts' means it is
    at most too wide."""
    z = 1.96
    n = len(values)
    p = sum(values) / n
    w = z**2 / n
    centre = p + w / 2
    variance = p * (1 - p) / n
    half = math.sqrt(z**2 * variance + w**2 / 4)
    low = (centre - half) / (1 + w)
    high = (centre + half) / (1 + w)
    if p == 0:                                             # exactly: rounding leaves it a little beside
        low = 0.0
    return p, low, high


def prefers_chosen(margins):
    """1 if the chosen response has the higher reward, ½ for a tie, else 0; any shape."""
    return (margins > 0) + 0.5 * (margins == 0)


def length_controlled(verdicts, lengths):
    """The win rate that is left at equal lengths, (R, n) × 2 -> (R,), as in AlpacaEval 2 (arXiv 2404.04475).

    verdicts: 1, ½ or 0. lengths: how much longer the response is than its opponent, within ±1. P(win) =
    σ(quality + bias · length) is fitted by Newton's method; the rate is σ(quality), or the raw one if no
    length differs. A trace of ridge keeps both finite, and weighs a thousand times more on quality: what the
    two explain equally well, as when all wins are longer, counts as length."""
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
        too_long = (size / 5).clamp(min=1)                                # beyond 5
        weights = weights + step / too_long
        if size.max() < 1e-9:
            break
    rate = torch.sigmoid(weights[:, 0, 0])
    same_lengths = (lengths == 0).all(-1)
    return torch.where(same_lengths, verdicts.mean(-1), rate)


def scaled_lengths(ours, theirs):
    """tanh(difference / its root mean square) of the texts' lengths in characters: (n,), within ±1."""
    differences = []
    for our_text, their_text in zip(ours, theirs, strict=True):
        differences.append(len(our_text) - len(their_text))
    difference = torch.tensor(differences).float()
    root_mean_square = difference.square().mean().sqrt()
    return torch.tanh(difference / root_mean_square.clamp(min=1e-9))


def bootstrap(statistic, *columns, prompts, draws=1000):
    """(value, low, high): statistic(*columns), and its 95 % interval, the percentiles of `draws` draws of the
    prompts with replacement, always the same ones; nan for one prompt. columns: numbers of k·prompts
    responses, first one to each prompt, then another to each. statistic: takes them as float64 tensors
    (R, n), one row per draw, and returns (R,)."""
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
    """The rate of wins (1, ½: tie, 0) of the texts `ours` against `theirs`, raw and, from ENOUGH prompts on,
    length-controlled. prompts: how many there are, as in `bootstrap`; None: as many as texts."""
    prompts = prompts or len(wins)
    figures = {"win_rate": share_of(means_of_prompts(wins, prompts))}
    if prompts >= ENOUGH:
        lengths = scaled_lengths(ours, theirs)
        figures["lc_win_rate"] = bootstrap(length_controlled, wins, lengths, prompts=prompts)
    return figures


def format_figure(value, low, high):
    """A figure as text: ± half its interval, or by the interval's ends if these are unlike far from it; alone
    if it has none."""
    if math.isnan(low):
        return f"{value:.3f}"
    half = (high - low) / 2
    centre = low + half
    if abs(centre - value) > 0.1 * half:
        return f"{value:.3f} [{low:.2f}, {high:.2f}]"
    return f"{value:.3f} ± {half:.3f}"


def few(n, figures):
    """What is to be said of figures of n prompts, "" if n will do."""
    said = ""
    if n < 20:
        said += f" | of {n} prompts only: the intervals are rough"
    if "win_rate" in figures and "lc_win_rate" not in figures:
        said += f" | a length-controlled win rate would need {ENOUGH} prompts"
    return said
