"""Timing of alternating pairs, and tables of results."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from runtime.warmup import seconds

NOT_MEASURED = "not measured"
# Variables of a launcher around this program, which must not reach the runs that it starts.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def environment_of_runs(device: torch.device) -> dict[str, str]:
    """The environment variables of runs of `main.py` that are to use this kind of device."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return environment if device.type == "cuda" else environment | {"CUDA_VISIBLE_DEVICES": ""}


def reason_of_failure(done: subprocess.CompletedProcess[str]) -> str:
    """Returns a failed run's line of the error, which torchrun's own lines follow, or its last line."""
    lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
    return next((line for line in lines if "rror: " in line), lines[-1])


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a suite.

    Attributes:
        device: where networks run.
        quick: small shapes and few repetitions, to see that a suite runs; its figures mean nothing.
        work_dir: a folder for synthetic data; the caller removes it.
        cases: number of volumes of the storage suite; None: its own default.
        num_workers: number of loader processes; None: one per core.
        deadline: when the GPU suite must have ended, on `time.monotonic`'s clock.
        parts: titles of the GPU suite's parts to run; empty: all.
        data_dir: the preprocessed folder of the peers suite.
        recipe: its argument file.
        accelerators: names of those that the storage suite emulates; empty: all.
        full_size: the storage suite's data set is five times the memory, as far as the disk allows.
    """

    device: torch.device
    quick: bool
    work_dir: Path
    cases: int | None = None
    num_workers: int | None = None
    deadline: float = math.inf
    parts: tuple[str, ...] = ()
    data_dir: Path | None = None
    recipe: Path = Path()
    accelerators: tuple[str, ...] = ()
    full_size: bool = False

    def seconds_left(self) -> float:
        """The time until the deadline."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Table:
    """A table of results.

    Attributes:
        rows: each has the length of `columns`.
        notes: what was measured, and how.
        problem: what is wrong with what was measured, in one line; the program then exits with an error.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]]
    notes: list[str] = field(default_factory=list)
    problem: str = field(default="", kw_only=True)

    def to_markdown(self) -> str:
        lines = [f"### {self.title}", "", _line(self.columns), _line(["---"] * len(self.columns))]
        lines += [_line([_plain(cell) for cell in row]) for row in self.rows]
        return "\n".join([*lines, "", *self.notes, ""] if self.notes else [*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


@dataclass(frozen=True)
class Comparison:
    """Alternating times of two implementations; `ratio` is the median of naive / ours: above 1, ours is faster."""

    naive_s: list[float]
    ours_s: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.naive_s, self.ours_s, strict=True))


def compare(
    naive: Callable[[], object], ours: Callable[[], object], pairs: int, device: torch.device, warm_up: int = 1
) -> Comparison:
    """Times both alternately, so that a slowdown of the machine affects both; discards the first `warm_up` pairs."""
    times = [(seconds(naive, device), seconds(ours, device)) for _ in range(warm_up + pairs)][warm_up:]
    return Comparison([a for a, _ in times], [b for _, b in times])
