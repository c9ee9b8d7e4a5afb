"""The loaders: batches of {"image": (N, C, D, H, W) float32, "label": (N, 1, D, H, W) uint8} for a training epoch,
whole volumes for evaluation.

A training loader is called with the epoch and yields that epoch's batches of this rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_loading.augmentation import Augmentation, DrawAugmentation, augment, draw_augmentation, draw_crop
from data_loading.dataset import file_of, map_array, map_case
from data_loading.preprocessing import Boxes, Shape, as_shape, edge_padding, pad_with_edges
from data_loading.sampling import EpochOrder, batches_per_epoch, sample_rng
from data_loading.volume import free_memory_bytes
from errors import UserError

Batch = dict[str, Tensor]

CPU = torch.device("cpu")

# The reference's synthetic loader: 32 random volumes, 64 samples of them an epoch.
SYNTHETIC_VOLUMES = 32
SYNTHETIC_SAMPLES_PER_EPOCH = 64
# A worker that hangs (dead disk, deadlock) ends the run instead of holding the cluster; no crop takes minutes.
WORKER_TIMEOUT_S = 600


class TrainingLoader(Protocol):
    """An epoch's batches of one rank."""

    def __len__(self) -> int:
        """Batches an epoch, equal on every rank."""
        ...

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of `epoch`, counted from 1."""
        ...


@dataclass(frozen=True)
class LoaderSettings:
    """What every training loader is made with; `patch` is the crop's shape, `device` where the network computes."""

    patch: Shape
    oversampling: float
    batch_size: int
    num_workers: int
    rank: int
    ranks: int
    order_seed: int
    sample_seed: int
    device: torch.device = CPU
    augment: DrawAugmentation = draw_augmentation


@dataclass(frozen=True)
class EvaluationCase:
    """A whole case: image (1, C, D, H, W) float32 and label (1, 1, D, H, W) uint8."""

    case: str
    image: Tensor
    label: Tensor


class CropDataset(Dataset[dict[str, NDArray[Any]]]):
    """Random crops of memory-mapped volumes; an item is asked for by (epoch, case index).

    A crop reads its own voxels alone. Which crop it is follows from (seed, epoch, case), whichever process asks.
    """

    def __init__(self, data_dir: Path, cases: Sequence[str], boxes: Sequence[Boxes], settings: LoaderSettings) -> None:
        self.data_dir = data_dir
        self.cases = list(cases)
        self.boxes = list(boxes)
        self.settings = settings
        # Opened volumes, by case index; empty when a worker process starts, since nothing has been read until then.
        self._maps: dict[int, tuple[NDArray[np.float32], NDArray[np.uint8]]] = {}

    def open_case(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """The mapped image and label of a case, kept open: to map them anew is a fifth of a sample's time."""
        if index not in self._maps:
            self._maps[index] = map_case(self.data_dir, self.cases[index])
        return self._maps[index]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, NDArray[Any]]:
        epoch, index = key
        settings = self.settings
        image, label = self.open_case(index)
        shape = as_shape(image.shape[1:])
        padding = edge_padding(shape, settings.patch)
        padded_shape = as_shape([n + sum(both) for n, both in zip(shape, padding, strict=True)])
        # Boxes need no shift by the padding: a padded axis is as long as the patch, so its crop starts at 0 anyway.
        start, drawn = draw_sample(epoch, index, padded_shape, self.boxes[index], settings)
        crop, mask = (_read_crop(array, start, settings.patch, padding) for array in (image, label))
        crop, mask = augment(crop, mask, drawn)
        return {"image": crop, "label": mask}


def draw_sample(
    epoch: int, index: int, shape: Shape, boxes: Boxes, settings: LoaderSettings
) -> tuple[Shape, Augmentation]:
    """The first voxel of a sample's crop and its augmentation: the same whichever loader or process asks.

    Args:
        shape: of the volume (D, H, W), at least the patch in each axis.
        boxes: of its foreground.
    """
    rng = sample_rng(settings.sample_seed, epoch, index)
    start = draw_crop(rng, shape, settings.patch, boxes, settings.oversampling)
    return start, settings.augment(rng)


