"""The loaders: batches of {"image": (N, C, D, H, W) float32, "label": (N, 1, D, H, W) uint8} for a training epoch,
whole volumes for evaluation.

A training loader is called with the epoch and yields that epoch's batches of this rank.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.compat import dataloader_worker_message, is_dataloader_timeout, is_dataloader_worker_error
from common.errors import UserError
from data_loading.dataset import file_of, map_array, map_case, read_case
from data_loading.integrity import FileWatch, both_files, check_files
from data_loading.io.volume import free_memory_bytes
from data_loading.preprocessing import Boxes, Shape, as_shape, edge_padding, pad_with_edges
from data_loading.sampler import EpochSampler, PseudoLabelCap, sample_rng
from data_loading.transforms import RandomTransform, Transform, draw_augmentation, draw_crop

Batch = dict[str, Tensor]

CPU = torch.device("cpu")

# The reference's synthetic loader: 32 random volumes, 64 samples of them an epoch.
SYNTHETIC_VOLUMES = 32
SYNTHETIC_SAMPLES_PER_EPOCH = 64
# A worker that hangs (dead disk, deadlock) ends the run instead of holding the cluster; no crop takes so long.
WORKER_TIMEOUT_S = 40


class TrainingLoader(Protocol):
    """An epoch's batches of one rank."""

    def __len__(self) -> int:
        """Batches an epoch, equal on every rank."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` (counted from 1) from batch `start` (counted from 0) on; those before are not made."""
        ...

    def describe(self, epoch: int, batch: int) -> list[str]:
        """What that batch holds, a phrase a sample, for a report: the case and where its crop begins."""
        ...


@dataclass(frozen=True)
class LoaderSettings:
    """What every training loader is made with.

    Attributes:
        patch: the crop's shape.
        device: where the network computes.
        steps: of `EpochSampler`.
    """

    patch: Shape
    oversampling: float
    batch_size: int
    num_workers: int
    rank: int
    ranks: int
    order_seed: int
    sample_seed: int
    device: torch.device = CPU
    augment: RandomTransform = draw_augmentation
    steps: int | None = None
    capped: PseudoLabelCap = PseudoLabelCap()  # noqa: RUF009

    def order(self, cases: int) -> EpochSampler:
        """In which order so many cases come to this rank. Raises UserError when an epoch has no batch."""
        order = EpochSampler(cases, self.batch_size, self.rank, self.ranks, self.order_seed, self.steps, self.capped)
        len(order)
        return order


@dataclass(frozen=True)
class EvaluationCase:
    """A whole case: image (1, C, D, H, W) float32 and label (1, 1, D, H, W) uint8."""

    case: str
    image: Tensor
    label: Tensor


