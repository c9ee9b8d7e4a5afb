"""A damaged state is not saved; a full disk is a warning during the run and an error at its end."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch

from common.errors import DIVERGED_EXIT, UserError
from runtime.train_state import Stop
from tests.runtime.checkpoint.disk import CPU, ENDED, FULL, Disk, Gathering, MakeState, make_writer, save_if_due


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_loss_sum_that_is_not_finite_is_never_saved(number: float, rank: int, make_state: MakeState) -> None:
    """On any rank: `StepSync` reports it at the next step."""
    disk, state = Disk(), make_state()
    sums = [1.0, 1.0]
    sums[rank] = number
    state.batch, state.loss_sum = 2, torch.tensor(sums[0])
    writer = make_writer(disk.write, world=Gathering(0, 2, CPU, sums=sums))
    writer.save(state)
    writer.finish(state, ENDED)
    assert disk.threads == []


def test_a_state_that_is_not_saved_is_not_tried_at_every_step(make_state: MakeState, clock: list[float]) -> None:
    """Reading the numbers makes the host wait for the device."""
    state = make_state()
    state.gradient_norm = torch.tensor(math.nan)
    writer = make_writer(Disk().write, minutes=1)
    clock[0] += 61
    writer.save(state)
    assert not writer.is_due()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_has_damaged_the_weights(number: float, make_state: MakeState) -> None:
    disk, state = Disk(), make_state()
    state.gradient_norm = torch.tensor(number)
    writer = make_writer(disk.write, epochs=1)
    writer.save(state)
    save_if_due(writer, 1, state)
    writer.finish(state, ENDED)
    assert disk.threads == []


def test_under_a_loss_scaler_such_a_step_was_skipped(make_state: MakeState) -> None:
    disk, state = Disk(), make_state()
    state.scaler = torch.amp.GradScaler("cpu", enabled=True)
    state.gradient_norm = torch.tensor(math.inf)
    make_writer(disk.write).finish(state, ENDED)
    assert len(disk.written) == 1


def test_after_a_divergence_the_last_good_one_stays(make_state: MakeState) -> None:
    disk, state = Disk(), make_state()
    state.epoch = 3
    writer = make_writer(disk.write, epochs=1)
    save_if_due(writer, 3, state)
    state.epoch = 4
    writer.finish(state, Stop("aborted", "diverged: mean Dice 0.0", DIVERGED_EXIT))
    assert disk.epochs() == [3]


# The end, and a disk that is full


@pytest.mark.parametrize(
    "stop", [Stop("success", "reached"), Stop("aborted", "not reached"), Stop("aborted", "interrupted", 143)]
)
def test_the_end_is_saved_after_what_is_under_way(stop: Stop, slow: Disk, make_state: MakeState) -> None:
    state = make_state()
    writer = make_writer(slow.write, epochs=1)
    state.epoch = 1
    save_if_due(writer, 1, state)
    state.epoch = 2
    threading.Timer(0.05, slow.let_go).start()
    writer.finish(state, stop)
    assert slow.epochs() == [1, 2]
    assert slow.threads == ["checkpoint", "MainThread"], "when it returns, the file is there"


def test_a_full_disk_is_a_warning_each_time_and_training_goes_on(
    make_state: MakeState, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, state = Disk(FULL), make_state()
    writer = make_writer(disk.write)
    writer.save(state)
    writer._join()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "warning: the checkpoint could not be saved (No space left on device); the last good one is untouched, "
        "training goes on\n"
    )
    disk.error = None
    writer.save(state)
    writer._join()
    assert len(disk.written) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "what"), [(FULL, "No space left on device"), (OSError("the share is gone"), "the share is gone")]
)
def test_at_the_end_a_full_disk_is_a_user_error(error: OSError, what: str, make_state: MakeState) -> None:
    with pytest.raises(UserError) as caught:
        make_writer(Disk(error).write).finish(make_state(), ENDED)
    assert str(caught.value) == (
        f"the checkpoint could not be saved ({what}); the last good one is untouched; the end of this run is lost"
    )


def test_a_failed_save_is_tried_again_after_the_interval(make_state: MakeState, clock: list[float]) -> None:
    """Not at every step: the warning would fill the screen."""
    writer = make_writer(Disk(FULL).write, minutes=1)
    clock[0] += 61
    writer.save(make_state())
    writer._join()
    assert not writer.is_due()
    clock[0] += 61
    assert writer.is_due()


def test_all_ranks_stay_until_rank_0_has_written(run_ranks: Callable[..., list[str]]) -> None:
    """A launcher kills all ranks as soon as one exits with a status other than 0."""
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
