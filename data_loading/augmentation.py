"""The reference recipe's crop and augmentation: draw the parameters first, then apply them.

All randomness of a sample comes from one generator, which the loader seeds with (seed, epoch, case).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import plugins
from data_loading.preprocessing import Boxes, Shape
from errors import UserError

AXES = "DHW"
FLIP_PROBABILITY = 1 / 3
BRIGHTNESS_PROBABILITY = 0.1
# Yes, a factor of 1.7 to 2.3: it is what MLPerf's target was calibrated with.
BRIGHTNESS_RANGE = (1.7, 2.3)
NOISE_PROBABILITY = 0.1
MAX_NOISE_DEVIATION = 0.1


@dataclass(frozen=True)
class Augmentation:
    """One drawn augmentation: which axes (D, H, W) to flip, the image's factor, the noise's deviation and seed."""

    flips: tuple[bool, bool, bool]
    factor: float = 1.0
    noise_deviation: float = 0.0
    noise_seed: int = 0


DrawAugmentation = Callable[[np.random.Generator], Augmentation]


def draw_crop(rng: np.random.Generator, shape: Shape, patch: Shape, boxes: Boxes, oversampling: float) -> Shape:
    """The first voxel of a crop of `patch` voxels, biased to the foreground.

    With probability `oversampling` around a foreground component (a class drawn among those present, then one of
    its two largest boxes), else uniform. Without any foreground always uniform.

    Args:
        shape: the volume's, at least `patch` in each axis.
        patch: the crop's.
        boxes: of `foreground_boxes`.
        oversampling: probability of a foreground crop.
    """
    if rng.random() < oversampling and boxes:
        classes = sorted(boxes)
        candidates = boxes[classes[rng.integers(len(classes))]]
        box = candidates[rng.integers(len(candidates))]
        starts = [_around(rng, box[axis], box[axis + 3], patch[axis], shape[axis]) for axis in range(3)]
    else:
        # The reference never draws the last offset: [0, size - patch).
        starts = [int(rng.integers(0, max(size - length, 1))) for size, length in zip(shape, patch, strict=True)]
    return starts[0], starts[1], starts[2]


def _around(rng: np.random.Generator, low: int, high: int, patch: int, size: int) -> int:
    """The start of a window of `patch` that a box [low, high) is grown or shrunk to, kept inside [0, size)."""
    box = high - low
    difference = abs(patch - box)
    below = int(rng.integers(0, max(difference, 1)))
    start = low - below if box < patch else low + below
    return min(max(start, 0), size - patch)


def draw_augmentation(rng: np.random.Generator, flips: str = AXES) -> Augmentation:
    """Flips with probability 1/3 an axis; factor 1.7 to 2.3 with 0.1; noise of deviation 0 to 0.1 with 0.1.

    Args:
        flips: the axes that may be flipped; the other draws are the same whatever it is.
    """
    drawn = rng.random(3) < FLIP_PROBABILITY
    flip_d, flip_h, flip_w = (bool(flip) and axis in flips for flip, axis in zip(drawn, AXES, strict=True))
    factor = rng.uniform(*BRIGHTNESS_RANGE) if rng.random() < BRIGHTNESS_PROBABILITY else 1.0
    deviation = rng.uniform(0.0, MAX_NOISE_DEVIATION) if rng.random() < NOISE_PROBABILITY else 0.0
    return Augmentation((flip_d, flip_h, flip_w), float(factor), float(deviation), int(rng.integers(2**63)))


def mlperf(flips: str = AXES) -> DrawAugmentation:
    """The reference's augmentation; MLPerf's own with every axis.

    Args:
        flips: axes that may be flipped, of "DHW". A class that is defined by its direction (anterior, left) must not
            be flipped along it: the network would have to tell the directions apart from the shape alone.

    Raises:
        UserError: anything but a part of "DHW".
    """
    if not isinstance(flips, str) or not set(flips) <= set(AXES) or len(set(flips)) != len(flips):
        raise UserError(f"--augment mlperf(flips={flips!r}): expected axes of 'DHW', such as 'HW', or '' for none")
    return partial(draw_augmentation, flips=flips)


AUGMENTATIONS: dict[str, Callable[..., DrawAugmentation]] = {"mlperf": mlperf}


def make_augmentation(spec: str) -> DrawAugmentation:
    """What `--augment` names: a function that draws a sample's augmentation. Raises UserError for an unknown one."""
    return plugins.build(spec, AUGMENTATIONS, "--augment")


def augment(
    image: NDArray[np.float32], label: NDArray[np.uint8], drawn: Augmentation
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Applies a drawn augmentation: flips to both, factor and noise to the image alone.

    Args:
        image: (C, D, H, W) float32, changed in place where that saves a copy.
        label: (1, D, H, W) uint8.

    Returns:
        image and label of the same shapes, contiguous.
    """
    image, label = _flip(image, drawn.flips), _flip(label, drawn.flips)
    if drawn.factor != 1.0:
        image *= np.float32(drawn.factor)
    if drawn.noise_deviation > 0.0:
        # torch draws normal numbers six times as fast as numpy.
        generator = torch.Generator().manual_seed(drawn.noise_seed)
        noise = torch.empty(image.shape).normal_(std=drawn.noise_deviation, generator=generator)
        image += noise.numpy()
    return image, label


def _flip(array: NDArray[Any], flips: tuple[bool, bool, bool]) -> NDArray[Any]:
    # An axis of one voxel, as pictures have, would get a negative stride, which np.ascontiguousarray leaves.
    axes = tuple(axis for axis, flip in enumerate(flips, start=1) if flip and array.shape[axis] > 1)
    return np.ascontiguousarray(np.flip(array, axes)) if axes else array
