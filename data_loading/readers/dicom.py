"""`--dataset dicom`: DICOM series, and their masks by their place in space.

    preprocess_dataset.py --dataset dicom --data_dir SERIES --labels_dir MASKS --results_dir OUT

All series below SERIES, whatever the folders; masks (NIfTI or DICOM-SEG) below MASKS, else among the series. A scan
that was exported to NIfTI may lie among the series where MASKS is given. A mask belongs to the scan on whose grid it
lies, and a scan to the patient of its PatientID, where that is empty to the topmost folder's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from common.errors import UserError
from data_loading.io.dicom import Series, find_series, is_dicom, sorted_headers
from data_loading.io.dicom_seg import open_segments
from data_loading.io.scan_discovery import stem
from data_loading.io.volume import Geometry, read_channels, read_geometry
from data_loading.readers.base import OWN_SPLIT, RawDataset, VolumeFlags
from data_loading.readers.mask_matching import fitting, is_nifti, nifti_files
from data_loading.readers.nifti import ScanCase, make_dataset
from data_loading.spec import DatasetSpec


@dataclass(frozen=True)
class Found:
    """A scan that was found.

    Attributes:
        case: the id it gets.
        folder: where it lies.
        top: the topmost folder below the data folder, else its own name.
    """

    case: str
    path: Path
    folder: str
    top: str
    geometry: Geometry
    series: Series | None


def read_dicom(
    data_dir: Path,
    evaluation_ids: Sequence[str],
    seed: int,
    *,
    labels_dir: Path | None = None,
    labels: Sequence[str] = (),
    slab: int | None = None,
    split: Sequence[float] = OWN_SPLIT,
    drop_empty: bool = True,
    **volumes: Unpack[VolumeFlags],
) -> RawDataset:
    """The series that have a mask; see above.

    Raises:
        UserError: no series, no mask that lies on one's grid, or one that lies on several.
    """
    if labels_dir is not None and not labels_dir.is_dir():
        raise UserError(f"--labels_dir {labels_dir}: no such folder")
    masks_dir = labels_dir or data_dir
    scans, notes = find_scans(data_dir, None if masks_dir.samefile(data_dir) else masks_dir)
    masks = find_masks(masks_dir)
    of_scan, strangers = match(masks, scans)
    notes += _told("passed over, they lie on no series' grid", [str(path) for path in strangers])
    bare = [scan.case for index, scan in enumerate(scans) if index not in of_scan]
    notes += _told("passed over, no mask lies on their grid", bare)
    if not of_scan:
        shapes = ", ".join(sorted({" x ".join(map(str, scan.geometry.shape)) for scan in scans}))
        raise UserError(
            f"--labels_dir {masks_dir}: none of its {len(masks)} mask(s) lies on the grid of a series in "
            f"{data_dir} ({shapes} voxels); masks must have their series' shape and affine"
        )
    patients = patients_of(scans)
    cases = [
        ScanCase(
            scans[i].case,
            scans[i].path,
            files[0],
            patient=patients[i],
            masks=tuple(files),
            series=scans[i].series,
            slices=scans[i].geometry.shape[2],
        )
        for i, files in sorted(of_scan.items())
    ]
    spec = DatasetSpec(data_dir.resolve().name.lower(), (), 1)
    where = f"--labels_dir {masks_dir}"
    return make_dataset(spec, cases, seed, labels, slab, split, drop_empty, where, notes, **volumes)


def find_scans(data_dir: Path, masks_dir: Path | None) -> tuple[list[Found], list[str]]:
    """The series below a folder that are volumes, and NIfTI scans among them; and lines on what is passed over.

    Args:
        masks_dir: whose NIfTI files are masks; None: all are.
    """
    scans: list[Found] = []
    notes = []
    for series in find_series(data_dir, "--data_dir"):
        try:
            _, geometry = sorted_headers(series)
        except UserError as error:  # a localiser, a series with a slice missing
            notes.append(f"passed over: {error}")
            continue
        folder = series.files[0].parent
        several = sum(folder == scan.path for scan in scans)
        scans.append(_found(data_dir, folder, f"_{series.name}" if several else "", geometry, series))
    for path in nifti_files(data_dir) if masks_dir else []:
        if masks_dir not in path.parents and read_channels(path) == 1:
            scans.append(_found(data_dir, path, "", read_geometry(path), None))
    names = [scan.case for scan in scans]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--data_dir {data_dir}: two scans would be called {twice[0]}; rename a folder")
    if not scans:
        raise UserError(f"--data_dir {data_dir}: no series that is a volume; {notes[0]}")
    return scans, notes


def _found(data_dir: Path, path: Path, suffix: str, geometry: Geometry, series: Series | None) -> Found:
    relative = path.relative_to(data_dir)
    parts = [*relative.parts[:-1], stem(path)] if relative.parts else [data_dir.resolve().name]
    case = re.sub(r"[^\w.-]", "_", "_".join(parts) + suffix).lstrip(".")
    return Found(case or "scan", path, path.name if series else path.parent.name, parts[0], geometry, series)


def find_masks(folder: Path) -> list[Path]:
    """NIfTI and DICOM-SEG files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if is_nifti(path) or (is_dicom(path) and open_segments(path) is not None)]


def match(masks: Sequence[Path], scans: Sequence[Found]) -> tuple[dict[int, list[Path]], list[Path]]:
    """The masks of each scan by its index, and those that lie on no scan's grid.

    Of series that share a grid, as phases of one examination do, a DICOM-SEG file tells its own; a NIfTI file lies in
    the series' folder, or is called like it.

    Raises:
        UserError: a mask might be any of several scans'.
    """
    of_scan: dict[int, list[Path]] = {}
    strangers = []
    for path in masks:
        indices = fitting(path, [scan.geometry for scan in scans])
        if len(indices) > 1:
            indices = _own(path, indices, scans)
        if not indices:
            strangers.append(path)
            continue
        of_scan.setdefault(indices[0], []).append(path)
    return of_scan, strangers


def _own(path: Path, indices: Sequence[int], scans: Sequence[Found]) -> list[int]:
    segments = None if is_nifti(path) else open_segments(path)
    told = segments.series if segments else frozenset()
    found = [i for i in indices if (series := scans[i].series) is not None and series.uid in told]
    called = (path.parent.name, stem(path))
    found = found or [i for i in indices if scans[i].case == stem(path) or scans[i].folder in called]
    if len(found) != 1:
        listed = ", ".join(scans[i].case for i in indices)
        raise UserError(
            f"{path} lies on the grid of {len(indices)} scans ({listed}); call it or its folder like its own"
        )
    return found


def patients_of(scans: Sequence[Found]) -> list[str]:
    """Of each scan a name that its patient alone has, and that does not tell who it is."""
    ids = [
        hashlib.sha256(scan.series.patient.encode()).hexdigest()[:12] if scan.series and scan.series.patient else ""
        for scan in scans
    ]
    of_folder = {scan.top: patient for scan, patient in zip(scans, ids, strict=True) if patient}
    return [patient or of_folder.get(scan.top, scan.top) for scan, patient in zip(scans, ids, strict=True)]


def _told(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what}: {', '.join(names[:3])}{more}"]
