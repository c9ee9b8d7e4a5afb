"""Runs of the real program in processes of its own to inject faults into, and comparison of their results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
from tests import programs

PROJECT = programs.ROOT
SPEC = DatasetSpec(name="balls", classes=("background", "bright", "brighter"))
# Two resolutions and small windows: a step takes milliseconds, so that many runs take only minutes.
TINY = (
    *("--model", "unet3d(filters=(4,8))"),
    *("--input_shape", "8", "8", "8", "--val_input_shape", "16", "16", "16"),
    *("--seed", "7", "--learning_rate", "0.3", "--quality_threshold", "1", "--batch_size", "1", "--no_report"),
)
# Includes the import of torch on a busy machine.
START_S = 120.0


def write_balls(folder: Path, train: int = 12, evaluation: int = 3) -> Path:
    """Writes a preprocessed folder of noisy volumes with a bright ball (1) and a brighter one (2)."""
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
    """`main.py` on one or several ranks, each a child process, without a launcher.

    Args:
        log_dir: log folder of the run; the output of each rank is written to `rank_N.txt` in it.
        program: replacement for `main.py` that injects a fault from inside the process.
        limit_bytes: largest permitted size of a file.
        environment: additional environment variables.
    """

    def __init__(
        self,
        data: Path,
        log_dir: Path,
        *arguments: object,
        ranks: int = 1,
        program: Sequence[str] = ("main.py",),
        limit_bytes: int | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        log_dir.mkdir(parents=True, exist_ok=True)
        self.log_dir = log_dir
        self._output = [log_dir / f"rank_{rank}.txt" for rank in range(ranks)]
        command = [*program, "--data_dir", str(data), "--log_dir", str(log_dir), *TINY, *map(str, arguments)]
        variables = programs.rank_variables(ranks) if ranks > 1 else [{}]
        self.started_at = time.time()
        self.ranks: list[programs.Started | subprocess.Popen[bytes]] = []
        self._writers: list[subprocess.Popen[bytes]] = []
        for output, of_rank in zip(self._output, variables, strict=True):
            output.write_text("")
            if limit_bytes is None:
                self.ranks.append(programs.start(*command, out=output, environment={**of_rank, **environment}))
            else:
                rank, writer = _start_limited(command, output, limit_bytes)
                self.ranks.append(rank)
                self._writers.append(writer)

    def output(self, rank: int = 0) -> str:
        return self._output[rank].read_text(encoding="utf-8", errors="replace")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Returns the events of a kind that the run has logged so far; ignores a line that is still being written."""
        path = self.log_dir / "log.jsonl"
        # Until this run opens its log, the file is that of an earlier run.
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

    def wait_for(self, kind: str, count: int = 1) -> None:
        """Waits until `count` events of a kind are logged or a rank has ended. Raises TimeoutError after START_S."""
        self._wait_until(lambda: len(self.events(kind)) >= count, f"no {count} {kind}")

    def wait_for_line(self, text: str, rank: int = 0) -> None:
        """Waits until a rank has printed the text.

        Raises:
            TimeoutError: it has not after START_S.
            RuntimeError: a rank ended before.
        """
        self._wait_until(lambda: text in self.output(rank), f"rank {rank} did not print {text!r}")
        if text not in self.output(rank):
            self.kill()
            raise RuntimeError(f"a rank ended before rank {rank} printed {text!r}:\n{self.output(rank)}")

    def _wait_until(self, has_happened: Callable[[], bool], problem: str) -> None:
        deadline = time.monotonic() + START_S
        while not has_happened() and all(rank.poll() is None for rank in self.ranks):
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{problem} in {START_S:.0f} s:\n{self.output()}")
            time.sleep(0.02)

    def signal(self, number: int, *ranks: int) -> None:
        """Sends a signal to the given ranks, by default to all."""
        for rank in ranks or range(len(self.ranks)):
            if self.ranks[rank].poll() is None:
                self.ranks[rank].send_signal(number)

    def wait(self, timeout_s: float = START_S) -> list[int]:
        """Returns the ranks' exit statuses: -n after signal n, 999 for a rank that was killed after the timeout."""
        deadline = time.monotonic() + timeout_s
        statuses = []
        for rank in self.ranks:
            try:
                statuses.append(rank.wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
                statuses.append(999)
        for writer in self._writers:  # the output is complete once they have ended
            writer.wait(10)
        return statuses

    def kill(self) -> list[int]:
        """Ends every rank at once, as a power failure does."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def last_line(self, rank: int = 0) -> str:
        return next((line for line in reversed(self.output(rank).splitlines()) if line.strip()), "")


def _start_limited(
    command: Sequence[str], output: Path, limit_bytes: int
) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
    """Starts a new interpreter that can write no file larger than the limit; returns it and what writes its output."""
    with output.open("w") as stream:
        # The output passes through another process, to which the limit does not apply.
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=stream)
    assert writer.stdin is not None
    with writer.stdin:
        limited = subprocess.Popen(
            ["prlimit", f"--fsize={limit_bytes}", sys.executable, *command],
            cwd=PROJECT,
            env={**os.environ, **programs.THREADS},
            stdout=writer.stdin,
            stderr=subprocess.STDOUT,
        )
    return limited, writer


def history(log_dir: Path) -> dict[str, Any]:
    """Returns every loss and score that all processes of a run logged, by epoch.

    Raises:
        AssertionError: two processes logged different values for one epoch.
    """
    found: dict[str, Any] = {}
    for path in sorted(log_dir.glob("log*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except ValueError:  # cut by a kill
                continue
            if event["event"] == "EpochStopped":
                values = {f"loss {event['epoch']}": [event["loss"], event["learning_rate"]]}
            elif event["event"] == "EvaluationStopped":
                values = {f"dice {event['epoch']}": [event["mean_dice"], event["loss"], event["per_case"]]}
            else:
                continue
            for key, value in values.items():
                assert found.setdefault(key, value) == value, f"{key}: {found[key]} and then {value}"
    return found


def differences(one: Path, other: Path) -> list[str]:
    """Lists the differences between the logged values and last checkpoints of two runs; empty if they are equal."""
    try:
        logs = history(one), history(other)
    except AssertionError as error:
        return [f"logged twice: {error}"]
    found = [f"logged {key}" for key in sorted(set(logs[0]) | set(logs[1])) if logs[0].get(key) != logs[1].get(key)]
    states = [vars(checkpoints.load(folder / "checkpoint.pth")) for folder in (one, other)]
    names = ("seed", "data", "best", "last", "best_epoch", "last_epoch", "best_dice", "batch", "evaluated")
    for name in (*names, "optimizer", "scaler"):
        if not is_same(states[0][name], states[1][name]):
            found.append(f"checkpoint's {name}")
    return found


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are equal bit for bit, including tensors in dicts and lists."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)
