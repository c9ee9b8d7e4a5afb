"""TorchIO's transforms: `--augment 'torchio:RandomElasticDeformation(p=0.3)' 'torchio:RandomGamma(p=0.2)'`.

Their axes 0, 1 and 2 are our D, H and W, their voxels cubes of 1 mm. A label is resampled by its nearest voxel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torchio

from common import registry
from common.errors import UserError
from data_loading.library_transforms import DrawForeign
from data_loading.transforms import Image, Label, RandomTransform


@dataclass(frozen=True)
class TorchioTransform:
    """Applies one to a pair of image and label."""

    transform: Any

    def __call__(self, image: Image, label: Label, seed: int) -> tuple[Image, Label]:
        subject = torchio.Subject(
            image=torchio.ScalarImage(tensor=torch.from_numpy(image)),
            label=torchio.LabelMap(tensor=torch.from_numpy(label)),
        )
        changed = self.transform(subject)
        return changed["image"].data.float().numpy(), changed["label"].data.to(torch.uint8).numpy()


def adapt(found: registry.ResolvedSpec[Any]) -> RandomTransform:
    """The transform that a spec names. Raises UserError for wrong arguments, or what is no transform."""
    transform = found.call({})
    if not isinstance(transform, torchio.Transform):
        raise UserError(f"--augment {found.name} is no transform of TorchIO")
    return DrawForeign(found.name, TorchioTransform(transform))
