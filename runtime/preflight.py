"""Pre-flight: finds in a second, before the clock starts, what would otherwise end the run hours later.

A failed check means that the run cannot complete; a warning, that it may not, or that it loses time. Each check is a
function of plain values. No volume is opened: file sizes and the index suffice.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError
from data_loading.dataset import case_file
from data_loading.device_loader import bytes_needed, memory_budget
from data_loading.integrity import FileCheck, check_files
from data_loading.io.volume import free_memory_bytes
from data_loading.preprocessing import Shape
from runtime.evaluation import SlidingWindowConfig
from runtime.inference import tile

TABLE_WIDTH = 100
SHARED_MEMORY = Path("/dev/shm")
# Each worker of torch's DataLoader prepares two batches ahead; the training loop holds one more (measured with df).
BATCHES_AHEAD = 2
TENSORS_PER_BATCH = 2
# Pipes and the process handle, in the training process (7 counted in torch 2.13, with tensors in the queue).
FILES_PER_WORKER = 8
# Files that Python, torch, CUDA and NCCL open.
OTHER_FILES = 256


@dataclass(frozen=True)
class Check:
    """A row of the table.

    Attributes:
        what: the subject.
        found: its state, with figures.
        verdict: "ok", "warn" or "fail".
        remedy: what to do about it; "" if nothing.
    """

    what: str
    found: str
    verdict: str = "ok"
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a run will need of each machine.

    Attributes:
        data_dir: the preprocessed folder; None: samples are synthetic.
        training, evaluation: ids of the cases that will be read.
        loader: the value of `--loader`.
        workers: loader processes per rank.
        batch_size: samples per rank per micro-batch.
        patch: shape (D, H, W) of a sample.
        channels: channels of an image.
        scoring: how evaluation cases are scored.
        checkpoint_dir: the folder of the checkpoints, which may not exist yet; None: none are saved.
        checkpoints: number of checkpoints that are kept.
        checkpoint_bytes: the size of one, see `checkpoint_bytes`.
    """

    data_dir: Path | None
    training: Sequence[str]
    evaluation: Sequence[str]
    loader: str
    workers: int
    batch_size: int
    patch: Shape
    channels: int
    scoring: SlidingWindowConfig
    checkpoint_dir: Path | None
    checkpoints: int
    checkpoint_bytes: int

    @property
    def batch_bytes(self) -> int:
        """Size of a micro-batch: images in float32, labels in uint8."""
        return self.batch_size * (4 * self.channels + 1) * math.prod(self.patch)


def run_checks(
    demand: Demand, device: torch.device, local_ranks: int, environment: Mapping[str, str] = os.environ
) -> list[Check]:
    """Runs every check that applies on this machine, in well under a second for KiTS19.

    Args:
        demand: what the run needs.
        device: this rank's.
        local_ranks: ranks on this machine.
        environment: environment variables of this process.
    """
    checks = []
    reads_from_disk = demand.loader == "pytorch"
    if demand.data_dir is not None:
        check, files = check_data(demand.data_dir, [*demand.training, *demand.evaluation])
        checks.append(check)
        if files is not None:
            if demand.loader == "device":  # falls back to reading from disk if the volumes do not fit
                volumes = [(demand.channels, *_shape(files, case)) for case in demand.training]
                reads_from_disk = bytes_needed(volumes) > memory_budget(device)
            checks.append(check_page_cache(sum(files.sizes.values()), free_memory_bytes()))
            if demand.evaluation:
                shapes = [_shape(files, case) for case in demand.evaluation]
                sharing = local_ranks if device.type == "cpu" else 1
                needed = [(evaluation_bytes(shape, demand.channels, demand.scoring), shape) for shape in shapes]
                checks.append(check_evaluation(needed, free_bytes(device), sharing))
    if demand.checkpoint_dir is not None:
        checks.append(check_disk(demand.checkpoint_dir, demand.checkpoints, demand.checkpoint_bytes))
    if reads_from_disk:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        checks.append(check_open_files(len(demand.training), demand.workers, limit))
        if demand.workers:
            checks.append(check_shared_memory(local_ranks, demand.workers, demand.batch_bytes))
    return checks + check_restarts(environment)


def _shape(files: FileCheck, case: str) -> Shape:
    """A case's shape (D, H, W): the index's, else a cube with as many voxels as its label has bytes."""
    side = round(files.sizes[case_file(Path(), case, "y").name] ** (1 / 3))
    return files.shapes.get(case, (side, side, side))


