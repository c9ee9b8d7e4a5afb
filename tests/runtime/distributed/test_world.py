"""Communication of two real processes with gloo, and of a world of one."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch.distributed import DistBackendError, DistError, HashStore

from common.errors import RankLost, UserError
from runtime.distributed import world as distributed
from runtime.distributed.world import KeyValueStore, World
from tests.programs import free_port

RunRanks = Callable[..., list[str]]

CPU = torch.device("cpu")


# The store


@pytest.fixture
def store() -> KeyValueStore:
    return KeyValueStore(HashStore())


def test_a_value_stays_until_another_replaces_it(store: KeyValueStore) -> None:
    assert store.get("key") is None
    store.set("key", "here")
    assert (store.get("key"), store.get("other")) == ("here", None)
    store.set("key", "")
    assert store.get("key") == ""
    store.set("key", "Zürich")
    assert store.get("key") == "Zürich"


def test_of_several_first_values_one_stays_and_all_receive_it(store: KeyValueStore) -> None:
    assert store.set_default("fault", "first") == "first"
    assert store.set_default("fault", "second") == "first"
    assert store.get("fault") == "first"


def test_the_store_is_read_while_the_others_are_in_a_collective(run_ranks: RunRanks) -> None:
    """From a thread, as the watchdog does; rank 0 makes rank 1 wait until its value has been read."""
    code = """
        import threading, time, torch

        read = []

        def look():
            while world.store.get("greeting") is None:
                time.sleep(0.01)
            read.append(world.store.get("greeting"))
            world.store.set("seen", "yes")

        if world.rank == 1:
            thread = threading.Thread(target=look)
            thread.start()
        else:
            time.sleep(0.2)
            world.store.set("greeting", "hello")
            while world.store.get("seen") is None:
                time.sleep(0.01)
        world.barrier()
        if world.rank == 1:
            thread.join()
        print(read)
    """
    assert run_ranks(code) == ["[]\n", "['hello']\n"]


# Collectives


def test_maximum_sum_and_values_of_all_ranks(run_ranks: RunRanks) -> None:
    code = """
        import json, torch
        mine = torch.tensor([[1.0, 5.0, 0.0], [3.0, 2.0, 0.0]][world.rank])
        given = mine.clone()
        total = world.sum(mine)
        kept = torch.equal(mine, given)
        largest = world.max(mine.clone())
        gathered = world.gather((world.rank, f"rank {world.rank}", [0.1]))
        first = world.broadcast("mine" if world.is_main else None)
        print(json.dumps([total.tolist(), kept, largest.tolist(), gathered, first, world.rank, world.size]))
    """
    results = [json.loads(out) for out in run_ranks(code)]
    gathered = [[0, "rank 0", [0.1]], [1, "rank 1", [0.1]]]
    expected = [[4.0, 7.0, 0.0], True, [3.0, 5.0, 0.0], gathered, "mine"]
    assert results == [[*expected, 0, 2], [*expected, 1, 2]]


def test_a_world_of_one(world: World) -> None:
    tensor = torch.tensor([1.0, 5.0])
    called: list[str] = []
    assert torch.equal(world.max(tensor), tensor)
    assert torch.equal(world.sum(tensor, lambda: called.append("waited")), tensor)
    assert world.gather("mine") == ["mine"]
    assert world.broadcast("mine") == "mine"
    assert world.store is None
    world.wait_for_main("saved", 60)
    assert called == [], "there is nobody to wait for"


def test_a_port_in_use_is_reported_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            UserError, match=f"^port {port} is in use; on one machine torchrun --standalone takes a free"
        ):
            World.join(0)


@pytest.mark.parametrize(("rank", "cause"), [(0, "1/2 clients joined"), (1, "Ping failed|[Rr]eset|[Bb]roken pipe")])
def test_ranks_that_do_not_meet_end_in_one_line(monkeypatch: pytest.MonkeyPatch, rank: int, cause: str) -> None:
    """Rank 0 is alone; rank 1 meets a server of something else."""
    with socketserver.TCPServer(("127.0.0.1", 0), Refusing) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        port = other.server_address[1] if rank else free_port()
        variables = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(distributed, "JOIN_TIMEOUT", timedelta(seconds=1))
        with pytest.raises(RankLost, match=rf"^the 2 ranks did not meet at 127.0.0.1:{port} within 1 s \(.*({cause})"):
            World.join(rank)
        other.shutdown()


class Refusing(socketserver.BaseRequestHandler):
    """Answers as a web server that was sent something else."""

    def handle(self) -> None:
        self.request.recv(4096)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_a_rank_that_waits_in_a_sum_polls_and_may_leave(run_ranks: RunRanks) -> None:
    """Rank 1 comes only when rank 0 has given up waiting."""
    code = """
        import time, torch
        looks = []

        def leave():
            looks.append("look")
            if len(looks) == 3:
                raise SystemError("left")

        if world.is_main:
            try:
                world.sum(torch.ones(2), leave)
            except SystemError as error:
                print(error, len(looks))
            world.store.set("left", "yes")
        else:
            while world.store.get("left") is None:
                time.sleep(0.01)
            print(world.sum(torch.ones(2), lambda: None).tolist())
    """
    assert run_ranks(code) == ["left 3\n", "[2.0, 2.0]\n"]


# Waiting for rank 0, and losing another


def test_ranks_wait_for_rank_0_and_no_longer_than_asked(store: KeyValueStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [1000.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += 20.0

    monkeypatch.setattr(distributed.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(distributed.time, "sleep", sleep)
    second = World(1, 2, CPU, store=store)
    second.wait_for_main("saved", 60)
    assert len(slept) == 3
    World(0, 2, CPU, store=store).wait_for_main("saved", 60)
    second.wait_for_main("saved", 60)
    assert len(slept) == 3, "rank 0 has come"
    second.wait_for_main("another", 60)
    assert len(slept) == 6


@pytest.mark.parametrize(
    ("error", "size", "lost"),
    [
        (RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), 2, True),
        (DistError("the group's"), 2, True),
        (DistBackendError("NCCL communicator was aborted"), 2, True),
        (RuntimeError("CUDA out of memory"), 2, False),
        (RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), 1, False),
    ],
)
def test_which_errors_mean_that_another_rank_is_lost(error: RuntimeError, size: int, lost: bool) -> None:
    assert World(0, size, CPU).lost_another(error) is lost


def test_a_killed_rank_is_an_error_of_that_kind(run_ranks: RunRanks) -> None:
    """As gloo words it today."""
    code = """
        import os, torch
        world.barrier()
        if not world.is_main:
            os._exit(0)
        try:
            while True:
                world.max(torch.ones(1))
        except RuntimeError as error:
            print(world.lost_another(error), flush=True)
            os._exit(0)
    """
    assert run_ranks(code) == ["True\n", ""]


def test_a_store_that_ended_with_rank_0_means_that_rank_0_was_here() -> None:
    class Gone(KeyValueStore):
        def __init__(self) -> None:
            """No store."""

        def get(self, key: str) -> str | None:
            raise RuntimeError("Connection reset by peer")

    World(1, 2, CPU, store=Gone()).wait_for_main("saved", 60)


def test_buffers_become_those_of_rank_0(run_ranks: Callable[..., list[str]]) -> None:
    printed = run_ranks(
        """
        import torch
        norm = torch.nn.BatchNorm3d(2)
        norm.running_mean.fill_(1.5 + world.rank)
        norm.num_batches_tracked.fill_(7 + world.rank)
        world.broadcast_buffers(norm)
        print(norm.running_mean.tolist(), norm.num_batches_tracked.item())
        """
    )
    assert printed == ["[1.5, 1.5] 7\n"] * 2


def test_a_part_of_the_ranks_communicates_and_splits_without_the_others(run_ranks: RunRanks) -> None:
    code = """
        import torch
        part = world.split([[0], [1, 2, 3]])
        inner = part.split([[0], [1, 2]]) if world.rank else part
        numbers = [torch.full((2,), part.rank), torch.full((1,), 0.5 + part.rank)]
        part.broadcast_tensors(numbers)
        print(part.rank, part.size, part.broadcast(world.rank), [one.tolist() for one in numbers], end=" ")
        print(part.gather(world.rank))
        print(inner.rank, inner.size, inner.sum(torch.tensor(float(world.rank))).item())
    """
    members = "1 [[0, 0], [0.5]] [1, 2, 3]"
    assert run_ranks(code, ranks=4) == [
        "0 1 0 [[0, 0], [0.5]] [0]\n0 1 0.0\n",
        f"0 3 {members}\n0 1 1.0\n",
        f"1 3 {members}\n0 2 5.0\n",
        f"2 3 {members}\n1 2 5.0\n",
    ]


def test_a_single_training_rank_can_lose_an_evaluating_one() -> None:
    store = KeyValueStore(HashStore())
    assert World(0, 1, CPU, store=store).lost_another(DistError("the group's"))
