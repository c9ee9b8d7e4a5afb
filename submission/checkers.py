"""MLPerf's own checkers (mlperf-logging), each asked in this process: what it says, and of which log's line."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from submission.inspection import MAX_NOT_CONVERGED, SCALING

USAGE = "training"
MAX_TOLD = 6


@dataclass(frozen=True)
class Verdict:
    """What a checker says; `told` has the first of its complaints, each with file and line where it has them."""

    checker: str
    accepted: bool
    told: tuple[str, ...]


def ask_all(tree: Path, system: str, ruleset: str, is_closed: bool) -> list[Verdict]:
    """All four on a packed tree; of an open result the RCP checker's verdict is told, and counts for nothing."""
    folder = tree / "results" / system / "unet3d"
    description = tree / "systems" / f"{system}.json"
    asked: dict[str, Callable[[], Verdict]] = {
        "compliance": lambda: ask_compliance(folder, ruleset),
        "RCP": lambda: ask_convergence(folder, ruleset),
        "system": lambda: ask_system(description, ruleset),
        "package": lambda: ask_package(tree, ruleset),
    }
    verdicts = []
    for checker, ask in asked.items():
        try:
            verdicts.append(ask())
        except Exception as error:  # other people's programs, on files of whatever content
            verdicts.append(Verdict(checker, False, (f"could not be asked: {type(error).__name__}: {error}",)))
    if not is_closed and not verdicts[1].accepted:
        verdicts[1] = Verdict("RCP", True, ("not asked of the open division; it would say: ", *verdicts[1].told))
    return verdicts


def ask_compliance(folder: Path, ruleset: str) -> Verdict:
    """Each log by itself; as many may fail as need not converge."""
    from mlperf_logging.compliance_checker import mlp_compliance

    told, failed = [], 0
    for path in sorted(folder.glob("result_*.txt")):
        with _listening() as lines:
            mlp_compliance.enqueued_configs.clear()  # a check that broke off leaves some
            checker = mlp_compliance.make_checker(USAGE, ruleset, False, False)
            valid, *_ = mlp_compliance.main(str(path), f"{USAGE}_{ruleset}/common.yaml", checker)
        if not valid:
            failed += 1
            told += [f"{path.name}{complaint}" for complaint in _complaints("\n".join(lines))]
    accepted = failed <= MAX_NOT_CONVERGED
    head = f"{failed} logs fail" if failed else "every log passes"
    return Verdict("compliance", accepted, (head, *told[:MAX_TOLD]))


def _complaints(text: str) -> Iterator[str]:
    """ ":LINE: complaint" each, of what the compliance checker logs; it counts lines from 0."""
    for piece in re.split(r"\n-{30}\n", text):
        lines = [
            line for line in piece.splitlines() if line.strip() and not line.startswith((" Compliance", "Running"))
        ]
        if not lines:
            continue
        match = re.search(r"failed in line (\d+)", lines[0])
        test = next((line.strip() for line in lines if line.startswith("failed test")), "")
        yield (f":{int(match[1]) + 1}: " if match else ": ") + lines[0].strip() + (f" ({test})" if test else "")


def ask_convergence(folder: Path, ruleset: str) -> Verdict:
    """Whether the runs converged no faster than the reference may have."""
    from mlperf_logging.rcp_checker import rcp_checker

    with _listening() as lines:
        passed, message, _ = rcp_checker.check_directory(
            str(folder), USAGE, ruleset, False, False, rcp_pass="pruned_rcps"
        )
    mean = [line.strip() for line in lines if "Submission mean" in line or "normalized" in line]
    return Verdict("RCP", bool(passed), (message, *mean))


def ask_system(description: Path, ruleset: str) -> Verdict:
    from mlperf_logging.system_desc_checker import system_desc_checker

    with _listening() as lines:
        valid, *_ = system_desc_checker.check_system_desc(str(description), USAGE, ruleset)
    return Verdict("system", bool(valid), (description.name, *([] if valid else map(str.strip, lines))))


def ask_package(tree: Path, ruleset: str) -> Verdict:
    """The whole tree; its verdict is a line of its log."""
    from mlperf_logging.package_checker import package_checker

    with _listening() as lines:
        package_checker.check_training_package(str(tree), USAGE, ruleset, False, False, False, False, False, "")
    for left in tree.glob(f"results/*/*/{SCALING}"):  # the checker's, and no file of a submission
        left.unlink()
    accepted = any("PACKAGE CHECKER FOUND NO ERRORS" in line for line in lines)
    wrong = [line.strip() for line in lines if re.search(r"[Ff]ail|Incorrect|not comply|Expected|Error", line)]
    return Verdict("package", accepted, ("no errors",) if accepted else tuple(wrong[:MAX_TOLD]))


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What the checkers log, as text; they log to the root, print, and warn."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    root, listener = logging.getLogger(), Listener(logging.INFO)
    level, handlers = root.level, root.handlers[:]
    root.handlers[:] = [listener]
    root.setLevel(logging.INFO)
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield lines
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def format_verdicts(verdicts: list[Verdict]) -> str:
    """A table: the checker, pass or FAIL, what it says."""
    lines = []
    for verdict in verdicts:
        head = f"{'pass' if verdict.accepted else 'FAIL'}  {verdict.checker:10}  "
        lines += [f"{head if not number else ' ' * len(head)}{text}" for number, text in enumerate(verdict.told)]
    return "\n".join(lines)
