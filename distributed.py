"""What a big or a long run needs and no reader of the method: processes, shards, logs, checkpoints.

torchrun starts the processes; each works on its share of a step's pairs. A run is a directory: args.json, logs of
JSON lines, checkpoints/STEP, model/. What stands there under its own name is whole, as it is written aside and
renamed. Random states are not saved, since each step's are made of seed, step and rank; nor is the position in the
data, which follows from the step.
"""
import fcntl
import hashlib
import json
import math
import os
import shutil
import warnings
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

from data import InputError, first_line

# --- processes ----------------------------------------------------------------------------------------------


@contextmanager
def joined(shard=False):
    """The device of this process, which has met torchrun's others while inside; with `shard` it also meets
    itself alone, as FSDP needs."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if shard or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **alone,
                                timeout=timedelta(hours=2))            # the first's evaluations may take long
    try:
        yield device
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise OSError(f"rank {rank()} has lost another process ({first_line(error)[-60:]}); --resume continues from "
                      "the last checkpoint") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    """Whether this is the process that speaks and writes."""
    return rank() == 0


def say(line):
    """Print a line, once for all processes."""
    if is_first():
        tqdm.write(line)


def together(action=lambda: None):
    """action(), on every process; where it raises InputError on one, all raise that."""
    problems, result = [None], None
    try:
        result = action()
    except InputError as error:
        problems = [str(error)]
    if dist.is_initialized():
        own, problems = problems[0], problems * world()
        dist.all_gather_object(problems, own)
        dist.barrier()                    # gloo's threads must be done with the objects before a process ends
    for problem in filter(None, problems):
        raise InputError(problem)
    return result


def in_turns(action):
    """action(), by one process of a node after the other, as each needs much of the node's memory for it."""
    results = [together(lambda: action() if turn == int(os.environ.get("LOCAL_RANK", 0)) else None)
               for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))]
    return next(result for result in results if result is not None)


def share(pairs):
    """This process's share of a step's pairs. Raises InputError where there are fewer than processes."""
    if len(pairs) < world():
        raise InputError(f"{len(pairs)} pairs a step are too few for {world()} processes; want a larger --batch-size")
    return pairs[rank()::world()]


def seed_samples(seed, step):
    """Seed what this process draws in this step."""
    torch.manual_seed((seed * 2**30 + step) * 2**10 + rank())


