"""Networks with several outputs (deep supervision): what they return, and the loss over all of their outputs.

In training such a network returns a tuple of logits, full resolution first, and in evaluation the first alone,
whatever form its library chose: a list (nnU-Net's in both modes), or one tensor with the outputs along an axis (MONAI's
DynUNet).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The logits, or in training those of several outputs, full resolution first.
Outputs = Tensor | tuple[Tensor, ...]


def unify_outputs(network: nn.Module, dimensions: int) -> None:
    """Makes a network return `Outputs`: in evaluation always one tensor. Names and weights stay as they are.

    Args:
        dimensions: spatial ones, 3 or 2; a tensor with one axis more than logits holds the outputs along its axis 1.
    """
    network.register_forward_hook(partial(_unified, dimensions=dimensions))


def _unified(network: nn.Module, inputs: tuple[Any, ...], output: Any, dimensions: int) -> Any:
    """A forward hook. What is neither logits nor several of them stays as it is, for `check_window` to refuse."""
    if isinstance(output, Tensor):
        if output.dim() != dimensions + 3:
            return output
        output = output.unbind(1)
    if not isinstance(output, list | tuple) or not output:
        return output
    return tuple(output) if network.training else output[0]


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def output_weights(count: int) -> list[float]:
    """Returns the weights of the outputs' losses: each half of the one before, with a sum of 1."""
    return [2.0**-index / (2 - 2.0 ** (1 - count)) for index in range(count)]


class OutputsLoss(nn.Module):
    """A loss over all outputs: the mean with `output_weights`, the labels brought to each output's size.

    Of the voxels that a coarser one covers, the one at its centre gives the label (with an even number, the next one),
    as in nnU-Net. A single tensor of logits gets the loss itself.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Logits (N, K, D, H, W) of each output's size, labels (N, 1, D, H, W) -> scalar."""
        if isinstance(outputs, Tensor):
            value: Tensor = self.loss(outputs, labels)
            return value
        weights = output_weights(len(outputs))
        losses = [
            w * self.loss(logits, labels_like(labels, logits)) for w, logits in zip(weights, outputs, strict=True)
        ]
        return torch.stack(losses).sum()


def labels_like(labels: Tensor, logits: Tensor) -> Tensor:
    """Returns the labels (N, 1, D, H, W) at the size of the logits, by nearest neighbour; themselves if it is equal."""
    size = logits.shape[2:]
    return labels if labels.shape[2:] == size else F.interpolate(labels, size=size, mode="nearest-exact")
