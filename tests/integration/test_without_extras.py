"""Law 3: with every extras/ folder deleted the benchmark still trains, evaluates and logs, and says what is gone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import PROJECT, TINY

pytestmark = pytest.mark.integration

LEFT_OUT = shutil.ignore_patterns("extras", "tests", "benchmarks", ".*", "__pycache__", "demo", "docs")


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without its extras."""
    copy = tmp_path_factory.mktemp("core") / "project"
    shutil.copytree(PROJECT, copy, ignore=LEFT_OUT)
    assert not list(copy.rglob("extras"))
    return copy


def run_core(core: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "main.py", *map(str, arguments)], cwd=core, capture_output=True, text=True, check=False,
        timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
    )  # fmt: skip


def test_a_run_trains_evaluates_and_logs(core: Path, balls: Path, tmp_path: Path) -> None:
    flags = [flag for flag in TINY if flag != "--no_report"]
    done = run_core(core, "--data_dir", balls, "--log_dir", tmp_path, *flags, "--epochs", 2, "--start_eval_at", 1)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "warning: no report.html: report.html: there is no module runtime.extras\n"
    assert {"unet3d.log", "log.jsonl", "run.json", "checkpoint.pth"} <= {file.name for file in tmp_path.iterdir()}
    scored = run_core(core, "--exec_mode", "evaluate", "--data_dir", balls, "--log_dir", tmp_path, "--load_ckpt_path",
                      tmp_path / "checkpoint.pth")  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    assert "mean_dice" in scored.stdout
    assert scored.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("--exec_mode", "predict", "--load_ckpt_path", "c.pth", "--scan", "s.nii", "--output", "o.nii"),
        ("--lr_schedule", "plateau"),
    ],
)
def test_what_is_gone_is_one_line(core: Path, balls: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run_core(core, "--data_dir", balls, "--log_dir", tmp_path, *TINY, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "there is no module runtime.extras" in line
