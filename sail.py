"""SAIL: self-improving efficient online alignment of language models (arXiv 2406.15567), from scratch.

Online alignment is a problem of two levels. The upper level fits a reward r to labelled pairs of responses;
the lower level makes the policy that is best for r, and this policy writes the pairs.

    upper:  max_r E_x E_{(y1,y2) ~ π_r} E_{(w,l) ~ label} [ log σ(r(x,y_w) − r(x,y_l)) ]
    lower:  π_r = argmax_π E_{y ~ π}[ r(x,y) ] − β KL(π ‖ π_ref) = π_ref exp(r/β) / Z(x)

Solved for r, the lower level says r = β log(π_r/π_ref) + β log Z(x). In the upper level Z cancels. This
leaves a single-level objective, in which the policy π_θ appears three times if it also gives the labels:

    J(θ) = E_x E_{(y1,y2) ~ π_θ} E_{(w,l) ~ label} [ f(u) ],     f = log σ,
    u    = β [ (log π_θ(y_w) − log π_ref(y_w)) − (log π_θ(y_l) − log π_ref(y_l)) ]

Here (w, l) says which of the two responses is preferred, by the data, a reward or the policy. J is the sum of
P(responses) · P(label) · f over all prompts, pairs and labels. The product rule gives one term for each
factor, and ∇P = P ∇log P turns each term into an expectation again.

    ∇J = E[ ∇f ]                                      T1   the DPO term
       + E[ f · ∇(log π_θ(y1|x) + log π_θ(y2|x)) ]    T2   because the responses come from the policy
       + E[ f · ∇log P(w ≻ l) ]                       T3   because the label comes from the policy; P = σ(u)

DPO keeps T1 alone. On a share `mix` of a run's pairs, SAIL-PR adds T2 (the policy's responses, a reward's
labels), SAIL-DP adds T3 (the data's responses, the policy's labels), and SAIL-PP adds both, each with a
weight. Under the policy's labels T1 is 0 if f = log σ, because ∇f then averages to 0 over the labels. The
other pairs of a run are trained with plain DPO, on the data's responses and labels. `sail_loss` below
computes all three terms for a batch of pairs, `training_step` uses it, and `train` is the loop.
experiments/terms_by_hand.py computes the terms of one prompt with torch.autograd.grad.

    python sail.py --variant pr                                # train on the toy world, in minutes on a CPU
    python sail.py --variant pr --model M --data D --reward R  # train your model, on a GPU if there is one
    torchrun --nproc_per_node 8 sail.py --variant pr …         # train on eight GPUs; on two nodes:
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 sail.py …

Where this code departs from the paper's text, on purpose:
  1. The label is summed out, not sampled: the gradient has the same expectation and less noise.
  2. A baseline, a running mean of past f, is subtracted from f in T2. It lowers the noise and keeps the
     expectation, since the expectation of ∇log π_θ(y|x) over y ~ π_θ is ∇ Σ_y π_θ(y|x) = ∇1 = 0.
  3. Responses are sampled at temperature 1 from the untruncated softmax, the distribution that T2 assumes.
  4. AdamW and full fine-tuning are the default; the authors used RMSprop and LoRA.
"""
import math
import shlex
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from runtime.command_line import InputError, command_line, seeded
from runtime.optimizer import make_optimizer, optimizer_step
from runtime.processes import (
    all_sum, computing_in, default_dtype, fails_together, print0, process_group, rank, sent,
    share_of_process, sum_gradients, with_equal_counts, world_size)
from runtime.run_directory import fingerprint, fingerprint_files, run_directory
from runtime.saved_model import save_model
from runtime.settings import Objective, Parser, Settings, flag_of, setting, settings_to_resume
from runtime.training import NOT_MEASURED, micro_batches, refuse_before_loading, steps, training

import torch
import torch.nn.functional as F

from data import Pair, collate, encode, end_token_ids, length_table
from evaluate import evaluate_policy, responses_to_each
from formats import train_and_held_out
from generate import (
    collate_pairs, load_models, load_policy, pair_logps, reference_logps, response_tokens, roll_out,
    score_once, sequence_logps, sequence_logps_and_revkl, with_trained)
from reward import (
    Reward, drop_unscorable, label_by_preference, label_by_reward, load_preference, load_reward, try_out)
from toy import draw_toy_pairs, is_toy_model, toy_settings, write_world

# --- the losses ---------------------------------------------------------------------------------------------
# B is the number of pairs in a call. *_logps are log π(y|x), summed over the tokens of y.


def margin(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
           beta=0.1, loss_type="sigmoid", lengths=None):
    """u, (B,): by how much a pair's chosen response is ahead of its rejected one. For DPO, IPO and SLiC it is
    the difference of implicit rewards, each β times a log-ratio (arXiv 2305.18290, eq. 7). The other
    objectives compare means per token; `lengths`, (2, B), are the numbers of tokens of the chosen and of the
    rejected responses. ORPO's margin has no β."""
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    if loss_type == "sigmoid_norm":                                   # Tülu 3 (arXiv 2411.15124)
        return beta * (chosen / lengths[0] - rejected / lengths[1])
    if loss_type == "simpo":                                          # arXiv 2405.14734, eq. 4: no reference
        return beta * (policy_chosen_logps / lengths[0] - policy_rejected_logps / lengths[1])
    if loss_type == "orpo":                                           # arXiv 2403.07691: no reference
        return log_odds(policy_chosen_logps / lengths[0]) - log_odds(policy_rejected_logps / lengths[1])
    return beta * (chosen - rejected)


