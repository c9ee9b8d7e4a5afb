"""The loader suite: the naive method makes the same samples, the bytes of a crop are counted, and the suite runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.data import disk_bytes_read, drop_caches, files_of, read_through
from benchmarks.harness import Options
from benchmarks.loader import next_epochs, page_bytes, run
from benchmarks.naive import NaiveCropDataset, naive_crop
from data_loading.base_loader import LoaderConfig
from data_loading.dataset import load_boxes
from data_loading.preprocessing import Shape, foreground_boxes
from data_loading.pytorch_loader import CropDataset
from data_loading.transforms import draw_crop

PATCH = (8, 9, 10)
SHAPES: Sequence[Shape] = ((20, 26, 18), (8, 30, 12), (24, 9, 31), (16, 16, 16))
CASES = [f"case_{number:05d}" for number in range(len(SHAPES))]


def blobs(shape: Shape, seed: int) -> NDArray[np.uint8]:
    """Returns a label with components of classes 1 and 2, smaller and larger than the patch; seed 0: no foreground."""
    field = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 1.5)
    label = np.digitize(field, np.quantile(field, (0.7, 0.9))).astype(np.uint8)
    return label if seed else np.zeros_like(label)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_preprocessed: Callable[..., Path]) -> Path:
    cases = {
        case: (np.arange(math.prod(shape), dtype=np.float32).reshape(1, *shape), blobs(shape, seed)[None])
        for seed, (case, shape) in enumerate(zip(CASES, SHAPES, strict=True))
    }
    return write_preprocessed(tmp_path_factory.mktemp("blobs"), cases)


@pytest.mark.parametrize("oversampling", [0.0, 0.4, 1.0])
def test_the_naive_method_makes_the_same_samples(folder: Path, oversampling: float) -> None:
    settings = LoaderConfig(
        patch=PATCH,
        oversampling=oversampling,
        batch_size=1,
        num_workers=0,
        rank=0,
        ranks=1,
        order_seed=1,
        sample_seed=2,
    )
    naive = NaiveCropDataset(folder, CASES, settings)
    ours = CropDataset(folder, CASES, load_boxes(folder, CASES, 3), settings)
    for epoch in range(1, 101):
        for index in range(len(CASES)):
            theirs, mine = naive[epoch, index], ours[epoch, index]
            np.testing.assert_array_equal(theirs["image"], mine["image"])
            np.testing.assert_array_equal(theirs["label"], mine["label"])
            assert theirs["image"].shape == (1, *PATCH)
            assert theirs["label"].dtype == np.uint8


def test_the_naive_method_draws_from_the_same_distribution() -> None:
    # The random numbers differ: only the distributions agree.
    draws = 3000
    label = blobs((14, 16, 12), 3)
    boxes, patch = foreground_boxes(label, 3), (5, 5, 5)
    naive_rng, our_rng = np.random.default_rng(1), np.random.default_rng(2)
    naive = np.array([naive_crop(naive_rng, label, patch, 0.4) for _ in range(draws)])
    ours = np.array(
        [draw_crop(our_rng, shape=label.shape, patch=patch, boxes=boxes, oversampling=0.4) for _ in range(draws)]
    )
    for axis in range(3):
        counts = [Counter(starts[:, axis].tolist()) for starts in (naive, ours)]
        for start in counts[0] | counts[1]:
            one, other = counts[0][start], counts[1][start]
            # Two counts with the same mean differ by more than 5 standard deviations once in 10^6 cases.
            assert abs(one - other) <= 5 * math.sqrt(one + other), (axis, start, one, other)


def test_the_pages_of_a_crop_are_those_of_its_bytes() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        shape = tuple(int(n) for n in rng.integers(4, 12, 3))
        patch = tuple(int(rng.integers(1, n + 1)) for n in shape)
        start = tuple(int(rng.integers(0, n - length + 1)) for n, length in zip(shape, patch, strict=True))
        itemsize, page = int(rng.choice([1, 4])), int(rng.choice([16, 64]))
        voxels = np.zeros(shape, bool)
        voxels[tuple(slice(n, n + length) for n, length in zip(start, patch, strict=True))] = True
        offsets = 128 + itemsize * np.flatnonzero(voxels)[:, None] + np.arange(itemsize)
        expected = page * len(np.unique(offsets // page))
        assert page_bytes(128, shape, start, patch, itemsize, page) == expected  # type: ignore[arg-type]


def test_every_call_runs_the_next_epoch() -> None:
    seen: list[int] = []
    step = next_epochs(seen.append)
    for _ in range(3):
        step()
    assert seen == [1, 2, 3]


def test_dropped_files_are_read_again_unharmed(folder: Path) -> None:
    files = files_of(folder, [*CASES, CASES[0]])
    assert [path.name for path in files[:3]] == ["case_00000_x.npy", "case_00000_y.npy", "case_00001_x.npy"]
    assert len(files) == 2 * len(CASES)
    before = [path.read_bytes() for path in files]
    drop_caches(files)
    assert read_through(files) == sum(map(len, before))
    assert [path.read_bytes() for path in files] == before
    assert (disk_bytes_read() or 0) >= 0


def test_the_suite_measures_every_loader(tmp_path: Path) -> None:
    rates, read = run(Options(device=torch.device("cpu"), quick=True, work_dir=tmp_path, num_workers=1))
    assert [row[0] for row in rates.rows] == [
        "naive, one process",
        "pytorch, one process",
        "pytorch, 1 worker(s)",
        "device (cpu), no worker",
    ]
    for row in rates.rows:
        assert len(row) == len(rates.columns)
        assert all(math.isfinite(cell) and cell > 0 for cell in row[1:])
        assert row[1] * row[2] == pytest.approx(1000)
    megabytes = {row[0]: row[1] for row in read.rows}
    assert megabytes["image voxels of the crop"] == pytest.approx(4 * 16**3 / 1e6)
    assert megabytes["label voxels of the crop"] == pytest.approx(16**3 / 1e6)
    whole = megabytes["naive: whole image and label"]
    assert whole == pytest.approx((5 * 24 * 40 * 40 + 2 * 128) / 1e6)
    crop, mean, most = list(megabytes.values())[2:5]
    assert crop < mean <= most < whole
