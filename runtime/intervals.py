"""Figures with their 95 % intervals, as (value, low, high): over held-out pairs, and over seeds."""
import math

import torch


def student(degrees):
    """The 97.5 % quantile of Student's t with this number of degrees of freedom, which is at least 1. Its
    error is below 0.005."""
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
    every prompt, then for a second response to every prompt, and so on. The interval of these means is over
    prompts, since responses to the same prompt are alike. Two held-out pairs with the same text as prompt
    count as two prompts."""
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
    """For a tensor of margins, chosen less rejected, of any shape: 1 if the margin is positive, ½ if it is 0,
    else 0."""
    return (margins > 0) + 0.5 * (margins == 0)


def along_label(margins, p):
    """What margins, chosen less rejected, are for labels that prefer the chosen response with probability p,
    two tensors of one shape: (the margins in the direction of the label, the probability that each margin
    has the sign of the label)."""
    ahead = prefers_chosen(margins)
    return (2 * p - 1) * margins, p * ahead + (1 - p) * (1 - ahead)


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


def few(n):
    """A warning, as text, about figures that were measured on n prompts; "" if n is enough."""
    if n < 20:
        return f" | of {n} prompts only: the intervals are rough"
    return ""
