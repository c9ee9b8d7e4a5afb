"""A mask as DICOM-SEG, one segment a class, each frame referring to the slice that it lies on: written, and read.

Needs `pip install '.[dicom]'`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.sr.coding import CodedConcept
from numpy.typing import NDArray

from common.errors import UserError
from common.files import replacing
from data_loading.io.dicom import COSINE_TOLERANCE, LPS_TO_RAS, Series, sorted_headers, with_identifiers
from data_loading.io.volume import Geometry, free_memory_bytes

# What a class is must be a code; its name stands in the label. SNOMED CT's most general ones for a part of a body.
CATEGORY = CodedConcept("123037004", "SCT", "Anatomical Structure")
PROPERTY = CodedConcept("85756007", "SCT", "Tissue")
MAKER = "unet3d-benchmark"
SEGMENTATION_CLASS = "1.2.840.10008.5.1.4.1.1.66.4"
# A frame lies on a slice when its origin is so near, in voxels.
PLACE_TOLERANCE = 0.05
# A pixel as stored and as read.
SEGMENT_BYTES = 2


def write_segmentation(path: Path, mask: NDArray[np.uint8], series: Series, classes: Sequence[str]) -> list[str]:
    """Writes the mask, atomically.

    Args:
        mask: (1, columns, rows, slices), on the grid of `read_series`.
        classes: names by label value, the background first.

    Returns:
        A line for the user where the source lacks identifiers, else none.

    Raises:
        UserError: the source's headers lack what the standard asks of a segmentation.
    """
    headers, _ = sorted_headers(series)
    filled = with_identifiers(headers)
    frames = np.ascontiguousarray(mask[0].transpose(2, 1, 0))
    try:
        with warnings.catch_warnings(action="ignore"):  # of empty frames, and of names that are no person's
            segmentation = Segmentation(
                source_images=headers,
                pixel_array=frames,
                segmentation_type="BINARY",
                segment_descriptions=[_description(value, name) for value, name in enumerate(classes) if value],
                series_instance_uid=hd.UID(),
                series_number=_free_number(headers[0]),
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer=MAKER,
                manufacturer_model_name=MAKER,
                software_versions="0.1.0",
                device_serial_number="0",
            )
            with replacing(path) as temporary:
                segmentation.save_as(temporary)
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: series {series.name} lacks what DICOM-SEG needs ({error}); "
            "write NIfTI instead, with --output FILE.nii.gz"
        ) from None
    note = f"{path}: the source's UIDs are empty in part, by an anonymiser it seems; missing ones are made up"
    return [note] if filled else []


def _description(value: int, name: str) -> SegmentDescription:
    return SegmentDescription(
        segment_number=value,
        segment_label=name,
        segmented_property_category=CATEGORY,
        segmented_property_type=PROPERTY,
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=MAKER, family=CodedConcept("123109", "DCM", "Artificial Intelligence"), version="0.1.0"
        ),
    )


def _free_number(header: Any) -> int:
    """A series number that the source's own is not."""
    number = header.get("SeriesNumber")
    return 1000 + int(number or 0) if 0 <= int(number or 0) < 10**8 else 1000


