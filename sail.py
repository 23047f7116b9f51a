"""SAIL: self-improving efficient online alignment of language models (arXiv 2406.15567), from scratch.

Online alignment has two levels: a reward r is fitted on pairs that were written by the best policy for r.

    upper:  max_r E_x E_{(y1,y2) ~ π_r} E_{(w,l) ~ label} [ log σ(r(x,y_w) − r(x,y_l)) ]
    lower:  π_r = argmax_π E_{y ~ π}[ r(x,y) ] − β KL(π ‖ π_ref) = π_ref exp(r/β) / Z(x)

The lower level's solution, read the other way, is r = β log(π_r/π_ref) + β log Z(x). Put into the upper
level, Z cancels in the difference, and one level is left: a policy π_θ, which is in three places of

    J(θ) = E_x E_{(y1,y2) ~ π_θ} E_{(w,l) ~ label} [ f(u) ],     f = log σ,
    u    = β [ (log π_θ(y_w) − log π_ref(y_w)) − (log π_θ(y_l) − log π_ref(y_l)) ]

The mean is a sum of P(responses) · P(label) · f. The product rule gives a term for each factor, and ∇P =
P ∇log P makes it a mean again. By the policy's own label, P(y_1 ≻ y_2) is σ(u_12).

    ∇J = E[ ∇f ]                                        T1   the DPO term
       + E[ f · ∇(log π_θ(y_1|x) + log π_θ(y_2|x)) ]    T2   because the responses come from the policy
       + E[ f · ∇log P(w ≻ l) ]                         T3   because the label comes from the policy

DPO keeps T1. SAIL-DP adds T3 (data's responses, own labels), SAIL-PR adds T2 (own responses, a reward's
labels), SAIL-PP adds both. `sail_loss` below is all of it, for B pairs; `training_step` is how it is used.

    python sail.py --variant pr                                         # the embedded toy world, on a CPU
    python sail.py --variant pr --model M --data D --reward R           # your own, on one GPU if there is one
    torchrun --nproc_per_node 8 sail.py --variant pr …                  # eight GPUs; two nodes:
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 sail.py …

What differs from the paper's text, on purpose:
  1. The label is summed out, not sampled: the same gradient on average, less noise (--label sampled).
  2. T2 has a baseline, a mean of f over other pairs, which changes its noise and not its expectation.
  3. Responses are sampled at temperature 1 from the untruncated softmax, of which T2 is the score.
  4. AdamW and full fine-tuning by default; the authors used RMSprop and LoRA.
"""
import argparse
import math
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from runtime.command_line import (
    InputError, Parser, command_line, format_counts, number, seeded)
from runtime.optimizer import make_optimizer, optimizer_step
from runtime.processes import (
    all_sum, computing_in, default_dtype, fails_together, print0, process_group, rank, sent, sum_gradients,
    with_equal_counts, world_size)
from runtime.run_directory import (
    date_of, fingerprint, fingerprint_files, refuse_inputs_inside, run_directory, save_model)
from runtime.training import steps, training

import torch
import torch.nn.functional as F

from data import collate, encode, end_token_ids, length_table
from evaluate import evaluate_policy
from formats import Pair, format_unread, train_and_held_out
from generate import load_models, load_policy, roll_out, sequence_logps
from reward import (
    Reward, drop_unscorable, label_by_preference, label_by_reward, load_preference, load_reward)
from toy import draw_toy_pairs, toy_settings, write_world

# --- the losses ---------------------------------------------------------------------------------------------
# B: the pairs of a call. *_logps: log π(y|x), summed over the tokens of y.


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             beta=0.1):
    """DPO's loss (arXiv 2305.18290, eq. 7), (B,), of log-probabilities (B,). β times a log-ratio is the
    implicit reward of a response, up to a constant of the prompt."""
    chosen_log_ratios = policy_chosen_logps - reference_chosen_logps
    rejected_log_ratios = policy_rejected_logps - reference_rejected_logps
    return -F.logsigmoid(beta * (chosen_log_ratios - rejected_log_ratios))


