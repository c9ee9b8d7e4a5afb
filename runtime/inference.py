"""Sliding-window inference: cuts a volume into windows and averages their logits where they overlap."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Predictor = Callable[[Tensor], Tensor]
Padding = list[tuple[int, int]]
# A window's slices along the axes D, H, W.
WindowSlices = tuple[slice, slice, slice]


def stride_of(window: Sequence[int], overlap: float) -> list[int]:
    """Returns the step between windows per axis: `int(R * (1 - overlap))` for a window of R voxels, at least 1."""
    return [max(1, int(length * (1 - overlap))) for length in window]


def remainder_crop(shape: Sequence[int], stride: Sequence[int]) -> WindowSlices:
    """Returns the part of a volume that the MLPerf reference scores (a quirk with which its target was calibrated).

    If the size S of an axis has a remainder S mod s below s // 2 for stride s, the remainder is cut off, the smaller
    half in front. An axis shorter than the stride is kept whole.
    """
    kept = []
    for size, step in zip(shape, stride, strict=True):
        remainder = size % step
        cut = remainder if remainder < min(step // 2, size) else 0
        kept.append(slice(cut // 2, size - (cut - cut // 2)))
    return kept[0], kept[1], kept[2]


def window_padding(shape: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> Padding:
    """Returns the voxels (before, after) to add per axis so that whole strides cover it, the smaller half in front.

    The padded size is the window plus a multiple of the stride. At MLPerf's overlap of 0.5 this is the reference's "up
    to a multiple of the stride"; at other overlaps the reference's rule would leave voxels without a window.
    """
    padding = []
    for size, length, step in zip(shape, window, stride, strict=True):
        strides = -(-max(size - length, 0) // step)
        missing = length + strides * step - size
        padding.append((missing // 2, missing - missing // 2))
    return padding


@lru_cache(maxsize=4)
def gaussian_map(window: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns the weights of a window's voxels: (D, H, W) float32, at most 1.

    They are the cube root of the outer product of three Gaussians, each with a standard deviation of an eighth of its
    axis (the reference uses the first axis for all three).
    """
    d, h, w = (torch.exp(-0.5 * ((torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / (n / 8)) ** 2) for n in window)
    product = (d[:, None, None] * h[None, :, None] * w[None, None, :]) ** (1 / 3)
    return (product / product.max()).float().to(device)


def tile(
    shape: Sequence[int], window: Sequence[int], overlap: float, padding_value: float | None
) -> tuple[Padding, list[WindowSlices]]:
    """Returns a volume's padding, and the windows of the padded volume; see `WindowedVolume` for the arguments."""
    stride = stride_of(window, overlap)
    padding = window_padding(shape, window, stride if padding_value is not None else [1, 1, 1])
    padded = [size + before + after for size, (before, after) in zip(shape, padding, strict=True)]
    return padding, list(window_slices(padded, window, stride))


def row_starts(windows: Iterable[WindowSlices]) -> list[int]:
    """Returns the first planes of windows, each once, in order: windows that share one are a row."""
    return sorted({window[0].start for window in windows})


def largest_slab(starts: Sequence[int], depth: int) -> int:
    """Returns the planes of the largest slab that is final at once: the largest step between rows; of one row, all."""
    return max((after - before for before, after in itertools.pairwise(starts)), default=depth)


class WindowedVolume:
    """A volume cut into windows, whose logits are averaged where they overlap, a slab of planes at a time.

    Windows come in the order of their first plane, so that a plane is final once the windows that begin above it are
    all there. Only the planes of one window are summed at a time: with many classes, logits are by far the largest.

    Args:
        image: (N, C, D, H, W), any size.
        window: (D, H, W) of a window, in voxels.
        overlap: share that neighbouring windows have in common, in [0, 1).
        padding_value: fills the padding to whole strides, as in the reference. None pads only a volume smaller than a
            window (with its edge), and moves the windows closer together instead: a network that never saw padding in
            training scores worse on it.
        member, members: index of this rank, and number of ranks, among those that share the volume's windows.

    Attributes:
        windows: this rank's windows, as slices of the padded volume.
        missing: number of these whose logits have not been added yet.
    """

    def __init__(
        self,
        image: Tensor,
        window: Sequence[int],
        overlap: float,
        *,
        padding_value: float | None = None,
        member: int = 0,
        members: int = 1,
    ) -> None:
        self._shape = image.shape[2:]
        self._padding, windows = tile(self._shape, window, overlap, padding_value)
        self._image = _pad(image, self._padding, padding_value)
        self._weights = gaussian_map(tuple(window), image.device)
        self._norm = torch.zeros(self._image.shape[2:], device=image.device)
        for slices in windows:
            self._norm[slices] += self._weights
        self.windows = windows[member::members]
        self.missing = len(self.windows)
        self._starts = row_starts(windows)
        # The sums of the planes from `_starts[_row]` on, one window deep.
        self._row = 0
        self._sums: Tensor | None = None
        self._final: deque[tuple[int, Tensor]] = deque()

    def window(self, slices: WindowSlices) -> Tensor:
        """Returns a window of the padded image, (N, C, *window)."""
        return self._image[..., *slices]

    def add(self, slices: WindowSlices, logits: Tensor) -> None:
        """Adds a window's logits (N, K, *window); the windows come in their order."""
        if self._sums is None:
            depth, *plane = self._weights.shape[0], *self._image.shape[3:]
            self._sums = torch.zeros(*logits.shape[:2], depth, *plane, device=self._image.device)
        while self._starts[self._row] < slices[0].start:
            self._complete_row()
        self._sums[..., *slices[1:]] += logits.float() * self._weights
        self.missing -= 1
        while not self.missing and self._row < len(self._starts):
            self._complete_row()

    def _complete_row(self) -> None:
        """Sets the planes aside that no later window adds to, and moves the others up."""
        assert self._sums is not None, "every member has a window"
        first, depth = self._starts[self._row], self._weights.shape[0]
        self._row += 1
        if self._row == len(self._starts):
            # No more than a usual slab at a time, since what follows makes copies of it.
            step = first - self._starts[self._row - 2] if self._row > 1 else depth
            self._final += [(first + at, self._sums[:, :, at : at + step]) for at in range(0, depth, step)]
            self._sums = None
            return
        step = self._starts[self._row] - first
        self._final.append((first, self._sums[:, :, :step].clone()))
        for at in range(0, depth - step, step):  # in place, and never onto planes that are still to be moved
            count = min(step, depth - step - at)
            self._sums[:, :, at : at + count] = self._sums[:, :, at + step : at + step + count]
        self._sums[:, :, depth - step :].zero_()

    def slabs(self, total: Callable[[Tensor], Tensor] = lambda own: own) -> Iterator[Slab]:
        """Yields the slabs that have become final since the last call, in order; together they are the volume.

        Args:
            total: sums a tensor over the ranks that share the volume, each of which calls it for the same slabs.
        """
        (before, _), *plane = self._padding
        h, w = (slice(n, n + size) for (n, _), size in zip(plane, self._shape[1:], strict=True))
        while self._final:
            first, sums = self._final.popleft()
            planes = slice(first, first + sums.shape[2])
            mean = total(sums).div_(self._norm[planes])
            low, high = max(first, before), min(planes.stop, before + self._shape[0])
            if low < high:
                yield Slab(slice(low - before, high - before), mean[:, :, low - first : high - first, h, w])


@dataclass(frozen=True)
class Slab:
    """Consecutive planes of a volume's mean logits.

    Attributes:
        planes: their place along D.
        logits: (N, K, planes, H, W) float32.
    """

    planes: slice
    logits: Tensor


def predict_windows(
    volumes: Iterable[WindowedVolume],
    predictor: Predictor,
    batch_size: int,
    total: Callable[[Tensor], Tensor] = lambda own: own,
) -> Iterator[Slab]:
    """Fills the volumes, in order, from batches of windows; a batch may hold windows of several volumes.

    Args:
        volumes: consumed only as far as the next batch needs, so that few are in memory at a time.
        predictor: maps (B, C, *window) to (B, K, *window).
        batch_size: windows per batch.
        total: as in `WindowedVolume.slabs`.

    Yields:
        The slabs, as soon as they are final, volume after volume; each volume's first slab begins at plane 0.
    """
    open_volumes: deque[WindowedVolume] = deque()
    batch: list[tuple[WindowedVolume, WindowSlices]] = []

    def run() -> Iterator[Slab]:
        windows = [volume.window(slices) for volume, slices in batch]
        outputs = predictor(torch.cat(windows)).split([len(window) for window in windows])
        for (volume, slices), logits in zip(batch, outputs, strict=True):
            volume.add(slices, logits)
        batch.clear()
        del windows, outputs, logits  # not held while the slabs are used
        while open_volumes:
            yield from open_volumes[0].slabs(total)
            if open_volumes[0].missing:
                return
            open_volumes.popleft()

    for volume in volumes:
        open_volumes.append(volume)
        for slices in volume.windows:
            batch.append((volume, slices))
            if len(batch) == batch_size:
                yield from run()
    if batch:
        yield from run()


def sliding_window(
    image: Tensor,
    predictor: Predictor,
    window: Sequence[int],
    overlap: float,
    *,
    padding_value: float | None = None,
    batch_size: int = 1,
) -> Tensor:
    """Returns the predictor's logits for a volume of any size, averaged where windows overlap.

    The arguments are those of `WindowedVolume` and `predict_windows`.

    Returns:
        (N, K, D, H, W) float32.
    """
    volume = WindowedVolume(image, window, overlap, padding_value=padding_value)
    return torch.cat([slab.logits for slab in predict_windows([volume], predictor, batch_size)], dim=2)


def window_slices(shape: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> Iterator[WindowSlices]:
    """Yields the windows of a volume that is at least as large as one.

    They are the fewest that cover it at most `stride` apart: evenly spaced, with the first and the last at the edges.
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
