"""The sum of two gradients of which one is a part of a wider tensor."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096


@triton.jit
def _add_part(a, b, out, rows, stride, C: tl.constexpr, C2: tl.constexpr, ROWS: tl.constexpr):
    """out = a + b, for rows of C elements that in b lie `stride` apart."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, C2)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    total = tl.load(a + row[:, None] * C + c[None, :], inside, 0.0).to(tl.float32)
    total += tl.load(b + row[:, None] * stride + c[None, :], inside, 0.0).to(tl.float32)
    tl.store(out + row[:, None] * C + c[None, :], total.to(out.dtype.element_ty), inside)


def add_part(a: Tensor, b: Tensor) -> Tensor:
    """Returns a + b, like a.

    Args:
        a: (N, C, D, H, W) channels-last.
        b: of the same shape: channels of a wider channels-last tensor.
    """
    n, channels, *size = a.shape
    out = torch.empty_like(a)
    padded = triton.next_power_of_2(channels)
    rows_per_tile = max(1, TILE // padded)
    rows = n * math.prod(size)
    _add_part[(triton.cdiv(rows, rows_per_tile),)](a, b, out, rows, b.stride(4), channels, padded, rows_per_tile)
    return out
