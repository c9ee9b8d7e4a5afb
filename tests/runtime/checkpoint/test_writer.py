"""When a run saves, that it is a copy that is written while training goes on, and what a disk that is full means."""

from __future__ import annotations

import errno
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import DIVERGED_EXIT, UserError
from runtime.checkpoint import writer as saving
from runtime.checkpoint.format import load, snapshot
from runtime.checkpoint.writer import CheckpointWriter, save
from runtime.distributed.world import World
from runtime.logging.events import (
    StepEnd,
)
from runtime.train_state import Stop, TrainState

MakeState = Callable[..., TrainState]

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
FULL = OSError(errno.ENOSPC, "No space left on device")
DUE = StepEnd(epoch=4, batch=1, loss=0.5, gradient_norm=1.0, loss_scale=1.0, save=True)
ENDED = Stop("aborted", "not reached")
take = partial(snapshot, config={}, seed=1, data="")


def save_if_due(writer: CheckpointWriter, epoch: int, state: TrainState) -> None:
    """As the training loop does after an epoch."""
    if writer.is_due_after_epoch(epoch):
        writer.save(state)


def saver(
    write: Callable[[dict[str, Any]], None], minutes: float = 0.0, epochs: int = 0, world: World = ALONE
) -> CheckpointWriter:
    return CheckpointWriter(world=world, snapshot=take, write=write, minutes=minutes, epochs=epochs)


def wait_for_writer(callback: CheckpointWriter) -> None:
    callback._join()


class Disk:
    """Keeps what was written; a writing lasts until `let_go` and fails with `error`."""

    def __init__(self, error: OSError | None = None, is_slow: bool = False) -> None:
        self.written: list[dict[str, Any]] = []
        self.threads: list[str] = []
        self.error = error
        self.began, self.may_end = threading.Event(), threading.Event()
        if not is_slow:
            self.let_go()

    def let_go(self) -> None:
        self.may_end.set()

    def write(self, content: dict[str, Any]) -> None:
        self.began.set()
        self.threads.append(threading.current_thread().name)
        assert self.may_end.wait(60)
        if self.error is not None:
            raise self.error
        self.written.append(content)

    def epochs(self) -> list[int]:
        return [content["last"]["epoch"] for content in self.written]


