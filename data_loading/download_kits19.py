"""Downloads KiTS19: the scans and masks of its 210 labelled cases, as `preprocess_dataset.py` reads them.

    python3 -m data_loading.download_kits19 --results_dir RAW --accept_licence
    python3 -m data_loading.download_kits19 --results_dir RAW --accept_licence --cases 0-9 41 --mirror http://HOST/kits19
    python3 -m data_loading.download_kits19 --list_urls

It can be interrupted at any time and started again: complete files are not fetched again, parts are continued. The
SHA-256 of every file is in `RAW/download.json`. Needs `pip install '.[download]'`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import registry
from common.cli import Parser, number
from common.errors import UserError, run_program
from common.files import replacing
from common.messages import logger
from common.progress import make_progress

# The owners' publication of the scans (2026) and of the masks, each at one revision, so that files never change.
IMAGES_URL = (
    "https://huggingface.co/datasets/neheller/KiTS-Challenge-Imaging/resolve/"
    "65f1f295a873326230153c7e1de0c7dba10f0b29/images/{case}.nii.gz"
)
MASKS_URL = (
    "https://raw.githubusercontent.com/neheller/kits19/"
    "456b293435b25303bbc7995f094f83a0afdff0eb/data/{case}/segmentation.nii.gz"
)
LICENCE = (
    "KiTS19 is licensed CC BY-NC-SA 4.0 (https://creativecommons.org/licenses/by-nc-sa/4.0/): not for commercial use"
)
# Later cases of KiTS19 have no published masks of this data set.
CASES = 210
MANIFEST_NAME = "download.json"
LOCK_NAME = ".download.lock"
# After this many files that failed the others would most likely fail as well.
MAX_FAILED_FILES = 3


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file to download: its name in the results folder, and where it comes from."""

    name: str
    url: str


def sources(cases: Sequence[int], mirror: str = "") -> list[Source]:
    """Returns the scan and the mask of each case.

    Args:
        mirror: base URL of a copy with the layout of the results folder; "": the owners' publication.
    """
    listed = []
    for case in (f"case_{each:05d}" for each in cases):
        for name, url in (("imaging", IMAGES_URL), ("segmentation", MASKS_URL)):
            path = f"{case}/{name}.nii.gz"
            listed.append(Source(name=path, url=f"{mirror.rstrip('/')}/{path}" if mirror else url.format(case=case)))
    return listed


def parse_cases(text: str) -> range:
    """Converts `23` or `0-209`."""
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a case or a range such as 0-209")
    found = range(int(first), int(last if dash else first) + 1)
    if not found or found[-1] >= CASES:
        raise argparse.ArgumentTypeError(f"{text}: KiTS19's labelled cases are 0-{CASES - 1}")
    return found


