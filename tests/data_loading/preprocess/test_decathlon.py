"""preprocess_dataset.py on the Decathlon's layout: channels, labels, split, warnings."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import preprocess_dataset
from common.errors import UserError
from data_loading import writer
from data_loading.index import INDEX_NAME, read_index
from data_loading.readers.base import ReaderOptions
from data_loading.readers.msd import read_msd
from tests.data_loading.preprocess.program import (
    F32,
    WriteRaw,
    preprocess,
)


def test_the_decathlon_keeps_its_spacing_and_is_normalised_per_scan(tmp_path: Path, write_msd: WriteRaw) -> None:
    raw, out = write_msd(tmp_path / "raw", 5), tmp_path / "out"
    preprocess(raw, out, "--dataset", "msd")
    index = read_index(out / INDEX_NAME)
    assert (len(index.split["train"]), len(index.split["evaluation"])) == (4, 1)
    for number in range(5):
        image = np.asarray(nib.load(raw / "imagesTr" / f"scan_{number}.nii.gz").dataobj, dtype=np.float64)
        x, y = (np.load(out / f"scan_{number}_{kind}.npy") for kind in "xy")
        np.testing.assert_allclose(x[0], (image - image.mean()) / image.std(), atol=1e-5)
        np.testing.assert_array_equal(y[0], np.asarray(nib.load(raw / "labelsTr" / f"scan_{number}.nii.gz").dataobj))
        transform = index.cases[f"scan_{number}"].transform
        assert transform is not None
        assert transform.source.spacing_mm == (2.0, 1.0, 1.0)
        assert transform.shape == transform.resampled_shape == (8, 9 + number, 10)


def test_modalities_become_channels(tmp_path: Path, write_msd: WriteRaw) -> None:
    raw, out = write_msd(tmp_path / "raw", 2, modalities=3), tmp_path / "out"
    preprocess(raw, out, "--dataset", "msd")
    x = np.load(out / "scan_1_x.npy")
    assert x.shape == (3, 8, 10, 10)
    np.testing.assert_allclose(x.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=(1, 2, 3)), 1, atol=1e-5)


def test_another_seed_changes_the_split_and_preprocesses_nothing(
    tmp_path: Path, write_msd: WriteRaw, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = write_msd(tmp_path / "raw", 10), tmp_path / "out"
    splits = []
    for seed in (0, 1, 0):
        preprocess(raw, out, "--dataset", "msd", "--seed", seed)
        splits.append(read_index(out / INDEX_NAME).split)
    assert splits[0] == splits[2] != splits[1]
    assert splits[1] == read_msd(raw, ReaderOptions(seed=1)).split
    assert capsys.readouterr().out.count("10 cases (0 now, 10 already done)") == 2


def test_another_spec_preprocesses_all_again(
    tmp_path: Path, write_msd: WriteRaw, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = write_msd(tmp_path / "raw", 2), tmp_path / "out"
    preprocess(raw, out, "--dataset", "msd")
    content = json.loads((raw / "dataset.json").read_text())
    content["labels"]["3"] = "cyst"
    (raw / "dataset.json").write_text(json.dumps(content))
    capsys.readouterr()
    preprocess(raw, out, "--dataset", "msd")
    assert "2 cases (2 now, 0 already done)" in capsys.readouterr().out
    assert len(read_index(out / INDEX_NAME).spec.classes) == 4


def test_modalities_and_merged_labels_as_in_brain_tumours(tmp_path: Path, write_msd: WriteRaw) -> None:
    raw, out = write_msd(tmp_path / "raw", 5, modalities=2), tmp_path / "out"
    preprocess(
        raw,
        out,
        "--dataset",
        "msd",
        "--labels",
        "kidney,tumour=1:whole",
        "--split_ratios",
        "0.6",
        "0.2",
        "0.2",
        "--intensity",
        "minmax",
        "--orientation",
        "SAR",
    )
    index = read_index(out / INDEX_NAME)
    assert (index.spec.classes, index.spec.channels) == (("background", "whole"), 2)
    assert [len(cases) for cases in index.split.values()] == [3, 1, 1]
    for number in range(5):
        image = np.asarray(nib.load(raw / "imagesTr" / f"scan_{number}.nii.gz").dataobj)
        label = np.asarray(nib.load(raw / "labelsTr" / f"scan_{number}.nii.gz").dataobj)
        x, y = (np.load(out / f"scan_{number}_{kind}.npy") for kind in "xy")
        low, high = image.min(axis=(0, 1, 2)), image.max(axis=(0, 1, 2))
        np.testing.assert_allclose(x, ((image - low) / (high - low)).transpose(3, 2, 1, 0), atol=1e-6)
        np.testing.assert_array_equal(y[0], (label > 0).transpose(2, 1, 0))


def test_the_split_and_its_options_are_saved_with_a_hash(tmp_path: Path, write_msd: WriteRaw) -> None:
    raw, out = write_msd(tmp_path / "raw", 5), tmp_path / "out"
    hashes = []
    for seed in ("3", "3", "4"):
        preprocess(raw, out, "--dataset", "msd", "--split_ratios", "0.6", "0.2", "0.2", "--seed", seed)
        content = json.loads((out / INDEX_NAME).read_text())
        hashes.append(content["split_hash"])
        assert content["provenance"] == {"dataset": "msd", "seed": int(seed), "split_ratios": [0.6, 0.2, 0.2]}
    assert hashes[0] == hashes[1] != hashes[2]
    assert hashes[2] == hashlib.sha256(json.dumps(content["split"], sort_keys=True).encode()).hexdigest()
    # A split edited by hand is detected, even if the file's digest is removed.
    del content["digest"]
    content["split"]["train"].append(content["split"]["test"].pop())
    (out / INDEX_NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the split differs from what preprocess_dataset\.py wrote"):
        read_index(out / INDEX_NAME)


def test_a_patient_in_two_subsets_is_rejected(tmp_path: Path, write_msd: WriteRaw) -> None:
    raw, out = write_msd(tmp_path / "raw", 5), tmp_path / "out"
    preprocess(raw, out, "--dataset", "msd")
    content = json.loads((out / INDEX_NAME).read_text())
    del content["digest"]
    for case in (content["split"]["train"][0], content["split"]["evaluation"][0]):
        content["cases"][case]["patient"] = "Q"
    (out / INDEX_NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match="patient Q is in train and in evaluation; preprocess again"):
        read_index(out / INDEX_NAME)


def test_a_duplicate_scan_and_a_missing_class_cause_warnings(
    tmp_path: Path, write_msd: WriteRaw, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_msd(tmp_path / "raw", 5)
    for kind in ("imagesTr", "labelsTr"):
        for number in range(1, 5):
            shutil.copy(raw / kind / "scan_0.nii.gz", raw / kind / f"scan_{number}.nii.gz")
    content = json.loads((raw / "dataset.json").read_text())
    content["labels"]["3"] = "cyst"
    (raw / "dataset.json").write_text(json.dumps(content))
    preprocess(raw, tmp_path / "out", "--dataset", "msd")
    warned = capsys.readouterr().err.splitlines()
    (held_out,) = read_index(tmp_path / "out" / INDEX_NAME).split["evaluation"]
    assert any(line.startswith(f"warning: {held_out} (evaluation) is the same scan as scan_") for line in warned)
    assert warned[-1] == "warning: class 3 (cyst) is in no training case"


def test_scans_of_different_orientations_cause_a_warning(
    tmp_path: Path, write_msd: WriteRaw, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_msd(tmp_path / "raw", 5)
    for kind in ("imagesTr", "labelsTr"):
        path = raw / kind / "scan_1.nii.gz"
        nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj), np.diag([-2.0, 1.0, 1.0, 1.0])), path)
    preprocess(raw, tmp_path / "out", "--dataset", "msd")
    message = "warning: the scans have different orientations (4 RAS, 1 LAS); --orientation RAS unifies them\n"
    assert capsys.readouterr().err == message
    preprocess(raw, tmp_path / "out", "--dataset", "msd", "--orientation", "RAS")
    assert capsys.readouterr().err == ""


def test_labels_outside_the_foreground_crop_are_counted(
    tmp_path: Path, write_msd: WriteRaw, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = write_msd(tmp_path / "raw", 2), tmp_path / "out"
    image = np.zeros((8, 9, 10), F32)
    image[2:, 1:8, 2:9] = 1000
    label = np.zeros((8, 9, 10), np.uint8)
    label[1:4, 4, 4] = 1
    for name, array in (("imagesTr", image), ("labelsTr", label)):
        nib.save(nib.Nifti1Image(array, np.diag([2.0, 1.0, 1.0, 1.0])), raw / name / "scan_0.nii.gz")
    preprocess(raw, out, "--dataset", "msd", "--foreground_crop")
    assert "scan_0: shape (6, 7, 7), mean 0.00, std 0.00, 1 labelled voxels outside the" in capsys.readouterr().out
    assert np.load(out / "scan_0_y.npy").sum() == 2


@pytest.mark.real_data
def test_the_real_hippocampus_set_is_split_in_three(real_data: Callable[[str], Path]) -> None:
    flags = {"split_ratios": (0.6, 0.2, 0.2), "orientation": "SPL"}
    data = preprocess_dataset.read_raw("msd", real_data("hippocampus"), 0, flags)
    assert [len(cases) for cases in data.split.values()] == [120, 40, 40]
    assert len({case for cases in data.split.values() for case in cases}) == 200


@pytest.mark.real_data
def test_real_mri_scans_are_preprocessed(tmp_path: Path, real_data: Callable[[str], Path]) -> None:
    data = read_msd(real_data("hippocampus"), ReaderOptions())
    for raw in data.cases[:4]:
        case, record = writer.preprocess_case(raw, tmp_path, data.spec)
        x, y = (np.load(tmp_path / f"{case}_{kind}.npy") for kind in "xy")
        assert x.shape == y.shape == (1, *record.transform.shape)  # type: ignore[union-attr]
        assert abs(x.mean()) < 1e-4
        assert sorted(record.boxes) == [1, 2]
