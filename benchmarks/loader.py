"""`--suite loader`: samples/s of every loader compared with a naive one, and the bytes that a sample reads."""

from __future__ import annotations

import itertools
import math
import mmap
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.data import MB, RemappingDataset, disk_bytes_read, drop_caches, files_of, worker_count, write_patients
from benchmarks.harness import NOT_MEASURED, Comparison, Options, Table, compare
from benchmarks.naive import NaiveCropDataset
from common.messages import notes_held, take_notes
from data_loading.base_loader import LoaderConfig, TrainingLoader
from data_loading.data_loader import make_training_loader
from data_loading.dataset import load_boxes
from data_loading.preprocessing import Shape
from data_loading.pytorch_loader import CropDataset, draw_sample
from data_loading.spec import KITS19

SHAPE, PATCH = (160, 400, 400), (128, 128, 128)
QUICK_SHAPE, QUICK_PATCH = (24, 40, 40), (16, 16, 16)
PAIRS, QUICK_PAIRS = 7, 2
VOLUMES = 4
# Samples per timing: the naive loader takes about 0.1 s each, twice that if it labels components; a loader's epoch must
# last longer than its start.
NAIVE_SAMPLES, LOADER_SAMPLES = 4 * VOLUMES, 32 * VOLUMES
# Bytes per voxel of the image and of the label.
ITEMSIZES = (4, 1)
# Number of crops whose pages are counted, and of samples read from a cold disk.
COUNTED_CROPS, COLD_SAMPLES = 200, 8


def run(options: Options) -> list[Table]:
    """Runs the suite: samples/s of the loaders, and the bytes that a sample reads."""
    shape, patch = (QUICK_SHAPE, QUICK_PATCH) if options.quick else (SHAPE, PATCH)
    folder = options.work_dir / "loader"
    cases = write_patients(folder, VOLUMES, shape)
    settings = LoaderConfig(
        patch=patch,
        oversampling=0.4,
        batch_size=2,
        num_workers=0,
        rank=0,
        ranks=1,
        order_seed=0,
        sample_seed=0,
        device=options.device,
    )
    return [
        measure_rates(options, folder, cases=cases, shape=shape, settings=settings),
        count_bytes(folder, cases, shape, settings),
    ]


