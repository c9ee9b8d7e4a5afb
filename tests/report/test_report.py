"""The report: reading logs back, verdicts, pictures that hang the right way, and markup that no name breaks."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from runtime.arguments import parse_arguments
from runtime.logging import events as ev
from runtime.logging.jsonl import JsonLinesTracker
from runtime.logging.log_folder import rotate_logs

pytest.importorskip("matplotlib", reason="the report is drawn by matplotlib, which is not installed")

from matplotlib.image import imread
from nibabel.orientations import apply_orientation

from report import cases, compliance, figures, page, write_comparison, write_report
from report.comparison import names_of
from report.compliance import Compliance
from report.markup import Html, table, tag
from report.records import Run, read_run

HOSTILE = "<script>alert(1)</script>"
REACHED = ("success", "mean Dice 0.9000 reached 0.9")
MISSED = ("aborted", "the target was not reached in 4 epochs")
CPU = torch.device("cpu")


def log_run(
    folder: Path,
    epochs: Sequence[int] = (1, 2, 3, 4),
    scores: dict[int, float] | None = None,
    stop: tuple[str, str] | None = MISSED,
    seed: int = 7,
    reasons: Sequence[str] = (),
    classes: Sequence[str] = ("background", "kidney", "tumour"),
    cases: Sequence[str] = ("a", "b", "c"),
    loss: float = 1.0,
    flags: Sequence[str] = (),
) -> Path:
    """A run as the program's own tracker logs it, an event every ten seconds: 8 samples an epoch, 4 s each."""
    rotate_logs(folder)
    arguments = ["--data_dir", str(folder / "DATA"), "--log_dir", str(folder), "--quality_threshold", "0.9", *flags]
    config = parse_arguments(arguments)[0]
    seeds = {"master": seed, "order": 1, "samples": 2, "ranks": [3]}
    happened: list[ev.Event] = [
        ev.InitStarted(config, {"torch": "2", "command": ["main.py"]}, False),
        ev.InitStopped(config, seeds, "open" if reasons else "closed", list(reasons), "1xCPU", [], 8, ["a note"]),
        ev.RunStarted(),
        ev.DataOpened(8, len(cases), 8, 2, 1, list(classes)),
    ]
    for epoch in epochs:
        happened.append(ev.EpochStarted(epoch, 0.1, 4))
        happened.append(ev.EpochStopped(epoch, loss / epoch, 0.1, 8, 4.0))
        if epoch in (scores or {}):
            mean = (scores or {})[epoch]
            row = {case: [mean - 0.1 * place, mean + 0.1 * place] for place, case in enumerate(cases)}
            happened.append(ev.EvaluationStopped(epoch, mean, [mean - 0.01, mean + 0.01], 0.5, 2.0, row))
    happened += [ev.RunStopped(*stop, max(epochs, default=0), 60.0)] if stop else []
    tracker = JsonLinesTracker(folder)
    for event in happened:
        tracker.on(event)
    path = folder / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for place, line in enumerate(lines):
        line["time_s"] = 1000.0 + 10 * place
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Tags(HTMLParser):
    """Every tag of a page and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path) -> str:
    return write_report(folder, None, None, CPU).read_text(encoding="utf-8")


def test_a_run_is_read_back(tmp_path: Path) -> None:
    run = read_run(log_run(tmp_path / "mine", scores={2: 0.8, 4: 0.85}, reasons=["one"]))
    assert (run.name, run.parts, run.division, run.rule_violations) == ("mine", 1, "open", ["one"])
    assert (run.classes, run.train_cases, run.evaluation_cases) == (["kidney", "tumour"], 8, 3)
    assert (run.target, run.samples_per_epoch, run.seeds["master"]) == (0.9, 8, 7)
    assert [epoch.loss for epoch in run.epochs.values()] == [1.0, 0.5, pytest.approx(1 / 3), 0.25]
    assert run.best is not None
    assert (run.best.epoch, run.best.dice) == (4, [pytest.approx(0.84), pytest.approx(0.86)])
    assert run.rate == 2.0  # 32 samples in 16 s
    # RunStarted is the third event; RunStopped comes 12 events after it.
    assert (run.init_s, run.clock_s) == (20.0, 120.0)
    assert (run.status, run.reason) == MISSED


def test_of_equal_evaluations_the_first_is_the_best(tmp_path: Path) -> None:
    """As in the checkpoint: only a better one replaces it."""
    run = read_run(log_run(tmp_path, scores={2: 0.8, 4: 0.8}))
    assert run.best is not None
    assert run.best.epoch == 2


def test_a_resumed_run_is_one_story_and_the_later_record_wins(tmp_path: Path) -> None:
    log_run(tmp_path, epochs=(1, 2, 3, 4), scores={2: 0.5, 4: 0.6}, stop=None)
    log_run(tmp_path, epochs=(3, 4, 5), scores={4: 0.7}, loss=10.0, reasons=["the run was resumed"], stop=REACHED)
    run = read_run(tmp_path)
    assert run.parts == 2
    assert {number: round(epoch.loss, 3) for number, epoch in run.epochs.items()} == {
        1: 1.0,
        2: 0.5,
        3: 3.333,
        4: 2.5,
        5: 2.0,
    }
    assert {epoch: found.mean_dice for epoch, found in run.evaluations.items()} == {2: 0.5, 4: 0.7}
    # The first part's last event comes 110 s after its RunStarted; the second's evaluation 60 s after its own.
    assert run.evaluations[4].clock_s == 110 + 60
    assert run.clock_s == 110 + 90


def test_what_an_earlier_part_did_after_the_checkpoint_is_forgotten(tmp_path: Path) -> None:
    log_run(tmp_path, epochs=(1, 2, 3, 4), scores={4: 0.6}, stop=None)
    log_run(tmp_path, epochs=(3,), reasons=["the run was resumed"], stop=None)
    run = read_run(tmp_path)
    assert list(run.epochs) == [1, 2, 3]
    assert run.evaluations == {}


@pytest.mark.parametrize(
    ("reasons", "seed"), [([], 7), (["the run was resumed"], 8)], ids=["a new run", "another run's checkpoint"]
)
def test_an_older_log_of_another_run_is_left_alone(tmp_path: Path, reasons: list[str], seed: int) -> None:
    log_run(tmp_path, epochs=(1, 2))
    log_run(tmp_path, epochs=(3,), reasons=reasons, seed=seed)
    assert list(read_run(tmp_path).epochs) == [3]


def test_parts_are_ordered_by_number_and_not_by_letter(tmp_path: Path) -> None:
    for epoch in range(1, 13):
        log_run(tmp_path, epochs=(epoch,), reasons=["the run was resumed"] if epoch > 1 else [])
    assert (tmp_path / "log.11.jsonl").exists()
    run = read_run(tmp_path)
    assert (list(run.epochs), run.parts) == (list(range(1, 13)), 12)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = log_run(tmp_path, stop=None) / "log.jsonl"
    text = path.read_text()
    path.write_text(text[:-20])
    run = read_run(tmp_path)
    assert (list(run.epochs), run.status) == ([1, 2, 3], "")


def test_a_number_that_json_lacks_is_no_number(tmp_path: Path) -> None:
    run = read_run(log_run(tmp_path, scores={2: math.nan, 4: 0.3}, loss=math.inf))
    assert all(math.isnan(epoch.loss) for epoch in run.epochs.values())
    assert run.best is not None
    assert run.best.epoch == 4
    assert "n/a" in page_of(tmp_path)


def damaged(folder: Path, line: int, text: str) -> Path:
    path = log_run(folder) / "log.jsonl"
    lines = path.read_text().splitlines()
    lines[line] = text
    path.write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none", "no such folder$"),
        (lambda folder: folder, "no log.jsonl in it; give the --log_dir of a run$"),
        (lambda folder: damaged(folder, 5, '{"event": '), "line 6 is no event of a run$"),
        (lambda folder: damaged(folder, 5, "[1, 2]"), "line 6 is no event of a run$"),
        (lambda folder: damaged(folder, 5, '{"event": "EpochStopped", "time_s": 1}'), "damaged or of another version"),
        (lambda folder: damaged(folder, 0, '{"event": "Other", "time_s": 1}'), "the log ends before the run began$"),
    ],
    ids=["no folder", "no log", "cut line", "no event", "no field", "no beginning"],
)
def test_what_is_no_log_is_told_in_one_line(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_run(make(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("scores", "stop", "tone", "head", "told"),
    [
        ({2: 0.8, 4: 0.9}, REACHED, "good", "Target reached", "0.9000 after epoch 4, 32 samples and 1 min 50 s"),
        ({2: 0.8}, MISSED, "bad", "Target not reached", "Best mean Dice 0.8000 at epoch 2, the target is 0.9."),
        ({}, MISSED, "", "Not evaluated", "4 epochs in 1 min 40 s. Nothing was scored"),
        ({2: 0.0}, ("aborted", "diverged: mean Dice 0.0"), "bad", "Diverged", "diverged: mean Dice 0.0."),
        ({2: 0.8}, ("aborted", "interrupted by SIGTERM"), "bad", "Ended early", "interrupted by SIGTERM. Best"),
        ({2: 0.8}, None, "bad", "No end in the log", "Still running, or killed."),
    ],
)
def test_verdicts(
    tmp_path: Path, scores: dict[int, float], stop: tuple[str, str] | None, tone: str, head: str, told: str
) -> None:
    verdict = page.verdict_of(read_run(log_run(tmp_path, scores=scores, stop=stop)))
    assert (verdict.tone, verdict.head) == (tone, head)
    assert told in verdict.told


def test_the_page_says_what_became_of_the_run(tmp_path: Path) -> None:
    folder = log_run(
        tmp_path / "kits", scores={2: 0.8, 4: 0.9}, stop=REACHED, reasons=["a far cry"], flags=["--epochs", "4"]
    )
    (folder / "benchmark.json").write_text(
        json.dumps({"samples_per_s": 12.0, "data_wait_ms": 25.0, "forward_backward_ms": 75.0, "verdict": "input-bound"})
    )
    read = Tags(page_of(folder))
    for told in ("Target reached", "kits", "a far cry", "a note", "there is no unet3d.log", "--epochs", "input-bound"):
        assert told in read.text
    assert "75%" in read.text
    assert read.tags.count("svg") == 6
    drawn = {file.name for file in (folder / "report").iterdir()}
    assert drawn == {f"{key}.png" for key in ("dice", "loss", "learning_rate", "samples_per_s", "time", "cases")}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (folder / "report").iterdir())
    assert f"No pictures: no checkpoint at {folder / 'checkpoint.pth'}." in read.text


def test_the_table_has_the_worst_case_first(tmp_path: Path) -> None:
    per_case = {"good": [0.9, 0.8], "bad": [0.1, 0.2], "none": [math.nan, 0.9], "fair": [0.5, 0.5]}
    assert cases.worst_first(per_case) == ["none", "bad", "fair", "good"]
    assert cases.chosen(per_case) == {"worst": "none", "median": "bad", "best": "good"}
    assert cases.chosen({"a": [1.0], "b": [0.0]}) == {"worst": "b", "best": "a"}
    assert cases.chosen({"a": [1.0]}) == {"worst": "a"}
    assert cases.chosen({}) == {}


def test_names_from_files_are_text_and_never_tags(tmp_path: Path) -> None:
    name = HOSTILE + "\"'&$x$"
    folder = log_run(
        tmp_path,
        scores={2: 0.5},
        classes=("background", name, "b"),
        cases=(name,),
        reasons=[name],
        stop=("aborted", name),
        flags=["--submission_org", name],
    )
    text = page_of(folder)
    read = Tags(text)
    assert "script" not in read.tags
    assert HOSTILE not in text
    assert read.text.count(HOSTILE) >= 5
    assert not [key for key, _ in read.attributes if key.startswith("on")]


def test_no_address_leaves_the_page(tmp_path: Path) -> None:
    read = Tags(page_of(log_run(tmp_path, scores={2: 0.5})))
    addresses = [
        value or "" for key, value in read.attributes if key in ("src", "href", "xlink:href", "action", "data")
    ]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert ("content", page.POLICY) in read.attributes


def test_drawings_share_no_name_and_take_every_colour_from_the_page(tmp_path: Path) -> None:
    charts = figures.draw_run(read_run(log_run(tmp_path, scores={2: 0.5, 4: 0.6})), tmp_path)
    names = [name for chart in charts for name in re.findall(r' id="([^"]+)"', chart.svg)]
    assert len(set(names)) == len(names) > 0
    for chart in charts:
        assert not re.search(r"#[0-9a-fA-F]{6}\b", chart.svg.replace("url(#", "")), chart.key
        assert "<style" not in chart.svg
        assert chart.told


def test_a_single_evaluation_is_a_chart_too(tmp_path: Path) -> None:
    dice = figures.draw_run(read_run(log_run(tmp_path, scores={2: 0.5})), tmp_path)[0]
    assert dice.told == "Mean Dice: 0.500 after epoch 2; the target is 0.9."
    ticks = re.findall(r"<text [^>]*>([^<]*)</text>", dice.svg)
    assert [tick for tick in ticks if re.fullmatch(r"[\d.]+", tick) and float(tick) > 1] == ["2"]


def test_the_same_run_draws_the_same_bytes(tmp_path: Path) -> None:
    run = read_run(log_run(tmp_path, scores={2: 0.5}))
    first, second = figures.draw_run(run, tmp_path), figures.draw_run(run, tmp_path)
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
def test_colours_stand_out_from_the_ground(theme: int) -> None:
    """WCAG AA: 4.5 for text, 3 for what is drawn."""
    blocks = re.findall(r":root \{(.*?)\}", page.STYLE.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6});", blocks[theme]))
    for ground in (colours["page"], colours["card"]):
        for name in ("ink", "soft", "link", "good", "bad"):
            assert contrast(colours[name], ground) >= 4.5, name
        for name in figures.SERIES:
            assert contrast(colours[name], ground) >= 3, name
    if theme == 0:
        assert {name: colours[name] for name in figures.INKS} == figures.INKS


@pytest.mark.parametrize(
    "affine",
    [
        np.diag([1.0, 1, 1, 1]),
        np.diag([-2.0, 1, -3, 1]),
        cases.KITS19_AXES,
        np.array([[0.1, 0.9, 0.2, 5], [0.1, 0.2, -2.8, 1], [-1.1, 0.1, 0.1, 0], [0, 0, 0, 1.0]]),
    ],
    ids=["RAS", "LAI", "KiTS19", "oblique"],
)
def test_volumes_hang_with_the_patients_right_head_and_nose_first(affine: np.ndarray[Any, Any]) -> None:
    shape = (4, 5, 6)
    # The scanner's coordinates grow towards right, front and head.
    corners = np.array([[d, h, w] for d in (0, 3) for h in (0, 4) for w in (0, 5)])
    places = corners @ affine[:3, :3].T
    foremost = corners[(places / np.abs(places).max(0)).sum(1).argmax()]
    volume = np.zeros(shape)
    volume[tuple(foremost)] = 1
    hung = apply_orientation(volume, cases.hanging(affine))
    assert np.argwhere(hung).tolist() == [[0, 0, 0]]


def test_the_centre_is_amid_the_foreground() -> None:
    mask = np.zeros((9, 9, 9), np.uint8)
    mask[1:4, 1:4, 1:4] = 1
    assert cases.centre_of(mask) == (2, 2, 2)
    mask[6:, 1:4, 1:4] = 2  # the middle lies between the two
    assert mask[cases.centre_of(mask)]
    assert cases.centre_of(np.zeros((4, 6, 8), np.uint8)) == (2, 3, 4)


def coloured(png: bytes, colour: str) -> np.ndarray[Any, Any]:
    """Rows and columns, from 0 to 1, of the pixels of a colour."""
    pixels = imread(io.BytesIO(png), format="png")[..., :3]
    wanted = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.argwhere(np.abs(pixels - wanted).max(-1) < 0.02) / np.array(pixels.shape[:2])


def test_planes_show_truth_and_prediction_in_their_places() -> None:
    """Truth at the patient's right, front and head; the prediction overlaps it and lies further left, back and down."""
    image = np.random.default_rng(0).normal(size=(40, 40, 40)).astype(np.float32)
    truth, prediction = np.zeros((2, 40, 40, 40), np.uint8)
    truth[4:16, 6:18, 8:20] = 1
    prediction[12:30, 12:32, 12:34] = 1
    pictures = {
        found.plane: found for found in cases.draw_planes(cases.Hung(image, truth, prediction, (1, 1, 1)), "case")
    }
    assert list(pictures) == ["axial", "coronal", "sagittal"]
    # Of each plane the edges (top, bottom, left, right) of the truth: rows and columns of the two axes that are left.
    edges = {"axial": (6, 18, 4, 16), "coronal": (8, 20, 4, 16), "sagittal": (8, 20, 6, 18)}
    for plane, expected in edges.items():
        found = coloured(pictures[plane].png, cases.TRUTH) * 40
        measured = (found[:, 0].min(), found[:, 0].max(), found[:, 1].min(), found[:, 1].max())
        assert measured == pytest.approx(expected, abs=0.7), plane
        assert plane in pictures[plane].told
    assert coloured(pictures["sagittal"].png, cases.PREDICTION).size == 0  # it begins behind that plane
    assert len(coloured(pictures["axial"].png, cases.PREDICTION)) > 50


