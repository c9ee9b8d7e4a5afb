"""Leaving in order: the first SIGTERM or SIGINT is a wish that training looks at, a second one ends at once."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from common.errors import Interrupted
from runtime.distributed.world import KeyValueStore

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Within this a second signal is the same wish: a terminal and a launcher both pass Ctrl-C on.
SAME_WISH_S = 1.0
# Between two looks at the board while waiting.
LOOK_S = 0.5


class SignalHandler:
    """While entered, SIGTERM and SIGINT only set `number`; a second one, a second later, has its usual effect.

    Args:
        board: of the run's ranks; None in a world of one.

    Attributes:
        number: of the signal that came, or that another rank got; 0: none.
    """

    def __init__(self, board: KeyValueStore | None = None) -> None:
        self.number = 0
        self._board = board
        self._looked_at = 0.0
        self._came_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalHandler:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._came_at and time.monotonic() - self._came_at > SAME_WISH_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self._came_at:
            self._came_at = time.monotonic()
            self.number = number

    def check(self) -> None:
        """Raises Interrupted once a signal came: leaves an evaluation to which this rank has not given its part yet.

        It says so on the board: without that part the evaluation ends for no rank. In training the ranks agree first.
        """
        if self.number:
            if self._board is not None:
                self._board.set_default("left an evaluation", str(self.number))
            raise Interrupted(self.number)

    def check_waiting(self) -> None:
        """Raises Interrupted once a rank has left before giving its part.

        For a rank that has given its own: were it to leave of its own wish, the others might have the whole and go on.
        """
        now = time.monotonic()
        if self._board is not None and now - self._looked_at > LOOK_S:
            self._looked_at = now
            if number := self._board.get("left an evaluation"):
                raise Interrupted(int(number))