def log_odds(logps):
    """The log-odds log(P / (1 − P)), given log P. log P is clamped to at most −1e-6, because the log-odds of
    a P that rounds to 1 are infinite."""
    logps = logps.clamp(max=-1e-6)
    return logps - torch.log(-torch.expm1(logps))


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             beta=0.1):
    """DPO's loss (arXiv 2305.18290, eq. 7), (B,), of log-probabilities (B,). `sail_loss` with its defaults
    gives the same."""
    return -F.logsigmoid(margin(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                                reference_rejected_logps, beta))


def utility(u, beta, loss_type, target_margin=None):
    """f(u), (B,): the utility of a pair of margin u, which is minus the loss called `loss_type`.

    sigmoid        log σ(u)               DPO (arXiv 2305.18290)
    sigmoid_norm   log σ(u)               length-normalised DPO (arXiv 2411.15124)
    ipo            −(u/β − 1/(2β))²       IPO (arXiv 2310.12036), with log-ratios summed over tokens
    hinge          −max(0, 1 − u)         SLiC (arXiv 2305.10425)
    simpo          log σ(u − target)      SimPO (arXiv 2405.14734); target_margin None means β/2
    orpo           log σ(u)               ORPO (arXiv 2403.07691), whose likelihood term is `nll_coef`"""
    if loss_type in ("sigmoid", "sigmoid_norm", "orpo"):
        return F.logsigmoid(u)
    if loss_type == "simpo":
        if target_margin is None:
            target_margin = beta / 2
        return F.logsigmoid(u - target_margin)
    if loss_type == "ipo":
        return -(u / beta - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return -F.relu(1 - u)
    raise ValueError(f"there is no loss_type {loss_type!r}")


def sail_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
              preference=None, on_policy=None, self_labelled=None, *,
              beta=0.1, response_coef=1.0, label_coef=1.0, loss_type="sigmoid", baseline=None, lengths=None):
    """SAIL's loss for every preference variant and utility (arXiv 2406.15567). Variants differ only in who
    writes a pair's responses and who labels it. It makes no difference which of the two is called
    chosen: the loss stays the same if they are exchanged and `preference` becomes 1 − `preference`.

    *_logps        (B,)  the policy's with gradient, the reference's without
    preference     (B,)  P(chosen ≻ rejected), given by the data or the reward. None means 1 for every pair.
                         For a label that was drawn, pass 0 or 1.
    on_policy      (B,)  bool: both responses were sampled from the policy as it is now, so T2 applies
    self_labelled  (B,)  bool: the policy labels the pair, so T3 applies; σ(u) then replaces `preference`
    baseline       what T2 subtracts from f, a number or (B,) without gradient. It must not depend on the
                   pair's own responses. None means f(0) for a single on-policy pair, and otherwise the
                   mean f of the call's other on-policy pairs, which must share no response with the pair
    lengths        (2, B)  the responses' numbers of tokens, for the objectives that compare means per token

    Returns (losses, metrics). losses, (B,), have the value −(p f(u) + (1 − p) f(−u)) and the gradient −(T1 +
    response_coef · T2 + label_coef · T3). With both coefficients 1, the expectation of this gradient is −∇J
    exactly. metrics: see `sail_metrics`."""
    u = margin(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
               beta, loss_type, lengths)
    no_pair = torch.zeros_like(u, dtype=torch.bool)
    on_policy = no_pair if on_policy is None else on_policy.bool()
    self_labelled = no_pair if self_labelled is None else self_labelled.bool()
    p = torch.ones_like(u) if preference is None else preference.to(u.dtype)
    p = torch.where(self_labelled, torch.sigmoid(u), p).detach()      # detached: T3 below is p's gradient

    f_chosen = utility(u, beta, loss_type)                            # f₊ (B,)
    f_rejected = utility(-u, beta, loss_type)                         # f₋ (B,)
    mean_f = p * f_chosen + (1 - p) * f_rejected                      # F̄ (B,); its gradient is T1
    f = mean_f.detach()                                               # F̄ as a mere weight, for T2
    if baseline is None:
        baseline = mean_of_others(f, on_policy, utility(torch.zeros_like(f), beta, loss_type))
    # Two numbers for each pair whose gradients are the terms T2 and T3. Their values mean nothing.
    T2 = (f - baseline) * (policy_chosen_logps + policy_rejected_logps)
    T3 = p * f_chosen.detach() * F.logsigmoid(u) + (1 - p) * f_rejected.detach() * F.logsigmoid(-u)
    T2 = torch.where(on_policy, T2, 0)
    T3 = torch.where(self_labelled, T3, 0)

    # Only the gradient of the corrections is wanted, so that the loss keeps the value −F̄, which is minus the
    # objective. corrections − corrections.detach() is 0 and has the gradient of the corrections.
    corrections = response_coef * T2 + label_coef * T3
    losses = -(mean_f + (corrections - corrections.detach()))
    label_weight = 1 + label_coef * torch.minimum(f_chosen, f_rejected)
    return losses, sail_metrics(losses, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                                reference_rejected_logps, beta, u, p, on_policy, self_labelled, label_weight)


