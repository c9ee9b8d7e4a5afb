"""What the tests of several rooms share: made-up scans, small data sets, programs as processes, the real scans.

Real scans lie in $REAL_DATA, or in a folder `data` of one of the project's neighbours. A test that needs them is marked
`real_data`, asks the fixture of that name for a folder, and skips where it is missing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from data_loading.dataset import case_file
from data_loading.index import INDEX_NAME, CaseRecord, DatasetIndex, write_json
from data_loading.preprocessing import foreground_boxes
from data_loading.spec import DatasetSpec

# A shell that starts the tests in the background has them ignore Ctrl-C, and every process they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
NEIGHBOURS = sorted(path.parent for path in ROOT.parent.glob("*/data/kits19_segmentations"))
REAL_DATA = Path(os.environ.get("REAL_DATA") or (NEIGHBOURS or [ROOT.parent / "data"])[0])

CLASSES = ("background", "kidney", "tumour")


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """A folder of the real data by its name; the test that asks for a missing one skips."""

    def folder(name: str) -> Path:
        path = REAL_DATA / name
        if not path.is_dir():
            pytest.skip(f"no real scans: {path} is missing; set REAL_DATA to the folder that holds {name}")
        return path

    return folder


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_python("main.py", "train", …)`: a program of the project as a process, from the project's folder."""

    def run(*arguments: object, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def write_scan() -> Callable[..., None]:
    """`write_scan(path, array, spacing_mm)`: any array as NIfTI, by nibabel alone; its folder is made."""

    def write(path: Path, array: NDArray[Any], spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.diag([*spacing_mm, 1.0])), path)

    return write


def two_kidneys(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Two blocks of class 1, and class 2 inside the first."""
    d, h, w = shape
    mask = np.zeros(shape, np.uint8)
    mask[d // 4 : d // 2, h // 4 : h // 2, 1 : w // 3] = 1
    mask[d // 4 : d // 2, h // 4 : h // 2, w // 2 : w - 1] = 1
    mask[d // 4 : d // 4 + 1, h // 4 : h // 3, 1 : w // 4] = 2
    return mask


@pytest.fixture(scope="session")
def write_kits19(write_scan: Callable[..., None]) -> Callable[..., Path]:
    """`write_kits19(folder, [0, 1])`: tiny patients in KiTS19's raw layout."""

    def write(folder: Path, ids: Sequence[int], shape: tuple[int, int, int] = (10, 12, 14)) -> Path:
        for number in ids:
            rng = np.random.default_rng(number)
            image = rng.normal(80, 150, shape).astype(np.int16)
            write_scan(folder / f"case_{number:05d}" / "imaging.nii.gz", image, (3.0, 1.5, 2.0))
            write_scan(folder / f"case_{number:05d}" / "segmentation.nii.gz", two_kidneys(shape), (3.0, 1.5, 2.0))
        return folder

    return write


@pytest.fixture(scope="session")
def write_msd(write_scan: Callable[..., None]) -> Callable[..., Path]:
    """`write_msd(folder, 5)`: tiny patients `scan_0` … in the Decathlon's layout; `modalities` above 1 makes 4-D."""

    def write(folder: Path, cases: int, modalities: int = 1) -> Path:
        pairs = []
        for number in range(cases):
            shape = (8, 9 + number, 10)
            image = np.random.default_rng(number).normal(300, 50, (*shape, modalities)).astype(np.float32)
            names = [f"{kind}/scan_{number}.nii.gz" for kind in ("imagesTr", "labelsTr")]
            write_scan(folder / names[0], image if modalities > 1 else image[..., 0], (2.0, 1.0, 1.0))
            write_scan(folder / names[1], two_kidneys(shape), (2.0, 1.0, 1.0))
            pairs.append({"image": f"./{names[0]}", "label": f"./{names[1]}"})
        content = {
            "name": "Scans",
            "modality": {str(channel): "MRI" for channel in range(modalities)},
            "labels": {str(value): name for value, name in enumerate(CLASSES)},
            "training": pairs,
        }
        (folder / "dataset.json").write_text(json.dumps(content))
        return folder

    return write


@pytest.fixture(scope="session")
def write_preprocessed() -> Callable[..., Path]:
    """`write_preprocessed(folder, {"case_00001": (image, label)})`: a folder to train from.

    Arrays are (C, D, H, W) and (1, D, H, W). With `index=False` it looks as the MLPerf reference leaves it, without
    `dataset.json`; else the first case is for evaluation when there are several.
    """

    def write(folder: Path, cases: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], index: bool = True) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        records = {}
        for case, (image, label) in cases.items():
            np.save(case_file(folder, case, "x"), image.astype(np.float32))
            np.save(case_file(folder, case, "y"), label.astype(np.uint8))
            boxes = foreground_boxes(label.astype(np.uint8), len(CLASSES))
            records[case] = CaseRecord(
                transform=None,
                boxes=boxes,
                digests={},
                source_stamp=[[0, 0], [0, 0]],
                statistics={"mean": 0.0, "std": 1.0},
            )
        if index:
            names = list(cases)
            held_out = names[:1] if len(names) > 1 else []
            split = {"train": [name for name in names if name not in held_out], "evaluation": held_out}
            write_json(
                folder / INDEX_NAME,
                DatasetIndex(spec=DatasetSpec(name="made_up", classes=CLASSES), split=split, cases=records).to_json(),
            )
        return folder

    return write
