"""Injects faults into the real program and prints or writes a table of the results.

make faults                                              # every fault, into docs/reliability.md
python3 -m tests.faults --only lost_rank --work_dir DIR  # one fault, printed
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch

from common.cli import Parser
from common.errors import UserError, one_line, run_program
from common.files import replacing
from tests.faults import Row, disks, groups, hosts, inputs, kills

FAULTS: tuple[Callable[..., Row], ...] = (
    kills.killed_at_random,
    kills.interrupted,
    groups.second_signal,
    groups.lost_rank,
    groups.stopped_rank,
    groups.hung_rank,
    groups.killed_worker,
    groups.hung_worker,
    groups.restarted,
    hosts.cut_off_host,
    disks.killed_while_saving,
    disks.damaged_checkpoints,
    disks.full_disk,
    disks.full_disk_for_logs,
    disks.lost_volumes,
    disks.non_finite_values,
    inputs.damaged_inputs,
)
HEADER = ("| fault | promise | test | runs: tried, kept | longest, s | work lost |", "|---|---|---|---|---|---|")
# The program replaces the text between these two lines of the document.
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="tests.faults", description=__doc__)
    names = [fault.__name__ for fault in FAULTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="FAULT", help=" ".join(names))
    parser.add_argument("--document", type=Path, help="document with the table; with --only, only those rows change")
    parser.add_argument("--work_dir", type=Path, help="folder that keeps the runs (default: a temporary folder)")
    arguments = parser.parse_args(argv)
    if arguments.document:
        table_in(arguments.document)  # before a quarter of an hour of runs
    work_dir = arguments.work_dir or Path(tempfile.mkdtemp(prefix="faults_"))
    started = time.monotonic()
    rows = []
    try:
        for fault in FAULTS:
            if fault.__name__ in arguments.only:
                began = time.monotonic()
                rows.append(inject(fault, work_dir / fault.__name__))
                print(f"{_line(rows[-1])}  [{time.monotonic() - began:.0f} s]", flush=True)
    finally:
        if arguments.work_dir is None:
            shutil.rmtree(work_dir, ignore_errors=True)
    if arguments.document:
        minutes = 0.0 if arguments.only != names else (time.monotonic() - started) / 60
        write(arguments.document, rows, minutes)
    broken = [failure for row in rows for failure in row.failures]
    print("\n".join(broken) or f"all promises held, in {time.monotonic() - started:.0f} s", flush=True)
    return 1 if broken else 0


def inject(fault: Callable[..., Row], folder: Path) -> Row:
    """Returns the row of a fault. What its function raises is a broken promise: it must not end the other faults."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return fault(folder)
    except Exception as error:
        traceback.print_exception(error)
        failure = f"{fault.__name__}: {type(error).__name__}: {one_line(error)}"
        return Row(fault=fault.__name__, promise="", test="", tried=1, kept=0, failures=(failure,))


def _line(row: Row) -> str:
    return f"{row.kept} of {row.tried}  {row.fault}: {row.promise}"


def line(row: Row) -> str:
    """Returns a row as a line of Markdown."""
    seconds = "" if row.seconds is None else f"{row.seconds:.2g}" if row.seconds < 1 else f"{row.seconds:.0f}"
    return f"| {row.fault} | {row.promise} | `{row.test}` | {row.tried}, {row.kept} | {seconds} | {row.lost} |"


def table_in(document: Path) -> re.Match[str]:
    """Finds the table in a document, as the first group. Raises UserError: no such document, or no marker lines."""
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--document {document}: {error.strerror or error}") from None
    measured = re.search(re.escape(BEGIN) + "(.*)" + re.escape(END), text, re.DOTALL)
    if not measured:
        raise UserError(f"--document {document}: {BEGIN.strip()} … {END.strip()} not found")
    return measured


def write(document: Path, rows: Sequence[Row], minutes: float) -> None:
    """Replaces the table in a document.

    Args:
        minutes: duration of a complete run; 0 replaces only the given rows of the existing table, and adds those that
            it lacks. A fault that was not tried keeps its row.

    Raises:
        UserError: no such document, or it does not contain the two marker lines.
    """
    measured = table_in(document)
    text = measured.string
    new = {row.fault: line(row) for row in rows if row.tried or minutes}
    if minutes:
        head = (
            f"Measured on {date.today().isoformat()} by `make faults` in {minutes:.0f} minutes: {_processor()}, "
            f"{os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}."
        )
        lines = [head, "", *HEADER, *new.values()]
    else:
        lines = [new.pop(old.split(" | ")[0].removeprefix("| "), old) for old in measured[1].splitlines()]
        lines += new.values()
    whole = text[: measured.start(1)] + "\n".join(lines) + "\n" + text[measured.end(1) :]
    with replacing(document) as temporary:
        temporary.write_text(whole, encoding="utf-8")


@functools.cache
def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return found[1].strip() if found else platform.machine()


if __name__ == "__main__":
    sys.exit(run_program(main, "tests.faults"))
