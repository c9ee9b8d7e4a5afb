"""Callbacks decide the same on every rank; the announcer hands every event to callbacks first, then to trackers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from runtime import callbacks
from runtime.callbacks import Announcer, Diverged, KeepBest, SaveCheckpoint, TargetReached
from runtime.events import (
    BatchDone,
    BlockStarted,
    BlockStopped,
    EpochStarted,
    EpochStopped,
    EvaluationStarted,
    EvaluationStopped,
    Event,
    RunStarted,
    RunStopped,
)
from runtime.training import TrainState

MakeState = Callable[..., TrainState]


def scored(mean_dice: float, epoch: int = 4) -> EvaluationStopped:
    return EvaluationStopped(epoch, mean_dice, [mean_dice, mean_dice], 0.5, 1.0)


def epoch_done(loss: float = 0.5, epoch: int = 4) -> EpochStopped:
    return EpochStopped(epoch, loss, 0.1, 8, 1.0)


@pytest.mark.parametrize("mean_dice", [0.908, 0.95, 1.0])
def test_target_reached_at_or_above_the_threshold(mean_dice: float, make_state: MakeState) -> None:
    state = make_state()
    TargetReached(0.908).on(scored(mean_dice), state)
    assert state.stop is not None
    assert state.stop[0] == "success"
    assert "0.908" in state.stop[1]


@pytest.mark.parametrize("mean_dice", [0.9079999, 0.0, math.nan])
def test_target_not_reached_below_it(mean_dice: float, make_state: MakeState) -> None:
    state = make_state()
    TargetReached(0.908).on(scored(mean_dice), state)
    assert state.stop is None


@pytest.mark.parametrize("mean_dice", [0.0, 9e-7, math.nan, -1.0])
def test_diverged_scores(mean_dice: float, make_state: MakeState) -> None:
    state = make_state()
    Diverged().on(scored(mean_dice), state)
    assert state.stop is not None
    assert state.stop[0] == "aborted"
    assert "diverged" in state.stop[1]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_diverged_losses_name_the_epoch(loss: float, make_state: MakeState) -> None:
    state = make_state()
    Diverged().on(epoch_done(loss, epoch=17), state)
    assert state.stop == ("aborted", f"diverged: the mean loss of epoch 17 is {loss}")


@pytest.mark.parametrize("event", [scored(1e-6), scored(0.3), epoch_done(1e30), epoch_done(0.0), RunStarted()])
def test_not_diverged(event: Event, make_state: MakeState) -> None:
    state = make_state()
    Diverged().on(event, state)
    assert state.stop is None


def test_the_best_is_kept_as_a_copy_on_the_host(make_state: MakeState) -> None:
    state = make_state()
    bias = state.network.output.conv.bias
    for epoch, (value, dice) in enumerate([(1.0, 0.4), (2.0, 0.6), (3.0, 0.5), (4.0, 0.6), (5.0, math.nan)], start=1):
        with torch.no_grad():
            bias.fill_(value)
        KeepBest().on(scored(dice, epoch), state)
    assert (state.best_epoch, state.best_dice) == (2, 0.6)
    assert state.best_network is not None
    assert state.best_network["output.conv.bias"].tolist() == [2.0] * 3
    assert state.best_network.keys() == state.network.state_dict().keys()
    assert {tensor.device.type for tensor in state.best_network.values()} == {"cpu"}


def test_the_first_score_is_the_best_yet_even_if_nothing(make_state: MakeState) -> None:
    state = make_state()
    KeepBest().on(scored(0.0, 2), state)
    assert (state.best_epoch, state.best_dice) == (2, 0.0)


def test_a_channels_last_network_is_kept_in_plain_memory_order(make_state: MakeState) -> None:
    state = make_state()
    state.network.to(memory_format=torch.channels_last_3d)
    KeepBest().on(scored(0.5), state)
    assert state.best_network is not None
    assert all(tensor.is_contiguous() for tensor in state.best_network.values())


@pytest.mark.parametrize(
    ("event", "saves"),
    [
        (scored(0.5), True),
        (RunStopped("aborted", "", 4, 1.0), True),
        (epoch_done(), False),
        (EpochStarted(1, 0.1, 1), False),
        (BatchDone(1, 0, 1), False),
        (EvaluationStarted(1, 1), False),
        (BlockStarted(1, 1), False),
        (BlockStopped(1, 1), False),
    ],
)
def test_saves_after_evaluations_and_at_the_end(event: Event, saves: bool, make_state: MakeState) -> None:
    saved: list[TrainState] = []
    state = make_state()
    SaveCheckpoint(saved.append).on(event, state)
    assert saved == ([state] if saves else [])


def test_saves_an_epoch_every_ten_minutes(make_state: MakeState, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    saved: list[float] = []
    callback = SaveCheckpoint(lambda state: saved.append(now[0]))
    state = make_state()
    for passed in (599, 2, 599, 2, 300):
        now[0] += passed
        callback.on(epoch_done(), state)
    assert saved == [1601, 2202]
    callback.on(scored(0.5), state)  # a save of another kind begins the ten minutes anew
    now[0] += 500
    callback.on(epoch_done(), state)
    assert saved == [1601, 2202, 2502]


class Recorder:
    """Callback and tracker in one: notes who heard what, in order."""

    def __init__(self, name: str, log: list[tuple[str, Event]]) -> None:
        self.name = name
        self.log = log

    def on(self, event: Event, state: TrainState | None = None) -> None:
        self.log.append((self.name, event))


def test_every_event_goes_to_callbacks_then_to_trackers_in_order(make_state: MakeState) -> None:
    log: list[tuple[str, Event]] = []
    announce = Announcer([Recorder("c1", log), Recorder("c2", log)], [Recorder("t1", log), Recorder("t2", log)])
    announce.state = make_state()
    event = RunStarted()
    announce(event)
    assert log == [("c1", event), ("c2", event), ("t1", event), ("t2", event)]


def test_before_there_is_a_state_only_trackers_hear() -> None:
    log: list[tuple[str, Event]] = []
    Announcer([Recorder("callback", log)], [Recorder("tracker", log)])(RunStarted())
    assert [name for name, _ in log] == ["tracker"]


def test_callbacks_see_the_state_and_may_stop_the_run(make_state: MakeState) -> None:
    announce = Announcer([TargetReached(0.5), KeepBest()], [])
    announce.state = make_state()
    announce(scored(0.7))
    assert announce.state.stop is not None
    assert announce.state.best_dice == 0.7
