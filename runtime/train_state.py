"""What training changes, and why a run ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stop:
    """Why a run ends: "success" or "aborted", the reason, and the program's exit status."""

    status: str
    reason: str
    exit_status: int = 0


@dataclass
class TrainState:
    """What training changes; a checkpoint holds all of it.

    Attributes:
        network: the bare network; `model` is it, wrapped for gradient averaging.
        epoch: the last one that was completed.
        step: optimizer steps of the run so far.
        batch: micro-batches of the next epoch that are done, up to the last whole step.
        loss_sum: of those, this rank's losses: a scalar on the device; None where `batch` is 0.
        evaluated: the last epoch with an evaluation behind it.
        gradient_norm: of the last step, a scalar on the device; no checkpoint needs it.
        best_epoch, best_dice, best_network: of the best evaluation yet, the weights on the host.
        stop: why the run must end; None: go on.
        records: what callbacks and schedules must know again after a resume, by their names: plain Python, and alike
            on all ranks as far as decisions follow from it.
    """

    network: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0
    batch: int = 0
    loss_sum: Tensor | None = None
    evaluated: int = 0
    gradient_norm: Tensor | None = None
    best_epoch: int = 0
    best_dice: float = -1.0
    best_network: dict[str, Tensor] | None = None
    stop: Stop | None = None
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
