"""The runs of a series: each with a seed and a folder of its own, whole or made again, of one configuration."""

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
from submission.launching import launcher
from submission.logs import read_log
from submission.record import load_series
from tests.submission.conftest import OPEN, ORG, Bench, WriteRun


def test_runs_come_with_own_seeds_folders_and_places(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.start("--runs", "3") == 0
    assert sorted(path.name for path in bench.results.iterdir()) == [f"result_{number}.txt" for number in range(3)]
    assert len(set(bench.seeds())) == 3
    for number in range(3):
        own = bench.runs / f"run_{number}"
        assert (own / "unet3d.log").read_bytes() == (bench.results / f"result_{number}.txt").read_bytes()
        assert (own / "console.txt").read_text() == ""
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"run 1 of 3: {bench.runs / 'run_0' / 'console.txt'}"
    assert lines[1].startswith("run 1 of 3: success after 4 epochs, 1.00 min, seed ")
    assert "; about 0:00:0" in lines[1]
    assert lines[-1].startswith("run 3 of 3: success")
    assert "left" not in lines[-1]


def test_a_series_goes_on_where_it_was(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.start("--runs", "2") == 0
    before = bench.seeds()
    assert bench.start("--runs", "3") == 0
    assert bench.seeds()[:2] == before
    assert f"2 of 3 runs are done, in {bench.runs}" in capsys.readouterr().out
    (bench.results / "result_1.txt").unlink()
    assert bench.start("--runs", "3") == 0
    assert bench.seeds()[:2] == before, "a log that is missing is put back in place"


def test_a_broken_run_is_made_again_from_scratch_with_another_seed(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.start("--runs", "2", orders=[{"seed": 8}, {"seed": 9, "exit": 137}, {}]) == 0
    assert 9 not in bench.seeds()
    found = load_series(bench.runs)
    assert found
    (broken,) = found.broken
    assert (broken.folder, broken.seed, broken.why) == ("run_1.broken_1", 9, "ended with the exit status 137")
    assert (bench.runs / "run_1.broken_1" / "console.txt").read_text() == "something has happened\n"
    assert found.seeds == {9, *bench.seeds()}
    assert "run_1 ended with the exit status 137" in capsys.readouterr().err


def test_what_breaks_off_again_and_again_needs_a_person(bench: Bench) -> None:
    with pytest.raises(UserError, match="run_0 was broken off 2 times, the last one: ended with the exit status 4"):
        bench.start("--runs", "2", orders=[{"exit": 4}, {"exit": 4, "lines": 0}])
    with pytest.raises(UserError, match=r"^the run was refused: something has happened$"):
        bench.start("--runs", "2", orders=[{"exit": 2}])
    assert not any(bench.results.iterdir())
    assert bench.start("--runs", "1") == 0


def test_a_run_that_diverged_counts_and_is_not_made_again(bench: Bench, write_open: WriteRun, tmp_path: Path) -> None:
    """Else a series could drop the runs that it does not like."""
    bench.template = write_open(tmp_path / "aborted.log", seed=4711, converges=False)
    assert bench.start("--runs", "1", orders=[{"exit": 3, "lines": 1000}]) == 0
    found = load_series(bench.runs)
    assert found
    assert [run.status for run in found.runs] == ["aborted"]
    assert found.broken == []


def test_no_seed_comes_twice(bench: Bench) -> None:
    assert bench.start("--runs", "2", orders=[{"seed": 5}, {"seed": 5}, {"seed": 6}]) == 0
    assert bench.seeds() == [5, 6]
    with pytest.raises(UserError, match="drew the seed 5, which another run"):
        bench.start("--runs", "3", orders=[{"seed": 5}, {"seed": 5}])


def test_a_run_that_was_resumed_or_whose_log_is_cut_is_none(bench: Bench, write_open: WriteRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="left a log that is not whole: line 20: ends with"):
        bench.start("--runs", "1", orders=[{"exit": 0, "lines": 20}, {"exit": 0, "lines": 20}])
    bench.template = write_open(tmp_path / "resumed.log", seed=4711, reasons=["the run was resumed"])
    with pytest.raises(UserError, match="of a resumed run"):
        bench.start("--runs", "1")
    with pytest.raises(UserError, match=r"left no unet3d\.log"):
        bench.start("--runs", "1", orders=[{"exit": 0, "lines": 0}] * 2)


def test_a_series_that_was_ended_in_a_run_makes_it_again(bench: Bench) -> None:
    """As after a power cut: the run's folder is there, and nobody knows of it."""
    bench.start("--runs", "1")
    (bench.runs / "run_1").mkdir()
    (bench.runs / "run_1" / "unet3d.log").write_text((bench.runs / "run_0" / "unet3d.log").read_text())
    assert bench.start("--runs", "2") == 0
    found = load_series(bench.runs)
    assert found
    assert [broken.why for broken in found.broken] == ["the series was ended in it"]


def test_a_signal_ends_the_run_and_then_the_series(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert bench.start("--runs", "1", orders=[{"stays": signal.SIGTERM}]) == 128 + signal.SIGTERM
    assert "start it again" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert bench.start("--runs", "1") == 0
    found = load_series(bench.runs)
    assert found
    assert len(found.broken) == 1


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ([*OPEN, "--learning_rate", "0.5"], "learning_rate 0.5, was 1.0"),
        ([*OPEN, "--ruleset", "3.0.0"], "ruleset 3.0.0, was 4.0.0"),
    ],
)
def test_a_changed_configuration_is_refused(changed: list[str], told: str, bench: Bench) -> None:
    bench.start("--runs", "1")
    with pytest.raises(UserError, match=told):
        bench.start("--runs", "2", arguments=changed)
    assert bench.start("--runs", "2", arguments=[*OPEN, "--verbose"]) == 0


def test_changed_code_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.start("--runs", "1")
    monkeypatch.setattr("submission.series.commit", lambda: "another")
    with pytest.raises(UserError, match="commit another, was"):
        bench.start("--runs", "2")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([*OPEN, "--seed", "7"], "--seed does not go with a series"),
        ([*OPEN, "--resume"], "--resume does not go with a series"),
        ([*OPEN, "--log_dir", "logs"], "--log_dir does not go with a series"),
        ([*OPEN, "--benchmark"], "--benchmark does not go with a series"),
        (["--data_dir", "data"], "--submission_org is missing"),
        ([*OPEN, "--epochs", "many"], "must be an integer, not 'many'"),
    ],
)
def test_arguments_that_no_series_can_have(arguments: list[str], told: str, bench: Bench) -> None:
    with pytest.raises(UserError, match=told):
        bench.start("--runs", "1", arguments=arguments)


