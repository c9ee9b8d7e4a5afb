"""Starts one run of a series, and what comes before it: the words before main.py, and a cleared page cache."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from common.errors import Interrupted, UserError
from common.messages import logger

PROJECT = Path(__file__).resolve().parents[1]
CLEARED_VARIABLE = "CACHES_WERE_CLEARED"


def launcher(prefix: str | None, processes: int) -> list[str]:
    """What stands before main.py: python, torchrun for more processes than one, or what `--launch` says."""
    if prefix is not None:
        if processes > 1:
            raise UserError("--launch says itself how many processes there are; drop --nproc_per_node")
        try:
            words = shlex.split(prefix)
        except ValueError as error:
            raise UserError(f"--launch {prefix!r}: {error}") from None
        if not words:
            raise UserError("--launch is empty")
        return words
    if processes > 1:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable]


def launch_run(before: Sequence[str], arguments: Sequence[str], log_dir: Path, were_cleared: bool) -> int:
    """Runs main.py to its end, its console in a file; a signal to this program ends it first.

    Args:
        before: the words that stand before main.py.
        arguments: of main.py.

    Raises:
        UserError: the launcher cannot be started.
        Interrupted: this program was asked to leave.
    """
    log_dir.mkdir()
    command = [*before, "main.py", *arguments, "--log_dir", str(log_dir), "--seed", "-1"]
    environment = {**os.environ, CLEARED_VARIABLE: str(int(were_cleared))}
    with (log_dir / "console.txt").open("wb") as console:
        try:
            process = subprocess.Popen(
                command,
                cwd=PROJECT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"{command[0]}: cannot be started: {error.strerror}") from None
        with _passing_on(process) as told:
            status = process.wait()
    if told:
        raise Interrupted(told[0])
    return status


class _passing_on:  # noqa: N801 - used like a function
    """SIGTERM and Ctrl-C go to the run alone, which ends in its own time."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._told: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> list[int]:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on)
        return self._told

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on(self, number: int, frame: FrameType | None) -> None:
        self._told.append(number)
        with suppress(OSError):  # it has just ended
            os.killpg(self._process.pid, signal.SIGTERM if len(self._told) < 2 else signal.SIGKILL)


def clear_caches(command: str | None) -> bool:
    """Whether the command cleared the page cache; told where it was asked to and could not."""
    if command is None:
        return False
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        reason = done.stderr.strip()[-200:] or done.returncode
        logger.warning(f"the page cache could not be cleared ({reason}); the log says so")
    return done.returncode == 0
