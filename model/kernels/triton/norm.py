"""Instance norm and activation: two passes over x forward, two over x and the gradient backward, no others."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.tiles import tiles
from model.normalization import NormState, window_moments, window_sums
from model.slabs import Slabs

# Elements per tile of a kernel that maps x to y, and of one that sums: each element of a tile has its own sums, which
# stay in registers, moments in fewer than gradients. Measured on an H200.
TILE, MOMENTS_TILE, GRADIENT_TILE = 2048, 2048, 1024
# Programs' sums that are added at a time, and channels per program that adds them.
SUM_ROWS, SUM_CHANNELS = 64, 32


@triton.jit
def _moments(x, mean_out, m2_out, voxels, per_program, C: tl.constexpr, C2: tl.constexpr, ROWS: tl.constexpr):
    """Per channel, mean and sum of squared deviations of this program's voxels.

    Each row of the tile keeps its own (Welford 1962), so that no step waits for another row; the rows are combined at
    the end (Chan et al. 1979).
    """
    sample, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    channel = tl.arange(0, C2)
    row = tl.arange(0, ROWS)
    first = program * per_program
    last = tl.minimum(first + per_program, voxels)
    whole = first + (last - first) // ROWS * ROWS
    mean = tl.zeros((ROWS, C2), tl.float32)
    m2 = tl.zeros((ROWS, C2), tl.float32)
    count = 0.0
    for start in range(first, whole, ROWS):
        index = (sample * voxels + start + row[:, None]) * C + channel[None, :]
        value = tl.load(x + index, (channel < C)[None, :], 0.0).to(tl.float32)
        count += 1.0
        delta = value - mean
        mean += delta * (1.0 / count)
        m2 += delta * (value - mean)
    # The last tile may be partly empty: only the rows inside have one more value.
    inside = whole + row < last
    index = (sample * voxels + whole + row[:, None]) * C + channel[None, :]
    value = tl.load(x + index, inside[:, None] & (channel < C)[None, :], 0.0).to(tl.float32)
    counts = count + inside.to(tl.float32)
    delta = tl.where(inside[:, None], value - mean, 0.0)
    mean += delta / tl.maximum(counts, 1.0)[:, None]
    m2 += delta * (value - mean)
    # A first mean, then the mean of what differs from it: the sum of large means alone would lose digits.
    size = (last - first).to(tl.float32)
    rough = tl.sum(mean * counts[:, None], 0) / size
    total_mean = rough + tl.sum((mean - rough[None, :]) * counts[:, None], 0) / size
    away = mean - total_mean[None, :]
    total_m2 = tl.sum(m2 + counts[:, None] * away * away, 0)
    out = (sample * tl.num_programs(0) + program) * C + channel
    tl.store(mean_out + out, total_mean, channel < C)
    tl.store(m2_out + out, total_m2, channel < C)


@triton.jit
def _finish_moments(
    means,
    m2s,
    mean_out,
    m2_out,
    inverse_std_out,
    voxels,
    per_program,
    programs,
    eps,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Combines the programs' moments of a sample, and computes 1 / sqrt(variance + eps)."""
    sample = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.arange(0, ROWS)
    size = voxels * 1.0  # not `.to`: torch.compile first traces the kernel with plain numbers
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, programs, ROWS):
        program = start + row
        inside = (program < programs)[:, None] & (channel < C)[None, :]
        count = tl.minimum(voxels - program * per_program, per_program).to(tl.float32)
        index = (sample * programs + program[:, None]) * C + channel[None, :]
        total += tl.load(means + index, inside, 0.0) * count[:, None]
    # As in `_moments`: a first mean, then the mean of what differs from it.
    rough = tl.sum(total, 0) / size
    off = tl.zeros((ROWS, CHANNELS), tl.float32)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, programs, ROWS):
        program = start + row
        inside = (program < programs)[:, None] & (channel < C)[None, :]
        count = tl.minimum(voxels - program * per_program, per_program).to(tl.float32)
        index = (sample * programs + program[:, None]) * C + channel[None, :]
        away = tl.where(inside, tl.load(means + index, inside, 0.0) - rough[None, :], 0.0)
        off += count[:, None] * away
        total += tl.load(m2s + index, inside, 0.0) + count[:, None] * away * away
    correction = tl.sum(off, 0) / size
    mean = rough + correction
    m2 = tl.sum(total, 0) - size * correction * correction
    variance = m2 / size
    tl.store(mean_out + sample * C + channel, mean, channel < C)
    tl.store(m2_out + sample * C + channel, m2, channel < C)
    tl.store(inverse_std_out + sample * C + channel, 1.0 / tl.sqrt(variance + eps), channel < C)


