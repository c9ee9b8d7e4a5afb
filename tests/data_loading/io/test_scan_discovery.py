"""Scans that `--scan` names, and the masks' paths that follow from `--output`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data_loading.io.scan_discovery import find_sources
from data_loading.io.volume import Geometry, Volume, write_nifti


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_masks_of_a_folder_are_named_after_its_scans(tmp_path: Path) -> None:
    scans = touch(tmp_path / "in", "b.nii.gz", "a.nii", "notes.txt", ".hidden.nii")
    sources = find_sources(scans, tmp_path / "out", None)
    assert [source.name for source in sources] == ["a", "b"]
    assert [source.output for source in sources] == [tmp_path / "out" / name for name in ("a.nii", "b.nii.gz")]


def test_endings_count_in_any_case_and_what_is_not_read_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans = touch(tmp_path / "in", "B.NII.GZ", "a.Nii", "c.mha", "d.gif", "e.gif")
    touch(scans / "below", "f.nii")
    sources = find_sources(scans, tmp_path / "out", None)
    assert [source.output.name for source in sources] == ["B.nii.gz", "a.nii"]
    assert capsys.readouterr().out == f"--scan {scans}: passed over 4 others (2 .gif, 1 folder, 1 .mha)\n"
    (source,) = find_sources(scans / "B.NII.GZ", tmp_path / "m.NII", None)
    assert source.output == tmp_path / "m.NII"


def test_the_raw_layout_of_kits19_is_a_folder_of_scans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        touch(tmp_path / "raw" / f"case_{number:05d}", "imaging.nii.gz", "segmentation.nii.gz")
    sources = find_sources(tmp_path / "raw", tmp_path / "out", None)
    assert [source.name for source in sources] == ["case_00000", "case_00001"]
    assert [source.output.name for source in sources] == ["case_00000.nii.gz", "case_00001.nii.gz"]
    assert sources[1].file == tmp_path / "raw" / "case_00001" / "imaging.nii.gz"
    touch(tmp_path / "raw" / "case_00002", "imaging.nii")
    touch(tmp_path / "raw" / "case_00003", "segmentation.nii")
    touch(tmp_path / "raw", "kits.json")
    *_, last = find_sources(tmp_path / "raw", tmp_path / "out", None)
    assert last.file == tmp_path / "raw" / "case_00002" / "imaging.nii"
    assert capsys.readouterr().out == f"--scan {tmp_path / 'raw'}: passed over 2 others (1 folder, 1 .json)\n"


def test_a_mask_goes_to_a_file_or_into_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz")
    for output, expected in (("m.nii", "m.nii"), ("out", "out/a.nii.gz")):
        (source,) = find_sources(tmp_path / "a.nii.gz", tmp_path / output, None)
        assert source.output == tmp_path / expected


@pytest.mark.parametrize(
    ("scan", "output", "series", "message"),
    [
        ("none", "out", None, "no such file or folder"),
        ("in/notes.txt", "out", None, r"expected a \.nii or \.nii\.gz file"),
        ("in", "in", None, "is a scan or another scan's mask"),
        ("in", "mask.nii.gz", None, "is a file, but .* holds 2 scans"),
        ("in/a.nii", "mask.dcm", None, "DICOM-SEG refers to DICOM slices"),
        ("in/a.nii", "MASK.DCM", None, "DICOM-SEG refers to DICOM slices"),
        ("in/a.nii", "MASK.PNG", None, "an image has one slice"),
        ("in/a.nii", "in/a.nii", None, "is a scan or another scan's mask"),
        ("in", "out", "4", "--series 4 applies only to DICOM, but .* contains NIfTI"),
        ("in/a.nii", "mask.png", None, "an image has one slice"),
        ("picture.png", "mask.dcm", None, "but .* contains 2-D images; write .png"),
        ("picture.png", "out", "4", "--series 4 applies only to DICOM, but .* contains 2-D images"),
    ],
)
def test_contradictory_arguments_are_refused(
    tmp_path: Path, scan: str, output: str, series: str | None, message: str
) -> None:
    touch(tmp_path / "in", "a.nii", "b.nii.gz", "notes.txt")
    touch(tmp_path, "picture.png")
    with pytest.raises(UserError, match=message):
        find_sources(tmp_path / scan, tmp_path / output, series)


PLAIN = Geometry(np.diag([-1.0, -1.0, 2.0, 1.0]), (5, 4, 3), (1.0, 1.0, 2.0))


def series_folder(folder: Path) -> Path:
    pytest.importorskip("pydicom", reason="pip install '.[dicom]'")
    from tests.data_loading.io.series import write_series

    write_series(folder, np.arange(60, dtype=np.int16).reshape(5, 4, 3), PLAIN)
    return folder


def test_dicom_counts_beside_pictures_and_masks_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = series_folder(tmp_path / "CT")
    touch(folder, "preview.jpg", "notes.txt")
    write_nifti(folder / "mask.nii.gz", Volume(np.ones((1, 5, 4, 3), np.uint8), PLAIN))
    (source,) = find_sources(folder, tmp_path / "out", None)
    assert (source.name, source.file) == ("CT", None)
    printed = capsys.readouterr().err
    assert "mask.nii.gz is on the grid of series 4, so a copy or a mask of it" in printed
    assert "1 picture beside DICOM (preview.jpg)" in printed


def test_a_mask_in_capitals_is_dicom_seg_and_one_slice_asks_for_its_folder(tmp_path: Path) -> None:
    folder = series_folder(tmp_path / "in")
    (source,) = find_sources(folder, tmp_path / "MASK.DCM", None)
    source.write(Volume(np.ones((1, *PLAIN.shape), np.uint8), PLAIN), ("background", "organ"))
    assert (tmp_path / "MASK.DCM").read_bytes()[128:132] == b"DICM"
    with pytest.raises(UserError, match=r"IM0000: one file of DICOM; give the folder of its series, such as --scan "):
        find_sources(folder / "IM0000", tmp_path / "out", None)


def test_nifti_on_another_grid_beside_dicom_is_asked_about(tmp_path: Path) -> None:
    folder = series_folder(tmp_path / "CT")
    affine = PLAIN.affine.copy()
    affine[0, 3] += 0.5
    write_nifti(folder / "other.nii", Volume(np.ones((1, 5, 4, 3), np.uint8), replace(PLAIN, affine=affine)))
    with pytest.raises(UserError, match=r"holds DICOM series \(4 \(.*\) and NIfTI files on other grids \(other\.nii\)"):
        find_sources(folder, tmp_path / "out", None)
    (source,) = find_sources(folder, tmp_path / "out", "4")
    assert source.file is None


def test_unreadable_slices_beside_a_picture_are_not_passed_over(tmp_path: Path) -> None:
    folder = series_folder(tmp_path / "CT")
    touch(folder, "preview.jpg")
    from tests.data_loading.io.series import change

    for file in folder.glob("IM*"):
        change(file, PixelSpacing=None)
    with pytest.raises(UserError, match="no PixelSpacing: 3 files"):
        find_sources(folder, tmp_path / "out", None)


def test_a_report_beside_nifti_leaves_the_nifti(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = series_folder(tmp_path / "CT")
    from pydicom.uid import RTStructureSetStorage

    from tests.data_loading.io.series import change

    for file in folder.glob("IM*"):
        change(file, SOPClassUID=RTStructureSetStorage)
    touch(folder, "a.nii.gz")
    (source,) = find_sources(folder, tmp_path / "out", None)
    assert source.name == "a"
    assert "not read: RT Structure Set: 3 files" in capsys.readouterr().err


def test_scans_one_level_down_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "own" / "scans", "a.nii", "b.nii")
    with pytest.raises(UserError, match=r"in sub-folders \(2 files, such as scans/a\.nii\); give one of them"):
        find_sources(tmp_path / "own", tmp_path / "out", None)
    touch(tmp_path / "one" / "scans", "a.nii")
    with pytest.raises(UserError, match=r"in sub-folders \(1 file, such as scans/a\.nii\)"):
        find_sources(tmp_path / "one", tmp_path / "out", None)
    touch(tmp_path / "names", "IM0001", "IM0002", "1.2.840.1", "1.2.840.2", "a.tar.gz")
    with pytest.raises(UserError, match=r"it holds 2 #\.#\.#\.#, 2 IM#, 1 \.tar\.gz"):
        find_sources(tmp_path / "names", tmp_path / "out", None)
    touch(tmp_path / "nrrd", "a.nrrd", "b.nrrd")
    with pytest.raises(UserError, match=r"no NIfTI file, 2-D image or DICOM series in it; it holds 2 \.nrrd"):
        find_sources(tmp_path / "nrrd", tmp_path / "out", None)
