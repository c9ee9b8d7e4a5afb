"""One case from the scanner's grid to the network's, bit for bit as MLPerf's reference does it; and the way back.

turn -> cut -> resample -> clip -> normalise -> pad, and the foreground boxes that the biased crop draws from. KiTS19 is
neither turned nor cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage

from data_loading.io.orientation import Reorientation, reorient_geometry, reorientation_to
from data_loading.io.volume import Geometry, Volume
from data_loading.spec import DatasetSpec, with_current_keys

Shape = tuple[int, int, int]
# A foreground component's bounding box: (d0, h0, w0, d1, h1, w1), ends exclusive.
Box = tuple[int, int, int, int, int, int]
# Per class that is present, its largest boxes.
Boxes = dict[int, list[Box]]

# The reference keeps the two components with the largest bounding boxes: a patient has two kidneys.
BOXES_PER_CLASS = 2


@dataclass(frozen=True, kw_only=True)
class GridTransform:
    """How a case came to the network's grid, as far as the way back must know.

    Attributes:
        source: the scan's own geometry.
        resampled_shape: voxels after resampling, before padding.
        padding_before: voxels that padding put in front of each axis.
        shape: voxels in the end.
        orientation: what the scan was turned to; None: as stored.
        crop: the part of the turned scan that was resampled; None: all.
        by_area: it was resized as pictures are: the edges of the outer voxels stay in place, not their centres.
    """

    source: Geometry
    resampled_shape: Shape
    padding_before: Shape
    shape: Shape
    orientation: str | None = None
    crop: Box | None = None
    half_pixel: bool = False

    @property
    def turn(self) -> Reorientation | None:
        """How the scan's axes were turned; None: not at all."""
        return reorientation_to(self.source.affine, self.orientation) if self.orientation else None

    @property
    def whole(self) -> Geometry:
        """The scan's geometry after it was turned."""
        return reorient_geometry(self.source, self.turn) if self.turn else self.source

    @property
    def cut(self) -> Geometry:
        """The scan's geometry after it was turned and cut: what was resampled."""
        return self.whole.cropped(self.crop[:3], _size_of(self.crop)) if self.crop else self.whole

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distances between the voxels of the network's grid."""
        ends = 0 if self.half_pixel else 1
        cut = self.cut
        lengths = zip(cut.shape, cut.spacing_mm, self.resampled_shape, strict=True)
        d, h, w = ((n - ends) * mm / (new - ends) if min(n, new) > ends else mm for n, mm, new in lengths)
        return d, h, w

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source.to_json(),
            "resampled_shape": list(self.resampled_shape),
            "padding_before": list(self.padding_before),
            "shape": list(self.shape),
            "orientation": self.orientation,
            "crop": list(self.crop) if self.crop else None,
            "half_pixel": self.half_pixel,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> GridTransform:
        record = with_current_keys(record)
        return cls(
            source=Geometry.from_json(record["source"]),
            resampled_shape=as_shape(record["resampled_shape"]),
            padding_before=as_shape(record["padding_before"]),
            shape=as_shape(record["shape"]),
            orientation=record.get("orientation"),
            crop=as_box(record["crop"]) if record.get("crop") else None,
            half_pixel=bool(record.get("half_pixel", False)),
        )


def as_shape(values: Any) -> Shape:
    d, h, w = (int(n) for n in values)
    return d, h, w


def as_box(values: Any) -> Box:
    d0, h0, w0, d1, h1, w1 = (int(n) for n in values)
    return d0, h0, w0, d1, h1, w1


def _size_of(box: Box) -> Shape:
    return box[3] - box[0], box[4] - box[1], box[5] - box[2]


def _slices_of(box: Box) -> tuple[slice, ...]:
    """Of a (C, D, H, W) array."""
    return (slice(None), *(slice(first, last) for first, last in zip(box[:3], box[3:], strict=True)))


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


