"""What happens in a run, as dataclasses. Metrics inside an event are already global: every rank decides alike.

Only `InitStarted` carries the whole configuration; the order of the events is the order of MLPerf's log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from common.messages import logger
from runtime.arguments import RunConfig


@dataclass(frozen=True)
class Event:
    """Something that happened; `kind` in the JSON lines is the class's name."""


@dataclass(frozen=True)
class InitStarted(Event):
    """Before the network is built."""

    config: RunConfig
    environment: dict[str, Any]
    caches_were_cleared: bool


@dataclass(frozen=True)
class PreflightEnd(Event):
    """The pre-flight's result: a table for people, and for each check what was looked at, found, and to do."""

    table: str
    checks: list[dict[str, str]]


@dataclass(frozen=True)
class InitStopped(Event):
    """Network, optimizer and warm-up are ready; no training data has been touched.

    Attributes:
        seeds: by purpose.
        division: "closed" or "open", with the reasons for "open".
        platform: what it runs on.
        tensors: parameter-holding modules' names, in the network's order, for `weights_initialization`.
        samples_per_epoch: over all ranks.
        notes: what the user may not expect, a line each.
    """

    config: RunConfig
    seeds: dict[str, Any]
    division: str
    reasons: list[str]
    platform: str
    tensors: list[str]
    samples_per_epoch: int
    notes: list[str]


@dataclass(frozen=True)
class Calibrated(Event):
    """`--benchmark`: what the figures are compared with, measured before the clock starts.

    Attributes:
        flops_per_sample: of forward and backward, a multiplication and an addition counted as two.
        peak_flops: a second, of this rank's device in a large matrix product of the step's number format.
        communication_ms: what a step takes longer where it averages gradients over the ranks; 0 on one.
    """

    flops_per_sample: float
    peak_flops: float
    communication_ms: float


@dataclass(frozen=True)
class RunStarted(Event):
    """The clock starts: comes before the first look at the data."""


@dataclass(frozen=True)
class DataOpened(Event):
    """`notes`: what the user may not expect, a line each."""

    train_samples: int
    eval_samples: int
    samples_per_epoch: int
    global_batch_size: int
    gradient_accumulation_steps: int
    classes: list[str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BlockStarted(Event):
    """A block: the epochs up to and with the next evaluation."""

    first_epoch: int
    epochs: int


@dataclass(frozen=True)
class EpochStarted(Event):
    epoch: int
    learning_rate: float
    batches: int


@dataclass(frozen=True)
class PhaseEnd(Event):
    """Part of an iteration: "data" (the batch has arrived), "forward and backward"; `MicroBatchEnd` ends the last."""

    phase: str


@dataclass(frozen=True)
class MicroBatchEnd(Event):
    """One iteration of this rank. Carries no loss: reading it would make the host wait for the device."""

    epoch: int
    batch: int
    samples: int


@dataclass(frozen=True)
class StepEnd(Event):
    """A step of the optimizer, told when its numbers have reached the host: on a GPU a step later.

    Attributes:
        batch: of the epoch, the last one of the step, counted from 0.
        loss: this rank's, the mean of the step's micro-batches.
        gradient_norm: of the averaged gradients, the loss scale divided out; equal on all ranks.
        loss_scale: 1 without a loss scaler.
        signal: the number of one that asks some rank to leave, 0: none. It and what follows are alike on all ranks.
        save: a checkpoint is due.
        fault: some rank's loss or gradient is no finite number, or its loss scale has collapsed.
    """

    epoch: int
    batch: int
    loss: float
    gradient_norm: float
    loss_scale: float
    signal: int = 0
    save: bool = False
    fault: bool = False


@dataclass(frozen=True)
class EpochStopped(Event):
    """`loss` is the mean over all ranks and batches, `seconds` this rank's."""

    epoch: int
    loss: float
    learning_rate: float
    samples: int
    seconds: float


@dataclass(frozen=True)
class EvaluationStarted(Event):
    epoch: int
    cases: int


@dataclass(frozen=True)
class CaseEvaluated(Event):
    """One case of this rank is done."""

    epoch: int
    case: str


@dataclass(frozen=True)
class EvaluationStopped(Event):
    """Scores over all cases and ranks.

    Attributes:
        dice: mean Dice of each foreground class, in the classes' order.
        mean_dice: mean of `dice`.
        loss: mean loss of the sliding-window logits.
        per_case: {case: Dice of each foreground class}.
    """

    epoch: int
    mean_dice: float
    dice: list[float]
    loss: float
    seconds: float
    per_case: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainDiceEnd(Event):
    """Scores of training cases, found as an evaluation finds its own; nothing is decided by them."""

    epoch: int
    mean_dice: float
    dice: list[float]
    loss: float
    seconds: float


@dataclass(frozen=True)
class BlockStopped(Event):
    first_epoch: int
    epochs: int


@dataclass(frozen=True)
class RunStopped(Event):
    """`status` is "success" or "aborted", `reason` says why."""

    status: str
    reason: str
    epoch: int
    seconds: float


@dataclass(frozen=True)
class RunFinalized(Event):
    """The last event, however a run ended that had started training: nothing of it is written any more.

    `files` are what it leaves behind: checkpoint, logs, report and pictures.
    """

    files: list[str]


class Tracker(Protocol):
    """Watches a run, on rank 0 alone. Returns nothing, so no tracker can change a run."""

    def on(self, event: Event) -> None: ...


class EventDispatcher:
    """Hands every event to the watchdog (on every rank), then to the trackers (rank 0; the other ranks have none).

    A tracker failure is reported once; training goes on, and the tracker still receives the events that follow.
    """

    def __init__(self, trackers: Sequence[Tracker], watchdog: Tracker | None = None) -> None:
        self._trackers = trackers
        self._watchdog = watchdog
        self._failed: set[int] = set()

    def __call__(self, event: Event) -> None:
        if self._watchdog is not None:
            self._watchdog.on(event)
        for tracker in self._trackers:
            try:
                tracker.on(event)
            except Exception as error:
                if id(tracker) not in self._failed:
                    self._failed.add(id(tracker))
                    cause = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
                    logger.warning(
                        f"{type(tracker).__name__} failed ({cause}); its record may be incomplete, training goes on"
                    )
