"""How the loss of a micro-batch is computed: from its logits alone, or by an `--augment` that mixes samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from common import registry
from common.errors import UserError
from common.messages import note
from model.deep_supervision import Outputs

Predict = Callable[[Tensor], Outputs]


class Objective(Protocol):
    """Computes a loss to backpropagate. Its random numbers come from torch's generator, seeded by `seed_step`."""

    def __call__(self, network: nn.Module, predict: Predict, loss: nn.Module, image: Tensor, label: Tensor) -> Tensor:
        """The loss of one micro-batch, a scalar.

        Args:
            network: the bare network, to inspect; `predict` runs it, in the run's precision.
            image: (N, C, D, H, W).
            label: (N, 1, D, H, W) uint8.
        """
        ...


def plain(network: nn.Module, predict: Predict, loss: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """The loss of the logits."""
    value: Tensor = loss(predict(image), label)
    return value


OBJECTIVES: registry.Table[Objective] = {
    "mixup": "runtime.mixup:Mixup",
    "manifold_mixup": "runtime.mixup:ManifoldMixup",
}


def split_specs(specs: Sequence[registry.Spec]) -> tuple[list[registry.Spec], list[registry.Spec]]:
    """Splits `--augment` into the specs that change single samples and those that mix the samples of a batch."""
    mixing = [spec for spec in specs if registry.parse(spec, "--augment")[0] in OBJECTIVES]
    return [spec for spec in specs if spec not in mixing], mixing


def make_objective(specs: Sequence[registry.Spec], batch_size: int, is_compiled: bool) -> Objective:
    """Returns the objective that `--augment` names, and notes where it has no effect.

    Raises:
        UserError: more than one, unknown arguments, or one that `--compile` would bypass.
    """
    if not specs:
        return plain
    if len(specs) > 1:
        raise UserError(f"--augment {' '.join(map(str, specs))}: only one of them may mix samples")
    objective = registry.build(specs[0], OBJECTIVES, "--augment")
    if is_compiled and getattr(objective, "looks_inside", False):
        raise UserError(f"--augment {specs[0]} hooks into the network's layers, which --compile would bypass; drop one")
    if batch_size == 1:
        note(f"--augment {specs[0]} does nothing with a --batch_size of 1: there is no sample to mix with")
    return objective
