"""run_program: every end has its exit status and at most one line on stderr; a bug keeps its traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from common.errors import (
    DIVERGED_EXIT,
    RANK_LOST_EXIT,
    USER_ERROR_EXIT,
    Interrupted,
    RankLost,
    UserError,
    error_line,
    interrupted_exit,
    run_program,
)


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


def test_a_lost_rank_is_one_line_and_status_4(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def program() -> int:
        raise RankLost("rank 2 hangs\nat epoch 3")

    monkeypatch.setenv("RANK", "1")
    assert run_program(program, "main.py") == 4
    assert capsys.readouterr() == ("", "main.py (rank 1): error: rank 2 hangs at epoch 3\n")


def test_every_end_has_a_status_of_its_own() -> None:
    """Scripts and launchers decide by them whether to start again."""
    assert (USER_ERROR_EXIT, DIVERGED_EXIT, RANK_LOST_EXIT) == (2, 3, 4)
    assert (interrupted_exit(signal.SIGTERM), interrupted_exit(signal.SIGINT)) == (143, 130)


@pytest.mark.parametrize(("number", "name", "status"), [(15, "SIGTERM", 143), (2, "SIGINT", 130)])
def test_an_interruption_names_its_signal(number: int, name: str, status: int) -> None:
    leaving = Interrupted(number)
    assert (str(leaving), leaving.exit_status) == (f"interrupted by {name}", status)


def test_an_error_is_one_line_whatever_its_message() -> None:
    assert error_line("main.py", "a\n b \t c") == "main.py: error: a b c"


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


@pytest.mark.parametrize(
    "program",
    [
        "while True: print('a line')",
        # As programs do that report files which cannot be written.
        "try:\n    while True: print('a line')\nexcept OSError:\n    raise UserError('not written') from None",
    ],
)
def test_output_that_nobody_reads_any_more_ends_a_program_in_silence(program: str) -> None:
    code = f"def program():\n{textwrap.indent(program, '    ')}\n"
    code = (
        f"import sys\nfrom common.errors import UserError, run_program\n{code}sys.exit(run_program(program, 'main.py'))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_another_broken_pipe_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    def send() -> None:
        try:
            raise BrokenPipeError("a server's connection")
        except OSError as error:
            raise UserError(f"cannot be sent: {error}") from None

    assert run_program(send, "main.py") == 2
    assert capsys.readouterr().err == "main.py: error: cannot be sent: a server's connection\n"
