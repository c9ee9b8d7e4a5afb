"""Messages: which stream, prefix and rank each level has; a stream that fails; notes held back for the log."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys

import pytest

from common.messages import logger, note, notes_held, take_notes


@pytest.fixture(autouse=True)
def _rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def test_each_level_has_its_stream_and_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("100% done")
    assert capsys.readouterr() == ("100% done\n", "")
    note("another loader is used")
    assert capsys.readouterr() == ("", "note: another loader is used\n")
    logger.warning("the disk is full")
    assert capsys.readouterr() == ("", "warning: the disk is full\n")
    logger.error("no such scan")
    assert capsys.readouterr() == ("", "error: no such scan\n")


def test_only_rank_0_informs_but_every_rank_warns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    logger.info("all well")
    logger.warning("damaged")
    assert capsys.readouterr() == ("", "warning: damaged\n")


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_a_message_that_cannot_be_written_ends_nothing(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream may be a file on the very disk that is full, or a pipe that nobody reads."""
    tried: list[str] = []

    class Full:
        def write(self, text: str) -> int:
            tried.append(text)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", Full())
    logger.log(level, "the disk is full")
    assert tried == ["the disk is full" if level == logging.INFO else "warning: the disk is full"]


def test_a_configured_root_logger_does_not_print_a_second_time() -> None:
    """Packages of trackers configure it, or a user's own module does."""
    program = "import logging; logging.basicConfig(level=0); from common.messages import logger; logger.warning('once')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "warning: once\n"


def test_notes_are_held_until_they_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with notes_held():
        note("first")
        logger.warning("printed at once")
        note("second")
        assert take_notes() == ["first", "second"]
        assert take_notes() == []
        note("third")
    assert capsys.readouterr() == ("", "warning: printed at once\n")
    assert take_notes() == [], "a run must not log what an earlier one in the same process left"
    note("fourth")
    assert capsys.readouterr().err == "note: fourth\n"
