"""All samples that a run can draw, with their lengths and encoder work, as mapped columns."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from filelock import FileLock

from data_pipeline.conversation.original import learnt_otherwise
from data_pipeline.conversation.template import text_tokens
from data_pipeline.conversation.tokenizer import TextTokenizer
from data_pipeline.errors import DataError
from data_pipeline.modalities import MODALITIES
from data_pipeline.planning.plan import Draws, Source
from data_pipeline.planning.remarks import Remarkable
from data_pipeline.progress import progress
from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.index import Manifest, SampleIndex, ShardIndex, load_index

_FORMAT = 1
_DESCRIPTION = "catalogue.json"
MOST_TOKENS = 2**31 - 1


class MediaRule(Protocol):
    """How media become language-model tokens and encoder work. It can be pickled."""

    @property
    def name(self) -> str:
        """Identifies the rule where its results are cached."""

    def tokens(self, modality: str, duration_ms: int) -> int:
        """Language-model tokens of a medium."""

    def work(self, modality: str, duration_ms: int) -> float:
        """What its encoder computes: pictures, frames of a video, or seconds of sound."""


class Entry(NamedTuple):
    """A sample and the shard it lies in."""

    shard: ShardIndex
    sample: SampleIndex


class Catalogue:
    """The sources of one split that a recipe names; a sample is known by its row.

    The columns are mapped from files, so that millions of samples cost no memory of the
    process's own, and all processes of a machine share them. Pickles as the folder's name.

    Attributes:
        folder: where the columns are.
        sources: what a plan draws from.
        combinations: of the sources, sorted; dealing knows each by its number.
        combination: number of each source's combination, ``[sources]`` int64.
        starts: first row of every source and, last, the number of rows, ``[sources + 1]``.
        tokens: length of every sample, language-model tokens, media included, ``[rows]`` int32;
            of one that is cut, what is left.
        work: encoder work by modality in the order of ``MODALITIES``: pictures, frames or
            seconds, ``[rows, modalities]`` float32.
        sample_tokens: most tokens of a sample; 0: no bound.
        remarkable: of every source, how many samples are cut or otherwise worth a remark.
    """

    def __init__(self, folder: Path) -> None:
        """Open what ``open_catalogue`` made.

        Raises:
            DataError: the folder does not hold a catalogue.
        """
        self.folder = folder
        try:
            record = json.loads((folder / _DESCRIPTION).read_text("utf-8"))
            self.tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
            self.work = np.load(folder / "work.npy", mmap_mode="r", allow_pickle=False)
            self.sources = tuple(Source(*facts) for facts in record["sources"])
            rows = sum(source.count for source in self.sources)
            self.sample_tokens = int(record.get("sample_tokens", 0))
            noted = record.get("remarkable") or [()] * len(self.sources)
            self.remarkable = tuple(Remarkable(*numbers) for numbers in noted)
            if self.tokens.shape != (rows,) or self.work.shape != (rows, len(MODALITIES)):
                raise ValueError("its columns are not as long as its sources")
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise DataError(
                f"The catalogue {folder} cannot be read ({error}): delete that folder."
            ) from error
        self.combinations = sorted({source.combination for source in self.sources})
        numbers = {name: number for number, name in enumerate(self.combinations)}
        self.combination = np.array([numbers[s.combination] for s in self.sources], dtype=np.int64)
        self.starts = np.cumsum([0, *(source.count for source in self.sources)])
        self._shards: list[dict[str, Any]] = record["shards"]
        counts = (shard["samples"] for shard in self._shards)
        self._shard_starts = list(accumulate(counts, initial=0))
        # Bound to the instance, so that it goes with it.
        self._shard: Callable[[int], ShardIndex] = lru_cache(maxsize=4096)(self._open_shard)

    @classmethod
    def load(cls, folder: Path) -> Catalogue:
        """Open a catalogue by its folder."""
        return cls(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return Catalogue, (self.folder,)

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, draws: Draws) -> np.ndarray:
        """Catalogue rows of planned samples, ``[samples]`` int64."""
        return self.starts[draws.source] + draws.row

    def source_of(self, rows: np.ndarray) -> np.ndarray:
        """Number of the source of each row."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def entry(self, row: int) -> Entry:
        """A sample by its row."""
        # In Python: NumPy takes several times as long for a single number.
        number = bisect_right(self._shard_starts, row) - 1
        shard = self._shard(number)
        return Entry(shard, shard.samples[row - self._shard_starts[number]])

    def _open_shard(self, number: int) -> ShardIndex:
        facts = self._shards[number]
        return load_index(
            Path(facts["path"]),
            url=facts["url"],
            bytes=facts["bytes"],
            sha256=facts["sha256"],
        )


