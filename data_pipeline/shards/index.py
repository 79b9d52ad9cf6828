"""The index beside a shard, and the manifest of a folder of shards, as light typed objects.

``X.index.jsonl`` lies beside ``X.tar`` and has one line per sample: where its bytes are and the
facts about its media that no model changes. ``manifest.json`` lists the shards of a folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.reading.medium import MODALITIES

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class MediumIndex:
    """Where a medium lies in its tar and how long it is.

    Attributes:
        modality: one of ``MODALITIES``.
        member: member name after ``<key>.``.
        offset: first byte of the medium in the tar.
        size: length, bytes.
        duration_ms: length of a sound or video, milliseconds; 0 for pictures, and where the
            medium's header cannot be read (decoding will find it broken).
        frames: frames of a video; 0 otherwise.
    """

    modality: str
    member: str
    offset: int
    size: int
    duration_ms: int = 0
    frames: int = 0


@dataclass(frozen=True, slots=True)
class SampleIndex:
    """Where a sample lies in its tar.

    Attributes:
        key: the sample's key.
        json_offset: first byte of its JSON record in the tar.
        json_size: length of the record, bytes.
        media: its media, in the order of the record.
    """

    key: str
    json_offset: int
    json_size: int
    media: tuple[MediumIndex, ...] = ()


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """A shard and its samples in the order of the tar.

    Attributes:
        path: the tar.
        dataset: the one dataset whose samples it holds.
        combination: the one combination of all its samples.
        samples: one entry per sample.
    """

    path: Path
    dataset: str
    combination: str
    samples: tuple[SampleIndex, ...]


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A shard as the manifest lists it.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        dataset: name of the dataset.
        combination: combination of modalities of every sample.
        path: of the tar, relative to the manifest's folder, with ``/``.
        samples: number of samples.
        bytes: size of the tar.
        sha256: of the tar, hexadecimal.
        index_bytes: size of the index.
        index_sha256: of the index, hexadecimal.
    """

    split: str
    dataset: str
    combination: str
    path: str
    samples: int
    bytes: int
    sha256: str
    index_bytes: int
    index_sha256: str


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """What a dataset's split asks.

    Attributes:
        combination: combination of modalities.
        samples: number of samples.
        answers: number of different (last) answers.
        majority: share of the most frequent answer, which is what guessing it would score.
    """

    combination: str
    samples: int
    answers: int
    majority: float


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds and how it was made.

    Attributes:
        folder: the folder that the shards' paths are relative to.
        builder: name and version of the builder.
        seed: the builder's seed.
        options: the builder's other options.
        packages: versions of the packages that the media come from.
        notes: what was left out and why, one sentence each.
        datasets: split -> dataset -> facts.
        entries: every shard.
        version: version of the manifest's format.
    """

    folder: Path
    builder: str
    seed: int
    options: dict[str, Any]
    packages: dict[str, str]
    notes: tuple[str, ...]
    datasets: dict[str, dict[str, DatasetFacts]]
    entries: tuple[ShardEntry, ...]
    version: int = MANIFEST_VERSION
    _loaded: dict[str, ShardIndex] = field(default_factory=dict, repr=False, compare=False)

    def splits(self) -> tuple[str, ...]:
        """The splits that have shards, in the order train, val, test."""
        present = {entry.split for entry in self.entries}
        return tuple(split for split in SPLITS if split in present)

    def shards(self, split: str, dataset: str | None = None) -> list[ShardIndex]:
        """Indexes of the shards of a split (of one dataset), in the manifest's order.

        Raises:
            DataError: nothing of this split and dataset exists, or an index is missing or damaged.
        """
        chosen = [
            entry
            for entry in self.entries
            if entry.split == split and dataset in (None, entry.dataset)
        ]
        if not chosen:
            known = sorted({f"{entry.split}/{entry.dataset}" for entry in self.entries})
            raise DataError(
                f"{self.folder} holds no {split}/{dataset or '*'}; it holds {', '.join(known)}"
            )
        return [self._index(entry) for entry in chosen]

    def _index(self, entry: ShardEntry) -> ShardIndex:
        if entry.path not in self._loaded:
            tar = self.folder / entry.path
            shard = load_index(tar, entry.dataset, entry.combination)
            if len(shard.samples) != entry.samples:
                raise DataError(
                    f"{index_path(tar)} lists {len(shard.samples)} samples but the manifest says "
                    f"{entry.samples}; build the data set again"
                )
            self._loaded[entry.path] = shard
        return self._loaded[entry.path]

    @property
    def digest(self) -> str:
        """SHA-256 over the checksums of all shards and indexes: names this data exactly."""
        text = "\n".join(f"{e.path} {e.sha256} {e.index_sha256}" for e in self.entries)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        record = {
            "version": self.version,
            "builder": self.builder,
            "seed": self.seed,
            "options": self.options,
            "packages": self.packages,
            "notes": list(self.notes),
            "datasets": {
                split: {name: asdict(facts) for name, facts in datasets.items()}
                for split, datasets in self.datasets.items()
            },
            "shards": [asdict(entry) for entry in self.entries],
        }
        return json.dumps(record, ensure_ascii=False, indent=1) + "\n"


def load_manifest(folder: Path | str) -> Manifest:
    """Read ``folder/manifest.json``.

    Raises:
        DataError: it is missing, damaged, of another version, or a path leaves the folder.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist; build the data set first "
            "(python -m data_pipeline.build quickstart)"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); build the data set again") from error
    try:
        if record["version"] != MANIFEST_VERSION:
            raise DataError(
                f"{path} has format {record['version']}, this version reads {MANIFEST_VERSION}; "
                "build the data set again"
            )
        entries = tuple(ShardEntry(**entry) for entry in record["shards"])
        manifest = Manifest(
            folder=folder,
            builder=record["builder"],
            seed=record["seed"],
            options=record["options"],
            packages=record["packages"],
            notes=tuple(record["notes"]),
            datasets={
                split: {name: DatasetFacts(**facts) for name, facts in datasets.items()}
                for split, datasets in record["datasets"].items()
            },
            entries=entries,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); build the data set again"
        ) from error
    for entry in entries:
        relative = PurePosixPath(entry.path)
        if relative.is_absolute() or ".." in relative.parts or relative.suffix != ".tar":
            raise DataError(f"{path}: '{entry.path}' is no tar inside the folder")
    return manifest


