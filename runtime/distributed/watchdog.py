"""No run hangs: a thread of each rank tells the others that it lives, and ends its process when one does not.

A rank that is killed, stopped, hangs or fails would leave the others waiting in a collective for half an hour. Each
rank writes to the board where it is; each watches the next one's note. Who finds something wrong pins it up for all,
and every rank ends with that cause as its last line.
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
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.compat import gloo_cause
from common.errors import RANK_LOST_EXIT, RankLost, error_line
from runtime.distributed.signals import SignalHandler
from runtime.distributed.world import KeyValueStore, World
from runtime.logging import events as ev

BEAT_S = 2.0
# A process that lives writes every two seconds, whatever its main thread does; a machine that swaps may take longer.
SILENCE_S = 20.0
# From one mark of the main thread in training to the next: long for any step that a GPU makes. Where steps are slower
# than a fifth of it, as on a CPU, five times the slowest yet.
STALL_S = 40.0
SLOWEST_TIMES = 5.0
# Before the first batch, and in an evaluation, where ranks with short cases wait for one with a long case.
PATIENT_S = 1800.0
# A cause is one line.
NAMED_RANKS = 8
# What follows a phase, and its number in the order of an iteration; the first is waiting for data.
FOLLOWING = {"data": (1, "forward and backward"), "forward and backward": (2, "the optimizer's step")}


class Watchdog:
    """A callback that marks where this rank is, and the thread that compares. In a world of one there is no thread.

    Args:
        interruption: of this rank; a signal that came to another rank is noted in it, for where no step comes.
    """

    def __init__(self, world: World, interruption: SignalHandler, name: str = "main.py") -> None:
        self._world = world
        self._interruption = interruption
        self._name = name
        # Epoch, batch and phase: what tells who is behind.
        self._place = (0, 0, 0)
        self._text = "the start"
        self._marked_at = time.monotonic()
        self._is_training = False
        self._has_stepped = False
        self._slowest_s = 0.0
        self._beat_at = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._world.board is not None:
            arguments = (self._world.board,)
            self._thread = threading.Thread(target=self._watch, args=arguments, name="watchdog", daemon=True)
            self._thread.start()
            self._beat_at = time.monotonic()  # it may be long since this was made
            threading.Thread(target=self._watch_the_board, name="watchdog's watchdog", daemon=True).start()
        return self

    def _watch_the_board(self) -> None:
        """The board's client waits without a limit where the network is cut: no error comes before it is back."""
        while not self._ended.wait(BEAT_S):
            if time.monotonic() - self._beat_at > SILENCE_S:
                self._end(f"rank 0's machine gave no answer for {SILENCE_S:.0f} s")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        board = self._world.board
        self._ended.set()
        if board is None or self._thread is None:
            return
        self._thread.join(BEAT_S)
        if isinstance(error, RuntimeError) and self._world.lost_another(error):
            raise RankLost(f"{_cause(board, self._world, error)}; start again with --resume") from None
        if error is not None:
            with suppress(RuntimeError):  # the board may be gone; the error is what counts
                board.set_default("fault", f"rank {self._world.rank} failed: {error}")
                self._let_others_read()

    def _let_others_read(self) -> None:
        """The board may hang in rank 0's process, and would go with it."""
        if self._world.is_main:
            time.sleep(2 * BEAT_S)

    def on(self, event: ev.Event) -> None:
        """Marks progress, with where it was made."""
        if isinstance(event, ev.EpochStarted):
            self._mark(True, (event.epoch, 0, 0), f"epoch {event.epoch}, waiting for data")
        elif isinstance(event, ev.PhaseEnd):
            epoch, batch, _ = self._place
            number, follows = FOLLOWING[event.phase]
            self._mark(True, (epoch, batch, number), f"epoch {epoch}, batch {batch}, {follows}")
        elif isinstance(event, ev.MicroBatchEnd):
            batch, self._has_stepped = event.batch + 1, True
            self._mark(True, (event.epoch, batch, 0), f"epoch {event.epoch}, batch {batch}, waiting for data")
        elif isinstance(
            event, ev.EpochStopped | ev.EvaluationStarted | ev.CaseEvaluated | ev.EvaluationStopped | ev.RunStopped
        ):  # after the last of them comes the last checkpoint, on a disk that may be slow
            self._mark(False, (event.epoch, sys.maxsize, 0), f"after epoch {event.epoch}")

    def _mark(self, is_training: bool, place: tuple[int, int, int], text: str) -> None:
        now = time.monotonic()
        if is_training and self._is_training:
            self._slowest_s = max(self._slowest_s, now - self._marked_at)
        self._is_training, self._place, self._text, self._marked_at = is_training, place, text, now

    def _limit_s(self) -> float:
        knows_steps = self._is_training and self._has_stepped
        return max(STALL_S, SLOWEST_TIMES * self._slowest_s) if knows_steps else PATIENT_S

    def _watch(self, board: KeyValueStore) -> None:
        world = self._world
        watched = (world.rank + 1) % world.size
        seen, seen_at, beat = None, time.monotonic(), 0
        try:
            while not self._ended.wait(BEAT_S if beat else 0.0):
                beat += 1
                self._beat_at = time.monotonic()
                note = {"beat": beat, "place": self._place, "at": self._text, "in": _main_thread_is_in()}
                board.set(f"rank {world.rank}", json.dumps(note | {"machine": _machine(), "pid": os.getpid()}))
                if fault := board.get("fault"):
                    self._end(f"ended with the group: {fault}")
                self._pass_on_signal(board)
                latest = board.get(f"rank {watched}")
                if latest != seen:
                    seen, seen_at = latest, time.monotonic()
                elif seen and time.monotonic() - seen_at > SILENCE_S:
                    self._give_up(board, _lost(watched, seen))
                if time.monotonic() - self._marked_at > self._limit_s():
                    self._give_up(board, self._stalled(board))
        except RuntimeError as error:
            # The board hangs in rank 0's or the launcher's process.
            if not self._ended.wait(BEAT_S):
                self._end(f"the connection to rank 0's machine is lost ({str(error).splitlines()[0]})")

    def _pass_on_signal(self, board: KeyValueStore) -> None:
        if self._interruption.number:
            board.set_default("signal", str(self._interruption.number))
        elif number := board.get("signal"):
            self._interruption.number = int(number)

    def _stalled(self, board: KeyValueStore) -> str:
        """Who is behind the others; every rank waits, but only one was waited for."""
        notes = _notes(board, self._world)
        places = {rank: tuple(note.get("place", (0, 0, 0))) for rank, note in notes.items()}
        behind = [rank for rank, place in places.items() if place == min(places.values())]
        # Where all have come equally far, the one that hangs is in another function than those that wait for it.
        who = f"rank {', '.join(map(str, behind))}" if len(behind) < len(places) else "every rank"
        functions = ", ".join(f"rank {rank} in {notes[rank].get('in')}" for rank in behind[:NAMED_RANKS])
        at = notes[behind[0]].get("at", "the start")
        return f"{who} hangs at {at}: nothing moved for {self._limit_s():.0f} s ({functions})"

    def _give_up(self, board: KeyValueStore, cause: str) -> None:
        hanging = board.set_default("fault", cause)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self._end(hanging)

    def _end(self, cause: str) -> None:
        """Ends this process at once: its main thread hangs in a collective, from which nothing calls it back."""
        self._let_others_read()
        print(error_line(self._name, f"{cause}; start again with --resume"), file=sys.stderr, flush=True)
        for worker in multiprocessing.active_children():
            worker.kill()  # one that hangs would stay
        os._exit(RANK_LOST_EXIT)