def test_a_plane_is_as_long_as_in_the_body() -> None:
    """Voxels of 1 x 1 x 4 mm: 40 x 40 x 10 of them are a cube, and fill the square picture."""
    image = np.ones((40, 40, 10), np.float32)
    image[0] = 0
    truth = np.zeros((40, 40, 10), np.uint8)
    truth[10:30, 10:30, 4:6] = 1
    hung = cases.Hung(image, truth, truth * 0, (1.0, 1.0, 4.0))
    coronal = list(cases.draw_planes(hung, "case"))[1]
    found = coloured(coronal.png, cases.TRUTH)
    height, width = np.ptp(found, axis=0)
    assert height == pytest.approx(0.2, abs=0.03)
    assert width == pytest.approx(0.5, abs=0.03)


def test_the_checker_is_asked_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "unet3d.log"
    assert compliance.check(log) == Compliance(None, "not asked: there is no unet3d.log")
    log.write_text("nothing of MLPerf's\n")
    refused = compliance.check(log)
    assert refused.accepted is False
    assert refused.complaints[0] == "Required EXACTLY_ONE occurrence of 'submission_org' but found 0"
    assert len(refused.complaints) == compliance.MAX_COMPLAINTS + 1
    assert re.fullmatch(r"and \d+ more", refused.complaints[-1])
    assert list(tmp_path.iterdir()) == [log]
    monkeypatch.setattr(compliance, "find_spec", lambda name: None)
    assert compliance.check(log).accepted is None
    assert "not installed" in compliance.check(log).told