def _read_crop(array: NDArray[Any], start: Shape, patch: Shape, padding: list[tuple[int, int]]) -> NDArray[Any]:
    """A crop in the coordinates of the padded volume; the padding itself is made here, never the whole volume."""
    shape = array.shape[1:]
    lows = [first - before for first, (before, _) in zip(start, padding, strict=True)]
    inside = tuple(slice(max(low, 0), min(low + n, size)) for low, n, size in zip(lows, patch, shape, strict=True))
    crop = np.array(array[(slice(None), *inside)])
    around = [(max(-low, 0), max(low + n - size, 0)) for low, n, size in zip(lows, patch, shape, strict=True)]
    return pad_with_edges(crop, around)


class _EpochSampler:
    """Hands a DataLoader its batches of (epoch, case index); the epoch is set before each pass."""

    def __init__(self, order: EpochOrder) -> None:
        self.order = order
        self.current = 1

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.order.batches(self.current):
            yield [(self.current, index) for index in batch]


class PytorchLoader:
    """`--loader pytorch`: crops made by a torch DataLoader's worker processes."""

    def __init__(self, dataset: CropDataset, settings: LoaderSettings) -> None:
        cases = len(dataset.cases)
        order = EpochOrder(cases, settings.batch_size, settings.rank, settings.ranks, settings.order_seed)
        self._dataset = dataset
        self._sampler = _EpochSampler(order)
        len(order)  # raises when an epoch has no batch
        # More workers than batches would only idle.
        workers = min(settings.num_workers, len(order))
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self._sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            timeout=WORKER_TIMEOUT_S if workers else 0,
            pin_memory=settings.device.type == "cuda",
        )

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        self._sampler.current = epoch
        awaited = iter(self._sampler.order.batches(epoch))
        try:
            for batch in self._loader:
                next(awaited)
                yield batch
        except UserError as error:
            # torch wraps a worker's error into the worker's traceback, which ends with the message.
            raise UserError(str(error).rstrip().rsplit(f"{UserError.__qualname__}: ", 1)[-1]) from None
        except RuntimeError as error:
            if not str(error).startswith("DataLoader"):
                raise
            raise UserError(self._lost_worker(error, next(awaited, []))) from error

    def _lost_worker(self, error: RuntimeError, batch: list[int]) -> str:
        """What is known when a worker was killed or hangs: torch names its process and the signal, no cause."""
        cases = ", ".join(self._dataset.cases[index] for index in batch)
        shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
        return (
            f"{str(error).splitlines()[0]} while {cases} was awaited; {free_memory_bytes() / 2**30:.1f} GiB of memory "
            f"and {shared / 2**30:.1f} GiB of /dev/shm are free; use a smaller --num_workers"
        )


class SyntheticLoader:
    """`--loader synthetic`: random volumes made once in memory, so that no disk or augmentation is measured."""

    def __init__(self, samples: int, channels: int, classes: int, settings: LoaderSettings) -> None:
        generator = torch.Generator().manual_seed(settings.sample_seed)
        shape = settings.patch
        self._images = torch.rand(SYNTHETIC_VOLUMES, channels, *shape, generator=generator)
        self._labels = torch.randint(classes, (SYNTHETIC_VOLUMES, 1, *shape), generator=generator, dtype=torch.uint8)
        self._batch_size = settings.batch_size
        self._batches = batches_per_epoch(samples, settings.batch_size, settings.ranks)

    def __len__(self) -> int:
        return self._batches

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for batch in range(self._batches):
            indices = (torch.arange(self._batch_size) + batch * self._batch_size) % SYNTHETIC_VOLUMES
            yield {"image": self._images[indices], "label": self._labels[indices]}


def synthetic_cases() -> list[str]:
    """Names for an epoch's synthetic samples."""
    return [f"synthetic_{index}" for index in range(SYNTHETIC_SAMPLES_PER_EPOCH)]


def shape_of(data_dir: Path, case: str) -> Shape:
    """The shape (D, H, W) of a case, from its header."""
    return as_shape(map_array(file_of(data_dir, case, "x"), np.float32).shape[1:])


def load_evaluation_case(data_dir: Path, case: str) -> EvaluationCase:
    """A whole case in memory. Raises UserError when its files are missing or damaged."""
    image, label = map_case(data_dir, case)
    return EvaluationCase(case, torch.from_numpy(np.array(image))[None], torch.from_numpy(np.array(label))[None])
