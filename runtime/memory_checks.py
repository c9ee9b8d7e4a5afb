"""Pre-flight checks of memory: a training step, an evaluation, and what the loaders keep on the host.

A check fails only where the estimate alone exceeds what is free. The estimate leaves out workspaces and fragmentation
(see `memory.py`), so a check warns where little is left for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.memory import free_memory_bytes
from data_loading.device_loader import MEMORY_SHARE
from data_loading.preprocessing import Shape
from data_loading.synthetic_loader import VOLUMES
from runtime.check_table import Check, format_size
from runtime.demand import Demand
from runtime.evaluation import SlidingWindowConfig
from runtime.inference import largest_slab, row_starts, tile
from runtime.memory import BatchMemory

# Share of the free memory above which a check warns.
TIGHT = 0.9


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The free memory of a machine, in bytes.

    Attributes:
        is_gpu: whether the ranks compute on GPUs, one each; otherwise they share the host's memory.
        device: free on the device of a rank.
        host: free on the host.
        ranks: on this machine.
    """

    is_gpu: bool
    device: int
    host: int
    ranks: int

    @property
    def sharing(self) -> int:
        """Number of ranks that share the memory of a device."""
        return 1 if self.is_gpu else self.ranks


def fitting_loader(demand: Demand, volumes: int, machine: Machine) -> str:
    """Returns the loader that `--loader device` will choose: itself, or pytorch if the volumes do not fit.

    It may use a share of what is free when the data is loaded. By then torch keeps a GPU's memory for itself that the
    steps on dummy data took.

    Args:
        volumes: bytes of the training volumes.
    """
    reserved = demand.network.step.peak(demand.batch_size) if machine.is_gpu and demand.prewarms else 0
    return "device" if volumes <= MEMORY_SHARE * (machine.device - reserved) else "pytorch"


def check_training(demand: Demand, loader: str, volumes: int, machine: Machine) -> Check:
    """Checks that a training step fits on the device, with all that is held during it.

    Args:
        loader: the one that will be used, see `fitting_loader`.
        volumes: bytes of the training volumes, which `--loader device` holds.
    """
    network, held, remarks = demand.network, demand.network.state_bytes, []
    if volumes and loader == "device":
        held += volumes
        remarks.append(f"{format_size(volumes)} of training volumes included")
    elif volumes:
        remarks.append(f"the {format_size(volumes)} of training volumes do not fit and are read from the disk")
    step = network.step.plus(held + _synthetic_bytes(demand, loader))
    if not machine.is_gpu:
        step = step.plus(0, demand.sample_bytes * _batches_on_host(demand, loader))
    if step.unknown:
        remarks.append(step.unknown)
    if machine.sharing > 1:
        remarks.append(f"each of {machine.sharing} ranks")
    needed = format_size(step.peak(demand.batch_size))
    found = f"a training step of {demand.batch_size} sample(s) takes {needed} on the device"
    found += f" ({'; '.join(remarks)})" if remarks else ""
    return _compare(
        "memory", found, step, demand.batch_size, free=machine.device // machine.sharing, flag="--batch_size"
    )


def check_host(demand: Demand, loader: str, machine: Machine) -> Check:
    """Checks that the batches of all ranks fit into the host's memory, from which they are copied to the GPUs.

    The arguments are those of `check_training`.
    """
    sample, windows = demand.sample_bytes, demand.scoring
    # The batch of dummy data, and its windows.
    dummy = (windows.batch_size * (4 * demand.channels + 1) * math.prod(windows.window), sample)
    # The batches that wait, one that is copied to pinned memory, and the present one.
    waiting = (_synthetic_bytes(demand, loader), sample * (_batches_on_host(demand, loader) + 2))
    host = BatchMemory((dummy, waiting))
    found = f"batches of {demand.batch_size} take {format_size(host.peak(demand.batch_size))} on each of "
    found += f"{machine.ranks} rank(s)"
    return _compare(
        "host memory", found, host, demand.batch_size, free=machine.host // machine.ranks, flag="--batch_size"
    )


def _synthetic_bytes(demand: Demand, loader: str) -> int:
    """Bytes of the random volumes of `--loader synthetic`: on the device, and while they are made on the host too."""
    return VOLUMES * demand.sample_bytes if loader == "synthetic" else 0


def _batches_on_host(demand: Demand, loader: str) -> int:
    return demand.batches_ahead if loader == "pytorch" else 0


