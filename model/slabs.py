"""A window cut along depth into equal slabs, one per rank of a group, with the numbers of the whole window.

Each 3x3x3 convolution reads one plane of its neighbours' slabs (a halo), and sums over a window's voxels are completed
over the group. How ranks communicate is the caller's: a `Slabs` object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Slabs(Protocol):
    """The ranks that share a window, in the order of their slabs. Every one of them must make the same calls."""

    @property
    def count(self) -> int:
        """Number of slabs."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns every rank's tensor, of equal shape, as (count, *shape)."""
        ...

    def exchange(self, to_previous: Tensor | None, to_next: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sends planes to the neighbours, all of the same shape; at least one of the two.

        Returns:
            What the previous rank sent `to_next`, and the next rank `to_previous`; zeros where there is no such rank,
            or all ranks send None in that direction.
        """
        ...


class SlabConv3d(nn.Conv3d):
    """3x3x3 convolution with padding 1. While `slabs` is set, its input is a slab, otherwise a whole window.

    With stride 2 a slab must have an even number of planes.
    """

    slabs: Slabs | None = None

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, D, H, W) -> (N, F, D/stride, H/stride, W/stride)."""
        if self.slabs is None:
            return super().forward(x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # the convolution would, but after the exchange
        # With stride 2, output o reads inputs 2o - 1 to 2o + 1: none of the next slab.
        padded = _Halo.apply(x, self.slabs, self.stride[0] == 1)
        return nn.functional.conv3d(padded, self.weight, None, self.stride, padding=(0, 1, 1))


class _Halo(torch.autograd.Function):
    """Puts the previous slab's last plane before x, and the next slab's first plane behind it if `behind`.

    Zeros take their places at the ends of the window, as in a padded convolution.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slabs: Slabs, behind: bool) -> Tensor:
        ctx.slabs, ctx.behind = slabs, behind
        before, after = slabs.exchange(x[:, :, :1] if behind else None, x[:, :, -1:])
        n, channels, planes, height, width = x.shape
        # Not `is_contiguous`: a single channel's tensor has both orders, of which the strides name one.
        order = torch.channels_last_3d if x.stride(1) == 1 else torch.contiguous_format
        shape = n, channels, planes + 1 + behind, height, width
        padded = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)
        padded[:, :, 1 : planes + 1] = x
        padded[:, :, :1] = before
        if behind:
            padded[:, :, -1:] = after
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Sends the halo's gradients back to the slabs that its planes came from, where they are added."""
        behind: bool = ctx.behind
        from_previous, from_next = ctx.slabs.exchange(grad[:, :, :1], grad[:, :, -1:] if behind else None)
        # In place: only the convolution reads the padded tensor, so no one else holds its gradient.
        inner = grad[:, :, 1:-1] if behind else grad[:, :, 1:]
        inner[:, :, -1:] += from_next
        if behind:
            inner[:, :, :1] += from_previous
        return inner, None, None


class SumOverSlabs(torch.autograd.Function):
    """Sums a tensor over the slabs of a window, of which every rank then computes the same loss.

    Its gradient with respect to a rank's own summand is that of the sum, here times the number of slabs: averaged over
    all ranks of a run, the parameters' gradients are then summed over a window's ranks and averaged over windows.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, slabs: Slabs) -> Tensor:
        ctx.count = slabs.count
        return slabs.gather(tensor).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.count, None


def halo_bytes(filters: Sequence[int], channels: int, plane: tuple[int, int], *, element_bytes: int) -> int:
    """Returns the bytes per sample that cross the boundary of two slabs of a U-Net in a training step, both ways.

    A rank between two others sends as much. Forward, a convolution with stride 1 sends a plane of its input each way,
    one with stride 2 a plane one way; backward the same, except for the image, which has no gradient.

    Args:
        filters: feature maps per resolution, the bottleneck last.
        channels: C of the image.
        plane: (H, W) of the image.
        element_bytes: size of a number.
    """
    # Per resolution: feature maps of all planes that cross the boundary, forward and backward.
    maps = [4 * here for here in filters]  # second convolution
    for level, here in enumerate(filters[:-1]):
        maps[level] += 2 * here  # stride 2, to the next resolution
        maps[level] += 4 * (2 * here + here)  # the decoder's two convolutions
    maps[0] += 2 * channels
    return element_bytes * sum(count * plane[0] * plane[1] // 4**level for level, count in enumerate(maps))
