"""torchrun, but for how it ends: with the ranks' exit status, and without starting again what would end in the same.

    python3 -m launch.torchrun --nnodes 2 --nproc_per_node 8 --max-restarts 3 … main.py --resume …

torchrun's own status is 1 whatever became of its ranks: no scheduler could tell bad input from a lost machine. And it
starts ranks again that were given bad input. All flags are torchrun's; without these two wishes, use torchrun itself.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import suppress
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.launcher import api
from torch.distributed.run import main as torchrun

from common.errors import DIVERGED_EXIT, RANK_LOST_EXIT, USER_ERROR_EXIT, error_line, interrupted_exit

# A rank that ended so would end so again.
FINAL_EXITS = (USER_ERROR_EXIT, DIVERGED_EXIT)
# Another machine's torchrun has given up and knows why: the lowest status, since srun tells the highest of all.
CLOSED_EXIT = 1
# As long as it takes a rank to notice that another has gone.
FAREWELL_S = 30.0
POLL_S = 0.1
ENDED_KEY = "ended for good"


class Agent(LocalElasticAgent):
    """Starts, watches and restarts this machine's ranks."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if any(failure.exitcode in FINAL_EXITS for failure in result.failures.values()):
            self._remaining_restarts = 0
            _say_farewell(worker_group)
        return result


def _say_farewell(worker_group: WorkerGroup) -> None:
    """Closes the rendezvous, and stays until every machine's ranks have ended for good too, or for a while.

    One machine keeps the rendezvous. Were it to leave at once, the others would take it for lost, and say so.
    """
    with suppress(RuntimeError, RendezvousError):  # that machine has left already
        worker_group.spec.rdzv_handler.set_closed()
        deadline = time.monotonic() + FAREWELL_S
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
        return _report(CLOSED_EXIT, "another machine has given up; its output says why")
    except RendezvousError as error:
        return _report(RANK_LOST_EXIT, f"the other machines are lost ({type(error).__name__}: {error})")
    return 0


def _cause(error: ChildFailedError) -> tuple[int, str]:
    """The exit status, as shells know it, and the words for the rank that failed first."""
    final = [(rank, failure) for rank, failure in error.failures.items() if failure.exitcode in FINAL_EXITS]
    rank, failure = final[0] if final else error.get_first_failure()
    if failure.exitcode < 0:
        number = -failure.exitcode
        return interrupted_exit(number), f"rank {rank} was killed by {signal.Signals(number).name}"
    return failure.exitcode, f"rank {rank} left with exit status {failure.exitcode}"


def _report(status: int, message: str) -> int:
    print(error_line("torchrun", message), file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
