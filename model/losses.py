"""Dice and cross-entropy as MLPerf computes them, in fp32 whatever the logits' type; and the Dice score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Keeps the ratio finite: a class absent from truth and prediction alike counts as 1.0.
SMOOTHING = 1e-6
SPATIAL = (2, 3, 4)


def dice_ratio(intersection: Tensor, total: Tensor) -> Tensor:
    """(2 * intersection + 1e-6) / (total + 1e-6), where total is the sum of both sizes."""
    return (2.0 * intersection + SMOOTHING) / (total + SMOOTHING)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(N, 1, D, H, W) integers -> (N, K, D, H, W) float32."""
    values = torch.arange(classes, device=labels.device, dtype=labels.dtype).view(1, classes, 1, 1, 1)
    return (labels == values).float()


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
        probabilities = logits.float().softmax(dim=1)[:, self.first_class :]
        truth = one_hot(labels, logits.shape[1])[:, self.first_class :]
        intersection = (probabilities * truth).sum(SPATIAL)
        total = probabilities.sum(SPATIAL) + truth.sum(SPATIAL)
        return (1.0 - dice_ratio(intersection, total)).mean()


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
        cross_entropy = F.cross_entropy(logits.float(), labels[:, 0].long())
        return (cross_entropy + self.dice(logits, labels)) / 2


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
