"""`python3 -m benchmarks` as a process: tables on stdout and in a file, user errors in one line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main, parse
from benchmarks.harness import Options, Table
from common.errors import UserError
from tests.programs import ROOT

Program = Callable[..., subprocess.CompletedProcess[str]]


def test_a_suite_prints_its_tables_and_writes_them(run_python: Program, tmp_path: Path) -> None:
    file = tmp_path / "tables.json"
    done = run_python("-m", "benchmarks", "--suite", "evaluate", "--quick", "--device", "cpu", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    content = json.loads(file.read_text(encoding="utf-8"))
    environment = content["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["cpu"]
    assert "commit" in environment
    assert content["quick"] is True
    assert list(content["suites"]) == ["evaluate"]
    lines = done.stdout.splitlines()
    for table in content["suites"]["evaluate"]:
        heading = lines.index(f"### {table['title']}")
        assert lines[heading + 2] == f"| {' | '.join(table['columns'])} |"
        assert lines[heading + 3].startswith("| --- |")
        printed = [line.split("|")[1].strip() for line in lines[heading + 4 : heading + 4 + len(table["rows"])]]
        assert printed == [str(row[0]) for row in table["rows"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "speed"), "invalid choice: 'speed'"),
        (("--suite", "evaluate", "--json", "/nowhere/tables.json"), "its folder does not exist"),
        (("--suite", "storage", "--accelerator", "v100"), "invalid choice: 'v100'"),
    ],
)
def test_a_user_error_is_one_line(run_python: Program, arguments: tuple[str, ...], message: str) -> None:
    done = run_python("-m", "benchmarks", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("benchmarks: error: ")
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json", "."), "is a folder"),
        (("--work_dir", "/nowhere"), "no such folder"),
        (("--json", __file__), "test_program.py exists; give another name, or remove it"),
        (("--suite", "all", "--cases", "1"), "--cases must be at least 2"),
        (("--suite", "storage", "--full_size", "--cases", "5"), "--full_size sets .*; drop --cases and --quick"),
        (("--suite", "storage", "--full_size", "--quick"), "--full_size sets the number of volumes"),
        (("--num_workers", "-1"), "--num_workers must be at least 0"),
        (("--parts", "Choices"), "--parts has no effect on --suite evaluate, only on gpu"),
        (("--suite", "gpu", "--minutes", "0"), "must be at least 0.1, not 0"),
        (("--suite", "peers", "--minutes", "3"), "--minutes has no effect on --suite peers"),
        (("--suite", "peers", "--device", "cuda"), "compares runs on the CPU; drop --device cuda"),
    ],
)
def test_bad_arguments_are_refused_before_measuring(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(["--suite", "evaluate", *arguments])


def test_sigterm_leaves_no_synthetic_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--suite", "storage", "--quick", "--work_dir", str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/storage/*")) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143
    assert not list(tmp_path.iterdir())


def test_the_gpu_suite_needs_a_gpu_or_quick() -> None:
    with pytest.raises(UserError, match="there is none; with --quick"):
        main(["--suite", "gpu", "--device", "cpu"])


def test_a_wrong_result_ends_with_an_error_once_all_tables_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = [Table("Sums", ["a"], [[1]], problem="Sums: wrong"), Table("After", ["a"], [[2]])]
    monkeypatch.setattr("benchmarks.evaluate.run", lambda options: iter(tables))
    file = tmp_path / "tables.json"
    with pytest.raises(UserError, match="Sums: wrong"):
        main(["--suite", "evaluate", "--quick", "--device", "cpu", "--json", str(file)])
    assert "### After" in capsys.readouterr().out
    written = json.loads(file.read_text(encoding="utf-8"))["suites"]["evaluate"]
    assert [table["problem"] for table in written] == ["Sums: wrong", ""]


def test_a_failed_suite_keeps_the_tables_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(options: Options) -> list[Table]:
        raise UserError("out of luck")

    monkeypatch.setattr("benchmarks.__main__.SUITES", ("evaluate", "step"))
    monkeypatch.setattr("benchmarks.evaluate.run", lambda options: [Table("Kept", ["a"], [[1]])])
    monkeypatch.setattr("benchmarks.step.run", fail)
    file = tmp_path / "tables.json"
    with pytest.raises(UserError, match="out of luck"):
        main(["--suite", "all", "--quick", "--device", "cpu", "--json", str(file)])
    (kept,) = json.loads(file.read_text(encoding="utf-8"))["suites"]["evaluate"]
    assert kept == {"title": "Kept", "columns": ["a"], "rows": [[1]], "notes": [], "problem": ""}
