"""A stand-in for a GPU, for tests on machines without one.

A `GpuTensor` says that it is on cuda:0 and keeps its values in a CPU tensor, so results can be compared with a CPU's to
the bit. While a `FakeGpu` is active, it
- records in `waits` whatever would make the host wait for a GPU: reading a value, an operation whose result's shape
  depends on values, a copy that is not asynchronous, a synchronization;
- raises where an operation gets tensors of both devices. Stricter than CUDA, which takes a CPU tensor without axes as
  a number: in a step, that is a tensor whose device was forgotten;
- delivers asynchronous copies to pinned memory only when an event after them, or the GPU, is waited for. Until then the
  memory holds NaN, or -1 for integers.

It does not imitate streams, kernels, NCCL or out-of-memory errors, and autocast computes as on a CPU.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from common.compat import TorchDispatchMode, tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[1]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# Operations that read values, and those whose result's shape depends on values.
READS = {
    name: name.replace("_local_scalar_dense", "item")
    for name in (
        *("_local_scalar_dense", "equal", "allclose", "nonzero", "masked_select"),
        *("_unique2", "unique_dim", "bincount"),
    )
}
# Torch gives `where` a number as a CPU tensor; the other only compares types.
TAKES_BOTH = ("where", "_has_compatible_shallow_copy_type")


class GpuTensor(Tensor):
    """A tensor on the fake GPU, with its values in `held`."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[GpuTensor], held: Tensor) -> GpuTensor:
        made: GpuTensor = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CPU
        )
        made.held = held
        return made

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, value: GpuTensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} while no fake GPU is active")

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"GpuTensor({self.held!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else str(self), spec)

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> Any:
        """As of a tensor; here because torch believes that the tensor is on the CPU already."""
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        format_ = memory_format or torch.preserve_format
        if device is None or device.type == "cuda":
            return super().to(dtype=dtype or self.dtype, memory_format=format_, copy=copy)
        if device.type == "cpu":  # `to` makes no pinned memory, so not asynchronously
            FakeGpu.active().wait("copy to the host")
        held: Tensor = self.detach().held  # type: ignore[attr-defined]
        return held.clone().to(device, dtype=dtype or self.dtype, memory_format=format_)

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        host: Tensor = self.to("cpu", memory_format=memory_format)
        return host

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy  # type: ignore[assignment]


class FakeGpu(TorchDispatchMode):
    """Runs the operations of a block on CPU and fake GPU.

    Attributes:
        waits: what made the host wait, as "what in function", with the innermost function of the project.
        pinned: the pinned memory made so far.
        copies_to_device: asynchronous ones, as ("pinned" or "pageable", shape).
    """

    _active: ClassVar[list[FakeGpu]] = []

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.copies_to_device: list[tuple[str, tuple[int, ...]]] = []
        # Copies under way, each with its place in the order of the GPU's work.
        self._stream: deque[tuple[int, Callable[[], object]]] = deque()
        self._time = 0
        self.pinned: list[Tensor] = []

    @classmethod
    def active(cls) -> FakeGpu:
        return cls._active[-1]

    def __enter__(self) -> FakeGpu:
        self._active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._active.pop()

    def wait(self, what: str, until: int | None = None) -> None:
        """Records that the host waits, and does the GPU's work until then; None: all of it."""
        self.waits.append(f"{what} in {_caller()}")
        self.advance(until)

    def advance(self, until: int | None = None) -> None:
        """Delivers the copies that were started before a point in time."""
        while self._stream and (until is None or self._stream[0][0] < until):
            self._stream.popleft()[1]()

    def now(self) -> int:
        self._time += 1
        return self._time

    def is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage().data_ptr() == own.untyped_storage().data_ptr() for own in self.pinned)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), dict(kwargs or {})
        if torch.is_inference_mode_enabled():  # in which composite operations arrive whole
            with self:
                if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_gpu = any(isinstance(tensor, GpuTensor) for tensor in tensors)
        device = kwargs.get("device")
        to_gpu = on_gpu if device is None else device.type == "cuda"
        # Autograd's formulas name the device that torch believes in.
        to_gpu |= on_gpu and name.startswith(("_to_copy", "new_"))
        if device is not None:
            kwargs["device"] = CPU
        pin = bool(kwargs.pop("pin_memory", None)) or name == "_pin_memory"
        if name == "copy_":
            return self._copy(*args, **kwargs)
        if name == "_to_copy" and to_gpu and not on_gpu:
            self._send(args[0], kwargs.get("non_blocking", False))
        elif on_gpu and name not in TAKES_BOTH and not all(isinstance(tensor, GpuTensor) for tensor in tensors):
            raise RuntimeError(f"{name}: tensors on {CPU} and {GPU}")
        if on_gpu and (name in READS or _has_mask(name, args)):
            self.wait(READS.get(name, "boolean mask"))
        with torch.inference_mode(False) if _is_plain_view(func, tensors) else nullcontext():
            if name == "_pin_memory":
                result = args[0].clone()
            else:
                result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
            if pin:
                self.pinned.append(result)
            if func._schema.is_mutable:
                return _written(func, args, kwargs)
            return tree_map(_on_gpu, result) if to_gpu else result

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        values = _held(source)
        if isinstance(target, GpuTensor) or not isinstance(source, GpuTensor):
            if isinstance(target, GpuTensor) and not isinstance(source, GpuTensor):
                self._send(source, non_blocking)
            _held(target).copy_(values)
        elif non_blocking and self.is_pinned(target):
            values = values.clone()
            target.fill_(float("nan") if target.is_floating_point() else -1)
            self._stream.append((self.now(), lambda: target.copy_(values)))
        else:
            self.wait("copy to the host")
            target.copy_(values)
        return target

    def _send(self, source: Tensor, non_blocking: bool) -> None:
        if not non_blocking:
            self.wait("copy to the device")
        else:
            self.copies_to_device.append(("pinned" if self.is_pinned(source) else "pageable", tuple(source.shape)))