def measure_rates(options: Options, folder: Path, cases: Sequence[str], shape: Shape, settings: LoaderConfig) -> Table:
    """Samples/s of each loader, and its ratio to the naive loader, which it alternates with."""
    # The cases are repeated: each index of the same file gives another crop.
    few, many = list(cases) * (NAIVE_SAMPLES // len(cases)), list(cases) * (LOADER_SAMPLES // len(cases))
    naive = NaiveCropDataset(folder, few, settings)
    ours = CropDataset(folder, few, load_boxes(folder, few, len(KITS19.classes)), settings)
    naive_block = next_epochs(lambda epoch: [naive[epoch, index] for index in range(len(few))])
    pairs = QUICK_PAIRS if options.quick else PAIRS

    def against_naive(work: Callable[[int], object], samples: int) -> tuple[float, float, Comparison]:
        taken = compare(naive_block, next_epochs(work), pairs, options.device)
        return samples / statistics.median(taken.ours_s), taken.ratio * samples / len(few), taken

    rate, ratio, taken = against_naive(lambda epoch: [ours[epoch, index] for index in range(len(few))], len(few))
    naive_rate = len(few) / statistics.median(taken.naive_s)
    rows = [row("naive, one process", naive_rate, 1.0), row("pytorch, one process", rate, ratio)]

    workers = worker_count(options)
    loader = make_training_loader(
        "pytorch", folder, cases=many, spec=KITS19, config=replace(settings, num_workers=workers)
    )
    rate, ratio, _ = against_naive(lambda epoch: drain(loader, epoch), len(many))
    rows.append(row(f"pytorch, {workers} worker(s)", rate, ratio))

    # Every volume is in device memory once: an "epoch" here is as many passes as give the same number of samples.
    passes = LOADER_SAMPLES // len(cases)
    with notes_held():
        device_loader = make_training_loader("device", folder, cases=cases, spec=KITS19, config=settings)
        fallback = take_notes()
    name = f"device ({options.device.type}), no worker"
    if fallback:
        rows.append([name, NOT_MEASURED, NOT_MEASURED, NOT_MEASURED])
    else:
        rate, ratio, _ = against_naive(
            lambda epoch: drain(device_loader, *range(epoch * passes, (epoch + 1) * passes)), len(many)
        )
        rows.append(row(name, rate, ratio))
    sizes = [" x ".join(map(str, sides)) for sides in (shape, settings.patch)]
    notes = [
        f"Volumes of {sizes[0]} voxels, crops of {sizes[1]}, warm caches, {pairs} pairs, each alternating with the "
        "naive loader in one process; ratios are medians of pairs. Target: pytorch in one process at least 20 times as "
        "fast as the naive loader.",
        *fallback,
    ]
    columns = ["loader", "samples/s", "ms per sample", "ratio to the naive loader"]
    return Table("Loaders: samples per second", columns, rows, notes)


def next_epochs(work: Callable[[int], object]) -> Callable[[], object]:
    """Calls `work` with epoch 1, 2, 3 …: every call draws new samples, as an epoch of training does."""
    epochs = itertools.count(1)
    return lambda: work(next(epochs))


def drain(loader: TrainingLoader, *epochs: int) -> int:
    """Consumes all batches of the epochs; returns their number."""
    return sum(1 for epoch in epochs for _ in loader.epoch(epoch))


def row(name: str, rate: float, ratio: float) -> list[str | float]:
    return [name, rate, 1000 / rate, ratio]


def count_bytes(folder: Path, cases: Sequence[str], shape: Shape, settings: LoaderConfig) -> Table:
    """What a sample reads: its voxels, the pages that contain them, and what a cold disk delivers."""
    boxes = load_boxes(folder, cases, len(KITS19.classes))
    voxels = [itemsize * math.prod(settings.patch) for itemsize in ITEMSIZES]
    # The voxels are at the end of a file.
    sizes = [path.stat().st_size for path in files_of(folder, cases[:1])]
    offsets = [size - itemsize * math.prod(shape) for size, itemsize in zip(sizes, ITEMSIZES, strict=True)]
    pages = []
    for number in range(COUNTED_CROPS):
        index = number % len(cases)
        start, _ = draw_sample((number, index), shape, boxes[index], settings)
        touched = [
            page_bytes(at, shape, start=start, patch=settings.patch, itemsize=n)
            for at, n in zip(offsets, ITEMSIZES, strict=True)
        ]
        pages.append(sum(touched))
    cold = read_cold(RemappingDataset(folder, cases, boxes, settings), folder, cases)
    rows: list[list[str | float]] = [
        ["image voxels of the crop", voxels[0] / MB],
        ["label voxels of the crop", voxels[1] / MB],
        ["both, copied from the mapped files", sum(voxels) / MB],
        ["whole pages that contain them, mean", statistics.mean(pages) / MB],
        ["whole pages that contain them, maximum", max(pages) / MB],
        ["delivered by the disk, cold caches, mean", NOT_MEASURED if cold is None else cold / MB],
        ["naive: whole image and label", sum(sizes) / MB],
    ]
    notes = [
        f"Target: at most 12 MB. The kernel reads whole pages ({mmap.PAGESIZE} bytes), and a crop's rows of "
        f"{4 * settings.patch[2]} bytes are {4 * shape[2]} apart: nearly every page between its first and last row is "
        f"touched. Computed from the strides of {COUNTED_CROPS} drawn crops; a cold disk adds read-ahead (the "
        f"process's own count over {COLD_SAMPLES} samples)."
    ]
    return Table("Loader: bytes read per sample", ["what", "MB per sample"], rows, notes)


def page_bytes(offset: int, shape: Shape, start: Shape, patch: Shape, itemsize: int, page: int = mmap.PAGESIZE) -> int:
    """Bytes of the pages of a file that contain a crop.

    Args:
        offset: of the first voxel in the file.
        shape: of the volume (D, H, W), in C order.
        start, patch: the crop's first voxel and its shape.
        itemsize: bytes per voxel.
    """
    d, h = (np.arange(first, first + length) for first, length in zip(start[:2], patch[:2], strict=True))
    rows = offset + itemsize * ((d[:, None] * shape[1] + h) * shape[2] + start[2]).ravel()
    first, last = rows // page, (rows + itemsize * patch[2] - 1) // page
    # Every row adds 1 at its first page and subtracts it after its last one.
    change = np.zeros(last.max() + 2, np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, last + 1, -1)
    return page * int((change.cumsum() > 0).sum())


def read_cold(dataset: CropDataset, folder: Path, cases: Sequence[str]) -> float | None:
    """Mean bytes that the disk delivers for a sample; None if the system cannot drop caches or count."""
    read = []
    for number in range(COLD_SAMPLES):
        index = number % len(cases)
        dropped = drop_caches(files_of(folder, [cases[index]]))
        before = disk_bytes_read()
        dataset[number + 1, index]
        after = disk_bytes_read()
        if not dropped or before is None or after is None:
            return None
        read.append(after - before)
    # No byte at all: the files are in memory anyway (tmpfs), or the kernel ignored the advice.
    return statistics.mean(read) or None
