"""What callbacks and schedules follow: an evaluation's number, and which way it gets better."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from common.errors import UserError
from runtime.logging.events import EvaluationStopped

Mode = Literal["max", "min"]
METRICS: dict[str, Callable[[EvaluationStopped], float]] = {
    "mean_dice": lambda event: event.mean_dice,
    "loss": lambda event: event.loss,
}
MODES: dict[str, Mode] = {"mean_dice": "max", "loss": "min"}


def mode_of(who: str, metric: str, mode: str | None) -> Mode:
    """The mode, "max" or "min"; the metric's own where it is None. Raises UserError for anything else."""
    if metric not in METRICS:
        raise UserError(f"{who}: metric={metric!r}; there is {', '.join(METRICS)}")
    if mode not in (None, "max", "min"):
        raise UserError(f"{who}: mode={mode!r}; it is 'max' or 'min'")
    return MODES[metric] if mode is None else "max" if mode == "max" else "min"


def is_better(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """Whether a value is better than the best yet (None: there is none) by more than `min_delta`; NaN never is."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value - best > min_delta if mode == "max" else best - value > min_delta
