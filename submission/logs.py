"""Reads one MLPerf log of this program and says, with its line, what makes it no log of one whole run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError
from runtime.mlperf.closed_division import RESUMED

TOKEN = ":::MLLOG "
WRITER = "runtime/logging/mlperf.py"
FORMER_WRITERS = ("runtime/trackers.py",)  # the module in earlier versions
BENCHMARK = "unet3d"
TARGET = 0.908
# What every log has once, in this order.
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
# A block: its epochs, and an evaluation at its end.
AFTER = {
    "block_start": ("epoch_start",),
    "epoch_start": ("epoch_stop",),
    "epoch_stop": ("epoch_start", "eval_start", "block_stop"),
    "eval_start": ("eval_accuracy",),
    "eval_accuracy": ("eval_stop",),
    "eval_stop": ("block_stop",),
    "block_stop": ("block_start", "run_stop"),
}


@dataclass(frozen=True)
class Problem:
    """What is wrong, in which file, and in which line of it; 0: the file as a whole."""

    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}" if self.line else f"{self.path}: {self.what}"


@dataclass(frozen=True)
class Record:
    """A line of an MLPerf log; `text` as it stands."""

    line: int
    time_ms: int
    key: str
    value: Any
    metadata: dict[str, Any]


@dataclass
class Log:
    """One run as its MLPerf log tells it; what `problems` are left out of may be anything.

    Attributes:
        values: of the keys that stand once.
        lines: where they stand.
        evaluations: (epoch, mean Dice) in order.
    """

    path: Path
    records: list[Record] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def clock_ms(self) -> int:
        """From run_start to run_stop."""
        times = {record.key: record.time_ms for record in self.records if record.key in ("run_start", "run_stop")}
        return times["run_stop"] - times["run_start"]

    @property
    def converged(self) -> bool:
        return bool(self.records[-1].metadata.get("status") == "success")

    @property
    def rule_violations(self) -> list[str]:
        named = next((r.metadata.get("departures") for r in self.records if r.key == "submission_division"), None)
        return list(named or [])

    @property
    def is_closed(self) -> bool:
        return bool(self.values.get("submission_division") == "closed")

    @property
    def epochs(self) -> int:
        """That it took: those up to its last evaluation."""
        return self.evaluations[-1][0] if self.evaluations else 0

    @property
    def unit(self) -> int:
        """What an epoch counts in `epoch_num`: its samples, or 1."""
        first = next(record for record in self.records if record.key == "epoch_start")
        return int(first.metadata["epoch_num"]) // int(first.metadata["epoch"])

    @property
    def unit_line(self) -> int:
        return next(record.line for record in self.records if record.key == "epoch_start")

    def seconds_in(self, what: str) -> float:
        """Between all `what`_start and `what`_stop: "epoch" or "eval"."""
        signs = {f"{what}_start": -1, f"{what}_stop": 1}
        return sum(signs[r.key] * r.time_ms for r in self.records if r.key in signs) / 1000


def read_log(path: Path) -> Log:
    """Reads and examines a log.

    Raises:
        UserError: it cannot be read; what is wrong with its content is in `problems`.
    """
    log = Log(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    for number, text in enumerate(lines, start=1):
        record = _parse(number, text)
        if isinstance(record, str):
            cut = " (the log is cut off here)" if number == len(lines) else ""
            log.problems.append(Problem(path, number, record + cut))
            return log
        log.records.append(record)
    if not log.records:
        log.problems.append(Problem(path, 0, "empty"))
        return log
    for record in log.records:
        log.values.setdefault(record.key, record.value)
        log.lines.setdefault(record.key, record.line)
    log.problems += [Problem(path, line, what) for line, what in _examine(log)]
    return log


def _parse(number: int, text: str) -> Record | str:
    """The line as a record, or why it is none."""
    if not text.startswith(TOKEN):
        return "no line of an MLPerf log"
    try:
        content = json.loads(text[len(TOKEN) :])
        record = Record(
            number, int(content["time_ms"]), str(content["key"]), content["value"], dict(content["metadata"])
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return "a damaged line"
    is_own = record.metadata.get("file") in (WRITER, *FORMER_WRITERS)
    return record if is_own else f"not written by this program's {WRITER}: a foreign log"


def _examine(log: Log) -> Iterator[tuple[int, str]]:
    """Everything wrong with a log whose lines are all records: (line, what)."""
    if (benchmark := log.values.get("submission_benchmark", BENCHMARK)) != BENCHMARK:
        yield (
            log.lines.get("submission_benchmark", 0),
            f"of the benchmark {benchmark!r}, not {BENCHMARK}: a foreign log",
        )
        return
    if str(RESUMED) in log.rule_violations:
        yield log.lines["submission_division"], "of a resumed run: a result is one run from its start to its end"
    for before, after in zip(log.records, log.records[1:], strict=False):
        if after.time_ms < before.time_ms:
            yield after.line, f"{after.key} is {before.time_ms - after.time_ms} ms before the line above it"
    last = log.records[-1]
    if last.key != "run_stop":
        yield last.line, f"ends with {last.key}, without run_stop: the log is cut off or its run was"
        return
    order = [record for record in log.records if record.key in HEAD]
    for record, key in zip(order, HEAD, strict=False):
        if record.key != key:
            yield record.line, f"{record.key} stands where {key} belongs"
            return
    if len(order) != len(HEAD):
        line = order[len(HEAD)].line if len(order) > len(HEAD) else last.line
        what = f"a second {order[len(HEAD)].key}" if len(order) > len(HEAD) else f"{HEAD[len(order)]} is missing"
        yield line, what
        return
    for key in ("seed", "samples_per_epoch", "global_batch_size"):
        if type(log.values[key]) is not int or log.values[key] < (key != "seed"):
            yield log.lines[key], f"{key} is {log.values[key]!r}"
            return
    yield from _examine_blocks(log)


def _last_epoch(log: Log) -> int:
    return max(int(record.metadata["epoch"]) for record in log.records if record.key == "epoch_stop")


def _examine_blocks(log: Log) -> Iterator[tuple[int, str]]:
    """Epochs from 1 on without a gap, scores where they belong, an end that fits the last one."""
    body = [record for record in log.records if record.key in AFTER]
    samples, unit, epoch, before = int(log.values["samples_per_epoch"]), 0, 0, "block_stop"
    if not any(record.key == "epoch_start" for record in body):
        yield log.records[-1].line, "the run ended before its first epoch"
        return
    for record in body:
        if record.key not in AFTER[before]:
            yield record.line, f"{record.key} after {before}: lines are missing or were added"
            return
        before = record.key
        if not record.key.startswith("block"):
            epoch += record.key == "epoch_start"
            told, count = record.metadata.get("epoch"), record.metadata.get("epoch_num")
            if told != epoch:
                yield record.line, f"epoch {told}, where epoch {epoch} belongs: a part of the run is missing"
                return
            unit = unit or (samples if count == samples else 1)
            if count != epoch * unit:
                yield record.line, f"epoch_num {count}, where {epoch * unit} belongs"
                return
        if record.key == "eval_accuracy":
            if type(record.value) not in (int, float):
                yield record.line, f"mean Dice is {record.value!r}"
                return
            log.evaluations.append((epoch, float(record.value)))
    yield from _examine_end(log, [record for record in body if record.key == "eval_accuracy"], before)


def _examine_end(log: Log, scores: Sequence[Record], before: str) -> Iterator[tuple[int, str]]:
    """A run that was aborted may have been so anywhere; one that reached its target ended with an evaluation."""
    stop = log.records[-1]
    status = stop.metadata.get("status")
    if status not in ("success", "aborted"):
        yield stop.line, f"run_stop with the status {status!r}"
    if status == "success" and (before != "block_stop" or not scores or log.evaluations[-1][0] != _last_epoch(log)):
        yield stop.line, "success without an evaluation right before run_stop"
    # Of an open run the log does not say what its target was.
    if not log.is_closed or not scores:
        return
    for record in scores[:-1]:
        if record.value >= TARGET:
            yield record.line, f"mean Dice {record.value} reached {TARGET}, yet the run goes on"
    if (scores[-1].value >= TARGET) is not (status == "success"):
        yield scores[-1].line, f"mean Dice {scores[-1].value}, target {TARGET}, yet run_stop says {status}"
