"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# The devices for which every PyTorch build has fused optimizers.
FUSED_DEVICES = ("cpu", "cuda")
# FusedLAMB's defaults.
LAMB_EPSILON = 1e-6
LAMB_MAX_GRAD_NORM = 1.0


def make_optimizer(
    name: str,
    parameters: Iterable[Parameter],
    learning_rate: float,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Returns `sgd` (with Nesterov momentum), `adam`, or `lamb` (NVIDIA apex's FusedLAMB if installed, else `Lamb`).

    Args:
        momentum: of sgd.
        betas: of adam and lamb.
        weight_decay: L2 penalty; decoupled for lamb.
    """
    parameters = list(parameters)
    # One kernel for all parameters; with a loss scaler it also skips a step without a host sync.
    fused = all(p.device.type in FUSED_DEVICES for p in parameters)
    if name == "sgd":
        # Nesterov without momentum is plain SGD, and torch refuses the pair.
        sgd = torch.optim.SGD(
            parameters,
            lr=learning_rate,
            momentum=momentum,
            nesterov=momentum > 0,
            weight_decay=weight_decay,
            fused=fused,
        )
        if fused and momentum > 0:
            sgd.register_step_pre_hook(_zero_new_momentum)
        return sgd
    if name == "adam":
        return torch.optim.Adam(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=fused)
    apex_lamb = _apex_fused_lamb() if all(p.is_cuda for p in parameters) else None
    return (apex_lamb or Lamb)(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay)


def _zero_new_momentum(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Creates the momentum of parameters that have none yet; with zeros, the first step is the same.

    Torch's fused SGD would create it itself, but leave it unwritten if a loss scaler skips the first step, as it often
    does; the next step then reads whatever that memory held (torch 2.13, on a CPU: numbers up to 3e38).
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _apex_fused_lamb() -> Callable[..., torch.optim.Optimizer] | None:
    """NVIDIA apex's FusedLAMB, or None. The `apex` on PyPI is a different program, so the class itself is looked up."""
    try:
        from apex.optimizers import FusedLAMB
    except Exception:  # the other apex fails in ways of its own, a broken build with ImportError or OSError
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
        """Takes one step; `closure`, if given, recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return loss
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in grads]))
        # A tensor, not a Python number: reading it would make the host wait for the device.
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
