"""The gradient of every route and utility, through a real causal language model, by enumeration in float64.

The policy is a two-layer GPT-2 that writes up to three tokens out of two words and an end token: fifteen
responses, cut ones included. J is summed over all 225 pairs of them and both labels, from probabilities taken
one context at a time, and differentiated by autograd; on the other side stands the expectation of what the
training step back-propagates: token ids through collate, masks, sequence_logps and sail_loss.
"""
import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import run_of, sail_args, tiny_model

import sail
from data import Pair
from sail import accumulate_gradients, preference_losses

END, PROMPT, BETA = 0, [1, 1], 0.7
ROUTES = {"dpo": (0, 0, 0), "dp": (0, 0, 1), "pp": (1, 1, 1), "pr": (1, 1, 0)}
UTILITIES = {                                    # f(u), typed from the papers, not from sail.py
    "sigmoid": lambda u: -torch.log(1 + torch.exp(-u)),
    "sigmoid_norm": lambda u: -torch.log(1 + torch.exp(-u)),
    "ipo": lambda u: -(u / BETA - 1 / (2 * BETA)) ** 2,
    "hinge": lambda u: torch.where(u < 1, u - 1, 0.0),
    "simpo": lambda u: -torch.log(1 + torch.exp(BETA / 2 - u)),
    "orpo": lambda u: -torch.log(1 + torch.exp(-u))}


def responses_of(words, longest):
    """Every response: it ends with the end token, or is cut at the longest length."""
    ended = [[*body, END] for n in range(longest) for body in itertools.product(words, repeat=n)]
    return ended + [list(body) for body in itertools.product(words, repeat=longest)]


def log_probabilities(model, responses):
    """log π(y|prompt) of each response, (R,), each token from a forward of its own context."""
    @cache
    def next_token(context):
        return model(torch.tensor([[*PROMPT, *context]])).logits[0, -1].log_softmax(-1)

    return torch.stack([sum(next_token(tuple(y[:t]))[token] for t, token in enumerate(y)) for y in responses])


class World:
    """Policy, reference, responses, and fixed tables: the data's distribution, a reward's preference."""

    def __init__(self, words=(1, 2), longest=3):
        self.policy, self.reference = (tiny_model("gpt2", vocab_size=len(words) + 1, seed=seed).double()
                                       for seed in (1, 2))
        self.reference.requires_grad_(False)
        self.responses = responses_of(words, longest)
        n = len(self.responses)
        generator = torch.Generator().manual_seed(3)
        reward = torch.randn(n, dtype=torch.float64, generator=generator)
        self.preference = torch.sigmoid(reward[:, None] - reward[None, :])                  # (R, R)
        self.data = torch.rand(n, n, dtype=torch.float64, generator=generator)
        self.data /= self.data.sum()
        self.logps = log_probabilities(self.policy, self.responses)                         # (R,), with grad
        self.reference_logps = log_probabilities(self.reference, self.responses)

    def margin(self, loss_type):
        """u of every pair, (R, R)."""
        lengths = torch.tensor([len(y) for y in self.responses])
        mean, log_ratio = self.logps / lengths, self.logps - self.reference_logps
        implicit = {"simpo": BETA * mean, "orpo": torch.log(mean.exp() / (1 - mean.exp())),
                    "sigmoid_norm": BETA * log_ratio / lengths}.get(loss_type, BETA * log_ratio)
        return implicit[:, None] - implicit[None, :]

    def pair_probability(self, route):
        """P(y1, y2), (R, R), with the gradient of what the policy samples."""
        if not ROUTES[route][0]:
            return self.data
        return self.logps.exp()[:, None] * self.logps.exp()[None, :]

    def label_probability(self, route, loss_type):
        return torch.sigmoid(self.margin(loss_type)) if ROUTES[route][2] else self.preference

    def exact_gradient(self, route, loss_type):
        """∇J by autograd through the closed form."""
        u, f = self.margin(loss_type), UTILITIES[loss_type]
        label = self.label_probability(route, loss_type)
        objective = (self.pair_probability(route) * (label * f(u) + (1 - label) * f(-u))).sum()
        return flat_gradient(objective, self.policy)

    def pair(self, i, j, route, draw=0.0):
        """The pair of responses i and j as the training loop holds it."""
        on_policy, _, self_labelled = map(bool, ROUTES[route])
        return Pair("", "", "", PROMPT, self.responses[i], self.responses[j], on_policy, self_labelled, draw,
                    preference=self.preference[i, j].item())

    def back_propagated(self, weighted_pairs, loss_type, baseline, label="expected", micro_batch_size=10**9):
        """Σ weight · (what the training step back-propagates for the pair), in micro-batches."""
        args = sail_args(["--variant", "pr", "--beta", str(BETA), "--loss-type", loss_type, "--label", label])
        args.response_coef = args.label_coef = 1.0
        total = 0
        for start in range(0, len(weighted_pairs), micro_batch_size):
            weights, pairs = zip(*weighted_pairs[start:start + micro_batch_size], strict=True)
            losses, _ = preference_losses(self.policy, self.reference, pairs, args, baseline)
            total = total - flat_gradient((torch.stack(weights).detach() * losses).sum(), self.policy)
        return total

    def all_pairs(self):
        return itertools.product(range(len(self.responses)), repeat=2)


