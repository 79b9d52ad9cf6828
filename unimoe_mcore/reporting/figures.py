"""The report's pictures: small SVG panels, so that a narrow screen shows them one by one."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from data_pipeline.modalities import FIRST
from data_pipeline.reading.collate import GROUPS
from unimoe_mcore.config.stage import OWN_MLP
from unimoe_mcore.reporting.document import Figure, Panel
from unimoe_mcore.reporting.results import Results, in_order
from unimoe_mcore.reporting.runs import Run
from unimoe_mcore.reporting.shares import Routing, Ways

COLOURS = dict(
    zip((*FIRST, "text"), ("#4269d0", "#a463f2", "#efb118", "#3ca951", "#6c757d"), strict=True)
)
"""Of the first modalities; others have those of ``EXPERTS``."""
OWN = "#c3c9cf"
"""Of the base's own MLP among the experts."""
EXPERTS = ("#6cc5b0", "#ff725c", "#97bbf5", "#9c6b4e", "#ff8ab7", "#38678f", "#dfc27d", "#5d3a8c")
"""Of experts that are of no modality, taken in turn."""
COLOURS |= dict(zip((name for name in GROUPS if name not in COLOURS), cycle(EXPERTS), strict=False))
RUNS = ("#4269d0", "#ff725c", "#3ca951", "#efb118", "#a463f2", "#6c757d")
"""Of runs, taken in turn."""

WIDTH, HEIGHT = 3.6, 2.5  # inches; a panel fits a telephone's screen
MOST_POINTS = 240
"""Points of a curve; of longer ones each point is a mean."""
SHOWN_WAYS = 5
"""Ways that a picture shows."""

_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names are not formulas
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # the same picture has the same bytes
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "legend.fontsize": 7,
    "legend.handlelength": 1.0,
    "legend.columnspacing": 0.9,
    "legend.handletextpad": 0.5,
}


@contextmanager
def panel(
    found: list[Panel], name: str, title: str, words: str, width: float = WIDTH, height: float = 0.0
) -> Iterator[Axes]:
    """Axes to draw on; at the end they are a panel more."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(width, height or HEIGHT), layout="constrained")
        axes.set_title(title, loc="left")
        yield axes
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name)
    found.append(Panel(safe, _only_svg(file.getvalue()), f"{title}: {words}"))


def _only_svg(text: str) -> str:
    """From ``<svg`` on, without the rules that would hold for the whole page, and metadata."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'<style type="text/css">.*?</style>', "", text, flags=re.DOTALL).strip()


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)


def curves(runs: Sequence[Run]) -> Figure:
    """Loss per label token and modality over the steps of every run."""
    found: list[Panel] = []
    for run in runs:
        groups = in_order(
            {k[5:] for line in run.metrics for k in line if k.startswith("loss/")} - {""}
        )
        if not groups:
            continue
        words = f"training loss of {', '.join(groups)} over {run.taken} steps"
        with panel(found, f"losses-{run.title}", run.title, words) as axes:
            for group in groups:
                colour = COLOURS.get(group, "#222222")
                steps, losses = _points(run.metrics, f"loss/{group}")
                axes.plot(*_smooth(steps, losses), color=colour, label=group, lw=1.3)
                steps, losses = _points(run.validations, f"loss/{group}")
                axes.plot(steps, losses, "o", color=colour, ms=3, mfc="white", mew=1.0)
            axes.set(xlabel="step", ylabel="loss per label token")
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            _legend(axes, min(5, len(groups)))
    return Figure(found)


