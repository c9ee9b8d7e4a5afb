"""`--dataset nifti`: pairing by stem, slabs, one file per organ, and rejected input."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.errors import UserError
from data_loading.dataset import read_spec_and_split
from data_loading.io.volume import Geometry, Volume, write_nifti
from data_loading.preprocessing import foreground_box
from data_loading.readers import nifti as scans
from data_loading.readers.base import ReaderOptions
from data_loading.readers.label_map import LabelMap
from data_loading.readers.mask_matching import read_classes
from data_loading.spec import KITS19
from tests.data_loading.readers.programs import arrays, preprocess, refused

SHAPE = (6, 5, 8)
AFFINE = np.array([[-2.0, 0, 0, 10], [0, 1.5, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])


def mask_of(number: int) -> np.ndarray:
    """Returns class 3 in the first four slices, and 7 in the last two of every other scan."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:4, 1:3, :4] = 3
    mask[2, 2, 6:] = 7 if number % 2 else 0
    return mask


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Six scans and their masks."""
    data, masks = tmp_path / "raw" / "Scans", tmp_path / "raw" / "masks"
    data.mkdir(parents=True)
    masks.mkdir()
    for number in range(6):
        image = np.random.default_rng(number).normal(0, 100, SHAPE).astype(np.float32)
        nib.save(nib.Nifti1Image(image, AFFINE), data / f"p{number}.nii.gz")
        nib.save(nib.Nifti1Image(mask_of(number), AFFINE), masks / f"p{number}.nii.gz")
    (data / "README").touch()
    return data, masks


def test_scans_and_masks_are_paired_by_stem_and_every_value_is_a_class(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    index = preprocess("nifti", *folders, tmp_path / "out", "--intensity none --split_ratios 0.5 0.25 0.25")
    assert (index.spec.name, index.spec.classes, index.spec.channels) == ("scans", ("background", "3", "7"), 1)
    assert {name: len(cases) for name, cases in index.split.items()} == {"train": 4, "evaluation": 1, "test": 1}
    for number in range(6):
        x, y = arrays(tmp_path / "out", f"p{number}")
        np.testing.assert_array_equal(x[0], nib.load(folders[0] / f"p{number}.nii.gz").get_fdata(dtype=np.float32))
        np.testing.assert_array_equal(y[0], np.searchsorted([0, 3, 7], mask_of(number)))
    assert read_spec_and_split(tmp_path / "out", [])[0].orientation == "LAS"
    assert index.provenance == {
        "dataset": "nifti",
        "seed": 0,
        "labels_dir": "../masks",
        "intensity": "none",
        "split_ratios": [0.5, 0.25, 0.25],
    }


def test_masks_of_another_folder_are_read_even_if_names_sizes_and_times_are_equal(
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data, masks = folders
    other = tmp_path / "raw" / "second_annotator"
    other.mkdir()
    for path in [*masks.glob("p*"), *data.glob("p*")]:
        nib.save(nib.load(path), path.with_suffix(""))  # .nii: its size does not depend on its values
        path.unlink()
    for path in masks.iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.roll(image.get_fdata().astype(np.uint8), 1, axis=1), AFFINE), other / path.name)
        for folder in (masks, other):
            os.utime(folder / path.name, ns=(1, 1))
    preprocess("nifti", data, masks, tmp_path / "out")
    with caplog.at_level("INFO"):
        preprocess("nifti", data, other, tmp_path / "out")
    assert "the masks are in ../second_annotator, no longer in ../masks, seen from --data_dir" in caplog.text
    preprocess("nifti", data, other, tmp_path / "at_once")
    for number in range(6):
        y = arrays(tmp_path / "out", f"p{number}")[1]
        np.testing.assert_array_equal(y, arrays(tmp_path / "at_once", f"p{number}")[1])
    # Moved as a whole, it is the same data.
    shutil.move(tmp_path / "raw", tmp_path / "moved")
    capsys.readouterr()
    preprocess("nifti", tmp_path / "moved/Scans", tmp_path / "moved/second_annotator", tmp_path / "out")
    assert "0 now, 6 already done" in capsys.readouterr().out


def test_a_mask_is_reoriented_to_its_scan(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, masks = folders
    image = nib.load(masks / "p1.nii.gz")
    nib.save(nib.as_closest_canonical(nib.Nifti1Image(mask_of(1)[:, ::-1], image.affine)), masks / "p1.nii.gz")
    flipped = AFFINE.copy()
    flipped[:3, 1] *= -1
    flipped[1, 3] += 1.5 * (SHAPE[1] - 1)
    nib.save(nib.as_closest_canonical(nib.Nifti1Image(mask_of(1)[:, ::-1], flipped)), masks / "p1.nii.gz")
    assert nib.aff2axcodes(nib.load(masks / "p1.nii.gz").affine) == ("R", "A", "S")
    preprocess("nifti", data, masks, tmp_path / "out")
    np.testing.assert_array_equal(arrays(tmp_path / "out", "p1")[1][0], np.searchsorted([0, 3, 7], mask_of(1)))


def test_slabs_are_cases_of_one_patient_and_empty_ones_do_not_train(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    index = preprocess(
        "nifti", *folders, out, "--slices_per_case 3 --labels 7=1:cyst 3=2 --split_ratios 0.5 0.5 --intensity none"
    )
    output = capsys.readouterr().out
    assert "12 slabs of 3 slices; 12 slices at the ends of 6 scans dropped" in output
    # Slices 0 to 2 and slice 3 hold label 3, so no slab is empty with these labels.
    assert len(index.cases) == 12
    for subset, cases in index.split.items():
        patients = {case.rpartition("_slab")[0] for case in cases}
        assert {index.cases[case].patient for case in cases} == patients
        assert len(cases) == 2 * len(patients) == 6, subset
    x, y = arrays(out, "p1_slab001")
    whole = nib.load(folders[0] / "p1.nii.gz")
    np.testing.assert_array_equal(x[0], whole.get_fdata(dtype=np.float32)[..., 3:6])
    np.testing.assert_array_equal(y[0], 2 * (mask_of(1)[..., 3:6] == 3))
    transform = index.cases["p1_slab001"].transform
    assert transform is not None
    np.testing.assert_allclose(transform.source.affine, whole.slicer[..., 3:6].affine)

    index = preprocess("nifti", *folders, out, "--slices_per_case 2 --labels 7=1:cyst --split_ratios 0.5 0.5")
    held_out = index.split["evaluation"]
    assert len(held_out) == 12, "empty ones are kept for evaluation"
    trains = [f"p{n}_slab003" for n in range(6) if n % 2 and f"p{n}_slab003" not in held_out]
    assert index.split["train"] == trains
    dropped = index.provenance["dropped"]
    assert len(dropped) == 12 - len(trains)
    assert not any((out / f"{case}_x.npy").exists() for case in dropped)
    output = capsys.readouterr().out
    assert f"{dropped[0]}: dropped, its mask is empty" in output
    assert f"{len(dropped)} training cases dropped because their masks are empty" in output
    kept = preprocess(
        "nifti", *folders, out, "--slices_per_case 2 --labels 7=1:cyst --split_ratios 0.5 0.5 --no-drop_empty"
    )
    assert len(kept.cases) == 24


@pytest.mark.parametrize(
    "options", ["", "--intensity minmax", "--intensity_window -50 80", "--foreground_crop --intensity_window -250 80"]
)
def test_slabs_are_scaled_as_their_scan_is(options: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """As a prediction scales it."""
    for number in range(6):
        path = folders[0] / f"p{number}.nii.gz"
        rising = nib.load(path).get_fdata(dtype=np.float32) + 100 * np.arange(SHAPE[2], dtype=np.float32)
        nib.save(nib.Nifti1Image(rising, AFFINE), path)
    preprocess("nifti", *folders, tmp_path / "whole", options)
    preprocess("nifti", *folders, tmp_path / "slabs", f"{options} --slices_per_case 4 --no-drop_empty")
    slabs = [arrays(tmp_path / "slabs", f"p1_slab00{number}")[0] for number in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(slabs, axis=-1), arrays(tmp_path / "whole", "p1")[0])


def test_a_part_of_a_scan_is_cropped_by_its_scans_mean() -> None:
    image = np.arange(8, dtype=np.float32).reshape(1, 1, 1, 8)
    spec = replace(KITS19, intensity_window=None)
    assert foreground_box(image[..., 4:], spec) == (0, 0, 2, 1, 1, 4)
    assert foreground_box(image[..., 4:], spec, image) == (0, 0, 0, 1, 1, 4)


def test_a_scan_is_read_once_for_its_slabs(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = scans.read_nifti
    monkeypatch.setattr(scans, "read_nifti", lambda *how: read.append(how[0].name) or real(*how))
    scans._read_scan_once.cache_clear()
    data = scans.read_nifti_folders(
        folders[0], ReaderOptions(labels_dir=folders[1], slices_per_case=2, labels=("3=1",))
    )
    for case in data.cases:
        case.read()
    assert read == [f"p{number}.nii.gz" for number in range(6)]
    scans._read_scan_once.cache_clear()


def test_other_labels_or_slabs_preprocess_again_and_another_split_does_not(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, now in (
        ("--labels 3=1", 6),
        ("--labels 3=1 --seed 4", 0),
        ("--labels 3=1 --split_ratios 0.5 0.25 0.25", 0),
        ("--labels 7=1:3", 6),
    ):
        preprocess("nifti", *folders, tmp_path / "out", flags)
        assert f"({now} now, {6 - now} already done)" in capsys.readouterr().out


def test_one_file_per_organ(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, masks = folders
    for number in range(6):
        mask = mask_of(number)
        (masks / f"p{number}.nii.gz").unlink()
        (masks / f"p{number}").mkdir()
        for name, value in (("liver", 3), ("aorta", 7)):
            organ = (mask == value).astype(np.uint8)
            if organ.any():
                nib.save(nib.Nifti1Image(organ, AFFINE), masks / f"p{number}" / f"{name}.nii.gz")
    index = preprocess("nifti", data, masks, tmp_path / "out")
    assert index.spec.classes == ("background", "aorta", "liver")
    for number in (0, 1):
        mask = mask_of(number)
        np.testing.assert_array_equal(arrays(tmp_path / "out", f"p{number}")[1][0], 2 * (mask == 3) + (mask == 7))
    index = preprocess("nifti", data, masks, tmp_path / "out", "--labels liver=1")
    np.testing.assert_array_equal(arrays(tmp_path / "out", "p1")[1][0], mask_of(1) == 3)


@pytest.mark.parametrize(("flags", "winner"), [("", "head"), ("--labels head=1 whole=2", "whole")])
def test_overlaps_of_organs_are_counted(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, winner: str
) -> None:
    data, masks = folders
    for number in range(6):
        (masks / f"p{number}.nii.gz").unlink()
        (masks / f"p{number}").mkdir()
        for name, slices in (("head", slice(2, 5)), ("whole", slice(0, 4))):
            organ = np.zeros(SHAPE, np.uint8)
            organ[1:4, 1:3, slices] = 1
            nib.save(nib.Nifti1Image(organ, AFFINE), masks / f"p{number}" / f"{name}.nii.gz")
    index = preprocess("nifti", data, masks, tmp_path / "out", flags)
    loser = "whole" if winner == "head" else "head"
    reason = "it is the higher class" if flags else "it has fewer voxels"
    expected = (
        f"12 voxels in both {winner} and {loser} became {winner}, as {reason} "
        f"(--labels with {loser} numbered above {winner} chooses {loser})"
    )
    output = capsys.readouterr().out
    assert f"; {expected}\n" in output
    assert index.cases["p3"].notes == (expected,)
    whole = 24 if winner == "whole" else 12
    assert dict(zip(index.spec.classes, index.cases["p3"].voxels, strict=True)) == {
        "background": 240 - 30,
        "whole": whole,
        "head": 30 - whole,
    }
    listed = f"head {6 * (30 - whole)} in 6 cases, whole {6 * whole} in 6 cases"
    assert f"voxels of the classes: background 1260 in 6 cases, {listed}\n" in output


def test_interpolated_masks_need_labels(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, masks = folders
    for path in masks.iterdir():
        mask = np.zeros(SHAPE, np.uint8)
        mask[0], mask[1] = 10, 5
        nib.save(nib.Nifti1Image(mask, AFFINE), path)
    output = refused(capsys, "nifti", data, masks)
    assert "masks: value 5 lies only between lower and higher values, as interpolation makes them" in output
    assert output.endswith("such as --labels 5=1 10=2")
    assert preprocess("nifti", data, masks, tmp_path / "out", "--labels 5-10=1").spec.classes[1] == "5-10"


def test_labels_reach_any_integer(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, masks = folders
    for path in masks.iterdir():
        mask = np.zeros(SHAPE, np.int16)
        mask[:2], mask[2:4], mask[4:] = -1, 14175, 2
        nib.save(nib.Nifti1Image(mask, AFFINE), path)
    index = preprocess("nifti", data, masks, tmp_path / "out", "--labels 14175=1:hippocampus")
    assert index.cases["p0"].voxels == (160, 80)
    index = preprocess("nifti", data, masks, tmp_path / "out", "--labels -1=1 2=2")
    assert index.cases["p0"].voxels == (80, 80, 80)
    assert preprocess("nifti", data, masks, tmp_path / "out").spec.classes == ("background", "-1", "2", "14175")


def test_scans_are_reoriented_cropped_and_resampled(folders: tuple[Path, Path], tmp_path: Path) -> None:
    flags = "--orientation SPR --spacing 1.5 1.5 2 --intensity_window 50 400 --intensity minmax --foreground_crop"
    index = preprocess("nifti", *folders, tmp_path / "out", flags)
    spec = index.spec
    assert (spec.orientation, spec.spacing_mm, spec.intensity_window) == ("SPR", (1.5, 1.5, 2.0), (50.0, 400.0))
    assert (spec.intensity, spec.foreground_crop, read_spec_and_split(tmp_path / "out", [])[0]) == (
        "minmax",
        True,
        spec,
    )
    for case, record in index.cases.items():
        x, y = arrays(tmp_path / "out", case)
        assert x.min() == 0
        assert 0 < x.max() <= 1
        assert x.shape == y.shape
        assert record.transform is not None
        assert record.transform.crop is not None


def test_endings_in_any_case_and_composed_accents_are_the_same_name(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, masks = folders
    (data / "p0.nii.gz").rename(data / "P0.NII.GZ")
    (masks / "p0.nii.gz").rename(masks / "P0.Nii.gz")
    (data / "p1.nii.gz").rename(data / f"{unicodedata.normalize('NFD', 'André')}.nii.gz")
    (masks / "p1.nii.gz").rename(masks / f"{unicodedata.normalize('NFC', 'André')}.nii.gz")
    (data / "p9.mha").touch()
    index = preprocess("nifti", data, masks, tmp_path / "out")
    assert sorted(index.cases) == ["André", "P0", "p2", "p3", "p4", "p5"]
    output = capsys.readouterr().out
    assert f"--data_dir {data}: passed over 2 others (1 README, 1 .mha)\n" in output
    assert "--labels_dir" not in output


BAD: list[tuple[str, Callable[[Path, Path], object], str, str]] = [
    (
        "a time series",
        lambda data, masks: nib.save(nib.Nifti1Image(np.zeros((*SHAPE, 7), np.float32), AFFINE), data / "p0.nii.gz"),
        "",
        "p0.nii.gz has 7 channels, 5 other scans have 1; all scans need the same channels",
    ),
    (
        "singular",
        lambda data, masks: nib.save(nib.Nifti1Image(mask_of(1), AFFINE[:, [0, 0, 2, 3]]), data / "p1.nii.gz"),
        "",
        "p1.nii.gz: the header's affine is singular: two axes run the same way; export it again",
    ),
    (
        "another ending",
        lambda data, masks: (masks / "p3.nii.gz").rename(masks / "p3.nrrd"),
        "",
        "no mask p3 for p3.nii.gz; p3.nrrd lies there, but its ending is not read",
    ),
    (
        "a folder named like a scan",
        lambda data, masks: ((data / "p3.nii").mkdir(), (data / "p3.nii.gz").rename(data / "p3.nii" / "p3.nii.gz")),
        "",
        "no scan p3 for p3.nii.gz; p3.nii lies there, but is a folder",
    ),
    ("no mask", lambda data, masks: (masks / "p3.nii.gz").unlink(), "", "no mask p3 for p3.nii.gz; stems must"),
    (
        "no scans",
        lambda data, masks: [p.unlink() for p in data.glob("p[34]*")],
        "",
        "no scan p3 for p3.nii.gz (and 1 more); stems must be equal",
    ),
    ("nothing", lambda data, masks: [p.unlink() for p in data.glob("*.nii.gz")], "", "Scans: no scan in it"),
    ("two with one stem", lambda data, masks: (data / "p3.nii").touch(), "", "p3.nii and p3.nii.gz have the same stem"),
    (
        "other shape",
        lambda data, masks: nib.save(nib.Nifti1Image(mask_of(1)[:5], AFFINE), masks / "p3.nii.gz"),
        "",
        "p3: the image has shape (6, 5, 8) but its mask (5, 5, 8)",
    ),
    (
        "other affine",
        lambda data, masks: nib.save(nib.Nifti1Image(mask_of(1), AFFINE + np.eye(4, k=3)), masks / "p3.nii.gz"),
        "",
        "p3: the affines of image and mask differ by 1 mm at the origin",
    ),
    (
        "several masks",
        lambda data, masks: (
            (masks / "p3.nii.gz").unlink(),
            (masks / "p3").mkdir(),
            [nib.save(nib.Nifti1Image(mask_of(1), AFFINE), masks / "p3" / f"{name}.nii.gz") for name in "ab"],
        ),
        "--labels 3=1",
        "p3: 2 masks are on its grid (a.nii.gz, b.nii.gz); remove all but one, or name structures",
    ),
    (
        "slab too long",
        lambda data, masks: None,
        "--slices_per_case 9",
        "--slices_per_case 9: no scan is that long; the longest has 8 slices",
    ),
    ("no slab", lambda data, masks: None, "--slices_per_case 0", "--slices_per_case 0: must be at least 1"),
    ("nothing labelled", lambda data, masks: None, "--labels 99=1 --drop_empty", "every training case has an empty"),
    ("no such organ", lambda data, masks: None, "--labels spleen=1", "--labels spleen: no mask of that name in"),
    ("not its flag", lambda data, masks: None, "--size 5 5", "--size does not apply to --dataset nifti, which accepts"),
    ("no window", lambda data, masks: None, "--intensity_window 5 5", "--intensity_window 5 5: LOW must be below HIGH"),
    (
        "no spacing",
        lambda data, masks: None,
        "--spacing 1 0 1",
        "--spacing 1 0 1: expected three distances in mm, above 0",
    ),
    (
        "no orientation",
        lambda data, masks: None,
        "--orientation RAL",
        "--orientation RAL: expected three letters such as",
    ),
    (
        "too few",
        lambda data, masks: None,
        "--split_ratios 0.9 0.05 0.05",
        "a ratio of 0.05 leaves none of 6 patients for evaluation",
    ),
    (
        "no shares",
        lambda data, masks: None,
        "--split_ratios 0.9 0.2",
        "--split_ratios 0.9 0.2: give two or three ratios that add up",
    ),
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
    assert message in refused(capsys, "nifti", *folders, flags)


def test_the_masks_folder_is_required(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    data, masks = folders
    assert refused(capsys, "nifti", data, None).startswith(
        "--dataset nifti needs --labels_dir, the folder of the masks"
    )
    assert "no such folder" in refused(capsys, "nifti", data, masks / "none")
    assert "masks need a separate folder" in refused(capsys, "nifti", data, data)


def test_a_folder_without_permission_is_reported_in_one_line(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)  # tests may run as root, who may enter every folder
    assert refused(capsys, "nifti", *folders) == f"{folders[0]}: cannot be read: Permission denied"


@pytest.mark.real_data
def test_a_real_ct_scan_is_preprocessed(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    data, masks = tmp_path / "scans", tmp_path / "masks"
    data.mkdir()
    masks.mkdir()
    (data / "ct.nii.gz").symlink_to(real_data("abdomen_ct") / "example_ct_sm.nii.gz")
    (masks / "ct.nii.gz").symlink_to(real_data("abdomen_ct") / "example_seg.nii.gz")
    flags = "--split_ratios 1 0 --labels 86,87=1:muscle 5=2:liver --foreground_crop"
    intensity = "--intensity_window -160 240 --intensity minmax --orientation SPL"
    index = preprocess("nifti", data, masks, tmp_path / "out", flags, intensity)
    x, y = arrays(tmp_path / "out", "ct")
    assert sorted(index.cases["ct"].boxes) == [1, 2]
    # The liver is brighter than the air around the patient, and the muscles of the back lie behind it, on both sides.
    assert 0.4 < x[y == 2].mean() < 0.8
    assert 0.4 < x[y == 1].mean() < 0.8
    _, _, rows, _ = np.nonzero(y == 1)
    assert rows.mean() > np.nonzero(y == 2)[2].mean() + 20
    boxes = index.cases["ct"].boxes[1]
    assert boxes[0][2] > boxes[1][5] or boxes[1][2] > boxes[0][5]
    assert x.shape[2] < 101


def test_a_structure_that_no_class_takes_may_hold_any_values(tmp_path: Path) -> None:
    grid = Geometry(np.eye(4), (1, 2, 3), (1, 1, 1))
    for name, values in (("liver", [0, 4, 4, 0, 0, 0]), ("other", [1, 2, 3, 0, 1, 2])):
        write_nifti(tmp_path / f"{name}.nii", Volume(np.array(values, np.uint8).reshape(1, *grid.shape), grid))
    masks = [tmp_path / "liver.nii", tmp_path / "other.nii"]
    read = read_classes(masks, grid, LabelMap.parse(["liver=1"]), "a")
    assert read.array.ravel().tolist() == [0, 1, 1, 0, 0, 0]
    with pytest.raises(UserError, match=r"other\.nii: holds 3 values, but it is read as the mask of other only"):
        read_classes(masks, grid, LabelMap.parse(["liver=1", "other=2"]), "a")
