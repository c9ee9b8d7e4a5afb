"""Checks of what transforms from outside of this project return, on which a run would otherwise train in silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import UserError
from data_loading.spec import IGNORED

if TYPE_CHECKING:
    from data_loading.transforms import Image, Label, Transform


@dataclass(frozen=True)
class CheckedTransform:
    """A transform whose results are checked.

    Args:
        name: names it in error messages.
        classes: the number of classes.
    """

    name: str
    classes: int
    transform: Transform = field(repr=False)

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        """Applies it and returns contiguous arrays of a sample's types.

        Raises:
            UserError: it returned no pair of arrays of the sample's shapes, or labels that are no classes.
        """
        shapes = image.shape, label.shape
        sample: Any = self.transform.apply(image, label)
        if not (isinstance(sample, tuple) and [type(array) for array in sample] == [np.ndarray, np.ndarray]):
            found = ", ".join(type(part).__name__ for part in (sample if isinstance(sample, tuple) else [sample]))
            raise self._error(f"returned {found or 'nothing'}; expected image and label, as two numpy arrays")
        for before, array in zip(shapes, sample, strict=True):
            if array.shape != before:
                raise self._error(f"turns {before} into {array.shape}; a sample must keep its shape")
        labels = np.ascontiguousarray(sample[1], np.uint8)
        if sample[1].dtype != np.uint8 and not np.array_equal(labels, sample[1]):
            if not np.issubdtype(sample[1].dtype, np.floating):
                raise self._error(f"returned labels from {sample[1].min()} to {sample[1].max()}")
            raise self._error(
                "interpolates between labels; set its interpolation of labels to nearest, or use another transform"
            )
        if int(labels.max()) >= self.classes and (wrong := labels[(labels >= self.classes) & (labels != IGNORED)]).size:
            raise self._error(f"returned label {wrong.max()}, but the highest class is {self.classes - 1}")
        return np.ascontiguousarray(sample[0], np.float32), labels

    def _error(self, problem: str) -> UserError:
        return UserError(f"--augment {self.name}: {problem}")

    def __str__(self) -> str:
        return str(self.transform)


@dataclass(frozen=True)
class RandomCheckedTransform:
    """Draws a `CheckedTransform`."""

    name: str
    classes: int
    draw: Callable[[np.random.Generator], Transform] = field(repr=False)

    def __call__(self, rng: np.random.Generator) -> CheckedTransform:
        drawn = self.draw(rng)
        if not callable(getattr(drawn, "apply", None)):
            raise UserError(f"--augment {self.name}: what it draws ({type(drawn).__name__}) has no method apply")
        return CheckedTransform(self.name, self.classes, drawn)
