"""Scores: a case equals a direct computation, weighs 1 / n, and is the same to the bit on any number of ranks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import Interrupted
from data_loading.data_loader import EvaluationCase
from model.losses import DiceCELoss
from model.metrics import dice_score
from runtime.distributed.world import World
from runtime.evaluation import CaseAssignment, CaseScorer, Evaluator, SlidingWindowConfig, assign_cases
from runtime.inference import sliding_window
from runtime.logging.events import CaseEvaluated, EvaluationStarted, EvaluationStopped, Event
from runtime.precision import Precision
from runtime.train_state import TrainState

SCORING = SlidingWindowConfig(
    window=(4, 4, 4), overlap=0.5, batch_size=3, classes=3, padding_value=-2.2, crops_remainder=False
)
CASES = ["case_00003", "case_00000", "case_00012"]
# Stride 4 in depth: 9 mod 4 = 1 is below 4 // 2, and cut; 10 mod 4 = 2 is not.
CROPPING = SlidingWindowConfig(
    window=(8, 4, 4), overlap=0.5, batch_size=3, classes=3, padding_value=-2.2, crops_remainder=True
)


def dummy_case(case: str) -> EvaluationCase:
    """A case whose shape and voxels follow from its name."""
    number = int(case.rpartition("_")[2])
    generator = torch.Generator().manual_seed(number)
    shape = (9 + number % 2, 5, 6)
    image = torch.randn(1, 1, *shape, generator=generator)
    return EvaluationCase(case, image, (image > 0.2).byte() + (image > 0.9).byte())


class Thresholds(nn.Module):
    """Logits by the voxel's value: predictable voxel by voxel, whatever the window."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat((torch.zeros_like(image), 4 * (image - 0.3), 8 * (image - 0.8)), dim=1)


def expected_scores(image: Tensor, label: Tensor) -> list[float]:
    """The definition: windows, loss, Dice."""
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


def score_all(cases: list[str], world: World, events: list[Event] | None = None) -> EvaluationStopped:
    return evaluate(make_scorer(Thresholds(), Precision(world.device, None)), cases, world, events)


def score_case(case: EvaluationCase, scorer: CaseScorer) -> Tensor:
    (row,) = scorer.score([case], World(0, 1, torch.device("cpu")))
    return row


def test_a_cases_score_is_a_direct_computation(fp32: Precision) -> None:
    case = dummy_case("case_00003")
    row = score_case(case, make_scorer(Thresholds(), fp32))
    assert row.dtype == torch.float64
    assert row.device.type == "cpu"
    assert row.tolist() == pytest.approx(expected_scores(case.image, case.label), rel=1e-12)
    assert row[0] > 0.05
    assert 0.5 < row[1] < 1


@pytest.mark.parametrize(("case", "kept"), [("case_00000", slice(0, 8)), ("case_00001", slice(0, 10))])
def test_the_references_crop_scores_the_kept_part_alone(case: str, kept: slice, fp32: Precision) -> None:
    loaded = dummy_case(case)
    # what is cut off is wrong on purpose: it must not count
    loaded.label[:, :, kept.stop :] = 2
    row = score_case(loaded, make_scorer(Thresholds(), fp32, windows=CROPPING))
    image, label = loaded.image[:, :, kept], loaded.label[:, :, kept]
    logits = sliding_window(
        image, Thresholds(), CROPPING.window, CROPPING.overlap, padding_value=CROPPING.padding_value
    )
    assert row.tolist() == pytest.approx([DiceCELoss()(logits, label).item(), *dice_score(logits, label)[0].tolist()])


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


def test_windows_are_computed_in_the_precision_and_scored_in_fp32() -> None:
    network = nn.Conv3d(1, 3, 1)
    kinds: list[torch.dtype] = []
    network.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    losses: list[torch.dtype] = []
    loss = DiceCELoss()
    loss.register_forward_pre_hook(lambda module, inputs: losses.append(inputs[0].dtype))
    score_case(
        dummy_case("case_00000"), make_scorer(network, Precision(torch.device("cpu"), torch.bfloat16), loss=loss)
    )
    assert set(kinds) == {torch.bfloat16}
    assert losses == [torch.float32]


