"""DICOM series: finds them in a folder and reads them as a Volume. Needs `pip install '.[dicom]'`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import generate_uid

from common.errors import UserError
from common.files import files_below, normalised
from common.messages import counted, note
from data_loading.io.dicom_geometry import cosines_note, sorted_headers
from data_loading.io.dicom_headers import (
    DAMAGED,
    SEARCH_TAGS,
    Series,
    Unread,
    describe,
    instance_uid,
    not_a_slice,
    not_placed,
    object_name,
    read_header,
)
from data_loading.io.dicom_pixels import are_copies, read_pixels
from data_loading.io.file_kinds import count_kinds, is_dicom
from data_loading.io.volume import WORKING_BYTES_PER_VOXEL, Volume, check_memory

__all__ = [
    "Series",
    "choose_series",
    "fill_missing_uids",
    "find_series",
    "read_series",
    "search_folder",
    "sorted_headers",
]
# Files of these endings claim to be DICOM.
SUFFIXES = (".dcm", ".dicom", ".ima")
NOT_DICOM = "not DICOM"
EMPTY = "empty"
# Reasons of files whose series is unknown.
LOST = (DAMAGED, NOT_DICOM, EMPTY)
# The index of a DICOM medium, which describes files that are read anyway.
DIRECTORY = "Media Storage Directory"


@dataclass(frozen=True, kw_only=True)
class DicomFolder:
    """The DICOM files in a folder and its subfolders.

    Attributes:
        series: those with slices, sorted by name.
        unread: files that belong to none of them.
        others: what else the folder holds, as text; "" for nothing.
    """

    series: list[Series]
    unread: list[Unread]
    others: str

    def holds_scans(self) -> bool:
        """Returns whether there are series, or images that may be scans although they cannot be read."""
        return bool(self.series) or not all(each.is_object for each in self.unread)

    def require(self, flag: str, folder: Path) -> list[Series]:
        """Returns the series. Raises UserError, saying what the folder holds instead, if there are none."""
        if not self.series:
            found = describe(self.unread) or ("none in it" + (f"; it holds {self.others}" if self.others else ""))
            raise UserError(f"{flag} {folder}: no DICOM series of single slices ({found})")
        return self.series

    def notes(self) -> list[str]:
        """Returns a line for what is not read as slices, and one for each series with repeated slices."""
        lines = [f"not read: {describe(self.unread)}"] if self.unread else []
        return lines + [
            f"series {series.name}: {counted(series.copies, 'repeated slice')} left out"
            for series in self.series
            if series.copies
        ]


@dataclass(frozen=True, kw_only=True)
class _Slice:
    path: Path
    header: Any

    def key(self) -> tuple[str, str, str, str]:
        """Returns what slices of one series have in common: UID, number, description, and the folder without a UID."""
        uid, description = (str(self.header.get(name) or "") for name in ("SeriesInstanceUID", "SeriesDescription"))
        number = "" if self.header.get("SeriesNumber") is None else str(self.header.SeriesNumber)
        # Some anonymisers empty the UID; then series differ by folder, number and description.
        return uid, number, description, "" if uid else str(self.path.parent)


def find_series(folder: Path, flag: str = "--scan") -> list[Series]:
    """Finds the series of slices in a folder and its subfolders; skips other objects (reports, segmentations).

    Args:
        flag: the flag that gave the folder, for error messages.

    Returns:
        The series, sorted by name.

    Raises:
        UserError: there are none.
    """
    return search_folder(folder).require(flag, folder)


def search_folder(folder: Path) -> DicomFolder:
    """Finds the series of slices in a folder and its subfolders, and the files that are DICOM or claim to be, without
    being slices of a series.
    """
    groups: dict[tuple[str, str, str, str], list[_Slice]] = {}
    unplaced: list[tuple[_Slice, Unread]] = []
    unread: list[Unread] = []
    plain: list[Path] = []
    for path in files_below(folder):
        if not is_dicom(path):
            plain.append(path)
            continue
        found = _inspect(path)
        if isinstance(found, Unread):
            unread.append(found)
        elif reason := not_placed(found.header):
            unplaced.append((found, Unread(path=path, reason=reason)))
        else:
            groups.setdefault(found.key(), []).append(found)
    unread += _claiming(plain, [path.path for group in groups.values() for path in group])
    series = []
    for key, group in sorted(groups.items(), key=lambda item: item[0][1:]):
        missing = [why for slice_, why in unplaced if _is_of(slice_, group)]
        folders = {slice_.path.parent for slice_ in group}
        missing += [each for each in unread if each.reason in LOST and each.path.parent in folders]
        series.append(_make_series(key, group, missing))
    taken = {each.path for one in series for each in one.unread}
    unread = [each for each in [*unread, *(why for _, why in unplaced)] if each.path not in taken]
    unread = [each for each in unread if each.reason != DIRECTORY]
    return DicomFolder(series=_named(series), unread=unread, others=count_kinds(plain))


def _inspect(path: Path) -> _Slice | Unread:
    """Reads the header of a file that begins as DICOM: a slice with a place or without one, or why it is none."""
    try:
        header = read_header(path, SEARCH_TAGS)
    except UserError:
        return Unread(path=path, reason=DAMAGED)
    if name := object_name(header):
        return Unread(path=path, reason=name, is_object=True)
    reason = not_a_slice(header)
    return Unread(path=path, reason=reason) if reason else _Slice(path=path, header=header)


def _claiming(plain: Iterable[Path], slices: Iterable[Path]) -> list[Unread]:
    """Returns the files that are not DICOM but are named like it, or like the slices beside them (IM0007)."""
    patterns = {(path.parent, _pattern(path)) for path in slices}
    return [
        Unread(path=path, reason=NOT_DICOM if path.stat().st_size else EMPTY)
        for path in plain
        if not path.name.startswith(".")
        and (path.suffix.lower() in SUFFIXES or (path.parent, _pattern(path)) in patterns)
    ]


def _pattern(path: Path) -> str:
    return re.sub(r"\d+", "#", path.name)


def _is_of(lone: _Slice, group: Sequence[_Slice]) -> bool:
    """Returns whether an image without a place belongs to a series; screenshots in it are of another class."""
    uid, *_, folder = lone.key()
    return any(
        slice_.header.SOPClassUID == lone.header.SOPClassUID and (slice_.key()[0], slice_.key()[3]) == (uid, folder)
        for slice_ in group
    )


def _make_series(key: tuple[str, str, str, str], group: Sequence[_Slice], unread: Sequence[Unread]) -> Series:
    """Makes a series of slices, in which files of one SOP instance, place and pixels count once."""
    seen: dict[tuple[object, ...], Path] = {}
    files = []
    for slice_ in group:
        instance = instance_uid(slice_.header)
        identity = (instance or slice_.path, *slice_.header.ImagePositionPatient)
        first = seen.setdefault(identity, slice_.path)
        if first == slice_.path or not are_copies(first, slice_.path):
            files.append(slice_.path)
    uid, number, description, _ = key
    return Series(
        name=number,
        uid=uid,
        description=description,
        files=tuple(files),
        patient=str(group[0].header.get("PatientID") or "").strip(),
        unread=tuple(unread),
        copies=len(group) - len(files),
    )


def _named(found: Sequence[Series]) -> list[Series]:
    """Returns the series, called by their numbers so far, with unique names."""
    numbers = Counter(series.name for series in found)
    names = [s.name if s.name and numbers[s.name] == 1 else s.uid or s.name or "unnamed" for s in found]
    unique = [
        f"{name}_{names[:index].count(name) + 1}" if names.count(name) > 1 else name for index, name in enumerate(names)
    ]
    return [replace(series, name=name) for series, name in zip(found, unique, strict=True)]


def choose_series(found: Sequence[Series], wanted: str | None, folder: Path) -> list[Series]:
    """Returns the series that `--series` selects by number, UID or description, or all for "all".

    Raises:
        UserError: no or several matches, or no selection among several series.
    """
    if wanted == "all" or (wanted is None and len(found) == 1):
        return list(found)
    listed = "; ".join(map(str, found))
    if wanted is None:
        raise UserError(
            f"--scan {folder} holds {len(found)} series; choose one with --series, or use --series all: {listed}"
        )
    named = [series for series in found if series.name == wanted]
    matches = named or [
        series for series in found if normalised(wanted) in (series.uid, normalised(series.description))
    ]
    if len(matches) != 1:
        count = f"{len(matches) or 'no'} series"
        raise UserError(f"--series {wanted}: {count} of that number, UID or description in {folder}: {listed}")
    return matches


def read_series(series: Series) -> Volume:
    """Reads a series as a volume (1, columns, rows, slices) float32, rescaled by each slice's own slope and intercept.

    Raises:
        UserError: the slices do not form a volume (orientations or sizes differ, one is missing or duplicated), files
            that may be slices cannot be read or placed, are damaged, need more than the free memory, or no installed
            package decodes them.
    """
    headers, geometry = sorted_headers(series)
    if line := cosines_note(headers[0], f"series {series.name}"):
        note(line)
    columns, rows, slices = geometry.shape
    needed = columns * rows * slices * WORKING_BYTES_PER_VOXEL
    check_memory(f"series {series.name}: {columns} x {rows} x {slices} voxels", needed)
    array = np.empty((1, columns, rows, slices), np.float32)
    for index, header in enumerate(headers):
        array[0, :, :, index] = read_pixels(Path(header.filename), (rows, columns)).T
    return Volume(array, geometry)


def fill_missing_uids(headers: Sequence[pydicom.Dataset]) -> bool:
    """Fills in UIDs that an anonymiser emptied, in place and reproducibly.

    The UIDs of a slice are copied from its file meta information; those of study and series are generated.

    Returns:
        Whether any were missing.
    """
    filled = False
    instances = [instance_uid(header) or generate_uid(entropy_srcs=[header.filename]) for header in headers]
    generated = {
        level: generate_uid(entropy_srcs=[level, *sorted(instances)])
        for level in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
    }
    for header, instance in zip(headers, instances, strict=True):
        for keyword, value in {"SOPInstanceUID": instance, **generated}.items():
            if not header.get(keyword):
                setattr(header, keyword, value)
                filled = True
    return filled
