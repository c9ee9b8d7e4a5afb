"""Instance norm and (leaky) ReLU as one operator that stays in channels-last, forward and backward.

`nn.InstanceNorm3d` copies a channels-last tensor to NCDHW and back, forward and backward; group and batch norm stay,
but ATen sums their statistics naively in fp32 there: off by 4e-3 on a 128^3 window, this file's by 1e-6.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.kernels.dispatch import triton_for

# Elements of a row after folding: long enough for vector instructions whatever C is, short enough for the L1 cache.
ROW = 1024


class InstanceNormActivation(nn.InstanceNorm3d):
    """Affine instance norm, then the activation: x -> leaky_relu(weight * (x - mean) / sqrt(var + eps) + bias).

    Mean and (biased) variance are of one sample's channel, in fp32 whatever the type of x.

    Args:
        channels: C.
        slope: of the activation below zero; 0 is ReLU.
        fused: False computes both by PyTorch's own operators, for comparison.
    """

    def __init__(self, channels: int, slope: float = 0.0, fused: bool = True) -> None:
        super().__init__(channels, affine=True)
        self.slope = slope
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> the same shape, type and memory format."""
        if self.fused and is_channels_last(x):
            return instance_norm_activation(x, self.weight, self.bias, self.eps, self.slope)
        return F.leaky_relu(super().forward(x), self.slope, inplace=True)


def is_channels_last(x: Tensor) -> bool:
    """In channels-last order and in no other: a tensor of one channel is in both."""
    return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


def instance_norm_activation(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    """See `InstanceNormActivation`. x (N, C, D, H, W) in channels-last; weight and bias (C,) fp32."""
    output: Tensor = _InstanceNormActivation.apply(x, weight, bias, eps, slope)
    return output


class _InstanceNormActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
        kernels = triton_for(x)
        forward = kernels.norm_forward if kernels else norm_forward
        y, mean, inverse = forward(x, weight, bias, eps, slope)
        # y costs no memory: the next convolution keeps it anyway.
        ctx.save_for_backward(x, y, weight, bias, mean, inverse)
        ctx.slope = slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, bias, mean, inverse = ctx.saved_tensors
        kernels = triton_for(x)
        backward = kernels.norm_backward if kernels else norm_backward
        dx, dweight, dbias = backward(grad, x, y, weight, bias, mean, inverse, ctx.slope)
        return dx, dweight, dbias, None, None


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in PyTorch's terms.

    Returns:
        y like x, mean (N, C) fp32, 1 / sqrt(var + eps) (N, C) fp32.
    """
    rows, repeats = _fold(x)
    voxels = math.prod(x.shape[2:])
    mean = _sum(rows, repeats) / voxels
    # Two passes: the mean of squares less the squared mean would lose digits where the mean is large.
    centred = rows - _tile(mean, repeats)
    inverse = (_sum(centred * centred, repeats) / voxels + eps).rsqrt()
    torch.addcmul(bias.float().repeat(repeats), centred, _tile(inverse * weight, repeats), out=centred)
    return _unfold(F.leaky_relu_(centred, slope).to(x.dtype), x), mean, inverse


def norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inverse: Tensor,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; the bias itself is for implementations that make y again.

    With z the normalised x and g the gradient below the activation:
    dx = weight * inverse * (g - mean(g) - z * mean(g * z)), dweight = sum(g * z), dbias = sum(g).
    """
    voxels = math.prod(x.shape[2:])
    g, repeats = _fold(torch.ops.aten.leaky_relu_backward(grad, y, slope, True))
    rows, _ = _fold(x)
    dbias = _sum(g, repeats)
    dweight = (_sum(g * rows, repeats) - mean * dbias) * inverse
    # dx is linear in g and x: factor * g + slant * x + shift, so that z need not be made.
    factor = weight * inverse
    slant = -factor * inverse * dweight / voxels
    shift = -factor * dbias / voxels - slant * mean
    dx = torch.addcmul(_tile(shift, repeats), rows, _tile(slant, repeats)).addcmul_(g, _tile(factor, repeats))
    return _unfold(dx.to(x.dtype), x), dweight.sum(0), dbias.sum(0)


def _fold(x: Tensor) -> tuple[Tensor, int]:
    """(N, C, D, H, W) channels-last -> ((N, voxels / r, r * C), r), float32: r voxels side by side in a row."""
    n, channels = x.shape[:2]
    voxels = math.prod(x.shape[2:])
    repeats = math.gcd(voxels, max(1, ROW // channels))
    return x.permute(0, 2, 3, 4, 1).reshape(n, voxels // repeats, repeats * channels).float(), repeats


def _unfold(rows: Tensor, like: Tensor) -> Tensor:
    n, channels, *shape = like.shape
    return rows.view(n, *shape, channels).permute(0, 4, 1, 2, 3)


def _tile(values: Tensor, repeats: int) -> Tensor:
    """(N, C) -> (N, 1, r * C), to go with folded rows."""
    return values.repeat(1, repeats)[:, None]


def _sum(rows: Tensor, repeats: int) -> Tensor:
    """Folded rows -> sums over voxels (N, C)."""
    return rows.sum(1).unflatten(1, (repeats, -1)).sum(1)