def _points(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [
        (line["step"], float(line[key]))
        for line in lines
        if isinstance(line.get(key), int | float) and math.isfinite(line[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(
    steps: Sequence[int], values: Sequence[float], weight: float = 0.85
) -> tuple[list[float], list[float]]:
    """Exponential moving average, started at the first value, in at most ``MOST_POINTS``."""
    if not values:
        return [], []
    smoothed, last = [], values[0]
    for value in values:
        last = weight * last + (1 - weight) * value
        smoothed.append(last)
    parts = min(MOST_POINTS, len(values))
    return (
        [float(part.mean()) for part in np.array_split(np.array(steps, float), parts)],
        [float(part.mean()) for part in np.array_split(np.array(smoothed), parts)],
    )


def accuracy(results: Results) -> Figure:
    """Exact answers per task of every given run, with intervals and the majority answer."""
    found: list[Panel] = []
    scores = [(judged.title, judged.scores()) for judged in results.finals]
    tasks = [task for task in results.tasks() if any(task in each for _, each in scores)]
    if not tasks:
        return Figure([])
    bars = len(scores)
    height = len(tasks) * (0.2 + 0.16 * bars) + 1.0
    words = f"share of exact answers of {', '.join(title for title, _ in scores)}, by task"
    with panel(found, "accuracy", "exact answers", words, 5.0, height) as axes:
        thick = 0.8 / bars
        for number, (title, each) in enumerate(scores):
            for row, task in enumerate(tasks):
                if task not in each:
                    continue
                place = row - 0.4 + (number + 0.5) * thick
                low, high = each[task].interval
                label = title if task == next(t for t in tasks if t in each) else None
                colour = RUNS[number % len(RUNS)]
                axes.barh(place, each[task].share, thick * 0.9, color=colour, label=label)
                axes.plot([low, high], [place, place], color="#222222", lw=1.1)
        for row, task in enumerate(tasks):
            if task in results.majority:
                at = [results.majority[task]] * 2
                label = "majority answer" if row == 0 else None
                axes.plot(at, [row - 0.44, row + 0.44], color="#d62728", lw=1.8, label=label)
        axes.set_yticks(range(len(tasks)), tasks)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel=f"share of held-out questions ({results.split} split)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.5 / height), ncols=min(3, bars + 1))
    return Figure(found)


def _stacked(
    axes: Axes, shares: np.ndarray, labels: Sequence[str], names: Sequence[str], colours: Any
) -> None:
    """Bars of shares that make one.

    Args:
        shares: ``[bars, parts]``.
        labels: of the bars.
        names: of the parts.
        colours: of the parts.
    """
    below = np.zeros(len(shares))
    for part, (name, colour) in enumerate(zip(names, colours, strict=True)):
        axes.bar(range(len(shares)), shares[:, part], 0.8, below, color=colour, label=name)
        below += shares[:, part]
    every = max(1, -(-len(labels) // 12))
    axes.set_xticks(range(0, len(labels), every), labels[::every])
    axes.set(ylim=(0, 1), xlabel="block")
    _legend(axes, min(5, len(names)))


def expert_colours(routing: Routing) -> list[str]:
    """An expert of a modality has the modality's colour."""
    return [
        COLOURS.get(name, OWN if name == OWN_MLP else EXPERTS[number % len(EXPERTS)])
        for number, name in enumerate(routing.experts)
    ]


def load(routing: Routing) -> Figure:
    """Load of every expert in every block, and the distance between modalities."""
    found: list[Panel] = []
    name, blocks = routing.run.title, [str(block) for block in routing.blocks]
    with panel(found, f"load-{name}", f"{name}: load per block", "share of each expert") as axes:
        _stacked(axes, routing.load(), blocks, routing.experts, expert_colours(routing))
        for part in range(1, len(routing.experts)):
            axes.axhline(part / len(routing.experts), color="#222222", lw=0.8, ls=(0, (4, 4)))
    words = "total-variation distance of modalities' shares, beside shuffled labels"
    with panel(found, f"distance-{name}", f"{name}: modalities apart", words) as axes:
        places = range(len(blocks))
        axes.plot(places, routing.variation, "o-", color="#4269d0", label="modalities", ms=4)
        mean = [mean for mean, _ in routing.shuffled]
        above = [high - mean for mean, high in routing.shuffled]
        axes.errorbar(
            places,
            mean,
            [[0.0] * len(mean), above],
            fmt="s",
            color="#888888",
            label="labels shuffled (to 97.5 %)",
            ms=3,
            capsize=2,
        )
        every = max(1, -(-len(blocks) // 12))
        axes.set_xticks(list(places)[::every], blocks[::every])
        axes.set(xlabel="block", ylabel="distance")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.15)
        _legend(axes, 2)
    return Figure(found)


def share_of_modalities(routing: Routing) -> Figure:
    """Modality share per expert: of whose questions an expert's tokens are."""
    found: list[Panel] = []
    shares, blocks = routing.of_experts(), [str(block) for block in routing.blocks]
    whole = routing.counts[0].sum(1) / max(1, routing.counts[0].sum())
    for number, expert in enumerate(routing.experts):
        title = f"expert {expert}: whose tokens" if "expert" not in expert else expert
        words = "share of each modality's questions in its tokens; last bar: in all tokens"
        with panel(found, f"expert-{number}-{routing.run.title}", title, words) as axes:
            bars = np.vstack([shares[:, :, number], whole])
            colours = [COLOURS.get(group, "#222222") for group in routing.groups]
            _stacked(axes, bars, [*blocks, "all"], routing.groups, colours)
    return Figure(found)


def share_of_experts(routing: Routing) -> Figure:
    """Expert share per modality: where the tokens of a modality's questions go."""
    found: list[Panel] = []
    shares, blocks = routing.of_groups(), [str(block) for block in routing.blocks]
    for number, group in enumerate(routing.groups):
        words = "share of each expert in the tokens of its questions"
        name = f"modality-{group}-{routing.run.title}"
        with panel(found, name, f"{group}: which experts", words) as axes:
            _stacked(axes, shares[:, number], blocks, routing.experts, expert_colours(routing))
    return Figure(found)


def ways(routing: Routing, found_ways: Sequence[Ways]) -> Figure:
    """The most travelled ways of each modality's tokens through the experts."""
    found: list[Panel] = []
    blocks = [str(block) for block in routing.blocks]
    if len(blocks) < 2:
        return Figure([])
    for each in found_ways:
        title = f"{each.group} questions: {each.kind}"
        words = f"the {SHOWN_WAYS} most travelled ways of {each.tokens} tokens"
        name = f"ways-{each.group}-{each.kind}-{routing.run.title}"
        with panel(found, name, title, words) as axes:
            for number, (way, count) in enumerate(each.paths[:SHOWN_WAYS]):
                share = count / max(1, each.tokens)
                shift = 0.06 * (number - (SHOWN_WAYS - 1) / 2)
                axes.plot(
                    range(len(way)),
                    [expert + shift for expert in way],
                    color=COLOURS.get(each.group, "#222222"),
                    lw=0.8 + 7 * share,
                    alpha=0.85 - 0.12 * number,
                    label=f"{share:.0%}",
                    solid_capstyle="round",
                )
            axes.set_yticks(range(len(routing.experts)), routing.experts)
            axes.set_ylim(-0.5, len(routing.experts) - 0.5)
            every = max(1, -(-len(blocks) // 12))
            axes.set_xticks(range(0, len(blocks), every), blocks[::every])
            axes.set(xlabel="block")
            _legend(axes, SHOWN_WAYS)
    return Figure(found)
