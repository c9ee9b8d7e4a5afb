"""Ranks and loader workers that are killed, stopped or hang: every rank ends soon and reports the cause."""

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
from tests import programs
from tests.faults import Row, failed_tries
from tests.faults.runs import PROJECT, TINY, Run, differences, history, write_balls

# With the default timeouts; shorter ones end a run sooner.
PROMISED_S = 60.0
# After a second signal.
AT_ONCE_S = 10.0
HANGING = ("-m", "tests.faults.hang")
ARGUMENTS = ("--epochs", 60, "--start_eval_at", 20, "--evaluate_every", 10, "--ckpt_every", "0.02m")
# torchrun restarts gloo groups reliably only if each group has its own store.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def children_of(process: int) -> list[int]:
    """Returns the child processes of a process, such as the loader workers of a rank."""
    listed = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8")
    return [int(child) for child in listed.split()]


def lost_rank(work_dir: Path, tries: int = 2) -> Row:
    """One of two ranks is killed."""
    return _inject(
        work_dir,
        tries,
        fault="a rank is killed",
        act=lambda run: run.signal(signal.SIGKILL, 1),
        expected=[RANK_LOST_EXIT, -signal.SIGKILL],
        message=r"rank 1 .*(killed|lost)",
    )


def stopped_rank(work_dir: Path, tries: int = 1, silence_s: float = 20.0) -> Row:
    """One of two ranks is stopped with all its threads, as on a machine that dies: its heartbeats end."""
    return _inject(
        work_dir,
        tries,
        fault="a rank is stopped (SIGSTOP)",
        act=lambda run: run.signal(signal.SIGSTOP, 1),
        expected=[RANK_LOST_EXIT, -signal.SIGKILL],
        message=r"rank 1 .*no sign of life",
        program=HANGING,
        environment={"SILENCE_S": str(silence_s)},
    )


def hung_rank(work_dir: Path, tries: int = 1, timeout_s: int = 40) -> Row:
    """The main thread of one of two ranks hangs, while its process lives and its connections stay open."""
    return _inject(
        work_dir,
        tries,
        fault="a rank hangs",
        act=lambda run: None,
        expected=[RANK_LOST_EXIT] * 2,
        message=r"hangs at epoch .*rank 1 in _hang",
        program=HANGING,
        environment={"HANG_RANK": "1", "HANG_AT": "100"},
        timeout_s=timeout_s,
    )


def killed_worker(work_dir: Path, tries: int = 2, timeout_s: int = 40) -> Row:
    """A loader worker is killed, as by the kernel when memory runs out."""
    return _inject(
        work_dir,
        tries,
        fault="a loader worker is killed",
        act=lambda run: os.kill(children_of(run.ranks[1].pid)[0], signal.SIGKILL),
        expected=[RANK_LOST_EXIT, USER_ERROR_EXIT],
        message=r"worker .*(killed|exited unexpectedly)",  # torch's messages; which one depends on the timing
        environment=programs.filters_variable("ignore::ResourceWarning"),  # torch raises wherever the program is
        timeout_s=timeout_s,
    )


def hung_worker(work_dir: Path, tries: int = 1, timeout_s: int = 40) -> Row:
    """A loader worker is stopped, like one that waits for a dead disk."""
    return _inject(
        work_dir,
        tries,
        fault="a loader worker hangs",
        act=lambda run: os.kill(children_of(run.ranks[1].pid)[0], signal.SIGSTOP),
        expected=[RANK_LOST_EXIT, USER_ERROR_EXIT],
        # If it was stopped while transferring a batch, the watchdog reports it; torch's timeout does not apply there.
        message=r"while waiting for ball_\d\d|rank 1 hangs at .*waiting for data",
        timeout_s=timeout_s,
    )


def reference(folder: Path) -> tuple[Path, Path]:
    """Returns the data and log folders of a run of two ranks without a fault, made once and shared by all faults."""
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
    act: Callable[[Run], None],
    expected: list[int],
    message: str,
    program: Sequence[str] = ("main.py",),
    environment: Mapping[str, str] = MappingProxyType({}),
    timeout_s: int = 40,
) -> Row:
    """Injects a fault into runs of two ranks and resumes them.

    Args:
        act: injects the fault into a running program.
        expected: exit statuses of the two ranks; that of the watchdog is also accepted.
        message: regular expression for the last line of each rank that reports an error.
        program: `HANGING` for a rank that hangs or notices silence sooner, by its variables in `environment`.
        timeout_s: of workers and ranks that hang.
    """
    data, whole = reference(work_dir.parent)
    arguments = ("--num_workers", 1, *ARGUMENTS)
    timeouts = ("--worker_timeout", timeout_s, "--stall_timeout", timeout_s)
    rng = random.Random(0)
    failures: list[str] = []
    slowest = 0.0
    for number in range(tries):
        log_dir = work_dir / f"try_{number}"
        run = Run(data, log_dir, *arguments, *timeouts, ranks=2, program=program, environment=environment)
        run.wait_for("EpochStopped", 4)
        time.sleep(rng.uniform(0, 0.2))
        if "HANG_AT" in environment:
            run.wait_for_line("hangs now", rank=1)
        injected_at = time.monotonic()
        act(run)
        statuses = run.wait(2 * PROMISED_S)
        seconds = time.monotonic() - injected_at
        slowest = max(slowest, seconds)
        problems = []
        is_watchdog = statuses == [RANK_LOST_EXIT] * 2 and "hangs at" in run.last_line()
        if (statuses != expected and not is_watchdog) or seconds > PROMISED_S:
            problems.append(f"exit statuses {statuses} after {seconds:.0f} s")
        # A killed rank prints nothing; every other rank prints the cause as its last line.
        problems += [
            f"rank {rank}'s last line: {run.last_line(rank)}"
            for rank, status in enumerate(statuses)
            if status >= 0 and not re.search(message, run.last_line(rank))
        ]
        back = Run(data, log_dir, *arguments, "--resume", ranks=2)
        problems += [f"did not resume: {back.last_line()}"] if any(back.wait()) else differences(whole, log_dir)
        failures += [f"{fault}, try {number}: {problem}" for problem in problems]
    return Row(
        fault=fault,
        promise=f"every rank ends within {PROMISED_S:.0f} s with the cause on its last line; --resume is exact",
        test="test_faults.py::test_lost",
        tried=tries,
        kept=tries - failed_tries(failures),
        seconds=slowest,
        lost="since the last checkpoint",
        failures=tuple(failures),
    )


