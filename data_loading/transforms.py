"""The biased crop and the augmentations: draw the parameters first, then apply them.

All randomness of a sample comes from one generator, which the loader seeds with (seed, epoch, case).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from common import registry
from common.errors import UserError
from data_loading.preprocessing import Boxes, Shape

AXES = "DHW"
FLIP_PROBABILITY = 1 / 3
BRIGHTNESS_PROBABILITY = 0.1
# Yes, a factor of 1.7 to 2.3: it is what MLPerf's target was calibrated with.
BRIGHTNESS_RANGE = (1.7, 2.3)
NOISE_PROBABILITY = 0.1
MAX_NOISE_DEVIATION = 0.1


Image = NDArray[np.float32]
Label = NDArray[np.uint8]


class Transform(Protocol):
    """An augmentation whose parameters are drawn; as text it says in a phrase what changes the intensities."""

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        """Image (C, D, H, W) and label (1, D, H, W), which may change in place, to contiguous ones of these shapes."""
        ...


# All that is random comes from the sample's own generator.
RandomTransform = Callable[[np.random.Generator], Transform]


@dataclass(frozen=True)
class Augmentation:
    """The reference's, drawn: which axes (D, H, W) to flip, the image's factor, the noise's deviation and seed."""

    flips: tuple[bool, bool, bool]
    factor: float = 1.0
    noise_deviation: float = 0.0
    noise_seed: int = 0

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        """Flips both; factor and noise are for the image alone."""
        image, label = flip(image, self.flips), flip(label, self.flips)
        if self.factor != 1.0:
            image *= np.float32(self.factor)
        if self.noise_deviation > 0.0:
            # torch draws normal numbers six times as fast as numpy.
            generator = torch.Generator().manual_seed(self.noise_seed)
            noise = torch.empty(image.shape).normal_(std=self.noise_deviation, generator=generator)
            image += noise.numpy()
        return image, label

    def __str__(self) -> str:
        return f"brightness {self.factor:.3g}, noise {self.noise_deviation:.3g}"


@dataclass(frozen=True)
class Compose:
    """Drawn augmentations, one after the other."""

    drawn: tuple[Transform, ...]

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        """As each of them, in their order."""
        for one in self.drawn:
            image, label = one.apply(image, label)
        return image, label

    def __str__(self) -> str:
        return ", ".join(map(str, self.drawn)) or "as it is"


@dataclass(frozen=True)
class DrawSeveral:
    """Draws several, in order, from one generator."""

    draws: tuple[RandomTransform, ...]

    def __call__(self, rng: np.random.Generator) -> Compose:
        return Compose(tuple(draw(rng) for draw in self.draws))


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


def mlperf(flips: str = AXES) -> RandomTransform:
    """The reference's augmentation; MLPerf's own with every axis.

    Args:
        flips: axes that may be flipped, of "DHW". A class that is defined by its direction (anterior, left) must not
            be flipped along it: the network would have to tell the directions apart from the shape alone.

    Raises:
        UserError: anything but a part of "DHW".
    """
    check_axes(flips, "mlperf(flips=…)")
    return partial(draw_augmentation, flips=flips)


def check_axes(axes: str, who: str) -> None:
    """Raises UserError for anything but a part of "DHW"."""
    if not isinstance(axes, str) or not set(axes) <= set(AXES) or len(set(axes)) != len(axes):
        raise UserError(f"--augment {who}: {axes!r}, expected axes of 'DHW', such as 'HW', or '' for none")


AUGMENTATIONS: registry.Table[RandomTransform] = {
    "mlperf": mlperf,
    "flips": "data_loading.spatial_transforms:flips",
    "rot90": "data_loading.spatial_transforms:rot90",
}
# Whose transforms are made a `RandomTransform` of, by whom; anything else that a spec imports must be one.
ADAPTERS = {
    "torchio": "data_loading.torchio_transforms:adapt",
    "monai": "data_loading.monai_transforms:adapt",
}


def make_augmentation(specs: Sequence[registry.Spec | str]) -> RandomTransform:
    """What `--augment` names, in its order: draws a sample's augmentation. Raises UserError for one that is unknown."""
    draws = [_make_draw(spec) for spec in specs]
    return draws[0] if len(draws) == 1 else DrawSeveral(tuple(draws))


def _make_draw(spec: registry.Spec | str) -> RandomTransform:
    found = registry.resolve(spec, AUGMENTATIONS, "--augment")
    package = found.name.partition(":")[0].partition(".")[0]
    if ":" in found.name and package in ADAPTERS:
        adapted: RandomTransform = registry.load(ADAPTERS[package], f"--augment {found.name}", package)(found)
        return adapted
    draw = found.call({})
    if not callable(draw):
        raise UserError(f"--augment {found.name} makes a {type(draw).__name__}, not a function that draws")
    return draw


def flip(array: NDArray[Any], flips: tuple[bool, bool, bool]) -> NDArray[Any]:
    """(C, D, H, W), contiguous, turned around along the chosen of the axes D, H and W."""
    # An axis of one voxel, as pictures have, would get a negative stride, which np.ascontiguousarray leaves.
    axes = tuple(n for n, is_flipped in enumerate(flips, start=1) if is_flipped and array.shape[n] > 1)
    return np.ascontiguousarray(np.flip(array, axes)) if axes else array
