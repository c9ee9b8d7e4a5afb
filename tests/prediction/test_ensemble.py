"""Prediction: masks are in the right place on any grid, and ensembles average probabilities."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from common.errors import UserError
from data_loading.io.scan_discovery import Source, find_sources
from data_loading.io.volume import Geometry, read_nifti
from data_loading.preprocessing import GridTransform, edge_padding, preprocess_label, resampled_shape
from data_loading.spec import KITS19, DatasetSpec
from prediction import ensemble as ensembles
from prediction.ensemble import Ensemble, Member, predict_scan
from prediction.memory import MemoryBudget, MemoryPlan
from prediction.predict import predict_scans
from runtime.evaluation import SlidingWindowConfig
from runtime.test_time_flips import flips_of
from tests.data_loading.oblique import geometries
from tests.data_loading.source_grid import to_source_grid
from tests.runtime.conftest import file_size_limit

CPU = torch.device("cpu")
WINDOW = (4, 4, 4)
PLAIN = DatasetSpec(name="synthetic", classes=("background", "object"), mean=0.0, std=1.0)


class Above(nn.Module):
    """Two classes by the voxel's value: the second if it is above 0."""

    def __init__(self, sharpness: float = 1.0) -> None:
        super().__init__()
        self.sharpness = sharpness

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat((torch.zeros_like(image), self.sharpness * image), dim=1)


def make_ensemble(
    spec: DatasetSpec,
    *networks: nn.Module,
    flips: str = "",
    max_gb: float | None = None,
    window: tuple[int, int, int] = WINDOW,
) -> Ensemble:
    windows = SlidingWindowConfig(
        window=window,
        overlap=0.5,
        batch_size=3,
        classes=len(spec.classes),
        padding_value=spec.padding_value,
        crops_remainder=False,
        flips=flips_of(flips),
    )
    members = (Member(network=n, windows=windows, amp=False, amp_dtype="auto", layout="NCDHW") for n in networks)
    return Ensemble(members=tuple(members), spec=spec, budget=MemoryBudget(max_gb, CPU))


def write_scan(path: Path, array: NDArray[Any], geometry: Geometry) -> Source:
    image = nib.Nifti1Image(array, geometry.affine)
    nib.save(image, path)
    return Source(name="scan", output=path.with_name("mask.nii.gz"), file=path)


def read_mask(source: Source, geometry: Geometry) -> NDArray[np.uint8]:
    """Returns the mask as nibabel reads it, after checking that its grid is the scan's."""
    image = nib.load(source.output)
    assert image.shape == geometry.shape
    np.testing.assert_allclose(image.affine, geometry.affine, atol=1e-4)
    assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(nib.load(source.file).affine)
    return np.asarray(image.dataobj)


ORIENTATIONS = [
    "".join(axes) for sides in itertools.product("RL", "AP", "SI") for axes in itertools.permutations(sides)
]


