"""The storage suite: case sizes, the rule of five times the memory, utilisation, shards, readings, and its tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pytest
import torch

from benchmarks import storage, storage_feed
from benchmarks.__main__ import ACCELERATORS
from benchmarks.data import disk_bytes_read
from benchmarks.harness import NOT_MEASURED, Options
from benchmarks.storage import Measurement, fed_number
from benchmarks.storage_data import (
    CropReading,
    Reading,
    WholeFileReading,
    bytes_of,
    cases_of_full_size,
    describe_scale,
    draw_sizes,
    fit_to_disk,
    volume_shape,
    write_volumes,
)
from benchmarks.storage_feed import EmulatedEpoch, Feeding, emulate, feed
from common.errors import UserError
from data_loading.base_loader import Batch, LoaderConfig
from data_loading.dataset import load_boxes, map_case

PATCH = (128, 128, 128)
SMALL = (16, 16, 16)


def options(work_dir: Path, cases: int | None = None) -> Options:
    return Options(device=torch.device("cpu"), quick=True, work_dir=work_dir, cases=cases, num_workers=1)


def measurement(fed: Feeding, number: int) -> Measurement:
    return Measurement(reading="crops", caches="cold", accelerator="h100", number=number, workers=1, fed=fed)


def fed_with(utilisation: float) -> Feeding:
    epoch = EmulatedEpoch(steps=9, samples=63, compute_s=10 * utilisation, total_s=10.0, first_wait_s=0.5)
    return Feeding(epochs=[epoch], disk_bytes=0)


def test_step_times_are_those_of_the_workload_files() -> None:
    assert storage.STEP_S == {"a100": 0.636, "h100": 0.323, "b200": 0.162}
    assert tuple(storage.STEP_S) == ACCELERATORS


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
    alone = Feeding(epochs=[seen], disk_bytes=100)
    assert (alone.utilisation, alone.disk_bytes_per_sample) == (0.75, 20)
    # With two accelerators, their times are added; their utilisations are not averaged.
    other = EmulatedEpoch(steps=1, samples=2, compute_s=4.0, total_s=4.0, first_wait_s=0.0)
    both = Feeding(epochs=[seen, other], disk_bytes=None)
    assert (both.utilisation, both.disk_bytes_per_sample) == (0.8, None)
    assert both.samples_per_s == 5 / 16 + 2 / 4
    assert measurement(both, 2).row()[5:] == [both.samples_per_s, NOT_MEASURED, NOT_MEASURED, 1500.0, 0.8, "no"]
    full = Feeding(epochs=[other], disk_bytes=6_000_000)
    assert measurement(full, 1).row() == ["crops", "cold", "H100", 1, 1, 0.5, 3.0, 1.5, 0.0, 1.0, "yes"]


def test_utilisation_counts_an_overslept_step_against_the_node() -> None:
    now = 0.0

    def oversleep(seconds: float) -> None:
        nonlocal now
        now += 2 * seconds

    batch = {"image": torch.zeros(1, 1)}
    seen = emulate([batch, batch], 1.0, lambda step: None, clock=lambda: now, sleep=oversleep)
    assert Feeding(epochs=[seen], disk_bytes=0).utilisation == 0.5


def test_the_head_says_how_large_the_data_set_is() -> None:
    assert describe_scale(500, 100) == "data set 5.0 times the memory"
    assert describe_scale(10**9, 10 * 10**9) == "scaled: data set 1 GB, 2 % of five times the memory"
    assert describe_scale(499, 100).startswith("scaled: ")


@pytest.mark.parametrize("memory", [10**9, 24 * 10**9, 512 * 10**9])
def test_full_size_is_five_times_the_memory(memory: int) -> None:
    cases = cases_of_full_size(memory)
    for seed in range(3):
        shapes = [volume_shape(size, PATCH) for size in draw_sizes(np.random.default_rng(seed), cases, PATCH)]
        assert sum(map(bytes_of, shapes)) >= 5 * memory
    assert cases * 146_600_628 <= 5 * memory * (1.1 if memory > 10**10 else 1.5)


def test_full_size_is_kept_as_far_as_the_disk_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 10**10
    monkeypatch.setattr(storage, "memory_bytes", lambda: memory)
    chosen = Options(device=torch.device("cpu"), quick=False, work_dir=tmp_path, full_size=True)
    shapes, notes = storage.draw_shapes(chosen, PATCH, 10**12)
    assert sum(map(bytes_of, shapes)) >= 5 * memory
    assert notes == []
    shapes, notes = storage.draw_shapes(chosen, PATCH, 4 * 10**9)
    assert sum(map(bytes_of, shapes)) <= 2 * 10**9
    assert "fit into half of the free disk space" in notes[0]


@pytest.mark.parametrize("reading", [CropReading(), WholeFileReading()])
@pytest.mark.parametrize("is_cold", [False, True])
def test_accelerators_have_disjoint_shards_and_cold_cases_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cold: bool, reading: Reading
) -> None:
    dropped: list[Counter[str]] = []
    monkeypatch.setattr(storage_feed, "drop_caches", lambda files: dropped.append(Counter(path.name for path in files)))
    cases = reading.write(tmp_path, [(16, 20, 20)] * 24, SMALL)
    settings = LoaderConfig(
        patch=SMALL, oversampling=0.4, batch_size=2, num_workers=1, rank=0, ranks=3, order_seed=0, sample_seed=0
    )
    fed = feed(reading, tmp_path, cases, settings=settings, step_s=0.001, steps=4, is_cold=is_cold)
    seen = fed.epochs
    assert [(one.steps, one.samples) for one in seen] == [(4, 8)] * 3
    assert all(one.compute_s == pytest.approx(0.004) for one in seen)
    assert all(one.total_s >= one.compute_s for one in seen)
    assert (fed.disk_bytes is None) == (disk_bytes_read() is None)
    if not is_cold:
        assert dropped == []
        return
    # 24 cases and samples: all are dropped before the start, then each again with its batch of two.
    everything = Counter(path.name for path in reading.files(tmp_path, cases))
    assert dropped[0] == everything
    assert [files.total() for files in dropped[1:]] == [everything.total() // 12] * 12
    assert sum(dropped[1:], Counter()) == everything


def test_volumes_are_written_with_boxes_inside(tmp_path: Path) -> None:
    shapes = [(16, 40, 40), (130, 128, 128)]
    cases = write_volumes(tmp_path, shapes, SMALL)
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


def test_a_whole_file_is_read_and_its_first_bytes_are_handed_over(tmp_path: Path) -> None:
    reading = WholeFileReading()
    shapes = [(16, 20, 20), (17, 30, 30)]
    cases = reading.write(tmp_path, shapes, SMALL)
    settings = LoaderConfig(
        patch=SMALL, oversampling=0.4, batch_size=2, num_workers=0, rank=0, ranks=1, order_seed=0, sample_seed=0
    )
    dataset = reading.dataset(tmp_path, cases, settings, is_cold=False)
    for index, (path, shape) in enumerate(zip(reading.files(tmp_path, cases), shapes, strict=True)):
        with np.load(path) as arrays:
            record = arrays["x"]
        assert record.shape == (bytes_of(shape),)
        assert np.count_nonzero(record) > 0.9 * record.size
        sample = dataset[1, index]
        np.testing.assert_array_equal(sample["image"], record[: 16**3])
    # All of it was read, not only its beginning: the archive's checksum is compared.
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadZipFile):
        _ = dataset[1, 1]


def test_the_suite_stops_at_the_first_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, int, int, bool, float]] = []

    def feed(
        reading: Reading, _: Path, __: object, *, settings: LoaderConfig, is_cold: bool, step_s: float, steps: int
    ) -> Feeding:
        tried.append((reading.name, settings.ranks, settings.num_workers, is_cold, step_s))
        limit = 2 if is_cold else 4
        return fed_with(0.90 if reading.name == "crops" and settings.ranks < limit else 0.89)

    monkeypatch.setattr(storage, "feed", feed)
    monkeypatch.setattr(storage, "was_dropped", lambda path: True)
    monkeypatch.setattr(storage, "drop_caches", lambda files: True)
    chosen = Options(
        device=torch.device("cpu"),
        quick=True,
        work_dir=tmp_path,
        cases=9,
        num_workers=4,
        accelerators=("a100", "b200"),
    )
    answer, details, _ = storage.run(chosen, {"a100": 1.6, "h100": 0.8, "b200": 0.16})
    assert tried == [
        *(("crops", *one, False, s) for s in (0.1, 0.01) for one in ((1, 4), (2, 2), (4, 1))),
        *(("crops", *one, True, s) for s in (0.1, 0.01) for one in ((1, 4), (2, 2))),
        *(("whole files", 1, 4, is_cold, s) for is_cold in (False, True) for s in (0.1, 0.01)),
    ]
    assert answer.columns == ["reading", "caches", "A100", "B200"]
    assert answer.rows == [
        ["crops", "warm", "2 (4 fail)", "2 (4 fail)"],
        ["crops", "cold", "1 (2 fail)", "1 (2 fail)"],
        ["whole files", "warm", "0", "0"],
        ["whole files", "cold", "0", "0"],
    ]
    assert [row[-1] for row in details.rows[:3]] == ["yes", "yes", "no"]
    for table in (answer, details):
        assert "(scaled: data set 0.00" in table.title
    assert fed_number([measurement(fed_with(0.9), number) for number in (1, 2, 4, 8)]) == "8 or more"


def test_an_epoch_reads_every_case_once_at_least(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, int]] = []

    def feed(_: object, __: object, ___: object, *, settings: LoaderConfig, steps: int, **____: object) -> Feeding:
        tried.append((settings.ranks, steps))
        return fed_with(0.9)

    monkeypatch.setattr(storage, "feed", feed)
    monkeypatch.setattr(storage, "READINGS", (WholeFileReading(),))
    monkeypatch.setattr(storage, "was_dropped", lambda path: False)
    monkeypatch.setattr(storage, "measure_read_ahead", lambda *_, **__: None)
    chosen = Options(device=torch.device("cpu"), quick=True, work_dir=tmp_path, cases=35, accelerators=("h100",))
    tables = storage.run(chosen)
    assert tried == [(1, 5), (2, 2), (4, 2), (8, 2)]
    assert tables[0].rows == [["whole files", "warm", "8 or more"]]
    assert any(note.startswith("Cold caches: not measured") for note in tables[0].notes)


def test_the_suite_feeds_real_workers(tmp_path: Path) -> None:
    slow = dict.fromkeys(storage.STEP_S, 7 * 16 / 100)
    answer, details, ahead = storage.run(options(tmp_path), slow)
    assert details.rows[0][:5] == ["crops", "warm", "A100", 1, 1]
    assert {row[0] for row in answer.rows} == {"crops", "whole files"}
    for row in details.rows:
        assert len(row) == len(details.columns)
        assert row[9] <= 1.0
        assert row[10] == ("yes" if row[9] >= 0.9 else "no")
        if row[1] == "cold" and row[6] != NOT_MEASURED:
            assert row[6] > 0
    assert "14 cases" in answer.notes[0]
    assert [row[0] for row in ahead.rows] == ["cold", "warm"]
    assert all(len(row) == len(ahead.columns) for row in ahead.rows)
    assert not list((tmp_path / "storage").glob("case_*"))
