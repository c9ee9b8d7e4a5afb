"""`--dataset dicom`: masks matched to series by their grid, patients, slabs, DICOM-SEG, and rejected input."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("highdicom", reason="pip install '.[dicom]'")
from common.errors import UserError
from data_loading.io import dicom
from data_loading.io.dicom_seg import read_header, read_segmentation, write_segmentation
from data_loading.io.volume import Geometry
from data_loading.readers.mask_matching import matching_grids
from data_loading.readers.overlaps import ClassMerger
from tests.data_loading.io.series import change, write_series
from tests.data_loading.readers.programs import arrays, preprocess, refused

# Orientation in which dcm2niix stores a mask: rows are reversed compared to DICOM.
NIFTI_ORIENTATION = ("L", "A", "S")
CLASSES = ("background", "liver", "spleen")


def grid(number: int, slices: int = 6) -> Geometry:
    """Returns an axial grid as in DICOM, at a different position for each scan."""
    affine = np.diag([-0.8, -0.6, 2.5, 1.0])
    affine[:3, 3] = 10.0 * number, -5.0, 3.0
    return Geometry(affine, (5, 4, slices), (0.8, 0.6, 2.5))


def image_of(number: int, slices: int = 6) -> np.ndarray:
    return np.random.default_rng(number).integers(-100, 300, (5, 4, slices)).astype(np.int16)


def mask_of(number: int, slices: int = 6) -> np.ndarray:
    mask = np.random.default_rng(100 + number).integers(0, 3, (5, 4, slices)).astype(np.uint8)
    mask[..., :2] = 1  # a structure with an inside: noise alone looks interpolated
    mask[..., -2:] = 0
    return mask


def save_mask(
    path: Path, mask: np.ndarray, geometry: Geometry, orientation: tuple[str, ...] = NIFTI_ORIENTATION
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(mask, geometry.affine)
    change = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(orientation)
    )
    nib.save(image.as_reoriented(change), path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three patients; the masks' names are in the reverse order of the patients'."""
    data, masks = tmp_path / "raw" / "data", tmp_path / "raw" / "masks"
    for number in range(3):
        for file in write_series(data / f"P{number}" / "CT", image_of(number), grid(number)):
            change(file, PatientID=f"secret {number}")
        save_mask(masks / f"mask_{9 - number}.nii.gz", mask_of(number), grid(number))
    return data, masks


def test_a_mask_is_matched_to_its_series_by_its_grid(folders: tuple[Path, Path], tmp_path: Path) -> None:
    index = preprocess("dicom", *folders, tmp_path / "out", "--intensity none --split_ratios 0.7 0.3")
    assert list(index.cases) == ["P0_CT", "P1_CT", "P2_CT"]
    assert index.spec.classes == ("background", "1", "2")
    assert [len(cases) for cases in index.split.values()] == [2, 1]
    for number in range(3):
        x, y = arrays(tmp_path / "out", f"P{number}_CT")
        np.testing.assert_array_equal(x[0], image_of(number))
        np.testing.assert_array_equal(y[0], mask_of(number))
    assert "secret" not in (tmp_path / "out" / "dataset.json").read_text(), "patient ids are not written"


