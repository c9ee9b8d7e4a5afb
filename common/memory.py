"""Free host memory: the machine's, or what is left of a control group's limit (containers, Slurm, systemd)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CONTROL_GROUPS = "sys/fs/cgroup"
# Names in a memory group's folder: limit, usage, and the prefix of the keys in `memory.stat`.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
VERSION_2 = ("memory.max", "memory.current", "")


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
    return max(0, min([available * 1024, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yields the bytes left in each memory group with a limit, of either version, from this process's own upwards."""
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
            left = _left(folder / part, *names)
            if left is not None:
                yield left


def _left(folder: Path, limit_name: str, usage_name: str, prefix: str) -> int | None:
    """Returns a group's limit less its usage, the page cache not included, which gives way; None without a limit."""
    limit, usage = _read(folder / limit_name).strip(), _read(folder / usage_name).strip()
    if not (limit.isdecimal() and usage.isdecimal()):  # "max" in version 2
        return None
    statistics = _read_table(folder / "memory.stat")
    page_cache = sum(statistics.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return int(limit) - int(usage) + page_cache


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
