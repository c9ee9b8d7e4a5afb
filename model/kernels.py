"""Which implementation of the memory-bound operators a tensor gets: Triton's on CUDA, PyTorch's own elsewhere."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

from torch import Tensor

# False computes everything in PyTorch's terms, for comparison; the numbers are the same.
USE_TRITON = True


def triton_for(x: Tensor) -> ModuleType | None:
    """`model.triton_kernels` where x is on CUDA and Triton is installed (PyTorch's CUDA builds bring it), else None."""
    return _triton_kernels() if USE_TRITON and x.is_cuda else None


@lru_cache
def _triton_kernels() -> ModuleType | None:
    try:
        from model import triton_kernels
    except ImportError:
        return None
    return triton_kernels