def _main_thread_is_in() -> str:
    """The innermost function of the main thread that is Python's, with its file and line."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return (
        f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})" if frame else "no function"
    )


def _machine() -> list[str]:
    """What two processes that may signal each other have in common: the host's name and the space of their numbers."""
    try:
        return [socket.gethostname(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        return [socket.gethostname(), ""]


def _notes(board: KeyValueStore, world: World) -> dict[int, dict[str, Any]]:
    return {rank: json.loads(board.get(f"rank {rank}") or "{}") for rank in range(world.size)}


def _lost(rank: int, note: str) -> str:
    """The words for a rank without a sign of life. On this machine it is killed: launchers wait for it for long."""
    known = json.loads(note)
    if known["machine"] == _machine():
        with suppress(OSError):
            os.kill(known["pid"], signal.SIGKILL)
    return (
        f"rank {rank} (process {known['pid']} on {known['machine'][0]}) gave no sign of life for {SILENCE_S:.0f} s; "
        f"it was at {known['at']}"
    )


def _cause(board: KeyValueStore, world: World, error: RuntimeError) -> str:
    """Why a collective failed: what some rank pinned up, or whose process is gone, or only what torch says."""
    deadline = time.monotonic() + 2 * BEAT_S
    while time.monotonic() < deadline:
        try:
            if fault := board.get("fault"):
                return f"ended with the group: {fault}"
            for rank, note in _notes(board, world).items():
                if note.get("machine") == _machine() and _is_gone(note["pid"]):
                    return f"rank {rank} (process {note['pid']}) was killed or has ended; it was at {note['at']}"
        except RuntimeError:  # the board was in the process that is lost
            break
        time.sleep(BEAT_S / 10)
    return f"another rank was lost ({gloo_cause(error)})"


def _is_gone(process: int) -> bool:
    """Whether a process of this machine has ended; one whose parent has not yet looked is a zombie."""
    try:
        os.kill(process, 0)
        return ") Z " in Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except ProcessLookupError:
        return True
    except OSError:
        return False
