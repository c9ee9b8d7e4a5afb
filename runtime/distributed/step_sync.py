"""What the ranks tell one another at each step's end: wishes to save or to leave, and whether the numbers are sound.

All of it is one vector of a few numbers: reduced to the maximum over the ranks, copied to the host, and read there a
step later, when it has long arrived. So the host never waits for work that the device could have begun, and every rank
hears the same at the same step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.distributed.world import World
from runtime.logging.events import StepEnd

# After thirty halvings without one usable gradient a loss scaler (it starts at 2^16) will not recover.
MIN_LOSS_SCALE = 2.0**-14


@dataclass(frozen=True)
class StepRequest:
    """What this rank asks of all: to leave because of a signal (its number; 0: no), to save a checkpoint."""

    signal: int = 0
    save: bool = False


class StepSync:
    """One beat a step.

    Args:
        wishes: asked at each beat.
        lag: beats from sending to hearing; None: 1 on a GPU, where the host would else wait for the step to end, and 0
            on a CPU, where it has ended.
    """

    def __init__(self, world: World, wishes: Callable[[], StepRequest] = StepRequest, lag: int | None = None) -> None:
        self._world = world
        self._wishes = wishes
        self._lag = (1 if world.device.type == "cuda" else 0) if lag is None else lag
        self._under_way: deque[tuple[int, int, Tensor, Callable[[], None]]] = deque()

    def submit(
        self, epoch: int, batch: int, loss: Tensor, gradient_norm: Tensor, loss_scale: Tensor | None
    ) -> Iterator[StepEnd]:
        """Sends this rank's vector and yields what has come back by now. Every rank must call it at every step.

        Args:
            batch: of the epoch, the last one of the step.
            loss, gradient_norm: scalars on the device.
            loss_scale: of a loss scaler, under which an infinite gradient is no fault; None without one.
        """
        wishes = self._wishes()
        if loss_scale is None:
            scale = torch.ones_like(loss)
            is_sound = loss.isfinite() & gradient_norm.isfinite()
        else:
            scale = loss_scale.to(loss.dtype).reshape(())
            is_sound = loss.isfinite() & (scale >= MIN_LOSS_SCALE)
        # Filled on the device: a tensor made from numbers on the host would be a copy that waits.
        asked = [torch.full_like(loss, float(value)) for value in (wishes.signal, wishes.save)]
        agreed = self._world.max(torch.stack([*asked, 1 - is_sound.to(loss.dtype)]))
        vector, arrived = _start_copy(torch.cat([agreed, torch.stack([loss, gradient_norm, scale])]))
        self._under_way.append((epoch, batch, vector, arrived))
        while len(self._under_way) > self._lag:
            yield self._hear()

    def drain(self) -> Iterator[StepEnd]:
        """Yields all that is still under way; waits for the device."""
        while self._under_way:
            yield self._hear()

    def _hear(self) -> StepEnd:
        epoch, batch, vector, arrived = self._under_way.popleft()
        arrived()
        signal, save, fault, loss, norm, scale = vector.tolist()
        return StepEnd(epoch, batch, loss, norm, scale, int(signal), bool(save), bool(fault))


def _start_copy(vector: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """The vector on its way to the host, and what waits for it."""
    if vector.device.type != "cuda":
        return vector, lambda: None
    host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True).copy_(vector, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event.synchronize
