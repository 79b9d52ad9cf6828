"""What lies in a data set, counted from the columns of its indexes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.inspection.texts import Texts, characters, read_texts
from data_pipeline.modalities import MODALITIES, modality
from data_pipeline.progress import progress
from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.index import SPLITS, DatasetFacts, Manifest, ShardIndex
from data_pipeline.shards.schema import MIXED, combination_of

MEASURES = {
    "text": "characters",
    "video": "seconds",
    "frames": "frames",
    **{name: "seconds" for name in MODALITIES if name != "video" and modality(name).length},
}
"""What has a length, in the order shown, and the length's unit."""

MANY_SHARDS = 100
"""Of one dataset, beyond which progress is shown."""


@dataclass
class Group:
    """The samples of one combination in one dataset of one split.

    Attributes:
        split: the split.
        dataset: the dataset.
        combination: the combination; never ``mixed``.
        samples: number of samples.
        shards: number of shards that hold some of them.
        mixed: number of those that hold other combinations too.
        bytes: records and media, without the tars' own.
        media: modality -> number of media.
        headless: recordings and clips whose length the index does not know: damaged ones.
        texts_read: samples whose text was read.
        lengths: measure -> lengths; of texts those of the samples read, of media all.
    """

    split: str
    dataset: str
    combination: str
    samples: int = 0
    shards: int = 0
    mixed: int = 0
    bytes: int = 0
    media: dict[str, int] = field(default_factory=dict)
    headless: int = 0
    texts_read: int = 0
    lengths: dict[str, np.ndarray] = field(default_factory=dict)

    def total(self, measure: str) -> float:
        """Sum of the lengths of media."""
        return float(self.lengths[measure].sum(dtype=np.float64)) if self._has(measure) else 0.0

    def _has(self, measure: str) -> bool:
        return len(self.lengths.get(measure, ())) > 0

    def summary(self) -> dict[str, dict[str, float]]:
        """Smallest, median, mean and largest of every measure that there is."""
        return {name: summary_of(self.lengths[name]) for name in MEASURES if self._has(name)}

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "split": self.split,
            "dataset": self.dataset,
            "combination": self.combination,
            "samples": self.samples,
            "shards": self.shards,
            "mixed_shards": self.mixed,
            "bytes": self.bytes,
            "media": self.media,
            "seconds": {
                name: round(self.total(name), 3)
                for name, unit in MEASURES.items()
                if unit == "seconds" and self.media.get(name)
            },
            "frames": int(self.total("frames")),
            "media_without_length": self.headless,
            "texts_read": self.texts_read,
            "lengths": self.summary(),
        }


def summary_of(values: np.ndarray) -> dict[str, float]:
    """Smallest, median, mean and largest of at least one number."""
    return {
        "smallest": round(float(values.min()), 3),
        "median": round(float(np.median(values)), 3),
        "mean": round(float(values.mean(dtype=np.float64)), 3),
        "largest": round(float(values.max()), 3),
    }


@dataclass(frozen=True)
class Contents:
    """What a data set holds, or some of its splits and datasets.

    Attributes:
        groups: in the manifest's order.
        facts: split and dataset -> what it asks, as the manifest has it.
        texts: whether texts were read.
    """

    groups: list[Group]
    facts: dict[tuple[str, str], DatasetFacts]
    texts: bool

    def splits(self) -> list[str]:
        """Those that there are."""
        return list(dict.fromkeys(group.split for group in self.groups))

    def of_split(self, split: str) -> list[Group]:
        """The groups of one split."""
        return [group for group in self.groups if group.split == split]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "groups": [group.to_json() for group in self.groups],
            "datasets": [
                {"split": split, "dataset": dataset, **asdict(facts)}
                for (split, dataset), facts in self.facts.items()
            ],
        }


def read_contents(
    manifest: Manifest, splits: Sequence[str] = (), datasets: Sequence[str] = ()
) -> Contents:
    """Count what a data set holds.

    Texts of a set that is elsewhere are not read: its shards would have to be fetched for them.

    Args:
        splits: only these; empty for all.
        datasets: only these; empty for all.

    Raises:
        DataError: a split or dataset is not there, or an index or a record is damaged.
    """
    reader = None if manifest.url else RecordReader()
    groups: list[Group] = []
    chosen = _chosen(manifest, splits, datasets)
    for split, dataset in chosen:
        shards = manifest.shards(split, dataset)
        found: dict[str, Group] = {}
        for combination in sorted({shard.combination for shard in shards}):
            same = [shard for shard in shards if shard.combination == combination]
            _count(same, found, (split, dataset), reader)
        groups += [found[name] for name in sorted(found)]
    facts = {
        (split, dataset): manifest.datasets[split][dataset]
        for split, dataset in chosen
        if dataset in manifest.datasets.get(split, {})
    }
    return Contents(groups, facts, reader is not None)


