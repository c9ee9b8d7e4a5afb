"""The real program trains, evaluates, saves and logs, on one and on several ranks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data_loading.dataset import read_spec_and_split
from data_loading.integrity import split_digest
from tests.integration.conftest import TINY, Program, events_of


def scores(output: str) -> dict[str, str]:
    """Returns the `name value` lines of an evaluation as a dict."""
    return dict(line.rsplit(" ", 1) for line in output.splitlines() if line)


def check_log(log: Path, ruleset: str = "4.0.0") -> subprocess.CompletedProcess[str]:
    """Runs MLPerf's compliance checker on a log."""
    command = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training", "--ruleset", ruleset]
    output = str(log.with_suffix(".checked"))
    return subprocess.run([*command, "--log_output", output, str(log)], capture_output=True, text=True, check=False)


def losses(logs: Path) -> list[float]:
    return [float(event["loss"]) for event in events_of(logs, "EpochStopped")]  # type: ignore[arg-type]


def test_a_run_reaches_its_target_and_reports_success(trained: Path) -> None:
    (stopped,) = events_of(trained, "RunStopped")
    evaluations = events_of(trained, "EvaluationStopped")
    assert stopped["status"] == "success"
    assert [event["epoch"] for event in evaluations][:2] == [10, 15]
    assert float(evaluations[-1]["mean_dice"]) >= 0.88  # type: ignore[arg-type]
    assert all(float(event["mean_dice"]) < 0.88 for event in evaluations[:-1])  # type: ignore[arg-type]
    assert losses(trained)[-1] < 0.6 * losses(trained)[0], "the network must have learned"


def test_mlperf_accepts_the_log(trained: Path) -> None:
    checked = check_log(trained / "unet3d.log")
    assert checked.returncode == 0, checked.stderr
    assert "SUCCESS" in checked.stderr


def test_the_run_file_names_configuration_environment_seeds_and_data(trained: Path, balls: Path) -> None:
    run = json.loads((trained / "run.json").read_text())
    assert run["config"]["quality_threshold"] == 0.88
    assert run["environment"]["torch"] == torch.__version__
    assert run["seeds"]["master"] == 7
    assert run["division"] == "open"
    assert any("data set balls" in reason for reason in run["rule_violations"])
    assert run["data_digest"] == split_digest(balls, read_spec_and_split(balls, ())[1])


def test_evaluation_of_the_checkpoint_gives_the_scores_of_training(
    program: Program, balls: Path, trained: Path
) -> None:
    done = program("--exec_mode", "evaluate", "--data_dir", balls, "--load_ckpt_path", trained / "checkpoint.pth")
    found = scores(done.stdout)
    best = max(events_of(trained, "EvaluationStopped"), key=lambda event: event["mean_dice"])  # type: ignore[arg-type, return-value]
    assert list(found) == ["epoch", "L1 dice", "L2 dice", "mean_dice", "eval_loss"]
    assert int(found["epoch"]) == best["epoch"]
    assert float(found["mean_dice"]) == pytest.approx(best["mean_dice"], abs=1e-6)
    assert float(found["eval_loss"]) == pytest.approx(best["loss"], abs=1e-6)


def test_evaluation_is_the_same_on_any_number_of_ranks(program: Program, balls: Path, trained: Path) -> None:
    """Three cases on two ranks (uneven), on three, and on four (one rank has no case)."""
    arguments = ("--exec_mode", "evaluate", "--data_dir", balls, "--load_ckpt_path", trained / "checkpoint.pth")
    alone = program(*arguments).stdout
    assert [program(*arguments, ranks=ranks).stdout for ranks in (2, 3, 4)] == [alone] * 3


def test_two_ranks_with_batch_norm_evaluate_the_network_that_is_saved(
    program: Program, balls: Path, tmp_path: Path
) -> None:
    """Each rank's running means are of its own last batch; scores are those of rank 0's, as the checkpoint is."""
    arguments = ("--data_dir", balls, "--log_dir", tmp_path, *TINY, "--normalization", "batchnorm", "--epochs", 1)
    program(*arguments, "--start_eval_at", 1, "--evaluate_every", 1, ranks=2)
    (evaluated,) = events_of(tmp_path, "EvaluationStopped")
    done = program("--exec_mode", "evaluate", "--data_dir", balls, "--load_ckpt_path", tmp_path / "checkpoint.pth")
    found = scores(done.stdout)
    assert float(found["eval_loss"]) == pytest.approx(evaluated["loss"], abs=1e-6)
    assert float(found["mean_dice"]) == pytest.approx(evaluated["mean_dice"], abs=1e-6)


