"""Shared by the suites on data: synthetic preprocessed folders, and control of the page cache."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Options
from data_loading.dataset import case_file, map_case
from data_loading.index import INDEX_NAME, CaseRecord, DatasetIndex, write_json
from data_loading.phantom import make_phantom
from data_loading.preprocessing import Boxes, Shape, foreground_boxes, normalise
from data_loading.pytorch_loader import CropDataset
from data_loading.spec import KITS19

MB = 1e6
READ_BYTES = 1 << 22


def worker_count(options: Options) -> int:
    """Number of loader processes: as requested, or else one per core."""
    return (os.cpu_count() or 1) if options.num_workers is None else options.num_workers


def write_patients(folder: Path, count: int, shape: Shape) -> list[str]:
    """Writes a preprocessed folder of phantoms of `shape` (D, H, W) voxels, each with two kidneys and a tumour.

    Returns:
        The case ids.
    """
    records = dict(write_patient(folder, shape, number) for number in range(count))
    write_index(folder, records)
    return list(records)


def write_patient(folder: Path, shape: Shape, number: int) -> tuple[str, CaseRecord]:
    """Writes one phantom; returns its case id and its entry in the index."""
    image, mask = make_phantom(0, number, shape)
    case = f"case_{number:05d}"
    boxes = foreground_boxes(mask.array, len(KITS19.classes))
    return case, save_case(
        folder, case, image=normalise(image.array.astype(np.float32), KITS19), label=mask.array, boxes=boxes
    )


def save_case(
    folder: Path, case: str, image: NDArray[np.float32], label: NDArray[np.uint8], boxes: Boxes
) -> CaseRecord:
    """Saves image (C, D, H, W) and label (1, D, H, W) and flushes them to disk, so that `drop_caches` can drop them.

    Returns:
        The case's entry in the index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("x", image), ("y", label)):
        with case_file(folder, case, kind).open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
    # No suite needs a digest, a source or statistics.
    return CaseRecord(
        transform=None,
        boxes=boxes,
        digests={},
        source_stamp=[[0, 0], [0, 0]],
        statistics={"mean": 0.0, "std": 1.0},
    )


def write_index(folder: Path, records: Mapping[str, CaseRecord]) -> None:
    """Writes `dataset.json` with every case in the training split."""
    split: dict[str, list[str]] = {"train": list(records), "evaluation": []}
    write_json(folder / INDEX_NAME, DatasetIndex(spec=KITS19, split=split, cases=dict(records)).to_json())


class RemappingDataset(CropDataset):
    """Maps its volumes again for each sample: the system cannot drop pages that a process keeps mapped."""

    def open_case(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        return map_case(self.data_dir, self.cases[index])


def files_of(folder: Path, cases: Iterable[str]) -> list[Path]:
    """The image and label files of the cases."""
    return [case_file(folder, case, kind) for case in dict.fromkeys(cases) for kind in "xy"]


def drop_caches(files: Iterable[Path]) -> bool:
    """Asks the kernel to drop its cached pages of files that are on disk and not mapped; root is not needed.

    Returns:
        False if the system has no such call. The kernel may also ignore it; `disk_bytes_read` shows whether it did.
    """
    # `getattr`: macOS's os has neither.
    advise, forget = getattr(os, "posix_fadvise", None), getattr(os, "POSIX_FADV_DONTNEED", None)
    if advise is None or forget is None:
        return False
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            advise(descriptor, 0, 0, forget)
        finally:
            os.close(descriptor)
    return True


def read_through(files: Iterable[Path]) -> int:
    """Reads every file once, which leaves them in the page cache as far as memory allows; returns the bytes read."""
    total = 0
    buffer = bytearray(READ_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return total


def disk_bytes_read(processes: Iterable[int] = ()) -> int | None:
    """Bytes that the disk has delivered for this process and others of this user, including read-ahead.

    Unlike the disk's own count (/proc/diskstats), it leaves out what strangers read meanwhile.

    Args:
        processes: their ids, such as those of a loader's workers.

    Returns:
        None if the system does not count, or one of the processes has ended.
    """
    try:
        return sum(_bytes_read(name) for name in ("self", *map(str, processes)))
    except (OSError, KeyError, ValueError):
        return None


def _bytes_read(process: str) -> int:
    fields: dict[str, Any] = dict(
        line.split(": ") for line in Path("/proc", process, "io").read_text(encoding="ascii").splitlines()
    )
    return int(fields["read_bytes"])
