"""`--init_from` in a run: weights that were trained on other input channels, or on cases that are now evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from data_loading.index import INDEX_NAME, DatasetIndex, read_index, write_json
from runtime.arguments import parse_arguments
from runtime.checkpoint import format as checkpoints
from runtime.distributed.world import World
from runtime.run import train_network

SHAPE = ["--input_shape", "4", "8", "8", "--val_input_shape", "4", "8", "8"]


def write_data(folder: Path, write_preprocessed: Callable[..., Path], channels: int) -> Path:
    rng = np.random.default_rng(0)
    volumes = {name: (rng.normal(size=(channels, 4, 8, 8)), rng.integers(0, 3, (1, 4, 8, 8))) for name in "abc"}
    write_preprocessed(folder, volumes)
    index = read_index(folder / INDEX_NAME)
    spec = replace(index.spec, channels=channels)
    write_json(folder / INDEX_NAME, DatasetIndex(spec=spec, split=index.split, cases=index.cases).to_json())
    return folder


def train(data_dir: Path, log_dir: Path, *flags: str) -> str:
    """Trains an epoch; returns the notes of the run."""
    arguments = ["--data_dir", str(data_dir), "--log_dir", str(log_dir), "--model", "unet3d(filters=(4, 8))", *SHAPE]
    arguments += ["--epochs", "1", "--seed", "1", "--batch_size", "1", "--num_workers", "0", "--no_report", *flags]
    train_network(parse_arguments(arguments)[0], World(0, 1, torch.device("cpu")), lambda config, world: None)
    events = [json.loads(line) for line in (log_dir / "log.jsonl").read_text().splitlines()]
    return "\n".join(next(event for event in events if event["event"] == "InitStopped")["notes"])


def test_weights_of_other_input_channels_are_a_start(tmp_path: Path, write_preprocessed: Callable[..., Path]) -> None:
    one, two = (write_data(tmp_path / f"data{count}", write_preprocessed, count) for count in (1, 2))
    train(one, tmp_path / "one")
    path = tmp_path / "one" / "checkpoint.pth"
    rates = ["--learning_rate", "0", "--init_learning_rate", "0"]
    notes = train(two, tmp_path / "two", "--init_from", str(path), *rates)
    name = "input_block.conv1.0.weight"
    assert f"{name} for 2 input channel(s) instead of 1: the mean over the channels, repeated, times 1/2" in notes
    before, after = (checkpoints.load(tmp_path / run / "checkpoint.pth").last for run in ("one", "two"))
    torch.testing.assert_close(after[name], before[name].expand(-1, 2, -1, -1, -1) / 2)
    assert all(torch.equal(after[other], before[other]) for other in before if other != name)


def test_evaluation_cases_that_the_weights_were_trained_on_are_noted(
    tmp_path: Path, write_preprocessed: Callable[..., Path]
) -> None:
    data = write_data(tmp_path / "data", write_preprocessed, 1)
    runs = {"whole": [], "fold0": ["--folds", "3", "--fold", "0"]}
    for name, flags in runs.items():
        train(data, tmp_path / name, *flags)

    def noted(name: str, *flags: str) -> bool:
        notes = train(data, tmp_path / "next", "--init_from", str(tmp_path / name / "checkpoint.pth"), *flags)
        return "checkpoint.pth: was trained on 1 of 1 evaluation case, so these score too well" in notes

    assert noted("fold0", "--folds", "3", "--fold", "1")
    # The folder's own split trains on two of the three cases.
    assert sorted(noted("whole", "--folds", "3", "--fold", fold) for fold in "012") == [False, True, True]
    assert not noted("fold0", "--folds", "3", "--fold", "0")
    assert not noted("whole")
    # Synthetic volumes come from no folder.
    synthetic = [
        "--init_from",
        str(tmp_path / "whole" / "checkpoint.pth"),
        "--loader",
        "synthetic",
        "--steps_per_epoch",
        "1",
    ]
    assert "too well" not in train(tmp_path / "none", tmp_path / "next", *synthetic)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--callbacks", "erly_stopping"], "--callbacks .*unknown name"),
        (["--lr_schedule", "plateau(factor=2)"], "--lr_schedule plateau: Factor"),
        (["--trackers", "jsnl"], "--trackers .*unknown name"),
        (["--init_from", "{log_dir}/checkpoint.pth"], "is in the folder of this run, which renames it"),
    ],
)
def test_a_mistake_leaves_the_files_of_an_earlier_run_where_they_are(
    flags: list[str], message: str, tmp_path: Path, write_preprocessed: Callable[..., Path]
) -> None:
    data, log_dir = write_data(tmp_path / "data", write_preprocessed, 1), tmp_path / "logs"
    train(data, log_dir)
    before = {path.name: path.read_bytes() for path in log_dir.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=message):
        train(data, log_dir, *(flag.format(log_dir=log_dir) for flag in flags))
    assert {path.name: path.read_bytes() for path in log_dir.iterdir() if path.is_file()} == before
