"""From planned steps to micro-batches that all ranks agree on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.reading.collate import MicroBatch, collate
from data_pipeline.reading.loader import ReadStep, StepLoader
from data_pipeline.reading.quarantine import Broken, Quarantine
from unimoe_mcore.config.data import DataConfig
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.runtime.devices import device

ALWAYS_ALLOWED = 8
"""Broken samples that never stop a run, however few samples it has drawn."""


class Feed:
    """This rank's micro-batches of a step, after all ranks know what is broken in it.

    Ranks that share a data-parallel rank read the same samples; what one of them finds broken all
    leave out, so that their tensors have the same shapes.

    Args:
        loader: reads this rank's samples.
        quarantine: the run's; its file is written by the first rank only.
        data: the recipe's.
        copies: ranks that read the same samples (tensor and pipeline parallelism).
        pad: token id of padding.
    """

    def __init__(
        self, loader: StepLoader, quarantine: Quarantine, data: DataConfig, copies: int, pad: int
    ) -> None:
        self.loader = loader
        self.quarantine = quarantine
        self._data = data
        self._copies = copies
        self._pad = pad
        self._drawn = 0

    def read(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step; a collective. What was found broken is on disk by then.

        Raises:
            UserError: too many samples are broken.
            DataError: a shard cannot be read.
        """
        read = self.loader.read(step)
        self._agree(read)
        return [
            replace(collate(samples, self._pad, self._data.pad_to), load=load)
            for samples, load in zip(read.without(self.quarantine), read.loads, strict=True)
        ]

    def _agree(self, read: ReadStep) -> None:
        plan = self.loader.dealer.timeline.at(read.step)
        counts = torch.tensor([len(read.broken), read.places], device=device())
        dist.all_reduce(counts)
        broken, places = (int(n) for n in counts)
        expected = plan.mixture.global_samples * self._copies
        if places != expected:
            raise RuntimeError(
                f"step {read.step + 1}: the ranks took {places} places of {expected}; they do not "
                "deal alike"
            )
        if broken:
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, read.broken)
            self.quarantine.add(_different(gathered))
        # Also where nothing is new: a run that was stopped for this must not get past it by being
        # started again.
        self._refuse_too_many(read.step)

    def _refuse_too_many(self, step: int) -> None:
        entries = self.quarantine.until(step)
        if len(entries) <= ALWAYS_ALLOWED:
            return
        drawn = sum(self.loader.dealer.timeline.at(step).cursors(step + 1).values())
        if len(entries) <= self._data.quarantine_most * drawn:
            return
        listed = "".join(f"\n  - {e.shard} {e.key} ({e.kind}): {e.reason}" for e in entries[-20:])
        raise UserError(
            f"At step {step + 1} {len(entries)} of {drawn} samples drawn are broken, more than "
            f"data.quarantine_most={self._data.quarantine_most:g} allows; all are listed in "
            f"{self.quarantine.path}, the last are:{listed}"
        )


def _different(gathered: list[list[Broken]]) -> list[Broken]:
    """What the ranks found, each sample once, in the same order everywhere."""
    found = {(b.dataset, b.key): b for part in reversed(gathered) for b in part}
    return [found[name] for name in sorted(found)]
