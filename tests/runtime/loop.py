"""Runs of the training loop for the tests: one epoch, or a whole run with a table of scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.losses import DiceCELoss
from runtime import training
from runtime.distributed.step_sync import StepRequest, StepSync
from runtime.distributed.world import World
from runtime.eval_schedule import EvalSchedule
from runtime.logging.events import (
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
from runtime.precision import Precision
from runtime.train_state import TrainState
from runtime.training import StepConfig, train, train_epoch
from tests.runtime.conftest import RateOf, make_loop

MakeState = Callable[..., TrainState]
# Any loader of `conftest.Batches`, by number and size of the batches.
MakeBatches = Callable[..., training.TrainingLoader]
SameWeights = Callable[[nn.Module, nn.Module], bool]

CPU = torch.device("cpu")
FP32 = Precision(CPU, None)
ALONE = World(0, 1, CPU)


def step_config(ga_steps: int = 1, layout: str = "NCDHW", precision: Precision = FP32, seed: int = 0) -> StepConfig:
    return StepConfig(loss=DiceCELoss(), precision=precision, ga_steps=ga_steps, layout=layout, seed=seed)


def run_epoch(
    state: TrainState,
    loader: training.TrainingLoader,
    *,
    epoch: int = 1,
    rate: float = 0.1,
    ga_steps: int = 1,
    lag: int = 0,
    emit: Callable[[Event], None] = lambda event: None,
    **parts: Any,
) -> list[Event]:
    """Runs one epoch; returns its events, each of which is also passed to `emit`; `parts` are those of `make_loop`."""
    events: list[Event] = []

    def record(event: Event) -> None:
        events.append(event)
        emit(event)

    defaults = {"step": step_config(ga_steps), "step_sync": StepSync(parts.get("world", ALONE), lag=lag)}
    loop = make_loop(loader, learning_rate=RateOf(lambda epoch: rate), emit=record, **(defaults | parts))
    train_epoch(state, loop, epoch)
    return events


def steps_of(events: list[Event]) -> list[StepEnd]:
    return [event for event in events if isinstance(event, StepEnd)]


def assert_close_weights(a: nn.Module, b: nn.Module, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    for (name, ours), theirs in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@dataclass(frozen=True)
class TwoRanks(World):
    """A world in which the sum of losses on the other rank is 3 more than on this one."""

    def sum(self, tensor: Tensor, while_waiting: Callable[[], None] | None = None) -> Tensor:
        return 2 * tensor + 3

    def max(self, tensor: Tensor) -> Tensor:
        return tensor


class Run:
    """A call of `train` that records all events and takes the score of each evaluation from a table."""

    world = ALONE

    def __init__(self, scores: dict[int, float], signals: dict[int, int] | None = None) -> None:
        """`signals`: signal numbers by the number of steps before them."""
        self.events: list[Event] = []
        self.scores = scores
        self.signals = signals or {}
        self.emit = EventDispatcher([self])

    def on(self, event: Event) -> None:
        self.events.append(event)

    def evaluate(self, epoch: int) -> EvaluationStopped:
        self.emit(EvaluationStarted(epoch, 1))
        score = self.scores.get(epoch, 0.5)
        return EvaluationStopped(epoch=epoch, mean_dice=score, dice=[score], loss=0.1, seconds=0.0)

    def request(self) -> StepRequest:
        return StepRequest(self.signals.get(sum(isinstance(event, StepEnd) for event in self.events), 0))

    def start(
        self,
        state: TrainState,
        loader: training.TrainingLoader,
        schedule: EvalSchedule,
        rate: Callable[[int], float] = lambda epoch: 0.1,
        **parts: Any,
    ) -> RunStopped:
        """Runs; checks that the last event is the only RunStopped and has the returned reason; returns it."""
        loop = make_loop(
            loader,
            schedule=schedule,
            learning_rate=RateOf(rate),
            step=step_config(),
            evaluate=self.evaluate,
            world=self.world,
            step_sync=StepSync(self.world, self.request),
            emit=self.emit,
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
        """Returns the class names of all events with their epochs, without those of batches and steps."""
        return [
            f"{type(event).__name__} {getattr(event, 'epoch', getattr(event, 'first_epoch', ''))}"
            for event in self.events
            if not isinstance(event, PhaseEnd | MicroBatchEnd | StepEnd)
        ]

    def losses(self) -> list[float]:
        return [event.loss for event in self.events if isinstance(event, EpochStopped)]
