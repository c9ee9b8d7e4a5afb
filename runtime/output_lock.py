"""Keeps two training runs out of each other's files: a lock on the log folder and one on the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from common.errors import UserError
from common.locks import LockHeld, NoLocks, file_lock
from common.messages import logger, note
from runtime.distributed.world import World

# Time that a resumed run gives the one before it: that may still save, or a network disk may still hold the lock of a
# machine that is lost (90 s with NFS 4).
PATIENCE_S = 120.0
LOG_LOCK = ".unet3d.lock"


@contextmanager
def outputs_locked(log_dir: Path, checkpoint: Path | None, world: World, *, patience_s: float = 0.0) -> Iterator[None]:
    """Keeps the folder of logs and the file of checkpoints to this run; every rank must call it, rank 0 locks.

    Args:
        checkpoint: None if the run keeps none.
        patience_s: how long to wait for another run to end.

    Raises:
        UserError: on every rank, if another run writes there, or if a folder cannot be written.
    """
    with ExitStack() as held:
        problem: UserError | None = None
        if world.is_main:
            try:
                what = f"--log_dir {log_dir}"
                held.enter_context(locked(log_dir / LOG_LOCK, what, "cannot be written", patience_s))
                if checkpoint is not None:
                    path, what = checkpoint.with_name(f".{checkpoint.name}.lock"), f"--save_ckpt_path {checkpoint}"
                    held.enter_context(locked(path, what, "its folder cannot be written", patience_s))
            except UserError as error:
                problem = error
        if problem := world.broadcast(problem):
            raise problem
        yield


def locked(path: Path, what: str, unwritable: str, patience_s: float = 0.0) -> AbstractContextManager[object]:
    """Locks a file, whose folder it makes, and returns the context at whose end it is released.

    Args:
        what: the folder or file that is locked with it, with its flag if it has one, for messages.
        unwritable: what a message says of a folder that cannot be written.
        patience_s: how long to wait for another process.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(file_lock(path))
            except LockHeld as other:
                if not patience_s:
                    raise
                logger.warning(f"{what} is in use by {other}; waiting at most {patience_s:g} s for it to end")
                held.enter_context(file_lock(path, patience_s))
        except LockHeld as other:
            raise UserError(f"{what} is in use by another run, {other}; wait for its end, or name another") from None
        except NoLocks:
            note(f"{what}: this file system has no locks, so a second run that writes there would not be noticed")
        except OSError as error:
            raise UserError(f"{what}: {unwritable}: {error.strerror or error}") from None
        return held.pop_all()
