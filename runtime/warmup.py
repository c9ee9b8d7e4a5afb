"""Before the clock: steps on made-up data, after which everything is as it was; and what `--benchmark` compares with.

Compiling, autotuning and the allocator's growth belong here: MLPerf allows it where weights are set back (rules, "the
clock").
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data_loading.pytorch_loader import Batch
from runtime.distributed.world import World
from runtime.logging.events import Calibrated
from runtime.precision import Precision
from runtime.train_state import TrainState
from runtime.training import StepConfig, forward_backward, optimizer_step

# A product large enough to reach the peak, small enough to take a second: 2 * size^3 operations.
PEAK_SIZES = {"cuda": 8192, "cpu": 2048}
REPETITIONS = 5


@contextmanager
def preserve_state(state: TrainState) -> Iterator[None]:
    """Weights, buffers, optimizer, scaler and random generators are afterwards, to the bit, what they were before."""
    saved = copy.deepcopy((state.network.state_dict(), state.optimizer.state_dict(), state.scaler.state_dict()))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
    network, optimizer, scaler = saved
    state.network.load_state_dict(network)
    state.optimizer.load_state_dict(optimizer)
    if scaler:  # a scaler that does nothing has no state, and refuses an empty one
        state.scaler.load_state_dict(scaler)
    state.optimizer.zero_grad(set_to_none=True)


def dummy_batch(batch_size: int, channels: int, classes: int, shape: Sequence[int], device: torch.device) -> Batch:
    """Random image and label, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch_size, channels, *shape, generator=generator)
    label = torch.randint(classes, (batch_size, 1, *shape), generator=generator, dtype=torch.uint8)
    return {"image": image.to(device), "label": label.to(device)}


def warm_up(state: TrainState, batch: Batch, window_batch: Batch, settings: StepConfig, steps: int) -> None:
    """`steps` training steps, each with its evaluation of a batch of windows, that leave no trace in the state."""
    with preserve_state(state):
        for _ in range(steps):
            state.model.train()
            for part in range(settings.ga_steps):
                forward_backward(state, batch, settings, communicate=part == settings.ga_steps - 1)
            optimizer_step(state)
            state.network.eval()
            with torch.inference_mode(), settings.precision.autocast():
                state.network(window_batch["image"])
        state.network.train()
    synchronize(settings.precision.device)


def calibrate(
    state: TrainState, build: Callable[[], nn.Module], batch: Batch, settings: StepConfig, world: World
) -> Calibrated:
    """What `--benchmark`'s figures are compared with. Every rank must call it.

    Args:
        build: makes the network anew, for counting on the meta device.
    """
    flops = training_flops(build, batch["image"].shape[1:])
    return Calibrated(flops, peak_flops(settings.precision), _exposed_communication_ms(state, batch, settings, world))


def training_flops(build: Callable[[], nn.Module], shape: Sequence[int]) -> float:
    """Operations of forward and backward of one sample (C, D, H, W), counted by PyTorch, computed nowhere."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build()(torch.empty(1, *shape)).sum().backward()
    return float(counter.get_total_flops())


def peak_flops(precision: Precision) -> float:
    """Operations a second of a large matrix product in the step's number format, the best of several."""
    size = PEAK_SIZES[precision.device.type]
    matrix = torch.ones(size, size, device=precision.device, dtype=precision.dtype or torch.float32)
    times = [seconds(lambda: matrix @ matrix, precision.device) for _ in range(REPETITIONS + 1)]
    return 2 * size**3 / min(times[1:])


def _exposed_communication_ms(state: TrainState, batch: Batch, settings: StepConfig, world: World) -> float:
    """What averaging adds to a step, that is not hidden behind the backward pass: medians of steps with and without."""
    if world.size == 1:
        return 0.0
    medians = []
    with preserve_state(state):
        for averages in (True, False):
            times = []
            for _ in range(REPETITIONS + 1):
                work = partial(forward_backward, state, batch, settings, communicate=averages)
                times.append(seconds(work, world.device))
                if averages:
                    optimizer_step(state)
            medians.append(sorted(times[1:])[REPETITIONS // 2])
    return max(0.0, 1e3 * (medians[0] - medians[1]))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes, the device's own work included."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; a CPU has nothing outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
