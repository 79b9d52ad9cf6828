"""Who takes which of a step's samples, in which micro-batch: any rank takes anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.planning.binning import ascending, fill


@dataclass(frozen=True)
class StepWork:
    """What dealing knows of a step's samples, in the plan's order; every array is ``[samples]``.

    Attributes:
        tokens: length, language-model tokens.
        language: work in the language model (``CostModel.language``).
        encoder: work in the encoders (``CostModel.encoders``).
        combination: number of the combination.
    """

    tokens: np.ndarray
    language: np.ndarray
    encoder: np.ndarray
    combination: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def total(self) -> np.ndarray:
        """All work of each sample."""
        return self.language + self.encoder

    def of(self, items: np.ndarray) -> StepWork:
        """Some of the samples."""
        return StepWork(
            self.tokens[items], self.language[items], self.encoder[items], self.combination[items]
        )


@dataclass(frozen=True)
class Ranks:
    """The data-parallel ranks that a step is dealt to.

    Attributes:
        count: how many.
        lockstep: how many neighbours wait for each other in every layer (expert parallelism).
        capacity: most tokens of a micro-batch.
        multiple: of which the number of micro-batches is one (interleaved pipeline stages).
    """

    count: int
    lockstep: int
    capacity: int
    multiple: int = 1

    def rounded(self, microbatches: int) -> int:
        """The next possible number of micro-batches."""
        return -(-microbatches // self.multiple) * self.multiple


@dataclass(frozen=True)
class Dealt:
    """The rank and micro-batch of every sample of a step.

    Attributes:
        rank: ``[samples]`` int64.
        micro: ``[samples]`` int64.
        microbatches: on every rank; those without a sample are run empty.
    """

    rank: np.ndarray
    micro: np.ndarray
    microbatches: int

    def of(self, rank: int) -> list[np.ndarray]:
        """Samples of each micro-batch of a rank, in the plan's order."""
        mine = np.flatnonzero(self.rank == rank)
        return [mine[self.micro[mine] == number] for number in range(self.microbatches)]


def deal_balanced(work: StepWork, ranks: Ranks) -> Dealt:
    """Deal a step's samples so that all ranks have equal work at any time.

    The samples fill as many bins as there are micro-batches on all ranks; bins of like work are
    then given to ranks that wait for each other.

    Raises:
        DataError: a sample alone is longer than a micro-batch.
    """
    for microbatches in numbers_of_microbatches(work.tokens, ranks):
        placed = fill(work.language, work.encoder, ranks.count * microbatches)
        rank, micro = _arrange(work, placed, ranks, microbatches)
        dealt = Dealt(rank[placed], micro[placed], microbatches)
        if fits(work, dealt, ranks):
            return dealt
    return packed(work, dealt, ranks)


def fits(work: StepWork, dealt: Dealt, ranks: Ranks) -> bool:
    """Whether no micro-batch is longer than its capacity."""
    bins = dealt.rank * dealt.microbatches + dealt.micro
    filled = np.bincount(bins, work.tokens, ranks.count * dealt.microbatches)
    return bool(filled.max(initial=0) <= ranks.capacity)


def packed(work: StepWork, dealt: Dealt, ranks: Ranks) -> Dealt:
    """The samples of every rank packed anew, first fit decreasing, into as many as that takes.

    For steps whose samples nearly fill micro-batches by themselves, where evenness finds no way.
    """
    micro = np.empty_like(dealt.micro)
    most = 1
    for rank in range(ranks.count):
        items = np.flatnonzero(dealt.rank == rank)
        room: list[int] = []
        for item in items[np.argsort(-work.tokens[items], kind="stable")]:
            tokens = int(work.tokens[item])
            place = next((n for n, left in enumerate(room) if tokens <= left), len(room))
            if place == len(room):
                room.append(ranks.capacity)
            room[place] -= tokens
            micro[item] = place
        most = max(most, len(room))
    return Dealt(dealt.rank, micro, ranks.rounded(most))


def numbers_of_microbatches(tokens: np.ndarray, ranks: Ranks) -> Iterator[int]:
    """Numbers of micro-batches to try, from the fewest that could do to one a sample.

    Raises:
        DataError: a sample alone is longer than a micro-batch.
    """
    longest = int(tokens.max(initial=0))
    if longest > ranks.capacity:
        raise DataError(
            f"A sample of {longest} tokens does not fit into a micro-batch: raise "
            f"data.tokens_per_microbatch (now {ranks.capacity}) to at least {longest}."
        )
    total, alone = int(tokens.sum()), int((tokens > ranks.capacity // 2).sum())
    number = max(1, -(-total // (ranks.count * ranks.capacity)), -(-alone // ranks.count))
    enough = max(number, -(-len(tokens) // ranks.count))  # one sample a bin
    number, enough = ranks.rounded(number), ranks.rounded(enough)
    while number < enough:
        yield number
        number = ranks.rounded(number + max(1, number // 8))
    yield enough


def _arrange(
    work: StepWork, placed: np.ndarray, ranks: Ranks, microbatches: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rank and micro-batch of every bin.

    Ranks in lockstep wait for their slowest in every micro-batch: they get neighbours in the
    order of bins by work. Of those, the rank with the least encoder work so far gets the most.
    """
    count = ranks.count * microbatches
    load = _sums(placed, work.language, count)
    coding = _sums(placed, work.encoder, count)
    group = ranks.lockstep if ranks.count % ranks.lockstep == 0 else 1
    groups = ranks.count // group
    rows = ascending(-(load + coding)).reshape(microbatches, groups, group)
    rank, micro = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    waited = np.zeros(groups, dtype=np.int64)
    encoded = np.zeros((groups, group), dtype=np.int64)
    for number, by_work in enumerate(rows):
        # The costliest row to the group that has waited the least.
        mine = np.empty_like(by_work)
        mine[ascending(waited)] = by_work
        heaviest = np.take_along_axis(mine, np.argsort(-coding[mine], axis=1, kind="stable"), 1)
        place = np.argsort(encoded, axis=1, kind="stable")
        rank[heaviest] = place + np.arange(groups)[:, None] * group
        micro[heaviest] = number
        waited += (load + coding)[mine].max(1)
        np.put_along_axis(
            encoded, place, np.take_along_axis(encoded, place, 1) + coding[heaviest], 1
        )
    return rank, micro


def _sums(placed: np.ndarray, work: np.ndarray, bins: int) -> np.ndarray:
    """Work in each bin, ``[bins]`` int64; exact, as float64 is below 2**53."""
    return np.bincount(placed, work, bins).astype(np.int64)
