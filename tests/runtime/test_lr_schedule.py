"""Schedules against their formulas; the plateau schedule, also after a resume."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from common.errors import UserError
from runtime.logging.events import EvaluationStopped
from runtime.lr_schedule import LRScheduleConfig, Plateau, build_lr_schedule
from runtime.train_state import TrainState

MakeState = Callable[..., TrainState]
RUN = LRScheduleConfig(
    learning_rate=0.8,
    init_learning_rate=0.1,
    lr_warmup_epochs=4,
    lr_decay_epochs=(),
    lr_decay_factor=1.0,
    epochs=24,
    callback_state={},
)


def scored(epoch: int, dice: float, loss: float = 1.0) -> EvaluationStopped:
    return EvaluationStopped(epoch=epoch, mean_dice=dice, dice=[dice], loss=loss, seconds=1.0)


@pytest.mark.parametrize("spec", ["multistep", "cosine", "polynomial", "plateau"])
def test_every_schedule_begins_with_the_same_warm_up(spec: str) -> None:
    rate = build_lr_schedule(spec, dataclasses.replace(RUN, callback_state={}))
    assert [rate(epoch) for epoch in range(1, 6)] == pytest.approx([0.275, 0.45, 0.625, 0.8, 0.8])


def test_multistep_is_mlperfs_formula() -> None:
    """Epoch 4 of 4 of the warm-up has the base rate; a decay epoch itself still has the rate before."""
    rate = build_lr_schedule("multistep", dataclasses.replace(RUN, lr_decay_epochs=(6, 9), lr_decay_factor=0.5))
    warm_up = [0.1 + 0.7 / 4, 0.1 + 0.7 / 2, 0.1 + 0.7 * 3 / 4, 0.8]
    expected = [*warm_up, 0.8, 0.8, 0.4, 0.4, 0.4, *[0.2] * 15]
    assert [rate(epoch) for epoch in range(1, 25)] == pytest.approx(expected, rel=1e-12)


def test_cosine_and_polynomial_are_their_formulas() -> None:
    cosine = build_lr_schedule("cosine(final=0.2)", RUN)
    polynomial = build_lr_schedule("polynomial(power=2.0, final=0.3)", RUN)
    for epoch in range(5, 25):
        progress = (epoch - 5) / 20
        assert cosine(epoch) == pytest.approx(0.2 + 0.3 * (1 + math.cos(math.pi * progress)))
        assert polynomial(epoch) == pytest.approx(0.3 + 0.5 * (1 - progress) ** 2)
    assert polynomial(24) > 0.3


def test_plateau_counts_its_patience_also_after_a_resume(make_state: MakeState) -> None:
    dice = [0.1, 0.5, 0.5, math.nan, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6]
    whole = Plateau(dataclasses.replace(RUN, callback_state={}), factor=0.5, patience=2)
    rates = []
    for epoch, value in enumerate(dice, 5):
        whole.on_evaluation_end(scored(epoch, value))
        rates.append(whole(epoch + 1))
    assert rates == pytest.approx([0.8] * 4 + [0.4] * 4 + [0.4, 0.2])
    for stop in range(1, len(dice)):
        state, resumed = make_state(), make_state()
        first = Plateau(dataclasses.replace(RUN, callback_state=state.callback_state), factor=0.5, patience=2)
        for epoch, value in enumerate(dice[:stop], 5):
            first.on_evaluation_end(scored(epoch, value))
        resumed.callback_state.update(state.callback_state)
        second = Plateau(dataclasses.replace(RUN, callback_state=resumed.callback_state), factor=0.5, patience=2)
        for epoch, value in enumerate(dice[stop:], 5 + stop):
            second.on_evaluation_end(scored(epoch, value))
        assert second(99) == pytest.approx(0.2)


def test_a_resumed_plateau_takes_new_arguments_and_another_metrics_best_does_not_count() -> None:
    state: dict[str, Any] = {}
    first = Plateau(dataclasses.replace(RUN, callback_state=state), factor=0.5, patience=5)
    for epoch in range(5, 8):
        first.on_evaluation_end(scored(epoch, 0.9))
    resumed = Plateau(dataclasses.replace(RUN, callback_state=copy.deepcopy(state)), factor=0.1, patience=2)
    resumed.on_evaluation_end(scored(8, 0.5))
    assert resumed(9) == pytest.approx(0.08), "two evaluations without progress before, and one now"
    other = Plateau(dataclasses.replace(RUN, callback_state=copy.deepcopy(state)), patience=1, metric="loss")
    for epoch, loss in enumerate([3.0, 2.0, 1.0], 8):
        other.on_evaluation_end(scored(epoch, 0.5, loss))
        assert other(epoch + 1) == pytest.approx(0.8)


def test_a_resumed_plateau_follows_a_changed_learning_rate() -> None:
    state: dict[str, Any] = {}
    first = Plateau(dataclasses.replace(RUN, learning_rate=0.7, callback_state=state), factor=0.1, patience=0)
    for epoch in (5, 6):
        first.on_evaluation_end(scored(epoch, 0.9))
    rate = first(7)
    assert rate == pytest.approx(0.07)
    for base, min_rate, resumed in ((0.7, 0.0, rate), (1.4, 0.0, 0.14), (0.07, 0.05, 0.05)):
        run = dataclasses.replace(RUN, learning_rate=base, callback_state=copy.deepcopy(state))
        second = Plateau(run, factor=0.1, min_rate=min_rate)
        assert second(7) == (rate if base == 0.7 else pytest.approx(resumed))


@pytest.mark.parametrize(
    ("metric", "mode", "rate"), [("loss", "max", 0.4), ("mean_dice", "max", 0.8), ("loss", "min", 0.8)]
)
def test_a_resumed_plateau_knows_the_best_of_the_same_metric_and_mode_only(metric: str, mode: str, rate: float) -> None:
    state: dict[str, Any] = {}
    first = Plateau(dataclasses.replace(RUN, callback_state=state), patience=0, metric=metric, mode=mode)
    first.on_evaluation_end(scored(5, 0.9, loss=0.9))
    resumed = Plateau(dataclasses.replace(RUN, callback_state=state), patience=0, metric="loss", mode="max")
    resumed.on_evaluation_end(scored(6, 0.5, loss=0.5))
    assert resumed(7) == pytest.approx(rate)


def test_plateaus_rate_never_falls_below_the_lowest() -> None:
    plateau = Plateau(dataclasses.replace(RUN, callback_state={}), factor=0.5, patience=0, min_rate=0.3)
    rates = []
    for epoch in range(5, 9):
        plateau.on_evaluation_end(scored(epoch, 0.5))
        rates.append(plateau(epoch + 1))
    assert rates == pytest.approx([0.8, 0.4, 0.3, 0.3])


def test_plateaus_threshold_is_relative_to_the_best() -> None:
    plateau = Plateau(dataclasses.replace(RUN, callback_state={}), factor=0.5, patience=0, threshold=0.5)
    rates = []
    for epoch, dice in enumerate([0.4, 0.59, 0.61, 0.9], 5):
        plateau.on_evaluation_end(scored(epoch, dice))
        rates.append(plateau(epoch + 1))
    assert rates == pytest.approx([0.8, 0.4, 0.4, 0.2])


@pytest.mark.parametrize("loss", [-0.5, 0.5])
def test_a_loss_that_does_not_fall_is_no_improvement_whatever_its_sign(loss: float) -> None:
    """The Dice losses of other libraries are negative."""
    plateau = Plateau(dataclasses.replace(RUN, callback_state={}), factor=0.5, patience=0, metric="loss")
    rates = []
    for epoch, value in enumerate([loss, loss, loss + 1e-5, loss - 1e-5, loss - 0.1], 5):
        plateau.on_evaluation_end(scored(epoch, 0.5, loss=value))
        rates.append(plateau(epoch + 1))
    assert rates == pytest.approx([0.8, 0.4, 0.2, 0.1, 0.1])


def test_plateau_ignores_evaluations_during_the_warm_up(make_state: MakeState) -> None:
    plateau = Plateau(dataclasses.replace(RUN, callback_state={}), factor=0.5, patience=0)
    for epoch in range(1, 5):
        plateau.on_evaluation_end(scored(epoch, 0.9))
    plateau.on_evaluation_end(scored(5, 0.5))
    assert plateau(6) == pytest.approx(0.8), "the first score that counts"
    plateau.on_evaluation_end(scored(6, 0.5))
    assert plateau(7) == pytest.approx(0.4)


def test_plateau_of_the_loss_goes_down(make_state: MakeState) -> None:
    plateau = Plateau(dataclasses.replace(RUN, callback_state={}), factor=0.1, patience=1, metric="loss")
    for epoch, loss in enumerate([3.0, 2.0, 1.0, 1.5, 1.5], 5):
        plateau.on_evaluation_end(scored(epoch, 0.5, loss))
    assert plateau(20) == pytest.approx(0.08)


def test_the_state_of_plateau_loads_with_weights_only(make_state: MakeState, tmp_path: Any) -> None:
    state = make_state()
    Plateau(dataclasses.replace(RUN, callback_state=state.callback_state)).on_evaluation_end(scored(5, 0.5))
    torch.save(state.callback_state, tmp_path / "r")
    assert torch.load(tmp_path / "r", weights_only=True) == state.callback_state


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cosin", "unknown name; available: cosine, multistep, plateau, polynomial"),
        ("cosine(last=1)", "unknown argument 'last'; it takes final"),
        ("plateau(factor=1.5)", "plateau: Factor should be < 1.0"),
        ("plateau(metric='accuracy')", "unknown metric 'accuracy'; available: mean_dice, loss"),
        ("plateau(mode='up')", "mode='up'; must be 'max' or 'min'"),
    ],
)
def test_a_wrong_spec_is_a_user_error(spec: str, message: str) -> None:
    with pytest.raises(UserError, match="--lr_schedule") as raised:
        build_lr_schedule(spec, RUN)
    assert message in str(raised.value)


def test_decay_epochs_apply_only_to_multistep() -> None:
    with pytest.raises(UserError, match="--lr_decay_epochs applies only to --lr_schedule multistep"):
        build_lr_schedule("cosine", dataclasses.replace(RUN, lr_decay_epochs=(3,)))
