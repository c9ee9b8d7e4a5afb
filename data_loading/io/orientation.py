"""Orientation of a scan's axes in the patient, and lossless reorientation by permuting and flipping axes.

An orientation is NIfTI's three letters: "RAS" if the axes run to the patient's right, anterior and superior side.
Nothing is interpolated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from data_loading.io.volume import Geometry, Volume, check_same_geometry, is_same_position

# An orientation has one letter of each pair.
DIRECTIONS = ("RL", "AP", "SI")


@dataclass(frozen=True)
class Reorientation:
    """A permutation of the three axes, followed by flips.

    Attributes:
        axes: for each new axis, the old axis that it comes from.
        flipped: for each new axis, whether its voxels are in reverse order.
    """

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """Returns a view of (C, D, H, W) with the new axes."""
        return self._flip(array.transpose(0, *(axis + 1 for axis in self.axes)))

    def undo(self, array: NDArray[Any]) -> NDArray[Any]:
        """Returns a view with the old axes: the inverse of `apply`."""
        return self._flip(array).transpose(0, *(self.axes.index(axis) + 1 for axis in range(3)))

    def _flip(self, array: NDArray[Any]) -> NDArray[Any]:
        # An axis of one voxel is not flipped: the result would be the same with a negative stride, which torch rejects
        # and np.ascontiguousarray does not remove.
        axes = tuple(axis for axis, flip in enumerate(self.flipped, start=1) if flip and array.shape[axis] > 1)
        return np.flip(array, axes)


def is_orientation(text: str) -> bool:
    """Returns whether the text is an orientation such as "RAS"."""
    return len(text) == 3 and all(sum(letter in pair for letter in text) == 1 for pair in DIRECTIONS)


def orientation_of(affine: NDArray[np.float64]) -> str:
    """Returns the orientation of a scan with this (4, 4) affine, for an oblique scan the nearest one."""
    return "".join(nib.aff2axcodes(affine))


def common_orientation(geometries: Iterable[Geometry]) -> str | None:
    """Returns the orientation that all geometries share; None if they differ or there are none."""
    found = {orientation_of(geometry.affine) for geometry in geometries}
    return found.pop() if len(found) == 1 else None


def reorientation_to(affine: NDArray[np.float64], orientation: str) -> Reorientation:
    """Returns the reorientation of a scan with this (4, 4) affine to an orientation.

    Raises:
        UserError: `orientation` is not an orientation.
    """
    if not is_orientation(orientation):
        raise UserError(f"{orientation!r} is not an orientation; use three letters such as RAS: R or L, A or P, S or I")
    old = nib.io_orientation(affine)
    change = nib.orientations.ornt_transform(old, nib.orientations.axcodes2ornt(tuple(orientation)))
    # `change` holds (new axis, sign) for each old axis.
    old_of = {int(new): (old, sign < 0) for old, (new, sign) in enumerate(change)}
    (a, flip_a), (b, flip_b), (c, flip_c) = (old_of[axis] for axis in range(3))
    return Reorientation((a, b, c), (flip_a, flip_b, flip_c))


def reorient(volume: Volume, change: Reorientation) -> Volume:
    """Returns the volume with new axes. Each voxel keeps its position in space; `change.undo` restores the array."""
    array = np.ascontiguousarray(change.apply(volume.array))
    return Volume(array, reorient_geometry(volume.geometry, change), volume.notes)


def reorient_geometry(source: Geometry, change: Reorientation) -> Geometry:
    """Returns the geometry of a reoriented scan."""
    affine = source.affine.copy()
    for new, (old, flip) in enumerate(zip(change.axes, change.flipped, strict=True)):
        step = source.affine[:3, old]
        affine[:3, new] = -step if flip else step
        if flip:  # the new axis begins where the old one ends
            affine[:3, 3] += (source.shape[old] - 1) * step
    a, b, c = change.axes
    shape = (source.shape[a], source.shape[b], source.shape[c])
    spacing_mm = (source.spacing_mm[a], source.spacing_mm[b], source.spacing_mm[c])
    return Geometry(affine, shape, spacing_mm)


def same_grid(one: Geometry, other: Geometry) -> bool:
    """Returns whether two grids have the same voxels in the same positions, whatever the orientation of their axes."""
    if one.shape == other.shape and is_same_position(one, other):  # also where an oblique grid has no nearest axes
        return True
    other = reorient_geometry(other, reorientation_to(other.affine, orientation_of(one.affine)))
    return one.shape == other.shape and is_same_position(one, other)


def to_grid(mask: Volume, geometry: Geometry, case: str) -> Volume:
    """Returns a mask with its axes reoriented to those of its scan's geometry.

    Raises:
        UserError: its voxels are not those of the scan, or it has several channels.
    """
    if mask.array.shape[0] != 1:
        raise UserError(f"{case}: its mask has {mask.array.shape[0]} channels, expected 1")
    array, own = mask.array, mask.geometry
    if own.shape != geometry.shape or not is_same_position(geometry, own):
        change = reorientation_to(own.affine, orientation_of(geometry.affine))
        check_same_geometry(geometry, reorient_geometry(own, change), case)
        array = np.ascontiguousarray(change.apply(array))
    return Volume(array, geometry, mask.notes)
