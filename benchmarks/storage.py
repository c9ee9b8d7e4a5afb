"""`--suite storage`: how many accelerators this node's disks and cores can feed, measured without one.

Files follow MLPerf Storage's size distribution, the loader and its worker processes are real, and accelerators only
sleep for as long as MLPerf Storage's unet3d workload says. The figure is their utilisation, the share of time in which
they compute; 0.90 passes. Samples are read in two ways: as crops, and as whole files, which MLPerf Storage emulates.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.data import MB, drop_caches, worker_count
from benchmarks.harness import NOT_MEASURED, Options, Table
from benchmarks.storage_data import (
    PATCH,
    TIMES_MEMORY,
    CropReading,
    Reading,
    WholeFileReading,
    bytes_of,
    cases_of_full_size,
    describe_scale,
    draw_sizes,
    fit_to_disk,
    volume_shape,
    was_dropped,
)
from benchmarks.storage_feed import Feeding, feed
from benchmarks.storage_read_ahead import measure_read_ahead
from common.memory import free_memory_bytes, memory_bytes
from data_loading.base_loader import LoaderConfig
from data_loading.preprocessing import Shape

# MLPerf Storage's unet3d workload files: s per step of 7 samples, and their number of files.
STEP_S = {"a100": 0.636, "h100": 0.323, "b200": 0.162}
BATCH_SIZE, CASES = 7, 168
QUICK_PATCH, QUICK_CASES, QUICK_SPEEDUP = (16, 16, 16), 14, 16
PASSING, NUMBERS = 0.90, (1, 2, 4, 8)
# Steps of each accelerator at least; an epoch is at least one pass over all cases: 24 steps for 168, 8 s on an H100.
STEPS, QUICK_STEPS = 24, 2
# MLPerf Storage's rule for an epoch of each accelerator.
RULE_STEPS = 500
PAIRS, QUICK_PAIRS = 32, 2
READINGS: tuple[Reading, ...] = (CropReading(), WholeFileReading())


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """`number` accelerators of a kind, fed at once; `caches` is warm or cold."""

    reading: str
    caches: str
    accelerator: str
    number: int
    workers: int
    fed: Feeding

    @property
    def passes(self) -> bool:
        return self.fed.utilisation >= PASSING

    def row(self) -> list[str | float]:
        per_sample, rate = self.fed.disk_bytes_per_sample, self.fed.samples_per_s
        return [
            self.reading,
            self.caches,
            self.accelerator.upper(),
            self.number,
            self.workers,
            rate,
            NOT_MEASURED if per_sample is None else per_sample / MB,
            NOT_MEASURED if per_sample is None else rate * per_sample / MB,
            1000 * statistics.median(epoch.first_wait_s for epoch in self.fed.epochs),
            self.fed.utilisation,
            "yes" if self.passes else "no",
        ]


def run(options: Options, step_s: dict[str, float] | None = None) -> list[Table]:
    """Runs the suite; `step_s` are the s per step of 7 samples of each accelerator, None: MLPerf Storage's."""
    load = os.getloadavg()[0]
    patch = QUICK_PATCH if options.quick else PATCH
    folder = options.work_dir / "storage"
    folder.mkdir()
    shapes, notes = draw_shapes(options, patch, shutil.disk_usage(folder).free)
    batch_size = min(BATCH_SIZE, len(shapes))
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
    times = {
        name: s * batch_size / BATCH_SIZE / (QUICK_SPEEDUP if options.quick else 1)
        for name, s in (step_s or STEP_S).items()
        if name in (options.accelerators or STEP_S)
    }
    measured, is_cold_possible, ahead = [], True, None
    for reading in READINGS:
        cases = reading.write(folder, shapes, patch)
        files = reading.files(folder, cases)
        # The call may be missing, or silently ignored, as by an in-memory file system: then nothing is cold.
        is_cold_possible = drop_caches(files) and was_dropped(files[0])
        if ahead is None:
            pairs = QUICK_PAIRS if options.quick else PAIRS
            ahead = measure_read_ahead(folder, cases, settings, pairs=pairs, is_cold=is_cold_possible)
        for caches in ("warm", "cold") if is_cold_possible else ("warm",):
            measured += measure(reading, folder, cases, settings=settings, times=times, caches=caches, options=options)
        for path in files:  # the disk has room for one kind of files
            path.unlink()
    notes += describe(shapes, settings, times, load=load, is_cold_possible=is_cold_possible)
    scale = describe_scale(sum(map(bytes_of, shapes)), memory_bytes())
    return [*tables(measured, list(times), scale, notes), *([ahead] if ahead else [])]


