"""The biased crop and the augmentations: draw the parameters first, then apply them.

    --augment mlperf
    --augment 'flips(p=0.5, axes="HW")' rot90

All randomness of a sample comes from one generator, which the loader seeds with (seed, permutation, case).
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
from data_loading.checked_transforms import RandomCheckedTransform
from data_loading.preprocessing import Boxes, Shape
from data_loading.spec import IGNORED

AXES = "DHW"
FLIP_PROBABILITY = 1 / 3
BRIGHTNESS_PROBABILITY = 0.1
# Unusually bright, but it is the reference's range, which MLPerf's target was calibrated with.
BRIGHTNESS_RANGE = (1.7, 2.3)
NOISE_PROBABILITY = 0.1
MAX_NOISE_STD = 0.1

Image = NDArray[np.float32]
Label = NDArray[np.uint8]


class Transform(Protocol):
    """An augmentation with drawn parameters; `str` returns it as a phrase for reports."""

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        """Transforms image (C, D, H, W) and label (1, D, H, W), perhaps in place.

        Returns:
            Contiguous arrays of the same shapes.
        """
        ...


# Draws a transform's parameters, all of them from the sample's own generator.
RandomTransform = Callable[[np.random.Generator], Transform]


@dataclass(frozen=True)
class Compose:
    """Several transforms, applied in order."""

    transforms: tuple[Transform, ...]

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        for transform in self.transforms:
            image, label = transform.apply(image, label)
        return image, label

    def __str__(self) -> str:
        return ", ".join(map(str, self.transforms)) or "unchanged"


@dataclass(frozen=True)
class RandomCompose:
    """Draws several transforms, in order, from one generator."""

    transforms: tuple[RandomTransform, ...]

    def __call__(self, rng: np.random.Generator) -> Compose:
        return Compose(tuple(draw(rng) for draw in self.transforms))


def draw_crop(
    rng: np.random.Generator,
    shape: Shape,
    patch: Shape,
    *,
    boxes: Boxes,
    oversampling: float,
    class_weights: Sequence[float] = (),
) -> Shape:
    """Draws the first voxel of a crop, biased to the foreground.

    With probability `oversampling` the crop is placed around a foreground component (a class drawn among those
    present, then one of its two largest boxes), otherwise uniformly. Without foreground it is always uniform.

    Args:
        shape: (D, H, W) of the volume, at least `patch` along each axis.
        patch: (D, H, W) of the crop.
        boxes: as `foreground_boxes` returns them.
        oversampling: probability of a foreground crop.
        class_weights: with which classes 1, 2, … are drawn among those present; () draws them equally often, as
            the reference does. Where all that are present weigh nothing the crop is uniform.
    """
    if rng.random() < oversampling and (drawn := _draw_class(rng, sorted(boxes), class_weights)):
        candidates = boxes[drawn]
        box = candidates[rng.integers(len(candidates))]
        starts = [_draw_start(rng, box[axis : axis + 4 : 3], patch[axis], shape[axis]) for axis in range(3)]
    else:
        # The reference never draws the last offset: [0, size - patch).
        starts = [int(rng.integers(0, max(size - length, 1))) for size, length in zip(shape, patch, strict=True)]
    return starts[0], starts[1], starts[2]


def _draw_class(rng: np.random.Generator, classes: list[int], weights: Sequence[float]) -> int:
    """Draws one of these classes; returns 0 if there are none, or none with a weight."""
    if not weights:
        return classes[rng.integers(len(classes))] if classes else 0
    shares = np.array([weights[value - 1] for value in classes])
    return int(rng.choice(classes, p=shares / shares.sum())) if shares.any() else 0


def _draw_start(rng: np.random.Generator, span: tuple[int, ...], patch: int, size: int) -> int:
    """Draws the start of a window of `patch` voxels in [0, size) that contains the span [low, high) or is inside it."""
    low, high = span
    length = high - low
    offset = int(rng.integers(0, max(abs(patch - length), 1)))
    start = low - offset if length < patch else low + offset
    return min(max(start, 0), size - patch)


@dataclass(frozen=True)
class MLPerfAugmentation:
    """The reference's augmentation: flips along D, H and W, then brightness and Gaussian noise of the image.

    Attributes:
        flips: axes (D, H, W) to flip, of image and label.
        factor: multiplies the image.
        noise_std: standard deviation of the noise added to the image.
        noise_seed: seed of the noise.
    """

    flips: tuple[bool, bool, bool]
    factor: float = 1.0
    noise_std: float = 0.0
    noise_seed: int = 0

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        image, label = flip(image, self.flips), flip(label, self.flips)
        if self.factor != 1.0:
            image *= np.float32(self.factor)
        if self.noise_std > 0.0:
            # torch draws normal numbers six times as fast as numpy.
            generator = torch.Generator().manual_seed(self.noise_seed)
            noise = torch.empty(image.shape).normal_(std=self.noise_std, generator=generator)
            image += noise.numpy()
        return image, label

    def __str__(self) -> str:
        return f"brightness {self.factor:.3g}, noise {self.noise_std:.3g}"


def draw_augmentation(rng: np.random.Generator, flips: str = AXES) -> MLPerfAugmentation:
    """Draws flips with probability 1/3 per axis, a factor of 1.7 to 2.3 with 0.1, and noise of std 0 to 0.1 with 0.1.

    Args:
        flips: axes that may be flipped; the other draws do not depend on it.
    """
    flip_d, flip_h, flip_w = _draw_flips(rng, FLIP_PROBABILITY, flips)
    factor = rng.uniform(*BRIGHTNESS_RANGE) if rng.random() < BRIGHTNESS_PROBABILITY else 1.0
    std = rng.uniform(0.0, MAX_NOISE_STD) if rng.random() < NOISE_PROBABILITY else 0.0
    return MLPerfAugmentation((flip_d, flip_h, flip_w), float(factor), float(std), int(rng.integers(2**63)))


def _draw_flips(rng: np.random.Generator, p: float, axes: str) -> tuple[bool, bool, bool]:
    d, h, w = (bool(drawn) and axis in axes for drawn, axis in zip(rng.random(3) < p, AXES, strict=True))
    return d, h, w


def mlperf(flips: str = AXES) -> RandomTransform:
    """Returns the reference's augmentation; MLPerf's own flips every axis.

    Args:
        flips: axes that may be flipped, from "DHW". Classes that differ by direction (anterior, left) must not be
            flipped along it: the network would have to distinguish them by shape alone.

    Raises:
        UserError: `flips` is not a subset of "DHW".
    """
    check_axes(flips, "mlperf(flips=…)")
    return partial(draw_augmentation, flips=flips)


@dataclass(frozen=True)
class Flips:
    """Flips along the selected axes (D, H, W)."""

    flips: tuple[bool, bool, bool]

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        return flip(image, self.flips), flip(label, self.flips)

    def __str__(self) -> str:
        return f"flips {''.join(axis for axis, flip in zip(AXES, self.flips, strict=True) if flip) or 'none'}"


def flips(p: float = 0.5, axes: str = AXES) -> RandomTransform:
    """Returns flips along each of the axes with probability p, independently.

    Raises:
        UserError: p is not a probability, or `axes` not a subset of "DHW".
    """
    _check_probability(p, "flips(p=…)")
    check_axes(axes, "flips(axes=…)")
    return partial(_draw_flips_alone, p, axes)


def _draw_flips_alone(p: float, axes: str, rng: np.random.Generator) -> Flips:
    return Flips(_draw_flips(rng, p, axes))


@dataclass(frozen=True)
class QuarterTurns:
    """A number of rotations by 90 degrees in the plane of two of the array axes 1 to 3."""

    turns: int
    plane: tuple[int, int]

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        """Rotates both, by 180 degrees if the patch is not square in the plane."""
        is_square = image.shape[self.plane[0]] == image.shape[self.plane[1]]
        turns = self.turns if is_square or not self.turns else 2
        return self._rotate(image, turns), self._rotate(label, turns)

    def _rotate(self, array: NDArray[Any], turns: int) -> NDArray[Any]:
        return np.ascontiguousarray(np.rot90(array, turns, self.plane)) if turns else array

    def __str__(self) -> str:
        return f"{self.turns} quarter turns"


def rot90(p: float = 0.5, axes: str = "HW") -> RandomTransform:
    """Returns, with probability p, a rotation by 90, 180 or 270 degrees (equally likely) in the plane of two axes.

    A patch that is not square in that plane is rotated by 180 degrees only, since its shape must not change.

    Raises:
        UserError: p is not a probability, or `axes` not two of "DHW".
    """
    _check_probability(p, "rot90(p=…)")
    check_axes(axes, "rot90(axes=…)")
    if len(axes) != 2:
        raise UserError(f"--augment rot90(axes={axes!r}): expected the two axes of a plane, such as 'HW'")
    return partial(_draw_turns, p, (AXES.index(axes[0]) + 1, AXES.index(axes[1]) + 1))


def _draw_turns(p: float, plane: tuple[int, int], rng: np.random.Generator) -> QuarterTurns:
    turns = int(rng.integers(1, 4))
    return QuarterTurns(turns if rng.random() < p else 0, plane)


def check_axes(axes: str, argument: str) -> None:
    """Raises UserError unless `axes` is a subset of "DHW"."""
    if not isinstance(axes, str) or not set(axes) <= set(AXES) or len(set(axes)) != len(axes):
        raise UserError(f"--augment {argument}: {axes!r}, expected axes of 'DHW', such as 'HW', or '' for none")


def _check_probability(p: float, argument: str) -> None:
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise UserError(f"--augment {argument}: {p!r} is not a probability")


AUGMENTATIONS: registry.Table[RandomTransform] = {
    "mlperf": mlperf,
    "flips": flips,
    "rot90": rot90,
    "nnunet": "data_loading.nnunet_augmentation:nnunet",
}
# Packages whose transforms are adapted; anything else that a spec imports must return a `RandomTransform`.
ADAPTERS = {
    "torchio": "data_loading.library_transforms:adapt_torchio",
    "monai": "data_loading.library_transforms:adapt_monai",
}


def make_augmentation(specs: Sequence[registry.Spec | str], classes: int = IGNORED) -> RandomTransform:
    """Returns the composition of the `--augment` specs, in order.

    Args:
        classes: their number; a transform from outside of this project must return no other labels.

    Raises:
        UserError: a spec is unknown.
    """
    transforms = [_make_random_transform(spec, classes) for spec in specs]
    return transforms[0] if len(transforms) == 1 else RandomCompose(tuple(transforms))


def _make_random_transform(spec: registry.Spec | str, classes: int) -> RandomTransform:
    resolved = registry.resolve(spec, AUGMENTATIONS, "--augment")
    if ":" not in resolved.name:
        return resolved.call({})
    package = resolved.name.partition(":")[0].partition(".")[0]
    if package in ADAPTERS:
        transform = registry.load(ADAPTERS[package], f"--augment {resolved.name}", package)(resolved)
    else:
        transform = resolved.call({})
    if not callable(transform):
        raise UserError(f"--augment {resolved.name}: returns a {type(transform).__name__}, expected a callable")
    return RandomCheckedTransform(resolved.name, classes, transform)


def flip(array: NDArray[Any], flips: tuple[bool, bool, bool]) -> NDArray[Any]:
    """Flips a (C, D, H, W) array along the selected axes (D, H, W); the result is contiguous."""
    # An axis of one voxel, as in 2-D images, would keep a negative stride even after np.ascontiguousarray.
    axes = tuple(n for n, is_flipped in enumerate(flips, start=1) if is_flipped and array.shape[n] > 1)
    return np.ascontiguousarray(np.flip(array, axes)) if axes else array
