"""Headers of DICOM files: which files are slices of a volume, and why others are not.

Needs `pip install '.[dicom]'`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from common.errors import UserError

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
USED_TAGS = [
    *SEARCH_TAGS,
    "SpacingBetweenSlices",
    "SliceThickness",
    "RescaleSlope",
    "RescaleIntercept",
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
]
# What places a slice in space, and the number of its values.
PLACEMENT = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
DAMAGED = "cut off or damaged"
# pydicom logs what it reads past in a damaged file; what matters is raised as UserError here.
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


@dataclass(frozen=True, kw_only=True)
class Unread:
    """A file that is not read, and why; `is_object`: it is no image, but a report, a segmentation or the like."""

    path: Path
    reason: str
    is_object: bool = False


@dataclass(frozen=True, kw_only=True)
class Series:
    """The slices of one series, in no particular order.

    Attributes:
        name: value that selects it in `--series`: the series number, or the UID if the number is missing or not unique.
        patient: PatientID, "" if an anonymiser emptied it.
        unread: files that belong to it, or lie beside its slices and may, and cannot be read or placed.
        copies: number of files left out because they repeat a slice.
    """

    name: str
    uid: str
    description: str
    files: tuple[Path, ...]
    patient: str = ""
    unread: tuple[Unread, ...] = ()
    copies: int = 0

    def __str__(self) -> str:
        return f"{self.name} ({self.description or 'no description'}, {len(self.files)} slices)"


def describe(unread: Sequence[Unread]) -> str:
    """Returns the reasons with the number of files and the first names of each, most frequent first."""
    names: dict[str, list[str]] = {}
    for each in unread:
        names.setdefault(each.reason, []).append(each.path.name)
    parts = []
    for reason, files in sorted(names.items(), key=lambda item: (-len(item[1]), item[0])):
        more = ", …" if len(files) > 3 else ""
        parts.append(f"{reason}: {len(files)} file{'s' * (len(files) > 1)} ({', '.join(files[:3])}{more})")
    return "; ".join(parts)


def read_header(path: Path, tags: list[str] | None = None) -> Any:
    """Reads a header without pixels, also of a file that lacks the preamble or the file meta information.

    Raises:
        UserError: the file is damaged.
    """
    return read_dataset(path, stop_before_pixels=True, specific_tags=tags)


def read_dataset(path: Path, **options: Any) -> Any:
    """Reads a file with `pydicom.dcmread`. Raises UserError if it is damaged or no DICOM."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about odd values of elements that are not used
            dataset = pydicom.dcmread(path, force=True, **options)
            for keyword in USED_TAGS:  # pydicom converts an element, and fails if it is damaged, when it is first used
                dataset.get(keyword)
            if not dataset.get("SOPClassUID"):
                dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
            if not dataset.file_meta.get("TransferSyntaxUID"):
                is_implicit, is_little = dataset.original_encoding
                explicit = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
                dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit
            return dataset
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or DAMAGED}") from None
    except Exception:  # pydicom raises many types on a damaged file
        raise UserError(f"{path}: not a readable DICOM file: {DAMAGED}") from None


def object_name(header: Any) -> str:
    """Returns what kind of object other than an image a file is, such as "RT Structure Set"; "" for an image."""
    uid = header.SOPClassUID
    name = str(getattr(uid, "name", uid))
    is_image = name == uid or " Image Storage" in name  # a private class has no name
    return "" if is_image else name.removesuffix(" Storage")


def not_a_slice(header: Any) -> str:
    """Returns why an image is no single slice of any volume, or ""."""
    if not header.get("Rows") or not header.get("Columns"):
        return DAMAGED
    frames = str(header.get("NumberOfFrames") or "1").strip()
    return "" if frames in ("0", "1") else "unsupported multi-frame, convert to NIfTI"


def not_placed(header: Any) -> str:
    """Returns which element that places a slice in space is missing or damaged, or ""."""
    for keyword, count in PLACEMENT.items():
        if header.get(keyword) is None or header.get(keyword) == "":
            return f"no {keyword}"
        if values_of(header, keyword, count) is None:
            return f"damaged {keyword}"
    return ""


def values_of(header: Any, keyword: str, count: int) -> NDArray[np.float64] | None:
    """Returns the finite numbers of an element, or None if there are not exactly `count`."""
    try:
        values = np.asarray([float(value) for value in header[keyword].value], np.float64)
    except (KeyError, TypeError, ValueError):
        return None
    return values if values.shape == (count,) and np.isfinite(values).all() else None


def floats(header: Any, keyword: str, count: int) -> NDArray[np.float64]:
    """Returns the numbers of an element. Raises UserError unless there are `count` finite ones."""
    values = values_of(header, keyword, count)
    if values is None:
        raise UserError(f"{header.filename}: {keyword} is missing or damaged; export it again")
    return values


def instance_uid(header: Any) -> str:
    """Returns the SOP instance UID, from the file meta information if an anonymiser emptied it; "" if both are."""
    return str(header.get("SOPInstanceUID") or header.file_meta.get("MediaStorageSOPInstanceUID") or "")
