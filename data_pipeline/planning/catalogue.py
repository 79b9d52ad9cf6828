"""All samples that a run can draw, with their lengths in language-model tokens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.conversation.template import TEMPLATE, text_tokens
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.errors import DataError
from data_pipeline.planning.plan import DatasetShare
from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.index import Manifest, SampleIndex, ShardIndex

MediumTokens = Callable[[str, int], int]
"""Language-model tokens of a medium, from its modality and its duration in milliseconds."""


class Entry(NamedTuple):
    """A sample and the shard it lies in."""

    shard: ShardIndex
    sample: SampleIndex


@dataclass(frozen=True)
class CatalogueDataset:
    """One dataset of a split.

    Attributes:
        share: how the plan sees it.
        entries: its samples in the order of the shards.
        text_tokens: tokens of each conversation without media, ``[samples]``.
    """

    share: DatasetShare
    entries: tuple[Entry, ...]
    text_tokens: np.ndarray


@dataclass(frozen=True)
class Catalogue:
    """The datasets of one split that a recipe names, in the recipe's order."""

    datasets: tuple[CatalogueDataset, ...]

    def entry(self, dataset: int, row: int) -> Entry:
        """A sample by the plan's numbers."""
        return self.datasets[dataset].entries[row]

    def tokens(self, dataset: int, row: int, medium_tokens: MediumTokens) -> int:
        """A sample's length in language-model tokens, media included."""
        chosen = self.datasets[dataset]
        media = chosen.entries[row].sample.media
        return int(chosen.text_tokens[row]) + sum(
            medium_tokens(facts.modality, facts.duration_ms) for facts in media
        )


def open_catalogue(
    manifest: Manifest,
    split: str,
    datasets: Mapping[str, float],
    tokenizer: TextTokenizer,
    cache: Path,
) -> Catalogue:
    """Find the recipe's datasets in a built set and count their tokens.

    Args:
        datasets: name -> multiplier, as in the recipe.
        cache: folder for token counts, which depend on tokenizer and template.

    Raises:
        DataError: if a dataset is not in the split.
    """
    fingerprint = hashlib.sha256((TEMPLATE + tokenizer.serialised()).encode()).hexdigest()[:16]
    found: dict[str, list[ShardIndex]] = {}
    for shard in manifest.shards(split):
        found.setdefault(shard.dataset, []).append(shard)
    missing = [name for name in datasets if name not in found]
    if missing:
        raise DataError(
            f"{manifest.folder} has no {split} data for {', '.join(missing)} (it has "
            f"{', '.join(sorted(found))}): take them out of data.datasets or build them."
        )
    reader = RecordReader()
    checksums = {manifest.folder / entry.path: entry.sha256 for entry in manifest.entries}
    opened = []
    for name, factor in datasets.items():
        shards = found[name]
        entries = tuple(Entry(shard, sample) for shard in shards for sample in shard.samples)
        lengths = [
            _text_lengths(
                shard,
                cache / "lengths" / fingerprint / f"{checksums[shard.path][:32]}.npy",
                tokenizer,
                reader,
            )
            for shard in shards
        ]
        digest = hashlib.sha256("".join(checksums[s.path] for s in shards).encode()).hexdigest()
        share = DatasetShare(name, len(entries), float(factor), digest)
        opened.append(CatalogueDataset(share, entries, np.concatenate(lengths)))
    return Catalogue(tuple(opened))


def _text_lengths(
    shard: ShardIndex, path: Path, tokenizer: TextTokenizer, reader: RecordReader
) -> np.ndarray:
    """Text tokens of every sample of a shard, from ``path`` where they were counted before."""
    if path.is_file():
        try:
            counted = np.load(path, allow_pickle=False)
            if counted.shape == (len(shard.samples),):
                return counted
        except (ValueError, OSError, EOFError):
            pass  # a damaged cache entry is only counted again
    counted = np.array(
        [text_tokens(_turns(reader, shard, s), tokenizer) for s in shard.samples], dtype=np.int32
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.save(file, counted, allow_pickle=False)
    partial.replace(path)
    return counted


def _turns(
    reader: RecordReader, shard: ShardIndex, sample: SampleIndex
) -> Sequence[Mapping[str, str]]:
    turns = reader.record(shard, sample).get("conversations")
    if not isinstance(turns, list):
        raise DataError(f"{shard.path}: sample {sample.key} has no conversations.")
    return turns
