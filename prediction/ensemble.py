"""Predicts one scan with an ensemble of networks, within the memory that it may use."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import UserError
from common.messages import counted, note
from common.progress import Progress, make_progress
from data_loading.io.file_kinds import is_image_file, stem
from data_loading.io.scan_discovery import Source, probabilities_file
from data_loading.io.volume import Volume
from data_loading.preprocessing import GridTransform
from data_loading.scan_checks import preprocess_scan
from data_loading.source_grid import SourceGrid
from data_loading.spec import DatasetSpec
from prediction.memory import GIB, READ_BYTES, MemoryBudget, MemoryEstimate, MemoryPlan, memory_plans, window_bytes
from prediction.volumes import ClassVolume, measure
from runtime.evaluation import SlidingWindowConfig
from runtime.inference import WindowedVolume, predict_windows
from runtime.memory_format import to_device
from runtime.precision import choose_precision
from runtime.test_time_flips import mean_over_flips


@dataclass(frozen=True, kw_only=True)
class Member:
    """A trained network with the settings of its evaluation.

    Attributes:
        amp, amp_dtype: as on the command line; their meaning depends on the device.
        layout: memory order, "NCDHW" or "NDHWC".
    """

    network: nn.Module
    windows: SlidingWindowConfig
    amp: bool
    amp_dtype: str
    layout: str


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Networks of one data set, whose probabilities are averaged.

    Attributes:
        members: all with the same batch size.
    """

    members: tuple[Member, ...]
    spec: DatasetSpec
    budget: MemoryBudget


def predict_scan(source: Source, ensemble: Ensemble, save_probabilities: bool) -> list[ClassVolume]:
    """Predicts one scan and writes its mask, with its probabilities beside it; returns each class's volume.

    Raises:
        UserError: the scan is damaged, unfit (see `preprocess_scan`), a picture for a network of volumes, has other
            channels than the network, or needs too much memory.
    """
    spec = ensemble.spec
    slices = min(member.windows.window[0] for member in ensemble.members)
    if slices > 1 and spec.size is None and source.file and is_image_file(source.file):
        raise UserError(
            f"{source.name}: {source.file} is a 2-D image, but the network was trained on volumes (windows of {slices} "
            "slices)"
        )
    ensemble.budget.check_host(READ_BYTES * spec.channels * source.voxels(), source.name)
    scan = source.read(spec.channels)
    geometry = scan.geometry
    for line in scan.notes:
        note(line)
    if len(scan.array) != spec.channels:
        raise UserError(f"{source.name}: has {counted(len(scan.array), 'channel')}, the network takes {spec.channels}")
    if slices > 1 and spec.size is None and 1 in geometry.shape:
        note(f"{source.name}: a single slice, but the network was trained on volumes (windows of {slices} slices)")
    image, transform = preprocess_scan(scan, spec, source.name)
    del scan  # may be half of the memory
    with ExitStack() as stack:
        shape = (len(spec.classes), *transform.reoriented.shape)
        kept = stack.enter_context(zeros_on_disk(shape, source.output.parent)) if save_probabilities else None
        grid = predict_image(image, transform, ensemble, source.name, kept=kept)
        mask = grid.mask()
        if save_probabilities:
            path = source.output.with_name(f"{stem(source.output)}_probabilities.nii.gz")
            with probabilities_file(path, geometry, len(spec.classes)) as add:
                for value in range(len(spec.classes)):
                    add(grid.probabilities(value))
    for line in source.write(Volume(mask[np.newaxis], geometry), spec.classes):
        note(line)
    return measure(source.name, mask, geometry, spec.classes)


@contextmanager
def zeros_on_disk(shape: Sequence[int], folder: Path) -> Iterator[NDArray[np.float32]]:
    """Yields an array of zeros in a nameless file of this folder, which vanishes with the program at the latest.

    Raises:
        UserError: the disk is too full.
    """
    size = 4 * math.prod(shape)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):  # without the space, writing to the array would end the program (SIGBUS)
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise UserError(
                f"--save_probabilities needs {size / GIB:.2f} GiB in {folder} while it runs: {error.strerror}"
            ) from None
        yield np.memmap(file, np.float32, "r+", shape=tuple(shape))


