"""Refuses scans whose values no network can use, in preprocessing as in prediction."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from data_loading.io.volume import Volume
from data_loading.preprocessing import GridTransform, preprocess_image
from data_loading.spec import DatasetSpec


def preprocess_scan(
    image: Volume, spec: DatasetSpec, source: object, *, is_whole: bool = True
) -> tuple[NDArray[np.float32], GridTransform]:
    """Preprocesses a scan as `preprocess_image` does, if its values allow it.

    Args:
        source: its name or path, for error messages.
        is_whole: a part of a scan may hold one value everywhere, such as air.

    Raises:
        UserError: voxels are not finite, before or after preprocessing, or all equal.
    """
    array = image.array
    if not np.isfinite(array).all():
        nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
        listed = [f"NaN in {nan}"] * (nan > 0) + [f"infinity or values beyond float32 in {infinite}"] * (infinite > 0)
        raise UserError(
            f"{source}: the scan contains NaN or infinity: {' and '.join(listed)} of its {array.size} voxels; repair "
            "or remove it"
        )
    if is_whole and array.size > 1 and (low := array.min()) == array.max():
        raise UserError(f"{source}: all {array.size} voxels of the scan are {low:g}; export it again or remove it")
    with np.errstate(over="ignore", invalid="ignore"):
        preprocessed, transform = preprocess_image(image, spec)
    if unfit := preprocessed.size - int(np.count_nonzero(np.isfinite(preprocessed))):
        raise UserError(
            f"{source}: {unfit} voxels are too large to be normalised (up to {array.max():g}); repair or remove it"
        )
    return preprocessed, transform
