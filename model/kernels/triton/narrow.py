"""3x3x3 convolution to few channels, for which cuDNN has no kernel of its own on Hopper.

For each plane and row of the kernel, a tile of whole rows of the image is loaded once and multiplied by the three
weights along W at once. The three products belong to voxels one to the left, here, and one to the right, so that they
are shifted along W before they are added. Nine loads instead of 27.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.tiles import shares

# Voxels of a tile, which are whole rows of the image; of a step of the weight's gradient. Measured on an H200.
ROWS, SUM_ROWS = 128, 32
# Loads under way at a time.
STAGES, SUM_STAGES = 3, 4
# Programs per sample and plane of the kernel that share the weight's gradient.
SUM_PROGRAMS = 33


@triton.jit
def _narrow_forward(
    x,
    weight,
    y,
    D,
    H,
    W,
    C: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y = convolution of x (N, D, H, W, C) with weight (27, C, F)."""
    sample = tl.program_id(1).to(tl.int64)
    voxels = D * H * W
    row = tl.arange(0, ROWS)
    voxel = tl.program_id(0) * ROWS + row
    d, h, w = voxel // (H * W), voxel // W % H, voxel % W
    c, f = tl.arange(0, C), tl.arange(0, F)
    left = tl.zeros((ROWS, F), tl.float32)
    here = tl.zeros((ROWS, F), tl.float32)
    right = tl.zeros((ROWS, F), tl.float32)
    image = x + (sample * voxels + voxel[:, None]) * C + c[None, :]
    kernel = weight + c[:, None] * F + f[None, :]
    for plane_and_row in range(9):
        kd, kh = plane_and_row // 3 - 1, plane_and_row % 3 - 1
        inside = (d + kd >= 0) & (d + kd < D) & (h + kh >= 0) & (h + kh < H)
        features = tl.load(image + (kd * H + kh) * W * C, inside[:, None], 0.0)
        taps = kernel + plane_and_row * 3 * C * F
        left = tl.dot(features, tl.load(taps), left)
        here = tl.dot(features, tl.load(taps + C * F), here)
        right = tl.dot(features, tl.load(taps + 2 * C * F), right)
    # A voxel's left neighbour is multiplied by the first weight, its right neighbour by the last.
    before = tl.broadcast_to(tl.maximum(row - 1, 0)[:, None], (ROWS, F))
    after = tl.broadcast_to(tl.minimum(row + 1, ROWS - 1)[:, None], (ROWS, F))
    here += tl.where((w > 0)[:, None], tl.gather(left, before, 0), 0.0)
    here += tl.where((w < W - 1)[:, None], tl.gather(right, after, 0), 0.0)
    index = (sample * voxels + voxel[:, None]) * F + f[None, :]
    tl.store(y + index, here.to(y.dtype.element_ty), (voxel < voxels)[:, None])


@triton.jit
def _narrow_weight_gradient(
    x,
    grad,
    out,
    D,
    H,
    W,
    per_program,
    C: tl.constexpr,
    F: tl.constexpr,
    ROWS: tl.constexpr,
):
    """This program's share of one plane of the weight's gradient, (3, 3, F, C): rows and columns of the kernel.

    The gradient's channels are stacked in four blocks: shifted by one voxel to the right, not, and to the left along W,
    and an empty one, since a matrix unit takes powers of two.
    """
    sample = tl.program_id(2).to(tl.int64)
    kd = tl.program_id(1) - 1
    voxels = D * H * W
    first = tl.program_id(0) * per_program
    last = tl.minimum(first + per_program, voxels)
    stacked = tl.arange(0, 4 * F)
    kw, f = stacked // F - 1, stacked % F
    c = tl.arange(0, C)
    above = tl.zeros((4 * F, C), tl.float32)
    here = tl.zeros((4 * F, C), tl.float32)
    below = tl.zeros((4 * F, C), tl.float32)
    for start in range(first, last, ROWS):
        voxel = start + tl.arange(0, ROWS)
        d, h, w = voxel // (H * W), voxel // W % H, voxel % W
        column = w[None, :] - kw[:, None]
        inside = (column >= 0) & (column < W) & (kw < 2)[:, None] & (voxel < last)[None, :]
        g = tl.load(grad + (sample * voxels + voxel[None, :] - kw[:, None]) * F + f[:, None], inside, 0.0)
        in_plane = (d + kd >= 0) & (d + kd < D) & (voxel < last)
        image = x + (sample * voxels + voxel[:, None] + kd * H * W) * C + c[None, :]
        features = tl.load(image - W * C, (in_plane & (h >= 1))[:, None], 0.0)
        above = tl.dot(g, features, above)
        features = tl.load(image, in_plane[:, None], 0.0)
        here = tl.dot(g, features, here)
        features = tl.load(image + W * C, (in_plane & (h < H - 1))[:, None], 0.0)
        below = tl.dot(g, features, below)
    program = (sample * tl.num_programs(0) + tl.program_id(0)) * 3 + kd + 1
    out += program * 9 * F * C + stacked[:, None] * C + c[None, :]
    tl.store(out, above, (kw < 2)[:, None])
    tl.store(out + 3 * F * C, here, (kw < 2)[:, None])
    tl.store(out + 6 * F * C, below, (kw < 2)[:, None])


def takes_rows(width: int) -> bool:
    """Returns whether rows of this width fill the kernels' tiles."""
    return ROWS % width == 0


def narrow_forward(x: Tensor, weight: Tensor) -> Tensor:
    """Convolves with a 3x3x3 kernel, padding 1 and stride 1.

    Args:
        x: (N, C, D, H, W) channels-last, 16-bit; `takes_rows(W)`, C 32 or 64.
        weight: (F, C, 3, 3, 3), like x.

    Returns:
        (N, F, D, H, W) channels-last.
    """
    n, channels, *size = x.shape
    filters = len(weight)
    y = torch.empty((n, filters, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    matrices = weight.permute(2, 3, 4, 1, 0).reshape(27, channels, filters).contiguous()
    _narrow_forward[triton.cdiv(math.prod(size), ROWS), n](
        x, matrices, y, *size, channels, filters, ROWS, num_stages=STAGES
    )
    return y


def narrow_input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Returns the gradient of `narrow_forward`'s x: the convolution of `grad` with the mirrored kernel.

    Args:
        grad: (N, F, D, H, W) channels-last, 16-bit, F 32 or 64.
        weight: as in `narrow_forward`.
    """
    return narrow_forward(grad, weight.flip(2, 3, 4).transpose(0, 1))


def narrow_weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Returns the gradient of `narrow_forward`'s weight, (F, C, 3, 3, 3) fp32.

    Args:
        x: as in `narrow_forward`.
        grad: (N, F, D, H, W) channels-last, like x.
    """
    n, channels, *size = x.shape
    filters = grad.shape[1]
    programs, per_program = shares(math.prod(size), SUM_ROWS, SUM_PROGRAMS)
    partial = x.new_empty(n * programs, 3, 3, 3, filters, channels, dtype=torch.float32)
    _narrow_weight_gradient[programs, 3, n](
        x, grad, partial, *size, per_program, channels, filters, SUM_ROWS, num_stages=SUM_STAGES
    )
    return partial.sum(0).permute(3, 4, 0, 1, 2)