def restarted(work_dir: Path, tries: int = 10) -> Row:
    """A rank is killed under `torchrun --max-restarts`: torchrun restarts the group, which resumes."""
    data, whole = reference(work_dir.parent)
    arguments = [*TINY, "--num_workers", 1, *ARGUMENTS]
    failures: list[str] = []
    slowest = 0.0
    for number in range(tries):
        log_dir = work_dir / f"try_{number}"
        log_dir.mkdir(parents=True)
        command = [
            sys.executable,
            *("-m", "torch.distributed.run", "--nnodes", 1, "--nproc_per_node", 2, "--max-restarts", 2),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{programs.free_port()}"),
            *("main.py", "--data_dir", data, "--log_dir", log_dir, "--resume", *arguments),
        ]
        environment = {**os.environ, **OWN_STORE, "OMP_NUM_THREADS": "1"}
        with (log_dir / "torchrun.txt").open("w") as stream:
            group = subprocess.Popen(
                list(map(str, command)), cwd=PROJECT, env=environment, stdout=stream, stderr=subprocess.STDOUT
            )
        while group.poll() is None and sum(key.startswith("loss") for key in history(log_dir)) < 5:
            time.sleep(0.05)
        if group.poll() is not None:
            failures.append(f"torchrun, try {number}: ended with {group.returncode} before the fault")
            continue
        injected_at = time.monotonic()
        ranks = [child for child in children_of(group.pid) if "main.py" in _command_of(child)]
        os.kill(ranks[number % len(ranks)], signal.SIGKILL)
        while group.poll() is None and len(list(log_dir.glob("log*.jsonl"))) < 2:
            time.sleep(0.05)
        slowest = max(slowest, time.monotonic() - injected_at)
        status = group.wait(300)
        problems = [f"exit status {status}"] if status else differences(whole, log_dir)
        failures += [f"torchrun, try {number}: {problem}" for problem in problems]
    return Row(
        fault="a rank is killed under torchrun --max-restarts",
        promise="torchrun restarts the group, which ends bit for bit the same",
        test="test_faults.py::test_restarted",
        tried=tries,
        kept=tries - failed_tries(failures),
        seconds=slowest,
        lost="since the last checkpoint",
        failures=tuple(failures),
    )


def _command_of(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8").replace("\0", " ")


def second_signal(work_dir: Path, tries: int = 2) -> Row:
    """A rank that hangs, and so cannot stop gracefully, receives SIGTERM twice."""
    data = write_balls(work_dir / "data")
    failures = []
    slowest = 0.0
    for number in range(tries):
        run = Run(
            data,
            work_dir / f"try_{number}",
            *(*ARGUMENTS, "--num_workers", number),
            program=HANGING,
            environment={"HANG_RANK": "0", "HANG_AT": "50"},
        )
        run.wait_for("DataOpened")
        run.wait_for_line("hangs now")
        run.signal(signal.SIGTERM)
        time.sleep(1.5)
        if run.ranks[0].poll() is not None:
            failures.append(f"try {number}: the first signal ended it at once")
        injected_at = time.monotonic()
        run.signal(signal.SIGTERM)
        statuses = run.wait(PROMISED_S)
        seconds = time.monotonic() - injected_at
        slowest = max(slowest, seconds)
        if statuses != [-signal.SIGTERM] or seconds > AT_ONCE_S:
            failures.append(f"try {number}: exit statuses {statuses} after {seconds:.0f} s")
    return Row(
        fault="a second SIGTERM",
        promise=f"ends at once, within {AT_ONCE_S:.0f} s",
        test="test_faults.py::test_second_signal",
        tried=tries,
        kept=tries - failed_tries(failures),
        seconds=slowest,
        lost="since the last checkpoint",
        failures=tuple(failures),
    )
