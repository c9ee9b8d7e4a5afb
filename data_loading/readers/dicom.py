"""`--dataset dicom`: DICOM series, and masks on the series' grids.

    preprocess_dataset.py --dataset dicom --data_dir SERIES --labels_dir MASKS --results_dir OUT

Series are searched in all subfolders of SERIES; masks (NIfTI or DICOM-SEG) in MASKS, by default among the series. With
MASKS given, NIfTI files among the series are further scans. A mask belongs to the scan with the same grid. The patient
of a scan is its PatientID, or its topmost folder if that is empty.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import files_below, normalised
from common.messages import counted
from data_loading.io.dicom import Series, read_series, search_folder, sorted_headers
from data_loading.io.dicom_geometry import check_complete
from data_loading.io.dicom_headers import Unread, describe, object_name
from data_loading.io.dicom_headers import read_header as read_any_header
from data_loading.io.dicom_pixels import read_pixels
from data_loading.io.dicom_seg import SEGMENTATION_STORAGE, UNREAD_MASKS, read_header
from data_loading.io.file_kinds import is_dicom, is_nifti, stem
from data_loading.io.orientation import to_grid
from data_loading.io.volume import Geometry, read_channels, read_geometry, read_nifti
from data_loading.readers.base import RawDataset, ReaderOptions
from data_loading.readers.mask_matching import matching_grids, nifti_files
from data_loading.readers.nifti import ScanCase, make_scan_dataset

# Largest relative difference between the voxels of a series and those of its copy.
COPY_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A scan in the data folder.

    Attributes:
        case: its case id.
        path: folder of the series, or the NIfTI file.
        folder: name of the folder that it is in.
        top_folder: first folder below the data folder; the file's own stem if it is in none.
        series: None for a NIfTI scan.
    """

    case: str
    path: Path
    folder: str
    top_folder: str
    geometry: Geometry
    series: Series | None


def read_dicom(data_dir: Path, options: ReaderOptions) -> RawDataset:
    """Finds the series that have a mask, as the module describes. Training cases with empty masks are dropped.

    Raises:
        UserError: no series, no mask on the grid of a series, or a mask that may belong to several.
    """
    if options.labels_dir is not None and not options.labels_dir.is_dir():
        raise UserError(f"--labels_dir {options.labels_dir}: no such folder")
    masks_dir = options.labels_dir or data_dir
    scans, notes = find_scans(data_dir, None if masks_dir.samefile(data_dir) else masks_dir)
    masks, unread = find_masks(masks_dir, is_apart=not masks_dir.samefile(data_dir))
    masks, copies = without_copies(masks, scans)
    notes += _skipped("copies of their series", copies)
    notes += [f"--labels_dir {masks_dir}: not read: {describe(unread)}"] if unread else []
    masks_of, unmatched = match_masks(masks, scans)
    notes += _skipped("not on the grid of any series", [str(path) for path in unmatched])
    notes += _skipped("no mask on its grid", [scan.case for index, scan in enumerate(scans) if index not in masks_of])
    if not masks_of:
        shapes = ", ".join(sorted({" x ".join(map(str, scan.geometry.shape)) for scan in scans}))
        found = (
            f"none of its {counted(len(masks), 'mask')} is on the grid of a series in {data_dir} ({shapes} voxels); "
            "masks must have the shape and affine of their series"
        )
        raise UserError(
            f"--labels_dir {masks_dir}: {found if masks else 'no masks in it, as NIfTI or DICOM-SEG'}"
            + (f"; not read: {describe(unread)}" if unread else "")
        )
    patients = patient_ids(scans)
    cases = [
        ScanCase(
            case=scans[index].case,
            image=scans[index].path,
            label=files[0],
            patient=patients[index],
            masks=tuple(files),
            series=scans[index].series,
            slices=scans[index].geometry.shape[2],
        )
        for index, files in sorted(masks_of.items())
    ]
    try:
        raw = make_scan_dataset(cases, options, data_dir=data_dir, masks_dir=masks_dir, channels=1, drops_empty=True)
    except UserError as error:  # too few cases, perhaps, because of what was left out
        left_out = [line for line in notes if "skipped" in line]
        raise UserError("; ".join([str(error), *left_out])) from None
    return replace(raw, notes=[*notes, *raw.notes])


def find_scans(data_dir: Path, masks_dir: Path | None) -> tuple[list[Scan], list[str]]:
    """Finds the series in a folder that are volumes, and the NIfTI scans among them.

    Args:
        masks_dir: folder whose NIfTI files are masks; None: all NIfTI files are masks.

    Returns:
        The scans, and messages about skipped series.

    Raises:
        UserError: no scans, or two with the same case id.
    """
    scans: list[Scan] = []
    found = search_folder(data_dir)
    # `find_masks` lists the other objects among the masks.
    # The two paths may be spelled differently.
    masks = (masks_dir or data_dir).resolve()
    listed = [each for each in found.unread if not (each.is_object and masks in each.path.resolve().parents)]
    notes = [f"--data_dir {data_dir}: {line}" for line in replace(found, unread=listed).notes()]
    for series in found.require("--data_dir", data_dir):
        check_complete(series)  # leaving the scan out would change the split
        try:
            _, geometry = sorted_headers(series)
        except UserError as error:  # a localiser, a missing slice
            notes.append(f"skipped: {error}")
            continue
        folder = series.files[0].parent
        suffix = f"_{series.name}" if any(folder == scan.path for scan in scans) else ""
        scans.append(_make_scan(data_dir, folder, geometry, series=series, suffix=suffix))
    files = [path for path in nifti_files(data_dir) if masks_dir and masks not in path.resolve().parents]
    files, copies = without_copies(files, scans)
    notes += _skipped("copies of their series", copies)
    for path in files:
        if read_channels(path) == 1:
            scans.append(_make_scan(data_dir, path, read_geometry(path)))
    names = [scan.case for scan in scans]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--data_dir {data_dir}: two scans would be called {duplicates[0]}; rename a folder")
    if not scans:
        raise UserError(f"--data_dir {data_dir}: no series that is a volume; {notes[0]}")
    return scans, notes


