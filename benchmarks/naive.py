"""Naive implementations, written plainly from the description of the reference: the baselines of the suites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch.utils.data import Dataset

from data_loading.base_loader import LoaderConfig
from data_loading.dataset import case_file
from data_loading.preprocessing import Shape
from data_loading.sampler import sample_rng


class NaiveCropDataset(Dataset[dict[str, NDArray[Any]]]):
    """Loads the whole volume for each sample, and labels the components of a whole class for a foreground crop.

    Draws random numbers in `CropDataset`'s order, so that the same (epoch, case index) gives the same sample. Volumes
    are at least as large as the patch, as preprocessing makes KiTS19's.
    """

    def __init__(self, data_dir: Path, cases: Sequence[str], settings: LoaderConfig) -> None:
        self.data_dir = data_dir
        self.cases = list(cases)
        self.settings = settings

    def __getitem__(self, key: tuple[int, int]) -> dict[str, NDArray[Any]]:
        epoch, index = key
        settings = self.settings
        rng = sample_rng(settings.sample_seed, epoch, index)
        image, label = (np.load(case_file(self.data_dir, self.cases[index], kind)) for kind in "xy")
        d, h, w = naive_crop(rng, label[0], settings.patch, settings.oversampling)
        window = (slice(None), *(slice(n, n + length) for n, length in zip((d, h, w), settings.patch, strict=True)))
        crop, mask = (np.ascontiguousarray(array[window]) for array in (image, label))
        crop, mask = settings.augment(rng).apply(crop, mask)
        return {"image": crop, "label": mask}


def naive_crop(rng: np.random.Generator, label: NDArray[np.uint8], patch: Shape, oversampling: float) -> Shape:
    """The first voxel of a crop of `patch` from the label (D, H, W): uniform, or around one of a class's two components
    with the largest boxes, which are computed each time."""
    if rng.random() < oversampling and len(classes := np.unique(label[label > 0])):
        components, _ = ndimage.label(label == classes[rng.integers(len(classes))])
        boxes = ndimage.find_objects(components)
        boxes.sort(key=lambda box: np.prod([axis.stop - axis.start for axis in box]), reverse=True)
        box = boxes[rng.integers(len(boxes[:2]))]
        starts = [_window(rng, axis, length, size) for axis, length, size in zip(box, patch, label.shape, strict=True)]
    else:
        starts = [int(rng.integers(max(size - n, 1))) for size, n in zip(label.shape, patch, strict=True)]
    return starts[0], starts[1], starts[2]


def _window(rng: np.random.Generator, box: slice, length: int, size: int) -> int:
    """The first voxel of a component's extent along an axis, grown or shrunk to `length` at random and kept inside."""
    low, high = int(box.start), int(box.stop)
    difference = abs(length - (high - low))
    below = int(rng.integers(max(difference, 1)))
    if high - low < length:
        low, high = low - below, high + difference - below
    else:
        low, high = low + below, high - (difference - below)
    low, high = max(low, 0), min(high, size)
    # If clipping made it too short, it is extended at the other end.
    return low if high - low == length or low == 0 else high - length
