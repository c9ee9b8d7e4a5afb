"""`--eval_ranks`: ranks of their own evaluate while the others train, and nothing else changes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DIVERGED_EXIT, RANK_LOST_EXIT, USER_ERROR_EXIT
from runtime.checkpoint.format import load
from submission.logs import read_log
from tests.faults.runs import Run, differences, history, write_balls

ARGUMENTS = ("--epochs", 20, "--start_eval_at", 5, "--evaluate_every", 5, "--num_workers", 0)
# `main.py`, whose evaluations wait until a file exists, or the run has ended; silence is noticed after four seconds.
GATED = (
    "-c",
    """
import os, runpy, time
from runtime.distributed import watchdog
from runtime.evaluation import CaseScorer
score = CaseScorer.score
def gated(self, cases, subgroup):
    while not os.path.exists(os.environ["GATE"]):
        self.check()
        time.sleep(0.01)
    yield from score(self, cases, subgroup)
CaseScorer.score = gated
watchdog.Timeouts.__init__.__kwdefaults__["silence_s"] = 4.0
runpy.run_path("main.py", run_name="__main__")
""",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_balls(tmp_path_factory.mktemp("balls"))


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`plain(2)`: the log folder of a run of two ranks without the flag, made once."""
    made: dict[int, Path] = {}

    def log_dir(ranks: int) -> Path:
        if ranks not in made:
            made[ranks] = tmp_path_factory.mktemp("plain")
            run = Run(data, made[ranks], *ARGUMENTS, ranks=ranks)
            assert run.wait() == [0] * ranks, run.output()
        return made[ranks]

    return log_dir


def start_gated(data: Path, log_dir: Path, *arguments: object) -> Run:
    """A run of two training ranks and one whose evaluations wait for the file `gate`."""
    gate = {"GATE": str(log_dir / "gate")}
    return Run(data, log_dir, *ARGUMENTS, "--eval_ranks", 1, *arguments, ranks=3, program=GATED, environment=gate)


