"""How a program ends: exit statuses, and the exceptions that end it in one line.

A `UserError` is the user's mistake, `Interrupted` a request to stop, `RankLost` the end of another process of the run.
Any other exception that escapes is a bug in this project and keeps its traceback.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable

# sysexits.h EX_USAGE is 64, but argparse exits with 2 and users script against that.
USER_ERROR_EXIT = 2
# The run ended in order, but diverged: starting it again would end the same way.
DIVERGED_EXIT = 3
# Another rank was lost; this one is sound, and --resume continues the run.
RANK_LOST_EXIT = 4


class UserError(Exception):
    """Bad input. The message states in one line what is wrong and what to do."""


def one_line(error: BaseException) -> str:
    """Returns an error's message on one line, or its class name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def failure_of(name: str, error: Exception) -> str:
    """Returns why one scan of many failed, on one line; names the type of an error that is no user's mistake."""
    if isinstance(error, UserError | OSError):
        return one_line(error)
    return f"{name}: unexpected {type(error).__name__} ({one_line(error)}); please report it with this scan's header"


class RankLost(Exception):  # noqa: N818 - not an error of this process
    """Another rank of the run was killed, hangs or failed; the message names it if it is known."""


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """A signal asked the program to stop.

    Args:
        number: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_status = interrupted_exit(number)


def interrupted_exit(number: int) -> int:
    """Returns 128 + the signal's number, the convention of shells and Kubernetes: 143 for SIGTERM, 130 for Ctrl-C."""
    return 128 + number


def exit_status_of(error: BaseException) -> int:
    """Returns the exit status of a program that an exception ends; 1, Python's own, for a bug."""
    if isinstance(error, UserError):
        return USER_ERROR_EXIT
    if isinstance(error, RankLost):
        return RANK_LOST_EXIT
    return interrupted_exit(signal.SIGINT) if isinstance(error, KeyboardInterrupt) else 1


def run_program(program: Callable[[], int | None], name: str) -> int:
    """Runs a command-line program and reports user errors in one line on stderr.

    Args:
        program: returns the exit status (None: 0).
        name: begins the line, such as "main.py".

    Returns:
        The exit status: the program's own, 2 after a UserError, 4 after a RankLost, 130 after Ctrl-C, 141 where
        nobody reads the output any more.
    """
    try:
        return program() or 0
    except (UserError, RankLost, BrokenPipeError) as error:
        if _is_output_closed(error):
            # As after SIGPIPE: `| head` has what it wants. What is left must not fail when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return interrupted_exit(signal.SIGPIPE)
        if isinstance(error, BrokenPipeError):
            raise
        print(error_line(name, str(error)), file=sys.stderr, flush=True)
        return exit_status_of(error)
    except KeyboardInterrupt as error:
        print(f"{_prefix(name)}: interrupted", file=sys.stderr, flush=True)
        return exit_status_of(error)


def _is_output_closed(error: BaseException) -> bool:
    """Returns whether an error, or the one that it replaced, comes from printing to a pipe without a reader."""
    if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
        return False
    try:
        output = select.poll()
        output.register(sys.stdout, 0)
        return any(event & select.POLLERR for _, event in output.poll(0))
    except (OSError, ValueError):  # no file of the system's, or closed
        return False


def error_line(name: str, message: str) -> str:
    """Returns the one line that reports an error, with the rank unless it is 0."""
    return f"{_prefix(name)}: error: {' '.join(message.split())}"


def port_in_use(port: str) -> str:
    """Returns what to do where rank 0 cannot listen."""
    return f"port {port} is in use; on one machine torchrun --standalone takes a free one, else name another"


def _prefix(name: str) -> str:
    rank = os.environ.get("RANK", "0")
    return name if rank == "0" else f"{name} (rank {rank})"
