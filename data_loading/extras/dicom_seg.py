"""A mask as DICOM-SEG, one segment a class, each frame referring to the slice that it lies on.

Needs `pip install '.[dicom]'`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.sr.coding import CodedConcept
from numpy.typing import NDArray

from data_loading.extras.dicom import Series, sorted_headers, with_identifiers
from errors import UserError
from files import replacing

# What a class is must be a code; its name stands in the label. SNOMED CT's most general ones for a part of a body.
CATEGORY = CodedConcept("123037004", "SCT", "Anatomical Structure")
PROPERTY = CodedConcept("85756007", "SCT", "Tissue")
MAKER = "unet3d-benchmark"


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
                source_images=headers, pixel_array=frames, segmentation_type="BINARY",
                segment_descriptions=[_description(value, name) for value, name in enumerate(classes) if value],
                series_instance_uid=hd.UID(), series_number=_free_number(headers[0]), sop_instance_uid=hd.UID(),
                instance_number=1, manufacturer=MAKER, manufacturer_model_name=MAKER, software_versions="0.1.0",
                device_serial_number="0",
            )  # fmt: skip
            with replacing(path) as temporary:
                segmentation.save_as(temporary)
    except (AttributeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: series {series.name} lacks what DICOM-SEG needs ({error}); "
                        "write NIfTI instead, with --output FILE.nii.gz") from None  # fmt: skip
    note = f"{path}: the source's UIDs are empty in part, by an anonymiser it seems; missing ones are made up"
    return [note] if filled else []


def _description(value: int, name: str) -> SegmentDescription:
    return SegmentDescription(
        segment_number=value, segment_label=name, segmented_property_category=CATEGORY,
        segmented_property_type=PROPERTY, algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=MAKER, family=CodedConcept("123109", "DCM", "Artificial Intelligence"), version="0.1.0"
        ),
    )  # fmt: skip


def _free_number(header: Any) -> int:
    """A series number that the source's own is not."""
    number = header.get("SeriesNumber")
    return 1000 + int(number or 0) if 0 <= int(number or 0) < 10**8 else 1000
