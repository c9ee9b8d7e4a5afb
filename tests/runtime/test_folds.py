"""`--folds`, `--fold` and `--splits`: the split of a run, what a checkpoint remembers, and contradictions."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from data_loading.folds import SPLITS_NAME, Fold, make_folds, read_splits
from data_loading.index import INDEX_NAME, DatasetIndex, read_index, write_json
from runtime.arguments import parse_arguments
from runtime.checkpoint import format as checkpoints
from runtime.distributed.world import World
from runtime.run import evaluate_checkpoint, train_network
from runtime.run_spec import make_run_spec, read_dataset

MODEL = "unet3d(filters=(4, 8))"
SHAPE = ["--input_shape", "4", "8", "8", "--val_input_shape", "4", "8", "8"]
FOLDS = make_folds({case: case for case in "abcde"}, 5)


@pytest.fixture
def data_dir(tmp_path: Path, write_preprocessed: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(0)
    volumes = {name: (rng.normal(size=(1, 4, 8, 8)), rng.integers(0, 3, (1, 4, 8, 8))) for name in "abcdet"}
    folder = write_preprocessed(tmp_path / "data", volumes)
    index = read_index(folder / INDEX_NAME)
    split = {"train": list("abc"), "evaluation": list("de"), "test": ["t"]}
    write_json(folder / INDEX_NAME, DatasetIndex(spec=index.spec, split=split, cases=index.cases).to_json())
    return folder


def split_of(data_dir: Path, *flags: str) -> dict[str, list[str]]:
    return read_dataset(parse_arguments(["--data_dir", str(data_dir), *flags])[0])[1]


def train(data_dir: Path, log_dir: Path, *flags: str) -> int:
    arguments = ["--data_dir", str(data_dir), "--log_dir", str(log_dir), "--model", MODEL, *SHAPE]
    arguments += ["--epochs", "1", "--evaluate_every", "1", "--start_eval_at", "1", "--seed", "1", "--batch_size", "1"]
    config, _ = parse_arguments([*arguments, "--num_workers", "0", "--no_report", "--quality_threshold", "1", *flags])
    return train_network(config, World(0, 1, torch.device("cpu")), lambda config, world: None)


def evaluate(data_dir: Path, checkpoint: Path, *flags: str | Path) -> list[str]:
    """The cases that are scored; `flags` may begin with further checkpoints."""
    arguments = ["--exec_mode", "evaluate", "--data_dir", str(data_dir), "--load_ckpt_path", str(checkpoint)]
    config, given = parse_arguments([*arguments, *map(str, flags), "--model", MODEL, "--log_dir", str(data_dir.parent)])
    evaluate_checkpoint(config, given, World(0, 1, torch.device("cpu")))
    with (data_dir.parent / "evaluation.csv").open() as stream:
        return sorted(row["case"] for row in csv.DictReader(stream))


def checkpoint_of(data_dir: Path, fold: Fold | None) -> Path:
    """A checkpoint of a fold, without what only training needs."""
    folder = data_dir.parent / "trained"
    train(data_dir, folder, "--folds", "5", "--fold", "0")
    path = folder / "checkpoint.pth"
    content = torch.load(path, weights_only=True)
    content.pop("fold")
    checkpoints.write_archive(content | ({"fold": fold.to_json()} if fold else {}), path)
    return path


def test_a_fold_divides_training_and_evaluation_cases(data_dir: Path) -> None:
    split = split_of(data_dir, "--folds", "5", "--fold", "1")
    assert split == {"train": list(FOLDS[1].train), "evaluation": list(FOLDS[1].val), "test": ["t"]}


def test_an_excluded_case_leaves_the_folds_of_all_others_as_they_are(data_dir: Path) -> None:
    for number, fold in enumerate(FOLDS):
        split = split_of(data_dir, "--folds", "5", "--fold", str(number), "--exclude", "a")
        assert split["train"] == [case for case in fold.train if case != "a"]
        assert split["evaluation"] == [case for case in fold.val if case != "a"]


def test_folds_of_the_training_cases_leave_the_evaluation_cases_for_testing(data_dir: Path) -> None:
    split = split_of(data_dir, "--folds", "3", "--fold", "0", "--folds_of", "train")
    assert sorted(split["train"] + split["evaluation"]) == list("abc")
    assert split["test"] == ["t", "d", "e"]


def test_a_file_of_folds_is_used_as_it_is(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data_dir.parent / "s.json"
    path.write_text(json.dumps([{"train": ["e"], "val": ["a"]}]))
    split = split_of(data_dir, "--splits", str(path), "--fold", "0")
    assert split == {"train": ["e"], "evaluation": ["a"], "test": ["t", "d"]}
    assert "2 training cases of --data_dir in neither part of the fold: b" in capsys.readouterr().err
    with pytest.raises(UserError, match="has only 1 fold, from 0 on"):
        split_of(data_dir, "--splits", str(path), "--fold", "1")


def test_a_run_writes_its_folds_and_its_checkpoint_is_scored_on_its_own(data_dir: Path) -> None:
    log_dir = data_dir.parent / "logs"
    train(data_dir, log_dir, "--folds", "5", "--fold", "2", "--exclude", "t")
    assert read_splits(log_dir / SPLITS_NAME) == FOLDS
    events = [json.loads(line) for line in (log_dir / "log.jsonl").read_text().splitlines()]
    scored = [event["per_case"] for event in events if event["event"] == "EvaluationStopped"]
    assert [list(each) for each in scored] == [list(FOLDS[2].val)]
    ready = next(event for event in events if event["event"] == "InitStopped")
    assert "--folds 5, not 0" in ready["rule_violations"]

    path = log_dir / "checkpoint.pth"
    assert checkpoints.load(path).fold == FOLDS[2]
    assert evaluate(data_dir, path) == list(FOLDS[2].val)
    assert evaluate(data_dir, path, "--eval_split", "train") == list(FOLDS[2].train)
    assert evaluate(data_dir, path, "--eval_split", "test") == ["t"]
    assert evaluate(data_dir, path, "--splits", str(log_dir / SPLITS_NAME), "--fold", "2") == list(FOLDS[2].val)
    with pytest.raises(UserError, match=r"--fold 1: .* was trained on another fold"):
        evaluate(data_dir, path, "--folds", "5", "--fold", "1")


def test_several_checkpoints_are_scored_as_one_on_cases_that_none_was_trained_on(data_dir: Path) -> None:
    paths = []
    for number in (0, 1):
        folder = data_dir.parent / str(number)
        train(data_dir, folder, "--folds", "5", "--fold", str(number), "--overlap", f"0.{number}")
        paths.append(folder / "checkpoint.pth")
    assert evaluate(data_dir, paths[0], paths[0]) == list(FOLDS[0].val)
    with pytest.raises(
        UserError, match=r"1/checkpoint.pth: its fold evaluates other cases than that of .*0/checkpoint"
    ):
        evaluate(data_dir, *paths)
    with pytest.raises(UserError, match=r"1/checkpoint.pth: its --overlap is 0.1, that of .* 0.0; give --overlap"):
        evaluate(data_dir, *paths, "--eval_split", "test")
    assert evaluate(data_dir, *paths, "--eval_split", "test", "--overlap", "0.5") == ["t"]


def test_a_checkpoint_of_another_split_may_have_seen_the_cases(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(data_dir, data_dir.parent / "own")
    path = data_dir.parent / "own" / "checkpoint.pth"
    evaluate(data_dir, path)
    assert "may have seen" not in capsys.readouterr().err
    index = read_index(data_dir / INDEX_NAME)
    split = {"train": list("cde"), "evaluation": list("ab"), "test": ["t"]}
    write_json(data_dir / INDEX_NAME, replace(index, split=split).to_json())
    assert evaluate(data_dir, path) == ["a", "b"]
    assert "checkpoint.pth was trained on another split of this data set" in capsys.readouterr().err
    write_json(data_dir / INDEX_NAME, replace(index, split=split, spec=replace(index.spec, name="other")).to_json())
    evaluate(data_dir, path)
    assert "may have seen" not in capsys.readouterr().err


def test_data_of_another_kind_than_in_training_is_noted(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint_of(data_dir, None)
    evaluate(data_dir, path)
    assert "of another kind" not in capsys.readouterr().err
    index = read_index(data_dir / INDEX_NAME)
    spec = replace(index.spec, classes=("background", "liver", "tumour"), spacing_mm=(3.0, 3.0, 3.0))
    write_json(data_dir / INDEX_NAME, replace(index, spec=spec).to_json())
    evaluate(data_dir, path)
    (noted,) = (line for line in capsys.readouterr().err.splitlines() if "of another kind" in line)
    assert "classes ['background', 'kidney', 'tumour'] in training, ['background', 'liver', 'tumour'] here" in noted
    assert "spacing_mm None in training, [3.0, 3.0, 3.0] here" in noted


@pytest.mark.parametrize("exclude", [[], ["--exclude", "c"]])
def test_a_checkpoint_of_the_folders_own_split_is_not_scored_on_a_fold_that_it_was_trained_on(
    exclude: list[str], data_dir: Path
) -> None:
    own, of_fold = data_dir.parent / "own", data_dir.parent / "fold"
    train(data_dir, own, *exclude)
    for number, fold in enumerate(FOLDS):
        flags = ["--folds", "5", "--fold", str(number)]
        (held_out,) = fold.val
        if held_out in {"a", "b", "c"}.difference(exclude):
            train(data_dir, of_fold, *flags)
            for first, others in ((own, []), (of_fold, [own / "checkpoint.pth"])):
                with pytest.raises(UserError, match=f"own/checkpoint.pth was trained on 1 of 1 case .*{held_out};"):
                    evaluate(data_dir, first / "checkpoint.pth", *others, *flags)
        else:
            assert evaluate(data_dir, own / "checkpoint.pth", *flags) == [held_out]
    assert evaluate(data_dir, own / "checkpoint.pth", "--eval_split", "train") == list("abc")


@pytest.mark.parametrize("flags", [["--folds", "5", "--fold", "1"], []])
def test_a_resume_with_another_fold_is_refused(data_dir: Path, flags: list[str]) -> None:
    log_dir = data_dir.parent / "logs"
    train(data_dir, log_dir, "--folds", "5", "--fold", "0")
    with pytest.raises(UserError, match=r"belongs to another run: .*--fold (1|None), was 0"):
        train(data_dir, log_dir, "--resume", "--epochs", "2", *flags)


def test_a_resume_with_another_file_of_folds_is_refused(data_dir: Path) -> None:
    log_dir, path = data_dir.parent / "logs", data_dir.parent / "s.json"
    path.write_text(json.dumps([{"train": ["b", "c"], "val": ["a"]}]))
    train(data_dir, log_dir, "--splits", str(path), "--fold", "0")
    path.write_text(json.dumps([{"train": ["b", "c"], "val": ["d"]}]))
    with pytest.raises(UserError, match="another data set or split"):
        train(data_dir, log_dir, "--resume", "--epochs", "2", "--splits", str(path), "--fold", "0")


def test_a_fold_of_another_data_set_is_noted_and_one_with_missing_cases_refused(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(data_dir, checkpoint_of(data_dir, Fold(("x",), ("y",)))) == ["d", "e"]
    assert "a fold of another data set" in capsys.readouterr().err
    with pytest.raises(UserError, match="its fold names y, which --data_dir does not have"):
        evaluate(data_dir, checkpoint_of(data_dir, Fold(("a",), ("y",))))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fold", "0"], "--fold needs --folds"),
        (["--folds", "5"], "--folds needs --fold,"),
        (["--folds_of", "train"], "--folds_of needs --folds"),
        (["--folds", "5", "--fold", "5"], "the last of 5 is 4"),
        (["--folds", "5", "--fold", "0", "--splits", "s.json"], "drop one of them"),
        (["--splits", "s.json", "--fold", "0", "--folds_of", "train"], "applies only to --folds"),
        (["--folds", "5", "--fold", "0", "--loader", "synthetic"], "does not go with --loader synthetic"),
        (["--folds", "5", "--fold", "0", "--exec_mode", "report"], "does not go with --exec_mode report"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arguments(["--data_dir", "d", *flags])


def test_folds_of_a_run_are_those_of_the_folder(data_dir: Path) -> None:
    config, _ = parse_arguments(
        ["--data_dir", str(data_dir), *SHAPE, "--folds", "5", "--fold", "3", "--batch_size", "1"]
    )
    run = make_run_spec(config, World(0, 1, torch.device("cpu")))
    assert run.folds == tuple(FOLDS)
    assert run.fold == FOLDS[3]
    assert make_run_spec(replace(config, folds=0, fold=None), World(0, 1, torch.device("cpu"))).fold is None
