"""From a network's probabilities to a mask on the scan's own grid, a few planes at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data_loading.preprocessing import GridTransform, resize_planes


class SourceGrid:
    """Receives a scan's probabilities on the network's grid, plane after plane, and makes the mask on the scan's grid.

    Undoes padding, resampling, crop and reorientation. Probabilities are interpolated, trilinearly with aligned
    corners as in preprocessing, and the arg-max is taken afterwards: nearest-neighbour labels cost small objects up to
    half their Dice. With all classes, probabilities would be the largest array in memory, so only planes are kept.

    Args:
        transform: what `preprocess_image` returned.
        kept: zeros, (K, *shape) of the reoriented scan, to keep the probabilities in; None: they are not kept.
    """

    def __init__(self, transform: GridTransform, kept: NDArray[np.float32] | None = None) -> None:
        self._transform = transform
        self._mask = np.zeros(transform.reoriented.shape, np.uint8)
        self._kept = kept
        if kept is not None and transform.crop:
            kept[0] = 1  # outside the crop, all is background
        # The first plane and the part of each that the network's grid covers.
        self._first, h, w, _, h_end, w_end = transform.crop or (0, 0, 0, *transform.reoriented.shape)
        self._covered = slice(h, h_end), slice(w, w_end)
        self._received = 0  # planes of the network's grid
        self._made = 0  # planes of the cropped grid
        self._last: Tensor | None = None  # the last plane received, (K, H, W) of the cropped grid

    def add(self, planes: Tensor) -> None:
        """Adds the next planes of the probabilities, (K, planes, H, W) float32 on the host."""
        transform = self._transform
        first = self._received - transform.padding_before[0]
        self._received += planes.shape[1]
        inside = slice(max(0, -first), max(0, transform.resampled_shape[0] - first))
        h, w = (
            slice(start, start + size)
            for start, size in zip(transform.padding_before[1:], transform.resampled_shape[1:], strict=True)
        )
        part = planes[:, inside, h, w]
        if part.shape[1]:
            self._add_planes(self._resize(part), first + inside.start)

    def _resize(self, planes: Tensor) -> Tensor:
        """Resizes (K, planes, H, W) to the cropped grid's H and W."""
        size = self._transform.cropped.shape[1:]
        if planes.shape[2:] == size:
            return planes
        if self._transform.half_pixel:
            return resize_planes(planes, size)
        return F.interpolate(planes, size, mode="bilinear", align_corners=True)

    def _add_planes(self, planes: Tensor, index: int) -> None:
        """Makes all planes that lie between those received so far, of which `index` is the first here.

        The weights are those of PyTorch's trilinear interpolation, in float32.
        """
        received, made = self._transform.resampled_shape[0], self._transform.cropped.shape[0]
        step = np.float32(received - 1) / np.float32(max(made - 1, 1)) if received != made else np.float32(1)
        for plane in planes.unbind(1):
            while self._made < made:
                place = np.float32(self._made) * step
                below = min(int(place), received - 1)
                weight = float(place - np.float32(below)) if below < received - 1 else 0.0
                if below + (weight > 0) > index:
                    break
                above = self._last
                self._put(plane if above is None or below == index else above * (1 - weight) + plane * weight)
            self._last, index = plane, index + 1

    def _put(self, plane: Tensor) -> None:
        at = self._first + self._made
        self._mask[at, *self._covered] = plane.argmax(0).to(torch.uint8).numpy()
        if self._kept is not None:
            self._kept[:, at, *self._covered] = plane.numpy()
        self._made += 1

    def mask(self) -> NDArray[np.uint8]:
        """Returns each voxel's most probable class, the first of equal ones: (D, H, W) of the scan."""
        return self._to_source(self._mask)

    def probabilities(self, value: int) -> NDArray[np.float32]:
        """Returns a class's probabilities, (D, H, W) of the scan; they must have been kept."""
        assert self._kept is not None
        return self._to_source(self._kept[value])

    def _to_source(self, array: NDArray[Any]) -> NDArray[Any]:
        reorientation = self._transform.reorientation
        return reorientation.undo(array[np.newaxis])[0] if reorientation else array
