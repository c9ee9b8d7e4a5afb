"""The table of `--trackers`, and the base class of the trackers that record to a third-party tool."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import registry
from common.errors import UserError
from runtime.logging import events as ev

TRACKERS: registry.Table[ev.Tracker] = {
    "mlperf": "runtime.logging.mlperf:MLPerfTracker",
    "jsonl": "runtime.logging.jsonl:JsonLinesTracker",
    "tensorboard": "runtime.logging.tensorboard:TensorBoard",
    "wandb": "runtime.logging.wandb:WeightsAndBiases",
    "mlflow": "runtime.logging.mlflow:MLflow",
}


def make_trackers(specs: Sequence[str], log_dir: Path) -> list[ev.Tracker]:
    """Builds the trackers that `--trackers` names; each gets the log folder.

    Raises:
        UserError: an unknown name or argument, a missing package, or an error raised by a tracker's constructor.
    """
    trackers: list[ev.Tracker] = []
    for spec in specs:
        try:
            trackers.append(registry.build(registry.Spec(spec, trusted=True), TRACKERS, "--trackers", log_dir=log_dir))
        except Exception as error:  # a user's own constructor may raise anything
            ev.close_files(trackers)
            if isinstance(error, UserError):
                raise
            raise UserError(f"--trackers {spec!r}: {type(error).__name__}: {error}") from error
    return trackers


class Recorder(ABC):
    """Translates a run's events into what experiment trackers record: facts, values by name, and files.

    Values are named step/… (per optimizer step), train/… (per epoch) and evaluation/…. The first are indexed by the
    step, counted from the run's first epoch, the others by the epoch.

    Args:
        every: record one step in `every`, at least 1.
    """

    def __init__(self, every: int) -> None:
        if not isinstance(every, int) or every < 1:
            raise UserError(f"--trackers: every={every!r}; expected a whole number, 1 or more")
        self._every = every
        self._facts: dict[str, dict[str, Any]] = {}
        self._classes: list[str] = []
        self._steps_per_epoch = 0
        self._ga_steps = 1

    def on(self, event: ev.Event) -> None:
        if isinstance(event, ev.InitStarted):
            self._facts = {"config": event.config.to_json(), "environment": event.environment}
        elif isinstance(event, ev.InitStopped):
            self._facts["run"] = {
                "seed": event.seeds["master"],
                "division": event.division,
                "rule_violations": event.rule_violations,
                "platform": event.platform,
            }
        elif isinstance(event, ev.DataOpened):
            self._on_data_opened(event)
        elif isinstance(event, ev.EpochStarted):
            self._steps_per_epoch = event.batches // self._ga_steps
        elif isinstance(event, ev.StepEnd):
            self._on_step_end(event)
        elif isinstance(event, ev.EpochStopped):
            values = {
                "train/loss": event.loss,
                "train/learning_rate": event.learning_rate,
                "train/samples_per_s": event.samples / max(event.seconds, 1e-9),
            }
            self.log_values("epoch", event.epoch, values)
        elif isinstance(event, ev.EvaluationStopped):
            values = {"evaluation/mean_dice": event.mean_dice, "evaluation/loss": event.loss}
            values |= self._by_class("evaluation", event.dice)
            self.log_values("epoch", event.epoch, values | {"evaluation/seconds": event.seconds})
        elif isinstance(event, ev.TrainDiceEnd):
            values = {"train/mean_dice": event.mean_dice}
            self.log_values("epoch", event.epoch, values | self._by_class("train", event.dice))
        elif isinstance(event, ev.RunStopped):
            self.end(event)
        elif isinstance(event, ev.RunFinalized):
            self.close([Path(file) for file in event.files])

    def _by_class(self, prefix: str, dice: Sequence[float]) -> dict[str, float]:
        return {f"{prefix}/dice_{name}": value for name, value in zip(self._classes, dice, strict=True)}

    def _on_data_opened(self, event: ev.DataOpened) -> None:
        """Begins the record: from here on all facts are known, and little can still make the run fail."""
        self._ga_steps = event.gradient_accumulation_steps
        self._classes = event.classes[1:]
        for name in ("classes", "train_samples", "eval_samples", "global_batch_size"):
            self._facts["run"][name] = getattr(event, name)
        self.begin(self._facts)

    def _on_step_end(self, event: ev.StepEnd) -> None:
        step = (event.epoch - 1) * self._steps_per_epoch + (event.batch + 1) // self._ga_steps
        if step % self._every == 0:
            values = {"loss": event.loss, "gradient_norm": event.gradient_norm, "loss_scale": event.loss_scale}
            self.log_values("step", step, {f"step/{name}": value for name, value in values.items()})

    @abstractmethod
    def begin(self, facts: dict[str, dict[str, Any]]) -> None:
        """Begins the record, once the clock runs. `facts` are grouped by "config" (flags), "environment" and "run"."""

    @abstractmethod
    def log_values(self, axis: str, index: int, values: dict[str, float]) -> None:
        """Records values by name at an index of the axis "epoch" or "step". They may be NaN or infinite."""

    @abstractmethod
    def end(self, event: ev.RunStopped) -> None:
        """Records how the run ended. No values follow, only `close`, unless the process is killed."""

    @abstractmethod
    def close(self, files: list[Path]) -> None:
        """Records the files that the run leaves, and ends: checkpoint (*.pth), logs, report, charts (*.png)."""
