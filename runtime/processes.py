"""The processes that torchrun starts. Each works on its share of a step's pairs, and a model that is too big
for one process is split into shards.

In a run of one process, the functions by which processes communicate do nothing, or return what they got."""
import os
import shutil
import signal
import sys
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps

import torch
import torch.distributed as dist
from tqdm import tqdm

from runtime.command_line import InputError, first_line, one_line

# --- this process and the others ----------------------------------------------------------------------------


@contextmanager
def process_group(shard=False):
    """A context in which this process is connected with torchrun's other processes; it yields the device of
    this process. With `shard` a single process is connected too, since FSDP needs this. Raises OSError if
    another process is lost."""
    device = own_device()
    if shard or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        connect(device)
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


def own_device():
    """This process's GPU, or the CPU if there is none. On a CPU, gradients are summed in a fixed order,
    whatever the number of threads. On a GPU, float32 products are computed in TF32, and attention does not
    use cuDNN: torch 2.11 and later prefer it, and it plans again for each new shape, which means for each
    decoded token."""
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False    # it only helps to find mistakes
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def default_dtype():
    """The dtype to compute in if no setting names one: bfloat16 on a GPU that has it, else float32."""
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return "bfloat16"
    return "float32"


PATIENCE = timedelta(hours=2)             # the longest time for which a process waits for others
meeting = None                            # the group for meetings, without GPUs; None: the default group


