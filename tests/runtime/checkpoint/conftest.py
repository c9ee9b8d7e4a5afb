"""Helpers of the checkpoint tests: a short training, and comparison of what was saved bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.losses import DiceCELoss
from runtime.checkpoint import writer as writer_module
from runtime.checkpoint.format import load, snapshot
from runtime.checkpoint.writer import save
from runtime.logging.events import EpochStopped, EvaluationStopped, Event
from runtime.precision import Precision
from runtime.scores import keep_if_best
from runtime.train_state import TrainState
from runtime.training import StepConfig, TrainingLoader, train_epoch
from tests.runtime.checkpoint.disk import Disk
from tests.runtime.conftest import RateOf, StopAt, make_loop

MakeState = Callable[..., TrainState]
MakeBatches = Callable[..., TrainingLoader]
SameWeights = Callable[[nn.Module, nn.Module], bool]
Weights = dict[str, Tensor]
CONFIG: dict[str, Any] = {"model": "unet3d(filters=(3,4))", "val_input_shape": (4, 4, 8), "lr_decay_epochs": ()}
SPEC: dict[str, Any] = {"name": "own", "classes": ("background", "one"), "spacing_mm": (1.5, 1.0, 1.0), "mean": None}
CPU = torch.device("cpu")


def train_epochs(
    state: TrainState,
    loader: TrainingLoader,
    first: int,
    last: int,
    layout: str = "NCDHW",
    leave_after: int | None = None,
) -> list[float]:
    """Returns the mean loss of each epoch; `leave_after` ends the last one after that batch."""
    events: list[Event] = []
    loop = make_loop(
        loader,
        learning_rate=RateOf(lambda epoch: 0.05),
        step=StepConfig(loss=DiceCELoss(), precision=Precision(CPU, None), ga_steps=1, layout=layout),
        emit=events.append,
        callbacks=[StopAt(batch=leave_after, epoch=last)],
    )
    for epoch in range(first, last + 1):
        train_epoch(state, loop, epoch)
    return [event.loss for event in events if isinstance(event, EpochStopped)]


def keep_best(state: TrainState, epoch: int, mean_dice: float) -> None:
    keep_if_best(state, EvaluationStopped(epoch=epoch, mean_dice=mean_dice, dice=[mean_dice], loss=0.1, seconds=1.0))


def keep_state(
    path: Path, state: TrainState, seed: int = 1, keep: int = 1, loss_sums: list[float] | None = None
) -> None:
    content = snapshot(state, loss_sums or [0.0], config=CONFIG, seed=seed, data="d1635", spec=SPEC)
    save(path, content, keep)


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def clone(state: TrainState) -> Weights:
    return {name: tensor.clone() for name, tensor in state.network.state_dict().items()}


def leaves(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every value within, with the keys that lead to it."""
    if isinstance(content, dict | list | tuple):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, inner in items:
            yield from leaves(inner, f"{name}.{key}")
    else:
        yield name, content


def equal(a: Any, b: Any) -> bool:
    """Whether the values are the same bit for bit, with tensors in the same memory order."""
    ours, theirs = list(leaves(a)), list(leaves(b))
    return [name for name, _ in ours] == [name for name, _ in theirs] and all(
        torch.equal(x, y) and x.stride() == y.stride() and x.dtype == y.dtype
        if isinstance(x, Tensor)
        else x == y and type(x) is type(y)
        for (_, x), (_, y) in zip(ours, theirs, strict=True)
    )


def epochs_in(folder: Path) -> dict[str, int]:
    """Returns the epoch of every file in the folder; each must be intact."""
    return {file.name: load(file).last_epoch for file in folder.iterdir()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pth"


@pytest.fixture
def weights(make_state: MakeState) -> Weights:
    return clone(make_state())


@pytest.fixture
def slow() -> Iterator[Disk]:
    disk = Disk(is_slow=True)
    yield disk
    disk.let_go()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that `time.monotonic` returns; a test changes them."""
    now = [1000.0]
    monkeypatch.setattr(writer_module.time, "monotonic", lambda: now[0])
    return now
