"""Sources, mixtures and plans of any size, for the tests of planning."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from data_pipeline.planning.permutation import Shuffle
from data_pipeline.planning.plan import Draws, GlobalPlan, Mixture, Source

KINDS = ("text", "image+text", "speech+text")

sizes = st.lists(st.one_of(st.just(1), st.integers(1, 120)), min_size=1, max_size=6)
compositions = st.sampled_from(["mixed", "uniform"])
shuffles = st.builds(Shuffle, st.integers(1, 40), st.integers(1, 20))
factors = st.dictionaries(st.sampled_from(KINDS), st.floats(0.1, 8), max_size=3)


def sources_of(sizes: list[int], digest: str = "x") -> list[Source]:
    """One dataset per size; combinations in turn."""
    return [
        Source(f"d{i}", KINDS[i % len(KINDS)], size, f"{digest}{i}") for i, size in enumerate(sizes)
    ]


def mixture_of(sizes: list[int], **changes: Any) -> Mixture:
    """Weights that differ, small steps, a shuffle of small windows."""
    facts: dict[str, Any] = {
        "datasets": {f"d{i}": 1.0 + i / 3 for i in range(len(sizes))},
        "global_samples": 8,
        "temperature": 0.5,
        "shuffle": Shuffle(4, 3),
    }
    return Mixture(**{**facts, **changes})


def plan_of(sizes: list[int], **changes: Any) -> GlobalPlan:
    return GlobalPlan(sources_of(sizes), mixture_of(sizes, **changes))


def triples(draws: Draws) -> list[tuple[int, int, int]]:
    """Source, epoch and row of every sample of a step."""
    columns = (draws.source, draws.epoch, draws.row)
    return list(zip(*(np.asarray(column).tolist() for column in columns), strict=True))
