"""Who takes which of a step's samples, and into which micro-batches they are packed."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from data_pipeline.errors import DataError


def deal_balanced(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Give every sample to one data-parallel rank so that the ranks' costs are nearly equal.

    Longest processing time first (Graham 1969): the costliest sample left goes to the rank with
    the least so far; ties go to the lower sample and the lower rank, so the result is one
    function of its arguments.

    Args:
        costs: work of each sample, in any unit.
        ranks: number of data-parallel ranks.

    Returns:
        For every rank the indices of its samples, in the plan's order.
    """
    loads = [(0.0, rank) for rank in range(ranks)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [sorted(part) for part in dealt]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack sequences into micro-batches of at most ``capacity`` tokens, first fit decreasing.

    Raises:
        DataError: if one sequence alone is longer than ``capacity``.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise DataError(
                f"A sample of {length} tokens does not fit into a micro-batch: raise "
                f"data.tokens_per_microbatch (now {capacity}) to at least {length}."
            )
        for b, left in enumerate(room):
            if length <= left:
                bins[b].append(index)
                room[b] -= length
                break
        else:
            bins.append([index])
            room.append(capacity - length)
    return [sorted(b) for b in bins]


def deal_step(lengths: Sequence[int], ranks: int, capacity: int) -> list[list[list[int]]]:
    """Samples of one step for every rank and micro-batch: ``result[rank][micro_batch]``.

    All ranks get the same number of micro-batches (expert parallelism and pipelines run in
    lockstep); a rank with less work gets empty ones at the end.
    """
    packed = []
    for part in deal_balanced([float(n) for n in lengths], ranks):
        bins = pack([lengths[i] for i in part], capacity)
        packed.append([[part[i] for i in micro] for micro in bins])
    most = max(1, *(len(bins) for bins in packed))
    return [bins + [[] for _ in range(most - len(bins))] for bins in packed]
