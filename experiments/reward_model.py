"""Make a reward model of preferences: Bradley-Terry on the pairs of any file that data.py reads.

    python experiments/reward_model.py --model M --data PAIRS --out DIR      # then sail.py --reward DIR/model

M is a causal language model, whose score head is drawn, or a sequence classifier with one logit.
"""
import math
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import (SIDES, BadRow, InputError, Parser, command_line, counted, length_table, number, read_json,
                  seeded)
from distributed import (begin, fingerprint, log, log_figures, make_optimizer, replace, run_directory,
                         save_checkpoint, say, stop_signals, sum_gradients, update)
from reward import classifier_logits, classifier_scores, load_classifier, mean_of, prefers_chosen, share_of
from toy import SFT_MODEL, train_and_held_out


def bradley_terry_loss(chosen, rejected):
    """−log P(chosen ≻ rejected), P = σ(r(x, chosen) − r(x, rejected)) (arXiv 1706.03741); rewards (B,) × 2 ->
    (B,)."""
    return -F.logsigmoid(chosen - rejected)


def encode_pairs(pairs, ids_of):
    """([(chosen, rejected)] as ids, counts, lengths in tokens): the counts are of dialogues that were cut,
    and of pairs dropped as a chat template refuses them, or as their difference was cut off."""
    encoded, counts, lengths = [], Counter(), {side: [] for side in SIDES}
    for pair in pairs:
        try:
            (chosen, chosen_cut), (rejected, rejected_cut) = (ids_of(pair["prompt"], pair[side])
                                                              for side in SIDES)
        except BadRow as reason:
            counts[str(reason)] += 1
            continue
        counts["dialogues cut from the left"] += chosen_cut + rejected_cut
        lengths["chosen"].append(len(chosen))
        lengths["rejected"].append(len(rejected))
        if chosen == rejected:
            counts["same tokens in both responses"] += 1
        else:
            encoded.append((chosen, rejected))
    return encoded, +counts, lengths


def evaluate_at(step, model, held_out, out):
    """Log accuracy, loss and margin on the held-out pairs."""
    if held_out:
        chosen = torch.tensor(classifier_scores(model, [pair[0] for pair in held_out]))
        rejected = torch.tensor(classifier_scores(model, [pair[1] for pair in held_out]))
        log_figures(out, step, {"accuracy": share_of(prefers_chosen(chosen - rejected).tolist()),
                                "loss": mean_of(bradley_terry_loss(chosen, rejected).tolist()),
                                "margin": mean_of((chosen - rejected).tolist())}, len(held_out))


def training_step(model, pairs, optimizer, scheduler, args):
    """One optimizer step on pairs of ids, a few a forward; (its figures, whether it was finite)."""
    started = time.perf_counter()
    losses, margins = [], []
    for micro in torch.arange(len(pairs)).split(args.micro_batch_size):
        rows = [pairs[place][side] for side in (0, 1) for place in micro.tolist()]
        chosen, rejected = classifier_logits(model, rows).chunk(2)
        loss = bradley_terry_loss(chosen, rejected)
        (loss.sum() / len(pairs)).backward()
        losses += loss.tolist()
        margins.append((chosen - rejected).detach())
    sum_gradients(model)
    loss, margins = sum(losses) / len(losses), torch.cat(margins)
    grad_norm, learning_rate, finite = update(model, optimizer, scheduler, 1.0, loss)
    return dict(loss=loss, accuracy=prefers_chosen(margins).mean().item(), margin=margins.mean().item(),
                grad_norm=grad_norm, learning_rate=learning_rate,
                seconds=time.perf_counter() - started), finite


