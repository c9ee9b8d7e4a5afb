"""What requesting a crop's planes ahead gains on cold caches and costs on warm ones, in alternating pairs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.data import MB, RemappingDataset, disk_bytes_read, drop_caches, files_of, read_through
from benchmarks.harness import NOT_MEASURED, Table
from data_loading import read_ahead
from data_loading.base_loader import LoaderConfig
from data_loading.dataset import load_boxes
from data_loading.pytorch_loader import CropDataset
from data_loading.read_ahead import PROBED_SAMPLES
from data_loading.spec import KITS19

# Warm samples differ by some us of their ms, so they take more pairs, of few cases, whose files are all mapped.
WARM_PAIRS, WARM_CASES = 10, 8


@dataclass(frozen=True, kw_only=True)
class SampleCost:
    """One sample: its time in s, and the bytes that the disk delivered (0 if the system does not count)."""

    time_s: float
    disk_bytes: int


def measure_read_ahead(folder: Path, cases: Sequence[str], settings: LoaderConfig, pairs: int, is_cold: bool) -> Table:
    """Makes samples with and without reading ahead, in turns; on cold caches only if `is_cold` is possible."""
    boxes = load_boxes(folder, cases, len(KITS19.classes))
    rows: list[list[str | float]] = [["cold", *[NOT_MEASURED] * 5]]
    if is_cold:
        rows = [_row("cold", alternate(RemappingDataset(folder, cases, boxes, settings), pairs, is_cold=True))]
    few = cases[:WARM_CASES]
    read_through(files_of(folder, few))
    warm = alternate(CropDataset(folder, few, boxes[: len(few)], settings), WARM_PAIRS * pairs, is_cold=False)
    notes = [
        f"One process; {pairs} pairs of the same sample on cold caches, {WARM_PAIRS * pairs} on warm ones, in "
        "random order. Times and ratios (of a pair; above 1: requesting is faster) are medians, "
        "bytes means."
    ]
    columns = ["caches", "ms without", "ms with", "ratio", "disk MB per sample without", "disk MB per sample with"]
    return Table("Storage: a crop's planes requested ahead", columns, [*rows, _row("warm", warm)], notes)


def alternate(dataset: CropDataset, pairs: int, is_cold: bool) -> list[tuple[SampleCost, SampleCost]]:
    """Returns the costs of each sample without and with reading ahead; the first warm pairs are left out."""
    costs, rng = [], np.random.default_rng(0)
    # Until every file is mapped, and the loader has found the cache warm.
    discarded = 0 if is_cold else PROBED_SAMPLES
    for number in range(discarded + pairs):
        key = (1 + number, number % len(dataset.cases))
        order = rng.permutation([False, True]).tolist()  # in turns, one order would always meet the same cases
        if not is_cold:
            dataset[key]  # so that neither of the two is the first to map the crop's pages
        pair = {is_on: _cost(dataset, key, is_on=is_on, is_cold=is_cold) for is_on in order}
        costs.append((pair[False], pair[True]))
    return costs[discarded:]


def _cost(dataset: CropDataset, key: tuple[int, int], is_on: bool, is_cold: bool) -> SampleCost:
    if is_cold:
        drop_caches(files_of(dataset.data_dir, [dataset.cases[key[1]]]))
    with _read_ahead_switched(is_on):
        before, started = disk_bytes_read() or 0, time.perf_counter()
        dataset[key]
        return SampleCost(time_s=time.perf_counter() - started, disk_bytes=(disk_bytes_read() or 0) - before)


@contextmanager
def _read_ahead_switched(is_on: bool) -> Iterator[None]:
    before = read_ahead.CAN_ADVISE
    read_ahead.CAN_ADVISE = before and is_on
    try:
        yield
    finally:
        read_ahead.CAN_ADVISE = before


def _row(caches: str, costs: Sequence[tuple[SampleCost, SampleCost]]) -> list[str | float]:
    without, ahead = zip(*costs, strict=True)
    return [
        caches,
        *(1000 * statistics.median(cost.time_s for cost in way) for way in (without, ahead)),
        statistics.median(a.time_s / b.time_s for a, b in costs),
        *(statistics.mean(cost.disk_bytes for cost in way) / MB for way in (without, ahead)),
    ]
