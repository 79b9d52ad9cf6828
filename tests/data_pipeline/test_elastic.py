"""The plan under everything at once: any ranks, dealings, stops, and samples that break on the way.

What a pool would read is made up, so that hundreds of runs fit into a test; plan, dealing, loader,
quarantine and state are the real ones.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.conversation.template import Rendered
from data_pipeline.planning.catalogue import Catalogue
from data_pipeline.planning.cost import CostModel
from data_pipeline.planning.dealer import Dealer
from data_pipeline.planning.dealing import Ranks
from data_pipeline.planning.timeline import PlanState, Timeline
from data_pipeline.reading.loader import ReadStep, StepLoader
from data_pipeline.reading.quarantine import Quarantine
from data_pipeline.reading.sample import BrokenSample, Sample
from tests.data_pipeline.cases_loading import catalogue_of, mixture
from tests.workspace import build_data

STEPS, SAMPLES, CAPACITY = 9, 20, 96


class MadeUpPool:
    """Gives a sample without media for every row, or says that it is broken."""

    def __init__(self, catalogue: Catalogue, broken: dict[str, int]) -> None:
        self._catalogue = catalogue
        self._broken = broken
        self._tasks: dict[int, list[int]] = {}

    def submit(self, task: int, rows: Sequence[int]) -> None:
        assert task not in self._tasks
        self._tasks[task] = list(rows)

    def result(self, task: int) -> list[Sample | BrokenSample]:
        return [self._read(row) for row in self._tasks.pop(task)]

    def _read(self, row: int) -> Sample | BrokenSample:
        shard, facts = self._catalogue.entry(row)
        if f"{shard.dataset}/{facts.key}" in self._broken:
            return BrokenSample("broken", shard.dataset, shard.path.name, facts.key, "made up")
        tokens = int(self._catalogue.tokens[row])
        return Sample(facts.key, shard.dataset, "text", Rendered([0] * tokens, [True] * tokens))


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """The tiny world's samples."""
    place = tmp_path_factory.mktemp("world")
    build_data(place / "data" / "tiny")
    return catalogue_of(place)


def names(step: ReadStep) -> list[str]:
    return [f"{s.dataset}/{s.key}" for samples in step.microbatches for s in samples]


segments = st.lists(
    st.tuples(
        st.integers(0, STEPS),  # steps until it is stopped; 0: killed before the first
        st.integers(1, 64),  # ranks
        st.sampled_from(["balanced", "sharded"]),
        st.integers(0, 4),  # steps that are handed to workers ahead
    ),
    max_size=4,
)


@given(
    segments,
    st.integers(1, 64),
    st.sampled_from(["mixed", "uniform"]),
    st.sets(st.integers(0, 143), max_size=40),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_whatever_breaks_and_stops_the_steps_are_the_plans(
    catalogue: Catalogue,
    stops: list[tuple[int, int, str, int]],
    ranks: int,
    compose: str,
    rows: set[int],
    lost: bool,
) -> None:
    """A broken sample is lacking from the step on that first met it, and nothing else ever is."""
    entries = [catalogue.entry(row) for row in sorted(rows)]
    broken = {f"{shard.dataset}/{facts.key}": 0 for shard, facts in entries}
    plan = Timeline(catalogue.sources, {0: mixture(compose, SAMPLES)})
    with tempfile.TemporaryDirectory() as folder:
        file, state, step = Path(folder) / "quarantine.jsonl", None, 0
        for count, world, deal, prefetch in [*stops, (STEPS, ranks, "balanced", 0)]:
            if lost:  # the state alone must do
                file.unlink(missing_ok=True)
            deal = "balanced" if compose == "uniform" else deal
            timeline = Timeline(catalogue.sources, {0: mixture(compose, SAMPLES)}, state)
            quarantine = Quarantine(file)
            quarantine.restore(state.quarantine if state else [])
            dealer = Dealer(catalogue, timeline, CostModel(), Ranks(world, 1, CAPACITY), deal)
            dealer.step = lru_cache(dealer.step)  # type: ignore[method-assign]  # once for all
            loaders = [
                StepLoader(dealer, MadeUpPool(catalogue, broken), quarantine, rank, STEPS, prefetch)
                for rank in range(world)
            ]
            end = min(STEPS, step + count)
            for number in range(step, end):
                read = [loader.read(number) for loader in loaders]
                for each in read:
                    quarantine.add(each.broken)
                check(catalogue, plan, number, read, broken, quarantine)
            if end > step:
                saved = timeline.state(end, quarantine.state()).to_json()
                state, step = PlanState.from_json(json.loads(json.dumps(saved))), end
    assert step == STEPS


def check(
    catalogue: Catalogue,
    plan: Timeline,
    number: int,
    read: list[ReadStep],
    broken: dict[str, int],
    quarantine: Quarantine,
) -> None:
    """One step of all ranks against the plan."""
    drawn = [catalogue.entry(int(row)) for row in catalogue.rows(plan.step(number))]
    planned = sorted(f"{shard.dataset}/{facts.key}" for shard, facts in drawn)
    assert sum(each.places for each in read) == len(planned) == SAMPLES
    assert len({len(each.microbatches) for each in read}) == 1
    assert sorted(n for each in read for n in names(each)) == [
        n for n in planned if n not in broken
    ]
    for name in {n for n in planned if n in broken}:
        dataset, key = name.split("/")
        assert quarantine.holds(dataset, key, number)
    for each in read:
        for samples in each.without(quarantine):
            assert sum(len(s.tokens.ids) for s in samples) <= CAPACITY
