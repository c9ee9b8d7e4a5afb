"""Where the slices of a DICOM series are in space: their order, the volume's affine, and series that are no volumes.

Slices are ordered by their position only: file names and instance numbers may be in any order, and the slice thickness
may differ from the slice distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from data_loading.io.dicom_headers import Series, describe, floats, read_header
from data_loading.io.dicom_pixels import are_copies
from data_loading.io.volume import Geometry

# Largest distance of a slice from its place among evenly spaced ones, as a fraction of the slice distance. A missing
# slice is a distance of 0.214 at least, where it is the middle one of five.
STEP_TOLERANCE = 0.1
# The same where positions are rounded to a decimal, often 0.1 mm, up to this fraction of which rounding explains.
ROUNDED_STEP_TOLERANCE = 0.21
ROUNDING = 0.7
# Largest difference between the direction cosines of one series, and of their lengths from 1 without a note.
COSINE_TOLERANCE = 1e-3
# Largest cosine of the angle between rows and columns; cosines are often rounded to three decimals.
PERPENDICULAR_TOLERANCE = 5e-3
# Smallest cosine of the angle between the slices' normal and the direction in which they follow each other. The gantry
# of a CT scanner tilts by 30° at most, a cosine of 0.87.
LEAST_NORMAL_COSINE = 0.5
# DICOM's axes run to the patient's left, posterior, superior; NIfTI's to the right, anterior, superior.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def sorted_headers(series: Series) -> tuple[list[Any], Geometry]:
    """Reads the headers, without pixels, of a series.

    Returns:
        The headers, sorted along the normal of the slice plane, and the geometry of the volume.

    Raises:
        UserError: see `dicom.read_series`.
    """
    check_complete(series)
    name = f"series {series.name}"
    headers = [read_header(path) for path in series.files]
    first = headers[0]
    _check_consistent(headers, name)
    along_row, along_column = unit_cosines(first, name)
    normal = np.cross(along_row, along_column)
    headers.sort(key=lambda header: float(floats(header, "ImagePositionPatient", 3) @ normal))
    positions = np.stack([floats(header, "ImagePositionPatient", 3) for header in headers])
    between_rows, between_columns = floats(first, "PixelSpacing", 2)  # in the standard's order
    affine = np.eye(4)
    affine[:3, 0] = along_row * between_columns
    affine[:3, 1] = along_column * between_rows
    affine[:3, 2] = _slice_step(positions, normal, headers, name)
    affine[:3, 3] = positions[0]
    d, h, w = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    if not (np.isfinite(affine).all() and min(d, h, w) > 0):
        raise UserError(f"{name}: positions, orientation or spacing are impossible; export it again")
    shape = (int(first.Columns), int(first.Rows), len(headers))
    return headers, Geometry(LPS_TO_RAS @ affine, shape, (d, h, w))


def check_complete(series: Series) -> None:
    """Raises UserError if files that may be slices of the series cannot be read or placed."""
    if series.unread:
        raise UserError(
            f"series {series.name}: {len(series.unread)} of {len(series.files) + len(series.unread)} files cannot be "
            f"read or placed, so that slices would be missing ({describe(series.unread)}); export them again, or "
            f"remove them from {series.unread[0].path.parent} if they are no slices"
        )


def unit_cosines(header: Any, name: str) -> NDArray[np.float64]:
    """Returns the directions of rows and columns as unit vectors, (2, 3).

    Raises:
        UserError: a vector is zero, or they are not perpendicular.
    """
    cosines = floats(header, "ImageOrientationPatient", 6).reshape(2, 3)
    lengths = np.linalg.norm(cosines, axis=1)
    if not lengths.min() > 0:
        raise UserError(f"{name}: ImageOrientationPatient holds a direction of length 0; export it again")
    unit: NDArray[np.float64] = cosines / lengths[:, None]
    if abs(cosine := float(unit[0] @ unit[1])) > PERPENDICULAR_TOLERANCE:
        raise UserError(
            f"{name}: by ImageOrientationPatient rows and columns are at {np.degrees(np.arccos(cosine)):.1f}° to each "
            "other instead of 90°; export it again"
        )
    return unit


def cosines_note(header: Any, name: str) -> str:
    """Returns a note if the direction cosines had to be normalised, else ""."""
    lengths = np.linalg.norm(floats(header, "ImageOrientationPatient", 6).reshape(2, 3), axis=1)
    if np.abs(lengths - 1).max() <= COSINE_TOLERANCE:
        return ""
    return (
        f"{name}: the direction cosines of ImageOrientationPatient are no unit vectors (lengths {lengths[0]:.4g} and "
        f"{lengths[1]:.4g}); they are normalised, and the pixel spacing is as stated"
    )


def _check_consistent(headers: Sequence[Any], name: str) -> None:
    """Raises UserError unless all slices have the same size, orientation and pixel spacing."""
    first = headers[0]
    cosines, spacing = unit_cosines(first, name), floats(first, "PixelSpacing", 2)
    for header in headers:
        if (header.Rows, header.Columns) != (first.Rows, first.Columns):
            raise UserError(
                f"{name}: {header.filename} has {header.Columns} x {header.Rows} pixels, others "
                f"{first.Columns} x {first.Rows}"
            )
        if np.abs(unit_cosines(header, name) - cosines).max() > COSINE_TOLERANCE:
            raise UserError(f"{name}: {header.filename} is oriented differently from other slices; is it a localiser?")
        if not np.allclose(floats(header, "PixelSpacing", 2), spacing, rtol=1e-3, atol=0):
            raise UserError(f"{name}: {header.filename} has a different pixel spacing from other slices")


def _slice_step(
    positions: NDArray[np.float64], normal: NDArray[np.float64], headers: Sequence[Any], name: str
) -> NDArray[np.float64]:
    """Returns the vector (3,) from one slice to the next in mm; for a single slice, its thickness along the normal."""
    if len(positions) == 1:
        return normal * _thickness(headers[0])
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    size = float(np.linalg.norm(step))
    along = np.diff(positions @ normal)
    if along.min() <= STEP_TOLERANCE * float(np.median(along)) or step @ normal < LEAST_NORMAL_COSINE * size:
        raise UserError(f"{name}: {_why_not_in_a_row(positions, headers)}")
    allowed = max(STEP_TOLERANCE * size, min(ROUNDING * _decimal_step(positions), ROUNDED_STEP_TOLERANCE * size))
    if _unevenness(positions) > allowed:
        raise UserError(
            f"{name}: slice distances range from {along.min():.4g} to {along.max():.4g} mm; is a slice missing?"
        )
    return step


def _thickness(header: Any) -> float:
    """Returns the slice distance that a header states, or else the slice thickness, or else 1, in mm."""
    for keyword in ("SpacingBetweenSlices", "SliceThickness"):
        try:
            if (value := abs(float(header.get(keyword) or 0))) > 0:
                return value
        except (TypeError, ValueError):  # damaged, so absent
            continue
    return 1.0


def _unevenness(positions: NDArray[np.float64]) -> float:
    """Returns the largest distance of a slice from its place among evenly spaced ones (a least-squares fit), mm."""
    index = np.arange(len(positions)) - (len(positions) - 1) / 2
    offsets = positions - positions.mean(axis=0)
    even = np.outer(index, index @ offsets / (index @ index))
    return float(np.linalg.norm(offsets - even, axis=1).max())


def _decimal_step(positions: NDArray[np.float64]) -> float:
    """Returns the largest power of ten of which all coordinates are multiples, in mm; 0 if there is none."""
    for exponent in range(1, -7, -1):
        multiples = positions / 10.0**exponent
        if np.abs(multiples - np.rint(multiples)).max() < 1e-3:
            return float(10.0**exponent)
    return 0.0


def _why_not_in_a_row(positions: NDArray[np.float64], headers: Sequence[Any]) -> str:
    """Returns why slices do not follow each other along their normal: wrong orientation, copies or several phases."""
    _, first, place, counts = np.unique(
        positions.round(6), axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    if len(counts) == len(positions):
        return (
            "its slices are at different positions, but not one after another along their normal; "
            "ImageOrientationPatient or ImagePositionPatient is wrong, export it again"
        )
    place = place.ravel()
    several = np.flatnonzero(counts > 1)
    one, other = (headers[index] for index in np.flatnonzero(place == several[0])[:2])
    if are_copies(Path(one.filename), Path(other.filename)):
        return f"{one.filename} and {other.filename} are copies of one slice under two SOP instance UIDs; remove one"
    if counts.min() == counts.max():
        return f"{counts[0]} slices at each of {len(first)} positions; several phases or echoes are not supported"
    return (
        f"several slices at one position ({one.filename} and {other.filename}), at {len(several)} of {len(first)} "
        "positions; remove those that do not belong to the volume"
    )
