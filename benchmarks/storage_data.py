"""Data sets for `--suite storage`: files of MLPerf Storage's sizes, and the two ways to read a sample from them."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import (
    RemappingDataset,
    disk_bytes_read,
    files_of,
    read_through,
    save_case,
    write_index,
)
from common.errors import UserError
from data_loading.base_loader import LoaderConfig
from data_loading.dataset import load_boxes
from data_loading.index import CaseRecord
from data_loading.preprocessing import Box, Shape
from data_loading.pytorch_loader import CropDataset
from data_loading.spec import KITS19

# MLPerf Storage's size distribution of an unet3d file, in bytes.
MEAN_BYTES, STD_BYTES = 146_600_628, 68_341_808
# A file there is a case here, image and label: 4 + 1 bytes per voxel, which gives KiTS19's mean of 29.3 Mvoxel.
BYTES_PER_VOXEL = 5
PATCH = (128, 128, 128)
# MLPerf Storage's rule, so that the page cache cannot hold the data set.
TIMES_MEMORY = 5
# A measurement must not fill a disk that others work on.
DISK_SHARE = 0.5
# One random block is repeated: drawing 25 GB would take longer than writing them.
BLOCK_VOXELS = 1 << 20


class Reading(ABC):
    """How a sample is read from a data set, and the files of that data set.

    Attributes:
        keeps_files_open: whether a worker opens each file once, in its first epoch.
    """

    name: str
    keeps_files_open: bool

    @abstractmethod
    def write(self, folder: Path, shapes: Sequence[Shape], patch: Shape) -> list[str]:
        """Writes a case of 5 bytes per voxel for each shape (D, H, W); returns the case ids."""

    @abstractmethod
    def files(self, folder: Path, cases: Iterable[str]) -> list[Path]:
        """Returns the files of the cases, each once."""

    @abstractmethod
    def dataset(self, folder: Path, cases: Sequence[str], config: LoaderConfig, is_cold: bool) -> CropDataset:
        """Returns the samples of the cases. If `is_cold`, it keeps no file mapped, so that the system can drop it."""


class CropReading(Reading):
    """This project's: a crop of the mapped image and label, augmented."""

    name = "crops"
    keeps_files_open = True

    def write(self, folder: Path, shapes: Sequence[Shape], patch: Shape) -> list[str]:
        return write_volumes(folder, shapes, patch)

    def files(self, folder: Path, cases: Iterable[str]) -> list[Path]:
        return files_of(folder, cases)

    def dataset(self, folder: Path, cases: Sequence[str], config: LoaderConfig, is_cold: bool) -> CropDataset:
        kind = RemappingDataset if is_cold else CropDataset
        return kind(folder, cases, load_boxes(folder, cases, len(KITS19.classes)), config)


class WholeFileReading(Reading):
    """MLPerf Storage's: all of an NPZ file that holds one sample, of which a part of fixed size is handed over."""

    name = "whole files"
    keeps_files_open = False

    def write(self, folder: Path, shapes: Sequence[Shape], patch: Shape) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        block = np.random.default_rng(0).integers(256, size=BLOCK_VOXELS, dtype=np.uint8)
        cases = [f"case_{number:05d}" for number in range(len(shapes))]
        for path, shape in zip(self.files(folder, cases), shapes, strict=True):
            with path.open("wb") as stream:
                np.savez(stream, x=np.resize(block, bytes_of(shape)))
                stream.flush()
                os.fsync(stream.fileno())
        return cases

    def files(self, folder: Path, cases: Iterable[str]) -> list[Path]:
        return [folder / f"{case}.npz" for case in dict.fromkeys(cases)]

    def dataset(self, folder: Path, cases: Sequence[str], config: LoaderConfig, is_cold: bool) -> CropDataset:
        return WholeFileDataset(folder, cases, [{} for _ in cases], config)


class WholeFileDataset(CropDataset):
    """Reads a case's NPZ file into memory, and hands over as many bytes as the patch has voxels: 2 MiB for 128³."""

    def __getitem__(self, key: tuple[int, int]) -> dict[str, NDArray[Any]]:
        with np.load(self.data_dir / f"{self.cases[key[1]]}.npz", allow_pickle=False) as arrays:
            record = arrays["x"]
        return {"image": record[: math.prod(self.config.patch)]}


