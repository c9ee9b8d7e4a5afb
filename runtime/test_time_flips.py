"""`--test_time_flips`: windows are predicted once per flip, and the logits averaged."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from common import registry
from data_loading.transforms import AXES
from runtime.inference import Predictor

# Each the axes to flip, as indices of (N, C, D, H, W); the first flips nothing.
Flips = tuple[tuple[int, ...], ...]
NO_FLIPS: Flips = ((),)
# Augmentations that flip, and their argument that names the axes: all axes if it is left out.
FLIPPING = {"mlperf": "flips", "flips": "axes", "nnunet": "flip_axes"}


def flips_of(axes: str) -> Flips:
    """Returns every combination of these axes of "DHW": 2 to the power of their number."""
    indices = sorted(AXES.index(axis) + 2 for axis in axes)
    return tuple(itertools.chain.from_iterable(itertools.combinations(indices, n) for n in range(len(indices) + 1)))


def mean_over_flips(predictor: Predictor, flips: Flips) -> Predictor:
    """Returns a predictor of the mean logits over the flips, each undone; float32 if there are several."""
    if flips == NO_FLIPS:
        return predictor

    def predict(windows: Tensor) -> Tensor:
        total = predictor(windows).float()
        for axes in flips[1:]:
            total = total + predictor(windows.flip(axes)).float().flip(axes)
        return total / len(flips)

    return predict


def untrained_flips(axes: str, augment: Sequence[registry.Spec | str], name: str) -> str:
    """Returns a note if the network was not trained with some of the flips, which lowers its score, else "".

    Args:
        augment: the `--augment` of its training.
        name: of the network or its file, for the note.
    """
    trained = ""
    for spec, arguments in (registry.parse(spec, "--augment") for spec in augment):
        if spec in FLIPPING:
            trained += arguments.get(FLIPPING[spec], AXES)
        elif "flip" in spec.lower():  # a library's, along axes that are not known here
            trained += AXES
    if not (unknown := "".join(axis for axis in axes if axis not in trained)):
        return ""
    augmentation = " ".join(map(str, augment)) or "no augmentation"
    return f"--test_time_flips {unknown}: {name} was trained without these flips ({augmentation})"
