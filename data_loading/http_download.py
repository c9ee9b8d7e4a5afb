"""Fetches gzip files over HTTP so that neither a cut connection nor a kill loses what has arrived.

A file grows as `NAME.part`, and `NAME.part.json` says what it is a part of; it gets its name when its length is that of
the server and its gzip stream is intact to the end. A part is continued only if the server confirms that the file has
not changed (If-Range); otherwise it starts over.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from threading import Event
from typing import Any

import requests
import urllib3

from common.errors import UserError, one_line
from common.files import replacing

# A file is given up after this many failures in a row without a new byte: with the waits below, after a minute.
ATTEMPTS = 6
FIRST_WAIT_S = 1.0  # doubled with every failure
LONGEST_RETRY_AFTER_S = 600.0
TIMEOUT_S = 30.0  # without a byte, or without a connection
# On a slow line (64 KB/s) a request to stop is noticed within a second.
CHUNK_BYTES = 1 << 16
# Request Timeout, Too Early, Too Many Requests; and every 5xx.
TRANSIENT_STATUSES = {408, 425, 429}


class Stopped(Exception):  # noqa: N818 - a request, not an error
    """The caller asked to stop; what has arrived is kept."""


class _Failure(Exception):  # noqa: N818 - handled here
    """An attempt failed, and another may succeed.

    Args:
        message: one line.
        wait_s: how long the server asked to wait; None if it did not.
    """

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _Part:
    """The part of a file that has arrived, and what the server said about the file.

    Attributes:
        total: bytes of the whole file; None if the server did not say.
        validator: strong ETag or date of the file, with which the part can be continued; "" for none.
        sha256: of the whole file; "" if the server did not say.
        furthest: the largest size that the part has had, before it perhaps started over.
    """

    def __init__(self, url: str, path: Path) -> None:
        self.path = path.with_name(f"{path.name}.part")
        self._facts_path = path.with_name(f"{path.name}.part.json")
        self._url, self._target = url, path
        self.total: int | None = None
        self.validator = self.sha256 = ""
        self.furthest = self.size
        try:
            facts = json.loads(self._facts_path.read_text(encoding="utf-8"))
            if facts["url"] == url:
                self.total, self.validator, self.sha256 = facts["total"], facts["validator"], facts["sha256"]
        except (OSError, ValueError, TypeError, KeyError):
            pass  # without facts it is not continued

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def is_complete(self) -> bool:
        return bool(self.validator) and self.total is not None and self.size == self.total

    def restart(self, response: requests.Response) -> None:
        """Empties the part and records what the response says about the file."""
        self.path.write_bytes(b"")
        etag = response.headers.get("ETag", "")
        self.validator = response.headers.get("Last-Modified", "") if etag.startswith("W/") or not etag else etag
        length = response.headers.get("Content-Length", "")
        self.total = int(length) if length.isdecimal() else None
        # Hugging Face redirects to its store, and names the file's SHA-256 in the redirecting response.
        linked = [hop.headers.get("X-Linked-ETag", "").strip('"') for hop in [*response.history, response]]
        self.sha256 = next((each for each in linked if re.fullmatch("[0-9a-f]{64}", each)), "")
        facts = {"url": self._url, "total": self.total, "validator": self.validator, "sha256": self.sha256}
        with replacing(self._facts_path) as temporary:
            temporary.write_text(json.dumps(facts), encoding="utf-8")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._facts_path.unlink(missing_ok=True)
        self.total, self.validator, self.sha256 = None, "", ""

    def finish(self) -> str:
        """Gives the file its name and returns its SHA-256; discards a damaged part and raises `_Failure`."""
        problem, found = gzip_problem(self.path), file_sha256(self.path)
        if not problem and self.sha256 not in ("", found):
            problem = f"its SHA-256 is {found}, where the server names {self.sha256}"
        if problem:
            self.discard()
            raise _Failure(f"what arrived is damaged: {problem}")
        with self.path.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(self.path, self._target)
        self._facts_path.unlink(missing_ok=True)
        return found


def fetch(url: str, path: Path, stop: Event, on_bytes: Callable[[int], object]) -> str:
    """Fetches a gzip file, as often as it takes, and returns its SHA-256.

    Args:
        path: gets the file when it is complete and intact; its folder exists.
        stop: ends the transfer; a later call continues it.
        on_bytes: called with the number of bytes of each piece that arrives.

    Raises:
        UserError: the server refuses, or the file did not arrive intact in `ATTEMPTS` attempts.
        OSError: the disk is full, or the folder cannot be written; what has arrived is kept.
        Stopped: `stop` was set.
    """
    part = _Part(url, path)
    failures = 0
    while True:
        before = part.furthest
        try:
            if not part.is_complete:
                _receive(url, part, stop, on_bytes)
            return part.finish()
        except _Failure as failure:
            failures = 1 if part.furthest > before else failures + 1
            if failures >= ATTEMPTS:
                raise UserError(f"{url}: {failure} ({failures} attempts without progress)") from None
            wait_s = FIRST_WAIT_S * 2 ** (failures - 1) if failure.wait_s is None else failure.wait_s
            if wait_s > LONGEST_RETRY_AFTER_S:
                raise UserError(f"{url}: {failure}, and the server asks to wait {wait_s:.0f} s") from None
            stop.wait(wait_s)


def _receive(url: str, part: _Part, stop: Event, on_bytes: Callable[[int], object]) -> None:
    """Makes one request and appends what arrives. Raises `_Failure` unless the file is complete afterwards."""
    # Stored bytes: a server must not compress them again, nor requests decompress them.
    headers = {"Accept-Encoding": "identity"}
    offset = part.size if part.validator else 0
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": part.validator}
    if stop.is_set():
        raise Stopped
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
            _check_status(response, part)
            if response.status_code == HTTPStatus.PARTIAL_CONTENT:
                _check_range(response, part, offset)
            else:
                part.restart(response)
            with part.path.open("ab") as stream:
                for piece in response.raw.stream(CHUNK_BYTES, decode_content=False):
                    stream.write(piece)
                    part.furthest = max(part.furthest, stream.tell())
                    on_bytes(len(piece))
                    if stop.is_set():
                        raise Stopped
    except ValueError as error:  # requests: the URL cannot be one
        raise UserError(f"{url}: {one_line(error)}") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _Failure(f"the connection failed: {_cause(error)}") from None
    if part.total is not None and part.size != part.total:
        found, total = part.size, part.total
        if found > total:
            part.discard()
        raise _Failure(f"{found} bytes arrived, where the server announced {total}")


def _check_status(response: requests.Response, part: _Part) -> None:
    """Raises `_Failure` for a page in place of the file or a status that may change, UserError for any other status."""
    status = response.status_code
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        if response.headers.get("Content-Type", "").startswith("text/html"):  # must not replace what has arrived
            raise _Failure("the server sends a web page, not the file")
        return
    answer = f"the server answers {status} {response.reason}"
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        part.discard()
        raise _Failure(answer)
    if status in TRANSIENT_STATUSES or status >= 500:
        raise _Failure(answer, _retry_after_s(response.headers.get("Retry-After", "")))
    raise UserError(f"{response.url}: {answer}")


def _check_range(response: requests.Response, part: _Part, offset: int) -> None:
    """Raises `_Failure` and discards the part if the response does not continue it."""
    content_range = response.headers.get("Content-Range", "")
    expected = f"bytes {offset}-{(part.total or 0) - 1}/{part.total}"
    if not offset or content_range != expected:
        part.discard()
        raise _Failure(f"the server sends the range {content_range!r}, where {expected!r} was asked for")


def _retry_after_s(text: str) -> float | None:
    """Returns the wait that a Retry-After header asks for, in seconds or until a date; None without one."""
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _cause(error: BaseException) -> str:
    """Returns the innermost reason of an error: requests and urllib3 wrap the system's several times."""
    while inner := getattr(error, "reason", None) or next((a for a in error.args if isinstance(a, Exception)), None):
        if not isinstance(inner, Exception):
            break
        error = inner
    return one_line(error)


def gzip_problem(path: Path) -> str:
    """Reads a gzip file to its end, where its checksum is; returns what is wrong with it, "" for nothing."""
    try:
        with gzip.open(path) as stream:
            while stream.read(1 << 20):
                pass
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        return one_line(error)
    return "" if path.stat().st_size else "the file is empty"


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_intact(path: Path, recorded: dict[str, Any] | None) -> bool:
    """Returns whether a file has its recorded SHA-256, or without a record is a whole gzip file."""
    return file_sha256(path) == recorded["sha256"] if recorded else not gzip_problem(path)
