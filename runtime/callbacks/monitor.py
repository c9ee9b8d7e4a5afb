"""The metrics that callbacks and learning-rate schedules can monitor, and when a value is an improvement."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

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


def kept_state(
    states: dict[str, dict[str, Any]], name: str, *, metric: str, mode: Mode, initial: dict[str, Any]
) -> dict[str, Any]:
    """Returns what a callback keeps under its name in `callback_state`, to be changed in place.

    At first this is `initial`, and once more when a resumed run monitors another metric or mode: the best value of one
    says nothing of the other.
    """
    monitored = {"metric": metric, "mode": mode}
    kept = states.get(name, {})
    # A checkpoint of an earlier version does not say what it monitored.
    if not kept or any(kept.get(key, value) != value for key, value in monitored.items()):
        states[name] = kept = copy.deepcopy(initial)
    kept.update(monitored)
    return kept


def is_better(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """Returns whether a value beats the best so far (None: there is none) by more than `min_delta`; NaN never does."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value - best > min_delta if mode == "max" else best - value > min_delta
