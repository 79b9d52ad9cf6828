"""The index beside a shard, and the manifest of a folder of shards, as light typed objects.

``X.index`` lies beside ``X.tar`` and says where each sample's bytes are, what they check to, and
the facts about its media that no model changes. ``manifest.json`` lists the shards of a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.shards.columns import IndexTable, SampleIndex, map_table
from data_pipeline.shards.columns import MediumIndex as MediumIndex

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 2
SPLITS = ("train", "val", "test")
MOST_MAPPED = 128
"""Indexes that a process keeps mapped; each costs a file descriptor."""


@dataclass(frozen=True)
class ShardIndex:
    """A shard and its samples in the order of the tar.

    It is light, also when pickled: the index file is mapped when it is asked for a sample.

    Attributes:
        path: the tar, or where a remote set's mirror would have it; the index lies beside it.
        dataset: the one dataset whose samples it holds.
        combination: the one combination of all its samples, or ``mixed``.
        url: the tar's address if it is remote, else empty.
        bytes: size of the tar, as the manifest says; 0 where that is not known.
        sha256: of the tar, hexadecimal, as the manifest says; empty where that is not known.
    """

    path: Path
    dataset: str
    combination: str
    url: str = field(default="", compare=False)
    bytes: int = field(default=0, compare=False)
    sha256: str = field(default="", compare=False)

    @property
    def samples(self) -> Sequence[SampleIndex]:
        """One entry per sample, made when it is asked for."""
        return _table(self._index).samples

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """The index by columns, see ``columns.COLUMNS``; mapped, not to be written to."""
        return _table(self._index).columns

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the codes in the column ``modality``."""
        return _table(self._index).modalities

    @cached_property
    def _index(self) -> Path:
        # Kept, since making and hashing a path takes longer than finding a sample.
        return index_path(self.path)

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A shard as the manifest lists it.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        dataset: name of the dataset.
        combination: combination of modalities of every sample, or ``mixed``.
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
        combination: its combination of modalities; several are separated by blanks.
        samples: number of samples.
        answers: number of different (last) answers.
        majority: share of the most frequent answer, which is what guessing it would score.
    """

    combination: str
    samples: int
    answers: int
    majority: float


@dataclass(frozen=True, slots=True)
class Counts:
    """How much there is of one combination.

    Attributes:
        samples: number of samples.
        media: number of media of each modality that occurs.
        bytes: records and media, without the tars' own.
    """

    samples: int
    media: dict[str, int]
    bytes: int


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
        counts: split -> dataset -> combination -> how much of it; also of mixed shards.
        url: where the shards are if they are elsewhere, without ``/`` at the end; the folder then
            holds their indexes only.
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
    counts: dict[str, dict[str, dict[str, Counts]]] = field(default_factory=dict)
    url: str = ""
    version: int = MANIFEST_VERSION
    _loaded: dict[str, ShardIndex] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
            url = f"{self.url}/{entry.path}" if self.url else ""
            shard = load_index(tar, url, entry.bytes, entry.sha256)
            found = (shard.dataset, shard.combination, len(shard))
            if found != (entry.dataset, entry.combination, entry.samples):
                raise DataError(
                    f"{index_path(tar)} lists {found[2]} samples of {found[0]} ({found[1]}) but "
                    f"the manifest says {entry.samples} of {entry.dataset} "
                    f"({entry.combination}); build the data set again"
                )
            self._loaded[entry.path] = shard
        return self._loaded[entry.path]

    @property
    def digest(self) -> str:
        """SHA-256 over the checksums of all shards and indexes: names this data exactly."""
        text = "\n".join(f"{e.path} {e.sha256} {e.index_sha256}" for e in self.entries)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        """The text of ``manifest.json``; a shard is a line."""
        record: dict[str, Any] = {
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
            "counts": {
                split: {
                    name: {combination: asdict(counts) for combination, counts in found.items()}
                    for name, found in datasets.items()
                }
                for split, datasets in self.counts.items()
            },
        }
        if self.url:
            record["url"] = self.url
        head = json.dumps(record, ensure_ascii=False, indent=1).removesuffix("\n}")
        shards = [json.dumps(asdict(entry), ensure_ascii=False) for entry in self.entries]
        return f'{head},\n "shards": [\n  ' + ",\n  ".join(shards) + "\n ]\n}\n"


class OldManifestError(DataError):
    """The manifest is of another version of the format.

    Attributes:
        builder: name and version of what made the folder.
    """

    def __init__(self, message: str, builder: str):
        super().__init__(message)
        self.builder = builder


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
            raise OldManifestError(
                f"{path} has format {record['version']}, this version reads {MANIFEST_VERSION}; "
                "build the data set again (or, with shards from elsewhere, index it again)",
                str(record["builder"]),
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
            counts={
                split: {
                    name: {key: Counts(**counts) for key, counts in found.items()}
                    for name, found in datasets.items()
                }
                for split, datasets in record["counts"].items()
            },
            url=record.get("url", ""),
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
    return tar.with_suffix(".index")


def load_index(tar: Path, url: str = "", bytes: int = 0, sha256: str = "") -> ShardIndex:
    """Check the index beside a tar, and that it fits the tar.

    Args:
        tar: the tar; it need not be there.
        url: where the tar is if it is not here.
        bytes: the tar's size; 0: not known.
        sha256: of the tar; empty: not known.

    Raises:
        DataError: it is missing or damaged, or is of a tar of another size.
    """
    path = index_path(tar)
    table = _fresh(path)
    sizes = {"the manifest says": bytes or table.tar_bytes}
    if not url:
        with contextlib.suppress(OSError):  # that it is missing, reading or `verify` will say
            sizes["the tar has"] = tar.stat().st_size
    for who, size in sizes.items():
        if size != table.tar_bytes:
            raise DataError(
                f"{path} is the index of a tar of {table.tar_bytes} bytes but {who} {size}; "
                f"restore {tar.name} or index it again"
            )
    return ShardIndex(tar, table.dataset, table.combination, url, bytes, sha256)


@lru_cache(maxsize=MOST_MAPPED)
def _mapped(path: Path) -> tuple[IndexTable, tuple[int, ...]]:
    """A mapped index and the identity of its file."""
    identity = _identity(path)
    return map_table(path), identity


def _table(path: Path) -> IndexTable:
    return _mapped(path)[0]


def _fresh(path: Path) -> IndexTable:
    """The table, mapped again if the file is another than the one that is mapped."""
    table, identity = _mapped(path)
    if identity == _identity(path):
        return table
    _mapped.cache_clear()
    return _table(path)


def _identity(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
