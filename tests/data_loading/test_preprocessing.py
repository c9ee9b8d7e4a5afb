"""Preprocessing against closed forms and MLPerf's own digests; and the way back to the scan's grid."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from numpy.typing import NDArray

from common.errors import UserError
from data_loading.io.orientation import DIRECTIONS, orientation_of
from data_loading.io.volume import Geometry, Volume, read_nifti
from data_loading.preprocessing import (
    GridTransform,
    Shape,
    as_shape,
    edge_padding,
    foreground_box,
    foreground_boxes,
    normalise,
    pad_with_edges,
    preprocess_image,
    preprocess_label,
    resample_image,
    resample_label,
    resample_label_aligned,
    resampled_shape,
    resize_planes,
)
from data_loading.readers.base import ReaderOptions, apply_options
from data_loading.scan_checks import preprocess_scan
from data_loading.spec import KITS19, DatasetSpec
from tests.data_loading.oblique import geometries
from tests.data_loading.source_grid import to_source_grid

F32 = np.float32
PLAIN = DatasetSpec(name="plain", classes=("background", "one", "two"), mean=0.0, std=1.0)
REAL_MASKS = (4, 7, 10, 15, 21, 30, 38, 41, 45, 61, 64, 70, 76, 87, 94, 110, 113, 122, 130, 152, 160, 206)


def scan(array: NDArray[np.generic], spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> Volume:
    """A (C, D, H, W) array as a volume with that spacing."""
    return Volume(array, Geometry(np.diag([*spacing_mm, 1.0]), as_shape(array.shape[1:]), spacing_mm))


def test_values_that_no_network_can_use_are_refused_with_their_number() -> None:
    good = np.arange(24, dtype=F32).reshape(1, 2, 3, 4)
    spec = replace(PLAIN, mean=0.0, std=1e-3)
    array, _ = preprocess_scan(scan(good), spec, "s")
    np.testing.assert_array_equal(array, preprocess_image(scan(good), spec)[0])
    for value, message in (
        (np.nan, "s: the scan contains NaN or infinity: NaN in 3 of its 24 voxels"),
        (np.inf, "infinity or values beyond float32 in 3 of its 24 voxels"),
        (3e38, "s: 3 voxels are too large to be normalised"),
    ):
        bad = good.copy()
        bad[0, 0, 0, :3] = value
        with pytest.raises(UserError, match=message):
            preprocess_scan(scan(bad), spec, "s")
    with pytest.raises(UserError, match="s: all 24 voxels of the scan are 1; export it again"):
        preprocess_scan(scan(np.ones_like(good)), spec, "s")
    preprocess_scan(scan(np.ones_like(good)), spec, "s", is_whole=False)  # a slab of air


@pytest.mark.real_data
@pytest.mark.parametrize("number", REAL_MASKS)
def test_real_masks_have_mlperfs_digests(number: int, real_data: Callable[[str], Path]) -> None:
    # The core promise: whoever preprocesses KiTS19 with this trains on MLPerf's data, bit for bit.
    folder = real_data("kits19_segmentations")
    official = json.loads((folder / "mlperf_md5.json").read_text())
    assert len(official) == len(REAL_MASKS)
    label = read_nifti(folder / f"case_{number:05d}" / "segmentation.nii.gz", np.uint8)
    assert KITS19.spacing_mm is not None
    shape = resampled_shape(label.geometry.shape, label.geometry.spacing_mm, KITS19.spacing_mm)
    # The images are not there; a mask needs of its image no more than the shape that it came to.
    transform = GridTransform(source=label.geometry, resampled_shape=shape, padding_before=(0, 0, 0), shape=shape)
    saved = io.BytesIO()
    np.save(saved, preprocess_label(label, transform, KITS19), allow_pickle=False)
    assert hashlib.md5(saved.getbuffer()).hexdigest() == official[f"case_{number:05d}_y.npy"]


def test_the_benchmarks_constants() -> None:
    assert KITS19.spacing_mm == (1.6, 1.2, 1.2)
    assert KITS19.intensity_window == (-79.0, 304.0)
    assert (KITS19.mean, KITS19.std, KITS19.padding_value) == (101.0, 76.9, -2.2)
    assert KITS19.min_shape == (128, 128, 128)
    assert len(KITS19.classes) == 3
    assert KITS19.crops_remainder


@pytest.mark.parametrize(
    ("shape", "spacing_mm", "target_mm", "expected"),
    [
        ((64, 512, 512), (4.0, 0.9765625, 0.9765625), (1.6, 1.2, 1.2), (160, 416, 416)),
        ((10, 10, 10), (1.99, 1.0, 0.5), (1.0, 1.0, 1.0), (19, 10, 5)),  # truncated, 19.9 is 19
        ((512, 512, 64), (0.9375, 0.9375, 0.9375), (1.2, 1.2, 1.2), (400, 400, 50)),  # float32 makes 399 and 49
        ((10, 10, 10), (4.3, 4.3, 4.3), (0.1, 0.1, 0.1), (429, 429, 429)),  # spacing · shape / target makes 430
        ((1, 3, 3), (0.5, 0.5, 0.25), (1.0, 1.0, 1.0), (1, 1, 1)),  # never nothing
    ],
)
def test_new_shape_is_truncated_in_float64(
    shape: Shape, spacing_mm: tuple[float, ...], target_mm: tuple[float, ...], expected: Shape
) -> None:
    assert resampled_shape(shape, spacing_mm, target_mm) == expected


def trilinear(image: NDArray[np.float64], shape: Shape) -> NDArray[np.float64]:
    """Interpolation by its definition, axis after axis: new voxel i of n lies at i · (old - 1) / (n - 1)."""
    for axis, size in enumerate(shape):
        old = image.shape[axis]
        at = np.arange(size) * (old - 1) / max(size - 1, 1)
        low = np.minimum(np.floor(at).astype(int), max(old - 2, 0))
        weight = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        high = np.minimum(low + 1, old - 1)
        image = image.take(low, axis) * (1 - weight) + image.take(high, axis) * weight
    return image


@pytest.mark.parametrize("shape", [(9, 13, 4), (3, 2, 17), (5, 6, 7), (1, 1, 1), (10, 1, 3)])
def test_images_are_resampled_trilinearly_with_corners_aligned(shape: Shape) -> None:
    image = np.random.default_rng(0).normal(0, 100, (2, 5, 6, 7)).astype(F32)
    resampled = resample_image(image, shape)
    assert resampled.dtype == F32
    for channel in range(2):
        np.testing.assert_allclose(resampled[channel], trilinear(image[channel].astype(np.float64), shape), atol=1e-3)


@pytest.mark.parametrize(("old", "new"), [(5, 9), (9, 5), (2, 82), (2, 164), (7, 7), (64, 160), (512, 416)])
def test_labels_are_resampled_by_legacy_nearest(old: int, new: int) -> None:
    # Legacy: floor of i times the ratio in float32. From 2 to 82 that is not what exact arithmetic gives.
    expected = np.minimum(np.floor(np.arange(new, dtype=F32) * F32(old / new)).astype(int), old - 1)
    line = (np.arange(old) % 251).astype(np.uint8)
    for axis in range(3):
        shape = tuple(old if a == axis else 1 for a in range(3))
        resampled = resample_label(line.reshape(1, *shape), as_shape(new if a == axis else 1 for a in range(3)))
        assert resampled.dtype == np.uint8
        np.testing.assert_array_equal(resampled.ravel(), line[expected])
    if (old, new) == (2, 82):
        assert (expected != np.arange(new) * old // new).any()


@pytest.mark.parametrize(
    ("old", "new"), [(5, 9), (9, 5), (2, 82), (7, 7), (64, 160), (512, 416), (1, 4), (4, 1), (1, 1)]
)
def test_aligned_labels_are_those_nearest_to_the_points_of_the_image(old: int, new: int) -> None:
    at = np.arange(new) * (old - 1) / max(new - 1, 1)
    line = (np.arange(old) % 251).astype(np.uint8)
    for axis in range(3):
        shape = tuple(old if a == axis else 1 for a in range(3))
        resampled = resample_label_aligned(line.reshape(1, *shape), as_shape(new if a == axis else 1 for a in range(3)))
        assert resampled.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(resampled.ravel(), line[np.floor(at + 0.5).astype(int)])


@pytest.mark.parametrize(("old", "new"), [(128, 300), (300, 128), (7, 1), (1, 7)])
def test_a_picture_one_pixel_wide_is_resized_like_each_column_of_a_wider_one(old: int, new: int) -> None:
    column = torch.arange(float(old)).reshape(1, 1, old, 1)
    expected = resize_planes(column.expand(1, 1, old, 2), (new, 2))[..., :1]
    torch.testing.assert_close(resize_planes(column, (new, 1)), expected)
    torch.testing.assert_close(resize_planes(column.mT, (1, new)), expected.mT)
    torch.testing.assert_close(resize_planes(column.expand(1, 1, old, 4), (new, 1)), expected)


@pytest.mark.parametrize("spacing_mm", [0.5, 1.3, 2.0, 4.0])
def test_a_resampled_mask_lies_on_its_scan(spacing_mm: float) -> None:
    """By the reference's rule, a ball of 6 voxels at 4 mm shares only half of its voxels with its own image."""
    points = np.stack(np.meshgrid(*[np.arange(48)] * 3, indexing="ij"))
    ball = (((points - np.array([30, 17, 24]).reshape(3, 1, 1, 1)) ** 2).sum(0) <= 36)[None]
    geometry = Geometry(np.eye(4), (48, 48, 48), (1.0, 1.0, 1.0))
    options = ReaderOptions(spacing=(spacing_mm,) * 3, intensity="none")
    spec = apply_options(DatasetSpec(name="balls", classes=("background", "ball")), options)
    image, transform = preprocess_image(Volume(ball.astype(F32), geometry), spec)
    label = preprocess_label(Volume(ball.astype(np.uint8), geometry), transform, spec)
    in_image = image > 0.5
    dice = 2 * np.count_nonzero(in_image & (label > 0)) / (np.count_nonzero(in_image) + np.count_nonzero(label))
    assert dice > 0.9
    places = [np.argwhere(mask[0]).mean(0) for mask in (in_image, label)]
    np.testing.assert_allclose(places[0], places[1], atol=0.15)
    assert not apply_options(KITS19, options).aligned_labels, "its digests are the reference's"


