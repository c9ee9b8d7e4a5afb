"""Augmentations by short name beside the reference's: flips and quarter turns.

--augment 'flips(p=0.5, axes="HW")' rot90
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from data_loading.transforms import AXES, Augmentation, Image, Label, RandomTransform, check_axes


def check_probability(p: float, who: str) -> None:
    """Raises UserError for what is no probability."""
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise UserError(f"--augment {who}: {p!r} is not a probability")


def flips(p: float = 0.5, axes: str = AXES) -> RandomTransform:
    """Flips each of the axes with probability p, independently.

    Raises:
        UserError: no probability, or anything but a part of "DHW".
    """
    check_probability(p, "flips(p=…)")
    check_axes(axes, "flips(axes=…)")
    return partial(_draw_flips, p, axes)


@dataclass(frozen=True)
class Flips:
    """Which of the axes D, H and W are flipped."""

    flips: tuple[bool, bool, bool]

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        return Augmentation(self.flips).apply(image, label)

    def __str__(self) -> str:
        return f"flips {''.join(axis for axis, flip in zip(AXES, self.flips, strict=True) if flip) or 'none'}"


def _draw_flips(p: float, axes: str, rng: np.random.Generator) -> Flips:
    d, h, w = (bool(drawn) and axis in axes for drawn, axis in zip(rng.random(3) < p, AXES, strict=True))
    return Flips((d, h, w))


def rot90(p: float = 0.5, axes: str = "HW") -> RandomTransform:
    """With probability p a turn by 90, 180 or 270 degrees, each as likely, in the plane of two axes.

    A patch that is no square in that plane is turned by 180 degrees alone, since its shape must stay.

    Raises:
        UserError: no probability, or anything but two of "DHW".
    """
    check_probability(p, "rot90(p=…)")
    check_axes(axes, "rot90(axes=…)")
    if len(axes) != 2:
        raise UserError(f"--augment rot90(axes={axes!r}): expected the plane's two axes, such as 'HW'")
    return partial(_draw_turn, p, (AXES.index(axes[0]) + 1, AXES.index(axes[1]) + 1))


@dataclass(frozen=True)
class QuarterTurns:
    """So many turns by 90 degrees in the plane of two of the axes 1 to 3."""

    turns: int
    plane: tuple[int, int]

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        """Turns both; by 180 degrees where a side is longer than the other."""
        is_square = image.shape[self.plane[0]] == image.shape[self.plane[1]]
        turns = self.turns if is_square or not self.turns else 2
        return _turned(image, turns, self.plane), _turned(label, turns, self.plane)

    def __str__(self) -> str:
        return f"{self.turns} quarter turns"


def _turned(array: NDArray[Any], turns: int, plane: tuple[int, int]) -> NDArray[Any]:
    return np.ascontiguousarray(np.rot90(array, turns, plane)) if turns else array


def _draw_turn(p: float, plane: tuple[int, int], rng: np.random.Generator) -> QuarterTurns:
    turns = int(rng.integers(1, 4))
    return QuarterTurns(turns if rng.random() < p else 0, plane)
