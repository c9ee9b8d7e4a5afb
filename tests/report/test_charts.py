"""Charts of one run and of several: self-contained SVG, colours with enough contrast, the comparison page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the report is drawn by matplotlib, which is not installed")

from report import charts, figures, page
from report.records import Run, names_of, read_run
from report.write import write_comparison
from tests.report.runs import REACHED, Tags, log_run


def test_charts_share_no_id_and_take_every_colour_from_the_page(tmp_path: Path) -> None:
    drawn = charts.draw_run(read_run(log_run(tmp_path, scores={2: 0.5, 4: 0.6})), tmp_path)
    names = [name for chart in drawn for name in re.findall(r' id="([^"]+)"', chart.svg)]
    assert len(set(names)) == len(names) > 0
    for chart in drawn:
        assert not re.search(r"#[0-9a-fA-F]{6}\b", chart.svg.replace("url(#", "")), chart.key
        assert "<style" not in chart.svg
        assert chart.caption


def test_a_single_evaluation_is_a_chart_too(tmp_path: Path) -> None:
    dice = charts.draw_run(read_run(log_run(tmp_path, scores={2: 0.5})), tmp_path)[0]
    assert dice.caption == "Mean Dice: 0.500 after epoch 2; the target is 0.9."
    ticks = re.findall(r"<text [^>]*>([^<]*)</text>", dice.svg)
    assert [tick for tick in ticks if re.fullmatch(r"[\d.]+", tick) and float(tick) > 1] == ["2"]


@pytest.mark.parametrize(("flags", "counted"), [((), True), (("--eval_ranks", "1"), False)])
def test_evaluations_beside_training_take_no_time_of_it(flags: tuple[str, ...], counted: bool, tmp_path: Path) -> None:
    drawn = charts.draw_run(read_run(log_run(tmp_path, scores={2: 0.5, 4: 0.6}, flags=flags)), tmp_path)
    (caption,) = [chart.caption for chart in drawn if "before the clock" in chart.caption]
    assert caption.startswith("Of 140 s: before the clock ")
    assert ("evaluation" in caption) is counted


def test_the_same_run_draws_the_same_bytes(tmp_path: Path) -> None:
    run = read_run(log_run(tmp_path, scores={2: 0.5}))
    first, second = charts.draw_run(run, tmp_path), charts.draw_run(run, tmp_path)
    assert first == second


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_have_enough_contrast(theme: int) -> None:
    """WCAG AA: 4.5 for text, 3 for graphics."""
    blocks = re.findall(r":root \{(.*?)\}", page.STYLE.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6});", blocks[theme]))
    for ground in (colours["page"], colours["card"]):
        for name in ("ink", "soft", "link", "good", "bad"):
            assert contrast(colours[name], ground) >= 4.5, name
        for name in figures.SERIES:
            assert contrast(colours[name], ground) >= 3, name
    if theme == 0:
        assert {name: colours[name] for name in figures.INKS} == figures.INKS


def test_runs_are_compared(tmp_path: Path) -> None:
    first = log_run(tmp_path / "first", scores={2: 0.8, 4: 0.9}, stop=REACHED, flags=["--momentum", "0.5"])
    second = log_run(tmp_path / "second", scores={2: 0.7}, seed=9)
    assert write_comparison([first, second]) == first / "comparison.html"
    read = Tags((first / "comparison.html").read_text(encoding="utf-8"))
    for text in (
        "first",
        "second",
        "Target reached",
        "Target not reached",
        "0.9000",
        "--momentum",
        "0.5",
        "master seed",
    ):
        assert text in read.text
    for same in ("--learning_rate", "--log_dir", "torch"):
        assert same not in read.text
    assert read.tags.count("svg") == 5
    assert not (second / "report").exists()


def test_runs_of_the_same_name_have_their_paths_shown(tmp_path: Path) -> None:
    runs = [Run(folder=tmp_path / name / "logs") for name in "ab"]
    assert names_of(runs) == [str(tmp_path / "a/logs"), str(tmp_path / "b/logs")]
