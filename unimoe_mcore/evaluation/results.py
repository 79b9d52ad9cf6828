"""What the runs of a staged schedule recorded, gathered for the report."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.reading.collate import GROUPS
from data_pipeline.shards.index import Manifest
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.evaluation.statistics import (
    Change,
    mean_pairwise_variation,
    paired_change,
    shuffled_variation,
    wilson,
)
from unimoe_mcore.runtime.run_directory import RunDirectory, read_lines


@dataclass(frozen=True)
class Score:
    """Exact answers of one task after one stage."""

    hits: int
    total: int

    @property
    def share(self) -> float:
        """Share of exact answers."""
        return self.hits / max(1, self.total)

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval (Wilson)."""
        return wilson(self.hits, self.total)


@dataclass
class Judged:
    """One evaluation of one run.

    Attributes:
        title: for a column, for example ``stage 1``.
        records: one per question.
    """

    title: str
    records: list[dict[str, Any]]

    def scores(self) -> dict[str, Score]:
        """Exact answers per dataset."""
        hits: Counter[str] = Counter()
        totals: Counter[str] = Counter()
        for record in self.records:
            totals[record["dataset"]] += 1
            hits[record["dataset"]] += record["exact"]
        return {name: Score(hits[name], totals[name]) for name in sorted(totals)}


@dataclass
class Results:
    """Everything the report shows.

    Attributes:
        columns: evaluations in the order of the schedule.
        curves: run -> ``metrics.jsonl``.
        majority: dataset -> share of the most frequent answer among the held-out questions.
        versions: run -> ``version.json``.
        seconds: run -> training seconds (sum over steps).
        split: which split was asked.
    """

    columns: list[Judged] = field(default_factory=list)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    majority: dict[str, float] = field(default_factory=dict)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    split: str = "test"
    notes: list[str] = field(default_factory=list)

    def tasks(self) -> list[str]:
        """All tasks that were asked, by modality, then name."""
        groups = {r["dataset"]: r["group"] for column in self.columns for r in column.records}
        return sorted(groups, key=lambda name: (GROUPS.index(groups[name]), name))


def gather(
    runs: Path, order: list[tuple[str, str, str]], manifest: Manifest, split: str
) -> Results:
    """Read what the runs recorded.

    Args:
        runs: folder of the run directories.
        order: (run, ``before`` or ``after``, title) in the order of the schedule.

    Raises:
        UserError: if a run has not been judged.
    """
    results = Results(split=split, notes=list(manifest.notes))
    for name, when, title in order:
        run = RunDirectory(runs / name, writes=False)
        path = run.evaluation(when, split)
        if not path.is_file():
            raise UserError(f"{path} is missing: run {name} again, it continues where it was.")
        results.columns.append(Judged(title, read_lines(path)))
        metrics = run.path / "metrics.jsonl"
        results.curves[name] = read_lines(metrics) if metrics.is_file() else []
        results.seconds[name] = sum(line["seconds"] for line in results.curves[name])
        results.versions[name] = json.loads((run.path / "version.json").read_text("utf8"))
    facts = manifest.datasets.get(split, {})
    results.majority = {name: fact.majority for name, fact in facts.items()}
    return results


def loss_changes(columns: list[Judged]) -> dict[str, Change]:
    """Held-out loss per group of samples: the first evaluation that asked a question, and the last.

    Text is first asked before the base is trained, all else before stage 1.
    """
    last, before = columns[-1], dict[tuple[str, str], dict[str, Any]]()
    for column in reversed(columns[:-1]):
        before |= {(r["dataset"], r["key"]): r for r in column.records}
    changes = {}
    for group in GROUPS:
        pairs = [
            (before[key], record)
            for record in last.records
            if record["group"] == group and (key := (record["dataset"], record["key"])) in before
        ]
        if pairs:
            changes[group] = paired_change(
                [(b["loss"], b["tokens"]) for b, _ in pairs],
                [(a["loss"], a["tokens"]) for _, a in pairs],
            )
    return changes


@dataclass(frozen=True)
class ExpertShare:
    """How one block's experts share the tokens of each group of samples.

    Attributes:
        block: transformer block.
        groups: names of the groups, the rows of ``shares``.
        shares: ``[groups, experts]``, rows sum to one.
        variation: mean pairwise total-variation distance between the rows.
        shuffled: the same with modality labels shuffled over samples, mean.
        shuffled_high: its 97.5 % quantile.
    """

    block: int
    groups: list[str]
    shares: np.ndarray
    variation: float
    shuffled: float
    shuffled_high: float


def expert_shares(judged: Judged) -> list[ExpertShare]:
    """Expert shares per block, from an evaluation that recorded routing; else empty."""
    records = [record for record in judged.records if "experts" in record]
    if not records:
        return []
    names = [group for group in GROUPS if any(r["group"] == group for r in records)]
    labels = np.array([names.index(record["group"]) for record in records])
    found = []
    for block in sorted(records[0]["experts"], key=int):
        counts = np.array([record["experts"][block] for record in records], dtype=float)
        sums = np.stack([counts[labels == group].sum(0) for group in range(len(names))])
        mean, high = shuffled_variation(counts, labels, len(names))
        found.append(
            ExpertShare(
                int(block),
                names,
                sums / sums.sum(1, keepdims=True),
                mean_pairwise_variation(counts, labels, len(names)),
                mean,
                high,
            )
        )
    return found
