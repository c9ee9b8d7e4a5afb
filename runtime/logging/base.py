"""What the trackers of people's own tools share: a run's events as facts, named numbers and files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from common.errors import UserError
from runtime.logging import events as ev


class Recorder(ABC):
    """A tracker that hands on what it hears in the terms that such tools have.

    The numbers of a step are named step/…, of training an epoch train/…, of an evaluation evaluation/…; the first have
    the number of the step since the run's first epoch beside them, the others the epoch.

    Args:
        every: one step in so many is recorded.
    """

    def __init__(self, every: int) -> None:
        if not isinstance(every, int) or every < 1:
            raise UserError(f"--trackers: every={every!r}; a tracker records one step in so many, 1 or more")
        self._every = every
        self._facts: dict[str, dict[str, Any]] = {}
        self._classes: list[str] = []
        self._steps_per_epoch = 0
        self._accumulation = 1

    def on(self, event: ev.Event) -> None:
        if isinstance(event, ev.InitStarted):
            self._facts = {"config": event.config.to_json(), "environment": event.environment}
        elif isinstance(event, ev.InitStopped):
            self._facts["run"] = {
                "seed": event.seeds["master"],
                "division": event.division,
                "departures": event.reasons,
                "platform": event.platform,
            }
        elif isinstance(event, ev.DataOpened):
            self._data_opened(event)
        elif isinstance(event, ev.EpochStarted):
            self._steps_per_epoch = event.batches // self._accumulation
        elif isinstance(event, ev.StepEnd):
            self._step_done(event)
        elif isinstance(event, ev.EpochStopped):
            rates = {"learning_rate": event.learning_rate, "samples_per_s": event.samples / max(event.seconds, 1e-9)}
            self.numbers("epoch", event.epoch, {"train/loss": event.loss} | {f"train/{k}": v for k, v in rates.items()})
        elif isinstance(event, ev.EvaluationStopped):
            dice = {f"evaluation/dice_{name}": value for name, value in zip(self._classes, event.dice, strict=True)}
            rest = {"evaluation/mean_dice": event.mean_dice, "evaluation/loss": event.loss}
            self.numbers("epoch", event.epoch, rest | dice | {"evaluation/seconds": event.seconds})
        elif isinstance(event, ev.TrainDiceEnd):
            dice = {f"train/dice_{name}": value for name, value in zip(self._classes, event.dice, strict=True)}
            self.numbers("epoch", event.epoch, {"train/mean_dice": event.mean_dice} | dice)
        elif isinstance(event, ev.RunStopped):
            self.end(event)
        elif isinstance(event, ev.RunFinalized):
            self.close([Path(file) for file in event.files])

    def _data_opened(self, event: ev.DataOpened) -> None:
        """The first moment at which all is known, and after which little can still refuse the run."""
        self._accumulation = event.gradient_accumulation_steps
        self._classes = event.classes[1:]
        for name in ("classes", "train_samples", "eval_samples", "global_batch_size"):
            self._facts["run"][name] = getattr(event, name)
        self.begin(self._facts)

    def _step_done(self, event: ev.StepEnd) -> None:
        step = (event.epoch - 1) * self._steps_per_epoch + (event.batch + 1) // self._accumulation
        if step % self._every == 0:
            values = {"loss": event.loss, "gradient_norm": event.gradient_norm, "loss_scale": event.loss_scale}
            self.numbers("step", step, {f"step/{name}": value for name, value in values.items()})

    @abstractmethod
    def begin(self, facts: dict[str, dict[str, Any]]) -> None:
        """The clock runs: what the run is, by "config" (the flags), "environment" and "run"."""

    @abstractmethod
    def numbers(self, axis: str, at: int, values: dict[str, float]) -> None:
        """Numbers by name, at an "epoch" or a "step"; NaN and infinite ones too."""

    @abstractmethod
    def end(self, event: ev.RunStopped) -> None:
        """No more numbers come. `close` does, unless the process is killed."""

    @abstractmethod
    def close(self, files: list[Path]) -> None:
        """The last call. `files` are what the run leaves: checkpoint (*.pth), logs, report, pictures (*.png)."""
