"""Held-out questions: every rank answers its share, rank 0 keeps the record."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from data_pipeline.reading.collate import MicroBatch
from data_pipeline.reading.loader import SampleReader
from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.evaluation.routing import RoutingRecorder
from unimoe_mcore.training.module import Judgement, TrainModule

CHUNK = 192
"""Questions that are dealt to the ranks at a time."""


def ask(
    module: TrainModule, reader: SampleReader, routing: bool, shown: str = ""
) -> list[dict[str, Any]]:
    """Answer every question of a catalogue, teacher-forced; a collective over all ranks.

    An answer is exact if every one of its tokens, the end token included, is the likeliest one
    given the right ones before it: then greedy decoding gives exactly that answer.

    Args:
        routing: also count which experts each question's tokens go to.
        shown: title of a progress bar, on a terminal; empty for none.

    Returns:
        On rank 0 one record per question: dataset, group, key, exact, loss (sum over the label
        tokens), tokens (number of them), and with ``routing`` ``experts``: for every MoE layer
        the number of this question's tokens that each expert got. Empty on other ranks.
    """
    places = [
        (number, row)
        for number, dataset in enumerate(reader.catalogue.datasets)
        for row in range(len(dataset.entries))
    ]
    mine: list[dict[str, Any]] = []
    silent = not (shown and sys.stderr.isatty())
    starts = range(0, len(places), CHUNK)
    for start in tqdm(starts, f"{shown}: questions", disable=silent, leave=False):
        part = places[start : start + CHUNK]
        batches = reader.deal(part, module.data_rank, module.data_ranks)
        with RoutingRecorder(module.chunks, enabled=routing) as recorder:
            judgements = module.judge(batches)
        if module.answers:
            mine += _records(batches, judgements, recorder)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    if dist.get_rank() != 0:
        return []
    return sorted((r for part in gathered for r in part), key=lambda r: (r["dataset"], r["key"]))


def _records(
    batches: Sequence[MicroBatch], judgements: Sequence[Judgement], recorder: RoutingRecorder
) -> list[dict[str, Any]]:
    records = []
    for number, (batch, judgement) in enumerate(zip(batches, judgements, strict=True)):
        label = batch.loss_mask[0].bool()
        experts = recorder.counts(number, batch)
        for index, sample in enumerate(batch.samples):
            where = label & (batch.sample[0] == index)
            record = {
                "dataset": sample.dataset,
                "group": sample.group,
                "key": sample.key,
                "exact": bool(judgement.correct[where].all()),
                "loss": float(judgement.losses[where].double().sum()),
                "tokens": int(where.sum()),
            }
            if experts:
                record["experts"] = {layer: c[index].tolist() for layer, c in experts.items()}
            records.append(record)
    return records


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One JSON line a question, visible only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
