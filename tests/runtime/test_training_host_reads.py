"""A step transfers no value to the host; an epoch transfers one vector per step and one loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from model.unet3d import Unet3d
from runtime.distributed import step_sync
from runtime.logging.events import (
    Event,
    MicroBatchEnd,
    StepEnd,
)
from runtime.optimizer import make_optimizer
from runtime.precision import Precision
from runtime.train_state import TrainState
from tests.runtime.conftest import train_step
from tests.runtime.loop import (
    MakeBatches,
    MakeState,
    run_epoch,
    step_config,
)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_transfers_no_value_to_the_host(
    scaled: bool, make_state: MakeState, make_batches: MakeBatches, forbid_reading: Callable[[], list[str]]
) -> None:
    state, loader = make_state(momentum=0.9), make_batches(4, 1)
    if scaled:
        state.scaler = UnreadScaler("cpu", enabled=True)
    run_epoch(state, loader)  # creates momentum's buffers and the scale
    reads = forbid_reading()
    for index, batch in enumerate(loader.epoch(1)):
        train_step(state, batch, step_config(2), is_last=index % 2 == 1)
    assert reads == []


class UnreadScaler(torch.amp.GradScaler):
    """A scaler for fused optimizers on a GPU, which check for infinities themselves; on a CPU, torch's reads them."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def update(self, new_scale: float | None = None) -> None:
        """Keeps the scale."""


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


@dataclass(frozen=True)
class WithoutAutocast(Precision):
    """fp32 on a device without autocast support."""

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize("optimizer", ["sgd", "lamb"])
def test_a_step_runs_on_the_meta_device(optimizer: str, make_batches: MakeBatches) -> None:
    """Tensors on the meta device have no values: every attempt to read one raises, also in C++."""
    meta = torch.device("meta")
    with meta:
        network = Unet3d(1, 3, filters=(3, 4))
    state = TrainState(
        network=network,
        model=network,
        optimizer=make_optimizer(optimizer, network.parameters(), 0.1),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    settings = step_config(2, precision=WithoutAutocast(meta, None))
    for index, batch in enumerate(make_batches(4, 1).epoch(1)):
        loss = train_step(state, batch, settings, is_last=index % 2 == 1)
        assert loss.device == meta
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()