def open_catalogue(
    manifest: Manifest,
    split: str,
    datasets: Sequence[str],
    tokenizer: TextTokenizer,
    rule: MediaRule,
    cache: Path,
    reader: RecordReader | None = None,
    sample_tokens: int = 0,
) -> Catalogue:
    """Find datasets in a built set, count their tokens, and lay the columns down in the cache.

    What was counted before, by this or another process or run, is not counted again.

    Args:
        datasets: names, in the recipe's order.
        cache: folder for token counts and columns; may be deleted at any time.
        reader: of records; needed for a set that is not on this machine.
        sample_tokens: most tokens of a sample; longer ones are cut. 0: no bound.

    Raises:
        DataError: if a dataset is not in the split.
    """
    shards = _shards_by_source(manifest, split, datasets)
    layout = tokenizer.template.name + tokenizer.serialised()
    text = hashlib.sha256(layout.encode()).hexdigest()[:16]
    identity: list[Any] = [str(manifest.folder.resolve()), manifest.url, text, rule.name]
    identity += [list(MODALITIES), sample_tokens]
    # The index as well as the tar: it says what samples there are and how long their media.
    index = {manifest.folder / entry.path: entry.index_sha256 for entry in manifest.entries}
    for source, found in shards.items():
        identity.append([*source, *(f"{shard.sha256} {index[shard.path]}" for shard in found)])
    name = hashlib.sha256(json.dumps([_FORMAT, identity]).encode()).hexdigest()[:24]
    folder = cache / "catalogue" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        with contextlib.suppress(DataError):  # it is not there, or damaged
            return Catalogue(folder)
        counter = _TextCounter(cache / "lengths" / text, tokenizer, reader or RecordReader())
        _compile(folder, shards, counter, rule, sample_tokens)
    return Catalogue(folder)


def _shards_by_source(
    manifest: Manifest, split: str, datasets: Sequence[str]
) -> dict[tuple[str, str], list[ShardIndex]]:
    """The shards of every (dataset, combination), datasets in the order asked for."""
    found: dict[str, list[ShardIndex]] = {}
    for shard in manifest.shards(split):
        found.setdefault(shard.dataset, []).append(shard)
    missing = [name for name in datasets if name not in found]
    if missing:
        raise DataError(
            f"{manifest.folder} has no {split} data for {', '.join(missing)} (it has "
            f"{', '.join(sorted(found))}): take them out of data.datasets or build them."
        )
    grouped: dict[tuple[str, str], list[ShardIndex]] = {}
    for name in datasets:
        for combination in sorted({shard.combination for shard in found[name]}):
            grouped[name, combination] = [s for s in found[name] if s.combination == combination]
    return grouped


class _TextCounter:
    """Text tokens of every sample of a shard, kept in one file per shard."""

    def __init__(self, folder: Path, tokenizer: TextTokenizer, reader: RecordReader) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._reader = reader

    def count(self, shard: ShardIndex) -> np.ndarray:
        """Tokens, and whether the published code learns otherwise (0, 1), ``[2, samples]`` int32.

        0 for a sample whose record makes no sense: reading will say so.

        Raises:
            DataError: the shard, or a sample's bytes in it, are damaged. Nothing is kept then,
                since the restored shard has the same name.
        """
        path = self._folder / f"{shard.sha256[:32]}.npy"
        if path.is_file():
            try:
                # Mapped, since a damaged header may claim any size.
                counted = np.load(path, mmap_mode="r", allow_pickle=False)
                if counted.shape == (2, len(shard.samples)) and counted.dtype == np.int32:
                    return counted
            except (ValueError, OSError, EOFError):
                pass  # a damaged cache entry is only counted again
        found = [self._sample(shard, each) for each in shard.samples]
        counted = np.array(found, dtype=np.int32).reshape(-1, 2).T
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        with partial.open("wb") as file:
            np.save(file, counted, allow_pickle=False)
        partial.replace(path)
        return counted

    def _sample(self, shard: ShardIndex, sample: SampleIndex) -> tuple[int, bool]:
        try:
            turns = self._reader.record(shard, sample)["conversations"]
            otherwise = learnt_otherwise(turns, self._tokenizer.template)
            return text_tokens(turns, self._tokenizer), bool(otherwise)
        except (KeyError, TypeError, AttributeError):
            return 0, False