def describe_scale(total: int, memory: int) -> str:
    """Says how a data set of `total` bytes stands to the rule of five times the memory, for a table's head."""
    share = total / (TIMES_MEMORY * memory)
    if share >= 1:
        return f"data set {total / memory:.1f} times the memory"
    return f"scaled: data set {total / 1e9:.3g} GB, {100 * share:.2g} % of five times the memory"


def cases_of_full_size(memory: int) -> int:
    """Returns the number of cases that surely make five times the memory: its mean's 4 standard deviations more."""
    mean = TIMES_MEMORY * memory / MEAN_BYTES
    return math.ceil(mean + 4 * math.sqrt(mean) * STD_BYTES / MEAN_BYTES) + 1


def draw_sizes(rng: np.random.Generator, cases: int, patch: Shape) -> NDArray[np.float64]:
    """Draws the bytes of each case from the size distribution, which scales with the patch.

    None is smaller than a crop, as after preprocessing. Raises UserError for fewer than 2 cases.
    """
    if cases < 2:
        raise UserError(f"--cases {cases}: the storage suite needs at least 2")
    scale = math.prod(patch) / math.prod(PATCH)
    sizes = rng.normal(scale * MEAN_BYTES, scale * STD_BYTES, cases)
    return np.maximum(sizes, BYTES_PER_VOXEL * math.prod(patch))


def volume_shape(size: float, patch: Shape) -> Shape:
    """A volume (D, H, W) of about `size` bytes, in proportion to 160 x 400 x 400, at least the patch in each axis."""
    voxels = size / BYTES_PER_VOXEL
    depth = max(patch[0], round((voxels * 0.4**2) ** (1 / 3)))
    side = max(patch[1], patch[2], round(math.sqrt(voxels / depth)))
    return depth, side, side


def bytes_of(shape: Shape) -> int:
    """Returns the bytes of a case's voxels, image and label."""
    return BYTES_PER_VOXEL * math.prod(shape)


def fit_to_disk(shapes: list[Shape], free: int) -> tuple[list[Shape], list[str]]:
    """As many volumes as fit into half of the `free` bytes, with a note if some are left out.

    Raises:
        UserError: there is no room for 2.
    """
    needed = np.cumsum([bytes_of(shape) for shape in shapes])
    fitting = int((needed <= DISK_SHARE * free).sum())
    if fitting < 2:
        raise UserError(
            f"the storage suite needs {needed[1] / DISK_SHARE / 1e9:.2f} GB free for 2 cases, it uses at most "
            f"half, and {free / 1e9:.2f} GB are free; choose another --work_dir"
        )
    left_out = f"Of {len(shapes)} cases {fitting} fit into half of the free disk space; the others were left out."
    return shapes[:fitting], [left_out] if fitting < len(shapes) else []


def write_volumes(folder: Path, shapes: Sequence[Shape], patch: Shape) -> list[str]:
    """Writes a preprocessed folder of noise with the boxes of two kidneys per case; returns the case ids."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal(BLOCK_VOXELS, dtype=np.float32)
    label = rng.integers(len(KITS19.classes), size=BLOCK_VOXELS, dtype=np.uint8)
    records: dict[str, CaseRecord] = {}
    for number, shape in enumerate(shapes):
        case = f"case_{number:05d}"
        boxes = {1: [_kidney(shape, patch, side) for side in (0.25, 0.75)]}
        records[case] = save_case(
            folder, case, image=np.resize(image, (1, *shape)), label=np.resize(label, (1, *shape)), boxes=boxes
        )
    write_index(folder, records)
    return list(records)


def _kidney(shape: Shape, patch: Shape, side: float) -> Box:
    """A box of half the patch, in the middle of D and H and at `side` of W: foreground crops cluster there."""
    lows = [round(n * at) - length // 4 for n, at, length in zip(shape, (0.5, 0.5, side), patch, strict=True)]
    return (lows[0], lows[1], lows[2], *(low + length // 2 for low, length in zip(lows, patch, strict=True)))  # type: ignore[return-value]


def was_dropped(path: Path) -> bool:
    """Whether reading a file with dropped pages makes the disk deliver bytes; True if the system does not count."""
    before = disk_bytes_read()
    read_through([path])
    after = disk_bytes_read()
    return before is None or after is None or after > before
