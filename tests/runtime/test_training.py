"""The loop: accumulation, the schedule, the order of events, golden losses, one wait for the device an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from errors import UserError
from model.losses import DiceCELoss
from model.unet3d import Unet3d
from runtime import training
from runtime.callbacks import Announcer, Diverged, TargetReached
from runtime.distributed import World
from runtime.events import (
    BatchDone,
    BlockStarted,
    BlockStopped,
    EpochStarted,
    EpochStopped,
    EvaluationStarted,
    EvaluationStopped,
    Event,
    PhaseDone,
    RunStopped,
)
from runtime.optim import learning_rate, make_optimizer
from runtime.precision import Precision
from runtime.training import (
    Schedule,
    StepSettings,
    TrainState,
    make_schedule,
    place,
    train,
    train_epoch,
    train_step,
)

MakeState = Callable[..., TrainState]
# Any loader of `conftest.Batches`, by number and size of the batches.
MakeBatches = Callable[..., training.TrainingLoader]
SameWeights = Callable[[nn.Module, nn.Module], bool]

CPU = torch.device("cpu")
FP32 = Precision(CPU, None)


def settings_of(ga_steps: int = 1, layout: str = "NCDHW", precision: Precision = FP32) -> StepSettings:
    return StepSettings(DiceCELoss(), precision, ga_steps, layout)


def run_epoch(
    state: TrainState, loader: training.TrainingLoader, rate: float = 0.1, epoch: int = 1, ga_steps: int = 1
) -> list[Event]:
    events: list[Event] = []
    train_epoch(state, epoch, loader, rate, settings_of(ga_steps), World(0, 1, CPU), events.append)
    return events


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
    network = place(TwoChannels(), CPU, layout)
    state = TrainState(
        network, network, make_optimizer("sgd", network.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False)
    )
    batch = {"image": torch.randn(2, 2, 4, 4, 4), "label": torch.zeros(2, 1, 4, 4, 4, dtype=torch.uint8)}
    train_step(state, batch, settings_of(layout=layout), is_last=True)
    (image,) = network.seen
    assert image.is_contiguous(memory_format=memory_format)
    assert torch.equal(image, batch["image"])
    unet = place(Unet3d(1, 3, filters=(2, 4)), CPU, layout)
    assert unet.input_block.conv2[0].weight.is_contiguous(memory_format=memory_format)


def test_channels_last_trains_to_the_same_numbers(make_state: MakeState, make_batches: MakeBatches) -> None:
    plain, last = make_state(), make_state()
    place(last.network, CPU, "NDHWC")
    losses = []
    for state, layout in ((plain, "NCDHW"), (last, "NDHWC")):
        events: list[Event] = []
        for epoch in (1, 2):
            train_epoch(
                state, epoch, make_batches(3, 2), 0.1, settings_of(layout=layout), World(0, 1, CPU), events.append
            )
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
        expected += [PhaseDone("data"), PhaseDone("forward and backward"), BatchDone(4, index, 2)]
    assert events[:-1] == expected


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
    assert sum(isinstance(event, BatchDone) for event in events) == 4
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

    def sum(self, tensor: Tensor) -> Tensor:
        return 2 * tensor + 3


def test_the_mean_loss_is_over_all_ranks(make_state: MakeState, make_batches: MakeBatches) -> None:
    alone = run_epoch(make_state(), make_batches(3, 2))[-1]
    events: list[Event] = []
    train_epoch(make_state(), 1, make_batches(3, 2), 0.1, settings_of(), TwoRanks(0, 2, CPU), events.append)
    both = events[-1]
    assert isinstance(alone, EpochStopped)
    assert isinstance(both, EpochStopped)
    assert both.loss == pytest.approx(alone.loss + 3 / 6, rel=1e-6)
    assert both.samples == 2 * alone.samples


def test_the_host_reads_the_device_once_an_epoch(
    make_state: MakeState, make_batches: MakeBatches, forbid_reading: Callable[[], list[str]]
) -> None:
    state, loader = make_state(momentum=0.9), make_batches(6, 1)
    run_epoch(state, loader)  # momentum's buffers exist from now on
    reads = forbid_reading()
    run_epoch(state, loader, ga_steps=2)
    assert reads == ["item"]


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
        network, network, make_optimizer(optimizer, network.parameters(), 0.1),
        torch.amp.GradScaler("cpu", enabled=False),
    )  # fmt: skip
    settings = settings_of(2, precision=Anywhere(meta, None))
    for index, batch in enumerate(make_batches(4, 1).epoch(1)):
        loss = train_step(state, batch, settings, is_last=index % 2 == 1)
        assert loss.device == meta
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


# The schedule


def test_evaluates_from_the_first_on_every_interval() -> None:
    schedule = Schedule(epochs=12, first_evaluation=4, interval=3)
    assert [epoch for epoch in range(1, 13) if schedule.evaluates(epoch)] == [4, 7, 10]


def test_no_first_evaluation_means_never() -> None:
    assert not any(Schedule(50, None, 1).evaluates(epoch) for epoch in range(1, 51))


@pytest.mark.parametrize(
    ("schedule", "start", "blocks"),
    [
        (Schedule(6, 2, 2), 1, [(1, 2), (3, 4), (5, 6)]),
        (Schedule(7, 3, 2), 1, [(1, 3), (4, 5), (6, 7)]),
        (Schedule(8, 3, 2), 1, [(1, 3), (4, 5), (6, 7), (8, 8)]),
        (Schedule(3, 1, 1), 1, [(1, 1), (2, 2), (3, 3)]),
        (Schedule(5, 9, 1), 1, [(1, 5)]),
        (Schedule(5, None, 1), 1, [(1, 5)]),
        (Schedule(8, 3, 2), 5, [(5, 5), (6, 7), (8, 8)]),
        (Schedule(8, 3, 2), 6, [(6, 7), (8, 8)]),
        (Schedule(8, 3, 2), 9, []),
    ],
)
def test_blocks_end_with_an_evaluation_or_the_run(
    schedule: Schedule, start: int, blocks: list[tuple[int, int]]
) -> None:
    assert list(schedule.blocks(start)) == blocks


@pytest.mark.parametrize("samples_per_epoch", [168, 166, 160, 56, 14, 1, 1000, 168 * 1000])
def test_the_rules_schedule(samples_per_epoch: int) -> None:
    schedule = make_schedule(10_000, samples_per_epoch, None, None)
    assert schedule.first_evaluation == -(-1000 * 168 // samples_per_epoch)
    assert schedule.interval == -(-20 * 168 // samples_per_epoch)
    assert schedule.epochs == 10_000


def test_the_rules_schedule_of_a_full_epoch_and_of_one_that_drops_two_samples() -> None:
    assert make_schedule(1, 168, None, None) == Schedule(1, 1000, 20)
    assert make_schedule(1, 166, None, None) == Schedule(1, 1013, 21)


def test_the_users_schedule() -> None:
    assert make_schedule(9, 168, 3, None) == Schedule(9, 3, 20)
    assert make_schedule(9, 168, None, 2) == Schedule(9, 1000, 2)
    assert make_schedule(9, 168, 3, 2) == Schedule(9, 3, 2)


def test_check_refuses_an_epoch_without_a_step() -> None:
    with pytest.raises(UserError, match=r"--ga_steps 5, but an epoch has 4 batches: no step"):
        Schedule(9, 1, 1).check(batches=4, ga_steps=5, warmup_steps=None)


@pytest.mark.parametrize(("epochs", "warmup_steps"), [(1, 4), (2, 8), (1, 200)])
def test_check_refuses_a_benchmark_that_ends_in_its_warm_up(epochs: int, warmup_steps: int) -> None:
    """5 batches and groups of 2: 4 iterations an epoch."""
    enough = warmup_steps // 4 + 2
    with pytest.raises(UserError, match=rf"{epochs} epoch\(s\) of 4 iterations .*use --epochs {enough} or"):
        Schedule(epochs, None, 1).check(5, 2, warmup_steps)
    Schedule(enough, None, 1).check(5, 2, warmup_steps)


def test_check_passes_a_run_with_a_result() -> None:
    Schedule(1, None, 1).check(batches=4, ga_steps=4, warmup_steps=None)
    Schedule(1, None, 1).check(batches=5, ga_steps=2, warmup_steps=3)
    Schedule(1, None, 1).check(batches=5, ga_steps=2, warmup_steps=0)


def test_note_speaks_up_where_nothing_will_be_evaluated() -> None:
    assert Schedule(5, 5, 1).note() == ""
    assert "no evaluation in these 5 epochs (the first is due at epoch 6)" in Schedule(5, 6, 1).note()
    assert "there are no cases" in Schedule(5, None, 1).note()


# A run


class Run:
    """`train` with a made-up evaluation: events are recorded, each evaluation's score is looked up."""

    def __init__(self, scores: dict[int, float], threshold: float = 0.908) -> None:
        self.events: list[Event] = []
        self.scores = scores
        self.announce = Announcer([TargetReached(threshold), Diverged()], [self])

    def on(self, event: Event) -> None:
        self.events.append(event)

    def evaluate(self, epoch: int) -> EvaluationStopped:
        self.announce(EvaluationStarted(epoch, 1))
        score = self.scores.get(epoch, 0.5)
        return EvaluationStopped(epoch, score, [score], 0.1, 0.0)

    def start(
        self, state: TrainState, loader: training.TrainingLoader, schedule: Schedule,
        rate: Callable[[int], float] = lambda epoch: 0.1,
    ) -> RunStopped:  # fmt: skip
        self.announce.state = state
        train(state, loader, schedule, rate, settings_of(), self.evaluate, World(0, 1, CPU), self.announce)
        stopped = self.events[-1]
        assert isinstance(stopped, RunStopped)
        return stopped

    def names(self) -> list[str]:
        """Class names with the epoch, but for single batches."""
        return [
            f"{type(event).__name__} {getattr(event, 'epoch', getattr(event, 'first_epoch', ''))}"
            for event in self.events
            if not isinstance(event, PhaseDone | BatchDone)
        ]

    def losses(self) -> list[float]:
        return [event.loss for event in self.events if isinstance(event, EpochStopped)]


