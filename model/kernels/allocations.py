"""What Triton's norm and loss allocate on the device: the same tensors, but no values, for estimates of memory.

Sums per program are left out: a thousandth of the tensors that they are sums of. The other operators of
`kernels/triton/` allocate no more than PyTorch's own, by which they are estimated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.losses import DiceSums
from model.normalization import NormState
from model.slabs import Slabs


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, slope: float, slabs: Slabs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    mean, inverse_std = x.new_empty(2, *x.shape[:2], dtype=torch.float32)
    return torch.empty_like(x), mean, inverse_std


def norm_backward(
    grad: Tensor, state: NormState, slope: float, slabs: Slabs | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.contiguous(memory_format=torch.channels_last_3d)  # alive until the function returns
    return torch.empty_like(state.x), torch.empty_like(state.weight), torch.empty_like(state.bias)


def sums_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns four empty tensors with the shapes of the fields of `DiceSums`."""
    logits = _ordered(logits)
    intersection, predicted, true = logits.new_empty(3, *logits.shape[:2], dtype=torch.float32)
    return logits.new_empty(len(logits), dtype=torch.float32), intersection, predicted, true


def sums_backward(logits: Tensor, labels: Tensor, grads: DiceSums) -> Tensor:
    return torch.empty_like(_ordered(logits))


def _ordered(logits: Tensor) -> Tensor:
    """Returns the logits in NCDHW or channels-last order, copied if they are in neither."""
    return logits if logits.is_contiguous(memory_format=torch.channels_last_3d) else logits.contiguous()