class Manifest:
    """`download.json`: SHA-256, length, modification time and URL of every complete file. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / MANIFEST_NAME
        self._lock = threading.Lock()
        self._files: dict[str, dict[str, Any]] = {}
        try:
            files = json.loads(self._path.read_text(encoding="utf-8"))["files"]
            self._files = {name: record for name, record in files.items() if {"sha256", "stamp"} <= record.keys()}
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.warning(f"{self._path}: damaged; the files are checked again")

    def record(self, name: str) -> dict[str, Any] | None:
        return self._files.get(name)

    def is_current(self, name: str) -> bool:
        """Returns whether the file was not written since it was recorded; opens nothing."""
        record, path = self.record(name), self._folder / name
        return record is not None and path.exists() and record["stamp"] == self._stamp(path)

    def add(self, source: Source, sha256: str) -> None:
        """Records a complete file."""
        with self._lock:
            self._files[source.name] = {
                "sha256": sha256,
                "stamp": self._stamp(self._folder / source.name),
                "url": source.url,
            }
            with replacing(self._path) as temporary:
                temporary.write_text(json.dumps({"files": dict(sorted(self._files.items()))}, indent=1) + "\n")

    @staticmethod
    def _stamp(path: Path) -> list[int]:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns]


class Download:
    """Downloads files into a folder, several at once.

    Args:
        http: the module `data_loading.http_download`, which needs an optional package.
    """

    def __init__(self, folder: Path, http: Any) -> None:
        self._folder = folder
        self._http = http
        self._manifest = Manifest(folder)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.bytes = self.fetched = 0
        self.failures: list[str] = []

    def run(self, files: Sequence[Source], num_workers: int) -> None:
        """Fetches what is missing or damaged.

        Raises:
            UserError: files could not be fetched; those that are complete, and parts, are kept.
            OSError: the disk is full, or the folder cannot be written.
        """
        self._clean()
        todo = [source for source in files if not self._manifest.is_current(source.name)]
        progress = make_progress(len(todo), "download", "file")
        started_at = time.monotonic()
        with ThreadPoolExecutor(num_workers) as pool:
            pending = {pool.submit(self._get, source) for source in todo}
            try:
                while pending:
                    done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                    rate = self.bytes / max(time.monotonic() - started_at, 1e-9)
                    progress.set_postfix_str(f"{self.bytes / 1e9:.2f} GB, {rate / 1e6:.1f} MB/s")
                    progress.update(len(done))
                    for finished in done:
                        self._check(finished)
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                progress.close()
        if self.failures:
            more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
            raise UserError(f"{self.failures[0]}{more}; run the same command again, what has arrived is kept")

    def _clean(self) -> None:
        """Deletes what a killed download left beside files and their parts."""
        orphans = [facts for facts in self._folder.rglob("*.part.json") if not facts.with_suffix("").exists()]
        for stale in [*self._folder.rglob(".*.json.*.tmp"), *orphans]:
            stale.unlink(missing_ok=True)

    def _check(self, finished: Future[None]) -> None:
        """Notes a failed file, and stops after `MAX_FAILED_FILES`."""
        try:
            finished.result()
        except UserError as error:
            self.failures.append(str(error))
            if len(self.failures) >= MAX_FAILED_FILES:
                raise UserError(
                    f"{error}; stopped after {MAX_FAILED_FILES} files that failed; run the same command again, what "
                    "has arrived is kept"
                ) from None
            logger.warning(str(error))

    def _get(self, source: Source) -> None:
        path = self._folder / source.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if self._http.is_intact(path, self._manifest.record(source.name)):
                self._manifest.add(source, self._http.file_sha256(path))
                return
            logger.warning(f"{path}: damaged or changed since it was downloaded; fetched again")
        sha256 = self._http.fetch(source.url, path, self._stop, self._count)
        self._manifest.add(source, sha256)
        with self._lock:
            self.fetched += 1

    def _count(self, size: int) -> None:
        with self._lock:
            self.bytes += size


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keeps a second download out of the folder. Raises UserError if one is running."""
    with (folder / LOCK_NAME).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--results_dir {folder}: another download into it is running") from None
        except OSError:  # a file system without locks
            pass
        yield


def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    files = sources(sorted({case for cases in options.cases for case in cases}), options.mirror)
    if options.list_urls:
        print("\n".join(f"{source.url}\t{source.name}" for source in files))
        return 0
    if options.results_dir is None:
        raise UserError("--results_dir is missing: the folder for the files")
    if not options.accept_licence:
        raise UserError(f"{LICENCE}; give --accept_licence if you agree")
    registry.load("data_loading.http_download:fetch", "download_kits19", "download")
    from data_loading import http_download

    logger.info(LICENCE)
    folder: Path = options.results_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder):
            download = Download(folder, http_download)
            download.run(files, options.num_workers)
    except OSError as error:
        raise UserError(
            f"--results_dir {folder}: {error.strerror or error}; make room or choose another folder, then run the same "
            "command again: what has arrived is kept"
        ) from None
    print(
        f"{len(files)} files in {folder}: {download.fetched} fetched ({download.bytes / 1e9:.2f} GB), "
        f"{len(files) - download.fetched} already there; SHA-256 of each in {folder / MANIFEST_NAME}"
    )
    return 0


def make_parser() -> Parser:
    """Returns the command line."""
    parser = Parser(prog="download_kits19", description="Downloads KiTS19's 210 labelled cases.", allow_abbrev=False)
    add = parser.add_argument
    add("--results_dir", type=Path, metavar="PATH", help="folder for case_00000/{imaging,segmentation}.nii.gz …")
    add("--accept_licence", action="store_true", help=f"agree to the licence. {LICENCE}")
    add(
        "--cases",
        type=parse_cases,
        nargs="+",
        metavar="N[-M]",
        default=[range(CASES)],
        help=f"cases, such as 0-9 41 (default: 0-{CASES - 1})",
    )
    add("--num_workers", type=number(int, 1, 64), metavar="N", default=4, help="files at a time (default: 4)")
    add("--mirror", metavar="URL", default="", help="fetch URL/case_00000/imaging.nii.gz … instead")
    add("--list_urls", action="store_true", help="print each URL and its file name, for another tool; fetch nothing")
    return parser


if __name__ == "__main__":
    sys.exit(run_program(main, "download_kits19"))
