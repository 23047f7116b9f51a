"""Where variants end, by enumeration in float64: a policy is a softmax over few responses, an expectation is
a sum over all pairs of them, and what is followed is the gradient of `sail_loss` itself."""
import math
from itertools import pairwise

import pytest
import torch

from sail import sail_loss

BETA = 0.5
REWARD = torch.tensor([1.0, 0.4, -0.3, -1.1], dtype=torch.float64)
REFERENCE = torch.tensor([-0.5, 0.3, 0.4, -0.2], dtype=torch.float64).log_softmax(-1)


def gradient(logits, reference, reward, own, preference=None, **options):
    """Minus ∇J of the logits, over all ordered pairs. own: "both", "responses", "labels" are the policy's
    own, or "nothing", where pairs are uniform; labels that are not its own are Bradley-Terry on the
    reward, or this preference, (K, K) P(row ≻ column)."""
    if preference is None:
        preference = torch.sigmoid(reward[:, None] - reward)
    logits = logits.detach().requires_grad_()
    logps, every = logits.log_softmax(-1), torch.ones(len(logits) ** 2, dtype=torch.bool)
    places = torch.arange(len(logits))
    first, second = (side.flatten() for side in torch.meshgrid(places, places, indexing="ij"))
    sampled, self_labelled = own in ("both", "responses"), own in ("both", "labels")
    losses, _ = sail_loss(
        logps[first], logps[second], reference[first], reference[second],
        None if self_labelled else preference[first, second], every & sampled,
        every & self_labelled, **{"beta": BETA, "baseline": 0.0, **options})
    chance = (logps[first] + logps[second]).exp().detach() if sampled else 1 / len(every)
    return torch.autograd.grad((chance * losses).sum(), logits)[0]


def fixed_point(gradient_at, logits, rate=8.0):
    """log π where descent along a gradient ends; it must end."""
    for _ in range(4000):
        step = gradient_at(logits)
        if step.norm() < 1e-9:
            return logits.log_softmax(-1)
        logits = logits - rate * step
    raise AssertionError(f"still moving by {step.norm()}")


def kl(one, other):
    return (one.exp() * (one - other)).sum().item()


def value(policy):
    """J_β = E[r] − β·KL, the goal of alignment."""
    return (policy.exp() @ REWARD).item() - BETA * kl(policy, REFERENCE)


def test_a_self_labelled_pair_pulls_by_beta_times_q_times_one_minus_q_times_its_own_margin():
    ours = torch.tensor([-3.0, -5.5], dtype=torch.float64, requires_grad=True)
    theirs = torch.tensor([-4.0, -4.7], dtype=torch.float64)
    u = BETA * ((ours[0] - theirs[0]) - (ours[1] - theirs[1])).item()
    q = 1 / (1 + math.exp(-u))
    for preference in (0.0, 0.3, 1.0):                  # whatever the true preference is: T1 is 0, T3 this
        loss, _ = sail_loss(*ours[:, None], *theirs[:, None], torch.tensor([preference]),
                            self_labelled=torch.tensor([True]), beta=BETA, label_coef=1.0)
        pull = -torch.autograd.grad(loss.sum(), ours)[0]
        assert pull.tolist() == pytest.approx([BETA * q * (1 - q) * u, -BETA * q * (1 - q) * u], abs=1e-12)


@pytest.mark.parametrize("scale, apart", [(0.2, 1.8e-2), (0.05, 1.2e-3)])
def test_dp_ends_to_first_order_where_dpo_with_a_smaller_beta_does(scale, apart):
    """beta·(1 − k), k = mix·label_coef/(1 − mix). A quarter of the reward leaves a sixteenth of the rest."""
    mix, label_coef, reward = 0.4, 0.6, scale * REWARD
    k = mix * label_coef / (1 - mix)

    def of_dp(logits):
        return ((1 - mix) * gradient(logits, REFERENCE, reward, "nothing")
                + mix * gradient(logits, REFERENCE, reward, "labels", label_coef=label_coef))

    dp = fixed_point(of_dp, REFERENCE)
    dpo, dpo_of_smaller_beta = (fixed_point(lambda logits, beta=beta: gradient(logits, REFERENCE, reward,
                                                                               "nothing", beta=beta),
                                            REFERENCE) for beta in (BETA, BETA * (1 - k)))
    margins, plain, smaller = ((policy - REFERENCE)[0] - (policy - REFERENCE)[3]
                               for policy in (dp, dpo, dpo_of_smaller_beta))
    assert (plain * BETA).item() == pytest.approx(2.1 * scale, abs=1e-5)          # DPO's margin: the reward's
    assert abs(margins / smaller - 1).item() < apart
    assert (margins / plain).item() == pytest.approx(1 / (1 - k), rel=2 * apart)     # 1.67 times DPO's


