"""SAIL: self-improving efficient online alignment of language models (arXiv 2406.15567), from scratch.

Online alignment is bilevel: a reward r is fitted on pairs that the policy produced, and the policy is the
best response to r under a KL penalty. That best response is known, r = β log π/π_ref + const, so r can be
put out of the problem, and the policy is left in three places of one objective: inside, in the responses,
and in the labels.

    J(θ) = E_x E_{(y1,y2) ~ π_θ} E_{(w,l) ~ label} [ f(u) ],     f = log σ,
    u    = β [ (log π_θ(y_w) − log π_ref(y_w)) − (log π_θ(y_l) − log π_ref(y_l)) ]

    ∇J = E[ ∇f ]                                        T1   the DPO term
       + E[ f · ∇(log π_θ(y_1|x) + log π_θ(y_2|x)) ]    T2   because the responses come from the policy
       + E[ f · ∇ log σ(u_12) ]                         T3   because the label comes from the policy

DPO keeps T1. SAIL-DP adds T3 (data's responses, own labels), SAIL-PR adds T2 (own responses, a reward's
labels), SAIL-PP adds both. `sail_loss` below is all of it.

    python sail.py --variant pr                                         # the embedded toy world, on a CPU
    python sail.py --variant pr --model M --data D --reward R           # your own, on one GPU if there is one
    torchrun --nproc_per_node 8 sail.py --variant pr …                  # eight GPUs; --shard splits the model
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d \
        --rdzv_endpoint HOST:29500 sail.py …                            # two nodes

What differs from the paper's text, on purpose:
  1. The label is summed out instead of sampled: the same gradient on average with
     less noise (--label sampled).
  2. T2 has a baseline, a mean of f over other pairs, which changes its noise and not its expectation.
  3. Responses are sampled at temperature 1 from the untruncated softmax: the
     distribution that T2 is the score of.
  4. AdamW and full fine-tuning by default; the authors used RMSprop and LoRA.

Shapes: B pairs, T tokens of prompt and response with padding, V vocabulary, N scored tokens in a batch.
"""
import copy
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import InputError, Parser, collate, command_line, counted, encode, number, pack, train_and_held_out
from generate import (AdapterReference, adapter_config, check_lengths, end_token_ids, first_line, in_step,
                      load_policy, require_peft, roll_out, shard, toy_checkpoint, toy_model, train_adapter)
from reward import label_by_reward, load_reward

# --- log-probabilities and losses ---------------------------------------------------------------------------


CHUNK = 2**27                             # logits, positions × vocabulary, that exist at a time
KNOWN = WeakSet()                         # models whose logits `logits_of` was seen to give


def response_states(model, input_ids, attention_mask, response_mask):
    """The last hidden states at the positions whose next token is the response's, (N, H): all of the model
    but its output layer. A model that allows it (generate.allow_packing) gets the rows packed: no padding,
    and a prompt that rows share once. Raises InputError for a model that `logits_of` does not know."""
    inner, kept = getattr(model, "module", model), []                  # a wrapper holds its model there
    if inner.config.get_text_config()._attn_implementation == "packed":
        inputs, places = pack(input_ids, attention_mask, response_mask)
    else:
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)    # (B, T): padding does not move a token
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        places = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
    places = places[:, :-1][response_mask[:, 1:].bool()]               # (N,): place t predicts token t+1

    def keep(_, hidden):                                               # all rows and tokens: (…, …, H)
        kept.append(hidden[0].flatten(0, 1).index_select(0, places))
        return kept[0][:0 if inner in KNOWN else 1]                    # one row, to compare below, or none

    hook = inner.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        row = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    with torch.no_grad():                                              # bfloat16 rounds the two differently
        ours = logits_of(inner, kept[0][:len(row)])
        same = torch.allclose(row.float(), ours.float(), rtol=0.02, atol=0.02, equal_nan=True)
    if not same:
        raise InputError(f"{type(inner).__name__} changes its logits after the output layer in a way that "
                         "sail.py's logits_of does not know; add it there")
    if len(row):
        KNOWN.add(inner)
    return kept[0]


def logits_of(model, hidden):
    """The model's logits for its last hidden states: (N, H) -> (N, V), float32 at least."""
    logits, config = model.get_output_embeddings()(hidden), model.config.get_text_config()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if hasattr(config, "logit_scale"):                                 # Cohere
        logits = logits * config.logit_scale
    if hasattr(config, "logits_scaling"):                              # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "final_logit_softcapping", None):               # Gemma
        logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    return logits


def sequence_logps(model, input_ids, attention_mask, response_mask, reference=None):
    """log π(y|x): the log-probabilities of a row's response tokens, summed; (B,), float32 at least.

    input_ids, attention_mask, response_mask: (B, T), padded on either side; response_mask is 1 on the
    response's tokens, its end token included. Only the positions that predict these are projected onto the
    vocabulary; where that makes more than CHUNK logits, in chunks and once more in backward, so that
    no more than a chunk of them exists at a time.

    With `reference`, a model that is held fixed, returns (3, B) from the same projections: log π, log π_ref
    and RevKL, Σ_tokens KL(π_ref(·|context) ‖ π(·|context)), exact over the vocabulary (arXiv 2606.31524).
    """
    scored = response_mask[:, 1:].bool()                               # (B, T−1): place t predicts token t+1
    tokens, rows = input_ids[:, 1:][scored], scored.nonzero()[:, 0]    # (N,)
    inner = getattr(model, "module", model)
    states = [response_states(model, input_ids, attention_mask, response_mask)]                     # (N, H)
    if reference is not None:
        with torch.no_grad():
            states.append(response_states(reference, input_ids, attention_mask, response_mask))

    def of_chunk(tokens, hidden, reference_hidden=None):               # (n,), (n, H) × 2 -> (n, 1 or 3)
        ours = logits_of(inner, hidden).log_softmax(-1)                # (n, V)
        if reference is None:
            return ours.gather(-1, tokens[:, None])
        with torch.no_grad():
            theirs = logits_of(getattr(reference, "module", reference), reference_hidden).log_softmax(-1)
        revkl = (theirs.exp() * (theirs - ours)).sum(-1, keepdim=True)
        return torch.cat([ours.gather(-1, tokens[:, None]), theirs.gather(-1, tokens[:, None]), revkl], -1)

    size = max(1, CHUNK // inner.get_output_embeddings().weight.shape[0])
    if len(tokens) <= size:
        terms = of_chunk(tokens, *states)
    else:
        terms = torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
                           for chunk in zip(*(each.split(size) for each in (tokens, *states)))])
    sums = terms.new_zeros(len(input_ids), terms.shape[1]).index_add(0, rows, terms).T     # (1 or 3, B)
    return sums[0] if reference is None else sums


