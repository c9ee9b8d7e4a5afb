"""The page: verdicts, content, escaping, failures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError

pytest.importorskip("matplotlib", reason="the report is drawn by matplotlib, which is not installed")

from report import page
from report.__main__ import main
from report.markup import Html, table, tag
from report.records import read_run
from report.write import write_report
from tests.report.runs import CPU, HOSTILE, MISSED, REACHED, Tags, log_run, page_of


@pytest.mark.parametrize(
    ("scores", "stop", "tone", "title", "detail"),
    [
        ({2: 0.8, 4: 0.9}, REACHED, "good", "Target reached", "0.9000 after epoch 4, 32 samples and 1 min 50 s"),
        ({2: 0.8}, MISSED, "bad", "Target not reached", "Best mean Dice 0.8000 at epoch 2, the target is 0.9."),
        ({}, MISSED, "", "Not evaluated", "4 epochs in 1 min 40 s. There was no evaluation."),
        ({2: 0.0}, ("aborted", "diverged: mean Dice 0.0"), "bad", "Diverged", "diverged: mean Dice 0.0."),
        ({2: 0.8}, ("aborted", "interrupted by SIGTERM"), "bad", "Ended early", "interrupted by SIGTERM. Best"),
        ({2: 0.8}, None, "bad", "No end in the log", "Still running, or killed."),
    ],
)
def test_verdicts(
    tmp_path: Path, scores: dict[int, float], stop: tuple[str, str] | None, tone: str, title: str, detail: str
) -> None:
    verdict = page.verdict_of(read_run(log_run(tmp_path, scores=scores, stop=stop)))
    assert (verdict.tone, verdict.title) == (tone, title)
    assert detail in verdict.detail


def test_the_verdict_sums_the_samples_of_each_epoch(tmp_path: Path) -> None:
    resumed = ["the run was resumed"]
    log_run(tmp_path / "a", epochs=(1,), batch=1)
    log_run(tmp_path / "a", epochs=(2,), batch=2, scores={2: 0.9}, violations=resumed, stop=REACHED)
    log_run(tmp_path / "b", epochs=(2,), scores={2: 0.9}, violations=resumed, stop=REACHED)  # without epoch 1
    assert "after epoch 2, 12 samples and" in page.verdict_of(read_run(tmp_path / "a")).detail
    assert "after epoch 2, about 16 samples and" in page.verdict_of(read_run(tmp_path / "b")).detail


def test_the_page_shows_how_the_run_ended(tmp_path: Path) -> None:
    folder = log_run(
        tmp_path / "kits", scores={2: 0.8, 4: 0.9}, stop=REACHED, violations=["a far cry"], flags=["--epochs", "4"]
    )
    (folder / "benchmark.json").write_text(
        json.dumps({"samples_per_s": 12.0, "data_wait_ms": 25.0, "forward_backward_ms": 75.0, "verdict": "input-bound"})
    )
    read = Tags(page_of(folder))
    for text in ("Target reached", "kits", "a far cry", "a note", "there is no unet3d.log", "--epochs", "input-bound"):
        assert text in read.text
    assert "75%" in read.text
    assert read.tags.count("svg") == 6
    drawn = {file.name for file in (folder / "report").iterdir()}
    assert drawn == {f"{key}.png" for key in ("dice", "loss", "learning_rate", "samples_per_s", "time", "cases")}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (folder / "report").iterdir())
    assert f"No images: no checkpoint at {folder / 'checkpoint.pth'}." in read.text


def test_doubtful_cases_are_marked(tmp_path: Path) -> None:
    folder = log_run(tmp_path, scores={2: 0.8}, cases=("a", "b"), doubtful={"b": "the mask was corrected", "z": "far"})
    read = Tags(page_of(folder))
    assert "b *" in read.text
    assert "a *" not in read.text
    assert "* b: the mask was corrected" in read.text
    assert "* z" not in read.text, "it was not evaluated"


def test_names_from_files_are_text_and_never_tags(tmp_path: Path) -> None:
    name = HOSTILE + "\"'&$x$"
    folder = log_run(
        tmp_path,
        scores={2: 0.5},
        classes=("background", name, "b"),
        cases=(name,),
        violations=[name],
        stop=("aborted", name),
        flags=["--submission_org", name],
    )
    text = page_of(folder)
    read = Tags(text)
    assert "script" not in read.tags
    assert HOSTILE not in text
    assert read.text.count(HOSTILE) >= 5
    assert not [key for key, _ in read.attributes if key.startswith("on")]


def test_the_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    read = Tags(page_of(log_run(tmp_path, scores={2: 0.5})))
    addresses = [
        value or "" for key, value in read.attributes if key in ("src", "href", "xlink:href", "action", "data")
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert ("content", page.POLICY) in read.attributes


def test_the_program_prints_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = log_run(tmp_path / "first"), log_run(tmp_path / "second")
    assert main([str(first)]) == 0
    assert main([str(first), str(second)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(first / "report.html"), str(first / "comparison.html")]
    assert (first / "comparison.html").is_file()


def test_without_matplotlib_one_line_names_what_to_install(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    folder = log_run(tmp_path)
    program = "import sys, runpy; sys.modules['matplotlib'] = None; sys.argv[0] = 'report'; "
    done = run_python("-c", program + "runpy.run_module('report', run_name='__main__')", folder)
    install = "report: error: the report is drawn by matplotlib, which is not installed: pip install '.[report]'\n"
    assert (done.returncode, done.stderr) == (2, install)
    assert not (folder / "report.html").exists()


def test_a_folder_that_cannot_be_written_is_a_one_line_error(tmp_path: Path) -> None:
    folder = log_run(tmp_path)
    (folder / "report").write_text("in the way")
    with pytest.raises(UserError, match=r"the report cannot be written: File exists$"):
        page_of(folder)


def test_a_failure_leaves_the_earlier_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = log_run(tmp_path)
    before = page_of(folder)
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "no space left")))
    with pytest.raises(UserError, match=r"no space left$"):
        write_report(folder, device=CPU)
    monkeypatch.undo()
    assert (folder / "report.html").read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.21, "3.2 s"),
        (59.94, "59.9 s"),
        (245.4, "4 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7620, "2 h 07 min"),
        (math.nan, "n/a"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert page.duration(seconds) == text


def test_numbers_have_three_significant_digits() -> None:
    assert [page.significant(value) for value in (12345.6, 16.42, 0.99812, math.nan)] == [
        "12,346",
        "16.4",
        "0.998",
        "n/a",
    ]
    assert [page.plain(value) for value in (True, None, [1, [2, 3]], (), "x")] == ["true", "n/a", "1 2 3", "n/a", "x"]


def test_markup_escapes_everything_else() -> None:
    made = tag("p", "<b>", tag("i", "&"), 3, class_='a"b', aria_label=None)
    assert made == '<p class="a&quot;b">&lt;b&gt;<i>&amp;</i>3</p>'
    assert isinstance(made, Html)
    assert "&lt;td&gt;" in table("c", ("a",), [("<td>",)])
