"""Transforms of users and libraries: what they return is checked, and given to the loader as a sample."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.registry import Spec
from data_loading.transforms import RandomTransform, make_augmentation

HERE = "tests.data_loading.test_checked_transforms"
CLASSES = 3


class Returning:
    """A user's transform that returns what a function makes of a sample."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.apply = function

    def __str__(self) -> str:
        return "as drawn"


RESULTS: dict[str, Callable[..., Any]] = {
    "kept": lambda image, label: (image, label),
    "wider": lambda image, label: (image.astype(np.float64), label.astype(np.int64)),
    "reversed": lambda image, label: (image[:, :, ::-1], label[:, :, ::-1]),
    "ignored": lambda image, label: (image, np.where(label == 1, np.uint8(255), label)),
    "cut image": lambda image, label: (image[:, 1:], label),
    "cut label": lambda image, label: (image, label[..., :-1]),
    "tensors": lambda image, label: (torch.from_numpy(image), torch.from_numpy(label)),
    "none": lambda image, label: None,
    "one": lambda image, label: image,
    "empty": lambda image, label: (),
    "half": lambda image, label: (image, label * np.float32(0.5)),
    "negative": lambda image, label: (image, label.astype(np.int16) - 1),
    "unknown class": lambda image, label: (image, label + np.uint8(2)),
}


def returning(kind: str) -> RandomTransform:
    return lambda rng: Returning(RESULTS[kind])


def without_apply() -> RandomTransform:
    return lambda rng: 3  # type: ignore[return-value]


def sample() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.integers(0, CLASSES, (1, 3, 4, 5), np.uint8)


def apply(spec: str) -> tuple[np.ndarray, np.ndarray]:
    drawn = make_augmentation([Spec(f"{HERE}:{spec}", trusted=True)], CLASSES)(np.random.default_rng(0))
    assert str(drawn) == "as drawn"
    return drawn.apply(*sample())


@pytest.mark.parametrize("kind", ["kept", "wider", "reversed", "ignored"])
def test_a_sound_result_becomes_a_sample(kind: str) -> None:
    image, label = apply(f"returning(kind={kind!r})")
    assert (image.dtype, label.dtype) == (np.float32, np.uint8)
    assert all(array.flags["C_CONTIGUOUS"] for array in (image, label))
    for array, expected in zip((image, label), RESULTS[kind](*sample()), strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("cut image", "turns (2, 3, 4, 5) into (2, 2, 4, 5); a sample must keep its shape"),
        ("cut label", "turns (1, 3, 4, 5) into (1, 3, 4, 4); a sample must keep its shape"),
        ("tensors", "returned Tensor, Tensor; expected image and label, as two numpy arrays"),
        ("none", "returned NoneType; expected image and label, as two numpy arrays"),
        ("one", "returned ndarray; expected image and label, as two numpy arrays"),
        ("empty", "returned nothing; expected image and label, as two numpy arrays"),
        ("half", "interpolates between labels; set its interpolation of labels to nearest, or use another transform"),
        ("negative", "returned labels from -1 to 1"),
        ("unknown class", "returned label 4, but the highest class is 2"),
    ],
)
def test_a_wrong_result_is_one_line(kind: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"^--augment {HERE}:returning: {re.escape(problem)}"):
        apply(f"returning(kind={kind!r})")


def test_a_draw_without_apply_is_one_line() -> None:
    with pytest.raises(
        UserError, match=rf"^--augment {HERE}:without_apply: what it draws \(int\) has no method apply$"
    ):
        apply("without_apply")
