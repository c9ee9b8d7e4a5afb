"""Chooses the implementation of the memory-bound operators: Triton on CUDA, PyTorch's own operators elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

# Norm and activation; the loss's sums; the convolution of the image; 3x3x3 convolutions to few channels; transposed
# convolution and concatenation; the convolution to the classes.
OPERATORS = ("norm", "loss", "image", "narrow", "join", "output")
# Compute capabilities on which a kernel was measured to be faster than cuDNN's; elsewhere cuDNN computes.
ONLY_ON = {"narrow": (9,)}
# Those that PyTorch's own operators compute on CUDA too, for comparison: the same to within rounding.
_plain: frozenset[str] = frozenset()
# Operators whose allocations `allocations.py` knows; PyTorch's own allocate no less than the other kernels.
ALLOCATING = ("norm", "loss")
# Within `allocating_only`: whether to allocate as Triton's operators do; None outside.
_allocates_as_triton: bool | None = None
# The kernels, or None and the reason; None before the first use. A cached function would make torch.compile warn.
_loaded: tuple[ModuleType | None, str] | None = None


def triton_for(x: Tensor, operator: str) -> ModuleType | None:
    """Returns `model.kernels.triton` if it computes the operator of x, else None.

    It does on CUDA if Triton works (PyTorch's CUDA builds include it), unless `use_plain` excludes the operator or it
    is slower there (`ONLY_ON`).
    """
    if _allocates_as_triton is not None:
        return _allocations() if _allocates_as_triton and operator in set(ALLOCATING) - _plain else None
    if not x.is_cuda or operator in _plain:
        return None
    if operator in ONLY_ON and torch.cuda.get_device_capability(x.device)[0] not in ONLY_ON[operator]:
        return None
    return _triton_kernels()[0]


def use_plain(operators: Iterable[str]) -> None:
    """Lets PyTorch's own operators compute these `OPERATORS` ("all": every one), and Triton's kernels all others."""
    global _plain
    chosen = frozenset(operators)
    _plain = frozenset(OPERATORS) if "all" in chosen else chosen


@contextmanager
def plain(operators: Iterable[str]) -> Iterator[None]:
    """Lets PyTorch's own operators compute these, too, inside the block."""
    before = _plain
    use_plain(before | frozenset(operators))
    try:
        yield
    finally:
        use_plain(before)


def uses_triton(device: torch.device) -> bool:
    """Returns whether tensors on this device are computed by Triton's operators."""
    return device.type == "cuda" and _triton_kernels()[0] is not None


@contextmanager
def allocating_only(as_triton: bool) -> Iterator[None]:
    """Within it tensors have no values: the operators allocate what Triton's do, or else run PyTorch's own."""
    global _allocates_as_triton
    before, _allocates_as_triton = _allocates_as_triton, as_triton
    try:
        yield
    finally:
        _allocates_as_triton = before


def note(device: torch.device) -> str:
    """Returns a line for the user if the kernels cannot be used on this GPU, else ""."""
    return _triton_kernels()[1] if device.type == "cuda" and set(OPERATORS) - _plain else ""


def _allocations() -> ModuleType:
    from model.kernels import allocations  # imports the operators' modules, which import this one

    return allocations


def _triton_kernels() -> tuple[ModuleType | None, str]:
    """Returns the kernels, or None and the reason."""
    global _loaded
    if _loaded is None:
        _loaded = _load()
    return _loaded


def _load() -> tuple[ModuleType | None, str]:
    """Imports the kernels and launches one: that needs a C compiler, which a slim image may lack."""
    try:
        from model.kernels import triton as triton_kernels

        _launch(triton_kernels)
    except Exception as error:  # Triton and its compiler may raise anything; PyTorch's own operators still work
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return None, f"Triton kernels cannot be used ({reason}); PyTorch's own operators are slower"
    return triton_kernels, ""


def _launch(kernels: ModuleType) -> None:
    logits, labels = torch.zeros(1, 2, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1, dtype=torch.uint8)
    kernels.sums_forward(logits.cuda(), labels.cuda())
