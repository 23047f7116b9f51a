"""The three terms of ∇J by hand: one prompt, three responses, torch.autograd.grad.

    python experiments/terms_by_hand.py         # three gradients, their sum beside ∇J and beside sail_loss

J is the sum over all pairs of P(responses) · P(label) · f, so the product rule gives three terms: T1
differentiates f, T2 differentiates P(responses), T3 differentiates P(label), and each holds the other two
factors fixed. T1 is 0 here: the policy's own label has the probability σ(u) that f = log σ(u) asks for.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from sail import sail_loss

BETA = 0.5
logits = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64, requires_grad=True)
reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()     # log π_ref(y|x) of each response
logps = logits.log_softmax(0)                                            # log π(y|x)
first, second = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T     # all nine pairs (y1, y2)

# The factors of J, for every pair with y1 as the winner; by symmetry the other label gives the same again.
u = BETA * ((logps - reference)[first] - (logps - reference)[second])
responses = logps[first].exp() * logps[second].exp()                     # P(y1, y2): the policy writes both
label = torch.sigmoid(u)                                                 # P(y1 ≻ y2): the policy labels
f = F.logsigmoid(u)


def gradient(value):
    """∂value/∂logits, (3,)."""
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


T1 = gradient(2 * (responses.detach() * label.detach() * f).sum())
T2 = gradient(2 * (responses * label.detach() * f.detach()).sum())
T3 = gradient(2 * (responses.detach() * label * f.detach()).sum())
J = 2 * (responses * label * f).sum()

# The same from sail_loss: every pair once, weighted by its probability; a constant baseline cancels out.
every = torch.ones(9, dtype=torch.bool)
losses, _ = sail_loss(logps[first], logps[second], reference[first], reference[second], None, every, every,
                      beta=BETA, baseline=-0.7)
from_loss = gradient(-(responses.detach() * losses).sum())

if __name__ == "__main__":
    for name, value in (("T1, through f", T1), ("T2, through P(responses)", T2), ("T3, through P(label)", T3),
                        ("T1 + T2 + T3", T1 + T2 + T3), ("the gradient of J", gradient(J)),
                        ("what sail_loss gives", from_loss)):
        numbers = (value.round(decimals=8) + 0.0).tolist()               # + 0.0: no negative zero
        print(f"{name:26}" + "".join(f"{number:12.8f}" for number in numbers))
