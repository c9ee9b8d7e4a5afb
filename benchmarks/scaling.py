"""Several processes: one and two measured here, and 8 to 1,024 GPUs on paper (see `paper.py`)."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import paper
from benchmarks.harness import NOT_MEASURED, Options, Table, environment_of_runs, reason_of_failure
from common.errors import UserError
from model.unet3d import MLPERF_FILTERS

PROJECT = Path(__file__).resolve().parents[1]
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
TIMEOUT_S = 1800
# The first ratio is weak scaling: two processes that share nothing would reach 1.
COLUMNS = [
    "processes",
    "threads each",
    "samples/s",
    "of twice one process with as many threads",
    "of one process with all threads",
]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The work of each process; every row is run `rounds` times, alternating."""

    filters: tuple[int, ...]
    window: int
    batch_size: int
    epochs: int
    warmup_steps: int
    rounds: int


def run(options: Options) -> list[Table]:
    return [processes(options), compared_with_published(), on_paper(), launches(), beyond_main()]


def scale_of(options: Options) -> Scale:
    """The work of each process that suits the device."""
    if options.quick:
        return Scale(filters=(4, 8), window=16, batch_size=2, epochs=1, warmup_steps=2, rounds=1)
    if options.device.type == "cuda":
        return Scale(filters=MLPERF_FILTERS, window=128, batch_size=7, epochs=8, warmup_steps=8, rounds=3)
    return Scale(filters=(16, 32, 64, 128), window=32, batch_size=2, epochs=1, warmup_steps=4, rounds=3)


