"""Runs all cells of `docs/tutorial.ipynb` on a data set that a tiny network learns in seconds."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import programs
from tests.integration.conftest import PROJECT, TINY

NOTEBOOK = PROJECT / "docs" / "tutorial.ipynb"


def parameters(raw: Path, work: Path) -> str:
    """Returns the cell of parameters, with a smaller network, windows and length than the recipe's."""
    more = [str(flag) for flag in TINY if flag != "--no_report"]
    more += ["--batch_size", "2", "--steps_per_epoch", "6", "--epochs", "10", "--start_eval_at", "8"]
    return f"RAW, WORK, MORE = {str(raw)!r}, {str(work)!r}, {more!r}"


def test_the_cells_run_one_after_the_other(
    balls_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, without a kernel: the programs too, and drawings are not shown."""
    pytest.importorskip("torchio", reason="pip install '.[torchio]'")
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="pip install '.[report]'")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(PROJECT / "docs")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    namespace: dict[str, Any] = {}
    for cell in cells:
        is_parameters = "parameters" in cell["metadata"].get("tags", [])
        exec(parameters(balls_raw, tmp_path) if is_parameters else "".join(cell["source"]), namespace)
        if "subprocess" in namespace:
            namespace["subprocess"] = SimpleNamespace(run=lambda command, **_: programs.call(*command[1:]))
    assert len(pyplot.get_fignums()) == 2  # the last cell draws on the figure before it
    pyplot.close("all")
    assert float(capsys.readouterr().out.split()[-1]) > 0.6
    assert (tmp_path / "mask.nii.gz").exists()
    assert (tmp_path / "tuned" / "evaluation.csv").exists()


@pytest.mark.slow
def test_the_notebook_runs_to_its_end(balls_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-dev.txt")
    nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-dev.txt")
    pytest.importorskip("torchio", reason="pip install '.[torchio]'")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    cell.source = parameters(balls_raw, tmp_path)
    resources = {"metadata": {"path": str(PROJECT / "docs")}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    outputs = notebook.cells[-1].outputs
    printed = "".join(output.get("text", "") for output in outputs)
    assert float(printed.split()[-1]) > 0.6
    assert any("image/png" in output.get("data", {}) for output in outputs), "the overlay is missing"
    with (tmp_path / "tuned" / "evaluation.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 3
    assert (tmp_path / "logs" / "top" / "last.pth").is_file()
