"""sail_loss against enumeration in float64: the gradient of every variant, term by term."""
import inspect
import itertools
import math

import pytest
import torch

import sail
from sail import dpo_loss, sail_loss, utility

K, BETA = 4, 0.5
LOSS_TYPES = ["sigmoid", "sigmoid_norm", "ipo", "hinge"]
ROUTES = {"dpo": (False, False), "dp": (False, True), "pp": (True, True), "pr": (True, False)}
PAIRS = torch.tensor(list(itertools.product(range(K), range(K))))                    # every (y1, y2), (K², 2)
TOKENS = torch.tensor([2, 1, 5, 3])                                                  # of each response


def softmax_policy():
    """(logits with grad, reference log-probs, P(i ≻ j) by some reward, data's pair distribution), float64."""
    generator = torch.Generator().manual_seed(0)
    logits, reference, reward = (torch.randn(K, dtype=torch.float64, generator=generator) for _ in range(3))
    preference = torch.sigmoid(2 * (reward[:, None] - reward[None, :]))
    data = torch.rand(K, K, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), reference.log_softmax(0), preference, data / data.sum()


def margins(ratio, loss_type="sigmoid"):
    """u of every pair, (K, K), of the responses' log-ratios."""
    if loss_type == "sigmoid_norm":
        ratio = ratio / TOKENS
    return BETA * (ratio[:, None] - ratio[None, :])


def exact_objective(route, logits, reference, preference, data, loss_type):
    """J, summed over every pair of responses and both labels; autograd gives its whole gradient."""
    on_policy, self_labelled = ROUTES[route]
    logps = logits.log_softmax(0)
    u = margins(logps - reference, loss_type)
    pair = (logps[:, None] + logps[None, :]).exp() if on_policy else data
    label = torch.sigmoid(u) if self_labelled else preference
    return (pair * (label * utility(u, BETA, loss_type) + (1 - label) * utility(-u, BETA, loss_type))).sum()


def call(route, logits, reference, preference, pairs=PAIRS, **options):
    """sail_loss on the given pairs of responses, its terms in full: (losses, metrics)."""
    on_policy, self_labelled = ROUTES[route]
    logps, first, second = logits.log_softmax(0), pairs[:, 0], pairs[:, 1]
    flags = torch.full((len(pairs),), on_policy), torch.full((len(pairs),), self_labelled)
    return sail_loss(logps[first], logps[second], reference[first], reference[second],
                     preference[first, second], *flags, lengths=TOKENS[pairs.T],
                     **{"beta": BETA, "response_coef": 1.0, "label_coef": 1.0, **options})


def pair_weights(route, logits, data):
    """The probability of each pair, as numbers: the expectation is over samples, not differentiated."""
    probability = logits.detach().softmax(0)
    joint = probability[:, None] * probability[None, :] if ROUTES[route][0] else data
    return joint[PAIRS[:, 0], PAIRS[:, 1]]


def gradient(value, logits):
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("baseline", [0.0, -0.7])
@pytest.mark.parametrize("route", ROUTES)
def test_the_expected_gradient_is_that_of_the_objective(route, baseline, loss_type):
    logits, reference, preference, data = softmax_policy()
    losses, _ = call(route, logits, reference, preference, loss_type=loss_type, baseline=baseline)
    estimate = gradient(-(pair_weights(route, logits, data) * losses).sum(), logits)
    exact = gradient(exact_objective(route, logits, reference, preference, data, loss_type), logits)
    assert exact.norm() > 1e-3
    torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-10)


def test_the_leave_one_out_baseline_is_the_mean_of_the_others():
    u = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    chosen = (u / BETA).clone().requires_grad_()
    zero, on = torch.zeros(3, dtype=torch.float64), torch.tensor([True, False, True])

    def gradients(**options):
        losses, _ = sail_loss(chosen, zero, zero, zero, None, on, beta=BETA, label_coef=0.0, **options)
        return torch.autograd.grad(losses.sum(), chosen)[0]

    f = torch.nn.functional.logsigmoid(u)
    torch.testing.assert_close(gradients(), gradients(baseline=torch.stack([f[2], zero[0], f[0]])))
    assert not torch.allclose(gradients(), gradients(baseline=f.mean()))


