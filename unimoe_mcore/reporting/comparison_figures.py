"""Two pictures of a comparison: what every model answers, and where a mixture sends its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.reading.collate import GROUPS
from unimoe_mcore.reporting.comparison import Arm
from unimoe_mcore.reporting.document import Panel
from unimoe_mcore.reporting.figures import RUNS, expert_colours, panel
from unimoe_mcore.reporting.shares import Routing

MAJORITY = "#d62728"
SHOWN_BLOCKS = 3
"""Blocks with experts that the picture shows: the first, the middle one and the last."""


def answers(arms: Sequence[Arm], majority: dict[str, float]) -> Panel:
    """Exact answers per task: a point with its 95 % interval for each model.

    Models of the same title up to the comma, such as ``MoE, seed 0``, have one colour.

    Args:
        majority: task -> share of its most frequent answer.
    """
    scores = [arm.judged.scores() for arm in arms]
    group = {record["dataset"]: record["group"] for arm in arms for record in arm.judged.records}
    tasks = sorted(group, key=lambda name: (GROUPS.index(group[name]), name))
    kinds = list(dict.fromkeys(_kind(arm) for arm in arms))
    colours = dict(zip(kinds, RUNS, strict=False))
    words = f"share of exact answers of {', '.join(arm.judged.title for arm in arms)}, by task"
    found: list[Panel] = []
    height = 0.42 * len(tasks) + 1.1
    with panel(found, "answers", "exact answers, with 95 % intervals", words, 6.4, height) as axes:
        for row, task in enumerate(tasks):
            if row % 2:
                axes.axhspan(row - 0.5, row + 0.5, color="#f4f5f7", zorder=0)
            for number, (arm, each) in enumerate(zip(arms, scores, strict=True)):
                if task in each:
                    place = row - 0.32 + 0.64 * number / max(1, len(arms) - 1)
                    share, (low, high) = each[task].share, each[task].interval
                    colour = colours.get(_kind(arm), "#222222")
                    axes.plot([low, high], [place, place], color=colour, lw=1.4)
                    axes.plot([share], [place], "o", color=colour, ms=4)
            if task in majority:
                axes.plot([majority[task]] * 2, [row - 0.42, row + 0.42], color=MAJORITY, lw=1.8)
        for kind in kinds:
            seeds = sum(_kind(arm) == kind for arm in arms)
            label = f"{kind}, {seeds} seeds" if seeds > 1 else kind
            axes.plot([], [], "o-", color=colours.get(kind, "#222222"), label=label, ms=4, lw=1.4)
        axes.plot([], [], color=MAJORITY, label="majority answer", lw=1.8)
        axes.set_yticks(range(len(tasks)), [f"{group[task]}: {task}" for task in tasks])
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.set(xlim=(0, 1), xlabel="share of held-out questions")
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.45 / height), ncols=4)
    return found[0]


def _kind(arm: Arm) -> str:
    return arm.judged.title.split(",")[0]


def experts(routing: Routing) -> Panel:
    """Expert share per modality in a few blocks, side by side (paper, sec. 5.1)."""
    last = len(routing.blocks) - 1
    shown = sorted({round(last * part / (SHOWN_BLOCKS - 1)) for part in range(SHOWN_BLOCKS)})
    shares = routing.of_groups()[shown]  # [blocks, groups, experts]
    wide = len(routing.groups) + 0.8
    words = (
        f"share of each expert in the tokens of each modality, block "
        f"{', '.join(str(routing.blocks[number]) for number in shown)}"
    )
    found: list[Panel] = []
    with panel(found, "experts", "which experts the tokens go to", words, 6.4, 2.7) as axes:
        places = np.array([b * wide + g for b in range(len(shown)) for g in range(len(shares[0]))])
        flat = shares.reshape(len(places), -1)
        below = np.zeros(len(places))
        for part, (name, colour) in enumerate(
            zip(routing.experts, expert_colours(routing), strict=True)
        ):
            axes.bar(places, flat[:, part], 0.8, below, color=colour, label=name)
            below += flat[:, part]
        axes.set_xticks(places, routing.groups * len(shown), rotation=45, ha="right")
        for number, block in enumerate(shown):
            middle = number * wide + (len(routing.groups) - 1) / 2
            axes.text(middle, 1.03, f"block {routing.blocks[block]}", ha="center", size=8)
        axes.set(ylim=(0, 1), ylabel="share of their choices")
        axes.set_title(axes.get_title(loc="left"), loc="left", pad=16)
        axes.legend(title="expert", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return found[0]
