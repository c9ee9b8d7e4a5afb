"""When a run stops and which weights it keeps; every rank decides from the same values."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from common.errors import DIVERGED_EXIT
from runtime.callbacks.base import Callback
from runtime.distributed.world import World
from runtime.logging.events import EvaluationStopped, Event, StepEnd
from runtime.scores import keep_if_best, stop_for_score
from runtime.train_state import Stop, TrainState
from runtime.training import TrainLoop, finish_step
from tests.runtime.conftest import make_loop

MakeState = Callable[..., TrainState]

CPU = torch.device("cpu")


def scored(mean_dice: float, epoch: int = 4) -> EvaluationStopped:
    return EvaluationStopped(epoch=epoch, mean_dice=mean_dice, dice=[mean_dice, mean_dice], loss=0.5, seconds=1.0)


def step_end(loss: float = 0.5, norm: float = 1.0, scale: float = 1.0, **agreed: Any) -> StepEnd:
    return StepEnd(epoch=4, batch=7, loss=loss, gradient_norm=norm, loss_scale=scale, **agreed)


@dataclass(frozen=True)
class Gathering(World):
    """A world whose `gather` knows the losses of all ranks."""

    losses: list[float] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        own_loss, own_text = value
        assert own_loss is self.losses[self.rank] or own_loss == self.losses[self.rank]
        texts = [
            own_text.replace(f"rank {self.rank}: loss {own_loss:g}", f"rank {rank}: loss {loss:g}")
            for rank, loss in enumerate(self.losses)
        ]
        return list(zip(self.losses, texts, strict=True))


class Described:
    """A loader that only describes its samples."""

    def describe(self, epoch: int, batch: int) -> list[str]:
        return [f"case_{epoch:05d} at ({batch}, 0, 0)", "case_00099 at (1, 2, 3)"]


class Checkpoints:
    def __init__(self) -> None:
        self.saved = 0

    def save(self, state: TrainState) -> None:
        self.saved += 1


def loop_of(losses: list[float] | None = None, rank: int = 0, **parts: Any) -> TrainLoop:
    losses = losses or [0.5]
    world = Gathering(rank, len(losses), CPU, losses=losses)
    defaults = {"world": world, "checkpoints": Checkpoints(), "first_rule_evaluation": 4}
    return make_loop(Described(), **(defaults | parts))  # type: ignore[arg-type]


# Scores


@pytest.mark.parametrize("mean_dice", [0.908, 0.95, 1.0])
def test_target_reached_at_or_above_the_threshold(mean_dice: float) -> None:
    stop = stop_for_score(scored(mean_dice), loop_of(), best_before=-1.0)
    assert stop is not None
    assert (stop.status, stop.exit_status) == ("success", 0)
    assert "0.908" in stop.reason


def test_target_not_reached_below_it() -> None:
    assert stop_for_score(scored(0.9079999), loop_of(), best_before=-1.0) is None


def test_a_threshold_of_zero_is_reached_by_a_score_of_zero() -> None:
    stop = stop_for_score(scored(0.0), loop_of(quality_threshold=0.0), best_before=-1.0)
    assert stop is not None
    assert stop.status == "success"


@pytest.mark.parametrize("mean_dice", [0.0, 9e-7, math.nan, -1.0])
def test_diverged_scores(mean_dice: float) -> None:
    stop = stop_for_score(scored(mean_dice), loop_of(), best_before=-1.0)
    assert stop == Stop("aborted", f"diverged: mean Dice {mean_dice}", DIVERGED_EXIT)


@pytest.mark.parametrize(
    ("dice", "epoch", "best", "ends"),
    [(0.0, 3, -1.0, False), (0.0, 3, 0.0, False), (0.0, 3, 0.2, True), (0.0, 4, -1.0, True), (math.nan, 3, -1.0, True)],
)
def test_before_mlperfs_first_evaluation_a_score_of_zero_is_allowed(
    dice: float, epoch: int, best: float, ends: bool
) -> None:
    assert (stop_for_score(scored(dice, epoch), loop_of(), best_before=best) is not None) is ends


@pytest.mark.parametrize("mean_dice", [1e-6, 0.3])
def test_small_scores_have_not_diverged(mean_dice: float) -> None:
    assert stop_for_score(scored(mean_dice), loop_of(), best_before=-1.0) is None


# Steps

NUMBERS = "diverged: epoch 4, batch 7: gradient norm 1, loss scale 1, "
ON = "on case_00004 at (7, 0, 0); case_00099 at (1, 2, 3)"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_ranks_whose_loss_is_not_finite_are_named_with_their_samples(rank: int, make_state: MakeState) -> None:
    """Every rank reports the same reason, including those with a finite loss."""
    losses = [0.5, math.nan, math.inf]
    stop = finish_step(make_state(), loop_of(losses, rank), step_end(losses[rank], fault=True))
    assert stop == Stop("aborted", f"{NUMBERS}rank 1: loss nan {ON} | rank 2: loss inf {ON}", DIVERGED_EXIT)


@pytest.mark.parametrize(("norm", "scale"), [(math.inf, 1.0), (math.nan, 1.0), (2.0, 2.0**-15)])
def test_if_only_the_gradients_are_at_fault_every_rank_is_named(
    norm: float, scale: float, make_state: MakeState
) -> None:
    stop = finish_step(make_state(), loop_of([0.5, 0.25]), step_end(0.5, norm, scale, fault=True))
    assert stop is not None
    assert stop.reason == (
        f"diverged: epoch 4, batch 7: gradient norm {norm:g}, loss scale {scale:g}, "
        f"rank 0: loss 0.5 {ON} | rank 1: loss 0.25 {ON}"
    )


@pytest.mark.parametrize(("ranks", "more"), [(4, ""), (5, " | and 1 more ranks"), (64, " | and 60 more ranks")])
def test_a_report_is_one_line_for_any_number_of_ranks(ranks: int, more: str, make_state: MakeState) -> None:
    stop = finish_step(make_state(), loop_of([math.nan] * ranks), step_end(math.nan, fault=True))
    assert stop is not None
    assert [f"rank {rank}:" in stop.reason for rank in range(6)] == [True] * 4 + [False] * 2
    assert stop.reason.endswith(f"rank 3: loss nan {ON}{more}")
    assert "\n" not in stop.reason


@pytest.mark.parametrize(
    "step",
    [
        step_end(1e30),
        step_end(0.0),
        # StepSync decides for all ranks whether non-finite values are a fault.
        step_end(math.nan, math.inf),
        step_end(save=True),
    ],
)
def test_a_step_without_a_fault_stops_nothing(step: StepEnd, make_state: MakeState) -> None:
    assert finish_step(make_state(), loop_of(), step) is None


def test_a_checkpoint_is_saved_when_asked_for_and_never_of_damaged_weights(make_state: MakeState) -> None:
    loop = loop_of()
    for step, saved in ((step_end(), 0), (step_end(save=True), 1), (step_end(save=True, fault=True), 1)):
        finish_step(make_state(), loop, step)
        assert loop.checkpoints.saved == saved  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("number", "name", "status"), [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "SIGINT", 130)]
)
def test_stops_at_the_step_at_which_the_ranks_receive_a_signal(
    number: int, name: str, status: int, make_state: MakeState
) -> None:
    stop = finish_step(make_state(), loop_of(), step_end(signal=number, save=True))
    assert stop == Stop("aborted", f"interrupted by {name}", status)


class Stopping(Callback):
    def __init__(self, reason: str, log: list[str]) -> None:
        self.reason, self.log = reason, log

    def on_step_end(self, step: StepEnd, state: TrainState) -> Stop | None:
        self.log.append(self.reason)
        return Stop("aborted", self.reason)


def test_a_fault_precedes_a_callback_and_a_callback_a_signal(make_state: MakeState) -> None:
    """A restart after a divergence would diverge again, so the exit status must be that of divergence."""
    log: list[str] = []
    loop = loop_of(callbacks=[Stopping("first", log), Stopping("second", log)])
    stop = finish_step(make_state(), loop, step_end(signal=signal.SIGTERM))
    assert (stop, log) == (Stop("aborted", "first"), ["first", "second"]), "every callback is called"
    stop = finish_step(make_state(), loop, step_end(signal=signal.SIGTERM, fault=True))
    assert stop is not None
    assert stop.exit_status == DIVERGED_EXIT


def test_the_trackers_receive_a_step_before_it_stops_the_run(make_state: MakeState) -> None:
    events: list[Event] = []
    step = step_end(signal=signal.SIGINT)
    finish_step(make_state(), loop_of(emit=events.append), step)
    assert events == [step]


# The best weights


def test_the_best_is_kept_as_a_copy_on_the_host(make_state: MakeState) -> None:
    state = make_state()
    bias = state.network.output.conv.bias
    for epoch, (value, dice) in enumerate([(1.0, 0.4), (2.0, 0.6), (3.0, 0.5), (4.0, 0.6), (5.0, math.nan)], start=1):
        with torch.no_grad():
            bias.fill_(value)
        keep_if_best(state, scored(dice, epoch))
    assert (state.best_epoch, state.best_dice) == (2, 0.6)
    assert state.best_network is not None
    assert state.best_network["output.conv.bias"].tolist() == [2.0] * 3
    assert state.best_network.keys() == state.network.state_dict().keys()
    assert {tensor.device.type for tensor in state.best_network.values()} == {"cpu"}


def test_the_first_score_is_the_best_even_if_zero(make_state: MakeState) -> None:
    state = make_state()
    keep_if_best(state, scored(0.0, 2))
    assert (state.best_epoch, state.best_dice) == (2, 0.0)


def test_a_channels_last_network_is_kept_in_plain_memory_order(make_state: MakeState) -> None:
    state = make_state()
    state.network.to(memory_format=torch.channels_last_3d)
    keep_if_best(state, scored(0.5))
    assert state.best_network is not None
    assert all(tensor.is_contiguous() for tensor in state.best_network.values())
