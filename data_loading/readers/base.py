"""A raw data set: its cases, their split, and the options that turn it into training volumes."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from common.errors import UserError
from common.files import normalised
from data_loading.io.orientation import DIRECTIONS, is_orientation, to_grid
from data_loading.io.volume import Volume, read_nifti
from data_loading.readers.label_map import LabelMap
from data_loading.spec import IGNORED, DatasetSpec
from data_loading.split import split_patients

# Shares of the patients that train and evaluate, unless the data set or the user chooses others.
DEFAULT_SPLIT_RATIOS = (0.8, 0.2)


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """Options of `preprocess_dataset.py` under the names of their flags; None: not given.

    Attributes:
        seed: seed of the split.
        split_ratios: shares of patients for train and evaluation, or for train, evaluation and test.
        labels: entries of `--labels` (see `LabelMap.parse`); empty: every value of the masks is a class.
        drop_empty: leave out training cases whose mask is empty; None: the reader's default.
        labels_dir: folder of the masks.
        slices_per_case: number of slices per case into which scans are divided; None: a scan is one case.
        size: (H, W) in pixels; 2-D images are resized to it.
        intensity_window: (low, high), for CT in HU; values are clipped to it.
        intensity: normalisation, one of `spec.INTENSITIES`.
        spacing: (D, H, W) in mm; scans are resampled to it.
        orientation: three letters such as "RAS"; axes are reoriented to it.
        foreground_crop: crop scans to the bounding box of their foreground.
        ignore_label: the masks' value of voxels without a class.
    """

    seed: int = 0
    split_ratios: tuple[float, ...] | None = None
    labels: tuple[str, ...] = ()
    drop_empty: bool | None = None
    labels_dir: Path | None = None
    slices_per_case: int | None = None
    size: tuple[int, int] | None = None
    intensity_window: tuple[float, float] | None = None
    intensity: str | None = None
    spacing: tuple[float, float, float] | None = None
    orientation: str | None = None
    foreground_crop: bool = False
    ignore_label: int | None = None


@dataclass(frozen=True, kw_only=True)
class RawCase:
    """The files of one case before preprocessing. Subclasses read other file formats.

    Attributes:
        case: case id, unique in its data set.
        labels: maps the mask's values to classes; None: the values are the classes.
        patient: patient id, "" if every case is a patient of its own.
        ignore_label: the mask's value of voxels without a class, which become `IGNORED`; None: every voxel has one.
    """

    case: str
    image: Path
    label: Path
    labels: LabelMap | None = None
    patient: str = ""
    ignore_label: int | None = None

    def is_whole(self) -> bool:
        """Returns whether the case is a whole scan and not a part of one."""
        return True

    def files(self) -> list[list[Path]]:
        """Returns the files of the image and the files of the mask."""
        return [[self.image], [self.label]]

    def settings(self) -> str:
        """Returns as text the settings besides the spec that change the case's volumes; "" for none."""
        ignored = "" if self.ignore_label is None else f" without {self.ignore_label}"
        return (repr(self.labels.pairs) if self.labels else "") + ignored

    def stamp(self) -> list[list[int]]:
        """Returns a stamp that changes with the sources.

        It holds [size in bytes, modification time in ns] for the image and for the mask (for several files the total
        size, the latest time and a checksum of each one's name, size and time, in order), then a checksum of
        `settings`, if there are any.
        """
        stamps = []
        for paths in self.files():
            facts = [(path.name, status.st_size, status.st_mtime_ns) for path in paths for status in [path.stat()]]
            stamps.append([sum(size for _, size, _ in facts), max(time for _, _, time in facts)])
            if len(facts) > 1:
                stamps[-1].append(zlib.crc32(repr(facts).encode()))
        return [*stamps, [zlib.crc32(settings.encode())]] if (settings := self.settings()) else stamps

    def read(self) -> tuple[Volume, Volume]:
        """Reads the case.

        Returns:
            The scan (C, D, H, W) float32 and its mask of classes (1, D, H, W) uint8, on the scan's grid.

        Raises:
            UserError: as `read_nifti`, or the mask has other voxels than the image.
        """
        image = read_nifti(self.image, np.float32)
        label = read_nifti(self.label, self.mask_type())
        return image, self.to_classes(to_grid(label, image.geometry, self.case))

    def mask_type(self) -> type[np.generic]:
        """Returns the type of the mask's values as they are read: wider than the classes where they are mapped."""
        return np.uint8 if self.labels is None and self.ignore_label is None else np.int32

    def to_classes(self, label: Volume) -> Volume:
        """Returns the mask with its values replaced by classes, and the ignore label by `IGNORED`.

        Raises:
            UserError: there is an ignore label, and another value is no class.
        """
        array = label.array
        if self.ignore_label is not None:
            is_ignored = array == self.ignore_label
            array = np.where(is_ignored, 0, array)
            if self.labels is None and not 0 <= array.min() <= array.max() < IGNORED:
                raise UserError(
                    f"{self.label}: labels from {array.min()} to {array.max()}; expected 0 to {IGNORED - 1}"
                )
        if self.labels:
            array = self.labels.apply(array)
        if self.ignore_label is not None:
            array = np.where(is_ignored, np.uint8(IGNORED), array.astype(np.uint8))
        return replace(label, array=array)