def test_intensities_are_clipped_then_normalised_in_float32() -> None:
    values = np.array([-3000, -79.5, -79, 0, 101, 303.9, 304, 304.1, 3000], F32)
    result = normalise(values.reshape(1, 1, 1, -1), KITS19)
    clipped = np.array([-79, -79, -79, 0, 101, 303.9, 304, 304, 304], F32)
    assert result.dtype == F32
    np.testing.assert_array_equal(result.ravel(), (clipped - F32(101)) / F32(76.9))
    assert result.min() == F32(-180) / F32(76.9)
    assert result.max() == F32(203) / F32(76.9)


def test_a_scan_without_a_window_is_only_normalised() -> None:
    values = np.array([-3000.0, 0.0, 3000.0], F32).reshape(1, 1, 1, 3)
    np.testing.assert_array_equal(normalise(values, replace(PLAIN, mean=10.0, std=4.0)), (values - 10) / 4)


def test_without_constants_every_channel_of_every_scan_has_its_own() -> None:
    rng = np.random.default_rng(0)
    image = np.stack([rng.normal(300, 50, (6, 7, 8)), rng.normal(-5e5, 0.5, (6, 7, 8))]).astype(F32)
    result = normalise(image, DatasetSpec(name="own", classes=("background", "one")))
    wide = image.astype(np.float64)
    for channel in range(2):
        expected = (wide[channel] - wide[channel].mean()) / wide[channel].std()
        np.testing.assert_allclose(result[channel], expected, rtol=1e-5, atol=1e-6)
    assert result.dtype == F32


