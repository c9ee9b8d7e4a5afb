"""DICOM series: found in a folder, read as a Volume, and a mask written as DICOM-SEG that refers to their slices.

Where a slice lies is told by its position alone: the thickness may differ from the distance, and file names and
instance numbers may run any way. Needs `pip install '.[dicom]'`.
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
from data_loading.io.volume import WORKING_BYTES_PER_VOXEL, Geometry, Volume, free_memory_bytes

# Distances between slices may differ by this share: positions are often rounded to 0.1 mm, a missing slice is a whole.
STEP_TOLERANCE = 0.1
# Direction cosines of one series agree this well.
COSINE_TOLERANCE = 1e-3
# DICOM's axes run to the patient's left, posterior, superior; NIfTI's to the right, anterior, superior.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
LISTED = [
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


@dataclass(frozen=True)
class Series:
    """The slices of one series, in no order.

    Attributes:
        name: what `--series` calls it: its number, or its UID where the number is missing or another's too.
        patient: the PatientID, "" where an anonymiser emptied it.
    """

    name: str
    uid: str
    description: str
    files: tuple[Path, ...]
    patient: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.description or 'no description'}, {len(self.files)} slices)"


def is_dicom(path: Path) -> bool:
    """Whether the file begins as DICOM files do."""
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_series(folder: Path, flag: str = "--scan") -> list[Series]:
    """The series of slices below a folder, by name; other objects (reports, segmentations) are passed over.

    Args:
        flag: which one names the folder.

    Raises:
        UserError: there is none, or a file is damaged.
    """
    groups: dict[tuple[str, str, str, str], list[Path]] = {}
    patients: dict[Path, str] = {}
    enhanced = 0
    for path in sorted(file for file in folder.rglob("*") if file.is_file() and is_dicom(file)):
        header = _header(path, LISTED)
        if int(header.get("NumberOfFrames") or 1) > 1:
            enhanced += 1
        elif header.get("ImagePositionPatient") and header.get("PixelSpacing") and header.get("Rows"):
            number = header.get("SeriesNumber")
            # Some anonymisers empty the UID; folder, number and description then tell series apart.
            uid = str(header.get("SeriesInstanceUID") or "")
            key = (
                uid,
                "" if number is None else str(number),
                str(header.get("SeriesDescription") or ""),
                "" if uid else str(path.parent),
            )
            groups.setdefault(key, []).append(path)
            patients[path] = str(header.get("PatientID") or "").strip()
    if not groups:
        why = f"{enhanced} multi-frame file(s), which are not read; convert them to NIfTI" if enhanced else "none in it"
        raise UserError(f"{flag} {folder}: no DICOM series of single slices ({why})")
    numbers = [number for _, number, _, _ in groups]
    return [
        Series(
            number if number and numbers.count(number) == 1 else uid or "unnamed",
            uid,
            description,
            tuple(files),
            patients[files[0]],
        )
        for (uid, number, description, _), files in sorted(groups.items(), key=lambda group: group[0][1:])
    ]


def choose_series(found: Sequence[Series], wanted: str | None, folder: Path) -> list[Series]:
    """The series that `--series` names by number, UID or description; "all": every one. Raises UserError."""
    if wanted == "all" or (wanted is None and len(found) == 1):
        return list(found)
    listed = "; ".join(map(str, found))
    if wanted is None:
        raise UserError(f"--scan {folder} holds {len(found)} series; choose one with --series, or all: {listed}")
    fitting = [series for series in found if wanted in (series.name, series.uid, series.description)]
    if len(fitting) != 1:
        count = "no series" if not fitting else f"{len(fitting)} series"
        raise UserError(f"--series {wanted}: {count} of that number, UID or description in {folder}: {listed}")
    return fitting


def read_series(series: Series) -> Volume:
    """The series as a volume (1, columns, rows, slices) float32, after each slice's own rescale slope and intercept.

    Raises:
        UserError: the slices are no volume (orientations or sizes differ, one is missing or there twice), are damaged,
            or no installed package decodes them.
    """
    headers, geometry = sorted_headers(series)
    columns, rows, slices = geometry.shape
    needed, free = columns * rows * slices * WORKING_BYTES_PER_VOXEL, free_memory_bytes()
    if needed > free:
        raise UserError(
            f"series {series.name}: {columns} x {rows} x {slices} voxels need {needed / 2**30:.1f} GiB to "
            f"work on, and {free / 2**30:.1f} GiB are free"
        )
    array = np.empty((1, columns, rows, slices), np.float32)
    for index, header in enumerate(headers):
        array[0, :, :, index] = _pixels(Path(header.filename), (rows, columns)).T
    return Volume(array, geometry)


def sorted_headers(series: Series) -> tuple[list[pydicom.Dataset], Geometry]:
    """The slices' headers, without pixels, along the normal of their plane; and the volume's geometry.

    Raises:
        UserError: see `read_series`.
    """
    headers = [_header(path) for path in series.files]
    first = headers[0]
    name = f"series {series.name}"
    for header in headers:
        if (header.Rows, header.Columns) != (first.Rows, first.Columns):
            raise UserError(
                f"{name}: {header.filename} has {header.Columns} x {header.Rows} pixels, others "
                f"{first.Columns} x {first.Rows}"
            )
        turned = np.abs(_floats(header, "ImageOrientationPatient", 6) - _floats(first, "ImageOrientationPatient", 6))
        if turned.max() > COSINE_TOLERANCE:
            raise UserError(f"{name}: {header.filename} is turned against other slices; a localiser among them?")
        if not np.allclose(_floats(header, "PixelSpacing", 2), _floats(first, "PixelSpacing", 2), rtol=1e-3):
            raise UserError(f"{name}: {header.filename} has other pixel spacing than other slices")
    cosines = _floats(first, "ImageOrientationPatient", 6)
    along_row, along_column = cosines[:3], cosines[3:]
    normal = np.cross(along_row, along_column)
    headers.sort(key=lambda header: float(_floats(header, "ImagePositionPatient", 3) @ normal))
    positions = np.stack([_floats(header, "ImagePositionPatient", 3) for header in headers])
    between_rows, between_columns = _floats(first, "PixelSpacing", 2)  # the standard's order
    affine = np.eye(4)
    affine[:3, 0] = along_row * between_columns
    affine[:3, 1] = along_column * between_rows
    affine[:3, 2] = _step(positions, normal, first, name)
    affine[:3, 3] = positions[0]
    d, h, w = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    if not (np.isfinite(affine).all() and min(d, h, w) > 0):
        raise UserError(f"{name}: positions, orientation or spacing are impossible; export it again")
    shape = (int(first.Columns), int(first.Rows), len(headers))
    return headers, Geometry(LPS_TO_RAS @ affine, shape, (d, h, w))


def _step(positions: NDArray[np.float64], normal: NDArray[np.float64], header: Any, name: str) -> NDArray[np.float64]:
    """From one slice to the next in mm; of a single slice its thickness."""
    if len(positions) == 1:
        return normal * float(header.get("SpacingBetweenSlices") or header.get("SliceThickness") or 1.0)
    step: NDArray[np.float64] = (positions[-1] - positions[0]) / (len(positions) - 1)
    size = float(np.linalg.norm(step))
    along = np.diff(positions @ normal)
    if along.min() <= STEP_TOLERANCE * float(np.median(along)):
        raise UserError(f"{name}: several slices at one position; several phases or echoes in a series are not read")
    even = positions[0] + np.arange(len(positions))[:, None] * step
    if np.linalg.norm(positions - even, axis=1).max() > STEP_TOLERANCE * size:
        raise UserError(
            f"{name}: distances between slices run from {along.min():.4g} to {along.max():.4g} mm; is a slice missing?"
        )
    return step


def _floats(header: Any, keyword: str, count: int) -> NDArray[np.float64]:
    try:
        values = np.asarray([float(value) for value in header[keyword].value], np.float64)
        if values.shape == (count,):
            return values
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(f"{header.filename}: its {keyword} is missing or damaged; export it again")


def _header(path: Path, tags: list[str] | None = None) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd values, which nothing here reads
            return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except Exception as error:  # a damaged file fails in as many ways as the format has parts
        raise UserError(f"{path}: not a readable DICOM file ({error})") from None


def _pixels(path: Path, shape: tuple[int, int]) -> NDArray[np.float32]:
    """A slice (rows, columns) in HU, or what its rescaling means."""
    try:
        with warnings.catch_warnings(action="ignore"):
            dataset = pydicom.dcmread(path)
            pixels = apply_rescale(dataset.pixel_array, dataset).astype(np.float32)
    except (NotImplementedError, RuntimeError) as error:
        if not is_missing_dicom_decoder(error):
            raise UserError(f"{path}: its pixels cannot be decoded ({error})") from None
        syntax = dataset.file_meta.TransferSyntaxUID.name
        raise UserError(f"{path}: no installed package decodes {syntax}; pip install '.[dicom]'") from None
    except Exception as error:  # as above
        raise UserError(f"{path}: its pixels cannot be decoded ({error})") from None
    if pixels.shape != shape:
        raise UserError(f"{path}: holds pixels of shape {pixels.shape}, its header says {shape}")
    return pixels


def with_identifiers(headers: Sequence[pydicom.Dataset]) -> bool:
    """Fills in UIDs that an anonymiser emptied, always the same ones; whether there were any.

    A slice's own come from its file's preamble; study and series get made-up ones.
    """
    filled = False
    key = [str(header.file_meta.MediaStorageSOPInstanceUID) for header in headers]
    for header, instance in zip(headers, key, strict=True):
        known = {"SOPClassUID": str(header.file_meta.MediaStorageSOPClassUID), "SOPInstanceUID": instance}
        for level in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
            known[level] = generate_uid(entropy_srcs=[level, *sorted(key)])
        for keyword, value in known.items():
            if not header.get(keyword):
                setattr(header, keyword, value)
                filled = True
    return filled
