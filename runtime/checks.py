"""The checks of the pre-flight, each from plain values: what was looked at, how it is, and what to do about it.

No volume is opened: the files' sizes and the index tell enough.
"""

from __future__ import annotations

import math
import resource
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError
from data_loading.integrity import FilesFound, check_files
from data_loading.io.volume import free_memory_bytes
from data_loading.preprocessing import Shape
from runtime.evaluation import SlidingWindowConfig
from runtime.inference import tile

SHARED_MEMORY = Path("/dev/shm")
# torch's DataLoader has each worker make two batches ahead; one more is in the training loop's hands (seen by df).
BATCHES_AHEAD = 2
TENSORS_OF_A_BATCH = 2
# Pipes and the process's handle, in the training process (7 counted in torch 2.13, with tensors in the queue).
FILES_OF_A_WORKER = 8
# Python's, torch's, CUDA's and NCCL's own.
FILES_OF_THE_REST = 256


@dataclass(frozen=True)
class Check:
    """A line of the table.

    Attributes:
        what: that was looked at.
        found: how it is, with figures.
        verdict: "ok", "warn" or "fail".
        remedy: what to do; "" where nothing is to be done.
    """

    what: str
    found: str
    verdict: str = "ok"
    remedy: str = ""


def check_data(data_dir: Path, cases: Sequence[str]) -> tuple[Check, FilesFound | None]:
    """Whether every file is there, as long as it was, and whether its content is known; and what was found."""
    try:
        files = check_files(data_dir, cases)
    except UserError as error:
        problem, _, remedy = str(error).partition("; ")
        return Check("data", problem, "fail", remedy), None
    found = f"{len(cases)} cases, {_size(sum(files.sizes.values()))}"
    if files.changed:
        size = _size(sum(files.sizes[name] for name in files.changed))
        found += (
            f"; {len(files.changed)} file(s) copied or changed since preprocessing, {size} to hash within the clock"
        )
        return Check("data", found, "warn", "preprocess_dataset.py --mode verify hashes them before it"), files
    if files.without_digest:
        return Check("data", f"{found}; no MD5 is known of {files.without_digest} file(s)"), files
    return Check("data", f"{found}, unchanged since preprocessing"), files


def check_page_cache(data_bytes: int, free: int) -> Check:
    """Whether the volumes stay in this machine's memory once they were read."""
    stays = data_bytes <= free
    where = "stay in memory after the first epoch" if stays else "are read from the disk in each epoch"
    return Check("page cache", f"the volumes' {_size(data_bytes)} {where}; {_size(free)} are free")


def check_evaluation(
    shapes: Sequence[Shape], channels: int, scoring: SlidingWindowConfig, free: int, sharing: int = 1
) -> Check:
    """Whether the largest of these cases (D, H, W) can be scored.

    Args:
        free: bytes that the rank's device has left for it.
        sharing: ranks that share these bytes, and may score the largest cases at the same time.
    """
    needed = sorted(((evaluation_bytes(shape, channels, scoring), shape) for shape in shapes), reverse=True)
    largest, shape = needed[0]
    found = f"the largest case, {shape}, takes {_size(largest)} on the device; {_size(free)} are free"
    if largest > free:
        return Check("evaluation", found, "fail", "use a device with more memory")
    if sharing > 1 and sum(size for size, _ in needed[:sharing]) > free:
        return Check("evaluation", f"{found} to {sharing} ranks", "warn", "use fewer ranks on this machine")
    return Check("evaluation", found)


