"""World: the ranks of a run. The only place that touches `torch.distributed`.

A run without torchrun is a world of one; everything here works for it alike.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from common.compat import is_gloo_error
from common.errors import UserError

T = TypeVar("T")

# A rank may wait for another that evaluates one case more; the largest case takes minutes on a CPU.
TIMEOUT = timedelta(minutes=30)
# Between two looks while waiting for other ranks.
POLL_S = 0.01


class KeyValueStore:
    """Notes that any rank may pin up and read at any time, outside of all collectives (torch's store)."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def set(self, name: str, text: str) -> None:
        self._store.set(name, text)

    def set_default(self, name: str, text: str) -> str:
        """Pins the text up unless that name has one; returns the one that hangs there now."""
        hanging: bytes = self._store.compare_set(name, "", text)
        return hanging.decode()

    def get(self, name: str) -> str | None:
        """The note of that name, None where there is none. Never waits for one."""
        return self._store.get(name).decode() if self._store.check([name]) else None


@dataclass(frozen=True)
class World:
    """This process's place among the ranks.

    Attributes:
        rank, size: of all ranks.
        device: where this rank computes.
        group: torch's handle of the ranks of a `split`; None: all of them.
        board: notes between the ranks; None in a world of one and in a `split`.
    """

    rank: int
    size: int
    device: torch.device
    group: Any = None
    board: KeyValueStore | None = None

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
            store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
            if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
                # torchrun keeps its store when it starts a group again, in which the lost group's addresses would be
                # found (of 14 restarts 7 failed). Its count of restarts is each machine's own, so not for several.
                store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
            # A connection of its own: the group's is locked while it waits.
            return cls(rank, size, device, board=KeyValueStore(PrefixStore("board", store.clone())))
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

    def sum(self, tensor: Tensor, while_waiting: Callable[[], None] | None = None) -> Tensor:
        """The sum over all ranks of a tensor of one shape, on every rank.

        Args:
            while_waiting: called again and again until every rank has come; what it raises ends the wait.
        """
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        work = dist.all_reduce(total, group=self.group, async_op=True)
        while while_waiting is not None and not work.is_completed():
            while_waiting()
            time.sleep(POLL_S)
        work.wait()
        return total.to(tensor.device)

    def max(self, tensor: Tensor) -> Tensor:
        """The largest of each element over all ranks, on every rank; stays on its device, and there no host waits."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank; plain Python only."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

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

    def wait_for_main(self, name: str, seconds: float) -> None:
        """Waits, outside of all collectives, until rank 0 has come to the same call, or for so long at most."""
        if self.board is None:
            return
        if self.is_main:
            self.board.set(name, "done")
        deadline = time.monotonic() + seconds
        with suppress(RuntimeError):  # a board that hung in rank 0's process has gone with it: rank 0 has come and left
            while self.board.get(name) is None and time.monotonic() < deadline:
                time.sleep(POLL_S)

    def lost_another(self, error: RuntimeError) -> bool:
        """Whether the error is the group's own: another rank no longer answers."""
        return self.size > 1 and (isinstance(error, dist.DistError) or is_gloo_error(error))

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
