"""Compares several runs on one page: outcomes, overlaid curves, and the flags that differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from report.figures import Axes, Chart, draw_chart, draw_line, finish
from report.folds import are_folds, join_folds
from report.markup import NOTHING, Html, bullets, table, tag
from report.page import charts_section, document, duration, plain, samples_to, score, significant, verdict_of
from report.records import Run, names_of

Points = tuple[list[float], list[float]]
# Flags that differ between any two runs and do not affect their numbers.
INCIDENTAL_FLAGS = (
    "log_dir",
    "save_ckpt_path",
    "load_ckpt_path",
    "verbose",
    "local_rank",
    "compare",
    "no_report",
    "resume",
)


def comparison_page(runs: Sequence[Run], folder: Path) -> str:
    """Returns the page as HTML; its charts are written to `folder` as PNG too."""
    names = names_of(runs)
    content = [
        tag("header", tag("p", "3D U-Net training runs", class_="soft"), tag("h1", f"{len(runs)} runs compared")),
        _outcomes(runs, names),
        *([_folds(runs, names)] if are_folds(runs) else []),
        charts_section("Curves", draw_comparison(runs, names, folder)),
        _differences(runs, names),
    ]
    return document(f"{len(runs)} runs compared", *content)


def _outcomes(runs: Sequence[Run], names: Sequence[str]) -> Html:
    head = ("run", "verdict", "best Dice", "at epoch", "target", "samples to converge", "time", "samples/s", "division")
    rows = []
    for run, name in zip(runs, names, strict=True):
        best, reached = run.best, run.converged
        rows.append(
            (
                name,
                verdict_of(run).title,
                score(best.mean_dice) if best else NOTHING,
                best.epoch if best else NOTHING,
                f"{run.target:g}",
                samples_to(run, reached.epoch) if reached else NOTHING,
                duration(run.clock_s),
                significant(run.samples_per_s),
                run.division or NOTHING,
            )
        )
    return tag("section", tag("h2", "Verdicts"), table("Outcome of each run", head, rows))


def _folds(runs: Sequence[Run], names: Sequence[str]) -> Html:
    """Returns the scores over the cases of all folds."""
    heading, rows, problems = tag("h2", "All cases of the folds"), [], []
    for name, last in (("best evaluations", False), ("last evaluations", True)):
        if joined := join_folds(runs, names, last=last):
            classes, problems = joined.classes, joined.problems
            means = map(score, (joined.mean_dice, *joined.class_dice))
            rows.append((name, len(joined.dice), *means))
    if not rows:
        return tag("section", heading, tag("p", "No fold was evaluated.", class_="soft"))
    caption = "Each case once, by the run that held it out; the best evaluation was chosen on these cases"
    return tag(
        "section",
        heading,
        table(caption, ("evaluations", "cases", "mean Dice", *classes), rows),
        *([bullets(problems)] if problems else []),
    )


def draw_comparison(runs: Sequence[Run], names: Sequence[str], folder: Path) -> list[Chart]:
    """Draws every chart that at least one run has numbers for."""
    charts = []
    for key, (title, x_label, points) in CHARTS.items():
        series = {name: points(run) for run, name in zip(runs, names, strict=True)}

        def draw(axes: Axes, series: dict[str, Points] = series, x_label: str = x_label) -> str:
            for index, (name, (x, y)) in enumerate(series.items()):
                draw_line(axes, x, y, index=index, label=name)
            finish(axes, x_label)
            ends = "; ".join(f"{name} ends at {y[-1]:.3g}" for name, (_, y) in series.items() if y)
            return ends and f"{ends}."

        if chart := draw_chart(key, title, draw, folder):
            charts.append(chart)
    return charts


def _dice(run: Run) -> Points:
    return list(run.evaluations), [evaluation.mean_dice for evaluation in run.evaluations.values()]


def _dice_by_time(run: Run) -> Points:
    evaluations = run.evaluations.values()
    return [evaluation.clock_s / 60 for evaluation in evaluations], [found.mean_dice for found in evaluations]


def _loss(run: Run) -> Points:
    return list(run.epochs), [epoch.loss for epoch in run.epochs.values()]


def _learning_rate(run: Run) -> Points:
    return list(run.epochs), [epoch.learning_rate for epoch in run.epochs.values()]


def _samples_per_s(run: Run) -> Points:
    timed = [epoch for epoch in run.epochs.values() if epoch.seconds > 0]
    return [epoch.number for epoch in timed], [epoch.samples / epoch.seconds for epoch in timed]


# By key: title, label of the x axis, and a run's points.
CHARTS: dict[str, tuple[str, str, Callable[[Run], Points]]] = {
    "compared_dice": ("Mean Dice by epoch", "epoch", _dice),
    "compared_time": ("Mean Dice by time", "minutes on the clock", _dice_by_time),
    "compared_loss": ("Training loss", "epoch", _loss),
    "compared_rate": ("Learning rate", "epoch", _learning_rate),
    "compared_samples_per_s": ("Training samples/s", "epoch", _samples_per_s),
}


def _differences(runs: Sequence[Run], names: Sequence[str]) -> Html:
    flags = dict.fromkeys(flag for run in runs for flag in run.config if flag not in INCIDENTAL_FLAGS)
    facts = dict.fromkeys(fact for run in runs for fact in run.environment if fact != "command")
    values = {f"--{flag}": [plain(run.config.get(flag)) for run in runs] for flag in flags}
    values |= {"master seed": [plain(run.seeds.get("master")) for run in runs]}
    values |= {fact.replace("_", " "): [plain(run.environment.get(fact)) for run in runs] for fact in facts}
    rows = [(name, *(tag("code", value) for value in row)) for name, row in values.items() if len(set(row)) > 1]
    heading = tag("h2", "Differences")
    if not rows:
        return tag("section", heading, tag("p", "The runs have the same flags, seed and environment.", class_="soft"))
    caption = "Flags, seed and environment that differ"
    return tag("section", heading, table(caption, ("setting", *names), rows, "words"))
