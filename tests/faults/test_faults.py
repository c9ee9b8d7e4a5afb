"""Injects every fault of docs/reliability.md into the real program a few times; `make faults` injects it more often.

`make test` injects each kind once or twice, with timeouts of four seconds; the tests marked slow try more often.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults import Row, disks, groups, kills


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def groups_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which all faults of two ranks share the run without a fault."""
    return tmp_path_factory.mktemp("groups")


def assert_kept(row: Row, tries: int) -> None:
    assert row.failures == (), "\n".join(row.failures)
    assert (row.tried, row.kept) == (tries, tries)


@pytest.mark.parametrize(
    ("variant", "tries"), [("2 ranks, 1 worker", 1), slow("1 rank, 3 workers", 4), slow("2 ranks, 1 worker", 4)]
)
def test_killed_and_resumed(tmp_path: Path, variant: str, tries: int) -> None:
    assert_kept(kills.killed_at_random(tmp_path, tries, variants=[variant]), tries)


@pytest.mark.parametrize("tries", [2, slow(6)])
def test_interrupted(tmp_path: Path, tries: int) -> None:
    assert_kept(kills.interrupted(tmp_path, tries), tries)


def test_second_signal(tmp_path: Path) -> None:
    assert_kept(groups.second_signal(tmp_path, 1), 1)


# One worker of pytest-xdist: they share a run, and measure how soon both ranks end.
@pytest.mark.xdist_group("groups of ranks")
@pytest.mark.parametrize(
    "fault",
    [
        groups.lost_rank,
        partial(groups.stopped_rank, silence_s=6.0),
        partial(groups.hung_rank, timeout_s=4),
        partial(groups.killed_worker, timeout_s=4),
        partial(groups.hung_worker, timeout_s=4),
    ],
    ids=["a rank is killed", "a rank is stopped", "a rank hangs", "a worker is killed", "a worker hangs"],
)
def test_lost(groups_dir: Path, fault: Callable[[Path, int], Row], tmp_path: Path) -> None:
    assert_kept(fault(groups_dir / tmp_path.name, 1), 1)


@pytest.mark.slow
@pytest.mark.xdist_group("groups of ranks")
def test_restarted(groups_dir: Path) -> None:
    assert_kept(groups.restarted(groups_dir / "restarted", 1), 1)


@pytest.mark.parametrize("tries", [50, slow(200)])
def test_damaged_checkpoints(tmp_path: Path, tries: int) -> None:
    assert_kept(disks.damaged_checkpoints(tmp_path / "work", tries), tries)


@pytest.mark.parametrize("tries", [5, slow(20)])
def test_killed_while_saving(tmp_path: Path, tries: int) -> None:
    assert_kept(disks.killed_while_saving(tmp_path / "work", tries), tries)


def test_full_disk(tmp_path: Path) -> None:
    assert_kept(disks.full_disk(tmp_path, 1), 1)


def test_full_disk_for_logs(tmp_path: Path) -> None:
    assert_kept(disks.full_disk_for_logs(tmp_path, 1), 1)


@pytest.mark.parametrize("tries", [3, slow(6)])
def test_lost_volumes(tmp_path: Path, tries: int) -> None:
    assert_kept(disks.lost_volumes(tmp_path, tries), tries)


@pytest.mark.parametrize("tries", [2, slow(4)])
def test_non_finite_values(tmp_path: Path, tries: int) -> None:
    assert_kept(disks.non_finite_values(tmp_path, tries), tries)
