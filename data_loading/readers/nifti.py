"""`--dataset nifti`: two folders of scans and masks with equal stems; and what every data set of scans shares with it.

    preprocess_dataset.py --dataset nifti --data_dir SCANS --labels_dir MASKS --results_dir OUT

A scan's mask is `MASKS/STEM.nii.gz`, or a folder `MASKS/STEM/` with a file for each organ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from common import registry
from common.errors import UserError
from data_loading.dataset import is_safe_case_id
from data_loading.io.scan_discovery import DICOM, stem
from data_loading.io.volume import Volume, read_channels, read_geometry, read_nifti
from data_loading.readers.base import OWN_SPLIT, RawCase, RawDataset, VolumeFlags, split_of, with_flags
from data_loading.readers.labels import LabelMap
from data_loading.readers.mask_matching import is_nifti, keys_in, nifti_files, read_classes
from data_loading.spec import DatasetSpec


@dataclass(frozen=True)
class ScanCase(RawCase):
    """A scan and its masks.

    Attributes:
        masks: the files of its mask; `label` is the first.
        series: a `dicom.Series`, None for a NIfTI scan.
        slices: of the scan, along the slice axis: the third one as stored.
        slab: (first slice, their number) of the part that is the case, None for all.
    """

    masks: tuple[Path, ...] = ()
    series: Any = None
    slices: int = 0
    slab: tuple[int, int] | None = None

    def files(self) -> list[list[Path]]:
        return [list(self.series.files) if self.series else [self.image], list(self.masks)]

    def options(self) -> str:
        return super().options() + (f" slab {self.slab}" if self.slab else "")

    def read(self) -> tuple[Volume, Volume]:
        """As `RawCase.read`; of a slab its own slices, with the origin moved to its first."""
        if self.slab is None:
            return _read(self)
        first, number = self.slab
        image, label = _read_once(replace(self, case=self.case.rpartition("_slab")[0], slab=None))
        d, h, _ = image.geometry.shape
        part = image.geometry.part((0, 0, first), (d, h, number))
        return Volume(image.array[..., first : first + number], part), Volume(
            label.array[..., first : first + number], part
        )


def _read(scan: ScanCase) -> tuple[Volume, Volume]:
    if scan.series:
        image = registry.load(f"{DICOM}:read_series", "--dataset dicom", "dicom")(scan.series)
    else:
        image = read_nifti(scan.image, np.float32)
    assert scan.labels is not None
    return image, read_classes(scan.masks, image.geometry, scan.labels, scan.case)


# The slabs of a scan follow one another.
_read_once = lru_cache(maxsize=1)(_read)


def read_folders(
    data_dir: Path,
    evaluation_ids: Sequence[str],
    seed: int,
    *,
    labels_dir: Path | None = None,
    labels: Sequence[str] = (),
    slab: int | None = None,
    split: Sequence[float] = OWN_SPLIT,
    drop_empty: bool | None = None,
    **volumes: Unpack[VolumeFlags],
) -> RawDataset:
    """Scans and masks as NIfTI files with equal stems; a 4-D scan has its channels last. A file is a patient.

    Raises:
        UserError: a scan without its mask or the other way round, or another data set's folder.
    """
    masks_dir = folder_of_masks(labels_dir, data_dir, "nifti")
    files_here = [(stem(path), path) for path in sorted(data_dir.iterdir()) if is_nifti(path)]
    scans = by_stem(files_here, f"--data_dir {data_dir}")
    found = [path for path in sorted(masks_dir.iterdir()) if is_nifti(path) or (path.is_dir() and nifti_files(path))]
    masks = by_stem(((path.name if path.is_dir() else stem(path), path) for path in found), f"--labels_dir {masks_dir}")
    check_paired(scans, masks, data_dir, masks_dir, "scan")
    cases = []
    for name, path in scans.items():
        files = tuple(nifti_files(masks[name])) if masks[name].is_dir() else (masks[name],)
        cases.append(ScanCase(name, path, files[0], masks=files, slices=read_geometry(path).shape[2]))
    spec = DatasetSpec(data_dir.resolve().name.lower(), (), read_channels(cases[0].image))
    return make_dataset(
        spec,
        cases,
        seed,
        labels,
        slab,
        split,
        bool(slab) if drop_empty is None else drop_empty,
        f"--labels_dir {masks_dir}",
        [],
        **volumes,
    )


def folder_of_masks(labels_dir: Path | None, data_dir: Path, dataset: str) -> Path:
    """`--labels_dir`. Raises UserError where it is not given, no folder, or the scans' own."""
    if labels_dir is None:
        raise UserError(f"--dataset {dataset} needs --labels_dir, the folder of the masks")
    if not labels_dir.is_dir():
        raise UserError(f"--labels_dir {labels_dir}: no such folder")
    if labels_dir.samefile(data_dir):
        raise UserError(f"--labels_dir {labels_dir} is --data_dir; masks need a folder of their own")
    return labels_dir


