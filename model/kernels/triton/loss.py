"""The sums of MLPerf's loss over a sample's voxels, and their gradient: logits and labels are read once each."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.tiles import tiles
from model.losses import DiceSums

# The softmax holds many tensors per tile; with 4096 elements it needs more registers than Hopper has.
SOFTMAX_TILE = 1024


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
    # Each row of the tile keeps its own sums, so that no step waits for another row.
    intersection = tl.zeros((ROWS, K2), tl.float32)
    predicted = tl.zeros((ROWS, K2), tl.float32)
    true = tl.zeros((ROWS, K2), tl.float32)
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
        intersection += tl.where(is_true, probability, 0.0)
        predicted += probability
        true += is_true.to(tl.float32)
        entropy += tl.where(in_volume, largest + tl.log(total) - tl.sum(tl.where(is_true, logit, 0.0), 1), 0.0)
    row = sample * tl.num_programs(0) + program
    plane = tl.num_programs(0) * tl.num_programs(1) * K
    tl.store(overlaps + row * K + value, tl.sum(intersection, 0), value < K)
    tl.store(overlaps + plane + row * K + value, tl.sum(predicted, 0), value < K)
    tl.store(overlaps + 2 * plane + row * K + value, tl.sum(true, 0), value < K)
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
    padded, rows, programs, per_program = tiles(classes, voxels, SOFTMAX_TILE)
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
    padded, rows, _, _ = tiles(classes, voxels, SOFTMAX_TILE)
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