def draw_shapes(options: Options, patch: Shape, free: int) -> tuple[list[Shape], list[str]]:
    """Draws the shape of each volume; as many as asked for, as far as the disk allows, with a note if it does not."""
    wanted = QUICK_CASES if options.quick else CASES
    if options.full_size:
        wanted = max(wanted, cases_of_full_size(memory_bytes()))
    sizes = draw_sizes(np.random.default_rng(0), wanted if options.cases is None else options.cases, patch)
    return fit_to_disk([volume_shape(size, patch) for size in sizes], free)


def measure(
    reading: Reading,
    folder: Path,
    cases: Sequence[str],
    *,
    settings: LoaderConfig,
    times: dict[str, float],
    caches: str,
    options: Options,
) -> list[Measurement]:
    """Feeds 1, 2, 4 and 8 accelerators of each kind, up to the first number that fails; `times` are s per step."""
    measured = []
    for accelerator, step_s in times.items():
        for number in NUMBERS:
            workers = max(1, settings.num_workers // number)
            ranks = replace(settings, num_workers=workers, ranks=number)
            steps = max(QUICK_STEPS if options.quick else STEPS, len(cases) // (number * settings.batch_size))
            fed = feed(reading, folder, cases, settings=ranks, step_s=step_s, steps=steps, is_cold=caches == "cold")
            measured.append(
                Measurement(
                    reading=reading.name,
                    caches=caches,
                    accelerator=accelerator,
                    number=number,
                    workers=workers,
                    fed=fed,
                )
            )
            if not measured[-1].passes:
                break
    return measured


def tables(measured: Sequence[Measurement], accelerators: Sequence[str], scale: str, notes: list[str]) -> list[Table]:
    """The answer, and what it was taken from; both heads say how large the data set was."""
    by_way: dict[tuple[str, str], list[Measurement]] = {}
    for one in measured:
        by_way.setdefault((one.reading, one.caches), []).append(one)

    return [
        Table(
            f"Storage: how many accelerators this node feeds ({scale})",
            ["reading", "caches", *(name.upper() for name in accelerators)],
            [
                [*way, *(fed_number([one for one in found if one.accelerator == name]) for name in accelerators)]
                for way, found in by_way.items()
            ],
            notes,
        ),
        Table(
            f"Storage: accelerators fed at once ({scale})",
            [
                "reading",
                "caches",
                "accelerator",
                "number",
                "workers each",
                "samples/s",
                "disk MB per sample",
                "disk MB/s",
                "ms for the first batch",
                "utilisation",
                "passes",
            ],
            [one.row() for one in measured],
        ),
    ]


def fed_number(measured: Sequence[Measurement]) -> str:
    """The largest number that passed, and the next that was tried and failed."""
    passed = max((one.number for one in measured if one.passes), default=0)
    failed = [one.number for one in measured if not one.passes]
    return f"{passed} ({failed[0]} fail)" if failed and passed else f"{passed} or more" if passed else "0"


def describe(
    shapes: Sequence[Shape], settings: LoaderConfig, times: dict[str, float], *, load: float, is_cold_possible: bool
) -> list[str]:
    """What was measured, and how."""
    total = sum(map(bytes_of, shapes))
    steps = ", ".join(f"{name.upper()} {1000 * s:.0f} ms" for name, s in times.items())
    notes = [
        f"{len(shapes)} cases, {total / 1e9:.2f} GB (mean {total / len(shapes) / MB:.1f} MB per case, image and "
        f"label), steps of {settings.batch_size} samples: {steps}. Crops: {' x '.join(map(str, settings.patch))}, "
        "augmented. Whole files: one NPZ file per sample, read whole, as MLPerf Storage does.",
        "Utilisation is steps x ms per step / the accelerators' time, including the wait for the first batch. "
        f"{PASSING:.2f} passes; the number goes up to the first that fails, or to {NUMBERS[-1]}. The cores are "
        "shared, hence the number of workers each.",
        f"MLPerf Storage wants a data set of {TIMES_MEMORY} times the memory, which the page cache cannot hold, and "
        f"{RULE_STEPS} steps per epoch; here an epoch has {STEPS} or one pass over the data.",
        "Cold: every file's pages are dropped before the start, and a case's again as soon as its batch has arrived; "
        "samples of one case that are read at the same time share pages. A virtual disk's host may still cache them.",
        "Disk bytes: what the kernel counts for this process and its workers (/proc/PID/io), other programs' left out.",
        f"Load average before the start: {load:.1f} on {os.cpu_count()} cores.",
    ]
    if not is_cold_possible:
        notes.append("Cold caches: not measured; the files are in memory, or this system does not drop its caches.")
    if total > free_memory_bytes():
        notes.append(f"Warm: {total / 1e9:.1f} GB do not fit into the free memory, so some of it comes from the disk.")
    return notes
