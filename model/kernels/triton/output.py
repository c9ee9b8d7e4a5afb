"""The 1x1x1 convolution to a few classes: one pass over x forward; backward one pass over x and the gradient."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.tiles import shares

ROWS = 128
SUM_PROGRAMS = 1024


@triton.jit
def _output_forward(
    x,
    weight,
    bias,
    y,
    voxels,
    C: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y = x (N, V, C) times the transpose of weight (K, C), plus bias."""
    sample = tl.program_id(1).to(tl.int64)
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, k = tl.arange(0, C2), tl.arange(0, K2)
    index = (sample * voxels + voxel[:, None]) * C + c[None, :]
    features = tl.load(x + index, (voxel < voxels)[:, None] & (c < C)[None, :], 0.0)
    kernel = tl.load(weight + k[None, :] * C + c[:, None], (c < C)[:, None] & (k < K)[None, :], 0.0)
    result = tl.dot(features, kernel) + tl.load(bias + k, k < K, 0.0).to(tl.float32)[None, :]
    index = (sample * voxels + voxel[:, None]) * K + k[None, :]
    tl.store(y + index, result.to(y.dtype.element_ty), (voxel < voxels)[:, None] & (k < K)[None, :])


@triton.jit
def _output_backward(
    grad,
    x,
    weight,
    dx,
    weight_out,
    bias_out,
    voxels,
    per_program,
    C: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dx, and this program's share of the gradients of weight (K, C) and bias (K)."""
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * per_program
    last = tl.minimum(first + per_program, voxels)
    c, k = tl.arange(0, C2), tl.arange(0, K2)
    kernel = tl.load(weight + k[:, None] * C + c[None, :], (k < K)[:, None] & (c < C)[None, :], 0.0)
    total = tl.zeros((K2, C2), tl.float32)
    bias_total = tl.zeros((ROWS, K2), tl.float32)
    for start in range(first, last, ROWS):
        voxel = start + tl.arange(0, ROWS)
        inside = (voxel < last)[:, None] & (c < C)[None, :]
        index = (sample * voxels + voxel[:, None]) * C + c[None, :]
        features = tl.load(x + index, inside, 0.0)
        g_index = (sample * voxels + voxel[:, None]) * K + k[None, :]
        g = tl.load(grad + g_index, (voxel < last)[:, None] & (k < K)[None, :], 0.0)
        tl.store(dx + index, tl.dot(g, kernel).to(dx.dtype.element_ty), inside)
        total = tl.dot(tl.trans(g), features, total)
        bias_total += g.to(tl.float32)
    program = sample * tl.num_programs(0) + tl.program_id(0)
    index = (program * K + k[:, None]) * C + c[None, :]
    tl.store(weight_out + index, total, (k < K)[:, None] & (c < C)[None, :])
    tl.store(bias_out + program * K + k, tl.sum(bias_total, 0), k < K)


def output_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolves with a 1x1x1 kernel.

    Args:
        x: (N, C, D, H, W) channels-last, 16-bit.
        weight: (K, C, 1, 1, 1), like x.
        bias: (K,).

    Returns:
        (N, K, D, H, W) channels-last.
    """
    n, channels, *size = x.shape
    classes = len(weight)
    y = torch.empty((n, classes, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    voxels = math.prod(size)
    grid = triton.cdiv(voxels, ROWS), n
    matrix = weight.reshape(classes, channels).contiguous()
    _output_forward[grid](x, matrix, bias, y, voxels, *_padded(channels, classes), ROWS)
    return y


def output_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x (like x), weight (K, C, 1, 1, 1) fp32 and bias (K,) fp32.

    Args:
        grad: (N, K, D, H, W) channels-last, like x.
        x, weight: as in `output_forward`.
    """
    n, channels, *size = x.shape
    classes = len(weight)
    voxels = math.prod(size)
    programs, per_program = shares(voxels, ROWS, max(1, SUM_PROGRAMS // n))
    dx = torch.empty_like(x)
    weights = x.new_empty(n * programs, classes, channels, dtype=torch.float32)
    biases = x.new_empty(n * programs, classes, dtype=torch.float32)
    matrix = weight.reshape(classes, channels).contiguous()
    _output_backward[programs, n](
        grad, x, matrix, dx, weights, biases, voxels, per_program, *_padded(channels, classes), ROWS
    )
    return dx, weights.sum(0).view(classes, channels, 1, 1, 1), biases.sum(0)


def _padded(channels: int, classes: int) -> tuple[int, int, int, int]:
    """C and K, each followed by a power of two that a matrix unit multiplies."""
    c, k = (max(16, triton.next_power_of_2(count)) for count in (channels, classes))
    return channels, c, classes, k
