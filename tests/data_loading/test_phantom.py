"""Phantoms: the same seed gives the same bytes, the anatomy is what it claims, given masks are kept."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from common.errors import UserError
from data_loading.io.volume import Geometry, Volume, check_same_geometry, read_geometry, read_nifti, write_nifti
from data_loading.phantom import main, make_phantom, paint

PROJECT = Path(__file__).resolve().parents[2]
SMALL = (32, 64, 64)
CASES = range(6)


@pytest.fixture(scope="module")
def phantoms() -> list[tuple[Volume, Volume]]:
    return [make_phantom(0, case, SMALL) for case in CASES]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def block_mask(shape: tuple[int, int, int] = (10, 96, 72)) -> Volume:
    """A kidney and a tumour far from the middle, on an oblique, anisotropic grid with an origin."""
    labels = np.zeros((1, *shape), dtype=np.uint8)
    labels[0, 2:8, 78:92, 4:20] = 1
    labels[0, 4:7, 80:88, 8:16] = 2
    affine = np.array([[0.1, 0, -4, 31], [0, -3.5, 0, -7], [-5, 0, 0.2, 12], [0, 0, 0, 1]], dtype=np.float64)
    sd, sh, sw = (float(s) for s in np.linalg.norm(affine[:3, :3], axis=0))
    return Volume(labels, Geometry(affine, shape, (sd, sh, sw)))


def test_same_seed_same_bytes_whatever_the_workers_and_cases(tmp_path: Path) -> None:
    common = ["--shape", "16", "32", "24", "--seed", "7"]
    assert main(["--results_dir", str(tmp_path / "one"), "--cases", "3", *common]) == 0
    assert main(["--results_dir", str(tmp_path / "two"), "--cases", "2", "--num_workers", "2", *common]) == 0
    one, two = files_of(tmp_path / "one"), files_of(tmp_path / "two")
    expected = {f"case_0000{n}/{name}.nii.gz" for n in range(3) for name in ("imaging", "segmentation")}
    assert set(one) == expected  # and no temporary file
    assert set(two) == {name for name in expected if not name.startswith("case_00002")}
    assert all(one[name] == two[name] for name in two)


def test_seed_and_case_each_change_image_and_mask(phantoms: list[tuple[Volume, Volume]]) -> None:
    image, mask = phantoms[0]
    for other_image, other_mask in (make_phantom(1, 0, SMALL), phantoms[1]):
        assert (image.array != other_image.array).mean() > 0.5
        assert (mask.array != other_mask.array).any()
        assert image.geometry.spacing_mm != other_image.geometry.spacing_mm


def test_every_patient_has_two_kidneys_and_a_tumour(phantoms: list[tuple[Volume, Volume]]) -> None:
    for _, mask in phantoms:
        assert mask.array.dtype == np.uint8
        assert np.unique(mask.array).tolist() == [0, 1, 2]
        left, right = np.split(mask.array[0] == 1, 2, axis=2)
        assert left.any()
        assert right.any()
        assert 0.01 < (mask.array == 1).mean() < 0.06
        assert 0.003 < (mask.array == 2).mean() < 0.03
        # The tumour sits on a kidney: every piece of it touches label 1.
        pieces, count = ndimage.label(mask.array[0] == 2)
        around = ndimage.binary_dilation(mask.array[0] == 1)
        assert all((around & (pieces == piece)).any() for piece in range(1, count + 1))


def test_labels_survive_the_smallest_shape() -> None:
    for case in range(40):
        _, mask = make_phantom(2, case, (16, 16, 16))
        assert np.bincount(mask.array.ravel(), minlength=3).min() >= 4, case


def test_intensities_are_those_of_ct(phantoms: list[tuple[Volume, Volume]]) -> None:
    for image, mask in phantoms:
        assert image.array.dtype == np.int16
        hu, labels = image.array[0].astype(np.float32), mask.array[0]
        assert 145 < np.median(hu[labels == 1]) < 205
        assert 72 < np.median(hu[labels == 2]) < 118
        air = hu[:, 0, 0]
        assert air.min() >= -1024
        assert -1024 < air.mean() < -970
        inside = hu[(labels == 0) & (hu > -500)]
        assert ((inside > -130) & (inside < -70)).mean() > 0.2  # fat
        assert ((inside > 20) & (inside < 90)).mean() > 0.1  # muscle
        assert (inside > 300).mean() > 0.002  # bone
        # Noise of 10 to 15 HU, as neighbours' difference deep inside the kidneys, away from blurred edges.
        deep = ndimage.binary_erosion(labels == 1, iterations=2)
        neighbours = deep[:, :, 1:] & deep[:, :, :-1]
        assert 9 < np.diff(hu, axis=2)[neighbours].std() / np.sqrt(2) < 16


def test_no_window_of_intensity_solves_the_task(phantoms: list[tuple[Volume, Volume]]) -> None:
    """Even the window that fits a patient best stays far from the labels, though it finds part of them."""
    kidney, tumour = (
        np.mean([best_window_dice(image.array, mask.array == label) for image, mask in phantoms]) for label in (1, 2)
    )
    assert 0.4 < kidney < 0.85
    assert 0.05 < tumour < 0.5


def best_window_dice(hu: NDArray[np.int16], target: NDArray[np.bool_]) -> float:
    edges = np.arange(40, 260, 20)
    windows = [(hu >= low) & (hu < high) for low in edges for high in edges if low < high]
    return max(2 * (window & target).sum() / (window.sum() + target.sum()) for window in windows)


def test_geometry_is_kits19s_and_survives_the_file(phantoms: list[tuple[Volume, Volume]], tmp_path: Path) -> None:
    for image, mask in phantoms:
        geometry = image.geometry
        check_same_geometry(geometry, mask.geometry, "phantom")
        sd, sh, sw = geometry.spacing_mm
        assert np.array_equal(geometry.affine[:3, :3], [[0, 0, -sw], [0, -sh, 0], [-sd, 0, 0]])
        assert 200 <= sd * SMALL[0] <= 350
        assert 350 <= sh * SMALL[1] <= 420
        assert sh == sw
    write_nifti(tmp_path / "imaging.nii.gz", image)
    assert nib.Nifti1Image.from_filename(tmp_path / "imaging.nii.gz").get_data_dtype() == np.int16
    again = read_nifti(tmp_path / "imaging.nii.gz", np.float32)
    assert np.array_equal(again.array, image.array)
    assert np.array_equal(again.geometry.affine, geometry.affine)
    assert again.geometry.spacing_mm == geometry.spacing_mm


def test_painting_keeps_id_voxels_and_geometry_of_the_mask(tmp_path: Path) -> None:
    masks, results = tmp_path / "masks", tmp_path / "raw"
    mask = block_mask()
    for case in (42, 107):
        (masks / f"case_{case:05d}").mkdir(parents=True)
        write_nifti(masks / f"case_{case:05d}" / "segmentation.nii.gz", mask)
    assert main(["--results_dir", str(results), "--segmentations", str(masks), "--cases", "1"]) == 0
    assert [path.name for path in results.iterdir()] == ["case_00042"]
    assert main(["--results_dir", str(results), "--segmentations", str(masks)]) == 0
    assert sorted(path.name for path in results.iterdir()) == ["case_00042", "case_00107"]
    images = []
    for case in (42, 107):
        written = read_nifti(results / f"case_{case:05d}" / "segmentation.nii.gz", np.uint8)
        assert np.array_equal(written.array, mask.array)
        images.append(read_nifti(results / f"case_{case:05d}" / "imaging.nii.gz", np.float32))
        for volume in (written, images[-1]):
            check_same_geometry(mask.geometry, volume.geometry, str(case))
            assert volume.geometry.spacing_mm == pytest.approx(mask.geometry.spacing_mm, abs=1e-6)
    assert np.array_equal(images[0].array, paint(mask, 0, 42).array)
    assert not np.array_equal(images[0].array, images[1].array)


def test_the_body_holds_labels_at_the_edge_of_the_view() -> None:
    mask = block_mask()
    hu = paint(mask, 0, 0).array[0]
    assert 145 < np.median(hu[mask.array[0] == 1]) < 205
    assert 72 < np.median(hu[mask.array[0] == 2]) < 118
    around = ndimage.binary_dilation(mask.array[0] > 0, iterations=2) & (mask.array[0] == 0)
    assert (hu[around] < -500).mean() < 0.02


def test_an_empty_mask_can_be_painted_and_other_labels_cannot() -> None:
    mask = block_mask()
    assert paint(Volume(np.zeros_like(mask.array), mask.geometry), 0, 0).array.max() > 300
    with pytest.raises(UserError, match="labels up to 4"):
        paint(Volume(mask.array * np.uint8(2), mask.geometry), 0, 0)
    with pytest.raises(UserError, match="found 2 channels"):
        paint(Volume(np.repeat(mask.array, 2, axis=0), mask.geometry), 0, 0)


def test_links_and_the_masks_themselves_are_left_alone(tmp_path: Path) -> None:
    outside, raw = tmp_path / "outside", tmp_path / "raw"
    outside.mkdir()
    raw.mkdir()
    (raw / "case_00000").symlink_to(outside)
    with pytest.raises(UserError, match="is a symbolic link"):
        main(["--results_dir", str(raw), "--cases", "1", "--shape", "16", "16", "16"])
    assert not any(outside.iterdir())
    masks = tmp_path / "masks"
    (masks / "case_00003").mkdir(parents=True)
    write_nifti(masks / "case_00003" / "segmentation.nii.gz", block_mask())
    before = files_of(masks)
    with pytest.raises(UserError, match="holds the masks themselves"):
        main(["--results_dir", str(masks), "--segmentations", str(masks)])
    assert files_of(masks) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--results_dir", "raw"], "give --cases N"),
        (["--results_dir", "raw", "--cases", "-1"], "--cases must be 1 to"),
        (["--results_dir", "raw", "--cases", "1", "--shape", "15", "64", "64"], "--shape must be 16 to"),
        (["--results_dir", "raw", "--cases", "1", "--shape", "30000", "30000", "30000"], "GiB of memory"),
        (["--results_dir", "raw", "--segmentations", "missing"], "no such folder; expected case_00000/segmentation"),
        (["--results_dir", "raw", "--segmentations", "empty"], "holds no masks; expected case_00000/segmentation"),
        (["--results_dir", "raw", "--segmentations", "damaged"], "damaged/case_00001/segmentation.nii.gz: damaged"),
        (["--results_dir", "a_file", "--cases", "1"], "--results_dir a_file: cannot be created"),
        (["--results_dir", "occupied", "--cases", "1", "--shape", "16", "16", "16"], "case_00000: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "empty" / "case_1").mkdir(parents=True)
    (tmp_path / "damaged" / "case_00001").mkdir(parents=True)
    (tmp_path / "damaged" / "case_00001" / "segmentation.nii.gz").write_bytes(gzip.compress(bytes(9999))[:20])
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "case_00000").touch()
    done = subprocess.run(
        [sys.executable, "-m", "data_loading.phantom", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert expected in done.stderr


@pytest.mark.real_data
@pytest.mark.parametrize("case", ["case_00038", "case_00061"])  # two of the smallest: under 10 million voxels
def test_painting_on_a_real_mask(real_data: Callable[[str], Path], case: str) -> None:
    path = real_data("kits19_segmentations") / case / "segmentation.nii.gz"
    mask = read_nifti(path, np.uint8)
    image = paint(mask, 0, int(case[-5:]))
    check_same_geometry(read_geometry(path), image.geometry, case)
    hu, labels = image.array[0], mask.array[0]
    assert 145 < np.median(hu[labels == 1]) < 205
    assert 72 < np.median(hu[labels == 2]) < 118
    around = ndimage.binary_dilation(labels > 0, iterations=3) & (labels == 0)
    assert (hu[around] < -500).mean() < 0.01  # the kidneys lie inside the body
    assert (hu < -900).mean() > 0.1  # which does not fill the view's corners