@pytest.fixture
def slow() -> Iterator[Disk]:
    disk = Disk(is_slow=True)
    yield disk
    disk.let_go()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that `time.monotonic` will tell, set by the test."""
    now = [1000.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    return now


# When


@pytest.mark.parametrize(("epochs", "saved"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4]), (5, [5])])
def test_saves_every_so_many_epochs(epochs: int, saved: list[int], make_state: MakeState) -> None:
    disk, state = Disk(), make_state()
    callback = saver(disk.write, epochs=epochs)
    for epoch in range(1, 6):
        state.epoch = epoch
        save_if_due(callback, epoch, state)
    wait_for_writer(callback)
    assert disk.epochs() == saved
    assert not callback.is_due(), "not by the clock"


def test_minutes_count_from_the_last_save_of_any_kind(make_state: MakeState, clock: list[float]) -> None:
    disk, state = Disk(), make_state()
    callback = saver(disk.write, minutes=10)
    due = []
    for passed in (0, 599, 1, 50):
        clock[0] += passed
        due.append(callback.is_due())
    assert due == [False, False, True, True], "until it was saved"
    callback.save(state)
    wait_for_writer(callback)
    clock[0] += 599
    assert not callback.is_due()
    state.best_epoch = 4
    callback.save(state)
    wait_for_writer(callback)
    clock[0] += 599
    assert not callback.is_due()
    clock[0] += 1
    assert callback.is_due()


def test_minutes_may_be_less_than_one_and_never_is_never(clock: list[float]) -> None:
    short, never = saver(Disk().write, minutes=0.5), saver(Disk().write)
    clock[0] += 29
    assert not short.is_due()
    clock[0] += 1
    assert short.is_due()
    clock[0] += 1e9
    assert not never.is_due()


def test_rank_0_s_clock_decides(clock: list[float]) -> None:
    ranks = [saver(Disk().write, minutes=1, world=World(rank, 3, CPU)) for rank in range(3)]
    clock[0] += 61
    assert [rank.is_due() for rank in ranks] == [True, False, False]


def test_nothing_is_due_while_the_last_one_is_written(slow: Disk, make_state: MakeState, clock: list[float]) -> None:
    callback = saver(slow.write, minutes=1)
    callback.save(make_state())
    clock[0] += 3600
    assert not callback.is_due()
    slow.let_go()
    wait_for_writer(callback)
    assert callback.is_due()


def test_a_run_without_checkpoints_saves_nothing(make_state: MakeState, clock: list[float]) -> None:
    world, state = Gathering(0, 3, CPU, sums=[1.0] * 3), make_state()
    state.batch, state.loss_sum = 4, torch.tensor(1.0)
    writer = CheckpointWriter(world=world, snapshot=take, write=None, minutes=1, epochs=1)
    clock[0] += 61
    assert not writer.is_due()
    assert not writer.is_due_after_epoch(1)
    writer.save(state)
    writer.finish(state, ENDED)
    assert world.gathered == [], "no host sync either"


# A copy, in a thread


def test_what_is_written_is_the_state_as_it_was(tmp_path: Path, slow: Disk, make_state: MakeState) -> None:
    """Training goes on while the disk takes its time."""
    path, state = tmp_path / "c.pth", make_state(momentum=0.9)
    bias = state.network.output.conv.bias

    def write(content: dict[str, Any]) -> None:
        slow.write(content)
        save(path, content)

    for p in state.network.parameters():
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    old, moment = bias.detach().clone(), state.optimizer.state[bias]["momentum_buffer"].clone()
    state.epoch, state.batch, state.loss_sum = 3, 2, torch.tensor(1.25)
    callback = saver(write)
    callback.save(state)
    assert slow.began.wait(60)
    state.optimizer.step()
    state.epoch, state.batch, state.loss_sum = 4, 5, state.loss_sum.add_(1.0)
    slow.let_go()
    wait_for_writer(callback)
    loaded = load(path)
    assert torch.equal(loaded.last["output.conv.bias"], old)
    assert not torch.equal(bias, old)
    assert loaded.optimizer is not None
    moments = [entry["momentum_buffer"] for entry in loaded.optimizer["state"].values()]
    assert any(torch.equal(each, moment) for each in moments)
    assert (loaded.last_epoch, loaded.batch, loaded.loss_sums) == (3, 2, [1.25])
    assert slow.threads == ["checkpoint"]


def test_a_save_waits_for_the_one_under_way(slow: Disk, make_state: MakeState) -> None:
    """Two at once would write one file; the first is not lost either."""
    state = make_state()
    callback = saver(slow.write, epochs=1)
    state.epoch = 1
    save_if_due(callback, 1, state)
    assert slow.began.wait(60)
    state.epoch = 2
    second = threading.Thread(target=callback.save, args=(state,))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    assert slow.threads == ["checkpoint"]
    slow.let_go()
    second.join(60)
    wait_for_writer(callback)
    assert slow.epochs() == [1, 2]


def test_other_ranks_write_nothing(make_state: MakeState) -> None:
    disk, state = Disk(), make_state()
    state.best_epoch = 4
    callback = saver(disk.write, epochs=1, world=World(1, 2, CPU))
    save_if_due(callback, 4, state)
    callback.finish(state, ENDED)
    assert disk.threads == []


@dataclass(frozen=True)
class Gathering(World):
    """A rank whose group's sums are known; counts how often they are gathered."""

    sums: list[float] = field(default_factory=list)
    gathered: list[float] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.gathered.append(value)
        return self.sums


def test_every_ranks_sum_of_losses_is_saved(make_state: MakeState) -> None:
    disk, state = Disk(), make_state()
    world = Gathering(0, 3, CPU, sums=[1.5, 2.5, 3.5])
    state.batch, state.loss_sum = 4, torch.tensor(1.5)
    saver(disk.write, world=world).finish(state, ENDED)
    assert disk.written[0]["last"]["loss_sums"] == [1.5, 2.5, 3.5]
    assert world.gathered == [1.5]


def test_between_epochs_nothing_is_gathered(make_state: MakeState) -> None:
    """A rank that was interrupted in an evaluation saves while others may still compute."""
    disk, world = Disk(), Gathering(0, 3, CPU)
    saver(disk.write, world=world).finish(make_state(), ENDED)
    assert disk.written[0]["last"]["loss_sums"] == [0.0] * 3
    assert world.gathered == []


# Numbers that are none


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_sum_of_losses_that_is_no_number_is_never_saved(number: float, rank: int, make_state: MakeState) -> None:
    """Whichever rank's: the next beat of the pulse will tell of it."""
    disk, state = Disk(), make_state()
    sums = [1.0, 1.0]
    sums[rank] = number
    state.batch, state.loss_sum, state.best_epoch = 2, torch.tensor(sums[0]), 4
    callback = saver(disk.write, world=Gathering(0, 2, CPU, sums=sums))
    callback.save(state)
    callback.save(state)
    callback.finish(state, ENDED)
    assert disk.threads == []


