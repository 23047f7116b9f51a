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
    torchrun --nproc_per_node 8 sail.py --variant pr …                  # eight GPUs
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
import json
import math
import os
import shutil
import time
import warnings
from collections import Counter
from fractions import Fraction
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import InputError, Parser, collate, command_line, counted, encode, number, pack, train_and_held_out
from generate import check_lengths, end_token_ids, load_policy, roll_out, toy_checkpoint, toy_model
from reward import label_by_reward, load_reward

# --- log-probabilities and losses ---------------------------------------------------------------------------


CHUNK = 2**27                             # logits, positions × vocabulary, that exist at a time
KNOWN = WeakSet()                         # models whose logits `logits_of` was seen to give


def response_states(model, input_ids, attention_mask, response_mask):
    """The last hidden states at the positions whose next token is the response's, (N, H): all of the model
    but its output layer. A model that allows it (generate.allow_packing) gets the rows packed: no padding,
    and a prompt that rows share once. Raises InputError for a model that `logits_of` does not know."""
    inner, kept = getattr(model, "module", model), []                  # DDP holds the model in .module
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
            theirs = logits_of(reference, reference_hidden).log_softmax(-1)
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


def preference_losses(policy, reference, pairs, args, baseline=None):
    """`sail_loss` of the pairs, and the regularisers that args turns on: (losses (B,), metrics).

    nll: −log π of the data's chosen response, per token. revkl: KL(π_ref ‖ π), the mean over the pair's
    response tokens. Adds to the metrics these two, KL(π‖π_ref) and the loss on fresh pairs.
    """
    if args.revkl_coef:
        ours, theirs, revkl = pair_logps(policy, pairs, args.dtype, reference)                     # (2, B)
    else:
        with torch.no_grad():
            theirs = pair_logps(reference, pairs, args.dtype)
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


def accumulate_gradients(policy, losses_of, pairs, micro_batch_size, scale):
    """Back-propagate scale·Σ weight·losses, `micro_batch_size` pairs of one weight at a time. Returns the
    metrics' weighted sums over the pairs."""
    totals = Counter()
    by_weight = [[pair for pair in pairs if pair["weight"] == weight]
                 for weight in sorted({pair["weight"] for pair in pairs})]
    micros = [group[start:start + micro_batch_size]
              for group in by_weight for start in range(0, len(group), micro_batch_size)]
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
DEFAULTS = dict(epochs=1.0, batch_size=32, learning_rate=1e-6, eval_every=100, max_prompt_length=512,
                max_response_length=512)
TOY_DEFAULTS = dict(epochs=3.0, batch_size=48, learning_rate=2e-4, eval_every=20, max_prompt_length=8,
                    max_response_length=24, reward="toy")
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


def join_processes():
    """(rank, world size, device) of this process, as torchrun's environment says; alone without it."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def shared_by_ranks(policy):
    """The policy in DistributedDataParallel, which averages the gradients over the ranks."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):    # torch 2.13 renames the option
        return DistributedDataParallel(policy, broadcast_buffers=False)


def load_everything(args, device):
    """(policy, reference, tokenizer, reward, examples, held-out examples, counts),
    checked against each other."""
    train, held_out, report = train_and_held_out(args.data, args.eval_data, args.limit, args.prefer)
    reward = load_reward(args.reward, device, args.trust_remote_code) if args.reward else None
    if args.variant == "sft" and args.model == "toy":
        policy, tokenizer = toy_model(args.seed)
    else:
        args.model = toy_checkpoint() if args.model == "toy" else args.model
        policy, tokenizer = load_policy(args.model, device, args.trust_remote_code)
    check_lengths(policy, args.model, args.max_prompt_length, args.max_response_length)
    reference = None
    if args.variant != "sft":
        args.reference = args.reference or args.model
        if args.reference == args.model:
            reference = copy.deepcopy(policy)
        else:
            reference, other = load_policy(args.reference, device, args.trust_remote_code)
            if other.get_vocab() != tokenizer.get_vocab():
                raise InputError(f"--reference {args.reference} has another vocabulary than "
                                 f"--model {args.model}")
        reference.requires_grad_(False)
    lengths = end_token_ids(tokenizer, policy), args.max_prompt_length, args.max_response_length
    examples, counts = encode(train, tokenizer, *lengths)
    held_out = encode(held_out[:args.eval_limit], tokenizer, *lengths)[0] if held_out else []
    counts = {"dropped": sum(report["dropped"].values()) + counts.pop("dropped"), **report["dropped"],
              **counts}
    return policy.to(device), reference, tokenizer, reward, examples, held_out, counts


