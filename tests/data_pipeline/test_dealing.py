"""Dealing to any rank, over worlds of 1 to 64: exact, even, the same on every processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.synthetic import UNIMOE_7B, write_catalogue
from data_pipeline.errors import DataError
from data_pipeline.planning.binning import ascending, fill, split
from data_pipeline.planning.catalogue import Catalogue
from data_pipeline.planning.cost import CostModel
from data_pipeline.planning.dealer import Dealer
from data_pipeline.planning.dealing import Ranks, deal_balanced
from data_pipeline.planning.plan import Mixture
from data_pipeline.planning.timeline import PlanState, Timeline
from data_pipeline.planning.work import step_work
from tests.data_pipeline.deals import CAPACITY, check, steps, work_of, worlds


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """Samples of realistic lengths."""
    return write_catalogue(tmp_path_factory.mktemp("synthetic") / "catalogue", 1500)


@given(steps, worlds)
@settings(max_examples=150, deadline=None)
def test_every_sample_is_taken_once_and_fits(step: dict[str, Any], ranks: Ranks) -> None:
    work = work_of(**step)
    dealt = deal_balanced(work, ranks)
    check(dealt, work, ranks)
    again = deal_balanced(work_of(**step), ranks)
    assert (dealt.rank == again.rank).all()
    assert (dealt.micro == again.micro).all()


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=120), worlds)
@settings(max_examples=80, deadline=None)
def test_not_many_more_microbatches_than_must_be(tokens: list[int], ranks: Ranks) -> None:
    dealt = deal_balanced(work_of(tokens), ranks)
    half = sum(n > CAPACITY // 2 for n in tokens)
    least = max(-(-sum(tokens) // (ranks.count * CAPACITY)), -(-half // ranks.count))
    assert dealt.microbatches <= ranks.rounded(2 * least + 1)


@pytest.mark.parametrize("count", [1, 2, 8, 64])
@pytest.mark.parametrize(
    "tokens",
    [[], [7], [1] * 64, [400] * 64, [201] * 50, [399, 1] * 20, [134] * 3 + [133], [0, 0, 0, 5]],
)
def test_odd_steps_are_dealt(tokens: list[int], count: int) -> None:
    for encoder in (0, 10**6):
        work = work_of(tokens, encoder=encoder)
        ranks = Ranks(count, min(2, count), CAPACITY)
        dealt = deal_balanced(work, ranks)
        check(dealt, work, ranks)
        if tokens in ([], [7]):
            assert dealt.microbatches == 1


def test_a_sample_that_is_too_long_is_refused() -> None:
    with pytest.raises(DataError, match=r"401 tokens.*raise data\.tokens_per_microbatch \(now 400"):
        deal_balanced(work_of([5, 401]), Ranks(2, 1, CAPACITY))


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=150), st.integers(1, 40))
@settings(max_examples=80, deadline=None)
def test_bins_are_within_one_item_of_even(work: list[int], bins: int) -> None:
    language = np.array(work, dtype=np.int64)
    placed = fill(language, np.zeros_like(language), bins)
    load = np.bincount(placed, language, bins)
    assert load.max() - load.min() <= max(work)
    # Twice the work in all of them is the same problem.
    assert (fill(2 * language, np.zeros_like(language), bins) == placed).all()


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 4000)), max_size=80), worlds)
@settings(max_examples=60, deadline=None)
def test_a_rank_divides_its_own_samples_only(items: list[tuple[int, int]], ranks: Ranks) -> None:
    language = np.array([item[0] for item in items], dtype=np.int64)
    encoder = np.array([item[1] for item in items], dtype=np.int64)
    rank = np.arange(len(items)) * 7 % ranks.count
    micro = split(language, encoder, rank, np.zeros((ranks.count, 3), dtype=np.int64))
    assert len(micro) == len(items)
    assert ((micro >= 0) & (micro < 3)).all()
    for each in range(ranks.count):
        own = rank == each
        dealt = there_and_back((language + encoder)[own], 3)
        found, plain = (
            sum((np.bincount(bins, work[own], 3) ** 2).sum() for work in (language, encoder))
            for bins in (micro[own], dealt)
        )
        assert found <= plain


def there_and_back(work: np.ndarray, bins: int) -> np.ndarray:
    """The costliest items one to each bin, the next ones in the opposite order, and so on.

    What exchanges begin with: they make the squared loads of the language model and of the
    encoders smaller together, so that the sum of both kinds may end further apart than here.
    """
    placed = np.empty(len(work), dtype=np.int64)
    for turn, item in enumerate(sorted(range(len(work)), key=lambda item: -work[item])):
        column = turn % bins
        placed[item] = bins - 1 - column if turn // bins % 2 else column
    return placed


@given(st.lists(st.integers(-(2**40), 2**40), max_size=200))
@settings(max_examples=60, deadline=None)
def test_the_quick_order_is_the_stable_one(values: list[int]) -> None:
    array = np.array(values * 2, dtype=np.int64)
    assert ascending(array).tolist() == np.argsort(array, kind="stable").tolist()


def test_ranks_have_even_work() -> None:
    """What the benchmark measures on realistic lengths, here with a wide margin."""
    rng = np.random.Generator(np.random.PCG64(3))
    ranks = Ranks(64, 8, 4096)
    tokens = rng.integers(20, 2001, 512).tolist()
    work = work_of(tokens)
    dealt = deal_balanced(work, ranks)
    place = dealt.rank * dealt.microbatches + dealt.micro
    load = np.bincount(place, work.language, 64 * dealt.microbatches)
    load = load.reshape(8, 8, dealt.microbatches)
    assert load.max(1).sum(1).max() < 1.05 * load.sum() / 64


def test_encoder_work_is_even_too() -> None:
    """Pictures cost an encoder, text none: both kinds of work are spread, not only their sum."""
    work = work_of([100] * 512, encoder=0)
    work.encoder[:128] = 50_000
    dealt = deal_balanced(work, Ranks(32, 8, 4096))
    coding = np.bincount(dealt.rank, work.encoder, 32)
    assert coding.max() <= 1.3 * coding.mean()


def test_costs_are_whole_numbers_however_they_are_computed(catalogue: Catalogue) -> None:
    """One by one, all at once, or in another order: no processor's way of summing can tell."""
    rng = np.random.Generator(np.random.PCG64(1))
    rows = rng.permutation(len(catalogue))[:400]
    whole = step_work(catalogue, rows, UNIMOE_7B)
    assert whole.language.dtype == whole.encoder.dtype == whole.tokens.dtype == np.int64
    order = rng.permutation(len(rows))
    moved = step_work(catalogue, rows[order], UNIMOE_7B)
    single = [step_work(catalogue, rows[i : i + 1], UNIMOE_7B) for i in range(len(rows))]
    for name in ("tokens", "language", "encoder", "combination"):
        assert (getattr(whole, name)[order] == getattr(moved, name)).all()
        assert getattr(whole, name).tolist() == [int(getattr(s, name)[0]) for s in single]


