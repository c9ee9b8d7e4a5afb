"""Callbacks decide the same on every rank; the announcer hands every event to callbacks first, then to trackers."""

from __future__ import annotations

import errno
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from common.errors import DIVERGED_EXIT, Interrupted
from runtime.callbacks.base import Diverged, EventDispatcher, KeepBest, StopOnSignal, TargetReached
from runtime.distributed.world import World
from runtime.logging.events import EpochStopped, EvaluationStopped, Event, RunStarted, RunStopped, StepEnd
from runtime.train_state import Stop, TrainState

MakeState = Callable[..., TrainState]

CPU = torch.device("cpu")


def scored(mean_dice: float, epoch: int = 4) -> EvaluationStopped:
    return EvaluationStopped(epoch, mean_dice, [mean_dice, mean_dice], 0.5, 1.0)


def step_done(loss: float = 0.5, norm: float = 1.0, scale: float = 1.0, **heard: Any) -> StepEnd:
    return StepEnd(4, 7, loss, norm, scale, **heard)


@dataclass(frozen=True)
class Gathering(World):
    """A rank whose group's losses are known."""

    losses: list[float] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        own_loss, own_text = value
        assert own_loss is self.losses[self.rank] or own_loss == self.losses[self.rank]
        texts = [
            own_text.replace(f"rank {self.rank}: loss {own_loss:g}", f"rank {rank}: loss {loss:g}")
            for rank, loss in enumerate(self.losses)
        ]
        return list(zip(self.losses, texts, strict=True))


def describe(epoch: int, batch: int) -> list[str]:
    return [f"case_{epoch:05d} at ({batch}, 0, 0)", "case_00099 at (1, 2, 3)"]


def diverged(losses: list[float] | None = None, rank: int = 0) -> Diverged:
    return Diverged(Gathering(rank, len(losses or [0.5]), CPU, losses=losses or [0.5]), describe, first_epoch=4)


def test_a_score_of_nothing_does_not_change_why_a_run_has_ended(make_state: MakeState) -> None:
    state = make_state()
    state.stop = Stop("success", "mean Dice 0.0000 reached 0.0")
    diverged().on(scored(0.0), state)
    assert state.stop.status == "success"


@pytest.mark.parametrize("mean_dice", [0.908, 0.95, 1.0])
def test_target_reached_at_or_above_the_threshold(mean_dice: float, make_state: MakeState) -> None:
    state = make_state()
    TargetReached(0.908).on(scored(mean_dice), state)
    assert state.stop is not None
    assert (state.stop.status, state.stop.exit_status) == ("success", 0)
    assert "0.908" in state.stop.reason


@pytest.mark.parametrize("mean_dice", [0.9079999, 0.0, math.nan])
def test_target_not_reached_below_it(mean_dice: float, make_state: MakeState) -> None:
    state = make_state()
    TargetReached(0.908).on(scored(mean_dice), state)
    assert state.stop is None


@pytest.mark.parametrize("mean_dice", [0.0, 9e-7, math.nan, -1.0])
def test_diverged_scores(mean_dice: float, make_state: MakeState) -> None:
    state = make_state()
    diverged().on(scored(mean_dice), state)
    assert state.stop == Stop("aborted", f"diverged: mean Dice {mean_dice}", DIVERGED_EXIT)


@pytest.mark.parametrize(
    ("dice", "epoch", "best", "ends"),
    [(0.0, 3, -1.0, False), (0.0, 3, 0.0, False), (0.0, 3, 0.2, True), (0.0, 4, -1.0, True), (math.nan, 3, -1.0, True)],
)
def test_before_mlperfs_first_evaluation_a_network_may_have_found_nothing_yet(
    dice: float, epoch: int, best: float, ends: bool, make_state: MakeState
) -> None:
    state = make_state()
    state.best_dice = best
    diverged().on(scored(dice, epoch), state)
    assert (state.stop is not None) is ends


NUMBERS = "diverged: epoch 4, batch 7: gradient norm 1, loss scale 1, "
ON = "on case_00004 at (7, 0, 0); case_00099 at (1, 2, 3)"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_ranks_whose_loss_is_no_number_are_named_with_their_samples(rank: int, make_state: MakeState) -> None:
    """The same words on every rank, the sound ones too."""
    state, losses = make_state(), [0.5, math.nan, math.inf]
    diverged(losses, rank).on(step_done(losses[rank], fault=True), state)
    assert state.stop == Stop("aborted", f"{NUMBERS}rank 1: loss nan {ON} | rank 2: loss inf {ON}", DIVERGED_EXIT)


@pytest.mark.parametrize(("norm", "scale"), [(math.inf, 1.0), (math.nan, 1.0), (2.0, 2.0**-15)])
def test_where_it_is_the_gradients_alone_every_rank_is_named(norm: float, scale: float, make_state: MakeState) -> None:
    state = make_state()
    diverged([0.5, 0.25]).on(step_done(0.5, norm, scale, fault=True), state)
    assert state.stop is not None
    assert state.stop.reason == (
        f"diverged: epoch 4, batch 7: gradient norm {norm:g}, loss scale {scale:g}, "
        f"rank 0: loss 0.5 {ON} | rank 1: loss 0.25 {ON}"
    )


