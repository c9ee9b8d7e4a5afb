"""The memory-bound operators of a training step as Triton kernels for CUDA.

`normalization.py` and `losses.py` define what they compute, with PyTorch versions that the tests compare them with.
Every sum has two stages, partial sums per program and then their total, without atomics: the same bits on every run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.losses import DiceSums
from model.normalization import NormState, window_moments, window_sums
from model.slabs import Slabs

# Elements per tile: 16 KiB in fp32, so that the registers of one program hold two tensors.
TILE = 4096
# The softmax holds more tensors per tile; with 4096 elements it needs more registers than Hopper has.
SOFTMAX_TILE = 1024
# Programs per sample: enough to fill a large GPU (132 SMs on H200) at batch 1, few enough to sum in one step.
PROGRAMS = 512


@triton.jit
def _moments(x, mean_out, m2_out, voxels, per_program, C: tl.constexpr, C2: tl.constexpr, ROWS: tl.constexpr):
    """Per channel, mean and sum of squared deviations of this program's voxels, tile by tile (Chan et al. 1979)."""
    sample, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    channel = tl.arange(0, C2)
    first = program * per_program
    last = tl.minimum(first + per_program, voxels)
    count = 0.0
    mean = tl.zeros((C2,), tl.float32)
    m2 = tl.zeros((C2,), tl.float32)
    for start in range(first, last, ROWS):
        voxel = start + tl.arange(0, ROWS)
        inside = (voxel < last)[:, None] & (channel < C)[None, :]
        value = tl.load(x + (sample * voxels + voxel[:, None]) * C + channel[None, :], inside, 0.0).to(tl.float32)
        size = tl.minimum(last - start, ROWS).to(tl.float32)
        tile_mean = tl.sum(value, 0) / size
        centred = tl.where(inside, value - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        total = count + size
        m2 += tl.sum(centred * centred, 0) + delta * delta * (count * size / total)
        mean += delta * (size / total)
        count = total
    index = (sample * tl.num_programs(0) + program) * C + channel
    tl.store(mean_out + index, mean, channel < C)
    tl.store(m2_out + index, m2, channel < C)


@triton.jit
def _normalize(x, y, scale, shift, slope, voxels, C: tl.constexpr, C2: tl.constexpr, ROWS: tl.constexpr):
    """y = leaky_relu(x * scale + shift), scale and shift (N, C)."""
    sample = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, C2)
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
    index = (sample * voxels + voxel[:, None]) * C + channel[None, :]
    value = tl.load(x + index, inside, 0.0).to(tl.float32)
    factor = tl.load(scale + sample * C + channel, channel < C, 0.0)
    offset = tl.load(shift + sample * C + channel, channel < C, 0.0)
    value = value * factor[None, :] + offset[None, :]
    value = tl.where(value > 0, value, value * slope)
    tl.store(y + index, value.to(y.dtype.element_ty), inside)


