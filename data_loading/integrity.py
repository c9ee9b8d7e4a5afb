"""Checks that a preprocessed folder is still what preprocessing wrote: quickly by file stamps, or by MD5s.

A stamp is [bytes, modification time in ns]. Preprocessing records each file's stamp beside its MD5; a file whose stamp
is unchanged has not been written since and need not be read. A file with another stamp (copied, touched, damaged) is
hashed once, and its new stamp is recorded in `verified.json`. Damage that leaves the stamp unchanged, such as a flipped
bit on the disk, is found only by `preprocess_dataset.py --mode verify`.
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

from common.errors import UserError
from common.progress import track
from data_loading.dataset import case_file, case_files, find_index
from data_loading.index import INDEX_NAME, CaseRecord, read_index, write_json
from data_loading.preprocessing import Shape

T = TypeVar("T")
Stamp = list[int]

# {file: stamp} of files that were hashed after preprocessing and found intact.
VERIFIED_NAME = "verified.json"
# hashlib releases the GIL; with more threads the disk is the limit.
HASH_THREADS = 8
# The .npy header of our arrays has 128 bytes; other writers may need more.
MAX_HEADER_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class FileCheck:
    """Facts about a folder's files known without opening them.

    Attributes:
        sizes: bytes of each file, by name.
        changed: files with an unknown stamp, whose MD5 must be compared.
        without_digest: number of files without a recorded MD5: all files of a folder that the MLPerf reference wrote.
        shapes: (D, H, W) of the cases whose shape the index records.
    """

    sizes: dict[str, int]
    changed: list[str]
    without_digest: int
    shapes: dict[str, Shape]


def check_files(data_dir: Path, cases: Sequence[str]) -> FileCheck:
    """Checks that every file of these cases exists and has a plausible size; opens none.

    It may therefore run before MLPerf's clock starts.

    Raises:
        UserError: files are missing or have an impossible size; the message names the first and counts the others.
    """
    index = find_index(data_dir)
    stamps = {path.name: file_stamp(path) for case in cases for path in case_files(data_dir, case)}
    _raise_if_any(data_dir, [name for name, stamp in stamps.items() if not stamp], "missing")
    sizes = {name: stamp[0] for name, stamp in stamps.items()}
    records = {case: index.cases[case] for case in cases if case in index.cases} if index else {}
    recorded = recorded_stamps(records)
    wrong = [name for name, stamp in recorded.items() if stamp[0] != sizes[name]]
    _raise_if_any(data_dir, wrong, "truncated or overwritten, its size differs from what preprocessing wrote")
    voxel_bytes = 4 * index.spec.channels if index else 4
    for case in cases:
        image, label = (path.name for path in case_files(data_dir, case))
        # An image has `voxel_bytes` per byte of its label; an interrupted copy leaves one of them too small.
        if not sizes[label] or abs(sizes[image] - voxel_bytes * sizes[label]) > voxel_bytes * MAX_HEADER_BYTES:
            raise UserError(
                f"{data_dir / image}: its {sizes[image]} bytes and the {sizes[label]} of {label} cannot hold the "
                "same number of voxels; run preprocess_dataset.py again"
            )
    digests = recorded_digests(records)
    verified = _read_verified(data_dir)
    changed = [name for name in digests if stamps[name] not in (recorded.get(name), verified.get(name))]
    shapes = {case: record.transform.shape for case, record in records.items() if record.transform}
    return FileCheck(sizes=sizes, changed=changed, without_digest=len(sizes) - len(digests), shapes=shapes)


def _raise_if_any(data_dir: Path, names: Sequence[str], problem: str) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise UserError(
            f"{data_dir / names[0]}: {problem}{more}; run preprocess_dataset.py again (--mode verify names every "
            "such file)"
        )


def verify_changed(data_dir: Path, names: Sequence[str]) -> None:
    """Hashes files (those of `check_files(…).changed`) and records the stamps of the intact ones for the next run.

    It reads the volumes, so it must not run before MLPerf's clock starts. Several processes may do it at once.

    Raises:
        UserError: a file's content differs from what preprocessing wrote; the message names the first and counts the
            others.
    """
    if not names:
        return
    records = read_index(data_dir / INDEX_NAME).cases
    digests = recorded_digests(records)
    # Taken before the files are read: a file that changes meanwhile no longer has the recorded stamp.
    stamps = {name: file_stamp(data_dir / name) for name in names}
    with ThreadPoolExecutor(HASH_THREADS) as threads:
        hashing = threads.map(lambda name: file_md5(data_dir / name), names)
        found = list(track(hashing, len(names), "MD5 of changed files", "file"))
    damaged = [name for name, md5 in zip(names, found, strict=True) if md5 != digests.get(name)]
    record_verified(data_dir, records, {name: stamp for name, stamp in stamps.items() if name not in damaged})
    _raise_if_any(data_dir, damaged, "content differs from what preprocessing wrote")


def record_verified(data_dir: Path, records: Mapping[str, CaseRecord], stamps: Mapping[str, Stamp]) -> None:
    """Records the stamps of files that were found intact, unless they are recorded already."""
    recorded = recorded_stamps(records)
    known = _read_verified(data_dir)
    new = {name: stamp for name, stamp in stamps.items() if stamp not in (recorded.get(name), known.get(name))}
    if new:
        with suppress(OSError):  # a read-only folder: the next run hashes them again
            write_json(data_dir / VERIFIED_NAME, known | new)


def _read_verified(data_dir: Path) -> dict[str, Stamp]:
    """Returns {file: stamp} as recorded by earlier runs, {} if the file is missing or damaged."""
    try:
        content = json.loads((data_dir / VERIFIED_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def file_stamp(path: Path) -> Stamp:
    """Returns [bytes, modification time in ns], [] for a missing file. Raises UserError if it cannot be read."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return [status.st_size, status.st_mtime_ns]


