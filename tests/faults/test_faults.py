"""Every fault of docs/reliability.md, injected into the real program; `make faults` injects it more often."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import Row, disks, groups, kills

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def groups_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of two ranks share the one without a fault."""
    return tmp_path_factory.mktemp("groups")


def kept(row: Row, tries: int) -> None:
    assert row.failures == (), "\n".join(row.failures)
    assert (row.tried, row.kept) == (tries, tries)


@pytest.mark.parametrize("way", ["1 rank, 3 workers", "2 ranks, 1 worker"])
def test_killed_and_resumed(tmp_path: Path, way: str) -> None:
    kept(kills.killed_at_random(tmp_path, 2, ways=[way]), 2)


def test_asked_to_leave(tmp_path: Path) -> None:
    kept(kills.asked_to_leave(tmp_path, 3), 3)


def test_second_signal(tmp_path: Path) -> None:
    kept(groups.second_signal(tmp_path, 1), 1)


@pytest.mark.parametrize(
    "fault", [groups.lost_rank, groups.stopped_rank, groups.hung_rank, groups.killed_worker, groups.hung_worker]
)
def test_lost(groups_dir: Path, fault: Callable[[Path, int], Row]) -> None:
    kept(fault(groups_dir / fault.__name__, 1), 1)


def test_restarted(groups_dir: Path) -> None:
    kept(groups.restarted(groups_dir / "restarted", 1), 1)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    kept(disks.damaged_checkpoints(tmp_path / "work", 200), 200)


def test_killed_while_saving(tmp_path: Path) -> None:
    kept(disks.killed_while_saving(tmp_path / "work", 20), 20)


def test_full_disk(tmp_path: Path) -> None:
    kept(disks.full_disk(tmp_path, 1), 1)


def test_full_disk_for_logs(tmp_path: Path) -> None:
    kept(disks.full_disk_for_logs(tmp_path, 1), 1)


def test_lost_volumes(tmp_path: Path) -> None:
    kept(disks.lost_volumes(tmp_path, 3), 3)


def test_numbers_gone_wrong(tmp_path: Path) -> None:
    kept(disks.numbers_gone_wrong(tmp_path, 2), 2)
