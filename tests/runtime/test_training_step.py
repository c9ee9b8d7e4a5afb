"""One step: gradients, accumulation, memory layout, precision and loss scaling."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.losses import DiceCELoss
from model.unet3d import Unet3d
from runtime import training
from runtime.logging.events import (
    EpochStopped,
    Event,
)
from runtime.memory_format import to_device
from runtime.optimizer import make_optimizer
from runtime.precision import Precision
from runtime.train_state import TrainState
from tests.runtime.conftest import train_step
from tests.runtime.loop import (
    CPU,
    MakeBatches,
    MakeState,
    SameWeights,
    assert_close_weights,
    run_epoch,
    step_config,
    steps_of,
)


@pytest.mark.parametrize("ga_steps", [2, 4])
def test_accumulated_micro_batches_step_as_one_big_batch(
    ga_steps: int, make_state: MakeState, make_batches: MakeBatches
) -> None:
    (big,) = make_batches(1, 4).epoch(1)
    whole, parts, start = make_state(), make_state(), make_state()
    train_step(whole, big, step_config(), is_last=True)
    for index in range(ga_steps):
        size = 4 // ga_steps
        micro = {name: tensor[index * size : (index + 1) * size] for name, tensor in big.items()}
        train_step(parts, micro, step_config(ga_steps), is_last=index == ga_steps - 1)
    assert_close_weights(parts.network, whole.network)
    moved = parts.network.output.conv.weight - start.network.output.conv.weight
    assert moved.abs().max() > 1e-3


def test_the_gradient_is_that_of_the_loss(make_state: MakeState, make_batches: MakeBatches) -> None:
    (batch,) = make_batches(1, 2).epoch(1)
    state, other = make_state(), make_state()
    loss = train_step(state, batch, step_config(), is_last=False)
    expected = DiceCELoss()(other.network(batch["image"]), batch["label"])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not loss.requires_grad, "a loss that keeps its graph would hold every activation of the epoch"
    for ours, theirs in zip(state.network.parameters(), other.network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_weights_change_only_with_the_last_micro_batch_of_a_step(
    make_state: MakeState, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    first, second = make_batches(2, 1).epoch(1)
    state, start = make_state(), make_state()
    train_step(state, first, step_config(2), is_last=False)
    assert same_weights(state.network, start.network)
    assert all(p.grad is not None for p in state.network.parameters())
    train_step(state, second, step_config(2), is_last=True)
    assert not same_weights(state.network, start.network)
    assert all(p.grad is None for p in state.network.parameters())


def test_only_the_last_micro_batch_of_a_step_communicates(
    make_state: MakeState, make_batches: MakeBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[str] = []
    log: list[str] = []

    @contextmanager
    def silent(model: nn.Module) -> Iterator[None]:
        inside.append("silent")
        yield
        inside.clear()

    monkeypatch.setattr(training, "without_communication", silent)
    state = make_state()
    state.network.register_forward_pre_hook(lambda *_: log.append("".join(inside)))
    state.network.output.register_full_backward_pre_hook(lambda *_: log.append("".join(inside)))
    run_epoch(state, make_batches(4, 1), ga_steps=2)
    # forward and backward of four micro-batches
    assert log == ["silent", "silent", "", ""] * 2


class TwoChannels(nn.Module):
    """Records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 1)
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        return self.conv(image)


