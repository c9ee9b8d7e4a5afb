"""The real program, and a small data set that a tiny network learns in seconds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_loading.io.volume import Geometry, Volume, write_nifti
from tests import programs

PROJECT = programs.ROOT
Program = Callable[..., subprocess.CompletedProcess[str]]

# Two resolutions, window 16: a step takes milliseconds.
TINY = (
    *("--model", "unet3d(filters=(4,8))"),
    *("--input_shape", "16", "16", "16", "--val_input_shape", "16", "16", "16"),
    *("--num_workers", "0", "--seed", "7", "--learning_rate", "0.3"),
    "--no_report",  # takes as long as the run; tested in test_report.py
)


@pytest.fixture(scope="session")
def program() -> Program:
    """Runs `main.py ARGUMENTS` and, unless `ok=False`, asserts that it exits with 0.

    In this process; with `ranks` in that many forked ones, whose output and worst exit status it returns.
    """

    def run(*arguments: object, ranks: int = 1, ok: bool = True) -> subprocess.CompletedProcess[str]:
        done = programs.call("main.py", *arguments) if ranks == 1 else on_ranks(ranks, *arguments)
        if ok:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def on_ranks(ranks: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    done = programs.run_ranks("main.py", *arguments, ranks=ranks)
    out, err = ("".join(texts) for texts in zip(*((rank.stdout, rank.stderr) for rank in done), strict=True))
    return subprocess.CompletedProcess(done[0].args, max(abs(rank.returncode) for rank in done), out, err)


@pytest.fixture(scope="session")
def balls_raw(make_once: Callable[..., Path]) -> Path:
    """A Decathlon-like folder: 15 noisy volumes with a bright ball (1) and a brighter one (2), of varied size."""
    return make_once("balls", write_balls)


def write_balls(folder: Path) -> None:
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    rng = np.random.default_rng(0)
    training = []
    for number in range(15):
        d, h, w = (int(n) for n in rng.integers(14, 26, 3))  # some smaller than the window of 16
        grid = np.stack(np.meshgrid(np.arange(d), np.arange(h), np.arange(w), indexing="ij"))
        label = np.zeros((d, h, w), np.uint8)
        for value in (1, 2):
            centre = rng.uniform(4, np.array([d, h, w]) - 4)
            label[((grid - centre[:, None, None, None]) ** 2).sum(0) < 16] = value
        image = (100.0 * label + rng.normal(0, 10, label.shape)).astype(np.float32)
        geometry = Geometry(np.diag([1.0, 1.0, 1.0, 1.0]), (d, h, w), (1.0, 1.0, 1.0))
        name = f"ball_{number:03}.nii.gz"
        write_nifti(folder / "imagesTr" / name, Volume(image[None], geometry))
        write_nifti(folder / "labelsTr" / name, Volume(label[None], geometry))
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    content = {
        "name": "Balls",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "bright", "2": "brighter"},
        "training": training,
    }
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def balls(balls_raw: Path, make_once: Callable[..., Path]) -> Path:
    """`balls_raw` preprocessed by the program: 12 training cases, 3 evaluation cases."""

    def preprocess(results: Path) -> None:
        arguments = ("--dataset", "msd", "--num_workers", 1, "--data_dir", balls_raw, "--results_dir", results)
        done = programs.call("preprocess_dataset.py", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr

    return make_once("balls_data", preprocess)


@pytest.fixture(scope="session")
def trained(program: Program, balls: Path, make_once: Callable[..., Path]) -> Path:
    """The log folder of a run on `balls` that reached its target; contains checkpoint.pth."""

    def train(logs: Path) -> None:
        program(
            *("--data_dir", balls, "--log_dir", logs, "--save_ckpt_path", logs / "checkpoint.pth", *TINY),
            # At the first evaluation the network predicts foreground; without it, the run would end as diverged.
            *("--epochs", 60, "--start_eval_at", 10, "--evaluate_every", 5, "--quality_threshold", 0.88),
        )

    return make_once("trained", train)


def events_of(logs: Path, kind: str) -> list[dict[str, object]]:
    """Returns the events of one kind in a run's log.jsonl."""
    lines = (logs / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]
