"""When a run saves a checkpoint, and how: from a copy of the state, in a thread, while training continues.

The newest checkpoint is at the path itself; those before it are beside it, named by their step (the optimizer steps of
the run so far): `checkpoint_000123.pth`.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import DIVERGED_EXIT, UserError
from common.files import replacing
from common.messages import logger
from runtime.checkpoint.format import read_step, write_archive
from runtime.distributed.world import World
from runtime.train_state import Stop, TrainState

# Time that the other ranks wait for rank 0's last checkpoint; launchers kill a job sooner.
PATIENCE_S = 300.0


class CheckpointWriter:
    """Saves the run's state; exists on every rank, rank 0 writes the file.

    A failed save (such as a full disk) is a warning during the run and a UserError at its end.

    Args:
        world: all ranks of the run.
        snapshot: returns a checkpoint's content, given the state and the loss sum of each rank.
        write: writes this content to the disk; None: the run keeps no checkpoints, and every method does nothing.
        minutes: interval between two saves; 0: not by time.
        epochs: interval between two saves; 0: not by epoch.
    """

    def __init__(
        self,
        *,
        world: World,
        snapshot: Callable[[TrainState, list[float]], dict[str, Any]],
        write: Callable[[dict[str, Any]], None] | None,
        minutes: float = 0.0,
        epochs: int = 0,
    ) -> None:
        self._world = world
        self._snapshot = snapshot
        self._write = write
        self._minutes = minutes if write else 0.0
        self._epochs = epochs if write else 0
        self._thread: threading.Thread | None = None
        self._last_save_s = time.monotonic()

    def is_due(self) -> bool:
        """Whether to save at the end of the next step, by rank 0's clock: always False on the other ranks.

        The ranks agree through `StepSync`. Nothing is due while the previous checkpoint is still being written.
        """
        waited_s = time.monotonic() - self._last_save_s
        is_writing = self._thread is not None and self._thread.is_alive()
        return self._world.is_main and 0 < self._minutes <= waited_s / 60 and not is_writing

    def is_due_after_epoch(self, epoch: int) -> bool:
        """Whether to save after this epoch (counted from 1); the same on every rank."""
        return self._epochs > 0 and epoch % self._epochs == 0

    def save(self, state: TrainState) -> None:
        """Copies the state and starts writing it. Every rank must call it at the same step.

        Waits first for the previous write if the disk is slower than the interval. A state with a loss or gradient that
        is not finite is not saved.
        """
        content = self._copy(state)
        if content is not None:
            self._join()
            self._thread = threading.Thread(target=self._write_or_warn, args=(content,), name="checkpoint")
            self._thread.start()
        self._last_save_s = time.monotonic()

    def finish(self, state: TrainState, stop: Stop) -> None:
        """Saves the last state of the run, unless it diverged: then the last good checkpoint remains.

        Every rank must call it, and waits until rank 0 has written: a launcher kills all ranks as soon as one exits
        with a status other than 0.

        Raises:
            UserError: the disk is full, or the folder is gone.
        """
        if self._write is None:
            return
        self._join()
        content = None if stop.exit_status == DIVERGED_EXIT else self._copy(state)
        if content is not None:
            try:
                self._write(content)
            except OSError as error:
                raise UserError(f"{_problem(error)}; the end of this run is lost") from None
        self._world.wait_for_main("saved", PATIENCE_S)

    def _copy(self, state: TrainState) -> dict[str, Any] | None:
        """A copy of the state on rank 0; None on the other ranks, without checkpoints, and for a damaged state.

        Reading the losses and the gradient norm is a host sync, which only steps with a checkpoint pay for. It detects
        what `StepSync` may still have under way: a last step that damaged the weights.
        """
        if self._write is None:
            return None
        sums = [0.0] * self._world.size
        if state.batch and state.loss_sum is not None:  # the same on all ranks; None during an evaluation
            sums = self._world.gather(state.loss_sum.item())
        norm = 0.0 if state.gradient_norm is None or state.scaler.is_enabled() else state.gradient_norm.item()
        if not self._world.is_main or not all(map(math.isfinite, [*sums, norm])):
            return None
        return self._snapshot(state, sums)

    def _write_or_warn(self, content: dict[str, Any]) -> None:
        assert self._write is not None
        try:
            self._write(content)
        except OSError as error:
            logger.warning(f"{_problem(error)}, training goes on")

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()


def _problem(error: OSError) -> str:
    return f"the checkpoint could not be saved ({error.strerror or error}); the last good one is untouched"


def prepare(path: Path) -> None:
    """Makes the checkpoint's folder before the run, so that a path that cannot be written is found at once.

    Removes the temporary files of a run that was killed while saving.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in path.parent.iterdir():
            if file.name.startswith(f".{path.name}.") and file.suffix == ".tmp":
                file.unlink(missing_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--save_ckpt_path {path}: its folder cannot be written: {error.strerror or error}") from None


def find_checkpoints(path: Path) -> list[Path]:
    """Returns the checkpoint files of the run that saves to `path`, the newest first."""
    if not path.parent.is_dir():
        return []
    by_step = _files_by_step(path)
    files = [path] * path.exists() + [by_step[step] for step in sorted(by_step, reverse=True)]
    if path.suffix:  # the names that earlier versions used: path.1, path.2, ...
        by_age = _files_by_number(path.parent, rf"{re.escape(path.name)}\.([1-9]\d*)")
        files += [by_age[age] for age in sorted(by_age)]
    return files


def set_aside_damaged(path: Path, resumed: Path) -> None:
    """Renames the checkpoints newer than the one that a run resumes from: they are damaged, and must replace no other.

    Raises:
        UserError: the folder cannot be written.
    """
    for file in itertools.takewhile(lambda file: file != resumed, find_checkpoints(path)):
        try:
            os.replace(file, file.with_name(f"{file.name}.damaged"))
        except OSError as error:
            raise UserError(f"--resume {file}: damaged, and cannot be renamed: {error.strerror or error}") from None


def _files_by_step(path: Path) -> dict[int, Path]:
    return _files_by_number(path.parent, rf"{re.escape(path.stem)}_(\d{{6,}}){re.escape(path.suffix)}")


def _files_by_number(folder: Path, pattern: str) -> dict[int, Path]:
    return {int(match[1]): file for file in folder.iterdir() if (match := re.fullmatch(pattern, file.name))}


def save(path: Path, content: dict[str, Any], keep: int = 1) -> None:
    """Writes a `snapshot` to `path`, and keeps `keep - 1` earlier checkpoints under names with their step.

    Killed at any moment, it leaves only whole files, and among them the new one or the newest of those before it. There
    is one checkpoint per step: a second one at the same step, such as after an evaluation, replaces the first.

    Raises:
        OSError: the folder cannot be written or the disk is full; every earlier file is untouched.
    """
    step = content["last"]["step"]
    with replacing(path) as temporary:
        write_archive(content, temporary)
        if keep > 1 and path.exists() and (earlier := read_step(path)) < step:
            # From here until `temporary` takes its name, `path` is missing, and `--resume` finds this one.
            os.replace(path, path.with_name(f"{path.stem}_{earlier:06d}{path.suffix}"))
    for other_step, file in _files_by_step(path).items():
        if other_step >= step:  # damaged, or the run would not have been resumed from an earlier one
            file.unlink(missing_ok=True)
    for file in find_checkpoints(path)[keep:]:
        file.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the new names durable: after a power cut, the files alone would not be enough."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