def _make_scan(
    data_dir: Path, path: Path, geometry: Geometry, *, series: Series | None = None, suffix: str = ""
) -> Scan:
    relative = path.relative_to(data_dir)
    parts = [*relative.parts[:-1], stem(path)] if relative.parts else [data_dir.resolve().name]
    return Scan(
        case=re.sub(r"[^\w.-]", "_", normalised("_".join(parts) + suffix)).lstrip(".") or "scan",
        path=path,
        folder=normalised(path.name if series else path.parent.name),
        top_folder=parts[0],
        geometry=geometry,
        series=series,
    )


def find_masks(folder: Path, is_apart: bool) -> tuple[list[Path], list[Unread]]:
    """Returns the NIfTI and DICOM-SEG files in a folder and its subfolders, and DICOM that holds masks in other forms.

    Args:
        is_apart: the folder is not that of the series, so that images in it are listed too.
    """
    masks, unread = [], []
    for path in files_below(folder):
        if is_nifti(path):
            masks.append(path)
        elif is_dicom(path):
            try:
                header = read_any_header(path, ["SOPClassUID"])
            except UserError:
                if is_apart:
                    raise
                continue  # `search_folder` has listed it
            if header.SOPClassUID == SEGMENTATION_STORAGE:
                masks.append(path)
            elif reason := UNREAD_MASKS.get(str(header.SOPClassUID)) or object_name(header) or "image" * is_apart:
                unread.append(Unread(path=path, reason=reason))
    return masks, unread


def without_copies(files: Sequence[Path], scans: Sequence[Scan]) -> tuple[list[Path], list[str]]:
    """Divides files into those that are no copies of a series as NIfTI, and the names of those that are."""
    copies = {path for path in files if is_nifti(path) and any(_is_copy(path, scan) for scan in scans if scan.series)}
    return [path for path in files if path not in copies], [str(path) for path in sorted(copies)]


def _is_copy(path: Path, scan: Scan) -> bool:
    """Returns whether a NIfTI file has the grid and the voxels of a series; most differ in the slice in the middle."""
    if scan.series is None or not matching_grids(path, [scan.geometry]):
        return False
    try:
        headers, geometry = sorted_headers(scan.series)
        array = to_grid(read_nifti(path, np.float32), geometry, scan.case).array[0]
        middle = len(headers) // 2
        plane = read_pixels(Path(headers[middle].filename), (geometry.shape[1], geometry.shape[0])).T
        return np.allclose(array[:, :, middle], plane, COPY_TOLERANCE) and np.allclose(
            array, read_series(scan.series).array[0], COPY_TOLERANCE
        )
    except UserError:  # reading the case reports it
        return False


def match_masks(masks: Sequence[Path], scans: Sequence[Scan]) -> tuple[dict[int, list[Path]], list[Path]]:
    """Matches masks to scans by their grids.

    Several series may share a grid, such as the phases of one examination. Then a DICOM-SEG file belongs to the series
    that it refers to, and a NIfTI file to the one whose folder it is in or is named after.

    Returns:
        The masks of each scan by its index, and the masks that are on no scan's grid.

    Raises:
        UserError: a mask may belong to several scans.
    """
    masks_of: dict[int, list[Path]] = {}
    unmatched = []
    for path in masks:
        indices = matching_grids(path, [scan.geometry for scan in scans])
        if not indices:
            unmatched.append(path)
            continue
        index = indices[0] if len(indices) == 1 else _choose_scan(path, indices, scans)
        masks_of.setdefault(index, []).append(path)
    return masks_of, unmatched


def _choose_scan(path: Path, indices: Sequence[int], scans: Sequence[Scan]) -> int:
    header = None if is_nifti(path) else read_header(path)
    referenced = header.series if header else frozenset()
    found = [index for index in indices if (series := scans[index].series) is not None and series.uid in referenced]
    if not found:
        # A mask's own name says more than its folder's.
        for name in (normalised(stem(path)), normalised(path.parent.name)):
            found = found or [index for index in indices if scans[index].case == name]
            found = found or [index for index in indices if scans[index].folder == name]
    if len(found) != 1:
        listed = ", ".join(scans[index].case for index in indices)
        raise UserError(
            f"{path} is on the grid of {len(indices)} scans ({listed}); name it or its folder after its scan"
        )
    return found[0]


def patient_ids(scans: Sequence[Scan]) -> list[str]:
    """Returns a pseudonym of each scan's patient: a hash of the PatientID, or the name of the topmost folder."""
    hashes = [
        hashlib.sha256(scan.series.patient.encode()).hexdigest()[:12] if scan.series and scan.series.patient else ""
        for scan in scans
    ]
    hash_of = {scan.top_folder: patient for scan, patient in zip(scans, hashes, strict=True) if patient}
    return [
        patient or hash_of.get(scan.top_folder, scan.top_folder) for scan, patient in zip(scans, hashes, strict=True)
    ]


def _skipped(reason: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"skipped, {reason}: {', '.join(names[:3])}{more}"]