def _compile(
    folder: Path,
    shards: Mapping[tuple[str, str], Sequence[ShardIndex]],
    counter: _TextCounter,
    rule: MediaRule,
    sample_tokens: int,
) -> None:
    """Write the columns, one shard in memory at a time, visible by one rename."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    every = [shard for found in shards.values() for shard in found]
    rows = sum(len(shard.samples) for shard in every)
    tokens = np.lib.format.open_memmap(partial / "tokens.npy", "w+", np.int32, (rows,))
    shape = (rows, len(MODALITIES))
    work = np.lib.format.open_memmap(partial / "work.npy", "w+", np.float32, shape)
    remarkable = np.zeros((len(shards), len(Remarkable._fields)), np.int64)
    owners = np.repeat(np.arange(len(shards)), [len(found) for found in shards.values()])
    start = 0
    shown = progress(every, "lengths", len(every)) if len(every) > 100 else every
    for owner, shard in zip(owners, shown, strict=True):
        end = start + len(shard.samples)
        media, work[start:end] = media_facts(shard, rule)
        text, otherwise = counter.count(shard)
        tokens[start:end], numbers = bounded(text + media, media, sample_tokens)
        remarkable[owner] += (*numbers, otherwise.sum())
        start = end
    tokens.flush()
    work.flush()
    record = {
        "sources": [[*source, *_source_facts(found)] for source, found in shards.items()],
        "sample_tokens": sample_tokens,
        "remarkable": remarkable.tolist(),
        "shards": [
            {
                "path": str(shard.path.resolve()),
                "url": shard.url,
                "bytes": shard.bytes,
                "sha256": shard.sha256,
                "samples": len(shard.samples),
            }
            for shard in every
        ],
    }
    (partial / _DESCRIPTION).write_text(json.dumps(record), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _source_facts(shards: Sequence[ShardIndex]) -> tuple[int, str]:
    """Number of samples, and a digest of the content."""
    digest = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()
    return sum(len(shard.samples) for shard in shards), digest


def bounded(tokens: np.ndarray, media: np.ndarray, most: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Lengths of samples as they will be read.

    Args:
        tokens: of every sample, text and media, ``[samples]``.
        media: those of its media.
        most: ``data.sample_tokens``.

    Returns:
        The lengths, and the numbers ``cut`` and ``overfull`` of ``Remarkable``.
    """
    if not most:
        return np.minimum(tokens, MOST_TOKENS), (0, 0)
    return np.minimum(tokens, most), (int((tokens > most).sum()), int((media >= most).sum()))


def media_facts(shard: ShardIndex, rule: MediaRule) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[samples]`` int64 and encoder work ``[samples, modalities]`` of a shard's media."""
    columns, samples = shard.columns, len(shard.samples)
    ends = columns["media_end"].astype(np.int64)
    sample = np.repeat(np.arange(samples), np.diff(ends, prepend=0))
    code = columns["modality"].astype(np.int64)
    # Many media share a length: each different one is asked for once.
    kinds, inverse = np.unique(
        (code << 32) | columns["duration_ms"].astype(np.int64), return_inverse=True
    )
    named = [(shard.modalities[int(kind >> 32)], int(kind & 0xFFFFFFFF)) for kind in kinds]
    each_tokens = np.array([rule.tokens(*kind) for kind in named], dtype=np.int64)
    each_work = np.array([rule.work(*kind) for kind in named], dtype=np.float64)
    place = np.array([MODALITIES.index(modality) for modality, _ in named], dtype=np.int64)
    width = len(MODALITIES)
    if not len(kinds):
        return np.zeros(samples, np.int64), np.zeros((samples, width), np.float32)
    tokens = np.bincount(sample, weights=each_tokens[inverse], minlength=samples)
    cells = sample * width + place[inverse]
    work = np.bincount(cells, weights=each_work[inverse], minlength=samples * width)
    return tokens.astype(np.int64), work.reshape(samples, width).astype(np.float32)
