"""The losses: MLPerf's Dice and cross-entropy, and adapters for other libraries' losses. All compute in fp32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.errors import UserError, one_line
from common.registry import Allowlist, Spec, Table, resolve
from model.kernels.dispatch import triton_for
from model.metrics import SPATIAL, dice_ratio
from model.slabs import Slabs, SumOverSlabs

# D, H and W of one class's voxels, (N, D, H, W).
SPATIAL_OF_CLASS = (1, 2, 3)


@dataclass(frozen=True)
class DiceSums:
    """Sums over each sample's voxels, from which Dice and cross-entropy follow.

    Attributes:
        cross_entropy: (N,), -log(probability of the true class).
        intersection: (N, K), probability of class k where it is the true one.
        predicted: (N, K), probability of class k everywhere.
        true: (N, K), number of voxels of class k.
    """

    cross_entropy: Tensor
    intersection: Tensor
    predicted: Tensor
    true: Tensor


def dice_sums(logits: Tensor, labels: Tensor, ignore_label: int | None = None) -> DiceSums:
    """Computes the sums in fp32 (float64 stays), with one pass over the voxels forward and one backward.

    Neither a one-hot tensor nor probabilities are kept: the backward pass recomputes the softmax.

    Args:
        logits: (N, K, D, H, W).
        labels: (N, 1, D, H, W).
        ignore_label: label of the voxels that count in no sum; PyTorch computes these sums, not Triton.
    """
    return DiceSums(*_DiceSumsFunction.apply(logits, labels, ignore_label))


def joined(sums: DiceSums) -> Tensor:
    """Returns the sums as one tensor (N, 1 + 3 K), to add up those of several slabs."""
    return torch.cat([sums.cross_entropy[:, None], sums.intersection, sums.predicted, sums.true], 1)


def split(sums: Tensor) -> DiceSums:
    """Undoes `joined`."""
    classes = sums.shape[1] // 3
    cross_entropy, *overlaps = sums.split([1, classes, classes, classes], 1)
    return DiceSums(cross_entropy[:, 0], *overlaps)


class _DiceSumsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_label: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(logits, labels)
        ctx.ignore_label = ignore_label
        kernels = triton_for(logits, "loss") if ignore_label is None else None
        forward = kernels.sums_forward if kernels else partial(sums_forward, ignore_label=ignore_label)
        cross_entropy, intersection, predicted, true = forward(logits, labels)
        ctx.mark_non_differentiable(true)
        return cross_entropy, intersection, predicted, true

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        kernels = triton_for(logits, "loss") if ctx.ignore_label is None else None
        backward = kernels.sums_backward if kernels else partial(sums_backward, ignore_label=ctx.ignore_label)
        return backward(logits, labels, DiceSums(*grads)), None, None


def sums_forward(
    logits: Tensor, labels: Tensor, ignore_label: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `dice_sums` with PyTorch operators.

    Returns:
        The fields of `DiceSums`.
    """
    logarithms = _at_least_fp32(logits).log_softmax(1)
    if ignore_label is None:
        probabilities = logarithms.exp()
    else:
        is_ignored = labels == ignore_label
        logarithms = logarithms.masked_fill(is_ignored, 0)  # also where they are infinite
        probabilities = logarithms.exp().masked_fill_(is_ignored, 0)
    cross_entropy = logarithms.new_zeros(len(logits))
    intersection, true = logarithms.new_empty(2, *logits.shape[:2])
    for value in range(logits.shape[1]):
        is_true = labels[:, 0] == value
        true[:, value] = is_true.sum(SPATIAL_OF_CLASS)
        intersection[:, value] = (probabilities[:, value] * is_true).sum(SPATIAL_OF_CLASS)
        cross_entropy -= (logarithms[:, value] * is_true).sum(SPATIAL_OF_CLASS)
    return cross_entropy, intersection, probabilities.sum(SPATIAL), true


