"""Dice and cross-entropy as MLPerf computes them, in fp32 whatever the logits' type; and the Dice score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common import registry
from common.errors import UserError
from model.kernels.dispatch import triton_for

# Keeps the ratio finite: a class absent from truth and prediction alike counts as 1.0.
SMOOTHING = 1e-6
SPATIAL = (2, 3, 4)
SPATIAL_OF_CLASS = (1, 2, 3)


def dice_ratio(intersection: Tensor, total: Tensor) -> Tensor:
    """(2 * intersection + 1e-6) / (total + 1e-6), where total is the sum of both sizes."""
    return (2.0 * intersection + SMOOTHING) / (total + SMOOTHING)


@dataclass(frozen=True)
class DiceSums:
    """Sums over a sample's voxels, from which both losses follow.

    Attributes:
        cross_entropy: (N,), of -log(probability of the true class).
        intersection: (N, K), of the class's probability where it is true.
        predicted: (N, K), of its probability everywhere.
        true: (N, K), of voxels where it is true.
    """

    cross_entropy: Tensor
    intersection: Tensor
    predicted: Tensor
    true: Tensor


def overlap_sums(logits: Tensor, labels: Tensor) -> DiceSums:
    """The sums in one pass over logits (N, K, D, H, W) and labels (N, 1, D, H, W), in fp32, and in one pass back.

    No one-hot tensor and no probabilities are kept: the way back computes the softmax again.
    """
    return DiceSums(*_OverlapSums.apply(logits, labels))


class _OverlapSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(logits, labels)
        kernels = triton_for(logits)
        cross_entropy, intersection, predicted, true = (
            kernels.sums_forward(logits, labels) if kernels else sums_forward(logits, labels)
        )
        ctx.mark_non_differentiable(true)
        return cross_entropy, intersection, predicted, true

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        kernels = triton_for(logits)
        backward = kernels.sums_backward if kernels else sums_backward
        return backward(logits, labels, *grads[:3]), None


def sums_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`overlap_sums` in PyTorch's terms."""
    logarithms = logits.float().log_softmax(1)
    probabilities = logarithms.exp()
    cross_entropy = torch.zeros(len(logits), device=logits.device)
    intersection, true = torch.empty(2, *logits.shape[:2], device=logits.device)
    for value in range(logits.shape[1]):
        is_true = labels[:, 0] == value
        true[:, value] = is_true.sum(SPATIAL_OF_CLASS)
        intersection[:, value] = (probabilities[:, value] * is_true).sum(SPATIAL_OF_CLASS)
        cross_entropy -= (logarithms[:, value] * is_true).sum(SPATIAL_OF_CLASS)
    return cross_entropy, intersection, probabilities.sum(SPATIAL), true


def sums_backward(
    logits: Tensor, labels: Tensor, cross_entropy: Tensor, intersection: Tensor, predicted: Tensor
) -> Tensor:
    """The logits' gradient from the sums' gradients; of their shape, type and memory format.

    With p the softmax, t the truth and q = predicted + intersection * t, class j's is
    cross_entropy * (p_j - t_j) + p_j * (q_j - sum_k q_k p_k).
    """

    def column(gradient: Tensor) -> Tensor:
        return gradient.view(-1, 1, 1, 1)

    probabilities = logits.float().softmax(1)
    gradient = torch.empty_like(logits, dtype=torch.float32)  # softmax forgets the memory format
    mean = torch.zeros_like(probabilities[:, 0])
    for value in range(logits.shape[1]):
        is_true = labels[:, 0] == value
        gradient[:, value] = column(predicted[:, value]) + column(intersection[:, value]) * is_true
        mean.addcmul_(gradient[:, value], probabilities[:, value])
    gradient += cross_entropy.view(-1, 1, 1, 1, 1) - mean[:, None]
    gradient *= probabilities
    for value in range(logits.shape[1]):
        gradient[:, value] -= column(cross_entropy) * (labels[:, 0] == value)
    return gradient.to(logits.dtype)