def mean_of_others(f, on_policy, f_zero):
    """T2's baseline, (B,): the mean f of the other on-policy pairs, or f(0) for the only on-policy pair.
    Pairs that are not on-policy get a value that T2 does not use."""
    others = on_policy.sum() - 1
    return torch.where(others > 0, ((f * on_policy).sum() - f) / others.clamp(min=1), f_zero)


@torch.no_grad()
def sail_metrics(losses, chosen_logps, rejected_logps, reference_chosen_logps, reference_rejected_logps,
                 beta, u, p, on_policy, self_labelled, label_weight):
    """Means over all pairs, detached. margin and accuracy are in the direction of the label, whose
    probability is p; a margin of 0 counts as half right. label_sharpness is |2p − 1|: 1 for a certain label,
    0 for a tie. label_reversed is the share of pairs that are self-labelled and in which T3 outweighs T1 for
    the less likely label. The argument label_weight, 1 + label_coef · f of that label, is negative there: for
    f = log σ it is the factor on ∇P(label) in the sum of T1 and T3."""
    q = 1 - p                                                         # P(rejected ≻ chosen)
    chosen_ahead = torch.where(u == 0, 0.5, (u > 0).to(p.dtype))
    label_reversed = self_labelled & (label_weight < 0)
    columns = {
        "loss": losses,
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "chosen_implicit_reward": beta * (chosen_logps - reference_chosen_logps),
        "rejected_implicit_reward": beta * (rejected_logps - reference_rejected_logps),
        "margin": (p - q) * u,
        "accuracy": p * chosen_ahead + q * (1 - chosen_ahead),
        "label_sharpness": (p - q).abs(),
        "on_policy": on_policy,
        "self_labelled": self_labelled,
        "label_reversed": label_reversed}
    metrics = {}
    for name, column in columns.items():
        metrics[name] = column.to(p.dtype).mean()
    return metrics


# --- the variants -------------------------------------------------------------------------------------------


@dataclass
class Variant:
    """How a variant treats its pairs, which are the share `mix` of a run's pairs. All other pairs are trained
    on the data's responses and labels, with DPO or, in sft, by likelihood. Each number is the default of the
    setting with the same name; for dp, pp and pr they are taken from the authors' examples."""
    responses: str                # who writes them: "data", "policy", or "data, policy" for chosen, rejected
    label: str                    # who labels them: "data", "policy" or "reward"
    mix: float = 0.0              # share of a run's pairs
    response_coef: float = 0.0    # weight of T2
    label_coef: float = 0.0       # weight of T3
    learning_rate: float = 1e-6
    likelihood: bool = False      # True: the loss is −log π of the chosen responses alone, as in SFT

    @property
    def sampled(self):
        """The sides of a pair that the policy writes."""
        return {"data": (), "policy": ("chosen", "rejected"), "data, policy": ("rejected",)}[self.responses]

    @property
    def unused(self):
        """The settings that have no effect on this variant."""
        if self.likelihood:                                    # the reward is still used to evaluate
            return {each.name for each in fields(Method)} - {"variant", "reward"}
        unused = set()
        if self.responses == self.label == "data":
            unused.add("mix")
        if self.responses != "policy":
            unused.add("response_coef")
        if self.label != "policy":
            unused.add("label_coef")
        if self.label != "reward":
            unused.add("preference")
        return unused


VARIANTS = {
    "sft": Variant(responses="data", label="data", likelihood=True, learning_rate=2e-5),
    "dpo": Variant(responses="data", label="data"),
    "dp": Variant(responses="data", label="policy", mix=0.4, label_coef=0.2),
    "pp": Variant(responses="policy", label="policy", mix=0.3, response_coef=0.2, label_coef=0.2),
    "pr": Variant(responses="policy", label="reward", mix=0.3, response_coef=0.3),
    "online-dpo": Variant(responses="policy", label="reward", mix=0.3),
    "relabelled-dpo": Variant(responses="data", label="reward", mix=1.0),
    "spin": Variant(responses="data, policy", label="data", mix=1.0)}


def defaults_of(name):
    """A setting's defaults by variant as text, without the defaults that are 0: "dp 0.4, pp 0.3"."""
    values = {variant: getattr(VARIANTS[variant], name) for variant in VARIANTS}
    return ", ".join(f"{variant} {value:g}" for variant, value in values.items() if value)


LOSS_TYPES = ("sigmoid", "sigmoid_norm", "ipo", "hinge", "simpo", "orpo")     # the losses of `utility`


