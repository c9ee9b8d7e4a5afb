"""What every room may raise: a mistake of the user's, told in one line.

Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

# sysexits.h EX_USAGE is 64, but argparse exits with 2 and users script against that.
USER_ERROR_EXIT = 2


class UserError(Exception):
    """Bad input: the message says in one line what is wrong and what to do."""


def run_program(program: Callable[[], int | None], name: str) -> int:
    """Runs a command-line program and turns a user's mistake into one line on stderr.

    Args:
        program: the program; what it returns is the exit status (None: 0).
        name: what the line begins with, such as "main.py".

    Returns:
        The exit status: the program's own, 2 after a UserError, 130 after Ctrl-C.
    """
    rank = os.environ.get("RANK", "0")
    prefix = name if rank == "0" else f"{name} (rank {rank})"
    try:
        return program() or 0
    except UserError as error:
        print(f"{prefix}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr, flush=True)
        return 130