def utility(margin, beta, loss_type, target_margin=0.0):
    """f(u), (B,), what a pair of margin u is worth: minus the loss that the name stands for. sigmoid: log
    σ(u), DPO (arXiv 2305.18290). ipo: −(u/β − 1/(2β))², IPO (2310.12036), log-ratios summed over tokens.
    hinge: −max(0, 1 − u), SLiC (2305.10425). simpo: log σ(u − target_margin). orpo: log σ(u)."""
    if loss_type in ("sigmoid", "orpo"):
        return F.logsigmoid(margin)
    if loss_type == "simpo":
        return F.logsigmoid(margin - target_margin)
    if loss_type == "ipo":
        return -(margin / beta - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return -F.relu(1 - margin)
    raise ValueError(f"loss_type {loss_type!r}: want sigmoid, ipo, hinge, simpo or orpo")


def sail_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
              preference=None, on_policy=None, self_labelled=None, *,
              beta=0.1, response_coef=0.3, label_coef=0.2, loss_type="sigmoid", baseline=None,
              label_draws=None, chosen_lengths=None, rejected_lengths=None, target_margin=0.0):
    """SAIL's loss for every variant and utility (arXiv 2406.15567): a pair is where its responses and its
    label come from.

    *_logps        (B,)  the policy's with gradient, the reference's without
    preference     (B,)  P(chosen ≻ rejected) according to the data or the reward; None: 1
    on_policy      (B,)  bool: both responses were sampled from the policy as it is now → T2; None: nowhere
    self_labelled  (B,)  bool: the label is the policy's own, P = σ(u), whatever `preference` says → T3;
                         None: nowhere
    baseline       b of T2, () or (B,); must not depend on the pair's own responses. None: the mean utility of
                   the other on-policy pairs of this call, which must share no response, or f(0) without any
    label_draws    (B,)  uniform in [0, 1): the label is drawn with them, as in the paper; None: summed out
    *_lengths      (B,)  the responses' tokens, for simpo and orpo; target_margin: simpo's m

    With both coefficients 1 the gradient's expectation is ∇J exactly; 0 switches a term off. The defaults are
    the authors': at 1, T2 seeks pairs that are easy to tell apart more than good ones, T3 seeks certainty.
    Returns (losses, metrics): losses (B,), of the value −f and the gradient −(T1 + response_coef·T2 +
    label_coef·T3); those of `sail_metrics`."""
    margin = beta * ((policy_chosen_logps - reference_chosen_logps)   # u (B,), as in DPO
                     - (policy_rejected_logps - reference_rejected_logps))
    if loss_type in ("simpo", "orpo"):                                # of means per token, no reference
        chosen_mean = (policy_chosen_logps / chosen_lengths).clamp(max=-1e-6)      # certainty: infinite odds
        rejected_mean = (policy_rejected_logps / rejected_lengths).clamp(max=-1e-6)
        margin = beta * (chosen_mean - rejected_mean)                 # SimPO (arXiv 2405.14734, eq. 4)
        if loss_type == "orpo":                                       # a difference of log-odds (2403.07691)
            margin = (chosen_mean - torch.log(-torch.expm1(chosen_mean))
                      - (rejected_mean - torch.log(-torch.expm1(rejected_mean))))

    nowhere = torch.zeros_like(margin, dtype=torch.bool)
    on_policy = nowhere if on_policy is None else on_policy.bool()
    self_labelled = nowhere if self_labelled is None else self_labelled.bool()

    p = torch.ones_like(margin) if preference is None else preference.to(margin.dtype)
    p = torch.where(self_labelled, torch.sigmoid(margin), p).detach()  # detached: T3 is its gradient, not T1
    if label_draws is not None:
        p = (label_draws.to(p.dtype) < p).to(p.dtype)

    f_chosen = utility(margin, beta, loss_type, target_margin)        # f₊ (B,)
    f_rejected = utility(-margin, beta, loss_type, target_margin)     # f₋ (B,)
    mean_f = p * f_chosen + (1 - p) * f_rejected                      # F̄; with p held, its gradient is T1

    f = mean_f.detach()                                               # detached: T2 moves the sampling, not f
    if baseline is None:
        others = on_policy.sum() - 1
        f_zero = utility(torch.zeros_like(f), beta, loss_type, target_margin)
        baseline = torch.where(others > 0, ((f * on_policy).sum() - f) / others.clamp(min=1), f_zero)
    T2 = torch.where(on_policy, (f - baseline) * (policy_chosen_logps + policy_rejected_logps), 0)

    T3 = (p * f_chosen.detach() * F.logsigmoid(margin)                # detached: T3 moves the label, not f
          + (1 - p) * f_rejected.detach() * F.logsigmoid(-margin))
    T3 = torch.where(self_labelled, T3, 0)

    corrections = response_coef * T2 + label_coef * T3
    losses = -(mean_f + (corrections - corrections.detach()))         # corrections: a gradient, but no value
    label_weight = 1 + label_coef * torch.minimum(f_chosen, f_rejected)
    return losses, sail_metrics(losses, policy_chosen_logps, policy_rejected_logps, margin, p, on_policy,
                                self_labelled, label_weight)