def test_caches_are_cleared_or_the_log_says_that_they_were_not(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a stand-in: clearing the machine's own would slow everyone on it."""
    cleared = tmp_path / "cleared"
    bench.start("--runs", "1")
    bench.start("--runs", "2", "--clear_caches", f"echo once >>{shlex.quote(str(cleared))}")
    bench.start("--runs", "3", "--clear_caches", "echo no permission >&2; false")
    told = [read_log(path).values["cache_clear"] for path in sorted(bench.results.iterdir())]
    assert told == [False, True, False]
    assert cleared.read_text() == "once\n"
    assert "the page cache could not be cleared (no permission)" in capsys.readouterr().err


def test_what_stands_before_main() -> None:
    assert launcher(None, 1) == [sys.executable]
    assert launcher(None, 8)[1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"]
    assert launcher("srun -N 4 'a b'", 1) == ["srun", "-N", "4", "a b"]
    for prefix, processes, told in (("srun", 8, "drop --nproc_per_node"), ("'", 1, "quotation"), (" ", 1, "is empty")):
        with pytest.raises(UserError, match=told):
            launcher(prefix, processes)


def test_a_launcher_that_is_not_there(tmp_path: Path) -> None:
    arguments = ["--result_dir", str(tmp_path / ORG), "--system", "abacus", "--launch", "/nowhere/srun"]
    with pytest.raises(UserError, match="/nowhere/srun: cannot be started"):
        main(["run", *arguments, "--", *OPEN])
    with pytest.raises(UserError, match="--launch needs --system"):
        main(["run", "--result_dir", str(tmp_path / ORG), "--launch", "srun", "--", *OPEN])


def test_the_system_is_named_by_its_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.Namespace(launch=None, nproc_per_node=8)
    monkeypatch.setattr(series, "nvidia", lambda what: "NVIDIA H200 (SXM)")
    assert series.default_system(options) == "8xNVIDIA_H200_SXM"
    monkeypatch.setattr(series, "nvidia", lambda what: "")
    monkeypatch.setattr(series, "cpu_name", lambda: "../AMD EPYC 9")
    assert series.default_system(options) == "8x.._AMD_EPYC_9"


def test_two_series_in_one_folder_keep_out_of_each_others_way(bench: Bench) -> None:
    bench.runs.mkdir(parents=True)
    with series._alone(bench.runs), pytest.raises(UserError, match="another `submission run` is at work there"):
        bench.start("--runs", "1")


def test_a_disk_that_is_full_is_told_in_one_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_command_line_is_told_in_one_line(tmp_path: Path) -> None:
    mistakes = [
        ([], "required: command"),
        (["run"], "required: --result_dir"),
        (["sell"], "invalid choice"),
        (["score", "--result_dir", str(tmp_path)], "no results/SYSTEM/unet3d"),
        (["run", "--result_dir", "x", "--runs", "41"], "must be between 1 and 40, not 41"),
        (["run", "--result_dir", "x", "--system", "../x", "--", *OPEN], "becomes a folder's name"),
    ]
    for arguments, told in mistakes:
        with pytest.raises(UserError, match=told):
            main(arguments)
