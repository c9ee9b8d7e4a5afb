"""Truncated or damaged checkpoints, full disks, volumes that disappear during a run, and non-finite values."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from common.errors import DIVERGED_EXIT, USER_ERROR_EXIT, UserError
from model.unet3d import Unet3d
from runtime.checkpoint import format as checkpoints
from runtime.checkpoint import resume, writer
from runtime.optimizer import make_optimizer
from runtime.train_state import TrainState
from tests.faults import Row, failed_tries
from tests.faults.runs import Run, differences, history, is_same, write_balls

ARGUMENTS = ("--num_workers", 1, "--start_eval_at", 8, "--evaluate_every", 4, "--ckpt_every", "0.01m")


def _state() -> TrainState:
    torch.manual_seed(0)
    network = Unet3d(1, 3, filters=(4, 8))
    optimizer = make_optimizer("sgd", network.parameters(), 0.1)
    network(torch.ones(1, 1, 8, 8, 8)).sum().backward()
    optimizer.step()
    return TrainState(
        network=network, model=network, optimizer=optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False), epoch=3
    )


def damaged_checkpoints(work_dir: Path, tries: int = 1000, seed: int = 0) -> Row:
    """A checkpoint is cut at a random byte or one to three of its bits are flipped.

    It must be refused, and the previous checkpoint must be found.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / "checkpoint.pth"
    state = _state()
    writer.save(path, checkpoints.snapshot(state, [0.0], config={}, seed=0, data=""))
    older = path.with_name("checkpoint_000000.pth")
    shutil.copy(path, older)
    good = path.read_bytes()
    rng = random.Random(seed)
    failures = []
    slowest = 0.0
    for number in range(tries):
        content = bytearray(good)
        if rng.random() < 0.5:
            del content[rng.randrange(len(good)) :]
            what = f"cut after {len(content)} bytes"
        else:
            bits = [rng.randrange(8 * len(good)) for _ in range(rng.randint(1, 3))]
            for bit in set(bits):
                content[bit // 8] ^= 1 << bit % 8
            what = f"bits {bits} flipped"
        path.write_bytes(content)
        began = time.monotonic()
        try:
            checkpoints.load(path)
            failures.append(f"try {number} ({what}): loaded as good")
        except UserError:
            pass
        # Suppresses a warning about the damaged file per try.
        with _quiet():
            found = resume.newest_intact(path)
        slowest = max(slowest, time.monotonic() - began)
        if found is None or found.path != older or not is_same(found.last, dict(state.network.state_dict())):
            failures.append(f"try {number} ({what}): the previous checkpoint was not found")
    return Row(
        fault="a checkpoint cut or flipped at random",
        promise="refused because of its checksum; --resume names it and uses the previous one",
        test="test_faults.py::test_damaged_checkpoints",
        tried=tries,
        kept=tries - failed_tries(failures),
        seconds=slowest,
        lost="since the previous checkpoint",
        failures=tuple(failures),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Redirects the file descriptor of stderr to /dev/null, for the messages of every library."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def killed_while_saving(work_dir: Path, tries: int = 100, seed: int = 0) -> Row:
    """A process that saves continuously is killed at a random moment; an intact checkpoint must remain."""
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / "checkpoint.pth"
    state = _state()
    content = checkpoints.snapshot(state, [0.0], config={}, seed=0, data="")
    writer.save(path, content, keep=2)
    rng = random.Random(seed)
    failures = []
    for number in range(tries):
        before = resume.newest_intact(path)
        child = os.fork()
        if child == 0:
            saved = before.last_epoch if before else 0
            while True:
                saved += 1
                content["last"]["epoch"] = content["last"]["step"] = saved
                writer.save(path, content, keep=2)
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with _quiet():
            found = resume.newest_intact(path)
        newest = writer.find_checkpoints(path)[0]  # `path`, unless the kill came between two renames
        if before is None or found is None or found.last_epoch < before.last_epoch or found.path != newest:
            failures.append(f"try {number}: {found and found.path} after {before and before.last_epoch} epochs")
        writer.prepare(path)
    left = [file.name for file in work_dir.iterdir() if file.name.endswith(".tmp")]
    failures += [f"left behind: {left}"] if left else []
    return Row(
        fault="SIGKILL while saving",
        promise="the newest checkpoint file is intact: the last one or the previous one",
        test="test_faults.py::test_killed_while_saving",
        tried=tries,
        kept=tries - len(failures),
        lost="nothing that was saved",
        failures=tuple(failures),
    )


def full_disk(work_dir: Path, tries: int = 2) -> Row:
    """The file size limit is below the size of a checkpoint, as on a disk that has filled up since the last save."""
    data = write_balls(work_dir / "data")
    failures = []
    slowest = 0.0
    for number in range(tries):
        log_dir = work_dir / f"try_{number}"
        Run(data, log_dir, *ARGUMENTS, "--epochs", 10).wait()
        before = (log_dir / "checkpoint.pth").read_bytes()
        began = time.monotonic()
        run = Run(data, log_dir, *ARGUMENTS, "--epochs", 20, "--resume", limit_bytes=len(before) * 3 // 4)
        statuses = run.wait()
        slowest = max(slowest, time.monotonic() - began)
        if statuses != [USER_ERROR_EXIT] or "the end of this run is lost" not in run.last_line():
            failures.append(f"try {number}: exit statuses {statuses}: {run.last_line()}")
        if "training goes on" not in run.output() or len(run.events("EpochStopped")) != 10:
            failures.append(f"try {number}: training did not continue:\n{run.output()}")
        if (log_dir / "checkpoint.pth").read_bytes() != before or list(log_dir.glob(".*.tmp")):
            failures.append(f"try {number}: the last good checkpoint was changed, or a temporary file was left")
    return Row(
        fault="disk full while saving",
        promise="a warning; training continues; the last good checkpoint is unchanged; exit status 2 at the end",
        test="test_faults.py::test_full_disk",
        tried=tries,
        kept=tries - failed_tries(failures),
        seconds=slowest,
        lost="since the last checkpoint",
        failures=tuple(failures),
    )


def full_disk_for_logs(work_dir: Path, tries: int = 2) -> Row:
    """The logs cannot grow any more; the run must still reach its end."""
    data = write_balls(work_dir / "data")
    # No workers: their batches pass through shared memory, to which the file size limit applies as well.
    arguments = (*ARGUMENTS, "--epochs", 12, "--ckpt_every", "never", "--num_workers", 0)
    failures = []
    for number in range(tries):
        whole, full = work_dir / f"whole_{number}", work_dir / f"full_{number}"
        Run(data, whole, *arguments, "--save_ckpt_path", whole / "checkpoint.pth").wait()
        # Enough for the beginning of the logs, but not for the epochs.
        limit = (whole / "log.jsonl").stat().st_size * (number + 2) // (tries + 2)
        run = Run(data, full, *arguments, limit_bytes=limit)
        statuses = run.wait()
        if statuses != [0] or "target not reached after 12 epochs" not in run.output():
            failures.append(f"try {number}: exit statuses {statuses}: {run.last_line()}")
        if run.output().count("JsonLinesTracker failed") != 1 or "Traceback" in run.output():
            failures.append(f"try {number}: expected exactly one warning:\n{run.output()}")
        if not history(full).items() <= history(whole).items():
            failures.append(f"try {number}: logged values differ")
    return Row(
        fault="disk full while logging",
        promise="one warning per log; training continues",
        test="test_faults.py::test_full_disk_for_logs",
        tried=tries,
        kept=tries - failed_tries(failures),
        lost="the rest of that log",
        failures=tuple(failures),
    )


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _change(path: Path) -> None:
    np.save(path, np.load(path)[:, ::-1])


def lost_volumes(work_dir: Path, tries: int = 6) -> Row:
    """A volume is deleted, truncated or overwritten while the run reads it."""
    data = write_balls(work_dir / "data")
    whole = work_dir / "whole"
    arguments = (*ARGUMENTS, "--epochs", 30)
    Run(data, whole, *arguments).wait()
    failures = []
    slowest = 0.0
    damages: list[Callable[[Path], None]] = [Path.unlink, _cut, _change]
    for number in range(tries):
        log_dir, copy = work_dir / f"try_{number}", work_dir / f"data_{number}"
        shutil.copytree(data, copy)
        run = Run(copy, log_dir, *arguments, "--num_workers", number % 2)
        run.wait_for("EpochStopped", 4)
        victim = copy / f"ball_{5 + number:02}_{'xy'[number // 3 % 2]}.npy"
        injected_at = time.monotonic()
        damages[number % 3](victim)
        statuses = run.wait(60)
        slowest = max(slowest, time.monotonic() - injected_at)
        if statuses != [USER_ERROR_EXIT] or victim.name not in run.last_line() or "Traceback" in run.output():
            failures.append(f"try {number}: exit statuses {statuses}: {run.output()}")
        if [event["status"] for event in run.events("RunStopped")] != ["aborted"]:
            failures.append(f"try {number}: the log is not closed")
        back = Run(data, log_dir, *arguments, "--resume")
        problems = [back.last_line()] if any(back.wait()) else differences(whole, log_dir)
        failures += [f"try {number}: {problem}" for problem in problems]
    return Row(
        fault="a volume vanishes, is cut or changes during the run",
        promise="the run ends with the volume's name on the last line; once it is restored, --resume is exact",
        test="test_faults.py::test_lost_volumes",
        tried=tries,
        kept=tries - failed_tries(failures),
        seconds=slowest,
        lost="since the last checkpoint",
        failures=tuple(failures),
    )


def non_finite_values(work_dir: Path, tries: int = 4) -> Row:
    """A volume becomes NaN or infinity after good epochs, on one rank or two."""
    data = write_balls(work_dir / "data")
    failures = []
    slowest = 0.0
    for number in range(tries):
        ranks = 1 + number % 2
        log_dir, copy = work_dir / f"try_{number}", work_dir / f"data_{number}"
        shutil.copytree(data, copy)
        arguments = (*ARGUMENTS, "--augment", "mlperf")
        Run(copy, log_dir, *arguments, "--epochs", 12, ranks=ranks).wait()
        best = checkpoints.load(log_dir / "checkpoint.pth")
        victim = f"ball_{5 + number:02}"
        image = np.load(copy / f"{victim}_x.npy")
        np.save(copy / f"{victim}_x.npy", np.full_like(image, (np.nan, np.inf)[number // 2 % 2]))
        began = time.monotonic()
        run = Run(copy, log_dir, *arguments, "--epochs", 20, "--resume", ranks=ranks)
        statuses = run.wait(90)
        slowest = max(slowest, time.monotonic() - began)
        stopped = run.events("RunStopped")
        reason = r"diverged: epoch 13, batch \d+: gradient norm \S+, loss scale 1, rank \d: loss \S+ on "
        if set(statuses) != {DIVERGED_EXIT}:
            failures.append(f"try {number}: exit statuses {statuses}: {run.output()}")
        elif [event["status"] for event in stopped] != ["aborted"] or not re.match(
            rf"{reason}{victim} at \(\d+, ", stopped[0]["reason"]
        ):
            failures.append(f"try {number}: the log does not end with the report: {stopped}")
        kept = checkpoints.load(log_dir / "checkpoint.pth")
        if not is_same(kept.best, best.best) or not all(bool(value.isfinite().all()) for value in kept.last.values()):
            failures.append(f"try {number}: the best or the last state has changed")
    return Row(
        fault="NaN or infinity in loss or gradients",
        promise="all ranks stop at that step with exit status 3 and report epoch, batch, rank, case, crop, loss scale "
        "and gradient norm; the best and the last good state are kept",
        test="test_faults.py::test_non_finite_values",
        tried=tries,
        kept=tries - failed_tries(failures),
        seconds=slowest,
        lost="since the last checkpoint",
        failures=tuple(failures),
    )
