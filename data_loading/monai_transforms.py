"""MONAI's transforms: `--augment 'monai.transforms:RandGaussianNoise(prob=0.2)' 'monai.transforms:RandRotated(…)'`.

Their axes are our D, H and W. One of MONAI's intensity transforms changes the image alone; any other, image and label
alike, the label by its nearest voxel: named for arrays (RandAffine), its twin for dictionaries (RandAffined) is used.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import monai.transforms
import numpy as np
from monai.transforms.transform import MapTransform, Randomizable, Transform

from common import registry
from common.errors import UserError
from data_loading.library_transforms import DrawForeign
from data_loading.transforms import Image, Label, RandomTransform


@dataclass(frozen=True)
class OnImage:
    """Applies a transform of arrays to the image."""

    transform: Any

    def __call__(self, image: Image, label: Label, seed: int) -> tuple[Image, Label]:
        return np.asarray(_seeded(self.transform, seed)(image)), label


@dataclass(frozen=True)
class OnBoth:
    """Applies a transform of dictionaries to image and label."""

    transform: Any

    def __call__(self, image: Image, label: Label, seed: int) -> tuple[Image, Label]:
        changed = _seeded(self.transform, seed)({"image": image, "label": label})
        return np.asarray(changed["image"]), np.asarray(changed["label"])


def _seeded(transform: Any, seed: int) -> Any:
    """MONAI's transforms have a generator each, which may be shared by no other sample."""
    if isinstance(transform, Randomizable):
        transform.set_random_state(seed)
    return transform


def adapt(found: registry.ResolvedSpec[Any]) -> RandomTransform:
    """The transform that a spec names. Raises UserError for wrong arguments, or what is no transform."""
    make = found.target
    if not isinstance(make, type) or not issubclass(make, Transform):
        raise UserError(f"--augment {found.name} is no transform of MONAI")
    is_intensity = make.__module__.startswith("monai.transforms.intensity")
    if not issubclass(make, MapTransform):
        twin = getattr(monai.transforms, f"{make.__name__}d", None)
        if is_intensity or twin is None:
            return DrawForeign(found.name, OnImage(found.call({})))
        found = replace(found, target=twin)
    takes = inspect.signature(found.target).parameters
    room: dict[str, Any] = {"keys": ("image",) if is_intensity else ("image", "label")}
    if "mode" in takes and not is_intensity and "mode" not in found.arguments:
        room["mode"] = ("bilinear", "nearest")
    return DrawForeign(found.name, OnBoth(found.call(room)))
