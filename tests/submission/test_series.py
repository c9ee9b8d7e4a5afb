"""The runs of a series: own seeds and folders, one configuration, failed runs repeated."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from submission import series
from submission.__main__ import main
from submission.launching import launch_command
from submission.logs import read_log
from submission.record import load_series
from tests.common.test_locks import held_elsewhere
from tests.submission.conftest import OPEN, ORG, Bench, WriteRun


def test_each_run_has_its_own_seed_folder_and_result(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.start("--runs", "3") == 0
    assert sorted(path.name for path in bench.results.iterdir()) == [f"result_{number}.txt" for number in range(3)]
    assert len(set(bench.seeds())) == 3
    for number in range(3):
        own = bench.runs / f"run_{number}"
        assert (own / "unet3d.log").read_bytes() == (bench.results / f"result_{number}.txt").read_bytes()
        assert (own / "console.txt").read_text() == ""
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run 1 of 3: {bench.runs / 'run_0' / 'console.txt'}"
    assert lines[1].startswith("run 1 of 3: target reached after 4 epochs, 1.00 min, seed ")
    assert "; about 0:00:0" in lines[1]
    assert lines[-1].startswith("run 3 of 3: target reached")
    assert "left" not in lines[-1]


def test_a_series_continues(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.start("--runs", "2") == 0
    before = bench.seeds()
    assert bench.start("--runs", "3") == 0
    assert bench.seeds()[:2] == before
    assert f"2 of 3 runs are done, in {bench.runs}" in capsys.readouterr().out
    (bench.results / "result_1.txt").unlink()
    assert bench.start("--runs", "3") == 0
    assert bench.seeds()[:2] == before, "a missing log is copied again"


def test_a_failed_run_is_repeated_from_scratch_with_another_seed(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.start("--runs", "2", orders=[{"seed": 8}, {"seed": 9, "exit": 137}, {}]) == 0
    assert 9 not in bench.seeds()
    found = load_series(bench.runs)
    assert found
    (failed,) = found.broken
    assert (failed.folder, failed.seed, failed.why) == ("run_1.broken_1", 9, "exit status 137")
    assert (bench.runs / "run_1.broken_1" / "console.txt").read_text() == "something has happened\n"
    assert found.seeds == {9, *bench.seeds()}
    assert "run_1 failed: exit status 137" in capsys.readouterr().err


def test_a_run_that_fails_twice_ends_the_series(bench: Bench) -> None:
    with pytest.raises(UserError, match="run_0 failed 2 times; the last cause: exit status 4"):
        bench.start("--runs", "2", orders=[{"exit": 4}, {"exit": 4, "lines": 0}])
    with pytest.raises(UserError, match=r"^main\.py refused to run: something has happened$"):
        bench.start("--runs", "2", orders=[{"exit": 2}])
    assert not any(bench.results.iterdir())
    assert bench.start("--runs", "1") == 0


def test_a_run_that_diverged_counts_and_is_not_repeated(bench: Bench, write_open: WriteRun, tmp_path: Path) -> None:
    """Otherwise a series could drop unwelcome runs."""
    bench.template = write_open(tmp_path / "aborted.log", seed=4711, converges=False)
    assert bench.start("--runs", "1", orders=[{"exit": 3, "lines": 1000}]) == 0
    found = load_series(bench.runs)
    assert found
    assert [run.status for run in found.runs] == ["aborted"]
    assert found.broken == []


def test_no_seed_is_used_twice(bench: Bench) -> None:
    assert bench.start("--runs", "2", orders=[{"seed": 5}, {"seed": 5}, {"seed": 6}]) == 0
    assert bench.seeds() == [5, 6]
    with pytest.raises(UserError, match="the same seed 5 as another run"):
        bench.start("--runs", "3", orders=[{"seed": 5}, {"seed": 5}])


def test_a_resumed_run_or_a_cut_log_is_a_failure(bench: Bench, write_open: WriteRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an invalid log: line 20: ends with"):
        bench.start("--runs", "1", orders=[{"exit": 0, "lines": 20}, {"exit": 0, "lines": 20}])
    bench.template = write_open(tmp_path / "resumed.log", seed=4711, reasons=["the run was resumed"])
    with pytest.raises(UserError, match="from a resumed run"):
        bench.start("--runs", "1")
    with pytest.raises(UserError, match=r"no unet3d\.log"):
        bench.start("--runs", "1", orders=[{"exit": 0, "lines": 0}] * 2)


def test_a_series_that_ended_during_a_run_repeats_it(bench: Bench) -> None:
    """As after a power cut: the run's folder exists, but has no record."""
    bench.start("--runs", "1")
    (bench.runs / "run_1").mkdir()
    (bench.runs / "run_1" / "unet3d.log").write_text((bench.runs / "run_0" / "unet3d.log").read_text())
    assert bench.start("--runs", "2") == 0
    found = load_series(bench.runs)
    assert found
    assert [failed.why for failed in found.broken] == ["the series ended during this run"]


