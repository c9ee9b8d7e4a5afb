"""Prediction: masks lie where they belong whatever the grid, and means are of probabilities."""

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
from data_loading.index import INDEX_NAME, DatasetIndex, write_json
from data_loading.io.scan_discovery import Source, find_sources
from data_loading.io.volume import Geometry, read_nifti
from data_loading.preprocessing import GridTransform, edge_padding, preprocess_label, resampled_shape, to_source_grid
from data_loading.spec import KITS19, DatasetSpec
from prediction import predict
from prediction.memory import Budget, Place
from prediction.predict import Member, Predictor, arg_max, classes_on_source_grid, predict_scan, spec_of
from runtime.checkpoint.format import Checkpoint
from tests.data_loading.oblique import geometries

CPU = torch.device("cpu")
WINDOW = (4, 4, 4)
PLAIN = DatasetSpec(name="made_up", classes=("background", "object"), mean=0.0, std=1.0)


class Above(nn.Module):
    """Two classes by the voxel's value: the second above 0."""

    def __init__(self, sharpness: float = 1.0) -> None:
        super().__init__()
        self.sharpness = sharpness

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat((torch.zeros_like(image), self.sharpness * image), dim=1)


class Ramp(nn.Module):
    """A logit that grows along the window's first axis, whatever is in it."""

    def forward(self, image: Tensor) -> Tensor:
        rising = torch.arange(image.shape[2], dtype=torch.float32).view(1, 1, -1, 1, 1).expand_as(image)
        return torch.cat((torch.zeros_like(image), rising), dim=1)


def member(network: nn.Module, window: tuple[int, int, int] = WINDOW) -> Member:
    return Member(network, window, 0.5, False, "auto", "NCDHW")


def predictor(
    spec: DatasetSpec, *networks: nn.Module, flips: tuple[tuple[int, ...], ...] = ((),), max_gb: float | None = None
) -> Predictor:
    return Predictor(tuple(map(member, networks)), spec, flips, 3, Budget(max_gb, CPU))


def write_scan(path: Path, array: NDArray[Any], geometry: Geometry) -> Source:
    image = nib.Nifti1Image(array, geometry.affine)
    nib.save(image, path)
    return Source("scan", path.with_name("mask.nii.gz"), path)


def read_mask(source: Source, geometry: Geometry) -> NDArray[np.uint8]:
    """The mask as another program reads it; its grid must be the scan's."""
    image = nib.load(source.output)
    assert image.shape == geometry.shape
    np.testing.assert_allclose(image.affine, geometry.affine, atol=1e-4)
    assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(nib.load(source.file).affine)
    return np.asarray(image.dataobj)


WAYS = ["".join(way) for sides in itertools.product("RL", "AP", "SI") for way in itertools.permutations(sides)]


