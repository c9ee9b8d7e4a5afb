"""A file is replaced whole or not at all; files are found behind links too."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.files import files_below, replacing


def test_the_new_file_takes_the_old_one_s_place(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent, "a rename is atomic within a file system only"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_below_links_are_found_and_a_loop_is_walked_once(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    for path in (elsewhere / "P1" / "a.nii", folder / "P2" / "b.nii"):
        path.parent.mkdir(parents=True)
        path.write_text("")
    (folder / "P1").symlink_to(elsewhere / "P1")
    (folder / "P2" / "loop").symlink_to(folder)
    (folder / "gone.nii").symlink_to(tmp_path / "none")
    assert files_below(folder) == [folder / "P1" / "a.nii", folder / "P2" / "b.nii"]