@pytest.mark.parametrize(("ranks", "more"), [(4, ""), (5, " | and 1 more ranks"), (64, " | and 60 more ranks")])
def test_a_report_is_one_line_whatever_the_number_of_ranks(ranks: int, more: str, make_state: MakeState) -> None:
    state = make_state()
    diverged([math.nan] * ranks).on(step_done(math.nan, fault=True), state)
    assert state.stop is not None
    assert [f"rank {rank}:" in state.stop.reason for rank in range(6)] == [True] * 4 + [False] * 2
    assert state.stop.reason.endswith(f"rank 3: loss nan {ON}{more}")
    assert "\n" not in state.stop.reason


def test_the_first_reason_to_stop_stays(make_state: MakeState) -> None:
    state = make_state()
    state.stop = first = Stop("success", "reached")
    diverged().on(step_done(fault=True), state)
    assert state.stop is first


@pytest.mark.parametrize(
    "event",
    [
        scored(1e-6),
        scored(0.3),
        step_done(1e30),
        step_done(0.0),
        # What some other rank's numbers make a fault, and only that: the pulse decides, alike for all.
        step_done(math.nan, math.inf),
        step_done(signal=15, save=True),
        EpochStopped(4, 1e30, 0.1, 8, 1.0),
        RunStarted(),
    ],
)
def test_not_diverged(event: Event, make_state: MakeState) -> None:
    state = make_state()
    diverged().on(event, state)
    assert state.stop is None


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_leaves_at_the_step_at_which_a_signal_is_heard(number: int, status: int, make_state: MakeState) -> None:
    state = make_state()
    with pytest.raises(Interrupted) as left:
        StopOnSignal().on(step_done(signal=number), state)
    assert left.value.exit_status == status


def test_does_not_leave_without_a_signal_or_from_a_run_that_ends_anyway(make_state: MakeState) -> None:
    state = make_state()
    for event in (step_done(save=True, fault=True), scored(0.5), RunStopped("aborted", "", 4, 1.0)):
        StopOnSignal().on(event, state)
    state.stop = diverged_ = Stop("aborted", "diverged", DIVERGED_EXIT)
    StopOnSignal().on(step_done(signal=signal.SIGTERM), state)
    assert state.stop is diverged_, "to start it again would end in the same: its exit status must say so"


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


class Recorder:
    """Callback and tracker in one: notes who heard what, in order."""

    def __init__(self, name: str, log: list[tuple[str, Event]]) -> None:
        self.name = name
        self.log = log

    def on(self, event: Event, state: TrainState | None = None) -> None:
        self.log.append((self.name, event))


def test_every_event_goes_to_callbacks_then_to_trackers_in_order(make_state: MakeState) -> None:
    log: list[tuple[str, Event]] = []
    announce = EventDispatcher([Recorder("t1", log), Recorder("t2", log)])
    announce.attach(make_state(), [Recorder("c1", log), Recorder("c2", log)])
    event = RunStarted()
    announce(event)
    assert log == [("c1", event), ("c2", event), ("t1", event), ("t2", event)]


def test_before_callbacks_govern_only_trackers_hear(make_state: MakeState) -> None:
    log: list[tuple[str, Event]] = []
    announce = EventDispatcher([Recorder("tracker", log)])
    announce(RunStarted())
    announce.attach(make_state(), [Recorder("callback", log)])
    assert [name for name, _ in log] == ["tracker"]


def test_callbacks_see_the_state_and_may_stop_the_run(make_state: MakeState) -> None:
    state = make_state()
    announce = EventDispatcher([])
    announce.attach(state, [TargetReached(0.5), KeepBest()])
    announce(scored(0.7))
    assert state.stop is not None
    assert state.best_dice == 0.7


def test_what_a_callback_raises_is_heard_by_no_tracker(make_state: MakeState) -> None:
    """It ends the run: a wish to leave, or a checkpoint that cannot be made."""
    log: list[tuple[str, Event]] = []
    announce = EventDispatcher([Recorder("tracker", log)])
    announce.attach(make_state(), [StopOnSignal()])
    with pytest.raises(Interrupted):
        announce(step_done(signal=signal.SIGINT))
    assert log == []


class Broken(Recorder):
    """A tracker that notes, and then fails."""

    def __init__(self, error: Exception, log: list[tuple[str, Event]]) -> None:
        super().__init__("broken", log)
        self.error = error

    def on(self, event: Event, state: TrainState | None = None) -> None:
        super().on(event)
        raise self.error


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("the share is gone"), "OSError: the share is gone"),
        (KeyError("epoch"), "KeyError: 'epoch'"),
    ],
)
def test_a_failing_tracker_is_told_of_once_by_its_name_and_hears_on(
    error: Exception, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[tuple[str, Event]] = []
    announce = EventDispatcher([Broken(error, log), Recorder("sound", log)])
    for event in (scored(0.5), scored(0.6)):
        announce(event)
    assert [name for name, _ in log] == ["broken", "sound"] * 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"warning: Broken failed ({what}); its record may be incomplete, training goes on\n"


def test_each_failing_tracker_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    announce = EventDispatcher([Broken(ValueError("one"), []), Broken(ValueError("two"), [])])
    announce(RunStarted())
    announce(RunStarted())
    assert [line.split("(")[1].split(")")[0] for line in capsys.readouterr().err.splitlines()] == [
        "ValueError: one",
        "ValueError: two",
    ]
