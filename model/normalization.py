"""Instance norm and (leaky) ReLU as one operator that keeps the channels-last format, forward and backward.

`nn.InstanceNorm3d` copies a channels-last tensor to NCDHW and back in both directions. Group and batch norm do not, but
for channels-last ATen sums their statistics naively in fp32: the error is 4e-3 on a 128^3 window, here it is 1e-6.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.kernels.dispatch import triton_for

# Elements per folded row: long enough for vector instructions for any C, short enough for the L1 cache.
ROW = 1024


class InstanceNormActivation(nn.InstanceNorm3d):
    """Affine instance norm and activation: x -> leaky_relu(weight * (x - mean) / sqrt(var + eps) + bias).

    Mean and (biased) variance are computed per sample and channel, in fp32 for any type of x.

    Args:
        channels: C.
        slope: slope of the activation below zero; 0 is ReLU.
        fused: False uses PyTorch's own operators, for comparison.
    """

    def __init__(self, channels: int, slope: float = 0.0, fused: bool = True) -> None:
        super().__init__(channels, affine=True)
        self.slope = slope
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> the same shape, type and memory format."""
        if self.fused and is_channels_last(x):
            return instance_norm_activation(x, self.weight, self.bias, eps=self.eps, slope=self.slope)
        return F.leaky_relu(super().forward(x), self.slope, inplace=True)


def is_channels_last(x: Tensor) -> bool:
    """Returns whether the tensor is channels-last only; a tensor with one channel is also contiguous."""
    return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


def instance_norm_activation(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, slope: float) -> Tensor:
    """Computes `InstanceNormActivation` for channels-last x (N, C, D, H, W); weight and bias (C,) fp32."""
    output: Tensor = _InstanceNormActivation.apply(x, weight, bias, eps, slope)
    return output


class NormState(NamedTuple):
    """Tensors that the forward pass saves for the backward pass.

    Attributes:
        x: input (N, C, D, H, W).
        y: output, like x.
        weight: (C,).
        bias: (C,).
        mean: (N, C) fp32.
        inverse_std: (N, C) fp32, 1 / sqrt(var + eps).
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    inverse_std: Tensor


class _InstanceNormActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
        kernels = triton_for(x, "norm")
        forward = kernels.norm_forward if kernels else norm_forward
        y, mean, inverse_std = forward(x, weight, bias, eps=eps, slope=slope)
        # Saving y costs no memory: the next convolution keeps it anyway.
        ctx.save_for_backward(*NormState(x, y, weight=weight, bias=bias, mean=mean, inverse_std=inverse_std))
        ctx.slope = slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state = NormState(*ctx.saved_tensors)
        kernels = triton_for(state.x, "norm")
        backward = kernels.norm_backward if kernels else norm_backward
        dx, dweight, dbias = backward(grad, state, ctx.slope)
        return dx, dweight, dbias, None, None


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the operator with PyTorch operators.

    Returns:
        `y`, `mean` and `inverse_std` of `NormState`.
    """
    rows, repeats = _fold(x)
    voxels = math.prod(x.shape[2:])
    mean = _sum(rows, repeats) / voxels
    # Two passes: E[x^2] - E[x]^2 would lose digits where the mean is large.
    centred = rows - _tile(mean, repeats)
    inverse_std = (_sum(centred * centred, repeats) / voxels + eps).rsqrt()
    torch.addcmul(bias.float().repeat(repeats), centred, _tile(inverse_std * weight, repeats), out=centred)
    return _unfold(F.leaky_relu_(centred, slope).to(x.dtype), x), mean, inverse_std


def norm_backward(grad: Tensor, state: NormState, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients with respect to x, weight and bias from `grad`, the gradient with respect to y.

    With z the normalized x and g the gradient before the activation:
    dx = weight * inverse_std * (g - mean(g) - z * mean(g * z)), dweight = sum(g * z), dbias = sum(g).
    `state.bias` is for implementations that recompute y.
    """
    x, mean, inverse_std = state.x, state.mean, state.inverse_std
    voxels = math.prod(x.shape[2:])
    g, repeats = _fold(torch.ops.aten.leaky_relu_backward(grad, state.y, slope, True))
    rows, _ = _fold(x)
    dbias = _sum(g, repeats)
    dweight = (_sum(g * rows, repeats) - mean * dbias) * inverse_std
    # dx is linear in g and x, scale * g + slope_x * x + offset, so z need not be computed.
    scale = state.weight * inverse_std
    slope_x = -scale * inverse_std * dweight / voxels
    offset = -scale * dbias / voxels - slope_x * mean
    dx = torch.addcmul(_tile(offset, repeats), rows, _tile(slope_x, repeats)).addcmul_(g, _tile(scale, repeats))
    return _unfold(dx.to(x.dtype), x), dweight.sum(0), dbias.sum(0)


def _fold(x: Tensor) -> tuple[Tensor, int]:
    """Channels-last (N, C, D, H, W) -> fp32 rows (N, voxels / r, r * C) of r voxels each, and r."""
    n, channels = x.shape[:2]
    voxels = math.prod(x.shape[2:])
    repeats = math.gcd(voxels, max(1, ROW // channels))
    return x.permute(0, 2, 3, 4, 1).reshape(n, voxels // repeats, repeats * channels).float(), repeats


def _unfold(rows: Tensor, like: Tensor) -> Tensor:
    n, channels, *shape = like.shape
    return rows.view(n, *shape, channels).permute(0, 4, 1, 2, 3)


def _tile(values: Tensor, repeats: int) -> Tensor:
    """(N, C) -> (N, 1, r * C), which broadcasts over folded rows."""
    return values.repeat(1, repeats)[:, None]


def _sum(rows: Tensor, repeats: int) -> Tensor:
    """Folded rows -> sums over the voxels (N, C)."""
    return rows.sum(1).unflatten(1, (repeats, -1)).sum(1)