def _by_file(case: str, by_kind: Mapping[str, T]) -> Iterator[tuple[str, T]]:
    """Yields (file name, value) for the values of "x" and "y"."""
    return ((case_file(Path(), case, kind).name, by_kind[kind]) for kind in "xy" if kind in by_kind)


class FileWatch:
    """Detects files that changed or vanished since the watch began.

    Args:
        paths: files to check; one that is missing from the start must stay missing.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        # As strings: os.stat is slower on a Path.
        self._seen = [(path, _status(path)) for path in map(str, paths)]

    def check(self) -> None:
        """Raises UserError if a file vanished or changed."""
        for path, before in self._seen:
            if (now := _status(path)) != before:
                what = "changed while training, its data cannot be trusted" if now else "vanished while training"
                raise UserError(f"{path}: {what}; run preprocess_dataset.py again, then start again with --resume")


def _status(path: str) -> tuple[int, int, int] | None:
    """Returns (bytes, modification time in ns, inode) of a file; None if it cannot be read."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def recorded_digests(records: Mapping[str, CaseRecord]) -> dict[str, str]:
    """Returns {file: MD5} of an index's cases."""
    return {name: md5 for case, record in records.items() for name, md5 in _by_file(case, record.digests)}


def recorded_stamps(records: Mapping[str, CaseRecord]) -> dict[str, Stamp]:
    """Returns {file: stamp after preprocessing} of an index's cases."""
    return {name: stamp for case, record in records.items() for name, stamp in _by_file(case, record.stamps)}


def split_digest(data_dir: Path, split: Mapping[str, Sequence[str]]) -> str:
    """Identifies a run's data: SHA-256 of a split (subsets of cases, in order) and its files' recorded MD5s.

    A folder that the reference wrote has no recorded MD5s; there it covers the split only.
    """
    index = find_index(data_dir)
    records = index.cases if index else {}
    used = {case: records[case] for cases in split.values() for case in cases if case in records}
    content = json.dumps([sorted(split.items()), fingerprint(recorded_digests(used))])
    return hashlib.sha256(content.encode()).hexdigest()


def recorded_md5s(data_dir: Path, cases: Sequence[str]) -> dict[str, str]:
    """Returns {file: MD5} of these cases' files as recorded, reading none; {} if one is not recorded."""
    index = find_index(data_dir)
    records = index.cases if index else {}
    digests = recorded_digests({case: records[case] for case in cases if case in records})
    return digests if len(digests) == 2 * len(cases) else {}


def fingerprint(digests: Mapping[str, str]) -> str:
    """Returns the SHA-256 over the lines `md5  name`, sorted by name: one value for a whole set of files."""
    lines = "".join(f"{md5}  {name}\n" for name, md5 in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_md5(path: Path) -> str:
    """Returns the MD5 of a file, read in pieces of 1 MiB. Raises UserError if it cannot be read."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()
