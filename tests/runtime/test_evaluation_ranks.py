"""Evaluation on several ranks: the scores are bit for bit those of one rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, nn

from model.ensemble import Ensemble
from runtime.distributed.world import World
from runtime.evaluation import assign_cases
from runtime.logging.events import CaseEvaluated, Event
from runtime.precision import Precision
from tests.runtime.scoring import (
    CASES,
    Thresholds,
    evaluate,
    make_scorer,
    score_all,
)


class SumTable:
    """Sums tensors over ranks that are threads, in the order of the ranks."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.entries: dict[int, Tensor] = {}

    def sum(self, rank: int, tensor: Tensor) -> Tensor:
        self.entries[rank] = tensor.clone()
        self.barrier.wait()
        total = torch.stack([self.entries[rank] for rank in sorted(self.entries)]).sum(0)
        self.barrier.wait()
        return total


@dataclass(frozen=True)
class ThreadWorld(World):
    """A rank that is a thread."""

    table: SumTable = field(default_factory=lambda: SumTable(1))
    tables: dict[tuple[int, ...], SumTable] = field(default_factory=dict)

    def sum(self, tensor: Tensor, while_waiting: Callable[[], None] | None = None) -> Tensor:
        return self.table.sum(self.rank, tensor)

    def split(self, parts: Sequence[Sequence[int]]) -> World:
        for part in parts:
            if self.rank in part:
                table = self.tables.setdefault(tuple(part), SumTable(len(part)))
                return ThreadWorld(list(part).index(self.rank), len(part), self.device, table=table)
        return World(0, 1, self.device)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """All threads share the model."""


@pytest.mark.parametrize("network", [Thresholds(), Ensemble([Thresholds(), Thresholds(1.0)])], ids=["one", "two"])
@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_same_on_any_number_of_ranks(ranks: int, count: int, network: nn.Module, world: World) -> None:
    cases = [*CASES, "case_00041"][:count]
    alone = score_all(cases, world, network=network)
    table, tables = SumTable(ranks), {}
    logs: list[list[Event]] = [[] for _ in range(ranks)]
    with ThreadPoolExecutor(ranks) as threads:
        together = list(
            threads.map(
                lambda rank: score_all(
                    cases, ThreadWorld(rank, ranks, world.device, table=table, tables=tables), logs[rank], network
                ),
                range(ranks),
            )
        )
    done = [event.case for log in logs for event in log if isinstance(event, CaseEvaluated)]
    assert sorted(done) == sorted(cases), "every case must be reported by exactly one rank"
    assert bool(tables) is (ranks > count), "windows are shared if there are more ranks than cases"
    for one in together:
        if ranks <= count:  # the order of all sums is the same: equal bit for bit
            assert replace(one, seconds=0) == replace(alone, seconds=0)
        assert one.mean_dice == pytest.approx(alone.mean_dice, abs=1e-6)
        assert one.loss == pytest.approx(alone.loss, abs=1e-6)
        assert replace(one, seconds=0) == replace(together[0], seconds=0), "every rank must have the same scores"


@pytest.mark.parametrize(
    ("windows", "ranks", "members"),
    [
        ([3, 9, 4], 1, ((0,), (0,), (0,))),
        ([3, 9, 4, 2], 2, ((1,), (0,), (1,), (1,))),  # 9 | 4 + 3 + 2
        ([8, 8], 2, ((0,), (1,))),
        ([5, 100], 5, ((1,), (0, 2, 3, 4))),  # all other ranks share the longest case
        ([60, 90], 5, ((1, 3), (0, 2, 4))),
        ([2], 5, ((0, 1),)),  # no more ranks than windows
        ([1, 1], 3, ((0,), (1,))),
        ([], 2, ()),
    ],
)
def test_cases_are_assigned_longest_first(windows: list[int], ranks: int, members: tuple[tuple[int, ...], ...]) -> None:
    assert assign_cases(windows, ranks) == members


def test_the_table_of_scores_is_summed_once_with_zeros_for_other_ranks_cases(world: World) -> None:
    tables: list[Tensor] = []

    class Spy(ThreadWorld):
        def sum(self, tensor: Tensor, while_waiting: Callable[[], None] | None = None) -> Tensor:
            tables.append(tensor.clone())
            return tensor

    score_all(CASES, Spy(1, 2, world.device))
    (table,) = tables
    assert table.dtype == torch.float64
    assert table.shape == (3, 3)
    assert [bool(row.any()) for row in table] == [False, True, False]


def test_a_shard_is_every_size_th_item() -> None:
    shards = [World(rank, 3, torch.device("cpu")).shard("abcdefg") for rank in range(3)]
    assert shards == ["adg", "be", "cf"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_rank_that_waits_for_others_checks_too(shared: bool, fp32: Precision) -> None:
    """Both for the table of scores and for the logits of a case whose windows are shared."""
    checks: list[object] = []

    class Spy(ThreadWorld):
        def sum(self, tensor: Tensor, while_waiting: Callable[[], None] | None = None) -> Tensor:
            checks.append(while_waiting)
            return tensor

        def split(self, parts: Sequence[Sequence[int]]) -> World:
            return Spy(0, 2, self.device)

    def check() -> None:
        """Never interrupts."""

    ranks = Spy(0, 2, torch.device("cpu"))
    cases = CASES[:1] if shared else CASES[:2]
    evaluate(make_scorer(Thresholds(), fp32, check_waiting=check), cases, ranks)
    slabs = 4  # of 9 planes in windows of 4, 2 apart: padded to 10, in rows that begin at 0, 2, 4 and 6
    assert checks == [check] * (slabs + 2 if shared else 1)