# A tenth of TINY's learning rate, with which the network predicts no foreground after three epochs and diverges.
SCHEDULE = (*TINY, "--epochs", 3, "--start_eval_at", 3, "--evaluate_every", 1, "--learning_rate", 0.03)


@pytest.fixture(scope="module")
def batch_of_six(program: Program, balls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of a run on one rank with batches of six samples."""
    logs = tmp_path_factory.mktemp("six")
    program("--data_dir", balls, "--log_dir", logs, *SCHEDULE, "--batch_size", 6)
    return logs


@pytest.mark.parametrize(("ranks", "batch_size", "ga_steps"), [(2, 3, 1), (3, 2, 1), (1, 2, 3), (2, 1, 3)])
def test_ranks_and_accumulation_train_as_one_big_batch(
    program: Program, balls: Path, batch_of_six: Path, tmp_path: Path, ranks: int, batch_size: int, ga_steps: int
) -> None:
    """The same global batch of 6, however it is divided, gives the same losses and scores up to rounding."""
    arguments = ("--data_dir", balls, "--log_dir", tmp_path, *SCHEDULE)
    program(*arguments, "--batch_size", batch_size, "--ga_steps", ga_steps, ranks=ranks)
    assert losses(tmp_path) == pytest.approx(losses(batch_of_six), rel=1e-4)
    (expected,), (found,) = (events_of(logs, "EvaluationStopped") for logs in (batch_of_six, tmp_path))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert found["mean_dice"] == pytest.approx(expected["mean_dice"], abs=1e-3)
    opened = events_of(tmp_path, "DataOpened")[0]
    assert opened["global_batch_size"] == 6
    assert opened["samples_per_epoch"] == 12


def test_two_ranks_to_a_sample_train_as_one(program: Program, balls: Path, tmp_path: Path) -> None:
    """The same losses and scores, on slabs read by loader workers; also of a run that is continued on them."""
    one, two, first = (tmp_path / name for name in ("one", "two", "first"))
    shared = ("--ranks_per_sample", 2, "--layout", "NDHWC", "--num_workers", 1)
    program("--data_dir", balls, "--log_dir", one, *SCHEDULE)
    program("--data_dir", balls, "--log_dir", two, *SCHEDULE, *shared, ranks=2)
    program("--data_dir", balls, "--log_dir", first, *SCHEDULE, *shared, "--epochs", 2, ranks=2)
    assert losses(first) == losses(two)[:2]
    done = program("--data_dir", balls, "--log_dir", first, *SCHEDULE, *shared, "--resume", ranks=2)
    assert "resumed from" in done.stdout
    assert losses(first) == losses(two)[2:]
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    (expected,), (found,) = (events_of(logs, "EvaluationStopped") for logs in (one, two))
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["mean_dice"] == pytest.approx(expected["mean_dice"], abs=1e-4)
    for logs in (one, two):
        (opened,) = events_of(logs, "DataOpened")
        assert (opened["global_batch_size"], opened["samples_per_epoch"]) == (2, 12)
        assert {event["samples"] for event in events_of(logs, "EpochStopped")} == {12}


def test_two_ranks_in_channels_last_train_without_a_warning(program: Program, balls: Path, tmp_path: Path) -> None:
    """DDP warns when a gradient's strides differ from its bucket's, and then copies it in every step."""
    done = program("--data_dir", balls, "--log_dir", tmp_path, *TINY, "--layout", "NDHWC", "--epochs", 1, ranks=2)
    assert "Warning" not in done.stderr


def test_loader_workers_and_layout_change_nothing(program: Program, balls: Path, tmp_path: Path) -> None:
    logged: dict[str, Any] = {}
    for name, extra in {"none": (), "two": ("--num_workers", 2), "last": ("--layout", "NDHWC")}.items():
        program("--data_dir", balls, "--log_dir", tmp_path / name, *TINY, *extra, "--epochs", 2)
        logged[name] = losses(tmp_path / name)
    assert logged["two"] == logged["none"]  # bit for bit: a sample's randomness follows from (seed, epoch, case)
    assert logged["last"] == pytest.approx(logged["none"], rel=1e-4)


def test_a_continued_run_equals_an_uninterrupted_one(program: Program, balls: Path, tmp_path: Path) -> None:
    paths = {name: tmp_path / f"{name}.pth" for name in ("whole", "first", "second")}
    for name, epochs, extra in (
        ("whole", 4, ()),
        ("first", 2, ()),
        ("second", 4, ("--load_ckpt_path", paths["first"])),
    ):
        logs = ("--log_dir", tmp_path / name, "--save_ckpt_path", paths[name])
        program("--data_dir", balls, *logs, *TINY, "--epochs", epochs, *extra)
    assert losses(tmp_path / "first") + losses(tmp_path / "second") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 4
    whole, second = (torch.load(paths[name], weights_only=True)["last"]["network"] for name in ("whole", "second"))
    assert all(torch.equal(whole[name], second[name]) for name in whole)


def test_a_second_run_keeps_the_logs_of_the_first(program: Program, balls: Path, tmp_path: Path) -> None:
    for epochs in (1, 2):
        program("--data_dir", balls, "--log_dir", tmp_path, *TINY, "--epochs", epochs)
    assert len(events_of(tmp_path, "EpochStopped")) == 2
    first = (tmp_path / "unet3d.1.log").read_text()
    assert first.count('"run_start"') == 1
    assert (tmp_path / "unet3d.log").read_text().count('"run_start"') == 1
    assert json.loads((tmp_path / "run.1.json").read_text())["config"]["epochs"] == 1


def test_its_argument_file_repeats_a_run(program: Program, balls: Path, tmp_path: Path) -> None:
    program("--data_dir", balls, "--log_dir", tmp_path / "first", *TINY, "--epochs", 2, "--seed", -1)
    program(f"@{tmp_path / 'first' / 'run.args'}", "--log_dir", tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "first")
    first, again = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("first", "again"))
    assert first["seeds"] == again["seeds"]


def test_benchmark_reports_samples_over_time(program: Program, tmp_path: Path) -> None:
    done = program(
        *("--loader", "synthetic", "--log_dir", tmp_path, *TINY, "--benchmark"),
        *("--epochs", 2, "--batch_size", 4, "--warmup_steps", 20),
    )
    figures = json.loads((tmp_path / "benchmark.json").read_text())
    printed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.split()[0] in figures)
    assert printed.keys() == figures.keys()
    assert figures["verdict"] in ("input-bound", "compute-bound", "communication-bound")
    phases = ("data_wait_ms", "forward_backward_ms", "optimizer_ms", "communication_ms")
    assert sum(figures[phase] for phase in phases) == pytest.approx(figures["latency_mean_ms"])
    assert 0 < figures["share_of_peak"] < 1
    assert figures["iterations"] == 2 * 64 // 4 - 20
    assert figures["samples_per_s"] == pytest.approx(4e3 / figures["latency_mean_ms"], rel=1e-2)
    assert figures["latency_p90_ms"] <= figures["latency_p95_ms"] <= figures["latency_p99_ms"]
    assert not events_of(tmp_path, "EvaluationStarted")


def test_a_batch_that_no_memory_holds_is_refused_with_one_that_fits(program: Program, tmp_path: Path) -> None:
    many = ("--loader", "synthetic", "--log_dir", tmp_path, *TINY, "--steps_per_epoch", 1, "--epochs", 1)
    done = program(*many, "--batch_size", 100_000_000, ok=False)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("main.py: error: memory: a training step of 100000000 sample(s) takes ")
    assert re.search(r"are free; use --batch_size \d+ or less, with more --ga_steps", last)
    done = program(*many, "--batch_size", 1, "--val_batch_size", 100_000_000, ok=False)
    assert re.search(r"error: evaluation: .* use --val_batch_size \d+ or less$", done.stderr.splitlines()[-1])


def test_arguments_can_be_read_from_a_recipe(program: Program, balls: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.args"
    spec = "unet3d(filters=(4,8,8), deep_supervision=2)"  # which no other test trains in the real program
    recipe.write_text(f"# a comment\n--model '{spec}'  # three resolutions\n--epochs 1\n--num_workers 0\n")
    shapes = ("--input_shape", 16, 16, 16, "--val_input_shape", 16, 16, 16)
    program(f"@{recipe}", "--data_dir", balls, "--log_dir", tmp_path, *shapes)
    assert json.loads((tmp_path / "run.json").read_text())["config"]["model"] == spec
