"""When a run evaluates."""

from __future__ import annotations

import pytest

from common.errors import UserError
from runtime.eval_schedule import EvalSchedule, make_schedule


def test_evaluates_at_the_first_epoch_and_then_every_interval() -> None:
    schedule = EvalSchedule(epochs=12, first_evaluation=4, interval=3)
    assert [epoch for epoch in range(1, 13) if schedule.evaluates(epoch)] == [4, 7, 10]


def test_without_a_first_evaluation_there_is_none() -> None:
    assert not any(EvalSchedule(50, None, 1).evaluates(epoch) for epoch in range(1, 51))


@pytest.mark.parametrize(
    ("schedule", "start", "blocks"),
    [
        (EvalSchedule(6, 2, 2), 1, [(1, 2), (3, 4), (5, 6)]),
        (EvalSchedule(7, 3, 2), 1, [(1, 3), (4, 5), (6, 7)]),
        (EvalSchedule(8, 3, 2), 1, [(1, 3), (4, 5), (6, 7), (8, 8)]),
        (EvalSchedule(3, 1, 1), 1, [(1, 1), (2, 2), (3, 3)]),
        (EvalSchedule(5, 9, 1), 1, [(1, 5)]),
        (EvalSchedule(5, None, 1), 1, [(1, 5)]),
        (EvalSchedule(8, 3, 2), 5, [(5, 5), (6, 7), (8, 8)]),
        (EvalSchedule(8, 3, 2), 6, [(6, 7), (8, 8)]),
        (EvalSchedule(8, 3, 2), 9, []),
    ],
)
def test_blocks_end_with_an_evaluation_or_the_run(
    schedule: EvalSchedule, start: int, blocks: list[tuple[int, int]]
) -> None:
    assert list(schedule.blocks(start)) == blocks


@pytest.mark.parametrize("samples_per_epoch", [168, 166, 160, 56, 14, 1, 1000, 168 * 1000])
def test_the_schedule_of_the_rules(samples_per_epoch: int) -> None:
    schedule = make_schedule(10_000, samples_per_epoch, None, None)
    assert schedule.first_evaluation == -(-1000 * 168 // samples_per_epoch)
    assert schedule.interval == -(-20 * 168 // samples_per_epoch)
    assert schedule.epochs == 10_000


def test_the_schedule_of_the_rules_for_168_and_166_samples() -> None:
    assert make_schedule(1, 168, None, None) == EvalSchedule(1, 1000, 20)
    assert make_schedule(1, 166, None, None) == EvalSchedule(1, 1013, 21)


def test_the_users_schedule() -> None:
    assert make_schedule(9, 168, 3, None) == EvalSchedule(9, 3, 20)
    assert make_schedule(9, 168, None, 2) == EvalSchedule(9, 1000, 2)
    assert make_schedule(9, 168, 3, 2) == EvalSchedule(9, 3, 2)


def test_check_refuses_an_epoch_without_a_step() -> None:
    with pytest.raises(UserError, match=r"--ga_steps 5, but an epoch has 4 batches: no step"):
        EvalSchedule(9, 1, 1).check(batches=4, ga_steps=5, warmup_steps=None)


@pytest.mark.parametrize(("epochs", "warmup_steps"), [(1, 4), (2, 8), (1, 200)])
def test_check_refuses_a_benchmark_that_ends_in_its_warm_up(epochs: int, warmup_steps: int) -> None:
    """5 batches and groups of 2: 4 iterations an epoch."""
    enough = warmup_steps // 4 + 2
    with pytest.raises(UserError, match=rf"{epochs} epoch\(s\) of 4 iterations .*use --epochs {enough} or"):
        EvalSchedule(epochs, None, 1).check(5, 2, warmup_steps)
    EvalSchedule(enough, None, 1).check(5, 2, warmup_steps)


def test_check_passes_a_run_with_a_result() -> None:
    EvalSchedule(1, None, 1).check(batches=4, ga_steps=4, warmup_steps=None)
    EvalSchedule(1, None, 1).check(batches=5, ga_steps=2, warmup_steps=3)
    EvalSchedule(1, None, 1).check(batches=5, ga_steps=2, warmup_steps=0)


def test_note_warns_if_there_is_no_evaluation() -> None:
    assert EvalSchedule(5, 5, 1).note() == ""
    assert "no evaluation in 5 epochs (the first is due at epoch 6)" in EvalSchedule(5, 6, 1).note()
    assert "there are no cases" in EvalSchedule(5, None, 1).note()