class DiceLoss(nn.Module):
    """1 - Dice of the softmax, mean over samples and classes.

    Args:
        include_background: whether class 0 counts.
    """

    def __init__(self, include_background: bool = False) -> None:
        super().__init__()
        self.first_class = 0 if include_background else 1

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, K, D, H, W), labels (N, 1, D, H, W) -> scalar."""
        return self.of_sums(overlap_sums(logits, labels))

    def of_sums(self, sums: DiceSums) -> Tensor:
        """The loss from the sums over voxels."""
        ratio = dice_ratio(sums.intersection, sums.predicted + sums.true)
        return (1.0 - ratio[:, self.first_class :]).mean()


class DiceCELoss(nn.Module):
    """(cross-entropy + Dice loss) / 2, MLPerf's training loss.

    Args:
        include_background: whether class 0 counts in the Dice term; cross-entropy always counts every voxel.
    """

    def __init__(self, include_background: bool = False) -> None:
        super().__init__()
        self.dice = DiceLoss(include_background)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, K, D, H, W), labels (N, 1, D, H, W) -> scalar."""
        sums = overlap_sums(logits, labels)
        cross_entropy = sums.cross_entropy.sum() / labels.numel()
        return (cross_entropy + self.dice.of_sums(sums)) / 2


class Adapted(nn.Module):
    """A loss of another library, with our arguments: logits in fp32, and the truth as that loss wants it.

    MONAI's Dice on 16-bit logits saturates, hence fp32. Torch's own losses take class indices (N, D, H, W) int64, all
    others the labels as they are, (N, 1, D, H, W) uint8.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.takes_indices = type(loss).__module__.startswith("torch.nn.")

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, K, D, H, W), labels (N, 1, D, H, W) -> scalar."""
        return self.loss(logits.float(), labels[:, 0].long() if self.takes_indices else labels)


LOSSES: registry.Table[nn.Module] = {"dice_ce": DiceCELoss, "dice": DiceLoss}
# A checkpoint may name these: a loss that takes labels, not one that fetches a network to compare with.
KNOWN = registry.Known(("monai.losses", "torch.nn"), nn.Module, (("to_onehot_y", "label_smoothing"),))
# How a loss makes probabilities of logits: where the user says none, softmax.
PROBABILITIES = ("softmax", "use_softmax", "sigmoid", "other_act")


def build_loss(spec: str, include_background: bool, classes: int) -> nn.Module:
    """The loss that `--loss` names: (logits (N, K, D, H, W), labels (N, 1, D, H, W) uint8) -> scalar, in fp32.

    Where a loss has the parameters and the spec leaves them out, it gets softmax, one-hot labels and the flag.

    Args:
        spec: may import what is not in the table where it is `registry.Typed`, else the `KNOWN` alone.

    Raises:
        UserError: unknown name or arguments, a spec that may not import, or no loss of logits and labels.
    """
    found = registry.find(spec, LOSSES, "--loss", KNOWN)
    defaults: dict[str, Any] = {"include_background": include_background, "to_onehot_y": True}
    if not set(PROBABILITIES) & set(found.arguments):
        defaults |= {"softmax": True, "use_softmax": True}
    loss = found.call({}, defaults)
    if isinstance(loss, DiceLoss | DiceCELoss):
        return loss
    adapted = Adapted(loss)
    logits = torch.zeros(1, classes, 8, 8, 8)
    try:
        value = adapted(logits, torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8))
    except Exception as error:
        told = " ".join(str(error).split())
        raise UserError(f"--loss {str(spec)!r} cannot compare {classes} classes' logits and labels: {told}") from None
    if not isinstance(value, Tensor) or value.dim():
        made = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(f"--loss {str(spec)!r} makes {made}, not a single number; does it need a reduction?")
    return adapted


def dice_score(logits: Tensor, labels: Tensor) -> Tensor:
    """Dice of the arg-max per class, background left out, in float64.

    Counts are whole numbers, exact in float64 up to 2^53 voxels; a class that neither side has counts as 1.0.

    Args:
        logits: (N, K, D, H, W).
        labels: (N, 1, D, H, W).

    Returns:
        (N, K - 1) float64.
    """
    prediction = logits.argmax(dim=1, keepdim=True)
    scores = []
    for value in range(1, logits.shape[1]):
        predicted, true = prediction == value, labels == value
        intersection = (predicted & true).sum(SPATIAL).double()
        total = predicted.sum(SPATIAL).double() + true.sum(SPATIAL).double()
        scores.append(dice_ratio(intersection, total)[:, 0])
    return torch.stack(scores, dim=1)
