"""Reads the micro-batches of a step for one data-parallel rank: its own bytes and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.conversation.template import render
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.errors import DataError
from data_pipeline.planning.catalogue import Catalogue, Entry, MediumTokens
from data_pipeline.planning.dealing import deal_step
from data_pipeline.planning.plan import GlobalPlan
from data_pipeline.reading.collate import MicroBatch, Sample, collate
from data_pipeline.reading.medium import MODALITIES
from data_pipeline.reading.records import RecordReader


@dataclass(frozen=True)
class Packing:
    """How samples become rows: most tokens of a row, and what its length is a multiple of."""

    capacity: int
    multiple: int


class SampleReader:
    """Reads, renders and packs samples of a catalogue."""

    def __init__(
        self,
        catalogue: Catalogue,
        tokenizer: TextTokenizer,
        medium_tokens: MediumTokens,
        packing: Packing,
    ) -> None:
        self.catalogue = catalogue
        self.tokenizer = tokenizer
        self.medium_tokens = medium_tokens
        self.packing = packing
        self._records = RecordReader()

    def step(self, plan: GlobalPlan, step: int, rank: int, ranks: int) -> list[MicroBatch]:
        """This rank's micro-batches of a planned step; every rank gets the same number."""
        draws = plan.step(step)
        return self.deal([(draw.dataset, draw.row) for draw in draws], rank, ranks)

    def deal(self, places: Sequence[tuple[int, int]], rank: int, ranks: int) -> list[MicroBatch]:
        """Deal samples ``(dataset, row)`` to ranks and read this rank's part."""
        lengths = [self.catalogue.tokens(d, row, self.medium_tokens) for d, row in places]
        mine = deal_step(lengths, ranks, self.packing.capacity)[rank]
        return [
            collate(
                [self.sample(*places[i]) for i in micro],
                self.tokenizer.pad,
                self.packing.multiple,
            )
            for micro in mine
        ]

    def sample(self, dataset: int, row: int) -> Sample:
        """One sample, rendered.

        Raises:
            DataError: naming shard and sample, if markers and media disagree.
        """
        entry: Entry = self.catalogue.entry(dataset, row)
        shard, facts = entry
        record = self._records.record(shard, facts)
        media = self._records.media(shard, facts)
        counts: dict[str, list[int]] = {m: [] for m in MODALITIES}
        for medium in facts.media:
            counts[medium.modality].append(self.medium_tokens(medium.modality, medium.duration_ms))
        try:
            tokens = render(record["conversations"], self.tokenizer, counts)
        except (DataError, KeyError, TypeError) as error:
            raise DataError(f"{shard.path}: sample {facts.key}: {error}.") from error
        group = next((m for m in MODALITIES if counts[m]), "text")
        return Sample(facts.key, shard.dataset, group, tokens, media)
