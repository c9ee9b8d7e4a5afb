"""Exported networks, used where neither this project nor torch can be imported, score as `evaluate` does."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_loading.dataset import case_file
from tests.integration.conftest import Program

# Precedes a program that runs without torch and this project, in an interpreter that ignores its environment (-I).
ISOLATED = """
import runpy, sys
site, sys.argv = sys.argv[1], sys.argv[2:]
sys.path.append(site)
sys.modules.update(dict.fromkeys(["torch", "monai"]))
"""
# Scores preprocessed cases with the example's own functions; prints each case's Dice per class.
SCORE = """
import json, numpy as np
from pathlib import Path
folder, network, *cases = sys.argv
sys.path.insert(0, str(Path(network).parent))
from predict_onnx import load_network, sliding_window
predictor, settings = load_network(Path(network))
for case in cases:
    image, label = (np.load(Path(folder, f"{case}_{kind}.npy")) for kind in "xy")
    mask = sliding_window(image, predictor, settings).argmax(0)
    pairs = [(mask == value, label[0] == value) for value in range(1, len(settings["classes"]))]
    dice = [(2 * (p & t).sum() + 1e-6) / (p.sum() + t.sum() + 1e-6) for p, t in pairs]
    print(case, json.dumps(list(map(float, dice))))
"""
RUN = "runpy.run_path(sys.argv[0], run_name='__main__')"


def isolated(program: str, *arguments: object, folder: Path) -> str:
    site = Path(pytest.importorskip("onnxruntime").__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ISOLATED + program, str(site), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def exported(program: Program, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with NET.onnx and the bundle of a trained network."""
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("exported")
    for name in ("NET.onnx", "bundle"):
        loaded = ("--load_ckpt_path", trained / "checkpoint.pth", "--output", folder / name)
        program("--exec_mode", "export", *loaded)
    return folder


@pytest.fixture(scope="module")
def masks(program: Program, trained: Path, unseen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the masks that this project predicts."""
    folder = tmp_path_factory.mktemp("masks")
    loaded = ("--load_ckpt_path", trained / "checkpoint.pth", "--scan", unseen, "--output", folder)
    program("--exec_mode", "predict", *loaded)
    return folder


@pytest.fixture(scope="module")
def unseen(balls: Path, balls_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the raw scans of the evaluation cases."""
    folder = tmp_path_factory.mktemp("unseen")
    for case in json.loads((balls / "dataset.json").read_text())["split"]["evaluation"]:
        (folder / f"{case}.nii.gz").write_bytes((balls_raw / "imagesTr" / f"{case}.nii.gz").read_bytes())
    return folder


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def test_onnx_scores_as_the_evaluation_does(
    program: Program, balls: Path, trained: Path, exported: Path, tmp_path: Path
) -> None:
    loaded = ("--data_dir", balls, "--load_ckpt_path", trained / "checkpoint.pth", "--log_dir", tmp_path)
    program("--exec_mode", "evaluate", *loaded)
    with (tmp_path / "evaluation.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    cases = [row["case"] for row in rows]
    assert case_file(balls, cases[0], "x").name == f"{cases[0]}_x.npy"
    printed = isolated(SCORE, balls, exported / "NET.onnx", *cases, folder=tmp_path)
    for row, line in zip(rows, printed.splitlines(), strict=True):
        case, _, dice = line.partition(" ")
        assert case == row["case"]
        # The table has six significant digits.
        assert json.loads(dice) == pytest.approx([float(row["bright_dice"]), float(row["brighter_dice"])], abs=1e-5)


def test_the_example_makes_the_masks_of_this_project(exported: Path, masks: Path, unseen: Path, tmp_path: Path) -> None:
    for scan in unseen.iterdir():
        isolated(RUN, exported / "predict_onnx.py", exported / "NET.onnx", scan, tmp_path / scan.name, folder=tmp_path)
        ours, theirs = voxels(masks / scan.name), voxels(tmp_path / scan.name)
        assert np.count_nonzero(ours != theirs) <= 2
        assert ours.any()
        np.testing.assert_array_equal(nib.load(tmp_path / scan.name).affine, nib.load(scan).affine)


def test_monai_makes_the_masks_of_this_project_and_names_a_damaged_scan(
    exported: Path, masks: Path, unseen: Path, tmp_path: Path
) -> None:
    pytest.importorskip("monai")
    pytest.importorskip("fire", reason="monai.bundle's command line needs it")
    config = exported / "bundle" / "configs" / "inference.json"
    scans = Path(shutil.copytree(unseen, tmp_path / "scans"))
    (scans / "a_damaged.nii.gz").write_bytes(b"no scan")  # the first by name
    folders = ("--dataset_dir", str(scans), "--output_dir", str(tmp_path / "masks"))
    done = subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(config), *folders],
        cwd=tmp_path,  # this project cannot be imported there
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": outside(os.environ.get("PYTHONPATH", ""))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert f"1 of {len(list(scans.iterdir()))} scan(s) have no mask: {scans / 'a_damaged.nii.gz'}: " in done.stderr
    for scan in unseen.iterdir():
        assert np.count_nonzero(voxels(masks / scan.name) != voxels(tmp_path / "masks" / scan.name)) <= 2


def outside(search_path: str) -> str:
    """Returns a search path without this project's folder."""
    project = Path(__file__).resolve().parents[2]
    return os.pathsep.join(folder for folder in search_path.split(os.pathsep) if folder and Path(folder) != project)
