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
from torch.nn.parallel import DistributedDataParallel

import sail
from sail import accumulate_gradients, join_processes, parse_args, preference_losses


def pairs_of(n, variant):
    """n pairs of random tokens, every second on the variant's route, as after rolling out and labelling."""
    generator = torch.Generator().manual_seed(7)

    def ids(longest):
        length = int(torch.randint(1, longest, (), generator=generator))
        return torch.randint(5, 261, (length,), generator=generator).tolist()

    on_policy, self_labelled = (sail.VARIANTS[variant][flag] for flag in ("on_policy", "self_labelled"))
    return [{"prompt_ids": ids(6), "chosen_ids": ids(9), "rejected_ids": ids(9), "draw": 0.3 + 0.05 * k,
             "preference": 0.5 if any(on_policy) and k == 2 else 1.0,
             "on_policy": on_policy if k % 2 == 0 else (False, False), "weight": 1.0,
             "self_labelled": self_labelled and k % 2 == 0} for k in range(n)]


def batch_gradient(n, variant, micro_batch_size, rank=0, world=1, label="expected"):
    """The gradient that sail.py's loop would step with, flattened, and the batch's summed metrics."""
    args = parse_args(["--variant", variant, "--label", label])
    policy, reference = tiny_model(seed=1), tiny_model(seed=2)
    model = DistributedDataParallel(policy, broadcast_buffers=False) if world > 1 else policy
    losses_of = partial(preference_losses, model, reference, args=args, baseline=-0.6)
    micros = sail.micro_batches(pairs_of(n, variant)[rank::world], micro_batch_size)
    totals = accumulate_gradients(model, losses_of, micros, world / n)
    return torch.cat([p.grad.flatten() for p in policy.parameters()]), sail.sum_over_ranks(totals, "cpu")


def write_gradients(file, rank, world):
    results = {}
    for variant, n, label in (("dpo", 8, "expected"), ("dpo", 7, "expected"), ("dp", 8, "expected"),
                              ("dp", 7, "expected"), ("dp", 7, "sampled"), ("pr", 7, "expected")):
        gradient, totals = batch_gradient(n, variant, 2, rank, world, label)
        results[f"{variant} {n} {label}"] = gradient.tolist(), totals
    if rank == 0:
        file.write_text(json.dumps(results))


def run_all(file, rank, world):
    policies, optimizers, gathered, make = [], [], [], sail.make_optimizer
    roll_out, met = sail.roll_out, (rank, world, torch.device("cpu"))
    sail.join_processes = lambda shard: met                    # once for all runs
    leave, sail.dist.destroy_process_group = sail.dist.destroy_process_group, lambda: None
    for arguments in json.loads(file.read_text()):
        args = parse_args(arguments)

        def recorded(*inputs, **options):
            pairs = roll_out(*inputs, **options)
            fresh = [pair["chosen_ids"] for pair in pairs if all(pair["on_policy"])]
            with open(Path(args.out, f"drawn-{rank}.jsonl"), "a") as drawn:
                drawn.write(json.dumps(fresh) + "\n")
            policies[:] = inputs[:1]
            gathered[:] = [sum(p.numel() * p.itemsize for p in inputs[0].parameters())]
            return pairs

        def make_optimizer(*inputs):
            optimizers[:] = make(*inputs)
            return optimizers

        sail.roll_out, sail.make_optimizer = recorded, make_optimizer
        sail.train(args)

        def own_bytes(tensors):
            return sum(t.to_local().nbytes for t in tensors if hasattr(t, "to_local"))

        states = [value for state in optimizers[0].state.values() for value in state.values()]
        Path(args.out, f"bytes-{rank}.json").write_text(json.dumps(dict(
            weights=own_bytes(policies[0].parameters()), optimizer=own_bytes(states), gathered=gathered[0])))
    sail.dist.destroy_process_group = leave


if __name__ == "__main__":
    rank, world, _ = join_processes()
    {"gradients": write_gradients, "runs": run_all}[sys.argv[1]](Path(sys.argv[2]), rank, world)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