def test_the_checker_is_asked_by_the_ruleset_that_the_run_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [Run(tmp_path, config={"ruleset": told}).ruleset for told in ("3.0.0", "9", None)] == [
        "3.0.0",
        "4.0.0",
        "4.0.0",
    ]
    log = tmp_path / "unet3d.log"
    log.write_text("")
    asked: list[list[str]] = []
    done = subprocess.CompletedProcess([], 0, "", "SUCCESS")
    monkeypatch.setattr(compliance.subprocess, "run", lambda command, **_: asked.append(command) or done)
    assert "ruleset 3.0.0" in compliance.check(log, "3.0.0").told
    assert asked[0][asked[0].index("--ruleset") + 1] == "3.0.0"


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = log_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib, which is not installed: pip install '\.\[report\]'$"):
        page_of(folder)
    assert not (folder / "report.html").exists()


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    folder = log_run(tmp_path)
    (folder / "report").write_text("in the way")
    with pytest.raises(UserError, match=r"the report cannot be written: File exists$"):
        page_of(folder)


def test_a_failure_leaves_the_earlier_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = log_run(tmp_path)
    before = page_of(folder)
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "no space left")))
    with pytest.raises(UserError, match=r"no space left$"):
        write_report(folder, None, None, CPU)
    monkeypatch.undo()
    assert (folder / "report.html").read_text(encoding="utf-8") == before


