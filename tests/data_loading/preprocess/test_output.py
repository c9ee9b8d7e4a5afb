"""Files that preprocess_dataset.py writes, messages, and options of KiTS19."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import preprocess_dataset
from data_loading.index import INDEX_NAME, read_index
from data_loading.io.volume import read_nifti
from data_loading.preprocessing import foreground_boxes, preprocess_image
from data_loading.readers.base import ReaderOptions
from data_loading.readers.kits19 import read_kits19
from data_loading.readers.msd import read_msd
from data_loading.spec import KITS19
from tests.data_loading.preprocess.program import (
    F32,
    IDS,
    RunPython,
    WriteRaw,
    contents,
    preprocess,
)
from tests.data_loading.source_grid import to_source_grid


def test_volumes_are_what_the_reference_computes(raw: Path, done: Path) -> None:
    for number in IDS:
        case = raw / f"case_{number:05d}"
        image = torch.from_numpy(np.asarray(nib.load(case / "imaging.nii.gz").dataobj, dtype=F32))[None, None]
        label = torch.from_numpy(np.asarray(nib.load(case / "segmentation.nii.gz").dataobj, dtype=np.uint8))[None, None]
        size = (int(3.0 / 1.6 * 10), int(1.5 / 1.2 * 12), int(2.0 / 1.2 * 14))
        image = F.interpolate(image, size=size, mode="trilinear", align_corners=True)[0]
        label = F.interpolate(label, size=size, mode="nearest")[0]
        normal = (np.clip(image.numpy(), F32(-79), F32(304)) - F32(101.0)) / F32(76.9)
        missing = [128 - n for n in size]
        padding = [(0, 0), *((n // 2, n - n // 2) for n in missing)]
        x, y = (np.load(done / f"case_{number:05d}_{kind}.npy") for kind in "xy")
        assert (x.dtype, y.dtype) == (F32, np.uint8)
        np.testing.assert_array_equal(x, np.pad(normal, padding, mode="edge"))
        np.testing.assert_array_equal(y, np.pad(label.numpy(), padding, mode="edge"))


def test_the_folder_holds_only_the_cases_and_their_index(done: Path) -> None:
    expected = [f"case_{number:05d}_{kind}.npy" for number in IDS for kind in "xy"]
    assert sorted(path.name for path in done.iterdir()) == [*expected, INDEX_NAME]


def test_the_index_holds_all_that_training_needs(raw: Path, done: Path) -> None:
    index = read_index(done / INDEX_NAME)
    assert index.spec == KITS19
    assert index.split == {"train": ["case_00001", "case_00002"], "evaluation": ["case_00000"]}
    assert list(index.cases) == [f"case_{number:05d}" for number in IDS]
    for case, record in index.cases.items():
        image = read_nifti(raw / case / "imaging.nii.gz", np.float32)
        x, y = (np.load(done / f"{case}_{kind}.npy") for kind in "xy")
        assert record.boxes == foreground_boxes(y, 3)
        assert sorted(record.boxes) == [1, 2]
        assert record.digests == {
            kind: hashlib.md5((done / f"{case}_{kind}.npy").read_bytes()).hexdigest() for kind in "xy"
        }
        assert record.statistics == pytest.approx({"mean": x.mean(dtype=float), "std": x.std(dtype=float)})
        assert record.source_stamp == [
            [(status := (raw / case / name).stat()).st_size, status.st_mtime_ns]
            for name in ("imaging.nii.gz", "segmentation.nii.gz")
        ]
        assert record.stamps == {
            kind: [(status := (done / f"{case}_{kind}.npy").stat()).st_size, status.st_mtime_ns] for kind in "xy"
        }
        transform = record.transform
        assert transform is not None
        np.testing.assert_array_equal(transform.source.affine, image.geometry.affine)
        assert (transform.source.shape, transform.source.spacing_mm) == ((10, 12, 14), (3.0, 1.5, 2.0))
        assert transform.resampled_shape == (18, 15, 23)
        assert transform.padding_before == (55, 56, 52)
        assert transform.shape == x.shape[1:] == (128, 128, 128)
        # The inverse transform needs only the index.
        np.testing.assert_array_equal(to_source_grid(x, transform), to_source_grid(*preprocess_image(image, KITS19)))


def test_every_case_has_a_line_and_the_medians_come_last(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocess(raw, tmp_path)
    output = capsys.readouterr()
    passed_over, *lines = output.out.splitlines()
    assert passed_over == "passed over 1 case, case_00210: KiTS19 publishes masks only below case_00210"
    statistics = [read_index(tmp_path / INDEX_NAME).cases[f"case_{number:05d}"].statistics for number in IDS]
    for number, line, one in zip(IDS, lines, statistics, strict=False):
        expected = f"shape (128, 128, 128), mean {one['mean']:.2f}, std {one['std']:.2f}"
        assert line == f"case_{number:05d}: {expected}"
    mean, deviation = (np.median([one[key] for one in statistics]) for key in ("mean", "std"))
    masks = [read_nifti(raw / f"case_{number:05d}" / "segmentation.nii.gz", np.uint8).array for number in IDS]
    counts = np.sum([np.bincount(mask.ravel()) for mask in masks], axis=0)
    listed = ", ".join(f"{name} {count} in 3 cases" for name, count in zip(KITS19.classes, counts, strict=True))
    assert lines[3:] == [
        f"voxels of the classes: {listed}",
        f"median shape (128, 128, 128), mean {mean:.2f}, std {deviation:.2f}",
        f"3 cases (3 now, 0 already done): 2 to train, 1 to evaluate, in {tmp_path}",
    ]
    assert output.err == ""


def test_two_workers_write_the_same_bytes(raw: Path, done: Path, tmp_path: Path, run_python: RunPython) -> None:
    # The process that hands out the cases spends no time on importing torch.
    program = "import sys; from preprocess_dataset import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    ran = run_python("-c", program, "--data_dir", raw, "--results_dir", tmp_path, "--num_workers", 2)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert contents(tmp_path) == contents(done)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("intensity_window", (-100.0, 300.0)),
        ("intensity", "zscore"),
        ("spacing", (2.0, 2.0, 2.0)),
        ("orientation", "IPL"),
        ("foreground_crop", True),
        ("labels", ("1,2=1",)),
        ("split_ratios", (0.5, 0.5)),
    ],
)
def test_kits19_with_a_flag_is_no_longer_kits19(raw: Path, flag: str, value: Any) -> None:
    data = preprocess_dataset.read_raw("kits19", raw, 0, {flag: value})
    assert data.spec.name == f"kits19 with other {flag}"
    assert preprocess_dataset.read_raw("kits19", raw, 0, {}).spec == KITS19
    # KiTS19's padding value does not hold for another window or normalisation.
    assert (data.spec.padding_value is None) == (flag in ("intensity_window", "intensity"))


def test_unlabelled_cases_are_not_preprocessed(raw: Path) -> None:
    # 210 and above have no masks; they are neither preprocessed nor reported as missing.
    assert (raw / "case_00210" / "imaging.nii.gz").exists()
    assert [case.case for case in read_kits19(raw, ReaderOptions(), []).cases] == [
        f"case_{number:05d}" for number in IDS
    ]


def test_every_reader_is_found_by_name() -> None:
    assert preprocess_dataset.find_reader("kits19") is read_kits19
    assert preprocess_dataset.find_reader("msd") is read_msd


def test_old_spellings_of_flags_give_the_same_folder(
    tmp_path: Path, write_msd: WriteRaw, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_msd(tmp_path / "raw", 5)
    old = "--split 0.6 0.2 0.2 --window 0 9 --intensity unit"
    new = "--split_ratios 0.6 0.2 0.2 --intensity_window 0 9 --intensity minmax"
    preprocess(raw, tmp_path / "new", "--dataset", "msd", *new.split())
    assert capsys.readouterr().err == ""
    preprocess(raw, tmp_path / "old", "--dataset", "msd", *old.split())
    pairs = [
        ("--split", "--split_ratios"),
        ("--window", "--intensity_window"),
        ("--intensity unit", "--intensity minmax"),
    ]
    ending = "; the old spelling will be removed in 0.3"
    assert capsys.readouterr().err.splitlines() == [f"warning: {a} is now {b}{ending}" for a, b in pairs]
    assert contents(tmp_path / "old") == contents(tmp_path / "new")
