"""The watchdog names an unresponsive, hanging or failed rank on every rank, and leaves one that only takes long."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed import DistBackendError, HashStore

from common.errors import RANK_LOST_EXIT, RankLost, UserError
from runtime.arguments import RunConfig
from runtime.build import make_watchdog
from runtime.distributed import watchdog as module
from runtime.distributed.roles import assign_roles
from runtime.distributed.signals import SignalHandler
from runtime.distributed.watchdog import Timeouts, Watchdog
from runtime.distributed.world import KeyValueStore, World
from runtime.logging import events as ev

CPU = torch.device("cpu")
ELSEWHERE = ["another machine", "pid:[1]"]


@pytest.fixture
def store() -> KeyValueStore:
    """The store that two ranks of this process share."""
    return KeyValueStore(HashStore())


WATCH_STORE = Watchdog._watch_store


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store answers, unless a test puts its watcher back."""
    monkeypatch.setattr(Watchdog, "_watch_store", lambda self: None)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The causes for which a process would have been ended; its thread ends instead."""
    causes: list[str] = []

    def end(self: Watchdog, cause: str) -> None:
        causes.append(cause)
        self._ended.set()

    monkeypatch.setattr(Watchdog, "_end", end)
    return causes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that `time.monotonic` returns, set by the test; for tests without threads."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


# A heartbeat every hundredth of a second, and no timeout, unless a test sets one.
FAST = Timeouts(heartbeat_s=0.01, silence_s=1000.0, stall_s=1000.0, slow_phase_s=1000.0)


def make(
    store: KeyValueStore | None,
    rank: int = 0,
    size: int = 2,
    signals: SignalHandler | None = None,
    **timeouts: float,
) -> Watchdog:
    return Watchdog(World(rank, size, CPU, store=store), signals or SignalHandler(), replace(FAST, **timeouts))


def send(watchdog: Watchdog, *events: ev.Event) -> Watchdog:
    for event in events:
        watchdog.on(event)
    return watchdog


def status_of(store: KeyValueStore, rank: int = 0) -> dict[str, Any]:
    return json.loads(store.get(f"rank {rank}") or "{}")


def publish_status(
    store: KeyValueStore, rank: int, progress: list[int], position: str, process: int = 1, machine: Any = ELSEWHERE
) -> None:
    status = {
        "heartbeat": 1,
        "progress": progress,
        "position": position,
        "function": "read (loader.py:7)",
        "machine": machine,
        "pid": process,
    }
    store.set(f"rank {rank}", json.dumps(status))


def wait_heartbeats(store: KeyValueStore, count: int, rank: int = 0) -> None:
    """Waits for `count` more heartbeats."""
    first = status_of(store, rank).get("heartbeat", 0)
    wait_until(lambda: status_of(store, rank).get("heartbeat", 0) >= first + count)


def a_step(epoch: int, batch: int) -> list[ev.Event]:
    return [ev.PhaseEnd("data"), ev.PhaseEnd("forward and backward"), ev.MicroBatchEnd(epoch, batch, 2)]


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "watchdog"]


# The thread


def test_a_world_of_one_has_no_thread() -> None:
    with make(None, size=1) as watchdog:
        assert watchers() == []
        send(watchdog, ev.EpochStarted(1, 0.1, 4), *a_step(1, 0))
    with pytest.raises(ValueError, match="a bug"), make(None, size=1):
        raise ValueError("a bug")


def test_two_sound_ranks_watch_each_other_until_the_end(store: KeyValueStore, ends: list[str]) -> None:
    with make(store, 0) as first, make(store, 1) as second:
        send(first, ev.EpochStarted(2, 0.1, 4), *a_step(2, 0), ev.PhaseEnd("data"))
        send(second, ev.EpochStarted(2, 0.1, 4))
        for rank in (0, 1):
            wait_heartbeats(store, 5, rank)
        assert len(watchers()) == 2
    wait_until(lambda: watchers() == [])
    assert ends == []
    assert store.get("fault") is None
    statuses = [status_of(store, rank) for rank in (0, 1)]
    assert [status["progress"] for status in statuses] == [[2, 1, 1], [2, 0, 0]]
    assert [status["position"] for status in statuses] == [
        "epoch 2, batch 1, forward and backward",
        "epoch 2, waiting for data",
    ]
    assert {status["pid"] for status in statuses} == {os.getpid()}


def test_a_status_names_the_function_of_the_main_thread(store: KeyValueStore, ends: list[str]) -> None:
    with make(store):
        wait_until(lambda: status_of(store).get("function", "").startswith("wait_until (test_watchdog.py:"))
    assert ends == []


def test_progress_grows_with_every_record() -> None:
    watchdog, places, texts = make(None), [], []
    epoch = [
        ev.EpochStarted(3, 0.1, 2),
        *a_step(3, 0),
        *a_step(3, 1),
        ev.EpochStopped(epoch=3, loss=0.5, learning_rate=0.1, samples=4, seconds=1.0),
    ]
    for event in [*epoch, ev.EpochStarted(4, 0.1, 2)]:
        places.append(send(watchdog, event)._progress)
        texts.append(watchdog._position)
    assert places == sorted(set(places))
    assert texts == [
        "epoch 3, waiting for data",
        "epoch 3, batch 0, forward and backward",
        "epoch 3, batch 0, the optimizer's step",
        "epoch 3, batch 1, waiting for data",
        "epoch 3, batch 1, forward and backward",
        "epoch 3, batch 1, the optimizer's step",
        "epoch 3, batch 2, waiting for data",
        "after epoch 3",
        "epoch 4, waiting for data",
    ]


# A silent rank


def test_a_silent_neighbour_is_named_with_its_position(
    store: KeyValueStore, ends: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    publish_status(store, 1, [3, 2, 1], "epoch 3, batch 2, forward and backward", process=4711)
    with make(store, silence_s=0.6):
        wait_until(lambda: ends)
    cause = (
        "rank 1 (process 4711 on another machine) gave no sign of life for 1 s; "
        "it was at epoch 3, batch 2, forward and backward"
    )
    assert ends[0] == cause
    assert store.get("fault") == cause, "for the ranks that do not watch it"
    assert "most recent call first" in capfd.readouterr().err, "where this rank's threads are"


@pytest.mark.parametrize("here", [True, False])
def test_a_silent_process_is_killed_where_it_is_on_this_machine(
    here: bool, store: KeyValueStore, ends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process would live on, and launchers wait for it. Its id means nothing on another machine."""
    killed: list[tuple[int, int]] = []
    publish_status(store, 1, [3, 2, 1], "epoch 3", 4711, module._machine() if here else ELSEWHERE)
    monkeypatch.setattr(module.os, "kill", lambda process, number: killed.append((process, number)))
    with make(store, silence_s=0.05):
        wait_until(lambda: ends)
    assert killed == ([(4711, signal.SIGKILL)] if here else [])