def summed(totals, device):
    """A Counter of floats, summed over the processes; all must hold the same keys."""
    if not dist.is_initialized():
        return totals
    names = sorted(totals)
    values = torch.tensor([float(totals[name]) for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return Counter(dict(zip(names, values.tolist())))


def data_parallel(policy):
    """What to train: the policy in DistributedDataParallel, or itself, where it is alone or sharded."""
    if world() == 1 or is_sharded(policy):
        return policy
    with warnings.catch_warnings(action="ignore", category=FutureWarning):    # torch 2.13 renames the option
        return torch.nn.parallel.DistributedDataParallel(policy, broadcast_buffers=False)


# --- shards -------------------------------------------------------------------------------------------------

def is_sharded(model):
    """Whether `shard` has split it: FSDP adds this method."""
    return hasattr(model, "reshard")


def shard(model, dtype="float32"):
    """Split the model's parameters over the processes, decoder layer by decoder layer (FSDP2), in place. Each process
    holds its part in float32; layers are gathered in `dtype` while they compute."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    bfloat16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bfloat16 if dtype == "bfloat16" else MixedPrecisionPolicy()
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters())):     # the decoder's
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


@contextmanager
def gathered(model):
    """While inside, each process has a whole copy of a sharded model, in its compute dtype, and calls it as often as
    it likes: no call needs the other processes. For other models, nothing."""
    parts = [module for module in model.modules() if is_sharded(module)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    if parts:
        with torch.no_grad():                                          # all together: it gathers all parts
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def weighted(micros, model):
    """The micro-batches as (pairs, weight), the weight the number of processes, by which DDP and FSDP divide
    the gradient. A sharded model's collectives demand as many on every process: what is added weighs 0."""
    most = torch.tensor(len(micros), device=next(model.parameters()).device)
    if is_sharded(model):
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return [(pairs, world()) for pairs in micros] + [(micros[0], 0)] * (int(most) - len(micros))


# --- the optimizer ------------------------------------------------------------------------------------------

def make_optimizer(parameters, steps, learning_rate, name="adamw", schedule="constant", warmup_steps=None):
    """(optimizer, scheduler): linear warm-up, over a tenth of the steps for None, then constant or cosine."""
    optimizer = (torch.optim.RMSprop(parameters, learning_rate) if name == "rmsprop" else
                 torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0, fused=True))
    warmup = max(1, steps // 10 if warmup_steps is None else warmup_steps)

    def factor(done):
        cosine = (1 + math.cos(math.pi * done / steps)) / 2 if schedule == "cosine" else 1
        return min(1, (done + 1) / warmup) * cosine

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def update(model, optimizer, scheduler, max_grad_norm, loss):
    """One optimizer step, unless the loss or the gradient is not finite; (gradient norm before clipping,
    learning rate, whether it was done)."""
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    grad_norm = (grad_norm.full_tensor() if is_sharded(model) else grad_norm).item()
    learning_rate = scheduler.get_last_lr()[0]
    finite = math.isfinite(grad_norm) and math.isfinite(loss)          # on all processes alike
    if finite:
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad()
    return grad_norm, learning_rate, finite


# --- a run's directory: logs --------------------------------------------------------------------------------

LOGS = ("metrics", "eval", "samples")
SHOWN = "loss margin accuracy reward kl response_length grad_norm learning_rate seconds".split()


def run_directory(source):
    """runs/NAME for a data source: a file's stem, or a hub name's last part with - for :."""
    return Path("runs", Path(source).stem.replace(":", "-"))


def begin(out, args, policy=None, optimizer=None, scheduler=None, progress=None, logs=LOGS):
    """Begin a run in `out`, or with --resume continue it from its newest checkpoint: (lock, progress). Other runs are
    kept out for as long as the lock, a file, is open. Raises InputError where there is another run."""
    lock, checkpoint = None, newest_checkpoint(out)
    if is_first():
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out} is in use by another run; wait for its end, or give another --out") from None
    if checkpoint and getattr(args, "resume", False):
        return lock, resume(checkpoint, policy, optimizer, scheduler, args)
    if checkpoint:
        raise InputError(f"{out}/checkpoints holds those of an earlier run; --resume continues it, without that "
                         "directory a new one starts")
    if is_first():
        (out / "args.json").write_text(json.dumps(vars(args), indent=1) + "\n", encoding="utf-8")
        for name in logs:
            (out / f"{name}.jsonl").write_text("")
    return lock, progress


def write_line(out, name, row):
    """Append a row to out/name.jsonl; what is not a finite number is written as null."""
    if is_first():
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value
               for key, value in row.items()}
        with open(out / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def log(out, record, steps, log_every=10):
    """Append a step's record to metrics.jsonl; print every log_every-th, the first and the last as a line."""
    write_line(out, "metrics", record)
    if record["step"] % log_every == 0 or record["step"] in (1, steps):
        fields = [f"{name} {record[name]:.4g}" for name in SHOWN if record.get(name) is not None]
        say(f"step {record['step']}/{steps} | " + " | ".join(fields))


def shown(value, low, high):
    """A figure as text, with half the width of its interval."""
    return f"{value:.3f} ± {(high - low) / 2:.3f}"


def log_figures(out, step, figures):
    """Append figures, {name: (value, low, high)}, to eval.jsonl; print a line, value ± half the interval."""
    row = {"step": step}
    for name, (value, *interval) in figures.items():
        row.update({name: value, f"{name}_interval": interval if math.isfinite(interval[0]) else None})
    write_line(out, "eval", row)
    say(f"eval {step} | " + " | ".join(f"{name} {shown(*figure)}" for name, figure in figures.items()))


# --- checkpoints and models ---------------------------------------------------------------------------------

def fingerprint(examples):
    """SHA-256 of the pairs' token ids: it tells data, tokenizer, template and truncation apart."""
    ids = [[example[f"{side}_ids"] for side in ("prompt", "chosen", "rejected")] for example in examples]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def newest_checkpoint(out):
    """The directory of the newest checkpoint, None without any."""
    return max((path for path in (out / "checkpoints").glob("*") if path.name.isdigit()),
               key=lambda path: int(path.name), default=None)


def state_of(policy, optimizer):
    """What a checkpoint holds, by name: the parameters that are trained, and the optimizer's state of each."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    options = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)
    weights, state = get_state_dict(policy, optimizer, options=options)
    return {f"{kind}.{name}": value for kind, values in (("model", weights), ("optimizer", state))
            for name, value in values.items() if isinstance(value, torch.Tensor)}


def save_checkpoint(out, policy, optimizer, progress):
    """Write checkpoints/STEP, aside and renamed; keep the last two. All processes take part. Raises InputError
    where it cannot be written."""
    import torch.distributed.checkpoint as dcp                         # here, since it takes a second
    path = out / "checkpoints" / str(progress["step"])
    aside = path.with_name(path.name + ".writing")
    if path.exists():
        return
    if is_first():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    together()                                                         # the directory is there
    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.save(state_of(policy, optimizer), no_dist=not dist.is_initialized(),
                     storage_writer=dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True))
    except dcp.CheckpointException as error:                           # on every process
        shutil.rmtree(aside, ignore_errors=True)
        reason = first_line(next(iter(error.failures.values()))[0])
        raise InputError(f"{path} cannot be written ({reason}); earlier checkpoints are untouched") from None
    if is_first():
        logs = {name: (out / f"{name}.jsonl").stat().st_size for name in LOGS}
        with open(aside / "progress.json", "w", encoding="utf-8") as file:
            file.write(json.dumps({**progress, "logs": logs}, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
        for old in sorted(path.parent.glob("*[0-9]"), key=lambda other: int(other.name))[:-2]:
            shutil.rmtree(old)
    together()                                                         # it is whole


def resume(path, policy, optimizer, scheduler, args):
    """Continue from the checkpoint `path`: weights, optimizer, scheduler and logs as they were; returns the
    progress. Raises InputError where the data or other arguments than `may_change` are others."""
    import torch.distributed.checkpoint as dcp
    out = path.parents[1]
    before = json.loads((out / "args.json").read_text(encoding="utf-8"))
    for name, value in vars(args).items():
        if name not in args.may_change and before.get(name) != value:
            what = "the data have" if name == "data_sha256" else f"--{name.replace('_', '-')} has"
            raise InputError(f"--resume: {what} changed since {path} was written, from {before.get(name)} to {value}; "
                             "go back to that, or start afresh with another --out")
    try:
        with warnings.catch_warnings(action="ignore"):                 # into the tensors of policy, optimizer
            dcp.load(state_of(policy, optimizer), no_dist=not dist.is_initialized(),
                     storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except (dcp.CheckpointException, RuntimeError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); remove it to use an earlier one") from None
    progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    scheduler.last_epoch = progress["step"] - progress["skipped"] - 1
    scheduler.step()
    for name, size in progress.pop("logs").items() if is_first() else ():
        os.truncate(out / f"{name}.jsonl", size)
    say(f"continuing after step {progress['step']}, from {path}")
    return progress


def save_model(policy, tokenizer, out, load_base):
    """Write out/model, a whole model that any tool loads: of a policy with an adapter the base, from
    `load_base`, with the adapter merged in; the adapter is in out/adapter. All processes take part."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    state = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    names = {name for name, _ in (*policy.named_parameters(), *policy.named_buffers())}     # of tied ones, one
    state = {name: value for name, value in state.items() if name in names}
    if is_first():
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of transformers' own names
            if hasattr(policy, "peft_config"):
                from peft import PeftModel, get_peft_model_state_dict
                replace(out / "adapter", lambda aside: (
                    policy.peft_config["default"].save_pretrained(aside),
                    save_file(get_peft_model_state_dict(policy, state), aside / "adapter_model.safetensors")))
                policy, state = PeftModel.from_pretrained(load_base(), out / "adapter").merge_and_unload(), None
            replace(out / "model", lambda aside: (policy.save_pretrained(aside, state_dict=state),
                                                  tokenizer.save_pretrained(aside)))
    together()                                                         # no process leaves before it is there


def replace(directory, write):
    """write(path) beside the directory, then rename: what stands there is whole, old or new."""
    aside, old = (Path(f"{directory}.{suffix}") for suffix in ("writing", "old"))
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(aside)
    if directory.exists():
        directory.rename(old)
    aside.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
