"""Filling bins evenly: the part of dealing that is an optimisation.

All arithmetic is on whole numbers, so that every rank, on whatever processor, finds the same bins.
"""

from __future__ import annotations

import numpy as np

EXCHANGES = 16
"""Rounds of exchanges between pairs of bins; the gain of a further one is below half a percent."""

POLISHED = 32
"""Fullest bins that are exchanged with further."""

_PAIRS_AT_ONCE = 256
"""Pairs of bins looked at together: what is computed for them then stays in a core's cache."""


def fill(
    language: np.ndarray, encoder: np.ndarray, bins: int, offset: np.ndarray | None = None
) -> np.ndarray:
    """Spread items over bins so that both kinds of work are nearly equal in every bin.

    Items are laid out in rounds, costliest first, each round's costliest into the emptiest bin
    (longest processing time first, Graham 1969, a round at a time). Then pairs of a full and an
    empty bin exchange the two items (or hand over one) that bring both nearest to each other,
    which is what a round-wise layout leaves to be gained.

    Args:
        language: work of each item in the language model, ``[items]`` int64.
        encoder: its work in the encoders, same unit, ``[items]`` int64.
        bins: number of bins, at least 1.
        offset: work that a bin is taken to hold already (less, if negative), ``[bins]`` int64.

    Returns:
        Bin of each item, ``[items]`` int64.
    """
    if bins == 1 or not len(language):
        return np.zeros(len(language), dtype=np.int64)
    start = np.zeros(bins, dtype=np.int64) if offset is None else offset
    placed = _lay_out(language + encoder, start)
    filled = _Bins(placed, language, encoder, start)
    _exchange(filled)
    _polish(filled)
    return filled.placed()


def ascending(values: np.ndarray) -> np.ndarray:
    """The stable order of whole numbers, many times as fast as NumPy's stable sort finds it.

    Places are the last bits of what is sorted, so that nothing is equal and any sort is stable.
    """
    bits = len(values).bit_length()
    keys = (values << bits) | np.arange(len(values))
    keys.sort()
    return keys & ((1 << bits) - 1)


