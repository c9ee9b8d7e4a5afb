"""Graceful stop: the first SIGTERM or SIGINT requests one, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from common.errors import Interrupted
from runtime.distributed.world import KeyValueStore

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A second signal within this time is the same request: a terminal and a launcher both pass Ctrl-C on.
SAME_REQUEST_S = 1.0
# Interval at which a waiting rank polls the store.
POLL_S = 0.5
# The store's key: the signal because of which some rank left an evaluation.
LEFT_EVALUATION = "left an evaluation"


class SignalHandler:
    """Once entered, SIGTERM and SIGINT only set `number`; another one, at least a second later, has its usual effect.

    Left without a signal, it restores the handlers that it found.

    Args:
        store: shared by the run's ranks; None in a world of one.

    Attributes:
        number: of the signal that this process or another rank received; 0: none.
    """

    def __init__(self, store: KeyValueStore | None = None) -> None:
        self.number = 0
        self._store = store
        self._polled_at = 0.0
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> SignalHandler:
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self.number:  # the process is about to exit with this signal's status, even if the same one comes again
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received_at and time.monotonic() - self._received_at > SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self._received_at:
            self._received_at = time.monotonic()
            self.number = number

    def check(self) -> None:
        """Raises Interrupted once a signal came: leaves an evaluation to which this rank has not contributed yet.

        It publishes this in the store, since without that contribution no rank can finish the evaluation. In training
        the ranks agree first.
        """
        if self.number:
            if self._store is not None:
                self._store.set_default(LEFT_EVALUATION, str(self.number))
            raise Interrupted(self.number)

    def check_waiting(self) -> None:
        """Raises Interrupted once another rank has left the evaluation without contributing.

        For a rank that has contributed: if it left by itself, the others might have all contributions and go on.
        """
        now = time.monotonic()
        if self._store is not None and now - self._polled_at > POLL_S:
            self._polled_at = now
            if number := self._store.get(LEFT_EVALUATION):
                raise Interrupted(int(number))
