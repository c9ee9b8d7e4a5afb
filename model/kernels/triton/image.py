"""A 3x3x3 convolution of an image with few channels, the network's first, as a product of two matrices.

cuDNN pads one channel to eight, and needs three kernels and many times the memory traffic. Here a tile of voxels is a
matrix (voxels, taps) that is gathered from the image as it is multiplied by the weights (taps, F).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.tiles import shares

ROWS = 128
# Programs that share the sum over voxels, over all samples.
SUM_PROGRAMS = 1024
TAPS = 27


@triton.jit
def _gathered(x, sample, voxel, k, D, H, W, last, C: tl.constexpr):
    """The image at each voxel's taps, 0 outside it; voxel and k broadcast, k = tap * C + channel."""
    depth, height, width = voxel // (H * W), voxel // W % H, voxel % W
    tap = k // C
    kd, kh, kw = tap // 9 - 1, tap // 3 % 3 - 1, tap % 3 - 1
    d, h, w = depth + kd, height + kh, width + kw
    inside = (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W) & (tap < 27) & (voxel < last)
    index = (sample * D * H * W + voxel + (kd * H + kh) * W + kw) * C + k % C
    return tl.load(x + index, inside, 0.0)


@triton.jit
def _image_forward(
    x,
    weight,
    y,
    D,
    H,
    W,
    C: tl.constexpr,
    F: tl.constexpr,
    F2: tl.constexpr,
    K2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y = convolution of x (N, D, H, W, C) with weight (27 * C, F)."""
    sample = tl.program_id(1).to(tl.int64)
    voxels = D * H * W
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k, f = tl.arange(0, K2), tl.arange(0, F2)
    image = _gathered(x, sample, voxel[:, None], k[None, :], D, H, W, voxels, C)
    kernel = tl.load(weight + k[:, None] * F + f[None, :], (k < 27 * C)[:, None] & (f < F)[None, :], 0.0)
    result = tl.dot(image.to(kernel.dtype), kernel)
    index = (sample * voxels + voxel[:, None]) * F + f[None, :]
    tl.store(y + index, result.to(y.dtype.element_ty), (voxel < voxels)[:, None] & (f < F)[None, :])


@triton.jit
def _image_weight_gradient(
    x,
    grad,
    out,
    D,
    H,
    W,
    per_program,
    C: tl.constexpr,
    F: tl.constexpr,
    F2: tl.constexpr,
    K2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """This program's share of the gradient of the weight, (27 * C, F)."""
    sample = tl.program_id(1).to(tl.int64)
    voxels = D * H * W
    first = tl.program_id(0) * per_program
    last = tl.minimum(first + per_program, voxels)
    k, f = tl.arange(0, K2), tl.arange(0, F2)
    total = tl.zeros((K2, F2), tl.float32)
    for start in range(first, last, ROWS):
        voxel = start + tl.arange(0, ROWS)
        index = (sample * voxels + voxel[:, None]) * F + f[None, :]
        g = tl.load(grad + index, (voxel < last)[:, None] & (f < F)[None, :], 0.0)
        image = _gathered(x, sample, voxel[None, :], k[:, None], D, H, W, last, C)
        total = tl.dot(image.to(g.dtype), g, total)
    program = sample * tl.num_programs(0) + tl.program_id(0)
    out += program * 27 * C * F
    tl.store(out + k[:, None] * F + f[None, :], total, (k < 27 * C)[:, None] & (f < F)[None, :])


def image_forward(x: Tensor, weight: Tensor) -> Tensor:
    """Convolves with a 3x3x3 kernel, padding 1 and stride 1, in the weight's number format.

    Args:
        x: (N, C, D, H, W) channels-last, any floating-point type; it is rounded to the weight's as it is read.
        weight: (F, C, 3, 3, 3), 16-bit.

    Returns:
        (N, F, D, H, W) channels-last.
    """
    n, channels, *size = x.shape
    filters = len(weight)
    y = torch.empty((n, filters, *size), dtype=weight.dtype, device=x.device, memory_format=torch.channels_last_3d)
    matrix = weight.permute(2, 3, 4, 1, 0).reshape(TAPS * channels, filters).contiguous()
    grid = triton.cdiv(math.prod(size), ROWS), n
    _image_forward[grid](x, matrix, y, *size, channels, filters, *_padded(channels, filters), ROWS)
    return y


def image_weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Returns the gradient of `image_forward`'s weight, (F, C, 3, 3, 3) fp32.

    Args:
        x: as in `image_forward`.
        grad: (N, F, D, H, W) channels-last, 16-bit.
    """
    n, channels, *size = x.shape
    filters = grad.shape[1]
    voxels = math.prod(size)
    programs, per_program = shares(voxels, ROWS, max(1, SUM_PROGRAMS // n))
    partial = grad.new_empty(n * programs, TAPS * channels, filters, dtype=torch.float32)
    _image_weight_gradient[programs, n](
        x, grad, partial, *size, per_program, channels, filters, *_padded(channels, filters), ROWS
    )
    return partial.sum(0).view(3, 3, 3, channels, filters).permute(4, 3, 0, 1, 2)


def _padded(channels: int, filters: int) -> tuple[int, int]:
    """F and 27 * C, padded to powers of two that a matrix unit multiplies."""
    return max(16, triton.next_power_of_2(filters)), max(16, triton.next_power_of_2(TAPS * channels))