def test_masks_in_the_folder_of_the_scans_are_no_scans_however_its_path_is_spelled(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    data, masks = folders
    shutil.move(masks, data / "masks")
    (tmp_path / "link").symlink_to(data)
    for number, spelled in enumerate((data / "masks", tmp_path / "link" / "masks", data / "P0" / ".." / "masks")):
        index = preprocess("dicom", data, spelled, tmp_path / str(number))
        assert list(index.cases) == ["P0_CT", "P1_CT", "P2_CT"]


def test_masks_among_the_series_are_found_and_other_files_skipped(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, masks = folders
    for path in masks.iterdir():
        shutil.move(path, data)
    save_mask(data / "elsewhere.nii.gz", mask_of(0), grid(7))
    write_series(data / "P1" / "scout", image_of(5, 1), grid(5, 1), number=9)
    index = preprocess("dicom", data, None, tmp_path / "out")
    assert list(index.cases) == ["P0_CT", "P1_CT", "P2_CT"]
    output = capsys.readouterr().out
    assert "skipped, not on the grid of any series: " in output
    assert "elsewhere.nii.gz" in output
    assert "skipped, no mask on its grid: P1_scout" in output


def test_scans_of_one_patient_stay_together_and_slabs_too(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, masks = folders
    for number in (3, 4):  # the first patient again, in a differently named folder, and once exported to NIfTI
        folder = data / ("P0" if number == 4 else "P9")
        if number == 3:
            for file in write_series(folder / "CT2", image_of(number), grid(number)):
                change(file, PatientID="secret 0")
        else:
            nib.save(nib.Nifti1Image(image_of(number), grid(number).affine), folder / "later.nii.gz")
        save_mask(masks / f"{number}.nii.gz", mask_of(number), grid(number))
    index = preprocess(
        "dicom", data, masks, tmp_path / "out", "--slices_per_case 2 --split_ratios 0.5 0.5 --labels 1=1"
    )
    assert len({record.patient for record in index.cases.values()}) == 3
    assert len({index.cases[f"{scan}_slab000"].patient for scan in ("P0_CT", "P9_CT2", "P0_later")}) == 1
    sides = [{index.cases[case].patient for case in cases} for cases in index.split.values()]
    assert sides[0].isdisjoint(sides[1])
    # The last slab of every scan is empty.
    assert all(case.endswith("slab002") for case in index.provenance["dropped"])
    assert not any(case.endswith("slab002") for case in index.split["train"])
    assert any(case.endswith("slab002") for case in index.split["evaluation"])


def test_with_empty_ids_every_folder_is_a_patient(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, masks = folders
    for file in data.rglob("IM*"):
        change(file, PatientID="", SeriesInstanceUID="")
    index = preprocess("dicom", data, masks, tmp_path / "out")
    assert sorted(record.patient for record in index.cases.values()) == ["P0", "P1", "P2"]


def test_dicom_seg_is_read_back_and_named_by_its_segments(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, masks = folders
    shutil.rmtree(masks)
    masks.mkdir()
    for series in dicom.find_series(data):
        number = int(series.files[0].parts[-3][1])
        path = masks / f"{9 - number}.dcm"
        write_segmentation(path, mask_of(number)[np.newaxis], series, CLASSES)
        _, geometry = dicom.sorted_headers(series)
        merger = ClassMerger(geometry.shape, by_size=False)
        read_segmentation(path, geometry, {"liver": 1, "spleen": 2}.get, merger.add)
        np.testing.assert_array_equal(merger.classes, mask_of(number))
        with pytest.raises(UserError, match=": not on the grid of its series"):
            read_segmentation(path, grid(5), lambda _: 1, merger.add)
    index = preprocess("dicom", data, masks, tmp_path / "out")
    assert index.spec.classes == CLASSES
    np.testing.assert_array_equal(arrays(tmp_path / "out", "P1_CT")[1][0], mask_of(1))
    preprocess("dicom", data, masks, tmp_path / "out", "--labels spleen=1")
    np.testing.assert_array_equal(arrays(tmp_path / "out", "P1_CT")[1][0], mask_of(1) == 2)


def test_a_damaged_dicom_seg_is_refused_or_harmless(tmp_path: Path) -> None:
    write_series(tmp_path / "in", image_of(0), grid(0))
    (series,) = dicom.find_series(tmp_path / "in")
    _, geometry = dicom.sorted_headers(series)
    write_segmentation(tmp_path / "m.dcm", mask_of(0)[np.newaxis], series, CLASSES)
    good = (tmp_path / "m.dcm").read_bytes()
    rng = np.random.default_rng(0)
    refused_ones = 0
    for _ in range(60):
        content = bytearray(good)
        for place in rng.integers(0, len(good), 3):
            content[place] = rng.integers(0, 256)
        (tmp_path / "m.dcm").write_bytes(content[: rng.integers(0, 3 * len(good))])
        try:
            if read_header(tmp_path / "m.dcm"):
                assert matching_grids(tmp_path / "m.dcm", [geometry]) in ([0], [])
                merger = ClassMerger(geometry.shape, by_size=False)
                read_segmentation(tmp_path / "m.dcm", geometry, lambda _: 1, merger.add)
                assert merger.finish(("background", "all")) == []
        except UserError:
            refused_ones += 1
    assert 0 < refused_ones < 60


def test_one_file_per_organ(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, masks = folders
    for number in range(3):
        (masks / f"mask_{9 - number}.nii.gz").unlink()
        for value, name in enumerate(CLASSES):
            if value:
                save_mask(masks / f"{number}" / f"{name}.nii.gz", (mask_of(number) == value).astype("u1"), grid(number))
    index = preprocess("dicom", data, masks, tmp_path / "out")
    assert index.spec.classes == CLASSES
    np.testing.assert_array_equal(arrays(tmp_path / "out", "P2_CT")[1][0], mask_of(2))


@pytest.mark.parametrize("name", ["head", "xhead"])
def test_a_part_inside_a_whole_keeps_its_voxels_whatever_its_name(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data, masks = folders
    for number in range(3):
        (masks / f"mask_{9 - number}.nii.gz").unlink()
        for part, values in (("whole", mask_of(number) > 0), (name, mask_of(number) == 1)):
            save_mask(masks / f"{number}" / f"{part}.nii.gz", values.astype("u1"), grid(number))
    index = preprocess("dicom", data, masks, tmp_path / "out", "--num_workers 1")
    value = index.spec.classes.index(name)
    for number in range(3):
        _, y = arrays(tmp_path / "out", f"P{number}_CT")
        np.testing.assert_array_equal(y[0] == value, mask_of(number) == 1)
    both = np.count_nonzero(mask_of(2) == 1)
    noted = f"P2_CT: .*; {both} voxels in both {name} and whole became {name}, as it has fewer voxels"
    assert re.search(noted, capsys.readouterr().out)
    preprocess("dicom", data, masks, tmp_path / "out", f"--num_workers 1 --labels {name}=1 whole=2")
    noted = f"P2_CT: .*; {both} voxels in both whole and {name} became whole, as it is the higher class"
    assert re.search(noted, capsys.readouterr().out)
    np.testing.assert_array_equal(arrays(tmp_path / "out", "P0_CT")[1][0], 2 * (mask_of(0) > 0))


def test_overlapping_segments_are_counted(tmp_path: Path) -> None:
    write_series(tmp_path / "in", image_of(0), grid(0))
    (series,) = dicom.find_series(tmp_path / "in")
    write_segmentation(tmp_path / "m.dcm", mask_of(0)[np.newaxis], series, CLASSES)
    _, geometry = dicom.sorted_headers(series)
    merger = ClassMerger(geometry.shape, by_size=False)
    read_segmentation(tmp_path / "m.dcm", geometry, {"liver": 1, "spleen": 2}.get, merger.add)
    read_segmentation(tmp_path / "m.dcm", geometry, {"liver": 3}.get, merger.add)
    count = np.count_nonzero(mask_of(0) == 1)
    (line,) = merger.finish(("background", "a", "b", "c"))
    assert line.startswith(f"{count} voxels in both c and a became c, as it is the higher class")
    np.testing.assert_array_equal(merger.classes, np.where(mask_of(0) == 1, 3, mask_of(0)))


def test_masks_of_series_on_one_grid_are_matched_by_name_or_rejected(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, masks = folders
    write_series(data / "P0" / "venous", image_of(8), grid(0), number=8)
    output = refused(capsys, "dicom", data, masks)
    assert "mask_9.nii.gz is on the grid of 2 scans (P0_CT, P0_venous); name it or its folder after its scan" in output
    (masks / "mask_9.nii.gz").rename(masks / "P0_venous.nii.gz")
    index = preprocess("dicom", data, masks, tmp_path / "out")
    assert list(index.cases) == ["P0_venous", "P1_CT", "P2_CT"]


def test_a_nifti_copy_of_a_series_is_neither_a_scan_nor_a_mask(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, masks = folders
    save_mask(data / "P0" / "CT" / "copy.nii.gz", image_of(0), grid(0))
    for number in (1, 2):  # on the grid of a series without being its copy
        save_mask(data / "P0" / f"later_{number}.nii.gz", image_of(number + 5), grid(number + 5))
        save_mask(masks / f"later_{number}.nii.gz", mask_of(number + 5), grid(number + 5))
    index = preprocess("dicom", data, masks, tmp_path / "out")
    assert list(index.cases) == ["P0_CT", "P0_later_1", "P0_later_2", "P1_CT", "P2_CT"]
    assert "skipped, copies of their series: " in capsys.readouterr().out
    for path in [*masks.glob("later*"), *(data / "P0").glob("later*")]:
        path.unlink()
    for path in masks.iterdir():
        shutil.move(path, data)
    assert list(preprocess("dicom", data, None, tmp_path / "out2").cases) == ["P0_CT", "P1_CT", "P2_CT"]


def test_masks_in_other_forms_are_named_with_the_reason(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, masks = folders
    (masks / "mask_9.nii.gz").unlink()
    for number, (kind, name) in enumerate({"481.3": "plan", "66.7": "labels", "88.11": "report"}.items()):
        path = shutil.copy(next((data / f"P{number}" / "CT").iterdir()), masks / f"{name}.dcm")
        change(path, SOPClassUID=f"1.2.840.10008.5.1.4.1.1.{kind}", Rows=None, PixelData=None)
    shutil.copy(next((data / "P1" / "CT").iterdir()), masks / "slice")
    preprocess("dicom", data, masks, tmp_path / "out")
    output = capsys.readouterr().out
    assert "RTSTRUCT, which holds contours; convert to DICOM-SEG or NIfTI: 1 file (plan.dcm)" in output
    assert "DICOM-SEG of type LABELMAP; export as BINARY: 1 file (labels.dcm)" in output
    assert "Basic Text SR: 1 file (report.dcm)" in output
    assert "image: 1 file (slice)" in output
    assert "skipped, no mask on its grid: P0_CT" in output
    for path in masks.glob("*.nii.gz"):
        path.unlink()
    assert "masks: no masks in it, as NIfTI or DICOM-SEG; not read: " in (
        printed := refused(capsys, "dicom", data, masks)
    )
    assert "LABELMAP; export as BINARY: 1 file (labels.dcm)" in printed


def test_slices_that_cannot_be_read_end_the_run_with_their_names(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    change(folders[0] / "P1" / "CT" / "IM0000", ImagePositionPatient=None)
    output = refused(capsys, "dicom", *folders)
    assert "1 of 6 files cannot be read or placed" in output
    assert "no ImagePositionPatient: 1 file (IM0000)" in output


def test_segmentations_among_the_series_are_masks_and_not_listed_as_unread(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, masks = folders
    shutil.rmtree(masks)
    for series in dicom.find_series(data):
        write_segmentation(
            series.files[0].with_name("seg.dcm"), mask_of(int(series.files[0].parts[-3][1]))[None], series, CLASSES
        )
    assert preprocess("dicom", data, None, tmp_path / "out").spec.classes == CLASSES
    assert "not read" not in capsys.readouterr().out


def shift(masks: Path) -> None:
    for path in masks.iterdir():
        image = nib.load(path)
        image.affine[0, 3] += 0.5
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), path)


BAD: list[tuple[str, Callable[[Path, Path], object], str, str]] = [
    (
        "shifted by half a voxel",
        lambda data, masks: shift(masks),
        "",
        "none of its 3 masks is on the grid of a series in",
    ),
    (
        "no masks",
        lambda data, masks: [path.unlink() for path in masks.iterdir()],
        "",
        "no masks in it, as NIfTI or DICOM-SEG",
    ),
    ("no series", lambda data, masks: [path.unlink() for path in data.rglob("IM*")], "", "no DICOM series of single"),
    (
        "one patient",
        lambda data, masks: [change(path, PatientID="1") for path in data.rglob("IM*")],
        "",
        "a split needs at least 2 cases, found 3, all of one patient; --split_ratios 1 0 trains on all",
    ),
    (
        "two broken series",
        lambda data, masks: [change(path, PixelSpacing=[0, 0]) for path in data.rglob("P[12]/CT/IM*")],
        "",
        "found 1; --split_ratios 1 0 trains on all; skipped: series",
    ),
    (
        "two values in an organ",
        lambda data, masks: (
            [save_mask(masks / f"{name}.nii.gz", mask_of(1), grid(1)) for name in ("liver", "spleen")]
            and (masks / "mask_8.nii.gz").unlink()
        ),
        "",
        "holds 2 values, but it is read as the mask of",
    ),
    ("a flag of images", lambda data, masks: None, "--size 5 5", "--size does not apply to --dataset dicom"),
]


@pytest.mark.parametrize(("change_folders", "flags", "message"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_input_is_reported_in_one_line(
    folders: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    change_folders: Callable[[Path, Path], object],
    flags: str,
    message: str,
) -> None:
    change_folders(*folders)
    assert message in refused(capsys, "dicom", *folders, flags)


def test_without_pydicom_the_message_names_what_to_install(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for name in ("io.dicom", "io.dicom_seg", "readers.dicom"):
        monkeypatch.delitem(sys.modules, f"data_loading.{name}", raising=False)
    output = refused(capsys, "dicom", *folders)
    assert output == "--dataset dicom: needs pydicom, which is not installed; pip install '.[dicom]'"


@pytest.mark.real_data
def test_the_real_series_has_its_muscles_on_the_back(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    folder = real_data("abdomen_ct")
    flags = "--split_ratios 1 0 --slices_per_case 10 --labels 86,87=1:muscle --spacing 2 4 4 --foreground_crop"
    intensity = "--intensity_window -160 240 --intensity minmax --orientation SPL"
    index = preprocess("dicom", folder / "dicom", folder, tmp_path / "out", flags, intensity)
    assert index.split == {"train": ["dicom_slab000", "dicom_slab001"], "evaluation": []}
    for case, record in index.cases.items():
        x, y = arrays(tmp_path / "out", case)
        assert x.shape[1] == 10
        assert record.transform is not None
        assert record.transform.source.spacing_mm[2] == 2.0
        assert 0.35 < x[y == 1].mean() < 0.7, "muscle, at about 50 HU"
        left, right = sorted(record.boxes[1], key=lambda box: box[2])
        assert left[5] <= right[2]
        assert min(left[1], right[1]) > x.shape[2] / 2, "behind the middle"
    starts = [record.transform.source.affine[2, 3] for record in index.cases.values() if record.transform]
    assert starts[1] - starts[0] == pytest.approx(20.0)
