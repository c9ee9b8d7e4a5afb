"""Reference convergence points: the published figures, what counts between and beyond them, scaling, the one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.arguments import RunConfig
from runtime.mlperf.convergence import expectation, expected_length, find_reference
from runtime.mlperf.rulesets import RULESETS, counts_samples, epoch_unit


@pytest.mark.parametrize(
    ("batch", "mean", "least"), [(28, 345_167, 318_186), (56, 357_404, 334_053), (84, 2480 * 168, 2319 * 168)]
)
def test_published_points_of_ruleset_4(batch: int, mean: int, least: int) -> None:
    reference = find_reference(batch)
    assert reference is not None
    assert reference.source == f"RCP of batch {batch}"
    assert reference.unit == "samples"
    assert round(reference.mean) == mean
    assert reference.least == pytest.approx(least, abs=14 if batch == 84 else 1)  # 2319 is an epoch's rounding
    assert reference.published[0] == min(reference.published)


def test_between_published_sizes_the_mean_lies_on_the_line() -> None:
    """64 is published too, but converges more slowly than its neighbours promise: the checker drops it."""
    below, between, above = (find_reference(batch) for batch in (56, 64, 84))
    assert below
    assert between
    assert above
    assert between.source == "RCP interpolated between batches 56 and 84"
    assert between.mean == pytest.approx(below.mean + (above.mean - below.mean) * 8 / 28)
    assert below.least < between.least < between.mean
    assert len(between.published) == 91


def test_beyond_the_published_sizes() -> None:
    small = find_reference(4)
    smallest = find_reference(28)
    assert small
    assert smallest
    assert (small.mean, small.least) == (smallest.mean, smallest.least)
    assert "batch 28, the smallest" in small.source
    assert find_reference(112) is None
    assert "cannot be submitted" in expectation(112, "4.0.0", 20.0)


def test_scaling_is_the_rules() -> None:
    reference = find_reference(56)
    assert reference
    assert reference.scaling(355_845) == pytest.approx(1.00438, abs=5e-6)
    assert reference.scaling(reference.mean) == 1
    assert reference.scaling(400_000) == 1
    assert reference.scaling(reference.least) == pytest.approx(1.0699037)
    assert reference.scaling(334_052) is None


def test_up_to_ruleset_3_0_points_are_in_epochs() -> None:
    reference = find_reference(80, "3.0.0")
    assert reference
    assert reference.unit == "epochs"
    assert reference.mean == pytest.approx(1603.78, abs=0.01)
    assert reference.mean_samples == pytest.approx(168 * reference.mean)
    assert reference.least_samples == pytest.approx(168 * reference.least)


def test_expectation_has_samples_and_where_measured_hours() -> None:
    line = "to converge: 345,167 samples on average, 318,186 the least accepted (RCP of batch 28, ruleset 4.0.0)"
    assert expectation(28, "4.0.0", None) == line
    assert expectation(28, "4.0.0", 20.0) == f"{line}; 4.8 h of training at the 20 samples/s of benchmark.json"


def test_the_rate_is_the_newest_measured_in_the_log_folder(
    tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    config = make_config(log_dir=tmp_path, batch_size=7, ga_steps=2)
    line = expected_length(config, groups=4)
    assert line.startswith("to converge: 357,404 samples")
    for number, (name, content) in enumerate([("benchmark.json", '{"samples_per_s": 10}'), ("benchmark.1.json", "{")]):
        (tmp_path / name).write_text(content)
        os.utime(tmp_path / name, (100 - number, 100 - number))
    assert expected_length(config, 4) == f"{line}; 9.9 h of training at the 10 samples/s of benchmark.json"
    for damaged in ("{", "[]", '{"samples_per_s": "fast"}', '{"samples_per_s": 0}'):
        (tmp_path / "benchmark.json").write_text(damaged)
        assert expected_length(config, 4) == line


def test_the_unit_changes_with_ruleset_3_1() -> None:
    assert [ruleset for ruleset in RULESETS if counts_samples(ruleset)] == ["3.1.0", "4.0.0"]
    assert (epoch_unit("3.0.0", 166), epoch_unit("3.1.0", 166)) == (1, 166)
