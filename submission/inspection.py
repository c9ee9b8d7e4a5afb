"""Checks the runs of one result together: 40 complete logs, one configuration, distinct seeds, unchanged files."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from common.errors import UserError
from runtime.eval_schedule import make_schedule
from runtime.mlperf.rulesets import RUNS, counts_samples
from submission.logs import BENCHMARK, HEAD, Log, Problem, read_log
from submission.record import SHOWN_DIGITS

MAX_NOT_CONVERGED = 4
# The keys whose values all runs of a result share.
SHARED_KEYS = tuple(
    key
    for key in HEAD
    if key not in ("cache_clear", "init_start", "seed", "submission_benchmark", "init_stop", "run_start")
)
# The values that the closed division requires.
CLOSED_VALUES = {
    "opt_name": "sgd",
    "oversampling": 0.4,
    "training_input_shape": [128, 128, 128],
    "validation_input_shape": [128, 128, 128],
    "validation_overlap": 0.5,
    "train_samples": 168,
    "eval_samples": 42,
}
RESULT_NAME = re.compile(r"result_(\d+)\.txt")
# Written beside the logs by MLPerf's package checker.
SCALING_FILE = "scaling.json"


def results_folder(result_dir: Path, system: str | None) -> Path:
    """Returns ORG/results/SYSTEM/unet3d.

    Args:
        system: None for the only one.

    Raises:
        UserError: there is no such folder, or there are several and `system` is None.
    """
    found = sorted(path.parent.name for path in result_dir.glob(f"results/*/{BENCHMARK}") if path.is_dir())
    if system is None and len(found) > 1:
        raise UserError(f"--result_dir {result_dir} has results of {', '.join(found)}; choose one with --system")
    if not found or (system is not None and system not in found):
        raise UserError(
            f"--result_dir {result_dir} has no results/{system or 'SYSTEM'}/{BENCHMARK}; `submission run` creates it"
        )
    return result_dir / "results" / (system or found[0]) / BENCHMARK


def runs_folder(result_dir: Path, system: str) -> Path:
    """Returns ORG.runs/SYSTEM, for the files of the runs that are not part of a submission."""
    whole = result_dir.resolve()
    return whole.with_name(f"{whole.name}.runs") / system


def read_results(folder: Path) -> tuple[list[Log], list[Problem]]:
    """Returns the logs in numerical order, and problems for missing, surplus and unknown files."""
    numbered, problems = {}, []
    for path in sorted(folder.iterdir()):
        if match := RESULT_NAME.fullmatch(path.name):
            numbered[int(match[1])] = path
        elif path.name != SCALING_FILE:
            problems.append(Problem(path, 0, "not a result: only result_0.txt … result_39.txt belong here"))
    if missing := [f"result_{number}.txt" for number in range(RUNS) if number not in numbered]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        runs = f"{len(numbered)} run{'s' * (len(numbered) != 1)}, not {RUNS}"
        problems.append(Problem(folder, 0, f"{runs}: {', '.join(missing[:3])}{more} missing"))
    problems += [
        Problem(numbered[number], 0, f"one run too many: a result has {RUNS}")
        for number in sorted(numbered)
        if number >= RUNS
    ]
    return [read_log(numbered[number]) for number in sorted(numbered)], problems


def find_problems(logs: Sequence[Log], ruleset: str) -> list[Problem]:
    """Returns everything wrong with these runs as one result, beginning with the problems of each log."""
    problems = [problem for log in logs for problem in log.problems]
    valid = [log for log in logs if not log.problems]
    problems += [*_differences(valid), *_repeated_seeds(valid), *_wrong_units(valid, ruleset)]
    problems += [problem for log in valid if log.is_closed for problem in _rule_violations(log)]
    failed = [log for log in valid if not log.converged]
    if len(failed) > MAX_NOT_CONVERGED:
        message = f"not converged, like {len(failed) - 1} others: at most {MAX_NOT_CONVERGED} runs may not converge"
        problems += [Problem(log.path, log.records[-1].line, message) for log in failed]
    return problems


def _differences(logs: Sequence[Log]) -> Iterator[Problem]:
    for key in SHARED_KEYS:
        values = [json.dumps(log.values[key]) for log in logs]
        if len(set(values)) > 1:
            usual, _ = Counter(values).most_common(1)[0]
            for log, value in zip(logs, values, strict=True):
                if value != usual:
                    message = f"another configuration: {key} is {value}, but {usual} in most runs"
                    yield Problem(log.path, log.lines[key], message)


def _repeated_seeds(logs: Sequence[Log]) -> Iterator[Problem]:
    first: dict[int, Log] = {}
    for log in logs:
        before = first.setdefault(log.values["seed"], log)
        if before is not log:
            message = f"the same seed {log.values['seed']} as {before.path.name}:{before.lines['seed']}"
            yield Problem(log.path, log.lines["seed"], message)


def _wrong_units(logs: Sequence[Log], ruleset: str) -> Iterator[Problem]:
    for log in logs:
        samples = int(log.values["samples_per_epoch"])
        if samples > 1 and (log.unit == samples) is not counts_samples(ruleset):
            logged, required = ("epochs", "samples") if counts_samples(ruleset) else ("samples", "epochs")
            message = f"epoch_num counts {logged}, but ruleset {ruleset} requires {required}"
            yield Problem(log.path, log.lines["epoch_start"], message)


def _rule_violations(log: Log) -> Iterator[Problem]:
    for key, required in CLOSED_VALUES.items():
        if log.values[key] != required:
            message = f"{key} is {json.dumps(log.values[key])}, the closed division requires {json.dumps(required)}"
            yield Problem(log.path, log.lines[key], message)
    if log.rule_violations:
        yield Problem(log.path, log.lines["submission_division"], f"closed, but: {'; '.join(log.rule_violations)}")
    schedule = make_schedule(1, log.values["samples_per_epoch"])
    first, interval = schedule.first_evaluation, schedule.interval
    for index, record in enumerate(record for record in log.records if record.key == "eval_accuracy"):
        epoch = record.metadata["epoch"]
        if first is None or epoch != first + index * interval:
            message = f"an evaluation after epoch {epoch}; required: from {first} on, every {interval}"
            yield Problem(log.path, record.line, message)
            break


def sha256_of(path: Path) -> str:
    """Returns a log's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find_changed_logs(logs: Sequence[Log], written: Mapping[str, tuple[Path, str]]) -> list[Problem]:
    """Finds logs that differ from what their runs wrote.

    Args:
        written: {result_0.txt: (log in the run's own folder, SHA-256 recorded when the run ended)}.
    """
    problems = []
    for log in logs:
        name = log.path.name
        if name not in written:
            problems.append(Problem(log.path, 0, "not written by a run of this series: a foreign log"))
        elif sha256_of(log.path) != written[name][1]:
            line = _first_difference(log.path, written[name][0])
            problems.append(Problem(log.path, line, "differs from what the run wrote: the log was changed afterwards"))
    return problems


def find_mixed_data(logs: Sequence[Log], digests: Mapping[str, str]) -> list[Problem]:
    """Finds runs on another data set than most; the logs themselves do not tell.

    Args:
        digests: {result_0.txt: digest of the data as recorded by the run, "" if unknown}.
    """
    found = {log.path: digest for log in logs if (digest := digests.get(log.path.name))}
    if len(set(found.values())) < 2:
        return []
    usual, _ = Counter(found.values()).most_common(1)[0]
    return [
        Problem(path, 0, f"another data set: its digest is {digest[:SHOWN_DIGITS]}, but {usual[:SHOWN_DIGITS]} in most")
        for path, digest in found.items()
        if digest != usual
    ]


def _first_difference(changed: Path, original: Path) -> int:
    """Returns the number of the first line that differs, or 0 if it cannot be found."""
    try:
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in (changed, original)]
    except OSError:
        return 0
    pairs = zip_longest(*(text.splitlines() for text in texts))
    return next((number for number, (one, other) in enumerate(pairs, start=1) if one != other), 0)