@settings(max_examples=40, deadline=None)
@given(geometries(), st.sampled_from([None, *ORIENTATIONS]), st.integers(0, 99))
def test_without_resampling_every_voxel_is_right(
    tmp_path_factory: pytest.TempPathFactory, geometry: Geometry, orientation: str | None, seed: int
) -> None:
    array = np.random.default_rng(seed).normal(0, 10, geometry.shape).astype(np.float32)
    source = write_scan(tmp_path_factory.mktemp("scan") / "scan.nii.gz", array, geometry)
    spec = replace(PLAIN, orientation=orientation, min_shape=(5, 3, 4), padding_value=9.0)
    (row,) = predict_scan(source, make_ensemble(spec, Above()), save_probabilities=False)
    np.testing.assert_array_equal(read_mask(source, geometry), array > 0)
    assert row.voxels == np.count_nonzero(array > 0)
    assert row.volume_ml == pytest.approx(row.voxels * np.prod(geometry.spacing_mm) / 1000, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(geometries(6, 14), st.sampled_from(ORIENTATIONS), st.tuples(*[st.floats(0.8, 1.5)] * 3), st.integers(0, 99))
def test_a_half_space_stays_in_place_through_another_spacing_and_back(
    tmp_path_factory: pytest.TempPathFactory,
    geometry: Geometry,
    orientation: str,
    spacing: tuple[float, float, float],
    seed: int,
) -> None:
    """A value linear in space is linear on every grid: the plane where it is 0 may move by at most a voxel."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=3)
    normal /= np.linalg.norm(normal)
    index = np.indices(geometry.shape).reshape(3, -1)
    places = geometry.affine[:3, :3] @ index + geometry.affine[:3, 3:]
    distance_mm = (normal @ (places - places.mean(axis=1, keepdims=True))).reshape(geometry.shape)
    source = write_scan(tmp_path_factory.mktemp("scan") / "scan.nii.gz", distance_mm.astype(np.float32), geometry)
    spec = replace(PLAIN, orientation=orientation, spacing_mm=spacing)
    predict_scan(source, make_ensemble(spec, Above()), save_probabilities=False)
    mask = read_mask(source, geometry)
    # Shapes are truncated: with so few voxels the real spacing is up to three times the requested one.
    far = np.abs(distance_mm) > 3 * np.linalg.norm(spacing)
    np.testing.assert_array_equal(mask[far], distance_mm[far] > 0)
    assert np.mean(mask == (distance_mm > 0)) > 0.5


@settings(max_examples=25, deadline=None)
@given(geometries(2, 7), st.sampled_from([None, *ORIENTATIONS]), st.integers(0, 99))
def test_outside_the_foreground_crop_everything_is_background(
    tmp_path_factory: pytest.TempPathFactory, geometry: Geometry, orientation: str | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    array = np.full(geometry.shape, -50, np.float32)
    d, h, w = (sorted(rng.choice(n + 1, 2, replace=False)) for n in geometry.shape)
    body = (slice(*d), slice(*h), slice(*w))
    array[body] = rng.choice([-1, 1], array[body].shape)
    source = write_scan(tmp_path_factory.mktemp("scan") / "scan.nii.gz", array, geometry)
    spec = replace(PLAIN, orientation=orientation, foreground_crop=True, intensity_window=(-40.0, 40.0))
    # This network labels everything but -1 as object: what it never saw must still be background.
    predict_scan(source, make_ensemble(spec, Above()), save_probabilities=True)
    np.testing.assert_array_equal(read_mask(source, geometry), array > 0)
    probabilities = np.asarray(nib.load(source.output.with_name("mask_probabilities.nii.gz")).dataobj)
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-6)
    outside = np.ones(geometry.shape, bool)
    outside[body] = False
    assert (probabilities[outside] == [1, 0]).all()


def probabilities(ensemble: Ensemble, image: NDArray[np.float32]) -> NDArray[np.float32]:
    d, h, w = image.shape
    transform = GridTransform(
        source=Geometry(np.eye(4), (d, h, w), (1.0, 1.0, 1.0)),
        resampled_shape=(d, h, w),
        padding_before=(0, 0, 0),
        shape=(d, h, w),
    )
    kept = np.zeros((2, d, h, w), np.float32)
    ensembles.predict_image(image[None], transform, ensemble, "scan", kept=kept)
    return kept


def test_an_ensemble_averages_probabilities_not_logits() -> None:
    image = np.full((5, 4, 6), 2.0, np.float32)
    found = probabilities(make_ensemble(PLAIN, Above(1.0), Above(-0.5)), image)
    expected = (1 / (1 + np.exp(-2.0)) + 1 / (1 + np.exp(1.0))) / 2
    np.testing.assert_allclose(found[1], expected, rtol=1e-5)
    np.testing.assert_allclose(found.sum(0), 1, rtol=1e-5)


class OfWindow(nn.Module):
    """The second class's logit is the voxel's place along W in its window, plus the window's largest value."""

    def forward(self, image: Tensor) -> Tensor:
        logits = torch.arange(image.shape[4], device=image.device) + image.amax((2, 3, 4), keepdim=True)
        return torch.cat((torch.zeros_like(image), logits.expand_as(image)), dim=1)


@pytest.mark.parametrize(("flips", "places"), [("", [0, 1, 2, 3]), ("W", [1.5] * 4), ("D", [0, 1, 2, 3])])
@pytest.mark.parametrize(("padding", "largest"), [(9.0, 9), (None, 2)])
def test_windows_are_flipped_and_padded_as_in_the_member_s_evaluation(
    flips: str, places: list[float], padding: float | None, largest: float
) -> None:
    ensemble = make_ensemble(replace(PLAIN, padding_value=padding), OfWindow(), flips=flips)
    found = probabilities(ensemble, np.full((3, 4, 4), 2, np.float32))  # a plane less than a window
    logits = np.log(found[1] / found[0])
    np.testing.assert_allclose(logits, np.broadcast_to(np.add(places, largest), logits.shape), atol=1e-2)


def test_every_member_counts_the_same_whatever_the_depth_of_its_windows() -> None:
    """Windows of other depths give slabs of other depths, whose planes must still meet."""
    image = np.random.default_rng(0).normal(size=(11, 4, 5)).astype(np.float32)
    sharpness = (1.0, -0.5, 3.0)
    depths = (4, 7, 2)
    each = [make_ensemble(PLAIN, Above(s), window=(depth, 4, 4)) for s, depth in zip(sharpness, depths, strict=True)]
    members = tuple(member for one in each for member in one.members)
    expected = np.mean([1 / (1 + np.exp(-s * image)) for s in sharpness], axis=0)
    np.testing.assert_allclose(probabilities(replace(each[0], members=members), image)[1], expected, rtol=1e-4)


def test_probabilities_are_written_as_nibabel_reads_them(tmp_path: Path) -> None:
    geometry = Geometry(np.array([[0.0, 0, -2, 7], [0, 3, 0, -5], [1, 0, 0, 2], [0, 0, 0, 1]]), (3, 4, 5), (1, 3, 2))
    array = np.random.default_rng(0).normal(size=geometry.shape).astype(np.float32)
    source = write_scan(tmp_path / "scan.nii", array, geometry)
    predict_scan(source, make_ensemble(replace(PLAIN, orientation="LPS"), Above()), save_probabilities=True)
    image = nib.load(tmp_path / "mask_probabilities.nii.gz")
    np.testing.assert_allclose(image.affine, geometry.affine, atol=1e-5)
    assert image.header.get_zooms()[:3] == geometry.spacing_mm
    stored = np.asarray(image.dataobj)
    np.testing.assert_allclose(stored[..., 1], 1 / (1 + np.exp(-array)), rtol=1e-4)
    np.testing.assert_array_equal(stored.argmax(-1), read_mask(source, geometry))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mask.nii.gz", "mask_probabilities.nii.gz", "scan.nii"]


def test_probabilities_without_space_for_them_are_refused_before_anything_is_predicted(tmp_path: Path) -> None:
    geometry = Geometry(np.eye(4), (3, 40, 50), (1.0, 1.0, 1.0))
    source = write_scan(tmp_path / "scan.nii", np.arange(6000, dtype=np.float32).reshape(geometry.shape), geometry)
    message = r"--save_probabilities needs 0\.00 GiB in .*too large"
    with file_size_limit(20_000), pytest.raises(UserError, match=message):
        predict_scan(source, make_ensemble(PLAIN, Above()), save_probabilities=True)
    assert [file.name for file in tmp_path.iterdir()] == ["scan.nii"]


def test_a_scan_with_other_channels_is_refused(tmp_path: Path) -> None:
    geometry = Geometry(np.eye(4), (3, 4, 5), (1.0, 1.0, 1.0))
    source = write_scan(tmp_path / "scan.nii", np.zeros((3, 4, 5, 2), np.float32), geometry)
    with pytest.raises(UserError, match=r"scan: has 2 channels, the network takes 1"):
        predict_scan(source, make_ensemble(PLAIN, Above()), save_probabilities=False)


def test_a_scan_too_large_for_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    source = write_scan(
        tmp_path / "scan.nii", np.zeros((300, 300, 300), np.uint8), Geometry(np.eye(4), (1, 1, 1), (1, 1, 1))
    )
    for channels, needed in ((1, r"0\.40"), (3, r"1\.21")):
        ensemble = make_ensemble(replace(PLAIN, channels=channels), Above(), max_gb=0.1)
        with pytest.raises(UserError, match=rf"scan: needs {needed} GiB, but .* are left of --max_memory_gb 0\.1"):
            predict_scan(source, ensemble, save_probabilities=False)


def test_if_the_gpu_runs_out_of_memory_the_next_plan_is_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def two_plans(*_: Any) -> Iterator[MemoryPlan]:
        yield MemoryPlan(volume_device=CPU, network_device=CPU, batch_size=7)
        yield MemoryPlan(volume_device=CPU, network_device=CPU, batch_size=2, note="computed on the CPU")

    original = ensembles.mean_probabilities

    def runs_out(image: Tensor, ensemble: Ensemble, plan: MemoryPlan, name: str) -> NDArray[np.float32]:
        if plan.batch_size == 7:
            raise torch.OutOfMemoryError
        return original(image, ensemble, plan, name)

    monkeypatch.setattr(ensembles, "memory_plans", two_plans)
    monkeypatch.setattr(ensembles, "mean_probabilities", runs_out)
    image = np.ones((4, 4, 4), np.float32)
    assert probabilities(make_ensemble(PLAIN, Above()), image)[1].min() > 0.7
    assert "note: scan: computed on the CPU (the GPU ran out of memory)" in capsys.readouterr().err


class Fragile(Above):
    """Fails on one value."""

    def forward(self, image: Tensor) -> Tensor:
        if not image.is_meta and bool((image == 7).any()):
            raise ValueError("seven")
        return super().forward(image)


def test_one_bad_scan_is_named_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = np.arange(-32, 32, dtype=np.float64).reshape(4, 4, 4)
    good[good == 7] = 8
    grid = Geometry(np.eye(4), (4, 4, 4), (1.0, 1.0, 1.0))
    folder = tmp_path / "in"
    folder.mkdir()
    for name, value in {"a": np.nan, "b": -np.inf, "c": 1e300, "d": 7.0, "g": 0.5}.items():
        array = good.copy()
        array[0, 0, :2] = value
        write_scan(folder / f"{name}.nii", array, grid)
    write_scan(folder / "e.nii", np.zeros((4, 4, 4)), grid)
    (folder / "f.nii").write_bytes(b"damaged")
    sources = find_sources(folder, tmp_path, None)
    rows, errors = predict_scans(sources, make_ensemble(PLAIN, Fragile()), False, is_folder=True)
    assert [row.scan for row in rows] == ["g"]
    assert errors[:5] == [
        "a: the scan contains NaN or infinity: NaN in 2 of its 64 voxels; repair or remove it",
        *(
            f"{name}: the scan contains NaN or infinity: infinity or values beyond float32 in 2 of its 64 voxels; "
            "repair or remove it"
            for name in "bc"
        ),
        "d: unexpected ValueError (seven); please report it with this scan's header",
        "e: all 64 voxels of the scan are 0; export it again or remove it",
    ]
    assert len(errors) == 6
    assert [path.name for path in tmp_path.glob("*.nii")] == ["g.nii"], "no mask is written for the others"
    assert capsys.readouterr().err == "".join(f"error: {line}\n" for line in errors)


def test_a_network_of_volumes_refuses_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="pip install '.[images]'")
    image.fromarray(np.arange(42, dtype=np.uint8).reshape(6, 7)).save(tmp_path / "a.png")
    (source,) = find_sources(tmp_path / "a.png", tmp_path / "out.png", None)
    with pytest.raises(UserError, match=r"a\.png is a 2-D image, but .* trained on volumes \(windows of 4 slices\)"):
        predict_scan(source, make_ensemble(PLAIN, Above()), save_probabilities=False)