def test_runs_are_compared(tmp_path: Path) -> None:
    first = log_run(tmp_path / "first", scores={2: 0.8, 4: 0.9}, stop=REACHED, flags=["--momentum", "0.5"])
    second = log_run(tmp_path / "second", scores={2: 0.7}, seed=9)
    assert write_comparison([first, second]) == first / "comparison.html"
    read = Tags((first / "comparison.html").read_text(encoding="utf-8"))
    for told in (
        "first",
        "second",
        "Target reached",
        "Target not reached",
        "0.9000",
        "--momentum",
        "0.5",
        "master seed",
    ):
        assert told in read.text
    for alike in ("--learning_rate", "--log_dir", "torch"):
        assert alike not in read.text
    assert read.tags.count("svg") == 5
    assert not (second / "report").exists()


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [Run(tmp_path / name / "logs") for name in "ab"]
    assert names_of(runs) == [str(tmp_path / "a/logs"), str(tmp_path / "b/logs")]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (3.21, "3.2 s"),
        (59.94, "59.9 s"),
        (245.4, "4 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7620, "2 h 07 min"),
        (math.nan, "n/a"),
    ],
)
def test_durations(seconds: float, told: str) -> None:
    assert page.duration(seconds) == told


def test_figures_have_digits_that_mean_something() -> None:
    assert [page.figure_of(value) for value in (12345.6, 16.42, 0.99812, math.nan)] == [
        "12,346",
        "16.4",
        "0.998",
        "n/a",
    ]
    assert [page.plain(value) for value in (True, None, [1, [2, 3]], (), "x")] == ["true", "n/a", "1 2 3", "n/a", "x"]


