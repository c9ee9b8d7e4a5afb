"""Sliding-window logits: pure tensor code."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

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


@lru_cache(maxsize=4)
def gaussian_map(window: tuple[int, ...], device: torch.device) -> Tensor:
    """A window's weights, (D, H, W) float32, at most 1.

    The cube root of the outer product of three Gaussians whose standard deviation is an eighth of their own axis (the
    reference takes the first axis's size for all three).
    """
    d, h, w = (torch.exp(-0.5 * ((torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / (n / 8)) ** 2) for n in window)
    product = (d[:, None, None] * h[None, :, None] * w[None, None, :]) ** (1 / 3)
    return (product / product.max()).float().to(device)


def tile(
    shape: Sequence[int], window: Sequence[int], overlap: float, padding_value: float | None
) -> tuple[Padding, list[Place]]:
    """How a volume is padded, and the windows of what comes of it; see `WindowedVolume` for the arguments."""
    stride = stride_of(window, overlap)
    padding = window_padding(shape, window, stride if padding_value is not None else [1, 1, 1])
    padded = [size + before + after for size, (before, after) in zip(shape, padding, strict=True)]
    return padding, list(window_places(padded, window, stride))


class WindowedVolume:
    """A volume, cut into windows, and the weighted sum of the logits that come back.

    Args:
        image: (N, C, D, H, W), any size.
        window: voxels of a window.
        overlap: share that neighbouring windows have in common, in [0, 1).
        padding_value: what lies outside a volume that is padded to whole strides, as the reference does; None pads
            (with its edge) only a volume smaller than a window, and moves the windows together instead: a network
            that never saw padding in training scores worse on it.
        member, members: this one's part of the windows where several ranks share a volume.

    Attributes:
        missing: windows of this part whose logits have not come back.
    """

    def __init__(
        self,
        image: Tensor,
        window: Sequence[int],
        overlap: float,
        padding_value: float | None = None,
        member: int = 0,
        members: int = 1,
    ) -> None:
        self._shape = image.shape[2:]
        self._padding, places = tile(self._shape, window, overlap, padding_value)
        self._image = _pad(image, self._padding, padding_value)
        self._weights = gaussian_map(tuple(window), image.device)
        self._norm = torch.zeros(self._image.shape[2:], device=image.device)
        self._total: Tensor | None = None
        for place in places:
            self._norm[place] += self._weights
        self.places = places[member::members]
        self.missing = len(self.places)

    def window(self, place: Place) -> Tensor:
        """(N, C, *window)."""
        return self._image[..., *place]

    def add(self, place: Place, logits: Tensor) -> None:
        """Adds a window's logits (N, K, *window)."""
        if self._total is None:
            shape = (logits.shape[0], logits.shape[1], *self._image.shape[2:])
            self._total = torch.zeros(shape, device=self._image.device)
        self._total[..., *place] += logits.float() * self._weights
        self.missing -= 1

    def logits(self, total: Callable[[Tensor], Tensor] = lambda own: own) -> Tensor:
        """(N, K, D, H, W) float32: the sum of the windows' outputs times `gaussian_map`, divided by the maps' sum.

        Args:
            total: adds up the members' sums, where there are several.
        """
        assert self._total is not None, "every member has a window"
        mean = total(self._total) / self._norm
        d, h, w = (slice(before, before + size) for (before, _), size in zip(self._padding, self._shape, strict=True))
        return mean[..., d, h, w]


def predict_windows(
    volumes: Iterable[WindowedVolume], predictor: Predictor, batch_size: int
) -> Iterator[WindowedVolume]:
    """Fills the volumes, in order, from batches of windows; a batch may hold windows of several volumes.

    Args:
        volumes: taken one after the other, only as far as a batch needs, so that few lie in memory at a time.
        predictor: (B, C, *window) -> (B, K, *window).
        batch_size: windows of a batch.

    Yields:
        Each volume as soon as its last window is back.
    """
    open_volumes: deque[WindowedVolume] = deque()
    batch: list[tuple[WindowedVolume, Place]] = []

    def run() -> Iterator[WindowedVolume]:
        windows = [volume.window(place) for volume, place in batch]
        outputs = predictor(torch.cat(windows)).split([len(window) for window in windows])
        for (volume, place), logits in zip(batch, outputs, strict=True):
            volume.add(place, logits)
        batch.clear()
        while open_volumes and not open_volumes[0].missing:
            yield open_volumes.popleft()

    for volume in volumes:
        open_volumes.append(volume)
        for place in volume.places:
            batch.append((volume, place))
            if len(batch) == batch_size:
                yield from run()
    if batch:
        yield from run()


def sliding_window(
    image: Tensor,
    predictor: Predictor,
    window: Sequence[int],
    overlap: float,
    padding_value: float | None = None,
    batch_size: int = 1,
) -> Tensor:
    """The predictor's logits for a volume of any size, averaged where windows overlap; see `WindowedVolume`.

    Returns:
        (N, K, D, H, W) float32.
    """
    volume = WindowedVolume(image, window, overlap, padding_value)
    (filled,) = predict_windows([volume], predictor, batch_size)
    return filled.logits()


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
