"""What the tests of this room share: a configuration, a world of one, a tiny network, and made-up batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.unet3d import Unet3d
from runtime.arguments import RunConfig, parse_arguments
from runtime.distributed import World
from runtime.optim import make_optimizer
from runtime.precision import Precision
from runtime.training import TrainState

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of a launcher or container around the tests must not reach the code."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "UNET3D_DATA_DIR", "UNET3D_LOG_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def world() -> World:
    return World(rank=0, size=1, device=CPU)


@pytest.fixture
def fp32() -> Precision:
    return Precision(CPU, None)


@pytest.fixture
def make_config() -> Callable[..., RunConfig]:
    """`make_config(field=value)`: the flags' defaults but for those given."""

    def make(**changed: Any) -> RunConfig:
        config, _ = parse_arguments(["--data_dir", "DATA"])
        return dataclasses.replace(config, **changed)

    return make


@pytest.fixture
def make_state() -> Callable[..., TrainState]:
    """`make_state("sgd", momentum=0.9)`: a tiny network as it stands before the first step, always the same."""

    def make(optimizer: str = "sgd", rate: float = 0.1, **settings: Any) -> TrainState:
        torch.manual_seed(11)
        network = Unet3d(1, 3, filters=(3, 4))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        return TrainState(network, network, make_optimizer(optimizer, network.parameters(), rate, **settings), scaler)

    return make


class Batches:
    """A training loader of made-up batches: the label follows from the image, so that something can be learnt."""

    def __init__(self, batches: int, batch_size: int, shape: tuple[int, int, int] = (4, 4, 8)) -> None:
        self.epochs: list[int] = []
        generator = torch.Generator().manual_seed(12)
        self._batches = []
        for _ in range(batches):
            image = torch.randn(batch_size, 1, *shape, generator=generator)
            label = (image > 0.3).byte() + (image > 1).byte()
            self._batches.append({"image": image, "label": label})

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, epoch: int) -> Iterator[dict[str, Tensor]]:
        self.epochs.append(epoch)
        yield from self._batches


@pytest.fixture
def make_batches() -> Callable[..., Batches]:
    return Batches


@pytest.fixture
def same_weights() -> Callable[[nn.Module, nn.Module], bool]:
    """Whether two networks hold the same values, bit for bit."""

    def same(a: nn.Module, b: nn.Module) -> bool:
        ours, theirs = a.state_dict(), b.state_dict()
        return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    return same


READING = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__")


@pytest.fixture
def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Once called, lists every way a tensor's value comes to the host, where a GPU would make the host wait."""

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
