"""A dummy disk, and what else the tests of the checkpoint writer share."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from runtime.checkpoint.format import snapshot
from runtime.checkpoint.writer import CheckpointWriter
from runtime.distributed.world import World
from runtime.train_state import Stop, TrainState

MakeState = Callable[..., TrainState]

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
FULL = OSError(errno.ENOSPC, "No space left on device")
ENDED = Stop("aborted", "not reached")
take = partial(snapshot, config={}, seed=1, data="")


def save_if_due(writer: CheckpointWriter, epoch: int, state: TrainState) -> None:
    """As the training loop does after an epoch."""
    if writer.is_due_after_epoch(epoch):
        writer.save(state)


def make_writer(
    write: Callable[[dict[str, Any]], None] | None, minutes: float = 0.0, epochs: int = 0, world: World = ALONE
) -> CheckpointWriter:
    return CheckpointWriter(world=world, snapshot=take, write=write, minutes=minutes, epochs=epochs)


class Disk:
    """Keeps what was written. A write lasts until `let_go`, and fails with `error` if there is one."""

    def __init__(self, error: OSError | None = None, is_slow: bool = False) -> None:
        self.written: list[dict[str, Any]] = []
        self.threads: list[str] = []
        self.error = error
        self.began, self.may_end = threading.Event(), threading.Event()
        if not is_slow:
            self.let_go()

    def let_go(self) -> None:
        self.may_end.set()

    def write(self, content: dict[str, Any]) -> None:
        self.began.set()
        self.threads.append(threading.current_thread().name)
        assert self.may_end.wait(60)
        if self.error is not None:
            raise self.error
        self.written.append(content)

    def epochs(self) -> list[int]:
        return [content["last"]["epoch"] for content in self.written]


@dataclass(frozen=True)
class Gathering(World):
    """A rank that gathers given sums, and records the values that it contributes."""

    sums: list[float] = field(default_factory=list)
    gathered: list[float] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.gathered.append(value)
        return self.sums
