"""Reads and writes masks as DICOM-SEG: one segment per class, and each frame refers to its source slice.

Needs `pip install '.[dicom]'`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.sr.coding import CodedConcept
from numpy.typing import NDArray

from common.errors import UserError
from common.files import replacing
from data_loading.io.dicom import Series, fill_missing_uids, sorted_headers
from data_loading.io.dicom_geometry import COSINE_TOLERANCE, LPS_TO_RAS, unit_cosines
from data_loading.io.dicom_headers import DAMAGED, read_dataset
from data_loading.io.dicom_headers import read_header as read_any_header
from data_loading.io.volume import Geometry, check_memory

# The standard requires codes for category and type of a segment; its label is the class name. These are SNOMED CT's
# most general codes for a part of the body.
CATEGORY = CodedConcept("123037004", "SCT", "Anatomical Structure")
PROPERTY = CodedConcept("85756007", "SCT", "Tissue")
MANUFACTURER = "unet3d-benchmark"
# As in pyproject.toml.
VERSION = "0.2.0"
SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"
# Masks in other forms, with what to do.
UNREAD_MASKS = {
    "1.2.840.10008.5.1.4.1.1.481.3": "RTSTRUCT, which holds contours; convert to DICOM-SEG or NIfTI",
    "1.2.840.10008.5.1.4.1.1.66.5": "surface segmentation; convert to DICOM-SEG or NIfTI",
    "1.2.840.10008.5.1.4.1.1.66.7": "DICOM-SEG of type LABELMAP; export as BINARY",
}
Add = Callable[[NDArray[np.uint8], int], None]
REPAIR = f"{DAMAGED}, or written wrongly; export it again"
# Largest distance of a frame's origin from that of its slice, in voxels.
POSITION_TOLERANCE = 0.05
# Memory per pixel of a frame: one byte as stored, one as read.
WORKING_BYTES_PER_PIXEL = 2


def write_segmentation(path: Path, mask: NDArray[np.uint8], series: Series, classes: Sequence[str]) -> list[str]:
    """Writes a mask as DICOM-SEG, atomically.

    Args:
        mask: (1, columns, rows, slices), on the grid of `read_series`.
        classes: class names, the background first.

    Returns:
        One message for the user if the source lacks UIDs, else an empty list.

    Raises:
        UserError: the source's headers lack elements that the standard requires for a segmentation.
    """
    headers, _ = sorted_headers(series)
    filled = fill_missing_uids(headers)
    frames = np.ascontiguousarray(mask[0].transpose(2, 1, 0))
    try:
        with warnings.catch_warnings(action="ignore"):  # about empty frames and malformed patient names
            segmentation = Segmentation(
                source_images=headers,
                pixel_array=frames,
                segmentation_type="BINARY",
                segment_descriptions=[_description(value, name) for value, name in enumerate(classes) if value],
                series_instance_uid=hd.UID(),
                series_number=_free_number(headers[0]),
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer=MANUFACTURER,
                manufacturer_model_name=MANUFACTURER,
                software_versions=VERSION,
                device_serial_number="0",
            )
            with replacing(path) as temporary:
                segmentation.save_as(temporary)
    except (AttributeError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        missing = re.search(r"attribute '(\w+)'", str(error))
        raise UserError(
            f"{path}: series {series.name} lacks elements that DICOM-SEG requires"
            f"{f' ({missing[1]})' if missing else ''}; "
            "write NIfTI instead, with --output FILE.nii.gz"
        ) from None
    note = f"{path}: some UIDs of the source are empty, probably due to anonymisation; new ones were generated"
    return [note] if filled else []


def _description(value: int, name: str) -> SegmentDescription:
    return SegmentDescription(
        segment_number=value,
        segment_label=name,
        segmented_property_category=CATEGORY,
        segmented_property_type=PROPERTY,
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=MANUFACTURER, family=CodedConcept("123109", "DCM", "Artificial Intelligence"), version=VERSION
        ),
    )


def _free_number(header: Any) -> int:
    """Returns a series number other than the source's."""
    number = header.get("SeriesNumber")
    return 1000 + int(number or 0) if 0 <= int(number or 0) < 10**8 else 1000


