"""Starts one run of a series: the command before main.py, the page cache, signals."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from common.errors import Interrupted, UserError
from common.messages import logger

PROJECT = Path(__file__).resolve().parents[1]
CLEARED_VARIABLE = "CACHES_WERE_CLEARED"


def launch_command(prefix: str | None, processes: int) -> list[str]:
    """Returns the command before main.py: `--launch`'s words, else torchrun for several processes, else python."""
    if prefix is None:
        torchrun = ["-m", "launch.torchrun", "--standalone", f"--nproc_per_node={processes}"]
        return [sys.executable, *(torchrun if processes > 1 else [])]
    if processes > 1:
        raise UserError("--launch sets the number of processes itself; drop --nproc_per_node")
    try:
        words = shlex.split(prefix)
    except ValueError as error:
        raise UserError(f"--launch {prefix!r}: {error}") from None
    if not words:
        raise UserError("--launch is empty")
    return words


def launch_run(launch: Sequence[str], arguments: Sequence[str], log_dir: Path, were_cleared: bool) -> int:
    """Runs main.py and returns its exit status.

    Args:
        launch: the command before main.py.
        arguments: for main.py.
        log_dir: is created; the run's output goes to `console.txt` in it.
        were_cleared: whether the page cache was cleared, which the run's log states.

    Raises:
        UserError: the launch command cannot be started.
        Interrupted: this program received SIGTERM or Ctrl-C; the run has ended.
    """
    log_dir.mkdir()
    command = [*launch, "main.py", *arguments, "--log_dir", str(log_dir), "--seed", "-1"]
    with (log_dir / "console.txt").open("wb") as console:
        try:
            process = subprocess.Popen(
                command,
                cwd=PROJECT,
                env={**os.environ, CLEARED_VARIABLE: str(int(were_cleared))},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"{command[0]}: cannot be started: {error.strerror}") from None
        with _signals_forwarded(process) as received:
            status = process.wait()
    if received:
        raise Interrupted(received[0])
    return status


@contextmanager
def _signals_forwarded(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Sends the run SIGTERM on the first SIGTERM or Ctrl-C and SIGKILL on the second; yields the signals received."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        with suppress(OSError):  # the run has just ended
            os.killpg(process.pid, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def clear_caches(command: str | None) -> bool:
    """Runs the command that clears the page cache and returns whether it succeeded; warns if not."""
    if command is None:
        return False
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        reason = done.stderr.strip()[-200:] or done.returncode
        logger.warning(f"the page cache could not be cleared ({reason}); the log states this")
    return done.returncode == 0
