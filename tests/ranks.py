"""Run by torchrun from the tests, on two ranks.

    ranks.py gradients FILE     the gradient of one global batch, shared by the ranks, into a file
    ranks.py runs FILE          sail.py with each list of arguments in the file; what each rank draws goes
                                into its --out
"""
import json
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from conftest import tiny_model

import distributed
import generate
import sail
from sail import accumulate_gradients, parse_args, preference_losses


def pairs_of(n, variant):
    """n pairs of random tokens, every second on the variant's route, as after rolling out and labelling."""
    generator = torch.Generator().manual_seed(7)

    def ids(longest):
        length = int(torch.randint(1, longest, (), generator=generator))
        return torch.randint(5, 261, (length,), generator=generator).tolist()

    sampled, self_labelled = (sail.VARIANTS[variant][flag] for flag in ("sampled", "self_labelled"))
    return [{"prompt_ids": ids(6), "chosen_ids": ids(9), "rejected_ids": ids(9), "draw": 0.3 + 0.05 * k,
             "preference": 0.5 if sampled and k == 2 else 1.0, "sampled": sampled if k % 2 == 0 else (),
             "self_labelled": self_labelled and k % 2 == 0} for k in range(n)]


def batch_gradient(n, variant, micro_batch_size, label="expected"):
    """The gradient that sail.py's loop would step with, flattened, and the batch's summed metrics."""
    args = parse_args(["--variant", variant, "--label", label])
    policy, reference = tiny_model(seed=1), tiny_model(seed=2)
    model = policy
    losses_of = partial(preference_losses, model, reference, args=args, baseline=-0.6)
    micros = generate.micro_batches(distributed.share(pairs_of(n, variant)), policy, micro_batch_size)
    totals = accumulate_gradients(model, losses_of, distributed.weighted(micros, policy), 1 / n)
    return torch.cat([p.grad.flatten() for p in policy.parameters()]), distributed.summed(totals, "cpu")


def write_gradients(file, device):
    results = {}
    for variant, n, label in (("dpo", 8, "expected"), ("dpo", 7, "expected"), ("dp", 8, "expected"),
                              ("dp", 7, "expected"), ("dp", 7, "sampled"), ("pr", 7, "expected")):
        gradient, totals = batch_gradient(n, variant, 2, label)
        results[f"{variant} {n} {label}"] = gradient.tolist(), totals
    if distributed.rank() == 0:
        file.write_text(json.dumps(results))


def run_all(file, device):
    rank, optimizers, sizes = distributed.rank(), [], {}
    roll_out, sample, make = sail.roll_out, generate.sample, sail.make_optimizer

    def own_bytes(tensors):
        return sum(t.to_local().nbytes for t in tensors if hasattr(t, "to_local"))

    def sampled(policy, *inputs):                                      # while it is gathered
        sizes.update(gathered=sum(p.numel() * p.itemsize for p in policy.parameters()))
        return sample(policy, *inputs)

    def make_optimizer(*inputs):
        optimizers[:] = made = make(*inputs)
        return made

    generate.sample, sail.make_optimizer = sampled, make_optimizer
    for arguments in json.loads(file.read_text()):
        args = parse_args(arguments)

        def recorded(policy, *inputs):
            sizes.update(weights=own_bytes(policy.parameters()))
            pairs = roll_out(policy, *inputs)
            fresh = [pair["chosen_ids"] for pair in pairs if len(pair["sampled"]) == 2]
            with open(Path(args.out, f"drawn-{rank}.jsonl"), "a") as drawn:
                drawn.write(json.dumps(fresh) + "\n")
            return pairs

        sail.roll_out = recorded
        sail.train(args, device)
        states = [value for state in optimizers[0].state.values() for value in state.values()]
        Path(args.out, f"bytes-{rank}.json").write_text(json.dumps({**sizes, "optimizer": own_bytes(states)}))


if __name__ == "__main__":
    with distributed.joined() as device:
        {"gradients": write_gradients, "runs": run_all}[sys.argv[1]](Path(sys.argv[2]), device)
        torch.distributed.barrier()
