"""Private names and message texts of other libraries that the project depends on, each in one place.

No other module names an underscore attribute of a library or recognises an error by its text. The versions are those in
which each was checked; `tests/common/test_compat.py` provokes the real errors in the installed ones, so that an upgrade
which changes one fails there, by name.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import grad as torch_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves, tree_map
from torch.utils.data.dataloader import DataLoader, _MultiProcessingDataLoaderIter

# torch 2.13: no public name for these; `torch.utils._pytree` and `_python_dispatch` have not moved since 2.1.
__all__ = [
    "FakeTensorMode",
    "TorchDispatchMode",
    "bf16_gradients_are_sound",
    "cpu_computes_bf16",
    "cpu_computes_fp16",
    "dataloader_worker_message",
    "end_dataloader_workers",
    "foreach_lerp",
    "gloo_cause",
    "is_dataloader_timeout",
    "is_dataloader_worker_error",
    "is_gloo_error",
    "is_meta_device_problem",
    "is_missing_dicom_decoder",
    "is_port_in_use",
    "is_unhooked",
    "is_unused_parameter_error",
    "loss_scale",
    "mllog_clock",
    "numpy_scalars_readable",
    "reference_point",
    "tree_iter",
    "tree_leaves",
    "tree_map",
    "without_torch_function",
    "written_arguments",
]


def foreach_lerp(tensors: list[Tensor], ends: list[Tensor], weight: float) -> None:
    """Moves each tensor by the share `weight` towards its end, in place, in few kernels. torch 2.11 to 2.14."""
    torch._foreach_lerp_(tensors, ends, weight)


def loss_scale(scaler: torch.amp.GradScaler) -> Tensor | None:
    """Returns the loss scale, a scalar on the device, or None where the scaler is off or has not scaled yet.

    `GradScaler.get_scale` is public, but makes the host wait for the device. torch 2.13.
    """
    return scaler._get_scale_async() if scaler.is_enabled() else None


def without_torch_function() -> AbstractContextManager[None]:
    """Returns a context in which no `__torch_function__` and no `TorchFunctionMode` is called. torch 2.13."""
    return torch._C.DisableTorchFunction()


def cpu_computes_bf16() -> bool:
    """Returns whether this CPU has bfloat16 instructions that oneDNN uses. torch 2.13."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpu_computes_fp16() -> bool:
    """Returns whether this CPU has float16 instructions that oneDNN uses. torch 2.13."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported())


def bf16_gradients_are_sound() -> bool:
    """Returns whether this CPU's bf16 convolutions compute the weight gradient of a small feature map.

    With AVX-512, oneDNN reads memory that was never written for a 3x3x3 kernel on a map of 2 x 2 x 2 or 2 x 2 x 4
    voxels, as in the bottleneck of a 64^3 window, and the gradient can be anything up to 1e38. Tries several times,
    with large values in freed memory, since what that memory holds is a matter of chance. torch 2.13.
    """
    generator = torch.Generator().manual_seed(0)
    image, gradient = (torch.randn(3, 8, 2, 2, 2, generator=generator).bfloat16() for _ in range(2))
    weight_shape, tries = [8, 8, 3, 3, 3], 8
    expected = torch_grad.conv3d_weight(image.float(), weight_shape, gradient.float(), padding=1)
    channels_last = torch.channels_last_3d
    image, gradient = (tensor.contiguous(memory_format=channels_last) for tensor in (image, gradient))
    for _ in range(tries):
        freed = [torch.full((size,), 1e30, dtype=torch.bfloat16) for size in (64, 256, 1024, 4096, 16384, 65536) * 8]
        del freed
        computed = torch_grad.conv3d_weight(image, weight_shape, gradient, padding=1)
        if not torch.allclose(computed.float(), expected, rtol=0.05, atol=0.1):
            return False
    return True


def written_arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Returns the arguments that an operation of a `TorchDispatchMode` changes in place. torch 2.13."""
    given = {**dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)), **kwargs}
    written = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    return [value for name, value in given.items() if name in written]


def is_unhooked(module: nn.Module) -> bool:
    """Returns whether calling a module runs its class's `forward` and nothing else. torch 2.13."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return not any(hooks) and "forward" not in vars(module)


class _NumberType:
    """Takes the place of numpy.dtype in a pickle: the type of a number, such as "f8", and its byte order."""

    def __init__(self, code: str, *_: object) -> None:
        if np.dtype(code).kind not in "biuf":
            raise pickle.UnpicklingError(f"numpy.{code} is no number")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"{state[1]!r} is no byte order")
        self.code = np.dtype(self.code).newbyteorder(state[1]).str


def _read_number(kind: _NumberType, data: bytes) -> bool | int | float:
    """Takes the place of numpy's `scalar`, and returns a Python number."""
    (number,) = np.frombuffer(data, kind.code)
    return number.item()


def numpy_scalars_readable() -> AbstractContextManager[None]:
    """Returns a context in which `torch.load(weights_only=True)` reads numpy's numbers, as Python's, and no more.

    A pickle names numpy's functions by their path, which is another one in numpy 1. Those named here are not numpy's:
    its dtypes take flags from the file that decide whether bytes are read as pointers. numpy 2.4, torch 2.13.
    """
    modules = ("numpy._core.multiarray", "numpy.core.multiarray")
    readers: list[Any] = [(_NumberType, "numpy.dtype"), *((_read_number, f"{module}.scalar") for module in modules)]
    return torch.serialization.safe_globals(readers)


