"""Scores: a case equals a direct computation, and all cases have the same weight."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from common.errors import Interrupted
from model.ensemble import Ensemble, mean_logits
from model.losses import DiceCELoss
from model.metrics import dice_score
from runtime.distributed.world import World
from runtime.evaluation import SlidingWindowConfig
from runtime.inference import sliding_window
from runtime.logging.events import CaseEvaluated, EvaluationStarted, EvaluationStopped, Event
from runtime.precision import Precision
from runtime.train_state import TrainState
from tests.runtime.scoring import (
    CASES,
    SCORING,
    Thresholds,
    dummy_case,
    evaluate,
    expected_scores,
    make_scorer,
    score_all,
    score_case,
)

# Stride 4 in depth: 9 mod 4 = 1 is below 4 // 2, and cut; 10 mod 4 = 2 is not.
CROPPING = SlidingWindowConfig(
    window=(8, 4, 4), overlap=0.5, batch_size=3, classes=3, padding_value=-2.2, crops_remainder=True
)


def test_a_cases_score_is_a_direct_computation(fp32: Precision) -> None:
    case = dummy_case("case_00003")
    row = score_case(case, make_scorer(Thresholds(), fp32))
    assert row.dtype == torch.float64
    assert row.device.type == "cpu"
    assert row.tolist() == pytest.approx(expected_scores(case.image, case.label), rel=1e-6)
    assert row[0] > 0.05
    assert 0.5 < row[1] < 1


@pytest.mark.parametrize(("case", "kept"), [("case_00000", slice(0, 8)), ("case_00001", slice(0, 10))])
def test_the_references_crop_scores_only_the_kept_part(case: str, kept: slice, fp32: Precision) -> None:
    loaded = dummy_case(case)
    # Wrong labels in the part that is cut off must not count.
    loaded.label[:, :, kept.stop :] = 2
    row = score_case(loaded, make_scorer(Thresholds(), fp32, windows=CROPPING))
    image, label = loaded.image[:, :, kept], loaded.label[:, :, kept]
    logits = sliding_window(
        image, Thresholds(), CROPPING.window, CROPPING.overlap, padding_value=CROPPING.padding_value
    )
    assert row.tolist() == pytest.approx([DiceCELoss()(logits, label).item(), *dice_score(logits, label)[0].tolist()])


def test_an_ensemble_averages_the_probabilities_of_whole_cases(world: World, fp32: Precision) -> None:
    networks = [Thresholds(), Thresholds(1.5), Thresholds(-0.5)]
    found = evaluate(make_scorer(Ensemble(networks), fp32), CASES, world)
    rows = []
    for case in map(dummy_case, CASES):
        how = SCORING.window, SCORING.overlap
        logits = [
            sliding_window(case.image, one, *how, padding_value=SCORING.padding_value, batch_size=3) for one in networks
        ]
        mean = torch.stack([one.double().softmax(1) for one in logits]).mean(0)
        of_logits = torch.stack(logits).mean(0)
        assert (mean.argmax(1) != of_logits.argmax(1)).any(), "the networks must show the difference"
        rows.append([DiceCELoss()(mean.log(), case.label).item(), *dice_score(mean, case.label)[0].tolist()])
    loss, *dice = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    assert found.dice == pytest.approx(dice, abs=1e-7)
    assert found.loss == pytest.approx(loss, abs=1e-6)


def test_an_ensemble_s_logits_are_the_logarithms_of_its_mean_probabilities() -> None:
    """Not just up to a constant, which a loss of sigmoids would see."""
    members = torch.randn(3, 2, 4, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_logits(list(members)).exp(), members.softmax(2).mean(0))


def test_voxels_with_the_ignore_label_count_neither_in_the_loss_nor_in_the_score(fp32: Precision) -> None:
    case = dummy_case("case_00003")
    case.label[:, :, 6:] = 255
    windows = replace(SCORING, ignore_label=255)
    row = score_case(case, make_scorer(Thresholds(), fp32, windows=windows, loss=DiceCELoss(ignore_label=255)))
    logits = sliding_window(case.image, Thresholds(), SCORING.window, SCORING.overlap, padding_value=-2.2)
    kept, label = logits[:, :, :6], case.label[:, :, :6]
    assert row.tolist() == pytest.approx([DiceCELoss()(kept, label).item(), *dice_score(kept, label)[0].tolist()])


def test_without_the_crop_every_voxel_counts(fp32: Precision) -> None:
    loaded = dummy_case("case_00000")
    loaded.label[:, :, 8:] = 2
    whole = score_case(loaded, make_scorer(Thresholds(), fp32, windows=replace(CROPPING, crops_remainder=False)))
    cropped = score_case(loaded, make_scorer(Thresholds(), fp32, windows=CROPPING))
    assert whole[2] < cropped[2] - 0.05


def test_the_padding_value_reaches_the_network(fp32: Precision) -> None:
    lowest: list[float] = []

    class Spy(Thresholds):
        def forward(self, image: Tensor) -> Tensor:
            lowest.append(image.min().item())
            return super().forward(image)

    score_case(dummy_case("case_00000"), make_scorer(Spy(), fp32, windows=replace(SCORING, padding_value=-50.0)))
    assert min(lowest) == -50
    lowest.clear()
    score_case(dummy_case("case_00000"), make_scorer(Spy(), fp32, windows=replace(SCORING, padding_value=None)))
    assert min(lowest) > -10


def test_windows_use_the_precision_and_scores_use_fp32() -> None:
    network = nn.Conv3d(1, 3, 1)
    kinds: list[torch.dtype] = []
    network.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    losses: list[tuple[torch.dtype, tuple[int, ...]]] = []

    class OfWholeLogits(nn.Module):
        def forward(self, logits: Tensor, label: Tensor) -> Tensor:
            losses.append((logits.dtype, tuple(logits.shape)))
            return logits.mean() + label.sum()

    case, bf16 = dummy_case("case_00000"), Precision(torch.device("cpu"), torch.bfloat16)
    score_case(case, make_scorer(network, bf16, loss=OfWholeLogits()))
    assert set(kinds) == {torch.bfloat16}
    assert losses == [(torch.float32, (1, 3, *case.image.shape[2:]))]


def test_every_case_has_the_same_weight(world: World) -> None:
    stopped = score_all(CASES, world)
    rows = [expected_scores((case := dummy_case(name)).image, case.label) for name in CASES]
    assert len({dummy_case(name).image.numel() for name in CASES}) > 1, "cases of different sizes"
    assert stopped.epoch == 7
    assert stopped.loss == pytest.approx(sum(row[0] for row in rows) / 3, rel=1e-6)
    assert stopped.dice == pytest.approx([sum(row[k] for row in rows) / 3 for k in (1, 2)], rel=1e-12)
    assert stopped.mean_dice == pytest.approx(sum(stopped.dice) / 2, rel=1e-15)
    assert list(stopped.per_case) == CASES
    for name, row in zip(CASES, rows, strict=True):
        assert stopped.per_case[name] == pytest.approx(row[1:], rel=1e-12)


def test_events_begin_with_the_count_and_name_every_case(world: World) -> None:
    events: list[Event] = []
    stopped = score_all(CASES, world, events)
    assert events == [EvaluationStarted(7, 3), *(CaseEvaluated(7, case) for case in CASES)]
    assert isinstance(stopped, EvaluationStopped), "emitted by the caller"


def test_no_value_is_transferred_to_the_host_while_cases_are_scored(
    forbid_reading: Callable[[], list[str]], fp32: Precision
) -> None:
    """On a GPU the host meanwhile loads the next case."""
    cases = [dummy_case(name) for name in CASES]
    alone = World(0, 1, torch.device("cpu"))
    reads = forbid_reading()
    rows = list(make_scorer(Thresholds(), fp32).score(cases, alone))
    assert len(rows) == 3
    assert reads == []


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_the_batch_of_windows_changes_no_score(batch_size: int, fp32: Precision) -> None:
    cases = [dummy_case(name) for name in CASES]
    one_by_one = [
        score_case(case, make_scorer(Thresholds(), fp32, windows=replace(SCORING, batch_size=1))) for case in cases
    ]
    seen: list[int] = []

    class Spy(Thresholds):
        def forward(self, image: Tensor) -> Tensor:
            seen.append(len(image))
            return super().forward(image)

    alone = World(0, 1, torch.device("cpu"))
    scoring = replace(SCORING, batch_size=batch_size)
    together = list(make_scorer(Spy(), fp32, windows=scoring).score(cases, alone))
    torch.testing.assert_close(torch.stack(together), torch.stack(one_by_one), rtol=0, atol=1e-12)
    total = sum(SCORING.windows(case.image.shape[2:]) for case in cases)
    # Batches contain windows of several cases: all but the last are full.
    assert seen == [batch_size] * (total // batch_size) + [total % batch_size] * (total % batch_size > 0)


def test_the_network_is_in_eval_mode_during_and_in_train_mode_after(world: World, fp32: Precision) -> None:
    modes: list[tuple[bool, bool]] = []

    class Spy(Thresholds):
        def forward(self, image: Tensor) -> Tensor:
            modes.append((self.training, torch.is_inference_mode_enabled()))
            return super().forward(image)

    network = Spy().train()
    evaluate(make_scorer(network, fp32), CASES[:1], world)
    assert set(modes) == {(False, True)}
    assert network.training


def test_scoring_changes_no_weight_and_no_statistic(
    make_state: Callable[..., TrainState],
    same_weights: Callable[[nn.Module, nn.Module], bool],
    world: World,
    fp32: Precision,
) -> None:
    state, untouched = make_state(), make_state()
    evaluate(make_scorer(state.network, fp32), CASES, world)
    assert same_weights(state.network, untouched.network)
    assert all(p.grad is None for p in state.network.parameters())


def test_a_network_that_returns_nan_has_a_nan_loss(world: World, fp32: Precision) -> None:
    class Broken(Thresholds):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image) * float("nan")

    stopped = evaluate(make_scorer(Broken(), fp32), CASES, world)
    assert stopped.loss != stopped.loss
    assert 0 <= stopped.mean_dice <= 1


# Interruptions


def test_a_check_is_made_before_every_batch_of_windows(world: World, fp32: Precision) -> None:
    """So that a signal is handled in the middle of the longest case."""
    log: list[str] = []

    class Spy(Thresholds):
        def forward(self, image: Tensor) -> Tensor:
            log.append("batch")
            return super().forward(image)

    evaluate(make_scorer(Spy(), fp32, check=lambda: log.append("check")), CASES, world)
    windows = sum(SCORING.windows(dummy_case(case).image.shape[2:]) for case in CASES)
    assert log == ["check", "batch"] * -(-windows // SCORING.batch_size)


def test_an_exception_of_a_check_ends_the_evaluation_at_once(world: World, fp32: Precision) -> None:
    batches: list[int] = []
    events: list[Event] = []

    class Spy(Thresholds):
        def forward(self, image: Tensor) -> Tensor:
            batches.append(len(image))
            return super().forward(image)

    def check() -> None:
        if len(batches) == 2:
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        evaluate(make_scorer(Spy(), fp32, check=check), CASES, world, events)
    assert len(batches) == 2
    assert not any(isinstance(event, CaseEvaluated) for event in events[1:])
