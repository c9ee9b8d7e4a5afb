"""A run on a data set with an ignore label: an open one, whose weights and scores do not depend on what is ignored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_loading.dataset import case_file
from data_loading.index import INDEX_NAME, DatasetIndex, read_index, write_json
from data_loading.spec import IGNORED, DatasetSpec
from runtime.arguments import parse_arguments
from runtime.checkpoint import format as checkpoints
from runtime.distributed.world import World
from runtime.run import train_network

SHAPE = ["--input_shape", "4", "8", "8", "--val_input_shape", "4", "8", "8"]


@pytest.fixture
def data_dir(tmp_path: Path, write_preprocessed: Callable[..., Path]) -> Path:
    """Cases whose left half is ignored."""
    rng = np.random.default_rng(0)
    volumes = {}
    for name in "abc":
        label = rng.integers(0, 3, (1, 4, 8, 8))
        label[..., :4] = IGNORED
        volumes[name] = rng.normal(size=(1, 4, 8, 8)), label
    folder = write_preprocessed(tmp_path / "data", volumes)
    index = read_index(folder / INDEX_NAME)
    spec = replace(index.spec, ignore_label=IGNORED)
    write_json(folder / INDEX_NAME, DatasetIndex(spec=spec, split=index.split, cases=index.cases).to_json())
    return folder


def train(data_dir: Path, log_dir: Path, *flags: str) -> list[dict[str, Any]]:
    arguments = ["--data_dir", str(data_dir), "--log_dir", str(log_dir), "--model", "unet3d(filters=(4, 8))", *SHAPE]
    arguments += ["--epochs", "2", "--evaluate_every", "1", "--start_eval_at", "1", "--seed", "1", "--batch_size", "1"]
    config, _ = parse_arguments([*arguments, "--num_workers", "0", "--no_report", "--quality_threshold", "1", *flags])
    train_network(config, World(0, 1, torch.device("cpu")), lambda config, world: None)
    return [json.loads(line) for line in (log_dir / "log.jsonl").read_text().splitlines()]


def test_a_run_with_an_ignore_label_is_an_open_one_and_scores_the_rest(data_dir: Path, tmp_path: Path) -> None:
    events = train(data_dir, tmp_path / "logs")
    ready = next(event for event in events if event["event"] == "InitStopped")
    assert "voxels left out by an ignore label, not all" in ready["rule_violations"]
    scores = [event for event in events if event["event"] == "EvaluationStopped"]
    assert len(scores) == 2
    assert all(0 < event["loss"] < 2 for event in scores)
    spec = checkpoints.load(tmp_path / "logs" / "checkpoint.pth").spec
    assert spec is not None
    assert DatasetSpec.from_json(spec).ignore_label == IGNORED


def test_a_run_where_nothing_counts_leaves_the_weights_as_they_were(data_dir: Path, tmp_path: Path) -> None:
    for case in "abc":
        path = case_file(data_dir, case, "y")
        np.save(path, np.full((1, 4, 8, 8), IGNORED, np.uint8))
    flags = ["--steps_per_epoch", "3", "--learning_rate", "1", "--oversampling", "0"]
    _forget_stamps(data_dir)
    train(data_dir, tmp_path / "trained", *flags)
    train(data_dir, tmp_path / "untrained", *flags, "--learning_rate", "0", "--init_learning_rate", "0")
    trained, untrained = (
        checkpoints.load(tmp_path / name / "checkpoint.pth").last for name in ("trained", "untrained")
    )
    assert all(torch.equal(trained[name], untrained[name]) for name in trained)


def _forget_stamps(data_dir: Path) -> None:
    index = read_index(data_dir / INDEX_NAME)
    cases = {case: replace(record, digests={}, stamps={}) for case, record in index.cases.items()}
    write_json(data_dir / INDEX_NAME, DatasetIndex(spec=index.spec, split=index.split, cases=cases).to_json())
