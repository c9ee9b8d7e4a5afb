"""The metrics that callbacks and learning-rate schedules can monitor, and when a value is an improvement."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from common.errors import UserError
from runtime.logging.events import EvaluationStopped

Mode = Literal["max", "min"]
METRICS: dict[str, Callable[[EvaluationStopped], float]] = {
    "mean_dice": lambda result: result.mean_dice,
    "loss": lambda result: result.loss,
}
MODES: dict[str, Mode] = {"mean_dice": "max", "loss": "min"}


def mode_of(flag: str, metric: str, mode: str | None) -> Mode:
    """Returns the mode, "max" or "min"; None selects the metric's natural direction.

    Raises:
        UserError: an unknown metric or mode.
    """
    if metric not in METRICS:
        raise UserError(f"{flag}: unknown metric {metric!r}; available: {', '.join(METRICS)}")
    if mode not in (None, "max", "min"):
        raise UserError(f"{flag}: mode={mode!r}; must be 'max' or 'min'")
    return MODES[metric] if mode is None else "max" if mode == "max" else "min"


def is_better(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """Returns whether a value beats the best so far (None: there is none) by more than `min_delta`; NaN never does."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value - best > min_delta if mode == "max" else best - value > min_delta