def test_a_pair_worth_exactly_the_baseline_has_no_T2():
    chosen = torch.zeros(4, dtype=torch.float64, requires_grad=True)         # u = 0: every pair is worth f(0)
    rest = [torch.zeros(4, dtype=torch.float64)] * 3
    for options in ({}, {"baseline": -math.log(2)}):
        losses, _ = sail_loss(chosen, *rest, None, torch.ones(4), response_coef=7.0, **options)
        plain = dpo_loss(chosen, *rest)
        torch.testing.assert_close(torch.autograd.grad(losses.sum(), chosen),
                                   torch.autograd.grad(plain.sum(), chosen))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_the_loss_has_the_value_of_the_utility_whatever_the_coefficients(route, loss_type):
    logits, reference, preference, _ = softmax_policy()
    losses, metrics = call(route, logits, reference, preference, loss_type=loss_type, response_coef=3.0,
                           label_coef=2.0)
    u = margins((logits.log_softmax(0) - reference).detach(), loss_type)[PAIRS[:, 0], PAIRS[:, 1]]
    p = torch.sigmoid(u) if ROUTES[route][1] else preference[PAIRS[:, 0], PAIRS[:, 1]]
    expected = -(p * utility(u, BETA, loss_type) + (1 - p) * utility(-u, BETA, loss_type))
    torch.testing.assert_close(losses.detach(), expected, rtol=0, atol=1e-12)
    assert metrics["loss"].item() == pytest.approx(expected.mean().item())
    assert not any(value.requires_grad for value in metrics.values())


def test_the_utilities_have_their_published_values():
    u = torch.tensor([0.4, -2.0], dtype=torch.float64)
    assert utility(u, 0.1, "sigmoid").tolist() == pytest.approx(
        [math.log(1 / (1 + math.exp(-x))) for x in (0.4, -2)])
    for loss_type in ("sigmoid_norm", "orpo"):
        assert torch.equal(utility(u, 0.1, loss_type), utility(u, 0.1, "sigmoid"))
    for beta, options, target in ((0.1, {}, 0.05), (2.0, {}, 1.0), (2.0, dict(target_margin=0.0), 0.0)):
        assert utility(u, beta, "simpo", **options).tolist() == pytest.approx(
            [math.log(1 / (1 + math.exp(target - x))) for x in (0.4, -2)])
    assert utility(u, 0.1, "ipo").tolist() == pytest.approx([-(4 - 5) ** 2, -(-20 - 5) ** 2])
    assert utility(u, 0.1, "hinge").tolist() == pytest.approx([-0.6, -3.0])
    with pytest.raises(ValueError):
        utility(u, 0.1, "nonsense")


def test_without_flags_it_is_dpo_exactly():
    torch.manual_seed(0)
    ours = [torch.randn(5, requires_grad=True) for _ in range(2)]
    theirs = [torch.randn(5) for _ in range(2)]
    plain = dpo_loss(*ours, *theirs, beta=0.3)
    sail_losses, _ = sail_loss(*ours, *theirs, beta=0.3)
    assert torch.equal(plain, sail_losses)
    for one, other in zip(torch.autograd.grad(plain.sum(), ours),
                          torch.autograd.grad(sail_losses.sum(), ours), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("route", ROUTES)
def test_swapping_the_pair_and_its_label_changes_nothing(route):
    logits, reference, preference, _ = softmax_policy()
    one, metrics = call(route, logits, reference, preference, PAIRS)
    # preferenceᵀ = 1 − preference
    other, swapped_metrics = call(route, logits, reference, preference, PAIRS.flip(1))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient(one.sum(), logits), gradient(other.sum(), logits))
    assert metrics["accuracy"] == pytest.approx(swapped_metrics["accuracy"])
    assert metrics["margin"] == pytest.approx(swapped_metrics["margin"])


