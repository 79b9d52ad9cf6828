"""Held-out questions: every rank answers its share, rank 0 keeps the record."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from data_pipeline.planning.dealing import Ranks
from data_pipeline.reading.collate import MicroBatch
from data_pipeline.reading.loader import RowLoader
from data_pipeline.reading.sample import BrokenSample, Sample
from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.evaluation.routing import RoutingRecorder
from unimoe_mcore.training.judging import Judgement, judge
from unimoe_mcore.training.module import TrainModule

CHUNK = 192
"""Questions that are dealt to the ranks at a time."""


def ask(
    module: TrainModule,
    loader: RowLoader,
    ranks: Ranks,
    collate: Callable[[Sequence[Sample]], MicroBatch],
    routing: bool,
    shown: str = "",
    rows: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Answer questions of a catalogue, teacher-forced; a collective over all ranks.

    An answer is exact if every one of its tokens, the end token included, is the likeliest one
    given the right ones before it: then greedy decoding gives exactly that answer.

    Questions that cannot be read are left out, and named on rank 0.

    Args:
        loader: of the questions.
        ranks: among whom they are dealt.
        collate: packs the questions of a micro-batch.
        routing: also count which experts each question's tokens go to.
        shown: title of a progress bar, on a terminal; empty for none.
        rows: the questions' rows of the catalogue; all without it.

    Returns:
        On rank 0 one record per question: dataset, group, key, exact, loss (sum over the label
        tokens), tokens (number of them), and with ``routing`` ``experts``: for every MoE layer
        the number of this question's tokens that each expert got. Empty on other ranks.
    """
    mine: list[dict[str, Any]] = []
    silent = not (shown and sys.stderr.isatty())
    asked = range(len(loader.catalogue)) if rows is None else rows
    starts = range(0, len(asked), CHUNK)
    for start in tqdm(starts, f"{shown}: questions", disable=silent, leave=False):
        part = loader.read(asked[start : start + CHUNK], ranks, module.data_rank)
        batches = [collate(samples) for samples in part]
        with RoutingRecorder(module.chunks, enabled=routing) as recorder:
            judgements = judge(module, batches)
        if module.answers:
            mine += _records(batches, judgements, recorder)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (mine, loader.broken))
    if dist.get_rank() != 0:
        return []
    _name_broken([sample for _, broken in gathered for sample in broken])
    records = (record for part, _ in gathered for record in part)
    return sorted(records, key=lambda r: (r["dataset"], r["key"]))


def _name_broken(broken: Sequence[BrokenSample]) -> None:
    for name in sorted({f"{b.shard} {b.key} ({b.kind}): {b.reason}" for b in broken}):
        print(f"a held-out question is left out: {name}", file=sys.stderr, flush=True)


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
