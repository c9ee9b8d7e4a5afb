"""The report's charts: matplotlib draws each once, for the page as SVG in the page's own colours, and as a PNG.

matplotlib is drawn on paper: every colour is one of `INKS`, which the page's SVG has as a CSS variable instead, so that
one drawing follows the reader's light or dark theme.
"""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.files import replacing
from report.records import Run

# By purpose: the colour on white paper; `style.css` has each as a variable of the same name, for both themes. The
# series are Okabe and Ito's, which people tell apart however they see colours, darkened to a contrast of 3 on white.
INKS = {
    "ink": "#1a2230",
    "soft": "#5b6472",
    "rule": "#d8dce2",
    "s0": "#0072b2",
    "s1": "#c85200",
    "s2": "#00845f",
    "s3": "#a8487f",
    "s4": "#8a6d00",
    "s5": "#3f7fa6",
}
SERIES = ("s0", "s1", "s2", "s3", "s4", "s5")
MARKERS = "osD^vP"
# In inches: drawn for a phone's width, where one chart fills the screen; a wide page has them side by side.
SIZE = (4.1, 2.75)
# Beside the axis; an entry takes about 5 points a letter and 30 for its line.
LEGEND_POINTS = 270
PNG_DPI = 200
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.titlesize": 10,
    "legend.fontsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INKS["ink"],
    "axes.labelcolor": INKS["soft"],
    "xtick.color": INKS["soft"],
    "ytick.color": INKS["soft"],
    "axes.edgecolor": INKS["rule"],
    "grid.color": INKS["rule"],
    "grid.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # Names come from files: a $ in one is a dollar.
    "text.parse_math": False,
}
# What matplotlib says of missing fonts and a first start is of no use to who trains.
logging.getLogger("matplotlib").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Chart:
    """A drawing: `key` names its file, `told` says in words what it shows."""

    key: str
    title: str
    told: str
    svg: str


@contextmanager
def open_axes() -> Iterator[tuple[Figure, Axes]]:
    """An empty chart in the page's style."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        yield figure, figure.add_subplot()


def save_chart(figure: Figure, key: str, title: str, told: str, folder: Path) -> Chart:
    """Writes FOLDER/KEY.png and returns the same drawing for the page."""
    drawn = io.StringIO()
    # The salt makes names inside of the SVG differ from chart to chart, and the same chart the same bytes.
    with mpl.rc_context(STYLE | {"svg.hashsalt": key}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        with replacing(folder / f"{key}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=PNG_DPI, facecolor="white")
    return Chart(key, title, told, _for_page(drawn.getvalue()))


def _for_page(svg: str) -> str:
    """The <svg> element alone, unsized and in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg
    )
    # An HTML page has a base of its own, so links into the drawing need no namespace.
    svg = svg.replace("xlink:href", "href")
    # Every drawing names its groups alike, and a page has each name once.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for name, colour in INKS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def shorten(name: str, length: int = 22) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def draw_line(axes: Axes, x: Sequence[float], y: Sequence[float], index: int, label: str, **style: Any) -> None:
    """A series; markers tell it from the others without colour, where they do not touch each other."""
    marker = MARKERS[index % len(MARKERS)] if len(x) <= 40 else ""
    line = ("-", "--", ":")[index // len(SERIES) % 3]
    # A label that begins with _ would be left out of the legend.
    axes.plot(
        x, y, line, color=INKS[SERIES[index % len(SERIES)]], marker=marker, label=shorten(label).lstrip("_"), **style
    )


def finish(axes: Axes, x_label: str) -> None:
    """Labels, whole epochs, and above the legend of several series, as many beside each other as there is room for."""
    axes.set_xlabel(x_label)
    # There is no half an epoch, not even where there is a single one.
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=x_label == "epoch", min_n_ticks=1))
    axes.margins(x=0.03)
    labels = [str(line.get_label()) for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    if len(labels) > 1:
        columns = int(LEGEND_POINTS / (30 + 5 * max(map(len, labels))))
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=max(1, min(columns, len(labels))),
            borderaxespad=0.1,
            handlelength=1.6,
            columnspacing=1.2,
        )


def draw_run(run: Run, folder: Path) -> list[Chart]:
    """Every chart that the run has numbers for."""
    charts = []
    draws: tuple[Callable[[Run, Path], Chart | None], ...] = (_dice, _loss, _rate, _samples, _time, _cases)
    for draw in draws:
        if chart := draw(run, folder):
            charts.append(chart)
    return charts


def _dice(run: Run, folder: Path) -> Chart | None:
    found = list(run.evaluations.values())
    if not found or run.best is None:
        return None
    epochs = [evaluation.epoch for evaluation in found]
    with open_axes() as (figure, axes):
        names = run.class_names(len(found[0].dice))
        for index, name in enumerate(names):
            draw_line(axes, epochs, [evaluation.dice[index] for evaluation in found], index, name)
        means = [evaluation.mean_dice for evaluation in found]
        axes.plot(epochs, means, color=INKS["ink"], marker=".", markersize=7, linewidth=2.2, label="mean")
        if run.train_dice:
            axes.plot(
                list(run.train_dice),
                list(run.train_dice.values()),
                ":",
                color=INKS["soft"],
                marker=".",
                label="mean, training",
            )
        _target(axes, run.target)
        finish(axes, "epoch")
        first = f"{found[0].mean_dice:.3f} after epoch {epochs[0]}, " if found[0] is not run.best else ""
        told = f"Mean Dice: {first}{run.best.mean_dice:.3f} after epoch {run.best.epoch}; the target is {run.target:g}."
        return save_chart(figure, "dice", "Dice per class", told, folder)


