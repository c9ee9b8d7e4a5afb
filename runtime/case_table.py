"""`--exec_mode evaluate`: writes each case's scores, distances and volumes to evaluation.csv, the worst case first.

MONAI computes the distances, if it is installed (`pip install '.[monai]'`).
"""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.files import replacing
from data_loading.index import INDEX_NAME, CaseRecord, read_index
from data_loading.io.volume import ML_PER_MM3
from data_loading.spec import DatasetSpec
from runtime.logging.events import EvaluationStopped

try:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.surface_dice import compute_surface_dice

    HAS_MONAI = True
except ImportError:
    HAS_MONAI = False

NAME = "evaluation.csv"
# Surfaces at most this far apart agree; two people's outlines of one organ differ by about as much.
TOLERANCE_MM = 1.0
PERCENTILE = 95


class CaseTable:
    """A `CaseMetric` that collects figures during an evaluation and writes them as a table.

    Args:
        data_dir: the preprocessed folder; distances and volumes refer to its grid.
        spec: the data set's constants.
        subset: the part of the split that the cases belong to.
    """

    def __init__(self, data_dir: Path, spec: DatasetSpec, subset: str) -> None:
        self._subset = subset
        self._classes = spec.classes[1:]
        self._spacing_mm = spec.spacing_mm
        self._records: dict[str, CaseRecord] = {}
        if (data_dir / INDEX_NAME).is_file():
            self._records = read_index(data_dir / INDEX_NAME).cases
        self._has_distances = HAS_MONAI
        self._figures: dict[str, list[float]] = {}
        kinds = ["volume_ml", "true_volume_ml"]
        kinds += [f"surface_dice_{TOLERANCE_MM:g}mm", f"hausdorff_{PERCENTILE}_mm"] if self._has_distances else []
        self._columns = [f"{name}_{kind}" for kind in kinds for name in self._classes]
        self.size = len(self._columns)

    def __call__(self, case: str, logits: Tensor, label: Tensor) -> Tensor:
        """Returns volumes, then surface Dice and Hausdorff distance, for each foreground class in turn."""
        predicted = logits.argmax(dim=1, keepdim=True)
        spacing = self._spacing_of(case)
        masks = [(predicted == value, label == value) for value in range(1, len(self._classes) + 1)]
        figures = [
            math.prod(spacing) * ML_PER_MM3 * mask.sum().double() for side in zip(*masks, strict=True) for mask in side
        ]
        if self._has_distances:
            figures += [surface_dice(*pair, spacing) for pair in masks]
            figures += [hausdorff_mm(*pair, spacing) for pair in masks]
        return torch.stack([figure.to(logits.device) for figure in figures])

    def _spacing_of(self, case: str) -> tuple[float, float, float]:
        """Returns the spacing (mm) of the preprocessed grid: resampling keeps the ends of an axis in place."""
        transform = self._records[case].transform if case in self._records else None
        if transform is None:
            return self._spacing_mm or (1.0, 1.0, 1.0)
        return transform.spacing_mm

    def keep(self, figures: dict[str, list[float]]) -> None:
        """Keeps the figures of all cases, by case id, for `write`."""
        self._figures = figures

    def write(self, log_dir: Path, result: EvaluationStopped) -> str:
        """Writes the table atomically.

        Returns:
            A line with the table's path, and what the table lacks.

        Raises:
            UserError: the folder cannot be written.
        """
        path = log_dir / NAME
        header = ["case", "subset", "mean_dice", *(f"{name}_dice" for name in self._classes), *self._columns]
        rows = [[case, sum(dice) / len(dice), *dice, *self._figures[case]] for case, dice in result.per_case.items()]
        rows.sort(key=lambda row: (row[1], row[0]))
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                writer.writerow(header)
                writer.writerows([case, self._subset, *map(_number, figures)] for case, *figures in rows)
        except OSError as error:
            raise UserError(f"--log_dir {log_dir}: {NAME} cannot be written: {error.strerror or error}") from None
        missing = (
            "" if self._has_distances else " (without surface Dice and Hausdorff distance: pip install '.[monai]')"
        )
        return f"cases {path}{missing}"


def _number(value: Any) -> str:
    """Formats a number with six digits; "" if it is not finite, as the distance to a class that is missing."""
    return f"{value:.6g}" if math.isfinite(value) else ""


def surface_dice(predicted: Tensor, true: Tensor, spacing_mm: tuple[float, ...]) -> Tensor:
    """Returns the share of both surfaces that is within `TOLERANCE_MM` of the other; NaN if both masks are empty.

    Args:
        predicted, true: masks, (1, 1, D, H, W) bool.
        spacing_mm: of the voxels, along (D, H, W).
    """
    with warnings.catch_warnings(action="ignore"):  # about empty masks: the result shows them
        score = compute_surface_dice(
            predicted.float().cpu(), true.float().cpu(), [TOLERANCE_MM], include_background=True, spacing=spacing_mm
        )
    return torch.as_tensor(np.asarray(score), dtype=torch.float64).flatten()[0]


def hausdorff_mm(predicted: Tensor, true: Tensor, spacing_mm: tuple[float, ...]) -> Tensor:
    """Returns the 95th percentile of the distances between the surfaces, the larger of both directions.

    Not finite if a mask is empty. The arguments are those of `surface_dice`.
    """
    with warnings.catch_warnings(action="ignore"):  # as above
        distance = compute_hausdorff_distance(
            predicted.float().cpu(),
            true.float().cpu(),
            include_background=True,
            percentile=PERCENTILE,
            spacing=spacing_mm,
        )
    return torch.as_tensor(np.asarray(distance), dtype=torch.float64).flatten()[0]