@dataclass
class Method(Objective):
    """What a run optimises. The reward, the reference and β are inherited from Objective. Fields without a
    help text are no flags; studies in experiments/ set them from Python."""
    variant: str = setting("pr", "who writes the responses, and who labels them", choices=tuple(VARIANTS))
    mix: float | None = setting(None, f"the variant's share of pairs ({defaults_of('mix')})", low=0, high=1)
    response_coef: float | None = setting(None, f"weight of T2 ({defaults_of('response_coef')})", low=0)
    label_coef: float | None = setting(None, f"weight of T3 ({defaults_of('label_coef')})", low=0)
    preference: str = setting("soft", "P(chosen ≻ rejected): soft is σ(reward difference), hard is 1 for the "
                                      "higher reward, and a function returns it",
                              metavar="{soft,hard,FILE.py:FUNCTION}")
    loss_type: str = setting("sigmoid", "the utility f", choices=LOSS_TYPES)
    nll_coef: float = setting(0.0, "weight of −log π per token of the data's chosen responses", low=0)
    revkl_coef: float = setting(0.0, "weight of KL(π_ref‖π) per token; toy pp 0.3", low=0)
    label: str = setting("expected", choices=("expected", "sampled"))    # a label is summed out or drawn
    label_smoothing: float = setting(0.0, low=0, high=0.5)               # ε of conservative DPO


# --- one training step --------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run works with from its first step to its last."""
    policy: torch.nn.Module
    reference: Any                # a model that is held fixed; None for sft
    tokenizer: Any
    reward: Reward | None
    examples: list[Pair]          # the encoded pairs to train on
    held_out: list[Pair]          # the encoded pairs to evaluate on
    settings: Settings
    preference_function: Any = None                   # a user's function that labels instead of the reward
    optimizer: Any = None
    scheduler: Any = None
    progress: dict = field(default_factory=dict)      # what a checkpoint keeps, such as T2's `baseline`


def training_step(run, data_pairs, variant_pairs, method):
    """Take one optimizer step on the data's pairs and the variant's pairs, of which each process gives its
    share: (sums of their metrics over all processes, whether the step was finite and so was taken, a dict of
    timings, gradient norm and learning rate). The pairs may be changed, and so is run.progress["baseline"].
    All processes call this together."""
    variant, figures = VARIANTS[method.variant], {}
    # 1. roll out: the policy's responses replace the data's on the sides that the variant samples
    with timed(figures, "seconds_rollout"):
        variant_pairs = roll_out(run.policy, run.tokenizer, variant_pairs, variant.sampled, run.settings)
    # 2. label the pairs, in place; if the policy is to label them, sail_loss does it
    with timed(figures, "seconds_reward"):
        if variant.label == "reward" and run.preference_function:
            label_by_preference(variant_pairs, run.preference_function)
        elif variant.label == "reward":
            label_by_reward(variant_pairs, run.reward, method.preference)
    # 3. back-propagate the mean loss over all pairs
    totals = accumulate_gradients(run, data_pairs + variant_pairs, method)
    # 4. step, unless the loss or the gradient is not finite
    figures["grad_norm"], figures["learning_rate"], finite = optimizer_step(
        run.policy, run.optimizer, run.scheduler, run.settings.max_grad_norm, totals["loss"])
    # 5. update T2's baseline, a running mean of f
    if totals["on_policy"] and math.isfinite(totals["on_policy_loss"]):
        mean_utility = -totals["on_policy_loss"] / totals["on_policy"]
        run.progress["baseline"] += 0.1 * (mean_utility - run.progress["baseline"])
    return totals, finite, figures


def accumulate_gradients(run, pairs, method):
    """Back-propagate the mean loss over the pairs of all processes in micro-batches; for SFT, the mean over
    the tokens of their chosen responses. All processes call this together, each with its own pairs. Returns
    the sums of all counts and metrics over all processes."""
    run.policy.train(run.settings.gradient_checkpointing)   # eval mode, unless checkpointing needs train mode
    likelihood = VARIANTS[method.variant].likelihood
    totals, sums = all_sum(counts_of(pairs, likelihood), run.policy.device), {}
    total = totals["chosen_tokens"] if likelihood else totals["pairs"]
    micros = micro_batches(pairs, response_tokens, run.policy, run.settings.micro_batch_size)
    for micro, weight in with_equal_counts(micros, run.policy):        # the weight is 1 if nothing is sharded
        if likelihood:
            losses, metrics = sft_losses(run.policy, micro, run.settings.dtype)
        else:
            losses, metrics = preference_losses(run.policy, run.reference, micro, method,
                                                run.progress["baseline"], run.settings.dtype)
        (weight * losses.sum() / total).backward()
        counted = len(micro)
        if weight == 0:                                                # a repeat keeps the processes in step
            counted = 0
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + value.double() * counted
    sum_gradients(run.policy)
    values = torch.stack(list(sums.values())).tolist()                 # one transfer, since each stalls a GPU
    sums = Counter(dict(zip(sums, values, strict=True)))
    totals.update(all_sum(sums, run.policy.device))
    return totals


