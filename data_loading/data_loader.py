"""Training loaders by name (`--loader`), and the loading of evaluation cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.messages import note
from data_loading.base_loader import LoaderConfig, TrainingLoader
from data_loading.dataset import case_file, load_boxes, map_array, read_case
from data_loading.device_loader import DeviceLoader, bytes_needed, load_volumes, memory_budget
from data_loading.pytorch_loader import CropDataset, PytorchLoader
from data_loading.spec import DatasetSpec
from data_loading.synthetic_loader import SyntheticLoader
from data_loading.transforms import MLPerfAugmentation

# Share of a GPU's free memory for evaluation volumes; those of KiTS19 are 6.6 GB in total.
EVALUATION_SHARE = 0.25


def make_training_loader(
    name: str, data_dir: Path, cases: Sequence[str], *, spec: DatasetSpec, config: LoaderConfig
) -> TrainingLoader:
    """Returns the loader called `name`. Raises UserError for an unknown name, too few cases, or damaged data."""
    if name not in LOADERS:
        raise UserError(f"--loader {name!r}: unknown loader; available: {', '.join(sorted(LOADERS))}")
    return LOADERS[name](data_dir, cases, spec, config)


def _pytorch(data_dir: Path, cases: Sequence[str], spec: DatasetSpec, config: LoaderConfig) -> TrainingLoader:
    boxes = load_boxes(data_dir, cases, len(spec.classes))
    return PytorchLoader(CropDataset(data_dir, cases, boxes, config), config)


def _device(data_dir: Path, cases: Sequence[str], spec: DatasetSpec, config: LoaderConfig) -> TrainingLoader:
    transform = config.augment(np.random.default_rng(0))
    if config.device.type == "cuda" and not isinstance(transform, MLPerfAugmentation):
        raise UserError("--loader device supports only --augment mlperf on a GPU; use --loader pytorch for others")
    shapes = [map_array(case_file(data_dir, case, "x"), np.float32).shape for case in cases]
    needed, budget = bytes_needed(shapes), memory_budget(config.device)
    if needed > budget:
        note(
            f"--loader device: the volumes need {needed / 2**30:.1f} GiB, half of the free memory is "
            f"{budget / 2**30:.1f} GiB; falling back to --loader pytorch"
        )
        return _pytorch(data_dir, cases, spec, config)
    boxes = load_boxes(data_dir, cases, len(spec.classes))
    return DeviceLoader(cases, load_volumes(data_dir, cases, config), boxes, config)


def _synthetic(data_dir: Path, cases: Sequence[str], spec: DatasetSpec, config: LoaderConfig) -> TrainingLoader:
    return SyntheticLoader(len(cases), spec.channels, len(spec.classes), config)


LOADERS: dict[str, Callable[[Path, Sequence[str], DatasetSpec, LoaderConfig], TrainingLoader]] = {
    "pytorch": _pytorch,
    "device": _device,
    "synthetic": _synthetic,
}


@dataclass(frozen=True)
class EvaluationCase:
    """A whole case: image (1, C, D, H, W) float32 and label (1, 1, D, H, W) uint8."""

    case: str
    image: Tensor
    label: Tensor


def load_evaluation_case(data_dir: Path, case: str) -> EvaluationCase:
    """Reads a whole case into memory. Raises UserError when its files are missing or damaged."""
    image, label = read_case(data_dir, case)
    return EvaluationCase(case, torch.from_numpy(image)[None], torch.from_numpy(label)[None])


class EvaluationCases:
    """Loads evaluation cases onto the device and keeps those that fit, so that the next evaluation reads no files.

    On a CPU none are kept: the operating system's page cache already holds them.
    """

    def __init__(self, data_dir: Path, device: torch.device) -> None:
        self._data_dir = data_dir
        self._device = device
        self._kept: dict[str, EvaluationCase] = {}
        # Bytes left for cases; None: not measured yet (a GPU is measured when the first evaluation begins).
        self._budget: int | None = None if device.type == "cuda" else 0

    def __call__(self, case: str) -> EvaluationCase:
        """Returns a case on the device. Raises UserError when its files are missing or damaged."""
        if case in self._kept:
            return self._kept[case]
        loaded = load_evaluation_case(self._data_dir, case)
        loaded = EvaluationCase(case, loaded.image.to(self._device), loaded.label.to(self._device))
        if self._budget is None:
            self._budget = memory_budget(self._device, EVALUATION_SHARE)
        size = loaded.image.nbytes + loaded.label.nbytes
        if size <= self._budget:
            self._budget -= size
            self._kept[case] = loaded
        return loaded
