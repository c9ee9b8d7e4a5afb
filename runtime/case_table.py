"""`--exec_mode evaluate`: writes each case's scores, distances and volumes to evaluation.csv, the worst case first."""

from __future__ import annotations

import csv
import errno
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from common.files import replacing
from data_loading.index import INDEX_NAME, CaseRecord, read_index
from data_loading.io.volume import volume_ml
from data_loading.spec import DatasetSpec
from runtime.distributed.world import World
from runtime.logging.events import EvaluationStopped
from runtime.surface_distance import PERCENTILE, TOLERANCE_MM, surface_figures

NAME = "evaluation.csv"


def prepare_table(log_dir: Path, world: World) -> None:
    """Makes the table's folder before the evaluation, so that one that cannot be written is found at once.

    Every rank must call it; rank 0 makes the folder.

    Raises:
        UserError: on every rank, if the folder cannot be made or written, or a folder has the table's name.
    """
    problem: UserError | None = None
    if world.is_main:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            if (log_dir / NAME).is_dir():
                raise IsADirectoryError(errno.EISDIR, "is a folder")
            with tempfile.TemporaryFile(dir=log_dir):
                pass
        except OSError as error:
            problem = _unwritable(log_dir, error)
    if problem := world.broadcast(problem):
        raise problem


def _unwritable(log_dir: Path, error: OSError) -> UserError:
    return UserError(f"--log_dir {log_dir}: {NAME} cannot be written: {error.strerror or error}")


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
        self._figures: dict[str, list[float]] = {}
        kinds = ["volume_ml", "true_volume_ml", f"surface_dice_{TOLERANCE_MM:g}mm", f"hausdorff_{PERCENTILE}_mm"]
        self._columns = [f"{name}_{kind}" for kind in kinds for name in self._classes]
        self.size = len(self._columns)

    def __call__(self, case: str, prediction: Tensor, label: Tensor) -> Tensor:
        """Returns volumes, then surface Dice and Hausdorff distance, for each foreground class in turn."""
        steps_mm = self._steps_of(case)
        masks = [(prediction == value, label == value) for value in range(1, len(self._classes) + 1)]
        voxel_ml = volume_ml(steps_mm)
        volumes = [voxel_ml * mask.sum().double() for side in zip(*masks, strict=True) for mask in side]
        surfaces = [
            surface_figures(one[0, 0].cpu().numpy(), other[0, 0].cpu().numpy(), steps_mm) for one, other in masks
        ]
        distances = torch.tensor(surfaces, dtype=torch.float64).T.flatten()
        return torch.cat([torch.stack(volumes), distances.to(label.device)])

    def _steps_of(self, case: str) -> NDArray[np.float64]:
        """Returns the steps (mm) between the voxels of the preprocessed grid, as the columns of a (3, 3) matrix."""
        transform = self._records[case].transform if case in self._records else None
        return np.diag(self._spacing_mm or (1.0, 1.0, 1.0)) if transform is None else transform.steps_mm

    def keep(self, figures: dict[str, list[float]]) -> None:
        """Keeps the figures of all cases, by case id, for `write`."""
        self._figures = figures

    def write(self, log_dir: Path, result: EvaluationStopped) -> str:
        """Writes the table atomically.

        Returns:
            A line with the table's path.

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
            raise _unwritable(log_dir, error) from None
        return f"cases {path}"


def _number(value: Any) -> str:
    """Formats a number with six digits; "" if it is not finite, as the distance to a class that is missing."""
    return f"{value:.6g}" if math.isfinite(value) else ""
