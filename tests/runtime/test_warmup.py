"""The warm-up leaves no trace in the state, and its figures are right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from model.losses import DiceCELoss
from model.unet3d import Unet3d
from runtime.distributed.world import World
from runtime.precision import Precision
from runtime.train_state import TrainState
from runtime.training import StepConfig
from runtime.warmup import calibrate, dummy_batch, peak_flops, preserve_state, training_flops, warm_up
from tests.runtime.conftest import train_step

SHAPE = (4, 4, 8)
CPU = torch.device("cpu")


@pytest.fixture
def settings(fp32: Precision) -> StepConfig:
    return StepConfig(loss=DiceCELoss(), precision=fp32, ga_steps=1, layout="NCDHW")


def everything(state: TrainState) -> dict[str, Any]:
    """All that a step can change."""
    parts = {"network": state.network, "optimizer": state.optimizer, "scaler": state.scaler}
    content = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    return content | {"random": torch.get_rng_state(), "training": state.network.training}


def leaves(content: object) -> list[object]:
    if isinstance(content, dict):
        return [leaf for key in content for leaf in [key, *leaves(content[key])]]
    if isinstance(content, list | tuple):
        return [leaf for inner in content for leaf in leaves(inner)]
    return [content]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    ours, theirs = leaves(a), leaves(b)
    return len(ours) == len(theirs) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lamb"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_warm_up_leaves_no_trace(
    optimizer: str, steps_before: int, make_state: Callable[..., TrainState], settings: StepConfig
) -> None:
    state = make_state(optimizer)
    batch = dummy_batch((2, 1, *SHAPE), 3, CPU)
    for _ in range(steps_before):
        train_step(state, batch, settings, is_last=True)
    before = everything(state)
    warm_up(state, batch, batch, settings, steps=3)
    assert same(everything(state), before)
    assert all(p.grad is None for p in state.network.parameters())


def test_buffers_outside_of_the_state_dict_come_back_too(make_state: Callable[..., TrainState]) -> None:
    state = make_state("sgd")
    inner = next(state.network.children())
    for module, name in ((state.network, "count"), (inner, "inner"), (inner, "replaced")):
        module.register_buffer(name, torch.ones(2), persistent=False)
    with preserve_state(state):
        state.network.get_buffer("count").add_(1)
        inner.get_buffer("inner").zero_()
        inner.replaced = torch.zeros(3)
    assert [b.tolist() for b in (state.network.get_buffer("count"), *inner.buffers(recurse=False))] == [[1, 1]] * 3
    assert "count" not in state.network.state_dict()


def test_the_first_loss_is_the_same_with_and_without(
    make_state: Callable[..., TrainState], settings: StepConfig
) -> None:
    batch = dummy_batch((2, 1, *SHAPE), 3, CPU)
    plain, warmed = make_state(), make_state()
    warm_up(warmed, batch, batch, settings, steps=2)
    for _ in range(3):
        expected = train_step(plain, batch, settings, is_last=True)
        assert torch.equal(train_step(warmed, batch, settings, is_last=True), expected)


def test_the_steps_themselves_do_change_the_state(make_state: Callable[..., TrainState], settings: StepConfig) -> None:
    """Otherwise the tests above would hold for a warm-up that does nothing."""
    state = make_state()
    weights: list[Tensor] = []
    state.network.register_forward_pre_hook(
        lambda network, inputs: weights.append(next(network.parameters()).detach().clone())
    )
    batch = dummy_batch((2, 1, *SHAPE), 3, CPU)
    warm_up(state, batch, batch, settings, steps=2)
    assert len(weights) == 4  # a training step and an evaluation of windows, twice
    assert not torch.equal(weights[0], weights[1])


def test_random_numbers_drawn_inside_are_given_back(make_state: Callable[..., TrainState]) -> None:
    state = make_state()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with preserve_state(state):
        torch.rand(100)
    assert torch.equal(torch.rand(4), expected)


def test_the_benchmark_networks_operations() -> None:
    """A forward pass of one 128^3 sample is 477.3 GMAC, forward and backward 2.860 TFLOP, by the field's count."""
    flops = training_flops(lambda: Unet3d(1, 3), (1, 128, 128, 128))
    assert flops == pytest.approx(2.860e12, rel=1e-3)


def test_operations_by_hand() -> None:
    """One 1x1x1 convolution of 2 to 3 maps on 4 voxels: 24 products and additions, again for the weights' gradient."""
    flops = training_flops(lambda: torch.nn.Conv3d(2, 3, 1, bias=False), (2, 1, 2, 2))
    assert flops == 2 * 24 * 2, "the input needs no gradient"


def test_operations_of_further_outputs_count() -> None:
    """A 1x1x1 convolution of 4 to 3 maps on 2 x 2 x 4 voxels, and the gradients of its weights and of its input."""
    one, two = (
        training_flops(partial(Unet3d, 1, 3, filters=(2, 4, 4), deep_supervision=n), (1, 4, 4, 8)) for n in (1, 2)
    )
    assert two - one == 3 * 2 * 4 * 3 * 2 * 2 * 4


def test_the_peak_is_positive_and_of_the_steps_format(fp32: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.warmup.PEAK_SIZES", {"cpu": 64})
    kinds: list[torch.dtype] = []
    original = Tensor.__matmul__

    def product(a: Tensor, b: Tensor) -> Tensor:
        assert a.float().std() > 0.5  # a GPU multiplies a constant faster than data
        kinds.append(a.dtype)
        return original(a, b)

    monkeypatch.setattr(Tensor, "__matmul__", product)
    assert peak_flops(fp32) > 0
    assert peak_flops(Precision(CPU, torch.bfloat16)) > 0
    assert kinds == [torch.float32] * 6 + [torch.bfloat16] * 6


def test_a_calibration_leaves_no_trace_and_one_rank_communicates_nothing(
    make_state: Callable[..., TrainState], settings: StepConfig, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.warmup.PEAK_SIZES", {"cpu": 64})
    state = make_state()
    before = everything(state)
    batch = dummy_batch((2, 1, *SHAPE), 3, CPU)
    found = calibrate(state, lambda: Unet3d(1, 3, filters=(3, 4)), batch, settings, sample=(1, *SHAPE), world=world)
    assert same(everything(state), before)
    assert found.communication_ms == 0
    assert found.flops_per_sample > 0
