"""The loop: accumulation, the schedule, the order of events, golden losses, one wait for the device an epoch, every end
of a run and going on from any place.
"""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import DIVERGED_EXIT, Interrupted, UserError
from model.losses import DiceCELoss
from model.unet3d import Unet3d
from runtime import training
from runtime.callbacks.base import Callback
from runtime.distributed import step_sync as pulses
from runtime.distributed.step_sync import StepRequest, StepSync
from runtime.distributed.world import World
from runtime.eval_schedule import EvalSchedule, make_schedule
from runtime.logging.events import (
    BlockStarted,
    BlockStopped,
    EpochStarted,
    EpochStopped,
    EvaluationStarted,
    EvaluationStopped,
    Event,
    EventDispatcher,
    MicroBatchEnd,
    PhaseEnd,
    RunStopped,
    StepEnd,
)
from runtime.lr_schedule import learning_rate
from runtime.memory_format import to_device
from runtime.optimizer import make_optimizer
from runtime.precision import Precision
from runtime.train_state import Stop, TrainState
from runtime.training import StepConfig, train, train_epoch
from tests.runtime.conftest import RateOf, StopAt, make_loop, train_step

MakeState = Callable[..., TrainState]
# Any loader of `conftest.Batches`, by number and size of the batches.
MakeBatches = Callable[..., training.TrainingLoader]
SameWeights = Callable[[nn.Module, nn.Module], bool]

CPU = torch.device("cpu")
FP32 = Precision(CPU, None)
ALONE = World(0, 1, CPU)


def settings_of(ga_steps: int = 1, layout: str = "NCDHW", precision: Precision = FP32, seed: int = 0) -> StepConfig:
    return StepConfig(loss=DiceCELoss(), precision=precision, ga_steps=ga_steps, layout=layout, seed=seed)


def run_epoch(
    state: TrainState,
    loader: training.TrainingLoader,
    rate: float = 0.1,
    epoch: int = 1,
    ga_steps: int = 1,
    world: World = ALONE,
    lag: int = 0,
    emit: Callable[[Event], None] = lambda event: None,
    callbacks: Sequence[Callback] = (),
    step: StepConfig | None = None,
) -> list[Event]:
    """One epoch; returns its events, each of which is passed to `emit` as it comes."""
    events: list[Event] = []

    def record(event: Event) -> None:
        events.append(event)
        emit(event)

    loop = make_loop(
        loader,
        learning_rate=RateOf(lambda epoch: rate),
        step=step or settings_of(ga_steps),
        world=world,
        step_sync=StepSync(world, lag=lag),
        emit=record,
        callbacks=callbacks,
    )
    train_epoch(state, loop, epoch)
    return events


def steps_of(events: list[Event]) -> list[StepEnd]:
    return [event for event in events if isinstance(event, StepEnd)]


