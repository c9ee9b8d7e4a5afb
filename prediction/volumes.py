"""Volume and connected components of each class in a mask, as text and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from common.errors import UserError
from common.files import replacing
from data_loading.io.volume import Geometry


@dataclass(frozen=True, order=True, kw_only=True)
class ClassVolume:
    """One class of one mask; voxels that share a face belong to the same component."""

    scan: str
    label: int
    name: str
    voxels: int
    volume_ml: float
    components: int

    def __str__(self) -> str:
        noun = "component" if self.components == 1 else "components"
        # Of voxels of 5 µm, an organ has nanolitres.
        volume = f"{self.volume_ml:.3g}" if 0 < self.volume_ml < 0.001 else f"{self.volume_ml:.3f}"
        return f"{self.scan} {self.name} {volume} ml {self.components} {noun}"


def measure(scan: str, mask: NDArray[np.uint8], geometry: Geometry, classes: Sequence[str]) -> list[ClassVolume]:
    """Returns a row for each foreground class, absent ones included.

    Args:
        mask: (D, H, W).
        classes: names, the background's first.
    """
    regions = ndimage.find_objects(mask, max_label=len(classes) - 1)
    rows = []
    for label, (name, region) in enumerate(zip(classes[1:], regions, strict=True), start=1):
        inside = mask[region] == label if region else np.zeros((0, 0, 0), bool)
        voxels = int(np.count_nonzero(inside))
        rows.append(
            ClassVolume(
                scan=scan,
                label=label,
                name=name,
                voxels=voxels,
                volume_ml=voxels * geometry.voxel_ml,
                components=int(ndimage.label(inside)[1]) if voxels else 0,
            )
        )
    return rows


def write_table(path: Path, rows: Sequence[ClassVolume]) -> None:
    """Writes the rows as CSV, atomically. Raises UserError if the file cannot be written."""
    try:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(field.name for field in fields(ClassVolume))
            writer.writerows([r.scan, r.label, r.name, r.voxels, f"{r.volume_ml:.6g}", r.components] for r in rows)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error.strerror or error}") from None