def _target(axes: Axes, target: float) -> None:
    axes.axhline(target, color=INKS["soft"], linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"target {target:g}",
        (0, target),
        xycoords=("axes fraction", "data"),
        xytext=(2, 3),
        textcoords="offset points",
        color=INKS["soft"],
        fontsize=9,
    )


def _loss(run: Run, folder: Path) -> Chart | None:
    if not run.epochs:
        return None
    losses = [epoch.loss for epoch in run.epochs.values()]
    with open_axes() as (figure, axes):
        draw_line(axes, list(run.epochs), losses, 0, "training")
        if run.evaluations:
            draw_line(axes, list(run.evaluations), [e.loss for e in run.evaluations.values()], 1, "evaluation")
        axes.set_ylim(bottom=0)
        finish(axes, "epoch")
        told = f"The training loss goes from {losses[0]:.3g} in epoch {min(run.epochs)} to {losses[-1]:.3g} at the end."
        return save_chart(figure, "loss", "Loss", told, folder)


def _rate(run: Run, folder: Path) -> Chart | None:
    if not run.epochs:
        return None
    rates = [epoch.learning_rate for epoch in run.epochs.values()]
    with open_axes() as (figure, axes):
        # A rate is an epoch's: a step, not a slope.
        axes.step(list(run.epochs), rates, where="mid", color=INKS["s2"])
        axes.set_ylim(0, 1.08 * max(rates) or 1)
        finish(axes, "epoch")
        told = (
            f"The learning rate starts at {rates[0]:.3g}, is {max(rates):.3g} at most and {rates[-1]:.3g} at the end."
        )
        return save_chart(figure, "learning_rate", "Learning rate", told, folder)


def _samples(run: Run, folder: Path) -> Chart | None:
    timed = [epoch for epoch in run.epochs.values() if epoch.seconds > 0]
    if not timed:
        return None
    rates = [epoch.samples / epoch.seconds for epoch in timed]
    with open_axes() as (figure, axes):
        axes.axhline(run.rate, color=INKS["soft"], linewidth=1, linestyle=(0, (4, 3)))
        draw_line(axes, [epoch.number for epoch in timed], rates, 0, "samples/s")
        axes.set_ylim(0, 1.15 * max(rates))
        finish(axes, "epoch")
        told = (
            f"{run.rate:.3g} samples/s over the run (dashed), {min(rates):.3g} to {max(rates):.3g} from epoch to epoch."
        )
        return save_chart(figure, "samples_per_s", "Training samples/s", told, folder)


def spent_s(run: Run) -> dict[str, float]:
    """Where the time went, in s, what there was none of left out."""
    training = sum(epoch.seconds for epoch in run.epochs.values())
    evaluation = sum(found.seconds for found in run.evaluations.values())
    spent = {
        "before the clock": run.init_s,
        "training": training,
        "evaluation": evaluation,
        "rest": run.clock_s - training - evaluation,
    }
    return {name: seconds for name, seconds in spent.items() if seconds > 0}


def phases_ms(run: Run) -> dict[str, float]:
    """A mean iteration's parts in ms, as `--benchmark` measured them; {} without."""
    parts = {
        "data": "data_wait_ms",
        "forward, backward": "forward_backward_ms",
        "optimizer": "optimizer_ms",
        "communication": "communication_ms",
    }
    found = {name: run.benchmark.get(key) for name, key in parts.items()}
    return {name: float(ms) for name, ms in found.items() if isinstance(ms, int | float)}


def _time(run: Run, folder: Path) -> Chart | None:
    spent = spent_s(run)
    total = sum(spent.values())
    if not total:
        return None
    with open_axes() as (figure, axes):
        _bars(axes, list(spent), [seconds / total for seconds in spent.values()])
        shares = ", ".join(f"{name} {_share(seconds / total)}" for name, seconds in spent.items())
        return save_chart(figure, "time", "Where the time went", f"Of {total:,.0f} s: {shares}.", folder)


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def _bars(axes: Axes, names: Sequence[str], shares: Sequence[float]) -> None:
    places = np.arange(len(names))[::-1]
    axes.barh(places, shares, height=0.55, color=INKS["s0"])
    axes.set_yticks(places, [shorten(name) for name in names])
    axes.set_xlim(0, 1.12 * max(shares))
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    for place, share in zip(places, shares, strict=True):
        axes.annotate(_share(share), (share, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)


def _cases(run: Run, folder: Path) -> Chart | None:
    best = run.best
    if best is None or not best.per_case:
        return None
    names = run.class_names(len(best.dice))
    with open_axes() as (figure, axes):
        for index in range(len(names)):
            scores = sorted(row[index] for row in best.per_case.values() if math.isfinite(row[index]))
            # Golden-ratio steps spread the points evenly and alike in every drawing.
            offsets = [0.5 * (place * 0.618034 % 1 - 0.5) for place in range(len(scores))]
            axes.scatter(
                index + np.array(offsets),
                scores,
                s=13,
                color=INKS[SERIES[index % len(SERIES)]],
                alpha=0.75,
                linewidths=0,
            )
            if scores:
                axes.hlines(float(np.median(scores)), index - 0.33, index + 0.33, color=INKS["ink"], linewidth=1.6)
        axes.set_xticks(range(len(names)), [shorten(name, 14) for name in names])
        axes.set_xlim(-0.6, len(names) - 0.4)
        told = f"{len(best.per_case)} cases in the best evaluation, a point a case; the bar is their median."
        return save_chart(figure, "cases", "Dice per case", told, folder)
