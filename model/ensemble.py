"""Several trained networks whose probabilities are averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn


class Ensemble(nn.ModuleList):
    """Networks of one data set, each of which predicts a whole case; `mean_logits` joins their predictions."""


def members_of(network: nn.Module) -> list[nn.Module]:
    """Returns the networks of an ensemble, or the network alone."""
    return list(network) if isinstance(network, Ensemble) else [network]


def mean_logits(logits: Sequence[Tensor]) -> Tensor:
    """Returns the logarithms of the mean probabilities, which are logits too; of one tensor, itself.

    Args:
        logits: of each member, (N, K, ...) float32.
    """
    if len(logits) == 1:
        return logits[0]
    total = logits[0].log_softmax(1)
    for one in logits[1:]:
        total = total.logaddexp(one.log_softmax(1))
    return total - math.log(len(logits))