def test_the_corrections_are_exactly_zero_where_their_flag_is_off():
    logits, reference, *_ = softmax_policy()
    logps = logits.log_softmax(0)
    columns = [logps[PAIRS[:, 0]], logps[PAIRS[:, 1]], reference[PAIRS[:, 0]], reference[PAIRS[:, 1]]]
    flagged = torch.arange(len(PAIRS)) % 2 == 0

    def rest(response_coef, label_coef):
        losses, _ = sail_loss(*columns, None, flagged, flagged, beta=BETA, response_coef=response_coef,
                              label_coef=label_coef)
        return gradient(losses[~flagged].sum(), logits)

    plain, _ = sail_loss(*columns, beta=BETA)
    assert torch.equal(rest(5.0, 5.0), gradient(plain[~flagged].sum(), logits))
    losses, _ = sail_loss(*columns, None, flagged, flagged, beta=BETA, response_coef=5.0, label_coef=5.0)
    assert not torch.allclose(gradient(losses[flagged].sum(), logits), gradient(plain[flagged].sum(), logits))


def test_relabelling_alone_teaches_nothing_and_T3_is_the_negative_entropy():
    logits, reference, preference, _ = softmax_policy()
    without, _ = call("dp", logits, reference, preference, label_coef=0.0)
    assert gradient(without.sum(), logits).abs().max() < 1e-14
    with_t3, _ = call("dp", logits, reference, preference, label_coef=1.0)
    ratio = logits.log_softmax(0) - reference
    q = torch.sigmoid(BETA * (ratio[PAIRS[:, 0]] - ratio[PAIRS[:, 1]]))
    entropy = -(q * q.log() + (1 - q) * (1 - q).log())
    torch.testing.assert_close(gradient(with_t3.sum(), logits), gradient(entropy.sum(), logits), rtol=0,
                               atol=1e-12)


def test_without_coefficients_every_term_counts_in_full():
    columns = [*torch.randn(4, 5, generator=torch.Generator().manual_seed(6)).double()]
    columns[0].requires_grad_()
    flagged = torch.ones(5)

    def gradients(**coefficients):
        losses, _ = sail_loss(*columns, None, flagged, flagged, beta=BETA, **coefficients)
        return torch.autograd.grad(losses.sum(), columns[0])[0]

    pr, dp = sail.VARIANTS["pr"].response_coef, sail.VARIANTS["dp"].label_coef
    assert (pr, dp) == (0.3, 0.2)                                      # the flags' are the authors'
    assert not torch.equal(gradients(), gradients(response_coef=pr))
    assert not torch.equal(gradients(), gradients(label_coef=dp))
    assert torch.equal(gradients(), gradients(response_coef=1.0, label_coef=1.0))


def test_the_coefficients_scale_their_term_and_nothing_else():
    logits, reference, preference, _ = softmax_policy()

    def of(response_coef, label_coef):
        losses, _ = call("pp", logits, reference, preference, response_coef=response_coef,
                         label_coef=label_coef, baseline=-0.5)
        return gradient(losses.sum(), logits)

    T1, T2, T3 = of(0, 0), of(1, 0) - of(0, 0), of(0, 1) - of(0, 0)
    torch.testing.assert_close(of(0.3, 0.2), T1 + 0.3 * T2 + 0.2 * T3)
    assert T2.norm() > 1e-3 and T3.norm() > 1e-3


def test_the_pairs_whose_label_T3_reverses_are_counted():
    u, zero = torch.tensor([0.1, 6.0, -6.0, 6.0]), torch.zeros(4)
    own = torch.tensor([True, True, True, False])
    _, metrics = sail_loss(u, zero, zero, zero, None, None, own, beta=1.0, label_coef=0.2)    # 1/0.2 = 5 < 6
    assert metrics["label_reversed"].item() == 0.5 and metrics["self_labelled"].item() == 0.75
    _, metrics = sail_loss(u, zero, zero, zero, None, None, own, beta=1.0, label_coef=0.1)    # 1/0.1 = 10
    assert metrics["label_reversed"].item() == 0


