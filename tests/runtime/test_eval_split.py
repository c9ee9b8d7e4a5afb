"""`--exec_mode evaluate --eval_split`: the part of the split that is scored, and the error if it is empty."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from data_loading.index import INDEX_NAME, DatasetIndex, read_index, write_json
from model.registry import build_network
from runtime import build, case_table
from runtime.arguments import parse_arguments
from runtime.distributed.world import World
from runtime.run import evaluate_checkpoint

MODEL = "unet3d(filters=(4, 8))"


@pytest.fixture
def data_dir(tmp_path: Path, write_preprocessed: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(0)
    volumes = {name: (rng.normal(size=(1, 4, 8, 8)), rng.integers(0, 3, (1, 4, 8, 8))) for name in "abcd"}
    folder = write_preprocessed(tmp_path / "data", volumes)
    index = read_index(folder / INDEX_NAME)
    split = {"train": ["b", "d"], "evaluation": ["a"], "test": ["c"]}
    write_json(folder / INDEX_NAME, DatasetIndex(spec=index.spec, split=split, cases=index.cases).to_json())
    return folder


def evaluate(data_dir: Path, *more: str) -> list[dict[str, str]]:
    checkpoint = data_dir.parent / "c.pth"
    torch.manual_seed(0)
    network = build_network(MODEL, 1, 3)
    torch.save(network.state_dict(), checkpoint)
    arguments = [
        "--exec_mode",
        "evaluate",
        "--data_dir",
        str(data_dir),
        "--load_ckpt_path",
        str(checkpoint),
        "--model",
        MODEL,
        "--val_input_shape",
        "4",
        "8",
        "8",
        "--log_dir",
        str(data_dir.parent),
        *more,
    ]
    config, given = parse_arguments(arguments)
    evaluate_checkpoint(config, given, World(0, 1, torch.device("cpu")))
    with (data_dir.parent / "evaluation.csv").open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(("subset", "cases"), [(None, "a"), ("evaluation", "a"), ("test", "c"), ("train", "bd")])
def test_the_part_that_is_asked_for_is_scored(data_dir: Path, subset: str | None, cases: str) -> None:
    rows = evaluate(data_dir, *(["--eval_split", subset] if subset else []))
    assert sorted(row["case"] for row in rows) == list(cases)
    assert {row["subset"] for row in rows} == {subset or "evaluation"}


def test_a_part_that_the_split_does_not_have_is_one_clear_line(data_dir: Path) -> None:
    index = read_index(data_dir / INDEX_NAME)
    del index.split["test"]
    write_json(data_dir / INDEX_NAME, index.to_json())
    with pytest.raises(UserError, match=r"its split has no test cases, but 2 of train, 1 of evaluation$"):
        evaluate(data_dir, "--eval_split", "test")


@pytest.mark.parametrize("way", ["below a file", "a folder in its place", "read-only"])
def test_a_table_that_cannot_be_written_is_refused_before_the_evaluation(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    log_dir = data_dir.parent / "logs"
    if way == "below a file":
        log_dir.write_text("mine")
        log_dir /= "deeper"
    elif way == "a folder in its place":
        (log_dir / "evaluation.csv").mkdir(parents=True)
    else:  # root may write everywhere

        def refuse(dir: Path) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(case_table.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(build, "make_evaluator", lambda *_, **__: pytest.fail("it was evaluated"))
    with pytest.raises(UserError, match=rf"^--log_dir {log_dir}: evaluation.csv cannot be written: [\w -]+$"):
        evaluate(data_dir, "--log_dir", str(log_dir))


def test_a_window_that_does_not_fit_is_one_clear_line(data_dir: Path) -> None:
    with pytest.raises(UserError, match=r"^evaluation: a window takes \d+\.\d GiB .* use smaller windows"):
        evaluate(data_dir, "--val_input_shape", "4096", "4096", "4096")
