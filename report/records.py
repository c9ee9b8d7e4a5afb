"""Reads a run from its log folder; a resumed run's log files are merged into one record."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from runtime.arguments import with_current_names
from runtime.mlperf.closed_division import RESUMED
from runtime.mlperf.rulesets import DEFAULT_RULESET, RULESETS

Event = Mapping[str, Any]
# Names in logs of version 0.1 -> current names.
RENAMED_EVENTS = {"TrainingScored": "TrainDiceEnd"}
RENAMED_KEYS = {"reasons": "rule_violations"}


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Training of one epoch.

    Attributes:
        loss: NaN if it was not finite.
        samples: over all ranks, of the process that completed it; an earlier one may have trained its beginning.
    """

    number: int
    loss: float
    learning_rate: float
    samples: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores after an epoch.

    Attributes:
        dice: mean over the cases, per foreground class.
        clock_s: since the start of the run, over all its log files.
        per_case: Dice per foreground class, by case.
    """

    epoch: int
    mean_dice: float
    dice: list[float]
    loss: float
    seconds: float
    clock_s: float
    per_case: dict[str, list[float]]


@dataclass(kw_only=True)
class Run:
    """A run as its logs describe it.

    Attributes:
        classes: names of the foreground classes.
        clock_s, init_s: seconds on MLPerf's clock and before it, over all log files.
        samples_per_epoch: of the newest log file; a resume may change it.
        epoch_samples: samples of every epoch that was begun, over all ranks, whether or not it was completed.
        log_files: number of files that the run was logged in: one more for each time it was resumed.
        status, reason: of its end; "" if the log has none.
        train_dice: mean Dice of training cases by epoch, from `--callbacks train_dice`.
        doubtful_cases: cases whose scans or masks have been doubted, and why.
        benchmark: results of `--benchmark`, else {}.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, Any] = field(default_factory=dict)
    division: str = ""
    rule_violations: list[str] = field(default_factory=list)
    platform: str = ""
    notes: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    train_cases: int = 0
    evaluation_cases: int = 0
    samples_per_epoch: int = 0
    started_s: float = 0.0
    clock_s: float = 0.0
    init_s: float = 0.0
    log_files: int = 0
    status: str = ""
    reason: str = ""
    epochs: dict[int, Epoch] = field(default_factory=dict)
    epoch_samples: dict[int, int] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    train_dice: dict[int, float] = field(default_factory=dict)
    doubtful_cases: dict[str, str] = field(default_factory=dict)
    benchmark: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.resolve().name or str(self.folder)

    @property
    def target(self) -> float:
        return float(self.config["quality_threshold"])

    @property
    def ruleset(self) -> str:
        """The MLPerf ruleset that its log follows; logs without one predate the choice."""
        ruleset = str(self.config.get("ruleset"))
        return ruleset if ruleset in RULESETS else DEFAULT_RULESET

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the highest mean Dice; of equal ones the first, whose network the checkpoint keeps."""
        finite = [evaluation for evaluation in self.evaluations.values() if math.isfinite(evaluation.mean_dice)]
        return max(finite, key=lambda evaluation: evaluation.mean_dice, default=None)

    @property
    def converged(self) -> Evaluation | None:
        """The first evaluation that reached the target."""
        return next((found for found in self.evaluations.values() if found.mean_dice >= self.target), None)

    @property
    def samples_per_s(self) -> float:
        """Training throughput over all epochs; NaN without any."""
        seconds = sum(epoch.seconds for epoch in self.epochs.values())
        return sum(epoch.samples for epoch in self.epochs.values()) / seconds if seconds else math.nan

    def samples_to(self, epoch: int) -> tuple[int, bool]:
        """Returns the samples of the epochs up to and including this one, and whether their number is exact.

        It is not if an epoch is not in these logs, or if the rest of one was skipped after a resume.
        """
        numbers = range(1, epoch + 1)
        samples = sum(self.epoch_samples.get(number, self.samples_per_epoch) for number in numbers)
        return samples, all(number in self.epochs for number in numbers)

    def class_names(self, count: int) -> list[str]:
        """Returns the names of `count` foreground classes: L1, L2, … if the log has none."""
        return self.classes if len(self.classes) == count else [f"L{value}" for value in range(1, count + 1)]


def names_of(runs: Sequence[Run]) -> list[str]:
    """Returns the name of each run's folder, or all paths if two folders have the same name."""
    short = [run.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def read_run(folder: Path) -> Run:
    """Reads the newest run of a log folder, with the log files that it was resumed from.

    Raises:
        UserError: there is no log, or it is not a run's.
    """
    if not folder.is_dir():
        raise UserError(f"--log_dir {folder}: no such folder")
    newest = folder / "log.jsonl"
    if not newest.is_file():
        raise UserError(f"--log_dir {folder}: no log.jsonl in it; give the --log_dir of a run")
    run = Run(folder=folder)
    try:
        for events in _read_logs(folder, newest):
            _add_log(run, events)
        run.benchmark = _read_object(folder / "benchmark.json")
        if run.config:
            run.target  # noqa: B018 - a log without it is another program's
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"--log_dir {folder}: its log is damaged or of another version ({error!r})") from None
    if not run.config:
        raise UserError(f"--log_dir {folder}: the log ends before the run began")
    return run


