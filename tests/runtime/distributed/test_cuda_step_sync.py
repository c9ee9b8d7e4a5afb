"""StepSync on a stand-in for a GPU, whose copies arrive only once they are waited for."""

from __future__ import annotations

import pytest
import torch

from runtime.distributed.step_sync import StepRequest, StepSync
from runtime.distributed.world import World
from runtime.logging.events import StepEnd
from tests.fake_gpu import GPU, FakeGpu

WORLD = World(0, 1, GPU)


def submit(step_sync: StepSync, batch: int) -> list[StepEnd]:
    loss, norm = (torch.full((), float(value), device=GPU) for value in (batch, 2 * batch))
    return list(step_sync.submit(epoch=1, batch=batch, loss=loss, gradient_norm=norm, loss_scale=None))


def end_of(batch: int, signal: int = 0) -> StepEnd:
    norm = 2.0 * batch
    return StepEnd(epoch=1, batch=batch, loss=float(batch), gradient_norm=norm, loss_scale=1.0, signal=signal)


@pytest.mark.parametrize("lag", [None, 0, 1, 3])
def test_steps_arrive_whole_without_a_wait_for_the_device(lag: int | None, gpu: FakeGpu) -> None:
    """In as many buffers as there are steps under way: one that was overwritten early would hold NaN."""
    step_sync = StepSync(WORLD, lambda: StepRequest(15), lag=lag)
    ends = [end for batch in range(9) for end in submit(step_sync, batch)]
    under_way = 1 if lag is None else lag
    assert len(ends) == 9 - under_way
    assert [*ends, *step_sync.drain()] == [end_of(batch, 15) for batch in range(9)]
    assert len(gpu.pinned) == under_way + 1
    assert gpu.waits == []


def test_a_value_that_a_step_changes_later_was_copied(gpu: FakeGpu) -> None:
    step_sync = StepSync(WORLD)
    loss, norm, scale = (torch.full((), value, device=GPU) for value in (0.5, 2.0, 1024.0))
    assert list(step_sync.submit(epoch=1, batch=0, loss=loss, gradient_norm=norm, loss_scale=scale)) == []
    for tensor in (loss, norm, scale):
        tensor.fill_(7.0)
    assert list(step_sync.drain()) == [StepEnd(epoch=1, batch=0, loss=0.5, gradient_norm=2.0, loss_scale=1024.0)]
