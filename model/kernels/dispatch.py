"""Chooses the implementation of the memory-bound operators: Triton on CUDA, PyTorch's own operators elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

# False uses PyTorch's own operators everywhere, for comparison; the numbers are the same.
USE_TRITON = True
# Within `allocating_only`: whether to allocate as Triton's operators do; None outside.
_allocates_as_triton: bool | None = None


def triton_for(x: Tensor) -> ModuleType | None:
    """Returns `model.kernels.triton` if x is on CUDA and Triton works (PyTorch's CUDA builds include it), else None."""
    if _allocates_as_triton is not None:
        return _allocations() if _allocates_as_triton else None
    return _triton_kernels()[0] if USE_TRITON and x.is_cuda else None


def uses_triton(device: torch.device) -> bool:
    """Returns whether tensors on this device are computed by Triton's operators."""
    return USE_TRITON and device.type == "cuda" and _triton_kernels()[0] is not None


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
    return _triton_kernels()[1] if USE_TRITON and device.type == "cuda" else ""


def _allocations() -> ModuleType:
    from model.kernels import allocations  # imports the operators' modules, which import this one

    return allocations


@lru_cache
def _triton_kernels() -> tuple[ModuleType | None, str]:
    """Returns the kernels, or None and the reason. The first launch needs a C compiler, which a slim image may lack."""
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