def preference_losses(policy, reference, pairs, method, baseline=None, dtype="float32"):
    """`sail_loss` of the pairs, plus the regularisers that are switched on: (losses (B,), metrics). The
    metrics are means over the pairs; their `loss` is without the regularisers."""
    # 1. log-probabilities, (2, B): row 0 the chosen responses, row 1 the rejected ones
    if method.revkl_coef:
        with computing_in(dtype, policy):
            ours, theirs, revkl = sequence_logps_and_revkl(policy, reference, *collate_pairs(pairs))
            ours, theirs, revkl = (each.unflatten(0, (2, len(pairs))) for each in (ours, theirs, revkl))
    else:
        theirs = reference_logps(reference, pairs, dtype)
        ours = pair_logps(policy, pairs, dtype)
        revkl = torch.zeros_like(ours)

    # 2. the pairs' flags and labels, as tensors (B,)
    def tensor(values, dtype=None):
        return sent(torch.tensor(values, dtype=dtype), ours.device)

    on_policy = tensor([pair.on_policy for pair in pairs])
    self_labelled = tensor([pair.self_labelled for pair in pairs])
    preference = tensor([pair.preference for pair in pairs], ours.dtype)
    preference = (1 - method.label_smoothing) * preference + method.label_smoothing * (1 - preference)
    if method.label == "sampled":
        preference = (tensor([pair.label_draw for pair in pairs]) < preference).to(ours.dtype)
    lengths = tensor([[len(pair.chosen_ids) for pair in pairs], [len(pair.rejected_ids) for pair in pairs]])
    # which responses were sampled, (2, B): both, none, or, as in SPIN, the rejected one
    sampled = tensor([[pair.samples == 2 for pair in pairs], [pair.samples > 0 for pair in pairs]])

    # 3. the loss
    losses, metrics = sail_loss(
        ours[0], ours[1], theirs[0], theirs[1], preference, on_policy, self_labelled,
        beta=method.beta, response_coef=method.response_coef, label_coef=method.label_coef,
        loss_type=method.loss_type, baseline=baseline, lengths=lengths)

    # 4. regularisers: −log π per token of chosen responses; KL(π_ref ‖ π) per token of both responses
    from_data = ~(on_policy | self_labelled)               # true for relabelled-dpo and spin, not for dp
    nll = torch.where(from_data, -ours[0] / lengths[0], 0.0)
    revkl = revkl.sum(0) / lengths.sum(0)
    with torch.no_grad():
        kl = (ours - theirs).mean(0)                                   # estimates KL(π ‖ π_ref) on samples
        metrics["kl"] = (kl * on_policy).mean()
        metrics["sampled_nll"] = -(ours * sampled).sum(0).mean()
        sampling_logps = tensor([pair.sampling_logps for pair in pairs], ours.dtype).T
        metrics["squared_sampler_gap"] = ((ours - sampling_logps) * sampled).square().sum(0).mean()
        metrics["on_policy_loss"] = (losses * on_policy).mean()
        metrics["nll"] = nll.mean()
        metrics["offline"] = from_data.float().mean()
        metrics["revkl"] = revkl.mean()
    return losses + method.nll_coef * nll + method.revkl_coef * revkl, metrics


def sft_losses(policy, pairs, dtype="float32"):
    """The negative log-likelihood of the chosen responses, summed over tokens: (losses (B,), metrics)."""
    batch = collate([pair.prompt_ids for pair in pairs], [pair.chosen_ids for pair in pairs])
    with computing_in(dtype, policy):
        logps = sequence_logps(policy, *batch)
    mean = logps.detach().mean()
    return -logps, {"loss": -mean, "chosen_logps": mean}


@contextmanager
def timed(figures, name):
    """Put the seconds that the block takes into figures[name]."""
    started = time.perf_counter()
    yield
    figures[name] = time.perf_counter() - started


# --- which pairs a step draws, and what it logs -------------------------------------------------------------


def plan(n_pairs, mix, settings):
    """(number of pairs, number of steps) of a run. If the setting `steps` is given, the run has that many
    full batches. Otherwise each pair of the data is seen `epochs` times as data, and the variant's pairs are
    added. At mix 1 all pairs are the variant's, and each pair of the data is seen `epochs` times as one of
    them."""
    if settings.steps:
        return settings.steps * settings.batch_size, settings.steps
    mix, offline = Fraction(str(mix)), int(settings.epochs * n_pairs)
    total = offline
    if mix != 1:
        total = int(offline / (1 - mix))
    return total, math.ceil(total / settings.batch_size)


@lru_cache(maxsize=4)
def order_of(n_pairs, seed, is_variants, epoch):
    """The indices of the pairs in an epoch's order, which is another for the variant than for the data."""
    generator = torch.Generator()
    generator.manual_seed(seeded("order", seed, int(is_variants), epoch))
    return torch.randperm(n_pairs, generator=generator).tolist()


