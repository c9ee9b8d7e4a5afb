"""Plans a prediction's memory: on which devices it runs, and with what batch size, to stay within `--max_memory_gb`."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError
from common.memory import free_memory_bytes
from data_loading.preprocessing import GridTransform
from runtime.evaluation import SlidingWindowConfig
from runtime.inference import largest_slab, row_starts, tile
from runtime.memory import LiveMemory
from runtime.memory_checks import free_bytes

GIB = 2**30
# Share of the free memory that is used; the rest is for allocations that are not counted here.
USABLE_SHARE = 0.9
# Left of `--max_memory_gb` for freed blocks that the allocator keeps: up to 0.05 GiB were measured.
RESERVED_BYTES = 64 * 2**20
# Bytes per voxel while a scan is read: the file's bytes twice, their scaled float64 values or a float32 copy.
READ_BYTES = 16
# Bytes per voxel of the source: the mask, in the network's orientation and the scan's, and as it is written.
MASK_BYTES = 4
# A convolution's own copies of its input and weights in another memory order.
CONVOLUTION_FACTOR = 1.5


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that the prediction of a scan takes.

    Attributes:
        volume: while windows are computed, for the padded image, the sums of one row of windows, and a slab.
        window: for the network's tensors, per window of a batch.
        host: at the same time and after that, always on the host.
    """

    volume: int
    window: int
    host: int

    @classmethod
    def make(
        cls,
        image_shape: Sequence[int],
        transform: GridTransform,
        windows: SlidingWindowConfig,
        *,
        members: int,
        window_bytes: int,
    ) -> MemoryEstimate:
        """Estimates the prediction of a preprocessed image of shape (C, D, H, W).

        Args:
            members: number of networks whose probabilities are averaged.
            window_bytes: see `window_bytes`.
        """
        channels, *shape = image_shape
        padding, slices = tile(shape, windows.window, windows.overlap, windows.padding_value)
        depth, *plane = (size + before + after for size, (before, after) in zip(shape, padding, strict=True))
        starts = row_starts(slices)
        step = largest_slab(starts, depth)
        # The sums, then a slab of logits and its softmax, for every member; the mean of the members.
        planes = members * (windows.window[0] + 2 * step) + (members > 1) * step
        floats = windows.classes * planes * math.prod(plane) + members * (channels + 1) * depth * math.prod(plane)
        floats += channels * math.prod(shape)
        # A slab, and its planes resized; then two planes at a time of the scan's grid and their mean.
        source = transform.reoriented.shape
        resized = (2 * step + 4) * windows.classes * max(math.prod(shape[1:]), math.prod(source[1:]))
        host = MASK_BYTES * math.prod(source) + 4 * resized
        return cls(volume=4 * floats, window=window_bytes, host=host)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Where a scan is predicted.

    Attributes:
        volume_device: holds the image and the windows' sums.
        network_device: computes the windows.
        batch_size: windows per forward pass.
        note: for the user, if the plan does not use the device as expected, else "".
    """

    volume_device: torch.device
    network_device: torch.device
    batch_size: int
    note: str = ""


@dataclass(frozen=True)
class MemoryBudget:
    """How much memory may be used.

    Attributes:
        max_gb: `--max_memory_gb`; None: all that is free.
        device: of this rank.
    """

    max_gb: float | None
    device: torch.device

    def host_bytes(self) -> int:
        """Returns the bytes of host memory that this process may still allocate."""
        free = int(USABLE_SHARE * free_memory_bytes())
        return free if self.max_gb is None else min(free, int(self.max_gb * GIB) - resident_bytes() - RESERVED_BYTES)

    def gpu_bytes(self) -> int:
        """Returns the bytes of GPU memory that this process may still allocate."""
        free = int(USABLE_SHARE * free_bytes(self.device))  # what earlier scans left in torch's reserve is free too
        allocated = torch.cuda.memory_allocated(self.device)
        return free if self.max_gb is None else min(free, int(self.max_gb * GIB) - allocated)

    def check_host(self, needed: int, name: str) -> None:
        """Raises UserError if the host may not allocate `needed` more bytes for the scan `name`."""
        if needed > (available := self.host_bytes()):
            limit = "are free" if self.max_gb is None else f"are left of --max_memory_gb {self.max_gb:g}"
            raise UserError(
                f"{name}: needs {needed / GIB:.2f} GiB, but {max(available, 0) / GIB:.2f} GiB {limit}; "
                "provide more, or use a smaller --val_input_shape or no --test_time_flips"
            )


def memory_plans(estimate: MemoryEstimate, budget: MemoryBudget, batch_size: int, name: str) -> Iterator[MemoryPlan]:
    """Yields the plans that fit, fastest first: all on the GPU, only the windows on the GPU, all on the CPU.

    Args:
        batch_size: windows per forward pass, if memory allows.
        name: of the scan, for messages.

    Raises:
        UserError: the host has too little memory, either for any plan or for the last one.
    """
    cpu, reason = torch.device("cpu"), ""
    budget.check_host(estimate.host, name)
    if budget.device.type == "cuda":
        gpu_bytes = budget.gpu_bytes()
        if (fitting := (gpu_bytes - estimate.volume) // estimate.window) > 0:
            batch = min(batch_size, fitting)
            yield MemoryPlan(volume_device=budget.device, network_device=budget.device, batch_size=batch)
        reason = f"needs {(estimate.volume + estimate.window) / GIB:.2f} GiB, the GPU has {gpu_bytes / GIB:.2f}"
        if (fitting := gpu_bytes // estimate.window) > 0 and estimate.volume + estimate.host <= budget.host_bytes():
            note = f"{reason}: its volume stays in host memory, windows are computed on the GPU"
            batch = min(batch_size, fitting)
            yield MemoryPlan(volume_device=cpu, network_device=budget.device, batch_size=batch, note=note)
        reason += ": computed on the CPU"
    held = estimate.volume + estimate.host
    budget.check_host(held + estimate.window, name)
    batch = min(batch_size, (budget.host_bytes() - held) // estimate.window)
    yield MemoryPlan(volume_device=cpu, network_device=cpu, batch_size=batch, note=reason)


def resident_bytes() -> int:
    """Returns this process's resident memory; 0 if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@torch.inference_mode()
def window_bytes(network: nn.Module, channels: int, window: Sequence[int]) -> int:
    """Returns the peak bytes of tensors for one window (D, H, W).

    Measured on the meta device, where nothing is computed or allocated.
    """
    on_meta = copy.deepcopy(network).to("meta")
    with torch.device("meta"), LiveMemory(on_meta.parameters()) as memory:
        on_meta(torch.empty(1, channels, *window, device="meta"))
    return int(CONVOLUTION_FACTOR * memory.peak)
