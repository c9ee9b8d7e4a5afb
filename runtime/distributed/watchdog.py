"""Watchdog: no run hangs because of a lost rank.

If one rank is killed, stopped, hangs or fails, the others would wait in a collective for half an hour. Therefore a
thread of each rank publishes its status in the key-value store at every heartbeat, and watches the status of the next
rank. A rank that detects a fault publishes it, and every rank exits with that cause as its last line.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.compat import gloo_cause
from common.errors import RANK_LOST_EXIT, RankLost, error_line
from runtime.distributed.signals import SignalHandler
from runtime.distributed.world import KeyValueStore, World
from runtime.logging import events as ev

# Where training steps take more than a fifth of the limit for a stall, as on a CPU, it is five times the slowest.
SLOWEST_FACTOR = 5.0
# Ranks named in the one line that states a cause.
NAMED_RANKS = 8
# For each phase that has ended: the number and name of the next phase in an iteration. Phase 0 is waiting for data.
NEXT_PHASE = {"data": (1, "forward and backward"), "forward and backward": (2, "the optimizer's step")}


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """When a rank counts as lost, in seconds.

    Attributes:
        heartbeat_s: between two heartbeats.
        silence_s: without a heartbeat. A live process sends them whatever its main thread does, but a machine that
            swaps may be late.
        stall_s: between two progress records of the main thread in training: longer than any GPU takes.
        slow_phase_s: the same before the first batch and in an evaluation, where ranks with small cases wait for one
            with a large case.
    """

    heartbeat_s: float = 2.0
    silence_s: float = 20.0
    stall_s: float = 40.0
    slow_phase_s: float = 1800.0


class Watchdog:
    """Records this rank's progress from its events, and watches the ranks in a thread (none in a world of one).

    Args:
        signals: this rank's handler, to which signals that another rank received are passed on: the ranks agree on a
            signal only at the end of a step.
        peers: the ranks that do the same as this one, among which one that hangs is found; None: all.
        name: begins the last line, such as "main.py".
    """

    def __init__(
        self,
        world: World,
        signals: SignalHandler,
        timeouts: Timeouts | None = None,
        *,
        peers: Sequence[int] | None = None,
        name: str = "main.py",
    ) -> None:
        self._world = world
        self._timeouts = timeouts or Timeouts()
        self._signals = signals
        self._peers = range(world.size) if peers is None else peers
        self._name = name
        # Epoch, batch and phase; the smallest belongs to the rank that is behind.
        self._progress = (0, 0, 0)
        self._position = "the start"
        self._progressed_at = time.monotonic()
        self._is_training = False
        self._has_stepped = False
        self._slowest_s = 0.0
        self._heartbeat_at = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._world.store is not None:
            arguments = (self._world.store,)
            self._thread = threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True)
            self._thread.start()
            self._heartbeat_at = time.monotonic()  # this object may have been created long ago
            threading.Thread(target=self._watch_store, name="watchdog's watchdog", daemon=True).start()
        return self

    def _watch_store(self) -> None:
        """Ends the process if the store does not answer: its client blocks without limit when the network is cut."""
        while not self._ended.wait(self._timeouts.heartbeat_s):
            if time.monotonic() - self._heartbeat_at > self._timeouts.silence_s:
                self._end(f"rank 0's machine gave no answer for {self._timeouts.silence_s:.0f} s")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        store = self._world.store
        self._ended.set()
        if store is None or self._thread is None:
            return
        self._thread.join(self._timeouts.heartbeat_s)
        if isinstance(error, RuntimeError) and self._world.lost_another(error):
            raise RankLost(
                f"{_cause(store, self._world, error, 2 * self._timeouts.heartbeat_s)}; start again with --resume"
            ) from None
        if error is not None:
            with suppress(RuntimeError):  # the store may be gone; what matters is the error
                store.set_default("fault", f"rank {self._world.rank} failed: {error}")
                self._let_others_read()

    def _let_others_read(self) -> None:
        """Waits on rank 0, whose process may hold the store and end it."""
        if self._world.is_main:
            time.sleep(2 * self._timeouts.heartbeat_s)

    def on(self, event: ev.Event) -> None:
        """Records progress and the position in the run."""
        if isinstance(event, ev.EpochStarted):
            self._record(True, (event.epoch, 0, 0), f"epoch {event.epoch}, waiting for data")
        elif isinstance(event, ev.PhaseEnd):
            epoch, batch, _ = self._progress
            number, phase = NEXT_PHASE[event.phase]
            self._record(True, (epoch, batch, number), f"epoch {epoch}, batch {batch}, {phase}")
        elif isinstance(event, ev.MicroBatchEnd):
            batch, self._has_stepped = event.batch + 1, True
            self._record(True, (event.epoch, batch, 0), f"epoch {event.epoch}, batch {batch}, waiting for data")
        elif isinstance(
            event, ev.EpochStopped | ev.EvaluationStarted | ev.CaseEvaluated | ev.EvaluationStopped | ev.RunStopped
        ):  # RunStopped is followed by the last checkpoint, on a disk that may be slow
            self._record(False, (event.epoch, sys.maxsize, 0), f"after epoch {event.epoch}")
        elif isinstance(event, ev.Waiting):
            self._record(False, self._progress, f"waiting for {event.what}")

    def _record(self, is_training: bool, progress: tuple[int, int, int], position: str) -> None:
        now = time.monotonic()
        if is_training and self._is_training:
            self._slowest_s = max(self._slowest_s, now - self._progressed_at)
        self._is_training, self._progress, self._position, self._progressed_at = is_training, progress, position, now

    def _timeout_s(self) -> float:
        if self._is_training and self._has_stepped:
            return max(self._timeouts.stall_s, SLOWEST_FACTOR * self._slowest_s)
        return self._timeouts.slow_phase_s

    def _watch(self, store: KeyValueStore) -> None:
        world = self._world
        watched = (world.rank + 1) % world.size
        last_status, changed_at, heartbeat = None, time.monotonic(), 0
        try:
            while not self._ended.wait(self._timeouts.heartbeat_s if heartbeat else 0.0):
                heartbeat += 1
                self._heartbeat_at = time.monotonic()
                store.set(f"rank {world.rank}", json.dumps(self._status(heartbeat)))
                if fault := store.get("fault"):
                    self._end(f"ended with the group: {fault}")
                self._share_signal(store)
                latest = store.get(f"rank {watched}")
                if latest != last_status:
                    last_status, changed_at = latest, time.monotonic()
                elif last_status and time.monotonic() - changed_at > self._timeouts.silence_s:
                    self._give_up(store, _kill_unresponsive(watched, last_status, self._timeouts.silence_s))
                if time.monotonic() - self._progressed_at > self._timeout_s():
                    self._give_up(store, self._stalled(store))
        except RuntimeError as error:
            # The store is in the process of rank 0 or of the launcher.
            if not self._ended.wait(self._timeouts.heartbeat_s):
                self._end(f"the connection to rank 0's machine is lost ({str(error).splitlines()[0]})")

    def _status(self, heartbeat: int) -> dict[str, Any]:
        """Returns what the other ranks may need to know about this one; the heartbeat makes each status differ."""
        return {
            "heartbeat": heartbeat,
            "progress": self._progress,
            "position": self._position,
            "function": _main_thread_function(),
            "machine": _machine(),
            "pid": os.getpid(),
        }

    def _share_signal(self, store: KeyValueStore) -> None:
        if self._signals.number:
            store.set_default("signal", str(self._signals.number))
        elif number := store.get("signal"):
            self._signals.number = int(number)

    def _stalled(self, store: KeyValueStore) -> str:
        """Returns an error message that names the ranks behind the others: all wait, but only for those."""
        statuses = _statuses(store, self._world)
        progress = {rank: tuple(statuses[rank].get("progress", (0, 0, 0))) for rank in self._peers}
        behind = [rank for rank, reached in progress.items() if reached == min(progress.values())]
        # If all are equally far, the one that hangs is in another function than those that wait for it.
        subject = f"rank {', '.join(map(str, behind))}" if len(behind) < len(statuses) else "every rank"
        functions = ", ".join(f"rank {rank} in {statuses[rank].get('function')}" for rank in behind[:NAMED_RANKS])
        position = statuses[behind[0]].get("position", "the start")
        return f"{subject} hangs at {position}: no progress for {self._timeout_s():.0f} s ({functions})"

    def _give_up(self, store: KeyValueStore, cause: str) -> None:
        published = store.set_default("fault", cause)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._end(published)

    def _end(self, cause: str) -> None:
        """Ends this process at once: its main thread hangs in a collective, which cannot be interrupted."""
        self._let_others_read()
        print(error_line(self._name, f"{cause}; start again with --resume"), file=sys.stderr, flush=True)
        for worker in multiprocessing.active_children():
            worker.kill()  # a worker that hangs would outlive this process
        os._exit(RANK_LOST_EXIT)


def _main_thread_function() -> str:
    """Returns the innermost Python function of the main thread, with its file and line."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return (
        f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})" if frame else "no function"
    )


