"""`--test_time_flips`: which flips, their mean, and the same in an evaluation and a prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_loading.spec import KITS19
from runtime.build import make_sliding_window_config
from runtime.checkpoint.format import Checkpoint
from runtime.distributed.world import World
from runtime.precision import Precision
from runtime.test_time_flips import flips_of, mean_over_flips, untrained_flips
from tests.runtime.scoring import CASES, SCORING, Thresholds, evaluate, make_scorer
from tests.runtime.test_arguments import parse


class Ramp(nn.Module):
    """Thresholds plus a slope along D and H, which a flip of either turns around."""

    def forward(self, image: Tensor) -> Tensor:
        slope = torch.linspace(-1, 1, image.shape[2]).view(-1, 1, 1) + torch.linspace(-2, 2, image.shape[3]).view(-1, 1)
        logits: Tensor = Thresholds()(image)
        return logits + slope * torch.tensor([0.0, 3.0, 5.0]).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("axes", "flips"),
    [("", ((),)), ("H", ((), (3,))), ("WD", ((), (2,), (4,), (2, 4)))],
)
def test_every_combination_of_the_axes(axes: str, flips: tuple[tuple[int, ...], ...]) -> None:
    assert flips_of(axes) == flips
    assert len(flips_of("DHW")) == 8


def test_flips_are_undone_and_averaged() -> None:
    """The slopes cancel out along the flipped axes, and only along them."""
    windows = torch.rand(2, 1, 4, 6, 5)
    plain = Thresholds()(windows)
    torch.testing.assert_close(mean_over_flips(Ramp(), flips_of("DHW"))(windows), plain)
    height_left = mean_over_flips(Ramp(), flips_of("D"))(windows) - plain
    expected = torch.linspace(-2, 2, 6).view(-1, 1) * torch.tensor([0.0, 3.0, 5.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(height_left, expected.expand_as(height_left), rtol=1e-5, atol=1e-5)
    half = mean_over_flips(lambda x: Thresholds()(x).bfloat16(), flips_of("H"))(windows)
    assert half.dtype == torch.float32


def test_an_evaluation_averages_over_the_flips(world: World, fp32: Precision) -> None:
    flipped = make_scorer(Ramp(), fp32, windows=replace(SCORING, flips=flips_of("DH")))
    plain = make_scorer(Thresholds(), fp32)
    sloping = make_scorer(Ramp(), fp32)
    expected, found = evaluate(plain, CASES, world), evaluate(flipped, CASES, world)
    assert found.dice == pytest.approx(expected.dice, abs=1e-6)
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    assert evaluate(sloping, CASES, world).dice != pytest.approx(expected.dice, abs=1e-2)


def test_the_flag_reaches_the_windows() -> None:
    config = parse("--test_time_flips", "HW")
    assert make_sliding_window_config(config, KITS19).flips == ((), (3,), (4,), (3, 4))
    assert make_sliding_window_config(parse(), KITS19).flips == ((),)


def test_flips_that_training_never_made_are_noted() -> None:
    def note(axes: str, *augment: str) -> str:
        return untrained_flips(axes, augment, "c.pth")

    assert note("HW", "mlperf(flips='HW')") == ""
    expected = "--test_time_flips D: c.pth was trained without these flips (mlperf(flips='HW'))"
    assert note("DHW", "mlperf(flips='HW')") == expected
    assert note("DHW", "mlperf") == ""
    several = ("torchio:RandomGamma(p=0.3)", "flips(axes='W')", "mlperf(flips='H')")
    assert note("HW", *several) == ""
    assert "--test_time_flips D: c.pth was trained without these flips (torchio" in note("DHW", *several)
    assert "without these flips (no augmentation)" in note("D")
    assert note("DHW", "torchio:RandomFlip(axes=(0, 1))") == ""  # a library's own names of the axes are not read


@pytest.mark.parametrize(
    ("config", "augment"),
    [({}, ["mlperf"]), ({"augment": "flips"}, ["flips"]), ({"augment": ["flips", "rot90"]}, ["flips", "rot90"])],
)
def test_a_checkpoint_names_its_augmentations(config: dict[str, object], augment: list[str]) -> None:
    assert Checkpoint(path=Path("c.pth"), config=config, best={}, last={}).augment == augment
