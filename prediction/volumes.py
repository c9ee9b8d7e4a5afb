"""What a mask holds: each class's volume and connected components, as lines and as CSV."""

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
from data_loading.io.volume import ML_PER_MM3, Geometry


@dataclass(frozen=True, order=True)
class Row:
    """One class of one mask; `components` are connected by faces."""

    scan: str
    label: int
    name: str
    voxels: int
    volume_ml: float
    components: int

    def __str__(self) -> str:
        many = "component" if self.components == 1 else "components"
        return f"{self.scan} {self.name} {self.volume_ml:.3f} ml {self.components} {many}"


def measure(scan: str, mask: NDArray[np.uint8], geometry: Geometry, classes: Sequence[str]) -> list[Row]:
    """A row for each foreground class, those without a voxel too.

    Args:
        mask: (D, H, W).
    """
    # The determinant, not the product of spacings: the axes of a tilted gantry are not at right angles.
    voxel_ml = abs(float(np.linalg.det(geometry.affine[:3, :3]))) * ML_PER_MM3
    regions = ndimage.find_objects(mask, max_label=len(classes) - 1)
    rows = []
    for value, name in enumerate(classes):
        if value == 0:
            continue
        region = regions[value - 1]
        inside = mask[region] == value if region else np.zeros((0, 0, 0), bool)
        voxels = int(np.count_nonzero(inside))
        components = ndimage.label(inside)[1] if voxels else 0
        rows.append(Row(scan, value, name, voxels, voxels * voxel_ml, int(components)))
    return rows


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows as CSV, atomically. Raises UserError where the folder cannot be written."""
    try:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(field.name for field in fields(Row))
            writer.writerows([r.scan, r.label, r.name, r.voxels, f"{r.volume_ml:.6g}", r.components] for r in rows)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error.strerror or error}") from None
