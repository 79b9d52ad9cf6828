"""What the answers of some runs come to: scores, changes, and comparisons of runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.reading.collate import GROUPS
from data_pipeline.shards.index import Manifest
from unimoe_mcore.evaluation.statistics import Change, clearly_differ, paired_change, wilson
from unimoe_mcore.reporting.runs import Run, data_of, family, with_ancestors

Key = tuple[str, str]
"""Dataset and key of a question."""


@dataclass(frozen=True)
class Score:
    """Exact answers of some questions."""

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


@dataclass(frozen=True)
class Judged:
    """One evaluation of one run.

    Attributes:
        run: whose.
        title: for a column, such as ``stage1`` or ``before stage1``.
        records: one per question.
    """

    run: Run
    title: str
    records: list[dict[str, Any]]

    def scores(self, by: str = "dataset") -> dict[str, Score]:
        """Exact answers per dataset, or per ``group``."""
        hits: Counter[str] = Counter()
        totals: Counter[str] = Counter()
        for record in self.records:
            totals[record[by]] += 1
            hits[record[by]] += record["exact"]
        return {name: Score(hits[name], totals[name]) for name in sorted(totals)}

    def mean(self) -> float:
        """Mean over datasets of the share of exact answers."""
        scores = self.scores()
        return sum(score.share for score in scores.values()) / max(1, len(scores))

    def by_key(self) -> dict[Key, dict[str, Any]]:
        """Records by the question that they answer."""
        return {(r["dataset"], r["key"]): r for r in self.records}


@dataclass
class Results:
    """Everything the report shows.

    Attributes:
        given: the runs that the report is of.
        runs: these and those they stand on, in the order in which they were made.
        stages: every evaluation of all runs on the split of the first given run, in this order.
        finals: the evaluations after training of the given runs that have one.
        majority: dataset -> share of the most frequent answer among the held-out questions.
        split: which split was asked.
        data: the data set of the questions, if it is there.
        notes: what a reader must know before all else.
    """

    given: list[Run]
    runs: list[Run]
    stages: list[Judged] = field(default_factory=list)
    finals: list[Judged] = field(default_factory=list)
    majority: dict[str, float] = field(default_factory=dict)
    split: str = "test"
    data: Manifest | None = None
    notes: list[str] = field(default_factory=list)

    def tasks(self) -> list[str]:
        """All datasets that were asked, by modality, then name."""
        groups = {r["dataset"]: r["group"] for each in self.stages for r in each.records}
        return sorted(groups, key=lambda name: (group_order(groups[name]), name))

    def groups(self) -> list[str]:
        """All groups of the questions that were asked."""
        return in_order({r["group"] for each in self.stages for r in each.records})


def group_order(group: str) -> tuple[int, str]:
    """Sorts groups as ``GROUPS`` does, unknown ones behind."""
    return (GROUPS.index(group) if group in GROUPS else len(GROUPS), group)


def in_order(groups: set[str]) -> list[str]:
    """Groups sorted as everywhere in the report."""
    return sorted(groups, key=group_order)


def gather(paths: Sequence[Path]) -> Results:
    """Read what runs, and those they stand on, recorded.

    Raises:
        UserError: if a folder is no run.
    """
    given, runs = with_ancestors(paths)
    results = Results(given, runs, split=given[0].split)
    for run in runs:
        for when, title in (("before", f"before {run.title}"), ("after", run.title)):
            records = run.evaluations.get((when, results.split), [])
            if records:
                results.stages.append(Judged(run, title, records))
    after = {each.run: each for each in results.stages if each.title == each.run.title}
    results.finals = [after[run] for run in given if run in after]
    results.data, missing = data_of(given[0])
    results.notes = [*_notes(results), *([missing] if missing else [])]
    results.majority = _majority(results)
    return results


def _majority(results: Results) -> dict[str, float]:
    """As the runs recorded it, else as the data set says."""
    found = {}
    if results.data is not None:
        facts = results.data.datasets.get(results.split, {})
        found = {name: fact.majority for name, fact in facts.items()}
    for run in results.runs:
        for when in ("before", "after"):
            event = run.event(f"evaluated {when}")
            known = event.get("majority")
            if event.get("split") == results.split and isinstance(known, dict):
                found |= {k: float(v) for k, v in known.items() if isinstance(v, int | float)}
    return found


def _notes(results: Results) -> list[str]:
    notes = [problem for run in results.runs for problem in run.problems]
    absent: dict[tuple[str, Path], list[str]] = {}
    for run in results.runs:
        for source in run.missing:
            absent.setdefault(source, []).append(run.title)
    for (role, folder), titles in absent.items():
        notes.append(
            f"The {role} of {', '.join(titles)}, {folder}, is not there any more, or is another "
            f"one by now: what that run recorded is missing here."
        )
    for run in results.given:
        if not run.made:
            notes.append(f"{run.title} is not done ({run.state}).")
        if run.split != results.split:
            notes.append(
                f"{run.title} was judged on the split {run.split}, {results.given[0].title} on "
                f"{results.split}: only answers on {results.split} are shown."
            )
        elif not run.records():
            notes.append(
                f"{run.title} has not answered the held-out questions of the split "
                f"{results.split} after training: it stands in no table of answers."
            )
    data = {run.data for run in results.runs if run.data}
    if len(data) > 1:
        listed = ", ".join(f"{run.title} {run.data[:12]}" for run in results.runs if run.data)
        notes.append(
            f"The runs were made from different data ({listed}): their questions need not be the "
            f"same, and no run is compared with one of other data question by question."
        )
    if results.data is not None:
        notes += results.data.notes
    return notes


def loss_changes(results: Results, last: Judged) -> dict[str, Change]:
    """Held-out loss per group: the first evaluation that asked a question, and a run's last.

    Text is first asked before the base is trained, all else before stage 1. Only runs that this
    one stands on, and itself, are looked at.
    """
    before: dict[Key, dict[str, Any]] = {}
    mine = [run for run in family(last.run) if run.data == last.run.data]
    for judged in reversed(results.stages):
        if judged is not last and judged.run in mine:
            before |= judged.by_key()
    changes = {}
    for group in results.groups():
        pairs = [
            (before[key], record)
            for key, record in last.by_key().items()
            if record["group"] == group and key in before
        ]
        if pairs:
            changes[group] = paired_change(
                [(b["loss"], b["tokens"]) for b, _ in pairs],
                [(a["loss"], a["tokens"]) for _, a in pairs],
            )
    return changes


@dataclass(frozen=True)
class Compared:
    """Two evaluations on the questions that both were asked.

    Attributes:
        gained: questions that only the second answers.
        lost: questions that only the first answers.
        both: number of questions.
    """

    before: Judged
    after: Judged
    gained: int
    lost: int
    both: int

    @property
    def clear(self) -> bool:
        """Whether gains and losses differ beyond chance."""
        return clearly_differ(self.gained, self.lost)


def compare(before: Judged, after: Judged) -> Compared | None:
    """Gained and lost questions; None where the two were not asked the same ones."""
    if before.run.data != after.run.data:
        return None
    was = before.by_key()
    pairs = [
        (bool(was[key]["exact"]), bool(now["exact"]))
        for key, now in after.by_key().items()
        if key in was
    ]
    if not pairs:
        return None
    gained = sum(now and not then for then, now in pairs)
    lost = sum(then and not now for then, now in pairs)
    return Compared(before, after, gained, lost, len(pairs))


def stage_changes(results: Results) -> list[Compared]:
    """Every evaluation against those that its run stands on, or its own before training."""
    own = {each.run: each for each in results.stages if each.title == each.run.title}
    begun = {each.run: each for each in results.stages if each.title != each.run.title}
    found = []
    for run, judged in own.items():
        stages = [own[each] for each in run.stands_on if each in own and each.kind != "base"]
        befores = [begun[run]] if run in begun else []
        befores += stages if run.kind == "moe" or not befores else []
        found += [pair for before in befores if (pair := compare(before, judged))]
    return found


def run_changes(results: Results) -> list[Compared]:
    """Every given run against every one that was given before it."""
    return [
        pair
        for number, later in enumerate(results.finals)
        for earlier in results.finals[:number]
        if (pair := compare(earlier, later))
    ]
