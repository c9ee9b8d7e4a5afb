"""The page of one run: verdict, curves, cases, images, MLPerf rules, configuration and environment."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.messages import counted
from report.cases import ShownCase, mean_of, worst_first
from report.compliance import Compliance
from report.figures import PREDICTION, TRUTH, Chart
from report.markup import NOTHING, Html, bullets, join, pairs, table, tag
from report.records import Run
from runtime.arguments import RunConfig
from runtime.train_state import NOT_REACHED

STYLE = Path(__file__).with_name("style.css")
# Without scripts and external resources: the browser blocks every request from the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


# Parts of an iteration, as `--benchmark` measures them.
PHASES = {
    "data": "data_wait_ms",
    "forward, backward": "forward_backward_ms",
    "optimizer": "optimizer_ms",
    "communication": "communication_ms",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a run ended.

    Attributes:
        tone: "good", "bad" or "".
        detail: the sentence below the title.
    """

    tone: str
    title: str
    detail: str


def document(title: str, *content: Html) -> str:
    """Returns a complete HTML file around `content`."""
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),  # without it a browser requests one
        tag("title", title),
        tag("style", Html(STYLE.read_text(encoding="utf-8"))),
    )
    footer = tag("p", f"Written {moment(time.time())} by the MLPerf 3D U-Net benchmark (python3 -m report).")
    body = tag("body", tag("main", *content), tag("footer", footer))
    return "<!DOCTYPE html>\n" + tag("html", tag("head", *head), body, lang="en") + "\n"


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def duration(seconds: float) -> str:
    """Formats seconds as 3.2 s, 4 min 05 s or 2 h 07 min."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def score(dice: float, digits: int = 4) -> str:
    return f"{dice:.{digits}f}" if math.isfinite(dice) else NOTHING


def significant(value: float) -> str:
    """Formats a number with three significant digits, or with separators from 1,000 on."""
    return NOTHING if not math.isfinite(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def samples_to(run: Run, epoch: int) -> str:
    """Returns the number of samples up to the end of an epoch, as a phrase."""
    samples, is_exact = run.samples_to(epoch)
    return f"{samples:,}" if is_exact else f"about {samples:,}"


def verdict_of(run: Run) -> Verdict:
    """Returns how the run ended."""
    best = run.best
    if reached := run.converged:
        detail = (
            f"Mean Dice {score(reached.mean_dice)} after epoch {reached.epoch}, {samples_to(run, reached.epoch)} "
            f"samples and {duration(reached.clock_s)} on the clock. The target is {run.target:g}."
        )
        return Verdict(tone="good", title="Target reached", detail=detail)
    known = (
        f"Best mean Dice {score(best.mean_dice)} at epoch {best.epoch}, the target is {run.target:g}." if best else ""
    )
    ran = f"{counted(len(run.epochs), 'epoch')} in {duration(run.clock_s)}."
    if not run.status:
        return Verdict(tone="bad", title="No end in the log", detail=f"Still running, or killed. {ran} {known}".strip())
    if run.reason.startswith("diverged"):
        return Verdict(tone="bad", title="Diverged", detail=f"{run.reason}. {known}".strip())
    if run.reason.startswith(NOT_REACHED):
        if best is None:
            return Verdict(tone="", title="Not evaluated", detail=f"{ran} There was no evaluation.")
        return Verdict(tone="bad", title="Target not reached", detail=f"{known} {ran}")
    return Verdict(tone="bad", title="Ended early", detail=f"{run.reason}. {known}".strip())


def run_page(
    run: Run, charts: Sequence[Chart], *, compliance: Compliance, shown: Sequence[ShownCase], no_images: str
) -> str:
    """Returns the page as HTML.

    Args:
        shown: cases with images.
        no_images: why there are none, else "".
    """
    cases = f"{run.train_cases} training cases, {run.evaluation_cases} evaluation cases" if run.train_cases else ""
    about = [moment(run.started_s), run.platform, cases, f"{run.log_files} log files" if run.log_files > 1 else ""]
    content = [
        tag(
            "header",
            tag("p", "3D U-Net training run", class_="soft"),
            tag("h1", run.name),
            tag("p", " · ".join(part for part in about if part), class_="soft"),
        ),
        _verdict(run, compliance),
        charts_section("Curves", charts),
        _phases(run),
        _cases(run),
        _images(shown, no_images),
        _rules(run, compliance),
        _settings(run),
    ]
    return document(f"{run.name}: {verdict_of(run).title}", *content)


def _verdict(run: Run, compliance: Compliance) -> Html:
    verdict, best, reached = verdict_of(run), run.best, run.converged
    tiles = [
        ("Best mean Dice", score(best.mean_dice) if best else NOTHING),
        ("Samples to converge", samples_to(run, reached.epoch) if reached else NOTHING),
        ("Time on the clock", duration(run.clock_s)),
        ("Training samples/s", significant(run.samples_per_s)),
        ("Division", run.division or NOTHING),
        ("MLPerf checker", {True: "accepted", False: "not accepted", None: "not run"}[compliance.accepted]),
    ]
    return tag(
        "section",
        tag("h2", verdict.title),
        tag("p", verdict.detail),
        pairs(tiles, "tiles"),
        class_=f"verdict {verdict.tone}".strip(),
    )


def _rules(run: Run, compliance: Compliance) -> Html:
    entries: list[tuple[object, object]] = []
    if run.rule_violations:
        division = f"{run.division}, because of these violations of the closed division's rules:"
        entries.append(("Division", join([division, bullets(run.rule_violations)])))
    elif run.division:
        entries.append(("Division", f"{run.division}, no rule violations"))
    complaints = bullets(compliance.complaints) if compliance.complaints else ""
    entries.append(("MLPerf checker", join([compliance.summary, complaints])))
    if run.notes:
        entries.append(("Notes", bullets(run.notes)))
    return tag("section", tag("h2", "MLPerf rules"), pairs(entries, "facts"))


def charts_section(title: str, charts: Iterable[Chart]) -> Html:
    """Returns charts side by side, each with its title and caption."""
    figures = [
        tag(
            "figure",
            tag("h3", chart.title),
            tag("div", Html(chart.svg), role="img", aria_label=f"{chart.title}. {chart.caption}"),
            tag("figcaption", chart.caption),
        )
        for chart in charts
    ]
    if not figures:
        return tag("section", tag("h2", title), tag("p", "The log has no complete epoch.", class_="soft"))
    return tag("section", tag("h2", title), tag("div", *figures, class_="charts"))


def _phases(run: Run) -> Html:
    measured = {name: run.benchmark.get(key) for name, key in PHASES.items()}
    phases = {name: float(ms) for name, ms in measured.items() if isinstance(ms, int | float)}
    total = sum(phases.values())
    if not total:
        return Html("")
    rows = [(name, f"{ms:.3g}", f"{ms / total:.0%}") for name, ms in phases.items()]
    rate = significant(float(run.benchmark.get("samples_per_s", math.nan)))
    return tag(
        "section",
        tag("h2", "Mean iteration"),
        tag("p", f"{rate} samples/s after the warm-up, {run.benchmark.get('verdict', 'bottleneck not determined')}."),
        table("Parts of an iteration", ("part", "ms", "share"), rows),
    )


def _cases(run: Run) -> Html:
    best = run.best
    if best is None or not best.per_case:
        return Html("")
    names = run.class_names(len(best.dice))
    rows = [
        (
            f"{case} *" if case in run.doubtful_cases else case,
            score(mean_of(best.per_case[case]), 3),
            *(score(dice, 3) for dice in best.per_case[case]),
        )
        for case in worst_first(best.per_case)
    ]
    doubtful = [f"* {case}: {why}" for case, why in run.doubtful_cases.items() if case in best.per_case]
    caption = f"Dice of {counted(len(rows), 'case')} after epoch {best.epoch}, the best evaluation; worst case first"
    marked = bullets(doubtful) if doubtful else ""
    return tag("section", tag("h2", "Cases"), table(caption, ("case", "mean", *names), rows, "tall"), marked)


def _images(shown: Sequence[ShownCase], no_images: str) -> Html:
    heading = tag("h2", "Worst, median, best")
    if not shown:
        return tag("section", heading, tag("p", f"No images: {no_images}.", class_="soft"))
    legend = tag(
        "span",
        tag("span", class_="key", style=f"border-color:{TRUTH}"),
        "truth",
        tag("span", class_="key dashed", style=f"border-color:{PREDICTION}"),
        "prediction",
        class_="legend",
    )
    planes = (
        "Three planes through the centre of the foreground; in the axial and coronal planes the patient's right is on "
        "the left."
    )
    return tag("section", heading, tag("p", planes, class_="soft"), tag("p", legend), *map(_images_of, shown))


def _images_of(case: ShownCase) -> Html:
    figures = [
        tag(
            "figure",
            tag(
                "img",
                src=f"data:image/png;base64,{base64.b64encode(image.png).decode()}",
                alt=image.description,
                width="640",
                height="640",
            ),
            tag("figcaption", image.plane),
        )
        for image in case.images
    ]
    title = f"{case.role.capitalize()}: {case.case}, mean Dice {score(mean_of(case.dice), 3)}"
    return tag("div", tag("h3", title), tag("div", *figures, class_="planes"), class_="case")


def _settings(run: Run) -> Html:
    defaults = {name: plain(value) for name, value in RunConfig().to_json().items()}
    flags = {f"--{name}": plain(value) for name, value in run.config.items() if name in defaults}
    changed = {flag: value for flag, value in flags.items() if value != defaults[flag.removeprefix("--")]}
    rest = {flag: value for flag, value in flags.items() if flag not in changed}
    environment = {name.replace("_", " "): value for name, value in run.environment.items()}
    seeds = {name.replace("_", " "): value for name, value in run.seeds.items()}
    return tag(
        "section",
        tag("h2", "Configuration"),
        _values("Flags that differ from their defaults", "flag", changed),
        tag(
            "details",
            tag("summary", f"{len(rest)} flags at their defaults"),
            _values("Flags at their defaults", "flag", rest),
        ),
        tag("h2", "Environment"),
        _values("Hardware and software of the run", "fact", environment),
        tag("h2", "Seeds"),
        _values("Seeds by purpose", "purpose", seeds),
    )


def _values(caption: str, heading: str, values: Mapping[str, Any]) -> Html:
    rows = [(name, tag("code", plain(value))) for name, value in values.items()]
    return table(caption, (heading, "value"), rows, "words")


def plain(value: Any) -> str:
    """Formats a value as on the command line, whether it comes from JSON or from argparse."""
    if isinstance(value, list | tuple):
        return " ".join(map(plain, value)) or NOTHING
    return NOTHING if value is None else json.dumps(value) if isinstance(value, bool) else str(value)
