"""The estimate of a step's memory against the tensors that a real step on this CPU holds, byte by byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.losses import DiceCELoss
from model.unet3d import Unet3d
from runtime.memory import BatchMemory, LiveMemory, moments, state_bytes, step_memory, window_memory
from runtime.memory_format import to_device
from runtime.optimizer import make_optimizer
from runtime.precision import Precision
from runtime.train_state import TrainState
from runtime.training import StepConfig, forward_backward
from runtime.warmup import dummy_batch

CPU = torch.device("cpu")
SHAPE = (1, 8, 8, 16)
BF16 = Precision(CPU, torch.bfloat16)


def make(network: nn.Module, layout: str = "NCDHW", optimizer: str = "sgd") -> TrainState:
    network = to_device(network, CPU, layout)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    made = make_optimizer(optimizer, network.parameters(), 0.1)
    return TrainState(network=network, model=network, optimizer=made, scaler=scaler)


def config(precision: Precision, layout: str = "NCDHW", ga_steps: int = 1) -> StepConfig:
    return StepConfig(loss=DiceCELoss(), precision=precision, ga_steps=ga_steps, layout=layout)


def known(memory: BatchMemory) -> BatchMemory:
    assert not memory.unknown
    return memory


def peak_of(network: nn.Module, compute: Callable[[], object]) -> int:
    with LiveMemory([*network.parameters(), *network.buffers()]) as memory:
        compute()
    return memory.peak


# What is counted.


def test_a_storage_counts_once_and_until_it_is_freed() -> None:
    held = torch.zeros(100)
    with LiveMemory([held]) as memory:
        tensor = torch.zeros(10)
        view = tensor[2:]
        view += held[:8]
        more = torch.ones(5, dtype=torch.uint8)
        del tensor, more
        last = view + 1  # keeps the whole of its storage
        del view
        last = last * 2
    assert memory.timeline == [40, 45, 40 + 32, 32 + 32]
    assert (memory.peak, last.numel()) == (72, 8)


def test_the_largest_batch_that_fits_is_the_last_one_that_does() -> None:
    memory = BatchMemory(((50, 3), (0, 10), (75, 0)))
    assert [memory.peak(samples) for samples in (0, 1, 8, 20)] == [75, 75, 80, 200]
    assert memory.fitting(74) == 0
    for free in range(75, 300):
        fitting = memory.fitting(free)
        assert memory.peak(fitting) <= free < memory.peak(fitting + 1)
    assert memory.plus(5, 1).peak(20) == 5 + 20 + 200


# A step and a batch of windows.


@pytest.mark.parametrize("layout", ["NCDHW", "NDHWC"])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(("ga_steps", "normalization"), [(1, "instancenorm"), (3, "instancenorm"), (1, "batchnorm")])
def test_a_step_takes_what_a_real_one_holds(
    fp32: Precision, layout: str, amp: bool, ga_steps: int, normalization: str
) -> None:
    step = config(BF16 if amp else fp32, layout, ga_steps)
    state = make(Unet3d(1, 3, filters=(4, 6, 8), normalization=normalization), layout)
    estimate = known(step_memory(state, step, SHAPE, as_triton=False))
    for samples in (2, 5):

        def compute(samples: int = samples) -> None:
            batch = dummy_batch((samples, *SHAPE), 3, CPU)
            for _ in range(ga_steps):
                forward_backward(state, batch, step, communicate=True)

        real = peak_of(state.network, compute)
        state.network.zero_grad()
        # torch's own norms keep 16-bit statistics, in the estimate 32-bit ones or none.
        assert estimate.peak(samples) == pytest.approx(real, rel=2e-3 if amp else 0)


@pytest.mark.parametrize("amp", [False, True])
def test_windows_take_what_real_ones_hold(fp32: Precision, amp: bool) -> None:
    precision = BF16 if amp else fp32
    network = to_device(Unet3d(1, 3, filters=(4, 6, 8)), CPU, "NDHWC")
    estimate = known(window_memory(network, precision, SHAPE, as_triton=False))

    def compute() -> None:
        with torch.inference_mode(), precision.autocast():
            network.eval()(torch.zeros(5, *SHAPE))

    assert estimate.peak(5) == peak_of(network, compute)


class Widest(nn.Module):
    """Two saved activations of 4 and 8 channels; the second is larger than everything after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 1)
        self.second = nn.Conv3d(4, 8, 1)
        self.last = nn.Conv3d(8, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        output: Tensor = self.last(self.second(self.first(image)))
        return output


def test_windows_by_hand(fp32: Precision) -> None:
    """Without a backward pass, the image is held by its caller, and a convolution's input and output are alive."""
    voxel = 4 * 8 * 8 * 16
    estimate = known(window_memory(Widest(), fp32, SHAPE, as_triton=False))
    assert estimate.peak(7) == 7 * voxel * (1 + 8 + 4)
    assert estimate.fitting(7 * voxel * 13 - 1) == 6


def test_an_estimate_leaves_no_trace(fp32: Precision) -> None:
    network = nn.Sequential(Unet3d(1, 3, filters=(4, 6)), nn.Dropout(0.5), nn.BatchNorm3d(3))
    state = make(network)
    before, random = {name: t.clone() for name, t in network.state_dict().items()}, torch.get_rng_state()
    known(step_memory(state, config(fp32), SHAPE, as_triton=False))
    known(window_memory(network, fp32, SHAPE, as_triton=False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert network.training
    assert all(p.grad is None for p in network.parameters())


def test_triton_s_operators_take_less_and_16_bit_half(fp32: Precision) -> None:
    def peak(precision: Precision, layout: str, as_triton: bool) -> int:
        state = make(Unet3d(1, 3, filters=(4, 6, 8)), layout)
        return known(step_memory(state, config(precision, layout), SHAPE, as_triton)).peak(100)

    assert peak(fp32, "NDHWC", False) > 1.02 * peak(fp32, "NDHWC", True)
    # In NCDHW, as a CPU without AVX-512 returns 16-bit convolutions in no other order.
    assert peak(BF16, "NCDHW", True) == pytest.approx(peak(fp32, "NCDHW", True) / 2, rel=0.1)


class Reads(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.expand(-1, 3, -1, -1, -1) * float(image.mean())


class Splits(nn.Module):
    """Computes sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([self.conv(one[None]) for one in image])


@pytest.mark.parametrize(("network", "reason"), [(Reads(), "_local_scalar_dense"), (Splits(), "depend on the batch")])
def test_a_network_that_needs_values_has_no_estimate_but_a_reason(
    fp32: Precision, network: nn.Module, reason: str
) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(network=network, model=network, optimizer=None, scaler=scaler)  # type: ignore[arg-type]
    for memory in (step_memory(state, config(fp32), SHAPE, False), window_memory(network, fp32, SHAPE, False)):
        assert reason in memory.unknown
        assert memory.peak(7) == 7 * 4 * 8 * 8 * 16, "the batch itself"


# What the first step adds.


@pytest.mark.parametrize(
    ("name", "settings"), [("sgd", {}), ("sgd", {"momentum": 0.0}), ("adam", {}), ("lamb", {"weight_decay": 0.1})]
)
def test_the_optimizers_moments_are_counted_until_they_exist(name: str, settings: dict[str, Any]) -> None:
    network = Unet3d(1, 3, filters=(4, 6))
    network.output.requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = make_optimizer(name, trained, 0.1, **settings)
    expected, parameters = state_bytes(network, optimizer, ranks=1), sum(p.nbytes for p in trained)
    assert expected == moments(optimizer) * parameters
    network(torch.zeros(1, 1, 4, 4, 4)).sum().backward()
    optimizer.step()
    state = [t for kept in optimizer.state.values() for t in kept.values() if isinstance(t, Tensor) and t.dim()]
    assert sum(t.nbytes for t in state) == expected
    assert state_bytes(network, optimizer, ranks=1) == 0
    assert state_bytes(network, optimizer, ranks=2) == parameters