def index_path(tar: Path) -> Path:
    """The index file that belongs to a tar."""
    return tar.with_suffix(".index.jsonl")


def dump_index(samples: Iterable[SampleIndex]) -> bytes:
    """The content of an index file."""
    return b"".join(_line(sample) for sample in samples)


def load_index(tar: Path, dataset: str, combination: str) -> ShardIndex:
    """Read the index beside a tar.

    Raises:
        DataError: it is missing or damaged.
    """
    path = index_path(tar)
    samples = []
    try:
        with path.open("rb") as stream:
            for line in stream:
                samples.append(_sample(json.loads(line)))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; index the shard again") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} line {len(samples) + 1} is damaged ({error}); index the shard again"
        ) from error
    return ShardIndex(tar, dataset, combination, tuple(samples))


def _line(sample: SampleIndex) -> bytes:
    media = []
    for medium in sample.media:
        record: dict[str, Any] = {
            "modality": medium.modality,
            "member": medium.member,
            "offset": medium.offset,
            "size": medium.size,
        }
        if medium.modality != "image":
            record["duration_ms"] = medium.duration_ms
        if medium.modality == "video":
            record["frames"] = medium.frames
        media.append(record)
    line = {"key": sample.key, "json": [sample.json_offset, sample.json_size], "media": media}
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _sample(record: Any) -> SampleIndex:
    media = tuple(MediumIndex(**medium) for medium in record["media"])
    offset, size = record["json"]
    numbers = [offset, size]
    for medium in media:
        numbers += [medium.offset, medium.size, medium.duration_ms, medium.frames]
        if medium.modality not in MODALITIES:
            raise ValueError(f"unknown modality '{medium.modality}'")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("offsets, sizes and lengths are whole numbers from 0")
    return SampleIndex(str(record["key"]), offset, size, media)
