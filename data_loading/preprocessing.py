"""One case from the scanner's grid to the network's, bit for bit as MLPerf's reference does it; and the way back.

resample -> clip -> normalise -> pad, and the foreground boxes that the biased crop draws from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage

from data_loading.spec import DatasetSpec
from data_loading.volume import Geometry, Volume

Shape = tuple[int, int, int]
# A foreground component's bounding box: (d0, h0, w0, d1, h1, w1), ends exclusive.
Box = tuple[int, int, int, int, int, int]
# Per class that is present, its largest boxes.
Boxes = dict[int, list[Box]]

# The reference keeps the two components with the largest bounding boxes: a patient has two kidneys.
BOXES_PER_CLASS = 2


@dataclass(frozen=True)
class Transform:
    """How a case came to the network's grid, as far as the way back must know.

    Attributes:
        source: the scan's own geometry.
        resampled_shape: voxels after resampling, before padding.
        padding_before: voxels that padding put in front of each axis.
        shape: voxels in the end.
    """

    source: Geometry
    resampled_shape: Shape
    padding_before: Shape
    shape: Shape

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source.to_json(),
            "resampled_shape": list(self.resampled_shape),
            "padding_before": list(self.padding_before),
            "shape": list(self.shape),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Transform:
        return cls(
            Geometry.from_json(record["source"]),
            as_shape(record["resampled_shape"]),
            as_shape(record["padding_before"]),
            as_shape(record["shape"]),
        )


def as_shape(values: Any) -> Shape:
    d, h, w = (int(n) for n in values)
    return d, h, w


def resampled_shape(shape: Shape, spacing_mm: tuple[float, ...], target_mm: tuple[float, ...]) -> Shape:
    """The shape at the target spacing: `int(spacing / target * shape)`, truncated, in float64; at least 1."""
    scaled = np.asarray(spacing_mm, np.float64) / np.asarray(target_mm, np.float64) * np.asarray(shape)
    return as_shape(np.maximum(scaled.astype(np.int64), 1))


def resample_image(image: NDArray[np.float32], shape: Shape) -> NDArray[np.float32]:
    """Trilinear, corners aligned, in float32. (C, D, H, W) -> (C, *shape)."""
    resampled = F.interpolate(torch.from_numpy(image)[None], size=shape, mode="trilinear", align_corners=True)
    return resampled[0].numpy()


def resample_label(label: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """PyTorch's legacy `nearest` on uint8, which MLPerf's digests were made with. (1, D, H, W) -> (1, *shape)."""
    return F.interpolate(torch.from_numpy(label)[None], size=shape, mode="nearest")[0].numpy()


def normalise(image: NDArray[np.float32], spec: DatasetSpec) -> NDArray[np.float32]:
    """Clips to the spec's window, subtracts the mean and divides by the deviation, in float32.

    A spec without mean and deviation takes each channel's own; a constant channel becomes 0.
    """
    if spec.intensity_window is not None:
        low, high = spec.intensity_window
        image = np.clip(image, np.float32(low), np.float32(high))
    if spec.mean is not None and spec.deviation is not None:
        return (image - np.float32(spec.mean)) / np.float32(spec.deviation)
    # Sums in float64: a float32 sum over 10^8 voxels loses three digits.
    mean = image.mean(axis=(1, 2, 3), dtype=np.float64, keepdims=True)
    deviation = image.std(axis=(1, 2, 3), dtype=np.float64, keepdims=True)
    scaled: NDArray[np.float32] = ((image - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)
    return scaled


def edge_padding(shape: Shape, min_shape: Shape | None) -> list[tuple[int, int]]:
    """Voxels to add (before, after) each axis to reach `min_shape`: half in front, the odd one behind."""
    missing = [max(0, least - size) for least, size in zip(min_shape or (0, 0, 0), shape, strict=True)]
    return [(n // 2, n - n // 2) for n in missing]


def pad_with_edges(array: NDArray[Any], padding: list[tuple[int, int]]) -> NDArray[Any]:
    """Repeats the edge values of a (C, D, H, W) array; the array itself where nothing is missing."""
    if not any(before or after for before, after in padding):
        return array
    return np.pad(array, [(0, 0), *padding], mode="edge")


def foreground_boxes(label: NDArray[np.uint8], classes: int) -> Boxes:
    """The bounding boxes of the largest face-connected components of every class present.

    Args:
        label: (D, H, W) or (1, D, H, W).
        classes: K, the background included; values of K and above are no class.

    Returns:
        {class: its `BOXES_PER_CLASS` largest boxes by volume, largest first}; classes without a voxel are left out.
    """
    label = label.reshape(label.shape[-3:])
    boxes: Boxes = {}
    for value, region in enumerate(ndimage.find_objects(label), start=1):
        if region is None or value >= classes:
            continue
        components, _ = ndimage.label(label[region] == value)
        origin = [axis.start for axis in region]
        found = [_box(component, origin) for component in ndimage.find_objects(components)]
        boxes[value] = sorted(found, key=_box_volume, reverse=True)[:BOXES_PER_CLASS]
    return boxes


def _box(component: tuple[slice, ...], origin: list[int]) -> Box:
    starts = [int(axis.start) + first for axis, first in zip(component, origin, strict=True)]
    stops = [int(axis.stop) + first for axis, first in zip(component, origin, strict=True)]
    return starts[0], starts[1], starts[2], stops[0], stops[1], stops[2]


def _box_volume(box: Box) -> int:
    return (box[3] - box[0]) * (box[4] - box[1]) * (box[5] - box[2])


def preprocess_image(image: Volume, spec: DatasetSpec) -> tuple[NDArray[np.float32], Transform]:
    """A scan on the network's grid, (C, D, H, W) float32, and how it came there."""
    source = image.geometry
    array = image.array
    shape = source.shape
    if spec.spacing_mm is not None and source.spacing_mm != spec.spacing_mm:
        shape = resampled_shape(source.shape, source.spacing_mm, spec.spacing_mm)
        array = resample_image(array, shape)
    padding = edge_padding(shape, spec.min_shape)
    array = pad_with_edges(normalise(array, spec), padding)
    before = as_shape([first for first, _ in padding])
    return array, Transform(source, shape, before, as_shape(array.shape[1:]))


def preprocess_label(label: Volume, transform: Transform, spec: DatasetSpec) -> NDArray[np.uint8]:
    """The mask on the grid that its scan came to, (1, D, H, W) uint8."""
    array = label.array
    if transform.resampled_shape != transform.source.shape:
        array = resample_label(array, transform.resampled_shape)
    return pad_with_edges(array, edge_padding(transform.resampled_shape, spec.min_shape))


def to_source_grid(array: NDArray[np.float32], transform: Transform) -> NDArray[np.float32]:
    """The way back: cuts the padding off and interpolates to the scan's own grid.

    Args:
        array: (K, D, H, W) probabilities on the network's grid. Interpolate probabilities and take the arg-max
            afterwards: nearest on labels costs small objects up to half their Dice.
        transform: what `preprocess_image` returned.

    Returns:
        (K, *source shape) float32.
    """
    windows = zip(transform.padding_before, transform.resampled_shape, strict=True)
    inside = array[(slice(None), *(slice(first, first + size) for first, size in windows))]
    if transform.resampled_shape == transform.source.shape:
        return inside
    return resample_image(np.ascontiguousarray(inside), transform.source.shape)
