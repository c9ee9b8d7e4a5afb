"""An epoch transfers one vector per step to the host, and one loss; `test_cuda_step.py` has what a step must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from runtime.distributed import step_sync
from runtime.logging.events import (
    Event,
    MicroBatchEnd,
    StepEnd,
)
from tests.runtime.loop import (
    MakeBatches,
    MakeState,
    run_epoch,
)


def test_the_host_reads_a_step_during_the_next_one_and_one_loss_per_epoch(
    make_state: MakeState,
    make_batches: MakeBatches,
    forbid_reading: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The only transfer of a step is the vector of StepSync, once it has arrived; the lag is 1 as on a GPU."""
    state, loader = make_state(momentum=0.9), make_batches(6, 1)
    run_epoch(state, loader)  # creates momentum's buffers
    log = forbid_reading()

    def copied(vector: Tensor, free: list[Any]) -> Callable[[], list[float]]:
        log.append("sent")

        def read() -> list[float]:
            log.append("arrived")
            return vector.tolist()

        return read

    def emit(event: Event) -> None:
        if isinstance(event, MicroBatchEnd | StepEnd):
            log.append(f"{type(event).__name__} {event.batch}")

    monkeypatch.setattr(step_sync, "_start_copy", copied)
    run_epoch(state, loader, ga_steps=2, lag=1, emit=emit)
    assert log == [
        *("MicroBatchEnd 0", "MicroBatchEnd 1", "sent"),
        *("MicroBatchEnd 2", "MicroBatchEnd 3", "sent", "arrived", "tolist", "StepEnd 1"),
        *("MicroBatchEnd 4", "MicroBatchEnd 5", "sent", "arrived", "tolist", "StepEnd 3"),
        *("arrived", "tolist", "StepEnd 5", "item"),
    ]
