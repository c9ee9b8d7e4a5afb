"""Files: replaced atomically, so that a reader always finds a whole one, old or new; numbered; found; and names."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; it replaces `path` at the end, or is deleted if an error is raised.

    Raises:
        OSError: the folder cannot be written or the disk is full; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rotate(files: Sequence[Path]) -> None:
    """Renames an earlier run's files to the first number that is free for all of them: log.jsonl to log.1.jsonl.

    Raises:
        OSError: the folder cannot be written.
    """
    number = 1
    while any(_numbered(file, number).exists() for file in files):
        number += 1
    for file in files:
        if file.exists():
            file.rename(_numbered(file, number))


def _numbered(file: Path, number: int) -> Path:
    return file.with_name(f"{file.stem}.{number}{file.suffix}")


def files_below(folder: Path) -> list[Path]:
    """Returns the files in a folder and its subfolders, sorted; links are followed, each folder once.

    Raises:
        UserError: a subfolder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}")

    seen: set[str] = set()
    found: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [path for path in (Path(root, name) for name in names) if path.is_file()]
    return sorted(found)


def normalised(name: str) -> str:
    """Returns a name with composed accents: file systems and keyboards differ in how they write é."""
    return unicodedata.normalize("NFC", name)
