"""Ranks and loader workers that are killed, stopped or hang: the group ends soon, says why, and comes back."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from common.errors import RANK_LOST_EXIT, USER_ERROR_EXIT
from tests.faults import Row
from tests.faults.runs import PROJECT, TINY, Run, differences, free_port, history, write_balls

PROMISED_S = 60.0
HANGING = ("-m", "tests.faults.hang")
ARGUMENTS = ("--epochs", 30, "--start_eval_at", 20, "--evaluate_every", 10, "--ckpt_every", "0.02m")
# `torchrun` on gloo comes back reliably only where each group has a store of its own.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def children_of(process: int) -> list[int]:
    """The loader workers of a rank."""
    listed = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8")
    return [int(child) for child in listed.split()]


def lost_rank(work_dir: Path, tries: int = 2) -> Row:
    """One of two ranks is killed."""
    return _inject(
        work_dir,
        tries,
        fault="a rank is killed",
        strike=lambda run: run.signal(signal.SIGKILL, 1),
        expected=[RANK_LOST_EXIT, -signal.SIGKILL],
        said=r"rank 1 .*(killed|lost)",
    )


def stopped_rank(work_dir: Path, tries: int = 1) -> Row:
    """One of two ranks is stopped, threads and all, as on a machine that dies: nothing is heard of it any more."""
    return _inject(
        work_dir,
        tries,
        fault="a rank is stopped (SIGSTOP)",
        strike=lambda run: run.signal(signal.SIGSTOP, 1),
        expected=[RANK_LOST_EXIT, -signal.SIGKILL],
        said=r"rank 1 .*no sign of life",
    )


def hung_rank(work_dir: Path, tries: int = 1) -> Row:
    """The main thread of one of two ranks hangs: the process lives, and its connections stay open."""
    return _inject(
        work_dir,
        tries,
        fault="a rank hangs",
        strike=lambda run: None,
        expected=[RANK_LOST_EXIT] * 2,
        said=r"hangs at epoch .*rank 1 in _hang",
        program=HANGING,
        settings={"HANG_RANK": "1", "HANG_AT": "100"},
    )


def killed_worker(work_dir: Path, tries: int = 2) -> Row:
    """A loader worker is killed, as the kernel does where memory runs out."""
    return _inject(
        work_dir,
        tries,
        fault="a loader worker is killed",
        strike=lambda run: os.kill(children_of(run.ranks[1].pid)[0], signal.SIGKILL),
        expected=[RANK_LOST_EXIT, USER_ERROR_EXIT],
        said=r"worker .*(killed|exited unexpectedly)",  # torch's words, as it comes to know
    )


def hung_worker(work_dir: Path, tries: int = 1) -> Row:
    """A loader worker is stopped, as one that waits for a dead disk."""
    return _inject(
        work_dir,
        tries,
        fault="a loader worker hangs",
        strike=lambda run: os.kill(children_of(run.ranks[1].pid)[0], signal.SIGSTOP),
        expected=[RANK_LOST_EXIT, USER_ERROR_EXIT],
        # Where it was stopped in the middle of handing a batch over, torch's timeout does not hold, but the watchdog.
        said=r"while ball_\d\d was awaited|rank 1 hangs at .*waiting for data",
    )


def reference(folder: Path) -> tuple[Path, Path]:
    """The data and the log folder of a run of two ranks without a fault, made once for all faults."""
    data, whole = folder / "two_ranks_data", folder / "two_ranks"
    if not whole.exists():
        run = Run(write_balls(data), whole, "--num_workers", 1, *ARGUMENTS, ranks=2)
        if any(run.wait()):
            raise RuntimeError(f"the run without a fault failed:\n{run.output()}")
    return data, whole


def _inject(
    work_dir: Path,
    tries: int,
    fault: str,
    strike: Callable[[Run], None],
    expected: list[int],
    said: str,
    program: Sequence[str] = ("main.py",),
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Row:
    data, whole = reference(work_dir.parent)
    arguments = ("--num_workers", 1, *ARGUMENTS)
    rng = random.Random(0)
    failures: list[str] = []
    slowest = 0.0
    for number in range(tries):
        log_dir = work_dir / f"try_{number}"
        run = Run(data, log_dir, *arguments, ranks=2, program=program, settings=settings)
        run.wait_for("EpochStopped", 4)
        time.sleep(rng.uniform(0, 0.2))
        while "HANG_RANK" in settings and "hangs now" not in run.output(1):
            time.sleep(0.02)
        struck = time.monotonic()
        strike(run)
        statuses = run.wait(2 * PROMISED_S)
        seconds = time.monotonic() - struck
        slowest = max(slowest, seconds)
        problems = []
        is_watchdog = statuses == [RANK_LOST_EXIT] * 2 and "hangs at" in run.last_line()
        if (statuses != expected and not is_watchdog) or seconds > PROMISED_S:
            problems.append(f"exit statuses {statuses} after {seconds:.0f} s")
        # A rank that was killed says nothing; every other one ends with the cause.
        problems += [
            f"rank {rank}'s last line: {run.last_line(rank)}"
            for rank, status in enumerate(statuses)
            if status >= 0 and not re.search(said, run.last_line(rank))
        ]
        back = Run(data, log_dir, *arguments, "--resume", ranks=2)
        problems += [f"did not come back: {back.last_line()}"] if any(back.wait()) else differences(whole, log_dir)
        failures += [f"{fault}, try {number}: {problem}" for problem in problems]
    return Row(
        fault=fault,
        promise=f"every rank ends within {PROMISED_S:.0f} s with the cause on its last line; --resume is exact",
        test="test_faults.py::test_lost",
        tried=tries,
        kept=tries - len({failure.split(":")[0] for failure in failures}),
        seconds=slowest,
        lost="since the last checkpoint",
        failures=tuple(failures),
    )


def restarted(work_dir: Path, tries: int = 10) -> Row:
    """`torchrun --max-restarts`, one of whose ranks is killed: the group comes back by itself and resumes."""
    data, whole = reference(work_dir.parent)
    arguments = [*TINY, "--num_workers", 1, *ARGUMENTS]
    failures: list[str] = []
    slowest = 0.0
    for number in range(tries):
        log_dir = work_dir / f"try_{number}"
        log_dir.mkdir(parents=True)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            1,
            "--nproc_per_node",
            2,
            "--max-restarts",
            2,
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"localhost:{free_port()}",
            "main.py",
            "--data_dir",
            data,
            "--log_dir",
            log_dir,
            "--resume",
            *arguments,
        ]
        environment = {**os.environ, **OWN_STORE, "OMP_NUM_THREADS": "1"}
        with (log_dir / "torchrun.txt").open("w") as told:
            group = subprocess.Popen(
                list(map(str, command)), cwd=PROJECT, env=environment, stdout=told, stderr=subprocess.STDOUT
            )
        while group.poll() is None and sum(key.startswith("loss") for key in history(log_dir)) < 5:
            time.sleep(0.05)
        struck = time.monotonic()
        ranks = [child for child in children_of(group.pid) if "main.py" in _command_of(child)]
        os.kill(ranks[number % len(ranks)], signal.SIGKILL)
        while group.poll() is None and len(list(log_dir.glob("log*.jsonl"))) < 2:
            time.sleep(0.05)
        slowest = max(slowest, time.monotonic() - struck)
        status = group.wait(300)
        problems = [f"exit status {status}"] if status else differences(whole, log_dir)
        failures += [f"torchrun, try {number}: {problem}" for problem in problems]
    return Row(
        fault="a rank is killed under torchrun --max-restarts",
        promise="the group comes back by itself and ends bit for bit the same",
        test="test_faults.py::test_restarted",
        tried=tries,
        kept=tries - len({failure.split(":")[0] for failure in failures}),
        seconds=slowest,
        lost="since the last checkpoint",
        failures=tuple(failures),
    )


def _command_of(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8").replace("\0", " ")


def second_signal(work_dir: Path, tries: int = 2) -> Row:
    """SIGTERM to a rank that hangs, so that it cannot leave in order, and then another one."""
    data = write_balls(work_dir / "data")
    failures = []
    slowest = 0.0
    for number in range(tries):
        run = Run(
            data,
            work_dir / f"try_{number}",
            *ARGUMENTS,
            "--num_workers",
            number,
            program=HANGING,
            settings={"HANG_RANK": "0", "HANG_AT": "50"},
        )
        run.wait_for("DataOpened")
        while "hangs now" not in run.output():
            time.sleep(0.02)
        run.signal(signal.SIGTERM)
        time.sleep(1.5)
        if run.ranks[0].poll() is not None:
            failures.append("one signal ended it at once")
        struck = time.monotonic()
        run.signal(signal.SIGTERM)
        statuses = run.wait(PROMISED_S)
        slowest = max(slowest, time.monotonic() - struck)
        if statuses != [-signal.SIGTERM]:
            failures.append(f"exit statuses {statuses}")
    return Row(
        fault="a second SIGTERM",
        promise="ends at once",
        test="test_faults.py::test_second_signal",
        tried=tries,
        kept=tries - len(failures),
        seconds=slowest,
        lost="since the last checkpoint",
        failures=tuple(failures),
    )
