"""`launch/slurm.sbatch`, run with stand-ins for Slurm's programs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import parse_args

from common.errors import DIVERGED_EXIT, RANK_LOST_EXIT, USER_ERROR_EXIT
from runtime.arguments import parse_arguments
from tests.integration.conftest import PROJECT, TINY
from tests.programs import free_port

LAUNCH = PROJECT / "launch"
JOB = "22001"
# Minimal stand-ins for Slurm's programs. A step runs one task per node; every node is this machine.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
status=0
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" &
  tasks+=($!)
done
echo "${tasks[@]}" >"$FAKE/tasks"
for task in "${tasks[@]}"; do
  one=0
  wait "$task" || one=$?
  if ((one > status)); then status=$one; fi
done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) printf '%s\\n' localhost node-2 ;;
  requeue) echo "$*" >>"$FAKE/requeued" ;;
  *) exit 1 ;;
esac
"""
# Records the command of a step and exits with $FAKE_STATUS.
SRUN_RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$FAKE/step"
exit "$FAKE_STATUS"
"""


class Cluster:
    """A folder with stand-ins for Slurm's programs, and one job."""

    def __init__(self, folder: Path, srun: str) -> None:
        self._folder = folder
        self._job: subprocess.Popen[str] | None = None
        for name, text in {"srun": srun, "scontrol": SCONTROL}.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def submit(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        """Starts the job as Slurm does: from a copy of the batch file in another folder."""
        script = self._folder / "slurm_script"
        script.write_text((LAUNCH / "slurm.sbatch").read_text(encoding="utf-8"), encoding="utf-8")
        slurm = {
            "SLURM_SUBMIT_DIR": str(PROJECT),
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": "node-[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
            "PATH": f"{self._folder}:{os.environ['PATH']}",
            "FAKE": str(self._folder),
        }
        one_core = {"PYTHON": sys.executable, "NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
        self._job = subprocess.Popen(
            ["bash", str(script), *map(str, arguments)],
            cwd=self._folder,
            env={**os.environ, **slurm, **one_core, "RDZV_PORT": str(free_port()), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self._job

    def end(self) -> None:
        """Ends a job that is still running after a test."""
        if self._job is not None and self._job.poll() is None:
            self.signal_time_limit()
            self._job.communicate(timeout=60)

    def run(self, *arguments: object, **environment: str) -> tuple[int, str]:
        """Runs the job; returns its exit status and output."""
        job = self.submit(*arguments, **environment)
        output, _ = job.communicate(timeout=180)
        return job.returncode, output

    def signal_time_limit(self) -> None:
        """Sends SIGTERM as --signal=TERM@120 does: to the tasks of the step, not to the batch shell."""
        for task in (self._folder / "tasks").read_text().split():
            os.kill(int(task), signal.SIGTERM)

    def requeued(self) -> list[str]:
        """Returns the arguments of each call of `scontrol requeue`."""
        path = self._folder / "requeued"
        return path.read_text().splitlines() if path.exists() else []

    def step(self) -> list[str]:
        return (self._folder / "step").read_text().splitlines()


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[[str], Cluster]]:
    made = []

    def make(srun: str) -> Cluster:
        folder = tmp_path / "slurm"
        folder.mkdir()
        made.append(Cluster(folder, srun))
        return made[0]

    yield make
    for cluster in made:
        cluster.end()


def logged(log_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Returns the events of one kind in all logs of a folder, oldest first."""
    paths = sorted(log_dir.glob("log*.jsonl"), key=lambda path: path.stat().st_mtime)
    events = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [event for event in events if event["event"] == kind]


def test_the_batch_file_is_valid_bash() -> None:
    done = subprocess.run(["bash", "-n", LAUNCH / "slurm.sbatch"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_job_on_two_nodes_stops_before_the_time_limit_and_resumes_when_requeued(
    make_cluster: Callable[[str], Cluster], balls: Path, tmp_path: Path
) -> None:
    cluster, logs = make_cluster(SRUN), tmp_path / "logs"
    folders = {"DATA_DIR": str(balls), "LOG_DIR": str(logs)}
    # Longer than the test waits; --ckpt_every has its default of ten minutes, so that only the graceful stop saves.
    never = ("--start_eval_at", 2000)
    first = cluster.submit(*TINY, "--epochs", 2000, *never, **folders)
    deadline = time.monotonic() + 120
    while not (logs / "log.jsonl").exists() or len(logged(logs, "EpochStopped")) < 3:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.signal_time_limit()
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 143, output
    assert cluster.requeued() == [f"requeue Incomplete {JOB}"]
    done = len(logged(logs, "EpochStopped"))
    assert logged(logs, "RunStopped")[-1]["reason"] == "interrupted by SIGTERM"

    status, output = cluster.run(*TINY, "--epochs", done + 2, *never, SLURM_RESTART_COUNT="1", **folders)
    assert status == 0, output
    assert re.search(rf"resumed from {logs}/checkpoint.pth after (epoch {done}|batch \d+ of epoch {done + 1})", output)
    assert [event["epoch"] for event in logged(logs, "EpochStopped")] == list(range(1, done + 3))
    assert logged(logs, "DataOpened")[-1]["global_batch_size"] == 2 * 2  # two ranks, two samples each
    assert len(cluster.requeued()) == 1


def test_bad_input_ends_the_job_without_a_restart(make_cluster: Callable[[str], Cluster], tmp_path: Path) -> None:
    cluster = make_cluster(SRUN)
    status, output = cluster.run("--epochs", 0, DATA_DIR=str(tmp_path), LOG_DIR=str(tmp_path / "logs"))
    assert status == USER_ERROR_EXIT, output
    assert cluster.requeued() == []
    # One line per rank: torchrun did not restart the ranks.
    assert output.count("error: argument --epochs") == 2


@pytest.mark.parametrize(
    ("status", "environment", "is_requeued"),
    [
        (0, {}, False),
        (1, {}, False),
        (USER_ERROR_EXIT, {}, False),
        (DIVERGED_EXIT, {}, False),
        (RANK_LOST_EXIT, {}, True),
        (RANK_LOST_EXIT, {"SLURM_RESTART_COUNT": "9"}, True),
        (RANK_LOST_EXIT, {"SLURM_RESTART_COUNT": "10"}, False),
        (RANK_LOST_EXIT, {"SLURM_RESTART_COUNT": "2", "MAX_REQUEUES": "2"}, False),
        (130, {}, False),
        (137, {}, True),
        (143, {}, True),
        (143, {"SLURM_RESTART_COUNT": "1000"}, True),
    ],
)
def test_a_job_is_requeued_only_if_that_can_help(
    make_cluster: Callable[[str], Cluster], tmp_path: Path, status: int, environment: dict[str, str], is_requeued: bool
) -> None:
    cluster = make_cluster(SRUN_RECORDER)
    folders = {"DATA_DIR": str(tmp_path), "LOG_DIR": str(tmp_path / "logs")}
    assert cluster.run(FAKE_STATUS=str(status), **folders, **environment)[0] == status
    assert cluster.requeued() == ([f"requeue Incomplete {JOB}"] if is_requeued else [])


def test_the_step_runs_a_resuming_torchrun_per_node(make_cluster: Callable[[str], Cluster], tmp_path: Path) -> None:
    cluster = make_cluster(SRUN_RECORDER)
    data, logs = tmp_path / "my data", tmp_path / "my logs"
    status, output = cluster.run(
        *("--model", "unet3d(filters=(4,8))"),
        DATA_DIR=str(data),
        LOG_DIR=str(logs),
        FAKE_STATUS="0",
        RDZV_PORT="",
        IMAGE="unet3d.sif",
    )
    assert status == 0, output
    step = cluster.step()
    assert {"--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--kill-on-bad-exit=0"} <= set(step)
    container = step[step.index("apptainer") : step.index("bash")]
    assert f"{data}:{data}:ro" in container
    assert str(logs) in container
    assert container[-1] == "unet3d.sif"
    launched = parse_args(step[step.index("launch.torchrun") + 1 :])
    assert (launched.nnodes, launched.nproc_per_node) == ("2", "1")
    assert (launched.rdzv_backend, launched.rdzv_id, launched.rdzv_endpoint) == ("c10d", JOB, "localhost:12001")
    assert launched.max_restarts == 3
    assert launched.training_script == "main.py"
    config, _ = parse_arguments(launched.training_script_args)
    assert (config.data_dir, config.log_dir, config.resume) == (data, logs, True)
    assert config.model.text == "unet3d(filters=(4,8))"


@pytest.mark.parametrize("missing", ["DATA_DIR", "LOG_DIR", "SLURM_SUBMIT_DIR"])
def test_a_missing_variable_is_named(make_cluster: Callable[[str], Cluster], tmp_path: Path, missing: str) -> None:
    cluster = make_cluster(SRUN_RECORDER)
    environment = {"DATA_DIR": str(tmp_path), "LOG_DIR": str(tmp_path), missing: ""}
    status, output = cluster.run(FAKE_STATUS="0", **environment)
    assert status != 0
    assert f"{missing} is not set" in output
    assert len(output.splitlines()) == 1
