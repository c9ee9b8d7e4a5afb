"""Memory: the machine's, or the tightest control group's limit and what it leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.memory import free_memory_bytes, memory_bytes

MIB = 2**20
MEMINFO = "MemTotal: 9000 kB\nMemAvailable: 8192 kB\nHugePages_Total: 0\n"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def version_2(group: str, limit: str, current: int, cache: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{group}"
    statistics = f"anon 1\nactive_file {cache}\ninactive_file {2 * cache}\nshmem 3\n"
    return {
        f"{folder}memory.max": f"{limit}\n",
        f"{folder}memory.current": f"{current}\n",
        f"{folder}memory.stat": statistics,
    }


def version_1(group: str, limit: int, usage: int, cache: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/memory/{group}"
    return {
        f"{folder}memory.limit_in_bytes": f"{limit}\n",
        f"{folder}memory.usage_in_bytes": f"{usage}\n",
        f"{folder}memory.stat": f"active_file 7\ntotal_active_file {2 * cache}\ntotal_inactive_file {cache}\n",
    }


def machine(group: str = "0::/\n") -> dict[str, str]:
    return {"proc/meminfo": MEMINFO, "proc/self/cgroup": group}


def test_free_memory_is_that_of_this_machine() -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert MIB < free_memory_bytes() <= physical


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param({}, id="no control groups"),
        pytest.param(version_2("", "max", 5 * MIB), id="no limit"),
        pytest.param(version_2("", str(100 * MIB), 5 * MIB), id="a limit above the machine's memory"),
        pytest.param({"sys/fs/cgroup/memory.max": f"{MIB}\n"}, id="a limit without a usage"),
    ],
)
def test_without_a_tighter_limit_it_is_the_machines(tmp_path: Path, groups: dict[str, str]) -> None:
    assert free_memory_bytes(write(tmp_path, machine() | groups)) == 8 * MIB


def test_a_container_of_version_2_leaves_its_limit_less_what_is_not_page_cache(tmp_path: Path) -> None:
    root = write(tmp_path, machine() | version_2("", str(6 * MIB), 5 * MIB, cache=MIB))
    assert free_memory_bytes(root) == 4 * MIB


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    files = machine("0::/slurm/job_1/task_0\n")
    files |= version_2("slurm/job_1/task_0/", "max", MIB) | version_2("slurm/job_1/", str(5 * MIB), 2 * MIB)
    files |= version_2("slurm/", str(7 * MIB), 2 * MIB)
    assert free_memory_bytes(write(tmp_path, files)) == 3 * MIB
    write(tmp_path, version_2("slurm/", str(4 * MIB), 2 * MIB))
    assert free_memory_bytes(tmp_path) == 2 * MIB


def test_groups_of_version_1_count_their_descendants_page_cache(tmp_path: Path) -> None:
    files = machine("5:cpuset:/docker/ab\n4:cpu,memory:/docker/ab\n0::/\n")
    files |= version_1("docker/ab/", 6 * MIB, 5 * MIB, cache=MIB) | version_1("", 2**63 - 4096, 0)
    assert free_memory_bytes(write(tmp_path, files)) == 4 * MIB


def test_a_container_whose_group_is_mounted_as_the_root_is_limited_too(tmp_path: Path) -> None:
    files = machine("4:memory:/docker/not/visible/here\n") | version_1("", 3 * MIB, MIB)
    assert free_memory_bytes(write(tmp_path, files)) == 2 * MIB


def test_a_group_above_its_limit_has_nothing_left(tmp_path: Path) -> None:
    assert free_memory_bytes(write(tmp_path, machine() | version_2("", str(MIB), 2 * MIB))) == 0


def test_memory_is_the_machines_or_the_lowest_limit_whatever_is_used(tmp_path: Path) -> None:
    assert memory_bytes() > MIB
    assert memory_bytes(write(tmp_path / "machine", machine())) == 9000 * 1024
    limited = machine("0::/a/b\n") | version_2("a/", str(6 * MIB), 5 * MIB) | version_2("a/b/", "max", MIB)
    assert memory_bytes(write(tmp_path / "limited", limited)) == 6 * MIB
