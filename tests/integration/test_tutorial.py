"""Runs all cells of `docs/tutorial.ipynb` on a data set that a tiny network learns in seconds."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.integration.conftest import PROJECT, TINY

pytestmark = pytest.mark.integration


def test_the_notebook_runs_to_its_end(balls_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-dev.txt")
    nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")
    pytest.importorskip("torchio", reason="pip install '.[torchio]'")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(PROJECT / "docs" / "tutorial.ipynb", as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    # Replaces the recipe's network, windows and length.
    more = [str(flag) for flag in TINY if flag != "--no_report"]
    more += ["--batch_size", "2", "--steps_per_epoch", "6", "--epochs", "10", "--start_eval_at", "8"]
    parameters.source = f"RAW, WORK, MORE = {str(balls_raw)!r}, {str(tmp_path)!r}, {more!r}"
    resources = {"metadata": {"path": str(PROJECT / "docs")}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    outputs = notebook.cells[-1].outputs
    printed = "".join(output.get("text", "") for output in outputs)
    assert float(printed.split()[-1]) > 0.6
    assert any("image/png" in output.get("data", {}) for output in outputs), "the overlay is missing"
    with (tmp_path / "tuned" / "evaluation.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 3
    assert (tmp_path / "logs" / "top" / "last.pth").is_file()