@triton.jit
def _normalize(
    x,
    y,
    weight,
    bias,
    mean,
    inverse_std,
    slope,
    voxels,
    C: tl.constexpr,
    C2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y = leaky_relu(x * scale + shift)."""
    sample = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, C2)
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
    index = (sample * voxels + voxel[:, None]) * C + channel[None, :]
    value = tl.load(x + index, inside, 0.0).to(tl.float32)
    scale, shift = _affine(weight, bias, mean, inverse_std, sample, channel, C)
    value = value * scale[None, :] + shift[None, :]
    value = tl.where(value > 0, value, value * slope)
    tl.store(y + index, value.to(y.dtype.element_ty), inside)


@triton.jit
def _affine(weight, bias, mean, inverse_std, sample, channel, C: tl.constexpr):
    """Scale and shift of a sample's channels, with which norm is x * scale + shift."""
    inside = channel < C
    scale = tl.load(weight + channel, inside, 0.0).to(tl.float32) * tl.load(
        inverse_std + sample * C + channel, inside, 0.0
    )
    shift = (
        tl.load(bias + channel, inside, 0.0).to(tl.float32) - tl.load(mean + sample * C + channel, inside, 0.0) * scale
    )
    return scale, shift


@triton.jit
def _gradient_sums(
    grad,
    x,
    weight,
    bias,
    mean,
    inverse_std,
    g_out,
    gx_out,
    slope,
    voxels,
    per_program,
    C: tl.constexpr,
    C2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums of g and of g * (x - mean) over this program's voxels; g is the gradient before the activation."""
    sample, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    channel = tl.arange(0, C2)
    scale, shift = _affine(weight, bias, mean, inverse_std, sample, channel, C)
    centre = tl.load(mean + sample * C + channel, channel < C, 0.0)
    first = program * per_program
    last = tl.minimum(first + per_program, voxels)
    g_sum = tl.zeros((ROWS, C2), tl.float32)
    gx_sum = tl.zeros((ROWS, C2), tl.float32)
    for start in range(first, last, ROWS):
        voxel = start + tl.arange(0, ROWS)
        inside = (voxel < last)[:, None] & (channel < C)[None, :]
        index = (sample * voxels + voxel[:, None]) * C + channel[None, :]
        value = tl.load(x + index, inside, 0.0).to(tl.float32)
        g = tl.load(grad + index, inside, 0.0).to(tl.float32)
        g = tl.where(value * scale[None, :] + shift[None, :] > 0, g, g * slope)
        g_sum += g
        gx_sum += g * (value - centre[None, :])
    index = (sample * tl.num_programs(0) + program) * C + channel
    tl.store(g_out + index, tl.sum(g_sum, 0), channel < C)
    tl.store(gx_out + index, tl.sum(gx_sum, 0), channel < C)


@triton.jit
def _finish_gradient_sums(
    g_sums,
    gx_sums,
    weight,
    mean,
    inverse_std,
    slope_out,
    base_out,
    dweight_out,
    dbias_out,
    voxels,
    programs,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds the programs' sums: a sample's gradients of weight and bias, and the line in x that dx contains."""
    sample = tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.arange(0, ROWS)
    size = voxels * 1.0  # as in `_finish_moments`
    g = tl.zeros((ROWS, CHANNELS), tl.float32)
    gx = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, programs, ROWS):
        inside = (start + row < programs)[:, None] & (channel < C)[None, :]
        index = (sample * programs + start + row[:, None]) * C + channel[None, :]
        g += tl.load(g_sums + index, inside, 0.0)
        gx += tl.load(gx_sums + index, inside, 0.0)
    out, inside = sample * C + channel, channel < C
    inverse = tl.load(inverse_std + out, inside, 0.0)
    scale = tl.load(weight + channel, inside, 0.0).to(tl.float32) * inverse
    dbias = tl.sum(g, 0)
    dweight = tl.sum(gx, 0) * inverse
    slope_x = -scale * inverse * dweight / size
    base = -scale * dbias / size - slope_x * tl.load(mean + out, inside, 0.0)
    tl.store(slope_out + out, slope_x, inside)
    tl.store(base_out + out, base, inside)
    tl.store(dweight_out + out, dweight, inside)
    tl.store(dbias_out + out, dbias, inside)


@triton.jit
def _gradient(
    grad,
    x,
    dx,
    weight,
    bias,
    mean,
    inverse_std,
    slope_x,
    base,
    slope,
    voxels,
    C: tl.constexpr,
    C2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dx = scale * g + slope_x * x + base."""
    sample = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, C2)
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
    index = (sample * voxels + voxel[:, None]) * C + channel[None, :]
    scale, shift = _affine(weight, bias, mean, inverse_std, sample, channel, C)
    linear = tl.load(slope_x + sample * C + channel, channel < C, 0.0)
    constant = tl.load(base + sample * C + channel, channel < C, 0.0)
    value = tl.load(x + index, inside, 0.0).to(tl.float32)
    g = tl.load(grad + index, inside, 0.0).to(tl.float32)
    g = tl.where(value * scale[None, :] + shift[None, :] > 0, g, g * slope)
    result = g * scale[None, :] + value * linear[None, :] + constant[None, :]
    tl.store(dx + index, result.to(dx.dtype.element_ty), inside)


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, slope: float, slabs: Slabs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `normalization.norm_forward` in three kernels, which read x twice and write y once."""
    n, channels = x.shape[:2]
    voxels = math.prod(x.shape[2:])
    padded, rows, programs, per_program = tiles(channels, voxels, MOMENTS_TILE)
    partial = x.new_empty(2, n, programs, channels, dtype=torch.float32)
    _moments[programs, n](x, partial[0], partial[1], voxels, per_program, channels, padded, rows)
    mean, m2, inverse_std = x.new_empty(3, n, channels, dtype=torch.float32)
    _finish_moments[triton.cdiv(channels, SUM_CHANNELS), n](
        *(partial[0], partial[1], mean, m2, inverse_std),
        *(voxels, per_program, programs, eps, channels, SUM_CHANNELS, SUM_ROWS),
    )
    if slabs is not None:
        mean, variance = window_moments(mean, m2, voxels, slabs)
        inverse_std = (variance + eps).rsqrt()
    y = torch.empty_like(x)
    rows = max(1, TILE // padded)
    _normalize[triton.cdiv(voxels, rows), n](
        x, y, weight, bias, mean, inverse_std, slope, voxels, channels, padded, rows
    )
    return y, mean, inverse_std


def norm_backward(
    grad: Tensor, state: NormState, slope: float, slabs: Slabs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `normalization.norm_backward` in three kernels, which read grad and x twice and write dx once.

    They do not read y: its sign follows from x, which they read anyway.
    """
    x, affine = state.x, (state.weight, state.bias, state.mean, state.inverse_std)
    grad = grad.contiguous(memory_format=torch.channels_last_3d)
    n, channels = x.shape[:2]
    voxels = math.prod(x.shape[2:])
    padded, rows, programs, per_program = tiles(channels, voxels, GRADIENT_TILE)
    partial = x.new_empty(2, n, programs, channels, dtype=torch.float32)
    _gradient_sums[programs, n](
        grad, x, *affine, partial[0], partial[1], slope, voxels, per_program, channels, padded, rows
    )
    slope_x, base = x.new_empty(2, n, channels, dtype=torch.float32)
    of_samples = x.new_empty(2, n, channels, dtype=torch.float32)
    _finish_gradient_sums[triton.cdiv(channels, SUM_CHANNELS), n](
        *(partial[0], partial[1], state.weight, state.mean, state.inverse_std),
        *(slope_x, base, of_samples[0], of_samples[1]),
        *(voxels, programs, channels, SUM_CHANNELS, SUM_ROWS),
    )
    if slabs is not None:
        dbias, dweight, window_voxels = window_sums(of_samples[1], of_samples[0], voxels, slabs)
        scale = state.weight * state.inverse_std
        slope_x = -scale * state.inverse_std * dweight / window_voxels
        base = -scale * dbias / window_voxels - slope_x * state.mean
    dx = torch.empty_like(x)
    rows = max(1, TILE // padded)
    _gradient[triton.cdiv(voxels, rows), n](grad, x, dx, *affine, slope_x, base, slope, voxels, channels, padded, rows)
    dweight, dbias = of_samples.sum(1)
    return dx, dweight, dbias
