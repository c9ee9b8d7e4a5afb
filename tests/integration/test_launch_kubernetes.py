"""`launch/kubeflow.yaml`: its structure, and that the programs accept its command."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

from common.errors import DIVERGED_EXIT, USER_ERROR_EXIT
from runtime.arguments import parse_arguments
from tests.integration.conftest import PROJECT


def kubeflow() -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the TrainingRuntime and the TrainJob."""
    runtime, job = yaml.safe_load_all((PROJECT / "launch" / "kubeflow.yaml").read_text(encoding="utf-8"))
    return runtime, job


def test_kubernetes_replaces_lost_pods_but_not_after_bad_input() -> None:
    runtime, job = kubeflow()
    assert {part["apiVersion"] for part in (runtime, job)} == {"trainer.kubeflow.org/v1alpha1"}
    assert (runtime["kind"], job["kind"]) == ("TrainingRuntime", "TrainJob")
    reference = job["spec"]["runtimeRef"]
    assert (reference["kind"], reference["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    # Trainer uses these names to find the container for the command, its arguments and the PET_ variables.
    assert replicated["name"] == "node"
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    spec = replicated["template"]["spec"]
    pod, (container,) = spec["template"]["spec"], spec["template"]["spec"]["containers"]
    assert container["name"] == "node"
    assert pod["restartPolicy"] == "Never"  # required by the API server for a podFailurePolicy
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


def test_the_kubernetes_command_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, job = kubeflow()
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    # Variables set by Trainer; the kubelet expands $(NAME).
    given = {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "auto",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "unet3d-node-0-0.unet3d",
        "PET_MASTER_PORT": "29500",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(PROJECT)  # the working folder of the image
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
