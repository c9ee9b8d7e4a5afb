"""The report page in a browser: legible in both themes, on a desktop and on a phone."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.conftest import TINY, Program

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

pytest.importorskip("matplotlib", reason="the report is drawn by matplotlib, which is not installed")

REPORTING = tuple(flag for flag in TINY if flag != "--no_report")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Without a sandbox, which a container may not allow; without the background services, which look for the network.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--hide-scrollbars")
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
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


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


def open_page(browser: Browser, path: Path, width: int, theme: str) -> tuple[Page, list[str], list[str]]:
    """Opens a file at a width in CSS pixels, below 500 as a phone; returns what it requested and complained about."""
    is_phone = width < 500
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        device_scale_factor=2 if is_phone else 1,
        is_mobile=is_phone,
        color_scheme=theme,
    )
    page, requests, problems = context.new_page(), [], []

    def listen(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning", "assert"):
            problems.append(message.text)

    page.on("request", lambda request: requests.append(request.url))
    page.on("console", listen)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(path.as_uri())
    return page, requests, problems


def measure(browser: Browser, path: Path, width: int, theme: str) -> tuple[Page, list[dict[str, Any]]]:
    """Opens a page, makes the checks common to all pages, and returns it with its texts."""
    page, requests, problems = open_page(browser, path, width, theme)
    found: list[dict[str, Any]] = page.evaluate(MEASURE)
    assert len(found) > 50
    assert problems == []
    assert [address for address in requests if not address.startswith("data:")] == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [text for text in found if text["right"] > width or text["left"] < 0] == []
    assert [text for text in found if text["size"] < 10] == []
    assert [text for text in found if text["contrast"] < 4.5] == []
    return page, found


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("theme", THEMES)
def test_the_page_is_legible_and_requests_nothing(browser: Browser, logs: Path, width: int, theme: str) -> None:
    page, found = measure(browser, logs / "report.html", width, theme)
    texts = {text["text"] for text in found}
    assert {"Target reached", "balls <run>", "bright", "brighter", "Worst, median, best"} <= texts
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") is (theme == "light")


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_images_are_shown_and_described(browser: Browser, logs: Path, width: int) -> None:
    page, _ = measure(browser, logs / "report.html", width, "light")
    images = page.evaluate(
        "[...document.images].map(i => [i.complete && i.naturalWidth, i.alt, i.getBoundingClientRect().width])"
    )
    assert len(images) == 9  # three planes of the worst, the median and the best case
    assert all(natural >= 500 and "plane of the" in alt and wide > 250 for natural, alt, wide in images)
    charts = page.evaluate("[...document.querySelectorAll('[role=img]')].map(e => e.getAttribute('aria-label'))")
    assert len(charts) == 6
    assert all(charts)
    pictures = {file.name for file in (logs / "report").iterdir()}
    assert {f"{role}_{plane}.png" for role in ("worst", "median", "best") for plane in ("axial", "coronal")} <= pictures


@pytest.mark.slow
def test_headings_make_an_outline(browser: Browser, logs: Path) -> None:
    page, _ = measure(browser, logs / "report.html", 1280, "light")
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(second - first <= 1 for first, second in itertools.pairwise(levels))
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.slow
def test_a_wide_table_scrolls_in_its_own_box(browser: Browser, logs: Path) -> None:
    page, _ = measure(browser, logs / "report.html", 390, "light")
    boxes = page.evaluate(
        "[...document.querySelectorAll('.box')].map(b => [getComputedStyle(b).overflowX, b.tabIndex, "
        "b.getBoundingClientRect().right, b.getAttribute('aria-label')])"
    )
    assert len(boxes) >= 4
    assert all(overflow == "auto" and tab == 0 and right <= 390 and label for overflow, tab, right, label in boxes)


@pytest.mark.slow
@pytest.mark.parametrize("theme", THEMES)
def test_names_from_files_are_escaped(browser: Browser, hostile: Path, theme: str) -> None:
    page, _ = measure(browser, hostile / "report.html", 390, theme)
    assert page.evaluate("document.title").startswith("logs: ")
    assert page.evaluate("document.scripts.length") == 0
    assert page.evaluate("document.body.textContent").count(HOSTILE) >= 3


@pytest.fixture(scope="module")
def compared(logs: Path, hostile: Path, program: Program) -> Path:
    return Path(program("--exec_mode", "report", "--log_dir", logs, hostile).stdout.strip())


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_runs_are_compared_on_a_page(browser: Browser, compared: Path, width: int) -> None:
    page, _ = measure(browser, compared, width, "dark")
    assert page.evaluate("document.querySelector('h1').textContent") == "2 runs compared"


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
