"""Preprocesses one case from the scanner's grid to the network's, bit for bit like MLPerf's reference.

reorient -> crop -> resample -> clip -> normalise -> pad, then the foreground boxes for the biased crop.
KiTS19 is neither reoriented nor cropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from data_loading.io.orientation import Reorientation, reorient_geometry, reorientation_to
from data_loading.io.volume import Geometry, Volume
from data_loading.spec import DatasetSpec, with_current_keys

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, int, int]
# A foreground component's bounding box: (d0, h0, w0, d1, h1, w1), ends exclusive.
Box = tuple[int, int, int, int, int, int]
# The largest boxes of each class present.
Boxes = dict[int, list[Box]]

# The reference keeps the two components with the largest bounding boxes: a patient has two kidneys.
BOXES_PER_CLASS = 2


@dataclass(frozen=True, kw_only=True)
class GridTransform:
    """The mapping from a scan's grid to the network's, as much as its inverse needs. Shapes are (D, H, W) in voxels.

    Attributes:
        source: the scan's own geometry.
        resampled_shape: shape after resampling, before padding.
        padding_before: voxels that padding added before each axis.
        shape: final shape.
        orientation: the orientation that the scan was reoriented to; None: as stored.
        crop: the part of the reoriented scan that was resampled; None: all of it.
        half_pixel: resized as 2-D images are: the edges of the outer voxels stay fixed, not their centres
            (`align_corners=False`).
    """

    source: Geometry
    resampled_shape: Shape
    padding_before: Shape
    shape: Shape
    orientation: str | None = None
    crop: Box | None = None
    half_pixel: bool = False

    @property
    def reorientation(self) -> Reorientation | None:
        """The reorientation of the scan's axes; None: none."""
        return reorientation_to(self.source.affine, self.orientation) if self.orientation else None

    @property
    def reoriented(self) -> Geometry:
        """The geometry of the reoriented scan."""
        return reorient_geometry(self.source, self.reorientation) if self.reorientation else self.source

    @property
    def cropped(self) -> Geometry:
        """The geometry of the reoriented and cropped scan, which was resampled."""
        return self.reoriented.cropped(self.crop[:3], _size_of(self.crop)) if self.crop else self.reoriented

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """(D, H, W) distances between the voxels of the network's grid."""
        ends = 0 if self.half_pixel else 1
        cropped = self.cropped
        lengths = zip(cropped.shape, cropped.spacing_mm, self.resampled_shape, strict=True)
        d, h, w = ((n - ends) * mm / (new - ends) if min(n, new) > ends else mm for n, mm, new in lengths)
        return d, h, w

    @property
    def steps_mm(self) -> NDArray[np.float64]:
        """(3, 3), its columns the steps between the voxels of the network's grid along D, H and W.

        With a tilted gantry they are not perpendicular.
        """
        cropped = self.cropped
        scale = np.asarray(self.spacing_mm) / np.asarray(cropped.spacing_mm)
        steps: NDArray[np.float64] = cropped.affine[:3, :3] * scale
        return steps

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
    """Returns the index of the box in a (C, D, H, W) array."""
    return (slice(None), *(slice(first, last) for first, last in zip(box[:3], box[3:], strict=True)))


def resampled_shape(shape: Shape, spacing_mm: tuple[float, ...], target_mm: tuple[float, ...]) -> Shape:
    """Returns the shape at the target spacing: `int(spacing / target * shape)`, truncated, in float64; at least 1."""
    scaled = np.asarray(spacing_mm, np.float64) / np.asarray(target_mm, np.float64) * np.asarray(shape)
    return as_shape(np.maximum(scaled.astype(np.int64), 1))


def resample_image(image: NDArray[np.float32], shape: Shape) -> NDArray[np.float32]:
    """Resamples (C, D, H, W) to (C, *shape): trilinear, corners aligned, in float32."""
    return _interpolate(image[None], shape, mode="trilinear", align_corners=True)[0]


