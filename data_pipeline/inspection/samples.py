"""The samples that a recipe draws from, with their lengths in tokens as far as a glance tells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.errors import DataError
from data_pipeline.inspection.contents import MANY_SHARDS
from data_pipeline.inspection.texts import otherwise_counter, read_texts, token_counter
from data_pipeline.modalities import MODALITIES
from data_pipeline.planning.catalogue import Catalogue, MediaRule, bounded, media_facts
from data_pipeline.progress import progress
from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.index import Manifest, ShardIndex

Sources = dict[tuple[str, str], list[ShardIndex]]
"""Dataset and combination -> shards."""


@dataclass(frozen=True)
class Glance:
    """What a recipe draws from.

    Attributes:
        catalogue: tokens of media are exact, those of a text are of one that stands for it.
        texts_read: number of texts that were read.
    """

    catalogue: Catalogue
    texts_read: int


def sources_of(manifest: Manifest, datasets: Sequence[str], taken: set[str]) -> Sources:
    """The training shards of some datasets, in the order in which a run has them.

    Args:
        datasets: names, in the recipe's order.
        taken: modalities that the recipe's stage has towers for.

    Raises:
        DataError: a dataset is not there, or needs a modality that is not taken.
    """
    sources: Sources = {}
    for name in datasets:
        shards = manifest.shards("train", name)
        asked = {modality for shard in shards for modality in shard.modalities}
        if asked - taken:
            raise DataError(
                f"{name} needs {', '.join(sorted(asked - taken))}, for which the recipe's stage "
                "has no tower; take it out of data.datasets"
            )
        for combination in sorted({shard.combination for shard in shards}):
            sources[name, combination] = [s for s in shards if s.combination == combination]
    if not sources:
        raise DataError(f"{manifest.folder} has none of the datasets that the recipe names")
    return sources


def glance(
    sources: Sources,
    tokenizer: TextTokenizer | None,
    rule: MediaRule,
    reader: RecordReader,
    folder: Path,
    sample_tokens: int = 0,
) -> Glance:
    """Lay down a catalogue as a run does, but without reading every text.

    A run reads them all, once. Here a few thousand of a source stand for the others, so that this
    takes seconds for a set of any size.

    Args:
        tokenizer: of the base; None: tokens are estimated from characters.
        rule: how media become tokens and work.
        folder: where the catalogue goes; must be there.
        sample_tokens: most tokens of a sample, see ``open_catalogue``.

    Raises:
        DataError: a shard or a record is damaged.
    """
    rows = sum(len(shard) for shards in sources.values() for shard in shards)
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.int32, (rows,))
    shape = (rows, len(MODALITIES))
    work = np.lib.format.open_memmap(folder / "work.npy", "w+", np.float32, shape)
    count, otherwise = token_counter(tokenizer), otherwise_counter(tokenizer)
    start, read, remarkable = 0, 0, []
    for (name, _), shards in sources.items():
        texts = read_texts(shards, reader)
        read += len(texts.rows)
        tokens[start : start + texts.count] = texts.spread(texts.measure(count))
        numbers = np.array([0, 0, texts.spread(texts.measure(otherwise)).sum()])
        for shard in progress(shards, name, len(shards)) if len(shards) > MANY_SHARDS else shards:
            part = slice(start, start + len(shard))
            media, work[part] = media_facts(shard, rule)
            whole = tokens[part].astype(np.int64) + media
            tokens[part], (cut, overfull) = bounded(whole, media, sample_tokens)
            numbers += (cut, overfull, 0)
            start = part.stop
        remarkable.append(numbers.tolist())
    tokens.flush()
    work.flush()
    facts = [[*place, *_facts(shards)] for place, shards in sources.items()]
    description = json.dumps(
        {
            "sources": facts,
            "shards": [],  # nothing is read by its rows
            "sample_tokens": sample_tokens,
            "remarkable": remarkable,
        }
    )
    (folder / "catalogue.json").write_text(description, encoding="utf-8")
    return Glance(Catalogue(folder), read)


def _facts(shards: Sequence[ShardIndex]) -> tuple[int, str]:
    """Number of samples, and the digest that a run has too, so that the order is the run's."""
    digest = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()
    return sum(len(shard) for shard in shards), digest
