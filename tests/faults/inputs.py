"""Damaged inputs: truncated, bit-flipped, of a wrong type, empty, or with hostile headers.

Each try damages one file in a copy of a good folder and runs the real program on the copy, in this process. The promise
holds if the program refuses in one line that names the file or its case, or if its result is bit for bit that of the
good folder. Undetectable damage is not tried: flipped bits in a plain .nii or in a Decathlon's dataset.json, which have
no checksum; and changes to preprocessed files that keep the modification time, such as those of a failing disk, which
only `preprocess_dataset.py --mode verify` finds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import USER_ERROR_EXIT, Interrupted, interrupted_exit, run_program
from tests.faults import Row
from tests.faults.damage import MARKER, damage
from tests.faults.subjects import Subject, make_subjects

LIMIT_S = 20.0
REFUSED, HARMLESS = "refused", "harmless"
TRACEBACK, HANG, SILENT = "traceback", "hang", "wrong result without an error"
UNCLEAR, STRAY = "unclear refusal", "wrote outside its folder"
# Warnings that Python does not print by default.
IGNORED_WARNINGS = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


@dataclass(frozen=True)
class Verdict:
    """Outcome of a try: `REFUSED`, `HARMLESS` or a failure; the line that shows it; duration in seconds."""

    outcome: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class Trial:
    """One damaged file: the subject's name, the kind of damage, its description (file and change), and the outcome."""

    subject: str
    kind: str
    what: str
    verdict: Verdict


def damaged_inputs(work_dir: Path, tries: int = 300, seed: int = 0) -> Row:
    """Damages one input per try; all randomness follows from `seed`. `work_dir` must be empty."""
    subjects = make_subjects(work_dir)
    trials = [try_one(subjects, work_dir, seed, index) for index in range(tries)]
    failures = [
        f"{trial.verdict.outcome}: {trial.what} (seed {seed}, try {index}): {trial.verdict.detail}"
        for index, trial in enumerate(trials)
        if trial.verdict.outcome not in (REFUSED, HARMLESS)
    ]
    return Row(
        fault="an input file is cut short, bit-flipped, empty, of a wrong type, or has a hostile header",
        promise="one line that names it, or the same result bit for bit",
        test="test_inputs.py::test_damaged_inputs",
        tried=tries,
        kept=tries - len(failures),
        seconds=max((trial.verdict.seconds for trial in trials), default=None),
        failures=tuple(failures),
    )


def try_one(subjects: list[Subject], work_dir: Path, seed: int, index: int) -> Trial:
    """Damages one file of a copy and judges the outcome; every random choice follows from seed and index."""
    rng = np.random.default_rng([seed, index])
    subject = subjects[int(rng.choice(len(subjects), p=[one.share for one in subjects]))]
    files = sorted(path.relative_to(subject.good) for path in subject.good.rglob("*") if path.is_file())
    # Chooses the suffix first: otherwise the only dataset.json would hardly ever be chosen.
    suffix = str(rng.choice(sorted({path.suffix for path in files})))
    candidates = [path for path in files if path.suffix == suffix]
    file = candidates[int(rng.integers(len(candidates)))]
    folder = work_dir / "try"
    shutil.copytree(subject.good, folder / "data")
    kind, what = damage(folder / "data" / file, suffix in subject.has_checksum, rng)
    verdict = judge(subject, folder, file)
    shutil.rmtree(folder)
    return Trial(subject.name, kind, f"{subject.name}/{file}: {what}", verdict)


def judge(subject: Subject, folder: Path, file: Path, limit_s: float = LIMIT_S) -> Verdict:
    """Runs the subject's program from FOLDER/data, in which `file` is damaged, to FOLDER/out."""
    data, out = folder / "data", folder / "out"
    before = set(folder.parent.iterdir())
    started = time.perf_counter()
    status, lines, raised = _run(lambda: subject.program(data, out), limit_s)
    seconds = time.perf_counter() - started
    strays = [*(set(folder.parent.iterdir()) - before), *folder.rglob(MARKER), *Path().glob(MARKER)]
    # For a list of files, the message may also name its folder or a file in it.
    names = [file.name, str(data)] if file.suffix == ".json" else [_case_of(file)]
    if isinstance(raised, _Hang):
        outcome, detail = HANG, f"still running after {limit_s:g} s"
    elif raised is not None:
        frame = traceback.extract_tb(raised.__traceback__)[-1]
        outcome, detail = TRACEBACK, f"{raised!r:.200} in {Path(frame.filename).name}:{frame.lineno}"
    elif strays:
        outcome, detail = STRAY, str(strays[0])
    elif status == USER_ERROR_EXIT:
        is_clear = len(lines) == 1 and any(name in lines[0] for name in names)
        outcome, detail = REFUSED if is_clear else UNCLEAR, " | ".join(lines)[:300]
    elif status != 0:
        outcome, detail = UNCLEAR, f"exit status {status}: {' | '.join(lines)[:300]}"
    elif subject.result(out) == subject.expected:
        outcome, detail = HARMLESS, ""
    else:
        outcome, detail = SILENT, "accepted, but the result differs from that of the undamaged folder"
    return Verdict(outcome, detail, seconds)


def _case_of(file: Path) -> str:
    """Returns the case that a file belongs to, by its name in all test folders: case_00000, scan_0."""
    match = re.search(r"(case|scan)_\d+", str(file))
    return match[0] if match else file.name


class _Hang(BaseException):
    """Raised by the timer; not an `Exception`, so that no handler swallows it."""


def _run(program: Callable[[], int | None], limit_s: float) -> tuple[int, list[str], BaseException | None]:
    """Runs a program; returns its exit status, the lines on stderr, and the exception that escaped."""

    def on_alarm(number: int, frame: Any) -> None:
        raise _Hang

    status, raised = 0, None
    handler = signal.signal(signal.SIGALRM, on_alarm)
    # A file, since `faulthandler` needs a file descriptor.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as stderr:
        # Repeats every second: an exception raised inside a destructor is lost.
        signal.setitimer(signal.ITIMER_REAL, limit_s, 1.0)
        try:
            with (
                contextlib.redirect_stderr(stderr),
                contextlib.redirect_stdout(io.StringIO()),
                warnings.catch_warnings(record=True) as warned,
            ):
                warnings.simplefilter("always")
                for category in IGNORED_WARNINGS:
                    warnings.simplefilter("ignore", category)
                status = run_program(program, "program")
        except BaseException as error:  # the outcome of the try
            raised = error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            faulthandler.enable(sys.__stderr__ or 2)
        stderr.seek(0)
        lines = [*stderr.read().splitlines(), *(str(warning.message) for warning in warned)]
    if isinstance(raised, Interrupted | KeyboardInterrupt) or status == interrupted_exit(signal.SIGINT):
        raise KeyboardInterrupt  # Ctrl-C by the user of the harness
    return status, lines, raised
