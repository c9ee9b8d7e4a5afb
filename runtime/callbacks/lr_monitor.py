"""`--callbacks lr_monitor`: the learning rate actually used, loss scale and gradient norm, in LOG_DIR/rates.csv."""

from __future__ import annotations

import csv

from common.errors import UserError
from common.messages import logger
from runtime.callbacks.base import Callback, RunContext
from runtime.logging.events import StepEnd
from runtime.train_state import TrainState


class LRMonitor(Callback):
    """Writes one line per step; the rate is read from the optimizer, not from the schedule.

    Args:
        every: writes every n-th step.
    """

    def __init__(self, run: RunContext, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UserError(f"--callbacks lr_monitor: every={every!r}; must be a whole number of at least 1")
        self._path = run.log_dir / "rates.csv" if run.world.is_main else None
        self._every = every
        self._steps = 0
        self._write(["epoch", "batch", "learning_rate", "loss_scale", "gradient_norm"], mode="w")

    def on_step_end(self, step: StepEnd, state: TrainState) -> None:
        self._steps += 1
        if self._steps % self._every == 0:
            rate = state.optimizer.param_groups[0]["lr"]
            self._write([step.epoch, step.batch, rate, step.loss_scale, step.gradient_norm])

    def _write(self, row: list[object], mode: str = "a") -> None:
        if self._path is not None:
            try:
                with self._path.open(mode, encoding="utf-8", newline="") as stream:
                    csv.writer(stream, lineterminator="\n").writerow(row)
            except OSError as error:
                reason = error.strerror or error
                logger.warning(f"--callbacks lr_monitor: {self._path} cannot be written ({reason}), training goes on")
                self._path = None
