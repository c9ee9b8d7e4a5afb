"""The commit that a run records: whatever changes the code changes it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from runtime import environment
from runtime.environment import commit

COMMIT = "[0-9a-f]{40}"
COMMAND = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]


def git(project: Path, *arguments: str) -> None:
    subprocess.run([*COMMAND, "-C", str(project), *arguments], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit: a module, a binary file and a .gitignore."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "main.py").write_text("print('training')\n")
    (folder / "table.bin").write_bytes(b"\0\1\2")
    (folder / ".gitignore").write_text("/ignored/\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    monkeypatch.setattr(environment, "PROJECT", folder)
    return folder


def test_an_unchanged_checkout_is_named_by_its_commit(project: Path) -> None:
    before = commit()
    assert before is not None
    assert re.fullmatch(COMMIT, before)
    (project / "main.py").touch()
    for name in ("notes.txt", "ignored/module.py", "venv/lib/python3.11/site-packages/other/module.py"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("not this project's code")
    assert commit() == before


def test_two_edits_of_a_changed_checkout_are_told_apart(project: Path) -> None:
    clean = commit()
    found = []
    for text in ("print('one')\n", "print('two')\n", "print('one')\n"):
        (project / "main.py").write_text(text)
        found.append(str(commit()))
    assert re.fullmatch(rf"{COMMIT}\+changes-[0-9a-f]{{7}}", found[0])
    assert found[0] != found[1]
    assert found[0] == found[2], "the same changes have the same name"
    git(project, "add", "main.py")
    assert commit() == found[0], "staged or not"
    git(project, "checkout", "-q", "HEAD", "main.py")
    assert commit() == clean


def test_changed_binary_files_are_told_apart(project: Path) -> None:
    found = []
    for content in (b"\0\1\3", b"\0\1\4"):
        (project / "table.bin").write_bytes(content)
        found.append(commit())
    assert found[0] != found[1]


def test_an_untracked_module_is_a_change(project: Path) -> None:
    found = [commit()]
    for name, text in (("own/loss.py", "A = 1"), ("own/loss.py", "A = 2"), ("own/größe.py", "A = 2")):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(text)
        found.append(commit())
    assert len(set(found)) == 4
    assert all(re.fullmatch(rf"{COMMIT}\+changes-[0-9a-f]{{7}}", str(name)) for name in found[1:])


def test_code_that_was_packed_into_the_project_is_no_change(project: Path) -> None:
    """`submission pack --result_dir ORG` in the project's folder, which `docs/submission.md` recommends."""
    before = commit()
    packed = project / "ORG" / "benchmarks" / "unet3d" / "implementations" / "pytorch" / "model"
    packed.mkdir(parents=True)
    (packed / "unet3d.py").write_text("")
    assert commit() == before


def test_an_unreadable_module_counts_by_its_name(project: Path) -> None:
    (project / "gone.py").symlink_to(project / "nowhere.py")
    assert "+changes-" in str(commit())


def test_without_git_there_is_no_commit(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (project / ".git").rename(tmp_path / "moved")
    assert commit() is None
    (tmp_path / "moved").rename(project / ".git")
    assert commit() is not None

    def hang(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 10)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", hang)
        assert commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
