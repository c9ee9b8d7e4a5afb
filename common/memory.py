"""Host memory: the machine's, or a control group's limit and what is left of it (containers, Slurm, systemd)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

CONTROL_GROUPS = "sys/fs/cgroup"
# Names in a memory group's folder: limit, usage, and the prefix of the keys in `memory.stat`.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
VERSION_2 = ("memory.max", "memory.current", "")


def memory_bytes(root: Path = Path("/")) -> int:
    """Returns the memory that this process may use, free or not: the machine's, or its control groups' lowest limit.

    Args:
        root: the folder of `proc` and `sys`.
    """
    total = _read_table(root / "proc/meminfo").get("MemTotal:")
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if total is None else total * 1024
    return min([physical, *(group.limit for group in _groups(root))])


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Returns the memory that this process can still get without swapping.

    On Linux it is MemAvailable, or the least that is left in one of the control groups of which this process is a
    member: the kernel ends a process that asks for more. Elsewhere it is all physical memory.

    Args:
        root: the folder of `proc` and `sys`.
    """
    available = _read_table(root / "proc/meminfo").get("MemAvailable:")
    if available is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([available * 1024, *(group.limit - group.used for group in _groups(root))]))


class Group(NamedTuple):
    """A memory group's limit and usage in bytes, the page cache not included, which gives way."""

    limit: int
    used: int


def _groups(root: Path) -> Iterator[Group]:
    """Yields each memory group with a limit, of either version, from this process's own upwards."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            folder, names = root / CONTROL_GROUPS / "memory", VERSION_1
        elif not controllers:
            folder, names = root / CONTROL_GROUPS, VERSION_2
        else:
            continue
        # A container sees its own group as the root, whatever the path says: groups that do not exist are passed over.
        path = PurePosixPath(group.lstrip("/"))
        for part in (path, *path.parents):
            found = _read_group(folder / part, *names)
            if found is not None:
                yield found


def _read_group(folder: Path, limit_name: str, usage_name: str, prefix: str) -> Group | None:
    """Reads a group's folder; returns None if it has no limit."""
    limit, usage = _read(folder / limit_name).strip(), _read(folder / usage_name).strip()
    if not (limit.isdecimal() and usage.isdecimal()):  # "max" in version 2
        return None
    statistics = _read_table(folder / "memory.stat")
    page_cache = sum(statistics.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return Group(int(limit), int(usage) - page_cache)


def _read(path: Path) -> str:
    """Returns a file's text; "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _read_table(path: Path) -> dict[str, int]:
    """Returns a file's lines `name number …` as a dictionary."""
    words = [line.split() for line in _read(path).splitlines()]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}
