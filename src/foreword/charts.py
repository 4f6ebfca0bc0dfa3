"""Charts as inline SVG that follows the page's light or dark colours. By matplotlib; nothing here knows of prefixes.

A chart is drawn in marker colours that become CSS variables: `--ink`, `--line`, `--one` .. `--four`. It is about 330
points wide, so that its text can be read on a phone and two fit side by side elsewhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

INK, LINE = "#010101", "#020202"
SERIES = ("#030303", "#040404", "#050505", "#060606")
VARIABLES = {INK: "--ink", LINE: "--line", **dict(zip(SERIES, ("--one", "--two", "--three", "--four"), strict=True))}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "axes.titlesize": 10,
}


@matplotlib.rc_context(STYLE)
def lines(
    title: str, series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str = "", mark: float | None = None
) -> Markup:
    """Points (x, y) joined, a line per name, from 0 up where nothing is below; `mark` is a vertical line."""
    figure, axes = _axes(title, 2.5)
    for (name, points), color in zip(series.items(), _colors(len(series)), strict=True):
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=2.5, linewidth=1.4, label=name)
    if mark is not None:
        axes.axvline(mark, color=LINE, linestyle=":", linewidth=1)
    values = [value for points in series.values() for _, value in points]
    if min(values) >= 0 and max(values) > 0:
        axes.set_ylim(0, 1.08 * max(values))
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(series) > 1:
        axes.legend(loc="best", fontsize=8)
    return _svg(figure, title)


@matplotlib.rc_context(STYLE)
def points(
    title: str,
    groups: Mapping[str, Sequence[tuple[Any, float]]],
    x: str,
    y: str,
    log: bool = False,
    line: Sequence[tuple[float, float]] = (),
) -> Markup:
    """Points (x, y), a colour per group; x are numbers, on a logarithmic axis where `log`, or names. `line` joins its
    points in steps."""
    figure, axes = _axes(title, 2.5)
    for (name, found), color in zip(groups.items(), _colors(len(groups)), strict=True):
        axes.scatter([at for at, _ in found], [value for _, value in found], color=color, s=22, label=name)
    axes.margins(x=0.1)
    if line:
        axes.plot(*zip(*line, strict=True), color=LINE, linewidth=1, drawstyle="steps-post")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=x, ylabel=y)
    if len(groups) > 1:
        axes.legend(loc="best", fontsize=8)
    return _svg(figure, title)


@matplotlib.rc_context(STYLE)
def bars(
    title: str, groups: Mapping[str, Sequence[float]], ticks: Sequence[str], y: str = "", log: bool = False
) -> Markup:
    """Bars side by side, a colour per group, a tick per value; the values stand above where there are few.

    log: heights by order of magnitude, up or down, even below 0.001, for values of which few are large."""
    figure, axes = _axes(title, 2.5)
    width = 0.8 / len(groups)
    for i, ((name, values), color) in enumerate(zip(groups.items(), _colors(len(groups)), strict=True)):
        places = [at + (i - (len(groups) - 1) / 2) * width for at in range(len(values))]
        drawn = axes.bar(places, values, width * 0.94, color=color, label=name)
        if len(values) * len(groups) <= 12:
            axes.bar_label(drawn, fmt="%.3f", fontsize=7, color=INK)
    if len(ticks) <= 12:
        axes.set_xticks(range(len(ticks)), ticks)
    axes.axhline(0, color=LINE, linewidth=0.8)
    axes.set_ylabel(y)
    if log:
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.yaxis.set_major_formatter("{x:g}")
    if len(groups) > 1:
        axes.margins(y=0.22)
        axes.legend(loc="upper center", ncols=len(groups), fontsize=8)
    return _svg(figure, title)


@matplotlib.rc_context(STYLE)
def heat(title: str, rows: Sequence[Sequence[float]], x: str, y: str, log: bool = False) -> Markup:
    """A matrix of values from 0 to 1 as colours, the first row at the bottom; rows may differ in length.

    log: colours by order of magnitude, down to 0.0001, for values of which few are large."""
    widest = max(map(len, rows))
    matrix = np.full((len(rows), widest), np.nan)
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = row
    norm = LogNorm(1e-4, 1, clip=True) if log else Normalize(0, 1)
    figure, axes = _axes(title, 3.1)
    image = axes.imshow(matrix, cmap="viridis", aspect="auto", origin="lower", norm=norm, interpolation="nearest")
    axes.set(xlabel=x, ylabel=y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    bar = figure.colorbar(image, ax=axes, fraction=0.05)
    bar.outline.set_visible(False)
    return _svg(figure, title)


def _axes(title: str, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    return figure, axes


def _colors(count: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(count)]


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as `<svg>`, without size, so that CSS decides, and with ids that no other chart of the page has."""
    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    label = Markup.escape(title)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
