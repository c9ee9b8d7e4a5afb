"""The reference recipe's crop and augmentation: how often, how much, and where."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_loading.preprocessing import Box, Boxes, Shape
from data_loading.transforms import MLPerfAugmentation, draw_augmentation, draw_crop, make_augmentation

DRAWS = 20_000


def within(hits: float, probability: float, draws: int = DRAWS) -> bool:
    """Whether a count is no further than 4 standard deviations of the binomial from what is expected."""
    return abs(hits - draws * probability) <= 4 * sqrt(draws * probability * (1 - probability))


@pytest.fixture(scope="module")
def drawn() -> list[MLPerfAugmentation]:
    rng = np.random.default_rng(0)
    return [draw_augmentation(rng) for _ in range(DRAWS)]


def test_every_axis_is_flipped_one_time_in_three_on_its_own(drawn: list[MLPerfAugmentation]) -> None:
    counts = Counter(one.flips for one in drawn)
    assert len(counts) == 8
    for flips, hits in counts.items():
        probability = np.prod([1 / 3 if flip else 2 / 3 for flip in flips])
        assert within(hits, float(probability)), flips


@pytest.mark.parametrize("axes", ["", "D", "HW", "WD"])
def test_flips_may_be_kept_to_some_axes_without_another_draw(axes: str, drawn: list[MLPerfAugmentation]) -> None:
    draw = make_augmentation([f"mlperf(flips={axes!r})"])
    rng = np.random.default_rng(0)
    for everywhere in drawn[:200]:
        kept = tuple(flip and axis in axes for flip, axis in zip(everywhere.flips, "DHW", strict=True))
        assert draw(rng) == replace(everywhere, flips=kept)


def test_the_augmentations_default_is_the_references(drawn: list[MLPerfAugmentation]) -> None:
    draw, rng = make_augmentation(["mlperf"]), np.random.default_rng(0)
    assert [draw(rng) for _ in range(200)] == drawn[:200]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mlperf(flips='X')", "axes of 'DHW'"),
        ("mlperf(flips='DD')", "axes of 'DHW'"),
        ("mlperf(flips=3)", "axes of 'DHW'"),
        ("mlperf(noise=0)", "unknown argument 'noise'"),
        ("elastic", "unknown name; available: flips, mlperf, nnunet, rot90"),
    ],
)
def test_an_augmentation_that_does_not_exist(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_augmentation([spec])


def test_brightness_is_1_7_to_2_3_one_time_in_ten(drawn: list[MLPerfAugmentation]) -> None:
    factors = np.array([one.factor for one in drawn if one.factor != 1.0])
    assert within(len(factors), 0.1)
    assert 1.7 <= factors.min() < 1.71
    assert 2.29 < factors.max() <= 2.3
    for quarter in np.histogram(factors, 4, (1.7, 2.3))[0]:
        assert within(quarter, 0.25, len(factors))


def test_noise_is_0_to_0_1_one_time_in_ten(drawn: list[MLPerfAugmentation]) -> None:
    deviations = np.array([one.noise_std for one in drawn if one.noise_std != 0.0])
    assert within(len(deviations), 0.1)
    assert 0 < deviations.min() < 0.001
    assert 0.099 < deviations.max() <= 0.1
    for quarter in np.histogram(deviations, 4, (0, 0.1))[0]:
        assert within(quarter, 0.25, len(deviations))
    assert len({one.noise_seed for one in drawn}) == DRAWS


def test_brightness_noise_and_flips_are_drawn_apart(drawn: list[MLPerfAugmentation]) -> None:
    assert within(sum(one.factor != 1 and one.noise_std != 0 for one in drawn), 0.01)
    assert within(sum(one.factor != 1 and one.flips[0] for one in drawn), 0.1 / 3)


def sample() -> tuple[np.ndarray, np.ndarray]:
    """An image (2, 3, 4, 5) that names every voxel, and a label (1, 3, 4, 5) that says the same."""
    index = np.arange(3 * 4 * 5, dtype=np.float32).reshape(1, 3, 4, 5)
    return np.concatenate([index, -index]), index.astype(np.uint8)


@pytest.mark.parametrize("axes", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_flips_turn_image_and_label_together(axes: tuple[int, ...]) -> None:
    image, label = sample()
    flipped = MLPerfAugmentation((0 in axes, 1 in axes, 2 in axes)).apply(image.copy(), label.copy())
    window = tuple(slice(None, None, -1 if axis in axes else 1) for axis in range(3))
    for before, after in zip((image, label), flipped, strict=True):
        np.testing.assert_array_equal(after, before[:, *window])
        assert (after.dtype, after.flags.c_contiguous) == (before.dtype, True)


def test_the_factor_is_for_the_image_alone() -> None:
    image, label = sample()
    brighter, same = MLPerfAugmentation((False,) * 3, factor=1.9).apply(image.copy(), label.copy())
    np.testing.assert_array_equal(brighter, image * np.float32(1.9))
    np.testing.assert_array_equal(same, label)
    assert brighter.dtype == np.float32


def test_the_noise_is_for_the_image_alone_and_comes_after_the_factor() -> None:
    image, label = np.full((1, 40, 40, 40), 3, np.float32), np.ones((1, 40, 40, 40), np.uint8)
    noisy, same = MLPerfAugmentation((True,) * 3, 2.0, 0.08, 7).apply(image.copy(), label.copy())
    added = noisy - 6
    assert noisy.dtype == np.float32
    assert abs(added.mean()) < 4 * 0.08 / sqrt(added.size)
    assert abs(added.std() / 0.08 - 1) < 0.02
    assert abs(np.corrcoef(added[0, :-1].ravel(), added[0, 1:].ravel())[0, 1]) < 0.02
    np.testing.assert_array_equal(same, label)
    again, _ = MLPerfAugmentation((True,) * 3, 2.0, 0.08, 7).apply(image.copy(), label.copy())
    np.testing.assert_array_equal(noisy, again)
    other, _ = MLPerfAugmentation((True,) * 3, 2.0, 0.08, 8).apply(image.copy(), label.copy())
    assert (noisy != other).any()


def test_nothing_drawn_changes_nothing() -> None:
    image, label = sample()
    same = MLPerfAugmentation((False, False, False)).apply(image.copy(), label.copy())
    np.testing.assert_array_equal(same[0], image)
    np.testing.assert_array_equal(same[1], label)


def starts(
    shape: Shape,
    patch: Shape,
    boxes: Boxes,
    oversampling: float,
    draws: int = 6000,
    class_weights: tuple[float, ...] = (),
) -> np.ndarray:
    """Crop starts of many draws, (draws, 3)."""
    rng = np.random.default_rng(1)
    settings = {"boxes": boxes, "oversampling": oversampling, "class_weights": class_weights}
    return np.array([draw_crop(rng, shape=shape, patch=patch, **settings) for _ in range(draws)])


def test_a_uniform_crop_starts_anywhere_but_at_the_last_offset() -> None:
    drawn = starts((12, 9, 8), (8, 8, 8), {}, 0.4)
    # Offsets 0 to 4 would fit; the reference draws from [0, size - patch).
    for offset in range(4):
        assert within((drawn[:, 0] == offset).sum(), 0.25, len(drawn))
    assert drawn[:, 0].max() == 3
    assert not drawn[:, 1:].any()


def test_axes_are_drawn_apart() -> None:
    drawn = starts((10, 10, 10), (8, 8, 8), {}, 0.0)
    assert len(Counter(map(tuple, drawn.tolist()))) == 8
    assert all(within(hits, 1 / 8, len(drawn)) for hits in Counter(map(tuple, drawn.tolist())).values())


@pytest.mark.parametrize("oversampling", [0.0, 0.4, 0.75, 1.0])
def test_oversampling_is_the_share_of_foreground_crops(oversampling: float) -> None:
    # Around a box in the very corner every crop ends at the volume's end, where no uniform one starts.
    drawn = starts((40, 40, 40), (8, 8, 8), {1: [(39, 39, 39, 40, 40, 40)]}, oversampling)
    foreground = (drawn == 32).all(axis=1).sum()
    assert within(foreground, oversampling, len(drawn))
    assert (drawn[:, 0] == 32).sum() == foreground


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (50, 54, {47: 1 / 4, 48: 1 / 4, 49: 1 / 4, 50: 1 / 4}),  # grown by 0 to 3 of 4 below, never by 4
        (20, 32, {20: 1 / 4, 21: 1 / 4, 22: 1 / 4, 23: 1 / 4}),  # shrunk by 0 to 3 of 4 below
        (30, 38, {30: 1.0}),
        (1, 5, {0: 3 / 4, 1: 1 / 4}),  # clamped, and extended at the other end
        (98, 100, {92: 1.0}),
        (93, 97, {90: 1 / 4, 91: 1 / 4, 92: 1 / 2}),
        (0, 100, dict.fromkeys(range(92), 1 / 92)),
    ],
)
def test_a_foreground_crop_is_its_box_grown_or_shrunk_by_chance(
    low: int, high: int, expected: dict[int, float]
) -> None:
    for axis in range(3):
        box = [10, 10, 10, 18, 18, 18]
        box[axis], box[axis + 3] = low, high
        boxes: Boxes = {2: [(box[0], box[1], box[2], box[3], box[4], box[5])]}
        drawn = starts((100, 100, 100), (8, 8, 8), boxes, 1.0, draws=4000)
        counts = Counter(drawn[:, axis].tolist())
        assert set(counts) == set(expected)
        assert all(within(counts[start], probability, 4000) for start, probability in expected.items())
        assert (np.delete(drawn, axis, axis=1) == 10).all()


def corner(start: int) -> Box:
    return start, start, start, start + 8, start + 8, start + 8


def test_classes_are_drawn_alike_and_then_their_components() -> None:
    drawn = starts((64, 64, 64), (8, 8, 8), {1: [corner(4), corner(20)], 2: [corner(40)]}, 1.0)
    for start, probability in ((4, 1 / 4), (20, 1 / 4), (40, 1 / 2)):
        assert within((drawn[:, 0] == start).sum(), probability, len(drawn))
    assert (drawn == drawn[:, :1]).all()


@pytest.mark.parametrize(
    ("weights", "shares"),
    [((1.0, 3.0, 9.0), (1 / 4, 3 / 4)), ((0.0, 0.2, 1.0), (0.0, 1.0)), ((5.0, 5.0, 0.0), (1 / 2, 1 / 2))],
)
def test_classes_are_drawn_by_their_weights_among_those_in_the_case(
    weights: tuple[float, ...], shares: tuple[float, float]
) -> None:
    boxes = {1: [corner(4)], 2: [corner(40)]}
    drawn = starts((64, 64, 64), (8, 8, 8), boxes, 1.0, class_weights=weights)
    for start, share in zip((4, 40), shares, strict=True):
        assert within((drawn[:, 0] == start).sum(), share, len(drawn))


def test_a_case_with_no_class_that_weighs_anything_is_cropped_uniformly() -> None:
    drawn = starts((12, 9, 8), (8, 8, 8), {1: [corner(0)]}, 1.0, draws=500, class_weights=(0.0, 1.0))
    np.testing.assert_array_equal(drawn.max(axis=0), [3, 0, 0])


def test_without_foreground_every_crop_is_uniform() -> None:
    np.testing.assert_array_equal(starts((12, 9, 8), (8, 8, 8), {}, 1.0, draws=500).max(axis=0), [3, 0, 0])


def test_a_crop_follows_from_its_generator() -> None:
    boxes: Boxes = {1: [corner(4)], 2: [corner(20)]}
    np.testing.assert_array_equal(starts((64,) * 3, (8,) * 3, boxes, 0.4), starts((64,) * 3, (8,) * 3, boxes, 0.4))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32), oversampling=st.sampled_from([0.0, 0.4, 1.0]))
def test_any_crop_lies_inside_and_a_foreground_crop_meets_its_box(
    data: st.DataObject, seed: int, oversampling: float
) -> None:
    shape, patch, box = [], [], []
    for _ in range(3):
        size = data.draw(st.integers(1, 30))
        patch.append(data.draw(st.integers(1, size)))
        low = data.draw(st.integers(0, size - 1))
        box.append((low, data.draw(st.integers(low + 1, size))))
        shape.append(size)
    (d0, d1), (h0, h1), (w0, w1) = box
    boxes: Boxes = {1: [(d0, h0, w0, d1, h1, w1)]}
    start = draw_crop(
        np.random.default_rng(seed), shape=tuple(shape), patch=tuple(patch), boxes=boxes, oversampling=oversampling
    )  # type: ignore[arg-type]
    for first, length, size, (low, high) in zip(start, patch, shape, box, strict=True):
        assert 0 <= first <= size - length
        if oversampling == 1.0:
            # Of the crop and the box the smaller lies in the larger.
            inner, outer = sorted([(first, first + length), (low, high)], key=lambda span: span[1] - span[0])
            assert outer[0] <= inner[0] < inner[1] <= outer[1]


def test_a_picture_may_be_flipped_along_its_single_slice() -> None:
    image = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)
    flipped, label = MLPerfAugmentation((True, False, True)).apply(image.copy(), image.astype(np.uint8))
    np.testing.assert_array_equal(torch.from_numpy(flipped), image[..., ::-1])
    np.testing.assert_array_equal(torch.from_numpy(label), image[..., ::-1])
