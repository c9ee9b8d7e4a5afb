"""`--callbacks lr_monitor`: every step's rate as it was used, loss scale and gradient norm, in LOG_DIR/rates.csv."""

from __future__ import annotations

import csv

from runtime.callbacks.base import RunContext
from runtime.logging.events import Event, StepEnd
from runtime.train_state import TrainState


class LRMonitor:
    """Writes a line a step, read from the optimizer and not from the schedule.

    Args:
        every: one step in so many is written.
    """

    def __init__(self, run: RunContext, every: int = 1) -> None:
        self._path = run.log_dir / "rates.csv" if run.world.is_main else None
        self._every = every
        self._steps = 0
        if self._path:
            self._write("epoch", "batch", "learning_rate", "loss_scale", "gradient_norm", mode="w")

    def on(self, event: Event, state: TrainState) -> None:
        if isinstance(event, StepEnd) and self._path:
            self._steps += 1
            if self._steps % self._every == 0:
                rate = state.optimizer.param_groups[0]["lr"]
                self._write(event.epoch, event.batch, rate, event.loss_scale, event.gradient_norm)

    def _write(self, *row: object, mode: str = "a") -> None:
        assert self._path
        with self._path.open(mode, encoding="utf-8", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerow(row)
