"""The packed scripts need no argument file that is not packed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from common.errors import UserError
from submission import checkers, package, scripts
from submission.__main__ import main
from tests.submission.conftest import Bench

RECIPE = "recipes/tracked.args"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one recipe; `my.args` beside it is not tracked."""
    folder = tmp_path / "project"
    (folder / "recipes").mkdir(parents=True)
    (folder / "main.py").write_text("")
    (folder / RECIPE).write_text("--batch_size 28  # as in the rules\n")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    (folder / "my.args").write_text("# mine\n--overlap 0.25\n--submission_org 'ACME'  # us\n--data_dir /my/data\n")
    monkeypatch.setattr(package, "PROJECT", folder)
    monkeypatch.setattr(checkers, "check_all", lambda *_: [])
    return folder


def set_arguments(bench: Bench, *arguments: str) -> None:
    path = bench.runs / "series.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"arguments": arguments}))


def pack(bench: Bench) -> int:
    return main(["pack", "--result_dir", str(bench.result_dir)])


def test_a_file_that_is_not_packed_is_replaced_by_its_flags(copied: Bench, project: Path) -> None:
    set_arguments(copied, "@my.args", f"@{RECIPE}", "--data_dir", "data")
    assert pack(copied) == 0
    code = copied.result_dir / "benchmarks" / "unet3d" / "implementations" / "pytorch"
    flags = f"--overlap 0.25 --submission_org ACME @{RECIPE}"
    assert f' main.py {flags} --data_dir "$DATA_DIR"' in (code / "abacus" / "run_and_time.sh").read_text()
    assert f" main.py {flags} --data_dir DATA" in (code / "abacus" / "README.md").read_text()
    assert json.loads((code / "abacus" / "abacus_pytorch.json").read_text())["arguments"] == flags
    assert not list(code.rglob("my.args"))


def test_files_within_files_and_other_spellings_of_a_path(project: Path) -> None:
    (project / "outer.args").write_text(f"@my.args\n@{RECIPE}\n--model 'unet3d(filters=(8, 16))'\n")
    mine = ["--overlap", "0.25", "--submission_org", "ACME", "--data_dir", "/my/data"]
    packed = package.tracked_files(project)
    replaced = scripts.with_files_replaced(["--amp", "@outer.args"], project, packed)
    assert replaced == ["--amp", *mine, f"@{RECIPE}", "--model", "unet3d(filters=(8, 16))"]
    for spelling in (f"@./{RECIPE}", f"@{project / RECIPE}"):
        assert scripts.with_files_replaced([spelling], project, packed) == [f"@{RECIPE}"]
    (project / RECIPE).write_text("@my.args\n")
    assert scripts.with_files_replaced([f"@{RECIPE}"], project, packed) == mine, "it would name a file that is missing"
    (project / "my.args").write_text("@outer.args\n")
    with pytest.raises(UserError, match=r"argument file outer\.args includes itself"):
        scripts.with_files_replaced(["@outer.args"], project, packed)


def test_nothing_is_packed_with_flags_that_the_runs_did_not_have(copied: Bench, project: Path) -> None:
    set_arguments(copied, "@my.args", f"@{RECIPE}", "--data_dir", "data")
    mine = project / "my.args"
    for content, message in (
        (
            mine.read_text() + "--momentum 0.5\n",
            r"^@my\.args .*: changed since the runs: momentum 0\.5, was 0\.9; rest",
        ),
        ("--submission_org ACME\n", r"changed since the runs: overlap 0\.5, was 0\.25"),
        ("--overlap '0.25\n", "an argument file has the line"),
        ("--colour red\n", "unrecognized arguments: --colour red"),
    ):
        mine.write_text(content)
        with pytest.raises(UserError, match=message):
            pack(copied)
    mine.write_bytes("--overlap 0.25\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"argument file .*my\.args: not UTF-8 text"):
        pack(copied)
    mine.unlink()
    with pytest.raises(UserError, match=r"started with @my\.args, which cannot be read any more \(No such file"):
        pack(copied)
    assert [path.name for path in copied.result_dir.iterdir()] == ["results"]
