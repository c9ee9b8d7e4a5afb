"""World: the ranks of a run. The only place that touches `torch.distributed`.

A run without torchrun is a world of one; everything here works for it alike.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import UserError

T = TypeVar("T")

# A rank may wait for another that evaluates one case more; the largest case takes minutes on a CPU.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process's place among the ranks.

    Attributes:
        rank, size: of all ranks.
        device: where this rank computes.
        group: torch's handle of the ranks of a `split`; None: all of them.
    """

    rank: int
    size: int
    device: torch.device
    group: Any = None

    @classmethod
    def join(cls, local_rank: int) -> World:
        """Joins the group that torchrun's variables describe (NCCL on GPUs, gloo on CPUs), or a world of one.

        Raises:
            UserError: `local_rank` names a GPU that this machine lacks, or torchrun's variables are incomplete.
        """
        try:
            size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        except ValueError as error:
            raise UserError(f"WORLD_SIZE and RANK must be numbers ({error}); start with torchrun") from None
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"--local_rank {local_rank}, but this machine has {torch.cuda.device_count()} GPU(s); "
                    "start at most that many ranks a machine"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
        if size > 1:
            missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
            if missing:
                raise UserError(f"WORLD_SIZE is {size} but {missing[0]} is not set; start with torchrun")
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        return cls(rank, size, device)

    def split(self, parts: Sequence[Sequence[int]]) -> World:
        """The smaller world of this rank's part; every rank must call it with the same disjoint parts.

        A rank that is in none gets a world of one.
        """
        mine = World(0, 1, self.device)
        for part in parts:
            if len(part) < 2:
                continue
            group = dist.new_group(list(part), timeout=TIMEOUT)
            if self.rank in part:
                mine = World(list(part).index(self.rank), len(part), self.device, group)
        return mine

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and checkpoints."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share: every `size`-th item, none twice; empty where there are more ranks than items."""
        return items[self.rank :: self.size]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks of a tensor of one shape, on every rank."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(tensor.device)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank; plain Python only."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Rank 0's buffers everywhere: batch norm's running statistics drift apart between DDP's own broadcasts."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def barrier(self) -> None:
        """Waits for every rank. An all-reduce, so that it works with gloo on CPUs too."""
        self.sum(torch.zeros(1, device=self.device))

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the ranks; the model itself in a world of one."""
        if self.size == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    def leave(self) -> None:
        """Leaves the group. Call it on every way out."""
        if self.size > 1 and dist.is_initialized():
            # A wrapped model that lies in a reference cycle would keep the group's threads alive into the interpreter's
            # end, where one that asks for Python's lock aborts the process (seen in one run of four on gloo).
            gc.collect()
            dist.destroy_process_group()


def without_communication(model: nn.Module) -> AbstractContextManager[None]:
    """Accumulates gradients locally; the step after it, outside, sends the sum (a single all-reduce a step)."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
