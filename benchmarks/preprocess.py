"""`--suite preprocess`: preprocessing of synthetic scans: the reference's way, one core, all cores, peak memory."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.data import MB, worker_count
from benchmarks.harness import Options, Table, reason_of_failure
from common.errors import UserError
from data_loading.integrity import file_md5
from data_loading.io.volume import write_nifti
from data_loading.phantom import make_phantom

PROJECT = Path(__file__).resolve().parents[1]
# Between KiTS19's smallest and median scan. With 48 of them the start of the workers is a few per cent of a run.
SHAPE, CASES, DISTINCT, PAIRS = (96, 512, 512), 48, 4, 3
# KiTS19's mean number of voxels, stored as float64, as its owners publish it.
FULL_SHAPE, FULL_CASES, FULL_PAIRS = (216, 512, 512), 4, 5
QUICK_SHAPE, QUICK_CASES, QUICK_DISTINCT, QUICK_PAIRS = (16, 24, 24), 2, 1, 1

# Runs in a process of its own and is timed inside it, to exclude Python's start. VmHWM (kB) is this process's own peak;
# getrusage would start from the peak of the parent process.
PROGRAM = """
import json, re, resource, sys, time
from pathlib import Path
from data_loading.readers.base import ReaderOptions
from data_loading.readers.kits19 import read_kits19
from data_loading.writer import preprocess

def peak():
    try:
        own = int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
    except OSError:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)

if __name__ == "__main__":
    raw, results, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    base, started = peak(), time.perf_counter()
    preprocess(read_kits19(raw, ReaderOptions(), []), results, workers)
    print(json.dumps({"seconds": time.perf_counter() - started, "base": base, "peak": peak()}))
"""

# Worker processes import this file too, so that none of them finds ISA-L.
WITH_ZLIB = """
import sys
sys.modules["isal"] = None
from preprocess_dataset import main
if __name__ == "__main__":
    sys.exit(main())
"""


@dataclass(frozen=True)
class PreprocessingRun:
    """One run: its seconds, and the memory of its largest process in bytes, at its start and at its peak."""

    seconds: float
    base: int
    peak: int


def run(options: Options) -> list[Table]:
    """Runs the suite: cases/s and peak memory of preprocessing."""
    shape, cases, distinct, pairs = (
        (QUICK_SHAPE, QUICK_CASES, QUICK_DISTINCT, QUICK_PAIRS) if options.quick else (SHAPE, CASES, DISTINCT, PAIRS)
    )
    workers = max(worker_count(options), 1)
    one, all_cases = options.work_dir / "raw_one", options.work_dir / "raw"
    write_scans(one, 1, 1, shape)
    write_scans(all_cases, cases, distinct, shape)
    program = options.work_dir / "preprocess_once.py"
    program.write_text(PROGRAM, encoding="utf-8")

    def measure(raw: Path, processes: int, threads: int | None) -> PreprocessingRun:
        return preprocess_once(program, raw, results=options.work_dir / "results", processes=processes, threads=threads)

    variants: dict[str, Callable[[], PreprocessingRun]] = {
        "1 process, 1 thread": lambda: measure(all_cases, 1, 1),
        "1 process, torch's own threads": lambda: measure(all_cases, 1, None),
        f"{workers} process(es)": lambda: measure(all_cases, workers, None),
    }
    # Alternating, as `compare` does; the first case alone warms up the file cache and the disk.
    alone = measure(one, 1, 1)
    rounds = [{name: run_variant() for name, run_variant in variants.items()} for _ in range(pairs)]
    baseline, *_, parallel = variants
    rates = []
    for name in variants:
        seconds = statistics.median(measured[name].seconds for measured in rounds)
        ratio = statistics.median(measured[baseline].seconds / measured[name].seconds for measured in rounds)
        rates.append([name, cases / seconds, seconds, ratio])

    def highest_peak(name: str) -> PreprocessingRun:
        return max((measured[name] for measured in rounds), key=lambda run: run.peak)

    largest = largest_case_bytes(shape)
    memory = [
        memory_row("1 process, 1 case", alone, largest),
        memory_row(f"1 process, {cases} cases", highest_peak(baseline), largest),
        memory_row(f"{workers} process(es), {cases} cases", highest_peak(parallel), largest),
    ]
    scans = f"{cases} synthetic scans ({distinct} different ones) of {' x '.join(map(str, shape))} voxels"
    return [
        compare_with_reference(options, workers),
        Table(
            "Preprocessing: cases per second",
            ["processes", "cases/s", "s", "ratio to one core"],
            rates,
            [
                f"{scans}, {pairs} alternating runs each, each into a fresh folder; times are medians, ratios medians "
                "over the rounds. The start of the workers is counted, that of Python is not. One process runs torch's "
                "resampling on all cores unless limited to one thread. Target: at least 1.8 times on 2 cores."
            ],
        ),
        Table(
            "Preprocessing: peak memory of the largest process",
            ["run", "at the start (MB)", "peak (MB)", "growth, in largest cases"],
            memory,
            [
                f"A case is {largest / MB:.3g} MB raw, as float32 and uint8. Memory is bounded by the largest case "
                "if many cases take no more than one."
            ],
        ),
    ]


def compare_with_reference(options: Options, workers: int) -> Table:
    """Runs the whole programs, Python's start included, on full-sized cases, alternately, and compares their files."""
    shape, cases, pairs = (
        (QUICK_SHAPE, QUICK_CASES, QUICK_PAIRS) if options.quick else (FULL_SHAPE, FULL_CASES, FULL_PAIRS)
    )
    raw, results = options.work_dir / "raw_full", options.work_dir / "full"
    write_scans(raw, cases, cases, shape, dtype=np.float64)
    packed = sum(path.stat().st_size for path in raw.glob("*/imaging.nii.gz")) / cases
    flags = ["--data_dir", str(raw), "--results_dir", str(results), "--num_workers", str(workers)]
    program = options.work_dir / "with_zlib.py"
    program.write_text(WITH_ZLIB, encoding="utf-8")
    commands = {
        "the reference's way, 1 process": ["-m", "benchmarks.naive_preprocessing", str(raw), str(results)],
        f"this project, {workers} process(es), zlib": [str(program), *flags],
    }
    if importlib.util.find_spec("isal"):
        commands[f"this project, {workers} process(es), ISA-L"] = [str(PROJECT / "preprocess_dataset.py"), *flags]
    rounds: list[list[tuple[float, float]]] = []
    digests = set()
    for _ in range(pairs):
        rounds.append([])
        for command in commands.values():
            rounds[-1].append(time_program(command))
            digests.add(tuple((path.name, file_md5(path)) for path in sorted(results.glob("*.npy"))))
            shutil.rmtree(results)
    rows: list[list[str | float]] = []
    for which, name in enumerate(commands):
        wall, cpu = (statistics.median(each[which][kind] for each in rounds) for kind in range(2))
        gains = [[each[0][kind] / each[which][kind] for each in rounds] for kind in range(2)]
        rows.append([name, wall, statistics.median(gains[0]), min(gains[0]), cpu, statistics.median(gains[1])])
    return Table(
        "Preprocessing: the reference's way and this project",
        ["program", "s", "times as fast", "lowest", "processor s", "ratio of processor time"],
        rows,
        [
            f"{cases} synthetic scans of {' x '.join(map(str, shape))} voxels, stored as float64 and packed to "
            f"{packed / math.prod(shape):.2g} bytes per voxel. {pairs} alternating runs of the whole programs, with "
            "Python's start; times are medians, ratios medians over the rounds. The files of all are compared byte for "
            "byte. The reference's way is a plain script from its description. Target: 1.6 times on 2 cores."
        ],
        problem="" if len(digests) == 1 else "preprocessing: the files differ from those of the reference's way",
    )


