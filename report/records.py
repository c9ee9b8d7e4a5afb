"""Reads a run back from its log folder; what a resumed run logged in several files becomes one story."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from runtime.arguments import with_current_names
from runtime.mlperf.closed_division import RESUMED
from runtime.mlperf.rulesets import DEFAULT_RULESET, RULESETS

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Epoch:
    """An epoch's training: `samples` over all ranks, `loss` NaN where it was no number."""

    number: int
    loss: float
    learning_rate: float
    samples: int
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Scores after an epoch: Dice per foreground class, of all cases and of each; `clock_s` since the run started."""

    epoch: int
    mean_dice: float
    dice: list[float]
    loss: float
    seconds: float
    clock_s: float
    per_case: dict[str, list[float]]


@dataclass
class Run:
    """A run as its logs tell it.

    Attributes:
        classes: of the foreground.
        clock_s, init_s: on the clock and before it, over all parts of a resumed run.
        parts: how many logs it is told by.
        status, reason: of its end; "" where the log has none.
        train_dice: mean Dice of training cases by epoch, where `--callbacks train_dice` found it.
        benchmark: what `--benchmark` measured, {} without.
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
    parts: int = 0
    status: str = ""
    reason: str = ""
    epochs: dict[int, Epoch] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    train_dice: dict[int, float] = field(default_factory=dict)
    benchmark: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.resolve().name or str(self.folder)

    @property
    def target(self) -> float:
        return float(self.config["quality_threshold"])

    @property
    def ruleset(self) -> str:
        """Whose units its MLPerf log has; a log that does not say is of a time when there was one."""
        told = str(self.config.get("ruleset"))
        return told if told in RULESETS else DEFAULT_RULESET

    @property
    def best(self) -> Evaluation | None:
        """The evaluation of the highest mean Dice; of equal ones the first, whose network the checkpoint keeps."""
        scored = [found for found in self.evaluations.values() if math.isfinite(found.mean_dice)]
        return max(scored, key=lambda found: found.mean_dice, default=None)

    @property
    def converged(self) -> Evaluation | None:
        """The first evaluation that reached the target."""
        return next((found for found in self.evaluations.values() if found.mean_dice >= self.target), None)

    @property
    def rate(self) -> float:
        """Training samples a second, over all epochs."""
        seconds = sum(epoch.seconds for epoch in self.epochs.values())
        return sum(epoch.samples for epoch in self.epochs.values()) / seconds if seconds else math.nan

    def class_names(self, count: int) -> list[str]:
        """`count` foreground classes' names, L1, L2, … where the log has none."""
        return self.classes if len(self.classes) == count else [f"L{value}" for value in range(1, count + 1)]


def read_run(folder: Path) -> Run:
    """The newest run of a log folder, with the parts that it was resumed from.

    Raises:
        UserError: no log, or one that no run has written.
    """
    if not folder.is_dir():
        raise UserError(f"--log_dir {folder}: no such folder")
    newest = folder / "log.jsonl"
    if not newest.is_file():
        raise UserError(f"--log_dir {folder}: no log.jsonl in it; give the --log_dir of a run")
    run = Run(folder)
    try:
        for events in _parts(folder, newest):
            _add_part(run, events)
        run.benchmark = _read_object(folder / "benchmark.json")
        if run.config:
            run.target  # noqa: B018 - a log without it is of another program
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"--log_dir {folder}: its log is damaged or of another version ({error!r})") from None
    if not run.config:
        raise UserError(f"--log_dir {folder}: the log ends before the run began")
    return run


def _parts(folder: Path, newest: Path) -> list[list[Event]]:
    """The events of the newest log and of those that it goes on from, the oldest first."""
    names = ((re.fullmatch(r"log\.(\d+)\.jsonl", file.name), file) for file in folder.iterdir())
    numbered = {int(match[1]): file for match, file in names if match}
    parts = [_read_events(newest)]
    for _, file in sorted(numbered.items(), reverse=True):
        if not _goes_on(parts[0]):
            break
        earlier = _read_events(file)
        later_seed, seed = _master_seed(parts[0]), _master_seed(earlier)
        if None not in (later_seed, seed) and later_seed != seed:
            break
        parts.insert(0, earlier)
    return parts


