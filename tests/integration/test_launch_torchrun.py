"""`launch.torchrun`: exit statuses and last lines of torchrun, on one and on two machines."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousConnectionError

from common.errors import RANK_LOST_EXIT, USER_ERROR_EXIT
from launch import torchrun
from tests.integration.conftest import PROJECT
from tests.programs import free_port


def failed(*ranks: tuple[int, int]) -> ChildFailedError:
    """Returns the error that torchrun raises after ranks have failed in the given order of (rank, exit status)."""
    failures = {}
    for timestamp, (rank, status) in enumerate(ranks):
        failures[rank] = ProcessFailure(local_rank=rank, pid=1, exitcode=status, error_file="/nowhere")
        failures[rank].timestamp = timestamp
    return ChildFailedError("main.py", failures)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (failed((1, -9), (0, 4)), 137, "rank 1 was killed by SIGKILL"),
        (failed((0, 4), (1, 2)), 2, "rank 1 exited with status 2"),
        (failed((3, 143)), 143, "rank 3 exited with status 143"),
        (SignalException("asked", signal.SIGTERM), 143, "stopped by SIGTERM"),
        (SignalException("asked", signal.SIGINT), 130, "stopped by SIGINT"),
        (
            DistNetworkError("…, code: -98, name: EADDRINUSE, message: …"),
            2,
            "is in use; on one machine torchrun --stand",
        ),
        (RendezvousClosedError(), 1, "another machine has given up"),
        (RendezvousConnectionError("no answer"), 4, "the other machines are lost"),
    ],
)
def test_torchrun_ends_with_the_ranks_status_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int, message: str
) -> None:
    def fail() -> NoReturn:
        raise error

    monkeypatch.setattr(torchrun, "torchrun", fail)
    assert torchrun.main() == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("torchrun: error: ")
    assert message in line


def test_another_error_of_the_network_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> NoReturn:
        raise DistNetworkError("code: -111, name: ECONNREFUSED")

    monkeypatch.setattr(torchrun, "torchrun", fail)
    with pytest.raises(DistNetworkError, match="ECONNREFUSED"):
        torchrun.main()


@pytest.mark.slow
def test_bad_input_on_one_machine_ends_the_others_without_a_restart(tmp_path: Path) -> None:
    """The first machine, which hosts the rendezvous, exits with bad input; the second only loses a rank."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "print('started', os.environ['RANK'], flush=True)\n"
        "time.sleep(2.0 * int(os.environ['RANK']))\n"
        f"sys.exit([{USER_ERROR_EXIT}, {RANK_LOST_EXIT}][int(os.environ['RANK'])])\n"
    )
    program = "import sys; from launch import torchrun; torchrun.FAREWELL_S = 10.0; sys.exit(torchrun.main())"
    port = free_port()
    machines = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", program, "--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "3"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "test"),
                *("--rdzv-conf", f"is_host={int(number == 0)}", str(script)),
            ],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [machine.communicate(timeout=60) for machine in machines]
    # Ranks are numbered in the order in which the machines arrive.
    ends = {machine.returncode: output for machine, output in zip(machines, outputs, strict=True)}
    assert set(ends) == {USER_ERROR_EXIT, torchrun.CLOSED_EXIT}
    assert ends[USER_ERROR_EXIT][0] == "started 0\n"
    assert ends[USER_ERROR_EXIT][1].splitlines()[-1] == "torchrun: error: rank 0 exited with status 2"
    assert ends[torchrun.CLOSED_EXIT][0] == "started 1\n"
    assert ends[torchrun.CLOSED_EXIT][1].splitlines()[-1].startswith("torchrun: error: another machine has given up")
