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
from model.slabs import Slabs

# Elements per folded row: long enough for vector instructions for any C, short enough for the L1 cache.
ROW = 1024


class InstanceNormActivation(nn.InstanceNorm3d):
    """Instance norm and activation: x -> leaky_relu(weight * (x - mean) / sqrt(var + eps) + bias).

    Mean and (biased) variance are computed per sample and channel, in fp32 for any type of x.

    Args:
        channels: C.
        slope: slope of the activation below zero; 0 is ReLU, and 1 the norm alone.
        fused: False uses PyTorch's own operators, for comparison.

    Attributes:
        weight, bias: (C,), or None (see `fused_norms`): 1 and 0.
        slabs: while it is set, x is a slab of a window, whose mean and variance are used.
    """

    slabs: Slabs | None = None

    def __init__(self, channels: int, slope: float = 0.0, fused: bool = True) -> None:
        super().__init__(channels, affine=True)
        self.slope = slope
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> the same shape, type and memory format."""
        slabs = self.slabs
        if slabs is not None or (self.fused and is_channels_last(x)):
            channels = x.shape[1]
            weight = self.weight if self.weight is not None else torch.ones(channels, device=x.device)
            bias = self.bias if self.bias is not None else torch.zeros(channels, device=x.device)
            return instance_norm_activation(x, weight, bias, eps=self.eps, slope=self.slope, slabs=slabs)
        y = super().forward(x)
        return y if self.slope == 1 else F.leaky_relu(y, self.slope, inplace=True)


def is_channels_last(x: Tensor) -> bool:
    """Returns whether the tensor is channels-last only; a tensor with one channel is also contiguous."""
    return _has_channels_last(x) and not x.is_contiguous()


def instance_norm_activation(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, slope: float, slabs: Slabs | None = None
) -> Tensor:
    """Computes `InstanceNormActivation` for x (N, C, D, H, W) and weight and bias (C,) fp32; keeps x's memory format.

    Args:
        slabs: if set, x is a slab of a window.
    """
    output: Tensor = _InstanceNormActivation.apply(x, weight, bias, eps, slope, slabs)
    return output


def window_moments(mean: Tensor, m2: Tensor, voxels: int, slabs: Slabs | None) -> tuple[Tensor, Tensor]:
    """Combines the slabs' moments (Chan et al. 1979): exact, also where a window's mean is large.

    Args:
        mean: (N, C), of this rank's slab.
        m2: (N, C), its sum of squared deviations from that mean.
        voxels: of a slab, all of which have equally many.
        slabs: None: x is a whole window.

    Returns:
        The window's mean and variance, bit for bit the same on every rank.
    """
    if slabs is None:
        return mean, m2 / voxels
    means, m2s = slabs.gather(torch.stack((mean, m2))).unbind(1)
    mean = means.mean(0)
    return mean, (m2s + voxels * (means - mean) ** 2).sum(0) / (voxels * slabs.count)


def window_sums(dbias: Tensor, dweight: Tensor, voxels: int, slabs: Slabs | None) -> tuple[Tensor, Tensor, int]:
    """Adds up the backward sums (N, C) of a window's slabs; the last value is its number of voxels."""
    if slabs is None:
        return dbias, dweight, voxels
    dbias, dweight = slabs.gather(torch.stack((dbias, dweight))).sum(0)
    return dbias, dweight, voxels * slabs.count


