"""DatasetSpec: the constants of a data set that preprocessing, training and evaluation need."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from common.errors import UserError

# The ignore label of preprocessed labels: above every class.
IGNORED = 255
INTENSITIES = ("zscore", "minmax", "none")

# Keys and values of `dataset.json` and of a checkpoint's spec that earlier versions wrote, and their current names.
RENAMED_KEYS = {"deviation": "std", "made": "provenance", "pseudo": "pseudo_labels", "by_area": "half_pixel"}
RENAMED_INTENSITIES = {"unit": "minmax"}


def with_current_keys(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record read from a file, with the keys of earlier versions renamed."""
    return {RENAMED_KEYS.get(key, key): value for key, value in record.items()}


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Constants of one data set.

    Attributes:
        name: short name, such as "kits19".
        classes: class names by label value; the first is the background.
        channels: image channels (modalities).
        spacing_mm: (D, H, W) that scans are resampled to; None keeps each scan's own.
        intensity_window: (low, high) that values are clipped to, in HU for CT; None: no clipping.
        mean, std: subtracted, then divided by; None: those of each scan and channel.
        intensity: "zscore": (x - mean) / std; "minmax": to [0, 1], by the window or else the range of each scan and
            channel; "none": the (clipped) values.
        min_shape: (D, H, W) that volumes are padded to with their edge values.
        padding_value: normalised value of a sliding window outside the volume; None repeats the edge.
        crops_remainder: evaluate as the MLPerf reference does, which crops a small remainder off the volume's edges (a
            quirk that the target was calibrated with); False evaluates whole volumes.
        orientation: directions of the axes (see `orientation.py`) that scans are reoriented to. None: preprocessing
            leaves them as stored, and `read_spec_and_split` fills in the orientation that all of them share, so that a
            new scan is reoriented to what the network was trained on.
        foreground_crop: crop scans to their foreground (`preprocessing.foreground_box`).
        size: (H, W) in pixels that 2-D images are resized to, slice by slice; None: no resizing.
        aligned_labels: labels are resampled at the points of the scan; False: by the reference's rule, which is up to a
            voxel of the result off these points.
        ignore_label: `IGNORED` if the labels have voxels without a class, which count in no loss and no score; None:
            every voxel has one.
    """

    name: str
    classes: tuple[str, ...]
    channels: int = 1
    spacing_mm: tuple[float, float, float] | None = None
    intensity_window: tuple[float, float] | None = None
    mean: float | None = None
    std: float | None = None
    min_shape: tuple[int, int, int] | None = None
    padding_value: float | None = None
    crops_remainder: bool = False
    orientation: str | None = None
    intensity: str = "zscore"
    foreground_crop: bool = False
    size: tuple[int, int] | None = None
    ignore_label: int | None = None
    aligned_labels: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns the fields; later ones only if they say something, since earlier versions refuse unknown fields."""
        defaults = {"ignore_label": None, "aligned_labels": False}
        return {name: value for name, value in asdict(self).items() if name not in defaults or value != defaults[name]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> DatasetSpec:
        """Reads a spec. Raises UserError if a field is unknown or missing, as in a folder of a later version."""
        record = with_current_keys(record)
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


# MLPerf's KiTS19 constants: mean and std are those of kidney and tumour voxels, in HU.
KITS19 = DatasetSpec(
    name="kits19",
    classes=("background", "kidney", "tumour"),
    spacing_mm=(1.6, 1.2, 1.2),
    intensity_window=(-79.0, 304.0),
    mean=101.0,
    std=76.9,
    min_shape=(128, 128, 128),
    padding_value=-2.2,
    crops_remainder=True,
)
# Directions of its axes: slices from head to foot, rows from front to back, columns from right to left.
KITS19_ORIENTATION = "IPL"
