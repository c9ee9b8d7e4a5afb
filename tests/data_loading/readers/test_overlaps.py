"""Voxels that two classes claim: who gets them does not depend on the order or the names of the masks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from data_loading.readers.overlaps import ClassMerger

NAMES = ("background", "a", "b", "c")
SHAPE = (6, 5, 4)


def random_masks() -> list[np.ndarray]:
    """Three overlapping masks of different sizes, of classes 1, 2 and 3; the second is the largest."""
    rng = np.random.default_rng(0)
    return [value * (rng.random(SHAPE) < share).astype("u1") for value, share in ((1, 0.3), (2, 0.6), (3, 0.4))]


@pytest.mark.parametrize(("by_size", "order"), [(False, (1, 2, 3)), (True, (2, 3, 1))])
@pytest.mark.parametrize("by_slice", [False, True])
def test_the_order_of_masks_changes_nothing(by_size: bool, order: tuple[int, ...], by_slice: bool) -> None:
    """Compared with painting the masks one over the other, the one that wins last."""
    masks = random_masks()
    expected = np.zeros(SHAPE, np.uint8)
    for value in order:
        expected[masks[value - 1] > 0] = value
    for shuffled in itertools.permutations(masks):
        merger = ClassMerger(SHAPE, by_size)
        for mask in shuffled:
            if by_slice:
                for index in range(SHAPE[2]):
                    merger.add(mask[:, :, index], index)
            else:
                merger.add(mask)
        lines = merger.finish(NAMES)
        np.testing.assert_array_equal(merger.classes, expected)
        claims = np.sum([mask > 0 for mask in masks], axis=0)
        assert sum(int(line.split()[0]) for line in lines) == (claims - 1).clip(0).sum()


def test_each_pair_is_counted_and_the_remedy_named() -> None:
    one, two = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    one[:3], two[2:] = 1, 2
    merger = ClassMerger(SHAPE, by_size=True)
    merger.add(two)
    merger.add(one)
    assert merger.finish(NAMES) == [
        "20 voxels in both a and b became a, as it has fewer voxels (--labels with b numbered above a chooses b)"
    ]
    np.testing.assert_array_equal(merger.classes[2], np.ones((5, 4)))


def test_of_two_of_one_size_the_later_wins() -> None:
    merger = ClassMerger(SHAPE, by_size=True)
    for value in (2, 1):
        merger.add(np.full(SHAPE, value, np.uint8))
    assert merger.finish(NAMES) == [
        "120 voxels in both b and a became b, the later of two of one size (--labels with a numbered above b chooses a)"
    ]


def test_masks_of_one_class_do_not_overlap() -> None:
    merger = ClassMerger(SHAPE, by_size=False)
    for _ in range(2):
        merger.add(np.ones(SHAPE, np.uint8))
    assert merger.finish(NAMES) == []
