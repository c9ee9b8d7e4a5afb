"""DICOM series: position, slice order and HU values; series that are not volumes are rejected."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings

from common.errors import UserError
from data_loading.io.volume import Geometry
from tests.data_loading.oblique import geometries

pytest.importorskip("pydicom", reason="pip install '.[dicom]'")
from data_loading.io import dicom
from tests.data_loading.io.series import change, write_series

PLAIN = Geometry(np.diag([-0.8, -0.6, 2.5, 1.0]), (5, 4, 6), (0.8, 0.6, 2.5))


def numbered(shape: tuple[int, int, int]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


@settings(max_examples=25, deadline=None)
@given(geometries())
def test_a_series_is_read_at_its_position(tmp_path_factory: pytest.TempPathFactory, geometry: Geometry) -> None:
    """Each voxel's value is at its position in space; on a left-handed grid the slices are in reverse order."""
    folder = tmp_path_factory.mktemp("series")
    array = numbered(geometry.shape)
    write_series(folder, array, geometry)
    volume = dicom.read_series(dicom.find_series(folder)[0])
    change_of_grid = np.linalg.inv(volume.geometry.affine) @ geometry.affine
    index = np.indices(geometry.shape).reshape(3, -1)
    ours = change_of_grid[:3, :3] @ index + change_of_grid[:3, 3:]
    np.testing.assert_allclose(ours, np.rint(ours), atol=1e-3)
    np.testing.assert_array_equal(volume.array[0][tuple(np.rint(ours).astype(int))], array[tuple(index)])
    np.testing.assert_allclose(volume.geometry.spacing_mm, geometry.spacing_mm, rtol=1e-5)


def test_every_slice_has_its_own_rescaling_and_the_thickness_is_not_the_distance(tmp_path: Path) -> None:
    write_series(tmp_path, numbered(PLAIN.shape) - 60, PLAIN)
    volume = dicom.read_series(dicom.find_series(tmp_path)[0])
    np.testing.assert_array_equal(volume.array[0], numbered(PLAIN.shape) - 60)
    np.testing.assert_allclose(volume.geometry.affine, PLAIN.affine, atol=1e-6)
    assert volume.geometry.spacing_mm[2] == pytest.approx(2.5)


def test_a_single_slice_has_its_thickness(tmp_path: Path) -> None:
    write_series(tmp_path, numbered((5, 4, 1)), PLAIN)
    (series,) = dicom.find_series(tmp_path)
    assert dicom.read_series(series).geometry.spacing_mm[2] == 99.0


def test_other_files_are_skipped_and_subfolders_are_searched(tmp_path: Path) -> None:
    files = write_series(tmp_path / "a" / "b", numbered(PLAIN.shape), PLAIN)
    (tmp_path / "README").write_text("no scan")
    shutil.copy(files[0], tmp_path / "report")
    change(tmp_path / "report", ImagePositionPatient=None, Rows=None)
    (series,) = dicom.find_series(tmp_path)
    assert (series.name, series.description, len(series.files)) == ("4", "synthetic", 6)


def test_several_series_are_named_and_chosen(tmp_path: Path) -> None:
    for number, name in ((2, "arterial"), (3, "venous"), (7, "venous")):
        write_series(tmp_path / str(number), numbered(PLAIN.shape), PLAIN, number=number, name=name)
    found = dicom.find_series(tmp_path)
    with pytest.raises(UserError, match=r"holds 3 series; choose one .*: 2 \(arterial, 6 slices\); 3 \(venous, "):
        dicom.choose_series(found, None, tmp_path)
    for wanted in ("2", "arterial", found[0].uid):
        assert dicom.choose_series(found, wanted, tmp_path) == [found[0]]
    assert dicom.choose_series(found, "all", tmp_path) == found
    for wanted, message in (("venous", "2 series"), ("9", "no series")):
        with pytest.raises(UserError, match=f"--series {wanted}: {message} of that number"):
            dicom.choose_series(found, wanted, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ImagePositionPatient": [0, 0, 400]}, "is a slice missing"),
        ({"ImageOrientationPatient": [0, 1, 0, 1, 0, 0]}, "is oriented differently from other slices"),
        ({"PixelSpacing": [2, 2]}, "has a different pixel spacing"),
        ({"Rows": 3}, "pixels, others"),
        ({"PixelData": b"\0\0"}, "cannot be decoded"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_slices_that_do_not_form_a_volume_are_rejected(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    files = write_series(tmp_path, numbered(PLAIN.shape), PLAIN)
    change(files[2], **changes)
    with pytest.raises(UserError, match=message):
        dicom.read_series(dicom.find_series(tmp_path)[0])


def test_a_missing_slice_and_two_at_one_position(tmp_path: Path) -> None:
    files = write_series(tmp_path, numbered(PLAIN.shape), PLAIN, seed=1)
    (series,) = dicom.find_series(tmp_path)
    position = {path: float(dicom._read_header(path).ImagePositionPatient[2]) for path in files}
    second = sorted(files, key=position.__getitem__)[1]
    second.rename(tmp_path.parent / f"{tmp_path.name}.out")
    with pytest.raises(UserError, match=r"range from 2\.5 to 5 mm; is a slice missing"):
        dicom.read_series(dicom.find_series(tmp_path)[0])
    shutil.copy(files[0] if files[0] != second else files[1], tmp_path / "again")
    with pytest.raises(UserError, match="several slices at one position"):
        dicom.read_series(dicom.find_series(tmp_path)[0])
    assert len(series.files) == 6


@pytest.mark.parametrize("keep", [140, 400, -8])
def test_a_damaged_file_is_one_line(tmp_path: Path, keep: int) -> None:
    files = write_series(tmp_path, numbered(PLAIN.shape), PLAIN)
    files[3].write_bytes(files[3].read_bytes()[:keep])
    with pytest.raises(UserError) as caught:
        dicom.read_series(dicom.find_series(tmp_path)[0])
    assert "\n" not in str(caught.value).strip()


def test_a_folder_without_dicom(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no DICOM series of single slices \(none in it\)"):
        dicom.find_series(tmp_path)


@pytest.mark.real_data
def test_a_real_series_agrees_with_its_labels(real_data: Callable[[str], Path]) -> None:
    """Slices 2 mm apart with a SliceThickness of 3 mm; JPEG 2000; anonymised, with empty UIDs."""
    pytest.importorskip("openjpeg", reason="pip install '.[dicom]'")
    folder = real_data("abdomen_ct")
    (series,) = dicom.find_series(folder / "dicom")
    volume = dicom.read_series(series)
    assert volume.geometry.spacing_mm == pytest.approx((0.9765625, 0.9765625, 2.0))
    labels = nib.load(folder / "example_seg_dicom.nii.gz")
    mask = np.asarray(labels.dataobj)
    assert volume.geometry.shape == mask.shape
    change_of_grid = np.linalg.inv(volume.geometry.affine) @ labels.affine

    def values(label: int) -> np.ndarray:
        ours = change_of_grid[:3, :3] @ np.argwhere(mask == label).T + change_of_grid[:3, 3:]
        np.testing.assert_allclose(ours, np.rint(ours), atol=1e-4)
        return volume.array[0][tuple(np.rint(ours).astype(int))]

    # HU of labelled structures, which need every slice in order: spleen, liver, back muscles, aorta.
    for label, low, high in ((1, 60, 110), (5, 75, 115), (86, 10, 60), (87, 10, 60), (52, 120, 190)):
        assert low < np.median(values(label)) < high
    assert np.std(values(1)) < 25, "soft tissue of one organ: no air, no bone, no fat"
