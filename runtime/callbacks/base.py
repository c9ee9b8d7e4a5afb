"""Callbacks decide: every rank runs them on the same events and comes to the same decisions.

`on(event, state)` may set `state.stop` or keep what is best; a tracker, in contrast, only watches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from common import registry
from common.errors import DIVERGED_EXIT, Interrupted
from common.messages import logger
from runtime.distributed.world import World
from runtime.logging.events import EvaluationStopped, Event, StepEnd, Tracker
from runtime.train_state import Stop, TrainState

# Below this the network predicts nothing at all: MLPerf's reference calls the run diverged.
DIVERGED_DICE = 1e-6
# A report is one line.
NAMED_RANKS = 4


@runtime_checkable
class Callback(Protocol):
    """May change the state, alike on every rank."""

    def on(self, event: Event, state: TrainState) -> None: ...


@dataclass(frozen=True)
class TargetReached:
    """Ends the run with success once the mean Dice reaches the threshold."""

    threshold: float

    def on(self, event: Event, state: TrainState) -> None:
        if isinstance(event, EvaluationStopped) and event.mean_dice >= self.threshold:
            state.stop = Stop("success", f"mean Dice {event.mean_dice:.4f} reached {self.threshold}")


@dataclass(frozen=True)
class Diverged:
    """Ends the run as aborted when the score has gone to nothing, or a step's numbers are none.

    Args:
        describe: what the batch (of an epoch) holds on this rank, a phrase a sample.
        first_epoch: with an evaluation by MLPerf's rule. Before it a network that has not found anything yet may still
            do so.
    """

    world: World
    describe: Callable[[int, int], Sequence[str]]
    first_epoch: int

    def on(self, event: Event, state: TrainState) -> None:
        # "not at least", so that NaN counts too
        if isinstance(event, EvaluationStopped) and not event.mean_dice >= DIVERGED_DICE and not state.stop:
            had_begun = state.best_dice >= DIVERGED_DICE or event.epoch >= self.first_epoch
            if had_begun or not math.isfinite(event.mean_dice):
                state.stop = Stop("aborted", f"diverged: mean Dice {event.mean_dice}", DIVERGED_EXIT)
        if isinstance(event, StepEnd) and event.fault and not state.stop:
            state.stop = Stop("aborted", f"diverged: {self._report(event)}", DIVERGED_EXIT)

    def _report(self, event: StepEnd) -> str:
        """Every rank must call it. Names the ranks whose loss is no number; all, where it is the gradients alone."""
        samples = "; ".join(self.describe(event.epoch, event.batch))
        told = self.world.gather((event.loss, f"rank {self.world.rank}: loss {event.loss:g} on {samples}"))
        guilty = [text for loss, text in told if not math.isfinite(loss)] or [text for _, text in told]
        more = f" | and {len(guilty) - NAMED_RANKS} more ranks" if len(guilty) > NAMED_RANKS else ""
        return (
            f"epoch {event.epoch}, batch {event.batch}: gradient norm {event.gradient_norm:g}, loss scale "
            f"{event.loss_scale:g}, {' | '.join(guilty[:NAMED_RANKS])}{more}"
        )


@dataclass(frozen=True)
class StopOnSignal:
    """Ends the run at the step at which all ranks heard that a signal asks some rank to leave."""

    def on(self, event: Event, state: TrainState) -> None:
        if isinstance(event, StepEnd) and event.signal and not state.stop:
            raise Interrupted(event.signal)


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


@dataclass(frozen=True)
class RunContext:
    """What a callback of `--callbacks` is made with, as `run`. What it must know again after a resume, plain Python,
    it keeps in `state.records` under a name of its own.

    Attributes:
        training: the training cases' ids.
        scorer: makes, of case ids and of who hears of each case, a function of the epoch that scores them; every rank
            must call both.
        announce: tells all of an event.
        snapshot: a checkpoint's content, of a state and every rank's losses (0 at an epoch's end).
    """

    log_dir: Path
    world: World
    training: Sequence[str]
    make_evaluate_fn: Callable[[Sequence[str], Callable[[Event], None]], Callable[[int], EvaluationStopped]]
    announce: Callable[[Event], None]
    snapshot: Callable[[TrainState, list[float]], dict[str, Any]]


CALLBACKS: registry.Table[Callback] = {
    "early_stopping": "runtime.callbacks.early_stopping:EarlyStopping",
    "top_k": "runtime.callbacks.top_k:TopK",
    "lr_monitor": "runtime.callbacks.lr_monitor:LRMonitor",
    "train_dice": "runtime.callbacks.train_dice:TrainDice",
}


def build_callbacks(specs: Sequence[str], context: RunContext) -> list[Callback]:
    """What `--callbacks` names. Raises UserError for an unknown name or argument, or a missing package."""
    return [registry.build(registry.Spec(spec, trusted=True), CALLBACKS, "--callbacks", run=context) for spec in specs]


class EventDispatcher:
    """Hands every event to the callbacks (all ranks), then to the trackers (rank 0: the others have none).

    A tracker that fails is told of once; it only watches, so the run goes on, and it hears of the next event too.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers
        self._failed: set[int] = set()
        self._callbacks: Sequence[Callback] = ()
        self._state: TrainState | None = None

    def attach(self, state: TrainState, callbacks: Sequence[Callback]) -> None:
        """From now on the callbacks hear of every event, in this order, and may change the state."""
        self._state, self._callbacks = state, callbacks

    def __call__(self, event: Event) -> None:
        if self._state is not None:
            for callback in self._callbacks:
                callback.on(event, self._state)
        for tracker in self._trackers:
            try:
                tracker.on(event)
            except Exception as error:
                if id(tracker) not in self._failed:
                    self._failed.add(id(tracker))
                    what = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
                    logger.warning(
                        f"{type(tracker).__name__} failed ({what}); its record may be incomplete, training goes on"
                    )
