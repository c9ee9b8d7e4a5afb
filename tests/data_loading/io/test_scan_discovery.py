"""Scans that `--scan` names, and the masks' paths that follow from `--output`."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from data_loading.io.scan_discovery import find_sources


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_masks_of_a_folder_are_named_after_its_scans(tmp_path: Path) -> None:
    scans = touch(tmp_path / "in", "b.nii.gz", "a.nii", "notes.txt", ".hidden.nii")
    sources = find_sources(scans, tmp_path / "out", None)
    assert [source.name for source in sources] == ["a", "b"]
    assert [source.output for source in sources] == [tmp_path / "out" / name for name in ("a.nii", "b.nii.gz")]


def test_a_mask_goes_to_a_file_or_into_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz")
    for output, expected in (("m.nii", "m.nii"), ("out", "out/a.nii.gz")):
        (source,) = find_sources(tmp_path / "a.nii.gz", tmp_path / output, None)
        assert source.output == tmp_path / expected


@pytest.mark.parametrize(
    ("scan", "output", "series", "message"),
    [
        ("none", "out", None, "no such file or folder"),
        ("in/notes.txt", "out", None, r"expected a \.nii or \.nii\.gz file"),
        ("in", "in", None, "is a scan or another scan's mask"),
        ("in", "mask.nii.gz", None, "is a file, but .* holds 2 scans"),
        ("in/a.nii", "mask.dcm", None, "DICOM-SEG refers to DICOM slices"),
        ("in/a.nii", "in/a.nii", None, "is a scan or another scan's mask"),
        ("in", "out", "4", "--series 4 applies only to DICOM, but .* contains NIfTI"),
        ("in/a.nii", "mask.png", None, "an image has one slice"),
        ("picture.png", "mask.dcm", None, "but .* contains 2-D images; write .png"),
        ("picture.png", "out", "4", "--series 4 applies only to DICOM, but .* contains 2-D images"),
    ],
)
def test_contradictory_arguments_are_refused(
    tmp_path: Path, scan: str, output: str, series: str | None, message: str
) -> None:
    touch(tmp_path / "in", "a.nii", "b.nii.gz", "notes.txt")
    touch(tmp_path, "picture.png")
    with pytest.raises(UserError, match=message):
        find_sources(tmp_path / scan, tmp_path / output, series)
