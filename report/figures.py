"""Figures of the report: matplotlib draws each chart once, as SVG in the page's colours and as PNG.

matplotlib draws on white; every colour is one of `INKS`, which the SVG refers to as CSS variables, so that one drawing
follows the reader's light or dark theme. This is the only module of the package that imports matplotlib.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import replacing

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError:
    raise UserError("the report is drawn by matplotlib, which is not installed: pip install '.[report]'") from None

# Colours on white, by purpose; `style.css` has a variable of the same name for each, in both themes. The series
# colours are Okabe and Ito's, which are distinct for colour-blind readers, darkened to a contrast of 3 on white.
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
# Outlines on a scan: bright on black, distinct for colour-blind readers; the prediction is dashed as well.
TRUTH, PREDICTION = "#56b4e9", "#f0a818"
# In inches, for a phone's width, where one chart fills the screen; a wide page shows charts side by side.
SIZE = (4.1, 2.75)
# Width of the legend: an entry takes about 5 points per letter and 30 for its line.
LEGEND_POINTS = 270
PNG_DPI = 200
PLANE_INCHES = 3.2
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
    # Names come from files: a $ in a name is a dollar sign.
    "text.parse_math": False,
}
# matplotlib logs missing fonts and its first start, which are of no use to users.
logging.getLogger("matplotlib").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart for the page.

    Attributes:
        key: stem of its PNG's file name.
        caption: describes in words what it shows.
        svg: an <svg> element in the page's colours.
    """

    key: str
    title: str
    caption: str
    svg: str


@contextmanager
def open_axes() -> Iterator[tuple[Figure, Axes]]:
    """Yields an empty chart in the page's style."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        yield figure, figure.add_subplot()


def draw_chart(key: str, title: str, draw: Callable[[Axes], str], folder: Path) -> Chart | None:
    """Draws a chart and writes FOLDER/KEY.png.

    Args:
        draw: draws on the axes and returns the caption; "" if there is nothing to draw.

    Returns:
        The chart for the page, None if there is nothing to draw.
    """
    svg = io.StringIO()
    with open_axes() as (figure, axes):
        if not (caption := draw(axes)):
            return None
        # The salt makes ids differ between charts, and makes the same chart the same bytes.
        with mpl.rc_context({"svg.hashsalt": key}):
            figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        with replacing(folder / f"{key}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=PNG_DPI, facecolor="white")
    return Chart(key=key, title=title, caption=caption, svg=_for_page(svg.getvalue()))


def _for_page(svg: str) -> str:
    """Returns the <svg> element alone, without a size and in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg
    )
    # In an HTML page, links within the drawing need no namespace.
    svg = svg.replace("xlink:href", "href")
    # Every drawing uses the same group ids, but ids must be unique within a page.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for name, colour in INKS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def shorten(name: str, length: int = 22) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def draw_line(axes: Axes, x: Sequence[float], y: Sequence[float], *, index: int, label: str) -> None:
    """Draws a series; markers distinguish it without colour, unless there are too many points for them."""
    marker = MARKERS[index % len(MARKERS)] if len(x) <= 40 else ""
    line = ("-", "--", ":")[index // len(SERIES) % 3]
    # matplotlib leaves labels that begin with _ out of the legend.
    axes.plot(x, y, line, color=INKS[SERIES[index % len(SERIES)]], marker=marker, label=shorten(label).lstrip("_"))


def draw_bars(axes: Axes, shares: dict[str, float]) -> None:
    """Draws horizontal bars of shares of 1, each with its percentage, top to bottom."""
    rows = np.arange(len(shares))[::-1]
    axes.barh(rows, list(shares.values()), height=0.55, color=INKS["s0"])
    axes.set_yticks(rows, [shorten(name) for name in shares])
    axes.set_xlim(0, 1.12 * max(shares.values()))
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    for row, share in zip(rows, shares.values(), strict=True):
        axes.annotate(percent(share), (share, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def finish(axes: Axes, x_label: str) -> None:
    """Labels the x axis and puts a legend above charts of several series."""
    axes.set_xlabel(x_label)
    # Epochs are whole numbers, even if there is only one.
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


@dataclass(frozen=True, kw_only=True)
class Plane:
    """A slice of a case: image, ground truth and prediction (rows, columns), class 0 being the background.

    Attributes:
        aspect: height of a voxel divided by its width.
        window: intensities shown as black and as white.
    """

    image: NDArray[np.float32]
    truth: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    aspect: float
    window: tuple[float, float]


def draw_plane(plane: Plane) -> bytes:
    """Returns a slice as a square PNG; each class is outlined by itself, so that borders between two are visible."""
    figure = Figure(figsize=(PLANE_INCHES, PLANE_INCHES), facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    low, high = plane.window
    axes.imshow(
        plane.image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=plane.aspect, interpolation="bilinear"
    )
    # Where the two agree, the wide line shows on both sides of the narrow one.
    lines = ((plane.truth, TRUTH, "solid", 2.4), (plane.prediction, PREDICTION, (0, (3.0, 1.5)), 1.2))
    for mask, colour, line, width in lines:
        for value in np.unique(mask[mask > 0]):
            # Padded by a voxel, so that outlines close at the image's edge too.
            outlined = np.pad((mask == value).astype(np.float32), 1)
            rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
            axes.contour(columns, rows, outlined, levels=[0.5], colors=[colour], linewidths=width, linestyles=[line])
    axes.set(xlim=(-0.5, plane.image.shape[1] - 0.5), ylim=(plane.image.shape[0] - 0.5, -0.5))
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=PNG_DPI, facecolor="black")
    return png.getvalue()
