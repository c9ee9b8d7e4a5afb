"""Optimizers by name, and the learning rate as a function of the epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from common import registry

# Where every PyTorch build has fused optimizers.
FUSED_DEVICES = ("cpu", "cuda")
# FusedLAMB's defaults.
LAMB_EPSILON = 1e-6
LAMB_MAX_GRAD_NORM = 1.0


def learning_rate(
    epoch: int,
    base: float,
    initial: float = 1e-4,
    warmup_epochs: int = 0,
    decay_epochs: Sequence[int] = (),
    decay_factor: float = 1.0,
) -> float:
    """The rate of a whole epoch, counted from 1.

    Warm-up: initial + (base - initial) * epoch / warmup_epochs up to and including epoch `warmup_epochs`. After it
    MultiStepLR, stepped at each epoch's end: base * factor^(decay epochs that have ended before this epoch). A decay
    epoch inside the warm-up counts from the warm-up's end (the MLPerf reference silently loses it).
    """
    if epoch <= warmup_epochs:
        return warm_up_rate(epoch, base, initial, warmup_epochs)
    return base * decay_factor ** sum(decay < epoch for decay in decay_epochs)


def warm_up_rate(epoch: int, base: float, initial: float, warmup_epochs: int) -> float:
    """initial + (base - initial) * epoch / warmup_epochs, for an epoch up to and including `warmup_epochs`."""
    return initial + (base - initial) * epoch / warmup_epochs


LRSchedule = Callable[[int], float]


@dataclass(frozen=True)
class LRScheduleConfig:
    """What a schedule is made with: the flags of the same names, and the run's records (see `TrainState`)."""

    learning_rate: float
    init_learning_rate: float
    lr_warmup_epochs: int
    lr_decay_epochs: tuple[int, ...]
    lr_decay_factor: float
    epochs: int
    records: dict[str, dict[str, Any]]


def multistep(run: LRScheduleConfig) -> LRSchedule:
    """MLPerf's: constant after the warm-up, times `--lr_decay_factor` after each of `--lr_decay_epochs`."""
    return partial(
        learning_rate,
        base=run.learning_rate,
        initial=run.init_learning_rate,
        warmup_epochs=run.lr_warmup_epochs,
        decay_epochs=run.lr_decay_epochs,
        decay_factor=run.lr_decay_factor,
    )


# One that follows the run's scores is a callback too.
SCHEDULES: registry.Table[LRSchedule] = {
    "multistep": multistep,
    "cosine": "runtime.lr_schedule:Cosine",
    "polynomial": "runtime.lr_schedule:Polynomial",
    "plateau": "runtime.lr_schedule:Plateau",
}


def build_lr_schedule(spec: str, settings: LRScheduleConfig) -> LRSchedule:
    """What `--lr_schedule` names: the rate of each epoch, counted from 1. Raises UserError for an unknown one."""
    return registry.build(registry.Spec(spec, trusted=True), SCHEDULES, "--lr_schedule", run=settings)


def make_optimizer(
    name: str,
    parameters: Iterable[Parameter],
    learning_rate: float,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """`sgd` (Nesterov), `adam`, or `lamb` (NVIDIA apex's FusedLAMB where it is installed, else `Lamb`)."""
    parameters = list(parameters)
    # One kernel for all parameters; with a loss scaler it also skips a step without the host's looking.
    fused = all(p.device.type in FUSED_DEVICES for p in parameters)
    if name == "sgd":
        # Nesterov without momentum is plain SGD, and torch refuses the pair.
        return torch.optim.SGD(
            parameters,
            lr=learning_rate,
            momentum=momentum,
            nesterov=momentum > 0,
            weight_decay=weight_decay,
            fused=fused,
        )
    if name == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=fused)
    apex_lamb = _apex_fused_lamb() if all(p.is_cuda for p in parameters) else None
    return (apex_lamb or Lamb)(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)


def _apex_fused_lamb() -> Callable[..., torch.optim.Optimizer] | None:
    """NVIDIA apex's FusedLAMB, or None. The `apex` on PyPI is another program: look for the class itself."""
    try:
        from apex.optimizers import FusedLAMB
    except Exception:  # the other apex fails in its own ways, a broken build with ImportError or OSError
        return None
    fused: Callable[..., torch.optim.Optimizer] = FusedLAMB
    return fused


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2) with the semantics of apex's FusedLAMB.

    All gradients are first divided by max(1, global norm / 1.0). With bias-corrected Adam moments m, v:
    u = m / (sqrt(v) + 1e-6) + weight_decay * w, and w -= lr * ratio * u, where ratio = |w| / |u| (1 where either is
    0, and 1 where weight_decay is 0, as FusedLAMB skips it there).

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: of the two moments, each in [0, 1).
        weight_decay: decoupled decay, at least 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure` may recompute the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return loss
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in grads]))
        # A tensor, never a number: reading it would make the host wait for the device.
        clip = (norm / LAMB_MAX_GRAD_NORM).clamp(min=1.0)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad.float() / clip, group)
        return loss

    def _update(self, p: Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        state["step"] += 1
        first, second = group["betas"]
        state["exp_avg"].lerp_(grad, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
        mean = state["exp_avg"] / (1 - first ** state["step"])
        square = state["exp_avg_sq"] / (1 - second ** state["step"])
        update = mean / (square.sqrt() + LAMB_EPSILON) + group["weight_decay"] * p
        if group["weight_decay"] == 0:
            p.sub_(update * group["lr"])
            return
        weight_norm, update_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
        ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
        p.sub_(update * (group["lr"] * ratio))
