"""`--callbacks 'early_stopping(patience=20)'`: ends a run that no longer improves."""

from __future__ import annotations

from typing import Any

from common.errors import UserError
from common.messages import counted
from runtime.callbacks.base import Callback, RunContext
from runtime.callbacks.monitor import METRICS, is_better, kept_state, mode_of
from runtime.logging.events import EvaluationStopped
from runtime.train_state import Stop, TrainState


class EarlyStopping(Callback):
    """Aborts the run after `patience` evaluations in a row without improvement; NaN is no improvement.

    Args:
        patience: number of evaluations, at least 1.
        min_delta: a smaller change is no improvement.
        metric: "mean_dice" or "loss".
        mode: "max" or "min"; None: the metric's natural direction.
    """

    NAME = "early_stopping"

    def __init__(
        self,
        run: RunContext,
        patience: int = 20,
        min_delta: float = 0.0,
        metric: str = "mean_dice",
        mode: str | None = None,
    ) -> None:
        flag = "--callbacks early_stopping"
        if not isinstance(patience, int) or patience < 1 or not min_delta >= 0:
            raise UserError(f"{flag}: patience must be a whole number of at least 1, min_delta at least 0")
        self._patience, self._min_delta = patience, min_delta
        self._metric, self._mode = metric, mode_of(flag, metric, mode)

    def on_train_start(self, state: TrainState) -> Stop | None:
        return self._stop(self._progress(state))  # a run that stopped early ends at once when it is resumed

    def on_evaluation_end(self, result: EvaluationStopped, state: TrainState) -> Stop | None:
        progress = self._progress(state)
        value = METRICS[self._metric](result)
        if is_better(value, progress["best"], self._mode, self._min_delta):
            progress.update(best=value, epoch=result.epoch, stale=0)
        else:
            progress["stale"] += 1
        return self._stop(progress)

    def _progress(self, state: TrainState) -> dict[str, Any]:
        initial = {"best": None, "epoch": 0, "stale": 0}
        return kept_state(state.callback_state, self.NAME, metric=self._metric, mode=self._mode, initial=initial)

    def _stop(self, progress: dict[str, Any]) -> Stop | None:
        if progress["stale"] < self._patience:
            return None
        best = "none" if progress["best"] is None else f"{progress['best']:.4f} at epoch {progress['epoch']}"
        stale = counted(progress["stale"], "evaluation")
        return Stop("aborted", f"no progress in {stale}; the best {self._metric}: {best}")