def implicit_reward(policy_logps, reference_logps, lengths, beta, loss_type):
    """r(x, y), whose difference between chosen and rejected response is the margin u; (B,) -> (B,).

    simpo: β·log π / |y| (arXiv 2405.14734). orpo: the log-odds of the mean log-probability per token
    (2403.07691). These two need `lengths`, in tokens, and no reference. All others: DPO's
    β·(log π − log π_ref) (2305.18290, eq. 5).
    """
    if loss_type == "simpo":
        return beta * policy_logps / lengths
    if loss_type == "orpo":
        mean = (policy_logps / lengths).clamp(max=-1e-6)               # certainty has infinite odds
        return mean - torch.log(-torch.expm1(mean))
    return beta * (policy_logps - reference_logps)


def utility(margin, beta, loss_type, target_margin=0.0):
    """f(u), what a pair of margin u is worth, (B,) -> (B,): minus the loss that the name stands for.

    sigmoid: log σ(u), DPO (arXiv 2305.18290). ipo: −(u/β − 1/(2β))², IPO (2310.12036), log-ratios summed over
    tokens. hinge: −max(0, 1 − u), SLiC (2305.10425). simpo: log σ(u − target_margin). orpo: log σ(u).
    """
    if loss_type in ("sigmoid", "orpo"):
        return F.logsigmoid(margin)
    if loss_type == "simpo":
        return F.logsigmoid(margin - target_margin)
    if loss_type == "ipo":
        return -(margin / beta - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return -F.relu(1 - margin)
    raise ValueError(f"loss_type {loss_type!r}: want sigmoid, ipo, hinge, simpo or orpo")


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *,
             beta=0.1, loss_type="sigmoid"):
    """DPO's loss (arXiv 2305.18290, eq. 7) per pair, (B,). All arguments (B,): log π(y|x)
    summed over y's tokens."""
    margin = beta * ((policy_chosen_logps - reference_chosen_logps)
                     - (policy_rejected_logps - reference_rejected_logps))
    return -utility(margin, beta, loss_type)


def sail_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
              preference=None, on_policy=None, self_labelled=None, *,
              beta=0.1, response_coef=1.0, label_coef=1.0, loss_type="sigmoid", baseline=None,
              label_draws=None, chosen_lengths=None, rejected_lengths=None, target_margin=0.0):
    """SAIL's loss for every variant and utility (arXiv 2406.15567): a pair is where its responses and its
    label come from.

    *_logps        (B,)  log π(y|x) summed over y's tokens; the policy's with gradient, the others without
    preference     (B,)  P(chosen ≻ rejected) according to the data or the reward; None: 1
    on_policy      (B,)  bool: both responses were sampled from the policy as it is now → T2; or (B, 2): the
                         chosen, the rejected one was; None: nowhere
    self_labelled  (B,)  bool: the label is the policy's own, P = σ(u), whatever `preference` says → T3;
                         None: nowhere
    baseline       b of T2, () or (B,); must not depend on the pair's own responses. None: the mean utility of
                   the other on-policy pairs of this call, which must share no response, or f(0) without any
    label_draws    (B,)  uniform in [0, 1): the label is drawn with them, as in the paper; None: summed out
    *_lengths      (B,)  the responses' tokens, for simpo and orpo; target_margin: simpo's m

    With both coefficients 1 the gradient's expectation is ∇J exactly; 0 switches a term off. Returns (losses,
    metrics): losses (B,), whose value is minus the pair's utility and whose gradient is −(T1 +
    response_coef·T2 + label_coef·T3); metrics, detached means over the pairs. margin and accuracy are in
    the label's sense; label_reversed: the share of pairs, self-labelled, where T3 has turned a label round.
    """
    margin = (                                                        # u (B,)
        implicit_reward(policy_chosen_logps, reference_chosen_logps, chosen_lengths, beta, loss_type)
        - implicit_reward(policy_rejected_logps, reference_rejected_logps, rejected_lengths, beta, loss_type))
    nowhere = torch.zeros_like(margin, dtype=torch.bool)
    on_policy = nowhere if on_policy is None else on_policy.bool()
    chosen_sampled, rejected_sampled = on_policy.T if on_policy.dim() == 2 else (on_policy, on_policy)
    sampled = chosen_sampled | rejected_sampled
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
        others = sampled.sum() - 1
        f_zero = utility(torch.zeros_like(f), beta, loss_type, target_margin)
        baseline = torch.where(others > 0, ((f * sampled).sum() - f) / others.clamp(min=1), f_zero)
    T2 = (f - baseline) * (torch.where(chosen_sampled, policy_chosen_logps, 0)
                           + torch.where(rejected_sampled, policy_rejected_logps, 0))

    T3 = (p * f_chosen.detach() * F.logsigmoid(margin)                # detached: T3 moves the label, not f
          + (1 - p) * f_rejected.detach() * F.logsigmoid(-margin))
    T3 = torch.where(self_labelled, T3, 0)

    corrections = response_coef * T2 + label_coef * T3
    losses = -(mean_f + (corrections - corrections.detach()))         # corrections: a gradient, but no value

    u, ahead = margin.detach(), (margin.detach() > 0) + 0.5 * (margin.detach() == 0)
    past = torch.minimum(f_chosen, f_rejected).detach() * label_coef < -1   # T3's weight 1 + label_coef·f < 0
    metrics = {
        "loss": losses, "margin": (2 * p - 1) * u, "accuracy": p * ahead + (1 - p) * (1 - ahead),
        "chosen_logps": policy_chosen_logps, "rejected_logps": policy_rejected_logps,
        "on_policy": sampled, "self_labelled": self_labelled, "label_reversed": self_labelled & past}
    return losses, {name: value.detach().to(margin.dtype).mean() for name, value in metrics.items()}


# --- one training step --------------------------------------------------------------------------------------


def pair_logps(model, pairs, dtype="float32", reference=None):
    """`sequence_logps` of the chosen and the rejected responses, (2, B), from one forward in which every
    response occurs once. With `reference`: (3, 2, B), log π, log π_ref and RevKL."""
    device, rows = next(model.parameters()).device, {}                 # rows: response -> its row
    places = [[rows.setdefault((tuple(pair["prompt_ids"]), tuple(pair[side])), len(rows)) for pair in pairs]
              for side in ("chosen_ids", "rejected_ids")]              # (2, B)
    prompts, responses = zip(*((list(prompt), list(response)) for prompt, response in rows))
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        sums = sequence_logps(model, *collate(prompts, responses, device), reference)
    return sums[..., torch.tensor(places, device=device)]


def reference_logps(reference, pairs, dtype="float32"):
    """log π_ref of the pairs' responses, (2, B), without gradient; of the data's responses the pair's own
    `reference_logps`, where it has them."""
    known = [None if any(pair["on_policy"]) else pair.get("reference_logps") for pair in pairs]
    asked = [place for place, logps in enumerate(known) if logps is None]
    parameter = next(reference.parameters())
    columns = torch.tensor([logps or (0.0, 0.0) for logps in known], device=parameter.device,
                           dtype=torch.promote_types(parameter.dtype, torch.float32)).T
    if asked:
        with torch.no_grad():
            columns[:, asked] = pair_logps(reference, [pairs[place] for place in asked], dtype)
    return columns


