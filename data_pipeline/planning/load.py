"""How evenly a step is dealt, carried by each of its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.planning.dealing import Dealt, StepWork


@dataclass(frozen=True)
class Load:
    """The work of a micro-batch in the units of the cost model.

    Attributes:
        mine: of this rank, what could not be read left out.
        slowest: planned, of the rank that has the most in the micro-batch of this number.
        mean: planned, of all ranks in the micro-batch of this number.
    """

    mine: int
    slowest: int
    mean: float


def planned_loads(work: StepWork, dealt: Dealt, ranks: int) -> list[Load]:
    """The planned part of every micro-batch's load; ``mine`` is 0."""
    bins = dealt.rank * dealt.microbatches + dealt.micro
    sums = np.bincount(bins, work.total, ranks * dealt.microbatches)
    table = sums.reshape(ranks, dealt.microbatches)
    return [Load(0, int(column.max()), float(column.mean())) for column in table.T]


def imbalance(slowest: Sequence[float], mean: Sequence[float]) -> float:
    """Sum over micro-batches of the slowest rank over that of the mean; 1 is even.

    Ranks that exchange tokens wait for each other in every micro-batch.
    """
    total = sum(mean)
    return sum(slowest) / total if total else 1.0