def _read_logs(folder: Path, newest: Path) -> list[list[Event]]:
    """Returns the events of the newest log file and of those that it continues, oldest first."""
    names = ((re.fullmatch(r"log\.(\d+)\.jsonl", file.name), file) for file in folder.iterdir())
    numbered = {int(match[1]): file for match, file in names if match}
    logs = [_read_events(newest)]
    for _, file in sorted(numbered.items(), reverse=True):
        if not _is_resumed(logs[0]):
            break
        earlier = _read_events(file)
        later_seed, seed = _master_seed(logs[0]), _master_seed(earlier)
        if None not in (later_seed, seed) and later_seed != seed:
            break
        logs.insert(0, earlier)
    return logs


def _is_resumed(log: list[Event]) -> bool:
    """Whether the log continues an earlier one; if it ends before that was logged, whether `--resume` was given."""
    if ready := _first(log, "InitStopped"):
        return str(RESUMED) in ready["rule_violations"]
    started = _first(log, "InitStarted")
    return started is not None and bool(started["config"]["resume"])


def _master_seed(log: list[Event]) -> int | None:
    ready = _first(log, "InitStopped")
    return None if ready is None else int(ready["seeds"]["master"])


def _read_events(path: Path) -> list[Event]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            event = {RENAMED_KEYS.get(key, key): value for key, value in json.loads(line).items()}
            event["event"], event["time_s"] = RENAMED_EVENTS.get(event["event"], event["event"]), event["time_s"]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if number == len(lines):  # the run was killed while writing it
                break
            raise UserError(f"{path}: line {number} is not an event of a run") from None
        events.append(event)
    return events


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: damaged or cannot be read") from None


def _first(events: list[Event], kind: str) -> Event | None:
    return next((event for event in events if event["event"] == kind), None)


def _add_log(run: Run, events: list[Event]) -> None:
    """Adds a log file's events; they replace earlier records of the same epochs."""
    run.log_files += 1
    run.status = run.reason = ""
    before_s, opened_s = run.clock_s, None
    batch_samples = 0  # of a micro-batch over all ranks; 0 until it is known
    started_s, ended_s = (events[0]["time_s"], events[-1]["time_s"]) if events else (0.0, 0.0)
    run.started_s = run.started_s or started_s
    for event in events:
        kind = event["event"]
        if kind == "InitStarted":
            run.config, run.environment = with_current_names(event["config"]), event["environment"]
        elif kind == "InitStopped":
            run.seeds, run.division, run.rule_violations = event["seeds"], event["division"], event["rule_violations"]
            run.platform, run.samples_per_epoch = event["platform"], event["samples_per_epoch"]
            run.doubtful_cases = dict(event.get("doubtful_cases", {}))
            run.notes += [note for note in event["notes"] if note not in run.notes]
        elif kind == "RunStarted":
            opened_s = event["time_s"]
            run.init_s += opened_s - started_s
        elif kind == "DataOpened":
            run.classes = [str(name) for name in event["classes"][1:]]
            run.train_cases, run.evaluation_cases = event["train_samples"], event["eval_samples"]
            batch_samples = event.get("global_batch_size", 0) // event.get("gradient_accumulation_steps", 1)
        elif kind == "EpochStarted":
            _discard_from(run, int(event["epoch"]))
            if batch_samples:
                run.epoch_samples[event["epoch"]] = event["batches"] * batch_samples
        elif kind == "EpochStopped":
            run.epochs[event["epoch"]] = _epoch(event)
            run.epoch_samples.setdefault(event["epoch"], int(event["samples"]))
        elif kind == "EvaluationStopped":
            clock_s = before_s + event["time_s"] - (opened_s or event["time_s"])
            run.evaluations[event["epoch"]] = _evaluation(event, clock_s)
        elif kind == "TrainDiceEnd":
            run.train_dice[event["epoch"]] = _number(event["mean_dice"])
        elif kind == "RunStopped":
            run.status, run.reason, ended_s = str(event["status"]), str(event["reason"]), event["time_s"]
    if opened_s is not None:
        run.clock_s = before_s + ended_s - opened_s


def _discard_from(run: Run, epoch: int) -> None:
    """Drops records from this epoch on: an earlier process made them after its last checkpoint, so they were lost."""
    for records in (run.epochs, run.epoch_samples, run.evaluations, run.train_dice):
        for number in [number for number in records if number >= epoch]:
            del records[number]


def _epoch(event: Event) -> Epoch:
    return Epoch(
        number=int(event["epoch"]),
        loss=_number(event["loss"]),
        learning_rate=_number(event["learning_rate"]),
        samples=int(event["samples"]),
        seconds=float(event["seconds"]),
    )


def _evaluation(event: Event, clock_s: float) -> Evaluation:
    return Evaluation(
        epoch=int(event["epoch"]),
        mean_dice=_number(event["mean_dice"]),
        dice=[_number(dice) for dice in event["dice"]],
        loss=_number(event["loss"]),
        seconds=float(event["seconds"]),
        clock_s=clock_s,
        per_case={str(case): [_number(dice) for dice in row] for case, row in event["per_case"].items()},
    )


def _number(value: Any) -> float:
    """JSON has no NaN: the log has null for numbers that are not finite."""
    return math.nan if value is None else float(value)