def check_evaluation(demand: Demand, shapes: Sequence[Shape], volumes: int, machine: Machine) -> Check:
    """Checks that the largest case can be scored; without cases, a batch of windows, as the steps on dummy data do.

    Args:
        shapes: of the cases, (D, H, W).
        volumes: bytes of the training volumes that are held on the device.
    """
    network, scoring, windows = demand.network, demand.scoring, demand.scoring.batch_size
    held = network.state_bytes + volumes
    cases = [(case_memory(shape, demand.channels, scoring, network.windows).plus(held), shape) for shape in shapes]
    if cases:
        largest, shape = max(cases, key=lambda case: case[0].peak(windows))
        found = f"the largest case, {shape}, with {windows} window(s) at once"
    else:
        largest, found = network.windows.plus(held), f"a batch of {windows} window(s)"
    found += f" takes {format_size(largest.peak(windows))} on the device"
    found += f" ({network.windows.unknown})" if network.windows.unknown else ""
    free = machine.device if cases else machine.device // machine.sharing
    check = _compare("evaluation", found, largest, windows, free=free, flag="--val_batch_size")
    together = sorted((case.peak(windows) for case, _ in cases), reverse=True)[: machine.sharing]
    if check.verdict != "fail" and sum(together) > machine.device:
        found = f"{check.found}, for {machine.sharing} ranks"
        return Check("evaluation", found, "warn", "use fewer ranks on this machine")
    return check


def check_window_fits(windows: BatchMemory, free: int) -> Check:
    """Checks that one evaluation window fits, for an evaluation outside of a run, which reads the cases only later."""
    found = f"a window takes {format_size(windows.peak(1))} on the device"
    return _compare("evaluation", found, windows, 1, free=free, flag="--val_batch_size")


def _compare(what: str, found: str, memory: BatchMemory, batch: int, *, free: int, flag: str) -> Check:
    """Compares what a batch needs with what is free; names the largest batch that fits."""
    needed, fitting = memory.peak(batch), memory.fitting(free)
    found += f"; {format_size(free)} are free"
    if needed > free:
        if not fitting:
            return Check(what, found, "fail", f"not even {flag} 1 fits: use smaller windows or a smaller --model")
        same = ", with more --ga_steps for the same global batch" if flag == "--batch_size" else ""
        return Check(what, found, "fail", f"use {flag} {fitting} or less{same}")
    if not memory.unknown:
        found += f"; up to {fitting} fit"
    if needed <= TIGHT * free:
        return Check(what, found)
    fewer = max(1, memory.fitting(int(TIGHT * free)))
    return Check(what, found, "warn", f"workspaces and fragmentation come on top; {flag} {fewer} leaves room for them")


def case_memory(shape: Shape, channels: int, scoring: SlidingWindowConfig, windows: BatchMemory) -> BatchMemory:
    """Returns the peak memory of scoring a case (D, H, W): the case, its `WindowedVolume`, and the largest of three.

    These are the network's `windows` (see `memory.window_memory`), the slabs that are final once a batch is back, with
    the loss of one of them, and the case's Dice. Counted on a CPU for losses that follow from sums, exact to the
    percent. Triton's loss takes less; a library's loss also needs the logits of the whole case.
    """
    kept = [len(range(size)[part]) for size, part in zip(shape, scoring.kept(shape), strict=True)]
    padding, slices = tile(kept, scoring.window, scoring.overlap, scoring.padding_value)
    depth, *plane = (size + before + after for size, (before, after) in zip(kept, padding, strict=True))
    padded, padded_plane = depth * math.prod(plane), math.prod(plane)
    starts = row_starts(slices)
    step = largest_slab(starts, depth)
    # The case, and its prediction.
    case = (4 * channels + 1) * math.prod(shape) + math.prod(kept)
    image = 4 * channels * padded if padded > math.prod(kept) else 0  # else the case's own
    # The sum of the windows' weights, and the sums of the weighted logits.
    sums = 4 * padded + 4 * scoring.classes * scoring.window[0] * padded_plane
    slab = 4 * scoring.classes * step * padded_plane if len(starts) > 1 else 0  # else a view of the sums
    # Softmax and its logarithm; one class's truth and its sum, which torch computes in int64.
    loss = (4 * 2 * scoring.classes + 1 + 8) * min(step, kept[0]) * math.prod(kept[1:])
    # Where one class is predicted, where it is true, both, and a sum.
    dice = (3 + 8) * math.prod(kept)
    held = case + image + sums
    of_window = slab * len(starts) // len(slices)  # a batch completes the more slabs the more windows it has
    stages = (held + loss + slab - of_window, of_window), (held + dice, 0)
    return BatchMemory((*windows.plus(held).stages, *stages), windows.unknown)


def free_bytes(device: torch.device) -> int:
    """Returns the memory that this process can still allocate on the device, torch's own reserve included."""
    if device.type != "cuda":
        return free_memory_bytes()
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve
