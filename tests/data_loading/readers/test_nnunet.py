"""`--dataset nnunet`: nnU-Net's raw layout, its channels, classes and mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from data_loading.dataset import read_case
from data_loading.index import INDEX_NAME, read_index
from data_loading.readers.base import ReaderOptions
from data_loading.readers.nnunet import read_nnunet
from preprocess_dataset import main as preprocess_main
from tests.data_loading.readers.layouts import case_ids

SHAPE = (6, 7, 8)
INDEX = {
    "channel_names": {"0": "T1", "1": "T2"},
    "labels": {"background": 0, "tumour": 2, "kidney": 1},
    "numTraining": 3,
    "file_ending": ".nii.gz",
}
WriteScan = Callable[..., None]


def image(case: int, channel: int) -> Any:
    return np.random.default_rng([case, channel]).normal(100 * (channel + 1), 10, SHAPE).astype(np.float32)


def mask(case: int) -> Any:
    return np.random.default_rng(case).integers(0, 3, SHAPE).astype(np.uint8)


@pytest.fixture
def raw(tmp_path: Path, write_scan: WriteScan) -> Path:
    """Three cases of two channels; cases are numbered with four digits, as channels are."""
    folder = tmp_path / "Dataset007_Test"
    for case in range(3):
        for channel in range(2):
            write_scan(folder / "imagesTr" / f"scan_{case:04d}_{channel:04d}.nii.gz", image(case, channel))
        write_scan(folder / "labelsTr" / f"scan_{case:04d}.nii.gz", mask(case))
    write_index(folder)
    return folder


def write_index(folder: Path, **changes: Any) -> None:
    content = {key: value for key, value in {**INDEX, **changes}.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(content))


def test_cases_classes_and_channels(raw: Path) -> None:
    found = read_nnunet(raw, ReaderOptions())
    assert case_ids(found) == ["scan_0000", "scan_0001", "scan_0002"]
    spec = found.spec
    assert (spec.name, spec.classes, spec.channels) == ("dataset007_test", ("background", "kidney", "tumour"), 2)
    assert list(found.notes) == []
    volume, label = found.cases[1].read()
    np.testing.assert_array_equal(volume.array, np.stack([image(1, 0), image(1, 1)]))
    np.testing.assert_array_equal(label.array[0], mask(1))


def test_a_channel_stored_the_other_way_round_is_reoriented(raw: Path, write_scan: WriteScan) -> None:
    import nibabel as nib

    path = raw / "imagesTr" / "scan_0001_0001.nii.gz"
    nib.save(nib.load(path).as_reoriented(np.array([[2, 1], [0, -1], [1, 1]])), path)
    volume, _ = read_nnunet(raw, ReaderOptions()).cases[1].read()
    np.testing.assert_array_equal(volume.array[1], image(1, 1))


def test_a_change_of_any_channel_changes_the_stamp(raw: Path) -> None:
    before = read_nnunet(raw, ReaderOptions()).cases[0].stamp()
    path = raw / "imagesTr" / "scan_0000_0001.nii.gz"
    path.write_bytes(path.read_bytes() + b"\0")
    assert read_nnunet(raw, ReaderOptions()).cases[0].stamp() != before


def test_channels_that_change_their_names_change_the_stamp(raw: Path) -> None:
    before = read_nnunet(raw, ReaderOptions()).cases[0].stamp()
    first, second = (raw / "imagesTr" / f"scan_0000_000{channel}.nii.gz" for channel in (0, 1))
    first.rename(raw / "kept")
    second.rename(first)
    (raw / "kept").rename(second)
    assert read_nnunet(raw, ReaderOptions()).cases[0].stamp() != before


def test_it_preprocesses_with_and_without_labels(raw: Path, tmp_path: Path) -> None:
    for name, more, classes in (
        ("a", [], ("background", "kidney", "tumour")),
        ("b", ["--labels", "kidney,tumour=1:organ"], ("background", "organ")),
    ):
        arguments = ["--dataset", "nnunet", "--data_dir", str(raw), "--results_dir", str(tmp_path / name)]
        assert preprocess_main([*arguments, "--num_workers", "1", *more]) == 0
        assert read_index(tmp_path / name / INDEX_NAME).spec.classes == classes
        array, label = read_case(tmp_path / name, "scan_0002")
        assert array.shape == (2, *SHAPE)
        np.testing.assert_array_equal(label[0], np.minimum(mask(2), len(classes) - 1))


def test_files_that_are_no_channels_are_counted_and_a_wrong_number_of_cases_noted(
    raw: Path, write_scan: WriteScan
) -> None:
    write_scan(raw / "imagesTr" / "other.nii.gz", image(0, 0))
    write_index(raw, numTraining=5)
    notes = list(read_nnunet(raw, ReaderOptions()).notes)
    assert [note.partition(": ")[2] for note in notes] == [
        "passed over 1 other (1 .nii.gz)",
        "dataset.json has numTraining 5, found 3 cases",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"background": 0, "whole": [1, 2]}}, "label 'whole' is a region, a list of values"),
        ({"labels": {"background": 0, "tumour": 2}}, r"labels must be numbered 0, 1, …, found \[0, 2\]"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, r"found \[0, 1, 1\]"),
        ({"labels": ["background"]}, "not nnU-Net's dataset.json"),
        ({"channel_names": {}}, "channel_names is empty"),
        ({"channel_names": None}, "not nnU-Net's dataset.json .*channel_names"),
        ({"channel_names": None, "modality": {"0": "CT"}}, "use --dataset msd"),
        ({"file_ending": ".png"}, "file_ending '.png'; only .nii.gz and .nii are read"),
        ({"file_ending": ".nii"}, r"labelsTr: no mask CASE.nii in it; it holds 3 others \(3 .nii.gz\)"),
        ({"dataset": {}}, "names its files under 'dataset'"),
        ({"channel_names": {"0": "CT"}}, "want scan_0000_0000.nii.gz, found scan_0000_0000.nii.gz, scan_0000_0001"),
        ({"numTraining": "many"}, "not nnU-Net's dataset.json"),
    ],
)
def test_what_dataset_json_must_not_hold_is_one_clear_line(raw: Path, changes: dict[str, Any], message: str) -> None:
    write_index(raw, **changes)
    with pytest.raises(UserError, match=message) as raised:
        read_nnunet(raw, ReaderOptions())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("labelsTr/scan_0001.nii.gz", "labelsTr has no scan_0001.nii.gz, but imagesTr has its scan"),
        ("imagesTr/scan_0001_0001.nii.gz", "want .*scan_0001_0001.nii.gz, found scan_0001_0000.nii.gz"),
        ("dataset.json", "no dataset.json in it"),
    ],
)
def test_a_missing_file_is_named(raw: Path, removed: str, message: str) -> None:
    (raw / removed).unlink()
    with pytest.raises(UserError, match=message):
        read_nnunet(raw, ReaderOptions())


def test_a_channel_on_another_grid_is_refused(raw: Path, write_scan: WriteScan) -> None:
    write_scan(raw / "imagesTr" / "scan_0000_0001.nii.gz", image(0, 1), (1.0, 1.0, 2.0))
    with pytest.raises(UserError, match=r"scan_0000_0001.nii.gz is on another grid than scan_0000_0000.nii.gz"):
        read_nnunet(raw, ReaderOptions()).cases[0].read()


def test_a_channel_file_with_several_channels_is_refused(raw: Path, write_scan: WriteScan) -> None:
    write_scan(raw / "imagesTr" / "scan_0000_0001.nii.gz", np.stack([image(0, 1)] * 2, -1))
    with pytest.raises(UserError, match="holds 2 channels"):
        read_nnunet(raw, ReaderOptions()).cases[0].read()