def format_table(checks: Sequence[Check]) -> str:
    """Returns the checks in aligned columns, wrapped at 100 characters."""
    width = max((len(check.what) for check in checks), default=0)
    lines = []
    for check in checks:
        start = f"{check.verdict:4}  {check.what:{width}}  "
        lines += textwrap.wrap(
            check.found + (f"; {check.remedy}" if check.remedy else ""),
            TABLE_WIDTH,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def failures(checks: Sequence[Check]) -> str:
    """Returns what failed and what to do, in one line for a UserError; "" if nothing failed."""
    return " | ".join(f"{check.what}: {check.found}; {check.remedy}" for check in checks if check.verdict == "fail")


def check_data(data_dir: Path, cases: Sequence[str]) -> tuple[Check, FileCheck | None]:
    """Checks that every file exists with its recorded size, and whether its content is known; also returns the files.

    The files are None if the check fails.
    """
    try:
        files = check_files(data_dir, cases)
    except UserError as error:
        problem, _, remedy = str(error).partition("; ")
        return Check("data", problem, "fail", remedy), None
    found = f"{len(cases)} cases, {_size(sum(files.sizes.values()))}"
    if files.changed:
        size = _size(sum(files.sizes[name] for name in files.changed))
        found += f"; {len(files.changed)} file(s) copied or changed since preprocessing, {size} to hash while timed"
        return Check("data", found, "warn", "preprocess_dataset.py --mode verify hashes them before the run"), files
    if files.without_digest:
        return Check("data", f"{found}; {files.without_digest} file(s) have no recorded MD5"), files
    return Check("data", f"{found}, unchanged since preprocessing"), files


def check_page_cache(data_bytes: int, free: int) -> Check:
    """Reports whether the volumes stay in this machine's memory once they have been read."""
    where = "stay in memory after the first epoch" if data_bytes <= free else "are read from the disk in each epoch"
    return Check("page cache", f"the volumes' {_size(data_bytes)} {where}; {_size(free)} are free")


def check_evaluation(needed: Sequence[tuple[int, Shape]], free: int, sharing: int = 1) -> Check:
    """Checks that the largest case can be scored.

    Args:
        needed: `evaluation_bytes` of each case, and its shape (D, H, W).
        free: bytes free on the rank's device.
        sharing: ranks that share these bytes, and may score the largest cases at the same time.
    """
    largest_first = sorted(needed, reverse=True)
    largest, shape = largest_first[0]
    found = f"the largest case, {shape}, takes {_size(largest)} on the device; {_size(free)} are free"
    if largest > free:
        return Check("evaluation", found, "fail", "use a device with more memory")
    if sharing > 1 and sum(size for size, _ in largest_first[:sharing]) > free:
        return Check("evaluation", f"{found} for {sharing} ranks", "warn", "use fewer ranks on this machine")
    return Check("evaluation", found)


def evaluation_bytes(shape: Shape, channels: int, scoring: SlidingWindowConfig) -> int:
    """Returns the peak memory of scoring a case (D, H, W): the case, its `WindowedVolume`, logits and loss.

    The peak is when its last window is back. Counted on a CPU, exact to the percent. Triton's loss takes less, but then
    the windows' activations dominate.
    """
    kept = [len(range(size)[part]) for size, part in zip(shape, scoring.kept(shape), strict=True)]
    padding, _ = tile(kept, scoring.window, scoring.overlap, scoring.padding_value)
    padded = math.prod(size + before + after for size, (before, after) in zip(kept, padding, strict=True))
    case = (4 * channels + 1) * math.prod(shape)
    image = 4 * channels * padded if padded > math.prod(kept) else 0  # else the case's own
    # The sum of the windows' weights, the sum of the weighted logits, and the quotient of the two.
    logits = 4 * (1 + 2 * scoring.classes) * padded
    # Softmax and its logarithm; one class's truth and its sum, which torch computes in int64.
    loss = (4 * 2 * scoring.classes + 1 + 8) * math.prod(kept)
    return case + image + logits + loss


def free_bytes(device: torch.device) -> int:
    """Returns the memory that this process can still allocate on the device, torch's own reserve included."""
    if device.type != "cuda":
        return free_memory_bytes()
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve


def check_disk(folder: Path, keep: int, state_bytes: int) -> Check:
    """Checks that `keep` checkpoints and the one being written fit on the disk of `folder`, which may not exist yet.

    Does not see a user's quota.
    """
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    fitting = free // max(state_bytes, 1)
    found = f"{keep + 1} checkpoints of {_size(state_bytes)} in {folder}; {_size(free)} are free"
    if fitting >= keep + 1:
        return Check("disk", found)
    remedy = f"make room for {_size((keep + 1) * state_bytes - free)} more, save elsewhere, or keep fewer"
    return Check("disk", found, "warn" if fitting else "fail", remedy)


def checkpoint_bytes(network: nn.Module, optimizer: torch.optim.Optimizer, networks: int = 2) -> int:
    """Returns the size of a checkpoint, to within some KB: the last network, the best one, the optimizer's moments.

    With `--eval_ranks` there are three networks: the one under evaluation too.
    Before the first step the optimizer has no moments yet: SGD with momentum will have one, Adam and LAMB two.
    """
    state = sum(tensor.nbytes for tensor in network.state_dict().values())
    parameters = sum(parameter.nbytes for parameter in network.parameters())
    moments = 2 if "betas" in optimizer.defaults else int(optimizer.defaults.get("momentum", 0) > 0)
    return networks * state + moments * parameters


def check_shared_memory(local_ranks: int, workers: int, batch_bytes: int, folder: Path = SHARED_MEMORY) -> Check:
    """Checks that the batches prepared by loader workers fit; SIGBUS kills a worker that finds no space for one.

    Args:
        local_ranks: ranks on this machine.
        workers: loader processes per rank.
        batch_bytes: size of a micro-batch.
        folder: the system's shared memory.
    """
    needed = local_ranks * (BATCHES_AHEAD * workers + 1) * batch_bytes
    if not folder.is_dir():
        return Check("shared memory", f"{_size(needed)} for batches; this system sets no limit in {folder}")
    free = shutil.disk_usage(folder).free
    found = f"{_size(needed)} for the batches of {local_ranks} x {workers} workers; {folder} has {_size(free)} free"
    if needed <= free:
        return Check("shared memory", found)
    fitting = max(0, (free // (local_ranks * batch_bytes) - 1) // BATCHES_AHEAD)
    remedy = f"use docker's --ipc=host or --shm-size, or --num_workers {fitting}"
    return Check("shared memory", found, "fail", remedy)


def check_open_files(mapped_cases: int, workers: int, limit: int) -> Check:
    """Checks the limit of open files per process: a memory map and a queued tensor hold one each.

    Args:
        mapped_cases: cases whose two files stay mapped in each process that makes samples; finally in every worker.
        workers: loader processes per rank.
        limit: the soft limit.
    """
    queue = TENSORS_PER_BATCH * (BATCHES_AHEAD * workers + 1) + FILES_PER_WORKER * workers if workers else 0
    # A worker's maps, the training process's queue; a worker starts as a copy of that process.
    certain, needed = max(2 * mapped_cases, queue), 2 * mapped_cases + queue + OTHER_FILES
    if limit == resource.RLIM_INFINITY:
        return Check("open files", f"up to {needed} per process; no limit")
    found = f"up to {needed} per process; {limit} are allowed"
    if needed <= limit:
        return Check("open files", found)
    return Check("open files", found, "fail" if certain > limit else "warn", f"run `ulimit -n {needed}` first")


def check_restarts(environment: Mapping[str, str]) -> list[Check]:
    """Checks that torchrun's --max-restarts can work on several machines; no check if no restarts are requested.

    By default torchrun itself holds the ranks' store, in which restarted ranks find the addresses of the dead ones: of
    14 restarts 7 failed (gloo, torch 2.13). On one machine `World.join` takes care of it.
    """
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    is_single_machine = environment.get("GROUP_WORLD_SIZE", "1") == "1"
    if not restarts.isdecimal() or not int(restarts) or is_single_machine:
        return []
    found = f"torchrun may restart the ranks {restarts} times"
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return [Check("restarts", found)]
    remedy = "give torchrun --rdzv-backend c10d, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
    return [Check("restarts", f"{found}, with the store of the ranks that died", "warn", remedy)]


def _size(count: float) -> str:
    """Formats bytes in the largest binary unit that keeps the number at 1 or more."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
