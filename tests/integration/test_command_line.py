"""Programs answer --help, a wrong flag and a missing input at once: they parse first and import torch afterwards."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

RunPython = Callable[..., subprocess.CompletedProcess[str]]

# Runs each command line of sys.argv[1] in one interpreter; prints exit statuses, and whether torch was imported.
ANSWERS = """
import json, runpy, sys
found = []
for path, *arguments in json.loads(sys.argv[1]):
    sys.argv = [path, *arguments]
    try:
        run = runpy.run_path if path.endswith(".py") else runpy.run_module
        run(path, run_name="__main__")
    except SystemExit as ended:
        found.append(ended.code)
print("STATUSES", found, "torch" in sys.modules)
"""
PREDICT = ("--exec_mode", "predict", "--scan", "scan.nii", "--output", "mask.nii", "--load_ckpt_path", "/nowhere.pth")


@pytest.mark.parametrize(
    ("status", "commands"),
    [
        (
            0,
            [
                ["main.py", "--help"],
                ["preprocess_dataset.py", "--help"],
                ["demo.py", "--help"],
                *([name, "--help"] for name in ("prediction", "report", "submission", "benchmarks")),
            ],
        ),
        (
            2,
            [
                ["main.py", "--epoch", "3"],
                ["main.py", "--data_dir", "/nowhere"],
                ["main.py", *PREDICT],
                ["preprocess_dataset.py", "--data_dir", "/nowhere", "--results_dir", "/tmp/out"],
                ["prediction", *PREDICT[2:]],
                ["report"],
                ["submission", "score"],
                ["benchmarks", "--suite", "speed"],
            ],
        ),
    ],
    ids=["help", "mistakes"],
)
def test_programs_answer_before_importing_torch(run_python: RunPython, status: int, commands: list[list[str]]) -> None:
    done = run_python("-c", ANSWERS, json.dumps(commands))
    assert done.stdout.splitlines()[-1] == f"STATUSES {[status] * len(commands)} False", done.stderr
    assert done.stderr.count("\n") == (len(commands) if status else 0), "one line per mistake"


def test_a_run_leaves_no_file_open_and_raises_no_warning(run_python: RunPython, tmp_path: Path) -> None:
    shape = ("--input_shape", "8", "8", "8", "--model", "unet3d(filters=(2,4))", "--num_workers", "0")
    flags = ("--loader", "synthetic", *shape, "--log_dir", tmp_path, "--no_report")
    done = run_python("main.py", *flags, PYTHONWARNINGS="error")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].endswith(" s: there are no evaluation cases")
