"""Runs that are killed or interrupted and resumed: their results and the lost work."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from common.errors import interrupted_exit
from tests.faults import Row, failed_tries
from tests.faults.runs import Run, differences, write_balls

EPOCHS = 24
# From a signal to the end of the run, its state saved.
PROMISED_S = 10.0
# Number of ranks and arguments of the runs that are killed several times before they end.
VARIANTS: dict[str, tuple[int, tuple[object, ...]]] = {
    "1 rank, no worker": (1, ("--num_workers", 0)),
    "1 rank, 3 workers": (1, ("--num_workers", 3, "--layout", "NDHWC")),
    "1 rank, device loader, accumulation": (1, ("--loader", "device", "--ga_steps", 2)),
    "2 ranks, 1 worker": (2, ("--num_workers", 1)),
}
# Saves every half second, also within epochs; evaluates often enough for kills to hit evaluations.
FREQUENT = ("--epochs", EPOCHS, "--start_eval_at", 8, "--evaluate_every", 2, "--ckpt_every", "0.008m")
RESUMED = re.compile(r"resumed from \S+ after (?:batch (\d+) of )?epoch (\d+)")


def killed_at_random(work_dir: Path, tries: int = 20, seed: int = 0, variants: Sequence[str] = tuple(VARIANTS)) -> Row:
    """Kills a run at random moments and resumes it until it ends; compares it with a run that was not killed."""
    data = write_balls(work_dir / "data")
    rng = random.Random(seed)
    failures: list[str] = []
    slowest = lost_s = 0.0
    done = 0
    for number, variant in enumerate(variants):
        ranks, arguments = VARIANTS[variant]
        whole, broken = work_dir / f"whole_{number}", work_dir / f"broken_{number}"
        reference = Run(data, whole, *arguments, *FREQUENT, ranks=ranks)
        if any(reference.wait()):
            raise RuntimeError(f"the run without a fault failed:\n{reference.output()}")
        duration_s = run_duration(reference)
        kills = tries // len(variants) + (number < tries % len(variants))
        for _ in range(kills):
            run = Run(data, broken, *arguments, *FREQUENT, "--resume", ranks=ranks)
            run.wait_for("DataOpened")
            time.sleep(rng.uniform(0.0, duration_s / max(kills - 1, 1)))
            saved = broken / "checkpoint.pth"
            if saved.exists():  # before the first checkpoint, all work is lost
                lost_s = max(lost_s, time.time() - max(saved.stat().st_mtime, run.started_at))
            run.kill()
            done += 1
        last = Run(data, broken, *arguments, *FREQUENT, "--resume", ranks=ranks)
        began = time.monotonic()
        last.wait_for("EpochStarted")
        slowest = max(slowest, time.monotonic() - began)
        statuses = last.wait()
        problems = [f"ended with {statuses}: {last.last_line()}"] if any(statuses) else differences(whole, broken)
        failures += [f"{variant}: {problem}" for problem in problems]
    return Row(
        fault="SIGKILL at a random moment",
        promise="--resume ends bit for bit as without the kill; only unsaved work is lost",
        test="test_faults.py::test_killed_and_resumed",
        tried=done,
        kept=done if not failures else 0,
        seconds=slowest,
        lost=f"{lost_s:.1f} s, saving every 0.5 s",
        failures=tuple(failures),
    )


def run_duration(run: Run) -> float:
    """Returns the seconds from opening the data to the end of the run."""
    (opened,), (stopped,) = run.events("DataOpened"), run.events("RunStopped")
    return float(stopped["time_s"] - opened["time_s"])


def interrupted(work_dir: Path, tries: int = 6, seed: int = 0) -> Row:
    """SIGTERM or SIGINT in training or in an evaluation, to one rank or to all: the run saves, stops and is resumed."""
    data = write_balls(work_dir / "data")
    rng = random.Random(seed)
    # The large overlap makes evaluations long enough for a signal to arrive during one.
    arguments = (
        *("--num_workers", 1, "--epochs", 16, "--start_eval_at", 8, "--evaluate_every", 4),
        *("--ckpt_every", "60m", "--overlap", 0.8, "--val_batch_size", 1),
    )
    failures: list[str] = []
    slowest = 0.0
    wholes = {}
    for ranks in (1, 2):
        wholes[ranks] = work_dir / f"whole_{ranks}"
        Run(data, wholes[ranks], *arguments, ranks=ranks).wait()
    for number in range(tries):
        ranks = 1 + number % 2
        sent = (signal.SIGTERM, signal.SIGINT)[number // 2 % 2]
        log_dir = work_dir / f"interrupted_{number}"
        run = Run(data, log_dir, *arguments, ranks=ranks)
        run.wait_for(*(("EvaluationStarted", 2) if number % 3 == 2 else ("EpochStopped", 9)))
        time.sleep(rng.uniform(0, 0.1))
        sent_at = time.monotonic()
        run.signal(sent, *([ranks - 1] if number % 4 > 1 else []))
        statuses = run.wait(60)
        seconds = time.monotonic() - sent_at
        slowest = max(slowest, seconds)
        what = f"{sent.name} on {ranks} rank(s), try {number}"
        if seconds > PROMISED_S:
            failures.append(f"{what}: stopped after {seconds:.0f} s")
        elif set(statuses) != {interrupted_exit(sent)}:
            failures.append(f"{what}: exit statuses {statuses}: {run.last_line()}")
        elif not run.events("RunStopped") or run.events("RunStopped")[0]["status"] != "aborted":
            failures.append(f"{what}: the log is not closed as aborted")
        else:
            back = Run(data, log_dir, *arguments, "--resume", ranks=ranks)
            if any(back.wait()):
                failures.append(f"{what}: did not resume: {back.last_line()}")
            failures += [f"{what}: {problem}" for problem in differences(wholes[ranks], log_dir)]
    return Row(
        fault="SIGTERM, SIGINT",
        promise=f"saves and stops within {PROMISED_S:.0f} s, exit status 143 or 130 on every rank; --resume is exact",
        test="test_faults.py::test_interrupted",
        tried=tries,
        kept=tries - failed_tries(failures),
        seconds=slowest,
        lost="none",
        failures=tuple(failures),
    )
