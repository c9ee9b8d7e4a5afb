"""The sliding window: tiling, padding, weights and the reference's crop, on volumes of any size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from runtime.inference import (
    Slab,
    WindowedVolume,
    gaussian_map,
    predict_windows,
    remainder_crop,
    sliding_window,
    stride_of,
    window_padding,
    window_slices,
)
from runtime.memory import LiveMemory

CPU = torch.device("cpu")
PADDING = -2.2

axes = st.integers(1, 9)
shapes = st.tuples(axes, axes, axes)
windows = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
overlaps = st.sampled_from([0.0, 0.2, 0.25, 0.5, 0.6, 0.75, 0.9, 0.99])


def plus_one(windows: Tensor) -> Tensor:
    return windows + 1


def many_classes(windows: Tensor) -> Tensor:
    return windows.expand(-1, 50, -1, -1, -1)


@settings(max_examples=120, deadline=None)
@given(shape=shapes, window=windows, overlap=overlaps, edge=st.booleans(), batch=st.sampled_from([(1, 1), (2, 3)]))
def test_a_predictor_that_adds_one_returns_the_image_plus_one(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float, edge: bool, batch: tuple[int, int]
) -> None:
    image = torch.rand(*batch, *shape, generator=torch.Generator().manual_seed(sum(shape)))
    found = sliding_window(image, plus_one, window, overlap, padding_value=None if edge else PADDING)
    assert found.shape == image.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, image + 1, rtol=0, atol=1e-5)


def test_a_predictor_may_have_other_channels_out_than_in() -> None:
    image = torch.rand(2, 1, 5, 6, 7)
    found = sliding_window(image, lambda x: torch.cat((x, 2 * x, -x), dim=1), (4, 4, 4), 0.5, padding_value=PADDING)
    torch.testing.assert_close(found, torch.cat((image, 2 * image, -image), dim=1), rtol=0, atol=1e-5)


def test_16_bit_logits_are_summed_in_fp32() -> None:
    image = torch.linspace(0, 1, 6 * 6 * 12).view(1, 1, 6, 6, 12)
    found = sliding_window(image, lambda x: x.bfloat16(), (4, 4, 4), 0.75, padding_value=PADDING)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, image.bfloat16().float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("window", "overlap", "stride"),
    [
        ((128, 128, 128), 0.5, [64, 64, 64]),
        ((128, 64, 96), 0.5, [64, 32, 48]),
        ((128, 128, 128), 0.25, [96, 96, 96]),
        ((5, 7, 9), 0.5, [2, 3, 4]),
        ((8, 8, 8), 0.0, [8, 8, 8]),
        ((8, 4, 2), 0.99, [1, 1, 1]),
    ],
)
def test_stride_is_truncated_and_at_least_one(window: tuple[int, ...], overlap: float, stride: list[int]) -> None:
    assert stride_of(window, overlap) == stride


@pytest.mark.parametrize(
    ("size", "stride", "kept"),
    [
        (190, 64, (0, 190)),  # 190 mod 64 = 62, not below 32
        (192, 64, (0, 192)),  # nothing remains
        (200, 64, (4, 196)),  # 8 remain: 4 and 4
        (201, 64, (4, 196)),  # 9 remain: the smaller half, 4, in front
        (193, 64, (0, 192)),  # 1 remains: none in front
        (223, 64, (15, 207)),  # 31 remain, the most that is cut
        (224, 64, (0, 224)),  # 32 remain: not below 32
        (161, 64, (0, 161)),  # 33
        (7, 3, (0, 7)),  # 1 remains, 3 // 2 = 1: not below
        (65, 64, (0, 64)),
        (20, 64, (0, 20)),  # shorter than a stride: all of it "remains", and stays
    ],
)
def test_remainder_crop(size: int, stride: int, kept: tuple[int, int]) -> None:
    for axis in range(3):
        shape, strides, expected = [128, 128, 128], [64, 64, 64], [(0, 128)] * 3
        shape[axis], strides[axis], expected[axis] = size, stride, kept
        assert [(part.start, part.stop) for part in remainder_crop(shape, strides)] == expected


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 700), stride=st.integers(1, 130))
def test_remainder_crop_never_takes_half_a_stride_and_leaves_whole_strides(size: int, stride: int) -> None:
    kept, *_ = remainder_crop((size, 1, 1), (stride, 1, 1))
    cut_before, cut_after = kept.start, size - kept.stop
    assert 0 <= cut_after - cut_before <= 1
    assert cut_before + cut_after <= max(0, stride // 2 - 1)
    assert kept.stop > kept.start
    assert cut_before + cut_after == 0 or (kept.stop - kept.start) % stride == 0


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 700), half=st.integers(1, 80))
def test_padding_at_half_overlap_is_the_references_rule(size: int, half: int) -> None:
    """Up to a multiple of the stride and at least R, half in front (windows of even size, as MLPerf's)."""
    target = max(2 * half, math.ceil(size / half) * half)
    missing = target - size
    (found, *_) = window_padding((size, 2, 2), (2 * half, 2, 2), (half, 1, 1))
    assert found == (missing // 2, missing - missing // 2)


@settings(max_examples=100, deadline=None)
@given(shape=shapes, window=windows, overlap=overlaps)
def test_windows_cover_every_voxel_and_stay_inside(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float
) -> None:
    stride = stride_of(window, overlap)
    padding = window_padding(shape, window, stride)
    padded = [size + before + after for size, (before, after) in zip(shape, padding, strict=True)]
    assert all(0 <= after - before <= 1 for before, after in padding)
    assert times_seen(padded, window, stride).min() >= 1
    # no less padding would do: a stride less would leave an end uncovered
    for size, length, step, whole in zip(shape, window, stride, padded, strict=True):
        assert whole == length or whole - step < size


def times_seen(shape: Sequence[int], window: tuple[int, int, int], stride: list[int]) -> NDArray[np.int64]:
    """Counts the windows that cover each voxel; windows must have their size and be inside the volume."""
    seen = np.zeros(shape, np.int64)
    for slices in window_slices(shape, window, stride):
        assert [part.stop - part.start for part in slices] == list(window)
        assert all(part.start >= 0 and part.stop <= size for part, size in zip(slices, shape, strict=True))
        seen[slices] += 1
    return seen


@settings(max_examples=100, deadline=None)
@given(window=windows, more=st.tuples(*[st.integers(0, 9)] * 3), overlap=overlaps)
def test_without_padding_windows_lie_flush_with_the_edges_and_evenly(
    window: tuple[int, int, int], more: tuple[int, int, int], overlap: float
) -> None:
    shape = [length + extra for length, extra in zip(window, more, strict=True)]
    stride = stride_of(window, overlap)
    assert times_seen(shape, window, stride).min() >= 1
    found = list(window_slices(shape, window, stride))
    for axis, (size, step) in enumerate(zip(shape, stride, strict=True)):
        starts = sorted({slices[axis].start for slices in found})
        steps = {after - before for before, after in itertools.pairwise(starts)}
        assert (starts[0], starts[-1]) == (0, size - window[axis])
        assert max(steps, default=0) <= step
        assert max(steps, default=0) - min(steps, default=0) <= 1
        assert len(starts) == math.ceil((size - window[axis]) / step) + 1, "as few as the stride allows"


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((128, 128, 128), 1),
        ((129, 128, 128), 2),
        ((192, 192, 192), 8),
        ((193, 256, 320), 3 * 3 * 4),
        ((20, 128, 400), 1 * 1 * 6),
    ],
)
def test_number_of_windows(shape: tuple[int, int, int], count: int) -> None:
    """ceil((S - R) / s) + 1 an axis: what adds up to 2,636 windows over MLPerf's 42 cases."""
    window, stride = (128, 128, 128), (64, 64, 64)
    padding = window_padding(shape, window, stride)
    padded = [size + sum(both) for size, both in zip(shape, padding, strict=True)]
    assert len(list(window_slices(padded, window, stride))) == count
    assert count == math.prod(max(0, math.ceil((size - 128) / 64)) + 1 for size in shape)


