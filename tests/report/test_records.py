"""Reading runs back from their log folders."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from report.records import read_run
from tests.report.runs import MISSED, REACHED, log_run


def test_a_run_is_read_back(tmp_path: Path) -> None:
    run = read_run(log_run(tmp_path / "mine", scores={2: 0.8, 4: 0.85}, violations=["one"]))
    assert (run.name, run.log_files, run.division, run.rule_violations) == ("mine", 1, "open", ["one"])
    assert (run.classes, run.train_cases, run.evaluation_cases) == (["kidney", "tumour"], 8, 3)
    assert (run.target, run.samples_per_epoch, run.seeds["master"]) == (0.9, 8, 7)
    assert [epoch.loss for epoch in run.epochs.values()] == [1.0, 0.5, pytest.approx(1 / 3), 0.25]
    assert run.best is not None
    assert (run.best.epoch, run.best.dice) == (4, [pytest.approx(0.84), pytest.approx(0.86)])
    assert run.samples_per_s == 2.0  # 32 samples in 16 s
    # RunStarted is the third event; RunStopped comes 12 events after it.
    assert (run.init_s, run.clock_s) == (20.0, 120.0)
    assert (run.status, run.reason) == MISSED


def test_of_equal_evaluations_the_first_is_the_best(tmp_path: Path) -> None:
    """As in the checkpoint, which only a better one replaces."""
    run = read_run(log_run(tmp_path, scores={2: 0.8, 4: 0.8}))
    assert run.best is not None
    assert run.best.epoch == 2


def test_a_resumed_run_is_merged_and_later_records_win(tmp_path: Path) -> None:
    log_run(tmp_path, epochs=(1, 2, 3, 4), scores={2: 0.5, 4: 0.6}, stop=None)
    log_run(tmp_path, epochs=(3, 4, 5), scores={4: 0.7}, loss=10.0, violations=["the run was resumed"], stop=REACHED)
    run = read_run(tmp_path)
    assert run.log_files == 2
    assert {number: round(epoch.loss, 3) for number, epoch in run.epochs.items()} == {
        1: 1.0,
        2: 0.5,
        3: 3.333,
        4: 2.5,
        5: 2.0,
    }
    assert {epoch: found.mean_dice for epoch, found in run.evaluations.items()} == {2: 0.5, 4: 0.7}
    # The first log's last event comes 110 s after its RunStarted; the second's evaluation 60 s after its own.
    assert run.evaluations[4].clock_s == 110 + 60
    assert run.clock_s == 110 + 90


def test_epochs_after_the_last_checkpoint_are_discarded(tmp_path: Path) -> None:
    log_run(tmp_path, epochs=(1, 2, 3, 4), scores={4: 0.6}, stop=None)
    log_run(tmp_path, epochs=(3,), violations=["the run was resumed"], stop=None)
    run = read_run(tmp_path)
    assert list(run.epochs) == [1, 2, 3]
    assert run.evaluations == {}


def test_each_epoch_counts_its_own_samples(tmp_path: Path) -> None:
    """A resume that changes the batch size leaves the epochs before it as they were."""
    log_run(tmp_path, epochs=(1, 2), batch=3)
    log_run(tmp_path, epochs=(3,), batch=1, violations=["the run was resumed"])
    run = read_run(tmp_path)
    assert [run.samples_to(epoch) for epoch in (1, 2, 3)] == [(12, True), (24, True), (28, True)]


def test_an_epoch_that_two_processes_trained_counts_whole(tmp_path: Path) -> None:
    """The second one logs the samples that it trained itself, for its throughput."""
    log_run(tmp_path, epochs=(1, 2), stop=None)
    log_run(tmp_path, epochs=(2, 3), begun_at=3, violations=["the run was resumed"])
    run = read_run(tmp_path)
    assert [epoch.samples for epoch in run.epochs.values()] == [8, 2, 8]
    assert run.samples_to(3) == (24, True)


def test_samples_are_a_guess_where_an_epoch_was_not_logged_or_not_completed(tmp_path: Path) -> None:
    log_run(tmp_path, epochs=(3, 4), batch=3, stop=None)
    path = tmp_path / "log.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))  # killed in epoch 4
    log_run(tmp_path, epochs=(5,), batch=1, violations=["the run was resumed"])
    # Epochs 1 and 2 are taken to be like those of the newest log, epoch 4 to be whole.
    assert read_run(tmp_path).samples_to(5) == (2 * 4 + 2 * 12 + 4, False)


def test_a_log_without_the_size_of_a_step_has_the_samples_of_its_epochs(tmp_path: Path) -> None:
    path = log_run(tmp_path, epochs=(1, 2), batch=3) / "log.jsonl"
    path.write_text(path.read_text().replace('"global_batch_size": 3, ', ""))
    assert read_run(tmp_path).samples_to(2) == (24, True)


@pytest.mark.parametrize(
    ("reasons", "seed"), [([], 7), (["the run was resumed"], 8)], ids=["a new run", "another run's checkpoint"]
)
def test_an_older_log_of_another_run_is_left_alone(tmp_path: Path, reasons: list[str], seed: int) -> None:
    log_run(tmp_path, epochs=(1, 2))
    log_run(tmp_path, epochs=(3,), violations=reasons, seed=seed)
    assert list(read_run(tmp_path).epochs) == [3]


def test_log_files_are_ordered_by_number(tmp_path: Path) -> None:
    for epoch in range(1, 13):
        log_run(tmp_path, epochs=(epoch,), violations=["the run was resumed"] if epoch > 1 else [])
    assert (tmp_path / "log.11.jsonl").exists()
    run = read_run(tmp_path)
    assert (list(run.epochs), run.log_files) == (list(range(1, 13)), 12)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = log_run(tmp_path, stop=None) / "log.jsonl"
    text = path.read_text()
    path.write_text(text[:-20])
    run = read_run(tmp_path)
    assert (list(run.epochs), run.status) == ([1, 2, 3], "")


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    run = read_run(log_run(tmp_path, scores={2: math.nan, 4: 0.3}, loss=math.inf))
    assert all(math.isnan(epoch.loss) for epoch in run.epochs.values())
    assert run.best is not None
    assert run.best.epoch == 4


def damaged(folder: Path, line: int, text: str) -> Path:
    path = log_run(folder) / "log.jsonl"
    lines = path.read_text().splitlines()
    lines[line] = text
    path.write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none", "no such folder$"),
        (lambda folder: folder, "no log.jsonl in it; give the --log_dir of a run$"),
        (lambda folder: damaged(folder, 5, '{"event": '), "line 6 is not an event of a run$"),
        (lambda folder: damaged(folder, 5, "[1, 2]"), "line 6 is not an event of a run$"),
        (lambda folder: damaged(folder, 5, '{"event": "EpochStopped", "time_s": 1}'), "damaged or of another version"),
        (lambda folder: damaged(folder, 0, '{"event": "Other", "time_s": 1}'), "the log ends before the run began$"),
    ],
    ids=["no folder", "no log", "cut line", "no event", "no field", "no beginning"],
)
def test_a_bad_log_is_a_one_line_error(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_run(make(tmp_path))
    assert "\n" not in str(error.value)


def test_logs_of_version_0_1_are_read(tmp_path: Path) -> None:
    path = log_run(tmp_path, epochs=(1,), violations=["one"], stop=None) / "log.jsonl"
    ready = json.loads(path.read_text().splitlines()[1])
    assert ready["event"] == "InitStopped"
    ready["reasons"] = ready.pop("rule_violations", None) or ready["reasons"]
    scored = {"event": "TrainingScored", "time_s": 1.0, "epoch": 1, "mean_dice": 0.5}
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(ready)
    lines[0] = lines[0].replace("prewarm_steps", "untimed_steps").replace("eval_split", "subset")
    path.write_text("\n".join([*lines, json.dumps(scored)]))
    run = read_run(tmp_path)
    assert (run.rule_violations, run.train_dice) == (["one"], {1: 0.5})
    assert (run.config["prewarm_steps"], run.config["eval_split"]) == (1, "evaluation")
