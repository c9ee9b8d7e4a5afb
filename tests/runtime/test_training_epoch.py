"""One epoch: its events, losses, learning rate and batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.losses import DiceCELoss
from runtime.logging.events import (
    EpochStarted,
    EpochStopped,
    Event,
    MicroBatchEnd,
    PhaseEnd,
    StepEnd,
)
from tests.runtime.loop import (
    CPU,
    MakeBatches,
    MakeState,
    SameWeights,
    TwoRanks,
    run_epoch,
    steps_of,
)


def test_an_epoch_reports_its_mean_loss_and_samples(make_state: MakeState, make_batches: MakeBatches) -> None:
    loader, state = make_batches(3, 2), make_state(rate=0.0)
    network = make_state().network
    expected = [DiceCELoss()(network(batch["image"]), batch["label"]).item() for batch in loader.epoch(0)]
    events = run_epoch(state, loader, rate=0.0, epoch=5)
    stopped = events[-1]
    assert isinstance(stopped, EpochStopped)
    assert stopped.loss == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert max(expected) - min(expected) > 1e-4, "otherwise a first or last loss would pass as the mean"
    assert (stopped.epoch, stopped.samples, stopped.learning_rate) == (5, 6, 0.0)
    assert state.epoch == 5


def test_events_of_an_epoch(make_state: MakeState, make_batches: MakeBatches) -> None:
    events = run_epoch(make_state(), make_batches(3, 2), rate=0.25, epoch=4)
    expected: list[Event] = [EpochStarted(4, 0.25, 3)]
    for index in range(3):
        expected += [PhaseEnd("data"), PhaseEnd("forward and backward"), MicroBatchEnd(4, index, 2)]
        expected += [StepEnd(epoch=4, batch=index, loss=0.0, gradient_norm=0.0, loss_scale=1.0)]
    # The values have their own test.
    without = [replace(e, loss=0.0, gradient_norm=0.0) if isinstance(e, StepEnd) else e for e in events]
    assert without[:-1] == expected


@pytest.mark.parametrize("lag", [0, 1])
def test_every_step_is_reported_within_its_epoch(lag: int, make_state: MakeState, make_batches: MakeBatches) -> None:
    events = run_epoch(make_state(), make_batches(5, 1), epoch=4, ga_steps=2, lag=lag)
    assert [(event.epoch, event.batch) for event in steps_of(events)] == [(4, 1), (4, 3)]
    assert isinstance(events[-1], EpochStopped)


def test_the_loader_receives_the_epoch(make_state: MakeState, make_batches: MakeBatches) -> None:
    loader = make_batches(1, 1)
    run_epoch(make_state(), loader, epoch=3)
    assert loader.epochs == [3]


def test_an_incomplete_step_is_left_out(
    make_state: MakeState, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    five, four = make_state(momentum=0.9), make_state(momentum=0.9)
    events = run_epoch(five, make_batches(5, 1), ga_steps=2)
    run_epoch(four, make_batches(4, 1), ga_steps=2)
    assert same_weights(five.network, four.network)
    assert [event.batches for event in events if isinstance(event, EpochStarted)] == [4]
    assert sum(isinstance(event, MicroBatchEnd) for event in events) == 4
    assert [event.samples for event in events if isinstance(event, EpochStopped)] == [4]
    assert all(p.grad is None for p in five.network.parameters())


def test_earlier_gradients_do_not_affect_an_epoch(
    make_state: MakeState, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    clean, dirty = make_state(), make_state()
    for p in dirty.network.parameters():
        p.grad = torch.ones_like(p)
    for state in (clean, dirty):
        run_epoch(state, make_batches(1, 1))
    assert same_weights(clean.network, dirty.network)


def test_an_epoch_sets_its_rate_and_train_mode(make_state: MakeState, make_batches: MakeBatches) -> None:
    state = make_state(rate=0.1)
    state.network.eval()
    modes: list[bool] = []
    state.network.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    run_epoch(state, make_batches(2, 1), rate=0.02)
    assert [group["lr"] for group in state.optimizer.param_groups] == [0.02]
    assert modes == [True, True]


def test_the_mean_loss_is_over_all_ranks(make_state: MakeState, make_batches: MakeBatches) -> None:
    alone = run_epoch(make_state(), make_batches(3, 2))[-1]
    both = run_epoch(make_state(), make_batches(3, 2), world=TwoRanks(0, 2, CPU))[-1]
    assert isinstance(alone, EpochStopped)
    assert isinstance(both, EpochStopped)
    assert both.loss == pytest.approx(alone.loss + 3 / 6, rel=1e-6)
    assert both.samples == 2 * alone.samples
