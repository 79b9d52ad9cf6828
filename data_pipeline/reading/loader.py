"""Reads the micro-batches of steps for one data-parallel rank: its own bytes and no others."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_pipeline.planning.catalogue import Catalogue
from data_pipeline.planning.cost import CostModel
from data_pipeline.planning.dealer import Dealer
from data_pipeline.planning.dealing import Dealt, Ranks, deal_balanced
from data_pipeline.planning.load import Load, planned_loads
from data_pipeline.planning.work import step_work
from data_pipeline.reading.pool import ReaderPool
from data_pipeline.reading.quarantine import Broken, Quarantine, broken_entry
from data_pipeline.reading.sample import BrokenSample, Sample

_TASKS_PER_STEP = 1_000_000


def step_of(task: int) -> int:
    """The step that a task of a ``StepLoader`` belongs to."""
    return task // _TASKS_PER_STEP


@dataclass
class ReadStep:
    """What a rank has read of a step.

    Attributes:
        step: its number.
        places: samples that the plan gave to this rank, broken ones included.
        microbatches: the samples of each micro-batch; those in quarantine are left out.
        broken: samples that were found broken now.
        loads: of each micro-batch.
    """

    step: int
    places: int
    microbatches: list[list[Sample]]
    broken: list[Broken] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)

    def without(self, quarantine: Quarantine) -> list[list[Sample]]:
        """The micro-batches without what is in quarantine by now."""
        return [
            [s for s in samples if not quarantine.holds(s.dataset, s.key, self.step)]
            for samples in self.microbatches
        ]


@dataclass(frozen=True)
class _Submitted:
    step: int
    places: int
    tasks: list[int | None]
    loads: list[Load]
    costs: list[list[int]]  # of the samples of each task


class StepLoader:
    """The steps of a plan, one after another, for one data-parallel rank.

    Steps are handed to the pool ahead of time; what comes out does not depend on how far, nor on
    the number of workers: a sample is left out from the step on at which it was found broken.

    Args:
        dealer: plans and deals.
        pool: reads.
        quarantine: what is known to be broken.
        rank: this rank.
        last: number of the run's last step and one.
        prefetch: steps that are handed to the pool ahead.
    """

    def __init__(
        self,
        dealer: Dealer,
        pool: ReaderPool,
        quarantine: Quarantine,
        rank: int,
        last: int,
        prefetch: int = 0,
    ) -> None:
        self.dealer = dealer
        self.pool = pool
        self.quarantine = quarantine
        self.rank = rank
        self._last = last
        self._prefetch = prefetch
        self._ahead: deque[_Submitted] = deque()

    def read(self, step: int) -> ReadStep:
        """The samples of a step; steps are asked for in ascending order, without gaps.

        Raises:
            DataError: a shard cannot be read.
        """
        following = self._ahead[-1].step + 1 if self._ahead else step
        for each in range(following, min(self._last, step + 1 + self._prefetch)):
            self._ahead.append(self._submit(each))
        submitted = self._ahead.popleft()
        if submitted.step != step:
            raise RuntimeError(f"step {submitted.step} is next, not step {step}")
        result = ReadStep(step, submitted.places, [])
        for task, load, costs in zip(
            submitted.tasks, submitted.loads, submitted.costs, strict=True
        ):
            read = [] if task is None else self.pool.result(task)
            result.broken += [broken_at(step, s) for s in read if isinstance(s, BrokenSample)]
            result.microbatches.append([s for s in read if isinstance(s, Sample)])
            whole = [c for c, s in zip(costs, read, strict=True) if isinstance(s, Sample)]
            result.loads.append(replace(load, mine=sum(whole)))
        return result

    def _submit(self, step: int) -> _Submitted:
        rows, dealt = self.dealer.step(step)
        work = step_work(self.dealer.catalogue, rows, self.dealer.costs)
        places, tasks, costs = 0, [], []
        for micro, items in enumerate(dealt.of(self.rank)):
            wanted = [item for item in items if not self._held(int(rows[item]), step)]
            places += len(items)
            tasks.append(self._read([int(row) for row in rows[wanted]], step, micro))
            costs.append([int(cost) for cost in work.total[wanted]])
        loads = planned_loads(work, dealt, self.dealer.ranks.count)
        return _Submitted(step, places, tasks, loads, costs)

    def _read(self, rows: list[int], step: int, micro: int) -> int | None:
        """Hand a micro-batch to the pool; None for one with nothing to read."""
        if not rows:
            return None
        task = step * _TASKS_PER_STEP + micro
        self.pool.submit(task, rows)
        return task

    def _held(self, row: int, step: int) -> bool:
        if not len(self.quarantine):
            return False
        shard, sample = self.dealer.catalogue.entry(row)
        return self.quarantine.holds(shard.dataset, sample.key, step)


def broken_at(step: int, sample: BrokenSample) -> Broken:
    """The line of the quarantine for a sample."""
    return broken_entry(step, sample.dataset, sample.shard, sample.key, sample.kind, sample.reason)


class RowLoader:
    """Any rows of a catalogue, dealt to ranks: held-out questions.

    Args:
        catalogue: of the rows.
        pool: reads; in the same catalogue.
        costs: what dealing goes by.
        left_out: samples that ended an earlier process; they are not read.

    Attributes:
        broken: samples of this rank that could not be read so far.
    """

    def __init__(
        self, catalogue: Catalogue, pool: ReaderPool, costs: CostModel, left_out: Quarantine
    ) -> None:
        self.catalogue = catalogue
        self.broken: list[BrokenSample] = []
        self._pool = pool
        self._costs = costs
        self._left_out = left_out
        self._task = 0

    def read(self, rows: Sequence[int], ranks: Ranks, rank: int) -> list[list[Sample]]:
        """This rank's micro-batches of some rows; every rank gets the same number.

        Raises:
            DataError: a shard cannot be read.
        """
        places = np.array([row for row in rows if not self._is_left_out(row)], dtype=np.int64)
        dealt: Dealt = deal_balanced(step_work(self.catalogue, places, self._costs), ranks)
        microbatches = []
        for micro in dealt.of(rank):
            self._task += 1
            self._pool.submit(self._task, [int(row) for row in places[micro]])
            read = self._pool.result(self._task)
            self.broken += [s for s in read if isinstance(s, BrokenSample)]
            microbatches.append([s for s in read if isinstance(s, Sample)])
        return microbatches

    def _is_left_out(self, row: int) -> bool:
        if not len(self._left_out):
            return False
        shard, sample = self.catalogue.entry(row)
        return self._left_out.holds(shard.dataset, sample.key, 0)
