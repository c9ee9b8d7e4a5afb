"""Distances between the surfaces of two masks, in mm, on grids whose axes need not be perpendicular."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

# Surfaces at most this far apart agree; two people's outlines of one organ differ by about as much.
TOLERANCE_MM = 1.0
PERCENTILE = 95


def surface_figures(
    predicted: NDArray[np.bool_], true: NDArray[np.bool_], steps_mm: NDArray[np.float64]
) -> tuple[float, float]:
    """Compares the surfaces of two masks.

    Args:
        predicted, true: (D, H, W).
        steps_mm: (3, 3), its columns the steps from a voxel to the next along D, H and W.

    Returns:
        The share of both surfaces that is within `TOLERANCE_MM` of the other, NaN if both masks are empty; and the 95th
        percentile of the distances between them, the larger of both directions, NaN if a mask is empty.
    """
    points = [surface_points(mask, steps_mm) for mask in (predicted, true)]
    total = sum(map(len, points))
    if not all(map(len, points)):
        return (0.0 if total else float("nan")), float("nan")
    trees = [cKDTree(each) for each in points]
    distances = [trees[1].query(points[0])[0], trees[0].query(points[1])[0]]
    close = sum(int(np.count_nonzero(each <= TOLERANCE_MM)) for each in distances)
    return close / total, max(float(np.percentile(each, PERCENTILE)) for each in distances)


def surface_points(mask: NDArray[np.bool_], steps_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the positions in mm, (n, 3), of the voxels of a mask with a face towards its outside.

    What is beyond the volume is outside, except along an axis of one voxel: an image has an outline.
    """
    boxes = ndimage.find_objects(mask.astype(np.uint8))
    if not boxes:
        return np.zeros((0, 3))
    inside = np.pad(mask[boxes[0]], [(1, 1) if n > 1 else (0, 0) for n in mask.shape])
    neighbours = ndimage.generate_binary_structure(3, 1)
    for axis, size in enumerate(mask.shape):
        if size == 1:
            neighbours &= np.moveaxis(np.array([False, True, False])[:, None, None], 0, axis)
    voxels = np.argwhere(inside & ~ndimage.binary_erosion(inside, neighbours)).astype(np.float64)
    points: NDArray[np.float64] = voxels @ steps_mm.T
    # Both masks' boxes have their own origin.
    first = np.array([side.start - (size > 1) for side, size in zip(boxes[0], mask.shape, strict=True)])
    return points + steps_mm @ first