@torch.no_grad()
def sail_metrics(losses, chosen_logps, rejected_logps, margin, p, on_policy, self_labelled, label_weight):
    """Means over the pairs, detached. margin and accuracy follow the label, whose probability is p; a margin
    of 0 is half right. label_weight: that of ∇log P(label) in T1 and T3 together; label_reversed is the share
    of pairs, self-labelled, where it is negative: there T3 pushes against a label."""
    q = 1 - p                                                         # P(rejected ≻ chosen)
    chosen_ahead = torch.where(margin == 0, 0.5, (margin > 0).to(p.dtype))
    label_reversed = self_labelled & (label_weight < 0)
    columns = {
        "loss": losses,
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "margin": p * margin - q * margin,
        "accuracy": p * chosen_ahead + q * (1 - chosen_ahead),
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
    """What happens to the share `mix` of the pairs; the others are DPO on the data."""
    responses: str                # who writes them: "data", "policy", or "data, policy", which is SPIN's
    label: str                    # who prefers one of them: "data", "policy" or "reward"
    mix: float = 0.0              # these three are defaults, from the authors' examples
    response_coef: float = 0.0    # of T2
    label_coef: float = 0.0       # of T3


VARIANTS = {
    "sft": Variant(responses="data", label="data"),                    # likelihood of the chosen responses
    "dpo": Variant(responses="data", label="data"),
    "dp": Variant(responses="data", label="policy", mix=0.4, label_coef=0.2),
    "pp": Variant(responses="policy", label="policy", mix=0.3, response_coef=0.2, label_coef=0.2),
    "pr": Variant(responses="policy", label="reward", mix=0.3, response_coef=0.3),
    "online-dpo": Variant(responses="policy", label="reward", mix=0.3),
    "relabelled-dpo": Variant(responses="data", label="reward", mix=1.0),
    "spin": Variant(responses="data, policy", label="data", mix=1.0)}
SAMPLED = {"data": (), "policy": ("chosen", "rejected"), "data, policy": ("rejected",)}


# --- one training step --------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run holds from its first to its last step."""
    policy: torch.nn.Module
    reference: object             # a model that is held fixed; None for sft
    tokenizer: object
    reward: Reward | None
    examples: list[Pair]          # to train on, encoded
    held_out: list[Pair]          # to evaluate on
    device: torch.device
    preference: object = None             # a user's function that labels in the reward's place
    optimizer: object = None
    scheduler: object = None
    progress: dict = field(default_factory=dict)      # what a checkpoint keeps: step, skipped, baseline, …


def training_step(run, offline, own, args):
    """One optimizer step on pairs of the data, `offline`, and on those that take the variant's way, `own`:
    (sums of their metrics, whether it was finite, more figures)."""
    variant, figures = VARIANTS[args.variant], {}
    # 1. roll out: the policy's responses in the place of the data's
    with timed(figures, "seconds_rollout"):
        own = roll_out(run.policy, run.tokenizer, own, SAMPLED[variant.responses], args)
    # 2. label them; where the policy labels, sail_loss does it
    with timed(figures, "seconds_reward"):
        if variant.label == "reward" and run.preference:
            label_by_preference(own, run.preference)
        elif variant.label == "reward":
            label_by_reward(own, run.reward, args.preference)
    # 3. back-propagate the mean loss over all pairs
    totals = accumulate_gradients(run, offline + own, args)
    # 4. step, unless the loss or the gradient is not finite
    figures["grad_norm"], figures["learning_rate"], finite = optimizer_step(
        run.policy, run.optimizer, run.scheduler, args.max_grad_norm, totals["loss"])
    # 5. move the baseline of T2 on, to a running mean of f
    if args.baseline == "running" and totals["on_policy"] and math.isfinite(totals["on_policy_loss"]):
        mean_utility = -totals["on_policy_loss"] / totals["on_policy"]
        run.progress["baseline"] += 0.1 * (mean_utility - run.progress["baseline"])
    return totals, finite, figures


def accumulate_gradients(run, pairs, args):
    """Back-propagate the mean loss, over the pairs of all processes (of SFT: over their tokens), by
    micro-batches; returns the sums of what was counted and measured."""
    run.policy.train(args.gradient_checkpointing)                      # works in train mode only; no dropout
    totals, sums = all_sum(count(pairs, args), run.device), {}
    over = totals["chosen_tokens" if args.variant == "sft" else "pairs"]
    micros = micro_batches(pairs, run.policy, args.micro_batch_size)
    for micro, weight in with_equal_counts(micros, run.policy):
        if args.variant == "sft":
            losses, metrics = sft_losses(run.policy, micro, args)
        else:
            losses, metrics = preference_losses(run.policy, run.reference, micro, args,
                                                run.progress["baseline"])
        (weight * losses.sum() / over).backward()
        counted = len(micro)
        if weight == 0:                                                # it is there for its collectives only
            counted = 0
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0) + value.double() * counted
    sum_gradients(run.policy)
    values = torch.stack(list(sums.values())).tolist()                 # all at once: a GPU waits for it
    totals.update(all_sum(Counter(dict(zip(sums, values))), run.device))
    return totals