@triton.jit
def _gradient_sums(
    grad,
    x,
    scale,
    shift,
    mean,
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
    factor = tl.load(scale + sample * C + channel, channel < C, 0.0)
    offset = tl.load(shift + sample * C + channel, channel < C, 0.0)
    centre = tl.load(mean + sample * C + channel, channel < C, 0.0)
    first = program * per_program
    last = tl.minimum(first + per_program, voxels)
    g_sum = tl.zeros((C2,), tl.float32)
    gx_sum = tl.zeros((C2,), tl.float32)
    for start in range(first, last, ROWS):
        voxel = start + tl.arange(0, ROWS)
        inside = (voxel < last)[:, None] & (channel < C)[None, :]
        index = (sample * voxels + voxel[:, None]) * C + channel[None, :]
        value = tl.load(x + index, inside, 0.0).to(tl.float32)
        g = tl.load(grad + index, inside, 0.0).to(tl.float32)
        g = tl.where(value * factor[None, :] + offset[None, :] > 0, g, g * slope)
        g_sum += tl.sum(g, 0)
        gx_sum += tl.sum(g * (value - centre[None, :]), 0)
    index = (sample * tl.num_programs(0) + program) * C + channel
    tl.store(g_out + index, g_sum, channel < C)
    tl.store(gx_out + index, gx_sum, channel < C)


@triton.jit
def _gradient(
    grad, x, dx, scale, shift, slope_x, base, slope, voxels, C: tl.constexpr, C2: tl.constexpr, ROWS: tl.constexpr
):
    """dx = scale * g + slope_x * x + base."""
    sample = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, C2)
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (voxel < voxels)[:, None] & (channel < C)[None, :]
    index = (sample * voxels + voxel[:, None]) * C + channel[None, :]
    factor = tl.load(scale + sample * C + channel, channel < C, 0.0)
    offset = tl.load(shift + sample * C + channel, channel < C, 0.0)
    linear = tl.load(slope_x + sample * C + channel, channel < C, 0.0)
    constant = tl.load(base + sample * C + channel, channel < C, 0.0)
    value = tl.load(x + index, inside, 0.0).to(tl.float32)
    g = tl.load(grad + index, inside, 0.0).to(tl.float32)
    g = tl.where(value * factor[None, :] + offset[None, :] > 0, g, g * slope)
    result = g * factor[None, :] + value * linear[None, :] + constant[None, :]
    tl.store(dx + index, result.to(dx.dtype.element_ty), inside)


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, slope: float, slabs: Slabs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `normalization.norm_forward` in two kernels, which read x twice and write y once."""
    n, channels = x.shape[:2]
    voxels = math.prod(x.shape[2:])
    padded, rows, programs, per_program = _tiles(channels, voxels, TILE)
    means, m2 = x.new_empty(2, n, programs, channels, dtype=torch.float32)
    _moments[programs, n](x, means, m2, voxels, per_program, channels, padded, rows)
    counts = torch.full((programs, 1), per_program, dtype=torch.float32, device=x.device)
    counts[-1] = voxels - (programs - 1) * per_program
    mean = (means * counts).sum(1) / voxels
    own_m2 = (m2 + counts * (means - mean[:, None]) ** 2).sum(1)
    mean, variance = window_moments(mean, own_m2, voxels, slabs)
    inverse_std = (variance + eps).rsqrt()
    scale = weight * inverse_std
    y = torch.empty_like(x)
    _normalize[triton.cdiv(voxels, rows), n](x, y, scale, bias - mean * scale, slope, voxels, channels, padded, rows)
    return y, mean, inverse_std


def norm_backward(
    grad: Tensor, state: NormState, slope: float, slabs: Slabs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `normalization.norm_backward` in two kernels, which read grad and x twice and write dx once.

    They do not read y: its sign follows from x, which they read anyway.
    """
    x, mean, inverse_std = state.x, state.mean, state.inverse_std
    grad = grad.contiguous(memory_format=torch.channels_last_3d)
    n, channels = x.shape[:2]
    voxels = math.prod(x.shape[2:])
    padded, rows, programs, per_program = _tiles(channels, voxels, TILE)
    scale = state.weight * inverse_std
    shift = state.bias - mean * scale
    sums = x.new_empty(2, n, programs, channels, dtype=torch.float32)
    _gradient_sums[programs, n](
        grad, x, scale, shift, mean, sums[0], sums[1], slope, voxels, per_program, channels, padded, rows
    )
    dbias, dweight = sums.sum(2)
    dweight = dweight * inverse_std
    window_dbias, window_dweight, window_voxels = window_sums(dbias, dweight, voxels, slabs)
    slope_x = -scale * inverse_std * window_dweight / window_voxels
    base = -scale * window_dbias / window_voxels - slope_x * mean
    dx = torch.empty_like(x)
    _gradient[triton.cdiv(voxels, rows), n](
        grad, x, dx, scale, shift, slope_x, base, slope, voxels, channels, padded, rows
    )
    return dx, dweight.sum(0), dbias.sum(0)


