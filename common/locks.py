"""Locks on files: a second process that would write the same ones is refused, and a lock dies with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

POLL_S = 0.2
HELD = (errno.EACCES, errno.EAGAIN)
# Some network disks have no locks.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class LockHeld(Exception):  # noqa: N818 - no error of this process
    """Another process holds the lock; the message names it."""


class NoLocks(Exception):  # noqa: N818 - no error of this process
    """The file system has no locks, so nothing is known of other processes."""


@contextmanager
def file_lock(path: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Holds a lock on a file, which it makes, and removes at the end.

    The lock belongs to this process alone and not also to those forked from it, which may outlive it: hence `lockf`,
    not `flock`. A network disk that has locks has them between machines.

    Args:
        patience_s: how long to wait for another process.

    Raises:
        LockHeld, NoLocks: it cannot be had.
        OSError: the file cannot be made.
    """
    deadline = time.monotonic() + patience_s
    while (descriptor := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise LockHeld(_holder(path))
        time.sleep(POLL_S)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    """Returns the descriptor of the locked file; None if another process holds the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in HELD:
                return None
            path.unlink(missing_ok=True)
            if error.errno in UNSUPPORTED:
                raise NoLocks from None
            raise
        if _is_at(path, descriptor):
            with suppress(OSError):  # a full disk: the lock holds without a name
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return descriptor
        os.close(descriptor)  # its holder ended and removed it since it was opened


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8") or "another process"
    return "another process"
