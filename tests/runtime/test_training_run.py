"""A run: order of events, results, learning rates, checkpoints, and golden losses."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from common.errors import DIVERGED_EXIT
from runtime.callbacks.base import Callback
from runtime.eval_schedule import EvalSchedule
from runtime.logging.events import (
    BlockStarted,
    BlockStopped,
    EpochStarted,
    EpochStopped,
    MicroBatchEnd,
)
from runtime.lr_schedule import learning_rate
from runtime.train_state import Stop, TrainState
from tests.runtime.conftest import StopAt
from tests.runtime.loop import (
    MakeBatches,
    MakeState,
    Run,
)


def test_events_come_in_the_documented_order(make_state: MakeState, make_batches: MakeBatches) -> None:
    run = Run({})
    run.start(make_state(), make_batches(2, 1), EvalSchedule(5, 2, 2))
    assert run.names() == [
        "BlockStarted 1",
        "EpochStarted 1",
        "EpochStopped 1",
        "EpochStarted 2",
        "EpochStopped 2",
        "EvaluationStarted 2",
        "EvaluationStopped 2",
        "BlockStopped 1",
        "BlockStarted 3",
        "EpochStarted 3",
        "EpochStopped 3",
        "EpochStarted 4",
        "EpochStopped 4",
        "EvaluationStarted 4",
        "EvaluationStopped 4",
        "BlockStopped 3",
        "BlockStarted 5",
        "EpochStarted 5",
        "EpochStopped 5",
        "BlockStopped 5",
        "RunStopped 5",
    ]
    blocks = [event for event in run.events if isinstance(event, BlockStarted | BlockStopped)]
    assert [block.epochs for block in blocks] == [2, 2, 2, 2, 1, 1]


def test_a_run_that_reaches_its_target_stops_at_once_with_success(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
    run = Run({2: 0.9079, 4: 0.908})
    stopped = run.start(make_state(), make_batches(1, 1), EvalSchedule(50, 2, 2))
    assert (stopped.status, stopped.epoch) == ("success", 4)
    assert "0.9080 reached 0.908" in stopped.reason
    assert run.stop.exit_status == 0
    assert run.names()[-3:] == ["EvaluationStopped 4", "BlockStopped 3", "RunStopped 4"]


def test_a_run_without_its_target_is_aborted_at_its_last_epoch(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
    run = Run({})
    stopped = run.start(make_state(), make_batches(1, 1), EvalSchedule(3, 1, 1))
    assert (stopped.status, stopped.epoch) == ("aborted", 3)
    assert "not reached in 3 epochs" in stopped.reason
    assert run.stop.exit_status == stopped.exit_status == 0, (
        "the run is complete: a restart would not train any further"
    )


def test_a_score_of_zero_is_aborted(make_state: MakeState, make_batches: MakeBatches) -> None:
    run = Run({2: 1e-7})
    stopped = run.start(make_state(), make_batches(1, 1), EvalSchedule(9, 1, 1))
    assert (stopped.status, stopped.epoch) == ("aborted", 2)
    assert "diverged" in stopped.reason
    assert run.stop.exit_status == stopped.exit_status == DIVERGED_EXIT


def test_a_loss_of_nan_ends_the_run_at_its_step(make_state: MakeState, make_batches: MakeBatches) -> None:
    state = make_state()
    with torch.no_grad():
        state.network.output.conv.bias.fill_(float("nan"))
    run = Run({})
    stopped = run.start(state, make_batches(3, 1), EvalSchedule(9, 1, 1))
    assert (stopped.status, stopped.epoch) == ("aborted", 0)
    assert stopped.reason.startswith("diverged: epoch 1, batch 0: ")
    assert stopped.reason.endswith("rank 0: loss nan on sample 0 of batch 0")
    assert run.stop.exit_status == DIVERGED_EXIT
    assert run.names() == ["BlockStarted 1", "EpochStarted 1", "BlockStopped 1", "RunStopped 0"]
    assert [event.batch for event in run.events if isinstance(event, MicroBatchEnd)] == [0]
    assert [event.epochs for event in run.events if isinstance(event, BlockStopped)] == [1]


def test_an_infinite_gradient_ends_the_run_although_the_loss_is_finite(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
    state = make_state()
    state.network.output.conv.bias.register_hook(lambda gradient: gradient * math.inf)
    stopped = Run({}).start(state, make_batches(3, 1), EvalSchedule(9, 1, 1))
    assert stopped.reason.startswith("diverged: epoch 1, batch 0: gradient norm inf, loss scale 1, rank 0: loss 0.9")


def test_a_run_continues_from_the_states_epoch(make_state: MakeState, make_batches: MakeBatches) -> None:
    state, loader = make_state(), make_batches(1, 1)
    state.epoch = 3
    run = Run({})
    run.start(state, loader, EvalSchedule(6, 2, 2))
    assert loader.epochs == [4, 5, 6]
    blocks = [(event.first_epoch, event.epochs) for event in run.events if isinstance(event, BlockStarted)]
    assert blocks == [(4, 1), (5, 2)]


def test_every_epoch_has_its_learning_rate(make_state: MakeState, make_batches: MakeBatches) -> None:
    run = Run({})
    run.start(make_state(), make_batches(1, 1), EvalSchedule(4, None, 1), rate=lambda epoch: 0.1 / epoch)
    rates = [event.learning_rate for event in run.events if isinstance(event, EpochStarted | EpochStopped)]
    assert rates == pytest.approx([0.1 / epoch for epoch in (1, 1, 2, 2, 3, 3, 4, 4)])


def test_a_run_stopped_at_the_end_of_an_epoch_is_not_evaluated(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
    state = make_state()

    class StopAtEpoch(Callback):
        def on_epoch_end(self, result: EpochStopped, state: TrainState) -> Stop | None:
            return Stop("aborted", "enough")

    run = Run({})
    stopped = run.start(state, make_batches(1, 1), EvalSchedule(3, 1, 1), callbacks=[StopAtEpoch()])
    assert stopped.reason == "enough"
    assert run.names() == ["BlockStarted 1", "EpochStarted 1", "EpochStopped 1", "BlockStopped 1", "RunStopped 1"]


@pytest.mark.parametrize(("epoch", "batch", "ran"), [(4, 0, 1), (5, 1, 1), (6, 0, 2)])
def test_a_block_cut_short_counts_the_epochs_that_ran(
    epoch: int, batch: int, ran: int, make_state: MakeState, make_batches: MakeBatches
) -> None:
    """Those that were completed, and one at least; the blocks here are of three."""
    run = Run({})
    run.start(make_state(), make_batches(2, 1), EvalSchedule(9, 3, 3), callbacks=[StopAt(batch, epoch)])
    blocks = [(event.first_epoch, event.epochs) for event in run.events if isinstance(event, BlockStopped)]
    assert blocks == [(1, 3), (4, ran)]


class RecordedCheckpoints:
    """A checkpoint writer that only records the epochs of its checkpoints."""

    def __init__(self, every: int = 0) -> None:
        self.every = every
        self.epochs: list[int] = []

    def is_due_after_epoch(self, epoch: int) -> bool:
        return self.every > 0 and epoch % self.every == 0

    def save(self, state: TrainState) -> None:
        self.epochs.append(state.epoch)


@pytest.mark.parametrize(
    ("scores", "every", "saved"),
    [
        ({1: 0.5, 2: 0.4, 3: 0.6, 4: 0.6}, 0, [1, 3]),  # each new best
        ({1: 0.5, 2: math.nan}, 0, [1]),
        ({1: 0.0}, 0, []),  # diverged at the first score: no best state to save
        ({1: 0.5, 2: 0.4, 3: 0.3, 4: 0.2}, 2, [1, 2, 4]),
    ],
)
def test_a_checkpoint_is_saved_for_each_new_best_and_when_an_epoch_is_due(
    scores: dict[int, float], every: int, saved: list[int], make_state: MakeState, make_batches: MakeBatches
) -> None:
    run, saves = Run(scores), RecordedCheckpoints(every)
    run.start(make_state(), make_batches(1, 1), EvalSchedule(4, 1, 1), checkpoints=saves)
    assert saves.epochs == saved


# Mean loss of each epoch, measured once (torch 2.13; equal to 1e-6 with one and two threads, with and without oneDNN).
# Detects changes of the arithmetic, the initial weights, the order of the steps and the learning rates.
WARM_UP = partial(learning_rate, base=0.3, initial=0.01, warmup_epochs=3, decay_epochs=(5,), decay_factor=0.5)
GOLDEN = {
    "plain": (
        {"momentum": 0.0},
        partial(learning_rate, base=0.3),
        [0.936771, 0.856095, 0.803759, 0.766197, 0.737306, 0.708687],
    ),
    "momentum and warm-up": (
        {"momentum": 0.9},
        WARM_UP,
        [0.940433, 0.828764, 0.764783, 0.704106, 0.620148, 0.535080],
    ),
    "adam": (
        {"optimizer": "adam"},
        partial(learning_rate, base=0.01),
        [0.948395, 0.872168, 0.822858, 0.780800, 0.739085, 0.700232],
    ),
    "lamb": (
        {"optimizer": "lamb", "weight_decay": 0.01},
        partial(learning_rate, base=0.03),
        [0.949523, 0.881193, 0.826867, 0.775563, 0.725836, 0.684312],
    ),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_losses(kind: str, make_state: MakeState, make_batches: MakeBatches) -> None:
    optimizer, rate, losses = GOLDEN[kind]
    run = Run({})
    run.start(make_state(**optimizer), make_batches(4, 2), EvalSchedule(6, 3, 3), rate)
    assert run.losses() == pytest.approx(losses, rel=1e-3)
