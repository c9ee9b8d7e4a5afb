"""Files of the previous version still open and give the same numbers: a data set, a checkpoint, logs, pseudo-labels.

`tests/previous_version/README.md` says how they were made; `expected.json` holds what the code of that time returned
from the functions below. Every test works on a copy: a resumed run writes beside the old files.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import main as program
import preprocess_dataset
from data_loading.dataset import pseudo_label_cap, read_case
from data_loading.index import INDEX_NAME, read_index
from data_loading.integrity import check_files, verify_changed
from data_loading.sampler import PseudoLabelCap
from report.records import read_run
from runtime.checkpoint.format import load

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "tests" / "previous_version"
# Sums of floats differ in their last digits from one kind of CPU to another. Scores are printed with six digits.
TOLERANCE = 1e-5

CHECKPOINT = ("--load_ckpt_path", "run/checkpoint.pth")
EVALUATE = ("--exec_mode", "evaluate", "--data_dir", "data", *CHECKPOINT, "--log_dir", "scores")
REPORT = ("--exec_mode", "report", "--log_dir")
# The command that wrote `run`, which SIGTERM ended in the eleventh epoch: with the old spellings of its flags.
TRAIN = (
    *("--data_dir", "data", "--log_dir", "run", "--model", "unet3d(filters=(3,6))", "--activation", "leaky_relu"),
    *("--input_shape", "12", "12", "12", "--val_input_shape", "12", "12", "12", "--val_batch_size", "2"),
    *("--batch_size", "2", "--steps_per_epoch", "20", "--epochs", "12", "--start_eval_at", "4"),
    *("--evaluate_every", "2", "--quality_threshold", "0.999", "--learning_rate", "0.3", "--momentum", "0.8"),
    *("--weight_decay", "1e-5", "--lr_warmup_epochs", "2", "--lr_schedule", "plateau(factor=0.5, patience=0)"),
    *("--callbacks", "early_stopping(patience=6)", "top_k(k=1)", "rate_monitor(every=5)", "training_dice"),
    *("--augment", "mlperf(flips='HW')", 'flips(p=0.5, axes="D")', "mixup(alpha=0.2)", "--untimed_steps", "2"),
    *("--ckpt_every", "2e", "--ckpt_keep", "1", "--oversampling", "0.5", "--num_workers", "0", "--seed", "5"),
    "--no_report",
)
Facts = dict[str, Any]


def opened(data: Path) -> Facts:
    """What a preprocessed folder holds."""
    index = read_index(data / INDEX_NAME)
    spec = index.spec
    cases = {}
    for case, record in index.cases.items():
        image, label = read_case(data, case)
        assert record.transform is not None
        cases[case] = {
            "image shape": list(image.shape),
            "image sum": float(image.sum(dtype=np.float64)),
            "voxels of each class": np.bincount(label.ravel()).tolist(),
            "boxes": {str(value): [list(box) for box in boxes] for value, boxes in record.boxes.items()},
            "scan's shape": list(record.transform.source.shape),
            "crop": list(record.transform.crop or ()),
            "spacing": list(record.transform.spacing_mm),
        }
    return {
        "name": spec.name,
        "classes": list(spec.classes),
        "channels": spec.channels,
        "spacing": list(spec.spacing_mm or ()),
        "window": list(spec.intensity_window or ()),
        "orientation": spec.orientation,
        "intensity": spec.intensity,
        "cut to the foreground": spec.foreground_crop,
        "split": index.split,
        "pseudo-labelled": index.pseudo_labels.cases if index.pseudo_labels else [],
        "threshold": index.pseudo_labels.threshold if index.pseudo_labels else None,
        "cases": cases,
    }


def loaded(path: Path) -> Facts:
    """Where a checkpoint stands, and the sum of each tensor in it."""
    checkpoint = load(path)
    assert checkpoint.optimizer is not None
    moments = checkpoint.optimizer["state"].values()
    return {
        "best epoch": checkpoint.best_epoch,
        "best Dice": checkpoint.best_dice,
        "epochs done": checkpoint.last_epoch,
        "batches of the next one": checkpoint.batch,
        "seed": checkpoint.seed,
        "best network": {name: float(tensor.double().sum()) for name, tensor in checkpoint.best.items()},
        "last network": {name: float(tensor.double().sum()) for name, tensor in checkpoint.last.items()},
        "momentum": [float(moment["momentum_buffer"].double().sum()) for moment in moments],
    }


def trained(logs: Path) -> Facts:
    """What a log folder records of a run, over all its resumed parts."""
    run = read_run(logs)
    return {
        "classes": run.classes,
        "seed": run.seeds["master"],
        "division": run.division,
        "parts": run.log_files,
        "end": run.reason,
        "loss": {str(epoch): found.loss for epoch, found in run.epochs.items()},
        "learning rate": {str(epoch): found.learning_rate for epoch, found in run.epochs.items()},
        "Dice": {str(epoch): found.dice for epoch, found in run.evaluations.items()},
        "Dice of training cases": {str(epoch): dice for epoch, dice in run.train_dice.items()},
    }


def segmented(mask: Path) -> Facts:
    """A mask's shape and its voxels of each class."""
    values = np.asarray(nib.load(mask).dataobj)
    return {"shape": list(values.shape), "voxels of each class": np.bincount(values.ravel()).tolist()}


