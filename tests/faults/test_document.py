"""The table that `make faults` writes into docs/reliability.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from tests.faults import Row
from tests.faults import __main__ as program
from tests.faults.__main__ import BEGIN, END, main, write

ROWS = [
    Row(fault="a fault", promise="held", test="t.py::a", tried=3, kept=3, seconds=1.234, lost="none"),
    Row(fault="another", promise="held", test="t.py::b", tried=2, kept=1, seconds=0.0321),
]


def document(folder: Path) -> Path:
    path = folder / "document.md"
    path.write_text(f"before\n{BEGIN}an old table\n{END}after\n", encoding="utf-8")
    return path


def test_the_table_replaces_the_old_one(tmp_path: Path) -> None:
    path = document(tmp_path)
    write(path, ROWS, 12.4)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{BEGIN}Measured on ")
    assert " in 12 minutes: " in text
    assert "| a fault | held | `t.py::a` | 3, 3 | 1 | none |\n" in text
    assert "| another | held | `t.py::b` | 2, 1 | 0.032 |  |\n" in text
    assert text.endswith(f"{END}after\n")
    assert "an old table" not in text


def test_a_fault_that_is_measured_again_changes_only_its_row(tmp_path: Path) -> None:
    path = document(tmp_path)
    write(path, ROWS, 12.4)
    before = path.read_text(encoding="utf-8")
    write(path, [Row(fault="another", promise="held", test="t.py::b", tried=2, kept=2, seconds=4.0)], 0.0)
    old, new = "| another | held | `t.py::b` | 2, 1 | 0.032 |  |", "| another | held | `t.py::b` | 2, 2 | 4 |  |"
    assert path.read_text(encoding="utf-8") == before.replace(old, new) != before


def test_a_new_fault_is_added_and_one_that_was_not_tried_keeps_its_row(tmp_path: Path) -> None:
    path = document(tmp_path)
    write(path, ROWS, 12.4)
    before = path.read_text(encoding="utf-8")
    unmeasured = Row(fault="another", promise="cannot be emulated here", test="", tried=0, kept=0)
    write(path, [unmeasured, Row(fault="new", promise="held", test="t.py::c", tried=1, kept=1)], 0.0)
    assert path.read_text(encoding="utf-8") == before.replace(END, f"| new | held | `t.py::c` | 1, 1 |  |  |\n{END}")


def test_a_wrong_document_is_refused_before_a_fault_is_injected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "FAULTS", ())
    (tmp_path / "plain.md").write_text("no table\n", encoding="utf-8")
    for name, reason in (("plain.md", "measured: begin"), ("missing.md", "No such file")):
        with pytest.raises(UserError, match=reason):
            main(["--document", str(tmp_path / name), "--work_dir", str(tmp_path)])


def test_what_a_fault_raises_is_a_broken_promise_and_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(work_dir: Path) -> Row:
        raise UserError("checkpoint.pth: damaged")

    monkeypatch.setattr(program, "FAULTS", (raises, lambda work_dir: ROWS[0]))
    monkeypatch.setattr(program.FAULTS[1], "__name__", "held")
    assert main(["--work_dir", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "raises: UserError: checkpoint.pth: damaged" in printed
    assert "3 of 3  a fault: held" in printed


@pytest.mark.parametrize(("failures", "status"), [((), 0), (("try 0: lost",), 1)])
def test_a_broken_promise_is_printed_and_fails(
    failures: tuple[str, ...],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def lost(work_dir: Path) -> Row:
        assert work_dir.is_dir()
        return Row(fault="lost", promise="held", test="t.py", tried=1, kept=1 - len(failures), failures=failures)

    faults: tuple[Callable[..., Row], ...] = (lost,)
    monkeypatch.setattr(program, "FAULTS", faults)
    assert main(["--work_dir", str(tmp_path)]) == status
    assert ("try 0: lost" in capsys.readouterr().out) == bool(status)
