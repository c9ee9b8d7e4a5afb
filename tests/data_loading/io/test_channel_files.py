"""Scans under nnU-Net's names: which files belong together, and the names of their masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data_loading.io.channel_files import scans_of
from data_loading.io.scan_discovery import find_sources


def write(folder: Path, write_scan: Callable[..., None], *names: str) -> Path:
    for number, name in enumerate(names):
        write_scan(folder / name, np.full((2, 3, 4), number, np.float32))
    return folder


@pytest.mark.parametrize(
    ("names", "channels", "scans"),
    [
        ("a_0000 b_0000", 1, "a b"),
        ("a_0000 a_0001 b_0000 b_0001", 2, "a b"),
        ("case_0000 case_0001", 1, ""),  # two cases with numbers of four digits
        ("case_0007_0000 case_0008_0000", 1, "case_0007 case_0008"),
        ("a_0000 b", 1, ""),
        ("a_0000 b_0001", 1, ""),
        ("a_0000 a_0001 b_0000", 2, "a b"),  # b lacks a channel
        ("a_0000 a_0001 b", 2, ""),
        ("a_0000 b_0000", 2, ""),
        ("a_000 b_000", 1, ""),
        ("", 1, ""),
    ],
)
def test_which_names_are_channels(names: str, channels: int, scans: str) -> None:
    files = [Path(f"{name}.nii.gz") for name in names.split()]
    assert list(scans_of(files, channels)) == scans.split()


def test_a_scan_without_one_of_its_channels_is_named_and_the_others_are_read(
    tmp_path: Path, write_scan: Callable[..., None]
) -> None:
    names = [f"{case}_000{number}.nii.gz" for case in "abc" for number in (0, 1)]
    folder = write(tmp_path / "imagesTs", write_scan, *names, "d_0000.nii.gz", "e_0001.nii.gz", "f_0000.nii.gz")
    write(folder, write_scan, "f_0001.nii.gz", "f_0002.nii.gz")
    sources = find_sources(folder, tmp_path / "out", None, 2)
    assert [source.output.name for source in sources] == [f"{case}.nii.gz" for case in "abcdef"]
    assert all(len(source.read(2).array) == 2 for source in sources[:3])
    lacks = r"lacks {} beside {}\.nii\.gz; the network takes 2 channels$"
    errors = [
        "^d: " + lacks.format("d_0001", "d_0000"),
        "^e: " + lacks.format("e_0000", "e_0001"),
        r"^f: has 3 channels, up to f_0002\.nii\.gz; the network takes 2$",
    ]
    for source, message in zip(sources[3:], errors, strict=True):
        with pytest.raises(UserError, match=message):
            source.read(2)


def test_files_that_hold_all_channels_are_scans_of_their_own_beside_one_that_looks_complete(
    tmp_path: Path, write_scan: Callable[..., None]
) -> None:
    names = ["a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz"]
    for name in names:
        write_scan(tmp_path / "scans" / name, np.zeros((2, 3, 4, 2), np.float32))
    sources = find_sources(tmp_path / "scans", tmp_path / "out", None, 2)
    assert [source.output.name for source in sources] == names
    assert all(len(source.read(2).array) == 2 for source in sources)


def test_masks_lose_the_number_of_the_channel(tmp_path: Path, write_scan: Callable[..., None]) -> None:
    folder = write(tmp_path / "imagesTs", write_scan, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii", "b_0001.nii")
    sources = find_sources(folder, tmp_path / "out", None, 2)
    assert [source.output for source in sources] == [tmp_path / "out/a.nii.gz", tmp_path / "out/b.nii"]
    assert [source.name for source in sources] == ["a", "b"]
    assert [source.read(2).array[:, 0, 0, 0].tolist() for source in sources] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("named", ["a_0000.nii", "a_0000.nii.gz"])
def test_the_named_file_is_predicted_also_beside_one_with_another_ending(
    named: str, tmp_path: Path, write_scan: Callable[..., None]
) -> None:
    names = ["a_0000.nii", "a_0000.nii.gz", "a_0001.nii", "a_0001.nii.gz"]
    folder = write(tmp_path / "one", write_scan, *names[:2])
    (source,) = find_sources(folder / named, tmp_path / "out.nii.gz", None, 1)
    assert source.read(1).array[0, 0, 0, 0] == names.index(named)
    folder = write(tmp_path / "two", write_scan, *names)
    (source,) = find_sources(folder / named, tmp_path / "out.nii.gz", None, 2)
    assert source.read(2).array[:, 0, 0, 0].tolist() == [names.index(named), names.index(named) + 2]


def test_a_single_file_brings_its_other_channels(tmp_path: Path, write_scan: Callable[..., None]) -> None:
    folder = write(tmp_path / "imagesTs", write_scan, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz")
    (source,) = find_sources(folder / "a_0000.nii.gz", tmp_path / "mask.nii.gz", None, 2)
    assert (source.name, source.output) == ("a", tmp_path / "mask.nii.gz")
    assert source.read(2).array.shape == (2, 2, 3, 4)
    (source,) = find_sources(folder / "b_0000.nii.gz", tmp_path / "out", None, 1)
    assert source.output == tmp_path / "out" / "b.nii.gz"
    (source,) = find_sources(folder / "a_0000.nii.gz", tmp_path / "out", None, 1)  # one of several numbered cases
    assert source.output == tmp_path / "out" / "a_0000.nii.gz"
    assert source.read(1).array.shape == (1, 2, 3, 4)


def test_a_mask_never_replaces_a_channel(tmp_path: Path, write_scan: Callable[..., None]) -> None:
    folder = write(tmp_path, write_scan, "a_0000.nii.gz", "a_0001.nii.gz")
    with pytest.raises(UserError, match="choose another folder"):
        find_sources(folder / "a_0000.nii.gz", folder / "a_0001.nii.gz", None, 2)
