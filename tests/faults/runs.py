"""The real program as processes that faults are injected into, and what is compared afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from benchmarks.data import save_case
from data_loading.index import INDEX_NAME, DatasetIndex, write_json
from data_loading.preprocessing import foreground_boxes
from data_loading.spec import DatasetSpec
from runtime.checkpoint import format as checkpoints

PROJECT = Path(__file__).resolve().parents[2]
SPEC = DatasetSpec(name="balls", classes=("background", "bright", "brighter"))
# Two resolutions and small windows: a step takes milliseconds, so that many faults fit into minutes.
TINY = (
    *("--model", "unet3d(filters=(4,8))"),
    *("--input_shape", "16", "16", "16", "--val_input_shape", "16", "16", "16"),
    *("--seed", "7", "--learning_rate", "0.3", "--quality_threshold", "1", "--batch_size", "1"),
)
# A process has to import torch first, on a machine with other work to do.
START_S = 120.0


def write_balls(folder: Path, train: int = 12, evaluation: int = 3) -> Path:
    """A preprocessed folder: noisy volumes with a bright ball (1) and a brighter one (2)."""
    rng = np.random.default_rng(0)
    records = {}
    for number in range(train + evaluation):
        shape = [int(n) for n in rng.integers(16, 26, 3)]
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"))
        label = np.zeros((1, *shape), np.uint8)
        for value in (1, 2):
            centre = rng.uniform(4, np.array(shape) - 4)
            label[0][((grid - centre[:, None, None, None]) ** 2).sum(0) < 16] = value
        image = (label + rng.normal(0, 0.1, label.shape)).astype(np.float32)
        boxes = foreground_boxes(label, len(SPEC.classes))
        records[f"ball_{number:02}"] = save_case(folder, f"ball_{number:02}", image=image, label=label, boxes=boxes)
    names = list(records)
    split = {"train": names[evaluation:], "evaluation": names[:evaluation]}
    write_json(folder / INDEX_NAME, DatasetIndex(spec=SPEC, split=split, cases=records).to_json())
    return folder


class Run:
    """`main.py` on one rank or several, each a process of this one, without a launcher.

    Args:
        log_dir: of the run; what the ranks say goes to files beside it.
        program: what is started instead of `main.py`, to inject a fault from inside.
        limit_bytes: the length at which the system lets no file grow any more.
        settings: environment variables.
    """

    def __init__(
        self,
        data: Path,
        log_dir: Path,
        *arguments: object,
        ranks: int = 1,
        program: Sequence[str] = ("main.py",),
        limit_bytes: int | None = None,
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        self.log_dir = log_dir
        self._output = [log_dir / f"rank_{rank}.txt" for rank in range(ranks)]
        command = [sys.executable, *program, "--data_dir", str(data), "--log_dir", str(log_dir), *TINY]
        command += map(str, arguments)
        port = free_port()
        self.started_at = time.time()
        self.ranks: list[subprocess.Popen[bytes]] = []
        self._told: list[subprocess.Popen[bytes]] = []
        for rank, output in enumerate(self._output):
            # One thread a process: ranks that spin for each other's cores take minutes for seconds' work.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            if ranks > 1:
                environment |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": "localhost",
                    "MASTER_PORT": str(port),
                }
            with output.open("w") as stream:
                # What it says passes through another process, for which the limit on files does not hold.
                told = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=stream)
            limits = ["prlimit", f"--fsize={limit_bytes}"] if limit_bytes else []
            self.ranks.append(
                subprocess.Popen(
                    [*limits, *command],
                    cwd=PROJECT,
                    env=environment | dict(settings),
                    stdout=told.stdin,
                    stderr=subprocess.STDOUT,
                    preexec_fn=_take_ctrl_c,
                )
            )
            assert told.stdin is not None
            told.stdin.close()
            self._told.append(told)

    def output(self, rank: int = 0) -> str:
        return self._output[rank].read_text(encoding="utf-8", errors="replace")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """What the run's JSON lines hold of that kind so far; a line that is still being written is left out."""
        path = self.log_dir / "log.jsonl"
        # Another run's file until this one has opened its own.
        if not path.exists() or path.stat().st_mtime < self.started_at:
            return []
        found = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event["event"] == kind and event["time_s"] >= self.started_at:
                found.append(event)
        return found

    def wait_for(self, kind: str, count: int = 1, timeout_s: float = START_S) -> None:
        """Until so many events of a kind are logged, or a rank has ended."""
        deadline = time.monotonic() + timeout_s
        while len(self.events(kind)) < count and all(rank.poll() is None for rank in self.ranks):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {count} {kind} in {timeout_s:.0f} s:\n{self.output()}")
            time.sleep(0.02)

    def signal(self, number: int, *ranks: int) -> None:
        """Sends a signal to some ranks, or to all."""
        for rank in ranks or range(len(self.ranks)):
            if self.ranks[rank].poll() is None:
                self.ranks[rank].send_signal(number)

    def wait(self, timeout_s: float = START_S) -> list[int]:
        """The ranks' exit statuses (-n after signal n); those that do not end in time are killed, with status 999."""
        deadline = time.monotonic() + timeout_s
        statuses = []
        for rank in self.ranks:
            try:
                statuses.append(rank.wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
                statuses.append(999)
        for told in self._told:
            told.wait(10)
        return statuses

    def kill(self) -> list[int]:
        """Ends every rank at once, as a power cut would."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def last_line(self, rank: int = 0) -> str:
        return next((line for line in reversed(self.output(rank).splitlines()) if line.strip()), "")


def _take_ctrl_c() -> None:
    """A shell in the background has its programs ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def history(log_dir: Path) -> dict[str, Any]:
    """Every loss and score that the run's processes logged, by epoch.

    Raises:
        AssertionError: two processes logged different numbers for one epoch.
    """
    found: dict[str, Any] = {}
    for path in sorted(log_dir.glob("log*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # cut by a kill
                continue
            if event["event"] == "EpochStopped":
                told = {f"loss {event['epoch']}": [event["loss"], event["learning_rate"]]}
            elif event["event"] == "EvaluationStopped":
                told = {f"dice {event['epoch']}": [event["mean_dice"], event["loss"], event["per_case"]]}
            else:
                continue
            for key, value in told.items():
                assert found.setdefault(key, value) == value, f"{key}: {found[key]} and then {value}"
    return found


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs that should have ended alike: logged numbers, the last checkpoint; [] if equal."""
    try:
        logs = history(one), history(other)
    except AssertionError as error:
        return [f"logged twice: {error}"]
    found = [f"logged {key}" for key in sorted(set(logs[0]) | set(logs[1])) if logs[0].get(key) != logs[1].get(key)]
    states = [vars(checkpoints.load(folder / "checkpoint.pth")) for folder in (one, other)]
    for name in (
        "seed",
        "data",
        "best",
        "last",
        "best_epoch",
        "last_epoch",
        "best_dice",
        "batch",
        "evaluated",
        "optimizer",
        "scaler",
    ):
        if not is_same(states[0][name], states[1][name]):
            found.append(f"checkpoint's {name}")
    return found


def is_same(one: Any, other: Any) -> bool:
    """Bit for bit, tensors in dicts and lists included."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)