@dataclass(frozen=True)
class Segments:
    """A DICOM-SEG file's header.

    Attributes:
        names: of the segments, by number.
        series: UIDs of the series that it says it belongs to.
        header: the file without its pixels.
    """

    path: Path
    names: dict[int, str]
    series: frozenset[str]
    header: Any

    def slices(self, geometry: Geometry) -> list[tuple[int, int]] | None:
        """(segment, slice) of each frame, where all frames lie on a grid of `read_series`; None where they do not.

        Raises:
            UserError: the header does not say where they lie.
        """
        try:
            return self._slices(geometry)
        except Exception as error:  # a damaged file fails in as many ways as the format has parts
            raise UserError(f"{self.path}: not a readable DICOM-SEG file ({error})") from None

    def _slices(self, geometry: Geometry) -> list[tuple[int, int]] | None:
        columns, rows, count = geometry.shape
        if (self.header.Columns, self.header.Rows) != (columns, rows):
            return None
        to_voxels = np.linalg.inv(LPS_TO_RAS @ geometry.affine)
        across, down = ((LPS_TO_RAS @ geometry.affine)[:3, axis] / geometry.spacing_mm[axis] for axis in (0, 1))
        found = []
        for group in self.header.PerFrameFunctionalGroupsSequence:
            position = _item(group, self.header, "PlanePositionSequence").ImagePositionPatient
            cosines = np.asarray(_item(group, self.header, "PlaneOrientationSequence").ImageOrientationPatient, float)
            spacing = np.asarray(_item(group, self.header, "PixelMeasuresSequence").PixelSpacing, float)
            if np.abs(cosines - np.concatenate([across, down])).max() > COSINE_TOLERANCE:
                return None
            if not np.allclose(spacing, geometry.spacing_mm[1::-1], rtol=1e-3):
                return None
            place = (to_voxels @ [*map(float, position), 1.0])[:3]
            index = round(float(place[2]))
            if np.abs(place - [0, 0, index]).max() > PLACE_TOLERANCE or not 0 <= index < count:
                return None
            segment = int(_item(group, self.header, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            if segment not in self.names:
                raise ValueError(f"no segment {segment}")
            found.append((segment, index))
        return found


def _item(group: Any, header: Any, keyword: str) -> Any:
    """The first item of a frame's sequence, of all frames' where it is shared."""
    own = group.get(keyword) or header.SharedFunctionalGroupsSequence[0].get(keyword)
    if not own:
        raise AttributeError(f"no {keyword}")
    return own[0]


def open_segments(path: Path) -> Segments | None:
    """The header of a DICOM-SEG file; None of another DICOM object. Raises UserError where it is damaged."""
    try:
        with warnings.catch_warnings(action="ignore"):
            header: Any = pydicom.dcmread(path, stop_before_pixels=True)
        if header.get("SOPClassUID") != SEGMENTATION_CLASS:
            return None
        names = {int(one.SegmentNumber): str(one.SegmentLabel) for one in header.SegmentSequence}
        series = {str(one.SeriesInstanceUID) for one in header.get("ReferencedSeriesSequence", [])}
        found = Segments(path, names, frozenset(series), header)
        if header.SegmentationType not in ("BINARY", "FRACTIONAL"):
            raise UserError(f"{path}: a segmentation of type {header.SegmentationType}; export it as BINARY")
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as the format has parts
        raise UserError(f"{path}: not a readable DICOM-SEG file ({error})") from None
    return found


def read_segments(path: Path, geometry: Geometry, class_of: Callable[[str], int]) -> NDArray[np.uint8]:
    """A DICOM-SEG file as classes on the grid of its series, (1, columns, rows, slices).

    Where segments overlap the higher class counts. Of fractions, half and above is inside.

    Args:
        class_of: of a segment's name.

    Raises:
        UserError: it is damaged, or lies on another grid.
    """
    segments = open_segments(path)
    slices = segments.slices(geometry) if segments else None
    if segments is None or slices is None:
        raise UserError(f"{path}: does not lie on its series' grid")
    needed, free = len(slices) * geometry.shape[0] * geometry.shape[1] * SEGMENT_BYTES, free_memory_bytes()
    if needed > free:
        raise UserError(
            f"{path}: {len(slices)} frames need {needed / 2**30:.1f} GiB to work on, and "
            f"{free / 2**30:.1f} GiB are free"
        )
    try:
        dataset: Any = pydicom.dcmread(path)
        frames = dataset.pixel_array.reshape(len(slices), *dataset.pixel_array.shape[-2:])
        limit = float(dataset.get("MaximumFractionalValue", 1)) / 2
    except Exception as error:  # as above
        raise UserError(f"{path}: its pixels cannot be decoded ({error})") from None
    mask = np.zeros((1, *geometry.shape), np.uint8)
    for frame, (segment, index) in zip(frames, slices, strict=True):
        classes = np.where(limit <= frame.T, np.uint8(class_of(segments.names[segment])), np.uint8(0))
        np.maximum(mask[0, :, :, index], classes, out=mask[0, :, :, index])
    return mask
