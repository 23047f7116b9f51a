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
import math
import time
from collections import Counter
from datetime import date
from fractions import Fraction
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

from data import (
    SIDES, InputError, Parser, collate, command_line, counted, length_table, number, read_json, seeded)

import torch
import torch.nn.functional as F
from tqdm import tqdm

from distributed import (begin, fingerprint, joined, log, make_optimizer, rank, run_directory,
                         save_checkpoint, save_model, say, share, stop_signals, sum_gradients, summed,
                         together, update, weighted)
from evaluate import count, evaluate_run, load_everything, record_of
from generate import load_policy, micro_batches, pair_logps, roll_out, sequence_logps
from reward import draw_toy_pairs, label_by_reward
from toy import SFT_MODEL, TOY_DEFAULTS, TOY_PAIRS, TOY_SFT, pairs_of

# --- the losses ---------------------------------------------------------------------------------------------


def implicit_reward(policy_logps, reference_logps, lengths, beta, loss_type):
    """r(x, y), (B,); u is a difference of two. simpo: β·log π / |y| (arXiv 2405.14734). orpo: the log-odds of
    the mean log-probability per token (2403.07691). These two need `lengths`, in tokens, and no reference.
    All others: DPO's β·(log π − log π_ref) (2305.18290, eq. 5)."""
    if loss_type == "simpo":
        return beta * policy_logps / lengths
    if loss_type == "orpo":
        mean = (policy_logps / lengths).clamp(max=-1e-6)               # certainty has infinite odds
        return mean - torch.log(-torch.expm1(mean))
    return beta * (policy_logps - reference_logps)


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


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *,
             beta=0.1, loss_type="sigmoid"):
    """DPO's loss (arXiv 2305.18290, eq. 7), (B,), of log π(y|x) summed over y's tokens, (B,) each."""
    margin = beta * ((policy_chosen_logps - reference_chosen_logps)
                     - (policy_rejected_logps - reference_rejected_logps))
    return -utility(margin, beta, loss_type)


def sail_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
              preference=None, on_policy=None, self_labelled=None, *,
              beta=0.1, response_coef=0.3, label_coef=0.2, loss_type="sigmoid", baseline=None,
              label_draws=None, chosen_lengths=None, rejected_lengths=None, target_margin=0.0):
    """SAIL's loss for every variant and utility (arXiv 2406.15567): a pair is where its responses and its
    label come from.

    *_logps        (B,)  log π(y|x) summed over y's tokens; the policy's with gradient, the others without
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
    Returns (losses, metrics): losses (B,), whose value is minus the pair's utility and whose gradient is
    −(T1 + response_coef·T2 + label_coef·T3); metrics, detached means over the pairs. margin and accuracy
    follow the label; label_reversed is the share of pairs, self-labelled, where T3 pushes against a label.
    """
    margin = (                                                        # u (B,)
        implicit_reward(policy_chosen_logps, reference_chosen_logps, chosen_lengths, beta, loss_type)
        - implicit_reward(policy_rejected_logps, reference_rejected_logps, rejected_lengths, beta, loss_type))
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

    u, ahead = margin.detach(), (margin.detach() > 0) + 0.5 * (margin.detach() == 0)
    past = torch.minimum(f_chosen, f_rejected).detach() * label_coef < -1   # T3's weight 1 + label_coef·f < 0
    metrics = {
        "loss": losses, "margin": (2 * p - 1) * u, "accuracy": p * ahead + (1 - p) * (1 - ahead),
        "chosen_logps": policy_chosen_logps, "rejected_logps": policy_rejected_logps,
        "on_policy": on_policy, "self_labelled": self_labelled, "label_reversed": self_labelled & past}
    return losses, {name: value.detach().to(margin.dtype).mean() for name, value in metrics.items()}


# --- one training step --------------------------------------------------------------------------------------


