"""Plans after one another: restarts, declared changes, and refusals that say what differs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.planning.permutation import Shuffle
from data_pipeline.planning.plan import ORDER, Mixture, Source, fingerprint_of
from data_pipeline.planning.timeline import PlanState, Timeline
from tests.data_pipeline.plans import (
    compositions,
    factors,
    mixture_of,
    sizes,
    sources_of,
    triples,
)

SIZES = [30, 50]
Step = list[tuple[int, int, int]]


def through_json(state: PlanState) -> PlanState:
    return PlanState.from_json(json.loads(json.dumps(state.to_json())))


def drawn(timeline: Timeline, steps: range) -> list[Step]:
    return [triples(timeline.step(step)) for step in steps]


def resumed(state: PlanState, phases: dict[int, Mixture], sizes: list[int] = SIZES) -> Timeline:
    return Timeline(sources_of(sizes), phases, through_json(state))


def with_order(state: PlanState, order: int) -> PlanState:
    """A state that a version with other rules has written."""
    description = {**state.description, "order": order}
    return replace(state, description=description, fingerprint=fingerprint_of(description))


mixtures = st.builds(
    dict,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    compose=compositions,
    global_samples=st.integers(1, 20),
    combinations=factors,
)
runs = st.builds(
    lambda first, later: {0: first, **later},
    mixtures,
    st.dictionaries(st.integers(1, 30), mixtures, max_size=3),
)


@given(sizes, runs, st.lists(st.integers(0, 35), max_size=4))
@settings(max_examples=100, deadline=None)
def test_stopped_and_resumed_anywhere_the_samples_are_the_same(
    sizes: list[int], run: dict[int, dict[str, Any]], stops: list[int]
) -> None:
    phases = {step: mixture_of(sizes, **facts) for step, facts in run.items()}
    whole = Timeline(sources_of(sizes), phases)
    expected = drawn(whole, range(40))
    # Each process gets as far as the next stop; some stop before they did anything.
    timeline, done, found = Timeline(sources_of(sizes), phases), 0, list[Step]()
    for stop in sorted(stops):
        found += drawn(timeline, range(done, stop))
        state, done = timeline.state(stop), stop
        assert state == whole.state(stop)
        timeline = resumed(state, phases, sizes)
        assert timeline.state(stop) == state
    assert found + drawn(timeline, range(done, 40)) == expected


@given(sizes, mixtures, mixtures, st.integers(1, 25), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_a_change_declared_at_a_stop_is_as_one_declared_from_the_start(
    sizes: list[int], one: dict[str, Any], other: dict[str, Any], change: int, more: int
) -> None:
    first, second = mixture_of(sizes, **one), mixture_of(sizes, **other)
    late = Timeline(sources_of(sizes), {0: first}).state(change)
    phases = {0: first, change: second}
    expected = Timeline(sources_of(sizes), phases)
    timeline = resumed(late, phases, sizes)
    assert timeline.state(change) == expected.state(change) == late
    steps = range(change, change + 15)
    assert drawn(timeline, steps) == drawn(expected, steps)
    # And once more, from a state of the second plan.
    state = timeline.state(change + more)
    again = range(change + more, change + 20)
    assert drawn(resumed(state, phases, sizes), again) == drawn(expected, again)


@given(sizes, runs)
@settings(max_examples=60, deadline=None)
def test_changes_of_the_plan_repeat_and_lose_no_sample(
    sizes: list[int], run: dict[int, dict[str, Any]]
) -> None:
    phases = {step: mixture_of(sizes, **facts) for step, facts in run.items()}
    timeline = Timeline(sources_of(sizes), phases)
    every = [each for step in drawn(timeline, range(40)) for each in step]
    assert len(set(every)) == len(every)
    counted = Counter[int]()
    for source, epoch, _ in every:
        assert epoch == counted[source] // sizes[source]
        counted[source] += 1
    names = [source.name for source in timeline.sources]
    assert timeline.state(40).cursors == {names[s]: n for s, n in counted.items()}


def test_the_state_is_small_and_knows_no_ranks() -> None:
    many = [100 + i for i in range(20)]
    text = json.dumps(Timeline(sources_of(many), {0: mixture_of(many)}).state(10**6).to_json())
    assert len(text) < 5000
    assert "rank" not in text
    assert "worker" not in text


def test_new_data_begin_their_first_epoch_and_the_old_go_on() -> None:
    """Declared: a source of other content is another source."""
    first, second = mixture_of([30]), mixture_of([30, 12])
    state = Timeline(sources_of([30]), {0: first}).state(5)
    sources = [*sources_of([30]), Source("d1", "image+text", 12, "new")]
    timeline = Timeline(sources, {0: first, 5: second}, through_json(state))
    after = [each for step in drawn(timeline, range(5, 12)) for each in step]
    old = [(epoch, row) for source, epoch, row in after if source == 0]
    assert old[0][0] == 1  # 40 of 30 were drawn
    new = [epoch for source, epoch, _ in after if source == 1]
    assert new == [place // 12 for place in range(len(new))]
    # A source that is not drawn for a while takes up its cursor again.
    gone = Timeline(sources, {0: first, 5: second, 8: first, 10: second})
    cursors = gone.state(8).cursors
    assert gone.state(10).cursors[sources[1].name] == cursors[sources[1].name]


DIFFERENCES = {
    "samples": ({"global_samples": 4}, "global_samples was 8, now 4"),
    "temperature": ({"temperature": 1.0}, "temperature was 0.5, now 1.0"),
    "composition": ({"compose": "uniform"}, "compose was mixed, now uniform"),
    "weights": ({"datasets": {"d0": 1.0, "d1": 2.0}}, "data.datasets.d1 was 1.33333, now 2"),
    "gone": ({"datasets": {"d0": 1.0}}, "d1 is no longer in data.datasets"),
    "combination": ({"combinations": {"text": 2.0}}, "text is new in data.combinations"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_another_plan_is_refused_with_the_difference(name: str) -> None:
    changes, words = DIFFERENCES[name]
    first, other = mixture_of(SIZES), mixture_of(SIZES, **changes)
    state = Timeline(sources_of(SIZES), {0: first}).state(6)
    with pytest.raises(DataError) as refused:
        resumed(state, {0: other})
    assert words in str(refused.value)
    assert "changed at step 6" in str(refused.value)
    assert "step: 6" in str(refused.value)
    assert len(resumed(state, {0: first, 6: other}).step(6))
    # At another step it was not so, or is not yet.
    with pytest.raises(DataError, match="the plan began at step 0, now at 4"):
        resumed(state, {0: first, 4: other})
    assert drawn(resumed(state, {0: first, 9: other}), range(6, 12)) == drawn(
        Timeline(sources_of(SIZES), {0: first, 9: other}), range(6, 12)
    )


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (sources_of([30, 52], "y"), r"d1 \(image\+text\) has other content: 50 samples were x1"),
        (
            [*sources_of(SIZES), Source("d0", "speech+text", 4, "z")],
            r"d0 \(speech\+text\) is newly",
        ),
        (sources_of(SIZES)[:1], r"d1 \(image\+text\) is no longer drawn"),
        (sources_of(SIZES)[::-1], r"the sources came in the order d0 \(text\), d1 \(image"),
    ],
)
def test_other_data_are_refused_with_the_difference(sources: list[Source], words: str) -> None:
    state = Timeline(sources_of(SIZES), {0: mixture_of(SIZES)}).state(6)
    with pytest.raises(DataError, match=words):
        Timeline(sources, {0: mixture_of(SIZES)}, state)
    changed = {0: mixture_of(SIZES), 6: mixture_of(SIZES)}
    assert len(Timeline(sources, changed, state).step(6))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"seed": 1}, "seed was 0, now 1"), ({"shuffle": Shuffle(4, 9)}, "shuffle was .* now .*9")],
)
def test_an_epoch_under_way_keeps_its_order(changes: dict[str, Any], words: str) -> None:
    """In another order some samples would come twice and others not at all."""
    first, other = mixture_of(SIZES), mixture_of(SIZES, **changes)
    state = Timeline(sources_of(SIZES), {0: first}).state(6)
    for phases in ({0: other}, {0: other, 6: other}, {0: other, 4: other}):
        with pytest.raises(DataError, match=f"cannot go on at step 6: {words}"):
            resumed(state, phases)
    with pytest.raises(DataError, match=r"hold for a whole run"):
        Timeline(sources_of(SIZES), {0: first, 6: other})
    older = with_order(Timeline(sources_of(SIZES), {0: first}).state(6), ORDER - 1)
    with pytest.raises(DataError, match=f"rules of the order were version {ORDER - 1}, now"):
        resumed(older, {0: first})
    # Nothing was drawn yet: nothing can come twice.
    begun = Timeline(sources_of(SIZES), {0: first}).state(0)
    assert resumed(begun, {0: other}).state(1) == Timeline(sources_of(SIZES), {0: other}).state(1)


def test_steps_before_a_restart_are_not_asked_for() -> None:
    phases = {0: mixture_of(SIZES), 6: mixture_of(SIZES, temperature=1.0)}
    timeline = resumed(Timeline(sources_of(SIZES), phases).state(9), phases)
    with pytest.raises(DataError, match="step 5 lies before"):
        timeline.step(5)
    with pytest.raises(DataError, match="begins at step 0"):
        Timeline(sources_of(SIZES), {3: mixture_of(SIZES)})


@pytest.mark.parametrize(
    "damage",
    [
        {"step": "six"},
        {"step": -1},
        {"step": True},
        {"cursors": []},
        {"cursors": {"d0/text/x0": "4"}},
        {"cursors": {"d0/text/x0": -4}},
        {"fingerprint": None},
        {"fingerprint": "0" * 64},
        {"description": {"origin": {}}},
        {"quarantine": None},
        {"more": 1},
    ],
)
def test_a_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    record = Timeline(sources_of([5]), {0: mixture_of([5])}).state(2).to_json()
    assert PlanState.from_json(json.loads(json.dumps(record))).to_json() == record
    with pytest.raises(DataError, match=r"state.*earlier checkpoint"):
        PlanState.from_json({**record, **damage})


@pytest.mark.parametrize("other", [[], None, "state", {}, {"step": 3, "fingerprint": "1"}])
def test_what_is_no_state_is_refused(other: Any) -> None:
    with pytest.raises(DataError, match="not the state of a data plan"):
        PlanState.from_json(other)