def processes(options: Options) -> Table:
    """`main.py --benchmark` on synthetic volumes, each process with its own batch (weak scaling)."""
    scale = scale_of(options)
    cores = len(os.sched_getaffinity(0))
    each = max(1, cores // 2)
    is_gpu = options.device.type == "cuda"
    # On a GPU a second process means a second GPU, and threads mean little.
    pairs = [(1, each), (2, each)] if is_gpu else [(1, each), (2, each), (1, cores)]
    window = " x ".join([str(scale.window)] * 3)
    notes = [
        f"main.py --benchmark --loader synthetic, unet3d with filters {scale.filters}, windows of {window}, "
        f"batches of {scale.batch_size} per process; medians of {scale.rounds} rounds."
    ]
    if is_gpu and torch.cuda.device_count() < 2:
        return Table(
            "One and two processes", COLUMNS, [[2, each, f"{NOT_MEASURED}: this machine has one GPU", "", ""]], notes
        )
    if not is_gpu:
        notes.append(
            f"On one machine's {cores} cores two processes share the arithmetic and the memory: this shows what "
            "averaging gradients costs, not what a second machine would add."
        )
    rates: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
    for number in range(scale.rounds):
        for pair in rates:
            folder = options.work_dir / f"scaling_{number}_{pair[0]}x{pair[1]}"
            rates[pair].append(samples_per_s(*pair, scale, folder, options.device))
    # Paired by round: whatever slows the machine down affects both.
    rows: list[list[Any]] = []
    for pair, own in rates.items():
        ratios: list[Any] = ["", ""]
        if pair[0] == 2:
            ratios[0] = median_ratio(own, rates[1, each]) / 2
            ratios[1] = median_ratio(own, rates[1, cores]) if not is_gpu else ""
        rows.append([*pair, statistics.median(own), *ratios])
    return Table("One and two processes", COLUMNS, rows, notes)


def median_ratio(own: list[float], other: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def samples_per_s(ranks: int, threads: int, scale: Scale, log_dir: Path, device: torch.device) -> float:
    """One run's samples/s over all its processes. Raises UserError with the reason if it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    window = " ".join([str(scale.window)] * 3)
    arguments = (
        f"--benchmark --loader synthetic --layout NDHWC --amp --input_shape {window} --val_input_shape {window} "
        f"--batch_size {scale.batch_size} --val_batch_size 1 --epochs {scale.epochs} "
        f"--warmup_steps {scale.warmup_steps} --seed 0 --no-verbose"
    ).split()
    arguments += ["--cudnn_benchmark"] if device.type == "cuda" else []
    model = f"unet3d(filters={scale.filters})"
    command = [sys.executable, *launcher, "main.py", *arguments, "--model", model, "--log_dir", str(log_dir)]
    environment = environment_of_runs(device) | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    if done.returncode:
        why = reason_of_failure(done)
        raise UserError(f"main.py on {ranks} process(es) exited with {done.returncode}: {why}")
    return float(json.loads((log_dir / "benchmark.json").read_text(encoding="utf-8"))["samples_per_s"])


def compared_with_published() -> Table:
    """The model compared with the published runs."""
    rows = []
    for published in (*paper.PUBLISHED, paper.LARGEST):
        minutes = paper.forecast(published.device, published.layout, paper.Links()).total / 60
        rows.append(
            [
                published.name,
                published.layout.batch,
                published.device.samples_per_s,
                published.minutes,
                minutes,
                minutes / published.minutes,
            ]
        )
    notes = [
        "From each run's samples/s and evaluation time (assuming batch 56); all constants are the same for every run. "
        "The last row is not a check: the floor of a step is fitted to it.",
    ]
    columns = ["run", "batch", "samples/s per device", "minutes, published", "minutes, model", "model / published"]
    return Table("Model against published", columns, rows, notes)


def on_paper() -> Table:
    """What `main.py` would reach on growing numbers of GPUs."""
    rows = []
    for gpus in GPUS:
        layout, forecast = paper.best(paper.H200, gpus, paper.Links())
        rows.append(
            [
                gpus,
                layout.training,
                f"{layout.batch}{beyond(layout.batch)}",
                layout.ranks_per_sample,
                max(1, int(layout.samples_per_gpu)),
                1e3 * forecast.step,
                1e3 * forecast.exposed,
                1e3 * forecast.exchange,
                forecast.evaluation,
                forecast.share,
                forecast.evaluations,
                forecast.total / 60,
                gpus * forecast.total / 60,
            ]
        )
    links = paper.Links()
    notes = [
        f"At the published {paper.H200.samples_per_s:g} samples/s and {paper.H200.windows_per_s:.0f} windows/s per "
        "GPU, start-up not counted. Batches divide the 168 cases, so that GPUs beyond the ranks stay idle.",
        f"All-reduce: {paper.GRADIENT_BYTES / 1e6:.0f} MB, rings at {links.within_node / 1e9:g} GB/s per GPU within a "
        f"node and {links.between_nodes / 1e9:g} GB/s per node between them, {links.overlap:.0%} hidden. Floor of a "
        f"step {1e3 * paper.STEP_FLOOR_S:g} ms.",
        f"Planes: ranks that share a sample (not measured on GPUs) each send {paper.HALO_BYTES / 1e6:.0f} MB per step "
        "to neighbours in their node; none of it is hidden, and its latency is in the floor.",
        f"Evaluation is {paper.evaluation_share_of_work():.0%} of the operations once it runs; its share of the time "
        "differs, as windows/s and samples/s do.",
        "* Samples to converge extrapolated: beyond batch 84 the line through 56 and 84 is continued. No "
        "published run supports it.",
    ]
    columns = [
        "GPUs",
        "ranks",
        "global batch",
        "ranks per sample",
        "samples per group",
        "ms per step",
        "of which all-reduce",
        "of which planes",
        "s per evaluation",
        "its share once evaluations run",
        "evaluations",
        "minutes to target",
        "GPU-minutes",
    ]
    return Table("On paper: main.py on 8 to 1,024 H200", columns, rows, notes)


def beyond(batch: int) -> str:
    return " *" if batch > paper.REFERENCES[-1].batch else ""


def launches() -> Table:
    """The settings of `on_paper`'s rows."""
    rows = []
    for gpus in GPUS:
        layout, _ = paper.best(paper.H200, gpus, paper.Links())
        reference = paper.nearest_reference(layout.batch)
        rows.append(
            [
                gpus,
                layout.batch * layout.ranks_per_sample // layout.training,
                f"{layout.batch}{beyond(layout.batch)}",
                1,
                f"{reference.learning_rate:g} / {reference.warmup_epochs}",
                f"`{paper.launch(layout, gpus)}`",
            ]
        )
    notes = ["Rate and warm-up are the nearest reference point's. HOST is the first node."]
    columns = ["GPUs", "batch_size", "global batch", "ga_steps", "rate / warm-up epochs", "command on each node"]
    return Table("Launch settings", columns, rows, notes)


def beyond_main() -> Table:
    """What 8 GPUs per sample, and evaluating during training, would add."""
    rows = []
    for gpus in GPUS:
        layout, forecast = paper.best(paper.H200, gpus, paper.Links(), beyond_main=True)
        _, plain = paper.best(paper.H200, gpus, paper.Links())
        rows.append(
            [
                gpus,
                f"{layout.batch}{beyond(layout.batch)}",
                layout.training,
                layout.evaluating,
                layout.ranks_per_sample,
                forecast.total / 60,
                plain.total / forecast.total,
            ]
        )
    notes = [
        "Not built: 8 GPUs per sample (main.py: at most 4). GPUs that only evaluate are its --eval_ranks, without "
        "which it counts in the last column. The largest published run did both.",
    ]
    columns = [
        "GPUs",
        "global batch",
        "training",
        "evaluating",
        "GPUs per sample",
        "minutes to target",
        "times as fast as main.py",
    ]
    return Table("On paper: 8 GPUs per sample, and GPUs that only evaluate", columns, rows, notes)
