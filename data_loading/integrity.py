"""Whether a preprocessed folder still is what preprocessing wrote: at once by its files' stamps, or by their MD5s.

A stamp is [bytes, time of the last change in ns]. Preprocessing records each file's beside its MD5; a file that still
has its stamp was not written since and need not be read. One that has another (copied, touched, damaged) is hashed
once, and its new stamp kept in a file of the folder. What changes no stamp, a bit that flips on the disk, only
`preprocess_dataset.py --mode verify` finds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from common.errors import UserError
from data_loading.dataset import case_file, case_files, find_index
from data_loading.index import INDEX_NAME, CaseRecord, read_index, write_json
from data_loading.preprocessing import Shape

T = TypeVar("T")
Stamp = list[int]

# SHA-256 over the lines "md5  name\n", sorted by name, of MLPerf's published digests of KiTS19: all 420 files, the
# 210 images alone, the 210 labels alone.
MLPERF_FINGERPRINTS = {
    "whole set": ("xy", "e7c2853b7ae3dee118170eff39211ffae5a173c95198f31e309c47dcc843abb5"),
    "images": ("x", "8ffb9335306084bc961dc60e200c883483dcc74928ea2169cbae617bbc397934"),
    "labels": ("y", "0d9b03e033b3914ceeb8d4662f6e5127785c7525a4dd9f327b58ed73f3e4402e"),
}
MLPERF_CASES = 210

# {file: stamp} of those that were hashed since preprocessing, and were good.
VERIFIED_NAME = "verified.json"
# hashlib lets other threads run meanwhile; with more of them a disk is what one waits for.
READERS = 8
# A .npy header has 128 bytes for our arrays; one of another writer may have more.
LONGEST_HEADER = 1024


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """What a folder's files look like from outside.

    Attributes:
        sizes: bytes of each file, by its name.
        changed: files whose stamp is not the one of a known content: their MD5 must be compared.
        without_digest: files whose MD5 nobody recorded; all of them in a folder that the MLPerf reference wrote.
        shapes: (D, H, W) of the cases whose shape the index tells.
    """

    sizes: dict[str, int]
    changed: list[str]
    without_digest: int
    shapes: dict[str, Shape]


def check_files(data_dir: Path, cases: Sequence[str]) -> FileCheck:
    """Asks after every file of these cases and opens none, so that it may come before MLPerf's clock starts.

    Raises:
        UserError: files are missing, or of a size that cannot be right; it names the first and counts them.
    """
    index = find_index(data_dir)
    stamps = {path.name: file_stamp(path) for case in cases for path in case_files(data_dir, case)}
    _refuse(data_dir, [name for name, stamp in stamps.items() if not stamp], "missing")
    sizes = {name: stamp[0] for name, stamp in stamps.items()}
    records = {case: index.cases[case] for case in cases if case in index.cases} if index else {}
    recorded = recorded_stamps(records)
    wrong = [name for name, stamp in recorded.items() if stamp[0] != sizes[name]]
    _refuse(data_dir, wrong, "cut off or overwritten, its size is not what preprocessing wrote")
    voxel_bytes = 4 * index.spec.channels if index else 4
    for case in cases:
        image, label = (path.name for path in case_files(data_dir, case))
        # An image has so many times its label's voxels' bytes; a copy that broke off leaves one of them too short.
        if not sizes[label] or abs(sizes[image] - voxel_bytes * sizes[label]) > voxel_bytes * LONGEST_HEADER:
            raise UserError(
                f"{data_dir / image}: its {sizes[image]} bytes and the {sizes[label]} of {label} cannot be of the same "
                "voxels; run preprocess_dataset.py again"
            )
    digests = recorded_digests(records)
    good = _read_verified(data_dir)
    changed = [name for name in digests if stamps[name] not in (recorded.get(name), good.get(name))]
    shapes = {case: record.transform.shape for case, record in records.items() if record.transform}
    return FileCheck(sizes=sizes, changed=changed, without_digest=len(sizes) - len(digests), shapes=shapes)


def _refuse(data_dir: Path, names: Sequence[str], problem: str) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise UserError(
            f"{data_dir / names[0]}: {problem}{more}; run preprocess_dataset.py again (--mode verify names every "
            "such file)"
        )


def verify_changed(data_dir: Path, names: Sequence[str]) -> None:
    """Hashes these files (those of `check_files(…).changed`), and keeps the good ones' stamps for the next run.

    It reads the volumes: not before MLPerf's clock runs. Several processes may do it at once: each finds the same.

    Raises:
        UserError: a file's content is not what preprocessing wrote; it names the first and counts them.
    """
    if not names:
        return
    records = read_index(data_dir / INDEX_NAME).cases
    digests = recorded_digests(records)
    # Before they are read: who changes a file meanwhile leaves it another stamp than the one that is kept.
    stamps = {name: file_stamp(data_dir / name) for name in names}
    with ThreadPoolExecutor(READERS) as readers:
        hashing = readers.map(lambda name: file_md5(data_dir / name), names)
        found = list(tqdm(hashing, "MD5 of changed files", len(names), unit="file", disable=None))
    damaged = [name for name, md5 in zip(names, found, strict=True) if md5 != digests.get(name)]
    keep_verified(data_dir, records, {name: stamp for name, stamp in stamps.items() if name not in damaged})
    _refuse(data_dir, damaged, "its content is not what preprocessing wrote")


def keep_verified(data_dir: Path, records: Mapping[str, CaseRecord], stamps: Mapping[str, Stamp]) -> None:
    """Remembers that the files had the content of their records under these stamps, where the records have others."""
    recorded = recorded_stamps(records)
    known = _read_verified(data_dir)
    new = {name: stamp for name, stamp in stamps.items() if stamp not in (recorded.get(name), known.get(name))}
    if new:
        with suppress(OSError):  # a read-only folder: the next run hashes them again
            write_json(data_dir / VERIFIED_NAME, known | new)


def _read_verified(data_dir: Path) -> dict[str, Stamp]:
    """What an earlier run kept, {} where there is nothing or it is damaged."""
    try:
        content = json.loads((data_dir / VERIFIED_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def file_stamp(path: Path) -> Stamp:
    """[bytes, time of the last change in ns], [] of a file that is missing. Raises UserError when nobody can say."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return [status.st_size, status.st_mtime_ns]


