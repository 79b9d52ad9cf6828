"""Which experts the tokens of held-out questions go to, and which ways they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.modalities import tower_of
from unimoe_mcore.config.stage import OWN_MLP
from unimoe_mcore.evaluation.pathways import KINDS
from unimoe_mcore.evaluation.statistics import mean_pairwise_variation, shuffled_variation
from unimoe_mcore.reporting.results import in_order
from unimoe_mcore.reporting.runs import Run


@dataclass(frozen=True)
class Routing:
    """How one run's experts share the tokens of its held-out questions.

    Attributes:
        run: whose.
        experts: names of the experts.
        groups: modalities of the questions.
        blocks: blocks with experts.
        counts: (token, expert) choices, ``[blocks, groups, experts]``.
        variation: per block the mean pairwise total-variation distance of the groups' shares.
        shuffled: the same with the questions' modalities shuffled: mean and 97.5 % quantile.
    """

    run: Run
    experts: list[str]
    groups: list[str]
    blocks: list[int]
    counts: np.ndarray
    variation: list[float]
    shuffled: list[tuple[float, float]]

    def of_groups(self) -> np.ndarray:
        """Share of every expert in a group's choices, ``[blocks, groups, experts]``."""
        return _shares(self.counts, 2)

    def of_experts(self) -> np.ndarray:
        """Share of every group in an expert's tokens, ``[blocks, groups, experts]``."""
        return _shares(self.counts, 1)

    def load(self) -> np.ndarray:
        """Share of every expert in all choices, ``[blocks, experts]``."""
        return _shares(self.counts.sum(1), 1)


def _shares(counts: np.ndarray, axis: int) -> np.ndarray:
    return counts / np.maximum(1, counts.sum(axis, keepdims=True))


def routing_of(run: Run) -> Routing | None:
    """What a run's evaluation after training recorded of its routers; None if it did not."""
    records = [record for record in run.records() if _well_formed(record.get("experts"))]
    if not records:
        return None
    names = list(records[0]["experts"])
    width = len(records[0]["experts"][names[0]])
    records = [
        record
        for record in records
        if list(record["experts"]) == names
        and all(len(row) == width for row in record["experts"].values())
    ]
    groups = in_order({record["group"] for record in records})
    labels = np.array([groups.index(record["group"]) for record in records])
    blocks = sorted(int(name) for name in names)
    each = np.array([[r["experts"][str(b)] for b in blocks] for r in records], dtype=float)
    counts = np.stack([each[labels == group].sum(0) for group in range(len(groups))], 1)
    return Routing(
        run,
        expert_names(run, width),
        groups,
        blocks,
        counts,
        [mean_pairwise_variation(each[:, b], labels, len(groups)) for b in range(len(blocks))],
        [shuffled_variation(each[:, b], labels, len(groups)) for b in range(len(blocks))],
    )


def _well_formed(experts: Any) -> bool:
    return (
        isinstance(experts, dict)
        and bool(experts)
        and all(name.isdigit() for name in experts)
        and all(
            isinstance(row, list) and row and all(isinstance(n, int) for n in row)
            for row in experts.values()
        )
    )


def expert_names(run: Run, count: int) -> list[str]:
    """What the report calls the experts: by the run that each comes from, else by its number."""
    entries = run.setting("stage.experts", [])
    if not isinstance(entries, list) or len(entries) != count:
        return [f"expert {number}" for number in range(count)]
    names = []
    for entry in entries:
        folder = Path(str(entry))
        named = folder.parent if folder.name == "gives" else folder
        names.append(OWN_MLP if entry == OWN_MLP else named.name.removeprefix("stage2-"))
    return [
        f"{name} ({names[:number].count(name) + 1})" if names.count(name) > 1 else name
        for number, name in enumerate(names)
    ]


@dataclass(frozen=True)
class Ways:
    """The most travelled ways of one modality's questions through the experts.

    Attributes:
        group: the modality.
        kind: of the tokens: ``medium`` or ``text``.
        tokens: number of tokens.
        distinct: number of different ways.
        paths: first choice in every block, and tokens that went this way; most travelled first.
        choices: all choices, ``[blocks, experts]``.
    """

    group: str
    kind: str
    tokens: int
    distinct: int
    paths: list[tuple[tuple[int, ...], int]]
    choices: np.ndarray


def ways_of(run: Run, routing: Routing) -> list[Ways]:
    """The ways that a run's evaluation recorded, by modality, media before text."""
    record = run.pathways.get(("after", run.split), {})
    groups = record.get("groups")
    if record.get("blocks") != routing.blocks or not isinstance(groups, dict):
        return []
    found = []
    for group in in_order({str(name) for name in groups}):
        for kind in KINDS:
            try:
                found.append(_ways(group, kind, groups[group][kind], routing))
            except (KeyError, TypeError, ValueError):
                continue
    return found


def _ways(group: str, kind: str, record: Any, routing: Routing) -> Ways:
    """One group's record.

    Raises:
        KeyError, TypeError, ValueError: if it is none.
    """
    paths = [(tuple(int(e) for e in way), int(count)) for way, count in record["paths"]]
    choices = np.array(record["choices"], dtype=float)
    known = range(len(routing.experts))
    fits = all(len(way) == len(routing.blocks) and set(way) <= set(known) for way, _ in paths)
    if not fits or choices.shape != (len(routing.blocks), len(routing.experts)):
        raise ValueError("it is of other blocks or experts")
    return Ways(group, kind, int(record["tokens"]), int(record["distinct"]), paths, choices)


def own_experts(routing: Routing) -> tuple[int, int]:
    """In how many (block, modality) pairs the modality's own expert is the most used one.

    Video counts as image. Modalities without an expert of their own are left out.

    Returns:
        Number of such pairs, and of all.
    """
    rows, first = 0, 0
    for block in routing.of_groups():
        for group, row in zip(routing.groups, block, strict=True):
            own = tower_of(group)
            if own in routing.experts:
                rows += 1
                first += routing.experts[int(row.argmax())] == own
    return first, rows


def way_in_words(way: Sequence[int], experts: Sequence[str], shown: int = 12) -> str:
    """A way by the experts' names; the middle of a long one is left out."""
    names = [experts[expert] for expert in way]
    if len(names) > shown:
        half = shown // 2
        names = [*names[:half], f"({len(names) - shown} more)", *names[-half:]]
    return " → ".join(names)
