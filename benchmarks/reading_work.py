"""What every reader of the comparison does with a sample's bytes, and how it is timed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.reading_set import ENCODERS, RULE, TOKENIZER
from data_pipeline.conversation.template import render
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.modalities import MODALITIES
from data_pipeline.reading.collate import MicroBatch, collate
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.prepare import SAMPLES_PER_FEATURE, prepare
from data_pipeline.reading.sample import Sample
from unimoe_mcore.config.towers import connector_tokens

BATCH = 32
SHUFFLED = 100
"""Samples in the shuffle buffers of WebDataset and Energon: what Energon's guide shows."""
PAD_TO = 128


class Work:
    """From a sample's bytes to tokens and decoded media: the same functions as in training.

    Args:
        folder: of the set.
    """

    def __init__(self, folder: Path) -> None:
        self.tokenizer = TextTokenizer.load(folder / TOKENIZER)

    def sample(self, key: str, members: Mapping[str, bytes]) -> Sample:
        """Decode a sample's media and lay its conversation out as tokens."""
        record = json.loads(members["json"])
        counts: dict[str, list[int]] = {modality: [] for modality in MODALITIES}
        media = []
        for each in record["media"]:
            modality, member = each["modality"], each["member"]
            medium = Medium(modality, members[member], f"{key}.{member}")
            content = prepare(medium, ENCODERS[modality])
            tower = RULE.tower(modality)
            places = (
                connector_tokens(tower.connector, len(content) // SAMPLES_PER_FEATURE)
                if modality == "speech"
                else RULE.tokens(modality, 0)
            )
            counts[modality].append(places)
            # The file's bytes are no longer needed, and are not carried from process to process.
            media.append(Medium(modality, b"", medium.source, content))
        group = next((m for m in MODALITIES if counts[m]), "text")
        tokens = render(record["conversations"], self.tokenizer, counts)
        return Sample(key, record["dataset"], group, tokens, tuple(media))

    def batch(self, samples: Sequence[Sample]) -> MicroBatch:
        """Pack samples into one row, as training does."""
        return collate(samples, self.tokenizer.pad, PAD_TO)


def timed(batches: Iterable[MicroBatch], samples: int) -> dict[str, float]:
    """Go through batches until that many samples have come.

    Returns:
        ``first``: seconds to the first batch. ``rate``: samples a second after it. ``cpu``: of
        this process, seconds a sample after it.
    """
    began = ready = time.perf_counter()
    used = time.process_time()
    counted = first = 0
    for batch in batches:
        counted += len(batch.samples)
        if not first:
            first, ready, used = counted, time.perf_counter(), time.process_time()
        if counted >= samples:
            break
    ended = time.perf_counter()
    return {
        "first": ready - began,
        "rate": (counted - first) / (ended - ready),
        "cpu": (time.process_time() - used) / (counted - first),
    }
