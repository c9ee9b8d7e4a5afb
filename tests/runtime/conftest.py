"""Fixtures shared by the tests of `runtime`: a configuration, worlds of processes, a tiny network, batches."""

from __future__ import annotations

import dataclasses
import resource
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_loading.base_loader import Batch, TrainingLoader
from model.losses import DiceCELoss
from model.unet3d import Unet3d
from runtime.arguments import RunConfig, parse_arguments
from runtime.callbacks.base import Callback
from runtime.checkpoint.writer import CheckpointWriter
from runtime.distributed.step_sync import StepSync
from runtime.distributed.world import World
from runtime.eval_schedule import EvalSchedule
from runtime.logging.events import EvaluationStopped, StepEnd
from runtime.lr_schedule import LRSchedule
from runtime.optimizer import make_optimizer
from runtime.precision import Precision
from runtime.train_state import Stop, TrainState
from runtime.training import StepConfig, TrainLoop, forward_backward, optimizer_step
from tests.programs import run_ranks as run_ranks_of

CPU = torch.device("cpu")
# Precedes the code of each rank in `run_ranks`.
JOIN = "from runtime.distributed.world import World\nworld = World.join(0)\n"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the environment variables of a launcher or container around the tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "UNET3D_DATA_DIR", "UNET3D_LOG_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def world() -> World:
    return World(rank=0, size=1, device=CPU)


@pytest.fixture
def fp32() -> Precision:
    return Precision(CPU, None)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limits file sizes to `size` bytes; writing fails, since Python ignores the signal SIGXFSZ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def run_ranks() -> Callable[..., list[str]]:
    """`run_ranks("print(world.rank)")`: returns what each of two processes of a gloo group prints."""

    def run(code: str, ranks: int = 2) -> list[str]:
        program = JOIN + textwrap.dedent(code) + "\nworld.leave()\n"
        # Without GPUs, World.join uses gloo.
        done = run_ranks_of("-c", program, ranks=ranks, environment={"CUDA_VISIBLE_DEVICES": ""})
        assert [rank.returncode for rank in done] == [0] * ranks, "\n".join(rank.stderr for rank in done)
        return [rank.stdout for rank in done]

    return run


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """`make_config(field=value)`: the default configuration with some fields replaced."""

    def make(**changed: Any) -> RunConfig:
        config, _ = parse_arguments(["--data_dir", "DATA"])
        return dataclasses.replace(config, **changed)

    return make


@pytest.fixture
def make_state() -> Callable[..., TrainState]:
    """`make_state("sgd", momentum=0.9)`: a tiny network before the first step, always with the same weights."""

    def make(optimizer: str = "sgd", rate: float = 0.1, **settings: Any) -> TrainState:
        torch.manual_seed(11)
        network = Unet3d(1, 3, filters=(3, 4))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        made = make_optimizer(optimizer, network.parameters(), rate, **settings)
        return TrainState(network=network, model=network, optimizer=made, scaler=scaler)

    return make


def train_step(state: TrainState, batch: Batch, config: StepConfig, is_last: bool) -> Tensor:
    """Trains on one micro-batch like the training loop; the last one of a step is followed by the optimizer's step."""
    loss = forward_backward(state, batch, config, communicate=is_last)
    if is_last:
        state.gradient_norm = optimizer_step(state)
    return loss


class RateOf(LRSchedule):
    """A schedule given by a function of the epoch."""

    def __init__(self, rate: Callable[[int], float]) -> None:
        self.rate = rate

    def __call__(self, epoch: int) -> float:
        return self.rate(epoch)

    def after_warm_up(self, epoch: int) -> float:
        return self.rate(epoch)


class StopAt(Callback):
    """Stops the run at the step whose last micro-batch is `batch`."""

    def __init__(self, batch: int | None, epoch: int | None = None) -> None:
        self.batch, self.epoch = batch, epoch

    def on_step_end(self, step: StepEnd, state: TrainState) -> Stop | None:
        is_here = step.batch == self.batch and self.epoch in (None, step.epoch)
        return Stop("aborted", "enough") if is_here else None


def make_loop(loader: TrainingLoader, **parts: Any) -> TrainLoop:
    """Returns a training loop on one CPU rank, without evaluation, checkpoints and callbacks unless given."""
    world = parts.get("world", World(0, 1, CPU))

    def evaluate(epoch: int) -> EvaluationStopped:
        raise AssertionError("no evaluation is due")

    defaults: dict[str, Any] = {
        "schedule": EvalSchedule(1, None, 1),
        "learning_rate": RateOf(lambda epoch: 0.1),
        "step": StepConfig(loss=DiceCELoss(), precision=Precision(CPU, None), ga_steps=1, layout="NCDHW"),
        "evaluate": evaluate,
        "callbacks": (),
        "checkpoints": CheckpointWriter(world=world, snapshot=lambda state, sums: {}, write=None),
        "step_sync": StepSync(world),
        "world": world,
        "emit": lambda event: None,
        "quality_threshold": 0.908,
    }
    return TrainLoop(loader=loader, **(defaults | parts))


class Batches:
    """A training loader of dummy batches; the label follows from the image, so that it can be learned."""

    def __init__(self, batches: int, batch_size: int, shape: tuple[int, int, int] = (4, 4, 8)) -> None:
        self.epochs: list[int] = []
        self.starts: list[int] = []
        generator = torch.Generator().manual_seed(12)
        self._batches = []
        for _ in range(batches):
            image = torch.randn(batch_size, 1, *shape, generator=generator)
            label = (image > 0.3).byte() + (image > 1).byte()
            self._batches.append({"image": image, "label": label})

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        self.epochs.append(epoch)
        self.starts.append(start)
        yield from self._batches[start:]

    def describe(self, epoch: int, batch: int) -> list[str]:
        return [f"sample {sample} of batch {batch}" for sample in range(len(self._batches[batch]["image"]))]


@pytest.fixture
def make_batches() -> Callable[..., Batches]:
    return Batches


@pytest.fixture
def same_weights() -> Callable[[nn.Module, nn.Module], bool]:
    """`same_weights(a, b)`: whether the states of two networks are equal bit for bit."""

    def same(a: nn.Module, b: nn.Module) -> bool:
        ours, theirs = a.state_dict(), b.state_dict()
        return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    return same


READING = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__")


@pytest.fixture
def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Once called, records every transfer of a tensor's value to the host, for which a GPU would make the host wait."""

    def start() -> list[str]:
        reads: list[str] = []
        for name in READING:
            original = getattr(Tensor, name)

            def reading(self: Tensor, *args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                reads.append(_name)
                return _original(self, *args, **kwargs)

            monkeypatch.setattr(Tensor, name, reading)
        return reads

    return start
