"""What a prediction takes in memory, and where it may be computed so that it stays within `--max_memory_gb`."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from common.compat import TorchDispatchMode, tree_leaves
from common.errors import UserError
from data_loading.io.volume import free_memory_bytes
from data_loading.preprocessing import GridTransform
from runtime.inference import tile

GIB = 2**30
# Of what is free; the rest is for what is not counted here.
SHARE = 0.9
# While a scan is read: the file's bytes twice, their scaled float64 values or a float32 copy.
READ_BYTES = 16
# On the way back a voxel of the source has the best probability, the next one, a comparison and the mask.
BACK_BYTES = 4 + 4 + 4 + 1 + 1
# A convolution's own copies of its input and weights in another order.
CONVOLUTION = 1.5


@dataclass(frozen=True)
class Sizes:
    """Bytes that a scan takes.

    Attributes:
        volume: the padded image, the sums of windows and the probabilities, while windows are computed.
        window: the network's own for one window.
        host: before and after that, on the host in any case.
    """

    volume: int
    window: int
    host: int

    @classmethod
    def of(
        cls,
        image: Sequence[int],
        transform: GridTransform,
        classes: int,
        window: Sequence[int],
        overlap: float,
        padding_value: float | None,
        several: bool,
        window_bytes: int,
    ) -> Sizes:
        """Of an image (C, D, H, W); `several`: a mean over members or flips is taken."""
        channels, *shape = image
        padding, _ = tile(shape, window, overlap, padding_value)
        padded = math.prod(size + before + after for size, (before, after) in zip(shape, padding, strict=True))
        floats = 2 * channels + 1 + 2 * classes + several * (channels + classes)
        source, network = math.prod(transform.source.shape), math.prod(shape)
        # A cropped scan's probabilities are pasted into the whole.
        back = (BACK_BYTES + 4 * (transform.crop is not None)) * source + 4 * network * (classes + 1)
        return cls(4 * padded * floats, window_bytes, back)


@dataclass(frozen=True)
class Place:
    """Where a scan is predicted.

    Attributes:
        volume, network: the devices of the sums and of the windows' logits.
        note: a phrase for the user where it is not the device that was there to be used, else "".
    """

    volume: torch.device
    network: torch.device
    batch_size: int
    note: str


@dataclass(frozen=True)
class Budget:
    """How much memory may be used.

    Attributes:
        max_gb: `--max_memory_gb`, None: what is free.
        device: of this rank.
    """

    max_gb: float | None
    device: torch.device

    def host(self) -> int:
        """Bytes that this process may take besides those it has."""
        free = int(SHARE * free_memory_bytes())
        return free if self.max_gb is None else min(free, int(self.max_gb * GIB) - resident_bytes())

    def gpu(self) -> int:
        """Bytes of the GPU besides those that this process has."""
        free = int(SHARE * torch.cuda.mem_get_info(self.device)[0])
        taken = torch.cuda.memory_allocated(self.device)
        return free if self.max_gb is None else min(free, int(self.max_gb * GIB) - taken)

    def check_host(self, needed: int, name: str) -> None:
        """Raises UserError where the host may not take so many bytes more."""
        if needed > (budget := self.host()):
            bound = "are free" if self.max_gb is None else f"are left of --max_memory_gb {self.max_gb:g}"
            raise UserError(
                f"{name}: needs {needed / GIB:.2f} GiB, and {max(budget, 0) / GIB:.2f} GiB {bound}; "
                "raise it, or use a smaller --val_input_shape or no --test_time_flips"
            )


def places(sizes: Sizes, budget: Budget, batch_size: int, name: str) -> Iterator[Place]:
    """Where there is room, the fastest first. Raises UserError in the end: the host is too small as well."""
    host = torch.device("cpu")
    why = ""
    budget.check_host(sizes.host, name)
    if budget.device.type == "cuda":
        gpu = budget.gpu()
        if (fitting := (gpu - sizes.volume) // sizes.window) > 0:
            yield Place(budget.device, budget.device, min(batch_size, fitting), "")
        why = f"needs {(sizes.volume + sizes.window) / GIB:.2f} GiB, the GPU has {gpu / GIB:.2f}"
        if (fitting := gpu // sizes.window) > 0 and sizes.volume <= budget.host():
            note = f"{why}: its volume stays in the host's memory, windows are computed on the GPU"
            yield Place(host, budget.device, min(batch_size, fitting), note)
        why += ": computed on the CPU"
    budget.check_host(sizes.volume + sizes.window, name)
    yield Place(host, host, min(batch_size, (budget.host() - sizes.volume) // sizes.window), why)


def resident_bytes() -> int:
    """Memory that this process has; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@torch.inference_mode()
def window_bytes(network: nn.Module, channels: int, window: Sequence[int]) -> int:
    """The most that one window's tensors take at once, found on the meta device, where nothing is computed."""
    shadow = copy.deepcopy(network).to("meta")
    with torch.device("meta"), _Live() as live:
        shadow(torch.empty(1, channels, *window, device="meta"))
    return int(CONVOLUTION * live.peak)


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages[StorageWeakRef(storage)] = storage.nbytes()
        self._storages = {alive: size for alive, size in self._storages.items() if not alive.expired()}
        self.peak = max(self.peak, sum(self._storages.values()))
        return made
