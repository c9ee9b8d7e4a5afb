"""Learning-rate schedules: the rate as a function of the epoch, after the same linear warm-up, and their table.

multistep (MLPerf's), cosine(final=0.0), polynomial(power=0.9, final=0.0), plateau(factor=0.5, patience=5)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from common import registry
from common.errors import UserError
from runtime.callbacks.monitor import METRICS, mode_of
from runtime.logging.events import EvaluationStopped


def learning_rate(
    epoch: int,
    *,
    base: float,
    initial: float = 1e-4,
    warmup_epochs: int = 0,
    decay_epochs: Sequence[int] = (),
    decay_factor: float = 1.0,
) -> float:
    """Returns MLPerf's rate of a whole epoch, counted from 1.

    Warm-up: initial + (base - initial) * epoch / warmup_epochs up to and including epoch `warmup_epochs`. After it
    MultiStepLR, stepped at each epoch's end: base * factor^(decay epochs that have ended before this epoch). A decay
    epoch inside the warm-up counts from the warm-up's end (the MLPerf reference silently loses it).
    """
    if epoch <= warmup_epochs:
        return initial + (base - initial) * epoch / warmup_epochs
    return base * decay_factor ** sum(decay < epoch for decay in decay_epochs)


@dataclass(frozen=True, kw_only=True)
class LRScheduleConfig:
    """The argument `run` of every schedule's constructor: the flags of the same names.

    Attributes:
        epochs: maximum number of epochs of the run.
        callback_state: see `TrainState`; where a schedule keeps what it needs after a resume.
    """

    learning_rate: float
    init_learning_rate: float
    lr_warmup_epochs: int
    lr_decay_epochs: tuple[int, ...]
    lr_decay_factor: float
    epochs: int
    callback_state: dict[str, dict[str, Any]]


class LRSchedule(ABC):
    """The learning rate of each epoch: linear warm-up, then `after_warm_up`."""

    def __init__(self, run: LRScheduleConfig) -> None:
        self.run = run

    def __call__(self, epoch: int) -> float:
        """Returns the rate of a whole epoch, counted from 1."""
        if epoch > self.run.lr_warmup_epochs:
            return self.after_warm_up(epoch)
        return learning_rate(
            epoch,
            base=self.run.learning_rate,
            initial=self.run.init_learning_rate,
            warmup_epochs=self.run.lr_warmup_epochs,
        )

    @abstractmethod
    def after_warm_up(self, epoch: int) -> float: ...

    def on_evaluation_end(self, result: EvaluationStopped) -> None:  # noqa: B027 - a hook: most schedules ignore scores
        """Called after each evaluation, on every rank, with the scores of all ranks."""

    def progress(self, epoch: int) -> float:
        """Returns the share of the epochs after the warm-up done when this one starts: from 0, always below 1."""
        return (epoch - 1 - self.run.lr_warmup_epochs) / max(self.run.epochs - self.run.lr_warmup_epochs, 1)


class MultiStep(LRSchedule):
    """MLPerf's: constant after the warm-up, multiplied by `--lr_decay_factor` after each of `--lr_decay_epochs`."""

    def after_warm_up(self, epoch: int) -> float:
        run = self.run
        return learning_rate(
            epoch, base=run.learning_rate, decay_epochs=run.lr_decay_epochs, decay_factor=run.lr_decay_factor
        )


class _WithoutDecayEpochs(LRSchedule, ABC):
    def __init__(self, run: LRScheduleConfig) -> None:
        if run.lr_decay_epochs:
            raise UserError("--lr_decay_epochs applies only to --lr_schedule multistep")
        super().__init__(run)


class Cosine(_WithoutDecayEpochs):
    """final + (base - final) * (1 + cos(pi * progress)) / 2 (SGDR without restarts, arXiv:1608.03983)."""

    def __init__(self, run: LRScheduleConfig, final: float = 0.0) -> None:
        super().__init__(run)
        self._final = final

    def after_warm_up(self, epoch: int) -> float:
        base = self.run.learning_rate
        return self._final + (base - self._final) * (1 + math.cos(math.pi * self.progress(epoch))) / 2


