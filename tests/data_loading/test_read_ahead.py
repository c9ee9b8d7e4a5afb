"""Reading ahead: the spans that are requested, when they are, and what the disk then delivers."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.data import disk_bytes_read, drop_caches, files_of, save_case
from benchmarks.storage_data import was_dropped
from data_loading import read_ahead
from data_loading.base_loader import LoaderConfig
from data_loading.dataset import map_case
from data_loading.pytorch_loader import CropDataset
from data_loading.read_ahead import ReadAhead, plane_spans

SHAPE = (1, 40, 256, 256)  # rows of 1 KiB, planes of 64 pages
CROP = (slice(None), slice(8, 24), slice(100, 116), slice(30, 94))

Arrays = tuple[NDArray[np.float32], NDArray[np.uint8]]


def made_up() -> Arrays:
    image = np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)
    return image, (image > 0).astype(np.uint8)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize("crop", [CROP, (slice(None), slice(3, 4), slice(255, 256), slice(255, 256))])
def test_spans_start_at_pages_and_hold_every_voxel_of_the_crop(dtype: type, crop: tuple[slice, ...]) -> None:
    offset = 128  # of the voxels in the file: a header
    size = 2 * int(np.prod(SHAPE[1:])) * np.dtype(dtype).itemsize + offset
    held = np.zeros(size, np.uint8)
    volume = held[offset:].view(dtype).reshape(2, *SHAPE[1:])
    view = volume[crop]
    view.view(np.uint8)[...] = 1
    spans = plane_spans(view, held.__array_interface__["data"][0])
    assert len(spans) == view.shape[0] * view.shape[1]
    outside = held.copy()
    for first, length in spans:
        assert first % mmap.PAGESIZE == 0
        assert first + length <= size
        outside[first : first + length] = 0
        assert held[first + length - 1] == 1  # no byte too many
        assert held[first : first + mmap.PAGESIZE].any()
    assert not outside.any()


def test_arrays_in_memory_are_left_alone() -> None:
    assert not ReadAhead().request([array[CROP] for array in made_up()])


def test_files_in_the_page_cache_are_left_alone(tmp_path: Path) -> None:
    image, label = made_up()
    save_case(tmp_path, "case_00000", image=image, label=label, boxes={})
    assert not ReadAhead().request([array[CROP] for array in map_case(tmp_path, "case_00000")])


def test_a_cold_disk_delivers_the_crops_planes_alone(tmp_path: Path) -> None:
    views = [array[CROP] for array in cold_case(tmp_path)]
    ahead = ReadAhead()
    before = disk_bytes_read()
    assert ahead.request(views)
    for view, array in zip(views, made_up(), strict=True):
        np.testing.assert_array_equal(np.array(view), array[CROP])
    delivered = (disk_bytes_read() or 0) - (before or 0)
    # Per plane 5 pages of the image and 2 of the label; without it, at least 32 pages around each that is missing.
    assert 0 < delivered <= 1.1 * 16 * (5 + 2) * mmap.PAGESIZE
    assert not ahead.request(views)


def test_the_loader_reads_cold_crops_so(tmp_path: Path) -> None:
    cold_case(tmp_path)
    config = LoaderConfig(
        patch=(16, 16, 16),
        oversampling=0.0,
        batch_size=1,
        num_workers=0,
        rank=0,
        ranks=1,
        order_seed=0,
        sample_seed=0,
    )
    dataset = CropDataset(tmp_path, ["case_00000"], [{}], config)
    before = disk_bytes_read()
    _ = dataset[1, 0]
    assert 0 < (disk_bytes_read() or 0) - (before or 0) <= 1.2 * 16 * (5 + 2) * mmap.PAGESIZE


def test_an_overlapping_crop_is_noticed(tmp_path: Path) -> None:
    (volume, _), ahead = cold_case(tmp_path), ReadAhead()
    assert ahead.request([volume[:, 8:24, 100:116, 30:94]])
    np.array(volume[:, 8:24, 100:116, 30:94])
    assert ahead.request([volume[:, 8:24, 112:128, 30:94]])  # other rows of the same planes
    assert ahead.request([volume[:, 23:39, 100:116, 30:94]])  # other planes
    assert not ahead.request([volume[:, 10:20, 101:110, 30:94]])  # inside the first


def test_probing_stops_in_a_warm_cache_and_starts_again_with_a_page_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "PROBED_SAMPLES", 2)
    volume, _ = cold_case(tmp_path)
    ahead = ReadAhead()
    in_memory = np.zeros((1, 2, 2, 2))
    assert [ahead.request([in_memory]) for _ in range(2)] == [False, False]
    crop = volume[:, 8:12, 8:12, 8:12]
    assert not ahead.request([crop])  # no longer probed
    np.array(crop)
    assert ahead.request([volume[:, 36:40, 240:256, 8:12]])


def cold_case(folder: Path) -> Arrays:
    """Writes a case and maps it with an empty page cache; skips the test where there is no such thing."""
    image, label = made_up()
    save_case(folder, "case_00000", image=image, label=label, boxes={})
    files = files_of(folder, ["case_00000"])
    if not drop_caches(files) or not was_dropped(files[0]) or disk_bytes_read() is None:
        pytest.skip("this file system does not drop its pages, or this system does not count what it reads")
    drop_caches(files)
    return map_case(folder, "case_00000")
