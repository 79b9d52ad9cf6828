"""Held-out questions: every rank answers its share, rank 0 keeps the record."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.planning.dealing import Ranks
from data_pipeline.reading.collate import MicroBatch
from data_pipeline.reading.loader import RowLoader
from data_pipeline.reading.sample import BrokenSample, Sample
from data_pipeline.shards.index import DatasetFacts
from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.evaluation.pathways import Pathways
from unimoe_mcore.evaluation.routing import RoutingRecorder
from unimoe_mcore.evaluation.summary import summary
from unimoe_mcore.runtime.run_directory import RunDirectory
from unimoe_mcore.training.judging import Judgement, judge
from unimoe_mcore.training.module import TrainModule

CHUNK = 192
"""Questions that are dealt to the ranks at a time."""

MOST_SAID = 200
"""Characters of an answer that are recorded."""


@dataclass(frozen=True)
class Asked:
    """What the answers to some questions were.

    Attributes:
        records: on rank 0 one per question, see ``ask``; empty on other ranks.
        pathways: on rank 0 the tokens' ways through the experts; None elsewhere, and where they
            were not asked for.
    """

    records: list[dict[str, Any]]
    pathways: dict[str, Any] | None = None


def ask(
    module: TrainModule,
    loader: RowLoader,
    ranks: Ranks,
    collate: Callable[[Sequence[Sample]], MicroBatch],
    tokenizer: TextTokenizer,
    routing: bool,
    shown: str = "",
    rows: Sequence[int] | None = None,
) -> Asked:
    """Answer questions of a catalogue, teacher-forced; a collective over all ranks.

    An answer is exact if every one of its tokens, the end token included, is the likeliest one
    given the right ones before it: then greedy decoding gives exactly that answer.

    Questions that cannot be read are left out, and named on rank 0.

    Args:
        loader: of the questions.
        ranks: among whom they are dealt.
        collate: packs the questions of a micro-batch.
        tokenizer: puts answers into words.
        routing: also count which experts each question's tokens go to, and which ways they take.
        shown: title of a progress bar, on a terminal; empty for none.
        rows: the questions' rows of the catalogue; all without it.

    Returns:
        Records with dataset, group, key, exact, loss (sum over the label tokens), tokens (number
        of them), ``said`` (``answer_in_words``), and with ``routing`` ``experts``: for every MoE
        layer the number of this question's tokens that each expert got.
    """
    mine: list[dict[str, Any]] = []
    pathways = Pathways(tokenizer.markers.values())
    silent = not (shown and sys.stderr.isatty())
    asked = range(len(loader.catalogue)) if rows is None else rows
    starts = range(0, len(asked), CHUNK)
    for start in tqdm(starts, f"{shown}: questions", disable=silent, leave=False):
        part = loader.read(asked[start : start + CHUNK], ranks, module.data_rank)
        batches = [collate(samples) for samples in part]
        with RoutingRecorder(module.chunks, enabled=routing) as recorder:
            judgements = judge(module, batches)
        if module.answers:
            mine += _records(batches, judgements, recorder, tokenizer)
            for number, batch in enumerate(batches if routing else ()):
                pathways.add(batch, *recorder.choices(number))
    return _gathered(mine, pathways if routing else None, loader.broken)


def _gathered(
    mine: list[dict[str, Any]], pathways: Pathways | None, broken: Sequence[BrokenSample]
) -> Asked:
    """All ranks' answers, on rank 0; a collective."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (mine, pathways, list(broken)))
    if dist.get_rank() != 0:
        return Asked([])
    _name_broken([sample for _, _, part in gathered for sample in part])
    records = [record for part, _, _ in gathered for record in part]
    records.sort(key=lambda r: (r["dataset"], r["key"]))
    if pathways is None:
        return Asked(records)
    for _, theirs, _ in gathered[1:]:
        pathways.merge(theirs)
    return Asked(records, pathways.record())


def _name_broken(broken: Sequence[BrokenSample]) -> None:
    for name in sorted({f"{b.shard} {b.key} ({b.kind}): {b.reason}" for b in broken}):
        print(f"a held-out question is left out: {name}", file=sys.stderr, flush=True)


def _records(
    batches: Sequence[MicroBatch],
    judgements: Sequence[Judgement],
    recorder: RoutingRecorder,
    tokenizer: TextTokenizer,
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
                "said": answer_in_words(
                    judgement.likeliest[where], batch.labels[0][where], tokenizer
                ),
            }
            if experts:
                record["experts"] = {layer: c[index].tolist() for layer, c in experts.items()}
            records.append(record)
    return records


def answer_in_words(likeliest: Tensor, labels: Tensor, tokenizer: TextTokenizer) -> str:
    """What greedy decoding says, as far as answering with the right tokens before it can tell.

    That is the right tokens up to the first one that the model would not say, and what it says
    there. ``...`` stands for what would follow. Answers of several turns are divided by `` / ``.

    Args:
        likeliest: the likeliest token at every place with a label, ``[tokens]``.
        labels: the right ones, ``[tokens]``.
    """
    turns: list[list[int]] = [[]]
    ended = False
    for said, right in zip(likeliest.tolist(), labels.tolist(), strict=True):
        if ended:
            turns.append([])
        ended = said == tokenizer.end
        turns[-1] += [] if ended else [said]
        if said != right:
            break
    words = " / ".join(tokenizer.decode(turn) for turn in turns)
    if len(words) > MOST_SAID:
        return words[:MOST_SAID] + "..."
    return words if ended else f"{words} ..."


def write_answers(
    run: RunDirectory, name: str, split: str, asked: Asked, facts: Mapping[str, DatasetFacts]
) -> dict[str, float]:
    """Write what was answered into the run's directory; the records last: they say it is done.

    Args:
        name: ``before`` or ``after`` training.
        facts: of the split's datasets.

    Returns:
        Share of exact answers per dataset.
    """
    path = run.evaluation(name, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    ways = run.pathways(name, split)
    ways.unlink(missing_ok=True)
    if asked.pathways is not None:
        write_text(ways, json.dumps(asked.pathways))
    write_text(path, "".join(json.dumps(record) + "\n" for record in asked.records))
    found = summary(asked.records)
    exact: dict[str, float] = found["exact"]
    majority = {each: facts[each].majority for each in exact if each in facts}
    if asked.records:
        run.event(f"evaluated {name}", split=split, majority=majority, **found)
    return exact
