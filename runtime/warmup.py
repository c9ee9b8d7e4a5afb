"""Before the clock starts: training steps on dummy data, and the reference figures of `--benchmark`.

They trigger compilation, autotuning and the allocator's growth, and leave the state as it was: MLPerf allows this if
the weights are restored (rules, "the clock").
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data_loading.base_loader import Batch
from model.deep_supervision import Outputs, as_tuple
from runtime.distributed.world import World
from runtime.logging.events import Calibrated
from runtime.precision import Precision
from runtime.train_state import TrainState
from runtime.training import StepConfig, forward_backward, optimizer_step

# Size of a matrix product large enough to reach the peak, small enough to take a second: 2 * size^3 operations.
PEAK_SIZES = {"cuda": 8192, "cpu": 2048}
REPETITIONS = 5


@contextmanager
def preserve_state(state: TrainState) -> Iterator[None]:
    """Restores weights, buffers, optimizer, scaler and random generators afterwards, bit for bit."""
    saved = copy.deepcopy((state.network.state_dict(), state.optimizer.state_dict(), state.scaler.state_dict()))
    # Some are not in the state dict.
    buffers = {name: buffer.clone() for name, buffer in state.network.named_buffers()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
    network, optimizer, scaler = saved
    state.network.load_state_dict(network)
    for name, buffer in buffers.items():
        if name not in network:
            owner, _, leaf = name.rpartition(".")
            setattr(state.network.get_submodule(owner), leaf, buffer)
    state.optimizer.load_state_dict(optimizer)
    if scaler:  # a disabled scaler has no state, and refuses an empty one
        state.scaler.load_state_dict(scaler)
    state.optimizer.zero_grad(set_to_none=True)


def dummy_batch(shape: Sequence[int], classes: int, device: torch.device) -> Batch:
    """Returns random images (N, C, D, H, W) of this shape, and labels, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(*shape, generator=generator)
    label = torch.randint(classes, (shape[0], 1, *shape[2:]), generator=generator, dtype=torch.uint8)
    return {"image": image.to(device), "label": label.to(device)}


def warm_up(state: TrainState, batch: Batch, window_batch: Batch, config: StepConfig, *, steps: int) -> None:
    """Runs training steps, each followed by the evaluation of a batch of windows; leaves no trace in the state."""
    with preserve_state(state):
        for _ in range(steps):
            state.model.train()
            for index in range(config.ga_steps):
                forward_backward(state, batch, config, communicate=index == config.ga_steps - 1)
            optimizer_step(state, config.max_grad_norm)
            state.network.eval()
            with torch.inference_mode(), config.precision.autocast():
                state.network(window_batch["image"])
        state.network.train()
    synchronize(config.precision.device)


def warm_up_evaluation(network: nn.Module, windows: Tensor, precision: Precision, *, steps: int) -> None:
    """Evaluates a batch of windows, for ranks that only evaluate."""
    network.eval()
    with torch.inference_mode(), precision.autocast():
        for _ in range(steps):
            network(windows)
    network.train()
    synchronize(precision.device)


def calibrate(
    state: TrainState,
    build: Callable[[], nn.Module],
    batch: Batch,
    config: StepConfig,
    *,
    sample: Sequence[int],
    world: World,
) -> Calibrated:
    """Measures the figures that `--benchmark` compares with. Every rank must call it.

    Args:
        state: the training state, which stays as it is.
        build: makes a new network, for counting on the meta device.
        batch: a micro-batch on the device; of slabs with `--ranks_per_sample`.
        config: how a step is computed.
        sample: (C, D, H, W) of a whole sample.
        world: all ranks of the run.
    """
    return Calibrated(
        flops_per_sample=training_flops(build, sample),
        peak_flops=peak_flops(config.precision),
        communication_ms=_exposed_communication_ms(state, batch, config, world),
    )


def training_flops(build: Callable[[], nn.Module], shape: Sequence[int]) -> float:
    """Returns the operations of forward and backward for one sample (C, D, H, W), counted without computing them."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        outputs: Outputs = build()(torch.empty(1, *shape))
        torch.stack([logits.sum() for logits in as_tuple(outputs)]).sum().backward()
    return float(counter.get_total_flops())


def peak_flops(precision: Precision) -> float:
    """Measures the operations per second of a large matrix product in the step's number format, the best of several."""
    size = PEAK_SIZES[precision.device.type]
    # Random, because a GPU multiplies ones faster than data: they cost less power.
    generator = torch.Generator(precision.device).manual_seed(0)
    matrix = torch.randn(size, size, device=precision.device, generator=generator).to(precision.dtype or torch.float32)
    times = [seconds(lambda: matrix @ matrix, precision.device) for _ in range(REPETITIONS + 1)]
    return 2 * size**3 / min(times[1:])


def _exposed_communication_ms(state: TrainState, batch: Batch, config: StepConfig, world: World) -> float:
    """Measures what gradient averaging adds to a step beyond the backward pass: medians of steps with and without."""
    if world.size == 1:
        return 0.0
    medians = []
    with preserve_state(state):
        for communicate in (True, False):
            times = []
            for _ in range(REPETITIONS + 1):
                work = partial(forward_backward, state, batch, config, communicate=communicate)
                times.append(seconds(work, world.device))
                if communicate:
                    optimizer_step(state, config.max_grad_norm)
            medians.append(sorted(times[1:])[REPETITIONS // 2])
    return max(0.0, 1e3 * (medians[0] - medians[1]))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Returns the duration of a call, including the work that it starts on the device."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; a CPU has nothing outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
