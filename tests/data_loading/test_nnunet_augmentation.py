"""`--augment nnunet`: probabilities and ranges, geometry on cases where it is exact, and its place in a loader."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from common.errors import UserError
from common.registry import Spec
from data_loading.transforms import Compose, make_augmentation
from runtime.test_time_flips import untrained_flips

pytest.importorskip("monai")
from data_loading.nnunet_augmentation import IDENTITY, Affine, draw_affine

DRAWS = 2000
NAMES = ["noise", "blur", "brightness", "contrast", "low resolution", "inverse gamma", "gamma"]


def block() -> tuple[np.ndarray, np.ndarray]:
    """An asymmetric block in a cube of 9 voxels: image (1, D, H, W), label (1, D, H, W)."""
    label = np.zeros((1, 9, 9, 9), np.uint8)
    label[0, 2:4, 1:6, 5:8] = 2
    return label.astype(np.float32) / 2, label


def make(spec: str = "nnunet") -> object:
    return make_augmentation([Spec(spec, trusted=True)])


@pytest.mark.parametrize(
    ("angles", "axes"), [((1, 0, 0), (2, 3)), ((0, 1, 0), (1, 3)), ((0, 0, 1), (1, 2))], ids=["D", "H", "W"]
)
@pytest.mark.parametrize("turns", [1, 2])
def test_quarter_turns_are_exact(angles: tuple[int, int, int], axes: tuple[int, int], turns: int) -> None:
    image, label = block()
    d, h, w = (turns * math.pi / 2 * angle for angle in angles)
    moved, mask = Affine((d, h, w), 1.0).apply(image, label)
    either = [np.rot90(label, sign * turns, axes) for sign in (1, -1)]
    assert any(np.array_equal(mask, expected) for expected in either)
    np.testing.assert_allclose(moved, mask / 2, atol=1e-5)
    assert (moved.dtype, mask.dtype) == (np.float32, np.uint8)


def test_a_scale_above_1_makes_structures_smaller() -> None:
    image, label = np.zeros((1, 17, 17, 17), np.float32), np.zeros((1, 17, 17, 17), np.uint8)
    label[0, 4:13, 4:13, 4:13] = 1
    sides = [round(Affine((0, 0, 0), scale).apply(image, label)[1].sum() ** (1 / 3)) for scale in (0.8, 1.0, 1.25)]
    assert sides == [11, 9, 7]  # offsets from the centre below 4.5 / scale


def test_without_rotation_and_scale_the_arrays_are_the_same() -> None:
    image, label = block()
    same = IDENTITY.apply(image, label)
    assert same[0] is image
    assert same[1] is label


def test_rotations_and_scales_are_as_frequent_and_as_large_as_nnunets() -> None:
    rng = np.random.default_rng(3)
    drawn = [draw_affine(30.0, rng) for _ in range(DRAWS)]
    angles = np.array([affine.angles for affine in drawn])
    scales = np.array([affine.scale for affine in drawn])
    margin = 4 * math.sqrt(0.2 * 0.8 / DRAWS)
    is_rotated, is_scaled = angles.any(axis=1), scales != 1
    assert abs(is_rotated.mean() - 0.2) < margin
    assert abs(is_scaled.mean() - 0.2) < margin
    assert abs((is_rotated & is_scaled).mean() - 0.04) < margin
    assert 0.95 * math.radians(30) < np.abs(angles).max() <= math.radians(30)
    assert 0.7 <= scales.min() < 0.72
    assert 1.38 < scales.max() <= 1.4


def test_image_and_label_turn_together_and_only_the_image_changes_its_values() -> None:
    augmentation, (image, label) = make(), (array.repeat(3, 1).repeat(3, 2).repeat(3, 3) for array in block())
    overlaps = []
    for seed in range(60):
        changed, mask = augmentation(np.random.default_rng(seed)).apply(image.copy(), label.copy())  # type: ignore[operator]
        assert changed.shape == image.shape
        assert set(np.unique(mask)) <= {0, 2}
        overlaps.append(np.corrcoef(changed.ravel(), mask.ravel())[0, 1])
    assert min(overlaps) > 0.6
    assert np.std(overlaps) > 0.01


def test_each_channel_keeps_its_own_statistics() -> None:
    """Each channel of two is changed as if it were alone, wherever a step depends on more than a voxel's value."""
    rng = np.random.default_rng(0)
    image, label = rng.normal(size=(2, 6, 6, 6)) * 0.5 + np.array([2, -2]).reshape(2, 1, 1, 1), np.zeros((1, 6, 6, 6))
    image, label = image.astype(np.float32), label.astype(np.uint8)
    changed = 0
    for draw in make().transforms:  # type: ignore[attr-defined]
        if getattr(draw, "name", "") in ("contrast", "inverse gamma", "gamma"):
            for seed in range(60):
                together = draw(np.random.default_rng(seed)).apply(image, label)[0]
                alone = [draw(np.random.default_rng(seed)).apply(channel[None], label)[0] for channel in image]
                np.testing.assert_array_equal(together, np.concatenate(alone))
                changed += not np.array_equal(together, image)
    assert changed > 15


def test_every_step_is_drawn_from_the_samples_generator() -> None:
    augmentation = make()
    drawn = augmentation(np.random.default_rng(1))  # type: ignore[operator]
    assert isinstance(drawn, Compose)
    assert [str(step).partition(" with seed")[0] for step in drawn.transforms[1:-1]] == NAMES
    first, again, other = (
        augmentation(np.random.default_rng(seed)).apply(*block())[0]  # type: ignore[operator]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    copy = pickle.loads(pickle.dumps(augmentation))  # for loader processes that are not forked
    np.testing.assert_array_equal(copy(np.random.default_rng(1)).apply(*block())[0], first)


def test_axes_that_must_not_be_flipped() -> None:
    augmentation = make("nnunet(flip_axes='H', rotation=0)")
    flips = [augmentation(np.random.default_rng(seed)).transforms[-1].flips for seed in range(40)]  # type: ignore[operator]
    assert {(d, w) for d, _, w in flips} == {(False, False)}
    assert {h for _, h, _ in flips} == {True, False}
    assert untrained_flips("H", ["nnunet(flip_axes='H')"], "c.pth") == ""
    assert "--test_time_flips D:" in untrained_flips("DH", ["nnunet(flip_axes='H')"], "c.pth")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nnunet(flip_axes='X')", "nnunet(flip_axes=…): 'X', expected axes of 'DHW'"),
        ("nnunet(rotation=200)", "nnunet(rotation=200): expected an angle of at most 180"),
        ("nnunet(rotation='a')", "nnunet(rotation='a'): expected an angle of at most 180"),
    ],
)
def test_wrong_arguments(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make(spec)
    assert message in str(caught.value)
