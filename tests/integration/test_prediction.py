"""Prediction of unseen scans, NIfTI and DICOM: masks in the scans' own geometry, with the scores of an evaluation."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data_loading.io.volume import Geometry, read_nifti
from tests.integration.conftest import TINY, Program


def dice(one: NDArray[np.uint8], other: NDArray[np.uint8], value: int) -> float:
    both = np.count_nonzero((one == value) & (other == value))
    return 2 * both / (np.count_nonzero(one == value) + np.count_nonzero(other == value))


@pytest.fixture(scope="module")
def unseen(balls: Path, balls_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the raw scans of the evaluation cases."""
    folder = tmp_path_factory.mktemp("unseen")
    for case in json.loads((balls / "dataset.json").read_text())["split"]["evaluation"]:
        shutil.copy(balls_raw / "imagesTr" / f"{case}.nii.gz", folder)
    return folder


@pytest.fixture(scope="module")
def scores(
    program: Program, balls: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """The rows that `evaluate` writes, one per case."""
    logs = tmp_path_factory.mktemp("scores")
    arguments = ("--data_dir", balls, "--load_ckpt_path", trained / "checkpoint.pth", "--log_dir", logs)
    program("--exec_mode", "evaluate", *arguments)
    with (logs / "evaluation.csv").open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def predicted(program: Program, trained: Path, unseen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("predicted") / "deep" / "out"
    predict(program, trained, unseen, output)
    return output


def predict(program: Program, trained: Path, scan: Path, output: Path, *more: object, ranks: int = 1) -> str:
    arguments = ("--load_ckpt_path", trained / "checkpoint.pth", "--scan", scan, "--output", output, *more)
    return program("--exec_mode", "predict", *arguments, ranks=ranks).stdout


def test_the_table_has_the_worst_case_first(scores: list[dict[str, str]]) -> None:
    means = [float(row["mean_dice"]) for row in scores]
    assert means == sorted(means)
    assert len(means) == 3
    for row in scores:
        assert float(row["mean_dice"]) == pytest.approx((float(row["bright_dice"]) + float(row["brighter_dice"])) / 2)
        assert float(row["bright_true_volume_ml"]) > 0


def test_masks_of_unseen_scans_have_the_scores_of_the_evaluation(
    predicted: Path, scores: list[dict[str, str]], unseen: Path, balls_raw: Path
) -> None:
    for row in scores:
        mask, scan = (nib.load(folder / f"{row['case']}.nii.gz") for folder in (predicted, unseen))
        assert mask.shape == scan.shape
        np.testing.assert_allclose(mask.affine, scan.affine, atol=1e-4)
        truth = read_nifti(balls_raw / "labelsTr" / f"{row['case']}.nii.gz", np.uint8).array[0]
        for value, name in ((1, "bright"), (2, "brighter")):
            assert dice(np.asarray(mask.dataobj), truth, value) == pytest.approx(float(row[f"{name}_dice"]), abs=0.01)
    assert sorted(file.name for file in predicted.iterdir()) == sorted(
        [file.name for file in unseen.iterdir()] + ["volumes.csv"]
    )


def test_volumes_are_printed_and_written(program: Program, trained: Path, unseen: Path, tmp_path: Path) -> None:
    scan = min(unseen.iterdir())
    printed = predict(program, trained, scan, tmp_path / "mask.nii.gz")
    with (tmp_path / "mask_volumes.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    mask = np.asarray(nib.load(tmp_path / "mask.nii.gz").dataobj)
    assert [row["name"] for row in rows] == ["bright", "brighter"]
    for row, line in zip(rows, printed.splitlines(), strict=True):
        assert int(row["voxels"]) == np.count_nonzero(mask == int(row["label"]))
        assert line.startswith(f"{row['scan']} {row['name']} {float(row['volume_ml']):.3f} ml {row['components']} ")


def test_ranks_share_a_folder(program: Program, trained: Path, unseen: Path, predicted: Path, tmp_path: Path) -> None:
    predict(program, trained, unseen, tmp_path / "out", ranks=2)
    for file in predicted.iterdir():
        if file.suffix == ".csv":
            assert (tmp_path / "out" / file.name).read_text() == file.read_text()
        else:
            np.testing.assert_array_equal(
                np.asarray(nib.load(tmp_path / "out" / file.name).dataobj), np.asarray(nib.load(file).dataobj)
            )


def test_a_scan_in_another_orientation_has_the_same_mask(
    program: Program, trained: Path, unseen: Path, predicted: Path, tmp_path: Path
) -> None:
    scan = min(unseen.iterdir())
    image = nib.load(scan)
    change = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple("IPL"))
    )
    nib.save(image.as_reoriented(change), tmp_path / "turned.nii.gz")
    predict(program, trained, tmp_path / "turned.nii.gz", tmp_path / "out")
    mask = nib.load(tmp_path / "out" / "turned.nii.gz")
    assert nib.aff2axcodes(mask.affine) == tuple("IPL")
    back = mask.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(mask.affine), [[0, 1], [1, 1], [2, 1]])
    )
    np.testing.assert_array_equal(np.asarray(back.dataobj), np.asarray(nib.load(predicted / scan.name).dataobj))


