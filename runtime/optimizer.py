"""The optimizer and its guarded step, for the policy and for a reward model."""
import math

import torch

from runtime.processes import is_sharded


def make_optimizer(parameters, steps, settings):
    """Make (optimizer, scheduler). The learning rate rises linearly during the warm-up, and is then constant.
    The schedule "cosine" multiplies this by a factor that falls from 1 to 0 as a half cosine over all
    `steps`, the warm-up included. The warm-up takes a tenth of the steps if settings.warmup_steps is None."""
    if settings.optimizer == "rmsprop":
        optimizer = torch.optim.RMSprop(parameters, settings.learning_rate)
    else:
        optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=0.0, fused=True)
    warmup_steps = settings.warmup_steps
    if warmup_steps is None:
        warmup_steps = steps // 10

    def factor(done):
        warm_up = min(1, (done + 1) / max(1, warmup_steps))
        if settings.schedule == "cosine":
            return warm_up * (1 + math.cos(math.pi * done / steps)) / 2
        return warm_up

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def optimizer_step(model, optimizer, scheduler, max_grad_norm, loss):
    """Clip the gradient and take one step of optimizer and scheduler, unless the loss or the gradient is not
    finite: (gradient norm before clipping, learning rate, whether the step was taken). The gradients are
    cleared in any case. All processes call this together, with the same loss."""
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if is_sharded(model):
        grad_norm = grad_norm.full_tensor()
    grad_norm = grad_norm.item()
    learning_rate = scheduler.get_last_lr()[0]
    finite = math.isfinite(grad_norm) and math.isfinite(loss)          # the same on all processes
    if finite:
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad()
    return grad_norm, learning_rate, finite