def preference_losses(policy, reference, pairs, args, baseline=None):
    """`sail_loss` of the pairs, plus the regularisers that are switched on: (losses (B,), metrics)."""
    # 1. log-probabilities, (2, B): row 0 the chosen responses, row 1 the rejected ones
    if args.revkl_coef:
        ours, theirs, revkl = pair_logps(policy, pairs, args.dtype, reference)
    else:
        with torch.no_grad():
            theirs = pair_logps(reference, pairs, args.dtype)
        ours = pair_logps(policy, pairs, args.dtype)
        revkl = torch.zeros_like(ours)

    # 2. what the pairs say of themselves, as tensors (B,)
    def tensor(values, dtype=None):
        return sent(torch.tensor(values, dtype=dtype), ours.device)

    on_policy = tensor([pair.on_policy for pair in pairs])
    self_labelled = tensor([pair.self_labelled for pair in pairs])
    preference = tensor([pair.preference for pair in pairs], ours.dtype)
    preference = (1 - args.label_smoothing) * preference + args.label_smoothing * (1 - preference)
    label_draws = None
    if args.label == "sampled":
        label_draws = tensor([pair.label_draw for pair in pairs])
    chosen_lengths = tensor([len(pair.chosen_ids) for pair in pairs])
    rejected_lengths = tensor([len(pair.rejected_ids) for pair in pairs])

    # 3. the loss
    losses, metrics = sail_loss(
        ours[0], ours[1], theirs[0], theirs[1], preference, on_policy, self_labelled,
        beta=args.beta, response_coef=args.response_coef, label_coef=args.label_coef,
        loss_type=args.loss_type, target_margin=args.target_margin, baseline=baseline,
        label_draws=label_draws, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)

    # 4. regularisers: −log π per token of the data's chosen responses; KL(π_ref ‖ π) per token of both
    offline = ~(on_policy | self_labelled)                             # both from the data, as is the label
    nll = torch.where(offline, -ours[0] / chosen_lengths, 0.0)
    revkl = revkl.sum(0) / (chosen_lengths + rejected_lengths)
    with torch.no_grad():
        kl = (ours - theirs).mean(0)                                   # KL(π ‖ π_ref), if π wrote both
        metrics["kl"] = (kl * on_policy).mean()
        metrics["on_policy_loss"] = (losses * on_policy).mean()
        metrics["nll"] = nll.mean()
        metrics["offline"] = offline.float().mean()
        metrics["revkl"] = revkl.mean()
    return losses + args.nll_coef * nll + args.revkl_coef * revkl, metrics


def pair_logps(model, pairs, dtype="float32", reference=None):
    """`sequence_logps` of the chosen and the rejected responses, in one forward: (2, B), or with `reference`
    (3, 2, B), log π, log π_ref and RevKL."""
    prompts = [pair.prompt_ids for pair in pairs]
    chosen = [pair.chosen_ids for pair in pairs]
    rejected = [pair.rejected_ids for pair in pairs]
    batch = collate(prompts + prompts, chosen + rejected)                              # (2B, T) each
    with computing_in(dtype, model):
        logps = sequence_logps(model, *batch, reference)                               # (2B,) or (3, 2B)
    return logps.unflatten(-1, (2, len(pairs)))


def sft_losses(policy, pairs, args):
    """The negative log-likelihood of the chosen responses, summed over tokens: (losses (B,), metrics)."""
    prompts = [pair.prompt_ids for pair in pairs]
    responses = [pair.chosen_ids for pair in pairs]
    batch = collate(prompts, responses)
    with computing_in(args.dtype, policy):
        logps = sequence_logps(policy, *batch)
    mean = logps.detach().mean()
    return -logps, {"loss": -mean, "chosen_logps": mean}


LOGITS = 3 * 2**24                        # of a forward on a CPU: 192 MB, several times


