"""Emulated accelerators for `--suite storage`: they take batches from the real loader and only sleep."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

from benchmarks.data import disk_bytes_read, drop_caches, read_through
from benchmarks.storage_data import Reading
from data_loading.base_loader import Batch, LoaderConfig, TrainingLoader
from data_loading.pytorch_loader import PytorchLoader


@dataclass(frozen=True, kw_only=True)
class EmulatedEpoch:
    """An epoch as one accelerator experienced it, times in s; `first_wait_s` is the wait for the first batch."""

    steps: int
    samples: int
    compute_s: float
    total_s: float
    first_wait_s: float


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """An epoch of several accelerators at once.

    Attributes:
        disk_bytes: what the disk delivered for this process and the workers; None if the system does not count.
    """

    epochs: list[EmulatedEpoch]
    disk_bytes: int | None

    @property
    def utilisation(self) -> float:
        """The share of the accelerators' time in which they computed."""
        return sum(epoch.compute_s for epoch in self.epochs) / sum(epoch.total_s for epoch in self.epochs)

    @property
    def samples_per_s(self) -> float:
        return sum(epoch.samples / epoch.total_s for epoch in self.epochs)

    @property
    def disk_bytes_per_sample(self) -> float | None:
        return None if self.disk_bytes is None else self.disk_bytes / sum(epoch.samples for epoch in self.epochs)


def feed(
    reading: Reading,
    folder: Path,
    cases: Sequence[str],
    *,
    settings: LoaderConfig,
    step_s: float,
    steps: int,
    is_cold: bool,
) -> Feeding:
    """One epoch of `steps` on each of `settings.ranks` accelerators, each fed by the loader of its own rank.

    Each has its own shard. The cases are repeated until an epoch is that long: with only a few steps, as when many
    ranks share a small set, only the start would be measured.
    """
    repeated = list(islice(cycle(cases), settings.ranks * steps * settings.batch_size))
    shards = [replace(settings, rank=rank) for rank in range(settings.ranks)]
    loaders = [PytorchLoader(reading.dataset(folder, repeated, shard, is_cold), shard) for shard in shards]
    # A run's workers start once. They are forked here, before there are threads, and each makes a batch at least.
    start = 0 if reading.keeps_files_open and not is_cold else max(0, steps - settings.num_workers)
    for batches in [loader.epoch(1, start) for loader in loaders]:
        for _ in batches:
            pass
    workers = [process.pid for process in multiprocessing.active_children() if process.pid]
    files = reading.files(folder, cases)
    with ThreadPoolExecutor(1) as dropper, ThreadPoolExecutor(len(loaders)) as accelerators:

        def accelerate(loader: TrainingLoader, shard: LoaderConfig) -> EmulatedEpoch:
            order = shard.sampler(len(repeated)).batches(2)

            def forget(step: int) -> None:
                dropper.submit(drop_caches, reading.files(folder, [repeated[index] for _, index in order[step]]))

            return emulate(loader.epoch(2), step_s, forget if is_cold else lambda step: None)

        if is_cold:
            drop_caches(files)
        else:
            read_through(files)
        before = disk_bytes_read(workers)
        epochs = list(accelerators.map(accelerate, loaders, shards))
        after = disk_bytes_read(workers)
    return Feeding(epochs=epochs, disk_bytes=None if before is None or after is None else after - before)


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
