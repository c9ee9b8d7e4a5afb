"""Epochs that are stopped and continued at any step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from runtime.logging.events import (
    EpochStarted,
    EpochStopped,
    Event,
    MicroBatchEnd,
    StepEnd,
)
from runtime.optimizer import make_optimizer
from runtime.train_state import TrainState
from tests.runtime.conftest import StopAt
from tests.runtime.loop import (
    MakeBatches,
    MakeState,
    SameWeights,
    run_epoch,
    step_config,
    steps_of,
)


class WithDropout(nn.Module):
    """A network with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.second = nn.Conv3d(4, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.second(nn.functional.dropout(self.first(image).relu(), 0.4, self.training))


def dropout_state() -> TrainState:
    torch.manual_seed(5)
    network = WithDropout()
    optimizer = make_optimizer("sgd", network.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(network=network, model=network, optimizer=optimizer, scaler=scaler)


@pytest.mark.parametrize("ga_steps", [1, 2])
def test_the_state_has_the_position_at_the_end_of_a_step(
    ga_steps: int, make_state: MakeState, make_batches: MakeBatches
) -> None:
    state, found = make_state(), []

    def emit(event: Event) -> None:
        position = state.epoch, state.batch, None if state.loss_sum is None else state.loss_sum.item()
        if isinstance(event, StepEnd):
            found.append(position)
        elif isinstance(event, MicroBatchEnd) and found:
            assert position == found[-1], "an unfinished step must not count"

    state.epoch = 6
    steps = steps_of(run_epoch(state, make_batches(5, 1), epoch=7, ga_steps=ga_steps, emit=emit))
    assert [position[:2] for position in found] == [(6, step.batch + 1) for step in steps]
    sums = [ga_steps * sum(step.loss for step in steps[: count + 1]) for count in range(len(steps))]
    assert [position[2] for position in found] == pytest.approx(sums, rel=1e-6)
    assert (state.epoch, state.batch, state.loss_sum) == (7, 0, None)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("ga_steps", [1, 2])
def test_the_rest_of_an_epoch_is_bit_for_bit_the_same(
    ga_steps: int, lag: int, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    """After any step and for a network with dropout, even if other random numbers were drawn in between."""
    whole, states = dropout_state(), []

    def emit(event: Event) -> None:
        if isinstance(event, StepEnd):
            states.append(copy.deepcopy(whole))

    stopped = run_epoch(whole, make_batches(5, 2), epoch=3, ga_steps=ga_steps, emit=emit)[-1]
    assert isinstance(stopped, EpochStopped)
    positions = [state.batch for state in states]
    assert positions == list(range(ga_steps, 6, ga_steps))
    for count, (state, done) in enumerate(zip(states, positions, strict=True), start=1):
        torch.manual_seed(1000 + done)
        rest = run_epoch(state, make_batches(5, 2), epoch=3, ga_steps=ga_steps, lag=lag)
        assert [event.batch for event in rest if isinstance(event, MicroBatchEnd)] == list(range(done, positions[-1]))
        assert [event.batch + 1 for event in steps_of(rest)] == positions[count:]
        assert same_weights(state.network, whole.network)
        assert (rest[-1].loss, state.epoch, state.batch) == (stopped.loss, 3, 0)


def test_a_loader_starts_at_the_position(make_state: MakeState, make_batches: MakeBatches) -> None:
    """Earlier batches are not read again, so that a late step of a long epoch begins at once."""
    state, loader = make_state(), make_batches(5, 1)
    state.batch, state.loss_sum = 2, torch.tensor(1.0)
    run_epoch(state, loader, epoch=3)
    assert (loader.epochs, loader.starts) == ([3], [2])


def test_dropout_follows_from_seed_epoch_and_batch(make_batches: MakeBatches) -> None:
    def loss(seed: int = 1, epoch: int = 1, before: int = 0) -> float:
        state = dropout_state()
        torch.manual_seed(before)
        events = run_epoch(state, make_batches(2, 1), rate=0.0, epoch=epoch, step=step_config(seed=seed))
        return steps_of(events)[0].loss

    assert loss(before=9) == loss()
    assert loss(seed=2) != loss()
    assert loss(epoch=2) != loss()
    same = make_batches(3, 1)
    same._batches[1:] = [same._batches[0]] * 2
    assert len({step.loss for step in steps_of(run_epoch(dropout_state(), same, rate=0.0))}) == 3


def test_a_stop_at_a_step_leaves_the_rest_of_the_epoch(make_state: MakeState, make_batches: MakeBatches) -> None:
    state = make_state()
    events = run_epoch(state, make_batches(4, 1), callbacks=[StopAt(batch=1)])
    assert sum(isinstance(event, MicroBatchEnd) for event in events) == 2
    assert isinstance(events[-1], StepEnd), "an epoch that was not completed has no mean loss"
    assert (state.epoch, state.batch) == (0, 2)


def test_a_stop_at_the_last_step_does_not_complete_the_epoch(make_state: MakeState, make_batches: MakeBatches) -> None:
    """With a lag, the last step is reported after the loop over the batches."""
    state = make_state()
    events = run_epoch(state, make_batches(4, 1), lag=1, callbacks=[StopAt(batch=3)])
    assert isinstance(events[-1], StepEnd)
    assert (state.epoch, state.batch) == (0, 4)
    (started, stopped) = run_epoch(state, make_batches(4, 1))
    assert (type(started), type(stopped)) == (EpochStarted, EpochStopped), "only the end of the epoch is left"
    assert (state.epoch, state.batch) == (1, 0)
