"""From synthetic raw scans in KiTS19's layout to a log that MLPerf accepts, with the commands of the README."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model.registry import build_network
from tests import programs
from tests.integration.conftest import PROJECT, Program, events_of
from tests.integration.test_training import check_log, scores

# MLPerf evaluates cases 00000 and 00003 of these four. The small field of view is resampled to about 128^3 voxels.
PHANTOMS = ["--cases", "4", "--shape", "16", "20", "20", "--field_of_view", "205", "154", "154"]
NETWORK = ("--model", "unet3d(filters=(8,8,16))", "--input_shape", 32, 32, 32, "--layout", "NDHWC")
# KiTS19's volumes are padded to at least 128^3: whole windows are evaluated one at a time, without warming up first.
WINDOWS = ("--val_batch_size", 1, "--prewarm_steps", 0, "--no_report")
RUN = ("--num_workers", 0, "--seed", 3, "--learning_rate", 0.3, "--oversampling", 1, *WINDOWS)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preprocessed phantoms."""
    work = tmp_path_factory.mktemp("kits")
    made = programs.call("-m", "data_loading.phantom", "--results_dir", work / "raw", *PHANTOMS)
    assert made.returncode == 0, made.stderr
    arguments = ("--data_dir", work / "raw", "--results_dir", work / "data", "--num_workers", 1)
    done = programs.call("preprocess_dataset.py", *arguments)
    assert done.returncode == 0, done.stderr
    return work / "data"


