"""The storage suite: case sizes, free disk space, utilisation, disjoint shards, and its table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import storage
from benchmarks.data import files_of
from benchmarks.harness import Options
from benchmarks.storage import EmulatedEpoch, draw_sizes, emulate, figures_of, fit_to_disk, utilisation, volume_shape
from common.errors import UserError
from data_loading.base_loader import Batch, LoaderConfig
from data_loading.dataset import load_boxes, map_case

PATCH = (128, 128, 128)
SMALL = (16, 16, 16)


def options(work_dir: Path, cases: int | None = None) -> Options:
    return Options(device=torch.device("cpu"), quick=True, work_dir=work_dir, cases=cases, num_workers=1)


def test_sizes_follow_the_distribution() -> None:
    sizes = draw_sizes(np.random.default_rng(3), 20_000, PATCH)
    made = np.array([5 * math.prod(volume_shape(size, PATCH)) for size in sizes])
    # The lower bound, the size of a crop, applies to 2.3 % of the cases and changes mean and deviation by up to 2 %.
    for bytes_of_cases in (sizes, made):
        assert bytes_of_cases.mean() == pytest.approx(146_600_628, rel=0.015)
        assert bytes_of_cases.std() == pytest.approx(68_341_808, rel=0.035)
        assert bytes_of_cases.min() >= 5 * 128**3


def test_a_smaller_patch_scales_the_sizes() -> None:
    whole = draw_sizes(np.random.default_rng(3), 100, PATCH)
    np.testing.assert_allclose(draw_sizes(np.random.default_rng(3), 100, SMALL), whole / 8**3)


@pytest.mark.parametrize("size", [1.0, 5.0 * 128**3, 80e6, 146_600_628.0, 400e6])
def test_a_volume_has_its_size_and_contains_a_crop(size: float) -> None:
    d, h, w = volume_shape(size, PATCH)
    assert min(d, h, w) >= 128
    assert 5 * d * h * w == pytest.approx(max(size, 5 * 128**3), rel=0.01)
    assert d <= h == w


def test_a_volume_of_128_mb_is_160_by_400_by_400() -> None:
    assert volume_shape(5 * 160 * 400 * 400, PATCH) == (160, 400, 400)


def test_half_of_the_disk_stays_free() -> None:
    shapes = [(10, 10, 10)] * 6  # 5,000 bytes each
    assert fit_to_disk(shapes, 60_000) == (shapes, [])
    fitting, notes = fit_to_disk(shapes, 59_999)
    assert len(fitting) == 5
    assert notes == ["Of 6 cases 5 fit into half of the free disk space; the others were left out."]
    assert len(fit_to_disk(shapes, 20_000)[0]) == 2
    with pytest.raises(UserError, match=r"needs 0\.00 GB free for 2 cases.*--work_dir"):
        fit_to_disk(shapes, 19_999)


def test_one_case_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--cases 1: the storage suite needs at least 2"):
        storage.run(options(tmp_path, cases=1))


def test_utilisation_by_hand() -> None:
    now = 100.0

    def batches() -> Iterator[Batch]:
        """Waits of 3, 1 and 0 s."""
        nonlocal now
        for wait_s, samples in ((3.0, 2), (1.0, 2), (0.0, 1)):
            now += wait_s
            yield {"image": torch.zeros(samples, 1)}

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    arrivals: list[tuple[int, float]] = []
    seen = emulate(batches(), 4.0, lambda step: arrivals.append((step, now)), clock=lambda: now, sleep=sleep)
    assert arrivals == [(0, 103.0), (1, 108.0), (2, 112.0)]
    assert seen == EmulatedEpoch(steps=3, samples=5, compute_s=12.0, total_s=16.0, first_wait_s=3.0)
    assert utilisation([seen]) == 0.75
    # With two accelerators, their times are added; their utilisations are not averaged.
    other = EmulatedEpoch(steps=1, samples=2, compute_s=4.0, total_s=4.0, first_wait_s=0.0)
    assert utilisation([seen, other]) == 0.8
    rate = 5 / 16 + 2 / 4
    assert figures_of([seen, other], (100, 100, 100)) == [rate, rate * 5, 1500.0, 0.8, "no"]
    assert figures_of([other], SMALL)[3:] == [1.0, "yes"]


def test_utilisation_counts_an_overslept_step_against_the_node() -> None:
    now = 0.0

    def oversleep(seconds: float) -> None:
        nonlocal now
        now += 2 * seconds

    batch = {"image": torch.zeros(1, 1)}
    assert utilisation([emulate([batch, batch], 1.0, lambda step: None, clock=lambda: now, sleep=oversleep)]) == 0.5


@pytest.mark.parametrize("is_cold", [False, True])
def test_accelerators_have_disjoint_shards_and_cold_cases_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cold: bool
) -> None:
    dropped: list[Counter[str]] = []
    monkeypatch.setattr(storage, "drop_caches", lambda files: dropped.append(Counter(path.name for path in files)))
    cases = storage.write_volumes(tmp_path, [(16, 20, 20)] * 24, SMALL)
    settings = LoaderConfig(
        patch=SMALL, oversampling=0.4, batch_size=2, num_workers=1, rank=0, ranks=3, order_seed=0, sample_seed=0
    )
    seen = storage.feed(tmp_path, cases, settings, 0.001, 4, is_cold)
    assert [(one.steps, one.samples) for one in seen] == [(4, 8)] * 3
    assert all(one.compute_s == pytest.approx(0.004) for one in seen)
    assert all(one.total_s >= one.compute_s for one in seen)
    if not is_cold:
        assert dropped == []
        return
    # 24 cases and samples: all are dropped before the start, then each again with its batch of two.
    everything = Counter(path.name for path in files_of(tmp_path, cases))
    assert dropped[0] == everything
    assert [files.total() for files in dropped[1:]] == [4] * 12
    assert sum(dropped[1:], Counter()) == everything


def test_volumes_are_written_with_boxes_inside(tmp_path: Path) -> None:
    shapes = [(16, 40, 40), (130, 128, 128)]
    cases = storage.write_volumes(tmp_path, shapes, SMALL)
    for case, shape, boxes in zip(cases, shapes, load_boxes(tmp_path, cases, 3), strict=True):
        image, label = map_case(tmp_path, case)
        assert image.shape == label.shape == (1, *shape)
        assert set(np.unique(label)) == {0, 1, 2}
        # The files are not sparse, which would read faster.
        assert np.count_nonzero(image) > 0.99 * image.size
        assert len(boxes[1]) == 2
        for box in boxes[1]:
            assert [high - low for low, high in zip(box[:3], box[3:], strict=True)] == [8, 8, 8]
            assert all(low >= 0 for low in box[:3])
            assert all(high <= size for high, size in zip(box[3:], shape, strict=True))


def test_the_suite_stops_at_the_first_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, int, bool]] = []

    def feed(_: Path, __: object, settings: LoaderConfig, is_cold: bool, **timing: float) -> list[EmulatedEpoch]:
        tried.append((settings.ranks, settings.num_workers, is_cold))
        compute_s = 9.0 if settings.ranks < (2 if is_cold else 4) else 8.9
        return [
            EmulatedEpoch(steps=9, samples=63, compute_s=compute_s, total_s=10.0, first_wait_s=0.5)
        ] * settings.ranks

    monkeypatch.setattr(storage, "feed", feed)
    monkeypatch.setattr(storage, "was_dropped", lambda path: True)
    monkeypatch.setattr(storage, "drop_caches", lambda files: True)
    table = storage.run(Options(device=torch.device("cpu"), quick=True, work_dir=tmp_path, cases=9, num_workers=4))[0]
    assert tried == [(1, 4, False), (2, 2, False), (4, 1, False), (1, 4, True), (2, 2, True)]
    assert [row[0] for row in table.rows] == ["warm"] * 3 + ["cold"] * 2
    assert [row[-1] for row in table.rows] == ["yes", "yes", "no", "yes", "no"]


def test_without_dropped_caches_cold_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        storage,
        "feed",
        lambda *_, **__: [EmulatedEpoch(steps=1, samples=7, compute_s=1.0, total_s=1.0, first_wait_s=0.0)],
    )
    monkeypatch.setattr(storage, "was_dropped", lambda path: False)
    table = storage.run(options(tmp_path))[0]
    assert [row[:2] for row in table.rows] == [["warm", accelerators] for accelerators in (1, 2, 4, 8)]
    assert any(note.startswith("Cold caches: not measured") for note in table.notes)


def test_the_suite_feeds_real_workers(tmp_path: Path) -> None:
    table = storage.run(options(tmp_path), samples_per_s=100.0)[0]
    assert table.rows[0][:3] == ["warm", 1, 1]
    for row in table.rows:
        assert len(row) == len(table.columns)
        assert all(math.isfinite(cell) and cell > 0 for cell in row[1:-1])
        assert row[6] <= 1.0
        assert row[7] == ("yes" if row[6] >= 0.9 else "no")
    assert "14 cases" in table.notes[0]