def predict_image(
    image: NDArray[np.float32],
    transform: GridTransform,
    ensemble: Ensemble,
    name: str,
    *,
    kept: NDArray[np.float32] | None = None,
) -> SourceGrid:
    """Predicts a preprocessed scan (C, D, H, W) on its own grid.

    Runs where memory allows: on the GPU; with windows on the GPU and the volume on the host; on the CPU.

    Args:
        kept: see `SourceGrid`.

    Raises:
        UserError: even the host has too little memory.
    """
    members, channels = ensemble.members, ensemble.spec.channels
    estimates = [
        MemoryEstimate.make(
            image.shape,
            transform,
            member.windows,
            members=len(members),
            window_bytes=window_bytes(member.network, channels, member.windows.window),
        )
        for member in members
    ]
    largest = max(estimates, key=lambda estimate: estimate.volume + estimate.window)
    failure = ""
    for plan in memory_plans(largest, ensemble.budget, members[0].windows.batch_size, name):
        if plan.note:
            note(f"{name}: {plan.note}{failure}")
        grid = SourceGrid(transform, kept)
        try:
            for planes in mean_probabilities(torch.from_numpy(image)[None], ensemble, plan, name):
                grid.add(planes)
            return grid
        except torch.OutOfMemoryError:
            failure = " (the GPU ran out of memory)"
            torch.cuda.empty_cache()
    raise UserError(f"{name}: the GPU ran out of memory, and the host has too little")


@torch.inference_mode()
def mean_probabilities(image: Tensor, ensemble: Ensemble, plan: MemoryPlan, name: str) -> Iterator[Tensor]:
    """Yields the mean of the members' softmax for an image (1, C, D, H, W), in slabs (K, planes, H, W) on the host."""
    each = [member.windows for member in ensemble.members]
    passes = sum(windows.windows(image.shape[2:]) * len(windows.flips) for windows in each)
    with closing(make_progress(passes, name, "window", leave=False)) as progress:
        image = image.to(plan.volume_device)
        for member in ensemble.members:
            to_device(member.network, plan.network_device, member.layout)
        for mean in _means([_probabilities(image, member, plan, progress) for member in ensemble.members]):
            yield mean.cpu()


def _means(members: Sequence[Iterator[Tensor]]) -> Iterator[Tensor]:
    """Averages volumes that come in slabs (K, planes, H, W), which may be of other depths for each."""
    waiting = [next(slabs) for slabs in members]
    while True:
        depth = min(slab.shape[1] for slab in waiting)
        total = waiting[0][:, :depth]
        for slab in waiting[1:]:
            total = total + slab[:, :depth]
        yield total / len(waiting) if len(waiting) > 1 else total
        for index, slab in enumerate(waiting):
            rest = slab[:, depth:] if slab.shape[1] > depth else next(members[index], None)
            if rest is None:  # for every member, since all have the same planes
                return
            waiting[index] = rest


def _probabilities(image: Tensor, member: Member, plan: MemoryPlan, progress: Progress) -> Iterator[Tensor]:
    """Yields a member's softmax in slabs (K, planes, H, W)."""
    forward = choose_precision(member.amp, member.amp_dtype, plan.network_device).applied_to(member.network)
    windows = member.windows

    def predict(batch: Tensor) -> Tensor:
        logits = forward(batch.to(plan.network_device))
        progress.update(len(batch))
        return logits.to(plan.volume_device)

    volume = WindowedVolume(image, windows.window, windows.overlap, padding_value=windows.padding_value)
    for slab in predict_windows([volume], mean_over_flips(predict, windows.flips), plan.batch_size):
        yield slab.logits[0].softmax(0)
