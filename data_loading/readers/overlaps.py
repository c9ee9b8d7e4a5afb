"""Merges the masks of several structures into one of classes, and counts the voxels that two of them claim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.messages import counted
from data_loading.readers.label_map import quoted


class ClassMerger:
    """Classes of one scan, to which masks are added in any order.

    Where two classes claim a voxel, the higher one gets it if the user numbered them in `--labels`; else the structure
    with fewer voxels, since the larger one often contains it, and of equal ones the higher.

    Args:
        shape: (D, H, W).
        by_size: the user did not number the classes.
    """

    def __init__(self, shape: tuple[int, int, int], by_size: bool) -> None:
        self.classes: NDArray[np.uint8] = np.zeros(shape, np.uint8)
        self.by_size = by_size
        self.voxels = np.zeros(256, np.int64)
        # (index along the last axis or all of it, indices of the voxels, the classes that claim them as well)
        self.claims: list[tuple[Any, tuple[NDArray[np.intp], ...], NDArray[np.uint8]]] = []

    def add(self, found: NDArray[np.uint8], index: int | slice = slice(None)) -> None:
        """Adds a mask of classes, (D, H, W), or (D, H) with the index of its slice."""
        owned = self.classes[:, :, index]
        for plane in found if found.ndim == 3 else (found,):  # bincount converts to 64 bits
            self.voxels += np.bincount(plane.ravel(), minlength=256)
        if (clash := (found > 0) & (owned > 0) & (found != owned)).any():
            self.claims.append((index, np.nonzero(clash), found[clash]))
        np.copyto(owned, found, where=owned == 0)

    def finish(self, names: Sequence[str]) -> list[str]:
        """Gives each voxel to the class that wins.

        Args:
            names: of the classes, the background first.

        Returns:
            A line for each pair of classes that claim the same voxels: how many, which class gets them, how to choose.
        """
        order = np.arange(256)
        if self.by_size:
            order = np.argsort(np.lexsort((np.arange(256), -self.voxels)))
        pairs = np.zeros(256 * 256, np.int64)
        for index, where, claimed in self.claims:
            owned = self.classes[:, :, index]
            before = owned[where]
            wins = order[claimed] > order[before]
            owned[where] = np.where(wins, claimed, before)
            winners, losers = np.where(wins, claimed, before), np.where(wins, before, claimed)
            pairs += np.bincount(256 * winners.astype(np.int64) + losers, minlength=len(pairs))
        self.claims.clear()
        return [
            f"{counted(int(pairs[pair]), 'voxel')} in both {names[winner]} and {names[loser]} became {names[winner]}, "
            f"{self._why(winner, loser)} (--labels with {quoted(names[loser])} numbered above {quoted(names[winner])} "
            f"chooses {names[loser]})"
            for pair in np.flatnonzero(pairs).tolist()
            if (winner := pair // 256) != (loser := pair % 256)
        ]

    def _why(self, winner: int, loser: int) -> str:
        if not self.by_size:
            return "as it is the higher class"
        return "as it has fewer voxels" if self.voxels[winner] < self.voxels[loser] else "the later of two of one size"
