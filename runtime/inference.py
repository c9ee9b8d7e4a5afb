"""Sliding-window logits: pure tensor code."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Predictor = Callable[[Tensor], Tensor]
Padding = list[tuple[int, int]]
# Slices of the axes D, H, W.
Place = tuple[slice, slice, slice]


def stride_of(window: Sequence[int], overlap: float) -> list[int]:
    """`int(R * (1 - overlap))` an axis, at least 1."""
    return [max(1, int(length * (1 - overlap))) for length in window]


def remainder_crop(shape: Sequence[int], stride: Sequence[int]) -> Place:
    """What the MLPerf reference keeps of a volume before it scores (a quirk that its target was calibrated with).

    Where an axis of size S has S mod s below s // 2, that remainder is cut off, the smaller half in front; an axis
    shorter than the stride stays whole.
    """
    kept = []
    for size, step in zip(shape, stride, strict=True):
        remainder = size % step
        cut = remainder if remainder < min(step // 2, size) else 0
        kept.append(slice(cut // 2, size - (cut - cut // 2)))
    return kept[0], kept[1], kept[2]


def window_padding(shape: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> Padding:
    """Voxels (before, after) that let whole strides cover each axis, the smaller half in front.

    The size becomes the window plus a multiple of the stride. At MLPerf's overlap of 0.5 that is the reference's
    "up to a multiple of the stride"; at other overlaps the reference's rule would leave voxels without a window.
    """
    padding = []
    for size, length, step in zip(shape, window, stride, strict=True):
        strides = -(-max(size - length, 0) // step)
        missing = length + strides * step - size
        padding.append((missing // 2, missing - missing // 2))
    return padding


def gaussian_map(window: Sequence[int], device: torch.device) -> Tensor:
    """A window's weights, (D, H, W) float32, at most 1.

    The cube root of the outer product of three Gaussians whose standard deviation is an eighth of their own axis (the
    reference takes the first axis's size for all three).
    """
    d, h, w = (torch.exp(-0.5 * ((torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / (n / 8)) ** 2) for n in window)
    product = (d[:, None, None] * h[None, :, None] * w[None, None, :]) ** (1 / 3)
    return (product / product.max()).float().to(device)


def sliding_window(
    image: Tensor,
    predictor: Predictor,
    window: Sequence[int],
    overlap: float,
    padding_value: float | None = None,
) -> Tensor:
    """The predictor's logits for a volume of any size, averaged where windows overlap.

    Args:
        image: (N, C, D, H, W), any size.
        predictor: (N, C, *window) -> (N, K, *window).
        window: voxels of a window.
        overlap: share that neighbouring windows have in common, in [0, 1).
        padding_value: what lies outside a volume that is padded to whole strides, as the reference does; None pads
            (with its edge) only a volume smaller than a window, and moves the windows together instead: a network
            that never saw padding in training scores worse on it.

    Returns:
        (N, K, D, H, W) float32: the sum of the windows' outputs times `gaussian_map`, divided by the maps' sum.
    """
    shape = image.shape[2:]
    stride = stride_of(window, overlap)
    whole_strides = stride if padding_value is not None else [1, 1, 1]
    padding = window_padding(shape, window, whole_strides)
    padded = _pad(image, padding, padding_value)
    weights = gaussian_map(window, image.device)
    total: Tensor | None = None
    norm = torch.zeros(padded.shape[2:], device=image.device)
    for place in window_places(padded.shape[2:], window, stride):
        logits = predictor(padded[..., *place])
        if total is None:
            total = torch.zeros(len(image), logits.shape[1], *padded.shape[2:], device=image.device)
        total[..., *place] += logits.float() * weights
        norm[place] += weights
    assert total is not None  # there is a window for every volume
    total /= norm
    d, h, w = (slice(before, before + size) for (before, _), size in zip(padding, shape, strict=True))
    return total[..., d, h, w]


def window_places(shape: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> Iterator[Place]:
    """The windows of a volume at least as large, as slices of its three axes.

    As many as cover it at no more than `stride` apart, the first and the last flush with the edges, evenly between.
    """
    starts = []
    for size, length, step in zip(shape, window, stride, strict=True):
        intervals = -(-(size - length) // step)
        starts.append([round(i * (size - length) / max(intervals, 1)) for i in range(intervals + 1)])
    for start in itertools.product(*starts):
        d, h, w = (slice(first, first + length) for first, length in zip(start, window, strict=True))
        yield d, h, w


def _pad(image: Tensor, padding: Padding, value: float | None) -> Tensor:
    flat = [n for both in reversed(padding) for n in both]  # F.pad counts from the last axis
    if not any(flat):
        return image
    return F.pad(image, flat, mode="replicate") if value is None else F.pad(image, flat, value=value)
