"""The loop that every training run shares: its logs, evaluations, checkpoints, signals and errors.

The order is train, log, evaluate, save, so that a step counts as done only when its outputs exist. If a run
ends anywhere in between, the missing work is done when the run is continued.
"""
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from runtime.command_line import InputError, one_line, seeded
from runtime.processes import (
    Interrupted, StopSignals, all_sum, bar_options, fails_together, gathered, print0, rank,
    world_size)
from runtime.run_directory import (
    begin, log_figures, print_step, refuse_changed_settings, refuse_inputs_inside, refuse_occupied,
    save_checkpoint, write_line)
from runtime.settings import flag_of, may_change


@dataclass
class Loop:
    """A run in its directory, with what its checkpoints hold."""
    out: Path
    name: str                     # the label of the progress bar
    args: Any                     # with seed, eval_every, save_every
    model: torch.nn.Module
    optimizer: Any
    progress: dict                # step, skipped, in_a_row, evaluated, record, and what the caller adds
    stop: StopSignals


@dataclass
class Step:
    """One optimizer step; the body of the loop fills in what it has done."""
    number: int                   # from 1
    record: dict | None = None    # its line in metrics.jsonl
    finite: bool = True           # whether the optimizer took the step


@fails_together
def refuse_before_loading(out, args, *inputs):
    """Raise errors that would otherwise end the run after its models are loaded: InputError if an input is
    `out` or lies in it, if `refuse_occupied` refuses `out`, or if --resume meets a changed setting that must
    not change. inputs: names of settings that are files or directories. All processes call this together."""
    if rank() != 0:
        return
    refuse_inputs_inside(out, {flag_of(name): getattr(args, name) for name in inputs})
    refuse_occupied(out, args)
    if args.resume:
        refuse_changed_settings(out, {**asdict(args), "may_change": may_change(args)})


@contextmanager
def training(out, name, args, recorded, progress, model, optimizer, scheduler):
    """A context with the Loop of a run in `out`, which all processes begin together or, with --resume,
    continue. An InputError or an OSError inside, for example because a disk is full, saves the steps that
    were done, if there are any, and becomes an InputError that says so. In a run of several processes, an
    OSError ends the run without saving.

    recorded: what args.json holds, the settings and the fingerprints of the inputs. progress: what the caller
    adds to the progress of every run."""
    progress = dict(step=0, skipped=0, in_a_row=0, evaluated=-1, record=None, **progress)
    recorded = {**recorded, "may_change": may_change(args)}
    lock, progress = begin(out, args, recorded, progress, model, optimizer, scheduler)
    with lock or nullcontext(), StopSignals() as stop:
        try:
            yield Loop(out, name, args, model, optimizer, progress, stop)
        except (InputError, OSError) as error:
            others_know = isinstance(error, InputError) or world_size() == 1
            if not progress["step"] or not others_know:
                raise
            save_checkpoint(out, model, optimizer, progress)           # all processes take part
            raise InputError(f"{one_line(error)} (step {progress['step']} is saved; --resume continues with "
                             "the same inputs)") from None


def steps(loop, count, evaluate):
    """Yield the Steps that are left of `count`; the loop's body trains one and fills it in. Then the step is
    logged, and the run is evaluated and saved if that is due. Evaluations are due at the end and, unless
    eval_every is 0, before the first step and every eval_every steps. Before each step, torch is seeded.

    evaluate() returns (figures, {"prompts": the number of prompts, …}, rows of samples), or None without
    held-out pairs; every process calls it. Raises InputError after ten steps in a row that are not finite,
    and SystemExit once a signal has stopped the run and the steps that were done are saved."""
    progress, args = loop.progress, loop.args
    if progress["record"] is not None:                       # its logging failed before the resume
        log_step(loop, count)
    first, evaluation, printed = progress["step"] + 1, None, 0.0
    bar = tqdm(desc=loop.name, total=count, initial=progress["step"], **bar_options())
    while True:
        step = progress["step"]
        stopping = is_stopped(loop)
        is_due = step == count or args.eval_every and step % args.eval_every == 0
        if is_due and progress["evaluated"] < step and not stopping:
            started = time.perf_counter()
            if evaluate_step(loop, evaluate):
                evaluation = time.perf_counter() - started
            stopping = is_stopped(loop)
        save_every = args.save_every or count + 1
        if step and (stopping or step % save_every == 0 or step == count and args.save_every):
            save_checkpoint(loop.out, loop.model, loop.optimizer, progress)
        if stopping:
            end_early(loop)
        if step == count:
            bar.close()
            return
        torch.manual_seed(seeded("samples", args.seed, step + 1, rank()))
        started = time.perf_counter()
        current = Step(step + 1)
        yield current
        seconds = time.perf_counter() - started
        count_step(progress, current, seconds)
        is_long_ago = bar.disable and time.perf_counter() - printed > 30
        if log_step(loop, count, is_long_ago):
            printed = time.perf_counter()
        bar.update()
        if current.number == first:
            print_how_long(seconds, evaluation, count - first + 1, args, loop.model.device)
        if progress["in_a_row"] >= 10:
            raise InputError(f"steps {step - 8} to {step + 1} had no finite loss or gradient; begin a "
                             "new run with a lower rate")