def test_extreme_costs_stay_exact() -> None:
    """Sums of the costliest samples are exact in floating point and in 64 bits."""
    costs = CostModel(1e-9, 1e-3, {"image": 1e9, "video": 1e9, "speech": 1e9, "audio": 1e9})
    language = costs.language(np.full(4096, 10**6))
    encoder = costs.encoders(np.full((4096, 4), 1e6, dtype=np.float32))
    assert int(language.max()) == int(encoder.max()) == 2**28
    dealt = fill(language, encoder, 64)
    assert (np.bincount(dealt, minlength=64) == 64).all()


@pytest.mark.parametrize("deal", ["balanced", "sharded"])
def test_an_older_processor_deals_alike(catalogue: Catalogue, deal: str) -> None:
    """NumPy without its vector instructions sums and sorts in another order."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    present = [name for name in __cpu_dispatch__ if __cpu_features__.get(name)]
    command = [sys.executable, "-m", "tests.data_pipeline.deals", str(catalogue.folder), deal]
    digests = {
        subprocess.check_output(
            command, text=True, env={**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(without)}
        )
        for without in ([], present)
    }
    assert len(digests) == 1


segments = st.lists(
    st.tuples(
        st.integers(0, 12),  # steps until the run is killed
        st.integers(1, 8),  # groups of ranks that come back
        st.sampled_from([1, 2, 8]),  # ranks of a group
        st.sampled_from(["balanced", "sharded"]),
        st.integers(0, 3),  # steps that were done after the last state was saved
    ),
    min_size=1,
    max_size=6,
)


@given(segments, st.sampled_from(["mixed", "uniform"]), st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_whatever_the_worlds_and_stops_a_run_takes_the_plan(
    catalogue: Catalogue,
    segments: list[tuple[int, int, int, str, int]],
    compose: str,
    change: int,
) -> None:
    """The union over all ranks and steps is what one process that never stops would take."""
    names = {source.dataset: 1.0 for source in catalogue.sources}
    first = Mixture(names, 48, compose=compose, seed=5)
    phases = {0: first, change: Mixture(names, 64, 0.5, {"text": 2.0}, compose, seed=5)}
    plan = Timeline(catalogue.sources, {0: first, **phases})
    costs, state, done, taken = UNIMOE_7B, None, 0, dict[int, list[int]]()
    for lasted, groups, lockstep, deal, lost in segments:
        timeline = Timeline(catalogue.sources, phases, state)
        ranks = Ranks(groups * lockstep, lockstep, 4096)
        way = "balanced" if compose == "uniform" else deal
        dealer = Dealer(catalogue, timeline, costs, ranks, way)
        for step in range(done, done + lasted + lost):
            rows, dealt = dealer.step(step)
            micro = [dealt.of(rank) for rank in range(ranks.count)]
            assert {len(each) for each in micro} == {dealt.microbatches}
            mine = [int(rows[i]) for each in micro for items in each for i in items]
            # What a replay takes is what the first try took.
            assert taken.setdefault(step, sorted(mine)) == sorted(mine)
        done += lasted
        state = PlanState.from_json(json.loads(json.dumps(timeline.state(done).to_json())))
    for step, mine in taken.items():
        assert mine == sorted(catalogue.rows(plan.step(step)).tolist())
    assert set(range(done)) <= set(taken)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"linear": 1}', '{"linear": 0, "quadratic": 0, "encoder": {}}']
)
def test_damaged_costs_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "costs.json"
    costs = CostModel(2.0, 0.25, {"image": 3.0}, "a test")
    costs.save(path)
    assert CostModel.load(path) == costs
    path.write_text(text)
    with pytest.raises(DataError, match=r"calibrate"):
        CostModel.load(path)
    for wrong in (float("nan"), -1.0, float("inf")):
        with pytest.raises(DataError, match="not positive, finite"):
            CostModel(1.0, wrong)
