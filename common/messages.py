"""Messages to the user, through one standard logger.

    from common.messages import logger, note

    logger.info("...")     a plain line on stdout, on rank 0 only
    note("...")            `note: ...` on stderr; in a training run part of its log instead
    logger.warning("...")  `warning: ...` on stderr, on every rank
    logger.error("...")    `error: ...` on stderr, on every rank

The results that a command computes are not messages: it prints them itself.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Between INFO and WARNING: what a user may not expect, although nothing is wrong.
NOTE = 25
logging.addLevelName(NOTE, "NOTE")

_held_notes: list[str] = []


def is_main_rank() -> bool:
    """Returns whether this process is rank 0, which alone prints what is the same on every rank."""
    return os.environ.get("RANK", "0") == "0"


class ConsoleHandler(logging.Handler):
    """Prints each message and flushes. Never raises: a full disk or a closed pipe must not end a run."""

    def emit(self, record: logging.LogRecord) -> None:
        is_plain = record.levelno <= logging.INFO
        if is_plain and not is_main_rank():
            return
        prefix = "" if is_plain else f"{record.levelname.lower()}: "
        with suppress(OSError, ValueError):  # ValueError: the stream has been closed
            print(f"{prefix}{record.getMessage()}", file=sys.stdout if is_plain else sys.stderr, flush=True)


logger = logging.getLogger("unet3d")
logger.setLevel(logging.INFO)
logger.propagate = False  # a tracker's package may configure the root logger, which would print everything twice
logger.addHandler(ConsoleHandler())


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 case", "2 cases"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def note(message: str) -> None:
    """Logs something that the user may not expect, although nothing is wrong."""
    logger.log(NOTE, message)


@contextmanager
def notes_held() -> Iterator[None]:
    """Holds notes back from the console: a training run logs and prints them with an event (see `take_notes`)."""

    def hold(record: logging.LogRecord) -> bool:
        if record.levelno == NOTE:
            _held_notes.append(record.getMessage())
        return record.levelno != NOTE

    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
        _held_notes.clear()


def take_notes() -> list[str]:
    """Returns the notes held back since the previous call, in their order, and forgets them."""
    notes = _held_notes.copy()
    _held_notes.clear()
    return notes