def is_stopped(loop):
    """Whether a signal has come to any of the processes."""
    came = Counter(stopped=loop.stop.exit_status is not None)
    return all_sum(came, loop.model.device)["stopped"] > 0


def end_early(loop):
    """Say how to go on, and raise SystemExit with the status that belongs to the signal."""
    step = loop.progress["step"]
    if step:
        place = " in place of --overwrite" if loop.args.overwrite else ""
        print0(f"stopped after step {step}, which is saved in {loop.out}/checkpoints/{step}; the same "
               f"command with --resume{place} continues, and the checkpoint works wherever a model does")
    else:
        print0("stopped before the first step; the same command starts the run again")
    raise SystemExit(loop.stop.exit_status or 0)


def count_step(progress, step, seconds):
    """Enter a Step in the progress: its number, whether it was skipped, and its record, to be logged."""
    progress["step"] = step.number
    if step.finite:
        progress["in_a_row"] = 0
    else:
        progress["in_a_row"] += 1
        progress["skipped"] += 1
    progress["record"] = {**step.record, "skipped": progress["skipped"], "seconds": seconds}


@fails_together
def log_step(loop, count, is_long_ago=False):
    """Append the step's record, `loop.progress["record"]`, to metrics.jsonl. Print it for every tenth step,
    step 1 and step `count`, the run's last, and if the last print is long ago. Returns whether it was
    printed. If it cannot be appended, it stays in the progress, and the run logs it when it is continued."""
    record = loop.progress["record"]
    write_line(loop.out, "metrics", record)
    loop.progress["record"] = None
    is_due = record["step"] % 10 == 0 or record["step"] in (1, count) or is_long_ago
    if is_due:
        print_step(record, count)
    return is_due


@fails_together
def evaluate_step(loop, evaluate):
    """Evaluate the model and log its figures; returns whether there were any. A signal ends the evaluation of
    a single process at once, and nothing is logged then. Several processes finish it, since each waits for
    the others."""
    may_interrupt = loop.stop.interrupting() if world_size() == 1 else nullcontext()
    step = loop.progress["step"]
    with gathered(loop.model):
        try:
            with may_interrupt:
                result = evaluate()
        except Interrupted:
            return False
    if result is not None:
        figures, counts, samples = result
        log_figures(loop.out, step, figures, counts)
        for row in samples:
            write_line(loop.out, "samples", {"step": step, **row})
    loop.progress["evaluated"] = step
    return result is not None


NOT_MEASURED = ("no pair is held out, so the model is not evaluated; --eval-data names pairs, or a run "
                "whose held-out pairs are used")
LOGITS = 3 * 2**24                     # the most logits of a forward on a CPU; one copy takes 192 MiB


@lru_cache
def logits_at_once():
    """The most logits, positions × vocabulary, that one forward may make: LOGITS on a CPU. On a GPU, where
    forwards of few rows are slow, these are as many as fit, with their log-softmax and its gradients (12
    bytes each), into a quarter of the memory that is free at the first call, but no fewer than LOGITS."""
    if not torch.cuda.is_initialized():
        return LOGITS
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(LOGITS, free // 4 // 12)


def micro_batches(items, tokens_of, model, size=None):
    """Divide the items, in order, into lists for one forward each. A list has at most `size` items, if that
    is given, and no more scored tokens than `logits_at_once` allows. An item that exceeds this alone has a
    list of its own. If there are no items, there is one empty list. tokens_of: a function that returns an
    item's number of scored tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    micros, logits, most = [[]], 0, logits_at_once()
    for item in items:
        more = tokens_of(item) * vocabulary
        full = len(micros[-1]) == size or logits + more > most
        if micros[-1] and full:
            micros.append([])
            logits = 0
        micros[-1].append(item)
        logits += more
    return micros


@fails_together
def print_how_long(seconds, evaluation, steps_left, args, device):
    """After the first step, print how long the run will take, and, if that is long, which settings make it
    shorter. evaluation: the seconds that the first evaluation took; None if there was none so far."""
    took, total = f"the first step took {seconds:.1f} s", seconds * steps_left
    evaluations = 1
    if args.eval_every:
        evaluations = max(1, steps_left // args.eval_every)
    if evaluation is not None:
        took += f", an evaluation {evaluation:.1f} s"
        total += evaluation * evaluations
    left = f"{total:.0f} s" if total < 100 else f"{total / 60:.0f} min"
    if evaluation is None:
        left += " of steps"                                    # how long evaluations take is not known yet
    print0(f"{took}: about {left} to go")
    if seconds > 60 or device.type == "cpu" and total > 1200:
        flags = []
        for name in ("max_response_length", "max_prompt_length", "max_length", "eval_limit", "eval_every"):
            if getattr(args, name, None):
                flags.append(f"{flag_of(name)} ({getattr(args, name)})")
        if has_fast_bfloat16(device) and args.dtype == "float32":
            flags.append("--dtype bfloat16")
        print0(f"flags that shorten a run: {', '.join(flags)}, --steps, --lora")


def has_fast_bfloat16(device):
    """Whether the device is a CPU with instructions for bfloat16, on which its products are faster than those
    in float32."""
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(features.get(name) for name in ("avx512_bf16", "amx_bf16"))
