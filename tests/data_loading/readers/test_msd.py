"""`--dataset msd`: cases by the list in dataset.json, the split, and damaged or malicious lists."""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from common.errors import UserError
from data_loading.readers.base import ReaderOptions
from data_loading.readers.msd import read_msd
from tests.data_loading.readers.layouts import case_ids, touch_kits19

WriteRaw = Callable[..., Path]


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes fields of a Decathlon's dataset.json; None removes one."""
    content = {**json.loads((folder / "dataset.json").read_text()), **changes}
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(kept))


def test_the_decathlon_is_found_by_its_list(tmp_path: Path, write_msd: WriteRaw) -> None:
    folder = write_msd(tmp_path / "task", 5)
    (folder / "imagesTr" / "._scan_0.nii.gz").touch()  # macOS creates such files; the list does not contain it
    raw = read_msd(folder, ReaderOptions())
    assert case_ids(raw) == [f"scan_{number}" for number in range(5)]
    assert raw.cases[3].image.samefile(folder / "imagesTr" / "scan_3.nii.gz")
    assert raw.cases[3].label.samefile(folder / "labelsTr" / "scan_3.nii.gz")
    spec = raw.spec
    assert (spec.name, spec.classes, spec.channels) == ("scans", ("background", "kidney", "tumour"), 1)
    assert spec.spacing_mm is spec.intensity_window is spec.mean is spec.std is spec.min_shape is None
    assert spec.padding_value is None
    assert not spec.crops_remainder


def test_class_names_follow_their_numbers_and_channels_the_modalities(tmp_path: Path, write_msd: WriteRaw) -> None:
    folder = write_msd(tmp_path, 2)
    rewrite(folder, labels={"2": "cyst", "0": "nothing", "1": "organ"}, modality={"0": "T1", "1": "T2"})
    assert read_msd(folder, ReaderOptions()).spec.classes == ("nothing", "organ", "cyst")
    assert read_msd(folder, ReaderOptions()).spec.channels == 2


def test_the_decathlons_split_is_80_to_20_by_seed(tmp_path: Path, write_msd: WriteRaw) -> None:
    folder = write_msd(tmp_path, 20)
    splits = [read_msd(folder, ReaderOptions(seed=seed)).split for seed in (0, 0, 1, 2, 3)]
    assert splits[0] == splits[1]
    assert len({tuple(split["evaluation"]) for split in splits}) > 1
    for split in splits:
        assert (len(split["train"]), len(split["evaluation"])) == (16, 4)
        assert sorted(split["train"] + split["evaluation"]) == sorted(f"scan_{number}" for number in range(20))


@pytest.mark.real_data
def test_the_real_hippocampus_set_is_read_whole(real_data: Callable[[str], Path]) -> None:
    raw = read_msd(real_data("hippocampus"), ReaderOptions())
    assert len(raw.cases) == 200
    assert (len(raw.split["train"]), len(raw.split["evaluation"])) == (160, 40)
    assert raw.spec.classes == ("background", "Anterior", "Posterior")


def test_a_mask_may_be_stored_the_other_way_round(tmp_path: Path, write_msd: WriteRaw) -> None:
    folder = write_msd(tmp_path, 2)
    path = folder / "labelsTr" / "scan_1.nii.gz"
    before = read_msd(folder, ReaderOptions()).cases[1].read()
    image = nib.load(path)
    affine = image.affine.copy()
    affine[0, 3] += 0.04  # of voxels of 1 mm
    nib.save(
        nib.Nifti1Image(np.asarray(image.dataobj), affine).as_reoriented(np.array([[2, 1], [0, -1], [1, 1]])), path
    )
    for labels in ((), ("1-2=1", "0=2")):
        image_after, mask_after = read_msd(folder, ReaderOptions(labels=labels)).cases[1].read()
        expected = before[1].array if not labels else np.where(before[1].array > 0, 1, 2)
        np.testing.assert_array_equal(mask_after.array, expected)
        assert mask_after.geometry is image_after.geometry


def test_a_byte_order_mark_and_composed_accents_are_the_same_list(tmp_path: Path, write_msd: WriteRaw) -> None:
    folder = write_msd(tmp_path, 2)
    for kind in ("imagesTr", "labelsTr"):
        path = folder / kind / "scan_1.nii.gz"
        path.rename(path.with_name(f"{unicodedata.normalize('NFD', 'André')}.nii.gz"))
    text = (folder / "dataset.json").read_text().replace("scan_1", unicodedata.normalize("NFC", "André"))
    (folder / "dataset.json").write_text(text, encoding="utf-8-sig")
    raw = read_msd(folder, ReaderOptions())
    assert case_ids(raw) == ["André", "scan_0"]
    assert all(case.read()[1].array.any() for case in raw.cases)


def test_the_list_of_nnunet_is_recognised(tmp_path: Path) -> None:
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "numTraining": 3}
    for more in ({}, {"dataset": {}}, {"training": [GOOD]}):
        (tmp_path / "dataset.json").write_text(json.dumps({**content, **more}))
        with pytest.raises(UserError, match="nnU-Net's list, which names no cases; use --dataset nnunet"):
            read_msd(tmp_path, ReaderOptions())


def test_images_that_the_list_lacks_are_named(tmp_path: Path, write_msd: WriteRaw) -> None:
    folder = write_msd(tmp_path, 2)
    assert read_msd(folder, ReaderOptions()).notes == []
    for name in ("scan_2.nii.gz", "scan_3.NII", "._scan_0.nii.gz", "notes.txt"):
        (folder / "imagesTr" / name).touch()
    raw = read_msd(folder, ReaderOptions())
    assert raw.notes == ["passed over 2 images that dataset.json does not list: scan_2.nii.gz, scan_3.NII"]
    assert case_ids(raw) == ["scan_0", "scan_1"]


