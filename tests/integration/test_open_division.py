"""Options of the open division in the real program: epochs, schedules, callbacks, fine-tuning and freezing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from runtime.checkpoint.format import load
from tests.integration.conftest import TINY, Program, events_of

# 12 training cases: 5 steps of 4 samples per rank use each case at most twice.
OPEN = (
    *TINY,
    *("--batch_size", 4, "--steps_per_epoch", 5, "--start_eval_at", 2, "--evaluate_every", 1),
    *("--callbacks", "early_stopping(patience=2, min_delta=2.0)", "top_k(k=2)", "lr_monitor"),
    "train_dice(cases=2)",
    *("--lr_schedule", "plateau(factor=0.5, patience=1, threshold=9.0)"),
)


@pytest.fixture(scope="module")
def opened(program: Program, balls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without progress: `min_delta` requires scores to rise by 2."""
    logs = tmp_path_factory.mktemp("opened")
    program("--data_dir", balls, "--log_dir", logs, *OPEN, "--epochs", 30)
    return logs


def test_a_run_without_progress_ends_early_and_keeps_its_best(opened: Path) -> None:
    evaluations = events_of(opened, "EvaluationStopped")
    (stopped,) = events_of(opened, "RunStopped")
    assert [event["epoch"] for event in evaluations] == [2, 3, 4]
    assert (stopped["status"], stopped["epoch"]) == ("aborted", 4)
    assert "no progress in 2 evaluations" in str(stopped["reason"])
    files = sorted(file.name for file in (opened / "top").iterdir())
    assert len(files) == 3
    assert files[-1] == "last.pth"
    best = load(opened / "checkpoint.pth")
    assert any(load(opened / "top" / name).last_epoch == best.best_epoch for name in files[:-1])


def test_an_epoch_has_the_steps_that_were_asked_for(opened: Path) -> None:
    assert [event["samples"] for event in events_of(opened, "EpochStopped")] == [20] * 4
    with (opened / "rates.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(int(row["epoch"]), int(row["batch"])) for row in rows] == [(e, b) for e in range(1, 5) for b in range(5)]
    # Plateau: evaluations 3 and 4 without progress halve the rate for epoch 5, which is not reached.
    assert {float(row["learning_rate"]) for row in rows} == {0.3}


def test_training_cases_are_scored_after_each_evaluation(opened: Path) -> None:
    scored = events_of(opened, "TrainDiceEnd")
    assert [event["epoch"] for event in scored] == [2, 3, 4]
    assert all(0 <= float(event["mean_dice"]) <= 1 for event in scored)  # type: ignore[arg-type]


def test_every_rule_violation_is_in_the_log(opened: Path) -> None:
    run = json.loads((opened / "run.json").read_text())
    violations = "; ".join(run["rule_violations"])
    for flag in ("--steps_per_epoch 5", "--callbacks early_stopping(patience=2", "--lr_schedule plateau("):
        assert flag in violations
    assert run["division"] == "open"


def test_excluded_cases_are_neither_trained_on_nor_evaluated(program: Program, balls: Path, tmp_path: Path) -> None:
    split = json.loads((balls / "dataset.json").read_text())["split"]
    excluded = (split["train"][0], split["train"][5], split["evaluation"][1])
    arguments = ("--data_dir", balls, "--log_dir", tmp_path, *TINY, "--batch_size", 2, "--exclude", *excluded)
    program(*arguments, "--epochs", 1, "--start_eval_at", 1, "--evaluate_every", 1)
    (opened,) = events_of(tmp_path, "DataOpened")
    assert (opened["train_samples"], opened["eval_samples"]) == (10, 2)
    (scored,) = events_of(tmp_path, "EvaluationStopped")
    assert set(scored["per_case"]) == {*split["evaluation"]} - {*excluded}  # type: ignore[call-overload]
    assert f"--exclude {' '.join(excluded)}" in "; ".join(
        json.loads((tmp_path / "run.json").read_text())["rule_violations"]
    )
    others = ("--data_dir", balls, "--log_dir", tmp_path, *TINY, "--batch_size", 2, "--epochs", 2, "--resume")
    done = program(*others, "--exclude", excluded[0], ok=False)
    assert "belongs to another run: --exclude" in done.stderr


def test_resumed_with_steps_and_a_schedule_equals_never_stopping(program: Program, balls: Path, tmp_path: Path) -> None:
    """The state of the schedule and the callbacks is resumed as well."""
    arguments = (
        *("--data_dir", balls, *OPEN[: OPEN.index("--callbacks")], "--callbacks", "early_stopping(patience=9)"),
        *("--lr_schedule", "plateau(factor=0.5, patience=1, threshold=9.0)"),
    )
    program(*arguments, "--log_dir", tmp_path / "whole", "--epochs", 6)
    program(*arguments, "--log_dir", tmp_path / "parts", "--epochs", 4)
    program(*arguments, "--log_dir", tmp_path / "parts", "--epochs", 6, "--resume")
    whole, parts = (load(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    assert all(torch.equal(whole.last[name], parts.last[name]) for name in whole.last)
    assert whole.callback_state == parts.callback_state
    rates = [event["learning_rate"] for event in events_of(tmp_path / "whole", "EpochStopped")]
    assert rates == [0.3, 0.3, 0.3, 0.3, 0.15, 0.15]
    assert [event["learning_rate"] for event in events_of(tmp_path / "parts", "EpochStopped")] == rates[4:]


def test_fine_tuning_the_output_from_another_runs_weights(
    program: Program, balls: Path, trained: Path, tmp_path: Path
) -> None:
    done = program(
        *("--data_dir", balls, "--log_dir", tmp_path, *TINY, "--epochs", 2),
        *("--init_from", trained / "checkpoint.pth", "--freeze", "all_but_output"),
        ranks=2,
    )
    assert "the best weights, of epoch" in done.stdout
    assert "all of the network" in done.stdout
    assert "trained: output.conv.weight, output.conv.bias" in done.stdout
    before, after = load(trained / "checkpoint.pth").best, load(tmp_path / "checkpoint.pth").last
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"output.conv.weight", "output.conv.bias"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--freeze", "decoder.*"), "--freeze 'decoder.*' does not match any parameter's whole name"),
        (("--division", "closed", "--steps_per_epoch", 3), "--steps_per_epoch 3"),
    ],
)
def test_a_user_error_is_one_line(
    program: Program, balls: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    done = program("--data_dir", balls, "--log_dir", tmp_path, *TINY, *arguments, ok=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
