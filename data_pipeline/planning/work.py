"""From planned samples to the work they mean: what dealing looks at."""

from __future__ import annotations

import math

import numpy as np

from data_pipeline.planning.catalogue import Catalogue
from data_pipeline.planning.cost import CostModel
from data_pipeline.planning.dealing import StepWork
from data_pipeline.planning.plan import GlobalPlan
from data_pipeline.planning.sharding import Demand, alike

_LOOKED_AT = 50_000
"""Samples of a source whose mean work stands for all of it."""


def step_work(catalogue: Catalogue, rows: np.ndarray, costs: CostModel) -> StepWork:
    """What dealing needs to know of some catalogue rows."""
    tokens = catalogue.tokens[rows].astype(np.int64)
    return StepWork(
        tokens,
        costs.language(tokens),
        costs.encoders(catalogue.work[rows]),
        catalogue.combination[catalogue.source_of(rows)],
    )


def demands(catalogue: Catalogue, plan: GlobalPlan, costs: CostModel) -> list[Demand]:
    """What each combination asks for in an average step of a plan, by its number in dealing."""
    samples = np.array(plan.weights) * plan.mixture.global_samples
    found = []
    for name in catalogue.combinations:
        drawn, work, squares = 0.0, 0.0, 0.0
        each: list[int] = []
        for number, source in enumerate(catalogue.sources):
            if source.combination != name or not samples[number]:
                continue
            first, last = int(catalogue.starts[number]), int(catalogue.starts[number + 1])
            rows = np.arange(first, last, max(1, (last - first) // _LOOKED_AT))
            # Whole numbers and exact sums, so that all ranks find the same.
            part = [int(n) for n in step_work(catalogue, rows, costs).total]
            drawn += samples[number]
            work += samples[number] * (sum(part) / len(part))
            each += part
            squares += samples[number] * (sum(n * n for n in part) / len(part))
        mean = work / drawn if drawn else 0.0
        spread = math.sqrt(max(0.0, squares - drawn * mean * mean))
        distance = sum(abs(n - int(mean)) for n in each) // max(1, len(each))
        found.append(Demand(work, spread, alike(int(mean), distance)))
    return found
