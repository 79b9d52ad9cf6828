"""Histograms of lengths: one row per combination, one panel per measure in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

_BARS = 48
_WIDE = 30.0
"""Largest over smallest length from which on a column's axis is logarithmic."""
_COLOURS = ("#8da5e3", "#e8740c", "#222222")
_MIDDLE = "#2a4fb0"
_WIDTH, _ROW, _TOP, _BOTTOM = 12.0, 2.0, 0.85, 0.55  # inches
_GAP = 0.36
"""Of a row's height, for what stands below and above its axes."""
_FAR = 100.0
"""Largest over smallest length from which on only powers of ten are written at the axis."""
_DOTS = 100  # per inch: 1200 wide


@dataclass(frozen=True)
class Series:
    """Lengths of some samples or media.

    Attributes:
        label: what they are of.
        values: lengths, ``[n]``; whole numbers if their type is.
        weights: what each stands for, ``[n]``; None: all the same.
    """

    label: str
    values: np.ndarray
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Panel:
    """One histogram.

    Attributes:
        row: the combination.
        measure: what is measured; all panels of a measure have the same axis.
        series: at most three, none empty; the first is filled, the others are lines over it.
    """

    row: str
    measure: str
    series: tuple[Series, ...]


def draw(panels: Sequence[Panel], heading: str, caption: str, path: Path) -> None:
    """Draw the panels and save them as a PNG of 1200 dots' width, visible only when whole.

    Args:
        panels: at least one.
        heading: text above.
        caption: small text below.
    """
    rows = list(dict.fromkeys(panel.row for panel in panels))
    labels = list(dict.fromkeys(series.label for panel in panels for series in panel.series))
    colours = {label: _COLOURS[n] for n, label in enumerate(labels)}
    scales = {
        measure: _edges([panel for panel in panels if panel.measure == measure])
        for measure in dict.fromkeys(panel.measure for panel in panels)
    }
    height = _TOP + _ROW * len(rows) + _BOTTOM
    figure = plt.figure(figsize=(_WIDTH, height))
    grid = figure.add_gridspec(
        len(rows),
        max(Counter(panel.row for panel in panels).values()),
        left=0.04,
        right=0.99,
        top=1 - _TOP / height,
        bottom=_BOTTOM / height,
        hspace=_GAP / (1 - _GAP),
        wspace=0.16,
    )
    for number, row in enumerate(rows):
        mine = [panel for panel in panels if panel.row == row]
        for place, panel in enumerate(mine):
            axes = figure.add_subplot(grid[number, place])
            edges, logarithmic = scales[panel.measure]
            _histogram(axes, panel, edges, colours)
            _dress(axes, edges, logarithmic)
            name = panel.measure if place else f"{row}: {panel.measure}"
            axes.set_title(name, fontsize=10, loc="left", y=1.0, pad=17)
    _frame(figure, heading, caption, colours)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, dpi=_DOTS, format="png")
    plt.close(figure)
    partial.replace(path)


def _edges(panels: Sequence[Panel]) -> tuple[np.ndarray, bool]:
    """Where the bars of a measure begin and end, and whether its axis is logarithmic."""
    values = [series.values for panel in panels for series in panel.series]
    low = float(min(each.min() for each in values))
    high = float(max(each.max() for each in values))
    logarithmic = low > 0 and high / low > _WIDE
    if not all(np.issubdtype(each.dtype, np.integer) for each in values):
        if high <= low:
            low, high = 0.9 * low, 1.1 * low
        space = np.geomspace if logarithmic else np.linspace
        return space(low, high, _BARS + 1), logarithmic
    # Bars of whole numbers end between two of them, so that none holds more numbers by chance.
    if logarithmic:
        cuts, ratio = [low], (high / low) ** (1 / _BARS)
        while cuts[-1] <= high:
            cuts.append(max(cuts[-1] + 1, round(cuts[-1] * ratio)))
        return np.array(cuts) - 0.5, True
    room = max(0.0, 5 - (high - low))  # a single number is no wall
    low, high = max(0.0, low - room), high + room
    step = max(1, round((high + 1 - low) / _BARS))
    return np.arange(low, high + step + 1, step) - 0.5, False


def _histogram(axes: Axes, panel: Panel, edges: np.ndarray, colours: dict[str, str]) -> None:
    middles = []
    for number, series in enumerate(panel.series):
        bars, _ = np.histogram(series.values, edges, weights=series.weights)
        percent, first = 100 * bars / bars.sum(), number == 0
        axes.stairs(percent, edges, fill=first, color=colours[series.label], lw=1.3)
        middles.append(_median(series))
    axes.axvline(middles[0], color=_MIDDLE, lw=1.3)
    words = [f"{s.label} {_short(m)}" for s, m in zip(panel.series, middles, strict=True)]
    text = ", ".join(words) if len(colours) > 1 else _short(middles[0])
    axes.text(0, 1.04, f"median {text}", fontsize=8, color=_MIDDLE, transform=axes.transAxes)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _median(series: Series) -> float:
    if series.weights is None:
        return float(np.median(series.values))
    order = np.argsort(series.values, kind="stable")
    reached = np.cumsum(series.weights[order])
    return float(series.values[order][np.searchsorted(reached, reached[-1] / 2)])


def _dress(axes: Axes, edges: np.ndarray, logarithmic: bool) -> None:
    if logarithmic:
        axes.set_xscale("log")
        near = edges[-1] / edges[0] < _FAR
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,), numticks=12))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        margin = (edges[-1] / edges[0]) ** 0.02
        axes.set_xlim(edges[0] / margin, edges[-1] * margin)
    else:
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], min_n_ticks=2))
        margin = (edges[-1] - edges[0]) * 0.02
        axes.set_xlim(edges[0] - margin, edges[-1] + margin)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}%"))
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _frame(figure: Figure, heading: str, caption: str, colours: dict[str, str]) -> None:
    """Heading, caption, and one legend for all panels, outside of them."""
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.1 / height, heading, fontsize=13, va="top")
    figure.text(0.01, 0.08 / height, caption, fontsize=9, color="#444444")
    if len(colours) > 1:
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
        names = list(colours)
        figure.legend(handles, names, loc="upper right", frameon=False, ncols=len(names))
