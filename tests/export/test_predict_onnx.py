"""The example that stands beside an ONNX file computes what this project does, step by step."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_loading.io.volume import Geometry, Volume, read_nifti
from data_loading.preprocessing import preprocess_image
from data_loading.source_grid import SourceGrid
from data_loading.spec import KITS19, DatasetSpec
from export import predict_onnx
from export.predict_onnx import Array, Scan, ScanError
from export.settings import PREPROCESSING
from runtime import inference
from runtime.test_time_flips import flips_of, mean_over_flips
from tests.data_loading.oblique import geometries

PLAIN = DatasetSpec(name="made", classes=("background", "object", "other"))
ORIENTATIONS = [
    "".join(axes) for sides in itertools.product("RL", "AP", "SI") for axes in itertools.permutations(sides)
]
SPECS = (
    PLAIN,
    replace(PLAIN, spacing_mm=(1.3, 0.8, 1.1), intensity_window=(-8.0, 12.0), intensity="minmax"),
    replace(PLAIN, spacing_mm=(0.7, 2.0, 0.9), intensity="minmax", foreground_crop=True),
    replace(PLAIN, intensity_window=(5.0, 20.0), foreground_crop=True, min_shape=(9, 9, 9), intensity="none"),
    replace(PLAIN, size=(5, 11), foreground_crop=True),
    replace(KITS19, min_shape=(12, 3, 15), intensity_window=(-9.0, 11.0), mean=2.0, std=3.0),
)


def settings_of(spec: DatasetSpec, **windows: Any) -> dict[str, Any]:
    record = spec.to_json()
    usual = {"window": [4, 6, 8], "overlap": 0.5, "padding_value": spec.padding_value, "test_time_flips": [[]]}
    preprocessing = {name: record[name] for name in PREPROCESSING}
    return {"channels": spec.channels, "preprocessing": preprocessing, **usual, **windows}


def classes_of(image: Tensor) -> Tensor:
    """A network of three classes: (N, C, D, H, W) -> (N, 3, D, H, W), another one for each direction of W."""
    x = image.sum(1, keepdim=True)
    return torch.cat((x, x.roll(1, -1), torch.sin(x)), dim=1)


def as_predictor(windows: Array) -> Array:
    logits: Array = classes_of(torch.from_numpy(windows)).numpy()
    return logits


@settings(max_examples=60, deadline=None)
@given(
    geometry=geometries(2, 12),
    orientation=st.sampled_from([None, *ORIENTATIONS]),
    spec=st.sampled_from(SPECS),
    channels=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_masks_are_those_of_this_project(
    geometry: Geometry, orientation: str | None, spec: DatasetSpec, channels: int, seed: int
) -> None:
    spec = replace(spec, orientation=orientation, channels=channels)
    array = np.random.default_rng(seed).normal(2, 10, (channels, *geometry.shape)).astype(np.float32)
    expected, transform = preprocess_image(Volume(array, geometry), spec)
    image, grid = predict_onnx.preprocess(Scan(array, geometry.affine, geometry.spacing_mm), settings_of(spec))
    assert image.dtype == np.float32
    assert image.shape == expected.shape
    np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-5)
    logits = classes_of(torch.from_numpy(expected)[None])[0]
    of_project = SourceGrid(transform)
    of_project.add(logits.softmax(0))
    differing = of_project.mask() != predict_onnx.mask_on_scan(logits.numpy(), grid)
    assert np.count_nonzero(differing) <= 1 + 0.002 * differing.size  # rounding where two classes are equal


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 15)] * 3),
    window=st.tuples(*[st.integers(1, 8)] * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.7]),
    value=st.sampled_from([None, -2.2]),
    axes=st.sampled_from(["", "W", "DH"]),
)
def test_windows_are_those_of_this_project(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float, value: float | None, axes: str
) -> None:
    image = np.random.default_rng(0).normal(0, 1, (1, *shape)).astype(np.float32)
    flips = flips_of(axes)
    predictor = mean_over_flips(classes_of, flips)
    expected = inference.sliding_window(torch.from_numpy(image)[None], predictor, window, overlap, padding_value=value)
    how = settings_of(PLAIN, window=list(window), overlap=overlap, padding_value=value, test_time_flips=flips)
    found = predict_onnx.sliding_window(image, as_predictor, how)
    np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 5, 6), (7, 5, 6, 3), (7, 5)])
@pytest.mark.parametrize("kind", [np.int16, np.float64])
def test_a_scan_is_read_as_this_project_reads_it(tmp_path: Path, shape: tuple[int, ...], kind: type) -> None:
    values = np.random.default_rng(0).integers(-99, 99, shape).astype(kind)
    image = nib.Nifti1Image(values, np.diag([2.0, 3.0, 4.0, 1.0]))
    image.header.set_slope_inter(2.0, -1.0)
    nib.save(image, tmp_path / "scan.nii.gz")
    expected = read_nifti(tmp_path / "scan.nii.gz", np.float32)
    found = predict_onnx.read_scan(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(found.array, expected.array)
    np.testing.assert_array_equal(found.affine, expected.geometry.affine)
    assert found.spacing_mm == expected.geometry.spacing_mm


def test_a_mask_has_the_scan_s_grid(tmp_path: Path) -> None:
    affine = np.array([[0, 2.0, 0, 5], [-1.5, 0, 0, 6], [0, 0, 3.0, 7], [0, 0, 0, 1]])
    values = np.random.default_rng(0).normal(0, 1, (7, 5, 6)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "scan.nii.gz")
    how = settings_of(replace(PLAIN, orientation="LPS", intensity="none"))
    predict_onnx.predict_file(
        tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz", lambda x: np.stack([0 * x, x], 2)[:, 0], how
    )
    mask = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(mask.affine, affine)
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(mask.dataobj), values > 0)


def test_scans_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    with pytest.raises(ScanError, match="no such file"):
        predict_onnx.read_scan(path)
    path.write_bytes(b"no scan")
    with pytest.raises(ScanError, match="damaged, or no NIfTI file of real numbers"):
        predict_onnx.read_scan(path)
    nib.save(nib.Nifti1Image(np.full((3, 3, 3), 7.0, np.float32), np.eye(4)), path)
    with pytest.raises(ScanError, match="all equal"):
        predict_onnx.read_scan(path)
    scan = Scan(np.zeros((2, 3, 3, 3), np.float32), np.eye(4), (1.0, 1.0, 1.0))
    with pytest.raises(ScanError, match=r"has 2 channel\(s\), the network takes 1"):
        predict_onnx.preprocess(scan, settings_of(PLAIN))
    values = np.arange(27, dtype=np.float32).reshape(3, 3, 3)
    nib.save(nib.MGHImage(values, np.eye(4)), tmp_path / "scan.mgz")
    with pytest.raises(ScanError, match=r"no NIfTI file .*MGHImage"):
        predict_onnx.read_scan(tmp_path / "scan.mgz")
    nib.save(nib.Nifti1Image(values.astype(np.complex64), np.eye(4)), path)
    with pytest.raises(ScanError, match=r"no NIfTI file of real numbers \(.*complex64"):
        predict_onnx.read_scan(path)
    for units, spacing in (("meter", 1.0), ("mm", 2.0)):
        image = nib.Nifti1Image(values, np.eye(4))
        image.header.set_xyzt_units(units)
        image.header["pixdim"][1:4] = spacing
        nib.save(image, path)
        with pytest.raises(ScanError, match="not in mm, or their size contradicts the affine"):
            predict_onnx.read_scan(path)


def test_scans_beside_one_that_cannot_be_used_are_predicted() -> None:
    predicted = []

    def predict(scan: str) -> None:
        if scan == "b":
            raise ScanError("b: damaged")
        predicted.append(scan)

    with pytest.raises(ScanError, match=r"^1 of 3 scan\(s\) have no mask: b: damaged$"):
        predict_onnx.predict_folder("abc", "scans", "masks", predict)
    assert predicted == ["a", "c"]
    predict_onnx.predict_folder("ac", "scans", "masks", predict)
    assert predicted == ["a", "c", "a", "c"]


def test_a_mask_that_is_no_nifti_and_folders_without_a_use_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict_onnx.main(["net.onnx", "scan.nii.gz", "mask.png"]) == 2
    assert "mask.png: a mask is written as .nii or .nii.gz" in capsys.readouterr().err
    for scans, masks, message in (
        ([], "masks", "no .nii or .nii.gz file in it"),
        (["a.nii"], ".", "masks would replace the scans"),
    ):
        with pytest.raises(ScanError, match=message):
            predict_onnx.predict_folder(scans, str(tmp_path), str(tmp_path / masks), pytest.fail)