def preference_losses(policy, reference, pairs, args, baseline=None):
    """`sail_loss` of the pairs, plus the regularisers that are switched on: (losses (B,), metrics). nll: −log
    π per token of the data's chosen response. revkl: KL(π_ref ‖ π) per token of the pair's responses."""
    if args.revkl_coef:
        ours, theirs, revkl = pair_logps(policy, pairs, args.dtype, reference)                     # (2, B)
    else:
        with torch.no_grad():
            theirs = pair_logps(reference, pairs, args.dtype)
        ours, revkl = pair_logps(policy, pairs, args.dtype), torch.zeros_like(theirs)

    def column(value_of, dtype=None):
        return torch.tensor([value_of(pair) for pair in pairs], dtype=dtype, device=ours.device)

    lengths = column(lambda pair: (len(pair["chosen_ids"]), len(pair["rejected_ids"]))).T           # (2, B)
    on_policy = column(lambda pair: len(pair["sampled"]) == 2)
    self_labelled = column(itemgetter("self_labelled"))
    preference = column(itemgetter("preference"), ours.dtype)
    losses, metrics = sail_loss(
        *ours, *theirs, preference + args.label_smoothing * (1 - 2 * preference), on_policy, self_labelled,
        beta=args.beta, response_coef=args.response_coef, label_coef=args.label_coef,
        loss_type=args.loss_type, target_margin=args.target_margin, baseline=baseline,
        label_draws=column(itemgetter("draw")) if args.label == "sampled" else None,
        chosen_lengths=lengths[0], rejected_lengths=lengths[1])

    offline = column(lambda pair: "chosen" not in pair["sampled"] and not pair["self_labelled"])
    nll, revkl = offline * -ours[0] / lengths[0], revkl.sum(0) / lengths.sum(0)
    with torch.no_grad():
        kl = (ours - theirs).mean(0)                                   # of two samples, an estimate
        metrics.update(kl=(kl * on_policy).mean(), on_policy_loss=(losses * on_policy).mean(),
                       nll=nll.mean(), offline=offline.float().mean(), revkl=revkl.mean())
    return losses + args.nll_coef * nll + args.revkl_coef * revkl, metrics


def sft_losses(policy, pairs, args):
    """The negative log-likelihood of the chosen responses, summed over tokens: (losses (B,), metrics)."""
    device = next(policy.parameters()).device
    batch = collate([pair["prompt_ids"] for pair in pairs], [pair["chosen_ids"] for pair in pairs], device)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        logps = sequence_logps(policy, *batch)
    return -logps, {"loss": -logps.detach().mean(), "chosen_logps": logps.detach().mean()}


def accumulate_gradients(model, losses_of, micros, scale):
    """Back-propagate scale·Σ weight·losses of micro-batches [(pairs, weight)]; returns the metrics' sums."""
    totals = Counter()
    for pairs, weight in micros:
        losses, metrics = losses_of(pairs)
        (scale * weight * losses.sum()).backward()
        for name, value in metrics.items():
            totals[name] += value.item() * len(pairs) * (weight > 0)
    sum_gradients(model)
    return totals


def training_step(run, pairs, args):
    """One optimizer step on pairs that say what is to be `sampled` and whether they are `self_labelled`:
    (sums of their metrics, whether it was finite, more figures). run: what `train` has loaded and made."""
    started = time.perf_counter()
    # 1. roll out: the policy's own responses in the place of the data's
    run.policy.eval()
    drawn = together(lambda: roll_out(run.policy, run.tokenizer, pairs, args))
    rolled_out = time.perf_counter()
    # 2. label them by the reward; where the policy labels, sail_loss does it
    if args.variant == "pr":
        together(lambda: label_by_reward(drawn, run.reward, args.preference))
    labelled = time.perf_counter()
    # 3. log-probabilities, loss, gradient of the mean over the pairs (of SFT's loss, over their tokens)
    run.policy.train(args.gradient_checkpointing)                      # works in train mode only; no dropout
    losses_of = partial(sft_losses, run.policy, args=args) if args.variant == "sft" else partial(
        preference_losses, run.policy, run.reference, args=args, baseline=run.progress["baseline"])
    totals = summed(count(drawn, args.variant), run.device)
    over = totals["chosen_tokens" if args.variant == "sft" else "pairs"]
    micros = weighted(micro_batches(drawn, run.policy, args.micro_batch_size), run.policy)
    totals.update(summed(accumulate_gradients(run.policy, losses_of, micros, 1 / over), run.device))
    # 4. step, unless the loss or the gradient is not finite; move the baseline on
    grad_norm, learning_rate, finite = update(run.policy, run.optimizer, run.scheduler, args.max_grad_norm,
                                              totals["loss"])
    if args.baseline == "running" and totals["on_policy"] and math.isfinite(totals["on_policy_loss"]):
        mean_utility = -totals["on_policy_loss"] / totals["on_policy"]
        run.progress["baseline"] += 0.1 * (mean_utility - run.progress["baseline"])
    return totals, finite, dict(grad_norm=grad_norm, learning_rate=learning_rate,
                                seconds=time.perf_counter() - started, seconds_rollout=rolled_out - started,
                                seconds_reward=labelled - rolled_out)