def test_the_metrics_equal_a_hand_computed_example():
    u, zero = torch.tensor([2.0, -1.0, 0.0]), torch.zeros(3)
    _, metrics = sail_loss(u, zero, zero - 1, zero - 1, torch.tensor([1.0, 0.0, 0.5]), beta=1.0)
    assert metrics["margin"].item() == pytest.approx((2.0 + 1.0 + 0.0) / 3)
    assert metrics["accuracy"].item() == pytest.approx((1 + 1 + 0.5) / 3)
    assert metrics["chosen_logps"].item() == pytest.approx(1 / 3) and metrics["rejected_logps"].item() == 0
    assert metrics["label_sharpness"].item() == pytest.approx((1 + 1 + 0) / 3)
    _, tied = sail_loss(zero, zero, zero, zero, torch.tensor([1.0, 0.0, 0.9]))
    assert tied["accuracy"].item() == 0.5                              # whatever the label


def test_the_implicit_rewards_are_beta_times_each_sides_log_ratio():
    chosen, rejected = torch.tensor([-1.0, -4.0]), torch.tensor([-2.0, -2.0])
    _, metrics = sail_loss(chosen, rejected, chosen - 3, rejected + 1, beta=0.5)
    assert metrics["chosen_implicit_reward"].item() == pytest.approx(0.5 * 3)
    assert metrics["rejected_implicit_reward"].item() == pytest.approx(0.5 * -1)
    assert metrics["margin"].item() == pytest.approx(0.5 * 4)


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
@pytest.mark.parametrize("sides", [(0.0, -3.0), (-3.0, 0.0)])
def test_a_certain_response_has_a_finite_loss_and_gradient(loss_type, sides):
    """Of probability 1 its odds are infinite."""
    logps, lengths = torch.tensor(sides, requires_grad=True), torch.ones(1)
    losses, _ = sail_loss(logps[:1], logps[1:], lengths, lengths, loss_type=loss_type,
                          lengths=torch.ones(2, 1))
    assert losses.isfinite().all() and gradient(losses.sum(), logps).isfinite().all()


@pytest.mark.parametrize("loss_type", [*LOSS_TYPES, "simpo", "orpo"])
def test_the_loss_can_be_pasted(loss_type):
    """Its source and what it calls run where nothing but torch is imported, with the same numbers."""
    functions = map(inspect.getsource, (sail.margin, sail.log_odds, sail.utility, sail.mean_of_others,
                                        sail.sail_loss, sail.sail_metrics))
    namespace = {}
    exec("\n\n".join(["import torch", "import torch.nn.functional as F", *functions]), namespace)
    logits, reference, *_ = softmax_policy()
    logps = logits.log_softmax(0)
    columns = [logps[PAIRS[:, 0]], logps[PAIRS[:, 1]], reference[PAIRS[:, 0]], reference[PAIRS[:, 1]]]
    flags = torch.arange(len(PAIRS)) % 2 == 0, torch.arange(len(PAIRS)) % 3 == 0
    options = dict(loss_type=loss_type, lengths=TOKENS[PAIRS.T])
    ours, metrics = sail_loss(*columns, None, *flags, **options)
    pasted, pasted_metrics = namespace["sail_loss"](*columns, None, *flags, **options)
    assert torch.equal(ours, pasted) and metrics == pasted_metrics
    assert torch.equal(gradient(ours.sum(), logits), gradient(pasted.sum(), logits))


@pytest.mark.parametrize("loss_type, is_zero", [("sigmoid", True), ("hinge", False)])
def test_under_the_policys_labels_t1_vanishes_for_log_sigma_alone(loss_type, is_zero):
    policy = [torch.tensor([-1.0, -4.0, -2.0], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    reference = [torch.tensor([-3.0, -3.5, -2.5], dtype=torch.float64),
                 torch.tensor([-1.5, -2.0, -4.0], dtype=torch.float64)]
    labelled = torch.ones(3, dtype=torch.bool)
    losses, _ = sail_loss(*policy, *reference, self_labelled=labelled, beta=0.5, label_coef=0,
                          loss_type=loss_type)
    losses.sum().backward()
    assert (policy[0].grad.abs().max() < 1e-12) == is_zero
    losses, _ = sail_loss(*policy, *reference, self_labelled=labelled, beta=0.5, loss_type=loss_type)
    (gradient,) = torch.autograd.grad(losses.sum(), policy[0])
    assert gradient.abs().min() > 1e-3                                 # T3's