def test_windows_go_in_order_each_once() -> None:
    found = list(window_slices((6, 4, 8), (4, 4, 4), (2, 2, 4)))
    starts = [tuple(part.start for part in slices) for slices in found]
    assert starts == [(0, 0, 0), (0, 0, 4), (2, 0, 0), (2, 0, 4)]


def test_windows_of_a_size_that_strides_do_not_divide_move_together() -> None:
    found = list(window_slices((11, 4, 4), (4, 4, 4), (4, 4, 4)))
    assert [slices[0].start for slices in found] == [0, 4, 7]


@pytest.mark.parametrize("window", [(8, 8, 8), (16, 8, 4), (5, 7, 2), (6, 1, 3)])
def test_gaussian_map_closed_form(window: tuple[int, int, int]) -> None:
    """The cube root of three Gaussians, standard deviation an eighth of their own axis, at most 1."""
    found = gaussian_map(window, CPU)
    assert found.shape == window
    assert found.dtype == torch.float32
    expected = np.zeros(window)
    for voxel in itertools.product(*map(range, window)):
        exponent = sum(((i - (n - 1) / 2) / (n / 8)) ** 2 for i, n in zip(voxel, window, strict=True))
        expected[voxel] = math.exp(-exponent / 2) ** (1 / 3)
    np.testing.assert_allclose(found.numpy(), expected / expected.max(), rtol=1e-5)
    assert found.max().item() == 1.0