def flat_gradient(value, model):
    gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten()
                      for g, p in zip(gradients, model.parameters(), strict=True)])


def relative_error(estimate, exact):
    assert exact.norm() > 1e-6
    return ((estimate - exact).norm() / exact.norm()).item()


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def small_world():
    """One word, two steps: three responses, nine pairs, 81 batches of two pairs."""
    return World(words=(1,), longest=2)


def test_the_enumerated_responses_are_all_there_are(world):
    assert len(world.responses) == 15
    assert world.logps.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert world.logps.exp().max() < 0.9 and sum(y[-1] != END for y in world.responses) == 8


@pytest.mark.parametrize("loss_type", UTILITIES)
@pytest.mark.parametrize("route", ROUTES)
def test_the_expected_gradient_is_that_of_the_objective(world, route, loss_type):
    exact, probability = world.exact_gradient(route, loss_type), world.pair_probability(route)
    weighted = [(probability[i, j], world.pair(i, j, route)) for i, j in world.all_pairs()]
    for baseline, micro_batch_size in ((0.0, 10**9), (-0.9, 10**9), (-0.9, 60)):
        estimate = world.back_propagated(weighted, loss_type, baseline, micro_batch_size=micro_batch_size)
        assert relative_error(estimate, exact) < 1e-9, (baseline, micro_batch_size)


@pytest.mark.parametrize("loss_type", UTILITIES)
@pytest.mark.parametrize("route", ["dpo", "pr"])
def test_a_drawn_label_has_the_same_expected_gradient(world, route, loss_type):
    exact, probability = world.exact_gradient(route, loss_type), world.pair_probability(route)
    label = world.label_probability(route, loss_type)
    weighted = [(probability[i, j] * chance, world.pair(i, j, route, draw))
                for i, j in world.all_pairs()
                for draw, chance in ((0.0, label[i, j]), (1 - 1e-12, 1 - label[i, j]))]
    for micro_batch_size in (10**9, 150):
        estimate = world.back_propagated(weighted, loss_type, -0.9, "sampled", micro_batch_size)
        assert relative_error(estimate, exact) < 1e-9


@pytest.mark.parametrize("loss_type", UTILITIES)
@pytest.mark.parametrize("route", ["pp", "pr"])
def test_the_leave_one_out_baseline_leaves_the_expectation_alone(small_world, route, loss_type):
    exact, probability = small_world.exact_gradient(route, loss_type), small_world.pair_probability(route)
    pairs = list(small_world.all_pairs())
    total = 0
    for (i, j), (k, m) in itertools.product(pairs, pairs):                            # all 81 batches of two
        half = probability[i, j] * probability[k, m] / 2
        batch = [(half, small_world.pair(i, j, route)), (half, small_world.pair(k, m, route))]
        total = total + small_world.back_propagated(batch, loss_type, None)
    assert relative_error(total, exact) < 1e-9


def test_a_wrong_gradient_would_be_seen(world):
    """The size of each term in the table: leaving one out is an error of far more than 1e-9."""
    exact, probability = world.exact_gradient("pp", "sigmoid"), world.pair_probability("pp")
    for left_out in ("dpo", "dp", "pr"):
        weighted = [(probability[i, j], world.pair(i, j, left_out)) for i, j in world.all_pairs()]
        assert relative_error(world.back_propagated(weighted, "sigmoid", 0.0), exact) > 0.01