def _lay_out(work: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The better of two layouts: costliest into the emptiest, or one that counts items.

    Where items are nearly alike, bins of ``k`` and of ``k + 1`` items are equal only if the
    latter hold the lighter items; exchanges one at a time would take long to find that.
    """
    bins = len(start)
    order = ascending(-work)
    placed = _in_rounds(work, order, start)
    more = len(work) % bins
    if not more or len(work) < bins:
        return placed
    heavy = len(work) // bins * (bins - more)
    counted = _in_rounds(work, order[:heavy], start[: bins - more])
    light = _in_rounds(work, order[heavy:], start[bins - more :])
    counted[order[heavy:]] = bins - more + light[order[heavy:]]
    fullest = [(start + _sums(work, layout, bins)).max() for layout in (placed, counted)]
    return placed if fullest[0] <= fullest[1] else counted


def _sums(work: np.ndarray, placed: np.ndarray, bins: int) -> np.ndarray:
    """Work in each bin; exact, as float64 is below 2**53."""
    return np.bincount(placed, work, bins).astype(np.int64)


def _in_rounds(work: np.ndarray, order: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Bin of the items in ``order``, costliest first; of other items nothing is said."""
    load, bins = start.copy(), len(start)
    placed = np.zeros(len(work), dtype=np.int64)
    for first in range(0, len(order), bins):
        items = order[first : first + bins]
        emptiest = ascending(load)[: len(items)]
        placed[items] = emptiest
        load[emptiest] += work[items]
    return placed


class _Bins:
    """Items in bins, and the work in each bin.

    Attributes:
        load: work in the language model, with what the bin was taken to hold, ``[bins]`` int64.
        coding: work in the encoders, ``[bins]`` int64.
    """

    def __init__(
        self, placed: np.ndarray, language: np.ndarray, encoder: np.ndarray, start: np.ndarray
    ) -> None:
        bins, self._count = len(start), len(placed)
        self.load = start + _sums(language, placed, bins)
        self.coding = _sums(encoder, placed, bins)
        # A free place holds an item without work.
        self._language, self._encoder = np.append(language, 0), np.append(encoder, 0)
        order = ascending(placed)
        count = np.bincount(placed, minlength=bins)
        first = np.cumsum(count) - count
        # Two places more than the fullest bin needs: a bin may be handed items.
        self._table = np.full((bins, int(count.max()) + 2), self._count, dtype=np.int64)
        self._table[placed[order], np.arange(self._count) - first[placed[order]]] = order

    def placed(self) -> np.ndarray:
        """Bin of each item."""
        result = np.empty(self._count, dtype=np.int64)
        there = self._table < self._count
        result[self._table[there]] = np.nonzero(there)[0]
        return result

    def exchange(self, one: np.ndarray, other: np.ndarray) -> bool:
        """The best exchange of every pair of bins, where there is one; whether there was any.

        No bin may be in two pairs.
        """
        changed = False
        for first in range(0, len(one), _PAIRS_AT_ONCE):
            part = slice(first, first + _PAIRS_AT_ONCE)
            changed |= self._exchange(one[part], other[part])
        return changed

    def _exchange(self, one: np.ndarray, other: np.ndarray) -> bool:
        mine, theirs = self._table.take(one, axis=0), self._table.take(other, axis=0)
        gain = _gain(
            self._language[mine], self._language[theirs], self.load[one] - self.load[other]
        )
        coded = self._encoder[mine], self._encoder[theirs]
        gain += _gain(*coded, self.coding[one] - self.coding[other])
        gain = gain.reshape(len(one), -1)
        best = gain.argmin(1)
        better = np.flatnonzero(gain[np.arange(len(one)), best] < 0)
        if not len(better):
            return False
        give, take = np.divmod(best[better], self._table.shape[1])
        one, other = one[better], other[better]
        given, taken = mine[better, give], theirs[better, take]
        self._table[one, give], self._table[other, take] = taken, given
        for work, sums in ((self._language, self.load), (self._encoder, self.coding)):
            moved = work[given] - work[taken]
            sums[one] -= moved
            sums[other] += moved
        return True


def _gain(here: np.ndarray, there: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Change of the summed squares by every exchange, halved, ``[pairs, places, places]``.

    With ``d`` the difference of two items and ``D`` that of their bins, an exchange changes the
    sum of the two bins' squared loads by ``2 d (d - D)``; so for each kind of work.
    """
    item = here[:, :, None] - there[:, None, :]
    gain = item - apart[:, None, None]
    gain *= item
    return gain


def _exchange(filled: _Bins) -> None:
    """Exchanges between full and empty bins, all pairs of a round at once."""
    bins = len(filled.load)
    pairs = bins // 2
    for number in range(EXCHANGES):
        load, coding = filled.load, filled.coding
        order = ascending(-(load + coding, coding, load, load)[number % 4])
        full, empty = order[:pairs], order[bins - pairs :][::-1]
        # The same two bins would meet again and again; neighbours in the order do as well.
        empty = np.roll(empty, number // 2 % 4 * (1 if number % 4 < 2 else -1))
        better = filled.exchange(full, empty)
        if not better and number % 4 == 3:
            break


def _polish(filled: _Bins) -> None:
    """Further exchanges between the few fullest bins and bins of any kind.

    Everyone waits for the fullest: it is worth more attention than the rest.
    """
    bins = len(filled.load)
    few, idle = min(POLISHED, bins // 2), 0
    stride = max(1, (bins - few) // few)
    for number in range(EXCHANGES):
        load = filled.load + filled.coding
        order = ascending(-load)
        if 128 * (load[order[0]] * bins - load.sum()) < load.sum():
            break  # the fullest is within a hundredth of the mean
        partners = order[few:][(np.arange(few) * stride + number) % (bins - few)]
        idle = 0 if filled.exchange(order[:few], partners) else idle + 1
        if idle == bins - few:
            break  # all have met


def split(
    language: np.ndarray, encoder: np.ndarray, rank: np.ndarray, offset: np.ndarray
) -> np.ndarray:
    """Divide the items of every rank among its own bins.

    Args:
        language: work of each item in the language model, ``[items]`` int64.
        encoder: its work in the encoders, ``[items]`` int64.
        rank: rank of each item, ``[items]``.
        offset: work that a bin is taken to hold already, ``[ranks, bins]`` int64.

    Returns:
        Bin of each item on its rank, ``[items]`` int64.
    """
    ranks, bins = offset.shape
    order = ascending(-(language + encoder))
    order = order[ascending(rank[order])]
    count = np.bincount(rank, minlength=ranks)
    turn, column = np.divmod(
        np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count), bins
    )
    micro = np.empty(len(order), dtype=np.int64)
    micro[order] = np.where(turn % 2, bins - 1 - column, column)
    if bins == 1 or not len(order):
        return micro
    filled = _Bins(rank * bins + micro, language, encoder, offset.ravel())
    pairs = [(one, other) for one in range(bins) for other in range(one)]
    for number in range(max(6, len(pairs))):
        one, other = (np.arange(ranks) * bins + each for each in pairs[number % len(pairs)])
        filled.exchange(one, other)
    return filled.placed() % bins
