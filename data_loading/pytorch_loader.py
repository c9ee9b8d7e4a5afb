"""`--loader pytorch`: random crops of memory-mapped volumes, made by the worker processes of a torch DataLoader."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from common.compat import (
    dataloader_worker_message,
    end_dataloader_workers,
    is_dataloader_timeout,
    is_dataloader_worker_error,
)
from common.errors import UserError, one_line
from common.memory import free_memory_bytes
from data_loading.base_loader import Batch, LoaderConfig, describe_sample
from data_loading.dataset import case_files, map_case
from data_loading.integrity import FileWatch, check_files
from data_loading.preprocessing import Boxes, Shape, as_shape, edge_padding, pad_with_edges
from data_loading.read_ahead import ReadAhead
from data_loading.sampler import EpochSampler, sample_rng
from data_loading.transforms import Transform, draw_crop
from data_loading.worker_signals import blocked_in_new_workers, leave_to_parent


def draw_sample(key: tuple[int, int], shape: Shape, boxes: Boxes, config: LoaderConfig) -> tuple[Shape, Transform]:
    """Draws a sample's crop and augmentation, a pure function of its arguments.

    Args:
        key: (permutation, case index) of `EpochSampler`.
        shape: (D, H, W) of the volume, at least the patch along each axis.
        boxes: the volume's foreground boxes.

    Returns:
        The crop's first voxel (D, H, W), and the augmentation.
    """
    rng = sample_rng(config.sample_seed, *key)
    start = draw_crop(
        rng,
        shape=shape,
        patch=config.patch,
        boxes=boxes,
        oversampling=config.oversampling,
        class_weights=config.class_weights,
    )
    return start, config.augment(rng)


class CropDataset(Dataset[dict[str, NDArray[Any]]]):
    """Random crops of memory-mapped volumes; an item's index is a key (permutation, case index) of `EpochSampler`.

    Only the crop's own voxels are read. A sample is a pure function of the seed and the key, in any process.
    """

    def __init__(self, data_dir: Path, cases: Sequence[str], boxes: Sequence[Boxes], config: LoaderConfig) -> None:
        self.data_dir = data_dir
        self.cases = list(cases)
        self.boxes = list(boxes)
        self.config = config
        # Opened volumes, by case index; empty when a worker process starts, since nothing has been read until then.
        self._maps: dict[int, tuple[FileWatch, tuple[NDArray[np.float32], NDArray[np.uint8]]]] = {}
        self._read_ahead = ReadAhead()

    def open_case(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Returns a case's mapped image and label, kept open: mapping them takes a fifth of a sample's time.

        Raises:
            UserError: a file is damaged, or it vanished or changed since it was mapped. Reading from the map of
                a truncated file kills the process with SIGBUS. The check takes 5 us of a sample's 4 ms (128^3, from the
                page cache).
        """
        if index not in self._maps:
            watch = FileWatch(case_files(self.data_dir, self.cases[index]))
            self._maps[index] = watch, map_case(self.data_dir, self.cases[index])
        watch, arrays = self._maps[index]
        watch.check()
        return arrays

    def __getitem__(self, key: tuple[int, int]) -> dict[str, NDArray[Any]]:
        image, label = self.open_case(key[1])
        start, transform = self._draw(key, image)
        padding = self._padding(image)
        windows, around = _windows([image, label], start, self.config.patch, padding)
        self._read_ahead.request(windows)
        crop, mask = (pad_with_edges(np.array(window), around) for window in windows)
        crop, mask = transform.apply(crop, mask)
        # Drawn and augmented as a whole, so that each part is that of one rank's sample.
        return {"image": crop[:, self.config.planes], "label": mask[:, self.config.planes]}

    def describe(self, key: tuple[int, int]) -> str:
        """Describes a sample in one phrase: its case, crop and augmentation."""
        start, transform = self._draw(key, self.open_case(key[1])[0])
        return describe_sample(self.cases[key[1]], start, transform)

    def _padding(self, image: NDArray[Any]) -> list[tuple[int, int]]:
        return edge_padding(as_shape(image.shape[1:]), self.config.patch)

    def _draw(self, key: tuple[int, int], image: NDArray[Any]) -> tuple[Shape, Transform]:
        padded = [n + sum(both) for n, both in zip(image.shape[1:], self._padding(image), strict=True)]
        # Boxes need no shift by the padding: a padded axis is as long as the patch, so its crop starts at 0 anyway.
        return draw_sample(key, as_shape(padded), self.boxes[key[1]], self.config)


