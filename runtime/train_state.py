"""What training changes, and why a run ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import Interrupted, interrupted_exit
from common.messages import counted
from runtime.weight_average import WeightAverage


@dataclass(frozen=True)
class Stop:
    """Why a run ends: "success" or "aborted", the reason, and the program's exit status."""

    status: str
    reason: str
    exit_status: int = 0

    @property
    def is_interrupted(self) -> bool:
        """Whether a signal ended the run."""
        return self.exit_status > interrupted_exit(0)


def stop_at_signal(signalled: Interrupted) -> Stop:
    """Returns the end of a run that a signal asks for."""
    return Stop("aborted", str(signalled), signalled.exit_status)


def first_stop(stops: Iterable[Stop | None]) -> Stop | None:
    """Returns the first request to stop; every callback is called, whatever those before it returned."""
    return next((stop for stop in list(stops) if stop), None)


@dataclass(frozen=True)
class PendingEvaluation:
    """An evaluation under way on evaluating ranks, while training goes on: its epoch, and the weights on the host."""

    epoch: int
    weights: dict[str, Tensor]


def on_host(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a copy of a state dict on the host. Waits for the device."""
    return {
        name: tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)
        for name, tensor in weights.items()
    }


NOT_REACHED = "the target was not reached"


def target_not_reached(epochs: int) -> str:
    """Returns the reason of a run that has used up its epochs."""
    return f"{NOT_REACHED} in {counted(epochs, 'epoch')}"


def outcome(status: str, reason: str) -> str:
    """Returns in plain words how a run ended: MLPerf calls "aborted" also what has only used up its epochs."""
    if status == "success":
        return "target reached"
    return "target not reached" if reason.startswith(NOT_REACHED) else "stopped"


@dataclass(kw_only=True)
class TrainState:
    """What training changes; a checkpoint holds all of it, except the gradients' norm.

    Attributes:
        network: the bare network.
        model: the network, wrapped for gradient averaging where there are several ranks.
        average: of `--ema_decay`; None without it.
        epoch: the last completed epoch, 0 before the first.
        step: optimizer steps of the run so far.
        batch: micro-batches of the next epoch that are done, up to its last whole step.
        loss_sum: the sum of this rank's losses over those micro-batches, a scalar on the device; None if `batch` is 0.
        evaluated: the last epoch whose scores are known.
        pending: the evaluation under way on evaluating ranks, of a later epoch; None if there is none.
        gradient_norm: of the last step, a scalar on the device.
        best_epoch, best_dice, best_network: the best evaluation so far; the weights are on the host.
        scored: the weights that were evaluated, while callbacks hear of their scores; None at other times.
        callback_state: what callbacks and learning-rate schedules need again after a resume, by their names: plain
            Python, and equal on all ranks where decisions depend on it.
    """

    network: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: WeightAverage | None = None
    epoch: int = 0
    step: int = 0
    batch: int = 0
    loss_sum: Tensor | None = None
    evaluated: int = 0
    pending: PendingEvaluation | None = None
    gradient_norm: Tensor | None = None
    best_epoch: int = 0
    best_dice: float = -1.0
    best_network: dict[str, Tensor] | None = None
    scored: dict[str, Tensor] | None = None
    callback_state: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def evaluated_weights(self) -> dict[str, Tensor]:
        """What an evaluation scores: the average of `--ema_decay`, otherwise the network's own weights."""
        return self.average.weights if self.average else self.network.state_dict()

    @property
    def scored_weights(self) -> dict[str, Tensor]:
        """The weights of the latest scores: with `--eval_ranks`, those of an earlier epoch."""
        return self.evaluated_weights if self.scored is None else self.scored

    def scoring(self) -> AbstractContextManager[None]:
        """Gives the network its `scored_weights` for a while."""
        return self.evaluating() if self.scored is None else other_weights(self.network, self.scored)

    def evaluating(self) -> AbstractContextManager[None]:
        """Gives the network its `evaluated_weights` for a while."""
        return other_weights(self.network, self.average.weights) if self.average else nullcontext()


@contextmanager
def other_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives a network other weights and buffers for a while; restores its own afterwards, bit for bit."""
    own = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(dict(weights))
    try:
        yield
    finally:
        network.load_state_dict(own)
