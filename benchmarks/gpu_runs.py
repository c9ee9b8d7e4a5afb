"""Whole runs of `main.py`: killed and resumed, and training on synthetic patients with the closed division's recipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import write_index, write_patient, write_patients
from benchmarks.gpu_checks import checked
from benchmarks.harness import Options, Table, environment_of_runs
from benchmarks.scaling import PROJECT
from common.errors import UserError
from runtime.checkpoint import format as checkpoints

TIMEOUT_S = 120
# Training on synthetic patients: at least a whole batch of the recipe.
PATIENTS, PATIENT_SHAPE = 32, (144, 176, 176)
TRAINING_S = 300
# Rows of the loss curve.
POINTS = 8


def start(options: Options, log_dir: Path, arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Starts `main.py`; its output goes to `log_dir`.out."""
    command = [sys.executable, "main.py", "--log_dir", str(log_dir), "--no_report", *arguments]
    environment = environment_of_runs(options.device)
    with log_dir.with_suffix(".out").open("a") as output:
        return subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )


def finish(process: subprocess.Popen[str], log_dir: Path, statuses: Sequence[int] = (0,)) -> None:
    """Waits for a run's end. Raises UserError with its last line if it fails."""
    try:
        status = process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise UserError(f"main.py did not end within {TIMEOUT_S} s") from None
    if status not in statuses:
        lines = log_dir.with_suffix(".out").read_text().strip().splitlines() or ["no output"]
        raise UserError(f"main.py exited with {status}: {lines[-1]}")


def events(log_dir: Path, name: str) -> list[dict[str, Any]]:
    """The events of this name in a run's log, as far as it is written."""
    path = log_dir / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # the last line, still being written
            break
        if event["event"] == name:
            found.append(event)
    return found


def resumed(options: Options) -> Table:
    """A run that is killed and resumed, compared with one that is not, bit for bit."""
    data = options.work_dir / "resumed_data"
    write_patients(data, 6, (40, 48, 56))
    settings = (
        "--input_shape 32 32 32 --val_input_shape 32 32 32 --batch_size 2 --epochs 12 --loader device --amp "
        "--layout NDHWC --seed 1 --cudnn_deterministic --ckpt_every 1e --learning_rate 0.1"
    )
    arguments = [*settings.split(), "--data_dir", str(data), "--model", "unet3d(filters=(8,16,32))"]
    whole, broken = options.work_dir / "whole", options.work_dir / "broken"
    processes = [start(options, whole, arguments), start(options, broken, arguments)]
    deadline = time.monotonic() + TIMEOUT_S
    while len(events(broken, "EpochStopped")) < 4 and processes[1].poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    processes[1].kill()
    processes[1].wait()
    finish(processes[0], whole)
    at = len(events(broken, "EpochStopped"))
    finish(start(options, broken, [*arguments, "--resume"]), broken)
    ends = [checkpoints.load(folder / "checkpoint.pth").state("last")[0] for folder in (whole, broken)]
    differing = [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])]
    losses = [events(folder, "EpochStopped")[-1]["loss"] for folder in (whole, broken)]
    rows: list[list[object]] = [
        ["killed during epoch", at + 1, "ok" if at < 12 else "the run had ended"],
        ["tensors that differ at the end", len(differing), "ok" if not differing else "WRONG"],
        [
            f"loss of the last epoch: {losses[1]}, without the kill {losses[0]}",
            "",
            "ok" if losses[0] == losses[1] else "WRONG",
        ],
    ]
    return checked("Killed and resumed", rows, ["SIGKILL; --cudnn_deterministic."], ["what", "value", "verdict"])


def to_target(options: Options) -> Table:
    """The single-GPU recipe of the closed division on synthetic patients for a few minutes: loss and samples/s."""
    data, log_dir = options.work_dir / "patients_data", options.work_dir / "target"
    count, shape = (4, (40, 40, 40)) if options.quick else (PATIENTS, PATIENT_SHAPE)
    data.mkdir()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        write_index(data, dict(pool.map(partial(write_patient, data, shape), range(count))))
    arguments = ["@recipes/kits19_1xgpu.args", "--data_dir", str(data), "--seed", "1", "--ckpt_every", "never"]
    if options.quick:
        small = "--batch_size 2 --input_shape 32 32 32 --val_input_shape 32 32 32 --epochs 3"
        arguments += [*small.split(), "--model", "unet3d(filters=(4,8))"]
    process = start(options, log_dir, arguments)
    deadline = time.monotonic() + min(TIMEOUT_S, options.seconds_left())
    while not events(log_dir, "RunStarted") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    limit = time.monotonic() + min(TRAINING_S, options.seconds_left())
    while process.poll() is None and time.monotonic() < limit:
        time.sleep(0.1)
    is_running = process.poll() is None and bool(events(log_dir, "RunStarted"))
    process.send_signal(signal.SIGTERM if is_running else signal.SIGKILL)
    if not is_running and process.wait(TIMEOUT_S) == -signal.SIGKILL:
        raise UserError("the run was not ready in the time that was left")
    finish(process, log_dir, (0, 128 + signal.SIGTERM))
    epochs = events(log_dir, "EpochStopped")
    if len(epochs) < 2:
        raise UserError(f"{len(epochs)} epochs were completed in the time that was left; a loss curve needs two")
    started = events(log_dir, "RunStarted")[0]["time_s"]
    every = max(1, len(epochs) // POINTS)
    rows: list[list[object]] = []
    for index in range(every - 1, len(epochs), every):
        own = epochs[max(0, index - every + 1) : index + 1]
        rate = sum(e["samples"] for e in own) / sum(e["seconds"] for e in own)
        mean = sum(e["loss"] for e in own) / len(own)
        rows.append([own[-1]["epoch"], own[-1]["time_s"] - started, own[-1]["learning_rate"], mean, rate])
    columns = ["up to epoch", "s since the start", "learning rate", "mean loss", "samples/s"]
    notes = [
        f"recipes/kits19_1xgpu.args on {count} synthetic patients of {' x '.join(map(str, shape))} voxels; the loader "
        "crops and augments; each row averages the epochs since the one above."
    ]
    finite = all(e["loss"] == e["loss"] and abs(e["loss"]) < 1e9 for e in epochs)
    problem = "" if finite and rows[-1][3] < rows[0][3] else "To a target: the loss does not fall"  # type: ignore[operator]
    return Table("To a target", columns, rows, notes, problem=problem)
