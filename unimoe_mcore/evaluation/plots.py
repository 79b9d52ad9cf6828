"""The report's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from data_pipeline.reading.collate import GROUPS
from unimoe_mcore.evaluation.results import ExpertShare, Results

COLOURS = dict(zip(GROUPS, ("#4269d0", "#a463f2", "#efb118", "#3ca951", "#6c757d"), strict=True))


def plot_losses(results: Results, path: Path) -> None:
    """Training loss per modality over the steps of all runs, one after another."""
    figure, axes = plt.subplots(figsize=(10, 4), layout="constrained")
    offset, ticks = 0, []
    labelled: set[str] = set()
    for name, lines in results.curves.items():
        if not lines:
            continue
        for group in GROUPS:
            key = f"loss/{group}"
            points = [(offset + line["step"], line[key]) for line in lines if key in line]
            if points:
                steps, losses = zip(*points, strict=True)
                label = None if group in labelled else group
                labelled.add(group)
                axes.plot(steps, _smooth(losses), color=COLOURS[group], label=label, lw=1.4)
        ticks.append((offset, lines[-1]["step"], name))
        offset += lines[-1]["step"]
        axes.axvline(offset, color="#cccccc", lw=0.8, zorder=0)
    top = axes.get_ylim()[1]
    for start, length, name in ticks:
        axes.text(start + length / 2, top, name, ha="center", va="bottom", fontsize=9)
    axes.set(xlabel="optimizer step", ylabel="loss per label token", xlim=(0, max(1, offset)))
    axes.set_ylim(0, top)
    axes.legend(frameon=False, ncols=len(labelled))
    _save(figure, path)


def _smooth(values: Sequence[float], weight: float = 0.85) -> list[float]:
    """Exponential moving average, started at the first value."""
    smoothed, last = [], values[0]
    for value in values:
        last = weight * last + (1 - weight) * value
        smoothed.append(last)
    return smoothed


def plot_accuracy(results: Results, path: Path) -> None:
    """Exact answers per task after the last stage, with intervals and the majority answer."""
    scores = results.columns[-1].scores()
    tasks = [task for task in results.tasks() if task in scores]
    groups = {r["dataset"]: r["group"] for r in results.columns[-1].records}
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(tasks) + 1.2), layout="constrained")
    for row, task in enumerate(tasks):
        score, (low, high) = scores[task], scores[task].interval
        axes.barh(row, score.share, color=COLOURS[groups[task]], height=0.65)
        axes.plot([low, high], [row, row], color="#222222", lw=1.5)
        majority = results.majority.get(task, 0.0)
        axes.plot([majority] * 2, [row - 0.4, row + 0.4], color="#d62728", lw=2)
    axes.plot([], [], color="#d62728", lw=2, label="majority answer")
    axes.plot([], [], color="#222222", lw=1.5, label="95 % interval")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel=f"exact answers on held-out questions ({results.split} split)")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_experts(shares: Sequence[ExpertShare], experts: Sequence[str], path: Path) -> None:
    """Expert share per modality, one panel per block with experts."""
    figure, panels = plt.subplots(
        1, len(shares), figsize=(1.2 + 3.6 * len(shares), 3.4), squeeze=False, layout="constrained"
    )
    highest = max(float(share.shares.max()) for share in shares)
    for axes, share in zip(panels[0], shares, strict=True):
        axes.imshow(share.shares, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
        for (row, column), value in np.ndenumerate(share.shares):
            colour = "white" if value > 0.6 * highest else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(experts)), experts)
        axes.set_yticks(range(len(share.groups)), share.groups)
        axes.set(title=f"block {share.block}", xlabel="expert")
    panels[0][0].set_ylabel("modality of the question")
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
