"""What a step cost: operations, time by what it went into, memory, evenness over ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data_pipeline.planning.load import imbalance
from data_pipeline.reading.collate import MicroBatch
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.model.build import expert_count
from unimoe_mcore.model.operations import Rows, language_operations, needed_rows
from unimoe_mcore.model.towers.tower import Tower
from unimoe_mcore.runtime.collectives import start_clock, stop_clock
from unimoe_mcore.runtime.devices import device, peak_memory


@dataclass(frozen=True)
class Measured:
    """What a step cost, the same on every rank.

    Attributes:
        operations: that the step needs (``unimoe_mcore.model.operations``), of all ranks.
        row_tokens: of the global batch as it was packed, padding included.
        communication_seconds: in collectives, waiting for slower ranks included; mean of ranks.
        optimizer_seconds: clipping and stepping; of the slowest rank.
        memory_bytes: most memory used so far, of the rank that used most.
        balance_busy: seconds outside of collectives, of the busiest rank over the mean.
        balance_read: sum over micro-batches of the costliest rank over the mean, in the units of
            the cost model, of what was read; 1 where no plan says.
        balance_planned: the same of what the dealing planned.
    """

    operations: int
    row_tokens: int
    communication_seconds: float
    optimizer_seconds: float
    memory_bytes: int
    balance_busy: float
    balance_read: float
    balance_planned: float


class Meter:
    """Measures steps; one collective a step.

    Args:
        towers: on this rank.
        counts: whether this rank counts the operations of the micro-batches it is given: one
            rank of those that share them does.
    """

    def __init__(self, recipe: Recipe, towers: Sequence[Tower], counts: bool) -> None:
        self._recipe = recipe
        self._towers = towers
        self._counts = counts
        self._began = 0.0
        self._optimizer = 0.0
        self._encoded = 0

    def begin(self) -> None:
        """A step begins: its data are there."""
        self._optimizer = 0.0
        self._encoded = self._tower_operations()
        self._began = time.perf_counter()
        start_clock()

    @contextmanager
    def optimizing(self) -> Iterator[None]:
        """Around the optimizer's work."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self._optimizer = time.perf_counter() - began

    def end(self, batches: Sequence[MicroBatch]) -> Measured:
        """The step is done; a collective.

        Args:
            batches: this rank's micro-batches.
        """
        waited = stop_clock()
        busy = time.perf_counter() - self._began - waited
        operations = row_tokens = 0
        if self._counts:
            row_tokens = sum(batch.input_ids.shape[1] for batch in batches)
            operations = self._language(batches) + self._tower_operations() - self._encoded
        loads = [b.load for b in batches if b.load is not None]
        costs = [operations, row_tokens, busy, waited, self._optimizer, peak_memory()]
        mine = [*costs, *(x.mine for x in loads)]
        numbers = torch.tensor(mine, dtype=torch.float64, device=device())
        flat = numbers.new_empty(dist.get_world_size() * len(mine))
        dist.all_gather_into_tensor(flat, numbers)
        table = flat.view(-1, len(mine))
        busiest, read = table[:, 2], table[:, len(costs) :]
        return Measured(
            operations=int(table[:, 0].sum()),
            row_tokens=int(table[:, 1].sum()),
            communication_seconds=table[:, 3].mean().item(),
            optimizer_seconds=table[:, 4].max().item(),
            memory_bytes=int(table[:, 5].max()),
            balance_busy=(busiest.max() / busiest.mean()).item(),
            balance_read=imbalance(read.amax(0).tolist(), read.mean(0).tolist()) if loads else 1.0,
            balance_planned=imbalance([x.slowest for x in loads], [x.mean for x in loads]),
        )

    def _language(self, batches: Sequence[MicroBatch]) -> int:
        recipe, stage = self._recipe, self._recipe.stage
        return language_operations(
            recipe.model,
            expert_count(recipe),
            stage.train,
            stage.lora,
            rows_of(batches),
            bool(stage.shared_expert),
        ).total

    def _tower_operations(self) -> int:
        return sum(tower.operations() for tower in self._towers)


def rows_of(batches: Sequence[MicroBatch]) -> Rows:
    """What the language model's work on some micro-batches depends on."""
    lengths = [len(sample.tokens.ids) for batch in batches for sample in batch.samples]
    return needed_rows(lengths, sum(batch.label_tokens for batch in batches))
