"""Planes of a scan's own grid, made from slabs of the network's grid: against PyTorch's resampling of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loading.io.volume import Geometry
from data_loading.preprocessing import GridTransform, Shape
from data_loading.source_grid import SourceGrid
from tests.data_loading.source_grid import to_source_grid

shapes = st.tuples(*[st.integers(1, 9)] * 3)


def transform_between(source: Shape, resampled: Shape, before: Shape = (0, 0, 0), **parts: object) -> GridTransform:
    return GridTransform(
        source=Geometry(np.eye(4), source, (1.0, 1.0, 1.0)),
        resampled_shape=resampled,
        padding_before=before,
        shape=resampled,
        **parts,  # type: ignore[arg-type]
    )


@settings(max_examples=150, deadline=None)
@given(
    source=shapes,
    resampled=shapes,
    before=st.tuples(*[st.integers(0, 3)] * 3),
    behind=st.tuples(*[st.integers(0, 3)] * 3),
    depths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)
def test_planes_are_those_of_the_whole_volume_resampled(
    source: Shape, resampled: Shape, before: Shape, behind: Shape, depths: list[int]
) -> None:
    shape = [sum(sizes) for sizes in zip(before, resampled, behind, strict=True)]
    array = np.random.default_rng(sum(shape)).random((3, *shape)).astype(np.float32)
    inside = array[:, *(slice(n, n + size) for n, size in zip(before, resampled, strict=True))]
    expected = F.interpolate(torch.from_numpy(inside)[None], source, mode="trilinear", align_corners=True)[0].numpy()
    found = to_source_grid(array, transform_between(source, resampled, before), depths)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize(("received", "made"), [(7, 200), (200, 7), (33, 100), (100, 33), (11, 501)])
def test_the_last_plane_is_made_whatever_the_rounding(received: int, made: int) -> None:
    array = np.linspace(0, 1, received, dtype=np.float32).reshape(1, -1, 1, 1)
    found = to_source_grid(array, transform_between((made, 1, 1), (received, 1, 1)))
    np.testing.assert_allclose(found.ravel(), np.linspace(0, 1, made), atol=1e-6)


def test_pictures_are_resized_with_their_pixels_edges_fixed() -> None:
    array = np.random.default_rng(0).random((2, 3, 8, 6)).astype(np.float32)
    expected = F.interpolate(
        torch.from_numpy(array), (5, 9), mode="bilinear", align_corners=False, antialias=True
    ).numpy()
    found = to_source_grid(array, transform_between((3, 5, 9), (3, 8, 6), half_pixel=True))
    np.testing.assert_array_equal(found, expected)


def test_a_plane_is_made_as_soon_as_those_beside_it_are_there() -> None:
    grid = SourceGrid(transform_between((9, 2, 2), (5, 2, 2), before=(1, 0, 0)))
    made = []
    for _ in range(7):
        grid.add(torch.rand(2, 1, 2, 2))
        made.append(grid._made)
    assert made == [0, 1, 3, 5, 7, 9, 9]


def test_of_equal_classes_the_first_wins() -> None:
    grid = SourceGrid(transform_between((4, 3, 2), (4, 3, 2)))
    grid.add(torch.full((3, 4, 3, 2), 0.5))
    assert not grid.mask().any()