def scores(printed: str) -> dict[str, float]:
    """The `name value` lines of an evaluation."""
    return {match[1]: float(match[2]) for match in re.finditer(r"^([\w ]+) ([-\d.e]+)$", printed, re.MULTILINE)}


def differences(found: Any, expected: Any, place: str = "") -> list[str]:
    """Where two nested structures differ; numbers may by the tolerance."""
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        return [text for key in found for text in differences(found[key], expected[key], f"{place}/{key}")]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [text for number, pair in pairs for text in differences(*pair, f"{place}/{number}")]
    if isinstance(found, float) and isinstance(expected, int | float):
        is_same = found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    else:
        is_same = found == expected
    return [] if is_same else [f"{place}: {found!r}, expected {expected!r}"]


def assert_as_expected(found: Facts, what: str) -> None:
    expected = json.loads((KEPT / "expected.json").read_text(encoding="utf-8"))
    assert differences(found, expected[what]) == []


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The expected numbers were computed so; and threads would wait for each other longer than such windows take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the old files, and the current folder: the paths in them are relative to it."""
    folder = tmp_path / "old"
    shutil.copytree(KEPT, folder)
    for case in (folder / "pseudo").glob("pseudo_*_y.npy"):  # only what differs from `data` is kept twice
        image = case.name.removeprefix("pseudo_").replace("_y", "_x")
        shutil.copy2(folder / "data" / image, folder / "pseudo" / f"pseudo_{image}")
    for file in (folder / "data").glob("case_*.npy"):
        shutil.copy2(file, folder / "pseudo" / file.name)
    monkeypatch.chdir(folder)
    return folder


def run_program(*arguments: str) -> None:
    """`main.py ARGUMENTS` in a process of its own, in the current folder."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_data_set_opens(old: Path) -> None:
    assert_as_expected(opened(old / "data"), "data")
    cases = sorted(read_index(old / "data" / INDEX_NAME).cases)
    verify_changed(old / "data", check_files(old / "data", cases).changed)
    assert preprocess_dataset.main(["--results_dir", "data", "--mode", "verify"]) == 0


def test_a_data_set_with_pseudo_labels_opens(old: Path) -> None:
    assert_as_expected(opened(old / "pseudo"), "pseudo")
    pseudo = read_index(old / "pseudo" / INDEX_NAME).pseudo_labels
    assert pseudo is not None
    assert pseudo.teacher == hashlib.sha256((old / "run" / "checkpoint.pth").read_bytes()).hexdigest()
    assert pseudo_label_cap(old / "pseudo") == PseudoLabelCap(count=3, max_share=0.25)
    cases = sorted(read_index(old / "pseudo" / INDEX_NAME).cases)
    verify_changed(old / "pseudo", check_files(old / "pseudo", cases).changed)


def test_a_checkpoint_opens(old: Path) -> None:
    assert_as_expected(loaded(old / "run" / "checkpoint.pth"), "checkpoint")