# --- the run: which pairs, how many steps, what is logged ---------------------------------------------------

VARIANTS = {  # which responses are sampled, whether the policy labels; the settings of the authors' examples
    "sft": dict(sampled=(), self_labelled=False, mix=0.0, response_coef=0.0, label_coef=0.0),
    "dpo": dict(sampled=(), self_labelled=False, mix=0.0, response_coef=0.0, label_coef=0.0),
    "dp": dict(sampled=(), self_labelled=True, mix=0.4, response_coef=0.0, label_coef=0.2),
    "pp": dict(sampled=SIDES, self_labelled=True, mix=0.3, response_coef=0.2, label_coef=0.2),
    "pr": dict(sampled=SIDES, self_labelled=False, mix=0.3, response_coef=0.3, label_coef=0.0),
    "spin": dict(sampled=SIDES[1:], self_labelled=False, mix=1.0, response_coef=0.0, label_coef=0.0)}


def plan(n_pairs, args):
    """(pairs in all, steps): every offline pair is seen `epochs` times, the variant's own come on top."""
    if args.steps:
        return args.steps * args.batch_size, args.steps
    mix, offline = Fraction(str(args.mix)), int(args.epochs * n_pairs)
    total = int(offline if mix == 1 else offline / (1 - mix))
    return total, math.ceil(total / args.batch_size)


@lru_cache(maxsize=4)
def order_of(n_pairs, seed, route, epoch):
    """The order in which an epoch visits the pairs; the variant's own are shuffled apart."""
    generator = torch.Generator().manual_seed(seeded("order", seed, route, epoch))
    return torch.randperm(n_pairs, generator=generator).tolist()


