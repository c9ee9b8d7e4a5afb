"""The Dice score, MLPerf's quality metric."""

from __future__ import annotations

import torch
from torch import Tensor

# Keeps the ratio finite: a class that neither side contains scores 1.0.
SMOOTHING = 1e-6
# D, H and W of (N, C, D, H, W).
SPATIAL = (2, 3, 4)


def dice_ratio(intersection: Tensor, total: Tensor) -> Tensor:
    """Returns (2 * intersection + 1e-6) / (total + 1e-6), where total is the sum of both sizes."""
    return (2.0 * intersection + SMOOTHING) / (total + SMOOTHING)


def dice_score(logits: Tensor, labels: Tensor, ignore_label: int | None = None) -> Tensor:
    """Computes the Dice score of the arg-max for every class but the background, as `dice_of_classes` does.

    Args:
        logits: (N, K, D, H, W).
        labels: (N, 1, D, H, W).
        ignore_label: label of the voxels that do not count.
    """
    return dice_of_classes(predicted_classes(logits, labels, ignore_label), labels, logits.shape[1])


def dice_of_classes(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Computes the Dice score of every class but the background.

    Voxel counts are integers, exact in float64 up to 2^53; a class that neither side contains scores 1.0.

    Args:
        prediction: as `predicted_classes` returns it, (N, 1, D, H, W).
        labels: (N, 1, D, H, W).
        classes: K, the background included.

    Returns:
        (N, K - 1) float64.
    """
    scores = []
    for value in range(1, classes):
        predicted, true = prediction == value, labels == value
        intersection = (predicted & true).sum(SPATIAL).double()
        total = predicted.sum(SPATIAL).double() + true.sum(SPATIAL).double()
        scores.append(dice_ratio(intersection, total)[:, 0])
    return torch.stack(scores, dim=1)


def predicted_classes(logits: Tensor, labels: Tensor, ignore_label: int | None) -> Tensor:
    """Returns the arg-max of logits (N, K, D, H, W), (N, 1, D, H, W) int64; the background where nothing counts."""
    prediction = logits.argmax(dim=1, keepdim=True)
    return prediction if ignore_label is None else prediction.masked_fill_(labels == ignore_label, 0)
