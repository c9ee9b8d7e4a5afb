"""Several runs on one page: what became of each, their curves over each other, and the flags that they differ in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from report import figures
from report.figures import Chart
from report.markup import NOTHING, Html, table, tag
from report.page import (
    charts_section,
    document,
    duration,
    figure_of,
    plain,
    samples_to,
    score,
    verdict_of,
)
from report.records import Run

Points = tuple[list[float], list[float]]
# A run's own places and wishes: no two runs are alike in these, and nothing of their numbers follows from them.
OWN_FLAGS = ("log_dir", "save_ckpt_path", "load_ckpt_path", "verbose", "local_rank", "compare", "no_report", "resume")


def comparison_page(runs: Sequence[Run], folder: Path) -> str:
    """The page as HTML; its charts lie in `folder` as PNG besides."""
    names = names_of(runs)
    content = [
        tag("header", tag("p", "3D U-Net training runs", class_="soft"), tag("h1", f"{len(runs)} runs compared")),
        _outcomes(runs, names),
        charts_section("Curves", draw_comparison(runs, names, folder)),
        _differences(runs, names),
    ]
    return document(f"{len(runs)} runs compared", *content)


def names_of(runs: Sequence[Run]) -> list[str]:
    """Each run's folder; the whole path where two folders bear one name."""
    short = [run.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def _outcomes(runs: Sequence[Run], names: Sequence[str]) -> Html:
    head = ("run", "verdict", "best Dice", "at epoch", "target", "samples to converge", "time", "samples/s", "division")
    rows = []
    for run, name in zip(runs, names, strict=True):
        best, reached = run.best, run.converged
        rows.append(
            (
                name,
                verdict_of(run).head,
                score(best.mean_dice) if best else NOTHING,
                best.epoch if best else NOTHING,
                f"{run.target:g}",
                samples_to(run, reached.epoch) if reached else NOTHING,
                duration(run.clock_s),
                figure_of(run.rate),
                run.division or NOTHING,
            )
        )
    return tag("section", tag("h2", "Verdicts"), table("What became of each run", head, rows))


def draw_comparison(runs: Sequence[Run], names: Sequence[str], folder: Path) -> list[Chart]:
    """Every chart that at least one run has numbers for."""
    draws: tuple[tuple[str, str, str, Callable[[Run], Points]], ...] = (
        ("compared_dice", "Mean Dice by epoch", "epoch", _dice),
        ("compared_time", "Mean Dice by time", "minutes on the clock", _dice_by_time),
        ("compared_loss", "Training loss", "epoch", _loss),
        ("compared_rate", "Learning rate", "epoch", _rate),
        ("compared_samples_per_s", "Training samples/s", "epoch", _samples),
    )
    charts = []
    for key, title, x_label, points in draws:
        found = {name: points(run) for run, name in zip(runs, names, strict=True)}
        if not any(x for x, _ in found.values()):
            continue
        with figures.open_axes() as (figure, axes):
            _draw(axes, found, x_label)
            ends = "; ".join(f"{name} ends at {y[-1]:.3g}" for name, (_, y) in found.items() if y)
            charts.append(figures.save_chart(figure, key, title, f"{ends}.", folder))
    return charts


def _draw(axes: Axes, found: dict[str, Points], x_label: str) -> None:
    for index, (name, (x, y)) in enumerate(found.items()):
        figures.draw_line(axes, x, y, index, name)
    figures.finish(axes, x_label)


def _dice(run: Run) -> Points:
    found = run.evaluations.values()
    return [evaluation.epoch for evaluation in found], [evaluation.mean_dice for evaluation in found]


def _dice_by_time(run: Run) -> Points:
    found = run.evaluations.values()
    return [evaluation.clock_s / 60 for evaluation in found], [evaluation.mean_dice for evaluation in found]


def _loss(run: Run) -> Points:
    return list(run.epochs), [epoch.loss for epoch in run.epochs.values()]


def _rate(run: Run) -> Points:
    return list(run.epochs), [epoch.learning_rate for epoch in run.epochs.values()]


def _samples(run: Run) -> Points:
    timed = [epoch for epoch in run.epochs.values() if epoch.seconds > 0]
    return [epoch.number for epoch in timed], [epoch.samples / epoch.seconds for epoch in timed]


def _differences(runs: Sequence[Run], names: Sequence[str]) -> Html:
    rows = []
    flags = dict.fromkeys(flag for run in runs for flag in run.config if flag not in OWN_FLAGS)
    values = {f"--{flag}": [plain(run.config.get(flag)) for run in runs] for flag in flags}
    values |= {"master seed": [plain(run.seeds.get("master")) for run in runs]}
    for what in dict.fromkeys(what for run in runs for what in run.environment if what != "command"):
        values[what.replace("_", " ")] = [plain(run.environment.get(what)) for run in runs]
    for what, row in values.items():
        if len(set(row)) > 1:
            rows.append((what, *(tag("code", value) for value in row)))
    section = tag("h2", "Differences")
    if not rows:
        return tag("section", section, tag("p", "The runs have the same flags, seed and environment.", class_="soft"))
    return tag("section", section, table("Flags, seed and environment that differ", ("what", *names), rows, "words"))
