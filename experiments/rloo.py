"""RLOO beside online DPO: the same loop, samples and reward, with another loss.

    python experiments/rloo.py --model M --data D --reward R …      # flags of sail.py, but no variant

RLOO (arXiv 2402.14740) with two samples to a prompt weighs the score of each by how much its regularised
reward, R = r − β log(π/π_ref), is above the other's. The two terms of a pair are one gradient:

    ½ [(R₁ − R₂) ∇log π(y₁) + (R₂ − R₁) ∇log π(y₂)] = ½ (R₁ − R₂) ∇(log π(y₁) − log π(y₂))

u is β times the difference of the log-ratios, and R₁ − R₂ = r₁ − r₂ − u. So this is the gradient of
−(r₁ − r₂ − u)² / 4β: RLOO fits the margin u to the reward difference by least squares where DPO with soft
labels fits σ(u) to σ(r₁ − r₂) by cross-entropy.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sail
from runtime.command_line import command_line


def rloo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
              preference, on_policy, self_labelled, *, beta, **_):
    """RLOO's loss for two samples to a prompt: (losses (B,), metrics), with the arguments of `sail_loss`.
    preference is σ(r₁ − r₂), from which the reward difference is taken back."""
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    u = sail.margin(*logps, beta)
    losses = (torch.logit(preference) - u).square() / (4 * beta)
    metrics = sail.sail_metrics(losses, *logps, beta, u.detach(), preference, on_policy, self_labelled,
                                torch.ones_like(u))
    return losses, metrics


def main(argv=None, **unflagged):
    """`python experiments/rloo.py …`: sail.py with this loss, on fresh pairs alone."""
    sail.sail_loss = rloo_loss
    argv = sys.argv[1:] if argv is None else argv
    sail.main([*argv, "--variant", "online-dpo", "--mix", "1"], **unflagged)


if __name__ == "__main__":
    command_line(main)
