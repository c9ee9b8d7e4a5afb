"""Trains, evaluates, logs and predicts NIfTI with every optional package blocked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.integration.conftest import PROJECT, TINY, events_of
from tests.test_laws import OPTIONAL

# Runs main.py where an import of an optional package fails, and a search for it finds nothing, as if it were not
# installed: torch looks for onnx.
BLOCKED_MAIN = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({sorted(OPTIONAL)}))
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
"""


def run(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_MAIN, *map(str, arguments)],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_benchmark_needs_no_optional_package(balls: Path, balls_raw: Path, tmp_path: Path) -> None:
    logs, mask = tmp_path / "logs", tmp_path / "mask.nii.gz"
    trained = ("--data_dir", balls, "--log_dir", logs, "--load_ckpt_path", logs / "checkpoint.pth")
    run(
        *("--data_dir", balls, "--log_dir", logs, *TINY, "--epochs", 40, "--start_eval_at", 20),
        *("--evaluate_every", 20, "--quality_threshold", 0.99),
    )
    assert events_of(logs, "EvaluationStopped")
    assert (logs / "unet3d.log").stat().st_size > 0
    assert "mean_dice" in run("--exec_mode", "evaluate", *trained)
    scan = next((balls_raw / "imagesTr").glob("*.nii.gz"))
    run("--exec_mode", "predict", *trained[4:], "--scan", scan, "--output", mask)
    assert mask.exists()
