"""`--suite storage`: how many accelerators this node's disks and cores can feed, measured without one.

Volumes follow MLPerf Storage's size distribution, the loader and its worker processes are real, and accelerators only
sleep. The figure is their utilisation, the share of time in which they compute; 0.90 passes.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import (
    MB,
    RemappingDataset,
    disk_bytes_read,
    drop_caches,
    files_of,
    read_through,
    save_case,
    worker_count,
    write_index,
)
from benchmarks.harness import Options, Table
from common.errors import UserError
from common.memory import free_memory_bytes
from data_loading.base_loader import Batch, LoaderConfig, TrainingLoader
from data_loading.dataset import load_boxes
from data_loading.index import CaseRecord
from data_loading.preprocessing import Box, Shape
from data_loading.pytorch_loader import CropDataset, PytorchLoader
from data_loading.spec import KITS19

# MLPerf Storage's size distribution of an unet3d file, in bytes, and its number of files.
MEAN_BYTES, STD_BYTES, CASES = 146_600_628, 68_341_808, 168
# A file there is a case here, image and label: 4 + 1 bytes per voxel, which gives KiTS19's mean of 29.3 Mvoxel.
BYTES_PER_VOXEL = 5
PATCH, QUICK_PATCH, QUICK_CASES = (128, 128, 128), (16, 16, 16), 14
BATCH_SIZE = 7
# MLPerf Storage's model of an H100: 21.7 samples/s, 323 ms per step of 7.
SAMPLES_PER_S, QUICK_SAMPLES_PER_S = 21.7, 350.0
PASSING, ACCELERATORS = 0.90, (1, 2, 4, 8)
# Steps of each accelerator: 8 s on an H100.
STEPS, QUICK_STEPS = 24, 2
# A measurement must not fill a disk that others work on.
DISK_SHARE = 0.5
# One random block is repeated: drawing 25 GB would take longer than writing them.
BLOCK_VOXELS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class EmulatedEpoch:
    """An epoch as one accelerator experienced it, times in s; `first_wait_s` is the wait for the first batch."""

    steps: int
    samples: int
    compute_s: float
    total_s: float
    first_wait_s: float


def run(options: Options, samples_per_s: float | None = None) -> list[Table]:
    """Runs the suite; `samples_per_s` is the speed of an emulated accelerator; None: MLPerf Storage's H100."""
    patch, wanted, speed, steps = (
        (QUICK_PATCH, QUICK_CASES, QUICK_SAMPLES_PER_S, QUICK_STEPS)
        if options.quick
        else (PATCH, CASES, SAMPLES_PER_S, STEPS)
    )
    folder = options.work_dir / "storage"
    folder.mkdir()
    sizes = draw_sizes(np.random.default_rng(0), wanted if options.cases is None else options.cases, patch)
    shapes, notes = fit_to_disk([volume_shape(size, patch) for size in sizes], shutil.disk_usage(folder).free)
    cases = write_volumes(folder, shapes, patch)
    files = files_of(folder, cases)
    total = sum(path.stat().st_size for path in files)
    batch_size = min(BATCH_SIZE, len(cases))
    step_s = batch_size / (samples_per_s or speed)
    settings = LoaderConfig(
        patch=patch,
        oversampling=0.4,
        batch_size=batch_size,
        num_workers=worker_count(options),
        rank=0,
        ranks=1,
        order_seed=0,
        sample_seed=0,
    )

    # The call may be missing, or silently ignored, as by an in-memory file system: then nothing is cold.
    is_cold_possible = drop_caches(files) and was_dropped(files[0])
    rows = []
    for is_cold in (False, True) if is_cold_possible else (False,):
        for accelerators in ACCELERATORS:
            workers = max(1, settings.num_workers // accelerators)
            ranks = replace(settings, num_workers=workers, ranks=accelerators)
            epochs = feed(folder, cases, settings=ranks, step_s=step_s, steps=steps, is_cold=is_cold)
            rows.append(["cold" if is_cold else "warm", accelerators, workers, *figures_of(epochs, patch)])
            if utilisation(epochs) < PASSING:
                break
    notes += [
        f"{len(cases)} cases, {total / 1e9:.2f} GB (mean {total / len(cases) / MB:.1f} MB per case, image and label), "
        f"crops of {' x '.join(map(str, patch))}, {steps} steps of {batch_size} samples, {1000 * step_s:.0f} ms each.",
        "Utilisation is steps x ms per step / the accelerators' time, including the wait for the first batch. "
        f"{PASSING:.2f} passes; the number goes up to the first that fails, or to {ACCELERATORS[-1]}. The cores are "
        "shared, hence the number of workers each.",
        "Cold: every file's pages are dropped before the start, and a case's again as soon as its batch has arrived; "
        "samples of one case that are read at the same time share pages. A virtual disk's host may still cache them.",
    ]
    if not is_cold_possible:
        notes.append("Cold caches: not measured; the files are in memory, or this system does not drop its caches.")
    if total > free_memory_bytes():
        notes.append(f"Warm: {total / 1e9:.1f} GB do not fit into the free memory, so some of it comes from the disk.")
    return [
        Table(
            "Storage: accelerators that this node can feed",
            [
                "caches",
                "accelerators",
                "workers each",
                "samples/s",
                "MB/s of crops",
                "ms for the first batch",
                "utilisation",
                "passes",
            ],
            rows,
            notes,
        )
    ]


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


def fit_to_disk(shapes: list[Shape], free: int) -> tuple[list[Shape], list[str]]:
    """As many volumes as fit into half of the `free` bytes, with a note if some are left out.

    Raises:
        UserError: there is no room for 2.
    """
    needed = np.cumsum([BYTES_PER_VOXEL * math.prod(shape) for shape in shapes])
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


def feed(
    folder: Path, cases: Sequence[str], settings: LoaderConfig, step_s: float, steps: int, is_cold: bool
) -> list[EmulatedEpoch]:
    """One epoch of `steps` on each of `settings.ranks` accelerators, each fed by the loader of its own rank.

    Each has its own shard. The cases are repeated until an epoch is that long: with only a few steps, as when many
    ranks share a small set, only the start would be measured.
    """
    repeated = list(islice(cycle(cases), settings.ranks * steps * settings.batch_size))
    shards = [replace(settings, rank=rank) for rank in range(settings.ranks)]
    boxes = load_boxes(folder, repeated, len(KITS19.classes))
    kind = RemappingDataset if is_cold else CropDataset
    loaders = [PytorchLoader(kind(folder, repeated, boxes, shard), shard) for shard in shards]
    # A run's workers start once. They are forked here, before there are threads, and finish an epoch they began.
    for batches in [loader.epoch(1) for loader in loaders]:
        for _ in batches:
            pass
    files = files_of(folder, cases)
    with ThreadPoolExecutor(1) as dropper, ThreadPoolExecutor(len(loaders)) as accelerators:

        def accelerate(loader: TrainingLoader, shard: LoaderConfig) -> EmulatedEpoch:
            order = shard.sampler(len(repeated)).batches(2)

            def forget(step: int) -> None:
                dropper.submit(drop_caches, files_of(folder, [repeated[index] for _, index in order[step]]))

            return emulate(loader.epoch(2), step_s, forget if is_cold else lambda step: None)

        if is_cold:
            drop_caches(files)
        else:
            read_through(files)
        return list(accelerators.map(accelerate, loaders, shards))


def emulate(
    batches: Iterable[Batch],
    step_s: float,
    on_batch: Callable[[int], object],
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> EmulatedEpoch:
    """An epoch of an accelerator that takes `step_s` per batch, whatever is in it; calls `on_batch` at each step."""
    started, first_wait, steps, samples = clock(), 0.0, 0, 0
    for batch in batches:
        if not steps:
            first_wait = clock() - started
        on_batch(steps)
        steps += 1
        samples += len(batch["image"])
        sleep(step_s)
    return EmulatedEpoch(
        steps=steps, samples=samples, compute_s=steps * step_s, total_s=clock() - started, first_wait_s=first_wait
    )


def utilisation(epochs: Sequence[EmulatedEpoch]) -> float:
    """The share of the accelerators' time in which they computed."""
    return sum(epoch.compute_s for epoch in epochs) / sum(epoch.total_s for epoch in epochs)


def figures_of(epochs: Sequence[EmulatedEpoch], patch: Shape) -> list[float | str]:
    """Samples/s of all accelerators, MB/s of their crops, ms for the first batch, utilisation, yes or no."""
    rate = sum(epoch.samples / epoch.total_s for epoch in epochs)
    first_ms = 1000 * statistics.median(epoch.first_wait_s for epoch in epochs)
    share = utilisation(epochs)
    crop = BYTES_PER_VOXEL * math.prod(patch)
    return [rate, rate * crop / MB, first_ms, share, "yes" if share >= PASSING else "no"]
