"""Pre-flight: finds in a second, before the clock starts, what would otherwise end the run hours later.

A failed check means that the run cannot complete; a warning, that it may not, or that it loses time. Each check is a
function of plain values. No volume is opened: file sizes and the index suffice.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from common.errors import UserError
from common.memory import free_memory_bytes
from common.messages import counted
from data_loading.dataset import case_file
from data_loading.device_loader import bytes_needed
from data_loading.integrity import FileCheck, check_files
from data_loading.preprocessing import Shape
from runtime.check_table import Check, format_size
from runtime.demand import BATCHES_AHEAD, Demand
from runtime.memory import moments
from runtime.memory_checks import (
    Machine,
    check_evaluation,
    check_host,
    check_training,
    fitting_loader,
    free_bytes,
)

SHARED_MEMORY = Path("/dev/shm")
TENSORS_PER_BATCH = 2
# Pipes and the process handle, in the training process (7 counted in torch 2.13, with tensors in the queue).
FILES_PER_WORKER = 8
# Files that Python, torch, CUDA and NCCL open.
OTHER_FILES = 256


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
    checks: list[Check] = []
    loader, volumes = demand.loader, 0
    shapes: list[Shape] | None = None if demand.data_dir else []  # None: unknown
    machine = Machine(
        is_gpu=device.type == "cuda", device=free_bytes(device), host=free_memory_bytes(), ranks=local_ranks
    )
    if demand.data_dir is not None:
        check, files = check_data(demand.data_dir, [*demand.training, *demand.evaluation])
        checks.append(check)
        if files is not None:
            if loader == "device":
                volumes = bytes_needed([(demand.channels, *_shape(files, case)) for case in demand.training])
                loader = fitting_loader(demand, volumes, machine)
            checks.append(check_page_cache(sum(files.sizes.values()), machine.host))
            shapes = [_shape(files, case) for case in demand.evaluation]
    if demand.training:
        checks.append(check_training(demand, loader, volumes, machine))
        if machine.is_gpu:
            checks.append(check_host(demand, loader, machine))
    if shapes or (shapes is not None and demand.prewarms):
        checks.append(check_evaluation(demand, shapes, volumes if loader == "device" else 0, machine))
    if demand.checkpoint_dir is not None:
        checks.append(check_disk(demand.checkpoint_dir, demand.checkpoints, demand.checkpoint_bytes))
    if loader == "pytorch":
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        checks.append(check_open_files(len(demand.training), demand.workers, limit))
        if demand.workers:
            checks.append(check_shared_memory(local_ranks, demand.workers, demand.batch_size * demand.sample_bytes))
    return checks + check_restarts(environment)


def _shape(files: FileCheck, case: str) -> Shape:
    """A case's shape (D, H, W): the index's, else a cube with as many voxels as its label has bytes."""
    side = round(files.sizes[case_file(Path(), case, "y").name] ** (1 / 3))
    return files.shapes.get(case, (side, side, side))


def check_data(data_dir: Path, cases: Sequence[str]) -> tuple[Check, FileCheck | None]:
    """Checks that every file exists with its recorded size, and whether its content is known; also returns the files.

    The files are None if the check fails.
    """
    try:
        files = check_files(data_dir, cases)
    except UserError as error:
        problem, _, remedy = str(error).partition("; ")
        return Check("data", problem, "fail", remedy), None
    found = f"{counted(len(cases), 'case')}, {format_size(sum(files.sizes.values()))}"
    if files.changed:
        size = format_size(sum(files.sizes[name] for name in files.changed))
        found += f"; {len(files.changed)} file(s) copied or changed since preprocessing, {size} to hash while timed"
        return Check("data", found, "warn", "preprocess_dataset.py --mode verify hashes them before the run"), files
    if files.without_digest:
        return Check("data", f"{found}; {files.without_digest} file(s) have no recorded MD5"), files
    return Check("data", f"{found}, unchanged since preprocessing"), files


def check_page_cache(data_bytes: int, free: int) -> Check:
    """Reports whether the volumes stay in this machine's memory once they have been read."""
    where = "stay in memory after the first epoch" if data_bytes <= free else "are read from the disk in each epoch"
    return Check("page cache", f"the volumes' {format_size(data_bytes)} {where}; {format_size(free)} are free")


def check_disk(folder: Path, keep: int, state_bytes: int) -> Check:
    """Checks that `keep` checkpoints and the one being written fit on the disk of `folder`, which may not exist yet.

    Does not see a user's quota.
    """
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    fitting = free // max(state_bytes, 1)
    found = f"{keep + 1} checkpoints of {format_size(state_bytes)} in {folder}; {format_size(free)} are free"
    if fitting >= keep + 1:
        return Check("disk", found)
    remedy = f"make room for {format_size((keep + 1) * state_bytes - free)} more, save elsewhere, or keep fewer"
    return Check("disk", found, "warn" if fitting else "fail", remedy)


def checkpoint_bytes(network: nn.Module, optimizer: torch.optim.Optimizer, networks: int = 2) -> int:
    """Returns the size of a checkpoint, to within some KB: the last network, the best one, the optimizer's moments.

    With `--eval_ranks` there is one more network, that under evaluation, and another with `--ema_decay`, the average.
    Before the first step the optimizer has no moments yet: SGD with momentum will have one, Adam and LAMB two.
    """
    state = sum(tensor.nbytes for tensor in network.state_dict().values())
    parameters = sum(parameter.nbytes for parameter in network.parameters())
    return networks * state + moments(optimizer) * parameters


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
        return Check("shared memory", f"{format_size(needed)} for batches; this system sets no limit in {folder}")
    free = shutil.disk_usage(folder).free
    found = f"{format_size(needed)} for the batches of {local_ranks} x {workers} workers; "
    found += f"{folder} has {format_size(free)} free"
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
