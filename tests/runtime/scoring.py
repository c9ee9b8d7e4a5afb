"""Cases, networks and calls of the evaluation for its tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from data_loading.data_loader import EvaluationCase
from model.losses import DiceCELoss
from model.metrics import dice_score
from runtime.distributed.world import World
from runtime.evaluation import CaseAssignment, CaseScorer, Evaluator, SlidingWindowConfig
from runtime.inference import sliding_window
from runtime.logging.events import EvaluationStopped, Event
from runtime.precision import Precision

SCORING = SlidingWindowConfig(
    window=(4, 4, 4), overlap=0.5, batch_size=3, classes=3, padding_value=-2.2, crops_remainder=False
)
CASES = ["case_00003", "case_00000", "case_00012"]


def dummy_case(case: str) -> EvaluationCase:
    """Returns a case whose shape and voxels follow from its name."""
    number = int(case.rpartition("_")[2])
    generator = torch.Generator().manual_seed(number)
    shape = (9 + number % 2, 5, 6)
    image = torch.randn(1, 1, *shape, generator=generator)
    return EvaluationCase(case, image, (image > 0.2).byte() + (image > 0.9).byte())


class Thresholds(nn.Module):
    """A network whose logits depend only on the voxel's value, in any window."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, image: Tensor) -> Tensor:
        image = image - self.shift
        return torch.cat((torch.zeros_like(image), 4 * (image - 0.3), 8 * (image - 0.8)), dim=1)


def expected_scores(image: Tensor, label: Tensor) -> list[float]:
    """Computes loss and Dice by their definition."""
    logits = sliding_window(image, Thresholds(), SCORING.window, SCORING.overlap, padding_value=SCORING.padding_value)
    return [DiceCELoss()(logits, label).item(), *dice_score(logits, label)[0].tolist()]


def make_scorer(network: nn.Module, precision: Precision, **parts: Any) -> CaseScorer:
    return CaseScorer(
        **({"network": network, "loss": DiceCELoss(), "windows": SCORING, "precision": precision} | parts)
    )


def evaluate(
    scorer: CaseScorer, cases: list[str], world: World, events: list[Event] | None = None
) -> EvaluationStopped:
    windows = [SCORING.windows(dummy_case(case).image.shape[2:]) for case in cases]
    return Evaluator(
        scorer=scorer,
        assignment=CaseAssignment.make(cases, windows, world),
        load_case=dummy_case,
        world=world,
        emit=(events if events is not None else []).append,
    )(epoch=7)


def score_all(
    cases: list[str], world: World, events: list[Event] | None = None, network: nn.Module | None = None
) -> EvaluationStopped:
    return evaluate(make_scorer(network or Thresholds(), Precision(world.device, None)), cases, world, events)


def score_case(case: EvaluationCase, scorer: CaseScorer) -> Tensor:
    (row,) = scorer.score([case], World(0, 1, torch.device("cpu")))
    return row
