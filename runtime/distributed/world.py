"""World: the ranks of a run. The only module that uses `torch.distributed`.

A run without torchrun is a world of one, for which everything here works too.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from common.compat import is_gloo_error, is_port_in_use
from common.errors import RankLost, UserError, port_in_use

T = TypeVar("T")

# A rank may wait for one that evaluates another case; the largest case takes minutes on a CPU.
TIMEOUT = timedelta(minutes=30)
# For all ranks to come: a cold network disk may take minutes to import torch.
JOIN_TIMEOUT = timedelta(minutes=5)
# DDP's warning of a gradient in another memory order than its weight; false for a convolution of one channel, such as
# the first, whose orders lay out the same memory.
SAME_MEMORY = r"(?s)Grad strides do not match bucket view strides.*grad\.sizes\(\) = \[\d+, 1, "
# Polling interval while waiting for other ranks.
POLL_S = 0.01


class KeyValueStore:
    """Strings by key, which any rank can set and get at any time outside of collectives (torch's store)."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def set_default(self, key: str, value: str) -> str:
        """Sets the value unless the key has one; returns the key's value after the call."""
        current: bytes = self._store.compare_set(key, "", value)
        return current.decode()

    def get(self, key: str) -> str | None:
        """Returns the key's value, or None if it has none. Never waits for one."""
        return self._store.get(key).decode() if self._store.check([key]) else None


@dataclass(frozen=True)
class World:
    """The ranks of a run, as seen from this process.

    Attributes:
        rank: of this process, from 0.
        size: number of ranks.
        device: on which this rank computes.
        group: torch's handle for the ranks of a `split`; None: all ranks.
        store: shared by all ranks of the run; None in a run of one rank, and in a `split` that has not been given it.
    """

    rank: int
    size: int
    device: torch.device
    group: Any = field(default=None, kw_only=True)
    store: KeyValueStore | None = field(default=None, kw_only=True)

    @classmethod
    def join(cls, local_rank: int) -> World:
        """Joins the group that torchrun's variables describe (NCCL on GPUs, gloo on CPUs), or a world of one.

        Raises:
            UserError: `local_rank` names a GPU that this machine lacks, torchrun's variables are incomplete, or its
                port is in use.
            RankLost: another rank did not come, or something else answers in the place of rank 0.
        """
        try:
            size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        except ValueError as error:
            raise UserError(f"WORLD_SIZE and RANK must be numbers ({error}); start with torchrun") from None
        if torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"--local_rank {local_rank}, but this machine has {torch.cuda.device_count()} GPU(s); "
                    "start at most that many ranks per machine"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        else:
            device = torch.device("cpu")
        if size > 1:
            missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
            if missing:
                raise UserError(f"WORLD_SIZE is {size} but {missing[0]} is not set; start with torchrun")
            try:
                store, rank, size = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
            except dist.DistError as error:
                if is_port_in_use(error):
                    raise UserError(port_in_use(os.environ["MASTER_PORT"])) from None
                address = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
                raise RankLost(
                    f"the {size} ranks did not meet at {address} within {JOIN_TIMEOUT.seconds} s "
                    f"({str(error).splitlines()[0]}); have all started, and does no other program use that port?"
                ) from None
            store.set_timeout(TIMEOUT)
            if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
                # torchrun keeps its store when it restarts a group, in which the ranks would find the lost group's
                # addresses (7 of 14 restarts failed). It counts restarts per machine, so not with several machines.
                store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
            # With its GPU NCCL connects here, where a failure names its cause, and not at the first collective.
            is_gpu = device.type == "cuda"
            dist.init_process_group(
                "nccl" if is_gpu else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
                device_id=device if is_gpu else None,
            )
            # A separate connection: the group's is locked while it waits.
            return cls(rank, size, device, store=KeyValueStore(PrefixStore("messages", store.clone())))
        return cls(rank, size, device)

    def split(self, parts: Sequence[Sequence[int]]) -> World:
        """Returns the smaller world of this rank's part; every rank must call it with the same disjoint parts.

        A rank that is in no part gets a world of one.
        """
        mine = World(0, 1, self.device)
        for part in parts:
            if len(part) < 2:
                continue
            ranks = [dist.get_process_group_ranks(self.group)[member] for member in part]
            # In a world that is itself a part, the ranks outside of it do not call this.
            is_local = self.group is not None
            with _unbound() if is_local else nullcontext():
                group = dist.new_group(ranks, timeout=TIMEOUT, use_local_synchronization=is_local)
            if self.rank in part:
                mine = World(list(part).index(self.rank), len(part), self.device, group=group)
        return mine

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and checkpoints."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this rank's share: every `size`-th item; empty if this rank comes after the last item."""
        return items[self.rank :: self.size]

    def sum(self, tensor: Tensor, while_waiting: Callable[[], None] | None = None) -> Tensor:
        """Returns, on every rank, the sum over all ranks of a tensor, which has the same shape on each.

        Args:
            while_waiting: called repeatedly until every rank has contributed; what it raises ends the wait.
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
        """Returns, on every rank, the elementwise maximum over all ranks. Stays on the device; no host waits for it."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def stack(self, tensor: Tensor) -> Tensor:
        """Returns, on every rank, all ranks' tensors, which have the same shape: (size, *shape)."""
        stacked = tensor.new_empty(self.size, *tensor.shape)
        if self.size == 1:
            return stacked.copy_(tensor[None])
        dist.all_gather(list(stacked.unbind()), tensor.contiguous(), group=self.group)
        return stacked

    def exchange(self, to_previous: Tensor | None, to_next: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sends a tensor to the rank before this one, and one of the same shape to the rank after it.

        Args:
            to_previous, to_next: None on all ranks: nothing is sent that way.

        Returns:
            What the previous rank sent `to_next`, and the next rank `to_previous`; zeros for what no rank sent.
        """
        operations, received = [], []
        for sent, step in ((to_next, 1), (to_previous, -1)):
            shape = next(tensor for tensor in (sent, to_next, to_previous) if tensor is not None)
            arriving = shape.new_zeros(shape.shape)
            received.append(arriving)
            if sent is None:
                continue
            for operation, tensor, peer in (
                (dist.isend, sent.contiguous(), self.rank + step),
                (dist.irecv, arriving, self.rank - step),
            ):
                if 0 <= peer < self.size:
                    peer = dist.get_global_rank(self.group, peer) if self.group is not None else peer
                    operations.append(dist.P2POp(operation, tensor, peer, group=self.group))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        from_previous, from_next = received
        return from_previous, from_next

    def gather(self, value: Any) -> list[Any]:
        """Returns every rank's value, in the order of the ranks, on every rank. Plain Python values only."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's value on every rank. Plain Python values only."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, group_src=0, group=self.group, device=self.device)
        return values[0]

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Copies rank 0's values into every rank's tensors, which have the same shapes on each, on its device."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, group_src=0, group=self.group)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copies rank 0's buffers to all: batch norm's running statistics drift apart between DDP's own broadcasts."""
        self.broadcast_tensors(model.buffers())

    def barrier(self) -> None:
        """Waits for every rank. An all-reduce, so that it works with gloo on CPUs too.

        On GPUs an all-reduce is only queued; the host waits because it reads the sum.
        """
        self.sum(torch.zeros(1, device=self.device)).item()

    def wait_for_main(self, name: str, seconds: float) -> None:
        """Waits, outside of collectives, until rank 0 has made the same call, or at most `seconds`."""
        if self.store is None:
            return
        if self.is_main:
            self.store.set(name, "done")
        deadline = time.monotonic() + seconds
        with suppress(RuntimeError):  # the store ended with rank 0's process, which has therefore called this too
            while self.store.get(name) is None and time.monotonic() < deadline:
                time.sleep(POLL_S)

    def lost_another(self, error: RuntimeError) -> bool:
        """Returns whether the error is one of the process group: another rank no longer answers."""
        is_alone = self.size == 1 and self.store is None  # a single rank that trains may have others that evaluate
        return not is_alone and (isinstance(error, dist.DistError) or is_gloo_error(error))

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the model with gradients averaged over the ranks; in a world of one the model itself."""
        if self.size == 1:
            return model
        warnings.filterwarnings("ignore", SAME_MEMORY)
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            process_group=self.group,
            gradient_as_bucket_view=True,
        )

    def leave(self) -> None:
        """Leaves the group. Call it on every way out."""
        if self.size > 1 and dist.is_initialized():
            # A wrapped model in a reference cycle would keep the group's threads alive until the interpreter ends,
            # where a thread that requests the GIL aborts the process (seen in one of four runs with gloo).
            gc.collect()
            dist.destroy_process_group()


@contextmanager
def _unbound() -> Iterator[None]:
    """Has NCCL make a new communicator instead of splitting that of all ranks, in which all would have to take part.

    It splits where the group of all ranks is bound to a GPU.
    """
    everyone = dist.group.WORLD
    assert everyone is not None
    device, everyone.bound_device_id = everyone.bound_device_id, None
    try:
        yield
    finally:
        everyone.bound_device_id = device


def without_communication(model: nn.Module) -> AbstractContextManager[None]:
    """Accumulates gradients locally; the next backward pass outside sends the sum (one all-reduce per step)."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