def resample_label(label: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """Resamples (1, D, H, W) to (1, *shape) with PyTorch's legacy `nearest`, as MLPerf's digests require.

    Voxel i of n becomes that of `floor(i m / n)`, where `resample_image` takes `i (m - 1) / (n - 1)`.
    """
    return _interpolate(label[None], shape, mode="nearest")[0]


def resample_label_aligned(label: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """Resamples (1, D, H, W) to (1, *shape) by the voxel nearest to each point of `resample_image`."""
    places = [
        (2 * np.arange(new) * (old - 1) + (new - 1)) // max(2 * (new - 1), 1)  # rounded, in integers
        for old, new in zip(label.shape[1:], shape, strict=True)
    ]
    return np.ascontiguousarray(label[:, *np.ix_(*places)])


def resize_image(image: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resizes a (C, D, H, W) image slice by slice: bilinear, antialiased so that shrinking uses every pixel."""
    import torch

    resized: NDArray[np.float32] = resize_planes(torch.from_numpy(image), size).numpy()
    return resized


def resize_planes(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes the last two axes of (N, C, H, W): bilinear, antialiased, by pixel centres."""
    import torch.nn.functional as F

    resize = partial(F.interpolate, mode="bilinear", align_corners=False, antialias=True)
    if size[1] == 1:  # PyTorch 2.13 returns wrong numbers for a width of one pixel if the height changes as well
        planes = resize(planes.mT, (planes.shape[3], size[0])).mT
    return resize(planes, size)


def resize_label(label: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resizes a (1, D, H, W) label slice by slice to the nearest pixel, with the pixel centres of `resize_image`."""
    return _interpolate(label, size, mode="nearest-exact")


def _interpolate(batch: NDArray[Any], size: tuple[int, ...], **how: Any) -> NDArray[Any]:
    """Interpolates the last axes of (N, C, …) to `size` with PyTorch, whose rounding MLPerf's digests contain."""
    # Here, since the process that only hands out cases need not spend seconds on it.
    import torch
    import torch.nn.functional as F

    interpolated: NDArray[Any] = F.interpolate(torch.from_numpy(batch), size=size, **how).numpy()
    return interpolated


def normalise(
    image: NDArray[np.float32], spec: DatasetSpec, whole: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Clips a (C, D, H, W) image to the spec's window, then scales it by the spec's `intensity`, in float32.

    Without mean and std in the spec, each channel's own are used; a constant channel becomes 0.

    Args:
        whole: the scan that the image is a part of, whose values are used instead of its own.
    """

    def clipped(array: NDArray[np.float32]) -> NDArray[np.float32]:
        if spec.intensity_window is None:
            return array
        low, high = spec.intensity_window
        return np.clip(array, np.float32(low), np.float32(high))

    image = clipped(image)
    if spec.intensity == "none":
        return image
    if spec.intensity == "minmax":
        scan = image if whole is None else whole
        ends = spec.intensity_window or (_per_channel(scan, np.min), _per_channel(scan, np.max))
        bottom, top = (np.asarray(end, np.float32) for end in ends)
        extent = np.where(top > bottom, top - bottom, np.float32(1))
        return ((image - bottom) / extent).astype(np.float32, copy=False)
    if spec.mean is not None and spec.std is not None:
        return (image - np.float32(spec.mean)) / np.float32(spec.std)
    scan = image if whole is None else clipped(whole)
    # Sums in float64: a float32 sum over 10^8 voxels loses three digits.
    mean = scan.mean(axis=(1, 2, 3), dtype=np.float64, keepdims=True)
    std = scan.std(axis=(1, 2, 3), dtype=np.float64, keepdims=True)
    scaled: NDArray[np.float32] = ((image - mean) / np.where(std > 0, std, 1.0)).astype(np.float32)
    return scaled


def _per_channel(image: NDArray[np.float32], statistic: Callable[..., Any]) -> NDArray[np.float32]:
    """Returns a statistic of each channel, (C, 1, 1, 1)."""
    found: NDArray[np.float32] = statistic(image, axis=(1, 2, 3), keepdims=True)
    return found


def foreground_box(
    image: NDArray[np.float32], spec: DatasetSpec, whole: NDArray[np.float32] | None = None
) -> Box | None:
    """Returns the bounding box of the voxels above the window's lower end; without a window, above the channel's mean.

    One channel above is enough.

    Args:
        image: (C, D, H, W), not clipped yet.
        whole: the scan that the image is a part of, whose mean is used instead of its own.

    Returns:
        The box, or None if no voxel is above.
    """
    scan = image if whole is None else whole
    floor = (
        spec.intensity_window[0] if spec.intensity_window else _per_channel(scan, partial(np.mean, dtype=np.float64))
    )
    body: NDArray[np.bool_] = np.any(image > floor, axis=0)
    if not body.any():
        return None
    sides = [np.flatnonzero(np.any(body, axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    return as_box([*(side[0] for side in sides), *(side[-1] + 1 for side in sides)])


def edge_padding(shape: Shape, min_shape: Shape | None) -> list[tuple[int, int]]:
    """Returns the voxels to add (before, after) each axis to reach `min_shape`: half before, the odd one after."""
    missing = [max(0, least - size) for least, size in zip(min_shape or (0, 0, 0), shape, strict=True)]
    return [(n // 2, n - n // 2) for n in missing]


def pad_with_edges(array: NDArray[Any], padding: list[tuple[int, int]]) -> NDArray[Any]:
    """Pads a (C, D, H, W) array with its edge values; returns the array itself if there is no padding."""
    if not any(before or after for before, after in padding):
        return array
    return np.pad(array, [(0, 0), *padding], mode="edge")


def foreground_boxes(label: NDArray[np.uint8], classes: int) -> Boxes:
    """Returns the bounding boxes of the largest face-connected components of every class present.

    Args:
        label: (D, H, W) or (1, D, H, W).
        classes: K, including the background; values of K and above are ignored.

    Returns:
        {class: its `BOXES_PER_CLASS` largest boxes by volume, largest first}, without absent classes.
    """
    label = label.reshape(label.shape[-3:])
    boxes: Boxes = {}
    for value, region in enumerate(ndimage.find_objects(label), start=1):
        if region is None or value >= classes:
            continue
        components, _ = ndimage.label(label[region] == value)
        origin = [axis.start for axis in region]
        found = [_box(component, origin) for component in ndimage.find_objects(components)]
        boxes[value] = sorted(found, key=lambda box: math.prod(_size_of(box)), reverse=True)[:BOXES_PER_CLASS]
    return boxes


def _box(component: tuple[slice, ...], origin: list[int]) -> Box:
    starts = [axis.start + first for axis, first in zip(component, origin, strict=True)]
    stops = [axis.stop + first for axis, first in zip(component, origin, strict=True)]
    return as_box([*starts, *stops])


def preprocess_image(image: Volume, spec: DatasetSpec) -> tuple[NDArray[np.float32], GridTransform]:
    """Returns a scan on the network's grid, (C, D, H, W) float32, and the transform to that grid."""
    array = image.array
    transform = GridTransform(
        source=image.geometry,
        resampled_shape=image.geometry.shape,
        padding_before=(0, 0, 0),
        shape=image.geometry.shape,
        orientation=spec.orientation,
        half_pixel=spec.size is not None,
    )
    array = _reorient_and_crop(array, transform)
    if spec.foreground_crop:
        transform = replace(transform, crop=foreground_box(array, spec, image.whole))
        array = _reorient_and_crop(image.array, transform)
    shape, spacing_mm = transform.cropped.shape, transform.cropped.spacing_mm
    if spec.size is not None:
        shape = (shape[0], *spec.size)
        array = resize_image(array, spec.size)
    elif spec.spacing_mm is not None and spacing_mm != spec.spacing_mm:
        shape = resampled_shape(shape, spacing_mm, spec.spacing_mm)
        array = resample_image(array, shape)
    padding = edge_padding(shape, spec.min_shape)
    array = pad_with_edges(normalise(array, spec, image.whole), padding)
    before = as_shape([first for first, _ in padding])
    return array, replace(transform, resampled_shape=shape, padding_before=before, shape=as_shape(array.shape[1:]))


def _reorient_and_crop(array: NDArray[Any], transform: GridTransform) -> NDArray[Any]:
    """Reorients and crops an image or its mask; returns the array itself if there is nothing to do."""
    array = transform.reorientation.apply(array) if transform.reorientation else array
    return np.ascontiguousarray(array[_slices_of(transform.crop)] if transform.crop else array)


def preprocess_label(label: Volume, transform: GridTransform, spec: DatasetSpec) -> NDArray[np.uint8]:
    """Returns the mask on its scan's preprocessed grid, (1, D, H, W) uint8."""
    array = _reorient_and_crop(label.array, transform)
    if transform.resampled_shape != array.shape[1:]:
        _, h, w = shape = transform.resampled_shape
        if transform.half_pixel:
            array = resize_label(array, (h, w))
        else:
            array = (resample_label_aligned if spec.aligned_labels else resample_label)(array, shape)
    return pad_with_edges(array, edge_padding(transform.resampled_shape, spec.min_shape))
