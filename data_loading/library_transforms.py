"""Transforms of TorchIO and MONAI, each run under a seed drawn from the sample's own generator.

    --augment 'torchio:RandomElasticDeformation(p=0.3)' 'torchio:RandomGamma(p=0.2)'
    --augment 'monai.transforms:RandGaussianNoise(prob=0.2)' 'monai.transforms:RandRotated(…)'

Their axes 0, 1 and 2 are our D, H and W; labels are resampled to the nearest voxel, and a transform that interpolates
between them is refused. TorchIO sees voxels of 1 mm cubed. MONAI's intensity transforms change the image only, all
others image and label: an array transform (RandAffine) is replaced by its dictionary version (RandAffined). Each
package is imported only when its transforms are used.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from common import registry
from common.errors import UserError, one_line
from data_loading.transforms import Image, Label, RandomTransform

# Of MONAI's transforms outside its module of intensities, those that would blur the labels.
IMAGE_ONLY = ("RandSimulateLowResolution", "RandImageFilter", "RandSmoothFieldAdjust")
# (image, label, seed) -> image, label
SeededFunction = Callable[[Image, Label, int], tuple[Image, Label]]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the generators of Python, numpy and torch's CPU, and restores their states afterwards.

    GPU generators are left alone: `torch.manual_seed` would seed them too, and nothing here computes on a GPU.
    """
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.default_generator.set_state(before[2])


@dataclass(frozen=True)
class LibraryTransform:
    """A library's transform with the seed of everything it draws."""

    name: str
    seed: int
    function: SeededFunction = field(repr=False)

    def apply(self, image: Image, label: Label) -> tuple[Image, Label]:
        """Applies it. Raises UserError if the transform fails."""
        try:
            with seeded(self.seed):
                changed, mask = self.function(image, label, self.seed)
        except Exception as error:
            reason = one_line(error)
            raise UserError(f"--augment {self.name}: failed on a sample {image.shape}: {reason}") from None
        return np.ascontiguousarray(changed, np.float32), np.ascontiguousarray(mask)

    def __str__(self) -> str:
        return f"{self.name} with seed {self.seed}"


@dataclass(frozen=True)
class RandomLibraryTransform:
    """Draws the seed of a `LibraryTransform`."""

    name: str
    function: SeededFunction = field(repr=False)

    def __call__(self, rng: np.random.Generator) -> LibraryTransform:
        return LibraryTransform(self.name, int(rng.integers(2**32)), self.function)


def adapt_torchio(resolved: registry.ResolvedSpec[Any]) -> RandomTransform:
    """Returns the TorchIO transform that a spec names. Raises UserError for wrong arguments or another object."""
    import torchio

    transform = resolved.call({})
    if not isinstance(transform, torchio.Transform):
        raise UserError(f"--augment {resolved.name}: not a transform of TorchIO")
    return RandomLibraryTransform(resolved.name, partial(_apply_torchio, transform))


def _apply_torchio(transform: Any, image: Image, label: Label, seed: int) -> tuple[Image, Label]:
    import torchio

    subject = torchio.Subject(
        image=torchio.ScalarImage(tensor=torch.from_numpy(image)),
        label=torchio.LabelMap(tensor=torch.from_numpy(label)),
    )
    changed = transform(subject)
    return changed["image"].data.float().numpy(), changed["label"].data.numpy()


def adapt_monai(resolved: registry.ResolvedSpec[Any]) -> RandomTransform:
    """Returns the MONAI transform that a spec names. Raises UserError for wrong arguments or another object."""
    import monai.transforms
    from monai.transforms.transform import MapTransform, Transform

    target = resolved.target
    if not isinstance(target, type) or not issubclass(target, Transform):
        raise UserError(f"--augment {resolved.name}: not a transform of MONAI")
    is_intensity = target.__module__.startswith("monai.transforms.intensity") or target.__name__.startswith(IMAGE_ONLY)
    if not issubclass(target, MapTransform):
        counterpart = getattr(monai.transforms, f"{target.__name__}d", None)
        if is_intensity or counterpart is None:
            return RandomLibraryTransform(resolved.name, partial(apply_monai_to_image, resolved.call({})))
        resolved = replace(resolved, target=counterpart)
    fixed: dict[str, Any] = {"keys": ("image",) if is_intensity else ("image", "label")}
    if "mode" in resolved.parameters and not is_intensity and "mode" not in resolved.arguments:
        fixed["mode"] = ("bilinear", "nearest")
    return RandomLibraryTransform(resolved.name, partial(_apply_monai, resolved.call(fixed)))


def apply_monai_to_image(transform: Any, image: Image, label: Label, seed: int) -> tuple[Image, Label]:
    """Applies a MONAI transform of arrays to the image alone."""
    return np.asarray(_seed_monai(transform, seed)(image)), label


def _apply_monai(transform: Any, image: Image, label: Label, seed: int) -> tuple[Image, Label]:
    changed = _seed_monai(transform, seed)({"image": image, "label": label})
    return np.asarray(changed["image"]), np.asarray(changed["label"])


def _seed_monai(transform: Any, seed: int) -> Any:
    """Seeds a transform's own generator, whose state samples must not share; returns the transform."""
    if hasattr(transform, "set_random_state"):  # a monai.transforms.Randomizable
        transform.set_random_state(seed)
    return transform