def by_stem(paths: Iterable[tuple[str, Path]], where: str) -> dict[str, Path]:
    """Files and folders by their stems. Raises UserError where two have one, or one cannot name a case."""
    found: dict[str, Path] = {}
    for name, path in paths:
        if not is_safe_case_id(name):
            raise UserError(f"{where}: {path.name} cannot name a case")
        if name in found:
            raise UserError(f"{where}: {found[name].name} and {path.name} have one stem")
        found[name] = path
    return found


def check_paired(scans: dict[str, Path], masks: dict[str, Path], data_dir: Path, labels_dir: Path, what: str) -> None:
    """Raises UserError where one is missing: it names the first and counts them."""
    if not scans:
        raise UserError(f"--data_dir {data_dir}: no {what} in it")
    for these, those, kind, place in (
        (scans, masks, "mask", f"--labels_dir {labels_dir}"),
        (masks, scans, what, f"--data_dir {data_dir}"),
    ):
        if missing := sorted(set(these) - set(those)):
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(f"{place}: no {kind} {missing[0]} for {these[missing[0]].name}{more}; stems must be equal")


def make_dataset(
    spec: DatasetSpec,
    cases: Sequence[ScanCase],
    seed: int,
    labels: Sequence[str],
    slab: int | None,
    split: Sequence[float],
    drop_empty: bool,
    where: str,
    notes: list[str],
    **volumes: Unpack[VolumeFlags],
) -> RawDataset:
    """What all data sets of scans do with what they found: classes, slabs, split.

    Args:
        where: the masks are from, for messages.
    """
    # Several files of one scan can only be organs; a single one then is an organ's too.
    by_name = any(len(scan.masks) > 1 for scan in cases)
    chosen = LabelMap.parse(labels) if labels else None
    names_wanted = chosen is not None and any(isinstance(key, str) for key, _ in chosen.pairs)
    if chosen is None or names_wanted:
        keys = set().union(*(keys_in(scan.masks, by_name or names_wanted) for scan in cases))
        if chosen:
            chosen.check_covers(keys, where)
        chosen = chosen or LabelMap.of_found(keys, where)
    cases = [replace(scan, labels=chosen) for scan in cases]
    if slab is not None:
        cases, told = cut_into_slabs(cases, slab)
        notes = [*notes, told]
    spec = with_flags(replace(spec, classes=chosen.classes), **volumes)
    return RawDataset(spec, list(cases), split_of(cases, split, seed, spec.name), drop_empty, notes)


def cut_into_slabs(cases: Sequence[ScanCase], size: int) -> tuple[list[ScanCase], str]:
    """Groups of `size` slices, each a case of its scan's patient, and a line that counts what is left over.

    Raises:
        UserError: no scan has so many slices.
    """
    if size < 1:
        raise UserError(f"--slab {size}: must be at least 1 slice")
    slabs = [
        replace(scan, case=f"{scan.case}_slab{index:03d}", patient=scan.patient or scan.case, slab=(index * size, size))
        for scan in cases
        for index in range(scan.slices // size)
    ]
    if not slabs:
        raise UserError(f"--slab {size}: no scan has so many slices; the longest has {max(s.slices for s in cases)}")
    left = [scan.slices % size for scan in cases if scan.slices % size]
    told = (
        f"; {sum(left)} slices at the ends of {len(left)} scan(s) are too few for another and dropped" if left else ""
    )
    return slabs, f"{len(slabs)} slabs of {size} slices{told}"
