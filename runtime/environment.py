"""The environment of a run: versions, device, commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROJECT = Path(__file__).resolve().parents[1]
# What git neither tracks nor ignores, but a run may import. Not the code that `submission pack` has copied into a
# result folder, nor packages of a virtual environment: neither is this project's code.
UNTRACKED_CODE = (
    "*.py",
    ":(exclude,glob)**/benchmarks/unet3d/implementations/**",
    ":(exclude,glob)**/site-packages/**",
)
# Digits of the digest of the changes, as many as in git's short names.
CHANGES_DIGITS = 7


def describe_environment(device: torch.device, ranks: int) -> dict[str, Any]:
    """Returns versions, processors and commit as plain values for the log."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "numpy": np.__version__,
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": ranks,
        "commit": commit(),
    }


def platform_name(device: torch.device, ranks: int) -> str:
    """Returns the default of `--submission_platform`, such as "8xNVIDIA H200"."""
    return f"{ranks}x{torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name()}"


def cpu_name() -> str:
    """Returns the processor's model name, or its architecture if the system has no name for it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """Returns the project's commit, with "+changes-" and a digest of the changes if there are any.

    Changes are those of tracked files and the Python files that git neither tracks nor ignores: a run may import them.

    Returns:
        None: outside a git checkout, or git does not answer.
    """
    try:
        name = _git("describe", "--always", "--abbrev=40").decode().strip()
        # Full names of the contents, so that changed binary files count too; the user's own tools must not alter it.
        changes = _git("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--full-index", "HEAD")
        untracked = _git("ls-files", "--others", "--exclude-standard", "-z", "--", *UNTRACKED_CODE)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    if not changes and not untracked:
        return name
    digest = hashlib.sha256(changes)
    for path in filter(None, untracked.split(b"\0")):
        digest.update(b"\0" + path + b"\0")
        with suppress(OSError):  # deleted meanwhile, or unreadable: its name counts
            digest.update(hashlib.sha256((PROJECT / os.fsdecode(path)).read_bytes()).digest())
    return f"{name}+changes-{digest.hexdigest()[:CHANGES_DIGITS]}"


def _git(*arguments: str) -> bytes:
    """Returns the output of a git command on the project, which leaves the checkout's locks alone."""
    command = ["git", "--no-optional-locks", "-C", str(PROJECT), *arguments]
    return subprocess.run(command, capture_output=True, check=True, timeout=10).stdout
