"""Reorientation: every voxel keeps its position in space, and the inverse is exact."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_loading.io.orientation import common_orientation, orientation_of, reorient, reorientation_to
from data_loading.io.volume import Geometry, Volume
from tests.data_loading.oblique import geometries

ORIENTATIONS = [
    "".join(orientation)
    for sides in itertools.product("RL", "AP", "SI")
    for orientation in itertools.permutations(sides)
]


def volume_of(geometry: Geometry) -> Volume:
    """Returns two channels in which every voxel has a unique value."""
    array = np.arange(2 * np.prod(geometry.shape), dtype=np.float32).reshape(2, *geometry.shape)
    return Volume(array, geometry)


@settings(max_examples=100, deadline=None)
@given(geometries(), st.sampled_from(ORIENTATIONS))
def test_a_scan_gets_the_orientation_and_every_voxel_keeps_its_position(geometry: Geometry, orientation: str) -> None:
    scan = volume_of(geometry)
    change = reorientation_to(geometry.affine, orientation)
    other = reorient(scan, change)
    assert orientation_of(other.geometry.affine) == orientation
    assert other.array.shape[1:] == other.geometry.shape
    steps = np.linalg.norm(other.geometry.affine[:3, :3], axis=0)
    np.testing.assert_allclose(steps, other.geometry.spacing_mm, rtol=1e-6)
    inverse = np.linalg.inv(geometry.affine)
    for index in itertools.product(*((0, size - 1) for size in other.geometry.shape)):
        position = other.geometry.affine @ [*index, 1]
        old = np.rint(inverse @ position).astype(int)[:3]
        np.testing.assert_allclose(geometry.affine @ [*old, 1], position, atol=1e-6)
        assert (other.array[:, *index] == scan.array[:, *old]).all()
    np.testing.assert_array_equal(change.undo(other.array), scan.array)


def test_a_scan_of_that_orientation_is_unchanged() -> None:
    scan = volume_of(Geometry(np.diag([-1.0, 1.0, 2.0, 1.0]), (3, 4, 5), (1.0, 1.0, 2.0)))
    other = reorient(scan, reorientation_to(scan.geometry.affine, "LAS"))
    np.testing.assert_array_equal(other.array, scan.array)
    np.testing.assert_array_equal(other.geometry.affine, scan.geometry.affine)


@pytest.mark.parametrize("orientation", ["RAS", "IPL", "PSR"])
def test_the_result_is_nibabels(orientation: str) -> None:
    scan = volume_of(
        Geometry(np.array([[0.0, 0, -2, 7], [0, 3, 0, -5], [1, 0, 0, 2], [0, 0, 0, 1]]), (3, 4, 5), (1, 3, 2))
    )
    image = nib.Nifti1Image(scan.array[0], scan.geometry.affine)
    change = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(orientation))
    )
    theirs = image.as_reoriented(change)
    ours = reorient(scan, reorientation_to(scan.geometry.affine, orientation))
    np.testing.assert_array_equal(ours.array[0], np.asarray(theirs.dataobj))
    np.testing.assert_allclose(ours.geometry.affine, theirs.affine)


def test_the_common_orientation_is_none_if_they_differ() -> None:
    ras, las = (Geometry(np.diag([side, 1.0, 1.0, 1.0]), (1, 1, 1), (1.0, 1.0, 1.0)) for side in (1.0, -1.0))
    assert common_orientation([ras, ras]) == "RAS"
    assert common_orientation([ras, las]) is None
    assert common_orientation([]) is None


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_reoriented_scan_of_one_slice_has_no_negative_strides(orientation: str) -> None:
    scan = volume_of(Geometry(np.eye(4), (1, 3, 4), (1.0, 1.0, 1.0)))
    other = reorient(scan, reorientation_to(scan.geometry.affine, orientation))
    assert torch.from_numpy(other.array).shape[1:] == other.geometry.shape
    assert orientation_of(other.geometry.affine) == orientation


def test_a_bad_orientation_is_reported_in_one_line() -> None:
    for text in ("RAX", "RA", "RLS", "ras", ""):
        with pytest.raises(UserError, match=f"'{text}' is not an orientation; use three letters such as RAS"):
            reorientation_to(np.eye(4), text)