def test_dicom_series_give_the_masks_of_their_scans(
    program: Program, trained: Path, unseen: Path, predicted: Path, tmp_path: Path
) -> None:
    """NIfTI masks are compared by affine, DICOM-SEG by the slices that they refer to."""
    hd = pytest.importorskip("highdicom", reason="pip install '.[dicom]'")
    from data_loading.io import dicom
    from tests.data_loading.io.series import write_series

    for number, scan in enumerate(sorted(unseen.iterdir())[:2], start=1):
        volume = read_nifti(scan, np.float32)
        # Scanners store integers.
        geometry = Geometry(volume.geometry.affine, volume.geometry.shape, volume.geometry.spacing_mm)
        write_series(tmp_path / "in" / scan.name, np.rint(volume.array[0]).astype(np.int16), geometry, number=number)
        nib.save(nib.Nifti1Image(np.rint(volume.array[0]), geometry.affine), tmp_path / f"{number}.nii")
        predict(program, trained, tmp_path / f"{number}.nii", tmp_path / f"expected_{number}.nii")
    refused = program(
        *("--exec_mode", "predict", "--load_ckpt_path", trained / "checkpoint.pth", "--scan", tmp_path / "in"),
        *("--output", tmp_path / "out.nii"),
        ok=False,
    )
    assert refused.returncode == 2
    assert "holds 2 series; choose one with --series, or use --series all: 1 (synthetic," in refused.stderr
    predict(program, trained, tmp_path / "in", tmp_path / "out", "--series", "all")
    for number in (1, 2):
        expected = nib.load(tmp_path / f"expected_{number}.nii")
        mask = nib.load(tmp_path / "out" / f"series_{number}.nii.gz")
        to_mask = np.linalg.inv(mask.affine) @ expected.affine
        index = np.indices(expected.shape).reshape(3, -1)
        indices = np.rint(to_mask[:3, :3] @ index + to_mask[:3, 3:]).astype(int)
        np.testing.assert_array_equal(np.asarray(mask.dataobj)[tuple(indices)], np.asarray(expected.dataobj).ravel())
        assert np.count_nonzero(np.asarray(mask.dataobj)) > 50
    predict(program, trained, tmp_path / "in", tmp_path / "seg.dcm", "--series", "2")
    segmentation = hd.seg.segread(tmp_path / "seg.dcm")
    headers, geometry = dicom.sorted_headers(dicom.find_series(tmp_path / "in")[1])
    frames = segmentation.get_pixels_by_source_instance(
        [header.SOPInstanceUID for header in headers], combine_segments=True
    )
    mask = np.asarray(nib.load(tmp_path / "out" / "series_2.nii.gz").dataobj)
    np.testing.assert_array_equal(frames.transpose(2, 1, 0), mask)


def test_an_ensemble_with_flips_within_a_memory_limit(
    program: Program, balls: Path, trained: Path, unseen: Path, predicted: Path, tmp_path: Path
) -> None:
    """The mean with a second network of another width, over flips, within a memory limit."""
    other = tmp_path / "other"
    program("--data_dir", balls, "--log_dir", other, *TINY, "--model", "unet3d(filters=(2,4))", "--epochs", 2)
    arguments = ("--load_ckpt_path", trained / "checkpoint.pth", other / "checkpoint.pth", "--checkpoint", "last")
    program(
        *("--exec_mode", "predict", *arguments, "--scan", unseen, "--output", tmp_path / "out"),
        *("--test_time_flips", "HW", "--save_probabilities", "--max_memory_gb", 3),
    )
    for scan in unseen.iterdir():
        name = scan.name.removesuffix(".nii.gz")
        mask = np.asarray(nib.load(tmp_path / "out" / scan.name).dataobj)
        probabilities = np.asarray(nib.load(tmp_path / "out" / f"{name}_probabilities.nii.gz").dataobj)
        np.testing.assert_array_equal(probabilities.argmax(-1), mask)
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)


@pytest.fixture
def damaged(unseen: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(unseen, folder)
    first = min(folder.iterdir())
    first.write_bytes(first.read_bytes()[:200])
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_scan_leaves_the_others_predicted(
    program: Program, trained: Path, damaged: Path, tmp_path: Path, ranks: int
) -> None:
    arguments = ("--load_ckpt_path", trained / "checkpoint.pth", "--scan", damaged, "--output", tmp_path / "out")
    done = program("--exec_mode", "predict", *arguments, ranks=ranks, ok=False)
    assert done.returncode != 0
    assert "1 of 3 scans could not be predicted, for the reasons above" in done.stderr
    assert str(min(damaged.iterdir())) in done.stderr
    assert "UserError" not in done.stderr, "one line without a traceback (apart from torchrun's own)"
    assert len(list((tmp_path / "out").iterdir())) == 3, "two masks and the table"


def test_the_only_scan_s_error_is_printed_once(program: Program, trained: Path, damaged: Path, tmp_path: Path) -> None:
    arguments = ("--load_ckpt_path", trained / "checkpoint.pth", "--scan", min(damaged.iterdir()))
    done = program("--exec_mode", "predict", *arguments, "--output", tmp_path / "m.nii", ok=False)
    assert (done.returncode, done.stderr.count(str(min(damaged.iterdir())))) == (2, 1)


def test_a_checkpoint_of_an_earlier_version_asks_for_its_folder(
    program: Program, balls: Path, trained: Path, unseen: Path, tmp_path: Path
) -> None:
    from runtime.checkpoint.writer import save

    content = torch.load(trained / "checkpoint.pth", weights_only=True)
    del content["spec"]
    save(tmp_path / "old.pth", content)
    arguments = ("--exec_mode", "predict", "--load_ckpt_path", tmp_path / "old.pth", "--scan", min(unseen.iterdir()))
    done = program(*arguments, "--output", tmp_path / "m.nii", ok=False)
    assert done.returncode == 2
    assert "does not hold its data set's constants" in done.stderr
    program(*arguments, "--output", tmp_path / "m.nii", "--data_dir", balls)
    assert (tmp_path / "m.nii").is_file()