def _windows(
    arrays: Sequence[NDArray[Any]], start: Shape, patch: Shape, padding: list[tuple[int, int]]
) -> tuple[list[NDArray[Any]], list[tuple[int, int]]]:
    """Returns views of what the volumes hold of a crop, which starts in coordinates of the padded volume.

    The second value is the padding that each axis of the crop lacks: only the crop is padded, never the whole volume.
    """
    shape = arrays[0].shape[1:]
    lows = [first - before for first, (before, _) in zip(start, padding, strict=True)]
    inside = tuple(slice(max(low, 0), min(low + n, size)) for low, n, size in zip(lows, patch, shape, strict=True))
    around = [(max(-low, 0), max(low + n - size, 0)) for low, n, size in zip(lows, patch, shape, strict=True)]
    return [array[(slice(None), *inside)] for array in arrays], around


class _BatchSampler:
    """Gives a DataLoader its batches of keys; the epoch is set before each pass."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        self.epoch = 1
        self.start = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        yield from self.sampler.batches(self.epoch)[self.start :]


class PytorchLoader:
    """Makes batches of `CropDataset` in `num_workers` processes, or in this one if that is 0."""

    def __init__(self, dataset: CropDataset, config: LoaderConfig) -> None:
        sampler = config.sampler(len(dataset.cases))
        self._dataset = dataset
        self._sampler = _BatchSampler(sampler)
        # More workers than batches would only idle.
        workers = min(config.num_workers, len(sampler))
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self._sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            # A worker that hangs (dead disk, deadlock) ends the run instead of blocking the cluster.
            timeout=config.worker_timeout_s if workers else 0,
            pin_memory=config.device.type == "cuda",
            worker_init_fn=leave_to_parent,
        )

    def __len__(self) -> int:
        return len(self._sampler)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """As `TrainingLoader.epoch`. Raises UserError when a file is damaged, or a worker is killed or hangs."""
        self._sampler.epoch, self._sampler.start = epoch, start
        pending = iter(self._sampler.sampler.batches(epoch)[start:])
        try:
            with blocked_in_new_workers():
                batches = iter(self._loader)
            for batch in batches:
                next(pending)
                yield batch
        except UserError as error:
            end_dataloader_workers(self._loader)
            raise UserError(dataloader_worker_message(error)) from None
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not is_dataloader_worker_error(error):
                end_dataloader_workers(self._loader)
                raise
            if is_dataloader_timeout(error):
                # A hung worker would outlive this process: torch only asks it to exit, and raises once it has.
                for worker in multiprocessing.active_children():
                    with suppress(RuntimeError):
                        worker.kill()
                        worker.join()
            end_dataloader_workers(self._loader)
            if not is_dataloader_timeout(error):
                # Raises if a file was truncated, perhaps while the worker read it.
                check_files(self._dataset.data_dir, self._dataset.cases)
            cases = ", ".join(self._dataset.cases[index] for _, index in next(pending, []))
            raise UserError(lost_worker_message(error, f"waiting for {cases}")) from error

    def describe(self, epoch: int, batch: int) -> list[str]:
        return [self._dataset.describe(key) for key in self._sampler.sampler.batches(epoch)[batch]]


def lost_worker_message(error: Exception, meanwhile: str) -> str:
    """Returns the message for a worker that was killed or hangs: torch reports its process and signal, but no cause.

    Args:
        meanwhile: what the main process was doing, such as "computing a step".
    """
    if isinstance(error, RuntimeError):
        reason = str(error).splitlines()[0]
    else:
        reason = f"a DataLoader worker was killed ({one_line(error)})"
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    remedy = "raise --worker_timeout" if is_dataloader_timeout(error) else "use a smaller --num_workers"
    return (
        f"{reason} while {meanwhile}; {free_memory_bytes() / 2**30:.1f} GiB of memory "
        f"and {shared / 2**30:.1f} GiB of /dev/shm are free; {remedy}, then --resume"
    )