def save_model(policy, tokenizer, directory):
    """save_pretrained into `directory`, written aside and renamed: what stands there is whole, old or new."""
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    aside, old = directory.with_name("model.writing"), directory.with_name("model.old")
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    policy.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if directory.exists():
        directory.rename(old)
    aside.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


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


def evaluate_now(policy, reference, tokenizer, reward, held_out, args, out, step):
    """Evaluate on the held-out pairs; append to eval.jsonl, and eight samples to
    samples.jsonl; print a line."""
    from evaluate import evaluate_policy
    figures, samples = evaluate_policy(policy, reference, tokenizer, held_out, reward, args)
    write_line(out, "eval", {"step": step, **{name: mean for name, (mean, _) in figures.items()}})
    for row in samples[:8]:
        write_line(out, "samples", {"step": step, **row})
    tqdm.write(f"eval {step} | " + " | ".join(f"{name} {mean:.3f}" for name, (mean, _) in figures.items()))


def start(out, args, summary):
    """Say what the run will do, make its directory, save its arguments and empty its logs."""
    print(summary, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n", encoding="utf-8")
    for name in ("metrics", "eval", "samples"):
        (out / f"{name}.jsonl").write_text("")


def make_optimizer(policy, steps, args):
    """(optimizer, scheduler): linear warm-up, then constant or cosine."""
    optimizers = {"adamw": partial(torch.optim.AdamW, weight_decay=0.0, fused=True),
                  "rmsprop": torch.optim.RMSprop}
    optimizer = optimizers[args.optimizer](policy.parameters(), lr=args.learning_rate)
    warmup = max(1, steps // 10 if args.warmup_steps is None else args.warmup_steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min(1, (done + 1) / warmup) * (
            (1 + math.cos(math.pi * done / steps)) / 2 if args.schedule == "cosine" else 1))


def update(policy, optimizer, scheduler, max_grad_norm):
    """One optimizer step, unless the gradient is not finite; (gradient norm before
    clipping, learning rate)."""
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm).item()
    learning_rate = scheduler.get_last_lr()[0]
    if math.isfinite(grad_norm):              # the same on every rank: all step or none
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad()
    return grad_norm, learning_rate