@pytest.mark.parametrize(("training", "evaluating"), [(2, 1), (1, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_scores_and_weights_are_those_of_a_run_without_evaluating_ranks(
    training: int, evaluating: int, data: Path, plain: Callable[[int], Path], tmp_path: Path
) -> None:
    ranks = training + evaluating
    own_machines = {"LOCAL_RANK": "0"}  # each rank makes the checks of its machine
    run = Run(data, tmp_path, *ARGUMENTS, "--eval_ranks", evaluating, ranks=ranks, environment=own_machines)
    assert run.wait() == [0] * ranks, run.output()
    assert differences(tmp_path, plain(training)) == []
    log = read_log(tmp_path / "unet3d.log")
    assert log.problems == []
    assert [epoch for epoch, _ in log.evaluations] == [5, 10, 15, 20]
    assert log.values["global_batch_size"] == training
    assert log.values["submission_platform"].startswith(f"{ranks}x")


def test_training_goes_on_during_an_evaluation_and_waits_before_the_next(
    data: Path, plain: Callable[[int], Path], tmp_path: Path
) -> None:
    run = start_gated(data, tmp_path)
    run.wait_for("EpochStopped", 10)  # the scores of the fifth are not here yet
    assert [event["epoch"] for event in run.events("EvaluationStarted")] == [5]
    assert not run.events("EvaluationStopped")
    (tmp_path / "gate").touch()
    assert run.wait() == [0, 0, 0], run.output()
    assert differences(tmp_path, plain(2)) == []


def test_the_target_ends_the_run_and_its_weights_are_kept(
    data: Path, plain: Callable[[int], Path], tmp_path: Path
) -> None:
    scores = {epoch: history(plain(2))[f"dice {epoch}"][0] for epoch in (5, 10)}
    target = max(scores.values())
    reached = min(epoch for epoch, score in scores.items() if score >= target)
    run = start_gated(data, tmp_path, "--quality_threshold", target)
    run.wait_for("EpochStopped", 10)
    (tmp_path / "gate").touch()
    assert run.wait() == [0, 0, 0], run.output()
    (stopped,) = run.events("RunStopped")
    assert stopped["status"] == "success"
    assert stopped["epoch"] > reached
    checkpoint = load(tmp_path / "checkpoint.pth")
    assert (checkpoint.best_epoch, checkpoint.best_dice) == (reached, target)
    assert checkpoint.pending is None
    assert read_log(tmp_path / "unet3d.log").problems == []


@pytest.mark.parametrize(
    ("epochs", "evaluating"),  # after ten epochs the training ranks wait for the scores
    [(6, 1), (10, 0), pytest.param(6, 0, marks=pytest.mark.slow), pytest.param(10, 1, marks=pytest.mark.slow)],
)
def test_a_run_stopped_during_an_evaluation_repeats_it_when_resumed(
    epochs: int, evaluating: int, data: Path, plain: Callable[[int], Path], tmp_path: Path
) -> None:
    run = start_gated(data, tmp_path)
    run.wait_for("EpochStopped", epochs)
    run.signal(signal.SIGTERM)
    assert run.wait(20) == [128 + signal.SIGTERM] * 3, run.output()
    checkpoint = load(tmp_path / "checkpoint.pth")
    assert checkpoint.pending is not None
    assert checkpoint.pending.epoch == 5
    resumed = Run(data, tmp_path, *ARGUMENTS, "--resume", "--eval_ranks", evaluating, ranks=2 + evaluating)
    assert resumed.wait() == [0] * (2 + evaluating), resumed.output()
    assert differences(tmp_path, plain(2)) == []


@pytest.mark.parametrize(("lost", "named"), [(2, "rank 2"), pytest.param(1, "rank 1", marks=pytest.mark.slow)])
def test_a_lost_rank_ends_both_sides_with_the_cause(lost: int, named: str, data: Path, tmp_path: Path) -> None:
    run = start_gated(data, tmp_path)
    run.wait_for("EvaluationStarted")
    run.signal(signal.SIGKILL, lost)
    statuses = run.wait(40)
    assert statuses.pop(lost) == -signal.SIGKILL
    assert statuses == [RANK_LOST_EXIT] * 2, run.output()
    assert named in run.last_line(0)


def test_an_evaluating_rank_that_fails_ends_both_sides_with_the_cause(tmp_path: Path) -> None:
    data = write_balls(tmp_path / "data")
    run = start_gated(data, tmp_path)
    run.wait_for("EpochStopped", 6)
    (data / "ball_01_x.npy").unlink()
    (tmp_path / "gate").touch()
    assert run.wait(40) == [RANK_LOST_EXIT, RANK_LOST_EXIT, USER_ERROR_EXIT]
    assert all("ball_01_x.npy: missing" in run.last_line(rank) for rank in range(3))


def test_a_run_that_diverges_first_waits_for_the_scores(data: Path, tmp_path: Path) -> None:
    run = start_gated(data, tmp_path, "--lr_decay_epochs", 5, "--lr_decay_factor", 1e30)
    run.wait_for("EpochStarted", 6)
    (tmp_path / "gate").touch()
    assert run.wait() == [DIVERGED_EXIT] * 3, run.output()
    assert [event["epoch"] for event in run.events("EvaluationStopped")] == [5]
    (stopped,) = run.events("RunStopped")
    assert stopped["reason"].startswith("diverged: epoch 6")
    # The best network, although training has lost it.
    kept = load(tmp_path / "checkpoint.pth")
    assert (kept.best_epoch, kept.last_epoch) == (5, 5)
    assert all(tensor.isfinite().all() for state in (kept.best, kept.last) for tensor in state.values())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_must_be_left_to_train(ranks: int, data: Path, tmp_path: Path) -> None:
    run = Run(data, tmp_path, *ARGUMENTS, "--eval_ranks", 2, ranks=ranks)
    assert run.wait() == [USER_ERROR_EXIT] * ranks
    expected = f"main.py: error: --eval_ranks 2, but the run has {ranks} rank(s), and at least one must train; start 3"
    assert run.last_line().startswith(expected)