class Polynomial(_WithoutDecayEpochs):
    """final + (base - final) * (1 - progress)^power; nnU-Net uses a power of 0.9."""

    def __init__(self, run: LRScheduleConfig, power: float = 0.9, final: float = 0.0) -> None:
        super().__init__(run)
        self._power, self._final = power, final

    def after_warm_up(self, epoch: int) -> float:
        base = self.run.learning_rate
        return self._final + (base - self._final) * (1 - self.progress(epoch)) ** self._power


# What torch's ReduceLROnPlateau remembers of the evaluations.
PROGRESS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")


class Plateau(_WithoutDecayEpochs):
    """Multiplies the rate by `factor` after more than `patience` evaluations without improvement after the warm-up.

    The rule is torch's ReduceLROnPlateau; its state is kept in `callback_state`.

    Args:
        metric: "mean_dice" or "loss" of the evaluation.
        mode: "max" or "min"; None: the metric's natural direction.
        threshold: an improvement is larger than this, relative to the size of the best.
        min_rate: the rate never falls below this.
    """

    NAME = "plateau"

    def __init__(
        self,
        run: LRScheduleConfig,
        factor: float = 0.5,
        patience: int = 5,
        metric: str = "mean_dice",
        mode: str | None = None,
        threshold: float = 1e-4,
        min_rate: float = 0.0,
    ) -> None:
        super().__init__(run)
        self._metric, mode = metric, mode_of("--lr_schedule plateau", metric, mode)
        self._threshold = threshold
        # An optimizer of its own: the rate of the run's optimizer is set anew for each epoch.
        self._carrier = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=run.learning_rate)
        try:
            self._rule = ReduceLROnPlateau(
                self._carrier, mode=mode, factor=factor, patience=patience, threshold_mode="abs", min_lr=min_rate
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"--lr_schedule plateau: {error}") from None
        if saved := run.callback_state.get(self.NAME):
            self._carrier.param_groups[0]["lr"] = self._resumed_rate(saved["rate"], saved.get("base"), min_rate)
            # The rest are arguments, which a resumed run may change; another metric's best says nothing of this one.
            if saved["rule"]["mode"] == mode and saved.get("metric", metric) == metric:
                self._rule.load_state_dict({key: saved["rule"][key] for key in PROGRESS if key in saved["rule"]})

    def after_warm_up(self, epoch: int) -> float:
        return float(self._carrier.param_groups[0]["lr"])

    def on_evaluation_end(self, result: EvaluationStopped) -> None:
        if result.epoch <= self.run.lr_warmup_epochs:
            return
        best = float(self._rule.best)
        # torch's own relative threshold would take a worse score for an improvement if it is below zero.
        self._rule.threshold = self._threshold * abs(best) if math.isfinite(best) else 0.0
        # To torch, NaN is never better than the best, so it counts as no improvement.
        self._rule.step(METRICS[self._metric](result))
        state = self._rule.state_dict().items()
        # Only the values that a checkpoint can hold.
        rule = {key: value for key, value in state if isinstance(value, bool | int | float | str | list)}
        rate = self.after_warm_up(result.epoch)
        base = self.run.learning_rate
        self.run.callback_state[self.NAME] = {"rule": rule, "rate": rate, "base": base, "metric": self._metric}

    def _resumed_rate(self, rate: float, base: float | None, min_rate: float) -> float:
        """Returns the checkpoint's rate, times the change of `--learning_rate` since (as the other schedules do)."""
        if base is None or base == self.run.learning_rate:
            return rate  # exactly
        return max(rate * self.run.learning_rate / base, min_rate)


LR_SCHEDULES: registry.Table[LRSchedule] = {
    "multistep": MultiStep,
    "cosine": Cosine,
    "polynomial": Polynomial,
    "plateau": Plateau,
}


def build_lr_schedule(spec: str, run: LRScheduleConfig) -> LRSchedule:
    """Builds the schedule that `--lr_schedule` names.

    Raises:
        UserError: an unknown name or argument, or an object that is not an `LRSchedule`.
    """
    schedule = registry.build(registry.Spec(spec, trusted=True), LR_SCHEDULES, "--lr_schedule", run=run)
    if not isinstance(schedule, LRSchedule):
        raise UserError(f"--lr_schedule {spec}: must derive from runtime.lr_schedule.LRSchedule")
    return schedule
