"""Estimates the memory of a training step and of a batch of evaluation windows without computing or allocating either.

The network runs on tensors that have shapes, types, strides and a device, but no values (torch's fake tensors), with
the run's own code for a step, autocast included. What is counted are the storages that are alive after each operation.
Not counted: what an operation allocates and frees inside (cuDNN's workspaces, oneDNN's copies in another memory order),
the fragmentation of an allocator, and the copies that `--augment mixup` makes of a batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from common.compat import FakeTensorMode, TorchDispatchMode, tree_leaves
from common.errors import one_line
from model.kernels.dispatch import allocating_only
from runtime.objective import plain
from runtime.precision import Precision
from runtime.train_state import TrainState
from runtime.training import StepConfig, forward_backward

Module = TypeVar("Module", bound=nn.Module)

# Batch sizes that are tried. At least two samples, since batch norm may need two values per channel.
SAMPLES = (2, 3)


class LiveMemory(TorchDispatchMode):
    """Records how many bytes of tensors are alive after each operation that adds some; a storage counts once.

    Args:
        held: tensors that were there before and are not counted, such as a network's weights.

    Attributes:
        timeline: bytes, one number per such operation.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.timeline: list[int] = []
        self._held = {StorageWeakRef(tensor.untyped_storage()) for tensor in held}
        self._alive: dict[StorageWeakRef, int] = {}

    @property
    def peak(self) -> int:
        return max(self.timeline, default=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        storages = [tensor.untyped_storage() for tensor in tree_leaves(output) if isinstance(tensor, Tensor)]
        found = {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        if found.keys() - self._alive.keys() - self._held:  # views and changes in place add nothing
            alive = {reference: size for reference, size in self._alive.items() if not reference.expired()}
            self._alive = alive | {reference: size for reference, size in found.items() if reference not in self._held}
            self.timeline.append(sum(self._alive.values()))
        return output


@dataclass(frozen=True)
class BatchMemory:
    """Peak memory of a batch of any size.

    Attributes:
        stages: at each stage of the computation, the bytes that do not depend on the batch, and those per sample.
        unknown: why only the batch itself is counted; "" if all is.
    """

    stages: tuple[tuple[int, int], ...]
    unknown: str = ""

    def peak(self, samples: int) -> int:
        """Returns the bytes that a batch of this size takes."""
        return max(fixed + samples * each for fixed, each in self.stages)

    def fitting(self, free: int) -> int:
        """Returns the size of the largest batch that fits into `free` bytes; 0 if none does."""
        if max(fixed for fixed, _ in self.stages) > free:
            return 0
        return min((free - fixed) // each for fixed, each in self.stages if each > 0)

    def plus(self, fixed: int, per_sample: int = 0) -> BatchMemory:
        """Returns the memory of a batch beside which more is held all the time."""
        return BatchMemory(tuple((own + fixed, each + per_sample) for own, each in self.stages), self.unknown)


def step_memory(state: TrainState, step: StepConfig, shape: Sequence[int], as_triton: bool) -> BatchMemory:
    """Returns what a training step allocates: the batch, activations, gradients.

    The weights are there before; the optimizer's moments and what loaders hold are up to the caller.

    Args:
        shape: (C, D, H, W) of a sample.
        as_triton: whether the memory-bound operators allocate as Triton's do; see `dispatch.uses_triton`.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = step.precision.device
    try:
        network = _without_values(state.network, mode).train()
        network.zero_grad(set_to_none=True)
        # A loss scaler holds scalars, whose values would be missing.
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        fake_state = replace(state, network=network, model=network, scaler=scaler)
        fake_step = replace(step, loss=_without_values(step.loss, mode), objective=plain)

        def compute(samples: int) -> None:
            image = torch.empty(samples, *shape, device=device)
            label = torch.empty(samples, 1, *shape[1:], dtype=torch.uint8, device=device)
            # The gradients of a step's first micro-batches are alive during its last one.
            for _ in range(min(step.ga_steps, 2)):
                forward_backward(fake_state, {"image": image, "label": label}, fake_step, communicate=True)
            network.zero_grad(set_to_none=True)

        with mode, allocating_only(as_triton):
            return _memory_of(compute, network)
    except Exception as error:  # any network of any library
        return batch_memory(shape, one_line(error)[:200])


def window_memory(network: nn.Module, precision: Precision, shape: Sequence[int], as_triton: bool) -> BatchMemory:
    """Returns what the network allocates for a batch of evaluation windows.

    The arguments are those of `step_memory`.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        network = _without_values(network, mode).eval()

        def compute(samples: int) -> None:
            with precision.autocast():
                network(torch.empty(samples, *shape, device=precision.device))

        with torch.inference_mode(), mode, allocating_only(as_triton):
            return _memory_of(compute, network)
    except Exception as error:  # any network of any library
        return batch_memory(shape, one_line(error)[:200])


def batch_memory(shape: Sequence[int], reason: str) -> BatchMemory:
    """Returns the memory of a batch of images (C, D, H, W) alone, with the reason why no more is known."""
    return BatchMemory(((0, 4 * math.prod(shape)),), f"activations not counted: {reason}")


def state_bytes(network: nn.Module, optimizer: torch.optim.Optimizer, ranks: int) -> int:
    """Returns what the first step adds for good: the optimizer's moments, and DDP's buckets if there are several ranks.

    DDP makes its buckets earlier, but on a CPU memory is only taken once it is written to.
    """
    parameters = sum(p.nbytes for p in network.parameters() if p.requires_grad)
    present = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    return max(0, moments(optimizer) * parameters - present) + (parameters if ranks > 1 else 0)


def moments(optimizer: torch.optim.Optimizer) -> int:
    """Returns how many values per parameter the optimizer keeps: SGD with momentum one, Adam and LAMB two."""
    return 2 if "betas" in optimizer.defaults else int(optimizer.defaults.get("momentum", 0) > 0)


def _memory_of(compute: Callable[[int], None], network: nn.Module) -> BatchMemory:
    """Derives the memory of any batch from the timelines of two sizes, which differ by a share of each sample.

    Raises:
        RuntimeError: the two run different operations.
    """
    timelines = []
    for samples in SAMPLES:
        with LiveMemory([*network.parameters(), *network.buffers()]) as memory:
            compute(samples)
        timelines.append(memory.timeline)
    small, large = timelines
    if len(small) != len(large):
        raise RuntimeError("its operations depend on the batch size")
    per_sample = [(more - less) // (SAMPLES[1] - SAMPLES[0]) for less, more in zip(small, large, strict=True)]
    stages = {(less - SAMPLES[0] * each, each) for less, each in zip(small, per_sample, strict=True)}
    return BatchMemory(tuple(sorted(stages)))


def _without_values(module: Module, mode: FakeTensorMode) -> Module:
    """Copies a module, its parameters and buffers replaced by tensors without values."""
    tensors: dict[int, Any] = {
        id(tensor): mode.from_tensor(tensor) for tensor in (*module.parameters(), *module.buffers())
    }
    return copy.deepcopy(module, tensors)