def train(args):
    """The whole run: load, loop, save. Raises InputError on bad input and after ten
    non-finite gradients in a row."""
    rank, world, device = join_processes()
    policy, reference, tokenizer, reward, examples, held_out, counts = load_everything(args, device)
    total, steps = plan(len(examples), args)
    if total // max(steps, 1) < world:
        raise InputError(f"{total} pairs in {steps} steps are too few for {world} process(es); more "
                         "--epochs, or a larger --batch-size")
    out, own = Path(args.out), int(total * Fraction(str(args.mix)))
    if rank == 0:
        start(out, args, f"{args.data}: {len(examples)} pairs to train on, {len(held_out)} to evaluate on; "
              f"{counted(counts)}\n{args.variant}: {total - own} offline pairs + {own} on the variant's "
              f"route = {total} pairs, {steps} steps of {math.ceil(total / steps)}, processes: {world} "
              f"-> {out}")
    model = shared_by_ranks(policy) if world > 1 else policy
    optimizer, scheduler = make_optimizer(policy, steps, args)
    baseline = 0.0                                  # T2's: a running mean of past fresh pairs' utility
    if args.baseline == "running":
        baseline = utility(torch.zeros(()), args.beta, args.loss_type, args.target_margin).item()
    skipped = skipped_in_a_row = 0
    evaluate_at = partial(evaluate_now, policy, reference, tokenizer, reward, held_out, args, out)
    if rank == 0 and held_out and args.eval_every:
        evaluate_at(0)
    for step in tqdm(range(1, steps + 1), args.variant, disable=None if rank == 0 else True):
        started = time.perf_counter()
        torch.manual_seed((args.seed * 2**30 + step) * 2**10 + rank)    # a rollout depends on nothing else
        # 1. draw the global batch; take this rank's share
        batch = draw_pairs(examples, step, steps, total, args)
        pairs = batch[rank::world]
        # 2. roll out, 3. label
        pairs = roll_out(policy, tokenizer, pairs, args.max_response_length, args.num_responses,
                         args.temperature, args.dtype)
        rolled_out = time.perf_counter()
        if args.variant == "pr":
            label_by_reward(pairs, reward, args.preference)
        labelled = time.perf_counter()
        # 4. log-probabilities, loss, gradient of the mean over the global batch (DDP divides by `world`)
        if args.variant == "sft":
            losses_of = partial(sft_losses, model, args=args)
            scale = world / sum(len(pair["chosen_ids"]) for pair in batch)
        else:
            losses_of = partial(preference_losses, model, reference, args=args, baseline=baseline)
            scale = world / len(batch)
        totals = accumulate_gradients(model, losses_of, pairs, args.micro_batch_size or len(pairs), scale)
        totals = sum_over_ranks(Counter({**totals, **count(pairs, args.variant)}), device)
        # 5. step
        grad_norm, learning_rate = update(policy, optimizer, scheduler, args.max_grad_norm)
        skipped_in_a_row = 0 if math.isfinite(grad_norm) else skipped_in_a_row + 1
        skipped += skipped_in_a_row > 0
        if skipped_in_a_row == 10:
            raise InputError(f"step {step}: ten non-finite gradients in a row; lower --learning-rate, and "
                             f"see {out}/metrics.jsonl")
        if args.baseline == "running" and totals["on_policy"] and math.isfinite(totals["on_policy_loss"]):
            baseline += 0.1 * (-totals["on_policy_loss"] / totals["on_policy"] - baseline)
        # 6. log, evaluate
        if rank == 0:
            record = record_of(step, totals, args, grad_norm=grad_norm, learning_rate=learning_rate,
                               skipped=skipped, **counts, seconds=time.perf_counter() - started,
                               seconds_rollout=rolled_out - started, seconds_reward=labelled - rolled_out)
            log(out, record, steps, args.log_every)
            if held_out and (step == steps or args.eval_every and step % args.eval_every == 0):
                evaluate_at(step)
    if rank == 0:
        save_model(policy, tokenizer, out / "model")
        print(f"saved {out}/model", flush=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


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
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of arithmetic, not weights")
    add("--seed", type=number(int, 0, 2**20), default=0)
    add = parser.add_argument_group("output").add_argument
    add("--out", help="directory for args.json, metrics.jsonl, eval.jsonl, samples.jsonl and model/; what an "
        "earlier run left there is replaced (runs/DATA/VARIANT)")
    add("--log-every", type=number(int, 1), default=10, help="steps between printed lines (10)")
    add("--eval-every", type=number(int, 0), help="steps between evaluations (100; toy 20); 0: at the end")
    add("--eval-limit", type=number(int, 1), default=128, help="held-out pairs to evaluate on (128)")
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
    if args.variant == "pr" and args.mix > 0 and not args.reward:
        parser.error("argument --reward: pr needs one to label its samples; toy, FILE.py:FUNCTION or a "
                     "classifier")
    return args


def run_name(data):
    """The directory under runs/ for a data source: a file's stem, or a hub name with - for / and :."""
    return Path(data).stem if Path(data).exists() else data.replace("/", "-").replace(":", "-")


if __name__ == "__main__":
    command_line(lambda: train(parse_args()))