def test_gaussian_map_of_mlperfs_window() -> None:
    found = gaussian_map((128, 128, 128), CPU)
    assert found.min().item() > 0
    # one voxel off the middle in one axis; std 16; the middle itself is half a voxel between two
    expected = math.exp(-((1.5 / 16) ** 2 - (0.5 / 16) ** 2) / 6)
    assert (found[62, 63, 63] / found[63, 63, 63]).item() == pytest.approx(expected, rel=1e-6)
    assert found[0, 0, 0].item() == pytest.approx(math.exp(-((63.5 / 16) ** 2 - (0.5 / 16) ** 2) / 2), rel=1e-5)
    torch.testing.assert_close(found, found.flip(0, 1, 2))
    torch.testing.assert_close(found, found.permute(2, 0, 1))


def direct(image: Tensor, window: tuple[int, int, int], overlap: float, value: float | None) -> Tensor:
    """The definition, window by window in float64, for `where_am_i`."""
    stride = stride_of(window, overlap)
    volume = image[0, 0].double().numpy()
    if value is None:
        padding = window_padding(volume.shape, window, [1, 1, 1])
        padded = np.pad(volume, padding, mode="edge")
    else:
        padding = window_padding(volume.shape, window, stride)
        padded = np.pad(volume, padding, constant_values=value)
    weights = gaussian_map(window, CPU).double().numpy()
    total, norm = np.zeros_like(padded), np.zeros_like(padded)
    counts = [math.ceil((n - r) / s) + 1 for n, r, s in zip(padded.shape, window, stride, strict=True)]
    lasts = [n - r for n, r in zip(padded.shape, window, strict=True)]
    starts = [np.linspace(0, last, count).round().astype(int) for last, count in zip(lasts, counts, strict=True)]
    for start in itertools.product(*starts):
        slices = tuple(slice(first, first + n) for first, n in zip(start, window, strict=True))
        corner = padded[slices][0, 0, 0]
        total[slices] += weights * (padded[slices] + 10 * corner)
        norm[slices] += weights
    inner = tuple(slice(before, before + n) for (before, _), n in zip(padding, image.shape[2:], strict=True))
    return torch.from_numpy((total / norm)[inner])[None, None]


def where_am_i(windows: Tensor) -> Tensor:
    """Depends on the window and not on the voxel alone, so that the weights of overlapping windows show."""
    return windows + 10 * windows[..., :1, :1, :1]


@pytest.mark.parametrize(
    ("shape", "window", "overlap"),
    [
        ((6, 6, 6), (4, 4, 4), 0.5),
        ((7, 5, 11), (4, 6, 2), 0.5),
        ((9, 4, 8), (4, 4, 4), 0.75),
        ((3, 3, 3), (4, 2, 6), 0),
    ],
)
@pytest.mark.parametrize("value", [PADDING, None])
def test_overlapping_windows_are_weighted_with_the_gaussian(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float, value: float | None
) -> None:
    image = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(3))
    found = sliding_window(image, where_am_i, window, overlap, padding_value=value)
    torch.testing.assert_close(found.double(), direct(image, window, overlap, value), rtol=1e-5, atol=1e-5)


def seen_by_predictor(image: Tensor, value: float | None) -> list[Tensor]:
    windows: list[Tensor] = []

    def predictor(window: Tensor) -> Tensor:
        windows.append(window[0, 0].clone())
        return window

    sliding_window(image, predictor, (4, 4, 4), 0.5, padding_value=value)
    return windows


def test_the_padding_value_is_what_lies_outside() -> None:
    image = torch.ones(1, 1, 3, 4, 2)
    (window,) = seen_by_predictor(image, PADDING)
    expected = torch.full((4, 4, 4), PADDING)
    expected[0:3, :, 1:3] = 1  # 1 voxel missing in depth: none in front; 2 in width: one and one
    assert torch.equal(window, expected)