def _machine() -> list[str]:
    """Returns host name and process-id namespace: two processes with both in common can signal each other."""
    try:
        return [socket.gethostname(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        return [socket.gethostname(), ""]


def _statuses(store: KeyValueStore, world: World) -> dict[int, dict[str, Any]]:
    return {rank: json.loads(store.get(f"rank {rank}") or "{}") for rank in range(world.size)}


def _kill_unresponsive(rank: int, last_status: str, silence_s: float) -> str:
    """Returns the error message for an unresponsive rank; kills it if it is local, since launchers wait for it."""
    status = json.loads(last_status)
    if status["machine"] == _machine():
        with suppress(OSError):
            os.kill(status["pid"], signal.SIGKILL)
    return (
        f"rank {rank} (process {status['pid']} on {status['machine'][0]}) gave no sign of life for "
        f"{silence_s:.0f} s; it was at {status['position']}"
    )


def _cause(store: KeyValueStore, world: World, error: RuntimeError, wait_s: float) -> str:
    """Returns why a collective failed: a published fault, a process that has ended, or else torch's error."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        try:
            if fault := store.get("fault"):
                return f"ended with the group: {fault}"
            for rank, status in _statuses(store, world).items():
                if status.get("machine") == _machine() and _has_ended(status["pid"]):
                    return (
                        f"rank {rank} (process {status['pid']}) was killed or has ended; it was at {status['position']}"
                    )
        except RuntimeError:  # the store was in the process that is lost
            break
        time.sleep(wait_s / 20)
    return f"another rank was lost ({gloo_cause(error)})"


def _has_ended(process: int) -> bool:
    """Returns whether a process of this machine has ended; it remains as a zombie until its parent waits for it."""
    try:
        os.kill(process, 0)
        return ") Z " in Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except ProcessLookupError:
        return True
    except OSError:
        return False
