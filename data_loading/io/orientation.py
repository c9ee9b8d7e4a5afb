"""Which way a scan's axes run in the patient, and turning a scan whole quarters and mirrors to run another way.

An orientation is NIfTI's three letters: "RAS" when the axes run to the patient's right, anterior and superior side.
Nothing is interpolated: axes change places and voxels their order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from data_loading.io.volume import Geometry, Volume

# Either way of each direction; an orientation has one letter of each pair.
DIRECTIONS = ("RL", "AP", "SI")


@dataclass(frozen=True)
class Turn:
    """A change of the three axes.

    Attributes:
        axes: of each new axis, the old one that it was.
        flipped: of each new axis, whether its voxels are in the reverse order.
    """

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]

    def apply(self, array: NDArray[Any]) -> NDArray[Any]:
        """(C, D, H, W) -> (C, the new axes); a view."""
        return self._flip(array.transpose(0, *(axis + 1 for axis in self.axes)))

    def undo(self, array: NDArray[Any]) -> NDArray[Any]:
        """The way back of `apply`; a view."""
        return self._flip(array).transpose(0, *(self.axes.index(axis) + 1 for axis in range(3)))

    def _flip(self, array: NDArray[Any]) -> NDArray[Any]:
        # An axis of one voxel stays: flipped it would be the same with a negative stride, which torch does not take and
        # np.ascontiguousarray leaves.
        axes = tuple(axis for axis, flip in enumerate(self.flipped, start=1) if flip and array.shape[axis] > 1)
        return np.flip(array, axes)


def is_orientation(text: str) -> bool:
    """Whether these are three letters such as "RAS"."""
    return len(text) == 3 and all(sum(letter in pair for letter in text) == 1 for pair in DIRECTIONS)


def orientation_of(affine: NDArray[np.float64]) -> str:
    """Three letters, for an oblique scan those of the nearest directions."""
    return "".join(nib.aff2axcodes(affine))


def common_orientation(geometries: Iterable[Geometry]) -> str | None:
    """The orientation that all of them have; None where they differ or there are none."""
    found = {orientation_of(geometry.affine) for geometry in geometries}
    return found.pop() if len(found) == 1 else None


def turn_to(affine: NDArray[np.float64], orientation: str) -> Turn:
    """The turn that makes a scan with this affine run that way. Raises UserError where it is no orientation."""
    if not is_orientation(orientation):
        raise UserError(f"{orientation!r} is no orientation; give three letters such as RAS: R or L, A or P, S or I")
    own = nib.io_orientation(affine)
    change = nib.orientations.ornt_transform(own, nib.orientations.axcodes2ornt(tuple(orientation)))
    # `change` has for each old axis the new one and its sense.
    old_of = {int(new): (old, sense < 0) for old, (new, sense) in enumerate(change)}
    (a, flip_a), (b, flip_b), (c, flip_c) = (old_of[axis] for axis in range(3))
    return Turn((a, b, c), (flip_a, flip_b, flip_c))


def turned(volume: Volume, turn: Turn) -> Volume:
    """The scan with its axes turned; each voxel keeps its place in space, and `turn.undo` gives the old array."""
    return Volume(np.ascontiguousarray(turn.apply(volume.array)), turned_geometry(volume.geometry, turn))


def turned_geometry(source: Geometry, turn: Turn) -> Geometry:
    """The geometry of a scan whose axes are turned."""
    affine = source.affine.copy()
    for new, (old, flip) in enumerate(zip(turn.axes, turn.flipped, strict=True)):
        step = source.affine[:3, old]
        affine[:3, new] = -step if flip else step
        if flip:  # the new axis begins where the old one ends
            affine[:3, 3] += (source.shape[old] - 1) * step
    a, b, c = turn.axes
    shape = (source.shape[a], source.shape[b], source.shape[c])
    spacing = (source.spacing_mm[a], source.spacing_mm[b], source.spacing_mm[c])
    return Geometry(affine, shape, spacing)