def assert_close_weights(a: nn.Module, b: nn.Module, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for (name, ours), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# One step


@pytest.mark.parametrize("ga_steps", [2, 4])
def test_accumulated_micro_batches_step_as_one_big_batch(
    ga_steps: int, make_state: MakeState, make_batches: MakeBatches
) -> None:
    (big,) = make_batches(1, 4).epoch(1)
    whole, parts, start = make_state(), make_state(), make_state()
    train_step(whole, big, settings_of(), is_last=True)
    for index in range(ga_steps):
        size = 4 // ga_steps
        micro = {name: tensor[index * size : (index + 1) * size] for name, tensor in big.items()}
        train_step(parts, micro, settings_of(ga_steps), is_last=index == ga_steps - 1)
    assert_close_weights(parts.network, whole.network)
    moved = parts.network.output.conv.weight - start.network.output.conv.weight
    assert moved.abs().max() > 1e-3


def test_the_gradient_is_that_of_the_loss(make_state: MakeState, make_batches: MakeBatches) -> None:
    (batch,) = make_batches(1, 2).epoch(1)
    state, other = make_state(), make_state()
    loss = train_step(state, batch, settings_of(), is_last=False)
    expected = DiceCELoss()(other.network(batch["image"]), batch["label"])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not loss.requires_grad, "a loss that keeps its graph would hold every activation of the epoch"
    for ours, theirs in zip(state.network.parameters(), other.network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_weights_move_with_the_last_of_a_group_alone(
    make_state: MakeState, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    first, second = make_batches(2, 1).epoch(1)
    state, start = make_state(), make_state()
    train_step(state, first, settings_of(2), is_last=False)
    assert same_weights(state.network, start.network)
    assert all(p.grad is not None for p in state.network.parameters())
    train_step(state, second, settings_of(2), is_last=True)
    assert not same_weights(state.network, start.network)
    assert all(p.grad is None for p in state.network.parameters())


def test_only_the_last_of_a_group_communicates(
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
    """Keeps what it was given."""

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
def test_the_layout_is_that_of_image_and_weights(layout: str, memory_format: torch.memory_format) -> None:
    network = to_device(TwoChannels(), CPU, layout)
    state = TrainState(
        network=network,
        model=network,
        optimizer=make_optimizer("sgd", network.parameters(), 0.1),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    batch = {"image": torch.randn(2, 2, 4, 4, 4), "label": torch.zeros(2, 1, 4, 4, 4, dtype=torch.uint8)}
    train_step(state, batch, settings_of(layout=layout), is_last=True)
    (image,) = network.seen
    assert image.is_contiguous(memory_format=memory_format)
    assert torch.equal(image, batch["image"])
    unet = to_device(Unet3d(1, 3, filters=(2, 4)), CPU, layout)
    assert unet.input_block.conv2[0].weight.is_contiguous(memory_format=memory_format)
    plane = to_device(nn.Conv2d(2, 2, 3), CPU, layout)
    is_last = memory_format == torch.channels_last_3d
    assert plane.weight.is_contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def test_channels_last_trains_to_the_same_numbers(make_state: MakeState, make_batches: MakeBatches) -> None:
    plain, last = make_state(), make_state()
    to_device(last.network, CPU, "NDHWC")
    losses = []
    for state, layout in ((plain, "NCDHW"), (last, "NDHWC")):
        events: list[Event] = []
        for epoch in (1, 2):
            events += run_epoch(state, make_batches(3, 2), epoch=epoch, step=settings_of(layout=layout))
        losses.append([event.loss for event in events if isinstance(event, EpochStopped)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_close_weights(last.network, plain.network, rtol=1e-3, atol=1e-5)


def test_a_loss_scaler_changes_nothing_where_nothing_overflows(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
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
    assert math.isfinite(events[-1].loss), "a skipped step is normal, and no reason to stop"
    (step,) = steps_of(events)
    assert (step.fault, step.loss_scale) == (False, 512.0)
    assert not math.isfinite(step.gradient_norm)


def test_the_loss_is_fp32_whatever_the_network_computes_in(make_state: MakeState, make_batches: MakeBatches) -> None:
    (batch,) = make_batches(1, 1).epoch(1)
    state = make_state()
    kinds: list[torch.dtype] = []
    state.network.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    loss = train_step(state, batch, settings_of(precision=Precision(CPU, torch.bfloat16)), is_last=True)
    assert kinds == [torch.bfloat16]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(train_step(make_state(), batch, settings_of(), True).item(), rel=0.05)
    assert {p.dtype for p in state.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("ga_steps", [1, 2])
def test_a_step_tells_its_mean_loss_and_the_norm_of_its_gradients(
    ga_steps: int, scale: float | None, make_state: MakeState, make_batches: MakeBatches
) -> None:
    """The norm is of what the optimizer takes: averaged over the micro-batches, the loss scale divided out."""
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


# An epoch


def test_an_epoch_leaves_the_mean_loss_and_its_samples(make_state: MakeState, make_batches: MakeBatches) -> None:
    loader, state = make_batches(3, 2), make_state(rate=0.0)
    network = make_state().network
    expected = [DiceCELoss()(network(batch["image"]), batch["label"]).item() for batch in loader.epoch(0)]
    events = run_epoch(state, loader, rate=0.0, epoch=5)
    stopped = events[-1]
    assert isinstance(stopped, EpochStopped)
    assert stopped.loss == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert max(expected) - min(expected) > 1e-4, "so that a last or first loss would show"
    assert (stopped.epoch, stopped.samples, stopped.learning_rate) == (5, 6, 0.0)
    assert state.epoch == 5


def test_events_of_an_epoch(make_state: MakeState, make_batches: MakeBatches) -> None:
    events = run_epoch(make_state(), make_batches(3, 2), rate=0.25, epoch=4)
    expected: list[Event] = [EpochStarted(4, 0.25, 3)]
    for index in range(3):
        expected += [PhaseEnd("data"), PhaseEnd("forward and backward"), MicroBatchEnd(4, index, 2)]
        expected += [StepEnd(epoch=4, batch=index, loss=0.0, gradient_norm=0.0, loss_scale=1.0)]
    # The numbers have a test of their own.
    without = [replace(e, loss=0.0, gradient_norm=0.0) if isinstance(e, StepEnd) else e for e in events]
    assert without[:-1] == expected


@pytest.mark.parametrize("lag", [0, 1])
def test_every_step_is_told_before_its_epoch_ends(lag: int, make_state: MakeState, make_batches: MakeBatches) -> None:
    events = run_epoch(make_state(), make_batches(5, 1), epoch=4, ga_steps=2, lag=lag)
    assert [(event.epoch, event.batch) for event in steps_of(events)] == [(4, 1), (4, 3)]
    assert isinstance(events[-1], EpochStopped)


def test_the_loader_is_asked_for_its_epoch(make_state: MakeState, make_batches: MakeBatches) -> None:
    loader = make_batches(1, 1)
    run_epoch(make_state(), loader, epoch=3)
    assert loader.epochs == [3]


def test_an_incomplete_group_is_left_out(
    make_state: MakeState, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    five, four = make_state(momentum=0.9), make_state(momentum=0.9)
    events = run_epoch(five, make_batches(5, 1), ga_steps=2)
    run_epoch(four, make_batches(4, 1), ga_steps=2)
    assert same_weights(five.network, four.network)
    assert [event.batches for event in events if isinstance(event, EpochStarted)] == [4]
    assert sum(isinstance(event, MicroBatchEnd) for event in events) == 4
    assert [event.samples for event in events if isinstance(event, EpochStopped)] == [4]
    assert all(p.grad is None for p in five.network.parameters())


def test_gradients_of_before_do_not_leak_into_an_epoch(
    make_state: MakeState, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    clean, dirty = make_state(), make_state()
    for p in dirty.network.parameters():
        p.grad = torch.ones_like(p)
    for state in (clean, dirty):
        run_epoch(state, make_batches(1, 1))
    assert same_weights(clean.network, dirty.network)


def test_an_epoch_sets_its_rate_and_train_mode(make_state: MakeState, make_batches: MakeBatches) -> None:
    state = make_state(rate=0.1)
    state.network.eval()
    modes: list[bool] = []
    state.network.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    run_epoch(state, make_batches(2, 1), rate=0.02)
    assert [group["lr"] for group in state.optimizer.param_groups] == [0.02]
    assert modes == [True, True]


@dataclass(frozen=True)
class TwoRanks(World):
    """The other rank's sum of losses is this one's plus 3."""

    def sum(self, tensor: Tensor, while_waiting: Callable[[], None] | None = None) -> Tensor:
        return 2 * tensor + 3

    def max(self, tensor: Tensor) -> Tensor:
        return tensor


def test_the_mean_loss_is_over_all_ranks(make_state: MakeState, make_batches: MakeBatches) -> None:
    alone = run_epoch(make_state(), make_batches(3, 2))[-1]
    both = run_epoch(make_state(), make_batches(3, 2), world=TwoRanks(0, 2, CPU))[-1]
    assert isinstance(alone, EpochStopped)
    assert isinstance(both, EpochStopped)
    assert both.loss == pytest.approx(alone.loss + 3 / 6, rel=1e-6)
    assert both.samples == 2 * alone.samples


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_reads_nothing(
    scaled: bool, make_state: MakeState, make_batches: MakeBatches, forbid_reading: Callable[[], list[str]]
) -> None:
    state, loader = make_state(momentum=0.9), make_batches(4, 1)
    if scaled:
        state.scaler = Unread("cpu", enabled=True)
    run_epoch(state, loader)  # momentum's buffers and the scale exist from now on
    reads = forbid_reading()
    for index, batch in enumerate(loader.epoch(1)):
        train_step(state, batch, settings_of(2), is_last=index % 2 == 1)
    assert reads == []


class Unread(torch.amp.GradScaler):
    """Steps as on a GPU with a fused optimizer, which looks for infinities itself: torch's own reads them on a CPU."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def update(self, new_scale: float | None = None) -> None:
        """Nothing was found that would change it."""


def test_the_host_reads_a_step_with_the_next_one_and_one_loss_an_epoch(
    make_state: MakeState,
    make_batches: MakeBatches,
    forbid_reading: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that is read of a step is the step_sync's vector, once it has arrived; as on a GPU, where the lag is 1."""
    state, loader = make_state(momentum=0.9), make_batches(6, 1)
    run_epoch(state, loader)  # momentum's buffers exist from now on
    log = forbid_reading()

    def copied(vector: Tensor) -> tuple[Tensor, Callable[[], None]]:
        log.append("sent")
        return vector, lambda: log.append("arrived")

    def emit(event: Event) -> None:
        if isinstance(event, MicroBatchEnd | StepEnd):
            log.append(f"{type(event).__name__} {event.batch}")

    monkeypatch.setattr(pulses, "_start_copy", copied)
    run_epoch(state, loader, ga_steps=2, lag=1, emit=emit)
    assert log == [
        *("MicroBatchEnd 0", "MicroBatchEnd 1", "sent"),
        *("MicroBatchEnd 2", "MicroBatchEnd 3", "sent", "arrived", "tolist", "StepEnd 1"),
        *("MicroBatchEnd 4", "MicroBatchEnd 5", "sent", "arrived", "tolist", "StepEnd 3"),
        *("arrived", "tolist", "StepEnd 5", "item"),
    ]


@dataclass(frozen=True)
class Anywhere(Precision):
    """fp32 on a device that autocast does not know."""

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize("optimizer", ["sgd", "lamb"])
def test_a_step_runs_where_no_value_can_be_read(optimizer: str, make_batches: MakeBatches) -> None:
    """On the meta device tensors have no values: whatever reads one raises, in C++ too."""
    meta = torch.device("meta")
    with meta:
        network = Unet3d(1, 3, filters=(3, 4))
    state = TrainState(
        network=network,
        model=network,
        optimizer=make_optimizer(optimizer, network.parameters(), 0.1),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    settings = settings_of(2, precision=Anywhere(meta, None))
    for index, batch in enumerate(make_batches(4, 1).epoch(1)):
        loss = train_step(state, batch, settings, is_last=index % 2 == 1)
        assert loss.device == meta
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


# The middle of an epoch


class Dropping(nn.Module):
    """Draws in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.second = nn.Conv3d(4, 3, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.second(nn.functional.dropout(self.first(image).relu(), 0.4, self.training))


def dropping_state() -> TrainState:
    torch.manual_seed(5)
    network = Dropping()
    optimizer = make_optimizer("sgd", network.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(network=network, model=network, optimizer=optimizer, scaler=scaler)


@pytest.mark.parametrize("ga_steps", [1, 2])
def test_at_a_steps_end_the_state_says_where_it_is(
    ga_steps: int, make_state: MakeState, make_batches: MakeBatches
) -> None:
    state, found = make_state(), []

    def emit(event: Event) -> None:
        place = state.epoch, state.batch, None if state.loss_sum is None else state.loss_sum.item()
        if isinstance(event, StepEnd):
            found.append(place)
        elif isinstance(event, MicroBatchEnd) and found:
            assert place == found[-1], "what is done of the next step does not count yet"

    state.epoch = 6
    steps = steps_of(run_epoch(state, make_batches(5, 1), epoch=7, ga_steps=ga_steps, emit=emit))
    assert [told[:2] for told in found] == [(6, step.batch + 1) for step in steps]
    sums = [ga_steps * sum(step.loss for step in steps[: count + 1]) for count in range(len(steps))]
    assert [told[2] for told in found] == pytest.approx(sums, rel=1e-6)
    assert (state.epoch, state.batch, state.loss_sum) == (7, 0, None)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("ga_steps", [1, 2])
def test_the_rest_of_an_epoch_is_the_whole_epochs_bit_for_bit(
    ga_steps: int, lag: int, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    """With a network that draws in each step: from any step on, whatever was drawn in between."""
    whole, states = dropping_state(), []

    def emit(event: Event) -> None:
        if isinstance(event, StepEnd):
            states.append(copy.deepcopy(whole))

    stopped = run_epoch(whole, make_batches(5, 2), epoch=3, ga_steps=ga_steps, emit=emit)[-1]
    assert isinstance(stopped, EpochStopped)
    places = [state.batch for state in states]
    assert places == list(range(ga_steps, 6, ga_steps))
    for count, (state, done) in enumerate(zip(states, places, strict=True), start=1):
        torch.manual_seed(1000 + done)
        rest = run_epoch(state, make_batches(5, 2), epoch=3, ga_steps=ga_steps, lag=lag)
        assert [event.batch for event in rest if isinstance(event, MicroBatchEnd)] == list(range(done, places[-1]))
        assert [event.batch + 1 for event in steps_of(rest)] == places[count:]
        assert same_weights(state.network, whole.network)
        assert (rest[-1].loss, state.epoch, state.batch) == (stopped.loss, 3, 0)


def test_a_loader_is_asked_for_the_rest_alone(make_state: MakeState, make_batches: MakeBatches) -> None:
    """Those before are not read again: a late step of a long epoch begins at once."""
    state, loader = make_state(), make_batches(5, 1)
    state.batch, state.loss_sum = 2, torch.tensor(1.0)
    run_epoch(state, loader, epoch=3)
    assert (loader.epochs, loader.starts) == ([3], [2])


def test_what_a_step_draws_is_of_the_ranks_seed_the_epoch_and_the_batch(make_batches: MakeBatches) -> None:
    def loss(seed: int = 1, epoch: int = 1, before: int = 0) -> float:
        state = dropping_state()
        torch.manual_seed(before)
        events = run_epoch(state, make_batches(2, 1), rate=0.0, epoch=epoch, step=settings_of(seed=seed))
        return steps_of(events)[0].loss

    assert loss(before=9) == loss()
    assert loss(seed=2) != loss()
    assert loss(epoch=2) != loss()
    same = make_batches(3, 1)
    same._batches[1:] = [same._batches[0]] * 2
    assert len({step.loss for step in steps_of(run_epoch(dropping_state(), same, rate=0.0))}) == 3


def test_a_stop_at_a_step_leaves_the_rest_of_the_epoch(make_state: MakeState, make_batches: MakeBatches) -> None:
    state = make_state()
    events = run_epoch(state, make_batches(4, 1), callbacks=[StopAt(batch=1)])
    assert sum(isinstance(event, MicroBatchEnd) for event in events) == 2
    assert isinstance(events[-1], StepEnd), "an epoch that was not completed has no mean loss"
    assert (state.epoch, state.batch) == (0, 2)


def test_a_stop_at_an_epochs_last_step_is_no_whole_epoch(make_state: MakeState, make_batches: MakeBatches) -> None:
    """With a lag, the last step is heard when no other one follows."""
    state = make_state()
    events = run_epoch(state, make_batches(4, 1), lag=1, callbacks=[StopAt(batch=3)])
    assert isinstance(events[-1], StepEnd)
    assert (state.epoch, state.batch) == (0, 4)
    (started, stopped) = run_epoch(state, make_batches(4, 1))
    assert (type(started), type(stopped)) == (EpochStarted, EpochStopped), "all that is left is to say so"
    assert (state.epoch, state.batch) == (1, 0)


# The schedule


def test_evaluates_from_the_first_on_every_interval() -> None:
    schedule = EvalSchedule(epochs=12, first_evaluation=4, interval=3)
    assert [epoch for epoch in range(1, 13) if schedule.evaluates(epoch)] == [4, 7, 10]


def test_no_first_evaluation_means_never() -> None:
    assert not any(EvalSchedule(50, None, 1).evaluates(epoch) for epoch in range(1, 51))


@pytest.mark.parametrize(
    ("schedule", "start", "blocks"),
    [
        (EvalSchedule(6, 2, 2), 1, [(1, 2), (3, 4), (5, 6)]),
        (EvalSchedule(7, 3, 2), 1, [(1, 3), (4, 5), (6, 7)]),
        (EvalSchedule(8, 3, 2), 1, [(1, 3), (4, 5), (6, 7), (8, 8)]),
        (EvalSchedule(3, 1, 1), 1, [(1, 1), (2, 2), (3, 3)]),
        (EvalSchedule(5, 9, 1), 1, [(1, 5)]),
        (EvalSchedule(5, None, 1), 1, [(1, 5)]),
        (EvalSchedule(8, 3, 2), 5, [(5, 5), (6, 7), (8, 8)]),
        (EvalSchedule(8, 3, 2), 6, [(6, 7), (8, 8)]),
        (EvalSchedule(8, 3, 2), 9, []),
    ],
)
def test_blocks_end_with_an_evaluation_or_the_run(
    schedule: EvalSchedule, start: int, blocks: list[tuple[int, int]]
) -> None:
    assert list(schedule.blocks(start)) == blocks


@pytest.mark.parametrize("samples_per_epoch", [168, 166, 160, 56, 14, 1, 1000, 168 * 1000])
def test_the_rules_schedule(samples_per_epoch: int) -> None:
    schedule = make_schedule(10_000, samples_per_epoch, None, None)
    assert schedule.first_evaluation == -(-1000 * 168 // samples_per_epoch)
    assert schedule.interval == -(-20 * 168 // samples_per_epoch)
    assert schedule.epochs == 10_000


def test_the_rules_schedule_of_a_full_epoch_and_of_one_that_drops_two_samples() -> None:
    assert make_schedule(1, 168, None, None) == EvalSchedule(1, 1000, 20)
    assert make_schedule(1, 166, None, None) == EvalSchedule(1, 1013, 21)


def test_the_users_schedule() -> None:
    assert make_schedule(9, 168, 3, None) == EvalSchedule(9, 3, 20)
    assert make_schedule(9, 168, None, 2) == EvalSchedule(9, 1000, 2)
    assert make_schedule(9, 168, 3, 2) == EvalSchedule(9, 3, 2)


def test_check_refuses_an_epoch_without_a_step() -> None:
    with pytest.raises(UserError, match=r"--ga_steps 5, but an epoch has 4 batches: no step"):
        EvalSchedule(9, 1, 1).check(batches=4, ga_steps=5, warmup_steps=None)


@pytest.mark.parametrize(("epochs", "warmup_steps"), [(1, 4), (2, 8), (1, 200)])
def test_check_refuses_a_benchmark_that_ends_in_its_warm_up(epochs: int, warmup_steps: int) -> None:
    """5 batches and groups of 2: 4 iterations an epoch."""
    enough = warmup_steps // 4 + 2
    with pytest.raises(UserError, match=rf"{epochs} epoch\(s\) of 4 iterations .*use --epochs {enough} or"):
        EvalSchedule(epochs, None, 1).check(5, 2, warmup_steps)
    EvalSchedule(enough, None, 1).check(5, 2, warmup_steps)


def test_check_passes_a_run_with_a_result() -> None:
    EvalSchedule(1, None, 1).check(batches=4, ga_steps=4, warmup_steps=None)
    EvalSchedule(1, None, 1).check(batches=5, ga_steps=2, warmup_steps=3)
    EvalSchedule(1, None, 1).check(batches=5, ga_steps=2, warmup_steps=0)


def test_note_speaks_up_where_nothing_will_be_evaluated() -> None:
    assert EvalSchedule(5, 5, 1).note() == ""
    assert "no evaluation in these 5 epochs (the first is due at epoch 6)" in EvalSchedule(5, 6, 1).note()
    assert "there are no cases" in EvalSchedule(5, None, 1).note()


# A run


class Run:
    """`train` with a fake evaluation: events are recorded, each evaluation's score is looked up."""

    world = ALONE

    def __init__(
        self, scores: dict[int, float], threshold: float = 0.908, signals: dict[int, int] | None = None
    ) -> None:
        """`signals`: the number of one, by how many beats were made before."""
        self.events: list[Event] = []
        self.scores = scores
        self.signals = signals or {}
        self.threshold = threshold
        self.emit = EventDispatcher([self])

    def on(self, event: Event) -> None:
        self.events.append(event)

    def evaluate(self, epoch: int) -> EvaluationStopped:
        self.emit(EvaluationStarted(epoch, 1))
        score = self.scores.get(epoch, 0.5)
        return EvaluationStopped(epoch=epoch, mean_dice=score, dice=[score], loss=0.1, seconds=0.0)

    def wish(self) -> StepRequest:
        return StepRequest(self.signals.get(sum(isinstance(event, StepEnd) for event in self.events), 0))

    def start(
        self,
        state: TrainState,
        loader: training.TrainingLoader,
        schedule: EvalSchedule,
        rate: Callable[[int], float] = lambda epoch: 0.1,
        **parts: Any,
    ) -> RunStopped:
        """How the log ends; the run returns the same, and closes the log only once."""
        loop = make_loop(
            loader,
            schedule=schedule,
            learning_rate=RateOf(rate),
            step=settings_of(),
            evaluate=self.evaluate,
            world=self.world,
            step_sync=StepSync(self.world, self.wish),
            emit=self.emit,
            quality_threshold=self.threshold,
            **parts,
        )
        self.stop = train(state, loop)
        stopped = self.last()
        assert (stopped.status, stopped.reason) == (self.stop.status, self.stop.reason)
        return stopped

    def last(self) -> RunStopped:
        (stopped,) = [event for event in self.events if isinstance(event, RunStopped)]
        assert stopped is self.events[-1]
        return stopped

    def names(self) -> list[str]:
        """Class names with the epoch, but for single batches and steps."""
        return [
            f"{type(event).__name__} {getattr(event, 'epoch', getattr(event, 'first_epoch', ''))}"
            for event in self.events
            if not isinstance(event, PhaseEnd | MicroBatchEnd | StepEnd)
        ]

    def losses(self) -> list[float]:
        return [event.loss for event in self.events if isinstance(event, EpochStopped)]


def test_events_come_in_the_documented_order(make_state: MakeState, make_batches: MakeBatches) -> None:
    run = Run({})
    run.start(make_state(), make_batches(2, 1), EvalSchedule(5, 2, 2))
    assert run.names() == [
        "BlockStarted 1",
        "EpochStarted 1",
        "EpochStopped 1",
        "EpochStarted 2",
        "EpochStopped 2",
        "EvaluationStarted 2",
        "EvaluationStopped 2",
        "BlockStopped 1",
        "BlockStarted 3",
        "EpochStarted 3",
        "EpochStopped 3",
        "EpochStarted 4",
        "EpochStopped 4",
        "EvaluationStarted 4",
        "EvaluationStopped 4",
        "BlockStopped 3",
        "BlockStarted 5",
        "EpochStarted 5",
        "EpochStopped 5",
        "BlockStopped 5",
        "RunStopped 5",
    ]
    blocks = [event for event in run.events if isinstance(event, BlockStarted | BlockStopped)]
    assert [block.epochs for block in blocks] == [2, 2, 2, 2, 1, 1]


def test_a_run_that_reaches_its_target_stops_at_once_with_success(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
    run = Run({2: 0.9079, 4: 0.908})
    stopped = run.start(make_state(), make_batches(1, 1), EvalSchedule(50, 2, 2))
    assert (stopped.status, stopped.epoch) == ("success", 4)
    assert "0.9080 reached 0.908" in stopped.reason
    assert run.stop.exit_status == 0
    assert run.names()[-3:] == ["EvaluationStopped 4", "BlockStopped 3", "RunStopped 4"]


def test_a_run_without_its_target_is_aborted_at_its_last_epoch(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
    run = Run({})
    stopped = run.start(make_state(), make_batches(1, 1), EvalSchedule(3, 1, 1))
    assert (stopped.status, stopped.epoch) == ("aborted", 3)
    assert "not reached in 3 epochs" in stopped.reason
    assert run.stop.exit_status == 0, "a whole run: to start it again would train no further"


def test_a_score_of_nothing_is_aborted(make_state: MakeState, make_batches: MakeBatches) -> None:
    run = Run({2: 1e-7})
    stopped = run.start(make_state(), make_batches(1, 1), EvalSchedule(9, 1, 1))
    assert (stopped.status, stopped.epoch) == ("aborted", 2)
    assert "diverged" in stopped.reason
    assert run.stop.exit_status == DIVERGED_EXIT


def test_a_loss_that_is_no_number_ends_the_run_at_its_step(make_state: MakeState, make_batches: MakeBatches) -> None:
    state = make_state()
    with torch.no_grad():
        state.network.output.conv.bias.fill_(float("nan"))
    run = Run({})
    stopped = run.start(state, make_batches(3, 1), EvalSchedule(9, 1, 1))
    assert (stopped.status, stopped.epoch) == ("aborted", 0)
    assert stopped.reason.startswith("diverged: epoch 1, batch 0: ")
    assert stopped.reason.endswith("rank 0: loss nan on sample 0 of batch 0")
    assert run.stop.exit_status == DIVERGED_EXIT
    assert run.names() == ["BlockStarted 1", "EpochStarted 1", "BlockStopped 1", "RunStopped 0"]
    assert [event.batch for event in run.events if isinstance(event, MicroBatchEnd)] == [0]
    assert [event.epochs for event in run.events if isinstance(event, BlockStopped)] == [1]


def test_a_gradient_that_is_no_number_ends_the_run_while_the_loss_is_one(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
    state = make_state()
    state.network.output.conv.bias.register_hook(lambda gradient: gradient * math.inf)
    stopped = Run({}).start(state, make_batches(3, 1), EvalSchedule(9, 1, 1))
    assert stopped.reason.startswith("diverged: epoch 1, batch 0: gradient norm inf, loss scale 1, rank 0: loss 0.9")


def test_a_run_goes_on_from_the_states_epoch(make_state: MakeState, make_batches: MakeBatches) -> None:
    state, loader = make_state(), make_batches(1, 1)
    state.epoch = 3
    run = Run({})
    run.start(state, loader, EvalSchedule(6, 2, 2))
    assert loader.epochs == [4, 5, 6]
    blocks = [(event.first_epoch, event.epochs) for event in run.events if isinstance(event, BlockStarted)]
    assert blocks == [(4, 1), (5, 2)]


def test_every_epoch_takes_its_own_rate(make_state: MakeState, make_batches: MakeBatches) -> None:
    run = Run({})
    run.start(make_state(), make_batches(1, 1), EvalSchedule(4, None, 1), rate=lambda epoch: 0.1 / epoch)
    rates = [event.learning_rate for event in run.events if isinstance(event, EpochStarted | EpochStopped)]
    assert rates == pytest.approx([0.1 / epoch for epoch in (1, 1, 2, 2, 3, 3, 4, 4)])


def test_a_run_that_is_stopped_at_an_epochs_end_is_not_evaluated(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
    state = make_state()

    class Enough(Callback):
        def on_epoch_end(self, result: EpochStopped, state: TrainState) -> Stop | None:
            return Stop("aborted", "enough")

    run = Run({})
    stopped = run.start(state, make_batches(1, 1), EvalSchedule(3, 1, 1), callbacks=[Enough()])
    assert stopped.reason == "enough"
    assert run.names() == ["BlockStarted 1", "EpochStarted 1", "EpochStopped 1", "BlockStopped 1", "RunStopped 1"]


class Saves:
    """Checkpoints that only record after which epochs they were saved."""

    def __init__(self, every: int = 0) -> None:
        self.every = every
        self.epochs: list[int] = []

    def is_due_after_epoch(self, epoch: int) -> bool:
        return self.every > 0 and epoch % self.every == 0

    def save(self, state: TrainState) -> None:
        self.epochs.append(state.epoch)


@pytest.mark.parametrize(
    ("scores", "every", "saved"),
    [
        ({1: 0.5, 2: 0.4, 3: 0.6, 4: 0.6}, 0, [1, 3]),  # each new best
        ({1: 0.5, 2: math.nan}, 0, [1]),
        ({1: 0.0}, 0, []),  # a run that diverges at its first score has no best worth saving
        ({1: 0.5, 2: 0.4, 3: 0.3, 4: 0.2}, 2, [1, 2, 4]),
    ],
)
def test_a_checkpoint_is_saved_for_each_new_best_and_when_an_epoch_is_due(
    scores: dict[int, float], every: int, saved: list[int], make_state: MakeState, make_batches: MakeBatches
) -> None:
    run, saves = Run(scores), Saves(every)
    run.start(make_state(), make_batches(1, 1), EvalSchedule(4, 1, 1), checkpoints=saves)
    assert saves.epochs == saved


# Leaving, and going on


def test_a_signal_is_followed_at_a_steps_end(make_state: MakeState, make_batches: MakeBatches) -> None:
    state, run = make_state(), Run({}, signals={4: signal.SIGTERM})
    stopped = run.start(state, make_batches(3, 1), EvalSchedule(9, 9, 1))
    assert run.stop == Stop("aborted", "interrupted by SIGTERM", 143)
    assert (stopped.epoch, state.epoch, state.batch) == (1, 1, 2), "the second step of epoch 2"
    assert run.names()[-3:] == ["EpochStarted 2", "BlockStopped 1", "RunStopped 1"]


def test_a_signal_is_followed_in_an_evaluation(make_state: MakeState, make_batches: MakeBatches) -> None:
    class Left(Run):
        def evaluate(self, epoch: int) -> EvaluationStopped:
            super().evaluate(epoch)
            raise Interrupted(signal.SIGINT)

    state, run = make_state(), Left({})
    run.start(state, make_batches(1, 1), EvalSchedule(9, 2, 2))
    assert run.stop == Stop("aborted", "interrupted by SIGINT", 130)
    assert (state.epoch, state.batch, state.evaluated) == (2, 0, 0), "the evaluation is still to be made"
    assert run.names()[-2:] == ["EvaluationStarted 2", "RunStopped 2"]


def test_a_run_that_left_goes_on_as_if_it_had_not(
    make_state: MakeState, make_batches: MakeBatches, same_weights: SameWeights
) -> None:
    """At any step of two epochs, but for what a checkpoint does between."""
    whole, straight = make_state(momentum=0.9), Run({})
    straight.start(whole, make_batches(3, 1), EvalSchedule(2, 1, 1))
    for beats in range(6):
        state = make_state(momentum=0.9)
        first, second = Run({}, signals={beats: signal.SIGTERM}), Run({})
        first.start(state, make_batches(3, 1), EvalSchedule(2, 1, 1))
        assert first.stop.exit_status == 143
        second.start(state, make_batches(3, 1), EvalSchedule(2, 1, 1))
        assert same_weights(state.network, whole.network)
        assert first.losses() + second.losses() == straight.losses()
        scored = [event.epoch for event in first.events + second.events if isinstance(event, EvaluationStopped)]
        assert scored == [1, 2]


@pytest.mark.parametrize(
    ("evaluated", "epochs", "names"),
    [
        (0, 4, ["EvaluationStarted 2", "EvaluationStopped 2", "BlockStarted 3"]),
        (1, 4, ["EvaluationStarted 2", "EvaluationStopped 2", "BlockStarted 3"]),
        (2, 4, ["BlockStarted 3"]),
        (0, 2, ["EvaluationStarted 2", "EvaluationStopped 2", "RunStopped 2"]),
    ],
)
def test_an_evaluation_that_an_earlier_process_owes_comes_first_and_once(
    evaluated: int, epochs: int, names: list[str], make_state: MakeState, make_batches: MakeBatches
) -> None:
    state, run = make_state(), Run({})
    state.epoch, state.evaluated = 2, evaluated
    run.start(state, make_batches(1, 1), EvalSchedule(epochs, 2, 2))
    assert run.names()[: len(names)] == names
    assert run.names().count("EvaluationStopped 2") == (evaluated < 2)
    assert run.names().count("EvaluationStopped 4") == (epochs == 4)
    assert state.evaluated == epochs


def test_nothing_is_owed_for_an_epoch_without_an_evaluation(make_state: MakeState, make_batches: MakeBatches) -> None:
    state, run = make_state(), Run({})
    state.epoch, state.evaluated = 3, 2
    run.start(state, make_batches(1, 1), EvalSchedule(4, 2, 2))
    assert run.names()[0] == "BlockStarted 4"


def test_an_evaluation_owed_may_end_the_run(make_state: MakeState, make_batches: MakeBatches) -> None:
    state, run = make_state(), Run({2: 0.95})
    state.epoch = 2
    assert run.start(state, make_batches(1, 1), EvalSchedule(9, 2, 2)).status == "success"
    assert run.names() == ["EvaluationStarted 2", "EvaluationStopped 2", "RunStopped 2"]


def test_who_hears_of_a_score_finds_it_in_the_state(make_state: MakeState, make_batches: MakeBatches) -> None:
    """Else a checkpoint of a new best, made on this event, would have the evaluation made again."""
    state, found = make_state(), []

    class Looking(Run):
        def on(self, event: Event) -> None:
            super().on(event)
            if isinstance(event, EvaluationStopped):
                found.append(state.evaluated)

    Looking({}).start(state, make_batches(1, 1), EvalSchedule(3, 1, 1))
    assert found == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("a bug of ours"), "ValueError: a bug of ours"),
        (UserError("case_00001: damaged"), "UserError: case_00001: damaged"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        # Of an error in a worker process of the loader, which comes with that process's traceback.
        (UserError("Caught UserError in worker 0.\nTraceback:\ncase_00001: gone"), "UserError: case_00001: gone"),
    ],
)
def test_whatever_is_raised_closes_the_log_and_is_raised_again(
    error: BaseException, reason: str, make_state: MakeState, make_batches: MakeBatches
) -> None:
    class Failing(Run):
        def evaluate(self, epoch: int) -> EvaluationStopped:
            raise error

    run = Failing({})
    with pytest.raises(type(error)) as caught:
        run.start(make_state(), make_batches(1, 1), EvalSchedule(9, 2, 2))
    assert caught.value is error
    assert (run.last().status, run.last().reason, run.last().epoch) == ("aborted", reason, 2)


@pytest.mark.parametrize(
    ("world", "reason"),
    [
        (TwoRanks(0, 2, CPU), "another rank was lost"),
        (ALONE, "RuntimeError: gloo: Connection closed by peer"),
    ],
)
def test_a_log_does_not_guess_which_rank_was_lost(
    world: World, reason: str, make_state: MakeState, make_batches: MakeBatches
) -> None:
    """The last line on stderr tells, once all that is known has come together."""

    class Failing(Run):
        def evaluate(self, epoch: int) -> EvaluationStopped:
            raise RuntimeError("gloo: Connection closed by peer")

    run = Failing({})
    run.world = world
    with pytest.raises(RuntimeError, match=r"^gloo"):
        run.start(make_state(), make_batches(1, 1), EvalSchedule(9, 2, 2))
    assert run.last().reason == reason


def test_a_worker_of_the_loader_that_was_killed_is_no_bug_of_ours(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
    """torch says so wherever the main thread happens to be, in the middle of a step too."""
    state, killed = make_state(), RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore of it")

    def interrupt(*_: object) -> None:
        raise killed

    state.network.register_forward_pre_hook(interrupt)
    run = Run({})
    with pytest.raises(UserError, match=r"^DataLoader worker \(pid 7\) is killed by signal: Killed\. .*--resume$"):
        run.start(state, make_batches(1, 1), EvalSchedule(9, 2, 2))
    assert (run.last().status, run.last().epoch) == ("aborted", 0)


# Mean loss of each epoch, measured once (torch 2.13, the same to 1e-6 with one and two threads, with and without
# oneDNN). Whatever changes the arithmetic, the first weights, the order of the steps or the rates shows here.
WARM_UP = partial(learning_rate, base=0.3, initial=0.01, warmup_epochs=3, decay_epochs=(5,), decay_factor=0.5)
GOLDEN = {
    "plain": (
        {"momentum": 0.0},
        partial(learning_rate, base=0.3),
        [0.936771, 0.856095, 0.803759, 0.766197, 0.737306, 0.708687],
    ),
    "momentum and warm-up": (
        {"momentum": 0.9},
        WARM_UP,
        [0.940433, 0.828764, 0.764783, 0.704106, 0.620148, 0.535080],
    ),
    "adam": (
        {"optimizer": "adam"},
        partial(learning_rate, base=0.01),
        [0.948395, 0.872168, 0.822858, 0.780800, 0.739085, 0.700232],
    ),
    "lamb": (
        {"optimizer": "lamb", "weight_decay": 0.01},
        partial(learning_rate, base=0.03),
        [0.949523, 0.881193, 0.826867, 0.775563, 0.725836, 0.684312],
    ),
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_losses(kind: str, make_state: MakeState, make_batches: MakeBatches) -> None:
    optimizer, rate, losses = GOLDEN[kind]
    run = Run({})
    run.start(make_state(**optimizer), make_batches(4, 2), EvalSchedule(6, 3, 3), rate)
    assert run.losses() == pytest.approx(losses, rel=1e-3)
