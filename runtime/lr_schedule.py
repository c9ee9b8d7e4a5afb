"""Learning rates of other fields than MLPerf's, by `--lr_schedule`; each after the same linear warm-up.

cosine(final=0.0)
polynomial(power=0.9, final=0.0)
plateau(factor=0.5, patience=5)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from common.errors import UserError
from runtime.callbacks.monitor import METRICS, mode_of
from runtime.logging.events import EvaluationStopped, Event
from runtime.optimizer import LRScheduleConfig, warm_up_rate
from runtime.train_state import TrainState


class _AfterWarmUp(ABC):
    """A schedule for the epochs that the warm-up leaves."""

    def __init__(self, run: LRScheduleConfig) -> None:
        if run.lr_decay_epochs:
            raise UserError("--lr_decay_epochs is of --lr_schedule multistep; drop it")
        self._run = run

    def __call__(self, epoch: int) -> float:
        run = self._run
        if epoch <= run.lr_warmup_epochs:
            return warm_up_rate(epoch, run.learning_rate, run.init_learning_rate, run.lr_warmup_epochs)
        return self.after_warm_up(epoch)

    def progress(self, epoch: int) -> float:
        """The share of the epochs after the warm-up that lies behind at the epoch's start: from 0, always below 1."""
        return (epoch - 1 - self._run.lr_warmup_epochs) / max(self._run.epochs - self._run.lr_warmup_epochs, 1)

    @abstractmethod
    def after_warm_up(self, epoch: int) -> float: ...


class Cosine(_AfterWarmUp):
    """final + (base - final) * (1 + cos(pi * progress)) / 2 (SGDR without restarts, arXiv:1608.03983)."""

    def __init__(self, run: LRScheduleConfig, final: float = 0.0) -> None:
        super().__init__(run)
        self._final = final

    def after_warm_up(self, epoch: int) -> float:
        base = self._run.learning_rate
        return self._final + (base - self._final) * (1 + math.cos(math.pi * self.progress(epoch))) / 2


class Polynomial(_AfterWarmUp):
    """final + (base - final) * (1 - progress)^power; nnU-Net's power is 0.9."""

    def __init__(self, run: LRScheduleConfig, power: float = 0.9, final: float = 0.0) -> None:
        super().__init__(run)
        self._power, self._final = power, final

    def after_warm_up(self, epoch: int) -> float:
        base = self._run.learning_rate
        return self._final + (base - self._final) * (1 - self.progress(epoch)) ** self._power


class Plateau(_AfterWarmUp):
    """Multiplies the rate with `factor` after more than `patience` evaluations without progress; not in the warm-up.

    A callback as well: it hears of every evaluation, whose scores are those of all ranks. The rule is torch's
    ReduceLROnPlateau; its state is in the run's records.

    Args:
        metric: "mean_dice" or "loss", of the evaluation.
        mode: "max" where more is better, "min" where less is; None: what the metric's nature says.
        threshold: progress is more than this, relative to the best.
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
        self._metric, better = metric, mode_of("--lr_schedule plateau", metric, mode)
        # An optimizer of its own: the rate of the run's follows from the epoch alone.
        self._carrier = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=run.learning_rate)
        try:
            self._rule = ReduceLROnPlateau(self._carrier, better, factor, patience, threshold, min_lr=min_rate)
        except (ValueError, TypeError) as error:
            raise UserError(f"--lr_schedule plateau: {error}") from None
        if kept := run.records.get(self.NAME):
            self._rule.load_state_dict(kept["rule"])
            self._carrier.param_groups[0]["lr"] = kept["rate"]

    def after_warm_up(self, epoch: int) -> float:
        return float(self._carrier.param_groups[0]["lr"])

    def on(self, event: Event, state: TrainState) -> None:
        if not isinstance(event, EvaluationStopped) or event.epoch <= self._run.lr_warmup_epochs:
            return
        # torch compares with NaN, which is never better, and so counts it as no progress.
        self._rule.step(METRICS[self._metric](event))
        state.records[self.NAME] = {"rule": _plain(self._rule.state_dict()), "rate": self.after_warm_up(0)}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Without what a checkpoint cannot hold."""
    return {key: value for key, value in values.items() if isinstance(value, bool | int | float | str | list)}
