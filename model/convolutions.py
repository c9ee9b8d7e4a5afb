"""The network's convolutions that are bound by memory traffic: of the image, to the classes, and up to a joined tensor.

Each computes as PyTorch's own operators do. For channels-last tensors in 16 bit on CUDA the work is done by Triton's
kernels instead (`kernels/triton/`): cuDNN has no good kernel for one input or three output channels, and concatenation
copies everything that it joins.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.kernels.dispatch import triton_for
from model.normalization import is_channels_last
from model.slabs import SlabConv3d

LAST = torch.channels_last_3d
HALF = (torch.bfloat16, torch.float16)
# Input channels up to which a convolution counts as one of an image: 27 taps of each fit one matrix product.
IMAGE_CHANNELS = 4
# Output channels of the convolutions at full resolution: half of the network's operations.
NARROW = 32
# Classes up to which the output's kernel keeps a voxel's logits in registers.
OUTPUT_CLASSES = 64


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the type in which a convolution of x computes: autocast's, or else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def half_kernels(operator: str, x: Tensor) -> ModuleType | None:
    """Returns Triton's kernels if they compute this operator of x: on CUDA, in 16 bit."""
    kernels = triton_for(x, operator)
    return kernels if kernels and compute_dtype(x) in HALF else None


class ImageConv3d(SlabConv3d):
    """3x3x3 convolution, padding 1, stride 1, without bias, of an image with few channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, F, D, H, W)."""
        # One channel is in both memory orders; the weight's strides tell which the network is in.
        is_last = x.is_contiguous(memory_format=LAST) and self.weight.stride(1) == 1
        if is_last and not x.requires_grad and self.slabs is None and half_kernels("image", x):
            output: Tensor = _ImageConvolution.apply(x, self.weight, compute_dtype(x))
            return output
        return super().forward(x)


class _ImageConvolution(torch.autograd.Function):
    """The convolution as a function of the weight: an image needs no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        kernels = triton_for(x, "image")
        assert kernels
        ctx.save_for_backward(x)
        y: Tensor = kernels.image_forward(x, weight.to(dtype))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        kernels = triton_for(x, "image")
        assert kernels
        return None, kernels.image_weight_gradient(x, grad.contiguous(memory_format=LAST)), None


class NarrowConv3d(SlabConv3d):
    """3x3x3 convolution, padding 1, stride 1, without bias, to so few channels that cuDNN is slow (see `is_narrow`)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, F, D, H, W)."""
        if is_channels_last(x) and self.slabs is None:
            kernels = half_kernels("narrow", x)
            if kernels and kernels.takes_rows(x.shape[4]):
                output: Tensor = _NarrowConvolution.apply(x.to(compute_dtype(x)), self.weight)
                return output
        return super().forward(x)


def is_narrow(in_channels: int, out_channels: int, stride: int) -> bool:
    """Returns whether a 3x3x3 convolution has a kernel in `kernels/triton/narrow.py` that is faster than cuDNN's."""
    return stride == 1 and out_channels == NARROW and in_channels in (NARROW, 2 * NARROW)


class _NarrowConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        kernels = triton_for(x, "narrow")
        assert kernels
        half = weight.to(x.dtype)
        ctx.save_for_backward(x, half)
        y: Tensor = kernels.narrow_forward(x, half)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        kernels = triton_for(x, "narrow")
        assert kernels
        grad = grad.contiguous(memory_format=LAST)
        if is_narrow(weight.shape[0], weight.shape[1], 1):
            dx = kernels.narrow_input_gradient(grad, weight)
        else:  # to more channels than `grad` has: cuDNN is faster
            last = weight.contiguous(memory_format=LAST)
            ones, zeros = [1, 1, 1], [0, 0, 0]
            dx, _, _ = torch.ops.aten.convolution_backward(
                grad, x, last, None, ones, ones, ones, False, zeros, 1, [True, False, False]
            )
        return dx, kernels.narrow_weight_gradient(x, grad)


class OutputConv3d(nn.Conv3d):
    """1x1x1 convolution with bias, to a few classes."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__(in_channels, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, K, D, H, W)."""
        if self.out_channels <= OUTPUT_CLASSES and is_channels_last(x) and half_kernels("output", x):
            dtype = compute_dtype(x)
            output: Tensor = _OutputConvolution.apply(x.to(dtype), self.weight, self.bias)
            return output
        return super().forward(x)


class _OutputConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kernels = triton_for(x, "output")
        assert kernels
        half = weight.to(x.dtype)
        ctx.save_for_backward(x, half)
        y: Tensor = kernels.output_forward(x, half, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        kernels = triton_for(x, "output")
        assert kernels
        gradients: tuple[Tensor, ...] = kernels.output_backward(grad.contiguous(memory_format=LAST), x, weight)
        return gradients


def upsample_and_join(x: Tensor, skip: Tensor, up: nn.ConvTranspose3d) -> Tensor:
    """Doubles the resolution of x by a transposed convolution and appends the encoder's features.

    Args:
        x: (N, C, D, H, W).
        skip: (N, F, 2D, 2H, 2W).
        up: 2x2x2, stride 2, from C to F channels, with bias.

    Returns:
        (N, 2F, 2D, 2H, 2W).
    """
    if is_channels_last(x) and is_channels_last(skip) and half_kernels("join", x):
        dtype = compute_dtype(x)
        joined: Tensor = _Join.apply(x.to(dtype), skip.to(dtype), up.weight, up.bias)
        return joined
    return torch.cat((up(x), skip), dim=1)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kernels = triton_for(x, "join")
        assert kernels
        half = weight.to(x.dtype)
        ctx.save_for_backward(x, half)
        joined: Tensor = kernels.join_forward(x, skip, half, bias)
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        kernels = triton_for(x, "join")
        assert kernels
        grad = grad.contiguous(memory_format=LAST)
        dx, dweight, dbias = kernels.join_backward(grad, x, weight)
        return dx, grad[:, weight.shape[1] :], dweight, dbias


def fork(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x twice: for the next encoder block and for the decoder. Their gradients are added in one pass."""
    if is_channels_last(x) and half_kernels("join", x):
        pair: tuple[Tensor, Tensor] = _Fork.apply(x)
        return pair
    return x, x


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, encoder: Tensor, decoder: Tensor) -> Tensor:
        kernels = triton_for(encoder, "join")
        if kernels and encoder.is_contiguous(memory_format=LAST) and _is_part_of_last(decoder):
            total: Tensor = kernels.add_part(encoder, decoder)
            return total
        return encoder + decoder


def _is_part_of_last(x: Tensor) -> bool:
    """Returns whether x (N, C, D, H, W) holds neighbouring channels of a channels-last tensor."""
    _, _, d, h, w = x.shape
    step = x.stride(4)
    return x.stride() == (d * h * w * step, 1, h * w * step, w * step, step)