def test_what_is_not_saved_is_not_tried_at_every_step_either(make_state: MakeState, clock: list[float]) -> None:
    """Reading the numbers is a wait for the device."""
    state = make_state()
    state.gradient_norm = torch.tensor(math.nan)
    callback = saver(Disk().write, minutes=1)
    clock[0] += 61
    callback.save(state)
    assert not callback.is_due()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_has_spoilt_the_weights(number: float, make_state: MakeState) -> None:
    disk, state = Disk(), make_state()
    state.gradient_norm = torch.tensor(number)
    callback = saver(disk.write, epochs=1)
    callback.save(state)
    save_if_due(callback, 1, state)
    callback.finish(state, ENDED)
    assert disk.threads == []


def test_under_a_loss_scaler_such_a_step_was_skipped(make_state: MakeState) -> None:
    disk, state = Disk(), make_state()
    state.scaler = torch.amp.GradScaler("cpu", enabled=True)
    state.gradient_norm = torch.tensor(math.inf)
    saver(disk.write).finish(state, ENDED)
    assert len(disk.written) == 1


def test_after_a_divergence_the_last_good_one_stays(make_state: MakeState) -> None:
    disk, state = Disk(), make_state()
    state.epoch = 3
    callback = saver(disk.write, epochs=1)
    save_if_due(callback, 3, state)
    state.epoch = 4
    callback.finish(state, Stop("aborted", "diverged: mean Dice 0.0", DIVERGED_EXIT))
    assert disk.epochs() == [3]


# The end, and a disk that is full


@pytest.mark.parametrize(
    "stop", [Stop("success", "reached"), Stop("aborted", "not reached"), Stop("aborted", "interrupted", 143)]
)
def test_the_end_is_saved_after_what_is_under_way(stop: Stop, slow: Disk, make_state: MakeState) -> None:
    state = make_state()
    callback = saver(slow.write, epochs=1)
    state.epoch = 1
    save_if_due(callback, 1, state)
    state.epoch = 2
    threading.Timer(0.05, slow.let_go).start()
    callback.finish(state, stop)
    assert slow.epochs() == [1, 2]
    assert slow.threads == ["checkpoint", "MainThread"], "when it returns, the file is there"


def test_a_full_disk_is_a_warning_each_time_and_training_goes_on(
    make_state: MakeState, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, state = Disk(FULL), make_state()
    callback = saver(disk.write)
    callback.save(state)
    wait_for_writer(callback)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "warning: the checkpoint could not be saved (No space left on device); the last good one is untouched, "
        "training goes on\n"
    )
    disk.error = None
    callback.save(state)
    wait_for_writer(callback)
    assert len(disk.written) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "what"), [(FULL, "No space left on device"), (OSError("the share is gone"), "the share is gone")]
)
def test_at_the_end_a_full_disk_is_the_users_to_mend(error: OSError, what: str, make_state: MakeState) -> None:
    with pytest.raises(UserError) as caught:
        saver(Disk(error).write).finish(make_state(), ENDED)
    assert str(caught.value) == (
        f"the checkpoint could not be saved ({what}); the last good one is untouched; the end of this run is lost"
    )


def test_a_failed_save_is_tried_again_after_the_interval(make_state: MakeState, clock: list[float]) -> None:
    """Not at every step: the warning would fill the screen."""
    callback = saver(Disk(FULL).write, minutes=1)
    clock[0] += 61
    callback.save(make_state())
    wait_for_writer(callback)
    assert not callback.is_due()
    clock[0] += 61
    assert callback.is_due()


def test_all_ranks_stay_until_rank_0_has_written(run_ranks: Callable[..., list[str]]) -> None:
    """A launcher kills all as soon as one leaves with an exit status."""
    code = """
        import time
        from runtime.checkpoint.writer import CheckpointWriter
        from runtime.train_state import Stop, TrainState

        def write(content):
            time.sleep(0.5)
            world.store.set("order", world.store.get("order") + " written")

        state = TrainState(network=None, model=None, optimizer=None, scaler=None)
        if world.is_main:
            world.store.set("order", "began")
        world.barrier()
        stop = Stop("aborted", "not reached")
        CheckpointWriter(world=world, snapshot=lambda state, sums: {}, write=write).finish(state, stop)
        print(world.store.get("order"))
        world.barrier()
    """
    assert run_ranks(code) == ["began written\n"] * 2
