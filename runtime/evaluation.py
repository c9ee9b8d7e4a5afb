"""Scores the evaluation cases: an exact mean, the same on any number of ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_loading.loader import EvaluationCase
from model.losses import dice_score
from runtime.distributed import World
from runtime.events import CaseEvaluated, EvaluationStarted, EvaluationStopped, Event
from runtime.inference import remainder_crop, sliding_window, stride_of
from runtime.precision import Precision


@dataclass(frozen=True)
class Scoring:
    """How a case is scored; the last three are the data set's (see `DatasetSpec`).

    Attributes:
        window, overlap: of the sliding window.
        classes: K, the background included.
        padding_value, crops_remainder: as in the spec.
    """

    window: tuple[int, int, int]
    overlap: float
    classes: int
    padding_value: float | None
    crops_remainder: bool


def evaluate(
    epoch: int,
    network: nn.Module,
    loss: nn.Module,
    cases: Sequence[str],
    load_case: Callable[[str], EvaluationCase],
    scoring: Scoring,
    precision: Precision,
    world: World,
    emit: Callable[[Event], None],
) -> EvaluationStopped:
    """Scores every case on exactly one rank and shares the scores with all.

    Each rank fills its own rows of a table of zeros. Adding zeros is exact, so the sum over the ranks is the whole
    table to the bit, and every rank takes the same mean of it: each case weighs 1 / number of cases.

    Returns:
        The scores; it is the caller who announces them.
    """
    emit(EvaluationStarted(epoch, len(cases)))
    started = time.perf_counter()
    network.eval()
    world.broadcast_buffers(network)
    table = torch.zeros(len(cases), scoring.classes, dtype=torch.float64)
    for index in world.shard(range(len(cases))):
        table[index] = score_case(load_case(cases[index]), network, loss, scoring, precision)
        emit(CaseEvaluated(epoch, cases[index]))
    network.train()
    table = world.sum(table)
    # Column by column in case order, not a tensor reduction: its order of additions may depend on the machine.
    means = [sum(column) / len(cases) for column in table.T.tolist()]
    dice = means[1:]
    return EvaluationStopped(
        epoch,
        mean_dice=sum(dice) / len(dice),
        dice=dice,
        loss=means[0],
        seconds=time.perf_counter() - started,
        per_case={case: row[1:] for case, row in zip(cases, table.tolist(), strict=True)},
    )


@torch.inference_mode()
def score_case(
    case: EvaluationCase, network: nn.Module, loss: nn.Module, scoring: Scoring, precision: Precision
) -> Tensor:
    """The loss of one case's sliding-window logits and its Dice per foreground class: (K,) float64 on the host."""
    device = precision.device
    image, label = case.image, case.label
    if scoring.crops_remainder:
        kept = remainder_crop(image.shape[2:], stride_of(scoring.window, scoring.overlap))
        image, label = image[..., *kept], label[..., *kept]
    label = label.to(device)

    def predict(windows: Tensor) -> Tensor:
        with precision.autocast():
            logits: Tensor = network(windows)
        return logits

    logits = sliding_window(image.to(device), predict, scoring.window, scoring.overlap, scoring.padding_value)
    # One transfer a case: the host needs the figures only now.
    return torch.cat((loss(logits, label).double().view(1), dice_score(logits, label)[0])).cpu()
