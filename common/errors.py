"""How a program ends: its exit statuses, and what every room may raise.

A `UserError` is a mistake of the user's, an `Interrupted` a wish to stop, a `RankLost` the end of another process of
the run. Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

# sysexits.h EX_USAGE is 64, but argparse exits with 2 and users script against that.
USER_ERROR_EXIT = 2
# The run ended in order, but with numbers that are of no use: to start it again would end in the same.
DIVERGED_EXIT = 3
# Another rank was lost: this one is sound, and starting again with --resume goes on.
RANK_LOST_EXIT = 4


class UserError(Exception):
    """Bad input: the message says in one line what is wrong and what to do."""


def one_line(error: BaseException) -> str:
    """Returns an error's message on one line, or its class name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


class RankLost(Exception):  # noqa: N818 - an end, not an error of this process
    """Another rank of the run was killed, hangs or failed; the message says which, as far as it is known."""


class Interrupted(Exception):  # noqa: N818 - a wish, not an error
    """A signal asked the program to leave.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_status = interrupted_exit(number)


def interrupted_exit(number: int) -> int:
    """128 + the signal's number, as shells and Kubernetes know it: 143 after SIGTERM, 130 after Ctrl-C."""
    return 128 + number


def run_program(program: Callable[[], int | None], name: str) -> int:
    """Runs a command-line program and turns a user's mistake into one line on stderr.

    Args:
        program: the program; what it returns is the exit status (None: 0).
        name: what the line begins with, such as "main.py".

    Returns:
        The exit status: the program's own, 2 after a UserError, 4 after a RankLost, 130 after Ctrl-C.
    """
    try:
        return program() or 0
    except UserError as error:
        print(complaint(name, str(error)), file=sys.stderr, flush=True)
        return USER_ERROR_EXIT
    except RankLost as error:
        print(complaint(name, str(error)), file=sys.stderr, flush=True)
        return RANK_LOST_EXIT
    except KeyboardInterrupt:
        print(f"{_prefix(name)}: interrupted", file=sys.stderr, flush=True)
        return interrupted_exit(signal.SIGINT)


def complaint(name: str, message: str) -> str:
    """The one line that tells an error, with the rank where there are several."""
    return f"{_prefix(name)}: error: {' '.join(message.split())}"


def _prefix(name: str) -> str:
    rank = os.environ.get("RANK", "0")
    return name if rank == "0" else f"{name} (rank {rank})"
