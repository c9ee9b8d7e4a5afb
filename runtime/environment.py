"""The environment of a run: versions, device, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


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
    """Returns the project's commit, with "+changes" if the tree is modified; None outside a git checkout."""
    project = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(project), "describe", "--always", "--abbrev=40", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
