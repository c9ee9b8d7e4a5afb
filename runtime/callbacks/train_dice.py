"""`--callbacks train_dice`: scores the training cases too, after each evaluation, to detect overfitting."""

from __future__ import annotations

from collections.abc import Callable

from common.errors import Interrupted, UserError
from runtime.callbacks.base import Callback, RunContext
from runtime.logging.events import EvaluationStopped, TrainDiceEnd, Waiting
from runtime.train_state import Stop, TrainState, stop_at_signal


class TrainDice(Callback):
    """Scores whole training cases with the evaluation's sliding windows and reports the scores as `TrainDiceEnd`.

    Args:
        cases: number of cases, the first by name, the same each time; None: all.
    """

    def __init__(self, run: RunContext, cases: int | None = None) -> None:
        if cases is not None and (not isinstance(cases, int) or cases < 1):
            raise UserError(f"--callbacks train_dice: cases={cases!r}; must be a whole number of at least 1, or None")
        self._run = run
        self._cases = sorted(run.training_cases)[:cases]
        self._evaluate: Callable[[int], EvaluationStopped] | None = None

    def on_evaluation_end(self, result: EvaluationStopped, state: TrainState) -> Stop | None:
        if self._evaluate is None:  # reads the volumes' headers, so not before the clock runs
            # Trackers must not count these cases; the watchdog must see that there is progress.
            self._evaluate = self._run.make_evaluate_fn(
                self._cases, lambda event: self._run.emit(Waiting("training cases"))
            )
        try:
            with state.scoring():
                scores = self._evaluate(result.epoch)
        except Interrupted as signalled:  # other callbacks have yet to hear of the evaluation
            return stop_at_signal(signalled)
        self._run.emit(
            TrainDiceEnd(
                epoch=result.epoch,
                mean_dice=scores.mean_dice,
                dice=scores.dice,
                loss=scores.loss,
                seconds=scores.seconds,
            )
        )
        return None
