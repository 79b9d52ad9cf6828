"""From a step's number to what every rank reads: plan, costs, dealing."""

from __future__ import annotations

import numpy as np

from data_pipeline.planning.catalogue import Catalogue
from data_pipeline.planning.cost import CostModel
from data_pipeline.planning.dealing import Dealt, Ranks, deal_balanced
from data_pipeline.planning.plan import GlobalPlan
from data_pipeline.planning.sharding import ROAMING, deal_sharded, owners
from data_pipeline.planning.timeline import Timeline
from data_pipeline.planning.work import demands, step_work


class Dealer:
    """Deals planned steps; the same on every rank.

    Args:
        catalogue: of the samples.
        timeline: the plan.
        costs: what samples cost.
        ranks: who takes them.
        deal: ``balanced`` or ``sharded``.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        timeline: Timeline,
        costs: CostModel,
        ranks: Ranks,
        deal: str = "balanced",
    ) -> None:
        self.catalogue = catalogue
        self.timeline = timeline
        self.costs = costs
        self.ranks = ranks
        self.deal = deal
        self._owners: dict[int, np.ndarray] = {}

    def step(self, step: int) -> tuple[np.ndarray, Dealt]:
        """Catalogue rows of a step, in the plan's order, and who takes which.

        Raises:
            DataError: a sample is longer than a micro-batch.
        """
        rows = self.catalogue.rows(self.timeline.step(step))
        work = step_work(self.catalogue, rows, self.costs)
        if self.deal == "sharded":
            return rows, deal_sharded(work, self.ranks, self.owners(step))
        return rows, deal_balanced(work, self.ranks)

    def owners(self, step: int) -> np.ndarray:
        """The combination that each rank owns at a step, by number, ``ROAMING`` for none.

        When the mixture changes, ranks keep what they own as far as possible.
        """
        begin = self.timeline.at(step).first_step
        if begin not in self._owners:
            before: np.ndarray | None = None
            for mixture in self.timeline.mixtures(step):
                plan = GlobalPlan(self.catalogue.sources, mixture)
                asked = demands(self.catalogue, plan, self.costs)
                before = owners(asked, self.ranks.count, self.ranks.lockstep, before)
            assert before is not None
            self._owners[begin] = before
        return self._owners[begin]

    def combinations_of(self, rank: int, step: int) -> list[str]:
        """The combinations that a rank may be given at a step."""
        names = self.catalogue.combinations
        if self.deal != "sharded":
            return names
        owner = int(self.owners(step)[rank])
        return names if owner == ROAMING else [names[owner]]
