"""Callbacks decide: every rank runs them on the same events and comes to the same decisions.

`on(event, state)` may set `state.stop` or keep what is best; a tracker, in contrast, only watches.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from errors import UserError
from runtime.events import EpochStopped, EvaluationStopped, Event, RunStopped, Tracker
from runtime.training import TrainState

# Below this the network predicts nothing at all: MLPerf's reference calls the run diverged.
DIVERGED_DICE = 1e-6
# Between evaluations (the first is hours away on one GPU) a state is kept at least so often.
SAVE_INTERVAL_S = 600.0


class Callback(Protocol):
    """May change the state, alike on every rank."""

    def on(self, event: Event, state: TrainState) -> None: ...


@dataclass(frozen=True)
class TargetReached:
    """Ends the run with success once the mean Dice reaches the threshold."""

    threshold: float

    def on(self, event: Event, state: TrainState) -> None:
        if isinstance(event, EvaluationStopped) and event.mean_dice >= self.threshold:
            state.stop = ("success", f"mean Dice {event.mean_dice:.4f} reached {self.threshold}")


@dataclass(frozen=True)
class Diverged:
    """Ends the run as aborted when the score has gone to nothing or the loss is no number."""

    def on(self, event: Event, state: TrainState) -> None:
        # "not at least", so that NaN counts too
        if isinstance(event, EvaluationStopped) and not event.mean_dice >= DIVERGED_DICE:
            state.stop = ("aborted", f"diverged: mean Dice {event.mean_dice}")
        if isinstance(event, EpochStopped) and not math.isfinite(event.loss):
            state.stop = ("aborted", f"diverged: the mean loss of epoch {event.epoch} is {event.loss}")


@dataclass(frozen=True)
class KeepBest:
    """Keeps a copy, on the host, of the weights with the highest mean Dice."""

    def on(self, event: Event, state: TrainState) -> None:
        if isinstance(event, EvaluationStopped) and event.mean_dice > state.best_dice:
            state.best_dice = event.mean_dice
            state.best_epoch = event.epoch
            state.best_network = {
                name: tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
                for name, tensor in state.network.state_dict().items()
            }


class SaveCheckpoint:
    """Saves the last and the best state: after each evaluation, every ten minutes, and at the run's end.

    Args:
        save: writes the state's file; called on rank 0 alone. Its OSError (a full disk) is a warning while the run
            goes on, and a UserError at its end.
    """

    def __init__(self, save: Callable[[TrainState], None]) -> None:
        self._save = save
        self._saved_at = time.monotonic()

    def on(self, event: Event, state: TrainState) -> None:
        is_due = isinstance(event, EpochStopped) and time.monotonic() - self._saved_at > SAVE_INTERVAL_S
        if not (is_due or isinstance(event, EvaluationStopped | RunStopped)):
            return
        try:
            self._save(state)
        except OSError as error:
            problem = f"the checkpoint could not be saved ({error.strerror or error}); the last good one is untouched"
            if isinstance(event, RunStopped):
                raise UserError(f"{problem}; the end of this run is lost") from None
            print(f"warning: {problem}, training goes on", file=sys.stderr, flush=True)
        self._saved_at = time.monotonic()


class Announcer:
    """Hands every event to the callbacks (all ranks), then to the trackers (rank 0: the others have none)."""

    def __init__(self, callbacks: Sequence[Callback], trackers: Sequence[Tracker]) -> None:
        self._callbacks = callbacks
        self._trackers = trackers
        self.state: TrainState | None = None

    def __call__(self, event: Event) -> None:
        if self.state is not None:
            for callback in self._callbacks:
                callback.on(event, self.state)
        for tracker in self._trackers:
            tracker.on(event)
