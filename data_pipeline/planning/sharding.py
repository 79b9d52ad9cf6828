"""Who takes which of a step's samples when ranks own combinations.

A rank that owns a combination reads nothing else and loads only the encoders it needs. What a
combination has too much of in a step, and combinations too small for a rank of their own, go to a
few roaming ranks, which take anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.planning.binning import ascending, fill, split
from data_pipeline.planning.dealing import (
    Dealt,
    Ranks,
    StepWork,
    fits,
    numbers_of_microbatches,
    packed,
)

ROAMING = -1
_DEVIATIONS = 2.0
"""Standard deviations of a combination's work in a step that its ranks leave to roaming ones.

Ranks whose combination has little work in a step idle, since they may read nothing else. More
would idle less, and roam more: this keeps idling below half a percent."""


@dataclass(frozen=True)
class Demand:
    """What a combination asks for in an average step.

    Attributes:
        work: of all its samples.
        deviation: standard deviation of that from step to step.
        alike: whether its samples differ little, see ``alike``.
    """

    work: float
    deviation: float
    alike: bool


def alike(mean: int, distance: int) -> bool:
    """Whether samples differ so little that ranks are filled evenly only with equally many.

    Args:
        mean: mean work of the samples.
        distance: mean distance from that.
    """
    return distance * 10 < mean


def owners(
    demands: list[Demand], ranks: int, lockstep: int, before: np.ndarray | None = None
) -> np.ndarray:
    """The combination that each rank owns, or ``ROAMING``.

    Args:
        demands: of every combination, by its number.
        ranks: number of data-parallel ranks.
        lockstep: how many neighbours wait for each other in every layer.
        before: the owners so far: ranks keep what they own as far as the numbers allow, so that
            few have to load another encoder when the mixture changes.

    Returns:
        ``[ranks]`` int64.
    """
    total = sum(demand.work for demand in demands)
    wanted = [
        int(max(0.0, demand.work - _DEVIATIONS * demand.deviation) * ranks / total + 1e-9)
        for demand in demands
    ]
    if sum(wanted) == ranks and any(
        d.work > 0 and not n for d, n in zip(demands, wanted, strict=True)
    ):
        wanted[wanted.index(max(wanted))] -= 1  # somebody must roam
    if before is None:
        return _laid_out(wanted, [demand.alike for demand in demands], ranks, lockstep)
    result = np.full(ranks, ROAMING, dtype=np.int64)
    for combination, count in enumerate(wanted):
        result[np.flatnonzero(before == combination)[:count]] = combination
    for combination, count in enumerate(wanted):
        lacking = count - int((result == combination).sum())
        # Ranks that roamed before load one encoder less than they have; others change theirs.
        free = np.flatnonzero(result == ROAMING)
        free = free[np.argsort(before[free] != ROAMING, kind="stable")]
        result[free[:lacking]] = combination
    return result


def _laid_out(wanted: list[int], alike: list[bool], ranks: int, lockstep: int) -> np.ndarray:
    """Combinations whose samples are alike begin a group of ranks in lockstep each.

    Their ranks cannot follow another's division into micro-batches; ranks of the others, which
    can, fill such a group up.
    """
    kinds = range(len(wanted))
    others = sorted((k for k in kinds if not alike[k]), key=lambda k: -wanted[k])
    flexible = [k for k in others for _ in range(wanted[k])]
    flexible += [ROAMING] * (ranks - sum(wanted))
    placed: list[int] = []
    for kind in (k for k in kinds if alike[k]):
        short = -len(placed) % lockstep
        placed += flexible[:short] + [kind] * wanted[kind]
        flexible = flexible[short:]
    return np.array(placed + flexible, dtype=np.int64)


def deal_sharded(work: StepWork, ranks: Ranks, owner: np.ndarray) -> Dealt:
    """Deal every sample to a rank that owns its combination or to a roaming one.

    Args:
        owner: combination of each rank (``owners``).

    Raises:
        DataError: a sample alone is longer than a micro-batch.
    """
    kinds = _kinds(work, owner, ranks.lockstep)
    taker = _takers(work, owner, kinds)
    for microbatches in numbers_of_microbatches(work.tokens, ranks):
        dealt = _fill_owned(work, taker, owner, ranks, kinds, microbatches)
        if fits(work, dealt, ranks):
            return dealt
    return packed(work, dealt, ranks)


@dataclass(frozen=True)
class _Kind:
    """A combination in one step.

    Attributes:
        items: its samples.
        work: of each.
        ranks: number of ranks that own it.
        alike: whether its samples are so much alike that ranks in lockstep divide their work
            alike only with equally many of them.
        lockstep: ranks that wait for each other.
    """

    items: np.ndarray
    work: np.ndarray
    ranks: int
    alike: bool
    lockstep: int

    def kept(self, level: int) -> int:
        """Work that its ranks keep at ``level`` work a rank."""
        total, count = int(self.work.sum()), len(self.items)
        if not self.alike or not self.ranks:
            return min(total, self.ranks * level)
        # Whole groups, the last and smaller one among them, have one sample more than the others.
        number = min(count, self.ranks * level * count // max(1, total))
        each, more = divmod(number, self.ranks)
        tail = self.ranks % self.lockstep
        whole = more // self.lockstep * self.lockstep
        with_tail = (more - tail) // self.lockstep * self.lockstep + tail
        number = each * self.ranks + max(whole, with_tail if more >= tail else 0)
        return total * number // max(1, count)


def _kinds(work: StepWork, owner: np.ndarray, lockstep: int) -> list[_Kind]:
    total, kinds = work.total, []
    number = int(max(work.combination.max(initial=-1), owner.max(initial=-1))) + 1
    for combination in range(number):
        items = np.flatnonzero(work.combination == combination)
        each = total[items]
        mean = int(each.sum()) // max(1, len(items))
        distance = int(np.abs(each - mean).sum()) // max(1, len(items))
        owned = int((owner == combination).sum())
        kinds.append(_Kind(items, each, owned, alike(mean, distance), lockstep))
    return kinds


def _takers(work: StepWork, owner: np.ndarray, kinds: list[_Kind]) -> np.ndarray:
    """Combination whose ranks take each sample, or ``ROAMING``, ``[samples]``."""
    taker, roaming = work.combination.copy(), int((owner == ROAMING).sum())
    if not roaming:
        return taker
    level = _level(kinds, roaming)
    for kind in kinds:
        if kind.ranks:
            chosen = _choose(kind, level)
            taker[kind.items[chosen]] = ROAMING
        else:
            taker[kind.items] = ROAMING
    return taker


def _level(kinds: list[_Kind], roaming: int) -> int:
    """The least work per rank such that roaming ranks can take all that others do not keep."""
    total = sum(int(kind.work.sum()) for kind in kinds)
    low, high = 0, total + 1
    while low < high:
        middle = (low + high) // 2
        left = total - sum(kind.kept(middle) for kind in kinds)
        if left <= roaming * middle:
            high = middle
        else:
            low = middle + 1
    return low


def _walk(work: np.ndarray, whole: bool = False) -> np.ndarray:
    """Samples in an order of which any first part has all sizes; mostly not the smallest third.

    All sizes, so that roaming ranks can be filled evenly; not the smallest, since the fewer
    samples roam the better.
    """
    order = ascending(-work)
    if not whole:
        order = order[: -(-len(order) * 2 // 3)]
    if not len(order):
        return order
    stride = max(1, round(len(order) * 0.6180339887))
    while np.gcd(stride, len(order)) != 1:
        stride += 1
    return order[np.arange(len(order)) * stride % len(order)]


def _choose(kind: _Kind, level: int) -> np.ndarray:
    """Samples that its ranks do not keep, by their place among ``kind.items``."""
    walk, total = _walk(kind.work), int(kind.work.sum())
    surplus = total - kind.kept(level)
    if kind.alike:
        return walk[: (surplus * len(kind.items) + total // 2) // max(1, total)]
    reached = np.cumsum(kind.work[walk])
    count = int(np.searchsorted(reached, surplus, side="right"))
    # The next one is taken if that comes nearer to what is wanted.
    if count < len(walk):
        short = surplus - (int(reached[count - 1]) if count else 0)
        count += 2 * short > int(kind.work[walk[count]])
    return walk[:count]


def _fill_owned(
    work: StepWork,
    taker: np.ndarray,
    owner: np.ndarray,
    ranks: Ranks,
    kinds: list[_Kind],
    microbatches: int,
) -> Dealt:
    """Fill the micro-batches of every kind of rank with its samples.

    Kinds whose samples are alike come first: nine of them in two micro-batches are five and four.
    The others then follow that profile wherever they wait for such a rank.
    """
    dealt = Dealt(np.zeros_like(taker), np.zeros_like(taker), microbatches)
    profile = np.zeros((ranks.count, microbatches), dtype=np.int64)
    present = [int(kind) for kind in np.unique(taker)]
    for kind in sorted(present, key=lambda k: (k == ROAMING or not kinds[k].alike, k)):
        same = kind != ROAMING and kinds[kind].alike
        items, takers = np.flatnonzero(taker == kind), np.flatnonzero(owner == kind)
        follows = profile[takers].any(1) & (not same)
        for mine, part in _shared_out(work.total, items, takers, follows):
            some = work.of(part)
            if not same and profile[mine].any():
                rank = fill(some.language, some.encoder, len(mine))
                micro = split(some.language, some.encoder, rank, -profile[mine])
            elif same:
                rank = fill(some.language, some.encoder, len(mine))
                even = np.zeros((len(mine), microbatches), dtype=np.int64)
                micro = split(some.language, some.encoder, rank, even)
                rank, micro = _most_first(some.total, rank, micro, ranks.lockstep)
            else:
                rank, micro = _bins_first(some, len(mine), microbatches)
            dealt.rank[part], dealt.micro[part] = mine[rank], micro
        if same:
            _note_profile(profile, work.total[items], dealt.rank[items], dealt.micro[items], ranks)
    return dealt


def _shared_out(
    total: np.ndarray, items: np.ndarray, takers: np.ndarray, follows: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ranks that follow a profile and those that do not, each with its share of the samples."""
    if follows.all() or not follows.any():
        return [(takers, items)]
    walk = items[_walk(total[items], whole=True)]
    reached = np.cumsum(total[walk])
    share = int(reached[-1]) * int(follows.sum()) // len(takers)
    count = int(np.searchsorted(reached, share, side="right"))
    return [(takers[follows], np.sort(walk[:count])), (takers[~follows], np.sort(walk[count:]))]


