"""Kinds of files, by their names and first bytes, and the count of what a folder holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_loading.io.file_kinds import count_kinds, is_dicom, is_file_name, is_nifti, kits19_file, passed_over, stem


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"\0" * 128 + b"DICM", True),
        (b"\x08\0\x05\0CS" + b" " * 200, True),  # explicit type
        (b"\x08\0\x05\0\x0a\0\0\0" + b" " * 200, True),  # implicit type, length 10
        (b"\x08\0\x05\0CS", False),  # too short for any image
        (b"\x08\0\x05\0\xff\0\0\0" + b" " * 200, False),
        (b"\x10\0\x05\0CS" + b" " * 200, False),
        (b"<html>" * 40, False),
        (b"", False),
    ],
)
def test_dicom_is_recognised_by_its_first_bytes(tmp_path: Path, start: bytes, expected: bool) -> None:
    (tmp_path / "a").write_bytes(start)
    assert is_dicom(tmp_path / "a") == expected
    assert not is_dicom(tmp_path / "none")


def test_names_count_in_any_case_and_hidden_ones_do_not(tmp_path: Path) -> None:
    assert [is_nifti(Path(name)) for name in ("A.NII.GZ", "a.nii", "._a.nii", "a.nii.gz.txt")] == [
        True,
        True,
        False,
        False,
    ]
    assert [stem(Path(name)) for name in ("a.b.NII.GZ", "a.JPEG", "a.b")] == ["a.b", "a", "a.b"]
    assert is_file_name(Path("M.DCM"))
    (tmp_path / "M.DCM").mkdir()
    assert not is_file_name(tmp_path / "M.DCM")


def test_others_are_counted_by_ending_or_by_name(tmp_path: Path) -> None:
    names = ("IM0001", "IM0002", "1.2.840.1", "1.2.841.2", "a.tar.gz", "b.v2.mha", ".hidden")
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "below.nii").mkdir()
    expected = "2 #.#.#.#, 2 IM#, 1 .tar.gz, 1 .mha, 1 folder"
    assert count_kinds(sorted(tmp_path.iterdir())) == expected
    assert passed_over(tmp_path, [], "left: ") == f"left: 7 others ({expected})"
    assert passed_over(tmp_path, tmp_path.iterdir(), "left: ") == ""


def test_a_packed_file_of_kits19_is_preferred(tmp_path: Path) -> None:
    assert kits19_file(tmp_path, "imaging").name == "imaging.nii.gz"
    (tmp_path / "imaging.nii").touch()
    assert kits19_file(tmp_path, "imaging").name == "imaging.nii"
    (tmp_path / "imaging.nii.gz").touch()
    assert kits19_file(tmp_path, "imaging").name == "imaging.nii.gz"
