"""How often each source is drawn: weights, and a schedule that spreads them evenly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import DataError

SMALLEST_BLOCK, LARGEST_BLOCK = 4096, 2**18
"""Positions after which a schedule repeats; the more, the more exactly it keeps small weights."""


def temperature_weights(
    counts: Sequence[int], factors: Sequence[float], temperature: float
) -> list[float]:
    """Shares: ``factor * count ** temperature``, normalised to sum to one.

    Args:
        counts: samples of each.
        factors: the recipe's multiplier of each.
        temperature: 1 draws in proportion to size, 0 draws all equally often.

    Raises:
        DataError: if nothing has a positive share.
    """
    raw = [factor * count**temperature for count, factor in zip(counts, factors, strict=True)]
    total = sum(raw)
    if not total > 0 or min(raw) < 0 or not math.isfinite(total):
        raise DataError("The mixture draws from nothing: give data.datasets a positive weight.")
    return [share / total for share in raw]


@dataclass(frozen=True)
class Schedule:
    """Which of several things comes at the p-th position; repeats after a block of positions.

    Attributes:
        order: what comes at each position of a block, ``[block]``.
        rank: how many earlier positions of the block have the same, ``[block]``.
        quota: positions per block of each.
    """

    order: np.ndarray
    rank: np.ndarray
    quota: np.ndarray

    @classmethod
    def of(cls, weights: Sequence[float]) -> Schedule:
        """Spread ``weights`` over a block: quotas by largest remainder, evenly interleaved.

        Everything with a positive weight gets at least one position, so that nothing is lost to
        rounding; the block is long enough for the smallest weight to be rounded by an eighth at
        most, as long as ``LARGEST_BLOCK`` allows it.
        """
        least = max(min(weight for weight in weights if weight > 0), 8 / LARGEST_BLOCK)
        block = max(SMALLEST_BLOCK, 2 ** math.ceil(math.log2(8 / least)))
        exact = np.asarray(weights, dtype=np.float64) * block
        quota = np.where(exact > 0, np.maximum(1, np.floor(exact)), 0).astype(np.int64)
        while quota.sum() != block:
            gap = exact - quota
            if quota.sum() < block:
                quota[int(np.argmax(np.where(exact > 0, gap, -np.inf)))] += 1
            else:
                quota[int(np.argmin(np.where(quota > 1, gap, np.inf)))] -= 1
        thing = np.repeat(np.arange(len(quota)), quota)
        rank = np.concatenate([np.arange(q) for q in quota])
        place = (rank + 0.5) / np.maximum(1, quota[thing])
        by_place = np.lexsort((thing, place))
        return cls(thing[by_place], rank[by_place], quota)

    def draw(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What comes at positions ``[n]``, and how often the same came before each. O(1) each."""
        block, offset = np.divmod(position, len(self.order))
        thing = self.order[offset]
        return thing, block * self.quota[thing] + self.rank[offset]

    def drawn(self, position: int) -> np.ndarray:
        """How often each comes before a position, ``[things]`` int64."""
        blocks, rest = divmod(position, len(self.order))
        return blocks * self.quota + np.bincount(self.order[:rest], minlength=len(self.quota))
