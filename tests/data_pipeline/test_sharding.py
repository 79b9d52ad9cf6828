"""Ranks that own combinations: nothing foreign, nothing lost, owners that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.synthetic import SHARES, UNIMOE_7B, write_catalogue
from data_pipeline.errors import DataError
from data_pipeline.planning.dealer import Dealer
from data_pipeline.planning.dealing import Dealt, Ranks, StepWork, deal_balanced
from data_pipeline.planning.plan import Mixture
from data_pipeline.planning.sharding import ROAMING, Demand, deal_sharded, owners
from data_pipeline.planning.timeline import Timeline
from tests.data_pipeline.deals import CAPACITY, KINDS, check, steps, work_of, worlds

demands = st.lists(
    st.builds(
        Demand,
        st.one_of(st.just(1e-12), st.floats(0.01, 10)),
        st.one_of(st.just(0.0), st.floats(0, 1)),
        st.booleans(),
    ),
    min_size=KINDS,
    max_size=KINDS,
)
lockstep = st.sampled_from([1, 2, 8])


def check_owned(dealt: Dealt, work: StepWork, owner: np.ndarray) -> None:
    """A rank that owns a combination gets only that one."""
    owned = owner[dealt.rank]
    assert ((owned == ROAMING) | (owned == work.combination)).all()


@given(steps, worlds, demands)
@settings(max_examples=150, deadline=None)
def test_ranks_that_own_a_combination_get_no_other(
    step: dict[str, Any], ranks: Ranks, demands: list[Demand]
) -> None:
    owner = owners(demands, ranks.count, ranks.lockstep)
    work = work_of(**step)
    dealt = deal_sharded(work, ranks, owner)
    check(dealt, work, ranks)
    check_owned(dealt, work, owner)
    again = deal_sharded(work_of(**step), ranks, owner)
    assert (dealt.rank == again.rank).all()
    assert (dealt.micro == again.micro).all()


@given(steps, worlds, st.lists(st.integers(ROAMING, KINDS - 1), min_size=1, max_size=64))
@settings(max_examples=80, deadline=None)
def test_any_division_of_the_ranks_will_do(
    step: dict[str, Any], ranks: Ranks, division: list[int]
) -> None:
    """Owners need not fit the step, as long as somebody roams."""
    owner = np.array((division * ranks.count)[: ranks.count], dtype=np.int64)
    owner[len(division) % ranks.count] = ROAMING
    work = work_of(**step)
    dealt = deal_sharded(work, ranks, owner)
    check(dealt, work, ranks)
    check_owned(dealt, work, owner)


@pytest.mark.parametrize("count", [1, 2, 8, 64])
@pytest.mark.parametrize(
    "tokens", [[], [7], [1] * 64, [400] * 64, [201] * 50, [399, 1] * 20, [134] * 3 + [133]]
)
def test_odd_steps_are_dealt(tokens: list[int], count: int) -> None:
    owner = owners([Demand(1.0, 0.1, True)] * KINDS, count, min(2, count))
    for encoder in (0, 10**6):
        work = work_of(tokens, kinds=KINDS, encoder=encoder)
        ranks = Ranks(count, min(2, count), CAPACITY)
        dealt = deal_sharded(work, ranks, owner)
        check(dealt, work, ranks)
        check_owned(dealt, work, owner)


def test_short_and_costly_neighbours_do_not_draw_long_ones_into_one_microbatch() -> None:
    """A video of few tokens outweighs all text of the rank beside it, which must still fit."""
    tokens = np.array([10] * 4 + [300] * 40, dtype=np.int64)
    kind = np.array([1] * 4 + [0] * 40)
    work = StepWork(tokens, tokens * 256, np.where(kind, 10**8, 0), kind)
    owner = np.array([1, 1, 1, 1, 0, 0, 0, 0])
    ranks = Ranks(8, 8, CAPACITY)
    check(deal_sharded(work, ranks, owner), work, ranks)


def test_a_sample_that_is_too_long_is_refused() -> None:
    with pytest.raises(DataError, match=r"401 tokens.*raise data\.tokens_per_microbatch \(now 400"):
        deal_sharded(work_of([5, 401]), Ranks(2, 1, CAPACITY), np.full(2, ROAMING))


@given(demands, st.integers(1, 64), lockstep)
@settings(max_examples=150, deadline=None)
def test_ranks_are_given_by_demand(demands: list[Demand], ranks: int, lockstep: int) -> None:
    owner = owners(demands, ranks, lockstep)
    assert len(owner) == ranks
    assert set(owner.tolist()) <= {ROAMING, *range(KINDS)}
    total = sum(demand.work for demand in demands)
    without = 0
    for number, demand in enumerate(demands):
        has = int((owner == number).sum())
        assert has <= demand.work * ranks / total + 1e-6
        without += not has
    # Whoever owns no rank is taken by those that roam.
    assert not without or (owner == ROAMING).any()


@given(demands, demands, st.integers(1, 64), lockstep)
@settings(max_examples=100, deadline=None)
def test_owners_change_as_little_as_the_numbers_allow(
    before: list[Demand], after: list[Demand], ranks: int, lockstep: int
) -> None:
    first = owners(before, ranks, lockstep)
    assert (owners(before, ranks, lockstep, first) == first).all()
    second = owners(after, ranks, lockstep, first)
    fresh = owners(after, ranks, lockstep)
    for kind in range(KINDS):
        had, has = int((first == kind).sum()), int((second == kind).sum())
        assert has == int((fresh == kind).sum())
        assert int(((first == kind) & (second == kind)).sum()) == min(had, has)


@pytest.mark.parametrize("count", [8, 16, 64])
def test_a_run_keeps_its_owners_when_the_mixture_changes(tmp_path: Any, count: int) -> None:
    catalogue = write_catalogue(tmp_path / "catalogue", 3000)
    names = {source.dataset: 1.0 for source in catalogue.sources}
    phases = {
        0: Mixture(names, 8 * count),
        3: Mixture(names, 8 * count, combinations={"text": 1.5}),
        6: Mixture(names, 8 * count, combinations={"text": 1.5}, temperature=0.9),
    }
    ranks = Ranks(count, 8, 4096)
    dealer = Dealer(catalogue, Timeline(catalogue.sources, phases), UNIMOE_7B, ranks, "sharded")
    owner = {step: dealer.owners(step) for step in (0, 2, 3, 8)}
    assert (owner[0] == owner[2]).all()
    for one, other in ((0, 3), (3, 8)):
        for kind in range(len(SHARES)):
            stay = (owner[one] == kind) & (owner[other] == kind)
            fewer = min((owner[one] == kind).sum(), (owner[other] == kind).sum())
            assert stay.sum() == fewer
    # A process that starts later finds the same.
    state = dealer.timeline.state(7)
    later = Timeline(catalogue.sources, phases, state)
    again = Dealer(catalogue, later, UNIMOE_7B, ranks, "sharded")
    assert (again.owners(8) == owner[8]).all()
    for rank in range(count):
        allowed = set(again.combinations_of(rank, 8))
        for step in (7, 8):
            rows, dealt = again.step(step)
            mine = catalogue.source_of(rows[dealt.rank == rank])
            assert {catalogue.sources[int(s)].combination for s in mine} <= allowed


def test_sharded_is_nearly_as_even_as_balanced_and_few_roam(tmp_path: Any) -> None:
    """What the benchmark measures, with a wide margin."""
    catalogue = write_catalogue(tmp_path / "catalogue", 20_000)
    mixture = Mixture({source.dataset: 1.0 for source in catalogue.sources}, 512)
    ranks = Ranks(64, 8, 4096)
    timeline = Timeline(catalogue.sources, {0: mixture})
    dealer = Dealer(catalogue, timeline, UNIMOE_7B, ranks, "sharded")
    owner, roamed, waited = dealer.owners(0), 0, []
    for step in range(6):
        rows, dealt = dealer.step(step)
        work = _work(dealer, rows)
        for each in (dealt, deal_balanced(work, ranks)):
            place = each.rank * each.microbatches + each.micro
            load = np.bincount(place, work.total, 64 * each.microbatches)
            slowest = load.reshape(8, 8, each.microbatches).max(1).sum(1).mean()
            waited.append(slowest / (load.sum() / 64))
        roamed += int((owner[dealt.rank] == ROAMING).sum())
    assert roamed < 0.15 * 6 * 512
    assert np.mean(waited[::2]) < np.mean(waited[1::2]) + 0.05


def _work(dealer: Dealer, rows: np.ndarray) -> StepWork:
    from data_pipeline.planning.work import step_work

    return step_work(dealer.catalogue, rows, dealer.costs)