def test_a_constant_scan_becomes_zero() -> None:
    image = np.full((2, 5, 6, 7), 0.1, F32)
    image[1] = -1024
    np.testing.assert_array_equal(
        normalise(image, DatasetSpec(name="own", classes=("background", "one"))), np.zeros_like(image)
    )


def test_own_statistics_come_after_the_window() -> None:
    image = np.array([0.0, 10.0, 1e6], F32).reshape(1, 1, 1, 3)
    spec = DatasetSpec(name="own", classes=("background", "one"), intensity_window=(0.0, 20.0))
    np.testing.assert_allclose(normalise(image, spec).ravel(), [-math.sqrt(1.5), 0, math.sqrt(1.5)], rtol=1e-6)


def test_padding_has_the_odd_voxel_behind() -> None:
    assert edge_padding((123, 128, 200), (128, 128, 128)) == [(2, 3), (0, 0), (0, 0)]
    assert edge_padding((1, 2, 3), (2, 6, 2)) == [(0, 1), (2, 2), (0, 0)]
    assert edge_padding((1, 2, 3), None) == [(0, 0)] * 3


def test_padding_repeats_the_edges_and_copies_nothing_otherwise() -> None:
    array = np.arange(8).reshape(1, 2, 2, 2)
    assert pad_with_edges(array, [(0, 0)] * 3) is array
    padded = pad_with_edges(array, [(0, 1), (2, 1), (0, 0)])
    assert padded.shape == (1, 3, 5, 2)
    expected = array[:, [0, 1, 1]][:, :, [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(padded, expected)


def test_the_order_is_resample_clip_normalise_pad() -> None:
    # From 0 to 1000 over four voxels; clipped first, the voxel at a third of the way would be 101 and not 304.
    image = np.broadcast_to(np.array([0, 1000], F32)[:, None, None], (2, 2, 2))[np.newaxis].copy()
    spec = replace(KITS19, spacing_mm=(1.0, 1.0, 1.0), min_shape=(7, 2, 3))
    array, transform = preprocess_image(scan(image, (2.0, 1.0, 1.0)), spec)
    line = (np.array([0, 304, 304, 304], F32) - F32(101)) / F32(76.9)
    np.testing.assert_array_equal(array[0, :, 0, 0], line[[0, 0, 1, 2, 3, 3, 3]])
    assert array.shape == (1, 7, 2, 3)
    assert array.dtype == F32
    assert transform == GridTransform(
        source=transform.source, resampled_shape=(4, 2, 2), padding_before=(1, 0, 0), shape=(7, 2, 3)
    )

    label = np.array([1, 2], np.uint8).reshape(1, 2, 1, 1).repeat(2, axis=2).repeat(2, axis=3)
    mask = preprocess_label(scan(label, (2.0, 1.0, 1.0)), transform, spec)
    np.testing.assert_array_equal(mask[0, :, 0, 0], [1, 1, 1, 2, 2, 2, 2])
    assert (mask.shape, mask.dtype) == ((1, 7, 2, 3), np.uint8)


def test_own_statistics_are_those_of_the_scan_and_not_of_its_padding() -> None:
    image = np.random.default_rng(0).normal(300, 50, (1, 4, 5, 6)).astype(F32)
    array, _ = preprocess_image(
        scan(image), DatasetSpec(name="own", classes=("background", "one"), min_shape=(9, 9, 9))
    )
    np.testing.assert_allclose(array[:, 2:6, 2:7, 1:7], (image - image.mean()) / image.std(), atol=1e-5)


def test_own_statistics_are_computed_in_float64() -> None:
    image = np.array([2**24, 2**24 + 2], F32).reshape(1, 1, 1, 2)  # float32 has no number between them for the mean
    own = DatasetSpec(name="own", classes=("background", "one"))
    assert normalise(image, own).ravel().tolist() == [-1, 1]


def test_a_scan_with_the_right_spacing_is_not_resampled() -> None:
    image = np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(F32)
    for spec in (replace(PLAIN, spacing_mm=(3.0, 2.0, 1.0)), PLAIN):
        array, transform = preprocess_image(scan(image, (3.0, 2.0, 1.0)), spec)
        np.testing.assert_array_equal(array, image)
        assert transform.resampled_shape == transform.shape == (4, 5, 6)


def test_transform_survives_json() -> None:
    _, transform = preprocess_image(scan(np.zeros((1, 4, 5, 6), F32), (3.0, 2.0, 1.0)), KITS19)
    again = GridTransform.from_json(json.loads(json.dumps(transform.to_json())))
    np.testing.assert_array_equal(again.source.affine, transform.source.affine)
    assert replace(again, source=transform.source) == transform
    assert again.source.spacing_mm == (3.0, 2.0, 1.0)


def test_boxes_are_the_two_largest_of_every_class_largest_first() -> None:
    label = np.zeros((20, 20, 20), np.uint8)
    label[0:2, 0:2, 0:2] = 1  # 8 voxels
    label[5:8, 5:8, 5:8] = 1  # 27 voxels
    label[10:16, 10, 10] = label[10, 10:16, 10] = label[10, 10, 10:16] = 1  # 16 voxels in a box of 216
    label[19, 19, 19] = 2
    expected = {1: [(10, 10, 10, 16, 16, 16), (5, 5, 5, 8, 8, 8)], 2: [(19, 19, 19, 20, 20, 20)]}
    assert foreground_boxes(label, 3) == expected
    assert foreground_boxes(label[np.newaxis], 3) == expected
    assert json.loads(json.dumps(foreground_boxes(label, 3)[2])) == [[19, 19, 19, 20, 20, 20]]


def test_a_long_thin_component_is_smaller_than_a_compact_one() -> None:
    label = np.zeros((20, 8, 8), np.uint8)
    label[:, 0, 0] = 1  # 20 voxels, with the longest sides
    label[0:3, 2:5, 2:5] = 1  # 27 voxels
    label[5:8, 2:5, 2:6] = 1  # 36 voxels
    assert foreground_boxes(label, 2) == {1: [(5, 2, 2, 8, 5, 6), (0, 2, 2, 3, 5, 5)]}


def test_components_touch_by_faces_alone() -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    label[0, 0, 0] = label[0, 1, 1] = 1  # across an edge
    label[2, 2, 2] = label[3, 3, 3] = 2  # across a corner
    assert len(foreground_boxes(label, 3)[1]) == 2
    assert len(foreground_boxes(label, 3)[2]) == 2
    label[0, 0, 1] = 1
    assert foreground_boxes(label, 3)[1] == [(0, 0, 0, 1, 2, 2)]


def test_classes_are_labelled_apart_and_absent_ones_left_out() -> None:
    label = np.zeros((4, 4, 4), np.uint8)
    assert foreground_boxes(label, 3) == {}
    label[0, 0, :2], label[0, 0, 2:] = 2, 3
    assert foreground_boxes(label, 4) == {2: [(0, 0, 0, 1, 1, 2)], 3: [(0, 0, 2, 1, 1, 4)]}
    assert foreground_boxes(label, 3) == {2: [(0, 0, 0, 1, 1, 2)]}


def flooded_boxes(label: NDArray[np.uint8], value: int) -> list[int]:
    """Volumes of the boxes of a class's components, by a flood fill."""
    left = {tuple(int(n) for n in place) for place in np.argwhere(label == value)}
    volumes = []
    while left:
        front, component = [left.pop()], []
        while front:
            place = front.pop()
            component.append(place)
            for axis in range(3):
                for step in (-1, 1):
                    near = tuple(n + step * (a == axis) for a, n in enumerate(place))
                    if near in left:
                        left.remove(near)
                        front.append(near)
        extent = np.ptp(np.array(component), axis=0) + 1
        volumes.append(int(extent.prod()))
    return sorted(volumes, reverse=True)


@settings(max_examples=60, deadline=None)
@given(label=st_numpy.arrays(np.uint8, st.tuples(*[st.integers(1, 5)] * 3), elements=st.integers(0, 2)))
def test_boxes_agree_with_a_flood_fill(label: NDArray[np.uint8]) -> None:
    boxes = foreground_boxes(label, 3)
    for value in (1, 2):
        volumes = [(d1 - d0) * (h1 - h0) * (w1 - w0) for d0, h0, w0, d1, h1, w1 in boxes.get(value, [])]
        assert volumes == flooded_boxes(label, value)[:2]


def ramp(shape: Shape) -> NDArray[np.float32]:
    """100 + 3d - 2h + w, which trilinear interpolation reproduces."""
    d, h, w = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return (100 + 3 * d - 2 * h + w).astype(F32)[np.newaxis]


@pytest.mark.parametrize("spacing_mm", [(5.0, 0.7, 0.7), (1.0, 1.0, 1.0), (0.8, 2.0, 1.3), (1.6, 1.2, 1.2)])
def test_the_way_back_returns_a_ramp_where_it_was(spacing_mm: tuple[float, float, float]) -> None:
    image = ramp((11, 31, 23))
    spec = replace(PLAIN, spacing_mm=(1.6, 1.2, 1.2), min_shape=(30, 30, 30))
    array, transform = preprocess_image(scan(image, spacing_mm), spec)
    assert min(array.shape[1:]) >= 30
    back = to_source_grid(array, transform)
    np.testing.assert_allclose(back, image, atol=1e-3)


def test_the_way_back_cuts_off_the_padding_and_nothing_else() -> None:
    image = np.random.default_rng(0).normal(size=(2, 5, 6, 7)).astype(F32)
    spec = replace(PLAIN, min_shape=(8, 6, 12))
    array, transform = preprocess_image(scan(image), spec)
    assert array.shape == (2, 8, 6, 12)
    marked = np.where(np.arange(12) < 2, np.nan, array).astype(F32)  # 5 are missing: 2 in front, 3 behind
    np.testing.assert_array_equal(to_source_grid(marked, transform), image)


def dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


def test_what_a_network_finds_comes_back_to_its_place() -> None:
    d, h, w = np.meshgrid(*map(np.arange, (14, 90, 80)), indexing="ij")
    spacing_mm = (5.0, 0.8, 0.9)
    # Balls of 25 and 12 mm radius, well off the middle.
    label = np.zeros(d.shape, np.uint8)
    for value, centre, radius_mm in ((1, (5, 40, 30), 25), (2, (9, 65, 55), 12)):
        squared = sum(((x - c) * s) ** 2 for x, c, s in zip((d, h, w), centre, spacing_mm, strict=True))
        label[squared < radius_mm**2] = value
    spec = replace(KITS19, min_shape=(64, 64, 96))
    # A perfect network: it sees one channel a class and is certain of the brightest.
    seen = np.stack([label == value for value in range(3)]).astype(F32)
    array, transform = preprocess_image(scan(seen, spacing_mm), replace(spec, intensity_window=None))
    certain = np.stack([array.argmax(axis=0) == value for value in range(3)]).astype(F32)
    back = to_source_grid(certain, transform)
    assert back.shape == (3, *label.shape)
    np.testing.assert_allclose(back.sum(axis=0), 1, atol=1e-5)
    for value in (1, 2):
        assert dice(back.argmax(axis=0) == value, label == value) >= 0.95

    # MLPerf's masks lie up to half a scan's voxel beside its images (nearest does not align corners), 2.5 mm here.
    mask = preprocess_label(scan(label[np.newaxis], spacing_mm), transform, spec)
    for value in (1, 2):
        assert dice(array.argmax(axis=0) == value, mask[0] == value) >= 0.9


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    spacing_mm=st.tuples(*[st.floats(0.3, 6.0)] * 3),
    target_mm=st.tuples(*[st.floats(0.6, 4.0)] * 3),
    least=st.integers(1, 16),
)
def test_there_and_back_any_scan_keeps_its_shape(
    shape: Shape, spacing_mm: tuple[float, float, float], target_mm: tuple[float, float, float], least: int
) -> None:
    spec = replace(PLAIN, spacing_mm=target_mm, min_shape=(least, least, least))
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(F32)
    array, transform = preprocess_image(scan(image, spacing_mm), spec)
    label = preprocess_label(scan((image > 0).astype(np.uint8), spacing_mm), transform, spec)
    assert array.shape[1:] == label.shape[1:] == transform.shape
    assert min(transform.shape) >= least
    expected = [max(1, int(s / t * n)) for n, s, t in zip(shape, spacing_mm, target_mm, strict=True)]
    assert list(transform.resampled_shape) == expected
    assert to_source_grid(array, transform).shape == (1, *shape)


WAYS = ["".join(way) for sides in itertools.product(*DIRECTIONS) for way in itertools.permutations(sides)]


@settings(max_examples=50, deadline=None)
@given(geometries(1, 7), st.sampled_from([None, *WAYS]), st.booleans(), st.integers(0, 9), st.integers(0, 999))
def test_turned_cut_and_padded_every_label_comes_back(
    geometry: Geometry, orientation: str | None, crop: bool, least: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.normal(1, 1, (2, *geometry.shape)).astype(F32)
    for axis, size in enumerate(geometry.shape, start=1):  # so that a crop begins anywhere
        first = rng.integers(size)
        places = np.arange(size)
        is_outside = (places < first) | (places > rng.integers(first, size))
        np.moveaxis(image, axis, 0)[is_outside] = 0
    label = rng.integers(0, 3, (1, *geometry.shape)).astype(np.uint8)
    spec = replace(
        PLAIN,
        orientation=orientation,
        foreground_crop=crop,
        min_shape=(least, least, least),
        intensity_window=(1.0, 9.0),
        intensity="none",
    )
    array, transform = preprocess_image(Volume(image, geometry), spec)
    record = json.loads(json.dumps(transform.to_json()))
    assert GridTransform.from_json(record).to_json() == record
    mask = preprocess_label(Volume(label, geometry), transform, spec)
    assert array.shape[1:] == mask.shape[1:] == transform.shape
    assert orientation_of(transform.cropped.affine) == (orientation or orientation_of(geometry.affine))
    certain = np.concatenate([mask == value for value in range(3)]).astype(F32)
    back = to_source_grid(certain, transform)
    np.testing.assert_array_equal(back.sum(axis=0), np.ones(geometry.shape))
    inside = np.ones(geometry.shape, bool)
    if crop and (image > 1).any():
        places = np.argwhere((image > 1).any(axis=0))
        inside[:] = False
        inside[tuple(slice(a, b + 1) for a, b in zip(places.min(0), places.max(0), strict=True))] = True
    np.testing.assert_array_equal(back.argmax(0), np.where(inside, label[0], 0))
    # A voxel of the network's grid lies where the geometry says.
    values = np.clip(image, 1, 9)
    start = np.array(transform.padding_before)
    for corner in itertools.product(*((0, size - 1) for size in transform.cropped.shape)):
        old = np.rint(np.linalg.inv(geometry.affine) @ transform.cropped.affine @ [*corner, 1]).astype(int)[:3]
        np.testing.assert_array_equal(array[:, *(start + corner)], values[:, *old])


@settings(max_examples=40, deadline=None)
@given(geometries(4, 12), st.sampled_from(WAYS), st.tuples(*[st.floats(0.8, 2.0)] * 3))
def test_turned_cut_and_resampled_a_ramp_comes_back(
    geometry: Geometry, orientation: str, spacing_mm: tuple[float, float, float]
) -> None:
    image = ramp(geometry.shape)
    spec = replace(
        PLAIN,
        orientation=orientation,
        foreground_crop=True,
        spacing_mm=spacing_mm,
        intensity="none",
        intensity_window=(float(np.median(image)), 1e6),
    )
    array, transform = preprocess_image(Volume(image, geometry), spec)
    assert transform.crop is not None
    back = to_source_grid(np.concatenate([np.zeros_like(array), array]), transform)[1:]  # outside, all is background
    assert back.shape == image.shape
    seen = back != 0
    assert seen[image > np.median(image)].all()
    if min(transform.resampled_shape) > 1:  # along an axis of one voxel nothing is left of a ramp
        clipped = replace(spec, intensity_window=(-1e6, 1e6), foreground_crop=False)
        whole, way = preprocess_image(Volume(image, geometry), clipped)
        np.testing.assert_allclose(to_source_grid(whole, way), image, atol=1e-2 * np.ptp(image) + 1e-3)
    resampled = list(transform.resampled_shape)
    target = [s * (n - 1) for s, n in zip(transform.cropped.spacing_mm, transform.cropped.shape, strict=True)]
    found = [s * (n - 1) for s, n in zip(transform.spacing_mm, resampled, strict=True)]
    assert all(a == pytest.approx(b) for a, b, n in zip(target, found, resampled, strict=True) if n > 1)


def test_old_transforms_have_neither_turn_nor_crop() -> None:
    _, transform = preprocess_image(scan(np.zeros((1, 4, 5, 6), F32)), PLAIN)
    old = {key: value for key, value in transform.to_json().items() if key not in ("orientation", "crop", "by_area")}
    read = GridTransform.from_json(old)
    assert (read.orientation, read.crop, read.half_pixel) == (None, None, False)


def test_to_unit_by_the_window_or_by_each_scans_own_ends() -> None:
    image = np.array([-200.0, -100.0, 0.0, 300.0, 900.0], F32).reshape(1, 1, 1, 5)
    windowed = normalise(image, replace(PLAIN, intensity="minmax", intensity_window=(-100.0, 300.0)))
    np.testing.assert_allclose(windowed.ravel(), [0, 0, 0.25, 1, 1])
    two = np.concatenate([image, 2 * image, 7 + 0 * image])
    own = normalise(two, replace(PLAIN, intensity="minmax"))
    expected = (image.ravel() + 200) / 1100
    np.testing.assert_allclose(own[:, 0, 0], [expected, expected, np.zeros(5)], rtol=1e-6)
    assert own.dtype == F32
    np.testing.assert_array_equal(normalise(image, replace(PLAIN, intensity="none")), image)


def test_the_body_is_what_is_above_the_window_or_the_mean() -> None:
    image = np.full((2, 6, 7, 8), -1000, F32)
    image[0, 2:4, 1:6, 3] = 40
    image[1, 3, 3, 5:7] = 900
    windowed = replace(PLAIN, intensity_window=(-100.0, 300.0))
    assert foreground_box(image, windowed) == foreground_box(image, PLAIN) == (2, 1, 3, 4, 6, 7)
    assert foreground_box(np.minimum(image, -100), windowed) is None
    for value in (0.3, 0.7, 0.9):  # summed in float32, their mean would be lower than they are
        assert foreground_box(np.full((1, 7, 11, 13), value, F32), PLAIN) is None


def test_a_shrunk_label_lies_where_its_image_does() -> None:
    ramp_of_9 = np.arange(9).reshape(1, 1, 1, 9).repeat(9, axis=2)
    spec = replace(PLAIN, size=(3, 3), intensity="none")
    array, transform = preprocess_image(scan(ramp_of_9.astype(F32)), spec)
    label = preprocess_label(scan(ramp_of_9.astype(np.uint8)), transform, spec)
    np.testing.assert_array_equal(label[0, 0], [[1, 4, 7]] * 3)  # the middle pixel of each three
    np.testing.assert_array_equal(np.rint(array[0, 0]), label[0, 0])


def test_a_picture_shrinks_without_losing_a_pixel_and_keeps_its_edges() -> None:
    rng = np.random.default_rng(0)
    image = rng.random((3, 1, 8, 12)).astype(F32)
    spec = replace(PLAIN, size=(4, 6), intensity="none")
    array, transform = preprocess_image(scan(image), spec)
    assert array.shape == (3, 1, 4, 6)
    # Halved, away from the border a pixel weighs the 4 x 4 around it 1:3:3:1 each way.
    weights = np.array([1, 3, 3, 1]) / 8
    expected = np.einsum("chw,h,w->c", image[:, 0, 1:5, 3:7], weights, weights)
    np.testing.assert_allclose(array[:, 0, 1, 2], expected, rtol=1e-5)
    assert transform.spacing_mm == (1.0, 2.0, 2.0)
    blocks = rng.integers(0, 3, (1, 1, 4, 6)).astype(np.uint8)
    label = blocks.repeat(2, axis=2).repeat(2, axis=3)
    np.testing.assert_array_equal(preprocess_label(scan(label), transform, spec), blocks)
    certain = np.concatenate([blocks == value for value in range(3)]).astype(F32)
    back = to_source_grid(certain, transform)
    np.testing.assert_allclose(back.sum(0), 1, rtol=1e-5)
    np.testing.assert_array_equal(back.argmax(0), label[0])
