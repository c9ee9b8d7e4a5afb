"""Draws how long the runs took to converge against the reference's runs, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from common.files import replacing
from report import figures
from runtime.mlperf.convergence import Reference


def draw(converged_at: Sequence[float | None], reference: Reference | None, path: Path) -> None:
    """Writes the share of runs that had converged by each point, the reference's and one's own.

    Raises:
        OSError: the file cannot be written.
    """
    unit = reference.unit if reference else "samples"
    own = sorted(length for length in converged_at if length is not None)
    with figures.open_axes() as (figure, axes):
        if reference:
            _steps(axes, sorted(reference.published), len(reference.published), 0, "reference")
            for where, ink, line, label in (
                (reference.mean, "s0", "--", "its mean"),
                (reference.least, "soft", ":", "least accepted"),
            ):
                axes.axvline(where, color=figures.INKS[ink], linewidth=1, linestyle=line, label=label)
        _steps(axes, own, len(converged_at), 1, "these runs")
        axes.set_ylabel("share of runs converged")
        axes.set_ylim(0, 1.02)
        figures.finish(axes, f"{unit} to converge")
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=figures.PNG_DPI, facecolor="white")


def _steps(axes: Axes, lengths: Sequence[float], count: int, index: int, label: str) -> None:
    if lengths:
        shares = [number / count for number in range(len(lengths) + 1)]
        axes.step([lengths[0], *lengths], shares, where="post", color=figures.INKS[figures.SERIES[index]], label=label)
