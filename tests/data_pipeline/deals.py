"""Steps to deal and what must hold of any dealing.

``python -m tests.data_pipeline.deals CATALOGUE DEAL`` prints a digest of some dealt steps.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from benchmarks.synthetic import UNIMOE_7B
from data_pipeline.planning.catalogue import Catalogue
from data_pipeline.planning.cost import CostModel
from data_pipeline.planning.dealer import Dealer
from data_pipeline.planning.dealing import Dealt, Ranks, StepWork
from data_pipeline.planning.plan import Mixture
from data_pipeline.planning.timeline import Timeline

CAPACITY = 400
KINDS = 4

lengths = st.one_of(
    st.lists(st.integers(1, CAPACITY), max_size=150),
    st.lists(st.sampled_from([1, 2, 133, 134, 200, 201, 399, 400]), max_size=100),
    st.builds(lambda each, number: [each] * number, st.integers(0, CAPACITY), st.integers(0, 150)),
)
steps = st.fixed_dictionaries(
    {
        "tokens": lengths,
        "seed": st.integers(0, 99),
        "kinds": st.integers(1, KINDS),
        "encoder": st.sampled_from([0, 1, 10**3, 10**5, 2**28]),
    }
)
worlds = st.builds(
    lambda lockstep, groups, multiple: Ranks(
        lockstep * max(1, groups // lockstep), lockstep, CAPACITY, multiple
    ),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 64),
    st.sampled_from([1, 1, 2, 3]),
)


def work_of(tokens: list[int], seed: int = 0, kinds: int = 1, encoder: int = 0) -> StepWork:
    """Samples of some lengths; combinations by chance, all but number 0 with encoder work."""
    rng = np.random.Generator(np.random.PCG64(seed))
    length = np.array(tokens, dtype=np.int64)
    combination = rng.integers(0, kinds, len(tokens))
    # Every second combination's samples are alike.
    by_chance = rng.integers(0, encoder + 1, len(tokens))
    coding = np.where(combination % 2, encoder, by_chance) * (combination > 0)
    return StepWork(length, CostModel(1.0, 1e-4).language(length), coding, combination)


def check(dealt: Dealt, work: StepWork, ranks: Ranks) -> None:
    """Every sample once, every rank equally many micro-batches, none too long."""
    assert dealt.microbatches % ranks.multiple == 0
    taken = []
    for rank in range(ranks.count):
        micro = dealt.of(rank)
        assert len(micro) == dealt.microbatches >= 1
        for items in micro:
            assert int(work.tokens[items].sum()) <= ranks.capacity
            assert items.tolist() == sorted(items.tolist())
            taken += items.tolist()
    assert sorted(taken) == list(range(len(work)))


def digest(folder: Path, deal: str) -> str:
    """Of who takes what in some steps of some worlds."""
    catalogue, found = Catalogue.load(folder), hashlib.sha256()
    for count in (8, 24, 64):
        mixture = Mixture({source.dataset: 1.0 for source in catalogue.sources}, 8 * count)
        timeline = Timeline(catalogue.sources, {0: mixture})
        dealer = Dealer(catalogue, timeline, UNIMOE_7B, Ranks(count, 8, 4096), deal)
        for step in range(6):
            rows, dealt = dealer.step(step)
            for column in (rows, dealt.rank, dealt.micro):
                found.update(column.astype("<i8").tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    print(digest(Path(sys.argv[1]), sys.argv[2]))