def sums_backward(logits: Tensor, labels: Tensor, grads: DiceSums, ignore_label: int | None = None) -> Tensor:
    """Computes the gradient with respect to the logits from `grads`, those with respect to the sums.

    With p the softmax, t the one-hot truth and q = predicted + intersection * t, the gradient of class j is
    cross_entropy * (p_j - t_j) + p_j * (q_j - sum_k q_k p_k). `true` does not depend on the logits.

    Returns:
        (N, K, D, H, W) in the type and memory format of the logits.
    """

    def column(gradient: Tensor) -> Tensor:
        return gradient.view(-1, 1, 1, 1)

    probabilities = _at_least_fp32(logits).softmax(1)
    gradient = torch.empty_like(logits, dtype=probabilities.dtype)  # softmax does not keep the memory format
    mean = torch.zeros_like(probabilities[:, 0])
    for value in range(logits.shape[1]):
        is_true = labels[:, 0] == value
        gradient[:, value] = column(grads.predicted[:, value]) + column(grads.intersection[:, value]) * is_true
        mean.addcmul_(gradient[:, value], probabilities[:, value])
    gradient += grads.cross_entropy.view(-1, 1, 1, 1, 1) - mean[:, None]
    gradient *= probabilities
    for value in range(logits.shape[1]):
        gradient[:, value] -= column(grads.cross_entropy) * (labels[:, 0] == value)
    if ignore_label is not None:
        gradient.masked_fill_(labels == ignore_label, 0)
    return gradient.to(logits.dtype)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class DiceLoss(nn.Module):
    """1 - Dice of the softmax, averaged over samples and classes.

    Args:
        include_background: whether to average over class 0 too.
        ignore_label: label of the voxels that do not count.
    """

    def __init__(self, include_background: bool = False, ignore_label: int | None = None) -> None:
        super().__init__()
        self.first_class = 0 if include_background else 1
        self.ignore_label = ignore_label

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, K, D, H, W), labels (N, 1, D, H, W) -> scalar."""
        return self.from_sums(dice_sums(logits, labels, self.ignore_label), labels.numel())

    def from_sums(self, sums: DiceSums, voxels: int) -> Tensor:
        """Computes the loss from the sums over the voxels of all samples, `voxels` of them."""
        ratio = dice_ratio(sums.intersection, sums.predicted + sums.true)
        return (1.0 - ratio[:, self.first_class :]).mean()


class DiceCELoss(nn.Module):
    """(cross-entropy + Dice loss) / 2, MLPerf's training loss.

    Args:
        include_background: whether the Dice term includes class 0; cross-entropy always includes every voxel.
        ignore_label: label of the voxels that do not count; the cross-entropy is the mean over all others.
    """

    def __init__(self, include_background: bool = False, ignore_label: int | None = None) -> None:
        super().__init__()
        self.dice = DiceLoss(include_background, ignore_label)
        self.ignore_label = ignore_label

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, K, D, H, W), labels (N, 1, D, H, W) -> scalar."""
        return self.from_sums(dice_sums(logits, labels, self.ignore_label), labels.numel())

    def from_sums(self, sums: DiceSums, voxels: int) -> Tensor:
        """Computes the loss from the sums over the voxels of all samples, `voxels` of them."""
        # Every voxel that counts is one of a class; without any the loss is 0.
        counted = voxels if self.ignore_label is None else sums.true.sum().clamp(min=1)
        return (sums.cross_entropy.sum() / counted + self.dice.from_sums(sums, voxels)) / 2


# Losses that follow from sums over the voxels, and so can be computed slab by slab.
FromSums = DiceLoss | DiceCELoss


class LossOfSlabs:
    """The loss of a volume whose logits come slab by slab. Only a loss that follows from no sums needs all of them.

    Args:
        loss: as `build_loss` returns it.
    """

    def __init__(self, loss: nn.Module) -> None:
        self._loss = loss
        self._sums: list[Tensor] = []
        self._whole: list[tuple[Tensor, Tensor]] = []
        self._voxels = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a slab's logits (N, K, planes, H, W) and labels (N, 1, planes, H, W), in the order of the planes."""
        self._voxels += labels.numel()
        if isinstance(self._loss, FromSums):
            self._sums.append(joined(dice_sums(logits, labels, self._loss.ignore_label)).double())
        else:
            self._whole.append((logits, labels))

    def value(self) -> Tensor:
        """Returns the loss, a scalar; float64 if it follows from sums."""
        if isinstance(self._loss, FromSums):
            return self._loss.from_sums(split(torch.stack(self._sums).sum(0)), self._voxels)
        logits, labels = (torch.cat(parts, dim=2) for parts in zip(*self._whole, strict=True))
        loss: Tensor = self._loss(logits, labels)
        return loss