def preference_losses(policy, reference, pairs, args, baseline=None):
    """`sail_loss` of the pairs, and the regularisers that args turns on: (losses (B,), metrics).

    nll: −log π of the data's chosen response, per token. revkl: KL(π_ref ‖ π), the mean over the pair's
    response tokens. Adds to the metrics these two, KL(π‖π_ref) and the loss on fresh pairs.
    """
    if args.revkl_coef:
        ours, theirs, revkl = pair_logps(policy, pairs, args.dtype, reference)                     # (2, B)
    else:
        theirs = reference_logps(reference, pairs, args.dtype)
        ours = pair_logps(policy, pairs, args.dtype)
        revkl = torch.zeros_like(theirs)

    def column(value_of, dtype=None):
        return torch.tensor([value_of(pair) for pair in pairs], dtype=dtype, device=ours.device)

    lengths = column(lambda pair: (len(pair["chosen_ids"]), len(pair["rejected_ids"]))).T          # (2, B)
    on_policy, self_labelled = column(itemgetter("on_policy")), column(itemgetter("self_labelled"))
    preference = column(itemgetter("preference"), ours.dtype)
    losses, metrics = sail_loss(
        *ours, *theirs, preference + args.label_smoothing * (1 - 2 * preference), on_policy, self_labelled,
        beta=args.beta, response_coef=args.response_coef, label_coef=args.label_coef,
        loss_type=args.loss_type, target_margin=args.target_margin, baseline=baseline,
        label_draws=column(itemgetter("draw")) if args.label == "sampled" else None,
        chosen_lengths=lengths[0], rejected_lengths=lengths[1])

    offline = ~on_policy[:, 0] & ~self_labelled
    nll, revkl = offline * -ours[0] / lengths[0], revkl.sum(0) / lengths.sum(0)
    with torch.no_grad():
        log_ratio = ((ours - theirs).T * on_policy).sum(1) / on_policy.sum(1).clamp(min=1)
        metrics.update(kl=log_ratio.mean(), on_policy_loss=(losses * on_policy.any(1)).mean(), nll=nll.mean(),
                       offline=offline.float().mean(), revkl=revkl.mean())
    return losses + args.nll_coef * nll + args.revkl_coef * revkl, metrics


def sft_losses(policy, pairs, args):
    """The negative log-likelihood of the chosen responses, summed over tokens: (losses (B,), metrics)."""
    device = next(policy.parameters()).device
    batch = collate([pair["prompt_ids"] for pair in pairs], [pair["chosen_ids"] for pair in pairs], device)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        logps = sequence_logps(policy, *batch)
    return -logps, {"loss": -logps.detach().mean(), "chosen_logps": logps.detach().mean()}


def micro_batches(pairs, size):
    """The pairs in lists of at most `size` pairs of one weight."""
    by_weight = [[pair for pair in pairs if pair["weight"] == weight]
                 for weight in sorted({pair["weight"] for pair in pairs})]
    return [group[start:start + size] for group in by_weight for start in range(0, len(group), size)]


def accumulate_gradients(policy, losses_of, micros, scale):
    """Back-propagate scale·Σ weight·losses over the micro-batches. Returns the metrics' weighted sums over
    the pairs."""
    totals = Counter()
    for micro in micros:
        policy.require_backward_grad_sync = micro is micros[-1]        # DDP: once, with the last
        losses, metrics = losses_of(micro)
        weight = micro[0]["weight"]
        (scale * weight * losses.sum()).backward()
        for name, value in metrics.items():
            totals[name] += value.item() * len(micro) * weight
    return totals


# --- the run: which pairs, how many steps, on which ranks, into which files ---------------------------------

VARIANTS = {  # the route: which responses are sampled, whose label; and the authors' example settings for it
    "sft": dict(on_policy=(False, False), self_labelled=False, mix=0.0, response_coef=0.0, label_coef=0.0),
    "dpo": dict(on_policy=(False, False), self_labelled=False, mix=0.0, response_coef=0.0, label_coef=0.0),
    "dp": dict(on_policy=(False, False), self_labelled=True, mix=0.4, response_coef=0.0, label_coef=0.2),
    "pp": dict(on_policy=(True, True), self_labelled=True, mix=0.3, response_coef=0.2, label_coef=0.2),
    "pr": dict(on_policy=(True, True), self_labelled=False, mix=0.3, response_coef=0.3, label_coef=0.0),
    "spin": dict(on_policy=(False, True), self_labelled=False, mix=1.0, response_coef=0.0, label_coef=0.0),
}
DEFAULTS = dict(epochs=1.0, batch_size=32, learning_rate=1e-6, eval_every=100, eval_limit=128,
                max_prompt_length=512, max_response_length=512)
TOY_DEFAULTS = dict(epochs=3.0, batch_size=48, learning_rate=2e-4, eval_every=20, eval_limit=256,
                    max_prompt_length=8, max_response_length=24, reward="toy")
TOY_REVKL = {"pp": 0.3}                 # without it PP runs away from the reference: tests/terms_toy.py
SFT_DEFAULTS = {False: dict(learning_rate=2e-5),                        # by "is it the toy?"
                True: dict(epochs=4.0, learning_rate=1e-3)}


def plan(n_pairs, args):
    """(pairs in all, optimizer steps): every offline pair is seen `epochs` times, the
    route's own come on top."""
    if args.steps:
        return args.steps * args.batch_size, args.steps
    mix, offline = Fraction(str(args.mix)), int(args.epochs * n_pairs)
    total = int(offline if mix == 1 else offline / (1 - mix))
    return total, math.ceil(total / args.batch_size)


@lru_cache(maxsize=4)
def order_of(n_pairs, seed, route, epoch):
    """The order in which an epoch visits the pairs; the route's own stream is shuffled
    apart from the offline one."""
    generator = torch.Generator().manual_seed((seed * 2 + route) * 2**20 + epoch)
    return torch.randperm(n_pairs, generator=generator).tolist()


