"""Fixtures shared by the tests of several packages: synthetic scans, small data sets, child processes, real scans.

Real scans are in $REAL_DATA, or in a folder `data` of a project next to this one. Tests that need them are marked
`real_data`, request a folder from the fixture of that name, and are skipped if it is missing.
"""

from __future__ import annotations

import os

# Before numpy and torch start their threads: each of the parallel test processes has one core.
os.environ["OMP_NUM_THREADS"] = "1"

import fcntl
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from tests import programs
from tests.fake_gpu import FakeGpu, fake_gpu

# Restores Ctrl-C for the tests and their child processes: a shell makes programs in the background ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
NEIGHBOURS = sorted(path.parent for path in ROOT.parent.glob("*/data/kits19_segmentations"))
REAL_DATA = Path(os.environ.get("REAL_DATA") or (NEIGHBOURS or [ROOT.parent / "data"])[0])

CLASSES = ("background", "kidney", "tumour")


def pytest_configure(config: pytest.Config) -> None:
    """Passes the filters of warnings, with those of `-W`, on to the programs that tests start."""
    filters = [*config.getini("filterwarnings"), *(config.getoption("pythonwarnings") or [])]
    os.environ[programs.FILTERS_VARIABLE] = json.dumps(filters)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each module to one of the parallel test processes, which makes its fixtures once; the long ones first."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.path.parent.name not in ("faults", "integration"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """A stand-in for a GPU, active during the test."""
    with fake_gpu(monkeypatch) as gpu:
        yield gpu


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """`real_data(name)`: a folder of the real data; skips the test if it is missing."""

    def folder(name: str) -> Path:
        path = REAL_DATA / name
        if not path.is_dir():
            pytest.skip(f"no real scans: {path} is missing; set REAL_DATA to the folder that holds {name}")
        return path

    return folder


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`make_once("balls", write)`: a folder that `write` makes, shared by all parallel test processes; read only."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def make(name: str, write: Callable[[Path], None]) -> Path:
        made, is_made = folder / f"shared_{name}", folder / f"shared_{name}.made"
        with (folder / f"shared_{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_made.exists():
                shutil.rmtree(made, ignore_errors=True)  # of a process that failed
                write(made)
                is_made.touch()
        return made

    return make


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_python("main.py", …)`: runs a program in a new interpreter, for tests of how it starts and ends."""

    def run(*arguments: object, timeout_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            # Other packages warn of much else when they are imported.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::ResourceWarning", **environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert "ResourceWarning" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def write_scan() -> Callable[..., None]:
    """`write_scan(path, array, spacing_mm)`: writes any array as NIfTI with nibabel; creates the folder.

    `axes` has a column for the direction of each axis; None: those of space.
    """

    def write(
        path: Path,
        array: NDArray[Any],
        spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
        axes: Any = None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        affine = np.eye(4)
        affine[:3, :3] = (np.eye(3) if axes is None else np.asarray(axes)) * spacing_mm
        nib.save(nib.Nifti1Image(array, affine), path)

    return write


def two_kidneys(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Returns a mask with two blocks of class 1, and class 2 inside the first."""
    d, h, w = shape
    mask = np.zeros(shape, np.uint8)
    mask[d // 4 : d // 2, h // 4 : h // 2, 1 : w // 3] = 1
    mask[d // 4 : d // 2, h // 4 : h // 2, w // 2 : w - 1] = 1
    mask[d // 4 : d // 4 + 1, h // 4 : h // 3, 1 : w // 4] = 2
    return mask


@pytest.fixture(scope="session")
def write_kits19(write_scan: Callable[..., None]) -> Callable[..., Path]:
    """`write_kits19(folder, [0, 1])`: writes tiny cases in KiTS19's raw layout."""

    def write(folder: Path, ids: Sequence[int], shape: tuple[int, int, int] = (10, 12, 14)) -> Path:
        for number in ids:
            rng = np.random.default_rng(number)
            image = rng.normal(80, 150, shape).astype(np.int16)
            axes = [[0, 0, -1], [0, -1, 0], [-1, 0, 0]]  # KiTS19's: slices, rows, columns
            for name, array in (("imaging", image), ("segmentation", two_kidneys(shape))):
                write_scan(folder / f"case_{number:05d}" / f"{name}.nii.gz", array, (3.0, 1.5, 2.0), axes)
        return folder

    return write


@pytest.fixture(scope="session")
def write_msd(write_scan: Callable[..., None]) -> Callable[..., Path]:
    """`write_msd(folder, 5)`: writes tiny cases `scan_0` … in the Decathlon's layout; 4-D for several `modalities`."""

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
    """`write_preprocessed(folder, {"case_00001": (image, label)})`: writes a preprocessed folder.

    Arrays are (C, D, H, W) and (1, D, H, W). `index=False` omits `dataset.json`, as the MLPerf reference does;
    otherwise, the first of several cases is for evaluation.
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
                DatasetIndex(spec=DatasetSpec(name="synthetic", classes=CLASSES), split=split, cases=records).to_json(),
            )
        return folder

    return write
