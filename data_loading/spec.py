"""DatasetSpec: what a preprocessed data set is, as far as preprocessing, training and scoring must know."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from common.errors import UserError

INTENSITIES = ("zscore", "minmax", "none")
# Former names, in dataset.json and checkpoints of older versions.
RENAMED_INTENSITIES = {"unit": "minmax"}


@dataclass(frozen=True)
class DatasetSpec:
    """One data set's constants.

    Attributes:
        name: short name, such as "kits19".
        classes: class names by label value; the first is the background.
        channels: image channels (modalities).
        spacing_mm: every scan is resampled to this; None keeps each scan's own.
        intensity_window: values are clipped to this, in HU for CT; None clips nothing.
        mean, deviation: subtracted, then divided by; None: of each scan and channel itself.
        intensity: "zscore": by mean and deviation; "minmax": to 0 to 1, of the window, without one of each scan and
            channel; "none": the (clipped) values as they are.
        min_shape: volumes are padded with their edge values to at least this.
        padding_value: what a sliding window sees outside the volume, after normalisation; None repeats the edge.
        crops_remainder: score as the MLPerf reference does, which cuts a small remainder off the edges
            before it scores (a quirk that the target was calibrated with); False scores whole volumes.
        orientation: which way the axes run (see `orientation.py`): scans are turned to it. None: preprocessing leaves
            them as stored, and `read_spec_and_split` fills in the orientation that all of them share, so that a new
            scan is turned to what the network was trained on.
        foreground_crop: scans are cut to the box of what is no background (`preprocessing.foreground_box`).
        size: pictures are resized to this (H, W), each slice for itself; None: not.
    """

    name: str
    classes: tuple[str, ...]
    channels: int = 1
    spacing_mm: tuple[float, float, float] | None = None
    intensity_window: tuple[float, float] | None = None
    mean: float | None = None
    deviation: float | None = None
    min_shape: tuple[int, int, int] | None = None
    padding_value: float | None = None
    crops_remainder: bool = False
    orientation: str | None = None
    intensity: str = "zscore"
    foreground_crop: bool = False
    size: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> DatasetSpec:
        """Raises UserError when a field is unknown or missing (a folder of a later version, say)."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(record) - known)
        if unknown or not {"name", "classes"} <= set(record):
            raise UserError(f"dataset.json: the spec has unknown or missing fields {unknown}; preprocess again")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in record.items()
        }
        if isinstance(intensity := values.get("intensity"), str):
            values["intensity"] = RENAMED_INTENSITIES.get(intensity, intensity)
        if values.get("intensity", "zscore") not in INTENSITIES:
            raise UserError(
                f"dataset.json: the spec has an unknown intensity {values['intensity']!r}; preprocess again"
            )
        return cls(**values)


# MLPerf's KiTS19 constants: intensity statistics are those of the kidney and tumour voxels (HU).
KITS19 = DatasetSpec(
    name="kits19",
    classes=("background", "kidney", "tumour"),
    spacing_mm=(1.6, 1.2, 1.2),
    intensity_window=(-79.0, 304.0),
    mean=101.0,
    deviation=76.9,
    min_shape=(128, 128, 128),
    padding_value=-2.2,
    crops_remainder=True,
)
# The axes of its scans: slices from head to foot, rows from front to back, columns from right to left.
KITS19_ORIENTATION = "IPL"