def draw_pairs(examples, step, steps, total, args):
    """The pairs of one global batch, flagged with their route; the same on every rank. Batches
    differ by one at most."""
    mix, variant = Fraction(str(args.mix)), VARIANTS[args.variant]
    generator = torch.Generator().manual_seed(args.seed * 2**30 + step)
    pairs = []
    for k in range(total * (step - 1) // steps, total * step // steps):
        route = int((k + 1) * mix) - int(k * mix)                   # 1 for `mix` of the pairs, evenly spread
        nth = int(k * mix) if route else k - int(k * mix)
        index = order_of(len(examples), args.seed, route, nth // len(examples))[nth % len(examples)]
        pairs.append({**examples[index], "preference": 1.0, "weight": 1.0,
                      "on_policy": variant["on_policy"] if route else (False, False),
                      "self_labelled": bool(route and variant["self_labelled"]),
                      "draw": torch.rand((), generator=generator).item()})
    return pairs


def sum_over_ranks(totals, device):
    """A Counter of floats, summed over the processes; all must hold the same keys."""
    if not dist.is_initialized():
        return totals
    names = sorted(totals)
    values = torch.tensor([float(totals[name]) for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return Counter(dict(zip(names, values.tolist())))


def count(pairs, variant):
    """What a step worked on, as weighted sums: pairs, tokens, and the samples' number, length, reward, …"""
    sides = ("chosen",) if variant == "sft" else ("chosen", "rejected")
    totals = Counter()
    for pair in pairs:
        lengths = [len(pair[f"{side}_ids"]) for side in sides]
        fresh = [length for length, sampled in zip(lengths, pair["on_policy"]) if sampled]
        own = dict(pairs=1, tokens=len(sides) * len(pair["prompt_ids"]) + sum(lengths),
                   chosen_tokens=lengths[0], fresh=len(fresh), fresh_tokens=sum(fresh),
                   unfinished=pair.get("unfinished", 0), reward=sum(pair.get("rewards", [])),
                   ties=pair.get("tie", 0))
        totals.update({name: pair["weight"] * value for name, value in own.items()})
    return totals


def record_of(step, totals, args, **rest):
    """The step's line in metrics.jsonl: means over all ranks' pairs; None for what this step had none of."""
    def mean(name, over="pairs"):
        return totals[name] / totals[over] if name in totals and totals[over] else None

    labelled_by_reward, sft = args.variant == "pr", args.variant == "sft"
    return {
        "step": step, "loss": mean("loss", "chosen_tokens" if sft else "pairs"),
        **{name: mean(name) for name in ("margin", "accuracy", "chosen_logps", "rejected_logps")},
        "kl": mean("kl", "on_policy"), "reward": mean("reward", "fresh") if labelled_by_reward else None,
        "response_length": mean("fresh_tokens", "fresh"), "unfinished": mean("unfinished", "fresh"),
        "on_policy": mean("on_policy"), "self_labelled": mean("self_labelled"),
        "label_reversed": mean("label_reversed", "self_labelled"), "ties": totals["ties"],
        "nll": mean("nll", "offline"), "revkl": mean("revkl") if args.revkl_coef else None,
        "tokens": round(totals["tokens"]), **rest}


def join_processes(shard=False):
    """(rank, world size, device) of this process, as torchrun's environment says; alone without it."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 or shard:
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **alone,
                                timeout=timedelta(hours=2))            # rank 0's evaluations may take long
    return rank, world, device


def whole(tensor):
    """The whole of a tensor that may be sharded; all ranks take part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def together(action):
    """action(), on every rank; where it raises InputError on one, all raise that."""
    problem = result = None
    try:
        result = action()
    except InputError as error:
        problem = str(error)
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        dist.barrier()                    # gloo's threads must be done with the objects before a process ends
    for problem in filter(None, problems):
        raise InputError(problem)
    return result


def in_turns(action):
    """action(), by one process of a node after the other, as each needs much of the node's memory for it."""
    results = [together(lambda: action() if turn == int(os.environ.get("LOCAL_RANK", 0)) else None)
               for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))]
    return next(result for result in results if result is not None)


def even_out(micros, device):
    """As many micro-batches on every rank as on that with most, since a sharded model's collectives demand
    it: a pair is repeated, with weight 0."""
    most = torch.tensor(len(micros), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return micros + [[{**micros[0][0], "weight": 0.0}]] * (int(most) - len(micros))


def shared_by_ranks(policy):
    """The policy in DistributedDataParallel, which averages the gradients over the ranks."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):    # torch 2.13 renames the option
        return DistributedDataParallel(policy, broadcast_buffers=False)


def load_models(args, device):
    """(policy, reference, tokenizer), the reference None for sft, as args wants them: adapted, sharded."""
    place = "cpu" if args.shard else device                            # FSDP moves what it keeps
    if args.model == "toy":
        policy, tokenizer = toy_model(args.seed)
    else:
        policy, tokenizer = load_policy(args.model, place, args.trust_remote_code)
    adapted = bool(args.lora or getattr(policy, "peft_config", None))
    if adapted:
        train_adapter(policy, args.lora, args.model, args.seed)
    elif args.merge:
        raise InputError("--merge: without --lora, and with no adapter in --model, there is nothing to merge")
    check_lengths(policy, args.model, args.max_prompt_length, args.max_response_length)
    reference = None
    if args.variant != "sft":
        args.reference = args.reference or args.model
        if args.reference == args.model:
            reference = AdapterReference(policy) if adapted else copy.deepcopy(policy).requires_grad_(False)
        else:
            reference, other = load_policy(args.reference, place, args.trust_remote_code)
            reference.requires_grad_(False)
            if other.get_vocab() != tokenizer.get_vocab():
                raise InputError(f"--reference {args.reference} has another vocabulary than "
                                 f"--model {args.model}")
    for model in (policy, reference) if args.shard else ():
        if isinstance(model, torch.nn.Module):
            shard(model, args.dtype)
    if not args.shard:
        policy.to(device)
    if args.gradient_checkpointing:
        recompute_activations(policy)
    return policy, reference, tokenizer


def recompute_activations(policy):
    """Keep no activations within layers in train mode, but compute them again in backward."""
    older = policy.gradient_checkpointing_enable                       # the name until transformers 5.2x
    getattr(policy, "activation_checkpointing_enable", older)({"use_reentrant": False})


def load_everything(args, device):
    """(policy, reference, tokenizer, reward, examples, held-out examples, counts),
    checked against each other."""
    train, held_out, report = train_and_held_out(args.data, args.eval_data, args.limit, args.prefer)
    reward = None
    if args.reward:
        reward = load_reward(args.reward, device, args.trust_remote_code, args.reward_timeout)
    if args.model == "toy" and args.variant != "sft":
        args.model = toy_checkpoint()
    load = partial(load_models, args, device)
    policy, reference, tokenizer = in_turns(load) if args.shard else load()
    lengths = end_token_ids(tokenizer, policy), args.max_prompt_length, args.max_response_length
    examples, counts = encode(train, tokenizer, *lengths)
    held_out = encode(held_out[:args.eval_limit], tokenizer, *lengths)[0] if held_out else []
    counts = {"dropped": sum(report["dropped"].values()) + counts.pop("dropped"), **report["dropped"],
              **counts}
    return policy, reference, tokenizer, reward, examples, held_out, counts


def save_model(policy, tokenizer, directory, args, rank):
    """save_pretrained into `directory`, of an adapter alone where one was trained, and with --merge the
    merged model beside it. Written aside and renamed: what stands there is whole, old or new. All ranks take
    part."""
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    state = None
    if args.shard:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        names = {name for name, _ in (*policy.named_parameters(), *policy.named_buffers())}     # tied: one
        state = get_model_state_dict(policy, options=options)
        state = {name: value for name, value in state.items() if name in names}
    if rank:
        return

    def save(model, directory, **options):
        aside, old = (directory.with_name(f"{directory.name}.{suffix}") for suffix in ("writing", "old"))
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of transformers' own names
            model.save_pretrained(aside, **options)
        tokenizer.save_pretrained(aside)
        if directory.exists():
            directory.rename(old)
        aside.rename(directory)
        shutil.rmtree(old, ignore_errors=True)

    save(policy, directory, state_dict=state)
    if args.merge:
        base = adapter_config(directory)["base_model_name_or_path"]
        base, _ = load_policy(base, "cpu", args.trust_remote_code)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            merged = require_peft("--merge").PeftModel.from_pretrained(base, directory).merge_and_unload()
        save(merged, directory.with_name("merged"))


def write_line(out, name, row):
    """Append a row to out/name.jsonl; what is not a finite number is written as null."""
    row = {key: None if isinstance(value, float) and not math.isfinite(value) else value
           for key, value in row.items()}
    with open(out / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def log(out, record, steps, log_every):
    """Append a step's record to metrics.jsonl; print every log_every-th, the first and the last as a line."""
    write_line(out, "metrics", record)
    if record["step"] % log_every and record["step"] not in (1, steps):
        return
    shown = {"loss": "{:.4f}", "margin": "{:.3f}", "accuracy": "{:.2f}", "reward": "{:.2f}", "kl": "{:.2f}",
             "response_length": "{:.1f}", "grad_norm": "{:.2f}", "learning_rate": "{:.1e}",
             "seconds": "{:.2f}"}
    fields = [f"{name} {form.format(record[name])}" for name, form in shown.items()
              if record.get(name) is not None]
    tqdm.write(f"step {record['step']}/{steps} | " + " | ".join(fields))


def log_figures(out, step, figures):
    """Append figures, {name: (value, low, high)}, to eval.jsonl; print a line, value ± half the interval."""
    from evaluate import shown
    row = {"step": step}
    for name, (value, *interval) in figures.items():
        row.update({name: value, f"{name}_interval": interval if math.isfinite(interval[0]) else None})
    write_line(out, "eval", row)
    tqdm.write(f"eval {step} | " + " | ".join(f"{name} {shown(*figure)}" for name, figure in figures.items()))


def evaluate_now(run, held_out, args, step):
    """Evaluate on the held-out pairs; log the figures, and eight samples in samples.jsonl. Rank 0 scores and
    writes."""
    from evaluate import evaluate_policy
    figures, samples = evaluate_policy(run.policy, run.reference, run.tokenizer, held_out,
                                       run.reward if run.rank == 0 else None, args)
    if run.rank:
        return
    log_figures(run.out, step, figures)
    for row in samples[:8]:
        write_line(run.out, "samples", {"step": step, **row})


# --- a run that can be stopped and continued: its directory, its checkpoints --------------------------------

LOGS = ("metrics", "eval", "samples", "skipped")
FREE = set("resume save_every log_every out micro_batch_size gradient_checkpointing shard shard_rollouts "
           "precompute_reference reward_timeout merge".split())        # may change when a run is continued


@contextmanager
def claimed(out):
    """Make the directory and keep other runs out of it, until this process ends in whatever way."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out} is in use by another run; wait for its end, or give another "
                             "--out") from None
        yield


def fingerprint(examples):
    """SHA-256 of the pairs' token ids: it tells data, tokenizer, template and truncation apart."""
    ids = [[example[f"{side}_ids"] for side in ("prompt", "chosen", "rejected")] for example in examples]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def start(out, args):
    """Save the arguments and empty the logs, for a run from the beginning."""
    if any(path.name.isdigit() for path in (out / "checkpoints").glob("*")):
        raise InputError(f"{out}/checkpoints holds those of an earlier run; --resume continues it, without "
                         "that directory a new one starts")
    shutil.rmtree(out / "checkpoints", ignore_errors=True)             # only a half-written one can be there
    (out / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n", encoding="utf-8")
    for name in LOGS:
        (out / f"{name}.jsonl").write_text("")


def newest_checkpoint(out, say):
    """The directory of the newest whole checkpoint, None without any; what is wrong with newer ones is said.
    Raises InputError where there are only broken ones."""
    paths = sorted((path for path in (out / "checkpoints").glob("*") if path.name.isdigit()),
                   key=lambda path: -int(path.name))
    for path in paths:
        try:
            progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
            sizes = {name: (path / name).stat().st_size for name in progress["files"]}
        except (OSError, ValueError) as error:
            problem = str(error)
        else:
            cut = [name for name, size in sizes.items() if size != progress["files"][name]]
            if not cut:
                return path
            problem = f"{cut[0]} has {sizes[cut[0]]} bytes and should have {progress['files'][cut[0]]}"
        say(f"{path} is not whole ({problem}); looking for an earlier one")
    if paths:
        raise InputError(f"{out}/checkpoints: none of {len(paths)} is whole; remove them to start afresh")
    return None


def tensors_of(policy, optimizer):
    """What a checkpoint holds, by name: the parameters that are trained and the optimizer's state of each."""
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    return {**{f"model.{name}": parameter.detach() for name, parameter in trained.items()},
            **{f"optimizer.{name}.{key}": value for name, parameter in trained.items()
               for key, value in optimizer.state[parameter].items()}}


def save_checkpoint(run):
    """Write checkpoints/STEP in the run's directory, aside and renamed; remove all but the last two. All
    ranks take part.

    Random states are not in it, as each step's is made of seed, step and rank; nor is the position in the
    data, which follows from the step. Raises OSError where it cannot be written.
    """
    import torch.distributed.checkpoint as dcp                         # here, since it takes a second
    path = run.out / "checkpoints" / str(run.progress["step"])
    aside = path.with_name(path.name + ".writing")
    if path.exists():
        return
    if run.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    together(lambda: None)                                             # the directory is there
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.save(tensors_of(run.policy, run.optimizer), no_dist=not dist.is_initialized(),
                     storage_writer=dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True))
        if run.rank == 0:
            files = {file.name: file.stat().st_size for file in aside.iterdir()}
            logs = {name: (run.out / f"{name}.jsonl").stat().st_size for name in LOGS}
            with open(aside / "progress.json", "w", encoding="utf-8") as file:
                file.write(json.dumps({**run.progress, "logs": logs, "files": files}, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            aside.rename(path)
    except (dcp.CheckpointException, OSError) as error:
        failures = getattr(error, "failures", {0: (error, None)})      # by rank; every rank raises DCP's
        shutil.rmtree(aside, ignore_errors=True)
        if run.rank:
            sys.exit(2)
        raise OSError(f"{path} cannot be written ({first_line(next(iter(failures.values()))[0])}); earlier "
                      "checkpoints are untouched") from None
    steps = sorted(int(other.name) for other in path.parent.iterdir() if other.name.isdigit())
    for step in steps[:-2] if run.rank == 0 else ():
        shutil.rmtree(path.parent / str(step))
    together(lambda: None)                                             # it is whole


def resume(run, path, args):
    """Continue from the checkpoint `path`: weights, optimizer, scheduler, progress, and the logs as they
    were. Raises InputError where the run had other arguments or other data."""
    import torch.distributed.checkpoint as dcp
    before = json.loads((run.out / "args.json").read_text(encoding="utf-8"))
    for name, value in vars(args).items():
        if name not in FREE and before.get(name) != value:
            what = "the data have" if name == "data_sha256" else f"--{name.replace('_', '-')} has"
            raise InputError(f"--resume: {what} changed since {path} was written, from {before.get(name)} to "
                             f"{value}; go back to that, or start afresh with another --out")
    for parameter in run.policy.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    run.optimizer.step()                                               # makes its state, to be overwritten
    run.optimizer.zero_grad()
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors_of(run.policy, run.optimizer), no_dist=not dist.is_initialized(),
                     storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except (dcp.CheckpointException, RuntimeError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); remove it to use an earlier "
                         "one") from None
    saved = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    run.progress = {name: saved[name] for name in run.progress}
    run.scheduler.last_epoch = saved["step"] - saved["skipped"] - 1
    run.scheduler.step()
    if run.rank == 0:
        for name, size in saved["logs"].items():
            os.truncate(run.out / f"{name}.jsonl", size)
        for other in path.parent.iterdir():                            # broken, or half written
            if not other.name.isdigit() or int(other.name) > saved["step"]:
                shutil.rmtree(other)


def precompute(examples, reference, directory, args):
    """Give each pair its `reference_logps`: from the file that an earlier run has left in the directory, else
    computed, and left there. The file's name has a hash of the reference's weights and the pairs' tokens."""
    inner, digest = getattr(reference, "module", reference), hashlib.sha256(fingerprint(examples).encode())
    for name, weight in inner.named_parameters():
        if not weight.requires_grad:                                   # so without an adapter in training
            digest.update(name.encode())
            digest.update(whole(weight).detach().cpu().flatten().view(torch.uint8).numpy())
    file = directory / f"reference-{args.dtype}-{digest.hexdigest()[:16]}.safetensors"
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if together(file.is_file):
        logps = load_file(file)["logps"]                               # (pairs, 2)
    else:
        own, size, parts = examples[rank::world], args.micro_batch_size or 16, []
        with in_step(inner, not args.shard_rollouts), torch.no_grad():
            for start in tqdm(range(0, len(own), size), "reference", disable=None if rank == 0 else True):
                parts.append(pair_logps(reference, own[start:start + size], args.dtype).T.cpu())
        shares = [torch.cat(parts)]
        if dist.is_initialized():
            shares = [None] * world
            dist.all_gather_object(shares, torch.cat(parts))
        logps = torch.empty(len(examples), 2)
        for nth, share in enumerate(shares):
            logps[nth::world] = share
        if rank == 0:
            aside = file.with_suffix(".writing")
            directory.mkdir(parents=True, exist_ok=True)
            save_file({"logps": logps}, aside)
            aside.rename(file)
    for example, pair in zip(examples, logps.tolist()):
        example["reference_logps"] = tuple(pair)


def make_optimizer(policy, steps, args):
    """(optimizer, scheduler): linear warm-up, then constant or cosine."""
    optimizers = {"adamw": partial(torch.optim.AdamW, weight_decay=0.0, fused=True),
                  "rmsprop": torch.optim.RMSprop}
    optimizer = optimizers[args.optimizer](policy.parameters(), lr=args.learning_rate)
    warmup = max(1, steps // 10 if args.warmup_steps is None else args.warmup_steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1, (done + 1) / warmup) * (
            (1 + math.cos(math.pi * done / steps)) / 2 if args.schedule == "cosine" else 1))


def update(policy, optimizer, scheduler, max_grad_norm, loss):
    """One optimizer step, unless the loss or the gradient is not finite; (gradient norm before clipping,
    learning rate, whether it was done)."""
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)).item()
    learning_rate = scheduler.get_last_lr()[0]
    finite = math.isfinite(grad_norm) and math.isfinite(loss)          # on all ranks alike: all step or none
    if finite:
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad()
    return grad_norm, learning_rate, finite


def training_step(run, step, args):
    """One optimizer step: (its line for metrics.jsonl, its sums over the ranks, whether it was finite). Moves
    run.progress on. run: what `train` loaded and made."""
    started = time.perf_counter()
    torch.manual_seed((args.seed * 2**30 + step) * 2**10 + run.rank)   # a rollout depends on nothing else
    # 1. draw the global batch; take this rank's share, of the pairs to sample for and of the others
    batch = draw_pairs(run.examples, step, run.steps, run.total, args)
    pairs = batch if run.world == 1 else sorted(batch, key=itemgetter("on_policy"))[run.rank::run.world]
    # 2. roll out, 3. label
    run.policy.eval()
    with in_step(run.policy, not args.shard_rollouts):
        pairs = roll_out(run.policy, run.tokenizer, pairs, args.max_response_length, args.num_responses,
                         args.temperature, args.dtype)
    rolled_out = time.perf_counter()
    if args.variant == "pr":
        together(lambda: label_by_reward(pairs, run.reward, args.preference))
    labelled = time.perf_counter()
    # 4. log-probabilities, loss, gradient of the mean over the global batch (DDP and FSDP divide by `world`)
    run.policy.train(args.gradient_checkpointing)                      # works in train mode only; no dropout
    if args.variant == "sft":
        losses_of = partial(sft_losses, run.model, args=args)
        scale = run.world / sum(len(pair["chosen_ids"]) for pair in batch)
    else:
        losses_of = partial(preference_losses, run.model, run.reference, args=args,
                            baseline=run.progress["baseline"])
        scale = run.world / len(batch)
    micros = micro_batches(pairs, args.micro_batch_size or len(pairs))
    micros = even_out(micros, run.device) if args.shard else micros
    totals = accumulate_gradients(run.model, losses_of, micros, scale)
    totals.update({**count(pairs, args.variant), "terminated": len(run.terminated)})
    totals = sum_over_ranks(totals, run.device)
    # 5. step
    grad_norm, learning_rate, finite = update(run.policy, run.optimizer, run.scheduler, args.max_grad_norm,
                                              totals["loss"])
    progress = run.progress
    progress.update(step=step, skipped=progress["skipped"] + (not finite),
                    skipped_in_a_row=0 if finite else progress["skipped_in_a_row"] + 1)
    if args.baseline == "running" and totals["on_policy"] and math.isfinite(totals["on_policy_loss"]):
        mean_utility = -totals["on_policy_loss"] / totals["on_policy"]
        progress["baseline"] += 0.1 * (mean_utility - progress["baseline"])
    record = record_of(step, totals, args, grad_norm=grad_norm, learning_rate=learning_rate,
                       skipped=progress["skipped"], **run.counts, seconds=time.perf_counter() - started,
                       seconds_rollout=rolled_out - started, seconds_reward=labelled - rolled_out)
    return record, totals, finite


def train(args):
    """The whole run: load, loop, save. Raises InputError on bad input, where a reward fails, and after ten
    non-finite steps in a row; what was reached by then is in a checkpoint."""
    rank, world, device = join_processes(args.shard)
    with ExitStack() as at_end:
        run = SimpleNamespace(rank=rank, world=world, device=device, terminated=[])
        at_end.callback(lambda: dist.is_initialized() and dist.destroy_process_group())
        (run.policy, run.reference, run.tokenizer, run.reward, run.examples, held_out,
         run.counts) = load_everything(args, device)
        run.total, run.steps = total, steps = plan(len(run.examples), args)
        args.data_sha256 = fingerprint([*run.examples, *held_out])
        if total // max(steps, 1) < world:
            raise InputError(f"{total} pairs in {steps} steps are too few for {world} process(es); more "
                             "--epochs, or a larger --batch-size")
        run.out, own = Path(args.out), int(total * Fraction(str(args.mix)))
        say = partial(print, flush=True) if rank == 0 else lambda line: None
        together(lambda: rank or at_end.enter_context(claimed(run.out)))
        run.model = shared_by_ranks(run.policy) if world > 1 and not args.shard else run.policy
        run.optimizer, run.scheduler = make_optimizer(run.policy, steps, args)
        say(f"{args.data}: {len(run.examples)} pairs to train on, {len(held_out)} to evaluate on; "
            f"{counted(run.counts)}\n{args.variant}: {total - own} offline pairs + {own} on the variant's "
            f"route = {total} pairs, {steps} steps of {math.ceil(total / steps)}, processes: {world} "
            f"-> {run.out}")
        # All that the loop carries on beside weights and optimizer. baseline: T2's, a running mean of past
        # fresh pairs' utility.
        run.progress = dict(step=0, baseline=0.0, skipped=0, skipped_in_a_row=0)
        if args.baseline == "running":
            f_zero = utility(torch.zeros(()), args.beta, args.loss_type, args.target_margin)
            run.progress["baseline"] = f_zero.item()
        checkpoint = newest_checkpoint(run.out, say) if args.resume else None
        if checkpoint:
            together(lambda: resume(run, checkpoint, args))
            say(f"continuing after step {run.progress['step']}, from {checkpoint}")
        else:
            together(lambda: rank or start(run.out, args))
        if args.precompute_reference:
            precompute(run.examples, run.reference, run.out.parent, args)
        loop(run, held_out, args, at_end)
        if run.progress["step"] < steps:
            say(f"stopped by SIGTERM after step {run.progress['step']}, which is saved; --resume continues")
            return
        save_model(run.policy, run.tokenizer, run.out / "model", args, rank)
        say(f"saved {run.out}/model")
        together(lambda: None)                                         # no rank leaves before it is there


def loop(run, held_out, args, at_end):
    """The steps that are left, with their logs, evaluations and checkpoints; ends early on SIGTERM."""
    at_end.callback(signal.signal, signal.SIGTERM,
                    signal.signal(signal.SIGTERM, lambda *_: run.terminated.append(True)))

    def evaluate_at(step):                                # only a sharded policy needs the other ranks for it
        if held_out and (run.rank == 0 or args.shard):
            run.policy.eval()
            with in_step(run.policy, not args.shard_rollouts):
                evaluate_now(run, held_out, args, step)

    try:
        if run.progress["step"] == 0 and args.eval_every:
            together(lambda: evaluate_at(0))
        for step in tqdm(range(run.progress["step"] + 1, run.steps + 1), args.variant, run.steps,
                         initial=run.progress["step"], disable=None if run.rank == 0 else True):
            record, totals, finite = training_step(run, step, args)
            if run.rank == 0:
                log(run.out, record, run.steps, args.log_every)
                if not finite:
                    pairs = draw_pairs(run.examples, step, run.steps, run.total, args)
                    prompts = [pair["prompt"] for pair in pairs]
                    write_line(run.out, "skipped", {"step": step, "prompts": prompts})
            if run.progress["skipped_in_a_row"] >= 10:
                raise InputError(f"steps {step - 9} to {step}: loss or gradient not finite ten times in a "
                                 f"row; their prompts are in {run.out}/skipped.jsonl; try a lower "
                                 "--learning-rate, or without them")
            if step == run.steps or args.eval_every and step % args.eval_every == 0:
                together(lambda: evaluate_at(step))
            if totals["terminated"] or args.save_every and (step % args.save_every == 0 or step == run.steps):
                save_checkpoint(run)
            if totals["terminated"]:
                return
    except InputError as error:
        if not run.progress["step"]:
            raise
        save_checkpoint(run)
        raise InputError(f"{error} (step {run.progress['step']} is saved; --resume continues)") from None
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise OSError(f"rank {run.rank} has lost another process ({first_line(error)[-60:]}); --resume "
                      "continues from the last checkpoint") from None


def parse_args(argv=None):
    """The command line, checked and completed with the defaults that depend on data and variant."""
    parser = Parser(description="Train a language model on preferences: SFT, DPO and SAIL's DP, PP and PR.")
    positive, weight = number(float, 1e-12), number(float, 0)
    add = parser.add_argument_group("method").add_argument
    add("--variant", choices=[*VARIANTS], default="pr", help="dp: data's responses, own labels; pp: own "
        "responses, own labels; pr: own responses, labels from --reward (default); dpo; sft; spin")
    add("--mix", type=number(float, 0, 1), help="fraction of pairs on the variant's route, the rest is DPO "
        "on the data; 1: fully online (the authors' examples: dp 0.4, pp 0.3, pr 0.3; spin 1)")
    add("--response-coef", type=weight, help="of T2 (the authors': pp 0.2, pr 0.3); 0 with pr: online DPO")
    add("--label-coef", type=weight, help="of T3 (the authors': dp 0.2, pp 0.2)")
    add("--label", choices=["expected", "sampled"], default="expected",
        help="sum the policy's or the reward's label out (default), or draw it as in the paper")
    add("--baseline", choices=["running", "none"], default="running",
        help="T2's: the running mean of past pairs' utility (default), or none, as in the paper")
    add("--preference", choices=["hard", "soft"], default="hard",
        help="pr's label: 1, or ½ for a tie, by the reward's order (default), or σ of the reward difference")
    add("--num-responses", type=number(int, 2), default=2,
        help="samples per prompt of pp and pr; all their pairs are trained on, together weighing one (2)")
    add("--beta", type=positive, default=0.1, help="KL weight (0.1, the authors')")
    add("--loss-type", choices=["sigmoid", "ipo", "hinge", "simpo", "orpo"], default="sigmoid",
        help="the utility f (sigmoid)")
    add("--target-margin", type=weight, default=0.0, help="simpo's m (0)")
    add("--label-smoothing", type=number(float, 0, 0.5), default=0.0, help="ε: given labels become 1 − ε (0)")
    add("--nll-coef", type=weight, default=0.0, help="of −log π per token of the data's chosen responses (0)")
    add("--revkl-coef", type=weight, help="of KL(π_ref‖π) per response token, over the whole vocabulary (0; "
        "toy pp 0.3)")
    add = parser.add_argument_group("models and data").add_argument
    add("--model", default="toy", help="a Hugging Face directory or hub name, or toy (default): the embedded "
        "world's SFT model, trained on first use; for sft, its random start")
    add("--reference", help="the frozen reference (--model as loaded)")
    add("--data", default="toy", help="toy (default), a .jsonl, .json, .csv or .parquet file, or a hub name "
        "OWNER/NAME[/CONFIG][:SPLIT]; see data.py")
    add("--eval-data", help="held-out pairs (toy:test for the toy, else one prompt in twenty of --data)")
    add("--prefer", choices=["better", "safer"], default="better", help="PKU-SafeRLHF's label to train on")
    add("--reward", help="toy, FILE.py:FUNCTION, or a one-logit classifier's directory or hub name")
    add("--reward-timeout", type=positive, default=600.0, metavar="SECONDS", help="stop where a call of "
        "FILE.py:FUNCTION takes longer (600)")
    add("--limit", type=number(int, 1), help="use at most so many pairs")
    add("--max-prompt-length", type=number(int, 1), help="tokens; cut from the left (512; toy 8)")
    add("--max-response-length", type=number(int, 1), help="tokens; cut from the right (512; toy 24)")
    add("--temperature", type=positive, default=1.0, help="of the rollouts; T2 needs 1 (default)")
    add("--trust-remote-code", action="store_true", help="run code that comes with a hub model")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=positive, help="times every offline pair is seen, whatever the mix; self-made pairs "
        "come on top (1; toy 3, toy sft 4)")
    add("--steps", type=number(int, 1), help="optimizer steps, instead of --epochs")
    add("--batch-size", type=number(int, 1), help="pairs per optimizer step, over all processes (32; toy 48)")
    add("--micro-batch-size", type=number(int, 1), help="pairs per forward (a process's whole share); where "
        "their logits are more than 2**27, they are computed twice, and fewer pairs are faster")
    add("--learning-rate", type=positive,
        help="(1e-6, sft 2e-5; toy 2e-4, sft 1e-3; the authors: 1e-5, sft 2e-5)")
    add("--warmup-steps", type=number(int, 0), help="of linear warm-up (a tenth of the steps)")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="after it (constant)")
    add("--optimizer", choices=["adamw", "rmsprop"], default="adamw", help="rmsprop is the authors' (adamw)")
    add("--max-grad-norm", type=positive, default=1.0, help="clip the gradient to this norm (1)")
    add("--seed", type=number(int, 0, 2**20), default=0)
    add = parser.add_argument_group("memory and speed").add_argument
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of arithmetic, not weights")
    add("--lora", type=number(int, 1), metavar="RANK", help="train a LoRA adapter of this rank (needs peft); "
        "the reference is the model without it. Where --model is itself an adapter, that is trained on, also "
        "without this flag, and its start is the reference")
    add("--merge", action="store_true", help="also save the model with its adapter merged, in OUT/merged")
    add("--shard", action="store_true", help="split weights, gradients, optimizer over the processes, FSDP2")
    add("--shard-rollouts", action="store_true", help="keep a sharded policy so while it samples, too: slow, "
        "for models of which one device cannot hold a copy")
    add("--gradient-checkpointing", action="store_true", help="compute activations twice, keep fewer of them")
    add("--precompute-reference", action="store_true", help="compute the reference's log-probabilities of "
        "the data once, before training, and keep them in a file beside OUT")
    add = parser.add_argument_group("output").add_argument
    add("--out", help="directory for args.json, metrics.jsonl, eval.jsonl, samples.jsonl and model/; what an "
        "earlier run left there is replaced (runs/DATA/VARIANT)")
    add("--save-every", type=number(int, 1), metavar="N", help="steps between checkpoints, of which the last "
        "two stay in OUT/checkpoints (never; SIGTERM and errors save one too)")
    add("--resume", action="store_true", help="continue from OUT's newest whole checkpoint, if any")
    add("--log-every", type=number(int, 1), default=10, help="steps between printed lines (10)")
    add("--eval-every", type=number(int, 0), help="steps between evaluations (100; toy 20); 0: at the end")
    add("--eval-limit", type=number(int, 1), help="held-out pairs to evaluate on (128; toy 256)")
    return completed(parser.parse_args(argv), parser)


