"""Progress is a bar on a terminal and, elsewhere, a line every half minute on rank 0."""

from __future__ import annotations

import pytest
from tqdm import tqdm

from common import progress
from common.progress import ProgressLines, make_progress, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that `time.monotonic` returns; set by the test."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_half_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track(range(10), 10, "evaluate", "case"):
        clock[0] += 12.0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "evaluate: 3 of 10 cases, 00:36 elapsed, 01:24 left",
        "evaluate: 6 of 10 cases, 01:12 elapsed, 00:48 left",
        "evaluate: 9 of 10 cases, 01:48 elapsed, 00:12 left",
    ]


def test_what_is_done_soon_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), 3, "MD5", "file")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_descriptions_and_values_stand_in_the_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines = make_progress(8, "train", "batch")
    lines.set_description("epoch 2/4")
    lines.set_postfix_str("loss 0.5000")
    clock[0] += 30.0
    lines.update(2)
    lines.close()
    assert capsys.readouterr().err == "epoch 2/4: 2 of 8 batches, 00:30 elapsed, 01:30 left, loss 0.5000\n"


def test_other_ranks_are_silent(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    for _ in track(range(10), 10, "evaluate", "case"):
        clock[0] += 60.0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("is_terminal", "bar", "kind"),
    [(True, None, tqdm), (False, None, ProgressLines), (False, True, tqdm), (True, False, ProgressLines)],
)
def test_a_bar_on_a_terminal_or_where_it_is_asked_for(
    is_terminal: bool, bar: bool | None, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: is_terminal, raising=False)
    made = make_progress(3, "evaluate", "case", bar=bar, leave=False)
    made.close()
    assert type(made) is kind
