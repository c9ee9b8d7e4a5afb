"""Reads one MLPerf log of this program and checks that it is the complete log of one run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from runtime.mlperf.closed_division import RESUMED

TOKEN = ":::MLLOG "
WRITER = "runtime/logging/mlperf.py"
FORMER_WRITERS = ("runtime/trackers.py",)  # the module's name in earlier versions
BENCHMARK = "unet3d"
TARGET = 0.908
# The keys that every log has exactly once, in this order.
HEAD = (
    "cache_clear",
    "init_start",
    "seed",
    "submission_benchmark",
    "submission_org",
    "submission_division",
    "submission_status",
    "submission_platform",
    "opt_name",
    "opt_base_learning_rate",
    "opt_learning_rate_warmup_epochs",
    "opt_learning_rate_decay_boundary_epochs",
    "opt_learning_rate_decay_factor",
    "opt_weight_decay",
    "opt_momentum",
    "oversampling",
    "training_input_shape",
    "validation_input_shape",
    "validation_overlap",
    "init_stop",
    "run_start",
    "train_samples",
    "eval_samples",
    "samples_per_epoch",
    "global_batch_size",
    "gradient_accumulation_steps",
)
# The keys that may follow a key inside the blocks; a block is a number of epochs with an evaluation at the end. With
# --eval_ranks its scores come after a later epoch, or after the last block.
AFTER = {
    "block_start": ("epoch_start",),
    "epoch_start": ("epoch_stop",),
    "epoch_stop": ("epoch_start", "eval_start", "eval_accuracy", "block_stop"),
    "eval_start": ("eval_accuracy", "block_stop"),
    "eval_accuracy": ("eval_stop",),
    "eval_stop": ("epoch_start", "eval_start", "block_stop", "run_stop"),
    "block_stop": ("block_start", "eval_accuracy", "run_stop"),
}


@dataclass(frozen=True)
class Problem:
    """A fault in a log, with its line; line 0 means the file as a whole."""

    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}" if self.line else f"{self.path}: {self.message}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of an MLPerf log."""

    line: int
    time_ms: int
    key: str
    value: Any
    metadata: dict[str, Any]


@dataclass(kw_only=True)
class Log:
    """One run as described by its MLPerf log; if there are `problems`, the rest may be incomplete.

    Attributes:
        records: by line.
        values: value of each key, where it first occurs.
        lines: line number of each key, where it first occurs.
    """

    path: Path
    records: list[Record] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def first(self, key: str) -> Record:
        """The first record of a key."""
        return self.records[self.lines[key] - 1]

    @property
    def clock_ms(self) -> int:
        """Milliseconds from run_start to run_stop."""
        return self.records[-1].time_ms - self.first("run_start").time_ms

    @property
    def converged(self) -> bool:
        return bool(self.records[-1].metadata.get("status") == "success")

    @property
    def rule_violations(self) -> list[str]:
        if "submission_division" not in self.lines:
            return []
        metadata = self.first("submission_division").metadata
        return list(metadata.get("rule_violations") or metadata.get("departures") or [])  # the latter up to 0.1

    @property
    def is_closed(self) -> bool:
        return bool(self.values.get("submission_division") == "closed")

    @property
    def evaluations(self) -> list[tuple[int, float]]:
        """(epoch, mean Dice) in order."""
        return [(record.metadata["epoch"], record.value) for record in self.records if record.key == "eval_accuracy"]

    @property
    def epochs(self) -> int:
        """Number of epochs up to the last evaluation."""
        return self.evaluations[-1][0] if self.evaluations else 0

    @property
    def unit(self) -> int:
        """By how much `epoch_num` grows per epoch: the samples of an epoch, or 1."""
        metadata = self.first("epoch_start").metadata
        return int(metadata["epoch_num"]) // int(metadata["epoch"])

    def seconds_in(self, phase: str) -> float:
        """Total seconds between `phase`_start and `phase`_stop; `phase` is "epoch" or "eval".

        A phase that was cut short has no stop and does not count.
        """
        total, started = 0, 0
        for record in self.records:
            if record.key == f"{phase}_start":
                started = record.time_ms
            elif record.key == f"{phase}_stop":
                total += record.time_ms - started
        return total / 1000


def read_log(path: Path) -> Log:
    """Reads and checks a log; faults in its content are listed in `problems`.

    Raises:
        OSError: the file cannot be read.
    """
    log = Log(path=path)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines:
        log.problems.append(Problem(path, 0, "empty"))
        return log
    for number, text in enumerate(lines, start=1):
        record = _parse(number, text)
        if isinstance(record, str):
            cut = " (the log is cut off here)" if number == len(lines) else ""
            log.problems.append(Problem(path, number, record + cut))
            return log
        log.records.append(record)
        log.values.setdefault(record.key, record.value)
        log.lines.setdefault(record.key, record.line)
    log.problems += [Problem(path, line, message) for line, message in _check(log)]
    return log