def test_the_regularisers_add_their_gradient(world):
    args = sail_args(["--variant", "pp", "--beta", str(BETA), "--nll-coef", "0.3", "--revkl-coef", "2"])
    plain = sail_args(["--variant", "pp", "--beta", str(BETA), "--revkl-coef", "0"])
    pairs = [world.pair(i, j, route) for i, j, route in (
        (0, 9, "dpo"), (5, 3, "dp"), (7, 2, "pp"), (6, 1, "pr"), (4, 12, "dpo"))]
    pairs[4].samples = 1                                       # spin's: its chosen response is the data's

    def gradient(args):
        losses, metrics = preference_losses(world.policy, world.reference, pairs, args, -0.9)
        return flat_gradient(losses.sum(), world.policy), metrics

    def per_token_kl(y):
        rows = torch.tensor([[*PROMPT, *y]])
        ours, theirs = (model(rows).logits[0, len(PROMPT) - 1:-1].log_softmax(-1)
                        for model in (world.policy, world.reference))
        return (theirs.exp() * (theirs - ours)).sum()

    nll = sum(-world.logps[i] / len(world.responses[i]) for i in (0, 4))        # the data's choices
    revkl = sum((per_token_kl(pair.chosen_ids) + per_token_kl(pair.rejected_ids))
                / (len(pair.chosen_ids) + len(pair.rejected_ids)) for pair in pairs)
    regularised, metrics = gradient(args)
    expected = gradient(plain)[0] + flat_gradient(0.3 * nll + 2 * revkl, world.policy)
    assert relative_error(regularised, expected) < 1e-9
    assert metrics["nll"].item() == pytest.approx(nll.item() / 5)
    assert metrics["revkl"].item() == pytest.approx(revkl.item() / 5)


def test_the_accumulated_gradient_is_that_of_the_weighted_losses(world, monkeypatch):
    args = sail_args(["--variant", "pr", "--beta", str(BETA)])
    pairs = [world.pair(i, j, "pr") for i, j in ((0, 9), (5, 3), (7, 2), (4, 12))]
    losses, _ = preference_losses(world.policy, world.reference, pairs, args, -0.9)
    expected = flat_gradient((torch.tensor([2.0, 2.0, 2.0, 0.0]) * losses).sum() / 4, world.policy)
    world.policy.zero_grad()
    micros = [(pairs[:2], 2), (pairs[2:3], 2), (pairs[3:], 0)]     # the last one is there for its collectives
    monkeypatch.setattr(sail, "with_equal_counts", lambda *_: micros)
    totals = accumulate_gradients(run_of(world.policy, world.reference, -0.9), pairs, args)
    gradient = torch.cat([p.grad.flatten() for p in world.policy.parameters()])
    world.policy.zero_grad()
    assert relative_error(gradient, expected) < 1e-9
    assert totals["loss"] == pytest.approx(losses[:3].sum().item())


def test_label_smoothing_is_a_preference_of_one_minus_epsilon(world):
    pairs = [replace(world.pair(0, 9, "dpo"), preference=1.0),
             replace(world.pair(3, 4, "dpo"), preference=0.5)]
    smoothed = [replace(pairs[0], preference=0.9), pairs[1]]                            # a tie stays a tie
    flag = sail_args(["--label-smoothing", "0.1"])
    one, _ = preference_losses(world.policy, world.reference, pairs, flag, 0.0)
    other, _ = preference_losses(world.policy, world.reference, smoothed, sail_args([]), 0.0)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_the_utilities_at_zero_are_the_baseline_of_a_single_pair(world):
    for loss_type, f in UTILITIES.items():
        weighted = [(torch.ones(()), world.pair(3, 8, "pr"))]
        alone = world.back_propagated(weighted, loss_type, None)
        given = world.back_propagated(weighted, loss_type, f(torch.zeros((), dtype=torch.float64)).item())
        torch.testing.assert_close(alone, given, rtol=1e-12, atol=1e-12)
        assert alone.norm() > 1e-6
