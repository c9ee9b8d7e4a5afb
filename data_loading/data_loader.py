"""The table of training loaders, making the one that `--loader` names; and the evaluation's cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.messages import note
from data_loading.dataset import file_of, load_boxes, map_array
from data_loading.device_loader import DeviceLoader, bytes_needed, load_volumes, memory_budget
from data_loading.pytorch_loader import (
    CropDataset,
    EvaluationCase,
    LoaderSettings,
    PytorchLoader,
    SyntheticLoader,
    TrainingLoader,
    load_evaluation_case,
)
from data_loading.spec import DatasetSpec
from data_loading.transforms import Augmentation

# Of a GPU's free memory when the first evaluation begins: KiTS19's evaluation volumes are 6.6 GB over all ranks.
EVALUATION_SHARE = 0.25


def make_training_loader(
    name: str, data_dir: Path, cases: Sequence[str], spec: DatasetSpec, settings: LoaderSettings
) -> TrainingLoader:
    """The loader of that name. Raises UserError for one that does not exist or cannot be filled."""
    if name not in LOADERS:
        raise UserError(f"--loader {name!r} does not exist; there are {', '.join(sorted(LOADERS))}")
    return LOADERS[name](data_dir, cases, spec, settings)


def _pytorch(data_dir: Path, cases: Sequence[str], spec: DatasetSpec, settings: LoaderSettings) -> TrainingLoader:
    boxes = load_boxes(data_dir, cases, len(spec.classes))
    return PytorchLoader(CropDataset(data_dir, cases, boxes, settings), settings)


def _device(data_dir: Path, cases: Sequence[str], spec: DatasetSpec, settings: LoaderSettings) -> TrainingLoader:
    drawn = settings.augment(np.random.default_rng(0))
    if settings.device.type == "cuda" and not isinstance(drawn, Augmentation):
        raise UserError(
            "--loader device augments on the GPU by mlperf alone; use --loader pytorch for another --augment"
        )
    shapes = [map_array(file_of(data_dir, case, "x"), np.float32).shape for case in cases]
    needed, budget = bytes_needed(shapes), memory_budget(settings.device)
    if needed > budget:
        note(
            f"--loader device: the volumes need {needed / 2**30:.1f} GiB, half of the free memory is "
            f"{budget / 2**30:.1f} GiB; going on with --loader pytorch"
        )
        return _pytorch(data_dir, cases, spec, settings)
    boxes = load_boxes(data_dir, cases, len(spec.classes))
    return DeviceLoader(cases, load_volumes(data_dir, cases, settings), boxes, settings)


def _synthetic(data_dir: Path, cases: Sequence[str], spec: DatasetSpec, settings: LoaderSettings) -> TrainingLoader:
    return SyntheticLoader(len(cases), spec.channels, len(spec.classes), settings)


LOADERS: dict[str, Callable[[Path, Sequence[str], DatasetSpec, LoaderSettings], TrainingLoader]] = {
    "pytorch": _pytorch,
    "device": _device,
    "synthetic": _synthetic,
}


class EvaluationCases:
    """Loads evaluation cases onto the device, and keeps there what fits: the next evaluation reads nothing.

    On a CPU nothing is kept, for the operating system's page cache keeps it already.
    """

    def __init__(self, data_dir: Path, device: torch.device) -> None:
        self._data_dir = data_dir
        self._device = device
        self._kept: dict[str, EvaluationCase] = {}
        self._budget: int | None = None if device.type == "cuda" else 0

    def __call__(self, case: str) -> EvaluationCase:
        """A case on the device. Raises UserError when its files are missing or damaged."""
        if case in self._kept:
            return self._kept[case]
        loaded = load_evaluation_case(self._data_dir, case)
        loaded = EvaluationCase(case, loaded.image.to(self._device), loaded.label.to(self._device))
        if self._budget is None:
            self._budget = memory_budget(self._device, EVALUATION_SHARE)
        if loaded.image.nbytes + loaded.label.nbytes <= self._budget:
            self._budget -= loaded.image.nbytes + loaded.label.nbytes
            self._kept[case] = loaded
        return loaded
