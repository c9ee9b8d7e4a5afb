"""DICOM series: position, slice order and HU values; series that are not volumes are rejected."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings

from common.errors import UserError
from data_loading.io.volume import Geometry
from tests.data_loading.oblique import geometries

pytest.importorskip("pydicom", reason="pip install '.[dicom]'")
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import BasicTextSRStorage, RTStructureSetStorage, SecondaryCaptureImageStorage

from data_loading.io import dicom
from data_loading.io.dicom_geometry import _slice_step
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
    geometry = dicom.read_series(series).geometry
    assert geometry.spacing_mm[2] == 99.0
    np.testing.assert_allclose(geometry.affine[:3, 2], [0, 0, 99], atol=1e-12)  # along the normal
    change(series.files[0], SpacingBetweenSlices=3.0)  # says more: slices may overlap or have gaps
    assert dicom.read_series(series).geometry.spacing_mm[2] == 3.0


def test_values_are_the_nearest_to_the_rescaled_ones(tmp_path: Path) -> None:
    (file,) = write_series(tmp_path, numbered((20, 6, 1)), PLAIN)
    stored = np.arange(120, dtype="<i2")
    change(file, RescaleSlope="0.1", RescaleIntercept="-5", PixelData=stored.tobytes())
    found = dicom.read_series(dicom.find_series(tmp_path)[0]).array[0, :, :, 0].T
    np.testing.assert_array_equal(found.ravel(), np.array([(value - 50) / 10 for value in range(120)], np.float32))


def test_other_files_are_skipped_and_subfolders_are_searched(tmp_path: Path) -> None:
    files = write_series(tmp_path / "a" / "b", numbered(PLAIN.shape), PLAIN)
    (tmp_path / "README").write_text("no scan")
    shutil.copy(files[0], tmp_path / "report")
    change(tmp_path / "report", SOPClassUID=BasicTextSRStorage, ImagePositionPatient=None, Rows=None)
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
    composed = [replace(found[0], description="Schädel"), found[1]]
    assert dicom.choose_series(composed, unicodedata.normalize("NFD", "Schädel"), tmp_path) == composed[:1]
    for wanted, message in (("venous", "2 series"), ("9", "no series")):
        with pytest.raises(UserError, match=f"--series {wanted}: {message} of that number"):
            dicom.choose_series(found, wanted, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ImagePositionPatient": [0, 0, 400]}, "is a slice missing"),
        ({"ImagePositionPatient": None}, r"1 of 6 files cannot be .*\(no ImagePositionPatient: 1 file \(IM0002\)\)"),
        ({"PixelSpacing": [1.0]}, r"damaged PixelSpacing: 1 file \(IM0002\)"),
        ({"RescaleSlope": 0}, "RescaleSlope is 0"),
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
    position = {path: position_of(path)[2] for path in files}
    second = sorted(files, key=position.__getitem__)[1]
    second.rename(tmp_path.parent / f"{tmp_path.name}.out")
    with pytest.raises(UserError, match=r"range from 2\.5 to 5 mm; is a slice missing"):
        dicom.read_series(dicom.find_series(tmp_path)[0])
    again = shutil.copy(files[0] if files[0] != second else files[1], tmp_path / "again")
    change(again, SOPInstanceUID="1.2.3")
    with pytest.raises(UserError, match="are copies of one slice under two SOP instance UIDs"):
        dicom.read_series(dicom.find_series(tmp_path)[0])
    change(again, PixelData=bytes(40))
    with pytest.raises(UserError, match=r"several slices at one position .* at 1 of 5 positions"):
        dicom.read_series(dicom.find_series(tmp_path)[0])
    assert len(series.files) == 6


def position_of(path: Path) -> list[float]:
    return [float(value) for value in pydicom.dcmread(path).ImagePositionPatient]


def test_several_phases_and_a_wrong_orientation_are_told_apart(tmp_path: Path) -> None:
    for phase in range(2):
        for file in write_series(tmp_path / "phases" / str(phase), numbered(PLAIN.shape) + phase, PLAIN):
            change(file, SeriesInstanceUID="1.2.3")
    with pytest.raises(UserError, match="2 slices at each of 6 positions; several phases or echoes"):
        dicom.read_series(dicom.find_series(tmp_path / "phases")[0])
    for orientation in ([1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0.1, 0.995]):
        for file in write_series(tmp_path / "sagittal", numbered(PLAIN.shape), PLAIN):
            change(file, ImageOrientationPatient=orientation)
        with pytest.raises(UserError, match="different positions, but not one after another along their normal"):
            dicom.read_series(dicom.find_series(tmp_path / "sagittal")[0])


def test_copies_of_slices_count_once(tmp_path: Path) -> None:
    files = write_series(tmp_path / "a", numbered(PLAIN.shape), PLAIN)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = dicom.search_folder(tmp_path)
    assert found.notes() == ["series 4: 6 repeated slices left out"]
    np.testing.assert_array_equal(dicom.read_series(found.series[0]).array[0], numbered(PLAIN.shape))
    change(tmp_path / "b" / files[0].name, PixelData=bytes(40))  # no copy: which is right is unknown
    with pytest.raises(UserError, match="several slices at one position"):
        dicom.read_series(dicom.find_series(tmp_path)[0])


@pytest.mark.parametrize("values", [("", ""), ("", "0"), ("1", ""), (None, "0"), ("1", None)])
def test_an_empty_slope_or_intercept_is_absent(tmp_path: Path, values: tuple[str | None, str | None]) -> None:
    for file in write_series(tmp_path, numbered(PLAIN.shape), PLAIN):
        change(file, RescaleSlope=1, RescaleIntercept=0)
        stored = numbered(PLAIN.shape)[:, :, round((position_of(file)[2] - PLAIN.affine[2, 3]) / 2.5)]
        change(file, PixelData=stored.T.astype("<i2").tobytes())
        change(file, RescaleSlope=values[0], RescaleIntercept=values[1])
    np.testing.assert_array_equal(dicom.read_series(dicom.find_series(tmp_path)[0]).array[0], numbered(PLAIN.shape))


@pytest.mark.parametrize(("distance", "decimals"), [(0.625, 1), (0.45, 1), (3.3, 0), (0.0125, 3)])
def test_rounded_positions_are_equidistant_and_a_missing_slice_is_not(
    tmp_path: Path, distance: float, decimals: int
) -> None:
    files = write_series(tmp_path, numbered((5, 4, 8)), PLAIN)
    for index, file in enumerate(files):
        change(file, ImagePositionPatient=[0, 0, round(index * distance, decimals)])
    affine = dicom.read_series(dicom.find_series(tmp_path)[0]).geometry.affine
    assert affine[2, 2] == pytest.approx(distance, abs=10.0**-decimals / 7)
    files[3].unlink()
    with pytest.raises(UserError, match="is a slice missing"):
        dicom.read_series(dicom.find_series(tmp_path)[0])


def test_a_missing_slice_is_noticed_at_any_place_however_positions_are_rounded() -> None:
    for count in range(4, 12):
        for missing in range(1, count - 1):
            positions = np.delete(np.arange(count) * 10.0, missing)[:, None] * np.array([0, 0, 1])
            with pytest.raises(UserError, match="is a slice missing"):
                _slice_step(positions, np.array([0.0, 0, 1]), [], "series")


def test_a_slice_out_of_place_is_refused_where_rounding_does_not_explain_it() -> None:
    positions = np.outer(np.arange(6.0), [0, 0, 1])
    normal = np.array([0.0, 0, 1])
    positions[2, 2] += 0.09
    np.testing.assert_allclose(_slice_step(positions, normal, [], "series"), [0, 0, 1])
    positions[2, 2] += 0.09
    with pytest.raises(UserError, match=r"range from 0\.82 to 1\.18 mm; is a slice missing"):
        _slice_step(positions, normal, [], "series")


def test_slices_of_a_tilted_gantry_are_a_volume() -> None:
    step = np.array([0, np.sin(np.pi / 6), np.cos(np.pi / 6)])  # 30°, as far as scanners tilt
    np.testing.assert_allclose(_slice_step(np.outer(np.arange(5), step), np.array([0.0, 0, 1]), [], "series"), step)


def test_microscopic_voxels_are_held_to_the_same_fractions(tmp_path: Path) -> None:
    """5 µm: a difference of 1e-3 of a voxel is accepted, one of a tenth is not."""
    for file in write_series(tmp_path, numbered(PLAIN.shape), PLAIN):
        change(file, PixelSpacing=[0.005, 0.005], ImagePositionPatient=[v / 500 for v in position_of(file)])
    spacing = dicom.read_series(dicom.find_series(tmp_path)[0]).geometry.spacing_mm
    assert spacing == pytest.approx((0.005, 0.005, 0.005), rel=1e-4)
    change(tmp_path / "IM0003", PixelSpacing=[0.0055, 0.005])
    with pytest.raises(UserError, match="different pixel spacing"):
        dicom.read_series(dicom.find_series(tmp_path)[0])


def test_cosines_of_another_length_are_normalised_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = None
    for scale in (1.0, 0.5, 2.0):
        for file in write_series(tmp_path / "in", numbered(PLAIN.shape), PLAIN):
            change(file, ImageOrientationPatient=[scale, 0, 0, 0, scale, 0])
        volume = dicom.read_series(dicom.find_series(tmp_path / "in")[0])
        expected = volume if expected is None else expected
        np.testing.assert_allclose(volume.geometry.affine, expected.geometry.affine, rtol=1e-12)
        assert ("no unit vectors" in capsys.readouterr().err) == (scale != 1)


@pytest.mark.parametrize(
    ("cosines", "message"),
    [
        ([1, 0, 0, 0.3, 0.954, 0], r"at 72\.5° to each other"),
        ([1, 0, 0, 1, 0, 0], r"at 0\.0° to each"),
        ([1, 0, 0, 0, 0, 0], "of length 0"),
    ],
)
def test_cosines_that_are_not_perpendicular_are_refused(tmp_path: Path, cosines: list[float], message: str) -> None:
    for file in write_series(tmp_path, numbered(PLAIN.shape), PLAIN):
        change(file, ImageOrientationPatient=cosines)
    with pytest.raises(UserError, match=message):
        dicom.read_series(dicom.find_series(tmp_path)[0])


def without_preamble(path: Path, *, implicit: bool) -> None:
    bare = Dataset()
    bare.update(dict(pydicom.dcmread(path).items()))
    with path.open("wb") as stream:
        pydicom.dcmwrite(stream, bare, implicit_vr=implicit, little_endian=True, enforce_file_format=False)


@pytest.mark.parametrize("implicit", [True, False])
def test_files_without_preamble_are_read(tmp_path: Path, implicit: bool) -> None:
    for file in write_series(tmp_path, numbered(PLAIN.shape), PLAIN)[::2]:
        without_preamble(file, implicit=implicit)
    volume = dicom.read_series(dicom.find_series(tmp_path)[0])
    np.testing.assert_array_equal(volume.array[0], numbered(PLAIN.shape))


def test_files_that_look_like_slices_are_counted_with_their_reasons(tmp_path: Path) -> None:
    files = write_series(tmp_path, numbered(PLAIN.shape), PLAIN)
    files[0].write_bytes(b"<html>session expired</html>")
    files[1].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes()[:400])
    (tmp_path / "IM.txt").write_text("no slice")
    (tmp_path / "._IM0004.dcm").write_text("a Mac's file")
    reasons = r"cut off or damaged: 1 file \(IM0002\); empty: 1 file \(IM0001\); not DICOM: 1 file \(IM0000\)"
    with pytest.raises(UserError, match=rf"3 of 6 files cannot be read or placed, .*\({reasons}\)"):
        dicom.read_series(dicom.find_series(tmp_path)[0])


def test_other_objects_and_images_of_other_classes_are_listed(tmp_path: Path) -> None:
    files = write_series(tmp_path, numbered(PLAIN.shape), PLAIN)
    for name, changes in {
        "plan": {"SOPClassUID": RTStructureSetStorage, "Rows": None},
        "screen": {"SOPClassUID": SecondaryCaptureImageStorage, "ImagePositionPatient": None},
        "cine": {"NumberOfFrames": 2},
    }.items():
        change(shutil.copy(files[0], tmp_path / name), **changes)
    found = dicom.search_folder(tmp_path)
    assert len(dicom.read_series(found.series[0]).array[0, 0, 0]) == 6
    assert found.notes() == [
        "not read: RT Structure Set: 1 file (plan); no ImagePositionPatient: 1 file (screen); "
        "unsupported multi-frame, convert to NIfTI: 1 file (cine)"
    ]


def test_a_folder_without_slices_says_what_it_holds(tmp_path: Path) -> None:
    for file in write_series(tmp_path, numbered(PLAIN.shape), PLAIN):
        change(file, PixelSpacing=None)
    with pytest.raises(UserError, match=r"no DICOM series of single slices \(no PixelSpacing: 6 files \(IM0000, "):
        dicom.find_series(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.nrrd").touch()
    with pytest.raises(UserError, match=r"\(none in it; it holds 1 \.nrrd\)"):
        dicom.find_series(tmp_path / "other")


def test_one_series_uid_with_two_descriptions_gets_two_names(tmp_path: Path) -> None:
    for number, name in ((4, "T1"), (4, "T2")):
        for file in write_series(tmp_path / name, numbered(PLAIN.shape), PLAIN, number=number, name=name):
            change(file, SeriesInstanceUID="1.2.3")
    found = dicom.find_series(tmp_path)
    assert [series.name for series in found] == ["1.2.3_1", "1.2.3_2"]
    for series in found:
        assert dicom.choose_series(found, series.name, tmp_path) == [series]
        assert dicom.choose_series(found, series.description, tmp_path) == [series]


@pytest.mark.parametrize("keep", [140, 400, -8])
def test_a_damaged_file_is_one_line(tmp_path: Path, keep: int) -> None:
    files = write_series(tmp_path, numbered(PLAIN.shape), PLAIN)
    files[3].write_bytes(files[3].read_bytes()[:keep])
    with pytest.raises(UserError) as caught:
        dicom.read_series(dicom.find_series(tmp_path)[0])
    assert "\n" not in str(caught.value).strip()


def test_a_damaged_slice_is_refused_or_harmless(tmp_path: Path) -> None:
    files = write_series(tmp_path, numbered(PLAIN.shape), PLAIN)
    good = files[3].read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        content = bytearray(good)
        for place in rng.integers(0, len(good), 4):
            content[place] = rng.integers(0, 256)
        files[3].write_bytes(content)
        try:
            found = dicom.find_series(tmp_path)
            slices = [dicom.read_series(series).array.shape[3] for series in found]
            assert sum(slices) == 6, "in two series if the damage is in the UID or the description"
        except UserError:
            refused += 1
    assert 0 < refused < 60


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