def draw_pairs(examples, step, total, count, method, seed):
    """Draw (the data's pairs, the variant's pairs) of one step, copies of the examples: the pairs of all
    processes, the same in each process. Steps are numbered from 1 to `count`. The share `mix` of a run's
    `total` pairs is the variant's, evenly spread over the steps."""
    mix, variant = Fraction(str(method.mix)), VARIANTS[method.variant]       # exact, so that no pair is lost
    generator = torch.Generator().manual_seed(seeded("label draws", seed, step))
    data_pairs, variant_pairs = [], []
    for k in range(total * (step - 1) // count, total * step // count):       # the run's k-th pair
        variants_before, variants_after = int(k * mix), int((k + 1) * mix)
        is_variants = variants_after > variants_before
        nth = variants_before if is_variants else k - variants_before  # among the variant's or data's pairs
        epoch, place = divmod(nth, len(examples))
        example = examples[order_of(len(examples), seed, is_variants, epoch)[place]]
        pair = replace(example, label_draw=torch.rand((), generator=generator).item())       # a copy
        if is_variants:
            pair.on_policy = variant.responses == "policy"
            pair.self_labelled = variant.label == "policy"
            variant_pairs.append(pair)
        else:
            data_pairs.append(pair)
    return data_pairs, variant_pairs


def counts_of(pairs, likelihood):
    """Count what a step works on: pairs and tokens, the number and length of the samples, and the rewards of
    all responses that a reward has scored."""
    totals = Counter(pairs=len(pairs), tokens=0, chosen_tokens=0, samples=0, sampled_tokens=0, unfinished=0,
                     scored=0, ties=0, cut_for_reward=0, reward=0.0)
    for pair in pairs:
        totals["tokens"] += len(pair.prompt_ids) + len(pair.chosen_ids)
        if not likelihood:
            totals["tokens"] += len(pair.prompt_ids) + len(pair.rejected_ids)
        totals["chosen_tokens"] += len(pair.chosen_ids)
        totals["samples"] += pair.samples
        totals["sampled_tokens"] += pair.sampled_tokens
        totals["unfinished"] += pair.unfinished
        totals["scored"] += len(pair.rewards)
        totals["reward"] += sum(pair.rewards)
        totals["cut_for_reward"] += pair.cut_for_reward
        if pair.rewards and pair.rewards[0] == pair.rewards[1]:
            totals["ties"] += 1
    return totals


def record_of(step, totals, method, figures):
    """A step's line in metrics.jsonl: counts and means from `totals` and, unchanged, `figures`, as
    `training_step` returns both. A mean is None if the step has none of the pairs or responses it is over."""
    variant = VARIANTS[method.variant]

    def mean(name, over="pairs"):
        if name not in totals or not totals[over]:
            return None
        return totals[name] / totals[over]

    record = {"step": step, "loss": mean("loss", "chosen_tokens" if variant.likelihood else "pairs")}
    for name in ("margin", "accuracy", "label_sharpness", "chosen_logps", "rejected_logps",
                 "chosen_implicit_reward", "rejected_implicit_reward", "on_policy", "self_labelled"):
        record[name] = mean(name)
    record["kl"] = mean("kl", "on_policy")
    record["reward"] = mean("reward", "samples") if totals["scored"] else None
    record["response_length"] = mean("sampled_tokens", "samples")
    record["unfinished"] = mean("unfinished", "samples")
    record["entropy"] = mean("sampled_nll", "sampled_tokens")          # the policy's per token, from samples
    squared_gap = mean("squared_sampler_gap", "samples")
    record["sampler_gap"] = None if squared_gap is None else math.sqrt(squared_gap)      # see generate.py
    record["label_reversed"] = mean("label_reversed", "self_labelled")
    record["nll"] = mean("nll", "offline")
    record["revkl"] = mean("revkl") if method.revkl_coef else None
    record["ties"] = totals["ties"] if totals["scored"] else None
    record["cut_for_reward"] = totals["cut_for_reward"] if totals["scored"] else None
    record["tokens"] = round(totals["tokens"])
    return {**record, **figures}


# --- main ---------------------------------------------------------------------------------------------------


def train(args):
    """The whole run: load, loop, save. All processes call this together. Raises InputError for bad input, for
    a reward that fails, and after ten steps in a row that are not finite, and SystemExit after a signal."""
    out = Path(args.out)
    inputs = ("model", "reference", "data", "eval_data", "reward", "preference")
    refuse_before_loading(out, args, *inputs)
    run, account, held_out_account, lengths = load_run(args)
    total, count = plan(len(run.examples), args.mix, args)
    pairs_a_step = total // max(count, 1)
    if pairs_a_step < world_size():
        raise InputError(f"--batch-size: {pairs_a_step} pairs a step are too few for {world_size()} "
                         "processes; raise it, or --epochs")
    run.optimizer, run.scheduler = make_optimizer(run.policy.parameters(), count, args)
    # This comes after the optimizer is made, because a forward leaves a sharded model gathered.
    if meets_data_again(total, run, args):
        score_once(run.reference, run.policy, run.examples, args.dtype)
    start = {"baseline": utility(torch.zeros(()), args.beta, args.loss_type).item()}              # f(0)
    recorded = {**asdict(args), **fingerprints(run, args), "data_counts": account.counts()}
    with training(out, args.variant, args, recorded, start, run.policy, run.optimizer, run.scheduler) as loop:
        run.progress = loop.progress
        print_plan(run, account, held_out_account, lengths, total, count, args)
        for step in steps(loop, count, lambda: evaluate_run(run, args)):
            drawn = draw_pairs(run.examples, step.number, total, count, args, args.seed)
            data_pairs, variant_pairs = share_of_process(*drawn)
            totals, step.finite, figures = training_step(run, data_pairs, variant_pairs, args)
            step.record = record_of(step.number, totals, args, figures)
        save_model(run.policy, run.tokenizer, args, lambda trained: merged(trained, args))
    command = ["python", "evaluate.py", str(out)]
    for name in ("reward", "preference"):
        if ".py:" in (getattr(args, name) or ""):              # code runs only if the command line names it
            command += [flag_of(name), getattr(args, name)]
    print0(f"saved {out}/model; `{shlex.join(command)}` samples from it and prints its held-out figures")


def meets_data_again(total, run, args):
    """Whether a run of `total` pairs needs the reference's log-probabilities of the data's responses more
    than once, and nothing else of the reference: neither of other responses nor, for revkl_coef, of other
    tokens."""
    samples = args.mix > 0 and VARIANTS[args.variant].sampled
    return run.reference is not None and not samples and not args.revkl_coef and total > len(run.examples)


def merged(trained, args):
    """The policy of a run that has trained an adapter, with the adapter merged into its base. trained: {name:
    trained weight}."""
    base, _ = load_policy(args.model, args.trust_remote_code, chat_template=args.chat_template)
    return with_trained(base, trained, args.lora, args.out)


def evaluate_run(run, args):
    """Evaluate the current policy, all processes together: (figures, the numbers of prompts and responses
    behind them, samples to keep). Returns None if no pair is held out."""
    if not run.held_out:
        return None
    run.policy.eval()
    n = len(run.held_out)
    each = responses_to_each(n, args.eval_limit)
    print0(f"evaluating: {each * n} responses of up to {args.max_response_length} tokens to the prompts of "
           f"{n} held-out pairs …")
    figures, samples = evaluate_policy(run.policy, run.reference, run.tokenizer, run.held_out, run.reward,
                                       args, each, run.progress["step"], run.preference_function)
    return figures, {"prompts": n, "responses": each * n}, samples[:min(8, n)]


def fingerprints(run, args):
    """The fingerprints that --resume compares besides the settings, {"…_sha256": text or None}: of training
    and held-out pairs as token ids and labels, and of the files of models and functions."""
    ids = []
    for pair in run.examples + run.held_out:
        ids.append([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, pair.preference])
    found = {"data_sha256": fingerprint(ids)}
    for name in ("model", "reference", "reward", "chat_template"):
        found[f"{name}_sha256"] = fingerprint_files(getattr(args, name))
    found["preference_sha256"] = None
    if run.preference_function:
        found["preference_sha256"] = fingerprint_files(args.preference)
    return found


@fails_together
def load_data(args):
    """Load (training pairs, held-out pairs, reward, preference function, Account of the training pairs,
    Account of the held-out pairs), all processes together. The pairs are TextPairs; a reward or a function
    that the settings do not name is None. Raises InputError if the data lacks responses that the variant
    needs, or if something cannot be loaded or tried out."""
    train, held_out, account, held_out_account = train_and_held_out(
        args.data, args.eval_data, args.limit, args.prefer, args.score_scale)
    for side in needed_sides(args):
        if getattr(train[0], side) is None:
            needs = " and ".join(needed_sides(args))
            raise InputError(f"{args.data} has {account.format}, without the {needs} responses that "
                             f"--variant {args.variant} learns from (pp, pr, online-dpo need none at mix 1)")
    reward = preference = None
    if args.reward:
        reward = load_reward(args.reward, args.trust_remote_code, args.dtype)
    if ".py:" in args.preference:
        preference = load_preference(args.preference)
    try_out(train[0], reward, preference)
    return train, held_out, reward, preference, account, held_out_account


def needed_sides(args):
    """The sides of a pair, chosen or rejected, for which the data must have responses."""
    variant = VARIANTS[args.variant]
    if variant.likelihood:
        return ["chosen"]
    if args.mix < 1:
        return ["chosen", "rejected"]
    return [side for side in ("chosen", "rejected") if side not in variant.sampled]


def load_run(args):
    """Load the data and the models, all processes together: (Run without an optimizer, Account of the
    training pairs, Account of the held-out pairs, lengths of the training pairs as in `encode`). At most
    eval_limit pairs are held out. Raises InputError for bad input."""
    train, held_out, reward, preference, account, held_out_account = load_data(args)
    policy, reference, tokenizer = load_models(args)
    limits = (end_token_ids(tokenizer, policy), args.max_prompt_length, args.max_response_length,
              policy.get_input_embeddings().weight.shape[0])
    examples, lengths = encode_scorable(train, account, tokenizer, limits, reward)
    if held_out:
        limits += (args.eval_limit,)
        held_out, _ = encode_scorable(held_out, held_out_account, tokenizer, limits, reward)
    run = Run(policy, reference, tokenizer, reward, examples, held_out, args, preference_function=preference)
    return run, account, held_out_account, lengths


def encode_scorable(pairs, account, tokenizer, limits, reward):
    """Encode the pairs and keep those that the reward, if any, can score: (encoded pairs, lengths as in
    `encode`). What is dropped or cut is added to `account`. limits: the arguments of `encode` that follow
    the tokenizer. Raises InputError as `encode` and `drop_unscorable` do."""
    encoded, changes, lengths = encode(pairs, tokenizer, *limits)
    account.add(changes)
    encoded, changes = drop_unscorable(encoded, reward)
    account.add(changes)
    return encoded, lengths


def print_plan(run, account, held_out_account, lengths, total, count, args):
    """Print what is trained, on which data, and in how many steps."""
    trained, size = run.policy.num_parameters(only_trainable=True), run.policy.num_parameters()
    print0(f"{args.model} on {run.policy.device} in {args.dtype}: {trained:,} of {size:,} parameters are "
           "trained")
    print0(f"chat template: {run.tokenizer.template_name}")
    print0(f"{args.data}: {len(run.examples)} pairs to train on\n{account}")
    limits = dict(prompt=args.max_prompt_length, chosen=args.max_response_length,
                  rejected=args.max_response_length)
    print0(length_table(lengths, "tokens", limits))
    print0(f"{args.eval_data or f'held out of {args.data}'}: {len(run.held_out)} pairs to evaluate on\n"
           f"{held_out_account}")
    if not run.held_out:
        print0(NOT_MEASURED)
    generated = int(total * Fraction(str(args.mix)))
    what = f"{generated} generated for the data's prompts"
    if generated and not VARIANTS[args.variant].sampled:
        what = f"{generated} with new labels"
    print0(f"{args.variant}: {total - generated} pairs from the data, {what}; {count} steps of up to "
           f"{math.ceil(total / count)} pairs -> {args.out}")


# --- the command line ---------------------------------------------------------------------------------------


@dataclass
class Arguments(Settings, Method):
    """All settings of a run."""

    @property
    def unused(self):
        return VARIANTS[self.variant].unused


def parse_args(argv=None, **unflagged):
    """The settings of a command line, checked and completed with the defaults that depend on data and
    variant. unflagged: settings that are no flags, by name."""
    parser = Parser("Train a language model by SFT, DPO or SAIL's DP, PP and PR. Defaults in brackets.")
    parser.add_settings(Method, title="method (the default weights are taken from the authors' examples)")
    parser.add_settings(Settings, title="models, data, optimisation, output (toy.py has the toy's defaults)",
                        data="toy, a .jsonl, .json, .csv or .parquet file, or a hub name (toy)",
                        learning_rate="rate after warm-up (1e-6, lora 1e-5, sft 2e-5; toy 4e-4, sft 2e-3)",
                        out="directory for logs and model (runs/DATA/VARIANT)")
    flags = {**vars(parser.parse_args(argv)), **unflagged}
    saved = settings_to_resume(flags, Arguments, toy_settings("dpo")["reward"])
    given = {**saved, **flags}
    name = given.get("variant", Method.variant)
    variant = VARIANTS[name]
    for unused in sorted(variant.unused & flags.keys()):
        parser.error(f"argument {flag_of(unused)}: has no effect on --variant {name}")
    source = given.get("data", "toy")
    defaults = dict(mix=variant.mix, response_coef=variant.response_coef, label_coef=variant.label_coef,
                    learning_rate=variant.learning_rate, dtype=default_dtype(),
                    out=f"{run_directory(source)}/{name}")
    if "lora" in given:
        defaults["learning_rate"] = max(variant.learning_rate, 1e-5)
    if source == "toy":
        if "model" in given and not is_toy_model(given["model"]):
            parser.error(f"argument --data: is needed; {given['model']} cannot read the toy's data")
        given.pop("data", None)
        defaults.update(toy_settings(name, given.get("model"), given.get("seed", 0)))
    args = Arguments(**{**defaults, **given})
    if not variant.likelihood:
        args.reference = args.reference or args.model
    refuse_flags(args, parser)
    return args


def refuse_flags(args, parser):
    """End with an error if settings do not go together, or if one is missing."""
    variant = VARIANTS[args.variant]
    if args.model is None:
        parser.error("argument --model: give a directory or hub name")
    if args.preference not in ("soft", "hard") and ".py:" not in args.preference:
        parser.error(f"argument --preference: {args.preference} is neither soft nor hard nor "
                     "FILE.py:FUNCTION")
    if variant.label == "reward" and args.mix > 0 and not args.reward and ".py:" not in args.preference:
        parser.error(f"argument --reward: {args.variant} needs one to label its pairs: FILE.py:FUNCTION or a "
                     "classifier; or give a --preference FILE.py:FUNCTION")
    if args.nll_coef and args.mix == 1 and "policy" in (variant.responses, variant.label):
        parser.error("argument --nll-coef: has no effect at mix 1: the policy writes or labels each pair")
    if args.label == "sampled" and variant.label == "policy":
        parser.error(f"label='sampled': {args.variant} sums out the policy's labels, so none is sampled")
    if args.overwrite and args.resume:
        parser.error("argument --overwrite: deletes what --resume continues; give only one of the two")


@fails_together
def make_toy(args):
    """Write, on rank 0, the files that `--data toy` stands for, unless they exist. All processes call this
    together."""
    if rank() != 0:
        return
    write_world(args.seed)
    if Path(args.data).name == "toy-pairs.jsonl" and not Path(args.data).is_file():
        print0(f"toy: sampling pairs from {args.model} into {args.data}, this once")
        draw_toy_pairs(args.model, args.data)


def main(argv=None, **unflagged):
    """The command `python sail.py …`, alone or under torchrun. unflagged: see `parse_args`."""
    args = parse_args(argv, **unflagged)
    is_toy = args.data == toy_settings(args.variant, args.model, args.seed)["data"]
    if is_toy:
        torch.set_num_threads(1)                   # more threads are no faster, and round differently
    with process_group(args.shard):
        if is_toy and args.model == toy_settings("dpo")["model"] and not Path(args.model).is_dir():
            print0(f"toy: {args.model} has no SFT model yet, so it is trained now, once")
            sft = parse_args(["--variant", "sft", "--resume"])
            make_toy(sft)
            train(sft)
        if is_toy:
            make_toy(args)
        train(args)


if __name__ == "__main__":
    command_line(main)