def completed(args, parser):
    """The arguments, with the defaults that depend on data and variant; what cannot work is an error."""
    toy, sft = args.data == "toy", args.variant == "sft"
    defaults = {**DEFAULTS, **(TOY_DEFAULTS if toy else {}), **(SFT_DEFAULTS[toy] if sft else {}),
                "mix": VARIANTS[args.variant]["mix"],
                "revkl_coef": TOY_REVKL.get(args.variant, 0.0) if toy else 0.0,
                "response_coef": VARIANTS[args.variant]["response_coef"],
                "label_coef": VARIANTS[args.variant]["label_coef"],
                "out": str(Path("runs", run_name(args.data), args.variant))}
    for name, value in defaults.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)

    if args.variant in ("sft", "dpo"):
        args.mix = 0.0                              # they have no route of their own
    if args.temperature != 1 and any(VARIANTS[args.variant]["on_policy"]) and args.response_coef:
        parser.error("argument --temperature: T2 is the score of samples at temperature 1; leave it, or set "
                     "--response-coef 0")
    if args.target_margin and args.loss_type != "simpo":
        parser.error("argument --target-margin: only --loss-type simpo has one")
    if args.lora and sft and args.model == "toy":
        parser.error("argument --lora: the toy's SFT model starts from nothing; there is no base to adapt")
    sampled_by_shards = args.shard and any(VARIANTS[args.variant]["on_policy"])
    if args.precompute_reference and (sft or args.revkl_coef or sampled_by_shards):
        parser.error("argument --precompute-reference: sft has no reference, --revkl-coef needs it at every "
                     "step, and so do the samples of a sharded policy")
    if args.shard_rollouts and not args.shard:
        parser.error("argument --shard-rollouts: only with --shard")
    if args.variant == "pr" and args.mix > 0 and not args.reward:
        parser.error("argument --reward: pr needs one to label its samples; toy, FILE.py:FUNCTION or a "
                     "classifier")
    return args


def run_name(data):
    """The directory under runs/ for a data source: a file's stem, or a hub name with - for / and :."""
    return Path(data).stem if Path(data).exists() else data.replace("/", "-").replace(":", "-")


if __name__ == "__main__":
    command_line(lambda: train(parse_args()))