def draw_pairs(examples, step, steps, total, args):
    """The pairs of one step, of all processes, flagged with their route; steps differ by one pair at most."""
    mix, variant = Fraction(str(args.mix)), VARIANTS[args.variant]
    generator = torch.Generator().manual_seed(seeded("label draws", args.seed, step))
    pairs = []
    for k in range(total * (step - 1) // steps, total * step // steps):
        route = int((k + 1) * mix) - int(k * mix)                   # 1 for `mix` of the pairs, evenly spread
        nth = int(k * mix) if route else k - int(k * mix)
        index = order_of(len(examples), args.seed, route, nth // len(examples))[nth % len(examples)]
        pairs.append({**examples[index], "preference": 1.0, "sampled": variant["sampled"] if route else (),
                      "self_labelled": bool(route and variant["self_labelled"]),
                      "draw": torch.rand((), generator=generator).item()})
    return sorted(pairs, key=itemgetter("sampled"))                 # for shares with as many of each kind


def train(args, device):
    """The whole run: load, loop, save. InputError: bad input, a failing reward, ten steps not finite."""
    run, out = SimpleNamespace(device=device), Path(args.out)
    args.date = args.date or date_of(out, args.resume)
    (run.policy, run.reference, run.tokenizer, run.reward, run.examples, run.held_out,
     run.counts, lengths) = load_everything(args, device)
    total, steps = plan(len(run.examples), args)
    share(range(total // max(steps, 1)))                               # complains where it is too little
    args.data_sha256 = fingerprint([*run.examples, *run.held_out])
    parameters = list(run.policy.parameters())
    run.optimizer, run.scheduler = make_optimizer(parameters, steps, args.learning_rate, args.optimizer,
                                                  args.schedule, args.warmup_steps)
    f_zero = utility(torch.zeros(()), args.beta, args.loss_type, args.target_margin).item()
    fresh = dict(step=0, skipped=0, in_a_row=0, total=total, steps=steps,
                 baseline=f_zero if args.baseline == "running" else 0.0)
    run.lock, run.progress = together(lambda: begin(out, args, fresh, run.policy, run.optimizer,
                                                    run.scheduler))
    limits = dict(prompt=args.max_prompt_length, chosen=args.max_response_length,
                  rejected=args.max_response_length)
    own, size = int(total * Fraction(str(args.mix))), sum(p.numel() for p in parameters)
    say(f"{args.model} on {device}: {sum(p.numel() for p in parameters if p.requires_grad):,} of {size:,} "
        f"parameters are trained\n{args.data}: {len(run.examples)} pairs to train on, {len(run.held_out)} to "
        f"evaluate on; {counted(+run.counts)}\n{length_table(lengths, 'tokens', limits)}\n"
        f"{args.variant}: {total - own} offline pairs + {own} on the "
        f"variant's route = {total} pairs, {steps} steps of {math.ceil(total / steps)} -> {out}")
    run.stopped = stop_signals()
    try:
        loop(run, out, args)
    except InputError as error:
        if not run.progress["step"]:
            raise
        save_checkpoint(out, run.policy, run.optimizer, run.progress)
        raise InputError(f"{error} (step {run.progress['step']} is saved; --resume continues)") from None
    if run.progress["step"] < steps:
        say(f"stopped after step {run.progress['step']}, which is saved; --resume continues")
        raise SystemExit(max(run.stopped, default=0))
    save_model(run.policy, run.tokenizer, out, lambda: load_policy(args.model, "cpu", args.trust_remote_code))
    code = f" --reward {args.reward}" * (".py:" in (args.reward or ""))
    say(f"saved {out}/model; `python evaluate.py {out}{code}` samples from it and sets it beside other runs")


def date_of(out, resume):
    """The date that a run's chat template is told: today, or that on which it began."""
    if resume and (out / "args.json").is_file():
        return read_json(out / "args.json").get("date")
    return date.today().isoformat()


def say_how_long(seconds, evaluation, steps, args, device):
    """After the first step, how long the run will take, and, where that is long, what makes it shorter."""
    evaluations = 1 + (steps // args.eval_every if args.eval_every else 0)
    total = seconds * steps + evaluation * evaluations
    say(f"the first step took {seconds:.1f} s, an evaluation {evaluation:.1f} s: about {total / 60:.0f} min "
        f"for {counted({'step(s)': steps, 'evaluation(s)': evaluations})}")
    if seconds > 60 or device.type == "cpu" and total > 1200:
        say(f"for a shorter run: --batch-size ({args.batch_size}), --max-response-length "
            f"({args.max_response_length}), --max-prompt-length ({args.max_prompt_length}), --steps, "
            f"--eval-limit ({args.eval_limit}), --eval-every ({args.eval_every}), --lora")


def loop(run, out, args):
    """The steps that are left, with logs, evaluations and checkpoints; ends early on SIGTERM or SIGINT."""
    progress, steps = run.progress, run.progress["steps"]
    started, first = time.perf_counter(), progress["step"] + 1
    if progress["step"] == 0 and args.eval_every:
        together(lambda: evaluate_run(run, out, 0, args))
    evaluated = time.perf_counter() - started
    for step in tqdm(range(progress["step"] + 1, steps + 1), args.variant, steps, initial=progress["step"],
                     disable=None if rank() == 0 else True):
        torch.manual_seed(seeded("samples", args.seed, step, rank()))
        pairs = share(draw_pairs(run.examples, step, steps, progress["total"], args))
        totals, finite, figures = training_step(run, pairs, args)
        progress.update(step=step, skipped=progress["skipped"] + (not finite),
                        in_a_row=0 if finite else progress["in_a_row"] + 1)
        figures.update(skipped=progress["skipped"], **run.counts)
        log(out, record_of(step, totals, args, **figures), steps)
        if step == first:
            say_how_long(figures["seconds"], evaluated, steps - first + 1, args, run.device)
        if progress["in_a_row"] >= 10:
            raise InputError(f"steps {step - 9} to {step}: loss or gradient not finite; lower the rate")
        if step == steps or args.eval_every and step % args.eval_every == 0:
            together(lambda: evaluate_run(run, out, step, args))
        stopped = summed(Counter(stopped=len(run.stopped)), run.device)["stopped"]
        if stopped or args.save_every and (step % args.save_every == 0 or step == steps):
            save_checkpoint(out, run.policy, run.optimizer, progress)
        if stopped:
            return


# --- the command line ---------------------------------------------------------------------------------------

DEFAULTS = dict(epochs=1.0, batch_size=32, schedule="constant", eval_every=100, eval_limit=128, beta=0.1,
                max_prompt_length=512, max_response_length=512, revkl_coef=0.0)


def parse_args(argv=None):
    """The command line, checked and completed with the defaults that depend on data and variant."""
    parser = Parser("Train a language model by SFT, DPO or SAIL's DP, PP and PR. Defaults in brackets.")
    positive, weight, whole = number(float, 1e-12), number(float, 0), number(int, 1)
    add = parser.add_argument_group("method (mix and weights: the authors' examples)").add_argument
    add("--variant", choices=[*VARIANTS], default="pr", help="who responds, and who labels (pr)")
    add("--mix", type=number(float, 0, 1), help="share of own pairs (dp 0.4, pp pr 0.3)")
    add("--response-coef", type=weight, help="weight of T2 (pp 0.2, pr 0.3); pr at 0: online DPO")
    add("--label-coef", type=weight, help="weight of T3 (dp pp 0.2)")
    add("--label", choices=["expected", "sampled"], default="expected", help="average over it, or draw")
    add("--baseline", choices=["running", "none"], default="running", help="of T2: mean of past f, or 0")
    add("--preference", choices=["soft", "hard"], default="soft", help="σ(reward difference), or 1 (soft)")
    add("--beta", type=positive, help="weight of the KL penalty (0.1; toy 0.5)")
    add("--loss-type", choices="sigmoid ipo hinge simpo orpo".split(), default="sigmoid", help="f (sigmoid)")
    add("--target-margin", type=weight, default=0.0, help="of simpo (0)")
    add("--label-smoothing", type=number(float, 0, 0.5), default=0.0, help="ε of conservative DPO (0)")
    add("--nll-coef", type=weight, default=0.0, help="weight of −log π per chosen token (0)")
    add("--revkl-coef", type=weight, help="weight of KL(π_ref‖π) per token (0; toy pp 0.3)")
    add = parser.add_argument_group("models and data").add_argument
    add("--model", default="toy", help="a directory or hub name, or toy, which is made (toy)")
    add("--reference", help="what KL is measured to (--model as it starts)")
    add("--lora", type=whole, metavar="RANK", help="train a LoRA adapter of this rank (needs peft)")
    add("--reward", help="FILE.py:FUNCTION, a one-logit classifier, or toy")
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
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="to compute in")
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
    parser.set_defaults(may_change=[flag.dest for flag in may_change] + ["may_change", "steps", "epochs"])
    return completed(parser.parse_args(argv), parser)


def completed(args, parser):
    """The arguments, with the defaults that depend on data and variant; what cannot work is an error."""
    toy, sft, variant = args.data in ("toy", "toy:grammar"), args.variant == "sft", VARIANTS[args.variant]
    args.model = str(SFT_MODEL) if args.model == "toy" and not sft else args.model
    defaults = {**DEFAULTS, **variant, "reference": None if sft else args.model,
                "out": f"{run_directory(args.data)}/{args.variant}"}
    defaults["learning_rate"] = 2e-5 if sft else 1e-5 if args.lora else 1e-6    # theirs, theirs, ours
    if toy:
        defaults.update(TOY_SFT if sft else TOY_DEFAULTS)
        defaults["revkl_coef"] = 0.3 if args.variant == "pp" else 0.0       # PP alone has no ceiling
    if args.data == "toy" and not sft:
        args.data, args.eval_data = f"{args.model}/{TOY_PAIRS}", args.eval_data or "toy:test"
    vars(args).update({name: defaults.get(name) for name, value in vars(args).items() if value is None})
    args.mix *= variant["mix"] > 0                  # sft and dpo have no route of their own
    sampled = variant["sampled"] if args.mix == 1 else ()
    args.needs = ["chosen"] if sft else [side for side in SIDES if side not in sampled]
    wrong = {"--target-margin: only simpo has one": args.target_margin and args.loss_type != "simpo",
             "--overwrite: deletes what --resume continues; give one of them": args.overwrite and args.resume,
             "--lora: the toy's SFT model has no base to adapt": args.lora and args.model == "toy",
             "--reward: pr needs one to label its samples; toy, FILE.py:FUNCTION or a classifier":
             args.variant == "pr" and args.mix > 0 and not args.reward}
    for message in filter(wrong.get, wrong):
        parser.error(f"argument {message}")
    return args


def main(argv=None):
    """`python sail.py …`, alone or under torchrun. Makes the toy's SFT model and pairs where missing."""
    args = parse_args(argv)
    with joined(args.shard) as device:
        drawn = Path(args.data).name == TOY_PAIRS
        together(lambda: drawn or pairs_of(args.data, 1))         # bad data is named before there is work
        if args.model == str(SFT_MODEL) and not together(SFT_MODEL.is_dir):
            say(f"toy: no SFT model in {SFT_MODEL} yet; training it, once")
            train(parse_args(["--variant", "sft", "--resume"]), device)
        if drawn and not together(Path(args.data).is_file):
            say(f"toy: drawing pairs from {args.model} into {args.data}, once")
            together(lambda: draw_toy_pairs(args.model, args.data) if rank() == 0 else None)
        train(args, device)


if __name__ == "__main__":
    command_line(main)
