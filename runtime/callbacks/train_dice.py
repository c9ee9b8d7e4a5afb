"""`--callbacks train_dice`: after each evaluation the training cases are scored alike, to see what is only learned
by heart."""

from __future__ import annotations

from collections.abc import Callable

from common.errors import UserError
from runtime.callbacks.base import RunContext
from runtime.logging.events import EvaluationStopped, Event, TrainDiceEnd
from runtime.train_state import TrainState


class TrainDice:
    """Scores whole training cases with the evaluation's windows and tells of it as `TrainDiceEnd`.

    Args:
        cases: how many, the first by their names, the same each time; None: all.
    """

    def __init__(self, run: RunContext, cases: int | None = None) -> None:
        if cases is not None and (not isinstance(cases, int) or cases < 1):
            raise UserError(f"--callbacks train_dice: cases={cases!r}; it is a whole number from 1 on, or None: all")
        self._run = run
        self._cases = sorted(run.training)[:cases]
        self._score: Callable[[int], EvaluationStopped] | None = None

    def on(self, event: Event, state: TrainState) -> None:
        if not isinstance(event, EvaluationStopped):
            return
        if self._score is None:  # deals the cases out by their headers, so not before the clock runs
            self._score = self._run.make_evaluate_fn(self._cases, lambda event: None)
        found = self._score(event.epoch)
        self._run.announce(TrainDiceEnd(event.epoch, found.mean_dice, found.dice, found.loss, found.seconds))
