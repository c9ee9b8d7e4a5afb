"""Masks of scans: found on a scan's grid by their affine, and read as classes on it.

A mask is a NIfTI file of values, several NIfTI files of one organ each, named like it, or a DICOM-SEG file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import registry
from common.errors import UserError
from data_loading.io.orientation import orientation_of, turn_to, turned, turned_geometry
from data_loading.io.scan_discovery import NIFTI, stem
from data_loading.io.volume import Geometry, Volume, check_same_geometry, read_geometry, read_nifti
from data_loading.readers.labels import Key, LabelMap

DICOM_SEG = "data_loading.io.dicom_seg"
# Corners of two grids that are one may differ by this share of a voxel: DICOM positions are decimal and rounded.
GRID_TOLERANCE = 0.05


def is_nifti(path: Path) -> bool:
    return path.name.endswith(NIFTI) and not path.name.startswith(".")


def nifti_files(folder: Path) -> list[Path]:
    """The NIfTI files below a folder."""
    return sorted(path for path in folder.rglob("*") if is_nifti(path) and path.is_file())


def same_grid(one: Geometry, other: Geometry) -> bool:
    """Whether two grids have the same voxels in the same places; one may run along its axes another way."""
    other = turned_geometry(other, turn_to(other.affine, orientation_of(one.affine)))
    if one.shape != other.shape:
        return False
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in one.shape))])
    apart = np.linalg.norm((corners @ (one.affine - other.affine).T)[:, :3], axis=1)
    return bool(apart.max() <= GRID_TOLERANCE * min(one.spacing_mm))


def keys_in(masks: Sequence[Path], by_name: bool) -> set[Key]:
    """What `--labels` may name in a scan's masks: values, or names of organs.

    Args:
        by_name: a NIfTI file is an organ's own.
    """
    found: set[Key] = set()
    for path in masks:
        if not is_nifti(path):
            found |= set(_seg("open_segments")(path).names.values())
        elif by_name:
            found.add(stem(path))
        else:
            found |= set(np.unique(read_nifti(path, np.uint8).array).tolist())
    return found


def read_classes(masks: Sequence[Path], geometry: Geometry, labels: LabelMap, case: str) -> Volume:
    """The masks of a scan as one, (1, D, H, W), on the scan's own grid; where two overlap the higher class counts.

    A file that has the name of an organ in `labels` is that organ's wherever it is not 0.

    Raises:
        UserError: a mask is damaged or lies on another grid.
    """
    if len(masks) > 1 and not any(isinstance(key, str) for key, _ in labels.pairs):
        names = ", ".join(path.name for path in masks[:3])
        raise UserError(
            f"{case}: {len(masks)} masks lie on its grid ({names}); remove all but one, or name organs in "
            "--labels, such as liver=1"
        )
    classes = np.zeros((1, *geometry.shape), np.uint8)
    for path in masks:
        if not is_nifti(path):
            found = _seg("read_segments")(path, geometry, labels.of)
        else:
            mask = _on_grid(read_nifti(path, np.uint8), geometry, case)
            own = labels.of(stem(path))
            if len(masks) == 1 and not own:
                found = labels.apply(mask)
            else:
                if own and len(values := np.unique(mask[mask > 0])) > 1:
                    raise UserError(
                        f"{path}: taken for the mask of {stem(path)} alone, as it is not the only one on "
                        f"its scan's grid or named so, but it holds {len(values)} values"
                    )
                found = np.where(mask > 0, np.uint8(own), np.uint8(0))
        np.maximum(classes, found, out=classes)
    return Volume(classes, geometry)


def _on_grid(mask: Volume, geometry: Geometry, case: str) -> NDArray[Any]:
    """The mask with its axes as the scan's run."""
    if mask.array.shape[0] != 1:
        raise UserError(f"{case}: its mask has {mask.array.shape[0]} channels, expected 1")
    turn = turn_to(mask.geometry.affine, orientation_of(geometry.affine))
    # By its corners, and where those differ by the header's own figures, which the message then tells.
    if not same_grid(geometry, mask.geometry):
        check_same_geometry(geometry, turned_geometry(mask.geometry, turn), case)
    return turned(mask, turn).array


def fitting(path: Path, geometries: Iterable[Geometry]) -> list[int]:
    """Which of the scans' grids a mask lies on. Raises UserError where the mask is damaged."""
    if is_nifti(path):
        own = read_geometry(path)
        return [index for index, geometry in enumerate(geometries) if same_grid(geometry, own)]
    segments = _seg("open_segments")(path)
    return [index for index, geometry in enumerate(geometries) if segments.slices(geometry) is not None]


def _seg(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = registry.load(f"{DICOM_SEG}:{name}", "a DICOM-SEG mask", "dicom")
    return found
