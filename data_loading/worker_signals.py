"""Keeps the signals that end a run away from its loader workers, whose batches its last step needs.

Ctrl-C in a terminal, `timeout`, torchrun and a scheduler signal all processes of a run. The main process saves and then
ends its workers; a worker that ended first would be reported as killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def blocked_in_new_workers() -> Iterator[None]:
    """Blocks the signals in workers started meanwhile, until `leave_to_parent`; in this process they come later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(_: int) -> None:
    """A DataLoader's `worker_init_fn`: from now on only its parent's SIGTERM ends this worker."""
    # Again, since a forkserver's children do not inherit what their parent blocks.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    threading.Thread(target=_end_for_parent, daemon=True).start()


def _end_for_parent() -> None:
    """Waits for a SIGTERM of the parent, with which torch and Python end a worker that does not end by itself.

    A thread, since a handler does not learn who sent the signal.
    """
    parent = multiprocessing.parent_process()
    while parent is not None:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent.pid:
            os._exit(0)
