"""Some questions with their media, right and wrong answers: chosen, read, made small."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.modalities import modality
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.preview import Preview
from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.columns import SampleIndex
from data_pipeline.shards.index import Manifest, ShardIndex
from data_pipeline.shards.schema import ASSISTANT, HUMAN, parse_sample
from unimoe_mcore.reporting.document import Answer, Example
from unimoe_mcore.reporting.results import Key, Results, in_order

MOST = 10
"""Examples of a report."""
MOST_MEDIA = 3
"""Media that are shown of one example."""
MOST_BYTES = 64 * 2**20
"""Largest medium that is looked at, bytes."""
MOST_CHARACTERS = 600
"""Of a question or an answer."""


def choose(results: Results, most: int = MOST) -> list[dict[str, Any]]:
    """Records of the questions to show: of every modality right and wrong ones by turns.

    By the checksum of their names, so that nobody picks them and every report picks the same.
    They are of the first given run that was judged.
    """
    if not results.finals:
        return []
    first = results.finals[0]
    left: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for record in sorted(first.records, key=_checksum, reverse=True):
        left.setdefault((record["group"], record["exact"]), []).append(record)
    groups = in_order({group for group, _ in left})
    chosen: list[dict[str, Any]] = []
    while len(chosen) < most and any(left.values()):
        for exact in (True, False):
            for group in groups:
                if left.get((group, exact)) and len(chosen) < most:
                    chosen.append(left[group, exact].pop())
    return sorted(chosen, key=lambda r: (groups.index(r["group"]), not r["exact"]))


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(f"{record['dataset']}/{record['key']}".encode()).hexdigest()


def examples(results: Results) -> list[Example]:
    """The chosen questions as they are shown; without their data only what was said."""
    finals = [(judged, judged.by_key()) for judged in results.finals]
    reader = RecordReader()
    found = []
    for record in choose(results):
        key = record["dataset"], record["key"]
        answers = [
            Answer(
                judged.title,
                _short(str(one.get("said", "(was not recorded)"))),
                bool(one["exact"]),
            )
            for judged, by_key in finals
            if judged.run.data == finals[0][0].run.data and (one := by_key.get(key))
        ]
        found.append(_example(results, reader, key, answers))
    return found


def _example(
    results: Results, reader: RecordReader, key: Key, answers: Sequence[Answer]
) -> Example:
    name = "/".join(key)
    if results.data is None:
        return Example(name, "", "", answers)
    try:
        shard, sample = _find(results.data, results.split, *key)
        parsed = parse_sample(reader.record_bytes(shard, sample), f"{shard.path.name}:{name}")
    except DataError as error:
        return Example(name, "", "", answers, notes=[str(error)])
    question = "\n".join(turn.text for turn in parsed.turns if turn.speaker == HUMAN)
    right = " / ".join(turn.text for turn in parsed.turns if turn.speaker == ASSISTANT)
    media, notes = [], []
    for facts in sample.media[:MOST_MEDIA]:
        try:
            if facts.size > MOST_BYTES:
                raise DataError(f"{name}.{facts.member} has {facts.size} bytes, too many to show.")
            media.append(show(reader.medium(shard, sample, facts)))
        except DataError as error:
            notes.append(str(error))
    if len(sample.media) > MOST_MEDIA:
        notes.append(f"{len(sample.media) - MOST_MEDIA} more media are not shown.")
    return Example(name, _short(question), _short(right), answers, media, notes)


def _find(manifest: Manifest, split: str, dataset: str, key: str) -> tuple[ShardIndex, SampleIndex]:
    """A sample by its key.

    Raises:
        DataError: it is not there.
    """
    for shard in manifest.shards(split, dataset):
        row = _row(shard, key.encode())
        if row is not None:
            return shard, shard.samples[row]
    raise DataError(f"{manifest.folder} holds no sample {key} in {split}/{dataset}.")


def _row(shard: ShardIndex, key: bytes) -> int | None:
    """Number of the sample with a key: all keys lie in the index one after another."""
    keys, ends = shard.columns["keys"].tobytes(), shard.columns["key_end"]
    place = keys.find(key)
    while place >= 0:
        row = int(np.searchsorted(ends, place, side="right"))
        start = int(ends[row - 1]) if row else 0
        if place == start and int(ends[row]) == start + len(key):
            return row
        place = keys.find(key, place + 1)
    return None


def show(medium: Medium) -> Preview:
    """A medium made small.

    Raises:
        DataError: it cannot be decoded, or its modality has nothing to show.
    """
    preview = modality(medium.modality).preview
    if preview is None:
        raise DataError(f"{medium.source} is {medium.modality}, which is not shown.")
    return preview(medium)


def _short(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " ..."
