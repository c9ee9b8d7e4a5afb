"""The files in `launch/`: Slurm's runs, with stand-ins for its programs; Kubernetes' says what the programs take."""

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
from typing import Any, NoReturn

import pytest
import yaml
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousConnectionError
from torch.distributed.run import parse_args

from common.errors import DIVERGED_EXIT, RANK_LOST_EXIT, USER_ERROR_EXIT
from launch import torchrun
from runtime.arguments import parse_arguments
from tests.faults.runs import free_port
from tests.integration.conftest import PROJECT, TINY

pytestmark = pytest.mark.integration

LAUNCH = PROJECT / "launch"
JOB = "22001"
# Slurm's own, as far as the file uses them. A step runs a task a node; every node is this machine.
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
# A step that keeps what it was asked to run, and ends as told.
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
        """Starts the job as Slurm does: from a copy of the file in another folder."""
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
        """Ends a job that a test has left behind."""
        if self._job is not None and self._job.poll() is None:
            self.near_the_time_limit()
            self._job.communicate(timeout=60)

    def run(self, *arguments: object, **environment: str) -> tuple[int, str]:
        """The job's exit status and output."""
        job = self.submit(*arguments, **environment)
        output, _ = job.communicate(timeout=180)
        return job.returncode, output

    def near_the_time_limit(self) -> None:
        """What --signal=TERM@120 does: the step's tasks get the signal, the batch shell does not."""
        for task in (self._folder / "tasks").read_text().split():
            os.kill(int(task), signal.SIGTERM)

    def requeued(self) -> list[str]:
        """What `scontrol requeue` was called with."""
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
    """The events of one kind in all logs of a folder, the oldest first."""
    paths = sorted(log_dir.glob("log*.jsonl"), key=lambda path: path.stat().st_mtime)
    events = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [event for event in events if event["event"] == kind]


