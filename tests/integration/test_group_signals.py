"""A signal to a run's whole process group, as a terminal and `timeout` send it, ends the run like one to itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.conftest import PROJECT, TINY
from tests.programs import THREADS

ARGUMENTS = (*TINY, "--num_workers", "2", "--epochs", "100000", "--start_eval_at", "99999")
LAUNCHER = ("-m", "launch.torchrun", "--standalone", "--nproc_per_node", "2")


@pytest.mark.parametrize(
    ("launcher", "number", "times"),
    [((), signal.SIGTERM, 2), ((), signal.SIGINT, 1), (LAUNCHER, signal.SIGINT, 1)],
    ids=["SIGTERM twice", "Ctrl-C", "Ctrl-C under torchrun"],
)
def test_a_signal_to_the_whole_group_saves_and_ends_in_one_line(
    balls: Path, tmp_path: Path, launcher: tuple[str, ...], number: signal.Signals, times: int
) -> None:
    log = tmp_path / "log.jsonl"
    run = subprocess.Popen(
        [sys.executable, *launcher, "main.py", "--data_dir", str(balls), "--log_dir", str(tmp_path), *ARGUMENTS],
        cwd=PROJECT,
        env={**os.environ, **THREADS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while "EpochStopped" not in (log.read_text(encoding="utf-8") if log.exists() else ""):
            assert run.poll() is None, run.stderr and run.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for _ in range(times):
            os.killpg(run.pid, number)
        out, err = run.communicate(timeout=60)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 128 + number, out + err
    assert out.splitlines()[-1].endswith(f"interrupted by {number.name}")
    errors = [line for line in err.splitlines() if "rror" in line or "Traceback" in line]
    assert errors == ([f"torchrun: error: stopped by {number.name}"] if launcher else [])
    assert (tmp_path / "checkpoint.pth").exists()