def _tiles(channels: int, voxels: int, tile: int) -> tuple[int, int, int, int]:
    """Returns channels padded to a power of two, voxels per tile, programs per sample and voxels per program.

    A program gets whole tiles, except for the last one.
    """
    padded = triton.next_power_of_2(channels)
    rows = max(1, tile // padded)
    tiles = triton.cdiv(voxels, rows)
    per_program = triton.cdiv(tiles, PROGRAMS) * rows
    return padded, rows, triton.cdiv(voxels, per_program), per_program


@triton.jit
def _sums(
    logits,
    labels,
    overlaps,
    cross_entropy,
    voxels,
    per_program,
    class_stride,
    voxel_stride,
    K: tl.constexpr,
    K2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The fields of `DiceSums`, over this program's voxels."""
    sample, program = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    value = tl.arange(0, K2).to(tl.int64)
    first = program * per_program
    last = tl.minimum(first + per_program, voxels)
    intersection = tl.zeros((K2,), tl.float32)
    predicted = tl.zeros((K2,), tl.float32)
    true = tl.zeros((K2,), tl.float32)
    entropy = tl.zeros((ROWS,), tl.float32)
    for start in range(first, last, ROWS):
        voxel = start + tl.arange(0, ROWS)
        in_volume = voxel < last
        inside = in_volume[:, None] & (value < K)[None, :]
        index = sample * voxels * K + voxel[:, None] * voxel_stride + value[None, :] * class_stride
        logit = tl.load(logits + index, inside, 0.0).to(tl.float32)
        label = tl.load(labels + sample * voxels + voxel, in_volume, 0).to(tl.int32)
        largest = tl.max(tl.where(inside, logit, -float("inf")), 1)
        largest = tl.where(in_volume, largest, 0.0)
        exponential = tl.where(inside, tl.exp(logit - largest[:, None]), 0.0)
        total = tl.where(in_volume, tl.sum(exponential, 1), 1.0)
        probability = exponential / total[:, None]
        is_true = inside & (label[:, None] == value[None, :])
        intersection += tl.sum(tl.where(is_true, probability, 0.0), 0)
        predicted += tl.sum(probability, 0)
        true += tl.sum(is_true.to(tl.float32), 0)
        entropy += tl.where(in_volume, largest + tl.log(total) - tl.sum(tl.where(is_true, logit, 0.0), 1), 0.0)
    row = sample * tl.num_programs(0) + program
    plane = tl.num_programs(0) * tl.num_programs(1) * K
    tl.store(overlaps + row * K + value, intersection, value < K)
    tl.store(overlaps + plane + row * K + value, predicted, value < K)
    tl.store(overlaps + 2 * plane + row * K + value, true, value < K)
    tl.store(cross_entropy + row, tl.sum(entropy, 0))


@triton.jit
def _sums_gradient(
    logits,
    labels,
    gradient,
    entropy_gradient,
    intersection_gradient,
    predicted_gradient,
    voxels,
    class_stride,
    voxel_stride,
    K: tl.constexpr,
    K2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradient in `losses.sums_backward`."""
    sample = tl.program_id(1).to(tl.int64)
    value = tl.arange(0, K2).to(tl.int64)
    voxel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_volume = voxel < voxels
    inside = in_volume[:, None] & (value < K)[None, :]
    index = sample * voxels * K + voxel[:, None] * voxel_stride + value[None, :] * class_stride
    logit = tl.load(logits + index, inside, 0.0).to(tl.float32)
    label = tl.load(labels + sample * voxels + voxel, in_volume, 0).to(tl.int32)
    d_entropy = tl.load(entropy_gradient + sample)
    d_intersection = tl.load(intersection_gradient + sample * K + value, value < K, 0.0)
    d_predicted = tl.load(predicted_gradient + sample * K + value, value < K, 0.0)
    largest = tl.max(tl.where(inside, logit, -float("inf")), 1)
    largest = tl.where(in_volume, largest, 0.0)
    exponential = tl.where(inside, tl.exp(logit - largest[:, None]), 0.0)
    total = tl.where(in_volume, tl.sum(exponential, 1), 1.0)
    probability = exponential / total[:, None]
    truth = (inside & (label[:, None] == value[None, :])).to(tl.float32)
    slope = d_predicted[None, :] + d_intersection[None, :] * truth
    mean = tl.sum(slope * probability, 1)
    result = d_entropy * (probability - truth) + probability * (slope - mean[:, None])
    tl.store(gradient + index, result.to(gradient.dtype.element_ty), inside)


def sums_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `losses.sums_forward` in one kernel, which reads logits and labels once and writes only partial sums."""
    logits, class_stride, voxel_stride = _class_strides(logits)
    n, classes = logits.shape[:2]
    voxels = math.prod(logits.shape[2:])
    padded, rows, programs, per_program = _tiles(classes, voxels, SOFTMAX_TILE)
    overlaps = logits.new_empty(3, n, programs, classes, dtype=torch.float32)
    cross_entropy = logits.new_empty(n, programs, dtype=torch.float32)
    _sums[programs, n](
        logits,
        labels.contiguous(),
        overlaps,
        cross_entropy,
        voxels,
        per_program,
        class_stride,
        voxel_stride,
        classes,
        padded,
        rows,
    )
    intersection, predicted, true = overlaps.sum(2)
    return cross_entropy.sum(1), intersection, predicted, true


def sums_backward(logits: Tensor, labels: Tensor, grads: DiceSums) -> Tensor:
    """Computes `losses.sums_backward` in one kernel, which reads logits and labels and writes the gradient once."""
    logits, class_stride, voxel_stride = _class_strides(logits)
    n, classes = logits.shape[:2]
    voxels = math.prod(logits.shape[2:])
    padded, rows, _, _ = _tiles(classes, voxels, SOFTMAX_TILE)
    gradient = torch.empty_like(logits)
    _sums_gradient[triton.cdiv(voxels, rows), n](
        logits,
        labels.contiguous(),
        gradient,
        grads.cross_entropy.contiguous(),
        grads.intersection.contiguous(),
        grads.predicted.contiguous(),
        voxels,
        class_stride,
        voxel_stride,
        classes,
        padded,
        rows,
    )
    return gradient


def _class_strides(logits: Tensor) -> tuple[Tensor, int, int]:
    """Returns the logits, contiguous in NCDHW or channels-last, and their class and voxel strides in elements."""
    if logits.is_contiguous(memory_format=torch.channels_last_3d):
        return logits, 1, logits.shape[1]
    return logits.contiguous(), math.prod(logits.shape[2:]), 1
