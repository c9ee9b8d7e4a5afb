"""When a run saves, and that it saves a copy of the state while training continues."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.checkpoint.format import load
from runtime.checkpoint.writer import save
from runtime.distributed.world import World
from tests.runtime.checkpoint.disk import (
    CPU,
    ENDED,
    Disk,
    Gathering,
    MakeState,
    make_writer,
    save_if_due,
)


@pytest.mark.parametrize(("epochs", "saved"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4]), (5, [5])])
def test_saves_every_nth_epoch(epochs: int, saved: list[int], make_state: MakeState) -> None:
    disk, state = Disk(), make_state()
    writer = make_writer(disk.write, epochs=epochs)
    for epoch in range(1, 6):
        state.epoch = epoch
        save_if_due(writer, epoch, state)
    writer._join()
    assert disk.epochs() == saved
    assert not writer.is_due(), "not by the clock"


def test_minutes_count_from_the_last_save_of_any_kind(make_state: MakeState, clock: list[float]) -> None:
    disk, state = Disk(), make_state()
    writer = make_writer(disk.write, minutes=10)
    due = []
    for passed in (0, 599, 1, 50):
        clock[0] += passed
        due.append(writer.is_due())
    assert due == [False, False, True, True], "until it was saved"
    writer.save(state)
    writer._join()
    clock[0] += 599
    assert not writer.is_due()
    writer.save(state)
    writer._join()
    clock[0] += 599
    assert not writer.is_due()
    clock[0] += 1
    assert writer.is_due()


def test_minutes_may_be_less_than_one_and_never_is_never(clock: list[float]) -> None:
    short, never = make_writer(Disk().write, minutes=0.5), make_writer(Disk().write)
    clock[0] += 29
    assert not short.is_due()
    clock[0] += 1
    assert short.is_due()
    clock[0] += 1e9
    assert not never.is_due()


def test_rank_0_s_clock_decides(clock: list[float]) -> None:
    ranks = [make_writer(Disk().write, minutes=1, world=World(rank, 3, CPU)) for rank in range(3)]
    clock[0] += 61
    assert [rank.is_due() for rank in ranks] == [True, False, False]


def test_nothing_is_due_while_the_last_one_is_written(slow: Disk, make_state: MakeState, clock: list[float]) -> None:
    writer = make_writer(slow.write, minutes=1)
    writer.save(make_state())
    clock[0] += 3600
    assert not writer.is_due()
    slow.let_go()
    writer._join()
    assert writer.is_due()


def test_a_run_without_checkpoints_saves_nothing(make_state: MakeState, clock: list[float]) -> None:
    world, state = Gathering(0, 3, CPU, sums=[1.0] * 3), make_state()
    state.batch, state.loss_sum = 4, torch.tensor(1.0)
    writer = make_writer(None, minutes=1, epochs=1, world=world)
    clock[0] += 61
    assert not writer.is_due()
    assert not writer.is_due_after_epoch(1)
    writer.save(state)
    writer.finish(state, ENDED)
    assert world.gathered == [], "no host sync either"


# A copy, in a thread


def test_what_is_written_is_the_state_as_it_was(tmp_path: Path, slow: Disk, make_state: MakeState) -> None:
    """Training continues during the write."""
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
    writer = make_writer(write)
    writer.save(state)
    assert slow.began.wait(60)
    state.optimizer.step()
    state.epoch, state.batch, state.loss_sum = 4, 5, state.loss_sum.add_(1.0)
    slow.let_go()
    writer._join()
    loaded = load(path)
    assert torch.equal(loaded.last["output.conv.bias"], old)
    assert not torch.equal(bias, old)
    assert loaded.optimizer is not None
    moments = [entry["momentum_buffer"] for entry in loaded.optimizer["state"].values()]
    assert any(torch.equal(each, moment) for each in moments)
    assert (loaded.last_epoch, loaded.batch, loaded.loss_sums) == (3, 2, [1.25])
    assert slow.threads == ["checkpoint"]


def test_a_save_waits_for_the_one_under_way(slow: Disk, make_state: MakeState) -> None:
    """Two writes at once would go to one file; the first is not lost either."""
    state = make_state()
    writer = make_writer(slow.write, epochs=1)
    state.epoch = 1
    save_if_due(writer, 1, state)
    assert slow.began.wait(60)
    state.epoch = 2
    second = threading.Thread(target=writer.save, args=(state,))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    assert slow.threads == ["checkpoint"]
    slow.let_go()
    second.join(60)
    writer._join()
    assert slow.epochs() == [1, 2]


def test_other_ranks_write_nothing(make_state: MakeState) -> None:
    disk, state = Disk(), make_state()
    writer = make_writer(disk.write, epochs=1, world=World(1, 2, CPU))
    save_if_due(writer, 4, state)
    writer.finish(state, ENDED)
    assert disk.threads == []


def test_every_ranks_sum_of_losses_is_saved(make_state: MakeState) -> None:
    disk, state = Disk(), make_state()
    world = Gathering(0, 3, CPU, sums=[1.5, 2.5, 3.5])
    state.batch, state.loss_sum = 4, torch.tensor(1.5)
    make_writer(disk.write, world=world).finish(state, ENDED)
    assert disk.written[0]["last"]["loss_sums"] == [1.5, 2.5, 3.5]
    assert world.gathered == [1.5]


def test_between_epochs_nothing_is_gathered(make_state: MakeState) -> None:
    """A rank that was interrupted in an evaluation saves while others may still be computing."""
    disk, world = Disk(), Gathering(0, 3, CPU)
    make_writer(disk.write, world=world).finish(make_state(), ENDED)
    assert disk.written[0]["last"]["loss_sums"] == [0.0] * 3
    assert world.gathered == []
