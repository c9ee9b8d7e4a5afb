"""`--augment nnunet`: nnU-Net's augmentation, with its probabilities and ranges, computed by MONAI.

Source: Isensee et al. 2021 (doi:10.1038/s41592-020-01008-z), supplementary note 4, as nnU-Net 2's default trainer sets
it. Three things differ. Rotated and scaled crops are filled with their own edge, where nnU-Net first cuts a larger
crop. What nnU-Net draws for each channel is drawn for all channels at once, with half the probability where nnU-Net
changes each channel with a probability of a half. Gamma is uniform from 0.7 to 1.5; nnU-Net's is below 1 half of the
time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import radians
from typing import Any

import numpy as np
from monai.transforms.intensity.array import (
    RandAdjustContrast,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandScaleIntensity,
    RandScaleIntensityFixedMean,
)
from monai.transforms.spatial.array import Affine as MonaiAffine
from monai.transforms.spatial.array import RandSimulateLowResolution

from common.errors import UserError
from data_loading.library_transforms import RandomLibraryTransform, apply_monai_to_image
from data_loading.transforms import AXES, Image, Label, RandomCompose, RandomTransform, check_axes, flips

ROTATION_PROBABILITY = 0.2
SCALING_PROBABILITY = 0.2
SCALES = (0.7, 1.4)
FLIP_PROBABILITY = 0.5
LARGEST_ANGLE = 180.0


@dataclass(frozen=True)
class Affine:
    """A rotation about the crop's centre and a change of scale: trilinear for the image, nearest for the label.

    Attributes:
        angles: about the axes D, H and W, in radians.
        scale: above 1, structures become smaller.
    """

    angles: tuple[float, float, float]
    scale: float

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        if self == IDENTITY:
            return image, label
        moved, mask = self._resample(image, "bilinear"), self._resample(label.astype(np.float32), "nearest")
        return moved, np.ascontiguousarray(mask, np.uint8)

    def _resample(self, array: Image, mode: str) -> Image:
        affine: Any = MonaiAffine(
            rotate_params=list(self.angles),
            scale_params=[self.scale] * 3,
            mode=mode,
            padding_mode="border",
            image_only=True,
        )
        return np.ascontiguousarray(affine(array), np.float32)

    def __str__(self) -> str:
        return f"rotation {', '.join(f'{angle:.2g}' for angle in self.angles)}, scale {self.scale:.3g}"


IDENTITY = Affine((0.0, 0.0, 0.0), 1.0)


def nnunet(flip_axes: str = AXES, rotation: float = 30.0) -> RandomTransform:
    """Returns nnU-Net's augmentation.

    In this order: rotation and scaling, noise, blur, brightness, contrast, low resolution, gamma, flips.

    Args:
        flip_axes: axes that may be flipped, from "DHW"; "" if each is a direction (left, anterior) for some class.
        rotation: largest angle about each axis, in degrees.

    Raises:
        UserError: `flip_axes` is not a subset of "DHW", or no such angle.
    """
    check_axes(flip_axes, "nnunet(flip_axes=…)")
    if not isinstance(rotation, int | float) or not 0 <= rotation <= LARGEST_ANGLE:
        raise UserError(f"--augment nnunet(rotation={rotation!r}): expected an angle of at most {LARGEST_ANGLE:g}")
    of_image = {
        "noise": RandGaussianNoise(prob=0.1, std=0.1),
        "blur": RandGaussianSmooth(prob=0.1, sigma_x=(0.5, 1.0), sigma_y=(0.5, 1.0), sigma_z=(0.5, 1.0)),
        "brightness": RandScaleIntensity(prob=0.15, factors=0.25),
        "contrast": RandScaleIntensityFixedMean(prob=0.15, factors=0.25, preserve_range=True),
        "low resolution": RandSimulateLowResolution(prob=0.125, zoom_range=(0.5, 1.0)),
        "inverse gamma": RandAdjustContrast(prob=0.1, gamma=(0.7, 1.5), invert_image=True, retain_stats=True),
        "gamma": RandAdjustContrast(prob=0.3, gamma=(0.7, 1.5), retain_stats=True),
    }
    return RandomCompose(
        (
            partial(draw_affine, rotation),
            *(
                RandomLibraryTransform(name, partial(APPLICATIONS.get(name, apply_monai_to_image), one))
                for name, one in of_image.items()
            ),
            flips(FLIP_PROBABILITY, flip_axes),
        )
    )


def apply_to_each_channel(transform: Any, image: Image, label: Label, seed: int) -> tuple[Image, Label]:
    """Applies a MONAI transform to each channel with the same draws, so that it keeps each channel's own statistics."""
    channels = [
        apply_monai_to_image(transform, image[index : index + 1], label, seed)[0] for index in range(len(image))
    ]
    return np.concatenate(channels), label


# Those that keep the mean, the range or the standard deviation.
APPLICATIONS = dict.fromkeys(("contrast", "inverse gamma", "gamma"), apply_to_each_channel)


def draw_affine(rotation: float, rng: np.random.Generator) -> Affine:
    """Draws angles up to `rotation` degrees with probability 0.2, and a scale of 0.7 to 1.4 with 0.2."""
    is_rotated, is_scaled = rng.random(2) < (ROTATION_PROBABILITY, SCALING_PROBABILITY)
    d, h, w = rng.uniform(-radians(rotation), radians(rotation), 3) * is_rotated
    return Affine((float(d), float(h), float(w)), float(rng.uniform(*SCALES)) if is_scaled else 1.0)
