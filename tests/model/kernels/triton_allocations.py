"""What Triton's operators are said to allocate is what they do allocate; their kernels are not launched.

`test_triton.py` runs this file in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from model.kernels import allocations
from model.kernels import triton as triton_kernels
from model.losses import DiceSums
from model.normalization import NormState
from runtime.memory import LiveMemory

LAST = torch.channels_last_3d


@pytest.fixture(autouse=True)
def _no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JITFunction, "__getitem__", lambda kernel, grid: lambda *arguments: None)


def norm_arguments(channels: int) -> tuple[torch.Tensor, NormState]:
    x = torch.zeros(2, channels, 16, 16, 32, dtype=torch.bfloat16).contiguous(memory_format=LAST)
    statistics = torch.ones(2, channels)
    weight = torch.ones(channels)
    return x, NormState(x, x, weight=weight, bias=weight, mean=statistics, inverse_std=statistics)


def forward_norm(module: Any) -> object:
    x, state = norm_arguments(8)
    return module.norm_forward(x, state.weight, state.bias, eps=1e-5, slope=0.0)


def backward_norm(module: Any) -> object:
    x, state = norm_arguments(8)
    return module.norm_backward(x.contiguous(), state, 0.0)


def forward_sums(module: Any) -> object:
    logits = torch.zeros(2, 3, 16, 16, 32, dtype=torch.bfloat16).transpose(2, 4)
    return module.sums_forward(logits, torch.zeros(2, 1, 32, 16, 16, dtype=torch.uint8))


def backward_sums(module: Any) -> object:
    logits = torch.zeros(2, 3, 16, 16, 32).contiguous(memory_format=LAST)
    sums = torch.zeros(2, 3)
    grads = DiceSums(torch.zeros(2), sums, sums, sums)
    return module.sums_backward(logits, torch.zeros(2, 1, 16, 16, 32, dtype=torch.uint8), grads)


@pytest.mark.parametrize("call", [forward_norm, backward_norm, forward_sums, backward_sums])
def test_allocations(call: Callable[[Any], Any]) -> None:
    with LiveMemory() as real:
        expected = call(triton_kernels)
    with LiveMemory() as estimate:
        found = call(allocations)
    results = [result if isinstance(result, tuple) else (result,) for result in (found, expected)]
    for ours, theirs in zip(*results, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
    # The sums per program are left out.
    assert 0.97 * real.peak < estimate.peak <= real.peak
