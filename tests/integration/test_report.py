"""The report page in a browser: legible in both themes, on a desktop and on a phone."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.browser import CHROMIUM, Page, open_browser
from tests.integration.conftest import TINY, Program

pytest.importorskip("matplotlib", reason="the report is drawn by matplotlib, which is not installed")
pytestmark = pytest.mark.integration

REPORTING = tuple(flag for flag in TINY if flag != "--no_report")
WIDTHS, THEMES = (1280, 390), ("light", "dark")
HOSTILE = "<script>document.title = 'broken'</script><img src=http://192.0.2.1/x.png onerror=alert(1)>"
# For every element with its own text: font size and left and right edges in CSS pixels, and contrast (WCAG). Elements
# in scrollable boxes count as inside the page.
MEASURE = """(() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => channels(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (channels(colour)[3] !== 0) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const looked = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].filter(node => node.nodeType === 3 && node.data.trim());
    if (!own.length || !element.checkVisibility()) continue;
    const style = getComputedStyle(element), area = element.getBoundingClientRect();
    const drawing = element.closest('svg');
    const scale = drawing ? drawing.getBoundingClientRect().width / drawing.viewBox.baseVal.width : 1;
    const levels = [light(drawing ? style.fill : style.color), light(ground(element))].sort((a, b) => b - a);
    looked.push({
      text: own[0].data.trim().slice(0, 40), size: parseFloat(style.fontSize) * scale,
      right: element.closest('.box') ? 0 : area.right, left: area.left,
      contrast: (levels[0] + 0.05) / (levels[1] + 0.05),
    });
  }
  return looked;
})()"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def logs(trained: Path, program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of a run with the page that `--exec_mode report` wrote."""
    copy = tmp_path_factory.mktemp("report") / "balls <run>"
    shutil.copytree(trained, copy)
    done = program("--exec_mode", "report", "--log_dir", copy)
    assert done.stdout.splitlines() == [str(copy / "report.html")]
    assert done.stderr == ""
    return copy