def _chosen(
    manifest: Manifest, splits: Sequence[str], datasets: Sequence[str]
) -> list[tuple[str, str]]:
    """The pairs of split and dataset that are asked for, in the manifest's order."""
    entries = [entry for entry in manifest.entries if entry.split in SPLITS]
    pairs = list(dict.fromkeys((entry.split, entry.dataset) for entry in entries))
    for names, place, what in ((splits, 0, "split"), (datasets, 1, "dataset")):
        for name in names:
            if all(pair[place] != name for pair in pairs):
                known = ", ".join(dict.fromkeys(pair[place] for pair in pairs)) or "nothing"
                raise DataError(f"{manifest.folder} has no {what} '{name}'; it has {known}")
        pairs = [pair for pair in pairs if not names or pair[place] in names]
    if not pairs:
        raise DataError(f"{manifest.folder} holds no shard; build the data set again")
    return pairs


def _count(
    shards: Sequence[ShardIndex],
    found: dict[str, Group],
    place: tuple[str, str],
    reader: RecordReader | None,
) -> None:
    """Add shards that list the same combination, or are all mixed, to their groups."""
    lengths: dict[str, list[tuple[str, np.ndarray]]] = {}
    codes = []
    many, name = len(shards) > MANY_SHARDS, "/".join(place)
    for shard in progress(shards, name, len(shards)) if many else shards:
        code, parts = _parts(shard)
        codes.append(code)
        for part in parts:
            group = found.setdefault(part.combination, Group(*place, part.combination))
            part.add_to(group, shard.combination == MIXED)
            lengths.setdefault(part.combination, []).extend(part.lengths())
    for name, measured in lengths.items():
        group = found[name]
        for measure in dict.fromkeys(measure for measure, _ in measured):
            values = [part for each, part in measured if each == measure]
            old = [group.lengths[measure]] if measure in group.lengths else []
            group.lengths[measure] = np.concatenate([*old, *values])
    if reader is not None:
        _add_texts(found, read_texts(shards, reader), np.concatenate(codes))


def _add_texts(found: dict[str, Group], texts: Texts, codes: np.ndarray) -> None:
    measured = texts.measure(characters)
    code = codes[texts.rows]
    for each in np.unique(code):
        group = found[_name(int(each))]
        old = group.lengths.get("text", np.zeros(0, np.int64))
        group.lengths["text"] = np.concatenate([old, measured[code == each]])
        group.texts_read = len(group.lengths["text"])


@dataclass(frozen=True)
class _Part:
    """The samples of one combination in one shard, as selections of its columns."""

    shard: ShardIndex
    combination: str
    samples: np.ndarray
    media: np.ndarray

    def add_to(self, group: Group, mixed: bool) -> None:
        columns = self.shard.columns
        group.samples += int(self.samples.sum())
        group.shards += 1
        group.mixed += mixed
        sizes = (columns["json_size"][self.samples], columns["size"][self.media])
        group.bytes += sum(int(size.sum(dtype=np.uint64)) for size in sizes)
        for name, chosen in self._by_modality():
            group.media[name] = group.media.get(name, 0) + int(chosen.sum())
            if modality(name).length is not None:
                group.headless += int((columns["duration_ms"][chosen] == 0).sum())

    def lengths(self) -> Iterator[tuple[str, np.ndarray]]:
        """Known lengths of its media by measure: seconds float32, frames uint32."""
        columns = self.shard.columns
        for name, chosen in self._by_modality():
            if modality(name).length is None:
                continue
            known = chosen & (columns["duration_ms"] > 0)
            yield name, (columns["duration_ms"][known] / 1000).astype(np.float32)
            if name == "video":
                yield "frames", columns["frames"][known]

    def _by_modality(self) -> Iterator[tuple[str, np.ndarray]]:
        code = self.shard.columns["modality"]
        for number, name in enumerate(self.shard.modalities):
            chosen = self.media & (code == number)
            if chosen.any():
                yield name, chosen


def _parts(shard: ShardIndex) -> tuple[np.ndarray, list[_Part]]:
    """Every sample's combination, as bits of ``MODALITIES``, and a part for each that occurs."""
    columns = shard.columns
    samples = len(columns["json_offset"])
    ends = columns["media_end"].astype(np.int64)
    owner = np.repeat(np.arange(samples), np.diff(ends, prepend=0))
    code = np.zeros(samples, np.uint8)
    for number, name in enumerate(shard.modalities):
        code[owner[columns["modality"] == number]] |= 1 << MODALITIES.index(name)
    parts = [
        _Part(shard, _name(int(each)), code == each, code[owner] == each)
        for each in np.unique(code)
    ]
    return code, parts


def _name(code: int) -> str:
    return combination_of(m for bit, m in enumerate(MODALITIES) if code >> bit & 1)


def few_modalities_first(combination: str) -> tuple[int, str]:
    """Sorts combinations."""
    return combination.count("+"), combination