def test_a_decathlon_case_needs_both_files(tmp_path: Path, write_msd: WriteRaw) -> None:
    folder = write_msd(tmp_path, 2)
    for kind, what in (("labelsTr", "mask"), ("imagesTr", "image")):
        path = folder / kind / "scan_1.nii.gz"
        path.rename(tmp_path / "away")
        with pytest.raises(UserError, match=f"scan_1: its {what} .* is missing beside scan_1.nii.gz"):
            read_msd(folder, ReaderOptions())
        (tmp_path / "away").rename(path)


def test_a_wrong_decathlon_folder_suggests_the_intended_one(tmp_path: Path, write_msd: WriteRaw) -> None:
    folder = write_msd(tmp_path / "msd" / "Task04", 2)
    with pytest.raises(UserError, match=f"no dataset.json in it; did you mean {folder}\\?"):
        read_msd(folder.parent, ReaderOptions())
    with pytest.raises(UserError, match=f"did you mean {folder}\\?"):
        read_msd(folder / "imagesTr", ReaderOptions())
    with pytest.raises(UserError, match="it has KiTS19's layout, use --dataset kits19"):
        read_msd(touch_kits19(tmp_path / "kits19", 0), ReaderOptions())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="give the folder of one Decathlon task"):
        read_msd(tmp_path / "empty", ReaderOptions())


def test_no_suggestion_for_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "glob", refuse)  # tests may run as root, who may enter every folder
    with pytest.raises(UserError, match="in it; give the folder"):
        read_msd(tmp_path, ReaderOptions())


GOOD = {"image": "imagesTr/scan_0.nii.gz", "label": "labelsTr/scan_0.nii.gz"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, r"not a Decathlon dataset.json \(it lacks labels\)"),
        ({"training": None}, r"not a Decathlon dataset.json \(it lacks training\)"),
        ({"modality": None}, r"not a Decathlon dataset.json \(it lacks modality\)"),
        ({"labels": ["background"]}, r"\(labels: expected an object, found \['background'\]\)"),
        ({"labels": {"zero": "background"}}, r"\(labels: expected numbers with names, found 'zero'\)"),
        ({"labels": {"0": "background", "2": "organ"}}, r"labels must be numbered 0, 1, …, found \[0, 2\]"),
        ({"labels": {"0": "background"}}, "labels must be numbered"),
        ({"labels": {"0": "background", "1": ["organ"]}}, r"expected a string, found \['organ'\]"),
        ({"modality": {}}, "dataset.json: lists no modality"),
        ({"modality": "CT"}, r"\(modality: expected an object, found 'CT'\)"),
        ({"name": 5}, "not a Decathlon dataset.json .*expected a string, found 5"),
        (
            {"training": ["imagesTr/scan_0.nii.gz"]},
            r"\(expected an object with image, found 'imagesTr/scan_0.nii.gz'\)",
        ),
        ({"training": []}, "dataset.json: a split needs at least 2 cases, found 0"),
        ({"training": [GOOD]}, "a split needs at least 2 cases, found 1"),
        ({"training": [GOOD, GOOD]}, "lists a case twice"),
        ({"training": [{**GOOD, "image": 5}]}, "not a Decathlon dataset.json .*expected a string, found 5"),
        ({"training": [{**GOOD, "image": f"imagesTr/{'x' * 5000}.nii.gz"}]}, "cannot look up .*: File name too long"),
        ({"training": [{**GOOD, "image": "../outside.nii.gz"}]}, r"'\.\./outside\.nii\.gz' is outside the data folder"),
        ({"training": [{**GOOD, "label": "labelsTr/../../x.nii.gz"}]}, "is outside the data folder"),
        ({"training": [{**GOOD, "image": "{tmp}/outside.nii.gz"}]}, "is outside the data folder"),
        ({"training": [{**GOOD, "label": "{tmp}/outside.nii.gz"}]}, "is outside the data folder"),
        ({"training": [{**GOOD, "image": ""}]}, "is outside the data folder"),
        ({"training": [{**GOOD, "image": "imagesTr/.nii.gz"}]}, "is outside the data folder"),
    ],
)
def test_a_bad_decathlon_list_is_reported_in_one_line(
    tmp_path: Path, write_msd: WriteRaw, changes: dict[str, Any], message: str
) -> None:
    folder = write_msd(tmp_path / "task", 2)
    shutil.copy(folder / "imagesTr" / "scan_0.nii.gz", tmp_path / "outside.nii.gz")
    rewrite(folder, **json.loads(json.dumps(changes).replace("{tmp}", str(tmp_path))))
    with pytest.raises(UserError, match=message) as caught:
        read_msd(folder, ReaderOptions())
    assert "\n" not in str(caught.value)


NESTED = [b"[" * 100_000, b'{"a":' * 100_000, b'{"labels": ' + b"[" * 100_000]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b'{"labels": 1}', *NESTED])
def test_a_damaged_decathlon_list_is_reported_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(UserError, match=r"dataset\.json: not a Decathlon dataset\.json"):
        read_msd(tmp_path, ReaderOptions())


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_a_decathlon_list_that_is_not_a_file_is_reported_in_one_line(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "dataset.json")
    with pytest.raises(UserError, match=r"dataset\.json: not a Decathlon dataset\.json .*a folder, a pipe or a device"):
        read_msd(tmp_path, ReaderOptions())
