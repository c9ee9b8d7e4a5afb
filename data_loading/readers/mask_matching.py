"""Finds the masks of scans, by equal stems or by their grid, and reads them as classes.

A mask is a NIfTI file of values, several NIfTI files named after one structure each, or a DICOM-SEG file.
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
from common.messages import note
from data_loading.index import is_safe_case_id
from data_loading.io.orientation import orientation_of, reorient, reorient_geometry, reorientation_to
from data_loading.io.scan_discovery import NIFTI, stem
from data_loading.io.volume import Geometry, Volume, check_same_geometry, read_geometry, read_nifti
from data_loading.readers.label_map import Key, LabelMap
from data_loading.readers.overlaps import ClassMerger

DICOM_SEG = "data_loading.io.dicom_seg"
# Corners of two equal grids may differ by this fraction of a voxel: DICOM positions are rounded decimals.
GRID_TOLERANCE = 0.05


def is_nifti(path: Path) -> bool:
    """Returns whether the file name is that of a NIfTI file; hidden files are not."""
    return path.name.endswith(NIFTI) and not path.name.startswith(".")


def nifti_files(folder: Path) -> list[Path]:
    """Returns the NIfTI files in a folder and its subfolders."""
    return sorted(path for path in folder.rglob("*") if is_nifti(path) and path.is_file())


def check_labels_dir(labels_dir: Path | None, data_dir: Path, dataset: str) -> Path:
    """Returns `--labels_dir`. Raises UserError if it is missing, not a folder, or the folder of the scans."""
    if labels_dir is None:
        raise UserError(f"--dataset {dataset} needs --labels_dir, the folder of the masks")
    if not labels_dir.is_dir():
        raise UserError(f"--labels_dir {labels_dir}: no such folder")
    if labels_dir.samefile(data_dir):
        raise UserError(f"--labels_dir {labels_dir} is also --data_dir; masks need a separate folder")
    return labels_dir


def pair_by_stem(
    scans: Iterable[Path], masks: Iterable[Path], *, data_dir: Path, labels_dir: Path, kind: str
) -> list[tuple[str, Path, Path]]:
    """Pairs scans and masks of equal stems, which become the case ids.

    Args:
        masks: files, or folders with the files of one scan.
        kind: what to call a scan in error messages.

    Returns:
        (stem, scan, mask) of each scan.

    Raises:
        UserError: no scans, a scan without its mask or a mask without its scan, two of one stem, or a stem that
            cannot be a case id.
    """
    data, labels = f"--data_dir {data_dir}", f"--labels_dir {labels_dir}"
    scan_of, mask_of = _by_stem(scans, data), _by_stem(masks, labels)
    if not scan_of:
        raise UserError(f"{data}: no {kind} in it")
    for present, absent, missing_kind, folder in ((scan_of, mask_of, "mask", labels), (mask_of, scan_of, kind, data)):
        if missing := sorted(present.keys() - absent.keys()):
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            name = present[missing[0]].name
            raise UserError(f"{folder}: no {missing_kind} {missing[0]} for {name}{more}; stems must be equal")
    return [(name, path, mask_of[name]) for name, path in scan_of.items()]


def _by_stem(paths: Iterable[Path], source: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        name = path.name if path.is_dir() else stem(path)
        if not is_safe_case_id(name):
            raise UserError(f"{source}: {path.name} cannot be used as a case id")
        if name in found:
            raise UserError(f"{source}: {found[name].name} and {path.name} have the same stem")
        found[name] = path
    return found


def same_grid(one: Geometry, other: Geometry) -> bool:
    """Returns whether two grids have the same voxels in the same positions, whatever the orientation of their axes."""
    other = reorient_geometry(other, reorientation_to(other.affine, orientation_of(one.affine)))
    if one.shape != other.shape:
        return False
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in one.shape))])
    distances_mm = np.linalg.norm((corners @ (one.affine - other.affine).T)[:, :3], axis=1)
    return bool(distances_mm.max() <= GRID_TOLERANCE * min(one.spacing_mm))


def find_keys(masks: Sequence[Path], by_name: bool) -> set[Key]:
    """Returns the keys in a scan's masks that `--labels` may list: values, or names of structures.

    Args:
        by_name: each NIfTI file is the mask of the structure that it is named after.
    """
    keys: set[Key] = set()
    for path in masks:
        if not is_nifti(path):
            keys |= set(_dicom_seg("read_header")(path).names.values())
        elif by_name:
            keys.add(stem(path))
        else:
            keys |= set(np.unique(read_nifti(path, np.uint8).array).tolist())
    return keys


def read_classes(masks: Sequence[Path], geometry: Geometry, labels: LabelMap, case: str) -> Volume:
    """Reads the masks of a scan as one, on the scan's grid, with a note where two overlap (see `ClassMerger`).

    A file named after a structure in `labels` is the mask of that structure, wherever it is not 0.

    Args:
        geometry: of the scan.
        case: case id, for error messages.

    Returns:
        Classes, (1, D, H, W) uint8.

    Raises:
        UserError: a mask is damaged or on another grid.
    """
    if len(masks) > 1 and not labels.has_names():
        names = ", ".join(path.name for path in masks[:3])
        raise UserError(
            f"{case}: {len(masks)} masks are on its grid ({names}); remove all but one, or name structures in "
            "--labels, such as liver=1"
        )
    merger = ClassMerger(geometry.shape, labels.by_size)
    for path in masks:
        if not is_nifti(path):
            _dicom_seg("read_segmentation")(path, geometry, labels.class_of, merger.add)
        else:
            mask = _to_grid(read_nifti(path, np.uint8), geometry, case)
            structure = labels.class_of(stem(path))
            if len(masks) == 1 and not structure:
                found = labels.apply(mask)
            else:
                if structure and len(values := np.unique(mask[mask > 0])) > 1:
                    raise UserError(
                        f"{path}: holds {len(values)} values, but it is read as the mask of {stem(path)} only, "
                        "because of its name or because other masks are on its scan's grid"
                    )
                found = np.where(mask > 0, np.uint8(structure), np.uint8(0))
            merger.add(found[0])
    for line in merger.finish(labels.classes):
        note(f"{case}: {line}")
    return Volume(merger.classes[np.newaxis], geometry)


def _to_grid(mask: Volume, geometry: Geometry, case: str) -> NDArray[Any]:
    """Returns the mask with its axes reoriented to the scan's."""
    if mask.array.shape[0] != 1:
        raise UserError(f"{case}: its mask has {mask.array.shape[0]} channels, expected 1")
    change = reorientation_to(mask.geometry.affine, orientation_of(geometry.affine))
    # If the corners differ, comparing the affines gives an error message with the header's numbers.
    if not same_grid(geometry, mask.geometry):
        check_same_geometry(geometry, reorient_geometry(mask.geometry, change), case)
    return reorient(mask, change).array


def matching_grids(path: Path, geometries: Sequence[Geometry]) -> list[int]:
    """Returns the indices of the scans on whose grid a mask is. Raises UserError if the mask is damaged."""
    if is_nifti(path):
        mask = read_geometry(path)
        return [index for index, geometry in enumerate(geometries) if same_grid(geometry, mask)]
    header = _dicom_seg("read_header")(path)
    return [index for index, geometry in enumerate(geometries) if header.frames_on(geometry) is not None]


def _dicom_seg(name: str) -> Callable[..., Any]:
    return registry.load(f"{DICOM_SEG}:{name}", "a DICOM-SEG mask", "dicom")