def test_markup_escapes_all_but_its_own() -> None:
    made = tag("p", "<b>", tag("i", "&"), 3, class_='a"b', aria_label=None)
    assert made == '<p class="a&quot;b">&lt;b&gt;<i>&amp;</i>3</p>'
    assert isinstance(made, Html)
    assert "&lt;td&gt;" in table("c", ("a",), [("<td>",)])


def test_a_picture_is_drawn_once_and_upright() -> None:
    """A volume of one slice, as `--dataset images` makes it: its edges are no planes."""
    image = np.random.default_rng(0).normal(size=(1, 30, 40)).astype(np.float32)
    truth = np.zeros((1, 30, 40), np.uint8)
    truth[0, 3:9, 20:36] = 1
    turn = cases.hanging(cases.KITS19_AXES)  # the axes that a picture has
    seen, mask = (apply_orientation(array, turn) for array in (image, truth))
    (picture,) = cases.draw_planes(cases.Hung(seen, mask, mask * 0, (1.0, 1.0, 1.0)), "case")
    assert picture.plane == "axial"
    rows, columns = coloured(picture.png, cases.TRUTH).T
    # Square, with 5 rows of black above and below.
    assert rows.min() * 40 - 5 == pytest.approx(3, abs=1)
    assert (columns.min() * 40, columns.max() * 40) == pytest.approx((20, 36), abs=1)
