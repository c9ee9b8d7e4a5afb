"""Seeds: derived from one master seed, drawn on rank 0 alone, and equal on all ranks."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from runtime.distributed.world import World
from runtime.seeding import Seeds, draw_seeds, seed_process, seed_step
from runtime.training_flags import SEED_LIMIT

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Wire(World):
    """Ranks of one process: rank 0's value is left in the box for the others."""

    box: list[Any] = field(default_factory=list)

    def broadcast(self, value: Any) -> Any:
        if self.is_main:
            self.box.append(value)
        else:
            assert value is None, "only rank 0 draws"
        return self.box[-1]


@pytest.fixture(autouse=True)
def _switches() -> Iterator[None]:
    """cuDNN's switches, this process's generators and environment are as before afterwards."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    variable = os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if variable is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = variable


def test_every_rank_has_the_same_seeds() -> None:
    box: list[Any] = []
    seeds = [draw_seeds(-1, Wire(rank, 4, CPU, box=box)) for rank in range(4)]
    assert all(each == seeds[0] for each in seeds)
    assert len(box) == 1
    assert len(seeds[0].ranks) == 4


def test_all_derived_seeds_differ(world: World) -> None:
    seeds = draw_seeds(42, Wire(0, 50, CPU))
    assert len({seeds.order, seeds.samples, *seeds.ranks}) == 52
    assert seeds != draw_seeds(43, Wire(0, 50, CPU))


def test_a_master_seed_gives_the_same_run_today_and_tomorrow(world: World) -> None:
    """The values: a run that a log names by its seed must come back after an update."""
    expected = np.random.SeedSequence(42).generate_state(3).tolist()
    assert draw_seeds(42, world) == Seeds(master=42, order=expected[0], samples=expected[1], ranks=(expected[2],))
    assert (expected[0], expected[1]) == (3444837047, 2669555309)


def test_order_and_samples_do_not_depend_on_the_number_of_ranks() -> None:
    seeds = [draw_seeds(7, Wire(0, size, CPU)) for size in (1, 2, 8)]
    assert len({(each.order, each.samples) for each in seeds}) == 1


def test_minus_one_takes_the_operating_systems_entropy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def drawn(limit: int) -> int:
        asked.append(limit)
        return 12345

    monkeypatch.setattr(secrets, "randbelow", drawn)
    seeds = draw_seeds(-1, world)
    assert asked == [SEED_LIMIT]
    assert seeds == draw_seeds(12345, world)
    assert asked == [SEED_LIMIT], "a given seed draws nothing"
    assert draw_seeds(0, world).master == 0, "0 is a seed like any other"


def test_minus_one_differs_from_run_to_run_whatever_the_global_generators_say(world: World) -> None:
    masters = set()
    for _ in range(5):
        seed_process(1, deterministic=False, autotune=False)
        masters.add(draw_seeds(-1, world).master)
    assert len(masters) == 5
    assert all(0 <= master < SEED_LIMIT for master in masters)


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), torch.rand(1).item()


def test_a_process_draws_the_same_again_in_all_three_libraries() -> None:
    seed_process(5, deterministic=False, autotune=False)
    first = draws()
    second = draws()
    seed_process(5, deterministic=False, autotune=False)
    assert draws() == first
    assert all(a != b for a, b in zip(first, second, strict=True))
    seed_process(6, deterministic=False, autotune=False)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_what_a_step_draws_follows_from_its_place_alone() -> None:
    """So a resumed run draws on, with nothing of the generators saved."""
    seed_step(5, 3, 7)
    expected = draws()
    for others in ((6, 3, 7), (5, 4, 7), (5, 3, 8), (5, 7, 3)):
        seed_step(*others)
        assert all(a != b for a, b in zip(draws(), expected, strict=True)), others
    seed_step(5, 3, 7)
    assert draws() == expected


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_any_ranks_seed_is_taken(seed: int) -> None:
    """A rank's seed is any number of 32 bits, and numpy's generator takes no more than those."""
    seed_step(seed, 100_000, 100_000)
    assert 0 <= torch.initial_seed() < 2**32


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32 + 5])
def test_any_seed_is_taken(seed: int) -> None:
    seed_process(seed, deterministic=False, autotune=False)
    assert torch.initial_seed() == seed


@pytest.mark.parametrize(("deterministic", "autotune"), [(False, False), (True, False), (False, True)])
def test_cudnns_switches(deterministic: bool, autotune: bool) -> None:
    seed_process(1, deterministic=deterministic, autotune=autotune)
    assert torch.backends.cudnn.deterministic is deterministic
    assert torch.backends.cudnn.benchmark is autotune
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)


def test_a_users_own_workspace_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    seed_process(1, deterministic=True, autotune=False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