@pytest.mark.parametrize("error", [ProcessLookupError, PermissionError])
def test_one_that_cannot_be_killed_is_named_all_the_same(
    error: type[OSError], store: KeyValueStore, ends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(process: int, number: int) -> None:
        raise error

    publish_status(store, 1, [3, 2, 1], "epoch 3", machine=module._machine())
    monkeypatch.setattr(module.os, "kill", refuse)
    with make(store, silence_s=0.05):
        wait_until(lambda: ends)
    assert "it was at epoch 3" in ends[0]


def test_the_last_rank_watches_the_first(store: KeyValueStore, ends: list[str]) -> None:
    for rank in (0, 1):
        publish_status(store, rank, [3, 2, 1], "epoch 3")
    with make(store, rank=2, size=3, silence_s=0.05):
        wait_until(lambda: ends)
    assert ends[0].startswith("rank 0 ")


def test_a_rank_that_has_not_begun_is_not_silent(store: KeyValueStore, ends: list[str]) -> None:
    with make(store, silence_s=0.01):
        wait_heartbeats(store, 20)
    assert ends == []


# A rank that hangs


@pytest.mark.parametrize(
    ("progress", "position", "message"),
    [
        ([2, 1, 1], "epoch 2, batch 1, forward and backward", "rank 1 hangs at epoch 2, batch 1, forward and backward"),
        ([2, 0, 0], "epoch 2, waiting for data", "rank 1 hangs at epoch 2, waiting for data"),
        ([1, 9, 0], "epoch 1, batch 9, waiting for data", "rank 1 hangs at epoch 1, batch 9, waiting for data"),
        ([2, 1, 2], "epoch 2, batch 1, the optimizer's step", "every rank hangs at epoch 2, batch 1, the optimizer"),
        ([2, 2, 0], "epoch 2, batch 2, waiting for data", "rank 0 hangs at epoch 2, batch 1, the optimizer's step"),
        ([3, 0, 0], "epoch 3, waiting for data", "rank 0 hangs at epoch 2, batch 1, the optimizer's step"),
    ],
)
def test_a_stall_names_the_rank_that_is_behind(
    progress: list[int],
    position: str,
    message: str,
    store: KeyValueStore,
    ends: list[str],
) -> None:
    """This one is at the optimizer's step of batch 1; the other one is at `progress`."""
    publish_status(store, 1, progress, position)
    with send(make(store, stall_s=0.1), ev.EpochStarted(2, 0.1, 4), *a_step(2, 0), *a_step(2, 1)[:2]):
        wait_until(lambda: ends)
    assert ends[0].startswith(message)
    assert ": no progress for " in ends[0]
    assert ("rank 1 in read (loader.py:7)" in ends[0]) is not message.startswith("rank 0"), (
        "in which function, of those that are named"
    )
    assert store.get("fault") == ends[0]


def test_a_rank_without_a_status_is_at_the_start(store: KeyValueStore, ends: list[str]) -> None:
    with send(make(store, stall_s=0.05), ev.EpochStarted(2, 0.1, 4), *a_step(2, 0)):
        wait_until(lambda: ends)
    assert ends[0].startswith("rank 1 hangs at the start: ")


def test_a_cause_is_one_line_whatever_the_number_of_ranks(store: KeyValueStore, ends: list[str]) -> None:
    for rank in range(1, 64):
        publish_status(store, rank, [2, 1, 0], "epoch 2")
    with send(make(store, size=64, stall_s=0.05), ev.EpochStarted(2, 0.1, 4), *a_step(2, 0)):
        wait_until(lambda: ends)
    assert ends[0].startswith("every rank hangs")
    assert ends[0].count(" in ") == 8
    assert "\n" not in ends[0]


def test_only_one_cause_is_published(store: KeyValueStore, ends: list[str]) -> None:
    """Each rank of a group that hangs detects it by itself; all end with the cause published first."""
    store.set_default("fault", "rank 5 failed: first")
    watchdog = send(make(store, stall_s=0.0), ev.EpochStarted(2, 0.1, 4), *a_step(2, 0))
    watchdog._give_up(store, "rank 1 hangs")
    assert ends == ["rank 5 failed: first"]


# What only takes long


def test_limits(clock: list[float]) -> None:
    watchdog = make(None, stall_s=40.0, slow_phase_s=1800.0)

    def after(seconds: float, *events: ev.Event) -> float:
        clock[0] += seconds
        return send(watchdog, *events)._timeout_s()

    compute, step, done = a_step(1, 0)
    assert after(0) == 1800, "before training"
    assert after(1, ev.EpochStarted(1, 0.1, 4)) == 1800, "workers start"
    assert after(7, compute) == 1800, "kernels are built"
    assert after(3, step) == 1800
    assert after(0, done) == 40, "a whole step is known"
    assert after(7.9, compute) == 40
    assert after(9, step) == pytest.approx(45), "five times the slowest record"
    assert after(1, done) == pytest.approx(45)
    assert after(1, ev.EpochStopped(epoch=1, loss=0.5, learning_rate=0.1, samples=8, seconds=1.0)) == 1800
    assert after(500, ev.EvaluationStarted(1, 3)) == 1800
    assert after(500, ev.CaseEvaluated(1, "case_00000")) == 1800
    assert after(500, ev.EvaluationStopped(epoch=1, mean_dice=0.5, dice=[0.5], loss=0.5, seconds=1.0)) == 1800
    assert after(500, ev.EpochStarted(2, 0.1, 4)) == pytest.approx(45), "an evaluation is no step"
    assert after(
        0, ev.BlockStopped(1, 1), ev.StepEnd(epoch=2, batch=0, loss=0.5, gradient_norm=1.0, loss_scale=1.0)
    ) == pytest.approx(45), "nothing is recorded"
    assert after(0, ev.RunStopped(status="aborted", reason="interrupted", epoch=1, seconds=1.0)) == 1800, (
        "the last checkpoint takes long"
    )


def test_a_resumed_epoch_counts_from_its_first_batch(clock: list[float]) -> None:
    """It need not be batch 0."""
    watchdog = send(make(None, stall_s=40.0), ev.EpochStarted(5, 0.1, 8), ev.PhaseEnd("data"))
    assert watchdog._timeout_s() == FAST.slow_phase_s
    assert send(watchdog, *a_step(5, 6)[1:])._timeout_s() == 40


@pytest.mark.parametrize(
    "events",
    [
        [],
        [ev.EpochStarted(1, 0.1, 4)],
        [ev.EpochStarted(1, 0.1, 4), ev.PhaseEnd("data")],
        [
            ev.EpochStarted(1, 0.1, 4),
            *a_step(1, 0),
            ev.EpochStopped(epoch=1, loss=0.5, learning_rate=0.1, samples=8, seconds=1.0),
        ],
        [ev.EpochStarted(1, 0.1, 4), *a_step(1, 0), ev.EvaluationStarted(1, 3)],
        [
            ev.EpochStarted(1, 0.1, 4),
            *a_step(1, 0),
            ev.RunStopped(status="aborted", reason="interrupted by SIGTERM", epoch=1, seconds=1.0),
        ],
    ],
    ids=["the start", "workers start", "the first batch", "an epoch's end", "an evaluation", "the last checkpoint"],
)
def test_what_takes_long_is_no_stall(events: list[ev.Event], store: KeyValueStore, ends: list[str]) -> None:
    with send(make(store, stall_s=0.02), *events):
        wait_heartbeats(store, 20)
    assert ends == []


def test_a_rank_that_waits_for_one_with_another_task_may_wait_forever(clock: list[float]) -> None:
    watchdog = send(make(None, slow_phase_s=1800.0), ev.EpochStarted(4, 0.1, 4), *a_step(4, 0))
    for _ in range(9):
        clock[0] += 1000
        send(watchdog, ev.Waiting("scores"))
        assert clock[0] - watchdog._progressed_at < watchdog._timeout_s() == 1800.0
    assert watchdog._position == "waiting for scores"
    assert watchdog._progress == (4, 1, 0), "it is as far as it was"


def test_a_rank_that_hangs_is_looked_for_among_those_with_the_same_task(store: KeyValueStore, ends: list[str]) -> None:
    """The evaluating rank 2 is behind, at the epoch that it scores."""
    publish_status(store, 1, [7, 0, 0], "epoch 7, waiting for data")
    publish_status(store, 2, [5, sys.maxsize, 0], "after epoch 5")
    watchdog = Watchdog(World(0, 3, CPU, store=store), SignalHandler(), replace(FAST, stall_s=0.1), peers=range(2))
    with send(watchdog, ev.EpochStarted(7, 0.1, 4), *a_step(7, 0)):
        wait_until(lambda: ends)
    assert ends[0].startswith("rank 1 hangs at epoch 7, waiting for data")


def test_a_slow_phase_has_a_timeout_too(store: KeyValueStore, ends: list[str]) -> None:
    with send(make(store, slow_phase_s=0.05), ev.EvaluationStarted(4, 3)):
        wait_until(lambda: ends)
    assert "hangs at " in ends[0]


# A signal


def test_a_signal_is_passed_on_to_the_other_ranks(store: KeyValueStore, ends: list[str]) -> None:
    handlers = [SignalHandler() for _ in range(3)]
    handlers[1].number = signal.SIGTERM
    with make(store, 0, 3, handlers[0]), make(store, 1, 3, handlers[1]), make(store, 2, 3, handlers[2]):
        wait_until(lambda: all(handler.number for handler in handlers))
    assert [handler.number for handler in handlers] == [signal.SIGTERM] * 3
    assert ends == []


def test_a_rank_s_own_signal_stays_its_own(store: KeyValueStore, ends: list[str]) -> None:
    handler = SignalHandler()
    handler.number = signal.SIGINT
    store.set("signal", str(int(signal.SIGTERM)))
    with make(store, signals=handler):
        wait_heartbeats(store, 3)
    assert (handler.number, store.get("signal")) == (signal.SIGINT, str(int(signal.SIGTERM)))


# A rank that fails


def test_a_rank_that_fails_publishes_it_and_raises_its_error(store: KeyValueStore, ends: list[str]) -> None:
    with make(store, 0):
        with pytest.raises(UserError, match=r"^case_00001: damaged$"), make(store, 1):
            raise UserError("case_00001: damaged")
        wait_until(lambda: ends)
    assert store.get("fault") == "rank 1 failed: case_00001: damaged"
    assert ends == ["ended with the group: rank 1 failed: case_00001: damaged"]


def test_the_first_fault_is_the_one_that_stays(store: KeyValueStore, ends: list[str]) -> None:
    store.set_default("fault", "rank 2 failed: first")
    with pytest.raises(ValueError, match="second"), make(store, 1):
        raise ValueError("second")
    assert store.get("fault") == "rank 2 failed: first"


def test_a_run_that_ends_well_publishes_no_fault(store: KeyValueStore, ends: list[str]) -> None:
    with make(store, 0), make(store, 1):
        pass
    assert (store.get("fault"), ends) == (None, [])


class Gone(KeyValueStore):
    """As when rank 0's process has ended."""

    def __init__(self) -> None:
        super().__init__(HashStore())

    def set(self, key: str, value: str) -> None:
        raise RuntimeError("Broken pipe\nException raised from sendBytes")

    def set_default(self, key: str, value: str) -> str:
        raise RuntimeError("Broken pipe")

    def get(self, key: str) -> str | None:
        raise RuntimeError("Connection reset by peer")


class Silent(KeyValueStore):
    """As when the network is cut: every call blocks."""

    def __init__(self, is_cut: threading.Event) -> None:
        super().__init__(HashStore())
        self.is_cut, self.is_restored = is_cut, threading.Event()

    def set(self, key: str, value: str) -> None:
        if self.is_cut.is_set():
            self.is_restored.wait(60)
        super().set(key, value)


def test_a_rank_whose_store_does_not_answer_ends(ends: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No error comes from it, and it may be the main thread that hangs for the same reason."""
    is_cut = threading.Event()
    store = Silent(is_cut)
    monkeypatch.setattr(Watchdog, "_watch_store", WATCH_STORE)
    with make(store, 1, silence_s=0.6):
        wait_heartbeats(store, 5, 1)
        is_cut.set()
        wait_until(lambda: ends)
        store.is_restored.set()
    assert ends == ["rank 0's machine gave no answer for 1 s"]


def test_a_store_that_answers_does_not_end_the_rank(
    store: KeyValueStore, ends: list[str], clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the run is, and however long ago the watchdog was made."""
    monkeypatch.setattr(Watchdog, "_watch_store", WATCH_STORE)
    watchdog = make(store, 1, slow_phase_s=math.inf)
    clock[0] += 5000
    with watchdog:
        for _ in range(3):
            wait_heartbeats(store, 2, rank=1)
            clock[0] += 900
    assert ends == []


def test_silence_counts_from_when_watching_begins(
    store: KeyValueStore, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is built in between."""
    monkeypatch.setattr(Watchdog, "_watch", lambda self, store: None)
    watchdog = make(store, 1)
    clock[0] += 5000
    with watchdog:
        assert watchdog._heartbeat_at == clock[0]


def test_a_rank_whose_store_is_gone_ends(ends: list[str]) -> None:
    with make(Gone(), 1):
        wait_until(lambda: ends)
    assert ends == ["the connection to rank 0's machine is lost (Broken pipe)"]


def test_at_the_end_of_a_run_the_store_may_go_first(ends: list[str]) -> None:
    """Rank 0's process may end at any time."""
    failed = threading.Event()

    class Going(Gone):
        def set(self, key: str, value: str) -> None:
            failed.set()
            super().set(key, value)

    with make(Going(), 1, heartbeat_s=60.0):
        assert failed.wait(60)
    wait_until(lambda: watchers() == [])
    assert ends == []


def test_an_error_is_raised_even_if_the_store_is_gone(ends: list[str]) -> None:
    with pytest.raises(UserError, match=r"^damaged$"), make(Gone(), 1):
        raise UserError("damaged")


# A collective that failed


LOST = RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer\nmore of it")


def lose(store: KeyValueStore, error: BaseException = LOST) -> str:
    """Returns the message of a rank whose collective fails with the error."""
    with pytest.raises(RankLost) as lost, make(store):
        raise error
    assert str(lost.value).endswith("; start again with --resume")
    return str(lost.value).removesuffix("; start again with --resume")


@pytest.mark.parametrize("error", [LOST, DistBackendError("NCCL communicator was aborted")])
def test_the_cause_of_a_failed_collective_is_the_published_fault(
    error: RuntimeError, store: KeyValueStore, ends: list[str]
) -> None:
    store.set_default("fault", "rank 1 failed: CUDA out of memory")
    assert lose(store, error) == "ended with the group: rank 1 failed: CUDA out of memory"


def test_or_a_process_that_is_gone(store: KeyValueStore, ends: list[str], sleeper: subprocess.Popen[bytes]) -> None:
    publish_status(store, 1, [2, 1, 1], "epoch 2, batch 1, forward and backward", sleeper.pid, module._machine())
    sleeper.kill()
    gone = f"rank 1 (process {sleeper.pid}) was killed or has ended; it was at epoch 2, batch 1, forward and backward"
    assert lose(store) == gone, "its parent has not looked yet"
    sleeper.wait()
    assert lose(store) == gone


def test_or_torchs_own_error(store: KeyValueStore, ends: list[str], sleeper: subprocess.Popen[bytes]) -> None:
    """A live process, one on another machine, and a store that is gone give no other cause."""
    publish_status(store, 1, [2, 1, 1], "epoch 2", sleeper.pid, module._machine())
    publish_status(store, 0, [2, 1, 1], "epoch 2", 2**22 + 1, ELSEWHERE)
    said = f"another rank was lost ({str(LOST).splitlines()[0]})"
    assert lose(store) == said
    guessed = RuntimeError(f"{str(LOST).splitlines()[0]} This is typically caused by something else")
    assert lose(store, guessed) == said
    assert lose(Gone()) == said


def test_this_rank_s_own_error_is_no_loss_of_another(store: KeyValueStore, ends: list[str]) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), make(store):
        raise RuntimeError("CUDA out of memory")
    assert store.get("fault") == "rank 0 failed: CUDA out of memory"


# The end of a process


def test_the_end_is_the_cause_as_the_last_line_and_status_4(
    store: KeyValueStore,
    sleeper: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Worker:
        def kill(self) -> None:
            sleeper.kill()

    ended: list[int] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(module.multiprocessing, "active_children", lambda: [Worker()])
    monkeypatch.setattr(module.os, "_exit", ended.append)
    make(store, 1)._end("rank 0 hangs")
    assert ended == [RANK_LOST_EXIT]
    assert capfd.readouterr().err == "main.py (rank 1): error: rank 0 hangs; start again with --resume\n"
    assert sleeper.wait(60) == -signal.SIGKILL, "a loader's worker that hangs would stay"


@pytest.mark.parametrize(("rank", "slept"), [(0, [0.02]), (1, [])])
def test_rank_0_ends_last_since_the_store_may_be_in_its_process(
    rank: int, slept: list[float], store: KeyValueStore, ends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    with pytest.raises(ValueError, match="a bug"), make(store, rank):
        raise ValueError("a bug")
    assert waited == slept


@pytest.mark.parametrize(
    ("flags", "stall_s"),
    [
        ({}, 44.0),
        ({"stall_timeout": 100}, 100.0),
        ({"worker_timeout": 300}, 304.0),
        ({"worker_timeout": 1, "stall_timeout": 2}, 5.0),
    ],
)
def test_the_flags_set_the_limits_and_the_loader_ends_first(
    flags: dict[str, int], stall_s: float, make_config: Callable[..., RunConfig]
) -> None:
    """The loader's error names the cases that it waited for."""
    watchdog = make_watchdog(make_config(**flags), assign_roles(World(0, 1, CPU), 0), SignalHandler())
    assert send(watchdog, ev.EpochStarted(1, 0.1, 4), *a_step(1, 0))._timeout_s() == stall_s