def _held(value: Any) -> Any:
    return value.held if isinstance(value, GpuTensor) else value


def _on_gpu(value: Any) -> Any:
    return GpuTensor(value) if isinstance(value, Tensor) else value


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """Returns the arguments that an operation in place, or with `out`, returns."""
    given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | kwargs
    written = [given[argument.name] for argument in func._schema.arguments if argument.is_write]
    return (written[0] if len(func._schema.returns) == 1 else tuple(written)) if func._schema.returns else None


def _is_plain_view(func: Any, tensors: list[Tensor]) -> bool:
    """Returns whether inference mode must not see an operation: a view of a tensor made outside of this mode."""
    is_view = not func._schema.is_mutable and any(returned.alias_info for returned in func._schema.returns)
    return is_view and torch.is_inference_mode_enabled() and not tensors[0].is_inference()


def _has_mask(name: str, args: Any) -> bool:
    """Returns whether an operation picks the elements where a mask is true."""
    indices = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _caller() -> str:
    """Returns the innermost function of the project, outside of the tests; else of the test."""
    frame, test = sys._getframe(1), "nowhere"
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        # An environment may lie in the project's folder.
        if path.is_relative_to(ROOT) and path != Path(__file__) and "site-packages" not in path.parts:
            if not path.is_relative_to(ROOT / "tests"):
                return frame.f_code.co_name
            test = frame.f_code.co_name
            if test.startswith("test_"):
                break
        frame = frame.f_back
    return test


class FakeEvent:
    """A stand-in for `torch.cuda.Event`; its time in ms is the order of the GPU's work."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing
        self.recorded: int | None = None

    def record(self, stream: object = None) -> None:
        self.recorded = FakeGpu.active().now()

    def synchronize(self) -> None:
        assert self.recorded is not None, "an event that was not recorded is not waited for"
        FakeGpu.active().advance(self.recorded)

    def elapsed_time(self, other: FakeEvent) -> float:
        assert self.enable_timing
        assert other.enable_timing
        assert self.recorded is not None
        assert other.recorded is not None
        return float(other.recorded - self.recorded)


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Activates a fake GPU for a block, and replaces what torch asks the driver until `monkeypatch` is undone."""
    if torch.cuda.is_available():
        torch.cuda.init()  # torch notes that it has done so, and the replaced function would not
    gpu, group = FakeGpu(), torch._C._group_tensors_by_device_and_dtype
    autocast, overwrites = torch.autocast, torch.__future__.get_overwrite_module_params_on_conversion()

    def grouped(*args: Any) -> Any:
        found = group(*args)
        return {(lists[0][0][0].device, dtype): lists for (_, dtype), lists in found.items()}

    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)
    # torch 2.14: asks the accelerator's driver whether a graph is being captured.
    monkeypatch.setattr(
        torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None, raising=False
    )
    monkeypatch.setattr(torch, "autocast", lambda device, **settings: autocast("cpu", **settings))
    for name, replacement in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device=None: (9, 0),
        "Event": FakeEvent,
        "synchronize": lambda device=None: gpu.wait("synchronize"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    # A module's parameters become GpuTensors by replacement: the data of a CPU tensor cannot.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with gpu:
            yield gpu
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
