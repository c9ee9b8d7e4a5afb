"""Loader workers end by their parent's SIGTERM and by no other process's."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import threading
import time
from multiprocessing.synchronize import Event
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_loading.worker_signals import STOPPING, blocked_in_new_workers, leave_to_parent


class Numbers(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def test_a_worker_outlives_the_signals_of_others_and_ends_by_its_parents() -> None:
    loader = DataLoader(Numbers(), num_workers=1, persistent_workers=True, worker_init_fn=leave_to_parent)
    with blocked_in_new_workers():
        batches = iter(loader)
    assert next(batches).item() == 0
    (worker,) = multiprocessing.active_children()
    for number in STOPPING:
        subprocess.run(["kill", f"-{number:d}", str(worker.pid)], check=True)
    assert [batch.item() for batch in batches] == list(range(1, 8))
    assert [batch.item() for batch in loader] == list(range(8)), "in the next epoch too"
    assert worker.is_alive()
    del loader, batches  # ends the worker, and with it torch's interest in how it ends
    worker.join(10)
    assert worker.exitcode == 0


def wait_for_parent(ready: Event) -> None:
    leave_to_parent(0)
    ready.set()
    time.sleep(60)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_worker_that_hangs_is_ended_by_its_parent(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    ready = context.Event()
    process = context.Process(target=wait_for_parent, args=(ready,))
    process.start()
    try:
        assert ready.wait(60)
        subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
        process.join(0.1)
        assert process.is_alive()
        process.terminate()
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()


def test_a_blocked_signal_comes_afterwards() -> None:
    arrived: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    try:
        with blocked_in_new_workers():
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            assert signal.SIGINT in signal.sigpending()
            assert arrived == []
        assert arrived == [signal.SIGINT]
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOPPING)
    finally:
        signal.signal(signal.SIGINT, before)
