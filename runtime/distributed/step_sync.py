"""What the ranks agree on at the end of each step: requests to save or to stop, and whether the numbers are finite.

All of it is one small vector, reduced to its maximum over the ranks, copied to the host, and read there one step later,
when it has long arrived. So the host never waits for the device, and every rank acts on the same values at the same
step.
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
    """What this rank asks of all ranks: to stop because of a signal (its number; 0: none), to save a checkpoint."""

    signal: int = 0
    save: bool = False


class StepSync:
    """Called once per optimizer step.

    Args:
        request: returns this rank's request; called at each step.
        lag: steps between submitting and reading; None: 1 on a GPU, where the host would otherwise wait for the step to
            finish, and 0 on a CPU, where it has finished.
    """

    def __init__(self, world: World, request: Callable[[], StepRequest] = StepRequest, lag: int | None = None) -> None:
        self._world = world
        self._request = request
        self._lag = (1 if world.device.type == "cuda" else 0) if lag is None else lag
        self._in_flight: deque[tuple[int, int, Callable[[], list[float]]]] = deque()
        self._free: list[_PinnedCopy] = []

    def submit(
        self, *, epoch: int, batch: int, loss: Tensor, gradient_norm: Tensor, loss_scale: Tensor | None
    ) -> Iterator[StepEnd]:
        """Sends this rank's vector and yields the steps that have arrived. Every rank must call it at every step.

        Args:
            batch: index in the epoch of the step's last micro-batch.
            loss, gradient_norm: scalars on the device.
            loss_scale: with a loss scaler, under which an infinite gradient is no fault; None without one.
        """
        request = self._request()
        if loss_scale is None:
            scale = torch.ones_like(loss)
            is_sound = loss.isfinite() & gradient_norm.isfinite()
        else:
            scale = loss_scale.to(loss.dtype).reshape(())
            is_sound = loss.isfinite() & (scale >= MIN_LOSS_SCALE)
        # Filled on the device: copying a tensor made from host numbers would wait.
        requested = [torch.full_like(loss, float(value)) for value in (request.signal, request.save)]
        agreed = self._world.max(torch.stack([*requested, 1 - is_sound.to(loss.dtype)]))
        vector = torch.cat([agreed, torch.stack([loss, gradient_norm, scale])])
        self._in_flight.append((epoch, batch, _start_copy(vector, self._free)))
        while len(self._in_flight) > self._lag:
            yield self._receive()

    def drain(self) -> Iterator[StepEnd]:
        """Yields every step still in flight; waits for the device."""
        while self._in_flight:
            yield self._receive()

    def _receive(self) -> StepEnd:
        epoch, batch, read = self._in_flight.popleft()
        signal, save, fault, loss, norm, scale = read()
        return StepEnd(
            epoch=epoch,
            batch=batch,
            loss=loss,
            gradient_norm=norm,
            loss_scale=scale,
            signal=int(signal),
            save=bool(save),
            fault=bool(fault),
        )


class _PinnedCopy:
    """Host memory that a GPU fills while the host goes on, and the event that marks its arrival."""

    def __init__(self, like: Tensor) -> None:
        self.host = torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        self.arrived = torch.cuda.Event()

    def start(self, vector: Tensor) -> None:
        self.host.copy_(vector, non_blocking=True)
        self.arrived.record()

    def read(self) -> list[float]:
        self.arrived.synchronize()
        values: list[float] = self.host.tolist()
        return values


def _start_copy(vector: Tensor, free: list[_PinnedCopy]) -> Callable[[], list[float]]:
    """Starts copying the vector to the host; returns a function that waits for it and returns its values.

    Args:
        free: copies that have been read, to be used again; so there are never more than are in flight at a time.
    """
    if vector.device.type != "cuda":
        return lambda: vector.tolist()
    copy = free.pop() if free else _PinnedCopy(vector)
    copy.start(vector)

    def read() -> list[float]:
        values = copy.read()
        free.append(copy)
        return values

    return read
