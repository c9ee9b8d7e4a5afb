"""Finds the masks of scans, by equal stems or by their grid, and reads them as classes.

A mask is a NIfTI file of values, several NIfTI files named after one structure each, or a DICOM-SEG file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import registry
from common.errors import UserError
from common.files import files_below, normalised
from data_loading.index import is_safe_case_id
from data_loading.io.file_kinds import is_nifti, passed_over, stem
from data_loading.io.mask_values import Found, find_values, merged
from data_loading.io.orientation import same_grid, to_grid
from data_loading.io.volume import Geometry, Volume, read_geometry, read_nifti
from data_loading.readers.label_map import LabelMap, quoted
from data_loading.readers.overlaps import ClassMerger

DICOM_SEG = "data_loading.io.dicom_seg"


def nifti_files(folder: Path) -> list[Path]:
    """Returns the NIfTI files in a folder and its subfolders."""
    return [path for path in files_below(folder) if is_nifti(path)]


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
    """Pairs scans and masks of equal stems, which become the case ids, with accents composed.

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
        raise UserError(f"{data}: no {kind} in it{passed_over(data_dir, [], '; it holds ')}")
    for present, absent, missing_kind, folder in (
        (scan_of, mask_of, "mask", labels_dir),
        (mask_of, scan_of, kind, data_dir),
    ):
        if missing := sorted(present.keys() - absent.keys()):
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            flag, name = labels if missing_kind == "mask" else data, present[missing[0]].name
            others = [path for path in sorted(folder.iterdir()) if normalised(path.name).startswith(f"{missing[0]}.")]
            unread = "; stems must be equal"
            if others:
                why = "is a folder" if others[0].is_dir() else "its ending is not read"
                unread = f"; {others[0].name} lies there, but {why}"
            raise UserError(f"{flag}: no {missing_kind} {missing[0]} for {name}{more}{unread}")
    return [(name, path, mask_of[name]) for name, path in scan_of.items()]


def _by_stem(paths: Iterable[Path], source: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        name = normalised(path.name if path.is_dir() else stem(path))
        if not is_safe_case_id(name):
            raise UserError(f"{source}: {path.name} cannot be used as a case id")
        if name in found:
            raise UserError(f"{source}: {found[name].name} and {path.name} have the same stem")
        found[name] = path
    return found


def find_names(masks: Sequence[Path]) -> set[str]:
    """Returns the names of structures in a scan's masks: those of their segments, or of their files."""
    segments = [_dicom_seg("read_header")(path).names.values() for path in masks if not is_nifti(path)]
    return {normalised(name) for names in segments for name in names} | {
        normalised(stem(path)) for path in masks if is_nifti(path)
    }


def find_mask_values(masks: Sequence[Path], ignore_label: int | None = None) -> tuple[set[str], Found]:
    """Returns the names of segments in a scan's masks, and the values of its NIfTI files but the ignore label."""
    return find_names([path for path in masks if not is_nifti(path)]), merged(
        find_values(read_nifti(path, np.int32).array, ignore_label) for path in masks if is_nifti(path)
    )


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
        structures = [quoted(stem(path)) for path in masks[:2]]
        raise UserError(
            f"{case}: {len(masks)} masks are on its grid ({names}); remove all but one, or name structures in "
            f"--labels, such as {structures[0]}=1 {structures[1]}=2"
        )
    merger = ClassMerger(geometry.shape, labels.by_size)
    notes: list[str] = []
    for path in masks:
        if not is_nifti(path):
            _dicom_seg("read_segmentation")(path, geometry, labels.class_of, merger.add)
        else:
            mask = to_grid(read_nifti(path, np.int32), geometry, case)
            notes += mask.notes
            merger.add(_classes_of(path, mask.array[0], labels, is_only=len(masks) == 1))
    notes += merger.finish(labels.classes)
    return Volume(merger.classes[np.newaxis], geometry, tuple(notes))


def _classes_of(path: Path, mask: NDArray[Any], labels: LabelMap, *, is_only: bool) -> NDArray[np.uint8]:
    structure = labels.class_of(stem(path))
    if is_only and not structure:
        return labels.apply(mask)
    if structure and len(values := np.unique(mask[mask != 0])) > 1:
        raise UserError(
            f"{path}: holds {len(values)} values, but it is read as the mask of {stem(path)} only, "
            "because of its name or because other masks are on its scan's grid"
        )
    return np.where(mask != 0, np.uint8(structure), np.uint8(0))


def matching_grids(path: Path, geometries: Sequence[Geometry]) -> list[int]:
    """Returns the indices of the scans on whose grid a mask is. Raises UserError if the mask is damaged."""
    if is_nifti(path):
        mask = read_geometry(path)
        return [index for index, geometry in enumerate(geometries) if same_grid(geometry, mask)]
    header = _dicom_seg("read_header")(path)
    return [index for index, geometry in enumerate(geometries) if header.frames_on(geometry) is not None]


def _dicom_seg(name: str) -> Callable[..., Any]:
    return registry.load(f"{DICOM_SEG}:{name}", "a DICOM-SEG mask", "dicom")