@settings(max_examples=40, deadline=None)
@given(geometries(), st.sampled_from([None, *WAYS]), st.integers(0, 99))
def test_on_its_own_grid_every_voxel_is_right(
    tmp_path_factory: pytest.TempPathFactory, geometry: Geometry, orientation: str | None, seed: int
) -> None:
    array = np.random.default_rng(seed).normal(0, 10, geometry.shape).astype(np.float32)
    source = write_scan(tmp_path_factory.mktemp("scan") / "scan.nii.gz", array, geometry)
    spec = replace(PLAIN, orientation=orientation, min_shape=(5, 3, 4), padding_value=9.0)
    (row,) = predict_scan(source, predictor(spec, Above()), save_probabilities=False)
    np.testing.assert_array_equal(read_mask(source, geometry), array > 0)
    assert row.voxels == np.count_nonzero(array > 0)
    assert row.volume_ml == pytest.approx(row.voxels * np.prod(geometry.spacing_mm) / 1000, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(geometries(6, 14), st.sampled_from(WAYS), st.tuples(*[st.floats(0.8, 1.5)] * 3), st.integers(0, 99))
def test_through_another_spacing_and_back_a_half_space_stays_in_its_place(
    tmp_path_factory: pytest.TempPathFactory,
    geometry: Geometry,
    orientation: str,
    spacing: tuple[float, float, float],
    seed: int,
) -> None:
    """A value that is linear in space is so on every grid: the plane where it is 0 may move by a voxel, no more."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=3)
    normal /= np.linalg.norm(normal)
    index = np.indices(geometry.shape).reshape(3, -1)
    places = geometry.affine[:3, :3] @ index + geometry.affine[:3, 3:]
    distance_mm = (normal @ (places - places.mean(axis=1, keepdims=True))).reshape(geometry.shape)
    source = write_scan(tmp_path_factory.mktemp("scan") / "scan.nii.gz", distance_mm.astype(np.float32), geometry)
    spec = replace(PLAIN, orientation=orientation, spacing_mm=spacing)
    predict_scan(source, predictor(spec, Above()), save_probabilities=False)
    mask = read_mask(source, geometry)
    # Shapes are truncated: with as few voxels as these, the grid's real spacing is up to three times the one asked for.
    far = np.abs(distance_mm) > 3 * np.linalg.norm(spacing)
    np.testing.assert_array_equal(mask[far], distance_mm[far] > 0)
    assert np.mean(mask == (distance_mm > 0)) > 0.5


@settings(max_examples=25, deadline=None)
@given(geometries(2, 7), st.sampled_from([None, *WAYS]), st.integers(0, 99))
def test_outside_of_the_foreground_crop_all_is_background(
    tmp_path_factory: pytest.TempPathFactory, geometry: Geometry, orientation: str | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    array = np.full(geometry.shape, -50, np.float32)
    d, h, w = (sorted(rng.choice(n + 1, 2, replace=False)) for n in geometry.shape)
    body = (slice(*d), slice(*h), slice(*w))
    array[body] = rng.choice([-1, 1], array[body].shape)
    source = write_scan(tmp_path_factory.mktemp("scan") / "scan.nii.gz", array, geometry)
    spec = replace(PLAIN, orientation=orientation, foreground_crop=True, intensity_window=(-40.0, 40.0))
    # This network calls all that is not -1 the object: what it never saw must be background all the same.
    predict_scan(source, predictor(spec, Above()), save_probabilities=True)
    np.testing.assert_array_equal(read_mask(source, geometry), array > 0)
    probabilities = np.asarray(nib.load(source.output.with_name("mask_probabilities.nii.gz")).dataobj)
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-6)
    outside = np.ones(geometry.shape, bool)
    outside[body] = False
    assert (probabilities[outside] == [1, 0]).all()


def test_class_by_class_is_the_arg_max_of_all() -> None:
    source = Geometry(np.eye(4), (7, 9, 5), (1.0, 1.0, 1.0))
    transform = GridTransform(source=source, resampled_shape=(4, 6, 8), padding_before=(1, 0, 2), shape=(6, 6, 11))
    values = np.random.default_rng(0).random((4, 6, 6, 11)).astype(np.float32)
    whole = to_source_grid(values, transform)
    np.testing.assert_array_equal(np.concatenate(list(classes_on_source_grid(values, transform))), whole)
    single = (one[0] for one in classes_on_source_grid(values, transform))
    np.testing.assert_array_equal(arg_max(single, source), whole.argmax(0))
    equal = np.zeros((3, 7, 9, 5), np.float32)
    assert not arg_max(iter(equal), source).any(), "the first of equal ones, as numpy's"


def probabilities(maker: Predictor, image: NDArray[np.float32]) -> NDArray[np.float32]:
    d, h, w = image.shape
    transform = GridTransform(
        source=Geometry(np.eye(4), (d, h, w), (1.0, 1.0, 1.0)),
        resampled_shape=(d, h, w),
        padding_before=(0, 0, 0),
        shape=(d, h, w),
    )
    return predict.predict_image(image[None], transform, maker, "scan")


def test_an_ensemble_is_the_mean_of_probabilities_not_of_logits() -> None:
    image = np.full((5, 4, 6), 2.0, np.float32)
    found = probabilities(predictor(PLAIN, Above(1.0), Above(-0.5)), image)
    expected = (1 / (1 + np.exp(-2.0)) + 1 / (1 + np.exp(1.0))) / 2
    np.testing.assert_allclose(found[1], expected, rtol=1e-5)
    np.testing.assert_allclose(found.sum(0), 1, rtol=1e-5)


def test_flips_are_undone_and_averaged() -> None:
    image = np.random.default_rng(0).normal(size=(4, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(
        probabilities(predictor(PLAIN, Above(), flips=((), (2,), (3, 4))), image),
        probabilities(predictor(PLAIN, Above()), image),
        rtol=1e-5,
    )
    plain = probabilities(predictor(PLAIN, Ramp()), image)
    both = probabilities(predictor(PLAIN, Ramp(), flips=((), (2,))), image)
    np.testing.assert_allclose(both, (plain + plain[:, ::-1]) / 2, rtol=1e-5)
    assert plain[1, 0, 0, 0] < 0.51 < plain[1, 3, 0, 0]


def test_probabilities_are_written_as_another_program_reads_them(tmp_path: Path) -> None:
    geometry = Geometry(np.array([[0.0, 0, -2, 7], [0, 3, 0, -5], [1, 0, 0, 2], [0, 0, 0, 1]]), (3, 4, 5), (1, 3, 2))
    array = np.random.default_rng(0).normal(size=geometry.shape).astype(np.float32)
    source = write_scan(tmp_path / "scan.nii", array, geometry)
    predict_scan(source, predictor(replace(PLAIN, orientation="LPS"), Above()), save_probabilities=True)
    image = nib.load(tmp_path / "mask_probabilities.nii.gz")
    np.testing.assert_allclose(image.affine, geometry.affine, atol=1e-5)
    stored = np.asarray(image.dataobj)
    np.testing.assert_allclose(stored[..., 1], 1 / (1 + np.exp(-array)), rtol=1e-4)
    np.testing.assert_array_equal(stored.argmax(-1), read_mask(source, geometry))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mask.nii.gz", "mask_probabilities.nii.gz", "scan.nii"]


def test_a_scan_of_other_channels_is_refused(tmp_path: Path) -> None:
    geometry = Geometry(np.eye(4), (3, 4, 5), (1.0, 1.0, 1.0))
    source = write_scan(tmp_path / "scan.nii", np.zeros((3, 4, 5, 2), np.float32), geometry)
    with pytest.raises(UserError, match=r"scan: has 2 channel\(s\), the network takes 1"):
        predict_scan(source, predictor(PLAIN, Above()), save_probabilities=False)


def test_a_scan_that_is_too_large_for_the_bound_is_refused_before_it_is_read(tmp_path: Path) -> None:
    source = write_scan(
        tmp_path / "scan.nii", np.zeros((300, 300, 300), np.uint8), Geometry(np.eye(4), (1, 1, 1), (1, 1, 1))
    )
    with pytest.raises(UserError, match=r"scan: needs 0\.40 GiB, and .* are left of --max_memory_gb 0\.1"):
        predict_scan(source, predictor(PLAIN, Above(), max_gb=0.1), save_probabilities=False)


def test_where_the_gpu_runs_out_of_memory_the_next_place_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def two_places(*_: Any) -> Iterator[Place]:
        yield Place(CPU, CPU, 7, "")
        yield Place(CPU, CPU, 2, "computed on the CPU")

    original = predict.mean_probabilities

    def runs_out(image: Tensor, maker: Predictor, where: Place) -> NDArray[np.float32]:
        if where.batch_size == 7:
            raise torch.OutOfMemoryError
        return original(image, maker, where)

    monkeypatch.setattr(predict, "places", two_places)
    monkeypatch.setattr(predict, "mean_probabilities", runs_out)
    image = np.ones((4, 4, 4), np.float32)
    assert probabilities(predictor(PLAIN, Above()), image)[1].min() > 0.7
    assert "note: scan: computed on the CPU (the GPU's memory ran out)" in capsys.readouterr().err


# What a checkpoint says of its data


def checkpoint(**values: Any) -> Checkpoint:
    empty: dict[str, Any] = dict.fromkeys(Checkpoint.__dataclass_fields__)
    return Checkpoint(**{**empty, "path": Path("c.pth"), "config": {"model": "unet3d"}, **values})


def test_the_spec_is_the_checkpoint_s_own() -> None:
    spec = replace(PLAIN, spacing_mm=(1.0, 2.0, 3.0), orientation="LPS")
    assert spec_of(checkpoint(spec=spec.to_json()), None) == (spec, "")
    with pytest.raises(UserError, match=r"c\.pth: its data set's spec is of another version"):
        spec_of(checkpoint(spec={"name": "x", "colour": 1}), None)


def test_an_older_checkpoint_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not hold its data set's constants.*give --data_dir"):
        spec_of(checkpoint(spec=None), None)
    write_json(tmp_path / INDEX_NAME, DatasetIndex(spec=PLAIN, split={"train": []}, cases={}).to_json())
    assert spec_of(checkpoint(spec=None), tmp_path) == (PLAIN, "")


def test_another_program_s_checkpoint_is_kits19_s_and_that_is_told(tmp_path: Path) -> None:
    spec, note = spec_of(checkpoint(spec=None, config={}), None)
    assert spec == replace(KITS19, orientation="IPL")
    assert "another program's: taken for one of KiTS19" in note
    write_json(tmp_path / INDEX_NAME, DatasetIndex(spec=PLAIN, split={"train": []}, cases={}).to_json())
    assert spec_of(checkpoint(spec=None, config={}), tmp_path) == (PLAIN, "")


def test_flips_that_training_never_made_are_told() -> None:
    loaded = checkpoint(config={"augment": "mlperf(flips='HW')"})
    assert predict.flips_note("HW", loaded) == []
    assert predict.flips_note("DHW", loaded) == ["--test_time_flips D: c.pth was trained without (mlperf(flips='HW'))"]
    assert predict.flips_note("DHW", checkpoint(config={})) == []
    several = checkpoint(config={"augment": ["torchio:RandomGamma(p=0.3)", "flips(axes='W')", "mlperf(flips='H')"]})
    assert predict.flips_note("HW", several) == []
    assert "--test_time_flips D: c.pth was trained without (torchio" in predict.flips_note("DHW", several)[0]
    assert "without (no augmentation)" in predict.flips_note("D", checkpoint(config={"augment": []}))[0]


# What --scan and --output name


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_a_folder_s_masks_have_its_scans_names(tmp_path: Path) -> None:
    scans = touch(tmp_path / "in", "b.nii.gz", "a.nii", "notes.txt", ".hidden.nii")
    sources = find_sources(scans, tmp_path / "out", None)
    assert [source.name for source in sources] == ["a", "b"]
    assert [source.output for source in sources] == [tmp_path / "out" / name for name in ("a.nii", "b.nii.gz")]


@pytest.mark.parametrize("size", [None, (12, 14)])
def test_pictures_are_predicted_as_pictures(tmp_path: Path, size: tuple[int, int] | None) -> None:
    image = pytest.importorskip("PIL.Image", reason="pip install '.[images]'")
    seen = np.zeros((6, 7), np.uint8)
    seen[2:5, 1:4] = 255
    (tmp_path / "in").mkdir()
    image.fromarray(seen).save(tmp_path / "in" / "a.tif")
    image.fromarray(seen.T.copy()).save(tmp_path / "in" / "b.jpg", quality=100)
    spec = replace(PLAIN, mean=100.0, std=10.0, size=size)
    network = predictor(spec, Above())
    for source in find_sources(tmp_path / "in", tmp_path, None):
        assert source.voxels() == 42
        predict_scan(source, network, save_probabilities=False)
    for name, expected in (("a", seen), ("b", seen.T)):
        mask = image.open(tmp_path / f"{name}.png")
        assert (mask.mode, mask.getpalette()[:3]) == ("P", [0, 0, 0])
        np.testing.assert_array_equal(np.asarray(mask), expected // 255)


def test_a_file_goes_to_a_file_or_into_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz")
    for output, expected in (("m.nii", "m.nii"), ("out", "out/a.nii.gz")):
        (source,) = find_sources(tmp_path / "a.nii.gz", tmp_path / output, None)
        assert source.output == tmp_path / expected


@pytest.mark.parametrize(
    ("scan", "output", "series", "told"),
    [
        ("none", "out", None, "no such file or folder"),
        ("in/notes.txt", "out", None, r"expected a \.nii or \.nii\.gz file"),
        ("in", "in", None, "is a scan or another scan's mask"),
        ("in", "mask.nii.gz", None, "is a file, but .* holds 2 scans"),
        ("in/a.nii", "mask.dcm", None, "DICOM-SEG refers to DICOM slices"),
        ("in/a.nii", "in/a.nii", None, "is a scan or another scan's mask"),
        ("in", "out", "4", "--series 4 applies only to DICOM, but .* contains NIfTI"),
        ("in/a.nii", "mask.png", None, "an image has one slice"),
        ("picture.png", "mask.dcm", None, "but .* contains 2-D images; write .png"),
        ("picture.png", "out", "4", "--series 4 applies only to DICOM, but .* contains 2-D images"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, scan: str, output: str, series: str | None, told: str) -> None:
    touch(tmp_path / "in", "a.nii", "b.nii.gz", "notes.txt")
    touch(tmp_path, "picture.png")
    with pytest.raises(UserError, match=told):
        find_sources(tmp_path / scan, tmp_path / output, series)


# The way through the network's grid


@pytest.mark.real_data
@pytest.mark.parametrize("case", range(22))
def test_real_masks_come_back_through_the_network_s_grid(real_data: Callable[[str], Path], case: int) -> None:
    """Of a network that knows the truth: nearest, as training's labels are, to 1.6 x 1.2 x 1.2 mm and back."""
    file = sorted(real_data("kits19_segmentations").glob("*/segmentation.nii.gz"))[case]
    truth = read_nifti(file, np.uint8)
    geometry = truth.geometry
    assert KITS19.spacing_mm is not None
    shape = resampled_shape(geometry.shape, geometry.spacing_mm, KITS19.spacing_mm)
    (d, _), (h, _), (w, _) = edge_padding(shape, KITS19.min_shape)
    transform = GridTransform(source=geometry, resampled_shape=shape, padding_before=(d, h, w), shape=shape)
    label = preprocess_label(truth, transform, KITS19)
    known = np.concatenate([label == value for value in range(3)]).astype(np.float32)
    found = arg_max((one[0] for one in classes_on_source_grid(known, transform)), geometry)

    def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
        return float(2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other)))

    mask = truth.array[0]
    assert dice(mask > 0, found > 0) >= 0.95
    for value in (1, 2):
        assert dice(mask == value, found == value) >= 0.9
