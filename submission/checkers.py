"""Runs MLPerf's own checkers (mlperf-logging) in this process and collects their verdicts."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from submission.inspection import MAX_NOT_CONVERGED, SCALING_FILE
from submission.logs import BENCHMARK

USAGE = "training"
MAX_MESSAGES = 6


@dataclass(frozen=True)
class Verdict:
    """A checker's verdict and its first messages, each with file and line where the checker names them."""

    checker: str
    accepted: bool
    messages: tuple[str, ...]


def check_all(tree: Path, system: str, ruleset: str, is_closed: bool) -> list[Verdict]:
    """Runs all four checkers on a packed tree; for an open result the RCP checker's verdict is only reported."""
    results = tree / "results" / system / BENCHMARK
    checks: dict[str, Callable[[], Verdict]] = {
        "compliance": lambda: check_compliance(results, ruleset),
        "RCP": lambda: check_convergence(results, ruleset),
        "system": lambda: check_system(tree / "systems" / f"{system}.json", ruleset),
        "package": lambda: check_package(tree, ruleset),
    }
    verdicts = {}
    for name, check in checks.items():
        try:
            verdicts[name] = check()
        except Exception as error:  # third-party programs, on files with any content
            verdicts[name] = Verdict(name, False, (f"the checker failed: {type(error).__name__}: {error}",))
    if not is_closed and not verdicts["RCP"].accepted:
        ignored = "not required in the open division; the checker's verdict: "
        verdicts["RCP"] = Verdict("RCP", True, (ignored, *verdicts["RCP"].messages))
    return list(verdicts.values())


def check_compliance(folder: Path, ruleset: str) -> Verdict:
    """Checks each log by itself; as many may fail as may miss the target."""
    from mlperf_logging.compliance_checker import mlp_compliance

    messages, failed = [], 0
    for path in sorted(folder.glob("result_*.txt")):
        with _captured_log() as lines:
            mlp_compliance.enqueued_configs.clear()  # an aborted check leaves entries behind
            checker = mlp_compliance.make_checker(USAGE, ruleset, False, False)
            valid, *_ = mlp_compliance.main(str(path), f"{USAGE}_{ruleset}/common.yaml", checker)
        if not valid:
            failed += 1
            messages += [f"{path.name}{complaint}" for complaint in _complaints("\n".join(lines))]
    head = f"{failed} logs fail" if failed else "every log passes"
    return Verdict("compliance", failed <= MAX_NOT_CONVERGED, (head, *messages[:MAX_MESSAGES]))


def _complaints(text: str) -> Iterator[str]:
    """Yields ":LINE: complaint" for each complaint of the compliance checker, which counts lines from 0."""
    for section in re.split(r"\n-{30}\n", text):
        lines = [
            line for line in section.splitlines() if line.strip() and not line.startswith((" Compliance", "Running"))
        ]
        if not lines:
            continue
        match = re.search(r"failed in line (\d+)", lines[0])
        test = next((line.strip() for line in lines if line.startswith("failed test")), "")
        yield (f":{int(match[1]) + 1}: " if match else ": ") + lines[0].strip() + (f" ({test})" if test else "")


def check_convergence(folder: Path, ruleset: str) -> Verdict:
    """Checks that the runs did not converge faster than the reference convergence points allow."""
    from mlperf_logging.rcp_checker import rcp_checker

    with _captured_log() as lines:
        passed, message, _ = rcp_checker.check_directory(
            str(folder), USAGE, ruleset, False, False, rcp_pass="pruned_rcps"
        )
    mean = [line.strip() for line in lines if "Submission mean" in line or "normalized" in line]
    return Verdict("RCP", bool(passed), (message, *mean))


def check_system(description: Path, ruleset: str) -> Verdict:
    """Checks a system description."""
    from mlperf_logging.system_desc_checker import system_desc_checker

    with _captured_log() as lines:
        valid, *_ = system_desc_checker.check_system_desc(str(description), USAGE, ruleset)
    return Verdict("system", bool(valid), (description.name, *([] if valid else map(str.strip, lines))))


def check_package(tree: Path, ruleset: str) -> Verdict:
    """Checks the whole tree; the package checker reports its verdict only as a log line."""
    from mlperf_logging.package_checker import package_checker

    with _captured_log() as lines:
        package_checker.check_training_package(str(tree), USAGE, ruleset, False, False, False, False, False, "")
    for left in tree.glob(f"results/*/*/{SCALING_FILE}"):  # written by the checker; not part of a submission
        left.unlink()
    if any("PACKAGE CHECKER FOUND NO ERRORS" in line for line in lines):
        return Verdict("package", True, ("no errors",))
    wrong = [line.strip() for line in lines if re.search(r"[Ff]ail|Incorrect|not comply|Expected|Error", line)]
    return Verdict("package", False, tuple(wrong[:MAX_MESSAGES]))


@contextmanager
def _captured_log() -> Iterator[list[str]]:
    """Yields a list that receives what is logged to the root logger; discards prints and warnings."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    root.handlers[:] = [Collector(logging.INFO)]
    root.setLevel(logging.INFO)
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield lines
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def format_verdicts(verdicts: list[Verdict]) -> str:
    """Formats a table with the checker, pass or FAIL, and the messages."""
    lines = []
    for verdict in verdicts:
        head = f"{'pass' if verdict.accepted else 'FAIL'}  {verdict.checker:10}  "
        lines += [f"{' ' * len(head) if number else head}{text}" for number, text in enumerate(verdict.messages)]
    return "\n".join(lines)