class CropDataset(Dataset[dict[str, NDArray[Any]]]):
    """Random crops of memory-mapped volumes; an item is asked for by (permutation, case index), see `EpochSampler`.

    A crop reads its own voxels alone. Which crop it is follows from the seed and that pair, whichever process asks.
    """

    def __init__(self, data_dir: Path, cases: Sequence[str], boxes: Sequence[Boxes], settings: LoaderSettings) -> None:
        self.data_dir = data_dir
        self.cases = list(cases)
        self.boxes = list(boxes)
        self.settings = settings
        # Opened volumes, by case index; empty when a worker process starts, since nothing has been read until then.
        self._maps: dict[int, tuple[FileWatch, tuple[NDArray[np.float32], NDArray[np.uint8]]]] = {}

    def open_case(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """The mapped image and label of a case, kept open: to map them anew is a fifth of a sample's time.

        Raises:
            UserError: a file is damaged, or it vanished or changed since it was mapped. Who reads on in the map of one
                that was cut off is killed by SIGBUS. To ask costs 5 us of a sample's 4 ms (128^3, from the page cache).
        """
        if index not in self._maps:
            watch = FileWatch(both_files(self.data_dir, self.cases[index]))
            self._maps[index] = watch, map_case(self.data_dir, self.cases[index])
        watch, arrays = self._maps[index]
        watch.check()
        return arrays

    def __getitem__(self, key: tuple[int, int]) -> dict[str, NDArray[Any]]:
        image, label = self.open_case(key[1])
        padding = self._padding(image)
        start, drawn = self._draw(key, image)
        crop, mask = (_read_crop(array, start, self.settings.patch, padding) for array in (image, label))
        crop, mask = drawn.apply(crop, mask)
        return {"image": crop, "label": mask}

    def _padding(self, image: NDArray[Any]) -> list[tuple[int, int]]:
        return edge_padding(as_shape(image.shape[1:]), self.settings.patch)

    def _draw(self, key: tuple[int, int], image: NDArray[Any]) -> tuple[Shape, Transform]:
        permutation, index = key
        padded = [n + sum(both) for n, both in zip(image.shape[1:], self._padding(image), strict=True)]
        # Boxes need no shift by the padding: a padded axis is as long as the patch, so its crop starts at 0 anyway.
        return draw_sample(permutation, index, as_shape(padded), self.boxes[index], self.settings)

    def describe(self, key: tuple[int, int]) -> str:
        """Which case the sample is of, and where its crop begins."""
        return describe_sample(self.cases[key[1]], *self._draw(key, self.open_case(key[1])[0]))


def describe_sample(case: str, start: Shape, drawn: Transform) -> str:
    """A sample in a phrase, for a report: the crop's first voxel (D, H, W) and what changed its intensities."""
    return f"{case} at {start}, {drawn}"


def draw_sample(
    permutation: int, index: int, shape: Shape, boxes: Boxes, settings: LoaderSettings
) -> tuple[Shape, Transform]:
    """The first voxel of a sample's crop and its augmentation: the same whichever loader or process asks.

    Args:
        shape: of the volume (D, H, W), at least the patch in each axis.
        boxes: of its foreground.
    """
    rng = sample_rng(settings.sample_seed, permutation, index)
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
    """Hands a DataLoader its batches of (permutation, case index); the epoch is set before each pass."""

    def __init__(self, order: EpochSampler) -> None:
        self.order = order
        self.current = 1
        self.start = 0

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        yield from self.order.batches(self.current)[self.start :]


class PytorchLoader:
    """`--loader pytorch`: crops made by a torch DataLoader's worker processes."""

    def __init__(self, dataset: CropDataset, settings: LoaderSettings) -> None:
        order = settings.order(len(dataset.cases))
        self._dataset = dataset
        self._sampler = _EpochSampler(order)
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

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self._sampler.current, self._sampler.start = epoch, start
        awaited = iter(self._sampler.order.batches(epoch)[start:])
        try:
            for batch in self._loader:
                next(awaited)
                yield batch
        except UserError as error:
            raise UserError(dataloader_worker_message(error)) from None
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not is_dataloader_worker_error(error):
                raise
            if is_dataloader_timeout(error):
                # One that hangs would stay when this process ends: torch only asks it to go, and raises when it has.
                for worker in multiprocessing.active_children():
                    with suppress(RuntimeError):
                        worker.kill()
                        worker.join()
            else:
                # It may be that a file was cut off in the middle of a read: raises if one was.
                check_files(self._dataset.data_dir, self._dataset.cases)
            cases = ", ".join(self._dataset.cases[index] for _, index in next(awaited, []))
            raise UserError(lost_worker(error, f"{cases} was awaited")) from error

    def describe(self, epoch: int, batch: int) -> list[str]:
        return [self._dataset.describe(key) for key in self._sampler.order.batches(epoch)[batch]]


def lost_worker(error: Exception, meanwhile: str) -> str:
    """What is known when a worker was killed or hangs: torch names its process and the signal, no cause."""
    torch_says = isinstance(error, RuntimeError)
    reason = str(error) or type(error).__name__
    told = reason.splitlines()[0] if torch_says else f"a DataLoader worker was killed ({reason})"
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return (
        f"{told} while {meanwhile}; {free_memory_bytes() / 2**30:.1f} GiB of memory "
        f"and {shared / 2**30:.1f} GiB of /dev/shm are free; use a smaller --num_workers, then --resume"
    )


class SyntheticLoader:
    """`--loader synthetic`: random volumes made once in memory, so that no disk or augmentation is measured."""

    def __init__(self, samples: int, channels: int, classes: int, settings: LoaderSettings) -> None:
        generator = torch.Generator().manual_seed(settings.sample_seed)
        shape = settings.patch
        self._images = torch.rand(SYNTHETIC_VOLUMES, channels, *shape, generator=generator)
        self._labels = torch.randint(classes, (SYNTHETIC_VOLUMES, 1, *shape), generator=generator, dtype=torch.uint8)
        self._batch_size = settings.batch_size
        self._batches = len(settings.order(samples))

    def __len__(self) -> int:
        return self._batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in range(start, self._batches):
            indices = (torch.arange(self._batch_size) + batch * self._batch_size) % SYNTHETIC_VOLUMES
            yield {"image": self._images[indices], "label": self._labels[indices]}

    def describe(self, epoch: int, batch: int) -> list[str]:
        first = batch * self._batch_size
        return [f"synthetic volume {(first + sample) % SYNTHETIC_VOLUMES}" for sample in range(self._batch_size)]


def synthetic_cases() -> list[str]:
    """Names for an epoch's synthetic samples."""
    return [f"synthetic_{index}" for index in range(SYNTHETIC_SAMPLES_PER_EPOCH)]


def shape_of(data_dir: Path, case: str) -> Shape:
    """The shape (D, H, W) of a case, from its header."""
    return as_shape(map_array(file_of(data_dir, case, "x"), np.float32).shape[1:])


def load_evaluation_case(data_dir: Path, case: str) -> EvaluationCase:
    """A whole case in memory. Raises UserError when its files are missing or damaged."""
    image, label = read_case(data_dir, case)
    return EvaluationCase(case, torch.from_numpy(image)[None], torch.from_numpy(label)[None])
