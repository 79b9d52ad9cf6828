"""What a dataset's shards hold, for the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards.checksums import file_sha256
from data_pipeline.shards.damage import member_damage
from data_pipeline.shards.index import (
    Counts,
    DatasetFacts,
    SampleIndex,
    ShardEntry,
    ShardIndex,
    index_path,
    load_index,
)
from data_pipeline.shards.scan import index_shard
from data_pipeline.shards.schema import Sample, parse_sample

REWRITTEN = ".by-combination"
"""``X.by-combination/`` beside ``X.tar`` holds the same samples and stands in for it."""

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


@dataclass(frozen=True)
class Description:
    """One dataset in one split.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        name: of the dataset.
        entries: its shards.
        facts: what it asks.
        counts: combination -> how much of it.
    """

    split: str
    name: str
    entries: tuple[ShardEntry, ...]
    facts: DatasetFacts
    counts: dict[str, Counts]


def shard_files(place: Path) -> list[Path]:
    """The tars in a dataset's folder and the folders below, in the manifest's order.

    Raises:
        DataError: there is a compressed one, which would be left out otherwise.
    """
    files = sorted(
        path
        for path in place.rglob("*.t*")
        if not any(part.startswith(".") for part in path.relative_to(place).parts)
    )
    for path in files:
        if path.name.endswith(_COMPRESSED):
            raise DataError(
                f"{path} is compressed; a shard is read by offsets: decompress it to a .tar first"
            )
    return [
        path
        for path in files
        if path.suffix == ".tar" and path.is_file() and not path.with_suffix(REWRITTEN).is_dir()
    ]


def describe_dataset(folder: Path, split: str, place: Path) -> Description:
    """Describe the shards of one dataset in one split; indexes that are missing are made.

    Args:
        folder: what paths are relative to.
        split: the split.
        place: the dataset's folder.

    Raises:
        DataError: a shard is not valid, of another dataset, or damaged since it was indexed.
    """
    shards = [_indexed(tar, place.name) for tar in shard_files(place)]
    answers = Counter[int]()  # by hash: the answers of a large set need not fit in memory
    tally = _Tally()
    entries = []
    for shard in shards:
        _read_samples(shard, answers, tally)
        index = index_path(shard.path)
        entries.append(
            ShardEntry(
                split=split,
                dataset=place.name,
                combination=shard.combination,
                path=shard.path.relative_to(folder).as_posix(),
                samples=len(shard),
                bytes=shard.path.stat().st_size,
                sha256=file_sha256(shard.path),
                index_bytes=index.stat().st_size,
                index_sha256=file_sha256(index),
            )
        )
    _refuse_repeated_keys(shards)
    counts = tally.counts()
    samples = answers.total()
    facts = DatasetFacts(
        combination=" ".join(counts),
        samples=samples,
        answers=len(answers),
        majority=round(max(answers.values(), default=0) / max(1, samples), 4),
    )
    return Description(split, place.name, tuple(entries), facts, counts)


class _Tally:
    """Adds up samples by combination."""

    def __init__(self) -> None:
        self._samples = Counter[str]()
        self._bytes = Counter[str]()
        self._media: dict[str, Counter[str]] = {}

    def add(self, combination: str, sample: SampleIndex) -> None:
        self._samples[combination] += 1
        self._bytes[combination] += sample.json_size + sum(each.size for each in sample.media)
        media = self._media.setdefault(combination, Counter())
        media.update(each.modality for each in sample.media)

    def counts(self) -> dict[str, Counts]:
        return {
            name: Counts(number, dict(sorted(self._media[name].items())), self._bytes[name])
            for name, number in sorted(self._samples.items())
        }


def _indexed(tar: Path, dataset: str) -> ShardIndex:
    """The index of a tar, made if it is missing and checked byte by byte if it was there."""
    if not index_path(tar).is_file():
        index_shard(tar)
        shard = load_index(tar)
    else:
        shard = load_index(tar)
        for problem in member_damage(shard):
            raise DataError(f"{tar} {problem}; restore it, or delete {index_path(tar).name}")
    if shard.dataset != dataset:
        raise DataError(
            f"{tar}: its samples are of dataset {shard.dataset}, the folder is called {dataset}; "
            "rename the folder"
        )
    return shard


def _read_samples(shard: ShardIndex, answers: Counter[int], tally: _Tally) -> None:
    with shard.path.open("rb") as stream:
        for sample in shard.samples:
            stream.seek(sample.json_offset)
            source = f"{shard.path}:{sample.key}"
            record = parse_sample(stream.read(sample.json_size), source)
            if not _agree(record, shard, sample):
                raise DataError(
                    f"{source}: the record and {index_path(shard.path).name} differ; delete the "
                    "index and index the shard again"
                )
            answers[hash(record.turns[-1].text)] += 1
            tally.add(record.combination, sample)


def _agree(record: Sample, shard: ShardIndex, sample: SampleIndex) -> bool:
    """Whether a record is the one that the index describes."""
    return (record.key, record.dataset) == (sample.key, shard.dataset) and [
        (each.modality, each.member) for each in record.media
    ] == [(each.modality, each.member) for each in sample.media]


def _refuse_repeated_keys(shards: Sequence[ShardIndex]) -> None:
    hashes = [
        np.fromiter((hash(each.key) for each in shard.samples), np.int64, len(shard))
        for shard in shards
    ]
    if not hashes:
        return
    values, times = np.unique(np.concatenate(hashes), return_counts=True)
    repeated = set(values[times > 1].tolist())
    if not repeated:
        return
    first: dict[str, Path] = {}
    for shard in shards:
        for sample in shard.samples:
            if hash(sample.key) not in repeated:
                continue
            if sample.key in first:
                raise DataError(
                    f"{shard.path}: sample '{sample.key}' is in {first[sample.key]} too; give "
                    "each sample of a dataset a key of its own"
                )
            first[sample.key] = shard.path