def _by_file(case: str, of_kinds: Mapping[str, T]) -> Iterator[tuple[str, T]]:
    """What a record keeps for "x" and "y", by the files' names."""
    return ((case_file(Path(), case, kind).name, of_kinds[kind]) for kind in "xy" if kind in of_kinds)


class FileWatch:
    """Notices that files are no longer what they were when the watch began.

    Args:
        paths: asked after by `check`; one that is missing already counts as it is.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        # As text: os.stat takes longer over a Path.
        self._seen = [(path, _status(path)) for path in map(str, paths)]

    def check(self) -> None:
        """Raises UserError where a file vanished or changed."""
        for path, before in self._seen:
            if (now := _status(path)) != before:
                what = "changed while training, nothing of it can be trusted" if now else "vanished while training"
                raise UserError(f"{path}: {what}; run preprocess_dataset.py again, then start again with --resume")


def _status(path: str) -> tuple[int, int, int] | None:
    """What changes with a file's content or when another takes its place; None where there is none to be had."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def recorded_digests(records: Mapping[str, CaseRecord]) -> dict[str, str]:
    """{file: MD5} of an index's cases."""
    return {name: md5 for case, record in records.items() for name, md5 in _by_file(case, record.digests)}


def recorded_stamps(records: Mapping[str, CaseRecord]) -> dict[str, Stamp]:
    """{file: stamp when preprocessing had written it} of an index's cases."""
    return {name: stamp for case, record in records.items() for name, stamp in _by_file(case, record.stamps)}


def split_digest(data_dir: Path, split: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 of the split (subsets of cases in their order) and its files' recorded MD5s: which data a run trains on.

    Of a folder that the reference wrote, whose MD5s nobody recorded, it is the split's alone.
    """
    index = find_index(data_dir)
    records = index.cases if index else {}
    used = {case: records[case] for cases in split.values() for case in cases if case in records}
    content = json.dumps([sorted(split.items()), fingerprint(recorded_digests(used))])
    return hashlib.sha256(content.encode()).hexdigest()


def recorded_fingerprint(data_dir: Path, cases: Sequence[str]) -> str:
    """The fingerprint of these cases' files by their recorded MD5s, none of them read; "" where one has none."""
    index = find_index(data_dir)
    records = index.cases if index else {}
    digests = recorded_digests({case: records[case] for case in cases if case in records})
    return fingerprint(digests) if len(digests) == 2 * len(cases) > 0 else ""


def fingerprint(digests: Mapping[str, str]) -> str:
    """SHA-256 over the lines `md5  name`, sorted by name: one figure for a whole set of files."""
    lines = "".join(f"{md5}  {name}\n" for name, md5 in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_md5(path: Path) -> str:
    """MD5 of a file, read in pieces of 1 MiB. Raises UserError when it cannot be read."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()