def is_meta_device_problem(message: str) -> bool:
    """Returns whether an operation failed only because its tensors are on the meta device, which holds no values.

    torch has no type for it: a network that creates a tensor on the host or reads a value gets a RuntimeError, or a
    NotImplementedError, whose text names the device. torch 2.13.
    """
    return "meta" in message


def is_gloo_error(error: RuntimeError) -> bool:
    """Returns whether a collective on CPUs failed because another rank is gone.

    gloo raises a bare RuntimeError whose text holds the path of its source file; NCCL raises `DistBackendError`.
    torch 2.13.
    """
    return "gloo" in str(error)


def is_port_in_use(error: RuntimeError) -> bool:
    """Returns whether torch's store could not listen on its port, because another process does. torch 2.13."""
    return "EADDRINUSE" in str(error)


def gloo_cause(error: RuntimeError) -> str:
    """Returns the first line of a gloo error without the guess at its reason that follows. torch 2.13."""
    return str(error).splitlines()[0].partition(" This is typically")[0]


def is_dataloader_worker_error(error: Exception) -> bool:
    """Returns whether an error reports a DataLoader worker that was killed, has ended, or hangs.

    torch raises a bare RuntimeError from a signal handler, wherever the main thread happens to be. When a worker is
    killed while it sends a batch, the pipe to it fails first, before torch has noticed. torch 2.13.
    """
    return isinstance(error, ConnectionError | EOFError) or str(error).startswith("DataLoader")


def is_unused_parameter_error(error: Exception) -> bool:
    """Returns whether DistributedDataParallel found that a step left out parameters.

    It raises a bare RuntimeError in the next forward pass, of the rank that left them out. torch 2.13.
    """
    return str(error).startswith("Expected to have finished reduction in the prior iteration")


def is_dataloader_timeout(error: Exception) -> bool:
    """Returns whether a DataLoader gave up waiting for a worker that is still alive. torch 2.13."""
    return "timed out" in str(error)


def dataloader_worker_message(error: Exception) -> str:
    """Returns the message with which an error was raised in a DataLoader worker.

    In the main process torch raises it again with the worker's traceback as its message, whose last entry is
    `package.Error: message`. torch 2.13.
    """
    return str(error).rstrip().rsplit(f"{type(error).__qualname__}: ", 1)[-1]


def end_dataloader_workers(loader: DataLoader[Any]) -> None:
    """Ends the workers of a DataLoader with persistent workers after an error.

    Otherwise the garbage collector ends them: if it finalizes a worker's queue first, torch waits 5 s for that worker.
    torch 2.13.
    """
    iterator = loader._iterator
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        iterator._shutdown_workers()
        loader._iterator = None


def is_missing_dicom_decoder(error: Exception) -> bool:
    """Returns whether pydicom could not decode pixels because no installed package decodes their format.

    A damaged file raises the same types. pydicom 3.0.
    """
    return any(word in str(error) for word in ("plugin", "handler", "missing"))


@contextmanager
def mllog_clock(clock_ms: Callable[[], int]) -> Iterator[None]:
    """Replaces the clock of MLPerf's logger, which has no parameter for it. mlperf-logging 4.1.

    Args:
        clock_ms: returns milliseconds since 1970.
    """
    from mlperf_logging.mllog import mllog

    real, mllog._current_time_ms = mllog._current_time_ms, clock_ms
    try:
        yield
    finally:
        mllog._current_time_ms = real


def reference_point(benchmark: str, ruleset: str, batch_size: int) -> tuple[dict[str, Any], str, Any] | None:
    """Returns MLPerf's reference convergence point (RCP) for a global batch size, by its checker's own functions.

    The public entry point of the checker wants a folder of result files. mlperf-logging 4.1.

    Returns:
        The point in the checker's own format, a description of its source, and the convergence of every published run
        of this batch size, or of the one that stands for it. None if no point exists for a batch as large.
    """
    # Here and not above: it imports scipy's statistics, which takes a second.
    from mlperf_logging.rcp_checker.rcp_checker import RCP_Checker

    checker: Any = RCP_Checker("training", ruleset, benchmark, False)
    kept = "pruned_rcps"
    point = checker._find_rcp(batch_size, kept)
    below, above = checker._find_top_min_rcp(batch_size, kept), checker._find_bottom_max_rcp(batch_size, kept)
    how = f"RCP of batch {batch_size}"
    if point is None and below and above:
        _, point = checker._create_interp_rcp(batch_size, below, above)
        how = f"RCP interpolated between batches {below['BS']} and {above['BS']}"
    elif point is None and above:
        point = checker._find_min_rcp(kept)
        how = f"RCP of batch {point['BS']}, the smallest that counts"
    if point is None:
        return None
    unpruned = checker._find_rcp(batch_size, "full_rcps") or point
    return point, how, point["Epochs to converge"] or unpruned["Epochs to converge"]
