"""Adapts other libraries' transforms: each runs under a seed drawn from the sample's own generator."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from common.errors import UserError
from data_loading.transforms import Image, Label

# (image, label, seed) -> image, label
Transform = Callable[[Image, Label, int], tuple[Image, Label]]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's own generators start from the seed, and are afterwards what they were.

    The CPU's alone: to seed torch as a whole would reach the GPUs' generators, and nothing here computes on one.
    """
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


@dataclass(frozen=True)
class ForeignDrawn:
    """A transform with the seed of all that it draws."""

    name: str
    seed: int
    transform: Transform = field(repr=False)

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        """Raises UserError where the transform changes the sample's shape, or fails."""
        try:
            with seeded(self.seed):
                changed, mask = self.transform(image, label, self.seed)
        except Exception as error:
            told = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--augment {self.name} of a sample {image.shape}: {told}") from None
        if changed.shape != image.shape or mask.shape != label.shape:
            raise UserError(
                f"--augment {self.name} makes {changed.shape} of {image.shape}: a sample must keep its shape"
            )
        return np.ascontiguousarray(changed, np.float32), np.ascontiguousarray(mask, np.uint8)

    def __str__(self) -> str:
        return f"{self.name} of seed {self.seed}"


@dataclass(frozen=True)
class DrawForeign:
    """Draws the seed."""

    name: str
    transform: Transform = field(repr=False)

    def __call__(self, rng: np.random.Generator) -> ForeignDrawn:
        return ForeignDrawn(self.name, int(rng.integers(2**32)), self.transform)
