"""sail_loss against TRL 1.16 on the same log-probabilities: four pairs, scored by a small Llama in float32.

The losses are what TRL's trainers returned on these pairs, or the closed form where it has no such. SimPO is
CPOTrainer with cpo_alpha 0; its simpo_gamma is target_margin, not a multiple of it. ORPOTrainer's loss is
nll + beta · OR with OR = −log σ(log-odds ratio), so its losses at two betas give OR.
"""
import pytest
import torch

from sail import margin, sail_loss, utility

POLICY = torch.tensor([[-856.96436, -1133.9061, -845.559, -948.9627],         # chosen: log π(y|x), summed
                       [-1416.352, -1199.5958, -1701.5352, -1716.486]])       # rejected
REFERENCE = torch.tensor([[-863.75714, -1138.981, -853.50244, -958.41095],
                          [-1426.4882, -1200.3872, -1717.6589, -1719.6853]])
LENGTHS = torch.tensor([[95, 125, 93, 105], [156, 132, 188, 189]])            # tokens, with the end token
NO_REFERENCE, SMOOTHED = torch.zeros(2, 4), torch.full((4,), 0.9)
ORPO = {0.1: 9.128425, 1.0: 9.74369}                                          # beta: ORPOTrainer's loss


@pytest.mark.parametrize("expected, options", [
    (0.74706906, {}),                                         # DPOTrainer: sigmoid, beta 0.1
    (1.526182, dict(beta=0.5)),                               # DPOTrainer
    (1.0247833, dict(loss_type="hinge")),                     # DPOTrainer
    (0.74459076, dict(preference=SMOOTHED)),                  # closed form: DPOTrainer's is not smoothed
    (61.351524, dict(loss_type="ipo")),                       # closed form: DPOTrainer's ipo is per token
    (0.62711415, dict(loss_type="sigmoid_norm", beta=5.0, lengths=LENGTHS)),                 # closed form
])
def test_the_values_are_those_of_trls_dpo(expected, options):
    losses, _ = sail_loss(*POLICY, *REFERENCE, **options)
    assert losses.mean().item() == pytest.approx(expected, rel=1e-5)


def test_ipo_on_means_per_token_is_that_of_trls_dpo():
    losses, _ = sail_loss(*POLICY / LENGTHS, *REFERENCE / LENGTHS, loss_type="ipo")
    assert losses.mean().item() == pytest.approx(24.717056, rel=1e-5)


@pytest.mark.parametrize("expected, options", [
    (5.621793, dict(preference=SMOOTHED)),                                # CPOTrainer: label_smoothing 0.1
    (1.2854865, dict(loss_type="simpo", beta=2.0)),                       # CPOTrainer: simpo_gamma 1
    ((ORPO[1.0] - ORPO[0.1]) / 0.9, dict(loss_type="orpo")),
])
def test_the_values_without_a_reference_are_those_of_trls_cpo_and_orpo(expected, options):
    losses, _ = sail_loss(*POLICY, *NO_REFERENCE, lengths=LENGTHS, **options)
    assert losses.mean().item() == pytest.approx(expected, rel=1e-5)


def test_simpo_with_another_target_margin_is_that_of_trls_cpo():
    u = margin(*POLICY, *NO_REFERENCE, beta=0.1, loss_type="simpo", lengths=LENGTHS)
    losses = -utility(u, 0.1, "simpo", target_margin=0.5)                 # CPOTrainer: simpo_gamma 0.5
    assert losses.mean().item() == pytest.approx(0.9728656, rel=1e-5)


def test_orpo_on_likely_responses_is_that_of_trls_odds_ratio_loss():
    losses, _ = sail_loss(*POLICY / 100, *NO_REFERENCE, loss_type="orpo",    # p ≈ 0.9 a token: 1 − p counts
                          lengths=LENGTHS)
    assert losses.mean().item() == pytest.approx(0.6920237, rel=1e-5)
