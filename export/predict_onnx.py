"""Predicts the mask of a NIfTI scan with an exported network; needs numpy, nibabel and onnxruntime alone.

    python3 predict_onnx.py NET.onnx SCAN.nii.gz MASK.nii.gz

A scan is reoriented, cropped, resampled, normalised and padded as the network's training data was, cut into overlapping
windows, and the mean of their logits, weighted by a Gaussian, becomes a mask on the scan's own grid. What a data set
needs of this is in the network's metadata, and is called the settings here.

This file is a copy: it belongs to no package and may be changed. Arrays are (C, D, H, W): channels, or classes, and the
axes of the file in their order.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Settings = dict[str, Any]
# Windows (N, C, D, H, W) float32 -> logits (N, K, D, H, W).
Predictor = Callable[[Array], Array]


class ScanError(Exception):
    """A scan or a network that cannot be used; the message says why in one line."""


@dataclass(frozen=True)
class Scan:
    """A scan as its file holds it.

    Attributes:
        array: (C, D, H, W) float32.
        affine: (4, 4), voxel index to mm.
        spacing_mm: (D, H, W) distances of the voxels.
    """

    array: Array
    affine: Array
    spacing_mm: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How the network's grid lies in the scan's; shapes are (D, H, W).

    Attributes:
        axes, flipped: of the reoriented scan: the scan's axis that each comes from, and whether it is reversed.
        shape: of the reoriented scan.
        crop: slices of its part that was resampled.
        resampled: shape after resampling.
        before: voxels that padding added in front of each axis.
        antialias: resized as 2-D images are, slice by slice.
    """

    axes: tuple[int, ...]
    flipped: tuple[int, ...]
    shape: tuple[int, ...]
    crop: tuple[slice, ...]
    resampled: tuple[int, ...]
    before: tuple[int, ...]
    antialias: bool


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 3:
        print("usage: predict_onnx.py NET.onnx SCAN.nii.gz MASK.nii.gz", file=sys.stderr)
        return 2
    network, scan, mask = map(Path, arguments)
    try:
        if not mask.name.lower().endswith((".nii", ".nii.gz")):
            raise ScanError(f"{mask}: a mask is written as .nii or .nii.gz")
        predictor, settings = load_network(network)
        predict_file(scan, mask, predictor, settings)
    except (ScanError, OSError) as error:
        print(f"predict_onnx.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def load_network(path: Path) -> tuple[Predictor, Settings]:
    """Returns a network and its settings. Raises ScanError if the file is damaged or was not exported with them."""
    import onnxruntime

    if not path.is_file():
        raise ScanError(f"{path}: no such file")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
        stored = session.get_modelmeta().custom_metadata_map
        settings = {name: json.loads(text) for name, text in stored.items()}
        (session_input,) = session.get_inputs()
        if "window" not in settings:
            raise ValueError("it has no settings")
    except Exception as error:  # onnxruntime and json each raise types of their own
        raise ScanError(f"{path}: damaged, or not exported with its settings ({error})") from None

    def predict(windows: Array) -> Array:
        logits: Array = session.run(None, {session_input.name: windows})[0]
        return logits

    return predict, settings


def predict_folder(scans: Sequence[str], scans_dir: str, masks_dir: str, predict: Callable[[str], None]) -> None:
    """Predicts the scans of a folder. Raises ScanError if it has none, or at the end, naming those that failed."""
    if not scans:
        raise ScanError(f"{scans_dir}: no .nii or .nii.gz file in it")
    if Path(scans_dir).resolve() == Path(masks_dir).resolve():
        raise ScanError(f"{masks_dir}: masks would replace the scans; give another output_dir")
    failed = []
    for scan in scans:
        try:
            predict(scan)
        except (ScanError, OSError) as error:
            failed.append(str(error))
    if failed:
        raise ScanError(f"{len(failed)} of {len(scans)} scan(s) have no mask: {'; '.join(failed)}")


def predict_file(scan_path: Path, mask_path: Path, predictor: Predictor, settings: Settings) -> None:
    """Predicts one scan and writes its mask, with the scan's affine."""
    scan = read_scan(scan_path)
    mask = predict_mask(scan, predictor, settings)
    image = nib.Nifti1Image(mask, scan.affine)
    image.header["pixdim"][1:4] = scan.spacing_mm
    nib.save(image, mask_path)


def predict_mask(scan: Scan, predictor: Predictor, settings: Settings) -> Array:
    """Returns the mask of a scan, (D, H, W) uint8 of the scan's grid."""
    image, grid = preprocess(scan, settings)
    return mask_on_scan(sliding_window(image, predictor, settings), grid)


def read_scan(path: Path) -> Scan:
    """Reads a NIfTI file; the channels of a 4-D one come last."""
    try:
        file: Any = nib.load(path)
        if not isinstance(file, nib.Nifti1Pair) or file.get_data_dtype().kind not in "iuf":  # NIfTI-2 is one too
            raise TypeError(f"it is a {type(file).__name__} of {file.get_data_dtype()}")
        values = file.get_fdata(dtype=np.float32)
    except FileNotFoundError:
        raise ScanError(f"{path}: no such file") from None
    except Exception as error:  # nibabel raises many types on a damaged file
        raise ScanError(f"{path}: damaged, or no NIfTI file of real numbers ({error})") from None
    values = values.reshape(*values.shape[:3], *[1] * (3 - values.ndim), -1)  # trailing axes are channels
    array = np.ascontiguousarray(np.moveaxis(values, -1, 0))
    if not np.isfinite(array).all() or (array.size > 1 and array.min() == array.max()):
        raise ScanError(f"{path}: its voxels are NaN, infinite or all equal")
    affine = np.asarray(file.affine, np.float64)
    spacing = [float(mm) for mm in file.header["pixdim"][1:4]]
    if file.ndim == 2:  # the header may lack the third spacing
        spacing[2] = float(np.linalg.norm(affine[:3, 2]))
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if int(file.header["xyzt_units"]) & 7 in (1, 3) or not np.allclose(spacing, lengths, rtol=0.01, atol=0):
        raise ScanError(f"{path}: its voxels are not in mm, or their size contradicts the affine; correct its header")
    return Scan(array, affine, tuple(spacing))


# The network's grid.


def preprocess(scan: Scan, settings: Settings) -> tuple[Array, Grid]:
    """Returns a scan on the network's grid, float32, and how that grid lies in the scan's."""
    how = settings["preprocessing"]
    if len(scan.array) != settings["channels"]:
        raise ScanError(f"the scan has {len(scan.array)} channel(s), the network takes {settings['channels']}")
    axes, flipped = orientation_change(scan.affine, how["orientation"])
    image = np.flip(scan.array.transpose(0, *(axis + 1 for axis in axes)), tuple(axis + 1 for axis in flipped))
    spacing = tuple(scan.spacing_mm[axis] for axis in axes)
    crop = foreground(image, how["intensity_window"]) if how["foreground_crop"] else (slice(None),) * 3
    shape = image.shape[1:]
    image = np.ascontiguousarray(image[:, *crop])
    size = image.shape[1:]
    if how["size"]:
        size = (size[0], *how["size"])
    elif how["spacing_mm"] and spacing != tuple(how["spacing_mm"]):
        scaled = np.asarray(spacing) / np.asarray(how["spacing_mm"]) * np.asarray(size)
        size = tuple(max(1, int(n)) for n in scaled)
    image = normalise(resize(image, size, antialias=bool(how["size"])), how)
    missing = [max(0, least - n) for least, n in zip(how["min_shape"] or (0, 0, 0), size, strict=True)]
    image = np.pad(image, [(0, 0), *((n // 2, n - n // 2) for n in missing)], mode="edge")
    before = tuple(n // 2 for n in missing)
    return image, Grid(
        axes=axes, flipped=flipped, shape=shape, crop=crop, resampled=size, before=before, antialias=bool(how["size"])
    )


def orientation_change(affine: Array, orientation: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the axes and flips that bring a scan to an orientation such as "RAS"; None leaves it as it is."""
    if orientation is None:
        return (0, 1, 2), ()
    wanted = nib.orientations.axcodes2ornt(tuple(orientation))
    change = nib.orientations.ornt_transform(nib.io_orientation(affine), wanted)
    # Each row holds an axis of the result and a sign, for one axis of the scan.
    axes = tuple(int(np.flatnonzero(change[:, 0] == axis)[0]) for axis in range(3))
    return axes, tuple(new for new, old in enumerate(axes) if change[old, 1] < 0)


def foreground(image: Array, intensity_window: Sequence[float] | None) -> tuple[slice, ...]:
    """Returns the bounding box of the voxels above the window's lower end, or else above their channel's mean."""
    floor = intensity_window[0] if intensity_window else image.mean((1, 2, 3), np.float64, keepdims=True)
    body = np.any(image > floor, axis=0)
    if not body.any():
        return (slice(None),) * 3
    sides = [np.flatnonzero(body.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    return tuple(slice(int(side[0]), int(side[-1]) + 1) for side in sides)


def normalise(image: Array, how: Settings) -> Array:
    """Clips and scales the intensities."""
    window = how["intensity_window"]
    if window:
        image = np.clip(image, np.float32(window[0]), np.float32(window[1]))
    if how["intensity"] == "none":
        return image
    if how["intensity"] == "minmax":
        ends = window or (image.min((1, 2, 3), keepdims=True), image.max((1, 2, 3), keepdims=True))
        low, high = (np.asarray(end, np.float32) for end in ends)
        return (image - low) / np.where(high > low, high - low, np.float32(1))
    if how["mean"] is not None and how["std"] is not None:
        return (image - np.float32(how["mean"])) / np.float32(how["std"])
    mean = image.mean((1, 2, 3), np.float64, keepdims=True)
    std = image.std((1, 2, 3), np.float64, keepdims=True)
    return ((image - mean) / np.where(std > 0, std, 1.0)).astype(np.float32)


# Interpolation.


def resize(image: Array, shape: Sequence[int], *, antialias: bool) -> Array:
    """Resizes the last axes of an array to a shape, linearly; an axis that has its length already is left alone.

    Args:
        antialias: the outer edges of the voxels stay fixed and shrinking uses every voxel, as is usual for pictures;
            otherwise the centres of the outer voxels stay fixed (trilinear with aligned corners).
    """
    for axis, size in zip(range(-len(shape), 0), shape, strict=True):
        length = image.shape[axis]
        if length == size:
            continue
        if antialias:
            weights = antialias_weights(length, size)
            image = np.moveaxis(np.tensordot(image, weights, axes=(axis, 1)), -1, axis)
        else:
            below, above, weight = neighbours(length, size)
            weight = weight.reshape(-1, *[1] * (-axis - 1))
            image = np.take(image, below, axis) * (1 - weight) + np.take(image, above, axis) * weight
    return np.ascontiguousarray(image)


def neighbours(length: int, size: int) -> tuple[Array, Array, Array]:
    """Returns, for each of `size` places along an axis: the voxels below and above it, and the weight of the latter."""
    step = np.float32(length - 1) / np.float32(max(size - 1, 1)) if size != length else np.float32(1)
    places = np.arange(size, dtype=np.float32) * step
    below = np.minimum(places.astype(np.int64), length - 1)
    above = np.minimum(below + 1, length - 1)
    return below, above, np.where(above > below, places - below.astype(np.float32), np.float32(0))


def antialias_weights(length: int, size: int) -> Array:
    """Returns the weights (size, length) of a triangle that is as wide as two voxels of the coarser grid."""
    scale = length / size
    centres = scale * (np.arange(size) + 0.5)
    distances = np.arange(length) + 0.5 - centres[:, None]
    weights = np.maximum(0, 1 - np.abs(distances) / max(scale, 1.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


# Windows.


def sliding_window(image: Array, predictor: Predictor, settings: Settings) -> Array:
    """Returns the logits (K, D, H, W) of an image, averaged where windows overlap."""
    window, value = settings["window"], settings["padding_value"]
    strides = [max(1, int(length * (1 - settings["overlap"]))) for length in window]
    padding = []
    for size, length, stride in zip(image.shape[1:], window, strides, strict=True):
        unit = stride if value is not None else 1
        missing = length + -(-max(size - length, 0) // unit) * unit - size
        padding.append((missing // 2, missing - missing // 2))
    how: Settings = {"mode": "edge"} if value is None else {"constant_values": value}
    padded = np.pad(image, [(0, 0), *padding], **how)
    weights = gaussian(window)
    norm = np.zeros(padded.shape[1:], np.float32)
    sums: Array | None = None
    lengths = zip(padded.shape[1:], window, strides, strict=True)
    for start in itertools.product(*(window_starts(*of_axis) for of_axis in lengths)):
        part = tuple(slice(first, first + length) for first, length in zip(start, window, strict=True))
        logits = mean_over_flips(padded[None, :, *part], predictor, settings["test_time_flips"])[0]
        if sums is None:
            sums = np.zeros((len(logits), *norm.shape), np.float32)
        sums[:, *part] += logits * weights
        norm[part] += weights
    assert sums is not None
    inside = [slice(n, n + size) for (n, _), size in zip(padding, image.shape[1:], strict=True)]
    kept: Array = (sums / norm)[:, *inside]
    return kept


def window_starts(size: int, length: int, stride: int) -> list[int]:
    """Returns where the windows of an axis begin: the fewest at most a stride apart, evenly spaced from end to end."""
    intervals = -(-(size - length) // stride)
    return [round(i * (size - length) / max(intervals, 1)) for i in range(intervals + 1)]


def gaussian(window: Sequence[int]) -> Array:
    """Returns the weights of a window's voxels: the cube root of three Gaussians, each an eighth of its axis wide."""
    d, h, w = (np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in window)
    product = (d[:, None, None] * h[None, :, None] * w[None, None, :]) ** (1 / 3)
    return (product / product.max()).astype(np.float32)


def mean_over_flips(windows: Array, predictor: Predictor, flips: Sequence[Sequence[int]]) -> Array:
    """Returns the mean of the logits over flips of some axes (of N, C, D, H, W), each undone; [] is no flip."""
    each = map(tuple, flips)
    total = sum(np.flip(predictor(np.flip(windows, axes).copy()), axes) for axes in each)
    return np.asarray(total, np.float32) / len(flips)


# The scan's grid.


def mask_on_scan(logits: Array, grid: Grid) -> Array:
    """Returns the most probable class of each voxel of the scan; probabilities, not classes, are interpolated."""
    inside = [slice(n, n + size) for n, size in zip(grid.before, grid.resampled, strict=True)]
    logits = logits[:, *inside]
    probabilities = np.exp(logits - logits.max(axis=0))
    probabilities /= probabilities.sum(axis=0)
    mask = np.zeros(grid.shape, np.uint8)
    part = mask[grid.crop]
    below, above, weights = neighbours(grid.resampled[0], part.shape[0])
    for plane, (low, high, weight) in enumerate(zip(below, above, weights, strict=True)):
        mean = probabilities[:, low] * (1 - weight) + probabilities[:, high] * weight
        part[plane] = resize(mean, part.shape[1:], antialias=grid.antialias).argmax(axis=0)
    back = [grid.axes.index(axis) for axis in range(3)]
    return np.ascontiguousarray(np.flip(mask, grid.flipped).transpose(back))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
