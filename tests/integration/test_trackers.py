"""The real program with all trackers at once, and its progress bars on a terminal."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.integration.conftest import PROJECT, TINY, Program, events_of, on_ranks

# 12 cases in batches of 2: 6 steps per epoch. At the first evaluation the network already predicts foreground; without
# foreground, the run would end as diverged.
SHORT = ("--epochs", 12, "--start_eval_at", 10, "--evaluate_every", 2)


def test_all_trackers_at_once_and_offline(
    program: Program, balls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    logs, uri = tmp_path / "logs", f"sqlite:///{tmp_path}/mlflow.db"
    tools = ("tensorboard", "wandb(project='kits', mode='offline')", f"mlflow(uri='{uri}')")
    # In a process of its own: wandb leaves threads running.
    done = on_ranks(1, "--data_dir", balls, "--log_dir", logs, *TINY, *SHORT, "--trackers", "mlperf", "jsonl", *tools)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    losses = [float(event["loss"]) for event in events_of(logs, "EpochStopped")]  # type: ignore[arg-type]
    dice = [float(event["mean_dice"]) for event in events_of(logs, "EvaluationStopped")]  # type: ignore[arg-type]
    assert (len(losses), len(dice)) == (12, 2)

    scalars = EventAccumulator(str(logs / "tensorboard"), size_guidance={"scalars": 0})
    scalars.Reload()
    assert [point.value for point in scalars.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    assert [point.value for point in scalars.Scalars("evaluation/mean_dice")] == pytest.approx(dice, rel=1e-6)
    assert [point.step for point in scalars.Scalars("step/gradient_norm")] == list(range(1, 73))

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [each for each in client.search_experiments() if each.name == "unet3d"]
    (run,) = client.search_runs([experiment.experiment_id])
    logged = sorted(client.get_metric_history(run.info.run_id, "train/loss"), key=lambda metric: metric.step)
    assert [metric.value for metric in logged] == pytest.approx(losses)
    assert run.data.metrics["evaluation/mean_dice"] == pytest.approx(dice[-1])
    assert {"evaluation/dice_bright", "evaluation/dice_brighter"} <= set(run.data.metrics)
    assert len(client.get_metric_history(run.info.run_id, "step/loss")) == 72
    assert (run.data.tags["run.status"], run.info.status) == ("aborted", "FINISHED"), "below its target, but in order"
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert kept >= {"checkpoint.pth", "unet3d.log", "log.jsonl", "run.json"}

    (offline,) = (logs / "wandb").glob("offline-run-*/run-*.wandb")
    stored = offline.read_bytes()
    assert all(name.encode() in stored for name in ("step/loss", "train/samples_per_s", "evaluation/dice_brighter"))
    staged = {path.stat().st_size for path in (logs / "wandb" / "artifacts").rglob("*") if path.is_file()}
    assert (logs / "checkpoint.pth").stat().st_size in staged
    assert not (tmp_path / "home").exists(), "nothing is written outside the folders given"

    # TensorBoard would draw two runs in one folder as one line.
    program("--data_dir", balls, "--log_dir", logs, *TINY, "--epochs", 1, "--trackers", "tensorboard")
    assert (logs / "tensorboard.1").is_dir()
    assert len(list((logs / "tensorboard").iterdir())) == 1
    assert not (logs / "log.jsonl").exists()
    assert (logs / "run.json").exists()


def test_only_rank_0_has_trackers(program: Program, balls: Path, tmp_path: Path) -> None:
    program("--data_dir", balls, "--log_dir", tmp_path, *TINY, "--epochs", 1, "--trackers", "tensorboard", ranks=2)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_a_custom_tracker_that_fails(program: Program, balls: Path, tmp_path: Path) -> None:
    """`tests.integration.test_trackers` is importable from the project's folder, as a user's own module would be."""
    spec = f"{__name__}:Custom(name='mine')"
    done = program("--data_dir", balls, "--log_dir", tmp_path, *TINY, "--epochs", 1, "--trackers", spec)
    names = (tmp_path / "mine").read_text().split()
    assert names[:2] == ["InitStarted", "PreflightEnd"]
    assert names[-2:] == ["RunStopped", "RunFinalized"]
    assert [line for line in done.stderr.splitlines() if "Custom" in line] == [
        "warning: Custom failed (ValueError: not today); its record may be incomplete, training goes on"
    ]


def test_trackers_are_closed_before_torchrun_ends_a_diverged_run(program: Program, balls: Path, tmp_path: Path) -> None:
    """torchrun ends every rank as soon as one has exited with a nonzero status, which is 3 here."""
    arguments = ("--data_dir", balls, "--log_dir", tmp_path, *TINY, "--epochs", 9, "--learning_rate", 1e30)
    done = program(*arguments, "--trackers", f"{__name__}:Custom(name='mine', slow_s=4.0)", ranks=2, ok=False)
    assert "diverged" in done.stdout
    assert (tmp_path / "mine").read_text().split()[-1] == "RunFinalized"


class Custom:
    """A user's tracker that records the names of events and fails at the start of each epoch."""

    def __init__(self, log_dir: Path, name: str, slow_s: float = 0.0) -> None:
        self._file = log_dir / name
        self._slow_s = slow_s

    def on(self, event: object) -> None:
        if type(event).__name__ == "RunFinalized":
            time.sleep(self._slow_s)
        with self._file.open("a") as file:
            print(type(event).__name__, file=file)
        if type(event).__name__ == "EpochStarted":
            raise ValueError("not today")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            ("tensorbord",),
            "--trackers 'tensorbord': unknown name; available: jsonl, mlflow, mlperf, tensorboard, wandb",
        ),
        (("wandb(projct='a')",), "--trackers wandb: unknown argument 'projct'; it takes project='unet3d'"),
        (("wandb(project=open)",), "expected a name or name(key=value, …) with plain values"),
        (("mlperf", "mlperf"), "--trackers names mlperf twice"),
        (("no.such:Thing",), "there is no module no"),
    ],
)
def test_a_wrong_spec_is_one_line_and_changes_nothing(
    program: Program, balls: Path, trained: Path, tmp_path: Path, specs: tuple[str, ...], message: str
) -> None:
    shutil.copy(trained / "checkpoint.pth", tmp_path / "checkpoint.pth")
    done = program("--data_dir", balls, "--log_dir", tmp_path, *TINY, "--trackers", *specs, ok=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
    assert (tmp_path / "checkpoint.pth").exists(), "an earlier run's checkpoint is not renamed"


# Progress bars


def on_a_terminal(arguments: list[str]) -> str:
    """Returns what the program writes to stderr, a terminal of 200 columns; stdout is not a terminal."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (50, 200))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}
    command = [sys.executable, "main.py", *arguments]
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.DEVNULL, stderr=follower)
    os.close(follower)
    written = b""
    try:
        while block := os.read(leader, 65536):
            written += block
    except OSError:  # the program has closed the terminal
        pass
    finally:
        os.close(leader)
        assert process.wait(60) == 0, written.decode()
    return written.decode()


def test_on_a_terminal_epoch_loss_rate_dice_and_time_left_are_shown(balls: Path, tmp_path: Path) -> None:
    arguments = ["--data_dir", balls, "--log_dir", tmp_path, *TINY, *SHORT]
    written = on_a_terminal([str(argument) for argument in arguments])
    drawn = [line for line in re.split(r"[\r\n]", written) if line.startswith("epoch 12/12 rate 0.3")]
    (dice,) = [event["mean_dice"] for event in events_of(tmp_path, "EvaluationStopped") if event["epoch"] == 10]
    assert any("72/72" in line for line in drawn)
    # [elapsed<left, rate, loss, Dice]: the Dice of the previous evaluation.
    pattern = rf"\[\d\d:\d\d<\d\d:\d\d, .*(batch/s|s/batch), loss \d\.\d{{4}}, Dice {float(str(dice)):.4f}\]"
    assert any(re.search(pattern, line) for line in drawn), drawn
    assert "evaluate" in written


def test_without_a_terminal_there_are_no_progress_bars(program: Program, balls: Path, tmp_path: Path) -> None:
    done = program("--data_dir", balls, "--log_dir", tmp_path, *TINY, "--epochs", 1)
    assert done.stderr == ""
    assert not re.search(r"[\r\x1b]", done.stdout)
