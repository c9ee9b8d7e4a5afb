"""Plots how long the runs took to converge, against the reference's runs, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from common.files import replacing
from report import figures
from runtime.mlperf.convergence import Reference


def draw(converged_at: Sequence[float | None], reference: Reference | None, path: Path) -> None:
    """Writes a plot of the share of runs converged after a number of samples or epochs.

    Args:
        converged_at: of each run, in the reference's unit; None if it did not converge.

    Raises:
        OSError: the file cannot be written.
    """
    with figures.open_axes() as (figure, axes):
        if reference:
            _plot_shares(axes, reference.published, ink="s0", label="reference")
            for position, ink, line, label in (
                (reference.mean, "s0", "--", "its mean"),
                (reference.least, "soft", ":", "least accepted"),
            ):
                axes.axvline(position, color=figures.INKS[ink], linewidth=1, linestyle=line, label=label)
        _plot_shares(axes, converged_at, ink="s1", label="these runs")
        axes.set_ylabel("share of runs converged")
        axes.set_ylim(0, 1.02)
        figures.finish(axes, f"{reference.unit if reference else 'samples'} to converge")
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=figures.PNG_DPI, facecolor="white")


def _plot_shares(axes: Axes, converged_at: Sequence[float | None], ink: str, label: str) -> None:
    lengths = sorted(length for length in converged_at if length is not None)
    if lengths:
        shares = [number / len(converged_at) for number in range(len(lengths) + 1)]
        axes.step([lengths[0], *lengths], shares, where="post", color=figures.INKS[ink], label=label)
