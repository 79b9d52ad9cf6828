"""Intervals and distances against numbers from elsewhere, by hand, or by their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimoe_mcore.evaluation.statistics import (
    mean_pairwise_variation,
    paired_change,
    shuffled_variation,
    total_variation,
    wilson,
)

Z = 1.959963984540054  # normal quantile of 97.5 %


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [  # scipy.stats.binomtest(hits, total).proportion_ci(method="wilson")
        (10, 20, 0.29930, 0.70070),
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (8, 10, 0.49016, 0.94331),
        (81, 263, 0.25524, 0.36620),  # Newcombe 1998, table I: 0.2553 to 0.3662
        (0, 0, 0.0, 1.0),
    ],
)
def test_known_intervals(hits: int, total: int, low: float, high: float) -> None:
    assert wilson(hits, total) == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(total=st.integers(1, 5000), data=st.data())
def test_an_interval_ends_where_the_share_is_as_far_off_as_95_percent_allow(
    total: int, data: st.DataObject
) -> None:
    """The definition: the shares p with ``|share - p| <= z sqrt(p (1 - p) / n)``."""
    hits = data.draw(st.integers(0, total))
    share = hits / total
    low, high = wilson(hits, total)
    assert low - 1e-12 <= share <= high + 1e-12
    assert low >= -1e-12
    assert high <= 1 + 1e-12
    for p in (low, high):
        allowed = Z * math.sqrt(max(0.0, p * (1 - p)) / total)
        assert abs(share - p) == pytest.approx(allowed, abs=1e-6)


def test_a_change_on_the_same_questions() -> None:
    # Per token 2, 2, 1 before and 1, 1, 1 after: differences -1, -1, 0, their mean -2/3, their
    # standard deviation sqrt(1/3), that of the mean 1/3.
    change = paired_change([(4.0, 2), (6.0, 3), (1.0, 1)], [(2.0, 2), (3.0, 3), (1.0, 1)])
    assert change.before == pytest.approx(11 / 6)
    assert change.after == pytest.approx(1.0)
    assert change.difference == pytest.approx(-2 / 3)
    assert change.half_width == pytest.approx(Z / 3, rel=1e-6)
    assert change.questions == 3
    assert change.lower  # -0.667 + 0.653


def test_a_change_within_its_interval_is_none() -> None:
    before = [(2.0, 1)] * 3
    assert not paired_change(before, [(1.0, 1), (1.0, 1), (2.1, 1)]).lower
    assert not paired_change(before, [(3.0, 1)] * 3).lower
    assert paired_change(before, [(1.9, 1)] * 3).lower  # small, but the same every time
    one = paired_change([(2.0, 1)], [(0.0, 1)])
    assert one.half_width == math.inf
    assert not one.lower


def test_total_variation() -> None:
    p = np.array([0.5, 0.5, 0.0])
    assert total_variation(p, p) == 0
    assert total_variation(p, np.array([0.0, 0.0, 1.0])) == 1
    assert total_variation(p, np.array([0.8, 0.2, 0.0])) == pytest.approx(0.3)


COUNTS = np.array([[6, 2], [2, 6], [0, 4], [4, 0]])
"""Tokens of four samples that two experts got."""


def test_variation_between_groups_weighs_tokens_not_samples() -> None:
    # Shares: group 0 (6, 2) / 8, group 1 (2, 10) / 12, group 2 (4, 0) / 4.
    found = mean_pairwise_variation(COUNTS, np.array([0, 1, 1, 2]), 3)
    assert found == pytest.approx((7 / 12 + 1 / 4 + 5 / 6) / 3)
    assert mean_pairwise_variation(COUNTS, np.array([0, 0, 0, 0]), 1) == 0


def test_the_shuffled_baseline_keeps_samples_and_mixes_labels() -> None:
    counts = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])
    labels = np.array([0, 0, 1, 1])
    assert mean_pairwise_variation(counts, labels, 2) == 1
    # Of the six ways to label them two separate the experts fully, four not at all.
    mean, high = shuffled_variation(counts, labels, 2, shuffles=3000)
    assert mean == pytest.approx(1 / 3, abs=0.04)
    assert high == 1
    assert shuffled_variation(counts, labels, 2) == shuffled_variation(counts, labels, 2)
    alike = np.array([[3, 1]] * 4)
    assert shuffled_variation(alike, labels, 2) == (0, 0)


def test_a_real_difference_lies_above_the_shuffled_ones_and_none_does_not() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    labels = np.arange(200) % 2
    for strength, differs in ((0.3, True), (0.0, False)):
        shares = np.stack([0.5 + strength * (labels - 0.5), 0.5 - strength * (labels - 0.5)], 1)
        counts = np.stack([generator.multinomial(30, share) for share in shares])
        _, high = shuffled_variation(counts, labels, 2)
        assert (mean_pairwise_variation(counts, labels, 2) > high) is differs
