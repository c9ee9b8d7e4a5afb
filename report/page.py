"""The page of one run: verdict, curves, time, cases, pictures, and what it was run with."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report.cases import PREDICTION, TRUTH, Shown, mean_of, worst_first
from report.compliance import Compliance
from report.figures import Chart, phases_ms
from report.markup import NOTHING, Html, join, pairs, table, tag
from report.records import Run
from runtime.arguments import RunConfig

STYLE = Path(__file__).with_name("style.css")
# No script and nothing from elsewhere: the browser itself sees to it that no request leaves the page.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Verdict:
    """`tone` is good, bad or "", `head` a few words, `told` the sentence under them."""

    tone: str
    head: str
    told: str


def document(title: str, *content: Html) -> str:
    """A whole HTML file around `content`."""
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),  # or else a browser asks the server for one
        tag("title", title),
        tag("style", Html(STYLE.read_text(encoding="utf-8"))),
    )
    footer = tag(
        "footer", tag("p", f"Written {moment(time.time())} by the MLPerf 3D U-Net benchmark's --exec_mode report.")
    )
    body = tag("body", tag("main", *content), footer)
    return "<!DOCTYPE html>\n" + tag("html", tag("head", *head), body, lang="en") + "\n"


def moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def duration(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 07 min."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def score(dice: float, digits: int = 4) -> str:
    return f"{dice:.{digits}f}" if math.isfinite(dice) else NOTHING


def figure_of(value: float) -> str:
    """Three digits that mean something, thousands apart."""
    return NOTHING if not math.isfinite(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def samples_to(run: Run, epoch: int) -> str:
    return f"{epoch * run.samples_per_epoch:,}"


def verdict_of(run: Run) -> Verdict:
    """What became of the run."""
    best = run.best
    if reached := run.converged:
        told = (
            f"Mean Dice {score(reached.mean_dice)} after epoch {reached.epoch}, {samples_to(run, reached.epoch)} "
            f"samples and {duration(reached.clock_s)} on the clock. The target is {run.target:g}."
        )
        return Verdict("good", "Target reached", told)
    known = (
        f"Best mean Dice {score(best.mean_dice)} at epoch {best.epoch}, the target is {run.target:g}." if best else ""
    )
    ran = f"{len(run.epochs)} epochs in {duration(run.clock_s)}."
    if not run.status:
        return Verdict("bad", "No end in the log", f"Still running, or killed. {ran} {known}".strip())
    if run.reason.startswith("diverged"):
        return Verdict("bad", "Diverged", f"{run.reason}. {known}".strip())
    if run.reason.startswith("the target was not reached"):
        if best is None:
            return Verdict("", "Not evaluated", f"{ran} Nothing was scored on the way.")
        return Verdict("bad", "Target not reached", f"{known} {ran}")
    return Verdict("bad", "Ended early", f"{run.reason}. {known}".strip())


def run_page(run: Run, charts: Sequence[Chart], shown: Sequence[Shown], left_out: str, checked: Compliance) -> str:
    """The page as HTML.

    Args:
        left_out: why there are no pictures of cases, "" where there are.
    """
    where = f"{run.train_cases} cases to train, {run.evaluation_cases} to evaluate" if run.train_cases else ""
    about = [moment(run.started_s), run.platform, where, f"told by {run.parts} logs" if run.parts > 1 else ""]
    content = [
        tag(
            "header",
            tag("p", "3D U-Net training run", class_="soft"),
            tag("h1", run.name),
            tag("p", " · ".join(part for part in about if part), class_="soft"),
        ),
        _verdict(run, checked),
        charts_section("Curves", charts),
        _phases(run),
        _cases(run),
        _pictures(shown, left_out),
        _rules(run, checked),
        _settings(run),
    ]
    return document(f"{run.name}: {verdict_of(run).head}", *content)


def _verdict(run: Run, checked: Compliance) -> Html:
    verdict, best, reached = verdict_of(run), run.best, run.converged
    tiles = [
        ("Best mean Dice", score(best.mean_dice) if best else NOTHING),
        ("Samples to converge", samples_to(run, reached.epoch) if reached else NOTHING),
        ("Time on the clock", duration(run.clock_s)),
        ("Training samples/s", figure_of(run.rate)),
        ("Division", run.division or NOTHING),
        ("MLPerf's checker", {True: "accepted", False: "not accepted", None: "not asked"}[checked.accepted]),
    ]
    return tag(
        "section",
        tag("h2", verdict.head),
        tag("p", verdict.told),
        pairs(tiles, "tiles"),
        class_=f"verdict {verdict.tone}".strip(),
    )


def _rules(run: Run, checked: Compliance) -> Html:
    rule_violations = (
        tag("ul", *(tag("li", departure) for departure in run.rule_violations)) if run.rule_violations else Html("")
    )
    told = join(
        [checked.told, tag("ul", *(tag("li", line) for line in checked.complaints)) if checked.complaints else ""]
    )
    entries: list[tuple[object, object]] = [("MLPerf's checker", told)]
    if run.division:
        departs = (
            "departs from the closed division's rules in:" if run.rule_violations else "nothing departs from its rules"
        )
        entries.insert(0, ("Division", join([f"{run.division}, " + departs, rule_violations])))
    if run.notes:
        entries.append(("Notes", tag("ul", *(tag("li", note) for note in run.notes))))
    return tag("section", tag("h2", "By MLPerf's rules"), pairs(entries, "facts"))


def charts_section(title: str, charts: Iterable[Chart]) -> Html:
    """Charts beside each other, each with its heading and what it shows in words."""
    figures = [
        tag(
            "figure",
            tag("h3", chart.title),
            tag("div", Html(chart.svg), role="img", aria_label=f"{chart.title}. {chart.told}"),
            tag("figcaption", chart.told),
        )
        for chart in charts
    ]
    if not figures:
        return tag("section", tag("h2", title), tag("p", "The log has no epoch yet.", class_="soft"))
    return tag("section", tag("h2", title), tag("div", *figures, class_="charts"))


def _phases(run: Run) -> Html:
    phases = phases_ms(run)
    total = sum(phases.values())
    if not total:
        return Html("")
    rows = [(name, f"{ms:.3g}", f"{ms / total:.0%}") for name, ms in phases.items()]
    rate = figure_of(float(run.benchmark.get("samples_per_s", math.nan)))
    told = f"{rate} samples/s after the warm-up, {run.benchmark.get('verdict', 'not judged')}."
    return tag(
        "section",
        tag("h2", "A mean iteration"),
        tag("p", told),
        table("Parts of an iteration", ("part", "ms", "share"), rows),
    )


def _cases(run: Run) -> Html:
    best = run.best
    if best is None or not best.per_case:
        return Html("")
    names = run.class_names(len(best.dice))
    rows = [
        (case, score(mean_of(best.per_case[case]), 3), *(score(dice, 3) for dice in best.per_case[case]))
        for case in worst_first(best.per_case)
    ]
    caption = f"Dice of {len(rows)} cases after epoch {best.epoch}, the best evaluation; the worst case first"
    return tag("section", tag("h2", "Cases"), table(caption, ("case", "mean", *names), rows, "tall"))


def _pictures(shown: Sequence[Shown], left_out: str) -> Html:
    if not shown:
        return tag("section", tag("h2", "Worst, median, best"), tag("p", f"No pictures: {left_out}.", class_="soft"))
    legend = tag(
        "p",
        tag(
            "span",
            tag("span", class_="key", style=f"border-color:{TRUTH}"),
            "truth",
            tag("span", class_="key dashed", style=f"border-color:{PREDICTION}"),
            "prediction",
            class_="legend",
        ),
    )
    blocks = []
    for case in shown:
        images = [
            tag(
                "figure",
                tag(
                    "img",
                    src=f"data:image/png;base64,{base64.b64encode(picture.png).decode()}",
                    alt=picture.told,
                    width="640",
                    height="640",
                ),
                tag("figcaption", picture.plane),
            )
            for picture in case.pictures
        ]
        head = tag("h3", f"{case.role.capitalize()}: {case.case}, mean Dice {score(mean_of(case.dice), 3)}")
        blocks.append(tag("div", head, tag("div", *images, class_="planes"), class_="case"))
    told = (
        "Three planes through the foreground's centre; the patient's right is on the left of the axial and the "
        "coronal one."
    )
    return tag("section", tag("h2", "Worst, median, best"), tag("p", told, class_="soft"), legend, *blocks)


def _settings(run: Run) -> Html:
    defaults = {name: plain(value) for name, value in RunConfig().to_json().items()}
    flags = {name: plain(value) for name, value in run.config.items() if name in defaults}
    changed = {name: value for name, value in flags.items() if value != defaults.get(name)}
    rest = {name: value for name, value in flags.items() if name not in changed}
    return tag(
        "section",
        tag("h2", "Configuration"),
        settings("Flags that differ from their defaults", "flag", changed),
        tag(
            "details",
            tag("summary", f"{len(rest)} flags at their defaults"),
            settings("Flags at their defaults", "flag", rest),
        ),
        tag("h2", "Environment"),
        settings("What it ran on", "what", run.environment),
        tag("h2", "Seeds"),
        settings("Seeds by purpose", "purpose", run.seeds),
    )


def settings(caption: str, what: str, values: Mapping[str, Any]) -> Html:
    rows = [
        (name.replace("_", " ") if what != "flag" else f"--{name}", tag("code", plain(value)))
        for name, value in values.items()
    ]
    return table(caption, (what, "value"), rows, "words")


def plain(value: Any) -> str:
    """As on the command line, however JSON or argparse hold it."""
    if isinstance(value, list | tuple):
        return " ".join(map(plain, value)) or NOTHING
    return NOTHING if value is None else json.dumps(value) if isinstance(value, bool) else str(value)
