"""The step_sync: every step's numbers come once and in order, and all ranks hear the same of wishes and faults."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.distributed.step_sync import MIN_LOSS_SCALE, StepRequest, StepSync
from runtime.distributed.world import World
from runtime.logging.events import StepEnd

# (epoch, batch, loss, gradient norm) of some steps; every number is exact in fp32.
STEPS = [(3, 1, 0.5, 2.0), (3, 3, 0.25, 1.5), (3, 5, 0.125, 1.0), (4, 1, 0.75, 0.5)]


def expected_end(step: tuple[int, int, float, float]) -> StepEnd:
    epoch, batch, loss, norm = step
    return StepEnd(epoch=epoch, batch=batch, loss=loss, gradient_norm=norm, loss_scale=1.0)


def submit(
    step_sync: StepSync, epoch: int, batch: int, loss: float, norm: float, scale: float | None = None
) -> list[StepEnd]:
    loss_scale = None if scale is None else torch.tensor(scale)
    return list(
        step_sync.submit(
            epoch=epoch,
            batch=batch,
            loss=torch.tensor(loss),
            gradient_norm=torch.tensor(norm),
            loss_scale=loss_scale,
        )
    )


def hear(
    world: World, loss: float, norm: float, scale: float | None = None, wishes: StepRequest | None = None
) -> StepEnd:
    """Returns the event of a step with these numbers, without a lag."""
    (event,) = submit(StepSync(world, lambda: wishes or StepRequest(), lag=0), 1, 0, loss, norm, scale)
    return event


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_every_step_comes_once_in_order_so_many_beats_later(lag: int, world: World) -> None:
    step_sync = StepSync(world, lag=lag)
    came = [submit(step_sync, *step) for step in STEPS]
    rest = list(step_sync.drain())
    expected = [expected_end(step) for step in STEPS]
    assert [len(events) for events in came] == [0] * lag + [1] * (4 - lag)
    assert [event for events in [*came, rest] for event in events] == expected
    assert list(step_sync.drain()) == [], "each is yielded once"


def test_the_lag_is_of_the_device(world: World) -> None:
    """On a CPU a step has ended when its numbers are sent; on a GPU reading them would wait for it."""
    assert len(submit(StepSync(world), *STEPS[0])) == 1
    step_sync = StepSync(World(0, 1, torch.device("cuda")))
    assert submit(step_sync, *STEPS[0]) == []
    assert submit(step_sync, *STEPS[1]) == [expected_end(STEPS[0])]


def test_a_beat_reads_what_was_sent_before_and_nothing_else(
    world: World, forbid_reading: Callable[[], list[str]]
) -> None:
    step_sync = StepSync(world, lag=1)
    steps: list[dict[str, Any]] = [
        {
            "epoch": epoch,
            "batch": batch,
            "loss": torch.tensor(loss),
            "gradient_norm": torch.tensor(norm),
            "loss_scale": None,
        }
        for epoch, batch, loss, norm in STEPS
    ]
    reads = forbid_reading()
    assert list(step_sync.submit(**steps[0])) == []
    assert reads == []
    for count, step in enumerate(steps[1:], start=1):
        (event,) = step_sync.submit(**step)
        assert event == expected_end(STEPS[count - 1])
        assert reads == ["tolist"] * count, "one vector a step"


class Poisoned(Tensor):
    """Cannot be read yet: its step is still being computed."""

    def tolist(self) -> list[Any]:
        raise AssertionError("the host would wait here")


def test_what_is_under_way_is_not_touched_before_its_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    step_sync = StepSync(world, lag=1)
    with monkeypatch.context() as patch:
        patch.setattr(
            "runtime.distributed.step_sync._start_copy", lambda vector, free: vector.as_subclass(Poisoned).tolist
        )
        assert submit(step_sync, *STEPS[0]) == []
    with pytest.raises(AssertionError, match="would wait"):
        submit(step_sync, *STEPS[1])


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "fault"),
    [
        (0.5, 2.0, None, False),
        (0.5, 0.0, None, False),
        (1e30, 1e30, None, False),
        (math.nan, 2.0, None, True),
        (math.inf, 2.0, None, True),
        (-math.inf, 2.0, None, True),
        (0.5, math.inf, None, True),
        (0.5, math.nan, None, True),
        # A scaler skips such a step and halves itself.
        (0.5, math.inf, 65536.0, False),
        (0.5, math.nan, 65536.0, False),
        (0.5, 2.0, MIN_LOSS_SCALE, False),
        (0.5, 2.0, MIN_LOSS_SCALE / 2, True),
        (0.5, 2.0, 0.0, True),
        (0.5, 2.0, math.nan, True),
        (math.nan, 2.0, 65536.0, True),
        (math.inf, 2.0, 65536.0, True),
    ],
)
def test_faults(loss: float, norm: float, scale: float | None, fault: bool, world: World) -> None:
    event = hear(world, loss, norm, scale)
    assert event.fault is fault
    values = (event.loss, event.gradient_norm, event.loss_scale)
    assert values == pytest.approx((loss, norm, 1.0 if scale is None else scale), nan_ok=True)


def test_wishes_are_asked_at_every_beat(world: World) -> None:
    asked = iter([StepRequest(), StepRequest(save=True), StepRequest(15), StepRequest(2, True)])
    step_sync = StepSync(world, lambda: next(asked), lag=0)
    heard = [event for step in STEPS for event in submit(step_sync, *step)]
    assert [(event.signal, event.save) for event in heard] == [(0, False), (0, True), (15, False), (2, True)]
    assert not any(event.fault for event in heard), "a wish is no fault"


def test_all_ranks_hear_the_same_wishes_and_faults_and_their_own_loss(run_ranks: Callable[..., list[str]]) -> None:
    """Rank 1 gets the signal and goes wrong, rank 0 wants to save."""
    code = """
        import json, math, torch
        from runtime.distributed.step_sync import StepRequest, StepSync
        ask = StepRequest
        mine = [(ask(), ask(15)), (ask(save=True), ask()), (ask(2, True), ask(15))]
        step_sync = StepSync(world, lambda: mine.pop(0)[world.rank], lag=1)
        losses = [(0.5, 0.25), (0.5, 0.25), (0.5, math.nan)]
        events = []
        for batch, loss in enumerate(losses):
            events += step_sync.submit(
                epoch=1,
                batch=batch,
                loss=torch.tensor(loss[world.rank]),
                gradient_norm=torch.tensor(2.0),
                loss_scale=None,
            )
        events += step_sync.drain()
        print(json.dumps([[e.batch, e.signal, e.save, e.fault, e.loss] for e in events]))
    """
    heard = [json.loads(out) for out in run_ranks(code)]
    agreed = [[0, 15, False, False], [1, 0, True, False], [2, 15, True, True]]
    assert [[event[:4] for event in of_rank] for of_rank in heard] == [agreed, agreed]
    losses = [[event[4] for event in of_rank] for of_rank in heard]
    assert losses == [[0.5] * 3, pytest.approx([0.25, 0.25, math.nan], nan_ok=True)]


def test_a_vector_that_a_step_changes_later_was_copied(world: World) -> None:
    """A scaler updates its scale in place, a loss may be added up in place."""
    step_sync = StepSync(world, lag=1)
    loss, norm, scale = torch.tensor(0.5), torch.tensor(2.0), torch.tensor(1024.0)
    assert list(step_sync.submit(epoch=1, batch=0, loss=loss, gradient_norm=norm, loss_scale=scale)) == []
    for tensor in (loss, norm, scale):
        tensor.fill_(7.0)
    assert list(step_sync.drain()) == [StepEnd(epoch=1, batch=0, loss=0.5, gradient_norm=2.0, loss_scale=1024.0)]
