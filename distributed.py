"""What a big or a long run needs and no reader of the method: processes, shards, logs, checkpoints.

torchrun starts the processes; each works on its share of a step's pairs. A run is a directory: args.json,
logs, checkpoints/STEP, model/. What stands there under its own name is whole: written aside, then renamed.
Neither random states nor the position in the data are saved: they follow from seed, step and rank.
"""
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import time
import warnings
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

from data import InputError, first_line, read_json, write_text

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
        raise OSError(f"rank {rank()} has lost another process ({first_line(error)[-60:]}); --resume goes on "
                      "from the last checkpoint") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank():
    """This process's number; 0 speaks and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def say(line):
    """Print a line, once for all processes."""
    if rank() == 0:
        tqdm.write(line)


def progress(items, what, total=None, unit="it"):
    """Hand on `items`, and show how far they are once that takes longer than a few seconds: a bar on a
    terminal, elsewhere a line every half minute."""
    total = len(items) if total is None else total
    if rank() != 0:
        yield from items
        return
    bar = tqdm(items, what, total, leave=False, delay=3, unit=unit, disable=None)
    started = said = time.perf_counter()
    for done, item in enumerate(bar, 1):
        yield item
        now = time.perf_counter()
        if bar.disable and now - said > 30:
            say(f"{what}: {done} of {total} after {now - started:.0f} s")
            said = now


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
        raise InputError(f"--batch-size: {len(pairs)} pairs a step are too few for {world()} processes; "
                         "raise it, or --epochs")
    return pairs[rank()::world()]


def summed(totals, device):
    """A Counter of floats, summed over the processes; all must hold the same keys."""
    if not dist.is_initialized():
        return totals
    names = sorted(totals)
    values = torch.tensor([float(totals[name]) for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return Counter(dict(zip(names, values.tolist())))


def stop_signals():
    """A list that gets the exit status at SIGTERM or SIGINT, to end after a step; a second SIGINT is hard."""
    stopped = []

    def note(number, _):
        stopped.append(130 if number == signal.SIGINT else 0)
        again = ""
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            again = "; again: at once, without saving"
        if rank() == 0:                                # not print: a signal may come in the middle of one
            os.write(2, f"\n{signal.Signals(number).name}: stopping after this step{again}\n".encode())

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return stopped


def sum_gradients(model):
    """Add up the processes' gradients (FSDP has done so for a sharded model). A parameter that the loss does
    not reach has a gradient of zeros: the optimizer then has a state of it, to save and to continue from."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if world() > 1 and not is_sharded(model):
            dist.all_reduce(parameter.grad)


# --- shards -------------------------------------------------------------------------------------------------

def is_sharded(model):
    """Whether `shard` has split it: FSDP adds this method."""
    return hasattr(model, "reshard")


def shard(model, dtype="float32"):
    """Split the model's parameters over the processes, decoder layer by decoder layer (FSDP2), in place. Each
    process holds its part in float32; layers are gathered in `dtype` while they compute."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    bfloat16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bfloat16 if dtype == "bfloat16" else MixedPrecisionPolicy()
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters())):   # the decoder's
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


@contextmanager
def gathered(model):
    """While inside, each process has a whole copy of a sharded model, in its compute dtype, and calls it as
    often as it likes: no call needs the other processes. For other models, nothing."""
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
    """The micro-batches as (pairs, weight): 1, or the number of processes, by which FSDP divides gradients.
    A sharded model's collectives demand as many on every process: what is added weighs 0."""
    if not is_sharded(model):
        return [(pairs, 1) for pairs in micros]
    most = torch.tensor(len(micros), device=next(model.parameters()).device)
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