def time_program(command: list[str]) -> tuple[float, float]:
    """Runs `python3 COMMAND`; returns its seconds, and the processor time of its processes in seconds.

    Raises:
        UserError: it failed, with the last line of its output.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=PROJECT, capture_output=True, text=True, check=False
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    _check_status(done)
    return seconds, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def write_scans(
    folder: Path, cases: int, distinct: int, shape: tuple[int, int, int], *, dtype: type[np.generic] = np.int16
) -> None:
    """Writes `cases` raw scans in KiTS19's layout, stored as `dtype`: `distinct` phantoms, and links to them."""
    for number in range(cases):
        case = folder / f"case_{number:05d}"
        case.mkdir(parents=True)
        if number >= distinct:
            for name in ("imaging.nii.gz", "segmentation.nii.gz"):
                os.link(folder / f"case_{number % distinct:05d}" / name, case / name)
            continue
        image, mask = make_phantom(0, number, shape)
        write_nifti(case / "imaging.nii.gz", replace(image, array=image.array.astype(dtype)))
        write_nifti(case / "segmentation.nii.gz", mask)


def preprocess_once(program: Path, raw: Path, results: Path, processes: int, threads: int | None) -> PreprocessingRun:
    """Preprocesses `raw` into a fresh folder, which is removed again.

    Args:
        threads: of torch; None: its own choice.

    Raises:
        UserError: it failed, with the last line of its output.
    """
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": str(threads)}
    if threads is None:
        del environment["OMP_NUM_THREADS"]
    try:
        done = subprocess.run(
            [sys.executable, str(program), str(raw), str(results), str(processes)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        shutil.rmtree(results, ignore_errors=True)
    _check_status(done)
    return PreprocessingRun(**json.loads(done.stdout.splitlines()[-1]))


def _check_status(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode != 0:
        raise UserError(f"preprocessing failed: {reason_of_failure(done)}")


def largest_case_bytes(shape: tuple[int, int, int]) -> int:
    """A raw case in memory: float32 image and uint8 mask."""
    return math.prod(shape) * (np.dtype(np.float32).itemsize + np.dtype(np.uint8).itemsize)


def memory_row(name: str, measured: PreprocessingRun, largest: int) -> list[str | float]:
    return [name, measured.base / MB, measured.peak / MB, (measured.peak - measured.base) / largest]
