"""Runs `preprocess_dataset.py` in process, for the tests of the readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from common.errors import run_program
from data_loading.index import INDEX_NAME, DatasetIndex, read_index
from preprocess_dataset import main


def preprocess(dataset: str, data: Path, masks: Path | None, out: Path, *more: object) -> DatasetIndex:
    """Preprocesses, with flags as strings of words or single values, and returns the index."""
    flags = [word for part in more for word in (part.split() if isinstance(part, str) else [str(part)])]
    arguments = ["--dataset", dataset, "--data_dir", data, "--results_dir", out, "--num_workers", 1]
    arguments += ["--labels_dir", masks] if masks else []
    assert main([*map(str, arguments), *flags]) == 0
    return read_index(out / INDEX_NAME)


def refused(capsys: pytest.CaptureFixture[str], dataset: str, data: Path, masks: Path | None, *flags: str) -> str:
    """Runs with bad input and returns the one-line error message."""
    capsys.readouterr()
    out = data.parent / "refused"
    status = run_program(lambda: int(bool(preprocess(dataset, data, masks, out, *flags))), "preprocess_dataset.py")
    output = capsys.readouterr().err
    assert (status, output.count("\n")) == (2, 1), output
    assert not (out / INDEX_NAME).exists()
    return output.removeprefix("preprocess_dataset.py: error: ").strip()


def arrays(out: Path, case: str) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    return np.load(out / f"{case}_x.npy"), np.load(out / f"{case}_y.npy")