def test_a_checkpoint_scores_as_it_did(old: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert program.main([*EVALUATE]) == 0
    best = scores(capfd.readouterr().out)
    assert program.main([*EVALUATE, "--subset", "test", "--checkpoint", "last"]) == 0
    assert_as_expected({"best": best, "last, on the test subset": scores(capfd.readouterr().out)}, "scores")


def test_a_table_of_cases_is_as_it_was(old: Path) -> None:
    assert program.main([*EVALUATE]) == 0
    (now,), (then,) = (
        list(csv.DictReader((old / folder / "evaluation.csv").read_text(encoding="utf-8").splitlines()))
        for folder in ("scores", "run")
    )
    common = {name: value for name, value in then.items() if name in now}  # without MONAI there are no distances
    assert {"case", "subset", "mean_dice", "bright_dice", "brighter_volume_ml"} <= common.keys()
    assert {name: now[name] for name in common} == common


def test_a_scan_is_predicted_as_it_was(old: Path) -> None:
    arguments = ["--exec_mode", "predict", *CHECKPOINT, "--scan", "scan.nii.gz", "--output", "again/mask.nii.gz"]
    assert program.main(arguments) == 0
    assert_as_expected(segmented(old / "again" / "mask.nii.gz"), "prediction")
    now, then = (nib.load(old / folder / "mask.nii.gz") for folder in ("again", "prediction"))
    assert np.array_equal(np.asarray(now.dataobj), np.asarray(then.dataobj))
    assert np.array_equal(now.affine, then.affine)
    table = "mask_volumes.csv"
    assert (old / "again" / table).read_bytes() == (old / "prediction" / table).read_bytes()


def test_an_interrupted_run_goes_on_to_the_same_numbers(old: Path) -> None:
    """From the middle of an epoch, with momentum, the schedule's rate and the list of the best checkpoints."""
    run_program(*TRAIN, "--resume")
    assert_as_expected(trained(old / "run"), "resumed logs")
    assert_as_expected(loaded(old / "run" / "checkpoint.pth"), "resumed checkpoint")
    # The new best one took the place of the one in the list: only a run's own files are deleted.
    assert sorted(file.name for file in (old / "run" / "top").iterdir()) == ["epoch_00012_0.6907.pth", "last.pth"]
    then, now = ((old / "run" / name).read_text(encoding="utf-8") for name in ("rates.1.csv", "rates.csv"))
    assert then == (KEPT / "run" / "rates.csv").read_text(encoding="utf-8")
    assert now.splitlines()[0] == then.splitlines()[0]
    assert program.main([*REPORT, "run", "--data_dir", "data"]) == 0  # a page of both parts
    assert "0.6907" in (old / "run" / "report.html").read_text(encoding="utf-8")


def test_early_stopping_remembers_its_count(old: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The last evaluation before the checkpoint brought no progress: with a patience of one the run ends at once."""
    patient = "early_stopping(patience=6)"
    program.main([*(("early_stopping(patience=1)" if flag == patient else flag) for flag in TRAIN), "--resume"])
    reason = "no progress in 1 evaluation; the best mean_dice: 0.6586 at epoch 8"
    assert reason in capfd.readouterr().out


def test_a_page_is_made_of_old_logs(old: Path) -> None:
    assert_as_expected(trained(old / "run"), "logs")
    assert program.main([*REPORT, "run", "--data_dir", "data"]) == 0
    page = (old / "run" / "report.html").read_text(encoding="utf-8")
    for text in ("interrupted by SIGTERM", "0.6586", "bright", "case_0"):
        assert text in page
    assert_as_expected({"pictures": sorted(file.name for file in (old / "run" / "report").iterdir())}, "report")


def test_old_logs_are_compared(old: Path) -> None:
    assert program.main([*REPORT, "run", "benchmark"]) == 0
    page = (old / "run" / "comparison.html").read_text(encoding="utf-8")
    for text in (">run<", ">benchmark<", "0.6586"):
        assert text in page


def test_an_old_benchmark_is_reported(old: Path) -> None:
    measured = json.loads((old / "benchmark" / "benchmark.json").read_text(encoding="utf-8"))
    assert read_run(old / "benchmark").benchmark == measured
    assert program.main([*REPORT, "benchmark"]) == 0
    assert measured["verdict"] in (old / "benchmark" / "report.html").read_text(encoding="utf-8")