def connect(device):
    """Start torch.distributed. Without torchrun, this process is its only one."""
    global meeting
    options = dict(timeout=PATIENCE)
    if "RANK" not in os.environ:
        options.update(store=dist.HashStore(), rank=0, world_size=1)
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, **options)
        meeting = dist.new_group(backend="gloo", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", **options)


def computing_in(dtype, model):
    """A context in which a model with weights in float32 computes in `dtype`, "float32" or "bfloat16"."""
    device = next(model.parameters()).device
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def sent(tensor, device):
    """Copy a tensor to the device, without waiting until it has arrived."""
    return tensor.to(device, non_blocking=True)


def rank():
    """This process's number; 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(line):
    """Print a line, once for all processes."""
    if rank() == 0:
        tqdm.write(line)


def progress(items, what):
    """Yield `items` one by one, with a bar that shows how many are done: on a terminal after three seconds,
    elsewhere every half minute."""
    interval = 0.1 if sys.stderr.isatty() else 30
    options = {**bar_options(), "disable": rank() != 0 or len(items) == 1}
    return tqdm(items, what, leave=False, delay=3, mininterval=interval, maxinterval=max(10, interval),
                **options)


def bar_options():
    """tqdm's options for a progress bar: rank 0 shows it, on a terminal, even if the terminal does not tell
    its width."""
    return dict(disable=None if rank() == 0 else True, ncols=shutil.get_terminal_size().columns)


def of_rank_0(value):
    """Send rank 0's value to all processes and return it."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, group=meeting)
    return values[0]


def of_all(value):
    """The values of all processes, in their order."""
    values = [value]
    if dist.is_initialized():
        values = [None] * world_size()
        dist.all_gather_object(values, value, meeting)
        dist.barrier(meeting)             # gloo's threads must be done with the objects before a process ends
    return values


def share_of_process(*lists):
    """This process's share of each list. The shares of all lists together differ between processes by one
    item at most."""
    shares, before = [], 0
    for items in lists:
        first = (rank() - before) % world_size()
        shares.append(items[first::world_size()])
        before += len(items)
    return shares


def divided(function, items):
    """Compute function(items), a list with a result for each item, in shares: each process computes its
    share, and every process gets all results. If there are fewer items than processes, some processes compute
    the first item without using the result, since all must take part in the forwards of a sharded model."""
    n, results = world_size(), [None] * len(items)
    share = items[rank()::n] or items[:1]
    for nth, part in enumerate(of_all(fails_together(function)(share))):
        results[nth::n] = part[:len(results[nth::n])]
    return results


def raise_together(problem=None, where=""):
    """If a process has a problem, raise InputError with it on all processes. If none has one, all processes
    have met when this returns. Raises OSError if a process does not come; its text says which one, and that
    it was missing at the end of the function `where`."""
    if dist.is_initialized():
        try:
            dist.monitored_barrier(meeting, PATIENCE, wait_all_ranks=True)
        except RuntimeError as error:
            raise OSError(f"rank {rank()} waited in vain for another process at the end of {where} "
                          f"({first_line(error)[-60:]}); --resume goes on from the last checkpoint") from None
    for each in of_all(problem):
        if each is not None:
            raise InputError(each)


def fails_together(function):
    """A decorator: if the function raises InputError in one process, or an OSError such as a full disk, it
    raises InputError in every process, so that no process waits for another in vain."""
    @wraps(function)
    def wrapped(*args, **options):
        problem, result = None, None
        try:
            result = function(*args, **options)
        except (InputError, OSError) as error:
            problem = one_line(error)
        raise_together(problem, function.__name__)
        return result

    return wrapped


def all_sum(totals, device):
    """Sum a Counter of floats over the processes, all of which must have the same keys."""
    if not dist.is_initialized():
        return totals
    names = sorted(totals)
    values = torch.tensor([float(totals[name]) for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return Counter(dict(zip(names, values.tolist(), strict=True)))


def sum_gradients(model):
    """Sum the gradients over the processes (FSDP has done so for a sharded model). A parameter that the loss
    does not reach gets a gradient of zeros, so that the optimizer has a state for it that can be saved and
    continued from."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if world_size() > 1 and not is_sharded(model):
            dist.all_reduce(parameter.grad)


class Interrupted(BaseException):
    """The first stop signal, raised where `StopSignals.interrupting` allows it."""


class StopSignals:
    """A context in which the first SIGINT, SIGTERM or SIGHUP is noted, so that a run can end after its step,
    and a second one ends the process at once. A signal that the process was started to ignore, as nohup does
    with SIGHUP, stays ignored. A child process, which a reward may start, gets back the handlers that were
    there before."""

    def __init__(self):
        self.exit_status = None                 # the process's status, once a signal has come
        self.may_interrupt = False
        self.before = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.note)
        os.register_at_fork(after_in_child=self.give_back)
        return self

    def __exit__(self, *_):
        self.give_back()

    def give_back(self):
        """Restore the handlers that were there before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def note(self, number, _):
        """The handler of the first signal."""
        self.exit_status = 130 if number == signal.SIGINT else 0
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        if rank() == 0:                                # os.write: a signal may interrupt a print
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: the run saves its steps and ends; a second signal ends it now\n".encode())
        if self.may_interrupt:
            raise Interrupted

    @contextmanager
    def interrupting(self):
        """A context in which the first signal raises Interrupted. It is for work that can be repeated later,
        such as an evaluation."""
        self.may_interrupt = True
        try:
            if self.exit_status is not None:
                raise Interrupted
            yield
        finally:
            self.may_interrupt = False


# --- shards -------------------------------------------------------------------------------------------------

def is_sharded(model):
    """Whether `shard` has split the model, which is seen by a method that FSDP adds."""
    return hasattr(model, "reshard")


def shard(model, device="cpu", dtype="float32"):
    """Split a model over the processes (FSDP2), in place. Rank 0 has the model's weights, and the other
    processes get their parts of them. The parts keep their dtype: float32, or bfloat16 if frozen."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    weights = {}
    if rank() == 0:
        weights = model.state_dict()
    split_layers(model, dtype)
    if rank() != 0:
        model.to_empty(device=device)
    set_model_state_dict(model, weights, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))
    for buffer in model.buffers():                       # a state_dict leaves some buffers out
        dist.broadcast(buffer, 0)


def split_layers(model, dtype):
    """Let FSDP2 gather one decoder layer after another, in `dtype`, while the model computes. The parameters
    outside of these layers, in the embedding and the output layer, are gathered in float32, in which they
    compute."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in decoder_layers(model):
        fully_shard(layer, mp_policy=policy)
    fully_shard(model)


def decoder_layers(model):
    """The model's decoder layers: the list of modules that holds most of the model's parameters."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


@contextmanager
def gathered(model):
    """A context in which each process holds a whole copy of a sharded model in its compute dtype, so that it
    can call the model as often as it likes without the other processes. It does nothing for a model that is
    not sharded."""
    parts = [module for module in model.modules() if is_sharded(module)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    if parts:
        with torch.no_grad():                                   # run by all processes; it gathers all parts
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def with_equal_counts(micro_batches, model):
    """Pair micro-batches with weights: [(pairs, weight)]. The weight is 1 for a model that is not sharded.
    Every process must take part in each forward of a sharded model, so a process with fewer micro-batches
    repeats its first one with weight 0. All other micro-batches of a sharded model have the number of
    processes as their weight, because FSDP divides gradients by it."""
    weighted = []
    if not is_sharded(model):
        for pairs in micro_batches:
            weighted.append((pairs, 1))
        return weighted
    most = torch.tensor(len(micro_batches), device=next(model.parameters()).device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    for pairs in micro_batches:
        weighted.append((pairs, world_size()))
    while len(weighted) < most:
        weighted.append((micro_batches[0], 0))
    return weighted
