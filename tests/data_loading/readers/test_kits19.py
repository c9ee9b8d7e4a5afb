"""`--dataset kits19`: which cases are found, how they are split, and which folder is suggested instead."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.errors import UserError
from data_loading.io.orientation import orientation_of
from data_loading.readers.base import ReaderOptions
from data_loading.readers.kits19 import EVALUATION_CASES, read_kits19
from data_loading.spec import KITS19
from tests.data_loading.readers.layouts import case_ids, touch_kits19

# MLPerf's 42 evaluation cases.
EVALUATION = """
    0 3 5 6 12 24 34 41 44 49 52 56 61 65 66 70 76 78 80 84 86
    87 92 111 112 125 128 138 157 160 161 162 169 171 176 185 187 189 198 203 206 207
"""

WriteRaw = Callable[..., Path]


def test_kits19_is_found_and_split_by_mlperfs_list(tmp_path: Path) -> None:
    raw = read_kits19(touch_kits19(tmp_path, 4, 0, 3, 209), ReaderOptions(), ["00000", "00003", "00206"])
    assert raw.spec == KITS19
    assert case_ids(raw) == ["case_00000", "case_00003", "case_00004", "case_00209"]
    assert raw.split == {"train": ["case_00004", "case_00209"], "evaluation": ["case_00000", "case_00003"]}
    assert raw.cases[0].image == tmp_path / "case_00000" / "imaging.nii.gz"
    assert raw.cases[0].label == tmp_path / "case_00000" / "segmentation.nii.gz"
    assert read_kits19(tmp_path, ReaderOptions(seed=1), ["00000", "00003", "00206"]).split == raw.split


def test_kits19_without_labels_and_other_things_are_skipped(tmp_path: Path) -> None:
    touch_kits19(tmp_path, 1, "copy", "²")
    (tmp_path / "case_00210").mkdir()
    (tmp_path / "case_00299").mkdir()
    (tmp_path / "case_00002").touch()  # a file
    (tmp_path / "kits.json").touch()
    for name in ("Case_00003", "00004", "RESULTS"):
        (tmp_path / name).mkdir()
    (tmp_path / "Case_00003" / "imaging.nii.gz").touch()
    (tmp_path / "00004" / "imaging.nii").touch()
    raw = read_kits19(tmp_path, ReaderOptions(), [])
    assert case_ids(raw) == ["case_00001"]
    assert raw.notes == [
        "passed over 2 cases, case_00210 to case_00299: KiTS19 publishes masks only below case_00210",
        "passed over 5 cases, 00004 to case_²: not a folder named case_ and a number",
    ]


def test_plain_files_are_found_beside_packed_ones(tmp_path: Path) -> None:
    touch_kits19(tmp_path, 0, 1)
    for name in ("imaging", "segmentation"):
        path = tmp_path / "case_00001" / f"{name}.nii.gz"
        path.rename(path.with_suffix(""))
    raw = read_kits19(tmp_path, ReaderOptions(), [])
    assert [case.image.name for case in raw.cases] == ["imaging.nii.gz", "imaging.nii"]


@pytest.mark.parametrize("codes", ["LPI", "RAS", "PIL"])
def test_files_of_another_axis_order_give_the_same_case(tmp_path: Path, write_kits19: WriteRaw, codes: str) -> None:
    write_kits19(tmp_path, [0, 1])
    expected = read_kits19(tmp_path, ReaderOptions(), []).cases[1].read()
    for path in (tmp_path / "case_00001").iterdir():
        image = nib.load(path)
        change = nib.orientations.ornt_transform(
            nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(codes))
        )
        nib.save(image.as_reoriented(change), path)
    first, second = read_kits19(tmp_path, ReaderOptions(), []).cases
    for found, volume in zip(second.read(), expected, strict=True):
        np.testing.assert_array_equal(found.array, volume.array)
        np.testing.assert_allclose(found.geometry.affine, volume.geometry.affine, atol=1e-5)
        assert found.geometry.spacing_mm == volume.geometry.spacing_mm
    assert second.read()[0].notes == (f"its axes run {codes}, reoriented to KiTS19's IPL",)
    assert [len(case.stamp()) for case in (first, second)] == [2, 3], "a folder of an earlier version is redone"
    # The user's choice goes first.
    chosen = read_kits19(tmp_path, ReaderOptions(orientation="RAS"), []).cases[1]
    assert orientation_of(chosen.read()[0].geometry.affine) == codes


def test_the_evaluation_list_is_mlperfs() -> None:
    listed = EVALUATION_CASES.read_text().split()
    assert len(listed) == 42
    assert listed == [f"{int(number):05d}" for number in EVALUATION.split()]


@pytest.mark.parametrize(("missing", "present"), [("segmentation", "imaging"), ("imaging", "segmentation")])
def test_a_kits19_case_needs_both_files(tmp_path: Path, missing: str, present: str) -> None:
    touch_kits19(tmp_path, 0, 1)
    (tmp_path / "case_00001" / f"{missing}.nii.gz").unlink()
    what = "mask" if missing == "segmentation" else "image"
    path = tmp_path / "case_00001" / f"{missing}.nii.gz"
    with pytest.raises(UserError, match=f"case_00001: its {what} {path} is missing beside {present}.nii.gz"):
        read_kits19(tmp_path, ReaderOptions(), [])


def test_a_wrong_kits19_folder_suggests_the_intended_one(tmp_path: Path, write_msd: WriteRaw) -> None:
    data = touch_kits19(tmp_path / "kits19" / "data", 0)
    with pytest.raises(UserError, match=f"did you mean {data}\\?"):
        read_kits19(data.parent, ReaderOptions(), [])
    with pytest.raises(UserError, match=f"did you mean its parent {data}\\?"):
        read_kits19(data / "case_00000", ReaderOptions(), [])
    decathlon = write_msd(tmp_path / "Task04", 2)
    with pytest.raises(UserError, match="it has the Decathlon's layout, use --dataset msd"):
        read_kits19(decathlon, ReaderOptions(), [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no case_00000 … in it; give the folder that holds case_00000/imaging"):
        read_kits19(tmp_path / "empty", ReaderOptions(), [])


def test_no_suggestion_for_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)  # tests may run as root, who may enter every folder
    with pytest.raises(UserError, match="in it; give the folder"):
        read_kits19(tmp_path, ReaderOptions())


def test_a_stamp_changes_with_the_source(tmp_path: Path) -> None:
    raw = read_kits19(touch_kits19(tmp_path, 0), ReaderOptions(), []).cases[0]
    stamps = [raw.stamp()]
    raw.label.write_bytes(b"longer")
    stamps.append(raw.stamp())
    os.utime(raw.image, ns=(0, 1_234_567_890_123_456_789))
    stamps.append(raw.stamp())
    assert stamps[2] == [[0, 1_234_567_890_123_456_789], [6, raw.label.stat().st_mtime_ns]]
    assert len({json.dumps(stamp) for stamp in stamps}) == 3
