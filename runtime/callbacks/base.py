"""The base class of callbacks, which may stop a run or save data of it, and the table of `--callbacks`.

A tracker, in contrast, only watches (see `runtime/logging/`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import registry
from common.errors import UserError
from runtime.distributed.world import World
from runtime.logging.events import EpochStopped, EvaluationStopped, Event, StepEnd
from runtime.train_state import Stop, TrainState


class Callback:
    """Hooks into the training loop. Every rank calls each hook with the same numbers.

    A hook may change the state, identically on every rank, and returns a `Stop` to end the run: every rank must return
    the same one. A callback keeps what it needs after a resume in `state.callback_state`, as plain Python values under
    a name of its own.
    """

    def on_train_start(self, state: TrainState) -> Stop | None:
        """Before the first epoch of this process."""

    def on_step_end(self, step: StepEnd, state: TrainState) -> Stop | None:
        """After an optimizer step, once its numbers have reached the host (on a GPU, one step later)."""

    def on_epoch_end(self, result: EpochStopped, state: TrainState) -> Stop | None:
        """After an epoch that was completed."""

    def on_evaluation_end(self, result: EvaluationStopped, state: TrainState) -> Stop | None:
        """After an evaluation; `state` already holds the best weights. With `--eval_ranks`, some epochs later."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The argument `run` of every callback's constructor.

    Attributes:
        training_cases: their ids.
        make_evaluate_fn: given case ids and a function that receives each case's event, returns a function of the epoch
            that scores these cases. Every rank must call both. A UserError with `--eval_ranks`.
        emit: reports an event to the trackers.
        snapshot: a checkpoint's content, given the state and every rank's sum of losses (0 at the end of an epoch).
    """

    log_dir: Path
    world: World
    training_cases: Sequence[str]
    make_evaluate_fn: Callable[[Sequence[str], Callable[[Event], None]], Callable[[int], EvaluationStopped]]
    emit: Callable[[Event], None]
    snapshot: Callable[[TrainState, list[float]], dict[str, Any]]


CALLBACKS: registry.Table[Callback] = {
    "early_stopping": "runtime.callbacks.early_stopping:EarlyStopping",
    "top_k": "runtime.callbacks.top_k:TopK",
    "lr_monitor": "runtime.callbacks.lr_monitor:LRMonitor",
    "train_dice": "runtime.callbacks.train_dice:TrainDice",
}


def build_callbacks(specs: Sequence[str], run: RunContext) -> list[Callback]:
    """Builds the callbacks that `--callbacks` names.

    Raises:
        UserError: an unknown name or argument, a missing package, or an object that is not a `Callback`.
    """
    callbacks = [registry.build(registry.Spec(spec, trusted=True), CALLBACKS, "--callbacks", run=run) for spec in specs]
    for spec, callback in zip(specs, callbacks, strict=True):
        if not isinstance(callback, Callback):
            raise UserError(f"--callbacks {spec}: must derive from runtime.callbacks.base.Callback")
    return callbacks