@dataclass(frozen=True, kw_only=True)
class SegmentationHeader:
    """Header of a DICOM-SEG file.

    Attributes:
        names: segment labels by segment number.
        series: UIDs of the series that the file refers to.
        header: the dataset without its pixels.
    """

    path: Path
    names: dict[int, str]
    series: frozenset[str]
    header: Any

    def frames_on(self, geometry: Geometry) -> list[tuple[int, int]] | None:
        """Returns the (segment, slice) of each frame if all are on the grid of a series, else None.

        Raises:
            UserError: the header lacks the positions of the frames.
        """
        try:
            return self._frames_on(geometry)
        except UserError:
            raise
        except Exception:  # pydicom raises many types on a damaged file
            raise UserError(f"{self.path}: its frames lack positions or segments; {REPAIR}") from None

    def _frames_on(self, geometry: Geometry) -> list[tuple[int, int]] | None:
        columns, rows, count = geometry.shape
        if (self.header.Columns, self.header.Rows) != (columns, rows):
            return None
        to_voxels = np.linalg.inv(LPS_TO_RAS @ geometry.affine)
        across, down = ((LPS_TO_RAS @ geometry.affine)[:3, axis] / geometry.spacing_mm[axis] for axis in (0, 1))
        frames = []
        for group in self.header.PerFrameFunctionalGroupsSequence:
            position = _item(group, self.header, "PlanePositionSequence").ImagePositionPatient
            orientation = _item(group, self.header, "PlaneOrientationSequence")
            orientation.filename = self.path
            cosines = unit_cosines(orientation, str(self.path)).ravel()
            spacing = np.asarray(_item(group, self.header, "PixelMeasuresSequence").PixelSpacing, float)
            if np.abs(cosines - np.concatenate([across, down])).max() > COSINE_TOLERANCE:
                return None
            if not np.allclose(spacing, geometry.spacing_mm[1::-1], rtol=1e-3, atol=0):
                return None
            origin = (to_voxels @ [*map(float, position), 1.0])[:3]
            index = round(float(origin[2]))
            if np.abs(origin - [0, 0, index]).max() > POSITION_TOLERANCE or not 0 <= index < count:
                return None
            segment = int(_item(group, self.header, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            if segment not in self.names:
                raise ValueError(f"no segment {segment}")
            frames.append((segment, index))
        return frames


def _item(group: Any, header: Any, keyword: str) -> Any:
    """Returns the first item of a frame's sequence, or of the sequence that all frames share."""
    sequence = group.get(keyword) or header.SharedFunctionalGroupsSequence[0].get(keyword)
    if not sequence:
        raise AttributeError(f"no {keyword}")
    return sequence[0]


def read_header(path: Path) -> SegmentationHeader | None:
    """Reads the header of a DICOM-SEG file; None for other DICOM objects. Raises UserError if it is damaged."""
    header: Any = read_any_header(path)
    if header.SOPClassUID != SEGMENTATION_STORAGE:
        return None
    try:
        names = {int(segment.SegmentNumber): str(segment.SegmentLabel) for segment in header.SegmentSequence}
        series = frozenset(str(item.SeriesInstanceUID) for item in header.get("ReferencedSeriesSequence", []))
        kind = header.SegmentationType
    except Exception:  # pydicom raises many types on a damaged file
        raise UserError(f"{path}: lacks elements of DICOM-SEG; {REPAIR}") from None
    if kind not in ("BINARY", "FRACTIONAL"):
        raise UserError(f"{path}: a segmentation of type {kind}; export it as BINARY")
    return SegmentationHeader(path=path, names=names, series=series, header=header)


def read_segmentation(path: Path, geometry: Geometry, class_of: Callable[[str], int], add: Add) -> None:
    """Reads a DICOM-SEG file as classes on the grid of its series, frame by frame.

    A fractional value is inside from half of the maximum.

    Args:
        class_of: returns the class of a segment label.
        add: is called for each frame of a class other than 0, with its classes (columns, rows) and slice index.

    Raises:
        UserError: the file is damaged, on another grid, or needs more than the free memory.
    """
    header = read_header(path)
    positions = header.frames_on(geometry) if header else None
    if header is None or positions is None:
        raise UserError(f"{path}: not on the grid of its series")
    columns, rows, _ = geometry.shape
    check_memory(f"{path}: {len(positions)} frames", len(positions) * columns * rows * WORKING_BYTES_PER_PIXEL)
    dataset = read_dataset(path)
    try:
        frames = dataset.pixel_array.reshape(len(positions), *dataset.pixel_array.shape[-2:])
        limit = float(dataset.get("MaximumFractionalValue", 1)) / 2
    except Exception:  # pydicom raises many types on a damaged file
        raise UserError(f"{path}: its pixels cannot be decoded; {REPAIR}") from None
    for frame, (segment, index) in zip(frames, positions, strict=True):
        if value := class_of(header.names[segment]):
            add(np.where(limit <= frame.T, np.uint8(value), np.uint8(0)), index)
