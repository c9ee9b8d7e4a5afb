"""`--ema_decay`: an exponential moving average of the weights, which evaluations score and the best state holds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from common.compat import foreach_lerp


class WeightAverage:
    """The average a of a network's weights and buffers w: after each step, a += (1 - d) * (w - a).

    d is `decay`, but at most (1 + n) / (10 + n) after n steps, as in TensorFlow's `ExponentialMovingAverage`: the
    random weights of the start would otherwise count for 1 / (1 - decay) steps. Whole numbers, such as batch norm's
    count of batches, are copied. The ranks need no exchange, since their weights are equal.

    Args:
        network: starts the average with its weights; must not be moved to another device afterwards.
        decay: in [0, 1).

    Attributes:
        weights: the averages, by the names of the network's state dict, on its device.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._decay = decay
        self._network = network
        self.weights = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    def update(self, step: int) -> None:
        """Takes in the weights after that many steps of the run."""
        share = 1 - min(self._decay, (1 + step) / (10 + step))
        own = self._network.state_dict()  # each time: a network may replace a buffer by another tensor
        means = [name for name, tensor in own.items() if tensor.is_floating_point()]
        foreach_lerp([self.weights[name] for name in means], [own[name] for name in means], share)
        for name in own.keys() - means:
            self.weights[name].copy_(own[name])

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continues from these averages."""
        for name, tensor in weights.items():
            self.weights[name].copy_(tensor)