def _goes_on(part: list[Event]) -> bool:
    """Whether it was resumed; one that ended before it could tell was, where it was asked to."""
    if ready := _first(part, "InitStopped"):
        return str(RESUMED) in ready["reasons"]
    started = _first(part, "InitStarted")
    return started is not None and bool(started["config"]["resume"])


def _master_seed(part: list[Event]) -> int | None:
    ready = _first(part, "InitStopped")
    return None if ready is None else int(ready["seeds"]["master"])


def _read_events(path: Path) -> list[Event]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            event["event"], event["time_s"]
        except (ValueError, TypeError, KeyError, RecursionError):
            if number == len(lines):  # the run was killed while it wrote
                break
            raise UserError(f"{path}: line {number} is no event of a run") from None
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


def _add_part(run: Run, events: list[Event]) -> None:
    """Adds a later part; where it did an epoch again, its record counts."""
    run.parts += 1
    run.status = run.reason = ""
    before_s, opened_s = run.clock_s, None
    started_s, ended_s = (events[0]["time_s"], events[-1]["time_s"]) if events else (0.0, 0.0)
    run.started_s = run.started_s or started_s
    for event in events:
        kind = event["event"]
        if kind == "InitStarted":
            run.config, run.environment = with_current_names(event["config"]), event["environment"]
        elif kind == "InitStopped":
            run.seeds, run.division, run.rule_violations = event["seeds"], event["division"], event["reasons"]
            run.platform, run.samples_per_epoch = event["platform"], event["samples_per_epoch"]
            run.notes += [note for note in event["notes"] if note not in run.notes]
        elif kind == "RunStarted":
            opened_s = event["time_s"]
            run.init_s += opened_s - started_s
        elif kind == "DataOpened":
            run.classes = [str(name) for name in event["classes"][1:]]
            run.train_cases, run.evaluation_cases = event["train_samples"], event["eval_samples"]
        elif kind == "EpochStarted":
            _forget(run, int(event["epoch"]))
        elif kind == "EpochStopped":
            run.epochs[event["epoch"]] = _epoch(event)
        elif kind == "EvaluationStopped":
            clock_s = before_s + event["time_s"] - (opened_s or event["time_s"])
            run.evaluations[event["epoch"]] = _evaluation(event, clock_s)
        elif kind in ("TrainDiceEnd", "TrainingScored"):  # the second in logs of 0.1
            run.train_dice[event["epoch"]] = _number(event["mean_dice"])
        elif kind == "RunStopped":
            run.status, run.reason, ended_s = str(event["status"]), str(event["reason"]), event["time_s"]
    if opened_s is not None:
        run.clock_s = before_s + ended_s - opened_s


def _forget(run: Run, epoch: int) -> None:
    """What an earlier part did from this epoch on was lost with its process: the checkpoint is older."""
    run.epochs = {number: found for number, found in run.epochs.items() if number < epoch}
    run.evaluations = {number: found for number, found in run.evaluations.items() if number < epoch}
    run.train_dice = {number: found for number, found in run.train_dice.items() if number < epoch}


def _epoch(event: Event) -> Epoch:
    return Epoch(
        int(event["epoch"]),
        _number(event["loss"]),
        _number(event["learning_rate"]),
        int(event["samples"]),
        float(event["seconds"]),
    )


def _evaluation(event: Event, clock_s: float) -> Evaluation:
    per_case = {str(case): [_number(dice) for dice in row] for case, row in event["per_case"].items()}
    return Evaluation(
        int(event["epoch"]),
        _number(event["mean_dice"]),
        [_number(dice) for dice in event["dice"]],
        _number(event["loss"]),
        float(event["seconds"]),
        clock_s,
        per_case,
    )


def _number(value: Any) -> float:
    """JSON has no NaN: the log has null for what was no finite number."""
    return math.nan if value is None else float(value)
