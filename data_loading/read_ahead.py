"""Reads a crop of memory-mapped volumes from a cold disk: the crop's own planes, requested all at once.

Copied from a map whose pages are not in memory, a crop costs far more than itself: at each missing page the kernel
reads the disk's whole `read_ahead_kb` (128 KiB to 8 MiB) around it, beyond the crop's rows, one request at a time.
"""

from __future__ import annotations

import mmap
import resource
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A crop is tried at 3 x 3 voxels of (D, H). One read earlier leaves a box in memory, so the corners find what a crop
# that overlaps it lacks; the others find pages that were dropped since. More would slow down warm reads.
PROBES = 3
# Other threads' faults do not count, where the system can tell (Linux).
WHOSE_FAULTS = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
CAN_ADVISE = all(hasattr(mmap, f"MADV_{name}") for name in ("RANDOM", "NORMAL", "WILLNEED"))


def read_ahead(crops: Sequence[NDArray[Any]]) -> bool:
    """Has the disk read the crops' planes, all at once, if some of the first is not in memory; changes no value.

    Args:
        crops: each (C, D, H, W), a view of a memory-mapped volume in C order; nothing is done for other arrays. They
            are read together, such as image and label, so that the first stands for all.

    Returns:
        Whether it did.
    """
    maps = [_map_of(crop) for crop in crops]
    if maps[0] is None or not CAN_ADVISE or not _misses_pages(crops[0], maps[0]):
        return False
    for crop, mapped in zip(crops, maps, strict=True):
        if mapped is not None:
            _request(crop, mapped)
    return True


def _map_of(array: NDArray[Any]) -> mmap.mmap | None:
    """The memory map of which an array is a view; None if it is in ordinary memory."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def _misses_pages(crop: NDArray[Any], mapped: mmap.mmap) -> bool:
    """Whether one of the probed voxels had to come from the disk: reading it was a major page fault.

    `mincore` would not do: in files that belong to another user it reports every page as present.
    """
    planes, rows = crop.shape[1:3]
    at_rows = [n * (rows - 1) // (PROBES - 1) for n in range(PROBES)]
    # Without read-ahead, so that a probe reads one page. Not kept: Linux would drop such pages from memory first.
    mapped.madvise(mmap.MADV_RANDOM)
    try:
        before = resource.getrusage(WHOSE_FAULTS).ru_majflt
        for n in range(PROBES):
            plane = n * (planes - 1) // (PROBES - 1)
            for row in at_rows:
                crop.item(0, plane, row, 0)
            if resource.getrusage(WHOSE_FAULTS).ru_majflt != before:
                return True
        return False
    finally:
        mapped.madvise(mmap.MADV_NORMAL)


def _request(crop: NDArray[Any], mapped: mmap.mmap) -> None:
    """Asks for each plane of each channel, from the crop's first row to its last: rows are about a page apart."""
    for first, length in plane_spans(crop, _address(np.frombuffer(mapped, np.uint8))):
        mapped.madvise(mmap.MADV_WILLNEED, first, length)


def plane_spans(crop: NDArray[Any], base: int) -> list[tuple[int, int]]:
    """Returns the first byte and the number of bytes of each plane's rows, from the start of a page.

    Args:
        crop: (C, D, H, W) with contiguous rows.
        base: the address of the map, which is that of a page.
    """
    start = _address(crop) - base
    rows, columns = crop.shape[2:]
    length = (rows - 1) * crop.strides[2] + columns * crop.itemsize
    spans = []
    for channel in range(crop.shape[0]):
        for plane in range(crop.shape[1]):
            first = start + channel * crop.strides[0] + plane * crop.strides[1]
            spans.append((first - first % mmap.PAGESIZE, length + first % mmap.PAGESIZE))
    return spans


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