def test_events_come_in_the_documented_order(make_state: MakeState, make_batches: MakeBatches) -> None:
    run = Run({})
    run.start(make_state(), make_batches(2, 1), Schedule(5, 2, 2))
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
    stopped = run.start(make_state(), make_batches(1, 1), Schedule(50, 2, 2))
    assert (stopped.status, stopped.epoch) == ("success", 4)
    assert "0.9080 reached 0.908" in stopped.reason
    assert run.names()[-3:] == ["EvaluationStopped 4", "BlockStopped 3", "RunStopped 4"]


def test_a_run_without_its_target_is_aborted_at_its_last_epoch(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
    stopped = Run({}).start(make_state(), make_batches(1, 1), Schedule(3, 1, 1))
    assert (stopped.status, stopped.epoch) == ("aborted", 3)
    assert "not reached in 3 epochs" in stopped.reason


def test_a_score_of_nothing_is_aborted(make_state: MakeState, make_batches: MakeBatches) -> None:
    stopped = Run({2: 1e-7}).start(make_state(), make_batches(1, 1), Schedule(9, 1, 1))
    assert (stopped.status, stopped.epoch) == ("aborted", 2)
    assert "diverged" in stopped.reason


def test_a_loss_that_is_no_number_ends_the_run_before_any_evaluation(
    make_state: MakeState, make_batches: MakeBatches
) -> None:
    state = make_state()
    with torch.no_grad():
        state.network.output.conv.bias.fill_(float("nan"))
    run = Run({})
    stopped = run.start(state, make_batches(1, 1), Schedule(9, 1, 1))
    assert (stopped.status, stopped.epoch) == ("aborted", 1)
    assert "epoch 1 is nan" in stopped.reason
    assert run.names() == ["BlockStarted 1", "EpochStarted 1", "EpochStopped 1", "BlockStopped 1", "RunStopped 1"]
    assert [event.epochs for event in run.events if isinstance(event, BlockStopped)] == [1]


def test_a_run_goes_on_from_the_states_epoch(make_state: MakeState, make_batches: MakeBatches) -> None:
    state, loader = make_state(), make_batches(1, 1)
    state.epoch = 3
    run = Run({})
    run.start(state, loader, Schedule(6, 2, 2))
    assert loader.epochs == [4, 5, 6]
    blocks = [(event.first_epoch, event.epochs) for event in run.events if isinstance(event, BlockStarted)]
    assert blocks == [(4, 1), (5, 2)]


def test_every_epoch_takes_its_own_rate(make_state: MakeState, make_batches: MakeBatches) -> None:
    run = Run({})
    run.start(make_state(), make_batches(1, 1), Schedule(4, None, 1), rate=lambda epoch: 0.1 / epoch)
    rates = [event.learning_rate for event in run.events if isinstance(event, EpochStarted | EpochStopped)]
    assert rates == pytest.approx([0.1 / epoch for epoch in (1, 1, 2, 2, 3, 3, 4, 4)])


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
    run.start(make_state(**optimizer), make_batches(4, 2), Schedule(6, 3, 3), rate)
    assert run.losses() == pytest.approx(losses, rel=1e-3)