class SlabLoss(nn.Module):
    """The loss of whole windows on every rank, from its slabs' logits and labels. See `SumOverSlabs` for its gradient.

    Raises:
        UserError: not a loss that follows from sums over the voxels.
    """

    def __init__(self, loss: nn.Module, slabs: Slabs) -> None:
        super().__init__()
        if not isinstance(loss, FromSums):
            raise UserError("--ranks_per_sample: only the losses dice_ce and dice can be computed by slabs")
        self.loss = loss
        self.slabs = slabs

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, K, D, H, W), labels (N, 1, D, H, W) of a slab -> scalar."""
        total = SumOverSlabs.apply(joined(dice_sums(logits, labels, self.loss.ignore_label)), self.slabs)
        return self.loss.from_sums(split(total), labels.numel() * self.slabs.count)


class LibraryLoss(nn.Module):
    """Another library's loss behind our arguments.

    It gets fp32 logits, because MONAI's Dice saturates on 16-bit ones. Torch's own losses get class indices
    (N, D, H, W) int64, all others the labels unchanged, (N, 1, D, H, W) uint8.

    Args:
        ignore_label: without a voxel of another label, the loss is 0: a library's mean over no voxel is NaN.
    """

    def __init__(self, loss: nn.Module, ignore_label: int | None = None) -> None:
        super().__init__()
        self.loss = loss
        self.ignore_label = ignore_label
        self.takes_indices = type(loss).__module__.startswith("torch.nn.")

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (N, K, D, H, W), labels (N, 1, D, H, W) -> scalar."""
        logits = logits.float()
        if self.ignore_label is not None:
            counted = (labels != self.ignore_label).any()
            # Before the loss too: a gradient that is no number would remain one if it were only multiplied by zero.
            logits = torch.where(counted, logits, 0.0)
        value: Tensor = self.loss(logits, labels[:, 0].long() if self.takes_indices else labels)
        return value if self.ignore_label is None else torch.where(counted, value, logits.sum() * 0)


LOSSES: Table[nn.Module] = {"dice_ce": DiceCELoss, "dice": DiceLoss}
# Losses that a checkpoint may name: those that compare with labels, none that downloads a network.
ALLOWED = Allowlist(
    modules=("monai.losses", "torch.nn"),
    base=nn.Module,
    required_parameters=(("to_onehot_y", "label_smoothing"),),
)
# Parameters that select how a loss turns logits into probabilities; softmax if the spec sets none of them.
PROBABILITIES = ("softmax", "use_softmax", "sigmoid", "other_act")


def build_loss(spec: Spec | str, include_background: bool, classes: int, ignore_label: int | None = None) -> nn.Module:
    """Builds the loss that `--loss` names: (logits (N, K, D, H, W), labels (N, 1, D, H, W) uint8) -> fp32 scalar.

    A loss with parameters for softmax, one-hot labels and the background gets them unless the spec sets them.

    Args:
        spec: an untrusted one is limited to `LOSSES` and `ALLOWED`.
        include_background: see `DiceCELoss`.
        classes: K, including the background.
        ignore_label: label of the voxels that do not count; torch's losses call it ignore_index.

    Raises:
        UserError: unknown name or arguments, a spec that may not import, not a loss of logits and labels, or one that
            counts every voxel of a data set with an ignore label.
    """
    resolved = resolve(spec, LOSSES, "--loss", ALLOWED)
    defaults: dict[str, Any] = {"include_background": include_background, "to_onehot_y": True}
    if not set(PROBABILITIES) & set(resolved.arguments):
        defaults |= {"softmax": True, "use_softmax": True}
    if ignore_label is not None:
        defaults |= {"ignore_label": ignore_label, "ignore_index": ignore_label}
    loss = resolved.call({}, defaults)
    if isinstance(loss, nn.Module) and any(parameter.requires_grad for parameter in loss.parameters()):
        raise UserError(f"--loss {str(spec)!r} has parameters of its own, which nothing would train; use buffers")
    if ignore_label not in (None, getattr(loss, "ignore_label", None), getattr(loss, "ignore_index", None)):
        raise UserError(
            f"--loss {str(spec)!r} counts every voxel, also those that the data set's ignore label leaves out; use "
            "dice_ce, dice, or a loss with ignore_label or ignore_index"
        )
    if isinstance(loss, FromSums):
        return loss
    adapted = LibraryLoss(loss, ignore_label)
    logits, labels = torch.zeros(1, classes, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8, dtype=torch.uint8)
    try:
        value = adapted(logits, labels)
    except Exception as error:  # any loss of any library
        problem = f"cannot compare logits of {classes} classes with labels: {one_line(error)}"
        raise UserError(f"--loss {str(spec)!r} {problem}") from None
    if not isinstance(value, Tensor) or value.dim():
        returned = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UserError(f"--loss {str(spec)!r} returns {returned}, not a single number; does it need a reduction?")
    return adapted
