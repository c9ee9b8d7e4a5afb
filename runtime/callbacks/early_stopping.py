"""`--callbacks 'early_stopping(patience=20)'`: ends a run that no longer makes progress."""

from __future__ import annotations

from common.errors import UserError
from runtime.callbacks.base import RunContext
from runtime.callbacks.monitor import METRICS, is_better, mode_of
from runtime.logging.events import BlockStarted, EvaluationStopped, Event
from runtime.train_state import Stop, TrainState


class EarlyStopping:
    """Ends the run, as aborted, after `patience` evaluations in a row without progress; NaN is none.

    Args:
        patience: evaluations, at least 1.
        min_delta: progress is more than this.
        metric: "mean_dice" or "loss".
        mode: "max" or "min"; None: as the metric's nature is.
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
        who = "--callbacks early_stopping"
        if not isinstance(patience, int) or patience < 1 or not min_delta >= 0:
            raise UserError(f"{who}: patience is a whole number from 1 on, min_delta a number from 0 on")
        self._patience, self._min_delta = patience, min_delta
        self._metric, self._mode = metric, mode_of(who, metric, mode)

    def on(self, event: Event, state: TrainState) -> None:
        record = state.records.setdefault(self.NAME, {"best": None, "epoch": 0, "stale": 0})
        if isinstance(event, EvaluationStopped):
            value = METRICS[self._metric](event)
            if is_better(value, record["best"], self._mode, self._min_delta):
                record.update(best=value, epoch=event.epoch, stale=0)
            else:
                record["stale"] += 1
        # A block's start: a run that had ended so is resumed, and ends again at once.
        if isinstance(event, EvaluationStopped | BlockStarted) and record["stale"] >= self._patience and not state.stop:
            best = "none" if record["best"] is None else f"{record['best']:.4f} at epoch {record['epoch']}"
            state.stop = Stop(
                "aborted", f"no progress in {record['stale']} evaluations; the best {self._metric}: {best}"
            )
