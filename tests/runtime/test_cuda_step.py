"""Whole training steps on a stand-in for a GPU: the numbers of a CPU, and a host that does not wait."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from model.kernels import dispatch
from model.unet3d import Unet3d
from runtime.distributed.step_sync import StepSync
from runtime.distributed.world import World
from runtime.logging.events import EpochStopped, Event, StepEnd
from runtime.memory_format import to_device
from runtime.mixup import ManifoldMixup, Mixup
from runtime.objective import Objective, plain
from runtime.optimizer import make_optimizer
from runtime.precision import Precision
from runtime.train_state import TrainState
from runtime.training import StepConfig, optimizer_step
from runtime.warmup import preserve_state, warm_up
from tests.fake_gpu import CPU, GPU, FakeGpu, GpuTensor
from tests.runtime.conftest import train_step
from tests.runtime.loop import MakeBatches, run_epoch, step_config

MakeStep = Callable[..., tuple[TrainState, StepConfig]]


@pytest.fixture(autouse=True)
def _without_triton() -> Iterator[None]:
    with dispatch.plain(dispatch.OPERATORS):
        yield


def make_step(
    device: torch.device,
    optimizer: str = "sgd",
    layout: str = "NDHWC",
    dtype: torch.dtype | None = None,
    objective: Objective = plain,
) -> tuple[TrainState, StepConfig]:
    """Returns a state with always the same weights, and how its steps of two micro-batches are computed."""
    torch.manual_seed(11)
    network = to_device(Unet3d(1, 3, filters=(3, 4)), device, layout)
    precision = Precision(device, dtype)
    state = TrainState(
        network=network,
        model=network,
        optimizer=make_optimizer(optimizer, network.parameters(), 0.1, weight_decay=0.01),
        scaler=precision.make_scaler(),
    )
    return state, replace(step_config(2, layout, precision), objective=objective)


def numbers(events: list[Event]) -> list[object]:
    """Returns what the events of an epoch say of steps and the epoch, without its duration."""
    return [
        replace(event, seconds=0.0) if isinstance(event, EpochStopped) else event
        for event in events
        if isinstance(event, StepEnd | EpochStopped)
    ]


def weights(network: nn.Module) -> list[torch.Tensor]:
    return [tensor.to("cpu", copy=True) for tensor in network.state_dict().values()]


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "plain": lambda: plain,
    "mixup": Mixup,
    "manifold_mixup": ManifoldMixup,
}


@pytest.mark.parametrize(
    ("optimizer", "layout", "dtype", "objective"),
    [
        ("sgd", "NDHWC", None, "plain"),
        ("sgd", "NCDHW", None, "plain"),
        ("adam", "NDHWC", None, "plain"),
        ("lamb", "NDHWC", None, "plain"),
        ("sgd", "NDHWC", torch.bfloat16, "plain"),
        ("sgd", "NDHWC", torch.float16, "plain"),
        ("adam", "NDHWC", torch.float16, "plain"),
        ("sgd", "NDHWC", None, "mixup"),
        ("sgd", "NCDHW", None, "manifold_mixup"),
    ],
)
def test_an_epoch_has_the_numbers_of_a_cpu_and_waits_once(
    optimizer: str, layout: str, dtype: torch.dtype | None, objective: str, gpu: FakeGpu, make_batches: MakeBatches
) -> None:
    outcomes = []
    for device in (CPU, GPU):
        state, config = make_step(device, optimizer, layout, dtype, OBJECTIVES[objective]())
        gpu.waits.clear()
        world = World(0, 1, device)
        events = run_epoch(state, make_batches(6, 2, (8, 8, 8)), step=config, world=world, step_sync=StepSync(world))
        outcomes.append((numbers(events), gpu.waits.copy(), weights(state.network)))
    (events_cpu, _, weights_cpu), (events_gpu, waits, weights_gpu) = outcomes
    assert waits == ["item in train_epoch"], "the mean loss of the epoch"
    assert len(events_gpu) == 4
    assert events_gpu == events_cpu
    for ours, theirs in zip(weights_gpu, weights_cpu, strict=True):
        assert torch.equal(ours, theirs)


def test_lamb_with_a_loss_scaler_waits_once_per_step(gpu: FakeGpu, make_batches: MakeBatches) -> None:
    """Torch's scaler reads whether to skip the step of an optimizer that is not fused."""
    state, config = make_step(GPU, "lamb", dtype=torch.float16)
    gpu.waits.clear()
    run_epoch(state, make_batches(4, 2, (8, 8, 8)), step=config, world=World(0, 1, GPU), step_sync=on_gpu())
    assert gpu.waits == ["item in optimizer_step"] * 2 + ["item in train_epoch"]


def on_gpu() -> StepSync:
    return StepSync(World(0, 1, GPU))


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lamb"])
def test_a_step_with_an_infinite_gradient_is_skipped_as_if_it_had_not_been(
    optimizer: str, device: torch.device, gpu: FakeGpu
) -> None:
    """Even the first one: torch's fused SGD would leave its momentum buffers unwritten."""

    def step(state: TrainState, gradient: float) -> None:
        for p in state.network.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer_step(state)

    states = []
    for gradients in ([float("inf"), 1.0], [1.0]):
        state, _ = make_step(device, optimizer, dtype=torch.float16)
        state.scaler.scale(torch.zeros((), device=device))  # creates the scale
        before = weights(state.network)
        junk = [torch.full_like(p, 1e30) for p in state.network.parameters() for _ in range(8)]
        del junk  # new tensors find it in their memory
        for gradient in gradients:
            step(state, gradient * state.scaler.get_scale())
            after = weights(state.network)
            is_same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
            assert is_same is (gradient == float("inf"))
        states.append(state)
    skipped, plainly = states
    assert skipped.scaler.get_scale() == plainly.scaler.get_scale() / 2
    for ours, theirs in zip(weights(skipped.network), weights(plainly.network), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_warm_up_leaves_the_state_as_it_was(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's random generator included; the one wait is for the end of the warm-up."""
    generator: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: generator.append(f"saved {device}"))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: generator.append(f"restored {device}"))
    state, config = make_step(GPU)
    batch = {
        "image": torch.ones(2, 1, 8, 8, 8, device=GPU),
        "label": torch.ones(2, 1, 8, 8, 8, dtype=torch.uint8, device=GPU),
    }
    train_step(state, batch, config, is_last=True)
    before, optimizer = weights(state.network), copy.deepcopy(state.optimizer.state_dict())
    gpu.waits.clear()
    warm_up(state, batch, batch, config, steps=2)
    assert gpu.waits == ["synchronize in synchronize"]
    assert [entry.partition(" ")[0] for entry in generator] == ["saved", "restored"]
    for ours, theirs in zip(weights(state.network), before, strict=True):
        assert torch.equal(ours, theirs)
    moments = list(zip(state.optimizer.state_dict()["state"].values(), optimizer["state"].values(), strict=True))
    assert len(moments) == len(before)
    for now, then in moments:
        assert isinstance(now["momentum_buffer"], GpuTensor)
        assert torch.equal(now["momentum_buffer"], then["momentum_buffer"])


def test_the_state_is_preserved_without_a_wait(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    state, _ = make_step(GPU, dtype=torch.float16)
    gpu.waits.clear()
    with preserve_state(state):
        pass
    assert gpu.waits == []
