"""A data set before preprocessing: its cases, their split, and what the flags of `preprocess_dataset.py` make of it."""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args, get_type_hints

import numpy as np

from common.errors import UserError
from data_loading.io.orientation import DIRECTIONS, is_orientation
from data_loading.io.volume import Volume, check_same_geometry, read_nifti
from data_loading.readers.labels import LabelMap
from data_loading.sampler import split_patients
from data_loading.spec import INTENSITIES, DatasetSpec

# Where neither the data set nor `--split` has another.
OWN_SPLIT = (0.8, 0.2)


class IntensityFlags(TypedDict, total=False):
    """What becomes of the values: every data set takes these flags; see `with_flags`."""

    window: tuple[float, float]
    intensity: str


class VolumeFlags(IntensityFlags, total=False):
    """How volumes are made of scans: every data set of scans takes these flags."""

    spacing: tuple[float, float, float]
    orientation: str
    foreground_crop: bool


@dataclass(frozen=True)
class RawCase:
    """One scan's files before preprocessing; extras derive others, which read other files.

    Attributes:
        labels: of the mask's values; None: they are the classes.
        patient: whose it is, "" where each case is a patient of its own.
    """

    case: str
    image: Path
    label: Path
    labels: LabelMap | None = None
    patient: str = ""

    def files(self) -> list[list[Path]]:
        """What the image is made of, and what the mask."""
        return [[self.image], [self.label]]

    def options(self) -> str:
        """What else than the files and the spec the case's volumes follow from, "" for nothing."""
        return repr(self.labels.pairs) if self.labels else ""

    def stamp(self) -> list[list[int]]:
        """Notices another source: size and time of the last change (ns) of image and mask, and a number of the options.

        Of several files the sizes' sum and the latest time.
        """
        found = [[path.stat() for path in files] for files in self.files()]
        own = [[sum(one.st_size for one in each), max(one.st_mtime_ns for one in each)] for each in found]
        return [*own, [zlib.crc32(options.encode())]] if (options := self.options()) else own

    def read(self) -> tuple[Volume, Volume]:
        """The scan (C, D, H, W) float32 and its mask (1, D, H, W) of classes. Raises UserError as `read_nifti` does."""
        image = read_nifti(self.image, np.float32)
        label = read_nifti(self.label, np.uint8)
        check_same_geometry(image.geometry, label.geometry, self.case)
        return image, self.classified(label)

    def classified(self, label: Volume) -> Volume:
        """The mask with classes in place of its values."""
        return Volume(self.labels.apply(label.array), label.geometry) if self.labels else label


@dataclass(frozen=True)
class RawDataset:
    """A raw data set, ready to be preprocessed.

    Attributes:
        split: maps "train", "evaluation" and perhaps "test" to case ids.
        drop_empty: training cases whose mask is empty are left out.
        notes: lines for the user.
        made: what `dataset.json` is to say of the options.
    """

    spec: DatasetSpec
    cases: list[RawCase]
    split: dict[str, list[str]]
    drop_empty: bool = False
    notes: list[str] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)


def with_flags(spec: DatasetSpec, size: tuple[int, int] | None = None, **flags: Unpack[VolumeFlags]) -> DatasetSpec:
    """The spec as the flags change it.

    Raises:
        UserError: a value that cannot be.
    """
    low, high = flags.get("window", (-math.inf, math.inf))
    spacing = flags.get("spacing", (1.0, 1.0, 1.0))
    orientation = flags.get("orientation")
    intensity = flags.get("intensity", spec.intensity)
    if not low < high or ("window" in flags and not math.isfinite(high - low)):
        raise UserError(f"--window {low:g} {high:g}: the lower end must be below the upper one")
    if len(spacing) != 3 or not all(0 < mm < math.inf for mm in spacing):
        raise UserError(f"--spacing {' '.join(f'{mm:g}' for mm in spacing)}: give three distances in mm, above 0")
    if orientation is not None and not is_orientation(orientation):
        pairs = ", ".join(" or ".join(pair) for pair in DIRECTIONS)
        raise UserError(f"--orientation {orientation}: give three letters such as RAS, one each of {pairs}")
    if intensity not in INTENSITIES:
        raise UserError(f"--intensity {intensity} does not exist; there is {', '.join(INTENSITIES)}")
    if size is not None and min(size) < 1:
        raise UserError(f"--size {size[0]} {size[1]}: must be at least 1 pixel each way")
    if "window" in flags:
        # What is outside of the volume was a value of the former window.
        spec = replace(spec, intensity_window=(low, high), padding_value=None)
    if "intensity" in flags:
        spec = replace(spec, intensity=intensity, mean=None, deviation=None, padding_value=None)
    return replace(
        spec,
        spacing_mm=flags.get("spacing", spec.spacing_mm),
        orientation=orientation or spec.orientation,
        foreground_crop=flags.get("foreground_crop", False),
        size=size or spec.size,
    )


def with_classes(spec: DatasetSpec, cases: list[RawCase], labels: Sequence[str]) -> tuple[DatasetSpec, list[RawCase]]:
    """Spec and cases of a data set whose classes are known, as `--labels` chooses and merges them."""
    chosen = LabelMap.parse(labels, spec.classes)
    return replace(spec, classes=chosen.classes), [replace(raw, labels=chosen) for raw in cases]


def split_of(cases: Sequence[RawCase], shares: Sequence[float], seed: int, where: object) -> dict[str, list[str]]:
    """The split by patient. Raises UserError where there are too few, naming `where` they are."""
    try:
        return split_patients({raw.case: raw.patient or raw.case for raw in cases}, shares, seed)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def flags_of(read: Callable[..., RawDataset]) -> list[str]:
    """The flags that a reader takes."""
    hints = get_type_hints(read)
    names: list[str] = []
    for name, parameter in inspect.signature(read).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            names += get_type_hints(get_args(hints[name])[0])
        elif parameter.kind is parameter.KEYWORD_ONLY:
            names.append(name)
    return names
