"""A lock excludes other processes, dies with its own, and is not held by forked ones."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.locks import LockHeld, NoLocks, file_lock

ROOT = Path(__file__).resolve().parents[2]
# Takes the lock, says so, and holds it until stdin is closed; with "fork" a child of its own lives on.
HOLD = """
import os, sys
from pathlib import Path
from common.locks import file_lock
with file_lock(Path(sys.argv[1])):
    if sys.argv[2:] == ["fork"] and os.fork() == 0:
        os.close(1)
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(path), *options]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_lock_held_elsewhere_names_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held_elsewhere(path) as other:
        with pytest.raises(LockHeld, match=f"^process {other.pid} on {socket.gethostname()}$"), file_lock(path):
            pass
        assert path.exists()
        with file_lock(tmp_path / "another"):
            pass


def test_a_lock_dies_with_its_process_though_a_child_lives(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held_elsewhere(path, "fork") as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        with file_lock(path):
            assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held_elsewhere(path) as other:
        timer = threading.Timer(0.1, other.kill)
        timer.start()
        with file_lock(path, patience_s=60):
            assert path.exists()
        timer.join()


def test_a_released_lock_leaves_no_file_and_can_be_had_again(tmp_path: Path) -> None:
    for _ in range(2):
        with file_lock(tmp_path / "lock"):
            pass
        assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_while_it_was_opened_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lockf, removed = tmp_path / "lock", fcntl.lockf, []

    def after_its_holder_ended(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(path.unlink())
        lockf(descriptor, operation)

    monkeypatch.setattr(fcntl, "lockf", after_its_holder_ended)
    with file_lock(path):
        assert path.read_text().startswith("process")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(NoLocks), file_lock(tmp_path / "lock"):
        pass
    assert list(tmp_path.iterdir()) == []
