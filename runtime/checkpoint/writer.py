"""When and how a run saves: from a copy, in a thread, while training goes on."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from common.errors import DIVERGED_EXIT, UserError, warn
from runtime.distributed.world import World
from runtime.logging.events import EpochStopped, EvaluationStopped, Event, StepEnd
from runtime.train_state import TrainState

# For rank 0's last checkpoint; launchers kill sooner.
PATIENCE_S = 300.0


class SaveCheckpoint:
    """A callback on every rank; rank 0 writes. Saves when it is due, after each evaluation with a new best, at the end.

    A disk that is full is a warning while the run goes on, and a UserError at its end.

    Args:
        minutes, epochs: how often; 0: not by these.
        take: makes a snapshot of the state, given every rank's sum of losses.
        write: writes a snapshot to the disk, in a thread of its own.
    """

    def __init__(
        self,
        world: World,
        minutes: float,
        epochs: int,
        take: Callable[[TrainState, list[float]], dict[str, Any]],
        write: Callable[[dict[str, Any]], None],
    ) -> None:
        self._world = world
        self._minutes = minutes
        self._epochs = epochs
        self._take = take
        self._write = write
        self._writer: threading.Thread | None = None
        self._began_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether this rank wants a checkpoint at the next step's end; rank 0's clock decides for all."""
        waited_s = time.monotonic() - self._began_at
        return self._world.is_main and 0 < self._minutes <= waited_s / 60 and not self._is_writing()

    def on(self, event: Event, state: TrainState) -> None:
        is_new_best = isinstance(event, EvaluationStopped) and state.best_epoch == event.epoch and not _diverged(state)
        is_epoch = isinstance(event, EpochStopped) and self._epochs > 0 and event.epoch % self._epochs == 0
        # A step with a fault has spoilt the weights.
        if is_new_best or is_epoch or (isinstance(event, StepEnd) and event.save and not event.fault):
            self._begin(state)

    def _is_writing(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    def _begin(self, state: TrainState) -> None:
        """Copies the state and starts writing; waits first for a disk that is slower than the interval."""
        content = self._snapshot(state)
        if content is not None:
            self._wait()
            self._writer = threading.Thread(target=self._write_or_warn, args=(content,), name="checkpoint")
            self._writer.start()
        self._began_at = time.monotonic()

    def _snapshot(self, state: TrainState) -> dict[str, Any] | None:
        """The state on rank 0, None on the others; every rank must call it at the same step.

        Reading the losses and the norm is a host sync, of a checkpoint's step alone. It finds what a beat of the pulse
        may still have under way: a last step that spoilt the weights, of which no checkpoint is made.
        """
        sums = [0.0] * self._world.size
        if state.batch and state.loss_sum is not None:  # alike on all ranks; in an evaluation there is none to gather
            sums = self._world.gather(state.loss_sum.item())
        norm = 0.0 if state.gradient_norm is None or state.scaler.is_enabled() else state.gradient_norm.item()
        if not self._world.is_main or not all(map(math.isfinite, [*sums, norm])):
            return None
        return self._take(state, sums)

    def _write_or_warn(self, content: dict[str, Any]) -> None:
        try:
            self._write(content)
        except OSError as error:
            warn(f"{_problem(error)}, training goes on")

    def _wait(self) -> None:
        if self._writer is not None:
            self._writer.join()

    def finish(self, state: TrainState) -> None:
        """Saves the last state, once the run has ended; that of a run gone wrong is left out for the last good one.

        Every rank waits for rank 0's writing: a launcher kills all as soon as one leaves with an exit status.

        Raises:
            UserError: the disk is full, or the folder gone.
        """
        self._wait()
        content = None if _diverged(state) else self._snapshot(state)
        if content is not None:
            try:
                self._write(content)
            except OSError as error:
                raise UserError(f"{_problem(error)}; the end of this run is lost") from None
        self._world.wait_for_main("saved", PATIENCE_S)


def _diverged(state: TrainState) -> bool:
    return state.stop is not None and state.stop.exit_status == DIVERGED_EXIT


def _problem(error: OSError) -> str:
    return f"the checkpoint could not be saved ({error.strerror or error}); the last good one is untouched"
