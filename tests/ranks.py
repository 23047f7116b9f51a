"""Run by torchrun from the tests, on two ranks.

    ranks.py gradients FILE     the gradient of one global batch, shared by the ranks, into a file
    ranks.py runs FILE          sail.py with each list of arguments in the file; what each rank draws goes
                                into its --out
"""
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from conftest import as_settings, run_of, sail_args, tiny_model

import evaluate
import generate
import reward
import sail
from data import Pair
from runtime.processes import process_group, rank, share_of_process
from sail import accumulate_gradients


def pairs_of(n, variant):
    """(pairs of the data, pairs on the variant's way): n pairs of random tokens in turn, as after rolling out
    and labelling."""
    generator = torch.Generator().manual_seed(7)

    def ids(longest):
        length = int(torch.randint(1, longest, (), generator=generator))
        return torch.randint(5, 261, (length,), generator=generator).tolist()

    variant, data_pairs, variant_pairs = sail.VARIANTS[variant], [], []
    for k in range(n):
        pair = Pair("", "", "", ids(6), ids(9), ids(9), label_draw=0.3 + 0.05 * k)
        if k % 2 == 0:
            pair.on_policy, pair.self_labelled = variant.responses == "policy", variant.label == "policy"
            pair.preference = 0.5 if pair.on_policy and k == 2 else 1.0
            variant_pairs.append(pair)
        else:
            data_pairs.append(pair)
    return data_pairs, variant_pairs


def batch_gradient(n, variant, micro_batch_size, label="expected"):
    """The gradient that sail.py's loop would step with, flattened, and the batch's summed metrics."""
    args = sail_args(["--variant", variant, "--label", label])
    run = run_of(tiny_model(seed=1), tiny_model(seed=2), -0.6, micro_batch_size=micro_batch_size)
    data_pairs, variant_pairs = share_of_process(*pairs_of(n, variant))
    totals = accumulate_gradients(run, data_pairs + variant_pairs, args)
    return torch.cat([p.grad.flatten() for p in run.policy.parameters()]), totals


def write_gradients(file, device):
    results = {}
    for variant, n, label in (("dpo", 8, "expected"), ("dpo", 7, "expected"), ("dp", 8, "expected"),
                              ("dp", 7, "expected"), ("pr", 7, "sampled"), ("pr", 7, "expected")):
        gradient, totals = batch_gradient(n, variant, 2, label)
        results[f"{variant} {n} {label}"] = gradient.tolist(), totals
    if rank() == 0:
        file.write_text(json.dumps(results))


def run_all(file, device):
    optimizers, sizes = [], {}
    roll_out, sample, make = sail.roll_out, generate.sample, sail.make_optimizer

    def own_bytes(tensors):
        return sum(t.to_local().nbytes for t in tensors if hasattr(t, "to_local"))

    def sampled(policy, *inputs, **options):                                      # while it is gathered
        sizes.update(gathered=sum(p.numel() * p.itemsize for p in policy.parameters()))
        return sample(policy, *inputs, **options)

    def answered(policy, tokenizer, prompts, *inputs, **options):                 # in an evaluation
        sizes["answered"].append(len(prompts))
        return sample(policy, tokenizer, prompts, *inputs, **options)

    def make_optimizer(*inputs):
        optimizers[:] = made = make(*inputs)
        return made

    generate.sample, evaluate.sample, sail.make_optimizer = sampled, answered, make_optimizer
    for arguments in json.loads(file.read_text()):
        if "--train" in arguments:
            flags, chosen = as_settings(arguments)
            reward.train_reward(reward.parse_args(flags, **chosen))
            continue
        args, sizes["answered"] = sail_args(arguments), []

        def recorded(policy, *inputs, args=args):
            sizes.update(weights=own_bytes(policy.parameters()), packed=generate.is_packed(policy),
                         ends=policy.generation_config.eos_token_id)
            pairs = roll_out(policy, *inputs)
            fresh = [pair.chosen_ids for pair in pairs if pair.on_policy]
            with open(Path(args.out, f"drawn-{rank()}.jsonl"), "a") as drawn:
                drawn.write(json.dumps(fresh) + "\n")
            return pairs

        sail.roll_out = recorded
        sail.train(args)
        states = [value for state in optimizers[0].state.values() for value in state.values()]
        sizes["optimizer"] = own_bytes(states)
        Path(args.out, f"bytes-{rank()}.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    with process_group() as device:
        {"gradients": write_gradients, "runs": run_all}[sys.argv[1]](Path(sys.argv[2]), device)
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)                 # gloo can abort an interpreter that ends (pytorch/pytorch#179291)
