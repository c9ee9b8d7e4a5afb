"""Runs preprocess_dataset.py in process, and compares the folders that it writes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

import preprocess_dataset
from data_loading.integrity import check_files
from preprocess_dataset import main

ROOT = Path(preprocess_dataset.__file__).resolve().parent


PROGRAM = "preprocess_dataset.py"


IDS = (0, 1, 2)  # the first is one of MLPerf's evaluation cases


F32 = np.float32


WriteRaw = Callable[..., Path]


RunPython = Callable[..., subprocess.CompletedProcess[str]]


def preprocess(raw: Path, out: Path, *more: object) -> None:
    arguments = ["--data_dir", raw, "--results_dir", out, "--num_workers", 1, *more]
    assert main(list(map(str, arguments))) == 0


def verify(out: Path, *more: object) -> int:
    return main(["--mode", "verify", "--results_dir", str(out), *map(str, more)])


def contents(folder: Path) -> dict[str, bytes]:
    """Returns every file; the index without its stamps, which hold the time of writing, and without its digest."""
    dated = re.compile(rb'"stamps": {.*?}|"digest": "\w+"', re.DOTALL)
    return {path.name: dated.sub(b"", path.read_bytes()) for path in folder.iterdir()}


def to_hash(folder: Path) -> list[str]:
    return check_files(folder, [f"case_{number:05d}" for number in IDS]).changed


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}


def redone(folder: Path, before: dict[str, int]) -> set[str]:
    """Returns the files written since."""
    return {name for name, written in times(folder).items() if before.get(name) != written}


def flip_byte(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x55
    path.write_bytes(content)
