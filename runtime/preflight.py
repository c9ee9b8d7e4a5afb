"""Pre-flight: what would end a run hours later is looked for in a second, before the clock starts.

A check that fails means that the run cannot go on to its end; one that warns, that it may not, or that it costs time.
"""

from __future__ import annotations

import os
import resource
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_loading.dataset import file_of
from data_loading.device_loader import bytes_needed, memory_budget
from data_loading.integrity import FilesFound
from data_loading.io.volume import free_memory_bytes
from data_loading.preprocessing import Shape
from runtime.checks import (
    Check,
    check_data,
    check_disk,
    check_evaluation,
    check_open_files,
    check_page_cache,
    check_restarts,
    check_shared_memory,
    free_bytes,
)
from runtime.evaluation import SlidingWindowConfig

TABLE_WIDTH = 100


@dataclass(frozen=True)
class Samples:
    """How training samples come to a rank.

    Attributes:
        loader: of `--loader`.
        workers: processes that a rank will start for it.
        batch_size: samples of a rank's batch.
        patch: a sample's shape (D, H, W).
        channels: of its image.
    """

    loader: str
    workers: int
    batch_size: int
    patch: Shape
    channels: int

    @property
    def batch_bytes(self) -> int:
        """Of a batch's image in float32 and its label in uint8."""
        d, h, w = self.patch
        return self.batch_size * (4 * self.channels + 1) * d * h * w


def run_checks(
    data_dir: Path | None,
    training: Sequence[str],
    evaluation: Sequence[str],
    samples: Samples,
    scoring: SlidingWindowConfig,
    checkpoints: Path | None,
    keep: int,
    state_bytes: int,
    device: torch.device,
    ranks_here: int,
    environment: Mapping[str, str] = os.environ,
) -> list[Check]:
    """Everything that this machine can be asked before the first step, in well under a second for KiTS19.

    Args:
        data_dir: the preprocessed folder; None where samples are made up.
        training, evaluation: the case ids that will be read.
        checkpoints: the folder they go to, perhaps still to be made; None: none are saved.
        keep: checkpoints of this run that stay.
        state_bytes: of one, see `checkpoint_bytes`.
        ranks_here: on this machine.
        environment: of this process.
    """
    checks = []
    reads_from_disk = samples.loader == "pytorch"
    if data_dir is not None:
        check, files = check_data(data_dir, [*training, *evaluation])
        checks.append(check)
        if files is not None:
            shapes = {case: _shape(files, case) for case in (*training, *evaluation)}
            if samples.loader == "device":  # whose volumes the pytorch loader reads where they do not fit
                volumes = [(samples.channels, *shapes[case]) for case in training]
                reads_from_disk = bytes_needed(volumes) > memory_budget(device)
            checks.append(check_page_cache(sum(files.sizes.values()), free_memory_bytes()))
            if evaluation:
                scored = [shapes[case] for case in evaluation]
                sharing = ranks_here if device.type == "cpu" else 1
                checks.append(check_evaluation(scored, samples.channels, scoring, free_bytes(device), sharing))
    if checkpoints is not None:
        checks.append(check_disk(checkpoints, keep, state_bytes))
    if reads_from_disk:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        checks.append(check_open_files(len(training), samples.workers, limit))
        if samples.workers:
            checks.append(check_shared_memory(ranks_here, samples.workers, samples.batch_bytes))
    return checks + check_restarts(environment)


def _shape(files: FilesFound, case: str) -> Shape:
    """A case's shape (D, H, W): the index's, else a cube of as many voxels as its label has bytes."""
    side = round(files.sizes[file_of(Path(), case, "y").name] ** (1 / 3))
    return files.shapes.get(case, (side, side, side))


def format_table(checks: Sequence[Check]) -> str:
    """The checks in aligned columns, broken at 100 characters."""
    width = max((len(check.what) for check in checks), default=0)
    lines = []
    for check in checks:
        text = check.found + (f"; {check.remedy}" if check.remedy else "")
        start = f"{check.verdict:4}  {check.what:{width}}  "
        lines += textwrap.wrap(
            text,
            TABLE_WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def failures(checks: Sequence[Check]) -> str:
    """What failed and what to do, in one line for a UserError; "" where nothing did."""
    return " | ".join(f"{check.what}: {check.found}; {check.remedy}" for check in checks if check.verdict == "fail")