def begin(out, args, progress=None, policy=None, optimizer=None, scheduler=None):
    """Begin a run in `out`, or with --resume continue it from its newest checkpoint: (lock, progress). Others
    are kept out for as long as the lock, a file, is open. Raises InputError where there is another run."""
    lock = together(lambda: locked(out) if rank() == 0 else None)       # first: all take part in what follows
    checkpoint = newest_checkpoint(out)
    if checkpoint and args.resume:
        progress = resume(checkpoint, args, progress, policy, optimizer, scheduler)
    elif rank() == 0:
        if (checkpoint or (out / "model").exists()) and not args.overwrite:
            continues = "--resume continues it, " if checkpoint else "it has no checkpoint to --resume, "
            raise InputError(f"{out} holds an earlier run; --overwrite replaces it, {continues}"
                             "another --out keeps it")
        if args.resume:
            say(f"--resume: {out} has no checkpoint, so this starts from the beginning; earlier logs stay, "
                "as NAME.jsonl.old")
        start_afresh(out, keep_logs=args.resume)
    if rank() == 0:
        write_text(out / "args.json", json.dumps(vars(args), indent=1) + "\n")
        if getattr(args, "tensorboard", False):
            events(out)
    return lock, progress


def start_afresh(out, keep_logs):
    """Take away what an earlier run left in `out`; its logs stay as NAME.jsonl.old where that is wanted."""
    for name in ("model", "adapter", "checkpoints", "tensorboard"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in LOGS:
        path = out / f"{name}.jsonl"
        if keep_logs and path.exists() and path.stat().st_size:
            path.replace(f"{path}.old")
        path.write_text("")


def locked(out):
    """The open lock of a run's directory, which is made. Raises InputError where another run holds it."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{out} is in use by another run; wait, or give another --out") from None
    return lock


@lru_cache
def events(out):
    """The writer of TensorBoard's event files of a run."""
    from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(out / "tensorboard")


def write_line(out, name, row):
    """Append a row to out/name.jsonl, and its numbers to the event files where there are any; what is not a
    finite number is written as null."""
    if rank() != 0:
        return
    row = {key: None if isinstance(value, float) and not math.isfinite(value) else value
           for key, value in row.items()}
    with open(out / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    if name != "samples" and (out / "tensorboard").is_dir():
        for key, value in row.items():
            if isinstance(value, (int, float)):
                events(out).add_scalar(f"{name}/{key}", value, row["step"])
        events(out).flush()


def log(out, record, steps):
    """Append a step's record to metrics.jsonl; print every tenth, the first and the last as a line."""
    write_line(out, "metrics", record)
    if record["step"] % 10 == 0 or record["step"] in (1, steps):
        fields = [f"{name} {record[name]:.4g}" for name in SHOWN if record.get(name) is not None]
        say(f"step {record['step']}/{steps} | " + " | ".join(fields))


def shown(value, low, high):
    """A figure as text: ± half its interval, or by the interval's ends if these are unlike far from it; alone
    where it has none."""
    if math.isnan(low):
        return f"{value:.3f}"
    half = (high - low) / 2
    if abs(low + half - value) > 0.1 * half:
        return f"{value:.3f} [{low:.2f}, {high:.2f}]"
    return f"{value:.3f} ± {half:.3f}"


def few(n):
    """A warning for figures of n prompts, "" where n will do."""
    return f" | of {n} prompts only: the intervals are rough" if n < 20 else ""


def log_figures(out, step, figures, n):
    """Append figures of n prompts, {name: (value, low, high)}, to eval.jsonl, and print them in a line."""
    row = {"step": step, "prompts": n}
    for name, (value, *interval) in figures.items():
        row.update({name: value, f"{name}_interval": interval if math.isfinite(interval[0]) else None})
    write_line(out, "eval", row)
    fields = [f"{name} {shown(*figure)}" for name, figure in figures.items()]
    say(f"eval {step} | {' | '.join(fields)}{few(n)}")


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
    """What a checkpoint holds, by name: the trained parameters, tied ones once, and the optimizer's state of
    each."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    options = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)
    weights, optimizer_state = get_state_dict(policy, optimizer, options=options)
    state = {}
    for name, parameter in policy.named_parameters():                  # names each storage once
        if parameter.requires_grad:
            state[f"model.{name}"] = weights[name]
    for name, value in optimizer_state.items():
        if isinstance(value, torch.Tensor):
            state[f"optimizer.{name}"] = value
    return state


def save_checkpoint(out, policy, optimizer, progress):
    """Write checkpoints/STEP, all processes together; keep the last two. Raises InputError where it fails."""
    import torch.distributed.checkpoint as dcp                         # here, since it takes a second
    path = out / "checkpoints" / str(progress["step"])
    aside = path.with_name(path.name + ".writing")
    if path.exists():
        return
    if rank() == 0:
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
    if rank() == 0:
        logs = {name: (out / f"{name}.jsonl").stat().st_size for name in LOGS}
        write_text(aside / "progress.json", json.dumps({**progress, "logs": logs}, indent=1) + "\n")
        aside.rename(path)
        for old in sorted(path.parent.glob("*[0-9]"), key=lambda other: int(other.name))[:-2]:
            shutil.rmtree(old)
    together()                                                         # it is whole


def resume(path, args, fresh, policy, optimizer, scheduler):
    """Continue from the checkpoint `path`: weights, optimizer, scheduler and logs as they were; returns the
    progress. Raises InputError where the data, or arguments other than `may_change`, are others, or where a
    run of another length would have come to this step with another learning rate or other pairs."""
    import torch.distributed.checkpoint as dcp
    out, progress = path.parents[1], read_json(path / "progress.json")
    before, step, logs = read_json(out / "args.json"), progress["step"], progress.pop("logs")
    for name, value in vars(args).items():
        if name not in args.may_change and before.get(name) != value:
            what = "the data have" if name == "data_sha256" else f"--{name.replace('_', '-')} has"
            raise InputError(f"--resume: {what} changed since {path} was written, from {before.get(name)} to "
                             f"{value}; go back to that, or start afresh with another --out")
    if progress["steps"] != fresh["steps"] and args.schedule != "constant":
        raise InputError(f"--resume: a {args.schedule} schedule of {fresh['steps']} steps has other rates "
                         f"than one of {progress['steps']}; keep the length, or take another --out")
    seen, would_have = (run["total"] * step // run["steps"] for run in (progress, fresh))
    if step > fresh["steps"] or seen != would_have:
        raise InputError(f"--resume: a run of {fresh['steps']} steps would not have seen these pairs by step "
                         f"{step}; keep the length, or take another --out (--steps may grow)")
    for name, size in logs.items():
        if (out / f"{name}.jsonl").stat().st_size < size:
            raise InputError(f"{out}/{name}.jsonl has lost lines since {path} was written; start afresh")
    try:
        with warnings.catch_warnings(action="ignore"):                 # into the tensors of policy, optimizer
            dcp.load(state_of(policy, optimizer), no_dist=not dist.is_initialized(),
                     storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except (dcp.CheckpointException, RuntimeError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); remove it, and --resume") from None
    for name, size in logs.items() if rank() == 0 else ():
        os.truncate(out / f"{name}.jsonl", size)
    scheduler.last_epoch = step - progress["skipped"] - 1
    scheduler.step()
    say(f"continuing after step {step}, from {path}")
    return {**progress, "total": fresh["total"], "steps": fresh["steps"]}


def save_model(policy, tokenizer, out, load_base):
    """Write out/model, a whole model that any tool loads: of a policy with an adapter the base, from
    `load_base`, with the adapter merged in; the adapter is in out/adapter. All processes take part."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()
    state = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    names = {name for name, _ in (*policy.named_parameters(), *policy.named_buffers())}    # of tied ones, one
    state = {name: value for name, value in state.items() if name in names}
    if rank() == 0:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of transformers' own names
            if hasattr(policy, "peft_config"):
                from peft import PeftModel, get_peft_model_state_dict
                adapter = {f"base_model.model.{name}": value           # the names that PeftModel reads
                           for name, value in get_peft_model_state_dict(policy, state).items()}
                replace(out / "adapter", lambda aside: (
                    policy.peft_config["default"].save_pretrained(aside),
                    save_file(adapter, aside / "adapter_model.safetensors")))
                policy = PeftModel.from_pretrained(load_base()[0], out / "adapter").merge_and_unload()
                state = None
            replace(out / "model", lambda aside: (policy.save_pretrained(aside, state_dict=state),
                                                  tokenizer.save_pretrained(aside)))
    together()                                                         # no process leaves before it is there


def replace(directory, write):
    """write(path) beside the directory, then rename: what stands there is whole."""
    aside = Path(f"{directory}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    write(aside)
    shutil.rmtree(directory, ignore_errors=True)
    aside.rename(directory)