def test_the_batch_file_is_sound_bash() -> None:
    done = subprocess.run(["bash", "-n", LAUNCH / "slurm.sbatch"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_job_on_two_nodes_leaves_before_the_time_limit_and_goes_on_when_started_again(
    make_cluster: Callable[[str], Cluster], balls: Path, tmp_path: Path
) -> None:
    cluster, logs = make_cluster(SRUN), tmp_path / "logs"
    folders = {"DATA_DIR": str(balls), "LOG_DIR": str(logs)}
    # Longer than the test would wait; --ckpt_every is at its ten minutes, so that only leaving in order saves.
    never = ("--start_eval_at", 2000)
    first = cluster.submit(*TINY, "--epochs", 2000, *never, **folders)
    deadline = time.monotonic() + 120
    while not (logs / "log.jsonl").exists() or len(logged(logs, "EpochStopped")) < 3:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.near_the_time_limit()
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


def test_bad_input_ends_the_job_at_once_and_for_good(make_cluster: Callable[[str], Cluster], tmp_path: Path) -> None:
    cluster = make_cluster(SRUN)
    status, output = cluster.run("--epochs", 0, DATA_DIR=str(tmp_path), LOG_DIR=str(tmp_path / "logs"))
    assert status == USER_ERROR_EXIT, output
    assert cluster.requeued() == []
    # One line a rank: torchrun did not start the ranks again.
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
def test_a_job_is_queued_again_where_that_helps(
    make_cluster: Callable[[str], Cluster], tmp_path: Path, status: int, environment: dict[str, str], is_requeued: bool
) -> None:
    cluster = make_cluster(SRUN_RECORDER)
    folders = {"DATA_DIR": str(tmp_path), "LOG_DIR": str(tmp_path / "logs")}
    assert cluster.run(FAKE_STATUS=str(status), **folders, **environment)[0] == status
    assert cluster.requeued() == ([f"requeue Incomplete {JOB}"] if is_requeued else [])


def test_the_step_is_one_torchrun_a_node_that_resumes(make_cluster: Callable[[str], Cluster], tmp_path: Path) -> None:
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
def test_a_variable_that_is_missing_is_named(
    make_cluster: Callable[[str], Cluster], tmp_path: Path, missing: str
) -> None:
    cluster = make_cluster(SRUN_RECORDER)
    environment = {"DATA_DIR": str(tmp_path), "LOG_DIR": str(tmp_path), missing: ""}
    status, output = cluster.run(FAKE_STATUS="0", **environment)
    assert status != 0
    assert f"{missing} is not set" in output
    assert len(output.splitlines()) == 1


def kubeflow() -> tuple[dict[str, Any], dict[str, Any]]:
    """The runtime and the job."""
    runtime, job = yaml.safe_load_all((LAUNCH / "kubeflow.yaml").read_text(encoding="utf-8"))
    return runtime, job


def test_kubernetes_replaces_lost_pods_but_not_after_bad_input() -> None:
    runtime, job = kubeflow()
    assert {part["apiVersion"] for part in (runtime, job)} == {"trainer.kubeflow.org/v1alpha1"}
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    asked = job["spec"]["runtimeRef"]
    assert (asked["kind"], asked["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    # By these names Trainer finds where the command, its arguments and the PET_ variables go.
    assert replicated["name"] == "node"
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    spec = replicated["template"]["spec"]
    pod, (container,) = spec["template"]["spec"], spec["template"]["spec"]["containers"]
    assert container["name"] == "node"
    assert pod["restartPolicy"] == "Never"  # else the API server refuses the policy
    assert spec["backoffLimit"] > 0
    stop, ignore = spec["podFailurePolicy"]["rules"]
    assert stop["action"] == "FailJob"
    assert stop["onExitCodes"] == {
        "containerName": "node",
        "operator": "In",
        "values": [USER_ERROR_EXIT, DIVERGED_EXIT],
    }
    assert ignore == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"} in container["env"]


def test_kubernetes_pods_have_data_results_and_shared_memory() -> None:
    pod = kubeflow()[0]["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(volumes) == {mount["name"] for mount in mounts.values()}
    assert mounts["/data"]["readOnly"]
    assert "readOnly" not in mounts["/results"]
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1


def test_kubernetes_command_is_one_that_the_programs_take(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, job = kubeflow()
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    # What Trainer sets, and what the kubelet makes of $(NAME).
    given = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "auto",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "unet3d-node-0-0.unet3d",
        "PET_MASTER_PORT": "29500",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(PROJECT)  # as the image's working folder
    (container,) = pod["containers"]
    command = [
        re.sub(r"\$\((\w+)\)", lambda found: given[found[1]], word)
        for word in [*container["command"], *job["spec"]["trainer"]["args"]]
    ]
    assert command[:3] == ["python3", "-m", "launch.torchrun"]
    launched = parse_args(command[3:])
    assert (launched.nnodes, launched.nproc_per_node, launched.rdzv_backend) == ("2", "gpu", "c10d")
    assert launched.rdzv_endpoint == "unet3d-node-0-0.unet3d:29500"
    assert launched.max_restarts > 0
    assert launched.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    assert launched.training_script == "main.py"
    config, _ = parse_arguments(launched.training_script_args)
    assert config.resume
    assert (str(config.data_dir), str(config.log_dir)) == ("/data", "/results")


def failed(*ranks: tuple[int, int]) -> ChildFailedError:
    """What torchrun raises after (rank, exit status) have failed in that order."""
    failures = {}
    for timestamp, (rank, status) in enumerate(ranks):
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=status, error_file="/nowhere")
        failures[rank].timestamp = timestamp
    return ChildFailedError("main.py", failures)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (failed((1, -9), (0, 4)), 137, "rank 1 was killed by SIGKILL"),
        (failed((0, 4), (1, 2)), 2, "rank 1 left with exit status 2"),
        (failed((3, 143)), 143, "rank 3 left with exit status 143"),
        (SignalException("asked", signal.SIGTERM), 143, "stopped by SIGTERM"),
        (SignalException("asked", signal.SIGINT), 130, "stopped by SIGINT"),
        (RendezvousClosedError(), 1, "another machine has given up"),
        (RendezvousConnectionError("no answer"), 4, "the other machines are lost"),
    ],
)
def test_torchrun_ends_with_the_ranks_status_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int, said: str
) -> None:
    def fail() -> NoReturn:
        raise error

    monkeypatch.setattr(torchrun, "torchrun", fail)
    assert torchrun.main() == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("torchrun: error: ")
    assert said in line


def test_one_machines_bad_input_is_no_lost_machine_to_the_others(tmp_path: Path) -> None:
    """The first machine, which keeps the rendezvous, leaves for good; the second only sees that a rank has gone."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "print('started', os.environ['RANK'], flush=True)\n"
        "time.sleep(2.0 * int(os.environ['RANK']))\n"
        f"sys.exit([{USER_ERROR_EXIT}, {RANK_LOST_EXIT}][int(os.environ['RANK'])])\n"
    )
    hurried = "import sys; from launch import torchrun; torchrun.FAREWELL_S = 10.0; sys.exit(torchrun.main())"
    port = free_port()
    machines = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                hurried,
                "--nnodes",
                "2",
                "--nproc_per_node",
                "1",
                "--max-restarts",
                "3",
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                f"localhost:{port}",
                "--rdzv-id",
                "test",
                "--rdzv-conf",
                f"is_host={int(number == 0)}",
                str(script),
            ],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [machine.communicate(timeout=60) for machine in machines]
    # Ranks are numbered as the machines come.
    ends = {machine.returncode: output for machine, output in zip(machines, outputs, strict=True)}
    assert set(ends) == {USER_ERROR_EXIT, torchrun.CLOSED_EXIT}
    assert ends[USER_ERROR_EXIT][0] == "started 0\n"
    assert ends[USER_ERROR_EXIT][1].splitlines()[-1] == "torchrun: error: rank 0 left with exit status 2"
    assert ends[torchrun.CLOSED_EXIT][0] == "started 1\n"
    assert ends[torchrun.CLOSED_EXIT][1].splitlines()[-1].startswith("torchrun: error: another machine has given up")
