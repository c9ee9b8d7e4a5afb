"""Values of masks: found without missing a rare one, and distinguished from those that interpolation made."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from common.errors import UserError
from data_loading.io import mask_values
from data_loading.io.mask_values import check_not_interpolated, find_values, merged


def ball(values: tuple[int, ...], radii: tuple[float, ...], size: int = 24) -> NDArray[np.int32]:
    """Returns a mask (1, D, H, W) of balls around the centre, the first one outermost."""
    distance = np.linalg.norm(np.indices((size, size, size)) - (size - 1) / 2, axis=0)
    mask = np.zeros((1, size, size, size), np.int32)
    for value, radius in zip(values, radii, strict=True):
        mask[0, distance < radius] = value
    return mask


def interpolated(mask: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.rint(ndimage.zoom(mask[0].astype(float), 0.6, order=1)).astype(np.int32)[np.newaxis]


@pytest.mark.parametrize("mask", [ball((10,), (8,)), ball((255,), (8,)), ball((-7, 9), (9, 4))])
def test_interpolated_values_are_refused(mask: NDArray[np.int32]) -> None:
    check_not_interpolated(find_values(mask), "masks")
    with pytest.raises(UserError, match=r"masks: value .* lies only between lower and higher values, .* --labels -?\d"):
        check_not_interpolated(find_values(interpolated(mask)), "masks")


@pytest.mark.parametrize(
    "mask",
    [
        ball((2, 1), (8, 4)),  # a core whose value is below its shell's
        ball((1, 2), (9, 5)),  # a shell of some voxels between background and core, as heart muscle
        ball((1, 4, 2), (9, 6, 3)),
        ball((5,), (1.5,)),
        np.zeros((1, 4, 4, 4), np.int32),
    ],
)
def test_structures_are_not_taken_for_interpolation(mask: NDArray[np.int32]) -> None:
    check_not_interpolated(find_values(mask), "masks")


@pytest.mark.parametrize("far", [300, -2, 2**31 - 1, -(2**31)])
def test_a_rare_value_is_found(monkeypatch: pytest.MonkeyPatch, far: int) -> None:
    monkeypatch.setattr(mask_values, "SAMPLES", 100)
    mask = ball((3,), (9,))
    mask[0, 0, 0, 0] = far
    found = find_values(mask)
    assert sorted(found) == sorted({0, 3, far})
    assert 100 <= found[3][0] < 200
    total = merged([found, {3: (1, 1), 8: (2, 0)}])
    assert (total[3][0], total[8]) == (found[3][0] + 1, (2, 0))


def test_a_value_is_interpolated_if_it_was_seen_often_and_almost_always_between_others() -> None:
    for looked_at, between in ((19, 19), (20, 19), (100, 95), (0, 0)):
        check_not_interpolated({3: (50, 0), 7: (looked_at, between)}, "masks")
    for looked_at, between in ((20, 20), (100, 96)):
        with pytest.raises(UserError, match="value 7 lies only between"):
            check_not_interpolated({3: (50, 0), 7: (looked_at, between)}, "masks")
