"""The evaluation suite: the naive method has the project's scores, and cases are assigned to ranks correctly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import evaluate
from benchmarks.evaluate import (
    BATCH_SIZES,
    RANKS,
    ConfidentNetwork,
    batched_scores,
    busiest,
    check_same,
    naive_scores,
    round_robin,
    scoring,
    window_counts,
    write_cases,
)
from benchmarks.harness import Options, Table
from data_loading.spec import KITS19
from model.unet3d import Unet3d
from runtime.evaluation import SlidingWindowConfig
from runtime.precision import Precision

CPU = torch.device("cpu")
FP32 = Precision(CPU, None)
WINDOW = (8, 12, 4)
# With strides of (4, 6, 2): remainders to crop, to pad, none; the last volume is smaller than the window.
SHAPES = ((13, 25, 8), (11, 17, 5), (6, 12, 4))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Table]:
    """Tables of the quick suite by title."""
    options = Options(device=CPU, quick=True, work_dir=tmp_path_factory.mktemp("evaluate"))
    return {table.title: table for table in evaluate.run(options)}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_naive_method_has_the_projects_scores(batch_size: int, tmp_path: Path) -> None:
    cases = write_cases(tmp_path, SHAPES)
    torch.manual_seed(5)
    # Without `ConfidentNetwork`: the scores depend on every window and weight.
    network = Unet3d(1, 3, filters=(4, 8)).eval()
    naive = naive_scores(tmp_path, cases, network, WINDOW, FP32)
    ours = batched_scores(tmp_path, cases, network, scoring(WINDOW, batch_size), FP32)
    assert naive.shape == (3, 3)
    assert 0.01 < naive[:, 1:].max() < 0.99
    torch.testing.assert_close(naive, ours, atol=1e-6, rtol=0)


def test_the_suite_scores_as_kits19_is_scored() -> None:
    how = scoring(WINDOW, 4)
    assert how == SlidingWindowConfig(
        window=WINDOW,
        overlap=0.5,
        batch_size=4,
        classes=len(KITS19.classes),
        padding_value=KITS19.padding_value,
        crops_remainder=KITS19.crops_remainder,
    )


def test_a_decided_network_has_no_ties_and_contains_the_networks_logits() -> None:
    torch.manual_seed(6)
    network = Unet3d(1, 3, filters=(4, 8)).eval()
    image = torch.randn(2, 1, 8, 8, 8)
    logits = ConfidentNetwork(network)(image)
    first, second = logits.topk(2, dim=1).values.unbind(1)
    assert (first - second).min() > 0.5
    expected = (image > -0.5).int() + (image > 0.5).int()
    assert torch.equal(logits.argmax(1, keepdim=True), expected)
    rest = logits - torch.zeros_like(logits).scatter(1, expected.long(), 1.0)
    torch.testing.assert_close(rest, 0.1 * network(image).tanh(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("column", "off"), [(0, 2e-5), (1, 2e-6), (2, 2e-6), (1, math.nan)])
def test_scores_that_differ_stop_the_suite(column: int, off: float) -> None:
    naive = torch.full((2, 3), 0.5, dtype=torch.float64)
    ours = naive.clone()
    check_same(naive, ours, FP32)
    ours[1, column] += off
    with pytest.raises(RuntimeError, match="not those of one window"):
        check_same(naive, ours, FP32)


def test_one_row_per_batch_size_with_positive_values(tables: dict[str, Table]) -> None:
    table = tables["Evaluation in batches of windows"]
    assert [row[0] for row in table.rows] == list(BATCH_SIZES)
    for row in table.rows:
        assert len(row) == len(table.columns)
        assert all(math.isfinite(figure) and figure > 0 for figure in row)


def test_the_synthetic_window_counts_have_mlperfs_totals() -> None:
    windows = window_counts()
    assert (len(windows), min(windows), max(windows), sum(windows)) == (42, 8, 144, 2636)


def test_one_row_per_number_of_ranks_and_longest_first_is_never_worse(tables: dict[str, Table]) -> None:
    rows = tables["Windows of the busiest rank"].rows
    assert [row[0] for row in rows] == list(RANKS)
    for ranks, share, naive, ours, ratio in rows:
        assert share == math.ceil(2636 / ranks)
        assert share <= ours <= naive
        assert ratio == naive / ours


def test_the_busiest_rank_by_hand() -> None:
    # Longest first: 7 | 5 + 2 | 3 + 3 + 1: no rank has more than 7.
    assert busiest([3, 7, 2, 5, 3, 1], 3) == 7
    # Two more ranks share the longest case: 9 in three parts, 4 on one rank.
    assert busiest([9, 4], 4) == 4
    assert busiest([9, 3], 5) == 3
    assert busiest([1, 1], 8) == 1


def test_round_robin_by_hand() -> None:
    assert round_robin([5, 5, 5, 5], 2) == 10
    assert round_robin([1, 2, 9], 3) == 9
    assert round_robin([6, 3], 64) == 6  # ranks without a case


def test_the_gpu_volumes_need_cropping_and_padding() -> None:
    options = Options(device=torch.device("cuda", 0), quick=False, work_dir=Path())
    scale, _ = evaluate.scales_of(options).values()
    remainders = [size % 64 for shape in scale.volumes for size in shape]
    assert any(0 < remainder < 32 for remainder in remainders)
    assert any(remainder >= 32 for remainder in remainders)
