"""Checkpoints cut short or damaged, disks that are full, volumes that vanish under way, and numbers gone wrong."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.errors import DIVERGED_EXIT, USER_ERROR_EXIT, UserError
from model.unet3d import Unet3d
from runtime.checkpoint import format as checkpoints
from runtime.checkpoint import resume, writer
from runtime.optimizer import make_optimizer
from runtime.train_state import TrainState
from tests.faults import Row
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
    """A checkpoint cut at a random byte or with one to three bits flipped; each must be refused, and the one before it
    be found."""
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
        # The warning names the damaged file; a thousand of them would hide everything else.
        with _quiet():
            found = resume.newest_good(path)
        slowest = max(slowest, time.monotonic() - began)
        if found is None or found.path != older or not is_same(found.last, dict(state.network.state_dict())):
            failures.append(f"try {number} ({what}): the one before it was not taken")
    return Row(
        fault="a checkpoint cut or flipped at random",
        promise="refused by its checksum; --resume names it and takes the one before",
        test="test_faults.py::test_damaged_checkpoints",
        tried=tries,
        kept=tries - len({f.split(" ")[1] for f in failures}),
        seconds=slowest,
        lost="since the one before it",
        failures=tuple(failures),
    )


class _quiet:  # noqa: N801 - reads as a word of the `with`
    """Nothing on stderr; the descriptor, so that it holds for every library."""

    def __enter__(self) -> None:
        self._kept = os.dup(2)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)

    def __exit__(self, *_: object) -> None:
        os.dup2(self._kept, 2)
        os.close(self._kept)


def killed_while_saving(work_dir: Path, tries: int = 100, seed: int = 0) -> Row:
    """A process that saves without a pause is killed at a random moment; a whole checkpoint must be left."""
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / "checkpoint.pth"
    state = _state()
    content = checkpoints.snapshot(state, [0.0], config={}, seed=0, data="")
    writer.save(path, content, keep=2)
    rng = random.Random(seed)
    failures = []
    for number in range(tries):
        before = resume.newest_good(path)
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
            found = resume.newest_good(path)
        newest = writer.find_checkpoints(path)[0]  # by its name; `path`, unless the kill came between two renames
        if before is None or found is None or found.last_epoch < before.last_epoch or found.path != newest:
            failures.append(f"try {number}: {found and found.path} after {before and before.last_epoch} epochs")
        writer.prepare(path)
    left = [file.name for file in work_dir.iterdir() if file.name.endswith(".tmp")]
    failures += [f"left behind: {left}"] if left else []
    return Row(
        fault="SIGKILL while saving",
        promise="the newest checkpoint file is whole: the last one or the one before",
        test="test_faults.py::test_killed_while_saving",
        tried=tries,
        kept=tries - len(failures),
        seconds=None,
        lost="none that was saved",
        failures=tuple(failures),
    )


def full_disk(work_dir: Path, tries: int = 2) -> Row:
    """No file may grow to a checkpoint's length any more, as on a disk that has filled up since the last one."""
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
            failures.append(f"try {number}: training did not go on:\n{run.output()}")
        if (log_dir / "checkpoint.pth").read_bytes() != before or list(log_dir.glob(".*.tmp")):
            failures.append(f"try {number}: the last good checkpoint was touched, or a temporary file stayed")
    return Row(
        fault="disk full while saving",
        promise="a warning, training goes on, the last good one untouched; exit status 2 at the end",
        test="test_faults.py::test_full_disk",
        tried=tries,
        kept=tries - len({f.split(":")[0] for f in failures}),
        seconds=slowest,
        lost="since the last checkpoint",
        failures=tuple(failures),
    )