def test_no_padding_value_repeats_the_edge_of_a_volume_smaller_than_a_window() -> None:
    image = torch.arange(24.0).view(1, 1, 3, 4, 2)
    expected = np.pad(image[0, 0].numpy(), ((0, 1), (0, 0), (1, 1)), mode="edge")
    (window,) = seen_by_predictor(image, None)
    assert torch.equal(window, torch.from_numpy(expected))


def test_no_padding_value_pads_nothing_of_a_larger_volume() -> None:
    image = torch.arange(7 * 5 * 4.0).view(1, 1, 7, 5, 4)
    starts = [(d, h) for d in (0, 2, 3) for h in (0, 1)]  # 1.5 rounds to 2
    expected = [image[0, 0, d : d + 4, h : h + 4] for d, h in starts]
    found = seen_by_predictor(image, None)
    assert len(found) == len(expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    padded = seen_by_predictor(image, PADDING)
    assert any((window == PADDING).any() for window in padded)


def test_the_image_itself_is_left_alone() -> None:
    image = torch.rand(1, 1, 4, 4, 8)
    before = image.clone()
    sliding_window(image, plus_one, (4, 4, 4), 0.5, padding_value=PADDING)
    assert torch.equal(image, before)


def test_a_slab_is_final_once_no_later_window_adds_to_it() -> None:
    """Windows of 4 planes, 2 apart, over 10 planes; one window per plane's row, then two at a time."""
    image = torch.rand(1, 1, 10, 4, 4)
    predicted: list[int] = []

    def predictor(windows: Tensor) -> Tensor:
        predicted.append(len(windows))
        return windows

    for batch_size in (1, 2):
        predicted.clear()
        seen = []
        for slab in predict_windows([WindowedVolume(image, (4, 4, 4), 0.5)], predictor, batch_size):
            seen.append((slab.planes.start, slab.planes.stop, sum(predicted)))
            torch.testing.assert_close(slab.logits, image[:, :, slab.planes])
        whole_batches = [-(-count // batch_size) * batch_size for count in (2, 3, 4, 4, 4)]
        assert seen == [(at, at + 2, count) for at, count in zip(range(0, 10, 2), whole_batches, strict=True)]


@settings(max_examples=60, deadline=None)
@given(shape=shapes, window=windows, overlap=overlaps, members=st.integers(1, 3), edge=st.booleans())
def test_slabs_cover_the_planes_in_order_on_any_number_of_ranks(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float, members: int, edge: bool
) -> None:
    """Each rank's sums of a slab, added up, make its mean; every rank has the same slabs."""
    image = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(sum(shape)))
    value = None if edge else PADDING

    def slabs(member: int, of: int, total: Callable[[Tensor], Tensor]) -> list[Slab]:
        volume = WindowedVolume(image, window, overlap, padding_value=value, member=member, members=of)
        return list(predict_windows([volume], plus_one, 3, total))

    members = min(members, len(WindowedVolume(image, window, overlap, padding_value=value).windows))
    own: list[list[Tensor]] = [[] for _ in range(members)]
    for member in range(members):
        slabs(member, members, lambda sums, member=member: own[member].append(sums.clone()) or sums)  # type: ignore[misc]
    sums = iter([sum(parts[1:], start=parts[0]) for parts in zip(*own, strict=True)])
    found = slabs(0, members, lambda _: next(sums))
    assert [slab.planes.start for slab in found] == [0, *(slab.planes.stop for slab in found[:-1])]
    assert found[-1].planes.stop == shape[0]
    torch.testing.assert_close(torch.cat([slab.logits for slab in found], 2), image + 1, rtol=0, atol=1e-5)


def test_the_sums_are_one_window_deep_however_long_the_volume() -> None:
    def peak(depth: int) -> int:
        image = torch.zeros(1, 1, depth, 8, 8)
        with LiveMemory([]) as memory:
            for slab in predict_windows([WindowedVolume(image, (8, 8, 8), 0.5)], many_classes, 1):
                del slab
        return memory.peak

    of_a_plane = 4 * 50 * 8 * 8
    assert peak(80) - peak(40) < 40 * of_a_plane / 10
    assert peak(80) < 35 * of_a_plane, "a window, the sums and a slab, with the copies of each"
