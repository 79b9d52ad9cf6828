"""How often each dataset is drawn: weights, and a schedule that spreads them evenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import DataError

BLOCK = 1024
"""Positions after which the schedule of datasets repeats."""


def temperature_weights(
    counts: Sequence[int], factors: Sequence[float], temperature: float
) -> list[float]:
    """Shares of the datasets: ``factor * count ** temperature``, normalised to sum to one.

    Args:
        counts: samples per dataset.
        factors: the recipe's multiplier per dataset.
        temperature: 1 draws in proportion to size, 0 draws all datasets equally often.

    Raises:
        DataError: if no dataset has a positive share.
    """
    raw = [factor * count**temperature for count, factor in zip(counts, factors, strict=True)]
    total = sum(raw)
    if total <= 0 or min(raw) < 0:
        raise DataError("The mixture draws from nothing: give data.datasets a positive weight.")
    return [share / total for share in raw]


@dataclass(frozen=True)
class Schedule:
    """Which dataset the p-th drawn sample comes from; repeats every ``BLOCK`` positions.

    Attributes:
        order: dataset at each position of a block, ``[BLOCK]``.
        rank: how many earlier positions of the block have the same dataset, ``[BLOCK]``.
        quota: positions per block of each dataset.
    """

    order: np.ndarray
    rank: np.ndarray
    quota: tuple[int, ...]

    @classmethod
    def of(cls, weights: Sequence[float], block: int = BLOCK) -> Schedule:
        """Spread ``weights`` over a block: quotas by largest remainder, evenly interleaved.

        Every dataset with a positive weight gets at least one position, so that none is lost to
        rounding.
        """
        exact = np.asarray(weights, dtype=np.float64) * block
        quota = np.where(exact > 0, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
        while quota.sum() != block:
            gap = exact - quota
            if quota.sum() < block:
                quota[int(np.argmax(np.where(exact > 0, gap, -np.inf)))] += 1
            else:
                quota[int(np.argmin(np.where(quota > 1, gap, np.inf)))] -= 1
        dataset = np.repeat(np.arange(len(quota)), quota)
        rank = np.concatenate([np.arange(q) for q in quota])
        place = (rank + 0.5) / np.maximum(1, quota[dataset])
        by_place = np.lexsort((dataset, place))
        return cls(dataset[by_place], rank[by_place], tuple(int(q) for q in quota))

    def draw(self, position: int) -> tuple[int, int]:
        """Dataset of a position, and how many times that dataset was drawn before it. O(1)."""
        block, offset = divmod(position, len(self.order))
        dataset = int(self.order[offset])
        return dataset, block * self.quota[dataset] + int(self.rank[offset])
