"""Injects every fault of docs/reliability.md into the real program a few times; `make faults` injects it more often."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import Row, disks, groups, kills

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def groups_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which all faults of two ranks share the run without a fault."""
    return tmp_path_factory.mktemp("groups")


def assert_kept(row: Row, tries: int) -> None:
    assert row.failures == (), "\n".join(row.failures)
    assert (row.tried, row.kept) == (tries, tries)


@pytest.mark.parametrize("variant", ["1 rank, 3 workers", "2 ranks, 1 worker"])
def test_killed_and_resumed(tmp_path: Path, variant: str) -> None:
    assert_kept(kills.killed_at_random(tmp_path, 2, variants=[variant]), 2)


def test_interrupted(tmp_path: Path) -> None:
    assert_kept(kills.interrupted(tmp_path, 3), 3)


def test_second_signal(tmp_path: Path) -> None:
    assert_kept(groups.second_signal(tmp_path, 1), 1)


@pytest.mark.parametrize(
    "fault", [groups.lost_rank, groups.stopped_rank, groups.hung_rank, groups.killed_worker, groups.hung_worker]
)
def test_lost(groups_dir: Path, fault: Callable[[Path, int], Row]) -> None:
    assert_kept(fault(groups_dir / fault.__name__, 1), 1)


def test_restarted(groups_dir: Path) -> None:
    assert_kept(groups.restarted(groups_dir / "restarted", 1), 1)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    assert_kept(disks.damaged_checkpoints(tmp_path / "work", 200), 200)


def test_killed_while_saving(tmp_path: Path) -> None:
    assert_kept(disks.killed_while_saving(tmp_path / "work", 20), 20)


def test_full_disk(tmp_path: Path) -> None:
    assert_kept(disks.full_disk(tmp_path, 1), 1)


def test_full_disk_for_logs(tmp_path: Path) -> None:
    assert_kept(disks.full_disk_for_logs(tmp_path, 1), 1)


def test_lost_volumes(tmp_path: Path) -> None:
    assert_kept(disks.lost_volumes(tmp_path, 3), 3)


def test_non_finite_values(tmp_path: Path) -> None:
    assert_kept(disks.non_finite_values(tmp_path, 2), 2)
