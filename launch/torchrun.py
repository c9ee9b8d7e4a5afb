"""torchrun, except for how it ends: with the ranks' exit status, and without restarts that would fail the same way.

    python3 -m launch.torchrun --nnodes 2 --nproc_per_node 8 --max-restarts 3 … main.py --resume …

torchrun's own status is 1 whatever happened to its ranks, so no scheduler can tell bad input from a lost machine;
and it restarts ranks that were given bad input. All flags are torchrun's.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import suppress
from typing import Any

from torch.distributed import DistNetworkError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api
from torch.distributed.run import main as torchrun

from common.compat import is_port_in_use
from common.errors import DIVERGED_EXIT, RANK_LOST_EXIT, USER_ERROR_EXIT, error_line, interrupted_exit, port_in_use

# A rank with such a status would end the same way again.
FINAL_EXITS = (USER_ERROR_EXIT, DIVERGED_EXIT)
# Another machine's torchrun has given up and reports why: the lowest status, since srun returns the highest of all.
CLOSED_EXIT = 1
# The time a rank needs to notice that another has exited.
LINGER_S = 30.0
POLL_S = 0.1
ENDED_KEY = "ended for good"


class Agent(LocalElasticAgent):
    """Starts, watches and restarts this machine's ranks."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if any(failure.exitcode in FINAL_EXITS for failure in result.failures.values()):
            self._remaining_restarts = 0
            _close_rendezvous(worker_group)
        return result


def _close_rendezvous(worker_group: WorkerGroup) -> None:
    """Closes the rendezvous and waits, for a limited time, until the ranks of every machine have ended for good.

    One machine hosts the rendezvous. If it exited at once, the others would report it as lost.
    """
    with suppress(RuntimeError, RendezvousError):  # that machine has exited already
        worker_group.spec.rdzv_handler.set_closed()
        deadline = time.monotonic() + LINGER_S
        store: Any = worker_group.store
        store.add(ENDED_KEY, 1)
        while store.add(ENDED_KEY, 0) < worker_group.group_world_size and time.monotonic() < deadline:
            time.sleep(POLL_S)


def main() -> int:
    api.LocalElasticAgent = Agent  # type: ignore[attr-defined]
    try:
        torchrun()
    except ChildFailedError as error:
        return _report(*_cause(error))
    except SignalException as error:
        return _report(interrupted_exit(error.sigval), f"stopped by {signal.Signals(error.sigval).name}")
    except RendezvousClosedError:
        return _report(CLOSED_EXIT, "another machine has given up; see its output for the reason")
    except DistNetworkError as error:
        if is_port_in_use(error):
            return _report(USER_ERROR_EXIT, port_in_use("29500 or that of --master_port"))
        raise
    except RendezvousError as error:
        return _report(RANK_LOST_EXIT, f"the other machines are lost ({type(error).__name__}: {error})")
    return 0


def _cause(error: ChildFailedError) -> tuple[int, str]:
    """The exit status, as shells report it, and a message about the rank that failed first."""
    final = [(rank, failure) for rank, failure in error.failures.items() if failure.exitcode in FINAL_EXITS]
    rank, failure = final[0] if final else error.get_first_failure()
    if failure.exitcode < 0:
        number = -failure.exitcode
        return interrupted_exit(number), f"rank {rank} was killed by {signal.Signals(number).name}"
    return failure.exitcode, f"rank {rank} exited with status {failure.exitcode}"


def _report(status: int, message: str) -> int:
    print(error_line("torchrun", message), file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
