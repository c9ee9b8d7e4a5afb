"""Two runs never write into one folder: the second is refused, on every rank, and without locks that is noted."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from runtime.distributed.world import World
from runtime.output_lock import LOG_LOCK, outputs_locked
from tests.common.test_locks import held_elsewhere

ALONE = World(0, 1, torch.device("cpu"))


def test_a_second_run_into_a_log_folder_is_refused(tmp_path: Path) -> None:
    with (
        held_elsewhere(tmp_path / LOG_LOCK) as other,
        pytest.raises(UserError, match=rf"^--log_dir {tmp_path} is in use by another run, process {other.pid} on "),
        outputs_locked(tmp_path, None, ALONE),
    ):
        pass


def test_a_second_run_with_the_same_checkpoint_is_refused(tmp_path: Path) -> None:
    logs, path = tmp_path / "logs", tmp_path / "checkpoints" / "c.pth"
    path.parent.mkdir()
    with held_elsewhere(path.with_name(".c.pth.lock")):
        with (
            pytest.raises(UserError, match=rf"^--save_ckpt_path {path} is in use by another run, process"),
            outputs_locked(logs, path, ALONE),
        ):
            pass
        assert list(logs.iterdir()) == []  # that lock has been released
        with outputs_locked(logs, path.with_name("d.pth"), ALONE):
            pass


def test_a_resumed_run_waits_for_the_one_before_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held_elsewhere(tmp_path / LOG_LOCK) as other:
        timer = threading.Timer(0.1, other.kill)
        timer.start()
        with outputs_locked(tmp_path, tmp_path / "checkpoint.pth", ALONE, patience_s=60):
            pass
        timer.join()
    expected = f"warning: --log_dir {tmp_path} is in use by process {other.pid} on "
    assert capsys.readouterr().err.startswith(expected)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with outputs_locked(tmp_path, None, ALONE):
        pass
    assert capsys.readouterr().err == (
        f"note: --log_dir {tmp_path}: this file system has no locks, so a second run that writes there would not be "
        "noticed\n"
    )


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for logs, checkpoint, problem in (
        (tmp_path / "file" / "logs", None, r"^--log_dir .*file/logs: cannot be written: Not a directory$"),
        (tmp_path, tmp_path / "file" / "c.pth", r"^--save_ckpt_path .*c.pth: its folder cannot be written: "),
    ):
        with pytest.raises(UserError, match=problem), outputs_locked(logs, checkpoint, ALONE):
            pass