def train(args):
    """Train a reward model, and evaluate it on held-out pairs before and after; returns it. Raises InputError
    on bad input, and where loss or gradient is not finite."""
    train_pairs, held_out, report = train_and_held_out(args.data, args.eval_data, args.limit, args.prefer)
    if any(pair[side] is None for pair in (train_pairs[0], *held_out[:1]) for side in SIDES):
        raise InputError(f"{args.eval_data or args.data}: a reward model needs pairs of responses throughout")
    out = Path(args.out or f"{run_directory(args.data)}-reward")
    if args.resume and (out / "args.json").is_file():
        args.date = args.date or read_json(out / "args.json").get("date")
    args.date = args.date or date.today().isoformat()
    torch.manual_seed(seeded("score head", args.seed))
    model, tokenizer, ids_of = load_classifier(
        str(SFT_MODEL) if args.model == "toy" else args.model, args.trust_remote_code, args.max_length,
        args.date, num_labels=1)
    # Others that load the model need an id to pad with. Whichever it is, training sees the same one.
    model.config.pad_token_id = next(token for token in (
        model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    model.to("cuda" if torch.cuda.is_available() else "cpu")           # in eval mode throughout: no dropout
    pairs, counts, lengths = encode_pairs(train_pairs, ids_of)
    held_out, *_ = encode_pairs(held_out, ids_of)
    if not pairs:
        raise InputError(f"{args.data}: no pair of {len(train_pairs)} can be told apart ({counted(counts)})")
    generator = torch.Generator().manual_seed(seeded("reward model's order", args.seed))
    order = torch.cat([torch.randperm(len(pairs), generator=generator) for _ in range(args.epochs)])
    steps = math.ceil(len(order) / args.batch_size)
    batches = order.tensor_split(steps)                                # they differ by one at most
    optimizer, scheduler = make_optimizer(model.parameters(), steps, args.learning_rate)
    args.data_sha256 = fingerprint([dict(prompt_ids=[], chosen_ids=chosen, rejected_ids=rejected)
                                    for chosen, rejected in [*pairs, *held_out]])
    fresh = dict(step=0, skipped=0, total=len(order), steps=steps)
    lock, progress = begin(out, args, fresh, model, optimizer, scheduler)     # kept: it is open to the end
    say(f"{args.data}: {len(pairs)} pairs to train on, {len(held_out)} to evaluate on; dropped: "
        f"{counted(report['dropped'] + counts)}\n{length_table(lengths, 'tokens')}\n"
        f"{steps} steps of {len(batches[0])} -> {out}")
    stopped = stop_signals()
    if progress["step"] == 0:
        evaluate_at(0, model, held_out, out)
    for step in tqdm(range(progress["step"] + 1, steps + 1), "reward", steps, initial=progress["step"],
                     disable=None):
        batch = [pairs[place] for place in batches[step - 1].tolist()]
        figures, finite = training_step(model, batch, optimizer, scheduler, args)
        log(out, dict(step=step, **figures), steps)
        if not finite:
            raise InputError(f"step {step}: loss or gradient not finite; try a lower --learning-rate")
        progress["step"] = step
        if step == steps:
            evaluate_at(step, model, held_out, out)
        if stopped or args.save_every and (step % args.save_every == 0 or step == steps):
            save_checkpoint(out, model, optimizer, progress)
        if stopped and step < steps:
            say(f"stopped after step {step}, which is saved; --resume continues")
            raise SystemExit(max(stopped))
    replace(out / "model", lambda aside: (model.save_pretrained(aside), tokenizer.save_pretrained(aside)))
    print(f"saved {out}/model; sail.py --variant pr --reward {out}/model uses it")
    return model


def main():
    """`python experiments/reward_model.py --model M --data D --out DIR`."""
    parser = Parser("Make a reward model of preferences.")
    add = parser.add_argument
    add("--model", default="toy", help="a causal language model or one-logit classifier (the toy's SFT)")
    add("--out", help="directory of model/, args.json and the logs (runs/DATA-reward)")
    add("--max-length", type=number(int, 1), help="tokens of a dialogue; cut from the left, also when served")
    add("--epochs", type=number(int, 1), default=1, help="(1)")
    add("--batch-size", type=number(int, 1), default=32, help="pairs per step (32)")
    add("--learning-rate", type=number(float, 1e-12), help="after a tenth of the steps (1e-5; toy 2e-4)")
    parser.shared("--data", "--eval-data", "--prefer", "--limit", "--date", "--seed", "--trust-remote-code")
    may_change = [
        add("--micro-batch-size", type=number(int, 1), default=4, metavar="N", help="pairs per forward (4)"),
        add("--save-every", type=number(int, 1), metavar="N", help="a checkpoint every N steps; two stay"),
        add("--resume", action="store_true", help="continue from OUT's newest checkpoint, if any"),
        add("--overwrite", action="store_true", help="replace an earlier run in OUT")]
    parser.set_defaults(may_change=[flag.dest for flag in may_change] + ["may_change"], schedule="constant")
    args = parser.parse_args()
    args.learning_rate = args.learning_rate or (2e-4 if args.data == "toy" else 1e-5)
    train(args)


if __name__ == "__main__":
    command_line(main)
