"""Transposed convolution (2x2x2, stride 2) and concatenation with the encoder's features, as one operator.

The transposed convolution is a matrix product (voxels, C) x (C, 8 * F), whose eight blocks of columns are the eight
voxels of the doubled resolution. It is written into the joined tensor where concatenation would copy it to; the
backward pass reads the joined gradient where it is.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.tiles import shares

ROWS, COLUMNS, DEPTH = 128, 64, 32
# Programs that share the sums over voxels of a weight's gradient.
SUM_PROGRAMS = 1024


@triton.jit
def _doubled(voxel, column, D, H, W, F: tl.constexpr):
    """The voxel of the doubled resolution that a column belongs to; voxel and column broadcast."""
    depth, height, width = voxel // (H * W), voxel // W % H, voxel % W
    corner = column // F
    d, h, w = 2 * depth + corner // 4, 2 * height + corner // 2 % 2, 2 * width + corner % 2
    return (d.to(tl.int64) * (2 * H) + h) * (2 * W) + w


@triton.jit
def _join_forward(
    x,
    weight,
    bias,
    skip,
    y,
    D,
    H,
    W,
    blocks,
    C: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """y[..., :F] = transposed convolution of x (N, D, H, W, C) with weight (C, 8 * F), y[..., F:] = skip."""
    sample = tl.program_id(1).to(tl.int64)
    voxels = D * H * W
    voxel = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, C, DEPTH):
        c = start + tl.arange(0, DEPTH)
        index = (sample * voxels + voxel[:, None]) * C + c[None, :]
        features = tl.load(x + index, (voxel < voxels)[:, None] & (c < C)[None, :], 0.0)
        inside = (c < C)[:, None] & (column < 8 * F)[None, :]
        kernel = tl.load(weight + c[:, None] * (8 * F) + column[None, :], inside, 0.0)
        result = tl.dot(features, kernel, result)
    f = column % F
    result += tl.load(bias + f, column < 8 * F, 0.0).to(tl.float32)[None, :]
    inside = (voxel < voxels)[:, None] & (column < 8 * F)[None, :]
    out = sample * 8 * voxels + _doubled(voxel[:, None], column[None, :], D, H, W, F)
    tl.store(y + out * (2 * F) + f[None, :], result.to(y.dtype.element_ty), inside)
    copied = tl.load(skip + out * F + f[None, :], inside, 0.0)
    tl.store(y + out * (2 * F) + F + f[None, :], copied.to(y.dtype.element_ty), inside)


@triton.jit
def _join_input_gradient(
    grad,
    weight,
    dx,
    D,
    H,
    W,
    blocks,
    C: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """dx = gradient of the transposed convolution's input, from the first F channels of grad (N, 2D, 2H, 2W, 2F)."""
    sample = tl.program_id(1).to(tl.int64)
    voxels = D * H * W
    voxel = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, 8 * F, DEPTH):
        column = start + tl.arange(0, DEPTH)
        out = sample * 8 * voxels + _doubled(voxel[:, None], column[None, :], D, H, W, F)
        inside = (voxel < voxels)[:, None] & (column < 8 * F)[None, :]
        g = tl.load(grad + out * (2 * F) + (column % F)[None, :], inside, 0.0)
        inside = (column < 8 * F)[:, None] & (c < C)[None, :]
        kernel = tl.load(weight + c[None, :] * (8 * F) + column[:, None], inside, 0.0)
        result = tl.dot(g, kernel, result)
    index = (sample * voxels + voxel[:, None]) * C + c[None, :]
    tl.store(dx + index, result.to(dx.dtype.element_ty), (voxel < voxels)[:, None] & (c < C)[None, :])