@pytest.mark.parametrize("shape", [(6, 7), (6, 7, 1), (1, 6, 7)])
def test_a_single_slice_for_a_network_of_volumes_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shape: tuple[int, ...]
) -> None:
    nib.save(nib.Nifti1Image(np.arange(42, dtype=np.int16).reshape(shape), np.eye(4)), tmp_path / "a.nii")
    (source,) = find_sources(tmp_path / "a.nii", tmp_path / "out.nii", None)
    predict_scan(source, make_ensemble(PLAIN, Above()), save_probabilities=False)
    line = "note: a: a single slice, but the network was trained on volumes (windows of 4 slices)\n"
    assert line in capsys.readouterr().err
    predict_scan(source, make_ensemble(PLAIN, Above(), window=(1, 4, 4)), save_probabilities=False)
    assert "slice" not in capsys.readouterr().err


@pytest.mark.parametrize("size", [None, (12, 14)])
def test_2d_images_are_predicted_as_2d_images(tmp_path: Path, size: tuple[int, int] | None) -> None:
    image = pytest.importorskip("PIL.Image", reason="pip install '.[images]'")
    seen = np.zeros((6, 7), np.uint8)
    seen[2:5, 1:4] = 255
    (tmp_path / "in").mkdir()
    image.fromarray(seen).save(tmp_path / "in" / "a.tif")
    image.fromarray(seen.T.copy()).save(tmp_path / "in" / "b.jpg", quality=100)
    spec = replace(PLAIN, mean=100.0, std=10.0, size=size)
    network = make_ensemble(spec, Above(), window=(1, 4, 4))
    for source in find_sources(tmp_path / "in", tmp_path, None):
        assert source.voxels() == 42
        predict_scan(source, network, save_probabilities=False)
    for name, expected in (("a", seen), ("b", seen.T)):
        mask = image.open(tmp_path / f"{name}.png")
        assert (mask.mode, mask.getpalette()[:3]) == ("P", [0, 0, 0])
        np.testing.assert_array_equal(np.asarray(mask), expected // 255)


@pytest.mark.real_data
@pytest.mark.parametrize("case", range(22))
def test_real_masks_survive_the_network_s_grid(real_data: Callable[[str], Path], case: int) -> None:
    """A perfect prediction, at 1.6 x 1.2 x 1.2 mm by nearest neighbour like the training labels, and back."""
    file = sorted(real_data("kits19_segmentations").glob("*/segmentation.nii.gz"))[case]
    truth = read_nifti(file, np.uint8)
    geometry = truth.geometry
    assert KITS19.spacing_mm is not None
    shape = resampled_shape(geometry.shape, geometry.spacing_mm, KITS19.spacing_mm)
    (d, _), (h, _), (w, _) = edge_padding(shape, KITS19.min_shape)
    transform = GridTransform(source=geometry, resampled_shape=shape, padding_before=(d, h, w), shape=shape)
    label = preprocess_label(truth, transform, KITS19)
    known = np.concatenate([label == value for value in range(3)]).astype(np.float32)
    found = to_source_grid(known, transform).argmax(0)

    def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
        return float(2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other)))

    mask = truth.array[0]
    assert dice(mask > 0, found > 0) >= 0.95
    for value in (1, 2):
        assert dice(mask == value, found == value) >= 0.9
