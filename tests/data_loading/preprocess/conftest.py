"""A raw KiTS19 folder and its preprocessed results."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data_loading.preprocess.program import (
    IDS,
    WriteRaw,
    preprocess,
)


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory, write_kits19: WriteRaw) -> Path:
    folder = write_kits19(tmp_path_factory.mktemp("raw"), [*IDS, 210])
    # KiTS19 has no masks for 210 and above.
    (folder / "case_00210" / "segmentation.nii.gz").unlink()
    return folder


@pytest.fixture(scope="session")
def done(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw`, preprocessed; must not be changed."""
    folder = tmp_path_factory.mktemp("results") / "new" / "data"
    preprocess(raw, folder)
    return folder


@pytest.fixture
def copy(raw: Path, done: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """(raw, results) that may be changed, with the original file times."""
    shutil.copytree(raw, tmp_path / "raw")
    shutil.copytree(done, tmp_path / "out")
    yield tmp_path / "raw", tmp_path / "out"
    shutil.rmtree(tmp_path / "out")
