"""The plan: every sample once an epoch, shares at every moment, a pure function of the step."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.planning.mixture import LARGEST_BLOCK, Schedule, temperature_weights
from data_pipeline.planning.permutation import Shuffle
from data_pipeline.planning.plan import GlobalPlan, Mixture, Source, fingerprint_of
from tests.data_pipeline.plans import (
    KINDS,
    compositions,
    factors,
    mixture_of,
    plan_of,
    shuffles,
    sizes,
    sources_of,
    triples,
)

numbers = st.integers(1, 40)


@given(st.lists(st.floats(1e-5, 10), min_size=1, max_size=12))
@settings(max_examples=80, deadline=None)
def test_a_schedule_follows_its_weights_at_every_moment(raw: list[float]) -> None:
    weights = [w / sum(raw) for w in raw]
    schedule = Schedule.of(weights)
    block = len(schedule.order)
    assert schedule.quota.sum() == block
    length = min(2 * block, 20_000)
    thing, before = schedule.draw(np.arange(length))
    for number, weight in enumerate(weights):
        drawn = np.cumsum(thing == number)
        share = schedule.quota[number] / block
        # Places (r + 1/2) / quota: half of its own, and half of every other's times its share.
        ideal = share * np.arange(1, length + 1)
        assert np.abs(drawn - ideal).max() <= 1.5 + share * len(weights) / 2
        assert abs(schedule.quota[number] - weight * block) <= max(1, weight * block / 8) + len(raw)
        assert before[thing == number].tolist() == list(range(int(drawn[-1])))
    for position in (0, 1, length // 3, length):
        counted = np.bincount(thing[:position], minlength=len(weights))
        assert schedule.drawn(position).tolist() == counted.tolist()


@pytest.mark.parametrize("least", [1e-3, 1e-9, 1e-320])
def test_nothing_is_lost_to_rounding(least: float) -> None:
    schedule = Schedule.of([1 - least, least, 0.0])
    assert schedule.quota[1] >= 1
    assert schedule.quota[2] == 0
    assert len(schedule.order) <= LARGEST_BLOCK


def test_temperature() -> None:
    assert temperature_weights([100, 300], [1, 1], 1.0) == [0.25, 0.75]
    assert temperature_weights([100, 300], [1, 1], 0.0) == [0.5, 0.5]
    assert temperature_weights([100, 400], [1, 1], 0.5) == pytest.approx([1 / 3, 2 / 3])
    for nothing in ([0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(DataError, match="draws from nothing"):
            temperature_weights([3, 4], nothing, 1.0)


@given(sizes, compositions, factors, shuffles, st.integers(0, 5), st.integers(1, 40), numbers)
@settings(max_examples=100, deadline=None)
def test_no_sample_comes_twice_in_an_epoch_and_none_is_left_out(
    sizes: list[int],
    compose: str,
    factors: dict[str, float],
    shuffle: Shuffle,
    seed: int,
    samples: int,
    steps: int,
) -> None:
    plan = plan_of(
        sizes,
        compose=compose,
        seed=seed,
        global_samples=samples,
        combinations=factors,
        shuffle=shuffle,
    )
    seen = dict[int, list[tuple[int, int]]]()
    for step in range(steps):
        cursors = {plan.sources[number].name: len(drawn) for number, drawn in seen.items()}
        assert plan.cursors(step) == cursors
        draws = plan.step(step)
        assert len(draws) == samples
        if compose == "uniform":
            assert len({plan.sources[int(s)].combination for s in draws.source}) == 1
        for source, epoch, row in triples(draws):
            seen.setdefault(source, []).append((epoch, row))
    for number, drawn in seen.items():
        assert len(set(drawn)) == len(drawn)
        assert all(0 <= row < sizes[number] for _, row in drawn)
        # Epochs follow each other, whole ones but for the last: a remainder is carried over.
        epochs = [epoch for epoch, _ in drawn]
        assert epochs == [place // sizes[number] for place in range(len(drawn))]
        source = plan.sources[number]
        assert plan.epochs(steps)[source.name] == len(drawn) / source.count


@given(sizes, compositions, st.integers(1, 3000), st.lists(st.integers(0, 2000), max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_step_is_a_function_of_its_number(
    sizes: list[int], compose: str, samples: int, steps: list[int]
) -> None:
    """Whatever was asked before, also of steps planned together and of ones larger than that."""
    walked = plan_of(sizes, compose=compose, global_samples=samples)
    for step in steps:
        fresh = plan_of(sizes, compose=compose, global_samples=samples)
        assert triples(walked.step(step)) == triples(fresh.step(step))


def test_a_far_step_is_that_of_one_who_walked_there() -> None:
    """Counted by cursors from the first step: the sequence of epochs has no gap."""
    plan = plan_of([50, 7, 1], global_samples=6)
    whole = [each for step in range(300) for each in triples(plan.step(step))]
    order = {number: [e for e in whole if e[0] == number] for number in range(3)}
    cursors = plan.cursors(250)
    for source, epoch, row in triples(plan_of([50, 7, 1], global_samples=6).step(250)):
        name = plan.sources[source].name
        assert order[source][cursors[name]] == (source, epoch, row)
        cursors[name] += 1
    assert cursors == plan.cursors(251)


@given(sizes, factors, st.integers(1, 64), st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_a_mixed_step_has_the_shares_of_the_mixture(
    sizes: list[int], factors: dict[str, float], samples: int, step: int
) -> None:
    plan = plan_of(sizes, combinations=factors, global_samples=samples)
    drawn = np.bincount(plan.step(step).source, minlength=len(sizes))
    whole = plan.cursors(step + 1)
    for source, weight, number in zip(plan.sources, plan.weights, drawn, strict=True):
        slack = 3 + weight * len(sizes)
        assert abs(number - weight * samples) <= slack + samples / 256
        ideal = weight * samples * (step + 1)
        # Beside the evenness at every moment, a weight is rounded to a share of the block.
        assert abs(whole.get(source.name, 0) - ideal) <= slack + ideal / 8


@given(st.lists(st.integers(40, 120), min_size=1, max_size=6), factors, st.integers(1, 32))
@settings(max_examples=40, deadline=None)
def test_uniform_steps_hold_one_combination_in_the_right_shares(
    sizes: list[int], factors: dict[str, float], samples: int
) -> None:
    plan = plan_of(sizes, compose="uniform", combinations=factors, global_samples=samples)
    steps = Counter[str]()
    drawn = np.zeros(len(sizes))
    for step in range(200):
        source = plan.step(step).source
        (kind,) = {plan.sources[int(number)].combination for number in source}
        steps[kind] += 1
        drawn += np.bincount(source, minlength=len(sizes))
        for each in KINDS:
            share = _share(plan, each)
            assert abs(steps[each] - share * (step + 1)) <= 1.5 + share * 1.5 + 0.01 * step
    for number, (source, weight) in enumerate(zip(plan.sources, plan.weights, strict=True)):
        # Inside its combination's steps a source is drawn by its weight.
        inside = weight / _share(plan, source.combination) * steps[source.combination] * samples
        assert abs(drawn[number] - inside) <= 3 + 0.01 * inside + len(sizes)


def _share(plan: GlobalPlan, kind: str) -> float:
    pairs = zip(plan.sources, plan.weights, strict=True)
    return sum(weight for source, weight in pairs if source.combination == kind)


def test_combinations_are_weighed() -> None:
    sources = [Source("d", "text", 60, "a"), Source("d", "image+text", 40, "b")]
    plain = GlobalPlan(sources, Mixture({"d": 1.0}, 8))
    assert plain.weights == pytest.approx([0.6, 0.4])
    weighed = GlobalPlan(sources, Mixture({"d": 1.0}, 8, combinations={"image+text": 3.0}))
    assert weighed.weights == pytest.approx([60 / 180, 120 / 180])
    gone = GlobalPlan(sources, Mixture({"d": 1.0}, 8, combinations={"image+text": 0.0}))
    assert set(gone.step(3).source.tolist()) == {0}
    with pytest.raises(DataError, match="draws from nothing"):
        GlobalPlan(sources, Mixture({"other": 1.0}, 8))


def named(plan: GlobalPlan, step: int) -> list[tuple[str, int, int]]:
    return [(plan.sources[s].name, epoch, row) for s, epoch, row in triples(plan.step(step))]


@given(sizes, compositions, st.integers(0, 6), st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_what_is_not_drawn_changes_nothing(
    sizes: list[int], compose: str, place: int, step: int
) -> None:
    plan = plan_of(sizes, compose=compose)
    sources = sources_of(sizes)
    sources.insert(min(place, len(sizes)), Source("unused", "text", 5, "u"))
    wider = GlobalPlan(sources, plan.mixture)
    assert named(wider, step) == named(plan, step)
    assert wider.fingerprint() == plan.fingerprint()


SIZES = [30, 50]
CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 1},
    "samples": {"global_samples": 9},
    "temperature": {"temperature": 1.0},
    "composition": {"compose": "uniform"},
    "block": {"shuffle": Shuffle(5, 3)},
    "window": {"shuffle": Shuffle(4, 4)},
    "combination": {"combinations": {"text": 2.0}},
    "weight": {"datasets": {"d0": 1.0, "d1": 9.0}},
}


def test_every_ingredient_changes_the_fingerprint_and_the_samples() -> None:
    plans = {name: plan_of(SIZES, **changes) for name, changes in CHANGES.items()}
    plans["size"] = GlobalPlan(sources_of([30, 51]), mixture_of(SIZES))
    plans["content"] = GlobalPlan(sources_of(SIZES, "y"), mixture_of(SIZES))
    whole = plan_of(SIZES)
    plans["begin"] = GlobalPlan(whole.sources, whole.mixture, 3)
    plans["cursors"] = GlobalPlan(whole.sources, whole.mixture, 0, {whole.sources[0].name: 4})
    prints = {plan.fingerprint() for plan in plans.values()}
    assert len(prints | {whole.fingerprint()}) == len(plans) + 1
    for name, plan in plans.items():
        first = [triples(plan.step(3 + step)) for step in range(30)]
        assert first != [triples(whole.step(3 + step)) for step in range(30)], name


def test_nothing_else_changes_the_fingerprint() -> None:
    whole = plan_of(SIZES, combinations={"text": 2.0, "image+text": 1.0}, temperature=1.0)
    facts = json.loads(json.dumps(whole.description()))
    assert fingerprint_of(facts) == whole.fingerprint()
    # Whole numbers for fractions, another order of names.
    datasets = dict(reversed(whole.mixture.datasets.items()))
    again = plan_of(
        SIZES, combinations={"image+text": 1, "text": 2}, temperature=1, datasets=datasets
    )
    for step in range(5):
        again.step(step)
    assert again.fingerprint() == whole.fingerprint()
    assert triples(again.step(7)) == triples(whole.step(7))
