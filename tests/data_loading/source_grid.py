"""All of a scan's probabilities on its own grid, as `SourceGrid` makes them from slabs of any depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from data_loading.preprocessing import GridTransform
from data_loading.source_grid import SourceGrid


def to_source_grid(
    array: NDArray[np.float32], transform: GridTransform, depths: Sequence[int] = (3, 1, 4)
) -> NDArray[np.float32]:
    """Returns (K, D, H, W) of the scan for (K, D, H, W) of the network's grid, in slabs of these depths over and over.

    Raises:
        AssertionError: the mask is not the arg-max of the probabilities.
    """
    grid = SourceGrid(transform, np.zeros((len(array), *transform.reoriented.shape), np.float32))
    first, turn = 0, 0
    while first < array.shape[1]:
        grid.add(torch.from_numpy(array[:, first : first + depths[turn % len(depths)]]))
        first, turn = first + depths[turn % len(depths)], turn + 1
    made = np.stack([grid.probabilities(value) for value in range(len(array))])
    np.testing.assert_array_equal(grid.mask(), made.argmax(0))
    return made