class NormState(NamedTuple):
    """Tensors that the forward pass saves for the backward pass.

    Attributes:
        x: input (N, C, D, H, W).
        y: output, like x; x itself if the slope is 1.
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
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float, slabs: Slabs | None
    ) -> Tensor:
        kernels = triton_for(x, "norm") if _has_channels_last(x) else None
        forward = kernels.norm_forward if kernels else norm_forward
        y, mean, inverse_std = forward(x, weight, bias, eps=eps, slope=slope, slabs=slabs)
        # Saving y costs no memory: the next convolution keeps it anyway. The norm alone does not need it, and its y may
        # be changed in place, by adding a residual to it.
        ctx.save_for_backward(
            *NormState(x, x if slope == 1 else y, weight=weight, bias=bias, mean=mean, inverse_std=inverse_std)
        )
        ctx.slope, ctx.slabs = slope, slabs
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state = NormState(*ctx.saved_tensors)
        kernels = triton_for(state.x, "norm") if _has_channels_last(state.x) else None
        backward = kernels.norm_backward if kernels else norm_backward
        dx, dweight, dbias = backward(grad, state, ctx.slope, ctx.slabs)
        return dx, dweight, dbias, None, None, None


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, slope: float, slabs: Slabs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the operator with PyTorch operators.

    Returns:
        `y`, `mean` and `inverse_std` of `NormState`; with `slabs` those of the whole window.
    """
    rows, repeats = _fold(x, x)
    voxels = math.prod(x.shape[2:])
    own_mean = _sum(rows, repeats) / voxels
    # The result, in which `centred` is computed. Not a view, which autograd would not let be changed in place.
    memory_format = torch.channels_last_3d if repeats else torch.contiguous_format
    y = torch.empty_like(x, dtype=rows.dtype, memory_format=memory_format)
    # Two passes: E[x^2] - E[x]^2 would lose digits where the mean is large.
    centred = torch.sub(rows, _tile(own_mean, repeats), out=_fold(y, y)[0])
    mean, variance = window_moments(own_mean, _sum(centred * centred, repeats), voxels, slabs)
    inverse_std = (variance + eps).rsqrt()
    scale = inverse_std * weight
    shift = bias.to(scale.dtype) + (own_mean - mean) * scale
    torch.addcmul(_tile(shift, repeats), centred, _tile(scale, repeats), out=centred)
    if slope != 1:
        F.leaky_relu_(centred, slope)
    return y.to(x.dtype), mean, inverse_std


def norm_backward(
    grad: Tensor, state: NormState, slope: float, slabs: Slabs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients with respect to x, weight and bias from `grad`, the gradient with respect to y.

    With z the normalized x and g the gradient before the activation:
    dx = weight * inverse_std * (g - mean(g) - z * mean(g * z)), dweight = sum(g * z), dbias = sum(g).
    With `slabs` the means are the window's; the sums are this slab's share of dweight and dbias.
    `state.bias` is for implementations that recompute y.
    """
    x, mean, inverse_std = state.x, state.mean, state.inverse_std
    g, repeats = _fold(grad if slope == 1 else torch.ops.aten.leaky_relu_backward(grad, state.y, slope, True), x)
    rows, _ = _fold(x, x)
    dbias = _sum(g, repeats)
    dweight = (_sum(g * rows, repeats) - mean * dbias) * inverse_std
    window_dbias, window_dweight, voxels = window_sums(dbias, dweight, math.prod(x.shape[2:]), slabs)
    # dx is linear in g and x, scale * g + slope_x * x + offset, so z need not be computed.
    scale = state.weight * inverse_std
    slope_x = -scale * inverse_std * window_dweight / voxels
    offset = -scale * window_dbias / voxels - slope_x * mean
    dx = torch.addcmul(_tile(offset, repeats), rows, _tile(slope_x, repeats)).addcmul_(g, _tile(scale, repeats))
    return _unfold(dx.to(x.dtype), x), dweight.sum(0), dbias.sum(0)


def _has_channels_last(x: Tensor) -> bool:
    """Returns whether the channels of a voxel are adjacent in memory; those of a single channel always are."""
    return x.is_contiguous(memory_format=torch.channels_last_3d)


def _fold(tensor: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """Folds x, or a tensor of its shape, into rows in the order of x, in fp32 (float64 stays).

    Returns:
        For channels-last x rows (N, voxels / r, r * C) of r voxels each, and r; for others (N, C, voxels), and 0.
    """
    n, channels = x.shape[:2]
    voxels = math.prod(x.shape[2:])
    tensor = tensor.to(torch.promote_types(x.dtype, torch.float32))
    if not _has_channels_last(x):
        return tensor.reshape(n, channels, voxels), 0
    repeats = math.gcd(voxels, max(1, ROW // channels))
    return tensor.permute(0, 2, 3, 4, 1).reshape(n, voxels // repeats, repeats * channels), repeats


def _unfold(rows: Tensor, like: Tensor) -> Tensor:
    if not _has_channels_last(like):
        return rows.view(like.shape)
    n, channels, *shape = like.shape
    return rows.view(n, *shape, channels).permute(0, 4, 1, 2, 3)


def _tile(values: Tensor, repeats: int) -> Tensor:
    """(N, C) -> (N, 1, r * C) or (N, C, 1), which broadcasts over folded rows."""
    return values.repeat(1, repeats)[:, None] if repeats else values[:, :, None]


def _sum(rows: Tensor, repeats: int) -> Tensor:
    """Folded rows -> sums over the voxels (N, C)."""
    return rows.sum(1).unflatten(1, (repeats, -1)).sum(1) if repeats else rows.sum(2)
