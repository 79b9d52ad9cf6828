"""Intervals and distances that results are judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959964


def wilson(hits: int, total: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927); ``(0, 1)`` without observations."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = hits / total, Z95 * Z95
    centre = share + z2 / (2 * total)
    half = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    scale = 1 + z2 / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


@dataclass(frozen=True)
class Change:
    """Change of a mean loss on the same questions.

    Attributes:
        before, after: loss per label token.
        difference: mean over questions of (after - before), per-question mean losses.
        half_width: of its 95 % interval (normal approximation, paired).
        questions: how many.
    """

    before: float
    after: float
    difference: float
    half_width: float
    questions: int

    @property
    def lower(self) -> bool:
        """Whether the loss fell by more than its 95 % interval."""
        return self.difference + self.half_width < 0


def paired_change(
    before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]]
) -> Change:
    """Compare ``(loss sum, label tokens)`` of the same questions in the same order."""
    a = np.array([loss / max(1, tokens) for loss, tokens in before])
    b = np.array([loss / max(1, tokens) for loss, tokens in after])
    difference = b - a
    spread = (
        difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    )

    def per_token(pairs: Sequence[tuple[float, int]]) -> float:
        return sum(loss for loss, _ in pairs) / max(1, sum(tokens for _, tokens in pairs))

    return Change(
        per_token(before),
        per_token(after),
        float(difference.mean()),
        float(Z95 * spread),
        len(difference),
    )


def clearly_differ(gained: int, lost: int) -> bool:
    """Whether gains and losses on the same questions differ beyond chance, at 5 %.

    McNemar's test in its normal approximation (McNemar 1947).
    """
    return abs(gained - lost) > Z95 * math.sqrt(gained + lost)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Total-variation distance of two distributions: half the sum of absolute differences."""
    return float(np.abs(p - q).sum() / 2)


def mean_pairwise_variation(counts: np.ndarray, labels: np.ndarray, groups: int) -> float:
    """Mean over pairs of groups of the total-variation distance of their expert shares.

    Args:
        counts: tokens of each sample that each expert got, ``[samples, experts]``.
        labels: group of each sample, ``[samples]``.
    """
    sums = np.stack([counts[labels == group].sum(0) for group in range(groups)]).astype(float)
    shares = sums / np.maximum(1, sums.sum(1, keepdims=True))
    pairs = [
        total_variation(shares[i], shares[j]) for i in range(groups) for j in range(i + 1, groups)
    ]
    return float(np.mean(pairs)) if pairs else 0.0


def shuffled_variation(
    counts: np.ndarray, labels: np.ndarray, groups: int, shuffles: int = 200, seed: int = 0
) -> tuple[float, float]:
    """The same figure with the group labels shuffled over samples: mean and 97.5 % quantile."""
    generator = np.random.Generator(np.random.PCG64(seed))
    values = [
        mean_pairwise_variation(counts, generator.permutation(labels), groups)
        for _ in range(shuffles)
    ]
    return float(np.mean(values)), float(np.quantile(values, 0.975))
