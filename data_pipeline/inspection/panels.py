"""Which lengths the pictures show, and what each of them stands for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.inspection.contents import MEASURES, Contents, Group, few_modalities_first
from data_pipeline.inspection.figure import Panel, Series
from data_pipeline.inspection.outlook import Phase
from data_pipeline.planning.catalogue import Catalogue

_NAMES = {
    measure: "frames of video" if measure == "frames" else f"{unit} of {measure}"
    for measure, unit in MEASURES.items()
} | {"text": "characters"}


def length_panels(contents: Contents) -> list[Panel]:
    """Lengths by combination, of all its datasets together, split by split."""
    panels = []
    combinations = {group.combination for group in contents.groups}
    for combination in sorted(combinations, key=few_modalities_first):
        groups = [group for group in contents.groups if group.combination == combination]
        for measure, name in _NAMES.items():
            series = [_series(measure, split, groups) for split in contents.splits()]
            found = tuple(each for each in series if len(each.values))
            if found:
                panels.append(Panel(combination, name, found))
    return panels


def _values(group: Group, measure: str) -> np.ndarray:
    return group.lengths.get(measure, np.zeros(0))


def _series(measure: str, split: str, groups: Sequence[Group]) -> Series:
    mine = [group for group in groups if group.split == split and len(_values(group, measure))]
    if not mine:
        return Series(split, np.zeros(0))
    values = [_values(group, measure) for group in mine]
    if measure != "text":
        return Series(split, np.concatenate(values))
    # A text that was read stands for as many samples as were passed over for it.
    weights = [np.full(group.texts_read, group.samples / group.texts_read) for group in mine]
    return Series(split, np.concatenate(values), np.concatenate(weights))


def token_panels(catalogue: Catalogue, phase: Phase) -> list[Panel]:
    """Tokens of the samples that a phase draws, by combination."""
    shares = {(each.dataset, each.combination): each.share for each in phase.drawn}
    panels = []
    for combination in dict.fromkeys(each.combination for each in phase.drawn):
        values, weights = [], []
        for number, source in enumerate(catalogue.sources):
            share = shares.get((source.dataset, source.combination), 0.0)
            if source.combination == combination and share:
                rows = slice(int(catalogue.starts[number]), int(catalogue.starts[number + 1]))
                values.append(catalogue.tokens[rows])
                weights.append(np.full(source.count, share / source.count))
        series = Series("drawn", np.concatenate(values), np.concatenate(weights))
        row = f"{combination}, {sum(float(each.sum()) for each in weights):.1%} of the samples"
        panels.append(Panel(row, "tokens of a sample", (series,)))
    return panels
