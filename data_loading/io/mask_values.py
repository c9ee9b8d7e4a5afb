"""The values of masks: whole numbers, and those that interpolation made.

Masks come from many programs. Some store labels scaled, so that 2 is read as 1.9999999995; some smooth a mask when they
scale or compress it, so that new values appear between its labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError

# Values this close to whole numbers are rounded to them.
ROUNDING = 1e-2
# Number of voxels of a mask that are looked at to find interpolated values.
SAMPLES = 50_000
# A value is interpolated if it was seen this often, and more than this share of it between a lower and a higher one.
FEWEST = 20
SHARE = 0.95
# Values further apart than this are found by sorting.
LONGEST_TABLE = 1 << 24


def whole_numbers(
    path: Path, array: NDArray[Any], dtype: type[np.generic]
) -> tuple[NDArray[np.generic], tuple[str, ...]]:
    """Returns a mask's values as whole numbers of type `dtype`, and a note if some were rounded.

    What is whole in float32 counts as whole, since most programs read masks as float32.

    Raises:
        UserError: a value is not finite, not whole or outside the type's range.
    """
    notes: tuple[str, ...] = ()
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise UserError(f"{path}: the mask holds NaN or infinity; expected whole numbers")
        rounded = np.rint(array)
        off = array.astype(np.float32) != rounded.astype(np.float32)
        if count := np.count_nonzero(off):
            value = np.float32(array[off][np.abs(array - rounded)[off].argmax()])
            found = f"{value!s} among {count} {'voxel' if count == 1 else 'voxels'} that are not whole"
            if abs(value - np.rint(value)) > ROUNDING:
                raise UserError(
                    f"{path}: a mask must hold whole numbers, found {found}; export it without interpolation"
                )
            notes = (f"{path.name}: rounded to whole numbers: {found}",)
        array = rounded
    low, high = (int(end) for end in (array.min(), array.max()))
    limits = np.iinfo(dtype)  # type: ignore[type-var]
    if low < limits.min or high > limits.max:
        remedy = "; --labels reaches other numbers" if dtype is np.uint8 else ""
        raise UserError(
            f"{path}: a mask must hold whole numbers from {limits.min} to {limits.max}, found {low} to {high}{remedy}"
        )
    return array.astype(dtype, copy=False), notes


# {value: (voxels looked at, voxels between a lower and a higher neighbour)}
Found = dict[int, tuple[int, int]]


def find_values(mask: NDArray[Any], ignore_label: int | None = None) -> Found:
    """Finds the values of a mask, and how often each but 0 lies between a lower and a higher one among its neighbours.

    Interpolation makes values only there; a structure of its own has an inside, or a border to one side only.

    Args:
        mask: (1, D, H, W) whole numbers. Of a large one, evenly spaced voxels are looked at.
        ignore_label: value of voxels without a class, which are passed over.
    """
    mask = mask[0] if ignore_label is None else np.where(mask[0] == ignore_label, 0, mask[0])
    positions = np.flatnonzero(mask)
    positions = positions[:: max(1, len(positions) // SAMPLES)]
    voxels = np.unravel_index(positions, mask.shape)
    values = mask[voxels]
    low, high = values.copy(), values.copy()
    for steps in itertools.product((-1, 0, 1), repeat=3):
        around = tuple(np.clip(axis + step, 0, n - 1) for axis, step, n in zip(voxels, steps, mask.shape, strict=True))
        np.minimum(low, mask[around], out=low)
        np.maximum(high, mask[around], out=high)
    is_between = (low < values) & (values < high)
    found: Found = dict.fromkeys(_distinct(mask), (0, 0))
    for value in np.unique(values).tolist():
        found[value] = (int(np.count_nonzero(values == value)), int(np.count_nonzero(is_between[values == value])))
    return found


def _distinct(mask: NDArray[Any]) -> list[int]:
    """Returns the values of a mask in ascending order, without sorting its voxels if they are close together."""
    low, high = int(mask.min()), int(mask.max())
    if high - low > LONGEST_TABLE:
        distinct: list[int] = np.unique(mask).tolist()
        return distinct
    is_found = np.zeros(high - low + 1, bool)
    is_found[mask.astype(np.int64) - low if low else mask] = True
    return [int(index) + low for index in np.flatnonzero(is_found)]


def merged(found: Iterable[Found]) -> Found:
    """Adds up what several masks hold."""
    total: Found = {}
    for each in found:
        for value, (looked_at, between) in each.items():
            before = total.get(value, (0, 0))
            total[value] = (before[0] + looked_at, before[1] + between)
    return total


def check_not_interpolated(found: Found, source: str) -> None:
    """Raises UserError if a value lies almost only between others: it is no class of its own.

    Args:
        source: where the masks come from, for the error message.
    """
    between = [
        value
        for value, (looked_at, count) in sorted(found.items())
        if looked_at >= FEWEST and count > SHARE * looked_at
    ]
    if between:
        listed = ", ".join(map(str, between[:5])) + (", …" if len(between) > 5 else "")
        classes = " ".join(f"{value}={number}" for number, value in enumerate(sorted(found.keys() - {0})[:3], 1))
        raise UserError(
            f"{source}: value {listed} lies only between lower and higher values, as interpolation makes them; export "
            f"the masks without interpolation, or list the classes, such as --labels {classes}"
        )