def resize_image(image: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Slice by slice and bilinear over areas: of a picture that shrinks, no pixel is left out. (C, D, H, W)."""
    resized = F.interpolate(torch.from_numpy(image), size=size, mode="bilinear", align_corners=False, antialias=True)
    return resized.numpy()


def resize_label(label: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The nearest pixel, where `resize_image` has its centre. (1, D, H, W)."""
    return F.interpolate(torch.from_numpy(label), size=size, mode="nearest-exact").numpy()


def normalise(image: NDArray[np.float32], spec: DatasetSpec) -> NDArray[np.float32]:
    """Clips to the spec's window, then scales as its `intensity` says, in float32.

    A spec without mean and deviation takes each channel's own; a constant channel becomes 0.
    """
    if spec.intensity_window is not None:
        low, high = spec.intensity_window
        image = np.clip(image, np.float32(low), np.float32(high))
    if spec.intensity == "none":
        return image
    if spec.intensity == "minmax":
        ends = spec.intensity_window or (_each(image, np.min), _each(image, np.max))
        least, most = (np.asarray(end, np.float32) for end in ends)
        extent = np.where(most > least, most - least, np.float32(1))
        return ((image - least) / extent).astype(np.float32, copy=False)
    if spec.mean is not None and spec.std is not None:
        return (image - np.float32(spec.mean)) / np.float32(spec.std)
    # Sums in float64: a float32 sum over 10^8 voxels loses three digits.
    mean = image.mean(axis=(1, 2, 3), dtype=np.float64, keepdims=True)
    std = image.std(axis=(1, 2, 3), dtype=np.float64, keepdims=True)
    scaled: NDArray[np.float32] = ((image - mean) / np.where(std > 0, std, 1.0)).astype(np.float32)
    return scaled


def _each(image: NDArray[np.float32], figure: Callable[..., Any]) -> NDArray[np.float32]:
    """A figure of each channel, (C, 1, 1, 1)."""
    found: NDArray[np.float32] = figure(image, axis=(1, 2, 3), keepdims=True)
    return found


def foreground_box(image: NDArray[np.float32], spec: DatasetSpec) -> Box | None:
    """The box of the body: of all voxels above the window's lower end, without a window above the channel's own mean.

    A voxel counts that is above in any channel.

    Args:
        image: (C, D, H, W), before it is clipped.

    Returns:
        None where no voxel is above.
    """
    floor = spec.intensity_window[0] if spec.intensity_window else _each(image, partial(np.mean, dtype=np.float64))
    body: NDArray[np.bool_] = np.any(image > floor, axis=0)
    if not body.any():
        return None
    sides = [np.flatnonzero(np.any(body, axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    return as_box([*(side[0] for side in sides), *(side[-1] + 1 for side in sides)])


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


def preprocess_image(image: Volume, spec: DatasetSpec) -> tuple[NDArray[np.float32], GridTransform]:
    """A scan on the network's grid, (C, D, H, W) float32, and how it came there."""
    array = image.array
    way = GridTransform(
        source=image.geometry,
        resampled_shape=image.geometry.shape,
        padding_before=(0, 0, 0),
        shape=image.geometry.shape,
        orientation=spec.orientation,
        half_pixel=spec.size is not None,
    )
    array = _turn_and_cut(array, way)
    if spec.foreground_crop:
        way = replace(way, crop=foreground_box(array, spec))
        array = _turn_and_cut(image.array, way)
    shape, spacing_mm = way.cut.shape, way.cut.spacing_mm
    if spec.size is not None:
        shape = (shape[0], *spec.size)
        array = resize_image(array, spec.size)
    elif spec.spacing_mm is not None and spacing_mm != spec.spacing_mm:
        shape = resampled_shape(shape, spacing_mm, spec.spacing_mm)
        array = resample_image(array, shape)
    padding = edge_padding(shape, spec.min_shape)
    array = pad_with_edges(normalise(array, spec), padding)
    before = as_shape([first for first, _ in padding])
    return array, replace(way, resampled_shape=shape, padding_before=before, shape=as_shape(array.shape[1:]))


def _turn_and_cut(array: NDArray[Any], way: GridTransform) -> NDArray[Any]:
    """The first two steps, of an image or its mask; the array itself where there is nothing to do."""
    array = way.turn.apply(array) if way.turn else array
    return np.ascontiguousarray(array[_slices_of(way.crop)] if way.crop else array)


def preprocess_label(label: Volume, transform: GridTransform, spec: DatasetSpec) -> NDArray[np.uint8]:
    """The mask on the grid that its scan came to, (1, D, H, W) uint8."""
    array = _turn_and_cut(label.array, transform)
    if transform.resampled_shape != array.shape[1:]:
        _, h, w = transform.resampled_shape
        array = (
            resize_label(array, (h, w)) if transform.half_pixel else resample_label(array, transform.resampled_shape)
        )
    return pad_with_edges(array, edge_padding(transform.resampled_shape, spec.min_shape))


def to_source_grid(array: NDArray[np.float32], transform: GridTransform, first: int = 0) -> NDArray[np.float32]:
    """The way back: cuts the padding off, interpolates to the scan's own grid, and undoes crop and turn.

    Outside of the crop all is background: its probability is 1, every other one 0.

    Args:
        array: (K, D, H, W) probabilities on the network's grid. Interpolate probabilities and take the arg-max
            afterwards: nearest on labels costs small objects up to half their Dice.
        transform: what `preprocess_image` returned.
        first: the class that `array` begins with.

    Returns:
        (K, *source shape) float32.
    """
    windows = zip(transform.padding_before, transform.resampled_shape, strict=True)
    inside = array[(slice(None), *(slice(start, start + size) for start, size in windows))]
    shape = transform.cut.shape
    if transform.resampled_shape != shape:
        inside = np.ascontiguousarray(inside)
        inside = resize_image(inside, shape[1:]) if transform.half_pixel else resample_image(inside, shape)
    if transform.crop:
        whole = np.zeros((len(array), *transform.whole.shape), np.float32)
        if first == 0:
            whole[0] = 1
        whole[_slices_of(transform.crop)] = inside
        inside = whole
    return transform.turn.undo(inside) if transform.turn else inside
