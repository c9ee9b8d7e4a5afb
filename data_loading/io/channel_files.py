"""nnU-Net's names: CASE_0000.nii.gz, CASE_0001.nii.gz, … are the channels of one scan, and CASE.nii.gz is its mask."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from data_loading.io.orientation import same_grid, to_grid
from data_loading.io.volume import Volume, read_channels, read_nifti

CHANNEL_NAME = re.compile(r"(.+)_(\d{4})(\.nii(?:\.gz)?)", re.IGNORECASE)


def by_case(files: Iterable[Path]) -> dict[str, dict[int, Path]]:
    """Returns the files that have such names, by case and number of the channel; of several, the first."""
    found: dict[str, dict[int, Path]] = {}
    for file in files:
        if match := CHANNEL_NAME.fullmatch(file.name):
            found.setdefault(match[1], {}).setdefault(int(match[2]), file)
    return found


def scans_of(files: Sequence[Path], channels: int) -> dict[str, list[Path]]:
    """Returns the files of each scan, channel by channel, if these are scans of that many channels; else {}.

    Cases may be numbered with four digits too: the names count only if no file is left over and every case has the
    channels from 0 on. Of several channels one such case is enough, if its first file holds a single channel, which
    makes it no scan of its own: the other cases lack files, which `check_channels` reports.
    """
    found = by_case(files)
    if not files or sum(map(len, found.values())) != len(files):
        return {}
    complete = [parts for parts in found.values() if sorted(parts) == list(range(channels))]
    if len(complete) < len(found) and not (channels > 1 and complete and _is_one_channel(complete[0][0])):
        return {}
    return {case: [parts[number] for number in sorted(parts)] for case, parts in found.items()}


def _is_one_channel(file: Path) -> bool:
    try:
        return read_channels(file) == 1
    except UserError:  # reported when the scan is read
        return True


def check_channels(files: Sequence[Path], name: str, channels: int) -> None:
    """Raises UserError unless a scan's files are its channels from 0 on, that many.

    Args:
        name: of the scan, for the error message.
    """
    found = by_case(files)[name]
    if missing := [f"{name}_{number:04d}" for number in range(channels) if number not in found]:
        present = ", ".join(file.name for file in files)
        raise UserError(
            f"{name}: lacks {' and '.join(missing)} beside {present}; the network takes {channels} channels"
        )
    if len(found) > channels:
        raise UserError(f"{name}: has {len(found)} channels, up to {files[-1].name}; the network takes {channels}")


def channels_beside(scan: Path) -> list[Path]:
    """Returns the files of a scan's folder whose names make them channels of this one; the scan alone for any other.

    Beside x_0000.nii, a file x_0000.nii.gz is another scan, and x_0001.nii comes before x_0001.nii.gz.
    """
    if not (match := CHANNEL_NAME.fullmatch(scan.name)):
        return [scan]
    others = sorted(scan.parent.iterdir(), key=lambda file: not file.name.endswith(match[3]))
    return sorted(by_case([scan, *others])[match[1]].values())


def read_channel_files(files: Sequence[Path], name: str) -> Volume:
    """Reads the channels of a scan, (C, D, H, W) float32, on the grid of the first.

    Args:
        name: of the scan, for error messages.

    Raises:
        UserError: as `read_nifti`; a file has several channels itself, or is on another grid than the first.
    """
    first = read_nifti(files[0], np.float32)
    array: NDArray[np.float32] = np.empty((len(files), *first.geometry.shape), np.float32)
    notes: list[str] = []
    for number, file in enumerate(files):
        volume = read_nifti(file, np.float32) if number else first
        if len(volume.array) != 1:
            raise UserError(f"{name}: {file} holds {len(volume.array)} channels; {file.stem[-4:]} names a single one")
        if not same_grid(first.geometry, volume.geometry):
            raise UserError(f"{name}: {file} is on another grid than {files[0].name}; resample one to the other")
        array[number] = to_grid(volume, first.geometry, name).array[0]
        notes += volume.notes
    return Volume(array, first.geometry, tuple(dict.fromkeys(notes)))
