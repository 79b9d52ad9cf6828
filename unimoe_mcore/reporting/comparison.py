"""Several ways to train on the same data, side by side: per task, per modality, and how even."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.reading.collate import GROUPS
from unimoe_mcore.reporting.results import Judged


@dataclass(frozen=True)
class Arm:
    """One trained model.

    Attributes:
        judged: its answers, under the title of its column.
        tokens: that it was trained on after the stage that all arms share.
        trained: parameters that trained in its last run.
    """

    judged: Judged
    tokens: int
    trained: int


def modality_means(judged: Judged) -> dict[str, float]:
    """Modality -> mean over its tasks of the share of exact answers, in the order of ``GROUPS``."""
    group = {record["dataset"]: record["group"] for record in judged.records}
    found: dict[str, list[float]] = {}
    for task, score in judged.scores().items():
        found.setdefault(group[task], []).append(score.share)
    return {name: statistics.fmean(found[name]) for name in GROUPS if name in found}


def spread(judged: Judged) -> float:
    """Standard deviation of the modalities' means: 0 if all modalities fare alike."""
    return statistics.pstdev(modality_means(judged).values())


def comparison_tables(arms: Sequence[Arm], majority: dict[str, float]) -> str:
    """Markdown: a table of tasks with their intervals, one of modalities and their spread.

    Args:
        majority: task -> share of its most frequent answer.
    """
    return "\n\n".join([_tasks(arms, majority), _modalities(arms)])


def _tasks(arms: Sequence[Arm], majority: dict[str, float]) -> str:
    scores = [arm.judged.scores() for arm in arms]
    group = {record["dataset"]: record["group"] for arm in arms for record in arm.judged.records}
    rows = [["task", "n", "majority", *(arm.judged.title for arm in arms)]]
    for task in sorted(group, key=lambda name: (GROUPS.index(group[name]), name)):
        most = majority.get(task)
        cells = []
        for each in scores:
            if task not in each:
                cells.append("")
                continue
            low, high = each[task].interval
            mark = " *" if most is not None and low <= most else ""
            cells.append(f"{each[task].share:.2f} ({low:.2f} to {high:.2f}){mark}")
        total = max(each[task].total for each in scores if task in each)
        known = "unknown" if most is None else f"{most:.2f}"
        rows.append([f"`{task}`", str(total), known, *cells])
    means = (statistics.fmean(score.share for score in each.values()) for each in scores)
    rows.append(["**mean**", "", "", *(f"**{mean:.3f}**" for mean in means)])
    explained = (
        "Share of exactly right answers on held-out questions, with its 95 % interval (Wilson). "
        "\\*: the interval does not lie above *majority*, what always giving the most frequent "
        "answer would score."
    )
    return f"{_markdown(rows)}\n\n{explained}"


def _modalities(arms: Sequence[Arm]) -> str:
    means = [modality_means(arm.judged) for arm in arms]
    rows = [["modality", *(arm.judged.title for arm in arms)]]
    for name in GROUPS:
        if any(name in each for each in means):
            rows.append([name, *(f"{each[name]:.3f}" if name in each else "" for each in means)])
    rows.append(["**mean of modalities**", *(f"{statistics.fmean(m.values()):.3f}" for m in means)])
    rows.append(["**spread**", *(f"{spread(arm.judged):.3f}" for arm in arms)])
    rows.append(["tokens after stage 1", *(f"{arm.tokens:,}" for arm in arms)])
    rows.append(["trained in the last run", *(f"{arm.trained / 1e6:.2f} M" for arm in arms)])
    explained = (
        "Mean over the tasks of each modality. *Spread* is the standard deviation of the "
        "modalities' means: the smaller, the more even."
    )
    return f"{_markdown(rows)}\n\n{explained}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)
