"""Make a reward model of preferences: Bradley-Terry on the pairs of any file that data.py reads.

    python experiments/reward_model.py --model M --data PAIRS --out DIR      # then sail.py --reward DIR/model

M is a causal language model, whose score head is drawn, or a sequence classifier with one logit.
"""
import math
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import SIDES, InputError, Parser, command_line, counted, number, seeded
from distributed import begin, log, log_figures, make_optimizer, replace, run_directory, say, update
from reward import classifier_logits, classifier_scores, load_classifier, mean_of, prefers_chosen, share_of
from toy import SFT_MODEL, train_and_held_out


def bradley_terry_loss(chosen, rejected):
    """−log P(chosen ≻ rejected), P = σ(r(x, chosen) − r(x, rejected)) (arXiv 1706.03741); rewards (B,) × 2 ->
    (B,)."""
    return -F.logsigmoid(chosen - rejected)


def encode_pairs(pairs, ids_of):
    """([(chosen, rejected)] as ids, how many were dropped by reason): those that a chat template refuses, and
    those whose difference was cut off."""
    encoded, dropped = [], Counter()
    for pair in pairs:
        try:
            chosen, rejected = (ids_of(pair["prompt"], pair[side]) for side in SIDES)
        except InputError:
            dropped["refused by the chat template"] += 1
            continue
        if chosen == rejected:
            dropped["same tokens in both responses"] += 1
        else:
            encoded.append((chosen, rejected))
    return encoded, dropped


def train(args):
    """Train a reward model, and evaluate it on held-out pairs before and after; returns it. Raises InputError
    on bad input, and where loss or gradient is not finite."""
    train_pairs, held_out, report = train_and_held_out(args.data, args.eval_data, args.limit, args.prefer)
    if any(pair[side] is None for pair in (train_pairs[0], *held_out[:1]) for side in SIDES):
        raise InputError(f"{args.eval_data or args.data}: a reward model needs pairs of responses throughout")
    torch.manual_seed(seeded("score head", args.seed))
    model, tokenizer, ids_of = load_classifier(
        str(SFT_MODEL) if args.model == "toy" else args.model, args.trust_remote_code, args.max_length,
        num_labels=1, dtype=torch.float32)
    # Others that load the model need an id to pad with. Whichever it is, training sees the same one.
    model.config.pad_token_id = next(token for token in (
        model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    model.to("cuda" if torch.cuda.is_available() else "cpu")           # in eval mode throughout: no dropout
    (pairs, dropped), (held_out, _) = encode_pairs(train_pairs, ids_of), encode_pairs(held_out, ids_of)
    if not pairs:
        raise InputError(f"{args.data}: no pair of {len(train_pairs)} can be told apart ({counted(dropped)})")
    out = Path(args.out or f"{run_directory(args.data)}-reward")
    lock, _ = begin(out, args)                                         # kept: it is open until the end
    generator = torch.Generator().manual_seed(seeded("reward model's order", args.seed))
    order = torch.cat([torch.randperm(len(pairs), generator=generator) for _ in range(args.epochs)])
    batches = order.tensor_split(math.ceil(len(order) / args.batch_size))      # they differ by one at most
    optimizer, scheduler = make_optimizer(
        model.parameters(), len(batches), args.learning_rate)
    say(f"{args.data}: {len(pairs)} pairs to train on, {len(held_out)} to evaluate on; dropped: "
        f"{counted(report['dropped'] + dropped)}\n{len(batches)} steps of {len(batches[0])} -> {out}")

    def evaluate_at(step):
        if held_out:
            ours, theirs = (torch.tensor(classifier_scores(model, side)) for side in zip(*held_out))
            log_figures(out, step, {"accuracy": share_of(prefers_chosen(ours - theirs).tolist()),
                                    "loss": mean_of(bradley_terry_loss(ours, theirs).tolist()),
                                    "margin": mean_of((ours - theirs).tolist())})

    evaluate_at(0)
    for step, batch in enumerate(tqdm(batches, "reward", disable=None), 1):
        sides = zip(*(pairs[place] for place in batch.tolist()))
        chosen, rejected = classifier_logits(model, [row for side in sides for row in side]).chunk(2)
        loss, margins = bradley_terry_loss(chosen, rejected).mean(), (chosen - rejected).detach()
        loss.backward()
        grad_norm, learning_rate, finite = update(model, optimizer, scheduler, 1.0, loss.item())
        record = dict(step=step, loss=loss.item(), accuracy=prefers_chosen(margins).mean().item(),
                      margin=margins.mean().item(), grad_norm=grad_norm, learning_rate=learning_rate)
        log(out, record, len(batches))
        if not finite:
            raise InputError(f"step {step}: loss or gradient not finite; try a lower --learning-rate")
    evaluate_at(len(batches))
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
    add("--batch-size", type=number(int, 1), default=32, help="pairs per step and forward (32)")
    add("--learning-rate", type=number(float, 1e-12), help="after a tenth of the steps (1e-5; toy 2e-4)")
    add("--overwrite", action="store_true", help="replace an earlier run in OUT")
    parser.shared("--data", "--eval-data", "--prefer", "--limit", "--seed", "--trust-remote-code")
    args = parser.parse_args()
    args.learning_rate = args.learning_rate or (2e-4 if args.data == "toy" else 1e-5)
    train(args)


if __name__ == "__main__":
    command_line(main)