def test_a_signal_ends_the_run_and_then_the_series(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert bench.start("--runs", "1", orders=[{"stays": signal.SIGTERM}]) == 128 + signal.SIGTERM
    assert "the same command continues the series" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert bench.start("--runs", "1") == 0
    found = load_series(bench.runs)
    assert found
    assert len(found.broken) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([*OPEN, "--learning_rate", "0.5"], "learning_rate 0.5, was 1.0"),
        ([*OPEN, "--ruleset", "3.0.0"], "ruleset 3.0.0, was 4.0.0"),
    ],
)
def test_a_changed_configuration_is_refused(changed: list[str], message: str, bench: Bench) -> None:
    bench.start("--runs", "1")
    with pytest.raises(UserError, match=message):
        bench.start("--runs", "2", arguments=changed)
    assert bench.start("--runs", "2", arguments=[*OPEN, "--verbose"]) == 0


def test_changed_code_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.start("--runs", "1")
    monkeypatch.setattr("submission.series.commit", lambda: "another")
    with pytest.raises(UserError, match="commit another, was"):
        bench.start("--runs", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*OPEN, "--seed", "7"], "--seed is not allowed in a series"),
        ([*OPEN, "--resume"], "--resume is not allowed in a series"),
        ([*OPEN, "--log_dir", "logs"], "--log_dir is not allowed in a series"),
        ([*OPEN, "--benchmark"], "--benchmark is not allowed in a series"),
        (["--data_dir", "data"], "set --submission_org; a placeholder is not accepted"),
        ([*OPEN, "--epochs", "many"], "must be an integer, not 'many'"),
    ],
)
def test_arguments_that_a_series_does_not_allow(arguments: list[str], message: str, bench: Bench) -> None:
    with pytest.raises(UserError, match=message):
        bench.start("--runs", "1", arguments=arguments)


def test_the_log_states_whether_caches_were_cleared(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a dummy command: clearing the real caches would slow down everyone on the machine."""
    cleared = tmp_path / "cleared"
    bench.start("--runs", "1")
    bench.start("--runs", "2", "--clear_caches", f"echo once >>{shlex.quote(str(cleared))}")
    bench.start("--runs", "3", "--clear_caches", "echo no permission >&2; false")
    cleared_before = [read_log(path).values["cache_clear"] for path in sorted(bench.results.iterdir())]
    assert cleared_before == [False, True, False]
    assert cleared.read_text() == "once\n"
    assert "the page cache could not be cleared (no permission)" in capsys.readouterr().err


def test_the_launch_command() -> None:
    assert launch_command(None, 1) == [sys.executable]
    assert launch_command(None, 8)[1:] == ["-m", "launch.torchrun", "--standalone", "--nproc_per_node=8"]
    assert launch_command("srun -N 4 'a b'", 1) == ["srun", "-N", "4", "a b"]
    for prefix, processes, message in (
        ("srun", 8, "drop --nproc_per_node"),
        ("'", 1, "quotation"),
        (" ", 1, "is empty"),
    ):
        with pytest.raises(UserError, match=message):
            launch_command(prefix, processes)


def test_a_missing_launcher(tmp_path: Path) -> None:
    arguments = ["--result_dir", str(tmp_path / ORG), "--system", "abacus", "--launch", "/nowhere/srun"]
    with pytest.raises(UserError, match="/nowhere/srun: cannot be started"):
        main(["run", *arguments, "--", *OPEN])
    with pytest.raises(UserError, match="--launch requires --system"):
        main(["run", "--result_dir", str(tmp_path / ORG), "--launch", "srun", "--", *OPEN])


def test_the_system_is_named_by_its_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(launch=None, nproc_per_node=8)
    monkeypatch.setattr(series, "nvidia_smi", lambda field: "NVIDIA H200 (SXM)")
    assert series.default_system(options) == "8xNVIDIA_H200_SXM"
    monkeypatch.setattr(series, "nvidia_smi", lambda field: "")
    monkeypatch.setattr(series, "cpu_name", lambda: "../AMD EPYC 9")
    assert series.default_system(options) == "8x.._AMD_EPYC_9"


def test_a_second_series_in_the_folder_is_refused(bench: Bench) -> None:
    bench.runs.mkdir(parents=True)
    with held_elsewhere(bench.runs / "lock") as other:
        with pytest.raises(UserError, match=f"{bench.runs} is in use by another run, process {other.pid} on "):
            bench.start("--runs", "1")
        assert not bench.results.exists() or not any(bench.results.iterdir())
    assert bench.start("--runs", "1") == 0


def test_a_full_disk_is_reported_in_one_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "run_0")

    monkeypatch.setattr(series, "launch_run", full)
    with pytest.raises(UserError, match="run_0: No space left on device"):
        bench.start("--runs", "1")


def test_a_damaged_record_is_refused(bench: Bench) -> None:
    bench.start("--runs", "1")
    for content in ("{", "[]", json.dumps({"format": 1, "runs": []})):
        (bench.runs / "series.json").write_text(content)
        with pytest.raises(UserError, match=r"series\.json: damaged"):
            bench.start("--runs", "2")


def test_command_line_mistakes_are_reported_in_one_line(tmp_path: Path) -> None:
    mistakes = [
        ([], "required: command"),
        (["run"], "required: --result_dir"),
        (["sell"], "invalid choice"),
        (["score", "--result_dir", str(tmp_path)], "has no results/SYSTEM/unet3d"),
        (["run", "--result_dir", "x", "--runs", "41"], "must be between 1 and 40, not 41"),
        (["run", "--result_dir", "x", "--system", "../x", "--", *OPEN], "is used as a folder name"),
    ]
    for arguments, message in mistakes:
        with pytest.raises(UserError, match=message):
            main(arguments)
