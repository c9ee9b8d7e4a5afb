"""How ranks with GPUs join and reduce, with stand-ins for NCCL: what is called, in which order, and where."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from common.errors import UserError
from runtime.distributed import world as distributed
from runtime.distributed.world import World
from tests.fake_gpu import GPU, FakeGpu


@pytest.fixture
def calls(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that choose a GPU and start NCCL, on a machine with two GPUs."""
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(device))

    def init_process_group(backend: str, **settings: Any) -> None:
        made.append((backend, settings["rank"], settings["world_size"], settings["device_id"]))

    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(HashStore(), 3, 4)]))
    monkeypatch.setattr(distributed.dist, "init_process_group", init_process_group)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    return made


def test_a_rank_takes_its_own_gpu_before_nccl_starts(calls: list[Any]) -> None:
    """NCCL and every allocation without an index would else use the first GPU, on all ranks."""
    world = World.join(1)
    assert (world.rank, world.size, world.device) == (3, 4, torch.device("cuda", 1))
    assert calls == [torch.device("cuda", 1), ("nccl", 3, 4, torch.device("cuda", 1))]


def test_a_gpu_alone_needs_no_group(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert World.join(0) == World(0, 1, GPU)
    assert calls == [GPU]


def test_a_rank_without_a_gpu_is_refused_before_any_is_touched(calls: list[Any]) -> None:
    with pytest.raises(UserError, match=r"--local_rank 2, but this machine has 2 GPU\(s\)"):
        World.join(2)
    assert calls == []


def test_without_a_gpu_it_is_gloo(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert World.join(1).device == torch.device("cpu")
    assert calls == [("gloo", 3, 4, None)]


class Work:
    """A collective on a GPU: queued at once, done after a while."""

    def __init__(self) -> None:
        self.asked = 0

    def is_completed(self) -> bool:
        self.asked += 1
        return self.asked > 2

    def wait(self) -> None:
        """Makes the GPU's next work wait, not the host."""


@pytest.fixture
def two(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> World:
    """This rank of two that hold the same numbers."""

    def all_reduce(tensor: torch.Tensor, **settings: Any) -> Work:
        assert tensor.device == GPU, "NCCL reduces tensors on GPUs only"
        if settings.get("op") is None:
            tensor.mul_(2)
        return Work()

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed, "POLL_S", 0)
    return World(0, 2, GPU)


def test_sums_and_maxima_stay_on_the_gpu(two: World, gpu: FakeGpu) -> None:
    tensor, looks = torch.ones(3, device=GPU), []
    assert two.sum(tensor).device == GPU
    assert two.max(tensor).device == GPU
    two.sum(tensor, lambda: looks.append("look"))
    assert len(looks) == 2, "the host may ask whether others are still there"
    assert gpu.waits == []
    assert two.sum(tensor).tolist() == [2.0] * 3
    assert tensor.tolist() == [1.0] * 3


def test_a_tensor_of_the_host_is_summed_on_the_gpu_and_returns(two: World) -> None:
    assert torch.equal(two.sum(torch.ones(3)), torch.full((3,), 2.0))


def test_the_host_waits_at_a_barrier(two: World, gpu: FakeGpu) -> None:
    """NCCL's all-reduce is only queued: without a read, a rank would start its clock before the others are there."""
    two.barrier()
    assert gpu.waits == ["item in barrier"]


def test_the_model_is_wrapped_for_the_ranks_own_gpu(two: World, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def wrap(model: torch.nn.Module, **settings: Any) -> Callable[..., Any]:
        given.update(settings)
        return model

    monkeypatch.setattr(distributed, "DistributedDataParallel", wrap)
    two.wrap(torch.nn.Linear(1, 1))
    assert given["device_ids"] == [GPU]


@pytest.mark.parametrize(("channels", "warns"), [(1, 0), (2, 1)])
def test_ddps_warning_of_strides_is_kept_where_they_lay_out_memory_in_another_way(channels: int, warns: int) -> None:
    text = "Grad strides do not match bucket view strides. This may …\ngrad.sizes() = [4, {}, 3, 3, 3], strides() = […"
    with warnings.catch_warnings(record=True, action="always") as caught:
        warnings.filterwarnings("ignore", distributed.SAME_MEMORY)
        warnings.warn(text.format(channels), UserWarning, stacklevel=1)
    assert len(caught) == warns
