"""run_program: a user's mistake is one line on stderr and exit status 2; a bug keeps its traceback."""

from __future__ import annotations

import pytest

from errors import UserError, run_program


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (3, 3)])
def test_the_programs_own_status(result: int | None, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(lambda: result, "main.py") == status
    assert capsys.readouterr() == ("", "")


def test_a_users_mistake_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def program() -> int:
        raise UserError("--data_dir nowhere:\n  no such   folder;\nmake it first")

    assert run_program(program, "main.py") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "main.py: error: --data_dir nowhere: no such folder; make it first\n"


def test_another_rank_says_which(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def program() -> int:
        raise UserError("no")

    monkeypatch.setenv("RANK", "3")
    assert run_program(program, "main.py") == 2
    assert capsys.readouterr().err == "main.py (rank 3): error: no\n"


def test_ctrl_c_is_130_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def program() -> int:
        raise KeyboardInterrupt

    assert run_program(program, "preprocess_dataset.py") == 130
    assert capsys.readouterr().err == "preprocess_dataset.py: interrupted\n"


def test_a_bug_keeps_its_traceback() -> None:
    def program() -> int:
        raise ValueError("a bug of ours")

    with pytest.raises(ValueError, match="a bug of ours"):
        run_program(program, "main.py")