def full_disk_for_logs(work_dir: Path, tries: int = 2) -> Row:
    """The logs may grow no more; the run must reach its end all the same."""
    data = write_balls(work_dir / "data")
    # No worker: its batches pass through shared memory, which the limit on files would hit as well.
    arguments = (*ARGUMENTS, "--epochs", 12, "--ckpt_every", "never", "--num_workers", 0)
    failures = []
    for number in range(tries):
        whole, full = work_dir / f"whole_{number}", work_dir / f"full_{number}"
        Run(data, whole, *arguments, "--save_ckpt_path", whole / "checkpoint.pth").wait()
        # Room for the head of the logs, not for the epochs.
        limit = (whole / "log.jsonl").stat().st_size * (number + 2) // (tries + 2)
        run = Run(data, full, *arguments, limit_bytes=limit)
        statuses = run.wait()
        if statuses != [0] or "aborted after 12 epochs" not in run.output():
            failures.append(f"try {number}: exit statuses {statuses}: {run.last_line()}")
        if run.output().count("JsonLinesTracker failed") != 1 or "Traceback" in run.output():
            failures.append(f"try {number}: not warned of once:\n{run.output()}")
        if not history(full).items() <= history(whole).items():
            failures.append(f"try {number}: what was logged is wrong")
    return Row(
        fault="disk full while logging",
        promise="one warning a log, training goes on",
        test="test_faults.py::test_full_disk_for_logs",
        tried=tries,
        kept=tries - len({f.split(":")[0] for f in failures}),
        seconds=None,
        lost="the rest of that log",
        failures=tuple(failures),
    )


def _vanish(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _change(path: Path) -> None:
    array = np.load(path)
    np.save(path, array[:, ::-1])


def lost_volumes(work_dir: Path, tries: int = 6) -> Row:
    """A volume is deleted, cut short or overwritten while the run reads it."""
    data = write_balls(work_dir / "data")
    whole = work_dir / "whole"
    arguments = (*ARGUMENTS, "--epochs", 30)
    Run(data, whole, *arguments).wait()
    failures = []
    slowest = 0.0
    harms: list[Callable[[Path], None]] = [_vanish, _cut, _change]
    for number in range(tries):
        log_dir, copy = work_dir / f"try_{number}", work_dir / f"data_{number}"
        shutil.copytree(data, copy)
        run = Run(copy, log_dir, *arguments, "--num_workers", number % 2)
        run.wait_for("EpochStopped", 4)
        victim = copy / f"ball_{5 + number:02}_{'xy'[number // 3 % 2]}.npy"
        struck = time.monotonic()
        harms[number % 3](victim)
        statuses = run.wait(60)
        slowest = max(slowest, time.monotonic() - struck)
        if statuses != [USER_ERROR_EXIT] or victim.name not in run.last_line() or "Traceback" in run.output():
            failures.append(f"try {number}: exit statuses {statuses}: {run.output()}")
        if [event["status"] for event in run.events("RunStopped")] != ["aborted"]:
            failures.append(f"try {number}: the log is not closed")
        back = Run(data, log_dir, *arguments, "--resume")
        problems = [back.last_line()] if any(back.wait()) else differences(whole, log_dir)
        failures += [f"try {number}: {problem}" for problem in problems]
    return Row(
        fault="a volume vanishes, is cut or changes during the run",
        promise="the run ends with its name on the last line; once it is back, --resume is exact",
        test="test_faults.py::test_lost_volumes",
        tried=tries,
        kept=tries - len({f.split(":")[0] for f in failures}),
        seconds=slowest,
        lost="since the last checkpoint",
        failures=tuple(failures),
    )


def numbers_gone_wrong(work_dir: Path, tries: int = 4) -> Row:
    """A volume of NaN or infinity comes in after good epochs, on one rank or two."""
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
        said = r"diverged: epoch 13, batch \d+: gradient norm \S+, loss scale 1, rank \d: loss \S+ on "
        if set(statuses) != {DIVERGED_EXIT}:
            failures.append(f"try {number}: exit statuses {statuses}: {run.output()}")
        elif [event["status"] for event in stopped] != ["aborted"] or not re.match(
            rf"{said}{victim} at \(\d+, ", stopped[0]["reason"]
        ):
            failures.append(f"try {number}: the log is not closed with the report: {stopped}")
        kept = checkpoints.load(log_dir / "checkpoint.pth")
        if not is_same(kept.best, best.best) or not all(bool(value.isfinite().all()) for value in kept.last.values()):
            failures.append(f"try {number}: the best or the last state is not what it was")
    return Row(
        fault="NaN or infinity in loss or gradients",
        promise="all ranks stop at that step, exit status 3, with epoch, batch, rank, "
        "case, crop, loss scale and gradient norm; the best and the last good state stay",
        test="test_faults.py::test_numbers_gone_wrong",
        tried=tries,
        kept=tries - len({f.split(":")[0] for f in failures}),
        seconds=slowest,
        lost="since the last checkpoint",
        failures=tuple(failures),
    )