def evaluation_bytes(shape: Shape, channels: int, scoring: SlidingWindowConfig) -> int:
    """What is held at once when a case's last window is back: the case, its `WindowedVolume`, logits and loss.

    Counted on a CPU to the percent. Triton's loss takes less, but then the windows' activations come first.
    """
    kept = [len(range(size)[part]) for size, part in zip(shape, scoring.kept(shape), strict=True)]
    padding, _ = tile(kept, scoring.window, scoring.overlap, scoring.padding_value)
    padded = math.prod(size + before + after for size, (before, after) in zip(kept, padding, strict=True))
    case = (4 * channels + 1) * math.prod(shape)
    image = 4 * channels * padded if padded > math.prod(kept) else 0  # else the case's own
    # The sum of the windows' weights, the sum of the weighted logits, and the one divided by the other.
    logits = 4 * (1 + 2 * scoring.classes) * padded
    # Softmax and its logarithm; one class's truth and its sum, for which torch makes int64 of it.
    loss = (4 * 2 * scoring.classes + 1 + 8) * math.prod(kept)
    return case + image + logits + loss


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still have on the device, what torch holds in reserve included."""
    if device.type != "cuda":
        return free_memory_bytes()
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def check_disk(folder: Path, keep: int, state_bytes: int) -> Check:
    """Whether `keep` checkpoints and the one that is being written fit where `folder` is or will be.

    A quota of the user's is not seen.
    """
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    room = free // max(state_bytes, 1)
    found = f"{keep + 1} checkpoints of {_size(state_bytes)} in {folder}; {_size(free)} are free"
    if room >= keep + 1:
        return Check("disk", found)
    remedy = f"make room for {_size((keep + 1) * state_bytes - free)} more, save elsewhere, or keep fewer"
    return Check("disk", found, "warn" if room else "fail", remedy)


def checkpoint_bytes(network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """A checkpoint's size on the disk, but for some KB: the last network, the best one, and the optimizer's moments.

    Before the first step the optimizer has no moments yet: SGD with momentum will have one, Adam and LAMB two.
    """
    state = sum(tensor.nbytes for tensor in network.state_dict().values())
    parameters = sum(parameter.nbytes for parameter in network.parameters())
    moments = 2 if "betas" in optimizer.defaults else int(optimizer.defaults.get("momentum", 0) > 0)
    return 2 * state + moments * parameters


def check_shared_memory(ranks_here: int, workers: int, batch_bytes: int, folder: Path = SHARED_MEMORY) -> Check:
    """Whether the batches that workers have ready fit; a worker without room for one is killed by SIGBUS.

    Args:
        folder: where the system keeps shared memory.
    """
    needed = ranks_here * (BATCHES_AHEAD * workers + 1) * batch_bytes
    if not folder.is_dir():
        return Check("shared memory", f"{_size(needed)} for batches; this system sets no limit in {folder}")
    free = shutil.disk_usage(folder).free
    found = f"{_size(needed)} for the batches of {ranks_here} x {workers} workers; {folder} has {_size(free)} free"
    if needed <= free:
        return Check("shared memory", found)
    fitting = max(0, (free // (ranks_here * batch_bytes) - 1) // BATCHES_AHEAD)
    remedy = f"use docker's --ipc=host or --shm-size, or --num_workers {fitting}"
    return Check("shared memory", found, "fail", remedy)


def check_open_files(mapped_cases: int, workers: int, limit: int) -> Check:
    """Whether a process may open as many files as it will: a kept map and a queued tensor hold one each.

    Args:
        mapped_cases: whose two files stay mapped in each process that makes samples; in the end in each worker.
        workers: of a rank.
        limit: the soft one.
    """
    queue = TENSORS_OF_A_BATCH * (BATCHES_AHEAD * workers + 1) + FILES_OF_A_WORKER * workers if workers else 0
    # A worker's maps, the training process's queue; a worker begins as a copy of that process.
    certain, needed = max(2 * mapped_cases, queue), 2 * mapped_cases + queue + FILES_OF_THE_REST
    if limit == resource.RLIM_INFINITY:
        return Check("open files", f"up to {needed} a process; no limit")
    found = f"up to {needed} a process; {limit} are allowed"
    if needed <= limit:
        return Check("open files", found)
    return Check("open files", found, "fail" if certain > limit else "warn", f"run `ulimit -n {needed}` first")


def check_restarts(environment: Mapping[str, str]) -> list[Check]:
    """Whether torchrun's --max-restarts can work on several machines; nothing where none are asked for.

    By default torchrun itself holds the ranks' store, and those that start again meet there the addresses of the dead:
    of 14 restarts 7 failed (gloo, torch 2.13). On one machine `World.join` sees to it.
    """
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    is_alone = environment.get("GROUP_WORLD_SIZE", "1") == "1"
    if not restarts.isdecimal() or not int(restarts) or is_alone:
        return []
    found = f"torchrun may start the ranks again {restarts} times"
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return [Check("restarts", found)]
    remedy = "give torchrun --rdzv-backend c10d, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
    return [Check("restarts", f"{found}, with the store of those that died", "warn", remedy)]


def _size(count: float) -> str:
    """Bytes in the largest binary unit that leaves a whole number."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
