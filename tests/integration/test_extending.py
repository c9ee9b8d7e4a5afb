"""Applies every addition of `docs/extending.md` to a copy of the project and uses it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.integration.conftest import PROJECT

FILE = re.compile(r"^A file, `(\S+)`:\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^A line in `(\w+)` of `(\S+)`:\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with everything that the document adds."""
    copy = tmp_path_factory.mktemp("extended") / "project"
    shutil.copytree(
        PROJECT, copy, ignore=shutil.ignore_patterns("tests", ".*", "__pycache__", "demo", "build", "*.png")
    )
    text = (PROJECT / "docs" / "extending.md").read_text(encoding="utf-8")
    files, lines = FILE.findall(text), LINE.findall(text)
    assert len(files) == len(lines) == 3
    for path, content in files:
        assert not (copy / path).exists()
        (copy / path).write_text(content, encoding="utf-8")
    for table, path, line in lines:
        assert len(line.splitlines()) == 1
        before = (copy / path).read_text(encoding="utf-8")
        after, count = re.subn(rf"^({table}: .* = {{\n)", rf"\1{line}", before, flags=re.MULTILINE)
        assert count == 1, f"{path} must have a table {table} with one entry per line"
        (copy / path).write_text(after, encoding="utf-8")
    return copy


def run(project: Path, *arguments: object, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
    )
    assert not ok or done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_the_documented_additions_work(extended: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "raw").mkdir()
    for number in range(5):
        label = rng.random((9, 10, 11)) < 0.3
        image = label * 5.0 + rng.normal(size=label.shape)
        np.savez(tmp_path / "raw" / f"patient_{number}.npz", image=image, label=label, spacing_mm=[2.0, 1.0, 1.0])
    data, logs = tmp_path / "data", tmp_path / "logs"
    preprocessed = run(
        extended,
        *("preprocess_dataset.py", "--dataset", "archives", "--data_dir", tmp_path / "raw", "--results_dir", data),
        *("--num_workers", 1, "--split_ratios", 0.6, 0.4),
    )
    assert "3 to train, 2 to evaluate" in preprocessed.stdout
    window = ("8", "8", "8")
    run(
        extended,
        *("main.py", "--data_dir", data, "--log_dir", logs, "--no_report"),
        *("--model", "pointwise(width=8)", "--input_shape", *window, "--val_input_shape", *window),
        *("--num_workers", 0, "--seed", 1, "--batch_size", 1, "--learning_rate", 0.3),
        *("--epochs", 30, "--start_eval_at", 30, "--trackers", "jsonl", "journal(file='dice.txt')"),
    )
    (line,) = (logs / "dice.txt").read_text().splitlines()
    assert line.startswith("epoch 30: ")
    assert float(line.split()[-1]) > 0.8, "the intensity alone identifies the class"
    again = run(
        extended,
        *("main.py", "--exec_mode", "evaluate", "--data_dir", data, "--log_dir", logs),
        *("--load_ckpt_path", logs / "checkpoint.pth"),
    )
    scored = dict(line.rsplit(" ", 1) for line in again.stdout.splitlines())
    assert float(scored["mean_dice"]) == pytest.approx(float(line.split()[-1]), abs=1e-4)


def test_an_unknown_name_lists_the_new_one(extended: Path, tmp_path: Path) -> None:
    done = run(extended, "main.py", "--loader", "synthetic", "--log_dir", tmp_path, "--model", "pontwise", ok=False)
    assert done.returncode == 2
    assert "available: pointwise, slicewise, unet3d" in done.stderr