def _bins_first(part: StepWork, ranks: int, microbatches: int) -> tuple[np.ndarray, np.ndarray]:
    """Even micro-batches, the fullest of them the first of the ranks."""
    bins = ranks * microbatches
    placed = fill(part.language, part.encoder, bins)
    load = np.bincount(placed, part.total, bins).astype(np.int64)
    order = ascending(-load).reshape(microbatches, ranks)
    order[1::2] = order[1::2, ::-1]
    place = np.empty(bins, dtype=np.int64)
    place[order.ravel()] = np.arange(bins)
    micro, rank = np.divmod(place[placed], ranks)
    return rank, micro


def _most_first(
    total: np.ndarray, rank: np.ndarray, micro: np.ndarray, lockstep: int
) -> tuple[np.ndarray, np.ndarray]:
    """Micro-batches renumbered, the fullest first; ranks such that groups have equally many.

    The ranks with one sample more than the others come first, or last if only the last group can
    hold them.
    """
    ranks, microbatches = int(rank.max(initial=0)) + 1, int(micro.max(initial=0)) + 1
    flat = np.bincount(rank * microbatches + micro, total, ranks * microbatches)
    load = flat.reshape(ranks, microbatches)
    order = np.argsort(-load, axis=1, kind="stable")
    number = np.argsort(order, axis=1, kind="stable")
    count = np.bincount(rank, minlength=ranks)
    most = int((count == count.max()).sum())
    place = np.empty(ranks, dtype=np.int64)
    by_count = -count if most % lockstep == 0 else count
    place[np.lexsort((-load[:, 0], by_count))] = np.arange(ranks)
    return place[rank], number[rank, micro]


def _note_profile(
    profile: np.ndarray, total: np.ndarray, rank: np.ndarray, micro: np.ndarray, ranks: Ranks
) -> None:
    """What ranks of a lockstep group wait for anyway, by micro-batch, relative to its mean."""
    count, microbatches = profile.shape
    load = np.bincount(rank * microbatches + micro, total, count * microbatches)
    group = ranks.lockstep if count % ranks.lockstep == 0 else 1
    slowest = load.astype(np.int64).reshape(-1, group, microbatches).max(1)
    shape = slowest - slowest.sum(1, keepdims=True) // microbatches
    wide = np.repeat(shape, group, axis=0)
    np.copyto(profile, wide, where=np.abs(wide) > np.abs(profile))