def test_every_case_weighs_the_same(world: World) -> None:
    stopped = score_all(CASES, world)
    rows = [expected_scores((case := dummy_case(name)).image, case.label) for name in CASES]
    assert len({dummy_case(name).image.numel() for name in CASES}) > 1, "cases of different sizes"
    assert stopped.epoch == 7
    assert stopped.loss == pytest.approx(sum(row[0] for row in rows) / 3, rel=1e-12)
    assert stopped.dice == pytest.approx([sum(row[k] for row in rows) / 3 for k in (1, 2)], rel=1e-12)
    assert stopped.mean_dice == pytest.approx(sum(stopped.dice) / 2, rel=1e-15)
    assert list(stopped.per_case) == CASES
    for name, row in zip(CASES, rows, strict=True):
        assert stopped.per_case[name] == pytest.approx(row[1:], rel=1e-12)


def test_events_begin_with_the_count_and_name_every_case(world: World) -> None:
    events: list[Event] = []
    stopped = score_all(CASES, world, events)
    assert events == [EvaluationStarted(7, 3), *(CaseEvaluated(7, case) for case in CASES)]
    assert isinstance(stopped, EvaluationStopped), "announced by the caller, not here"


class Table:
    """Where ranks that are threads add up: everyone puts in, everyone takes the sum in the ranks' order."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.entries: dict[int, Tensor] = {}

    def sum(self, rank: int, tensor: Tensor) -> Tensor:
        self.entries[rank] = tensor.clone()
        self.barrier.wait()
        total = torch.stack([self.entries[rank] for rank in sorted(self.entries)]).sum(0)
        self.barrier.wait()
        return total


@dataclass(frozen=True)
class Thread(World):
    """A rank that is a thread."""

    table: Table = field(default_factory=lambda: Table(1))
    tables: dict[tuple[int, ...], Table] = field(default_factory=dict)

    def sum(self, tensor: Tensor, while_waiting: Callable[[], None] | None = None) -> Tensor:
        return self.table.sum(self.rank, tensor)

    def split(self, parts: Sequence[Sequence[int]]) -> World:
        for part in parts:
            if self.rank in part:
                table = self.tables.setdefault(tuple(part), Table(len(part)))
                return Thread(list(part).index(self.rank), len(part), self.device, table=table)
        return World(0, 1, self.device)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """There is nothing to send in one process."""


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_same_on_any_number_of_ranks(ranks: int, count: int, world: World) -> None:
    cases = [*CASES, "case_00041"][:count]
    alone = score_all(cases, world)
    table, tables = Table(ranks), {}
    logs: list[list[Event]] = [[] for _ in range(ranks)]
    with ThreadPoolExecutor(ranks) as threads:
        together = list(
            threads.map(
                lambda rank: score_all(
                    cases, Thread(rank, ranks, world.device, table=table, tables=tables), logs[rank]
                ),
                range(ranks),
            )
        )
    done = [event.case for log in logs for event in log if isinstance(event, CaseEvaluated)]
    assert sorted(done) == sorted(cases), "every case announced by exactly one rank"
    assert bool(tables) is (ranks > count), "windows are shared where there are more ranks than cases"
    for one in together:
        if ranks <= count:  # nothing is added in another order: the same to the bit
            assert replace(one, seconds=0) == replace(alone, seconds=0)
        assert one.mean_dice == pytest.approx(alone.mean_dice, abs=1e-6)
        assert one.loss == pytest.approx(alone.loss, abs=1e-6)
        assert replace(one, seconds=0) == replace(together[0], seconds=0), "every rank has the same scores"


@pytest.mark.parametrize(
    ("windows", "ranks", "members"),
    [
        ([3, 9, 4], 1, ((0,), (0,), (0,))),
        ([3, 9, 4, 2], 2, ((1,), (0,), (1,), (1,))),  # 9 | 4 + 3 + 2
        ([8, 8], 2, ((0,), (1,))),
        ([5, 100], 5, ((1,), (0, 2, 3, 4))),  # the spare ranks all help the longest
        ([60, 90], 5, ((1, 3), (0, 2, 4))),
        ([2], 5, ((0, 1),)),  # a rank without a window would have nothing to add
        ([1, 1], 3, ((0,), (1,))),
        ([], 2, ()),
    ],
)
def test_cases_are_dealt_out_longest_first(
    windows: list[int], ranks: int, members: tuple[tuple[int, ...], ...]
) -> None:
    assert assign_cases(windows, ranks) == members


def test_no_value_comes_to_the_host_while_cases_are_scored(
    forbid_reading: Callable[[], list[str]], fp32: Precision
) -> None:
    """On a GPU the host goes on loading the next case meanwhile."""
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
    # Batches hold windows of several cases: all are full but for the last.
    assert seen == [batch_size] * (total // batch_size) + [total % batch_size] * (total % batch_size > 0)


def test_a_table_is_shared_once_with_zeros_for_the_other_ranks_cases(world: World) -> None:
    tables: list[Tensor] = []

    class Spy(Thread):
        def sum(self, tensor: Tensor, while_waiting: Callable[[], None] | None = None) -> Tensor:
            tables.append(tensor.clone())
            return tensor

    score_all(CASES, Spy(1, 2, world.device))
    (table,) = tables
    assert table.dtype == torch.float64
    assert table.shape == (3, 3)
    assert [bool(row.any()) for row in table] == [False, True, False]


def test_a_shard_is_every_size_th_item() -> None:
    shards = [World(rank, 3, torch.device("cpu")).shard("abcdefg") for rank in range(3)]
    assert shards == ["adg", "be", "cf"]


def test_the_network_is_in_eval_mode_within_and_in_train_mode_after(world: World, fp32: Precision) -> None:
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


def test_a_network_that_yields_nan_scores_as_a_nan_loss(world: World, fp32: Precision) -> None:
    class Broken(Thresholds):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image) * float("nan")

    stopped = evaluate(make_scorer(Broken(), fp32), CASES, world)
    assert stopped.loss != stopped.loss
    assert 0 <= stopped.mean_dice <= 1


# Leaving


def test_a_check_is_made_before_every_batch_of_windows(world: World, fp32: Precision) -> None:
    """So that a signal is heard in the middle of the longest case."""
    log: list[str] = []

    class Spy(Thresholds):
        def forward(self, image: Tensor) -> Tensor:
            log.append("batch")
            return super().forward(image)

    evaluate(make_scorer(Spy(), fp32, check=lambda: log.append("check")), CASES, world)
    windows = sum(SCORING.windows(dummy_case(case).image.shape[2:]) for case in CASES)
    assert log == ["check", "batch"] * -(-windows // SCORING.batch_size)


def test_what_a_check_raises_ends_the_evaluation_at_once(world: World, fp32: Precision) -> None:
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


@pytest.mark.parametrize("shared", [False, True])
def test_a_rank_that_waits_for_others_checks_too(shared: bool, fp32: Precision) -> None:
    """Both for the table of scores and, where a case's windows are shared, for its partners' logits."""
    checks: list[object] = []

    class Spy(Thread):
        def sum(self, tensor: Tensor, while_waiting: Callable[[], None] | None = None) -> Tensor:
            checks.append(while_waiting)
            return tensor

        def split(self, parts: Sequence[Sequence[int]]) -> World:
            return Spy(0, 2, self.device)

    def check() -> None:
        """Nothing to say."""

    ranks = Spy(0, 2, torch.device("cpu"))
    cases = CASES[:1] if shared else CASES[:2]
    evaluate(make_scorer(Thresholds(), fp32, check_waiting=check), cases, ranks)
    assert checks == [check] * (2 if shared else 1)
