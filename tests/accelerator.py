"""An accelerator that is none, "fake:0": its tensors compute on the CPU, and raise where a GPU's would.

Two devices that meet are an error, but for 0-dimensional CPU tensors in arithmetic and for indices; so is a
generator of the CPU. Autocast rounds to bfloat16 as CUDA's does. What would make the CPU wait is counted
in `syncs`, by the line of this project from which it comes. Not covered: streams, NCCL, and real kernels. It
stands on torch's experimental interface for devices in Python."""
import contextlib
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule, _setup_privateuseone_for_python_backend)

ROOT = str(Path(__file__).parents[1])
CPU, FAKE = torch.device("cpu"), "fake"
aten = torch.ops.aten
syncs = Counter()


class FakeTensor(torch.Tensor):
    """A tensor of fake:0; `cpu` has its values."""

    @staticmethod
    def __new__(cls, values):
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, layout=values.layout, device=torch.device(FAKE, 0))
        made.values_ = values
        return made

    def tolist(self):
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Machine(TorchDispatchMode):
    """While it is on, tensors can be made on, and sent to, fake:0."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Constructors(TorchFunctionMode):
    """Lets torch.tensor(values, device="fake") make them on the CPU, and send them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device") or CPU
        if function in (torch.tensor, torch.as_tensor) and torch.device(device).type == FAKE:
            kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


def values_of(value):
    return value.values_ if isinstance(value, FakeTensor) else value


def run(function, args, kwargs):
    """The operator on the tensors' values, as the accelerator would compute it."""
    inputs = tree_leaves((args, kwargs))
    ours = [each for each in inputs if isinstance(each, FakeTensor)]
    others = [each for each in inputs if isinstance(each, torch.Tensor) and not isinstance(each, FakeTensor)]
    device = kwargs.get("device")
    kind = torch.device(device).type if device is not None else None
    if not ours and kind != FAKE:
        return function(*args, **kwargs)
    copies = function in (aten._to_copy.default, aten.copy_.default)
    leaves = function is aten._to_copy.default and kind == "cpu"
    leaves = leaves or function is aten.copy_.default and not isinstance(args[0], FakeTensor)
    count_sync(function, args, leaves)
    if others and not copies:
        refuse_meeting(function, args, others)
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{function}: a CPU generator on the accelerator")
    plain_args, plain_kwargs = tree_map(values_of, (args, kwargs))
    if device is not None:
        plain_kwargs["device"] = CPU
    result = function(*plain_args, **plain_kwargs)
    if leaves:
        return result
    known = {id(each.values_): each for each in ours}

    def wrapped(value):
        if isinstance(value, torch.Tensor):
            return known[id(value)] if id(value) in known else FakeTensor(value)
        return value

    result = tree_map(wrapped, result)
    if function._schema.is_mutable or any(each.alias_info for each in function._schema.arguments):
        return return_and_correct_aliasing(function, args, kwargs, result)
    return result


def count_sync(function, args, leaves):
    """Count what makes the CPU wait: a value that it reads, a size that depends on values."""
    indices = []
    if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        indices = tree_leaves(args[1])
    by_mask = any(isinstance(each, FakeTensor) and each.dtype == torch.bool for each in indices)
    waits = function in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
    if not (waits or by_mask or leaves):
        return
    lines = [frame for frame in traceback.extract_stack() if frame.filename.startswith(ROOT)
             and not any(each in frame.filename for each in ("/tests/", "/site-packages/"))]
    if lines:
        syncs[f"{Path(lines[-1].filename).name}: {lines[-1].line}"] += 1


def refuse_meeting(function, args, others):
    """Raises RuntimeError where CUDA does: tensors of the CPU with those of the accelerator."""
    packet, target = function.overloadpacket, args[0]
    if packet in (aten.index, aten.index_put, aten.index_put_) and isinstance(target, FakeTensor):
        return
    pointwise = torch.Tag.pointwise in function.tags or packet in (aten.where, aten.fill_, aten.masked_fill)
    if pointwise and all(each.dim() == 0 for each in others):
        return
    raise RuntimeError(f"{function}: two devices, {FAKE}:0 and cpu {[tuple(each.shape) for each in others]}")


# --- autocast, as CUDA's ------------------------------------------------------------------------------------

LOW = ["linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"]
HIGH = ["softmax.int", "log_softmax.int", "cumsum", "sum", "sum.dim_IntList", "prod", "norm.Scalar",
        "pow.Tensor_Scalar", "rsqrt", "exp", "log", "log_sigmoid"]


def register_autocast():
    """Let LOW compute in bfloat16 and HIGH in float32."""
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    libraries.append(others)
    no_autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast_before(function, dtype):
        def cast(value):
            is_float = isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16)
            return value.to(dtype) if is_float and value.device.type == FAKE else value

        def computed(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(no_autocast):
                args, kwargs = tree_map(cast, (args, kwargs))
                return function(*args, **kwargs)

        return computed

    for names, dtype in ((LOW, torch.bfloat16), (HIGH, torch.float32)):
        for name in names:
            packet, _, overload = name.partition(".")
            function = getattr(getattr(aten, packet), overload or "default")
            libraries[0].impl(name, cast_before(function, dtype), "AutocastPrivateUse1")


class Module(_DummyBackendModule):
    """What torch.fake has: a checkpoint's writer asks for a stream."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def current_stream(self):
        return mock.MagicMock()

    def stream(self, _):
        return contextlib.nullcontext()


libraries = [torch.library.Library("aten", "IMPL")]      # they are undone when they are deleted


@contextlib.contextmanager
def accelerator():
    """Inside, there is a fake:0."""
    if not hasattr(torch, FAKE):
        _setup_privateuseone_for_python_backend(FAKE, backend_module=Module())
        register_autocast()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)        # keeps tied weights tied
    try:
        with Machine(), Constructors(), torch.autograd.set_multithreading_enabled(False):
            yield torch.device(FAKE, 0)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
