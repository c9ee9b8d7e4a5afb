"""`--dataset nifti`: two folders of scans and masks with equal stems. Also the scan cases that `dicom` uses.

    preprocess_dataset.py --dataset nifti --data_dir SCANS --labels_dir MASKS --results_dir OUT

The mask of a scan is `MASKS/STEM.nii.gz`, or a folder `MASKS/STEM/` with one file per structure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from common import registry
from common.errors import UserError
from common.messages import counted
from data_loading.io.file_kinds import is_nifti, passed_over
from data_loading.io.mask_values import check_not_interpolated, merged
from data_loading.io.scan_discovery import DICOM
from data_loading.io.volume import Volume, read_channels, read_geometry, read_nifti
from data_loading.readers.base import RawCase, RawDataset, ReaderOptions, apply_options, ignore_voxels, split_by_patient
from data_loading.readers.label_map import LabelMap
from data_loading.readers.mask_matching import (
    check_labels_dir,
    find_mask_values,
    find_names,
    nifti_files,
    pair_by_stem,
    read_classes,
)
from data_loading.spec import DatasetSpec


@dataclass(frozen=True, kw_only=True)
class ScanCase(RawCase):
    """A NIfTI scan or DICOM series with its masks, whole or a slab of it.

    Attributes:
        masks: files of the mask; `label` is the first.
        series: a `dicom.Series`; None for a NIfTI scan.
        slices: number of slices of the scan, along its third axis as stored.
        slab: (first slice, number of slices) of the case; None for the whole scan.
    """

    masks: tuple[Path, ...]
    slices: int
    series: Any = None
    slab: tuple[int, int] | None = None

    def is_whole(self) -> bool:
        return self.slab is None

    def files(self) -> list[list[Path]]:
        return [list(self.series.files) if self.series else [self.image], list(self.masks)]

    def settings(self) -> str:
        by_size = self.labels is not None and self.labels.by_size and self.labels.has_names()
        return (
            super().settings() + " by size" * by_size + (f" slab {self.slab}, scaled as the scan" if self.slab else "")
        )

    def read(self) -> tuple[Volume, Volume]:
        """Reads the case as `RawCase.read` does; the origin of a slab is at its first slice."""
        if self.slab is None:
            return _read_scan(self)
        first, count = self.slab
        image, label = _read_scan_once(replace(self, case=self.case.rpartition("_slab")[0], slab=None))
        d, h, _ = image.geometry.shape
        geometry = image.geometry.cropped((0, 0, first), (d, h, count))
        slices = slice(first, first + count)
        part = Volume(image.array[..., slices], geometry, image.notes * (first == 0), whole=image.array)
        return part, Volume(label.array[..., slices], geometry, label.notes)


def _read_scan(scan: ScanCase) -> tuple[Volume, Volume]:
    if scan.series:
        image = registry.load(f"{DICOM}:read_series", "--dataset dicom", "dicom")(scan.series)
    else:
        image = read_nifti(scan.image, np.float32)
    assert scan.labels is not None
    labels = scan.labels if scan.ignore_label is None else scan.labels.with_ignored(scan.ignore_label)
    return image, read_classes(scan.masks, image.geometry, labels, scan.case)


# The slabs of a scan are read one after another.
_read_scan_once = lru_cache(maxsize=1)(_read_scan)


def read_nifti_folders(data_dir: Path, options: ReaderOptions) -> RawDataset:
    """Finds scans and masks, NIfTI files with equal stems; a 4-D scan has its channels last. Each scan is a patient.

    Raises:
        UserError: a scan without its mask or a mask without its scan, or a bad option.
    """
    masks_dir = check_labels_dir(options.labels_dir, data_dir, "nifti")
    scans = [path for path in sorted(data_dir.iterdir()) if is_nifti(path) and path.is_file()]
    found = [path for path in sorted(masks_dir.iterdir()) if (nifti_files(path) if path.is_dir() else is_nifti(path))]
    pairs = pair_by_stem(scans, found, data_dir=data_dir, labels_dir=masks_dir, kind="scan")
    cases = []
    for case, scan, mask in pairs:
        masks = tuple(nifti_files(mask)) if mask.is_dir() else (mask,)
        cases.append(ScanCase(case=case, image=scan, label=masks[0], masks=masks, slices=read_geometry(scan).shape[2]))
    raw = make_scan_dataset(
        cases,
        options,
        data_dir=data_dir,
        masks_dir=masks_dir,
        channels=_channels_of(cases),
        drops_empty=options.slices_per_case is not None,
    )
    notes = [
        passed_over(data_dir, [*scans, masks_dir], f"--data_dir {data_dir}: passed over "),
        passed_over(masks_dir, [*found, data_dir], f"--labels_dir {masks_dir}: passed over "),
    ]
    return replace(raw, notes=[*filter(None, notes), *raw.notes])


def _channels_of(cases: Sequence[ScanCase]) -> int:
    """Returns the number of channels, from the headers. Raises UserError, naming the odd ones, if scans differ."""
    channels = {scan.image.name: read_channels(scan.image) for scan in cases}
    counts = Counter(channels.values())
    ((common, number), *others) = counts.most_common()
    if others:
        odd = [f"{name} has {counted(count, 'channel')}" for name, count in channels.items() if count != common]
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise UserError(
            f"{odd[0]}{more}, {counted(number, 'other scan')} {'has' if number == 1 else 'have'} {common}; "
            "all scans need the same channels: remove the odd ones or export them again"
        )
    return common


def make_scan_dataset(
    cases: Sequence[ScanCase],
    options: ReaderOptions,
    *,
    data_dir: Path,
    masks_dir: Path,
    channels: int,
    drops_empty: bool,
) -> RawDataset:
    """Makes a data set of scans with their masks: selects classes, divides scans into slabs, splits the cases.

    Args:
        drops_empty: the default of `--drop_empty`.

    Raises:
        UserError: a bad option.
    """
    labels = _select_labels(cases, options, f"--labels_dir {masks_dir}")
    spec = DatasetSpec(name=data_dir.resolve().name.lower(), classes=labels.classes, channels=channels)
    spec, cases = ignore_voxels(spec, [replace(scan, labels=labels) for scan in cases], options)
    notes = []
    if options.slices_per_case is not None:
        cases, note = divide_into_slabs(cases, options.slices_per_case)
        notes.append(note)
    return RawDataset(
        spec=apply_options(spec, options),
        cases=cases,
        split=split_by_patient(cases, options, spec.name),
        drop_empty=drops_empty if options.drop_empty is None else options.drop_empty,
        notes=notes,
    )


def _select_labels(cases: Sequence[ScanCase], options: ReaderOptions, source: str) -> LabelMap:
    """Returns the classes that `--labels` lists, or else one for each value or name in the masks."""
    if options.labels:
        labels = LabelMap.parse(options.labels)
        if labels.has_names():
            labels.check_names(set().union(*(find_names(scan.masks) for scan in cases)), source)
    # Several files per scan mean one file per structure, also for a scan that has only one.
    elif any(len(scan.masks) > 1 for scan in cases):
        labels = LabelMap.from_keys(set().union(*(find_names(scan.masks) for scan in cases)), source)
    else:
        found = [find_mask_values(scan.masks, options.ignore_label) for scan in cases]
        values = merged(each for _, each in found)
        labels = LabelMap.from_keys({*values, *(name for names, _ in found for name in names)}, source)
        check_not_interpolated(values, source)
    if options.ignore_label is not None and labels.has_names():
        raise UserError(
            f"--ignore_label {options.ignore_label} is a value of masks, but {source} has a mask for each structure, "
            "which has no such value"
        )
    return labels


def divide_into_slabs(cases: Sequence[ScanCase], size: int) -> tuple[list[ScanCase], str]:
    """Divides scans into cases of `size` consecutive slices each, which belong to one patient.

    Returns:
        The cases, and a message that counts them and the slices left over.

    Raises:
        UserError: no scan has that many slices.
    """
    if size < 1:
        raise UserError(f"--slices_per_case {size}: must be at least 1")
    slabs = [
        replace(scan, case=f"{scan.case}_slab{index:03d}", patient=scan.patient or scan.case, slab=(index * size, size))
        for scan in cases
        for index in range(scan.slices // size)
    ]
    if not slabs:
        longest = max(scan.slices for scan in cases)
        raise UserError(f"--slices_per_case {size}: no scan is that long; the longest has {longest} slices")
    note = f"{counted(len(slabs), 'slab')} of {counted(size, 'slice')}"
    if remainders := [scan.slices % size for scan in cases if scan.slices % size]:
        note += f"; {counted(sum(remainders), 'slice')} at the ends of {counted(len(remainders), 'scan')} dropped"
    return slabs, note
