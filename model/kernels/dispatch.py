"""Which implementation of the memory-bound operators a tensor gets: Triton's on CUDA, PyTorch's own elsewhere."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

# False computes everything in PyTorch's terms, for comparison; the numbers are the same.
USE_TRITON = True


def triton_for(x: Tensor) -> ModuleType | None:
    """`model.kernels.triton` where x is on CUDA and Triton works (PyTorch's CUDA builds bring it), else None."""
    return _triton_kernels()[0] if USE_TRITON and x.is_cuda else None


def note(device: torch.device) -> str:
    """One line for the user where a GPU's kernels cannot be used, else ""."""
    return _triton_kernels()[1] if USE_TRITON and device.type == "cuda" else ""


@lru_cache
def _triton_kernels() -> tuple[ModuleType | None, str]:
    """The kernels, or why there are none. Their first launch needs a C compiler, which a slim image may lack."""
    try:
        from model.kernels import triton as triton_kernels

        _launch(triton_kernels)
    except Exception as error:  # whatever Triton or its compiler raise: PyTorch's own operators compute the same
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return None, f"Triton's kernels cannot be used ({reason}); PyTorch's own operators are slower"
    return triton_kernels, ""


def _launch(kernels: ModuleType) -> None:
    logits, labels = torch.zeros(1, 2, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1, dtype=torch.uint8)
    kernels.sums_forward(logits.cuda(), labels.cuda())