def test_online_dpo_ends_at_the_best_policy_and_pr_beside_it():
    best = (REFERENCE + REWARD / BETA).log_softmax(-1)
    assert value(best) == pytest.approx(BETA * (REFERENCE + REWARD / BETA).logsumexp(-1).item())
    ends = [fixed_point(lambda logits, coef=coef: gradient(logits, REFERENCE, REWARD, "responses",
                                                           response_coef=coef), best)
            for coef in (0.0, 0.3, 1.0)]
    distances, lost = [kl(end, best) for end in ends], [value(best) - value(end) for end in ends]
    assert distances[0] == pytest.approx(0, abs=1e-12)
    assert 1e-4 < distances[1] < distances[2]
    assert lost == pytest.approx([BETA * distance for distance in distances], abs=1e-9)  # J* − J = β·KL(π‖π*)


def test_online_ipo_ends_at_the_regularised_nash_policy_of_a_preference_that_no_reward_explains():
    """Rock beats scissors, scissors beat paper, paper beats rock; the fourth loses to all. The Nash policy of
    P(π ≻ π') − β·KL(π‖π_ref) + β·KL(π'‖π_ref) is the best response to itself, π ∝ π_ref·exp(P(y ≻ π) / β)
    (arXiv 2403.08635). Online DPO ends elsewhere: it looks for a reward, and there is none."""
    preference = torch.tensor([[0.5, 0.9, 0.1, 0.8], [0.1, 0.5, 0.9, 0.7], [0.9, 0.1, 0.5, 0.6],
                               [0.2, 0.3, 0.4, 0.5]], dtype=torch.float64)
    ends = {f: fixed_point(lambda logits, f=f: gradient(logits, REFERENCE, None, "responses", preference,
                                                        response_coef=0.0, loss_type=f), REFERENCE, rate)
            for f, rate in (("ipo", 0.2), ("sigmoid", 8.0))}
    off = {}
    for f, policy in ends.items():
        best_response = (REFERENCE + preference @ policy.exp() / BETA).log_softmax(-1)
        off[f] = kl(policy, best_response)
    assert off["ipo"] == pytest.approx(0, abs=1e-12) and off["sigmoid"] > 1e-2
    assert kl(ends["ipo"], REFERENCE) > 0.01                          # it has moved


def test_pp_leaves_for_what_the_reference_thinks_rare_and_the_rarer_the_farther():
    """PP sees no reward. It stands still at the reference, and off it, it climbs until it has put about half
    of its mass on the rare response: its KL grows by about 1 with every zero of ε. The best policy stays
    near."""
    reward, pp, best = torch.tensor([0.0, 1.0], dtype=torch.float64), [], []
    for epsilon in (1e-2, 1e-4, 1e-6, 1e-8):
        reference = torch.tensor([1 - epsilon, epsilon], dtype=torch.float64).log()

        def uphill(logit, reference=reference):                        # dJ by the rare response's logit
            return -gradient(torch.tensor([0.0, logit]).double(), reference, reward, "both")[1].item()

        low, high = (reference[1] - reference[0]).item(), 5.0
        assert uphill(low) == pytest.approx(0, abs=1e-9)         # the reference sums to 1 within rounding
        assert uphill(low + 0.5) > 0 > uphill(high)
        low += 0.5
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if uphill(middle) > 0 else (low, middle)
        pp.append(kl(torch.tensor([0.0, low], dtype=torch.float64).log_softmax(-1), reference))
        best.append(kl((reference + reward / BETA).log_softmax(-1), reference))
    assert best[0] < 0.1 and best == sorted(best, reverse=True)
    growth = [after - before for before, after in pairwise(pp)]
    assert all(1.8 < each < 2.5 for each in growth)                    # log(100)/2 = 2.3 if it were just half