@pytest.fixture(scope="module")
def run(program: Program, kits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    logs = tmp_path_factory.mktemp("kits_run")
    program(
        *("--data_dir", kits, "--log_dir", logs, "--save_ckpt_path", logs / "c.pth", *NETWORK, *RUN),
        *("--epochs", 8, "--start_eval_at", 8, "--evaluate_every", 1, "--batch_size", 1),
    )
    return logs


def test_the_run_learns_and_mlperf_accepts_the_log(run: Path) -> None:
    (evaluation,) = events_of(run, "EvaluationStopped")
    losses = [event["loss"] for event in events_of(run, "EpochStopped")]
    assert losses[-1] < losses[0]  # type: ignore[operator]
    assert set(evaluation["per_case"]) == {"case_00000", "case_00003"}  # type: ignore[call-overload]
    checked = check_log(run / "unet3d.log")
    assert checked.returncode == 0, checked.stderr


def test_the_keys_are_in_the_reference_s_order(run: Path) -> None:
    lines = (run / "unet3d.log").read_text().splitlines()
    keys = [json.loads(line.removeprefix(":::MLLOG "))["key"] for line in lines]
    once = list(dict.fromkeys(keys))
    assert once == [
        *("cache_clear", "init_start", "seed", "submission_benchmark", "submission_org", "submission_division"),
        *("submission_status", "submission_platform", "opt_name", "opt_base_learning_rate"),
        *("opt_learning_rate_warmup_epochs", "opt_learning_rate_decay_boundary_epochs"),
        *("opt_learning_rate_decay_factor", "opt_weight_decay", "opt_momentum", "oversampling"),
        *("training_input_shape", "validation_input_shape", "validation_overlap", "weights_initialization"),
        *("init_stop", "run_start", "train_samples", "eval_samples", "samples_per_epoch", "global_batch_size"),
        *("gradient_accumulation_steps", "block_start", "epoch_start", "epoch_stop", "eval_start", "eval_accuracy"),
        *("eval_stop", "block_stop", "run_stop"),
    ]


def test_a_folder_without_an_index_trains_identically(program: Program, kits: Path, tmp_path: Path) -> None:
    """The MLPerf reference's preprocessing writes only the volumes."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in kits.glob("*.npy"):
        (bare / path.name).symlink_to(path)
    losses = []
    for name, data in (("index", kits), ("bare", bare)):
        program("--data_dir", data, "--log_dir", tmp_path / name, *NETWORK, *RUN, "--epochs", 3, "--batch_size", 1)
        losses.append([event["loss"] for event in events_of(tmp_path / name, "EpochStopped")])
    assert losses[0] == losses[1]


def test_run_and_time_prints_the_result_line(kits: Path, tmp_path: Path) -> None:
    """With the seed that was drawn, and with paths from the current folder."""
    (tmp_path / "mine.args").write_text("--epochs 1\n--start_eval_at 1\n--quality_threshold 1e-6\n")
    arguments = [*map(str, (*NETWORK, *RUN[:2], *RUN[4:])), "@mine.args"]
    environment = {**os.environ, "DATA_DIR": os.path.relpath(kits, tmp_path), "LOG_DIR": ".", "PYTHON": sys.executable}
    done = subprocess.run(
        [str(PROJECT / "run_and_time.sh"), "-1", *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "unet3d.log").read_text()
    seed = re.search(r"^RESULT,image_segmentation,(\d+),\d+,\w+,", done.stdout, re.MULTILINE)
    assert seed is not None, done.stdout
    cleared = "page cache cleared" in done.stdout
    assert f'"key": "cache_clear", "value": {str(cleared).lower()}' in log
    assert f'"key": "seed", "value": {seed[1]}' in log


PROGRAM = """#!/usr/bin/env bash
# In place of Python: logs how the run ended, then waits for a signal if asked to.
trap 'echo saved; exit 143' TERM
echo '"key": "run_stop", "value": null, "metadata": {"status": "aborted"}' > "$LOG_DIR/unet3d.log"
if [ -n "${WAITS:-}" ]; then
  echo started
  while true; do sleep 0.02; done
fi
"""


def start_with_stand_in(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Starts run_and_time.sh with `PROGRAM` in place of Python."""
    stand_in = folder / "python"
    stand_in.write_text(PROGRAM)
    stand_in.chmod(0o755)
    paths = {"DATA_DIR": "data", "LOG_DIR": str(folder), "PYTHON": str(stand_in)}
    return subprocess.Popen(
        [str(PROJECT / "run_and_time.sh"), "3"],
        env={**os.environ, **paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_run_and_time_has_no_result_for_a_run_below_its_target(tmp_path: Path) -> None:
    with start_with_stand_in(tmp_path) as run:
        out, err = run.communicate(timeout=60)
    assert run.returncode == 0
    assert "RESULT" not in out
    assert err.endswith("the run ended below its target: no result\n")


def test_run_and_time_passes_a_signal_on_and_waits_for_the_run(tmp_path: Path) -> None:
    """`docker stop` and schedulers signal the script alone."""
    with start_with_stand_in(tmp_path, WAITS="1") as run:
        assert run.stdout is not None
        while run.stdout.readline() != "started\n":
            pass
        run.terminate()
        out, err = run.communicate(timeout=60)
    assert run.returncode == 143
    assert "saved\n" in out
    assert err.endswith("the run failed with exit status 143: no result\n")


def test_scores_match_a_direct_computation_from_the_logits(program: Program, kits: Path, tmp_path: Path) -> None:
    """`evaluate` agrees with the definition of the reference on volumes of one window, for a bare state dict."""
    torch.manual_seed(1)
    network = build_network("unet3d(filters=(8,8,16))", 1, 3).eval()
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    arguments = ("--exec_mode", "evaluate", "--data_dir", kits, "--load_ckpt_path", tmp_path / "bare.pth")
    printed = scores(program(*arguments, "--model", "unet3d(filters=(8,8,16))").stdout)
    ratios = []
    for case in ("case_00000", "case_00003"):
        image = torch.from_numpy(np.load(kits / f"{case}_x.npy"))[None]
        truth = np.load(kits / f"{case}_y.npy")[0]
        with torch.inference_mode():
            predicted = network(image)[0].argmax(0).numpy()
        assert set(np.unique(predicted)) == {0, 1, 2}
        ratios.append(
            [
                2 * np.sum((predicted == k) & (truth == k)) / (np.sum(predicted == k) + np.sum(truth == k))
                for k in (1, 2)
            ]
        )
    kidney, tumour = np.mean(ratios, axis=0)
    assert float(printed["L1 dice"]) == pytest.approx(kidney, abs=1e-5)
    assert float(printed["L2 dice"]) == pytest.approx(tumour, abs=1e-5)
    assert float(printed["mean_dice"]) == pytest.approx((kidney + tumour) / 2, abs=1e-5)