@triton.jit
def _join_weight_gradient(
    x,
    grad,
    weight_out,
    bias_out,
    D,
    H,
    W,
    rows,
    per_program,
    blocks,
    C: tl.constexpr,
    F: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """This program's share of the gradients of weight (C, 8 * F) and bias (8 * F); a row is a voxel of any sample."""
    c = tl.program_id(0) // blocks * CHANNELS + tl.arange(0, CHANNELS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    program = tl.program_id(1).to(tl.int64)
    voxels = D * H * W
    first = program * per_program
    last = tl.minimum(first + per_program, rows)
    total = tl.zeros((CHANNELS, COLUMNS), tl.float32)
    bias_total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        features = tl.load(x + row[None, :] * C + c[:, None], (c < C)[:, None] & (row < last)[None, :], 0.0)
        sample, voxel = row // voxels, (row % voxels).to(tl.int32)
        out = (sample * 8 * voxels)[:, None] + _doubled(voxel[:, None], column[None, :], D, H, W, F)
        inside = (row < last)[:, None] & (column < 8 * F)[None, :]
        g = tl.load(grad + out * (2 * F) + (column % F)[None, :], inside, 0.0)
        total = tl.dot(features, g, total)
        bias_total += tl.sum(g.to(tl.float32), 0)
    index = (program * C + c[:, None]) * (8 * F) + column[None, :]
    tl.store(weight_out + index, total, (c < C)[:, None] & (column < 8 * F)[None, :])
    if tl.program_id(0) // blocks == 0:
        tl.store(bias_out + program * 8 * F + column, bias_total, column < 8 * F)


def join_forward(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes `convolutions.join_forward` in one kernel.

    Args:
        x: (N, C, D, H, W) channels-last, 16-bit.
        skip: (N, F, 2D, 2H, 2W) channels-last, like x.
        weight: (C, F, 2, 2, 2) channels-last, like x.
        bias: (F,).

    Returns:
        (N, 2F, 2D, 2H, 2W) channels-last.
    """
    n, channels, *size = x.shape
    filters = weight.shape[1]
    y = torch.empty(
        (n, 2 * filters, *skip.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d
    )
    blocks = triton.cdiv(8 * filters, COLUMNS)
    grid = triton.cdiv(math.prod(size), ROWS) * blocks, n
    _join_forward[grid](x, _matrix(weight), bias, skip, y, *size, blocks, channels, filters, ROWS, COLUMNS, DEPTH)
    return y


def join_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x (like x), weight (C, F, 2, 2, 2) fp32 and bias (F,) fp32; skip's is a part of grad.

    Args:
        grad: (N, 2F, 2D, 2H, 2W) channels-last, like x.
        x, weight: as in `join_forward`.
    """
    n, channels, *size = x.shape
    filters = weight.shape[1]
    dx = torch.empty_like(x)
    blocks = triton.cdiv(channels, COLUMNS)
    voxels = math.prod(size)
    grid = triton.cdiv(voxels, ROWS) * blocks, n
    _join_input_gradient[grid](grad, _matrix(weight), dx, *size, blocks, channels, filters, ROWS, COLUMNS, DEPTH)
    rows, step, columns = n * voxels, 64, 128
    blocks = triton.cdiv(8 * filters, columns)
    products = triton.cdiv(channels, COLUMNS) * blocks
    programs, per_program = shares(rows, step, max(1, min(SUM_PROGRAMS // products, triton.cdiv(rows, 4 * step))))
    weights = x.new_empty(programs, channels, 8 * filters, dtype=torch.float32)
    biases = x.new_empty(programs, 8 * filters, dtype=torch.float32)
    _join_weight_gradient[products, programs](
        x, grad, weights, biases, *size, rows, per_program, blocks, channels, filters, COLUMNS, columns, step
    )
    dweight = weights.sum(0).view(channels, 2, 2, 2, filters).permute(0, 4, 1, 2, 3)
    return dx, dweight, biases.sum(0).view(8, filters).sum(0)


def _matrix(weight: Tensor) -> Tensor:
    """(C, F, 2, 2, 2) -> (C, 8 * F) contiguous; no copy of a channels-last weight."""
    return weight.permute(0, 2, 3, 4, 1).reshape(len(weight), -1).contiguous()
