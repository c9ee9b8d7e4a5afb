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

# A crop is probed at 3 x 3 voxels of (D, H). One read earlier leaves a box in memory, so the corners find what a crop
# that overlaps it lacks; the others find pages that were dropped since.
PROBES = 3
# Probing takes 1 to 2 % of a warm sample's time, so after as many samples without a page from the disk it stops.
PROBED_SAMPLES = 64
# Other threads' faults do not count, where the system can tell (Linux).
WHOSE_FAULTS = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
CAN_ADVISE = all(hasattr(mmap, f"MADV_{name}") for name in ("RANDOM", "NORMAL", "WILLNEED"))


class ReadAhead:
    """Requests crops that are not in memory before they are copied; changes no value.

    It probes the first samples of a process. Later ones are probed again once a major page fault has shown that some
    page came from the disk: such a sample was read the kernel's way, the next ones are not.
    """

    def __init__(self) -> None:
        self._to_probe = PROBED_SAMPLES
        self._faults = _major_faults()

    def request(self, crops: Sequence[NDArray[Any]]) -> bool:
        """Has the disk read the crops' planes, all at once, if the first is found not to be in memory.

        Args:
            crops: each (C, D, H, W), a view of a memory-mapped volume in C order; nothing is done for other arrays.
                They are read together, such as image and label, so that the first stands for all.

        Returns:
            Whether it did.
        """
        if not CAN_ADVISE:
            return False
        if _major_faults() != self._faults:
            self._to_probe = PROBED_SAMPLES
        is_cold = False
        if self._to_probe:
            mapped = map_of(crops[0])
            is_cold = mapped is not None and _misses_pages(crops[0], mapped)
            self._to_probe = PROBED_SAMPLES if is_cold else self._to_probe - 1
        if is_cold:
            for crop in crops:
                if mapped := map_of(crop):
                    for first, length in plane_spans(crop, _address(np.frombuffer(mapped, np.uint8))):
                        mapped.madvise(mmap.MADV_WILLNEED, first, length)
        self._faults = _major_faults()
        return is_cold


def map_of(array: NDArray[Any]) -> mmap.mmap | None:
    """The memory map of which an array is a view; None if it is in ordinary memory."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def plane_spans(crop: NDArray[Any], base: int) -> list[tuple[int, int]]:
    """Returns the first byte and the number of bytes of each plane, from the start of a page.

    A span goes from the crop's first row to its last: rows are about a page apart, so little lies between them.

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


def _misses_pages(crop: NDArray[Any], mapped: mmap.mmap) -> bool:
    """Whether one of the probed voxels had to come from the disk: reading it was a major page fault.

    `mincore` would not do: in files that belong to another user it reports every page as present.
    """
    planes, rows = crop.shape[1:3]
    at_rows = [n * (rows - 1) // (PROBES - 1) for n in range(PROBES)]
    # Without read-ahead, so that a probe reads one page. Not kept: Linux would drop such pages from memory first.
    mapped.madvise(mmap.MADV_RANDOM)
    try:
        before = _major_faults()
        for n in range(PROBES):
            plane = n * (planes - 1) // (PROBES - 1)
            for row in at_rows:
                crop.item(0, plane, row, 0)
            if _major_faults() != before:
                return True
        return False
    finally:
        mapped.madvise(mmap.MADV_NORMAL)


def _major_faults() -> int:
    return resource.getrusage(WHOSE_FAULTS).ru_majflt


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
