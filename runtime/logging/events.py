"""The events of a run, as dataclasses, and their dispatcher.

Scores in an event are already those of all ranks, so that every rank takes the same decisions. The order of the events
is the order of MLPerf's log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

from common.messages import logger
from runtime.arguments import RunConfig


@dataclass(frozen=True)
class Event:
    """Something that happened; in the JSON lines `event` is the class's name."""


@dataclass(frozen=True)
class InitStarted(Event):
    """Before the network is built."""

    config: RunConfig
    environment: dict[str, Any]
    caches_were_cleared: bool


@dataclass(frozen=True)
class PreflightEnd(Event):
    """The result of the pre-flight checks: a table to print, and each check's subject, finding and remedy."""

    table: str
    checks: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class InitStopped(Event):
    """Network, optimizer and warm-up are ready; no training data has been touched.

    Attributes:
        seeds: by purpose.
        division: "closed" or "open"; `rule_violations` make it open.
        platform: the system's name.
        tensors: names of the modules with parameters, in the network's order, for `weights_initialization`.
        samples_per_epoch: over all ranks.
        notes: what the user may not expect, one line each.
        doubtful_cases: cases whose scans or masks have been doubted, and why.
        data_digest: identifies the cases of each subset and their files; "" in a record of an earlier version.
    """

    config: RunConfig
    seeds: dict[str, Any]
    division: str
    rule_violations: list[str]
    platform: str
    tensors: list[str]
    samples_per_epoch: int
    notes: list[str]
    doubtful_cases: Mapping[str, str] = field(default_factory=dict)
    data_digest: str = ""


@dataclass(frozen=True)
class Calibrated(Event):
    """`--benchmark`: reference figures, measured before the clock starts.

    Attributes:
        flops_per_sample: of forward and backward; a multiply-add counts as two.
        peak_flops: per second, of this rank's device in a large matrix product of the step's number format.
        communication_ms: by how much averaging the gradients over the ranks prolongs a step; 0 on one rank.
    """

    flops_per_sample: float
    peak_flops: float
    communication_ms: float


@dataclass(frozen=True)
class RunStarted(Event):
    """The clock starts; the training data has not been touched yet."""


@dataclass(frozen=True, kw_only=True)
class DataOpened(Event):
    """The data set is open; `notes`: what the user may not expect, one line each."""

    train_samples: int
    eval_samples: int
    samples_per_epoch: int
    global_batch_size: int
    gradient_accumulation_steps: int
    classes: list[str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class BlockStarted(Event):
    """A block is the epochs up to and including the next evaluation."""

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


@dataclass(frozen=True, kw_only=True)
class StepEnd(Event):
    """A step of the optimizer, reported when its numbers have reached the host: on a GPU, one step later.

    Attributes:
        batch: index in the epoch, from 0, of the step's last micro-batch.
        loss: this rank's mean over the step's micro-batches.
        gradient_norm: of the averaged gradients, the loss scale divided out; equal on all ranks.
        loss_scale: 1 without a loss scaler.
        signal: number of a signal that some rank received, 0: none. This and the fields below are equal on all ranks.
        save: a checkpoint is due.
        fault: some rank's loss or gradient is not finite, or its loss scale has collapsed.
    """

    epoch: int
    batch: int
    loss: float
    gradient_norm: float
    loss_scale: float
    signal: int = 0
    save: bool = False
    fault: bool = False


@dataclass(frozen=True, kw_only=True)
class EpochStopped(Event):
    """`loss` is the mean over all ranks and batches, `seconds` is this rank's time."""

    epoch: int
    loss: float
    learning_rate: float
    samples: int
    seconds: float


@dataclass(frozen=True)
class EvaluationStarted(Event):
    """`is_concurrent`: on ranks of its own (`--eval_ranks`); its scores follow after later epochs."""

    epoch: int
    cases: int
    is_concurrent: bool = False


@dataclass(frozen=True)
class Waiting(Event):
    """This rank waits for one that does something else, for as long as that takes; repeated while it waits."""

    what: str


@dataclass(frozen=True)
class CaseEvaluated(Event):
    """This rank has scored one case."""

    epoch: int
    case: str


@dataclass(frozen=True, kw_only=True)
class EvaluationStopped(Event):
    """Scores over all cases and ranks.

    Attributes:
        dice: mean Dice of each foreground class, in the classes' order.
        mean_dice: mean of `dice`.
        loss: mean loss of the sliding-window logits.
        per_case: Dice of each foreground class, by case id.
    """

    epoch: int
    mean_dice: float
    dice: list[float]
    loss: float
    seconds: float
    per_case: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainDiceEnd(Event):
    """Scores of training cases, computed as an evaluation does; no decision depends on them."""

    epoch: int
    mean_dice: float
    dice: list[float]
    loss: float
    seconds: float


@dataclass(frozen=True)
class BlockStopped(Event):
    first_epoch: int
    epochs: int


@dataclass(frozen=True, kw_only=True)
class RunStopped(Event):
    """`status` is "success" or "aborted", for the stated `reason`.

    `exit_status` is the program's: MLPerf calls a run aborted, too, that has used up its epochs in order.
    """

    status: str
    reason: str
    epoch: int
    seconds: float
    exit_status: int = 0


@dataclass(frozen=True)
class RunFinalized(Event):
    """The last event of a run that had started training, however it ended: nothing is written after it.

    `files`: checkpoint, logs, report and pictures of the run.
    """

    files: list[str]


class Tracker(Protocol):
    """Watches a run, on rank 0 alone. Returns nothing, so no tracker can change a run."""

    def on(self, event: Event) -> None: ...


@runtime_checkable
class HoldsFiles(Protocol):
    """A tracker that keeps files open."""

    def close_files(self) -> None:
        """Closes them, after the last event, however the run ended."""


def close_files(trackers: Iterable[Tracker]) -> None:
    for tracker in trackers:
        if isinstance(tracker, HoldsFiles):
            with suppress(OSError):  # a full disk, which the tracker has reported
                tracker.close_files()


class EventDispatcher:
    """Hands every event to the watchdog (on every rank), then to the trackers (rank 0; the other ranks have none).

    A tracker failure is reported once; training goes on, and the tracker still receives the events that follow. As a
    context it closes the trackers' files at the end.
    """

    def __init__(self, trackers: Sequence[Tracker], watchdog: Tracker | None = None) -> None:
        self._trackers = trackers
        self._watchdog = watchdog
        self._failed: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        close_files(self._trackers)

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