@pytest.fixture(scope="module")
def hostile(logs: Path, program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with malicious class and case names."""
    copy = tmp_path_factory.mktemp("hostile") / "logs"
    shutil.copytree(logs, copy)
    lines = [json.loads(line) for line in (copy / "log.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] == "DataOpened":
            line["classes"] = ["background", HOSTILE, HOSTILE]
        if line["event"] == "EvaluationStopped":
            line["per_case"] = {case + HOSTILE: row for case, row in line["per_case"].items()}
    (copy / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    program("--exec_mode", "report", "--log_dir", copy)
    return copy


def measure(browser: Page, path: Path, width: int, theme: str) -> list[dict[str, Any]]:
    """Opens a page, makes the checks common to all pages, and returns its texts."""
    browser.requests.clear()
    browser.problems.clear()
    browser.show(path.as_uri(), width, theme=theme)
    found: list[dict[str, Any]] = browser.evaluate(MEASURE)
    assert len(found) > 50
    assert browser.problems == []
    assert [address for address in browser.requests if not address.startswith("data:")] == [path.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert [text for text in found if text["right"] > width or text["left"] < 0] == []
    assert [text for text in found if text["size"] < 10] == []
    assert [text for text in found if text["contrast"] < 4.5] == []
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_the_page_is_legible_and_requests_nothing(browser: Page, logs: Path, width: int, theme: str) -> None:
    texts = {found["text"] for found in measure(browser, logs / "report.html", width, theme)}
    assert {"Target reached", "balls <run>", "bright", "brighter", "Worst, median, best"} <= texts
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is (theme == "light")


@pytest.mark.parametrize("width", WIDTHS)
def test_images_are_shown_and_described(browser: Page, logs: Path, width: int) -> None:
    measure(browser, logs / "report.html", width, "light")
    images = browser.evaluate(
        "[...document.images].map(i => [i.complete && i.naturalWidth, i.alt, i.getBoundingClientRect().width])"
    )
    assert len(images) == 9  # three planes of the worst, the median and the best case
    assert all(natural >= 500 and "plane of the" in alt and wide > 250 for natural, alt, wide in images)
    charts = browser.evaluate("[...document.querySelectorAll('[role=img]')].map(e => e.getAttribute('aria-label'))")
    assert len(charts) == 6
    assert all(charts)
    pictures = {file.name for file in (logs / "report").iterdir()}
    assert {f"{role}_{plane}.png" for role in ("worst", "median", "best") for plane in ("axial", "coronal")} <= pictures


def test_headings_make_an_outline(browser: Page, logs: Path) -> None:
    measure(browser, logs / "report.html", 1280, "light")
    levels = browser.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(second - first <= 1 for first, second in itertools.pairwise(levels))
    assert browser.evaluate("document.documentElement.lang") == "en"


def test_a_wide_table_scrolls_in_its_own_box(browser: Page, logs: Path) -> None:
    measure(browser, logs / "report.html", 390, "light")
    boxes = browser.evaluate(
        "[...document.querySelectorAll('.box')].map(b => [getComputedStyle(b).overflowX, b.tabIndex, "
        "b.getBoundingClientRect().right, b.getAttribute('aria-label')])"
    )
    assert len(boxes) >= 4
    assert all(overflow == "auto" and tab == 0 and right <= 390 and label for overflow, tab, right, label in boxes)


@pytest.mark.parametrize("theme", THEMES)
def test_names_from_files_are_escaped(browser: Page, hostile: Path, theme: str) -> None:
    measure(browser, hostile / "report.html", 390, theme)
    assert browser.evaluate("document.title").startswith("logs: ")
    assert browser.evaluate("document.scripts.length") == 0
    assert browser.evaluate("document.body.textContent").count(HOSTILE) >= 3


@pytest.fixture(scope="module")
def compared(logs: Path, hostile: Path, program: Program) -> Path:
    return Path(program("--exec_mode", "report", "--log_dir", logs, hostile).stdout.strip())


@pytest.mark.parametrize("width", WIDTHS)
def test_runs_are_compared_on_a_page(browser: Page, compared: Path, width: int) -> None:
    measure(browser, compared, width, "dark")
    assert browser.evaluate("document.querySelector('h1').textContent") == "2 runs compared"


def test_images_need_the_checkpoint_and_data_of_the_run(logs: Path, program: Program, tmp_path: Path) -> None:
    copy = tmp_path / "logs"
    shutil.copytree(logs, copy)
    (copy / "checkpoint.pth").unlink()
    program("--exec_mode", "report", "--log_dir", copy, "--load_ckpt_path", tmp_path / "none.pth")
    assert f"No images: checkpoint {tmp_path / 'none.pth'}: no such file" in (copy / "report.html").read_text()
    program("--exec_mode", "report", "--log_dir", copy, "--data_dir", tmp_path / "gone")
    assert f"No images: --data_dir {tmp_path / 'gone'}: no such folder" in (copy / "report.html").read_text()


def test_a_run_writes_its_page_unless_disabled(program: Program, balls: Path, tmp_path: Path) -> None:
    arguments = ("--data_dir", balls, *REPORTING, "--epochs", 2, "--start_eval_at", 9)
    printed = program(*arguments, "--log_dir", tmp_path / "with", ranks=2).stdout
    assert f"report {tmp_path / 'with' / 'report.html'}" in printed.splitlines()
    page = (tmp_path / "with" / "report.html").read_text()
    assert "Not evaluated" in page
    assert "accepts the log" not in page  # the checker requires an evaluation
    program(*arguments, "--log_dir", tmp_path / "without", "--no_report")
    assert not (tmp_path / "without" / "report.html").exists()


def test_a_page_that_cannot_be_written_does_not_end_the_run(program: Program, balls: Path, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("in the way")
    done = program("--data_dir", balls, *REPORTING, "--epochs", 1, "--log_dir", tmp_path)
    assert "warning: no report.html: " in done.stderr
    assert done.stderr.count("report") < 5
    assert "Traceback" not in done.stderr


def test_bad_input_is_one_line(program: Program, tmp_path: Path) -> None:
    done = program("--exec_mode", "report", "--log_dir", tmp_path, ok=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"main.py: error: --log_dir {tmp_path}: no log.jsonl in it; give the --log_dir of a run\n"
    done = program("--data_dir", tmp_path, "--log_dir", tmp_path, tmp_path, ok=False)
    assert done.returncode == 2
    assert "only --exec_mode report takes several folders" in done.stderr