@lru_cache
def logits_at_once():
    """How many logits, positions × vocabulary, a forward may make. On a GPU, where few rows are slow: as many
    as fit, with their log-softmax and its gradients (12 bytes each), into a quarter of what is free before
    the first of them."""
    if not torch.cuda.is_initialized():
        return LOGITS
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(LOGITS, free // 4 // 12)


def micro_batches(pairs, model, size=None):
    """The pairs, in order, in lists of at most `size` pairs and about `logits_at_once()` logits; a pair that
    exceeds these by itself stands alone."""
    vocabulary = model.config.get_text_config().vocab_size
    micros, logits, most = [[]], 0, logits_at_once()
    for pair in pairs:
        more = (len(pair.chosen_ids) + len(pair.rejected_ids)) * vocabulary
        full = len(micros[-1]) == size or logits + more > most
        if micros[-1] and full:
            micros.append([])
            logits = 0
        micros[-1].append(pair)
        logits += more
    return micros


@contextmanager
def timed(figures, name):
    """Put the seconds that the block takes into figures[name]."""
    started = time.perf_counter()
    yield
    figures[name] = time.perf_counter() - started


# --- the run: which pairs, how many steps, what is logged ---------------------------------------------------


def plan(n_pairs, args):
    """(pairs in all, steps): every offline pair is seen `epochs` times, the variant's own come on top."""
    if args.steps:
        return args.steps * args.batch_size, args.steps
    mix, offline = Fraction(str(args.mix)), int(args.epochs * n_pairs)
    total = offline
    if mix != 1:
        total = int(offline / (1 - mix))
    return total, math.ceil(total / args.batch_size)


@lru_cache(maxsize=4)
def order_of(n_pairs, seed, own, epoch):
    """The order in which an epoch visits the pairs; the variant's own are shuffled apart."""
    generator = torch.Generator()
    generator.manual_seed(seeded("order", seed, int(own), epoch))
    order = torch.randperm(n_pairs, generator=generator)
    return order.tolist()


def draw_pairs(examples, step, args, total, steps):
    """(offline, own): the pairs of one step, of all processes, of which `own` take the variant's way. They
    are evenly spread over the steps."""
    mix, variant = Fraction(str(args.mix)), VARIANTS[args.variant]
    generator = torch.Generator().manual_seed(seeded("label draws", args.seed, step))
    offline, own = [], []
    for k in range(total * (step - 1) // steps, total * step // steps):
        before = int(k * mix)                                           # own pairs up to the k-th
        is_own = int((k + 1) * mix) > before
        nth = before if is_own else k - before
        order = order_of(len(examples), args.seed, is_own, nth // len(examples))
        pair = replace(examples[order[nth % len(examples)]],
                       label_draw=torch.rand((), generator=generator).item())
        if is_own:
            pair.on_policy = variant.responses == "policy"
            pair.self_labelled = variant.label == "policy"
            own.append(pair)
        else:
            offline.append(pair)
    return offline, own


def share_of_process(offline, own):
    """This process's share of a step's pairs, as many, or one more, as of any other."""
    n = world_size()
    first = (rank() - len(offline)) % n
    return offline[rank()::n], own[first::n]


def count(pairs, args):
    """What a step works on, as sums: pairs, tokens, and the samples' number, length, reward, …"""
    totals = Counter(pairs=len(pairs), tokens=0, chosen_tokens=0, samples=0, sampled_tokens=0, unfinished=0,
                     ties=0, reward=0.0)
    for pair in pairs:
        totals["tokens"] += len(pair.prompt_ids) + len(pair.chosen_ids)
        if args.variant != "sft":
            totals["tokens"] += len(pair.prompt_ids) + len(pair.rejected_ids)
        totals["chosen_tokens"] += len(pair.chosen_ids)
        totals["samples"] += pair.samples
        totals["sampled_tokens"] += pair.sampled_tokens
        totals["unfinished"] += pair.unfinished
        totals["reward"] += sum(pair.rewards)
        if pair.rewards and pair.rewards[0] == pair.rewards[1]:
            totals["ties"] += 1
    return totals


def record_of(step, totals, args, **more):
    """The step's line in metrics.jsonl: means over all pairs; None for what this step had none of."""
    def mean(name, over="pairs"):
        if name not in totals or not totals[over]:
            return None
        return totals[name] / totals[over]

    record = {"step": step, "loss": mean("loss")}
    if args.variant == "sft":
        record["loss"] = mean("loss", "chosen_tokens")
    for name in ("margin", "accuracy", "chosen_logps", "rejected_logps", "on_policy", "self_labelled"):
        record[name] = mean(name)
    record["kl"] = mean("kl", "on_policy")
    record["reward"] = None
    if VARIANTS[args.variant].label == "reward":
        record["reward"] = mean("reward", "samples")
    record["response_length"] = mean("sampled_tokens", "samples")
    record["unfinished"] = mean("unfinished", "samples")
    record["label_reversed"] = mean("label_reversed", "self_labelled")
    record["nll"] = mean("nll", "offline")
    record["revkl"] = mean("revkl") if args.revkl_coef else None
    record["ties"] = totals["ties"]
    record["tokens"] = round(totals["tokens"])
    return {**record, **more}


@fails_together
def load_data(args, device):
    """(training pairs, held-out pairs, reward, Counter of what was dropped and altered among the training
    pairs, that of the held-out pairs)."""
    train, held_out, report, held_out_report = train_and_held_out(args.data, args.eval_data, args.limit,
                                                                  args.prefer)
    for side in args.needs:
        if getattr(train[0], side) is None:
            raise InputError(f"{args.data}: {report['format']}, without the {' and '.join(args.needs)} "
                             f"responses that --variant {args.variant} learns from (pp, pr and online-dpo do "
                             "without at --mix 1)")
    if report["unread"]:
        print0(f"{args.data}: read by nothing: {format_unread(report['unread'])}")
    reward = None
    if args.reward:
        reward = load_reward(args.reward, device, args.trust_remote_code, args.date)
    train, counts = drop_unscorable(train, reward)
    held_out, held_out_counts = drop_unscorable(held_out, reward)
    for each, file in ((counts, report), (held_out_counts, held_out_report)):
        if file:                                                       # held-out pairs may be of the same one
            each["dropped"] += sum(file["dropped"].values())
            each.update(file["dropped"] + file["altered"])
    return train, held_out, reward, counts, held_out_counts


def load_run(args, device):
    """(Run without an optimizer, counts, counts of the held-out pairs, lengths): the counts are of what was
    dropped, cut and altered on the way from the file to token ids, the lengths as in `encode`."""
    train, held_out, reward, counts, held_out_counts = load_data(args, device)
    policy, reference, tokenizer = load_models(args, device)
    limits = (end_token_ids(tokenizer, policy), args.max_prompt_length, args.max_response_length,
              policy.get_input_embeddings().weight.shape[0])
    examples, more, lengths = encode(train, tokenizer, *limits)
    counts = more + counts
    if held_out:
        held_out, more, _ = encode(held_out, tokenizer, *limits, args.eval_limit)
        held_out_counts.update(more)
    run = Run(policy, reference, tokenizer, reward, examples, held_out, device)
    if ".py:" in args.preference:
        run.preference = load_preference(args.preference)
    return run, +counts, +held_out_counts, lengths


def print_plan(run, counts, held_out_counts, lengths, total, steps, args):
    """What is trained, on what, and how."""
    trained = size = 0
    for parameter in run.policy.parameters():
        size += parameter.numel()
        if parameter.requires_grad:
            trained += parameter.numel()
    print0(f"{args.model} on {run.device} in {args.dtype}: {trained:,} of {size:,} parameters are trained")
    print0(f"{args.data}: {len(run.examples)} pairs to train on; {format_counts(counts)}")
    limits = dict(prompt=args.max_prompt_length, chosen=args.max_response_length,
                  rejected=args.max_response_length)
    print0(length_table(lengths, "tokens", limits))
    print0(f"{args.eval_data or 'held out of these'}: {len(run.held_out)} pairs to evaluate on; "
           f"{format_counts(held_out_counts)}")
    mix = Fraction(str(args.mix))
    own = int(total * mix)
    print0(f"{args.variant}: {total - own} offline pairs + {own} on the variant's way = {total} pairs, "
           f"{steps} steps of {math.ceil(total / steps)} -> {args.out}")


def train(args, device):
    """The whole run: load, loop, save. InputError: bad input, a failing reward, ten steps not finite."""
    out = Path(args.out)
    refuse_inputs_inside(out, {"--model": args.model, "--reference": args.reference, "--data": args.data,
                               "--eval-data": args.eval_data, "--reward": args.reward,
                               "--preference": args.preference})
    args.date = args.date or date_of(out, args.resume)
    run, counts, held_out_counts, lengths = load_run(args, device)
    total, count = plan(len(run.examples), args)
    a_step = total // max(count, 1)
    if a_step < world_size():
        raise InputError(f"--batch-size: {a_step} pairs a step are too few for {world_size()} processes; "
                         "raise it, or --epochs")
    ids = []
    for pair in run.examples + run.held_out:
        ids.append([pair.prompt_ids, pair.chosen_ids, pair.rejected_ids])
    args.data_sha256 = fingerprint(ids)
    args.model_sha256 = fingerprint_files(args.model)
    args.reference_sha256 = fingerprint_files(args.reference)
    args.reward_sha256 = fingerprint_files(args.reward)
    args.preference_sha256 = None
    if run.preference:
        args.preference_sha256 = fingerprint_files(args.preference)
    args.data_counts = dict(counts)
    run.optimizer, run.scheduler = make_optimizer(run.policy.parameters(), count, args.learning_rate,
                                                  args.optimizer, args.schedule, args.warmup_steps)
    start = {"baseline": 0.0}
    if args.baseline == "running":                                     # from f(0) on
        f_zero = utility(torch.zeros(()), args.beta, args.loss_type, args.target_margin)
        start["baseline"] = f_zero.item()

    def load_base():
        model, _ = load_policy(args.model, "cpu", args.trust_remote_code)
        return model

    with training(out, args.variant, args, start, run.policy, run.optimizer, run.scheduler) as loop:
        run.progress = loop.progress
        print_plan(run, counts, held_out_counts, lengths, total, count, args)
        for step in steps(loop, count, lambda: evaluate_run(run, args)):
            offline, own = share_of_process(*draw_pairs(run.examples, step.number, args, total, count))
            totals, step.finite, figures = training_step(run, offline, own, args)
            step.record = record_of(step.number, totals, args, **figures)
        save_model(run.policy, run.tokenizer, out, load_base)
    command = f"python evaluate.py {out}"
    if ".py:" in (args.reward or ""):
        command += f" --reward {args.reward}"
    print0(f"saved {out}/model; `{command}` samples from it and sets it beside other runs")


def evaluate_run(run, args):
    """(figures, how many pairs they are of, samples to keep) of the policy as it is; None without any
    held-out pair."""
    if not run.held_out:
        return None
    run.policy.eval()
    print0(f"evaluating: a response of up to {args.max_response_length} tokens to each of "
           f"{len(run.held_out)} held-out prompts …")
    figures, samples = evaluate_policy(run.policy, run.reference, run.tokenizer, run.held_out, run.reward,
                                       args)
    return figures, len(run.held_out), samples[:8]


# --- the command line ---------------------------------------------------------------------------------------

DEFAULTS = dict(epochs=1.0, batch_size=32, schedule="constant", eval_every=100, eval_limit=128, beta=0.1,
                max_prompt_length=512, max_response_length=512, revkl_coef=0.0)


def parse_args(argv=None):
    """The command line, checked and completed with the defaults that depend on data and variant."""
    parser = Parser("Train a language model by SFT, DPO or SAIL's DP, PP and PR. Defaults in brackets.")
    positive, weight, whole = number(float, 1e-12), number(float, 0), number(int, 1)
    add = parser.add_argument_group("method (mix and weights: the authors' examples)").add_argument
    add("--variant", choices=[*VARIANTS], default="pr", help="who responds, and who labels (pr)")
    add("--mix", type=number(float, 0, 1), help="share of own pairs (dp 0.4, pp pr online-dpo 0.3)")
    add("--response-coef", type=weight, help="weight of T2 (pp 0.2, pr 0.3)")
    add("--label-coef", type=weight, help="weight of T3 (dp pp 0.2)")
    add("--label", choices=["expected", "sampled"], default="expected", help="average over it, or draw")
    add("--baseline", choices=["running", "none"], default="running", help="of T2: mean of past f, or 0")
    add("--preference", type=preference_source, default="soft", metavar="{soft,hard,FILE.py:FUNCTION}",
        help="P(chosen ≻ rejected): σ(reward difference), 1, or your function's (soft)")
    add("--beta", type=positive, help="weight of the KL penalty (0.1; toy 0.5)")
    add("--loss-type", choices="sigmoid ipo hinge simpo orpo".split(), default="sigmoid", help="f (sigmoid)")
    add("--target-margin", type=weight, default=0.0, help="of simpo (0)")
    add("--label-smoothing", type=number(float, 0, 0.5), default=0.0, help="ε of conservative DPO (0)")
    add("--nll-coef", type=weight, default=0.0, help="weight of −log π per chosen token (0)")
    add("--revkl-coef", type=weight, help="weight of KL(π_ref‖π) per token (0; toy pp 0.3)")
    add = parser.add_argument_group("models and data").add_argument
    add("--model", help="a directory or hub name (toy: made on first use)")
    add("--reference", help="what KL is measured to (--model as it starts)")
    add("--lora", type=whole, metavar="RANK", help="train a LoRA adapter of this rank (needs peft)")
    add("--reward", help="FILE.py:FUNCTION, or a one-logit classifier")
    parser.shared("--data", "--eval-data", "--prefer", "--limit", "--max-prompt-length",
                  "--max-response-length", "--date", "--seed", "--trust-remote-code", add=add)
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive, help="times each pair of the data is seen (1; toy sft 4)")
    add("--steps", type=whole, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=whole, help="pairs per step, over all processes (32; toy 96)")
    add("--learning-rate", type=positive, help="(1e-6, lora 1e-5, sft 2e-5; toy 4e-4, sft 2e-3)")
    add("--warmup-steps", type=number(int, 0), help="of linear warm-up (a tenth of all steps)")
    add("--schedule", choices=["constant", "cosine"], help="after warm-up (constant; toy cosine)")
    add("--optimizer", choices=["adamw", "rmsprop"], default="adamw", help="rmsprop is the authors' (adamw)")
    add("--max-grad-norm", type=positive, default=1.0, help="clip the gradient to this norm (1)")
    add("--dtype", choices=["float32", "bfloat16"], help="to compute in (bfloat16 on a GPU that has it)")
    parser.shared("--sample-batch-size", add=add)
    add("--eval-every", type=number(int, 0), help="steps between evaluations (100; toy 25), 0: at the end")
    add("--eval-limit", type=whole, help="held-out pairs to evaluate on (128; toy 256)")
    add = parser.add_argument_group("memory, speed, output: may change when a run is continued").add_argument
    may_change = [
        add("--micro-batch-size", type=whole, metavar="N", help="at most N pairs per forward"),
        add("--gradient-checkpointing", action="store_true", help="compute activations twice, keep fewer"),
        add("--shard", action="store_true", help="split model and optimizer over the processes (FSDP2)"),
        add("--out", help="directory for logs and model (runs/DATA/VARIANT)"),
        add("--save-every", type=whole, metavar="N", help="a checkpoint every N steps; two stay"),
        add("--resume", action="store_true", help="continue from OUT's newest checkpoint, if any"),
        add("--overwrite", action="store_true", help="delete an earlier run in OUT before starting"),
        add("--tensorboard", action="store_true", help="also write OUT/tensorboard (needs tensorboard)")]
    parser.set_defaults(data="toy", may_change=[flag.dest for flag in may_change] + ["may_change"])
    return completed(parser.parse_args(argv), parser)


def completed(args, parser):
    """The arguments, with the defaults that depend on data and variant; what cannot work is an error."""
    variant = VARIANTS[args.variant]
    args.toy = args.data == "toy"
    defaults = {**DEFAULTS, "mix": variant.mix, "response_coef": variant.response_coef,
                "label_coef": variant.label_coef, "out": f"{run_directory(args.data)}/{args.variant}",
                "learning_rate": 1e-6, "dtype": default_dtype()}
    if args.lora:
        defaults["learning_rate"] = 1e-5
    if args.variant == "sft":
        defaults["learning_rate"] = 2e-5
    if args.toy:
        defaults.update(toy_settings(args.variant, args.model, args.seed))
        args.data = None
    for name, value in vars(args).items():
        if value is None:
            setattr(args, name, defaults.get(name))
    if args.model is None:
        parser.error("argument --model: want a directory or hub name")
    if args.variant != "sft":
        args.reference = args.reference or args.model
    if variant.mix == 0:                            # sft and dpo have no pairs of their own
        args.mix = 0.0
    args.needs = needed_sides(args)
    refuse_flags(args, parser)
    return args


def preference_source(text):
    """An argparse type: what gives the preference of a pair that the reward labels."""
    if text not in ("soft", "hard") and ".py:" not in text:
        raise argparse.ArgumentTypeError(f"{text} is neither soft nor hard nor FILE.py:FUNCTION")
    return text


def needed_sides(args):
    """Which responses the data must have."""
    if args.variant == "sft":
        return ["chosen"]
    if args.mix < 1:
        return ["chosen", "rejected"]
    sampled = SAMPLED[VARIANTS[args.variant].responses]
    return [side for side in ("chosen", "rejected") if side not in sampled]


def refuse_flags(args, parser):
    """An error for flags that do not go together."""
    if args.target_margin and args.loss_type != "simpo":
        parser.error("argument --target-margin: only simpo has one")
    if args.overwrite and args.resume:
        parser.error("argument --overwrite: deletes what --resume continues; give one of them")
    if VARIANTS[args.variant].label == "reward" and args.mix > 0:
        if not args.reward and ".py:" not in args.preference:
            parser.error(f"argument --reward: {args.variant} needs one to label its samples; "
                         "FILE.py:FUNCTION or a classifier")


@fails_together
def make_toy(args):
    """What `--data toy` stands for, as files, unless they are there."""
    if rank() != 0:
        return
    write_world(args.seed)
    if Path(args.data).name == "toy-pairs.jsonl" and not Path(args.data).is_file():
        print0(f"toy: drawing pairs from {args.model} into {args.data}, once")
        draw_toy_pairs(args.model, args.data)


def main(argv=None):
    """`python sail.py …`, alone or under torchrun."""
    args = parse_args(argv)
    if args.toy:
        torch.set_num_threads(1)                   # more gain nothing on it, and round otherwise
    with process_group(args.shard) as device:
        if args.toy and args.model == toy_settings("dpo")["model"] and not Path(args.model).is_dir():
            print0(f"toy: no SFT model in {args.model} yet; training it, once")
            sft = parse_args(["--variant", "sft", "--resume"])
            make_toy(sft)
            train(sft, device)
        if args.toy:
            make_toy(args)
        train(args, device)


if __name__ == "__main__":
    command_line(main)
