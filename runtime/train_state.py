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


def target_not_reached(epochs: int) -> str:
    """Returns the reason of a run that has used up its epochs."""
    return f"the target was not reached in {epochs} epochs"


@dataclass(kw_only=True)
class TrainState:
    """What training changes; a checkpoint holds all of it, except the gradients' norm.

    Attributes:
        network: the bare network.
        model: the network, wrapped for gradient averaging where there are several ranks.
        epoch: the last completed epoch, 0 before the first.
        step: optimizer steps of the run so far.
        batch: micro-batches of the next epoch that are done, up to its last whole step.
        loss_sum: the sum of this rank's losses over those micro-batches, a scalar on the device; None if `batch` is 0.
        evaluated: the last epoch after which the network was evaluated.
        gradient_norm: of the last step, a scalar on the device.
        best_epoch, best_dice, best_network: the best evaluation so far; the weights are on the host.
        callback_state: what callbacks and learning-rate schedules need again after a resume, by their names: plain
            Python, and equal on all ranks where decisions depend on it.
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
    callback_state: dict[str, dict[str, Any]] = field(default_factory=dict)
