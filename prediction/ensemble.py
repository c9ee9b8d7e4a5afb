"""Predicts one scan with an ensemble of networks and flips, within the memory that it may use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import UserError
from common.messages import counted, note
from common.progress import Progress, make_progress
from data_loading.io.file_kinds import is_image_file, stem
from data_loading.io.scan_discovery import Source, probabilities_file
from data_loading.io.volume import Geometry, Volume
from data_loading.preprocessing import GridTransform, to_source_grid
from data_loading.scan_checks import preprocess_scan
from data_loading.spec import DatasetSpec
from prediction.memory import READ_BYTES, MemoryBudget, MemoryEstimate, MemoryPlan, memory_plans, window_bytes
from prediction.volumes import ClassVolume, measure
from runtime.evaluation import SlidingWindowConfig
from runtime.inference import sliding_window
from runtime.memory_format import to_device
from runtime.precision import choose_precision


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
        flips: each the axes to flip, as indices of (N, C, D, H, W); the mean is taken over all of them.
    """

    members: tuple[Member, ...]
    spec: DatasetSpec
    flips: tuple[tuple[int, ...], ...]
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
    if len(scan.array) != spec.channels:
        raise UserError(f"{source.name}: has {counted(len(scan.array), 'channel')}, the network takes {spec.channels}")
    if slices > 1 and spec.size is None and 1 in geometry.shape:
        note(f"{source.name}: a single slice, but the network was trained on volumes (windows of {slices} slices)")
    image, transform = preprocess_scan(scan, spec, source.name)
    del scan  # may be half of the memory
    path = source.output.with_name(f"{stem(source.output)}_probabilities.nii.gz")
    probabilities = predict_image(image, transform, ensemble, source.name)
    classes = (values[0] for values in classes_on_source_grid(probabilities, transform))
    if save_probabilities:
        with probabilities_file(path, geometry, len(spec.classes)) as add:
            mask = arg_max(_write_each(add, classes), geometry)
    else:
        mask = arg_max(classes, geometry)
    for line in source.write(Volume(mask[np.newaxis], geometry), spec.classes):
        note(line)
    return measure(source.name, mask, geometry, spec.classes)


def _write_each(
    add: Callable[[NDArray[np.float32]], None], classes: Iterator[NDArray[np.float32]]
) -> Iterator[NDArray[np.float32]]:
    """Passes each class's probabilities to `add` before yielding them."""
    for values in classes:
        add(values)
        yield values


def classes_on_source_grid(
    probabilities: NDArray[np.float32], transform: GridTransform
) -> Iterator[NDArray[np.float32]]:
    """Resamples probabilities (K, D, H, W) from the network's grid; yields (1, *source shape) for each class.

    One at a time: all together would be the largest array in memory, and the numbers are the same.
    """
    for value in range(len(probabilities)):
        yield to_source_grid(probabilities[value : value + 1], transform, first=value)


def arg_max(classes: Iterator[NDArray[np.float32]], geometry: Geometry) -> NDArray[np.uint8]:
    """Returns each voxel's most probable class, the first of equal ones: (D, H, W) uint8."""
    mask = np.zeros(geometry.shape, np.uint8)
    best = np.full(geometry.shape, -np.inf, np.float32)
    for value, probability in enumerate(classes):
        is_larger = probability > best
        np.copyto(mask, np.uint8(value), where=is_larger)
        np.maximum(best, probability, out=best)
    return mask


def predict_image(
    image: NDArray[np.float32], transform: GridTransform, ensemble: Ensemble, name: str
) -> NDArray[np.float32]:
    """Returns mean probabilities of a preprocessed scan, (C, D, H, W) -> (K, D, H, W).

    Runs where memory allows: on the GPU; with windows on the GPU and the volume on the host; on the CPU.

    Raises:
        UserError: even the host has too little memory.
    """
    members, channels = ensemble.members, ensemble.spec.channels
    estimates = [
        MemoryEstimate.make(
            image.shape,
            transform,
            member.windows,
            is_mean=len(members) * len(ensemble.flips) > 1,
            window_bytes=window_bytes(member.network, channels, member.windows.window),
        )
        for member in members
    ]
    largest = max(estimates, key=lambda estimate: estimate.volume + estimate.window)
    failure = ""
    for plan in memory_plans(largest, ensemble.budget, members[0].windows.batch_size, name):
        if plan.note:
            note(f"{name}: {plan.note}{failure}")
        try:
            return mean_probabilities(torch.from_numpy(image)[None], ensemble, plan, name)
        except torch.OutOfMemoryError:
            failure = " (the GPU ran out of memory)"
            torch.cuda.empty_cache()
    raise UserError(f"{name}: the GPU ran out of memory, and the host has too little")


@torch.inference_mode()
def mean_probabilities(image: Tensor, ensemble: Ensemble, plan: MemoryPlan, name: str) -> NDArray[np.float32]:
    """Returns the mean of the members' softmax over all flips, (1, C, D, H, W) -> (K, D, H, W), on the host."""
    total: Tensor | None = None
    windows = sum(member.windows.windows(image.shape[2:]) for member in ensemble.members)
    progress = make_progress(windows * len(ensemble.flips), name, "window", leave=False)
    image = image.to(plan.volume_device)
    for member in ensemble.members:
        to_device(member.network, plan.network_device, member.layout)
        for axes in ensemble.flips:
            probabilities = _logits(image.flip(axes) if axes else image, member, plan, progress)
            # Softmax in place: another K volumes would be the largest tensor in memory.
            probabilities.sub_(probabilities.amax(dim=1, keepdim=True)).exp_()
            probabilities.div_(probabilities.sum(dim=1, keepdim=True))
            probabilities = probabilities.flip(axes) if axes else probabilities
            total = probabilities if total is None else total.add_(probabilities)
            del probabilities
    progress.close()
    assert total is not None
    total /= len(ensemble.members) * len(ensemble.flips)
    return total[0].cpu().numpy()


def _logits(image: Tensor, member: Member, plan: MemoryPlan, progress: Progress) -> Tensor:
    precision = choose_precision(member.amp, member.amp_dtype, plan.network_device)

    def predict(windows: Tensor) -> Tensor:
        with precision.autocast():
            logits: Tensor = member.network(windows.to(plan.network_device))
        progress.update(len(windows))
        return logits.to(plan.volume_device)

    windows = member.windows
    return sliding_window(
        image,
        predict,
        windows.window,
        windows.overlap,
        padding_value=windows.padding_value,
        batch_size=plan.batch_size,
    )