@dataclass(frozen=True, kw_only=True)
class RawDataset:
    """A raw data set, ready to be preprocessed.

    Attributes:
        split: case ids of "train", "evaluation" and, in a three-way split, "test".
        drop_empty: leave out training cases whose mask is empty.
        notes: messages for the user, one line each.
        provenance: how the data set was made, for `dataset.json`.
    """

    spec: DatasetSpec
    cases: Sequence[RawCase]
    split: dict[str, list[str]]
    drop_empty: bool = False
    notes: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


RawCaseT = TypeVar("RawCaseT", bound=RawCase)
Reader = Callable[[Path, ReaderOptions], RawDataset]


def apply_options(spec: DatasetSpec, options: ReaderOptions) -> DatasetSpec:
    """Returns the spec with the options applied.

    Raises:
        UserError: an option has an impossible value.
    """
    window, spacing, orientation, size = options.intensity_window, options.spacing, options.orientation, options.size
    if window is not None and not (window[0] < window[1] and math.isfinite(window[1] - window[0])):
        raise UserError(f"--intensity_window {window[0]:g} {window[1]:g}: LOW must be below HIGH")
    if spacing is not None and not all(0 < mm < math.inf for mm in spacing):
        raise UserError(f"--spacing {' '.join(f'{mm:g}' for mm in spacing)}: expected three distances in mm, above 0")
    if orientation is not None and not is_orientation(orientation):
        pairs = ", ".join(" or ".join(pair) for pair in DIRECTIONS)
        raise UserError(f"--orientation {orientation}: expected three letters such as RAS, one of each pair: {pairs}")
    if size is not None and min(size) < 1:
        raise UserError(f"--size {size[0]} {size[1]}: height and width must be at least 1 pixel")
    # The padding value is that of air under the previous normalisation.
    if window is not None:
        spec = replace(spec, intensity_window=window, padding_value=None)
    if options.intensity is not None:
        spec = replace(spec, intensity=options.intensity, mean=None, std=None, padding_value=None)
    return replace(
        spec,
        spacing_mm=spacing or spec.spacing_mm,
        orientation=orientation or spec.orientation,
        foreground_crop=options.foreground_crop,
        size=size or spec.size,
        # The reference's rule for masks is right for its own data set alone, whose digests contain it.
        aligned_labels=spec.aligned_labels or (spacing is not None and spec.spacing_mm is None),
    )


def map_labels(
    spec: DatasetSpec, cases: Sequence[RawCase], options: ReaderOptions
) -> tuple[DatasetSpec, list[RawCase]]:
    """Applies `--labels` and `--ignore_label`, if given, to a data set with known classes.

    Returns:
        Its new spec and cases.

    Raises:
        UserError: as `LabelMap.parse`, or the ignore label is that of a class.
    """
    mapped = list(cases)
    if options.labels:
        labels = LabelMap.parse(options.labels, spec.classes)
        spec, mapped = replace(spec, classes=labels.classes), [replace(raw, labels=labels) for raw in mapped]
    return ignore_voxels(spec, mapped, options)


def ignore_voxels(
    spec: DatasetSpec, cases: Sequence[RawCaseT], options: ReaderOptions
) -> tuple[DatasetSpec, list[RawCaseT]]:
    """Applies `--ignore_label`, if given, to a data set whose classes are settled; returns its new spec and cases.

    Raises:
        UserError: it is the value of a class.
    """
    value = options.ignore_label
    if value is None:
        return spec, list(cases)
    for raw in cases[:1]:
        keys = range(len(spec.classes)) if raw.labels is None else [key for key, _ in raw.labels.pairs]
        if value in keys:
            raise UserError(
                f"--ignore_label {value} is a label of a class too; list the classes without it in --labels"
            )
    if len(spec.classes) > IGNORED:
        raise UserError(f"--ignore_label {value}: beside it there may be {IGNORED} classes, found {len(spec.classes)}")
    return replace(spec, ignore_label=IGNORED), [replace(raw, ignore_label=value) for raw in cases]


def split_by_patient(cases: Sequence[RawCase], options: ReaderOptions, source: object) -> dict[str, list[str]]:
    """Splits the cases by patient, by the options' ratios and seed.

    Args:
        source: where the cases come from, for the error message.

    Raises:
        UserError: bad ratios or too few patients.
    """
    patients = {raw.case: raw.patient or raw.case for raw in cases}
    try:
        return split_patients(patients, options.split_ratios or DEFAULT_SPLIT_RATIOS, options.seed)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def existing(path: Path) -> Path:
    """Returns the path as its folder has it: lists and file systems differ in how they write é (composed or not)."""
    with suppress(OSError):
        if not path.exists():
            name = normalised(path.name)
            return next((other for other in path.parent.iterdir() if normalised(other.name) == name), path)
    return path


def make_case(case: str, image: Path, label: Path) -> RawCase:
    """Returns the case of an image and its mask. Raises UserError if one of the files is missing."""
    try:
        is_complete = image.exists() and label.exists()
    except OSError as error:  # a name that is too long, a folder without permission
        raise UserError(f"{case}: cannot look up {image} or its mask: {error.strerror}") from None
    if not is_complete:
        missing, present = (image, label) if not image.exists() else (label, image)
        kind = "mask" if missing is label else "image"
        beside = f" beside {present.name}" if present.exists() else ""
        raise UserError(f"{case}: its {kind} {missing} is missing{beside}; download it or remove the case")
    return RawCase(case=case, image=image, label=label)
