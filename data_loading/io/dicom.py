"""DICOM series: finds them in a folder and reads them as a Volume.

Slices are ordered by their position only: file names and instance numbers may be in any order, and the slice thickness
may differ from the slice distance. Needs `pip install '.[dicom]'`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_rescale
from pydicom.uid import generate_uid

from common.compat import is_missing_dicom_decoder
from common.errors import UserError
from data_loading.io.volume import WORKING_BYTES_PER_VOXEL, Geometry, Volume, check_memory

# Largest deviation from even slice distances, as a fraction: positions are often rounded to 0.1 mm, and a missing slice
# is a deviation of 1.
STEP_TOLERANCE = 0.1
# Largest difference between the direction cosines of one series.
COSINE_TOLERANCE = 1e-3
# DICOM's axes run to the patient's left, posterior, superior; NIfTI's to the right, anterior, superior.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SEARCH_TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "PatientID",
]


@dataclass(frozen=True, kw_only=True)
class Series:
    """The slices of one series, in no particular order.

    Attributes:
        name: value that selects it in `--series`: the series number, or the UID if the number is missing or not unique.
        patient: PatientID, "" if an anonymiser emptied it.
    """

    name: str
    uid: str
    description: str
    files: tuple[Path, ...]
    patient: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.description or 'no description'}, {len(self.files)} slices)"


def is_dicom(path: Path) -> bool:
    """Returns whether the file begins with the DICOM preamble."""
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_series(folder: Path, flag: str = "--scan") -> list[Series]:
    """Finds the series of slices in a folder and its subfolders; skips other objects (reports, segmentations).

    Args:
        flag: the flag that gave the folder, for error messages.

    Returns:
        The series, sorted by name.

    Raises:
        UserError: there are none, or a file is damaged.
    """
    groups: dict[tuple[str, str, str, str], list[Any]] = {}
    multi_frame = 0
    for path in sorted(file for file in folder.rglob("*") if file.is_file() and is_dicom(file)):
        header = _read_header(path, SEARCH_TAGS)
        if int(header.get("NumberOfFrames") or 1) > 1:
            multi_frame += 1
        elif header.get("ImagePositionPatient") and header.get("PixelSpacing") and header.get("Rows"):
            uid, description = (str(header.get(name) or "") for name in ("SeriesInstanceUID", "SeriesDescription"))
            number = "" if header.get("SeriesNumber") is None else str(header.SeriesNumber)
            # Some anonymisers empty the UID; then series differ by folder, number and description.
            groups.setdefault((uid, number, description, "" if uid else str(path.parent)), []).append(header)
    if not groups:
        unsupported = f"{multi_frame} unsupported multi-frame file(s); convert them to NIfTI"
        reason = unsupported if multi_frame else "none in it"
        raise UserError(f"{flag} {folder}: no DICOM series of single slices ({reason})")
    numbers = [number for _, number, _, _ in groups]
    return [
        Series(
            name=number if number and numbers.count(number) == 1 else uid or "unnamed",
            uid=uid,
            description=description,
            files=tuple(Path(header.filename) for header in headers),
            patient=str(headers[0].get("PatientID") or "").strip(),
        )
        for (uid, number, description, _), headers in sorted(groups.items(), key=lambda group: group[0][1:])
    ]


def choose_series(found: Sequence[Series], wanted: str | None, folder: Path) -> list[Series]:
    """Returns the series that `--series` selects by number, UID or description, or all for "all".

    Raises:
        UserError: no or several matches, or no selection among several series.
    """
    if wanted == "all" or (wanted is None and len(found) == 1):
        return list(found)
    listed = "; ".join(map(str, found))
    if wanted is None:
        raise UserError(
            f"--scan {folder} holds {len(found)} series; choose one with --series, or use --series all: {listed}"
        )
    matches = [series for series in found if wanted in (series.name, series.uid, series.description)]
    if len(matches) != 1:
        count = f"{len(matches) or 'no'} series"
        raise UserError(f"--series {wanted}: {count} of that number, UID or description in {folder}: {listed}")
    return matches


def read_series(series: Series) -> Volume:
    """Reads a series as a volume (1, columns, rows, slices) float32, rescaled by each slice's own slope and intercept.

    Raises:
        UserError: the slices do not form a volume (orientations or sizes differ, one is missing or duplicated), are
            damaged, need more than the free memory, or no installed package decodes them.
    """
    headers, geometry = sorted_headers(series)
    columns, rows, slices = geometry.shape
    needed = columns * rows * slices * WORKING_BYTES_PER_VOXEL
    check_memory(f"series {series.name}: {columns} x {rows} x {slices} voxels", needed)
    array = np.empty((1, columns, rows, slices), np.float32)
    for index, header in enumerate(headers):
        array[0, :, :, index] = _read_pixels(Path(header.filename), (rows, columns)).T
    return Volume(array, geometry)


def sorted_headers(series: Series) -> tuple[list[pydicom.Dataset], Geometry]:
    """Reads the headers, without pixels, of a series.

    Returns:
        The headers, sorted along the normal of the slice plane, and the geometry of the volume.

    Raises:
        UserError: see `read_series`.
    """
    headers = [_read_header(path) for path in series.files]
    first = headers[0]
    name = f"series {series.name}"
    _check_consistent(headers, name)
    cosines = _floats(first, "ImageOrientationPatient", 6)
    along_row, along_column = cosines[:3], cosines[3:]
    normal = np.cross(along_row, along_column)
    headers.sort(key=lambda header: float(_floats(header, "ImagePositionPatient", 3) @ normal))
    positions = np.stack([_floats(header, "ImagePositionPatient", 3) for header in headers])
    between_rows, between_columns = _floats(first, "PixelSpacing", 2)  # in the standard's order
    affine = np.eye(4)
    affine[:3, 0] = along_row * between_columns
    affine[:3, 1] = along_column * between_rows
    affine[:3, 2] = _slice_step(positions, normal, first, name)
    affine[:3, 3] = positions[0]
    d, h, w = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    if not (np.isfinite(affine).all() and min(d, h, w) > 0):
        raise UserError(f"{name}: positions, orientation or spacing are impossible; export it again")
    shape = (int(first.Columns), int(first.Rows), len(headers))
    return headers, Geometry(LPS_TO_RAS @ affine, shape, (d, h, w))


def _check_consistent(headers: Sequence[Any], name: str) -> None:
    """Raises UserError unless all slices have the same size, orientation and pixel spacing."""
    first = headers[0]
    cosines, spacing = _floats(first, "ImageOrientationPatient", 6), _floats(first, "PixelSpacing", 2)
    for header in headers:
        if (header.Rows, header.Columns) != (first.Rows, first.Columns):
            raise UserError(
                f"{name}: {header.filename} has {header.Columns} x {header.Rows} pixels, others "
                f"{first.Columns} x {first.Rows}"
            )
        if np.abs(_floats(header, "ImageOrientationPatient", 6) - cosines).max() > COSINE_TOLERANCE:
            raise UserError(f"{name}: {header.filename} is oriented differently from other slices; is it a localiser?")
        if not np.allclose(_floats(header, "PixelSpacing", 2), spacing, rtol=1e-3):
            raise UserError(f"{name}: {header.filename} has a different pixel spacing from other slices")


def _slice_step(
    positions: NDArray[np.float64], normal: NDArray[np.float64], header: Any, name: str
) -> NDArray[np.float64]:
    """Returns the vector (3,) from one slice to the next in mm; for a single slice, its thickness along the normal."""
    if len(positions) == 1:
        return normal * float(header.get("SpacingBetweenSlices") or header.get("SliceThickness") or 1.0)
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    size = float(np.linalg.norm(step))
    along = np.diff(positions @ normal)
    if along.min() <= STEP_TOLERANCE * float(np.median(along)):
        raise UserError(
            f"{name}: several slices at one position; a series of several phases or echoes is not supported"
        )
    even = positions[0] + np.arange(len(positions))[:, None] * step
    if np.linalg.norm(positions - even, axis=1).max() > STEP_TOLERANCE * size:
        raise UserError(
            f"{name}: slice distances range from {along.min():.4g} to {along.max():.4g} mm; is a slice missing?"
        )
    return step


def _floats(header: Any, keyword: str, count: int) -> NDArray[np.float64]:
    try:
        values = np.asarray([float(value) for value in header[keyword].value], np.float64)
        if values.shape == (count,):
            return values
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(f"{header.filename}: {keyword} is missing or damaged; export it again")


def _read_header(path: Path, tags: list[str] | None = None) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # about odd values of elements that are not used
            return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except Exception as error:  # pydicom raises many types on a damaged file
        raise UserError(f"{path}: not a readable DICOM file ({error})") from None


def _read_pixels(path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Reads a slice (rows, columns), rescaled, which gives HU for CT."""
    try:
        with warnings.catch_warnings(action="ignore"):
            dataset = pydicom.dcmread(path)
            pixels = apply_rescale(dataset.pixel_array, dataset).astype(np.float32)
    except (NotImplementedError, RuntimeError) as error:
        if not is_missing_dicom_decoder(error):
            raise UserError(f"{path}: its pixels cannot be decoded ({error})") from None
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise UserError(f"{path}: no installed package decodes {syntax}; pip install '.[dicom]'") from None
    except Exception as error:  # pydicom raises many types on a damaged file
        raise UserError(f"{path}: its pixels cannot be decoded ({error})") from None
    if pixels.shape != shape:
        raise UserError(f"{path}: holds pixels of shape {pixels.shape}, but its header states {shape}")
    return pixels


def fill_missing_uids(headers: Sequence[pydicom.Dataset]) -> bool:
    """Fills in UIDs that an anonymiser emptied, in place and reproducibly.

    The UIDs of a slice are copied from its file meta information; those of study and series are generated.

    Returns:
        Whether any were missing.
    """
    filled = False
    instances = [str(header.file_meta.MediaStorageSOPInstanceUID) for header in headers]
    generated = {
        level: generate_uid(entropy_srcs=[level, *sorted(instances)])
        for level in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
    }
    for header, instance in zip(headers, instances, strict=True):
        known = {"SOPClassUID": str(header.file_meta.MediaStorageSOPClassUID), "SOPInstanceUID": instance, **generated}
        for keyword, value in known.items():
            if not header.get(keyword):
                setattr(header, keyword, value)
                filled = True
    return filled