@pytest.mark.parametrize(
    ("layout", "memory_format"), [("NCDHW", torch.contiguous_format), ("NDHWC", torch.channels_last_3d)]
)
def test_image_and_weights_have_the_layout(layout: str, memory_format: torch.memory_format) -> None:
    network = to_device(TwoChannels(), CPU, layout)
    state = TrainState(
        network=network,
        model=network,
        optimizer=make_optimizer("sgd", network.parameters(), 0.1),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    batch = {"image": torch.randn(2, 2, 4, 4, 4), "label": torch.zeros(2, 1, 4, 4, 4, dtype=torch.uint8)}
    train_step(state, batch, step_config(layout=layout), is_last=True)
    (image,) = network.seen
    assert image.is_contiguous(memory_format=memory_format)
    assert torch.equal(image, batch["image"])
    unet = to_device(Unet3d(1, 3, filters=(2, 4)), CPU, layout)
    assert unet.input_block.conv2[0].weight.is_contiguous(memory_format=memory_format)
    plane = to_device(nn.Conv2d(2, 2, 3), CPU, layout)
    is_last = memory_format == torch.channels_last_3d
    assert plane.weight.is_contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def test_channels_last_trains_to_the_same_losses(make_state: MakeState, make_batches: MakeBatches) -> None:
    plain, last = make_state(), make_state()
    to_device(last.network, CPU, "NDHWC")
    losses = []
    for state, layout in ((plain, "NCDHW"), (last, "NDHWC")):
        events: list[Event] = []
        for epoch in (1, 2):
            events += run_epoch(state, make_batches(3, 2), epoch=epoch, step=step_config(layout=layout))
        losses.append([event.loss for event in events if isinstance(event, EpochStopped)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_close_weights(last.network, plain.network, rtol=1e-3, atol=1e-5)


def test_a_loss_scaler_changes_nothing_without_an_overflow(make_state: MakeState, make_batches: MakeBatches) -> None:
    plain, scaled = make_state(), make_state()
    scaled.scaler = torch.amp.GradScaler("cpu", enabled=True)
    for state in (plain, scaled):
        run_epoch(state, make_batches(4, 1), ga_steps=2)
    assert_close_weights(scaled.network, plain.network, rtol=1e-6, atol=1e-7)


def test_a_loss_scaler_skips_a_step_that_overflows(
    make_state: MakeState, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    state, start = make_state(), make_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)
    state.network.output.conv.bias.register_hook(lambda gradient: gradient * math.inf)
    events = run_epoch(state, make_batches(1, 1))
    assert same_weights(state.network, start.network)
    assert state.scaler.get_scale() == 512
    assert math.isfinite(events[-1].loss), "a skipped step must not stop the run"
    (step,) = steps_of(events)
    assert (step.fault, step.loss_scale) == (False, 512.0)
    assert not math.isfinite(step.gradient_norm)


def test_the_loss_is_fp32_in_any_precision(make_state: MakeState, make_batches: MakeBatches) -> None:
    (batch,) = make_batches(1, 1).epoch(1)
    state = make_state()
    kinds: list[torch.dtype] = []
    state.network.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    loss = train_step(state, batch, step_config(precision=Precision(CPU, torch.bfloat16)), is_last=True)
    assert kinds == [torch.bfloat16]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(train_step(make_state(), batch, step_config(), True).item(), rel=0.05)
    assert {p.dtype for p in state.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("ga_steps", [1, 2])
def test_a_step_reports_its_mean_loss_and_gradient_norm(
    ga_steps: int, scale: float | None, make_state: MakeState, make_batches: MakeBatches
) -> None:
    """The norm is that of the optimizer's gradients: averaged over the micro-batches, without the loss scale."""
    state, other, loader = make_state(rate=0.0), make_state(), make_batches(4, 1)
    if scale is not None:
        state.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)
    steps = steps_of(run_epoch(state, loader, rate=0.0, ga_steps=ga_steps))
    losses = []
    for batch in loader.epoch(1):
        loss = DiceCELoss()(other.network(batch["image"]), batch["label"])
        (loss / ga_steps).backward()
        losses.append(loss.item())
        if len(losses) % ga_steps == 0:
            norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in other.network.parameters()))
            step = steps.pop(0)
            assert step.loss == pytest.approx(sum(losses[-ga_steps:]) / ga_steps, rel=1e-6)
            assert step.gradient_norm == pytest.approx(norm, rel=1e-5)
            assert step.loss_scale == (scale or 1.0)
            other.network.zero_grad()
    assert steps == []


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_gradients_above_the_largest_norm_are_scaled_down_to_it(
    share: float, scale: float | None, make_state: MakeState, make_batches: MakeBatches
) -> None:
    """SGD without momentum moves the weights by rate * gradient; the reported norm is that before clipping."""
    start, free, clipped = make_state(), make_state(momentum=0.0), make_state(momentum=0.0)
    if scale is not None:
        clipped.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)
    (step,) = steps_of(run_epoch(free, make_batches(1, 1)))
    limit = share * step.gradient_norm
    config = replace(step_config(), max_grad_norm=limit)
    (same_step,) = steps_of(run_epoch(clipped, make_batches(1, 1), step=config))
    assert same_step.gradient_norm == pytest.approx(step.gradient_norm, rel=1e-5)
    for before, expected, actual in zip(
        start.network.parameters(), free.network.parameters(), clipped.network.parameters(), strict=True
    ):
        moved = min(share, 1.0) * (expected - before)
        torch.testing.assert_close(actual - before, moved, rtol=1e-3, atol=2e-7)


def test_clipping_leaves_a_step_that_overflows_to_the_loss_scaler(
    make_state: MakeState, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    state, start = make_state(), make_state()
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)
    state.network.output.conv.bias.register_hook(lambda gradient: gradient * math.inf)
    run_epoch(state, make_batches(1, 1), step=replace(step_config(), max_grad_norm=1.0))
    assert same_weights(state.network, start.network)
    assert state.scaler.get_scale() == 512
