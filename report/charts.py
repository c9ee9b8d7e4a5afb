"""The charts of one run: scores, loss, learning rate, throughput, time, and scores by case."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from common.messages import counted
from report.figures import INKS, SERIES, Axes, Chart, draw_bars, draw_chart, draw_line, finish, percent, shorten
from report.records import Run


def draw_run(run: Run, folder: Path) -> list[Chart]:
    """Draws every chart that the run has numbers for, each as FOLDER/KEY.png too."""
    drawn = (draw_chart(key, title, partial(draw, run), folder) for key, (title, draw) in CHARTS.items())
    return [chart for chart in drawn if chart]


def _dice(run: Run, axes: Axes) -> str:
    evaluations, best = list(run.evaluations.values()), run.best
    if best is None:
        return ""
    epochs = list(run.evaluations)
    for index, name in enumerate(run.class_names(len(best.dice))):
        draw_line(axes, epochs, [evaluation.dice[index] for evaluation in evaluations], index=index, label=name)
    means = [evaluation.mean_dice for evaluation in evaluations]
    axes.plot(epochs, means, color=INKS["ink"], marker=".", markersize=7, linewidth=2.2, label="mean")
    if run.train_dice:
        train_means = list(run.train_dice.values())
        axes.plot(list(run.train_dice), train_means, ":", color=INKS["soft"], marker=".", label="mean, training")
    axes.axhline(run.target, color=INKS["soft"], linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"target {run.target:g}",
        (0, run.target),
        xycoords=("axes fraction", "data"),
        xytext=(2, 3),
        textcoords="offset points",
        color=INKS["soft"],
        fontsize=9,
    )
    finish(axes, "epoch")
    first = f"{means[0]:.3f} after epoch {epochs[0]}, " if evaluations[0] is not best else ""
    return f"Mean Dice: {first}{best.mean_dice:.3f} after epoch {best.epoch}; the target is {run.target:g}."


def _loss(run: Run, axes: Axes) -> str:
    if not run.epochs:
        return ""
    losses = [epoch.loss for epoch in run.epochs.values()]
    draw_line(axes, list(run.epochs), losses, index=0, label="training")
    if run.evaluations:
        losses_there = [evaluation.loss for evaluation in run.evaluations.values()]
        draw_line(axes, list(run.evaluations), losses_there, index=1, label="evaluation")
    axes.set_ylim(bottom=0)
    finish(axes, "epoch")
    return f"The training loss goes from {losses[0]:.3g} in epoch {min(run.epochs)} to {losses[-1]:.3g} at the end."


def _learning_rate(run: Run, axes: Axes) -> str:
    if not run.epochs:
        return ""
    rates = [epoch.learning_rate for epoch in run.epochs.values()]
    # Constant within an epoch: a step, not a slope.
    axes.step(list(run.epochs), rates, where="mid", color=INKS["s2"])
    axes.set_ylim(0, 1.08 * max(rates) or 1)
    finish(axes, "epoch")
    return f"The learning rate starts at {rates[0]:.3g}, is at most {max(rates):.3g} and ends at {rates[-1]:.3g}."


def _samples_per_s(run: Run, axes: Axes) -> str:
    rates = {epoch.number: epoch.samples / epoch.seconds for epoch in run.epochs.values() if epoch.seconds > 0}
    if not rates:
        return ""
    low, high = min(rates.values()), max(rates.values())
    axes.axhline(run.samples_per_s, color=INKS["soft"], linewidth=1, linestyle=(0, (4, 3)))
    draw_line(axes, list(rates), list(rates.values()), index=0, label="samples/s")
    axes.set_ylim(0, 1.15 * high)
    finish(axes, "epoch")
    return f"{run.samples_per_s:.3g} samples/s over the run (dashed), {low:.3g} to {high:.3g} in single epochs."


def _time(run: Run, axes: Axes) -> str:
    training = sum(epoch.seconds for epoch in run.epochs.values())
    evaluation = sum(evaluation.seconds for evaluation in run.evaluations.values())
    if run.config.get("eval_ranks"):  # ranks of their own evaluated during the training
        evaluation = 0.0
    seconds = {
        "before the clock": run.init_s,
        "training": training,
        "evaluation": evaluation,
        "rest": run.clock_s - training - evaluation,
    }
    seconds = {name: value for name, value in seconds.items() if value > 0}
    if not seconds:
        return ""
    total = sum(seconds.values())
    shares = {name: value / total for name, value in seconds.items()}
    draw_bars(axes, shares)
    return f"Of {total:,.0f} s: {', '.join(f'{name} {percent(share)}' for name, share in shares.items())}."


def _cases(run: Run, axes: Axes) -> str:
    best = run.best
    if best is None or not best.per_case:
        return ""
    names = run.class_names(len(best.dice))
    for index in range(len(names)):
        scores = sorted(row[index] for row in best.per_case.values() if math.isfinite(row[index]))
        # Golden-ratio steps spread the points evenly, and the same way in every drawing.
        x = index + np.array([0.5 * (rank * 0.618034 % 1 - 0.5) for rank in range(len(scores))])
        axes.scatter(x, scores, s=13, color=INKS[SERIES[index % len(SERIES)]], alpha=0.75, linewidths=0)
        if scores:
            axes.hlines(float(np.median(scores)), index - 0.33, index + 0.33, color=INKS["ink"], linewidth=1.6)
    axes.set_xticks(range(len(names)), [shorten(name, 14) for name in names])
    axes.set_xlim(-0.6, len(names) - 0.4)
    return f"Best evaluation: one point for each of its {counted(len(best.per_case), 'case')}; the bar is their median."


# By key: title, and a function that draws and returns the caption, "" if there is nothing to draw.
CHARTS: dict[str, tuple[str, Callable[[Run, Axes], str]]] = {
    "dice": ("Dice per class", _dice),
    "loss": ("Loss", _loss),
    "learning_rate": ("Learning rate", _learning_rate),
    "samples_per_s": ("Training samples/s", _samples_per_s),
    "time": ("Where the time went", _time),
    "cases": ("Dice per case", _cases),
}
