"""A restored run continues exactly as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.errors import UserError
from runtime.checkpoint.format import load
from runtime.checkpoint.resume import restore
from runtime.memory_format import to_device
from runtime.train_state import TrainState
from tests.runtime.checkpoint.conftest import (
    CPU,
    MakeBatches,
    MakeState,
    SameWeights,
    keep_best,
    keep_state,
    same,
    train_epochs,
)

OPTIMIZERS: dict[str, dict[str, float]] = {"sgd": {"momentum": 0.9}, "adam": {}, "lamb": {"weight_decay": 0.01}}


@pytest.mark.parametrize("layout", ["NCDHW", "NDHWC"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resuming_equals_never_stopping_bit_for_bit(
    optimizer: str,
    layout: str,
    path: Path,
    make_state: MakeState,
    make_batches: MakeBatches,
    same_weights: SameWeights,
) -> None:
    def start() -> TrainState:
        state = make_state(optimizer, **OPTIMIZERS[optimizer])
        to_device(state.network, CPU, layout)
        return state

    straight, loader = start(), make_batches(3, 1)
    train_epochs(straight, loader, 1, 4, layout)
    first = start()
    train_epochs(first, loader, 1, 1, layout)
    keep_best(first, 1, 0.5)
    train_epochs(first, loader, 2, 2, layout)
    keep_state(path, first)
    second = start()
    restore(second, load(path))
    assert (second.epoch, second.best_epoch, second.best_dice) == (2, 1, 0.5)
    assert second.best_network is not None
    assert first.best_network is not None
    assert same(second.best_network, first.best_network)
    train_epochs(second, loader, 3, 4, layout)
    assert second.step == straight.step == 12
    assert same_weights(second.network, straight.network)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_resuming_in_the_middle_of_an_epoch_too(
    batch: int, optimizer: str, path: Path, make_state: MakeState, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    """Weights and mean loss; 3 is the epoch's last batch."""
    straight, first, second = (make_state(optimizer, **OPTIMIZERS[optimizer]) for _ in range(3))
    losses = train_epochs(straight, make_batches(4, 1), 1, 3)
    begun = train_epochs(first, make_batches(4, 1), 1, 2, leave_after=batch)
    assert first.loss_sum is not None
    first.evaluated = 1
    keep_state(path, first, loss_sums=[first.loss_sum.item()])
    restore(second, load(path))
    assert (second.epoch, second.batch, second.evaluated) == (1, batch + 1, 1)
    assert begun + train_epochs(second, make_batches(4, 1), 2, 3) == losses
    assert same_weights(second.network, straight.network)


def test_every_rank_takes_its_own_sum_of_losses(path: Path, make_state: MakeState) -> None:
    state = make_state()
    state.batch = 2
    keep_state(path, state, loss_sums=[0.5, 0.1])
    found = []
    for rank in range(3):
        fresh = make_state()
        restore(fresh, load(path), rank)
        found.append(None if fresh.loss_sum is None else fresh.loss_sum.item())
    assert found == [0.5, torch.tensor(0.1).item(), None], "a rank more than there were has none"
    state.batch = 0
    keep_state(path, state, loss_sums=[0.5, 0.1])
    restore(fresh, load(path))
    assert fresh.loss_sum is None, "between epochs there is nothing to add to"


def test_a_loss_scale_comes_back(path: Path, make_state: MakeState) -> None:
    state, fresh = make_state(), make_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, enabled=True)
    state.scaler.scale(torch.ones(1))  # the scale becomes a tensor with its first use
    keep_state(path, state)
    fresh.scaler = torch.amp.GradScaler("cpu", enabled=True)
    restore(fresh, load(path))
    assert fresh.scaler.get_scale() == 512.0
    assert fresh.scaler.state_dict() == state.scaler.state_dict()
    restore(make_state(), load(path))  # without a scaler: fp32 continues from fp16


def test_momentum_and_decay_are_this_runs_own(path: Path, make_state: MakeState, make_batches: MakeBatches) -> None:
    """The log states the flags: a checkpoint's settings must not silently replace them."""
    state = make_state("sgd", momentum=0.9, weight_decay=0.0)
    train_epochs(state, make_batches(1, 1), 1, 1)
    keep_state(path, state)
    fresh = make_state("sgd", momentum=0.95, weight_decay=0.1)
    restore(fresh, load(path))
    (group,) = fresh.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.95, 0.1)
    bias = fresh.network.output.conv.bias
    buffer = state.optimizer.state[state.network.output.conv.bias]["momentum_buffer"]
    assert torch.equal(fresh.optimizer.state[bias]["momentum_buffer"], buffer)


@pytest.mark.parametrize("trained", ["sgd", "adam", "lamb"])
@pytest.mark.parametrize("asked", ["sgd", "adam", "lamb"])
def test_another_optimizer_is_refused(
    trained: str, asked: str, path: Path, make_state: MakeState, make_batches: MakeBatches
) -> None:
    state, fresh, loader = make_state(trained), make_state(asked), make_batches(1, 1)
    train_epochs(state, loader, 1, 1)
    keep_state(path, state)
    if trained == asked:
        restore(fresh, load(path))
        train_epochs(fresh, loader, 2, 2)
        assert fresh.epoch == 2
    else:
        with pytest.raises(UserError, match="saved with another --optimizer"):
            restore(fresh, load(path))