def _parse(number: int, text: str) -> Record | str:
    """Returns the line's record, or an error message."""
    if not text.startswith(TOKEN):
        return "not a line of an MLPerf log"
    try:
        content = json.loads(text[len(TOKEN) :])
        record = Record(
            line=number,
            time_ms=int(content["time_ms"]),
            key=str(content["key"]),
            value=content["value"],
            metadata=dict(content["metadata"]),
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return "a damaged line"
    is_own = record.metadata.get("file") in (WRITER, *FORMER_WRITERS)
    return record if is_own else f"not written by this program's {WRITER}: a foreign log"


def _check(log: Log) -> Iterator[tuple[int, str]]:
    """Yields (line, message) for each fault of a log whose lines are all records."""
    if (benchmark := log.values.get("submission_benchmark", BENCHMARK)) != BENCHMARK:
        yield log.lines["submission_benchmark"], f"benchmark {benchmark!r}, not {BENCHMARK}: a foreign log"
        return
    if str(RESUMED) in log.rule_violations:
        yield log.lines["submission_division"], "from a resumed run: a result is one run from its start to its end"
    for before, after in pairwise(log.records):
        if after.time_ms < before.time_ms:
            yield after.line, f"{after.key} is {before.time_ms - after.time_ms} ms before the line above it"
    last = log.records[-1]
    if last.key != "run_stop":
        yield last.line, f"ends with {last.key}, without run_stop: the log or its run was cut off"
        return
    for record, key in zip_longest((record for record in log.records if record.key in HEAD), HEAD):
        if record is None:
            yield last.line, f"{key} is missing"
            return
        if record.key != key:
            yield record.line, f"{record.key} in place of {key}" if key else f"a second {record.key}"
            return
    for key in ("seed", "samples_per_epoch", "global_batch_size"):
        if type(log.values[key]) is not int or log.values[key] < (key != "seed"):
            yield log.lines[key], f"{key} is {log.values[key]!r}"
            return
    yield from _check_blocks(log)


def _check_blocks(log: Log) -> Iterator[tuple[int, str]]:
    """Checks that epochs count from 1 without a gap, each with the records it needs."""
    if "epoch_start" not in log.lines:
        yield log.records[-1].line, "the run ended before its first epoch"
        return
    samples, unit, epoch, before = int(log.values["samples_per_epoch"]), 0, 0, "block_stop"
    in_block, in_evaluation, ends_with_evaluation, evaluated = False, False, False, 0
    scores = []
    # Training that diverges, or is interrupted, ends within an epoch.
    is_aborted = log.records[-1].metadata.get("status") == "aborted"
    last_block = next((record for record in reversed(log.records) if record.key == "block_stop"), None)
    for record in log.records:
        if record.key not in AFTER:
            continue
        is_pair = record.key not in ("eval_start", "eval_accuracy") or in_evaluation == (record.key == "eval_accuracy")
        is_cut_short = record is last_block and before == "epoch_start" and is_aborted
        if not (record.key in AFTER[before] or is_cut_short) or not is_pair:
            yield record.line, f"{record.key} after {before}: lines are missing or were added"
            return
        before = record.key
        if record.key.startswith("block"):
            in_block = record.key == "block_start"
        else:
            epoch += record.key == "epoch_start"
            if record.key == "eval_start":
                in_evaluation, evaluated = True, epoch
            ends_with_evaluation = record.key == "eval_stop"
            in_evaluation = in_evaluation and not ends_with_evaluation
            expected = evaluated if record.key in ("eval_accuracy", "eval_stop") else epoch
            logged, count = record.metadata.get("epoch"), record.metadata.get("epoch_num")
            if logged != expected:
                yield record.line, f"epoch {logged}, expected epoch {expected}: part of the run is missing"
                return
            unit = unit or (samples if count == samples else 1)
            if count != expected * unit:
                yield record.line, f"epoch_num {count}, expected {expected * unit}"
                return
        if record.key == "eval_accuracy":
            if type(record.value) not in (int, float):
                yield record.line, f"mean Dice is {record.value!r}"
                return
            scores.append(record)
    yield from _check_end(log, scores, ends_with_evaluation=ends_with_evaluation and not in_block)


def _check_end(log: Log, scores: Sequence[Record], ends_with_evaluation: bool) -> Iterator[tuple[int, str]]:
    """Checks the status: an aborted run may end anywhere, a successful one ends with the evaluation that succeeded."""
    stop = log.records[-1]
    status = stop.metadata.get("status")
    if status not in ("success", "aborted"):
        yield stop.line, f"run_stop with the status {status!r}"
    if status == "success" and not ends_with_evaluation:
        yield stop.line, "success without an evaluation right before run_stop"
    # The log of an open run does not contain its target.
    if not log.is_closed or not scores:
        return
    for record in scores[:-1]:
        if record.value >= TARGET:
            yield record.line, f"mean Dice {record.value} reached {TARGET}, yet the run continued"
    if (scores[-1].value >= TARGET) is not (status == "success"):
        yield scores[-1].line, f"mean Dice {scores[-1].value}, target {TARGET}, but the status of run_stop is {status}"
