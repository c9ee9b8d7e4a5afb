"""The log folder: an earlier run's files are kept under a number of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import UserError
from runtime.logging import log_folder
from runtime.logging.log_folder import rotate_logs


def write(folder: Path, **contents: str) -> None:
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(text)


def listing(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_rotation_keeps_every_earlier_log(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "logs"
    rotate_logs(folder)
    assert listing(folder) == {}
    for run in ("first", "second", "third"):
        rotate_logs(folder)
        write(folder, unet3d__log=run, log__jsonl=run, run__json=run)
        if run == "first":
            write(folder, evaluation__csv=run)
    assert listing(folder) == {
        "unet3d.1.log": "first",
        "log.1.jsonl": "first",
        "run.1.json": "first",
        "evaluation.1.csv": "first",
        "unet3d.2.log": "second",
        "log.2.jsonl": "second",
        "run.2.json": "second",
        "unet3d.log": "third",
        "log.jsonl": "third",
        "run.json": "third",
    }


def test_a_runs_files_keep_one_number(tmp_path: Path) -> None:
    """Each run wrote other files; a number is a run's, not a file's."""
    write(tmp_path, unet3d__log="first")
    rotate_logs(tmp_path)
    write(tmp_path, benchmark__json="second", notes__txt="mine")
    rotate_logs(tmp_path)
    write(tmp_path, unet3d__log="third", benchmark__json="third")
    rotate_logs(tmp_path)
    assert listing(tmp_path) == {
        "unet3d.1.log": "first",
        "benchmark.2.json": "second",
        "unet3d.3.log": "third",
        "benchmark.3.json": "third",
        "notes.txt": "mine",
    }


def test_a_log_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--log_dir .*file/logs: cannot be written"):
        rotate_logs(tmp_path / "file" / "logs")


def test_a_log_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_folder.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match=r"cannot be written: permission denied$"):
        rotate_logs(tmp_path)
