"""Distances between surfaces, by closed form and as MONAI computes them on perpendicular grids."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from runtime.surface_distance import surface_figures, surface_points


def block(*slices: slice, shape: tuple[int, int, int] = (10, 20, 20)) -> NDArray[np.bool_]:
    mask = np.zeros(shape, bool)
    mask[slices] = True
    return mask


def test_the_surface_of_a_block_is_its_outer_voxels() -> None:
    points = surface_points(block(slice(0, 4), slice(5, 9), slice(16, 20)), np.diag([2.0, 1.0, 0.5]))
    assert len(points) == 4**3 - 2**3
    np.testing.assert_array_equal(points.min(axis=0), [0, 5, 8])
    np.testing.assert_array_equal(points.max(axis=0), [6, 8, 9.5])


def test_an_image_has_an_outline() -> None:
    for axis in range(3):
        mask = np.moveaxis(block(slice(0, 1), slice(5, 9), slice(0, 4), shape=(1, 20, 20)), 0, axis)
        assert len(surface_points(mask, np.eye(3))) == 4**2 - 2**2


@pytest.mark.parametrize("move", [(0, 0, 3), (0, 2, 3), (1, -1, 1), (0, 0, 0), (0, 1, 0)])
def test_a_movement_is_measured_along_the_sheared_axes(move: tuple[int, int, int]) -> None:
    steps_mm = np.array([[2.0, 0, 0], [0, 1.0, -0.75], [0, 0, 1.0]])  # the third axis is 1.25 mm long
    masks = [np.zeros((10, 20, 20), bool) for _ in range(2)]
    masks[0][5, 9, 8] = masks[1][tuple(np.add((5, 9, 8), move))] = True
    d, h, w = move
    expected = math.hypot(2 * d, h - 0.75 * w, w)
    dice, distance_mm = surface_figures(*masks, steps_mm)
    assert distance_mm == pytest.approx(expected)
    assert dice == (expected <= 1)  # at exactly 1 mm, surfaces agree


@pytest.mark.parametrize("seed", range(4))
def test_perpendicular_grids_give_monais_figures(seed: int) -> None:
    pytest.importorskip("monai", reason="pip install '.[monai]'")
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice

    rng = np.random.default_rng(seed)
    spacing = rng.uniform(0.5, 2, 3)
    masks = [rng.random((9, 10, 11)) < share for share in (0.3, 0.02)]
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    dice, distance_mm = surface_figures(*masks, rotation @ np.diag(spacing))
    tensors = [torch.from_numpy(mask).float()[None, None] for mask in masks]
    with warnings.catch_warnings(action="ignore"):
        expected = compute_surface_dice(*tensors, [1.0], include_background=True, spacing=tuple(spacing))
        farthest = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=tuple(spacing))
    assert dice == pytest.approx(float(expected), abs=1e-6)
    assert distance_mm == pytest.approx(float(farthest), rel=1e-5)


def test_empty_masks_have_no_distance() -> None:
    empty, full = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    assert np.isnan(surface_figures(empty, empty, np.eye(3))).all()
    dice, distance_mm = surface_figures(empty, full, np.eye(3))
    assert dice == 0
    assert math.isnan(distance_mm)
