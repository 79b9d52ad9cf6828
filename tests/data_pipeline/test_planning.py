"""Invariants of the plan, the dealing and the packing, over many sizes and worlds."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.planning.dealing import deal_balanced, deal_step, pack
from data_pipeline.planning.mixture import BLOCK, Schedule, temperature_weights
from data_pipeline.planning.plan import DatasetShare, GlobalPlan, epochs


def plan_of(counts: list[int], seed: int = 0, samples: int = 8, **changes: object) -> GlobalPlan:
    shares = tuple(DatasetShare(f"d{i}", n, 1.0, f"x{i}") for i, n in enumerate(counts))
    return GlobalPlan(shares, seed, samples, temperature=0.5)


counts = st.lists(st.integers(1, 300), min_size=1, max_size=6)


@given(counts, st.integers(0, 5), st.integers(1, 64), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_every_sample_of_an_epoch_is_used_once(
    sizes: list[int], seed: int, samples: int, steps: int
) -> None:
    plan = plan_of(sizes, seed, samples)
    draws = [draw for step in range(steps) for draw in plan.step(step)]
    assert len(draws) == steps * samples
    assert len(set(draws)) == len(draws), "a sample twice in one epoch"
    for dataset, size in enumerate(sizes):
        mine = [draw for draw in draws if draw.dataset == dataset]
        by_epoch = Counter(draw.epoch for draw in mine)
        whole = [epoch for epoch in by_epoch if epoch < max(by_epoch)]
        assert all(by_epoch[epoch] == size for epoch in whole), "an epoch left before its end"


@given(counts, st.integers(1, 32), st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_a_step_is_a_function_of_its_number(sizes: list[int], samples: int, step: int) -> None:
    walked = plan_of(sizes, 3, samples)
    for earlier in range(step % 7):
        walked.step(earlier)
    assert walked.step(step) == plan_of(sizes, 3, samples).step(step)


def test_seed_and_content_change_the_plan() -> None:
    assert plan_of([50, 70], seed=0).step(4) != plan_of([50, 70], seed=1).step(4)
    one, other = plan_of([50, 70]), plan_of([50, 71])
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint() == plan_of([50, 70]).fingerprint()


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_schedule_follows_the_weights(raw: list[float]) -> None:
    weights = [w / sum(raw) for w in raw]
    schedule = Schedule.of(weights)
    drawn = Counter(schedule.draw(position)[0] for position in range(BLOCK))
    assert sum(schedule.quota) == BLOCK
    for dataset, weight in enumerate(weights):
        assert drawn[dataset] == schedule.quota[dataset]
        assert drawn[dataset] >= 1
        assert abs(drawn[dataset] - weight * BLOCK) < len(weights) + 1
    ranks = [schedule.draw(p) for p in range(3 * BLOCK)]
    for dataset in range(len(weights)):
        cursors = [cursor for d, cursor in ranks if d == dataset]
        assert cursors == list(range(len(cursors))), "a cursor skipped or repeated a place"


def test_steps_stay_close_to_the_mixture() -> None:
    plan = plan_of([100, 100, 400], samples=40)
    weights = plan.weights()
    for step in range(30):
        drawn = Counter(draw.dataset for draw in plan.step(step))
        for dataset, weight in enumerate(weights):
            assert abs(drawn[dataset] - 40 * weight) <= 2


def test_epochs_counts_what_steps_draw() -> None:
    plan = plan_of([10, 30], samples=16)
    drawn = Counter(draw.dataset for step in range(100) for draw in plan.step(step))
    assert epochs(plan, 100) == {"d0": drawn[0] / 10, "d1": drawn[1] / 30}


def test_temperature() -> None:
    assert temperature_weights([100, 300], [1, 1], 1.0) == [0.25, 0.75]
    assert temperature_weights([100, 300], [1, 1], 0.0) == [0.5, 0.5]
    with pytest.raises(DataError, match="positive weight"):
        temperature_weights([100], [0.0], 1.0)


lengths = st.lists(st.integers(1, 500), min_size=1, max_size=64)


@given(lengths, st.integers(1, 64), st.integers(500, 900))
@settings(max_examples=80, deadline=None)
def test_dealing_keeps_every_sample_and_equal_microbatches(
    sizes: list[int], ranks: int, capacity: int
) -> None:
    dealt = deal_step(sizes, ranks, capacity)
    assert len(dealt) == ranks
    assert len({len(micro) for micro in dealt}) == 1, "ranks differ in micro-batches"
    flat = [i for rank in dealt for micro in rank for i in micro]
    assert sorted(flat) == list(range(len(sizes)))
    for rank in dealt:
        for micro in rank:
            assert sum(sizes[i] for i in micro) <= capacity


@given(lengths, st.integers(1, 16))
@settings(max_examples=60, deadline=None)
def test_balanced_dealing_is_within_one_sample_of_even(sizes: list[int], ranks: int) -> None:
    loads = [
        sum(sizes[i] for i in part) for part in deal_balanced([float(s) for s in sizes], ranks)
    ]
    assert max(loads) - min(loads) <= max(sizes)


@given(lengths)
@settings(max_examples=40, deadline=None)
def test_packing_opens_no_bin_too_many(sizes: list[int]) -> None:
    bins = pack(sizes, 500)
    half_full = [b for b in bins if sum(sizes[i] for i in b) <= 250]
    assert len(half_full) <= 1, "two half-empty bins could have been one"


def test_a_sample_longer_than_a_microbatch_is_refused() -> None:
    with pytest.raises(DataError, match="raise data.tokens_per_microbatch"):
        pack([10, 700], 500)
