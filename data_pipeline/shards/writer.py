"""Writes shards with WebDataset's ``TarWriter`` and scans tars for their index.

The bytes depend on the samples only: modification time, owner and order are fixed.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from webdataset import TarWriter

from data_pipeline.errors import DataError
from data_pipeline.shards.index import (
    MediumIndex,
    SampleIndex,
    ShardIndex,
    dump_index,
    index_path,
)
from data_pipeline.shards.probe import sound_duration_ms, video_length
from data_pipeline.shards.schema import (
    MAX_RECORD_BYTES,
    Sample,
    modalities_of,
    parse_sample,
    validate_sample,
)

MAX_MEDIUM_BYTES = 512 * 1024**2
"""Largest medium that may lie in a shard, bytes."""

_NAME = re.compile(r"([A-Za-z0-9_-]+)\.([0-9a-z.]+)")
_Member = tuple[int, int]
"""Offset and size in the tar, bytes."""


class ShardWriter:
    """Writes the samples of one dataset and combination into numbered shards.

    A shard appears, index first, by renames: a tar that is there is complete and has its index.
    Use it as a context manager; leaving it with an exception drops the unfinished shard.

    Args:
        folder: where ``<dataset>-00000.tar`` goes; made if it does not exist.
        dataset: name of the dataset.
        combination: combination that every sample must have.
        max_samples: most samples in a shard.
        max_bytes: a shard is closed when its media and records reach this size, bytes.
    """

    def __init__(
        self,
        folder: Path,
        dataset: str,
        combination: str,
        max_samples: int = 4000,
        max_bytes: int = 256 * 1024**2,
    ):
        modalities_of(combination)
        self.shards: list[ShardIndex] = []
        self._folder = Path(folder)
        self._dataset = dataset
        self._combination = combination
        self._max_samples = max_samples
        self._max_bytes = max_bytes
        self._keys: set[str] = set()
        self._tar: TarWriter | None = None
        self._stream: IO[bytes] | None = None
        self._samples = 0
        self._bytes = 0

    def write(self, sample: Sample, media: Mapping[str, bytes]) -> None:
        """Append a sample.

        Args:
            sample: the record.
            media: member name (``0.jpg``) -> bytes, for exactly the sample's media.

        Raises:
            DataError: the sample is not valid, of another dataset or combination, was written
                before, or has too large media.
        """
        validate_sample(sample, members=media)
        self._refuse_stranger(sample, media)
        record = sample.to_json()
        size = len(record) + sum(len(data) for data in media.values())
        full = self._samples >= self._max_samples or self._bytes + size > self._max_bytes
        if self._tar is not None and full:
            self._finish()
        if self._tar is None:
            self._begin()
        assert self._tar is not None
        self._tar.write({"__key__": sample.key, "json": record, **media})
        self._keys.add(sample.key)
        self._samples += 1
        self._bytes += size

    def close(self) -> list[ShardIndex]:
        """Finish the last shard; returns the indexes of all shards written."""
        if self._tar is not None:
            self._finish()
        return self.shards

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._stream is not None:
            self._stream.close()
            self._partial.unlink(missing_ok=True)

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._dataset}-{len(self.shards):05d}.tar"

    @property
    def _partial(self) -> Path:
        return self._path.with_suffix(f".tar.partial-{os.getpid()}")

    def _refuse_stranger(self, sample: Sample, media: Mapping[str, bytes]) -> None:
        if sample.dataset != self._dataset:
            raise DataError(
                f"sample '{sample.key}' is of dataset {sample.dataset}, this shard's is "
                f"{self._dataset}"
            )
        if sample.combination != self._combination:
            raise DataError(
                f"sample '{sample.key}' is {sample.combination}, this shard holds "
                f"{self._combination} only; give each combination a dataset of its own"
            )
        if sample.key in self._keys:
            raise DataError(f"sample '{sample.key}' is written twice")
        if surplus := set(media) - {medium.member for medium in sample.media}:
            raise DataError(f"sample '{sample.key}' has unlisted media {sorted(surplus)}")
        for member, data in media.items():
            if len(data) > MAX_MEDIUM_BYTES:
                raise DataError(f"sample '{sample.key}': {member} exceeds {MAX_MEDIUM_BYTES} bytes")

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stream = self._partial.open("wb")
        self._tar = TarWriter(self._stream, encoder=False, mtime=0)
        self._samples = self._bytes = 0

    def _finish(self) -> None:
        assert self._tar is not None
        assert self._stream is not None
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._tar = self._stream = None
        partial, path = self._partial, self._path
        shard = build_index(partial)
        _write_index(path, shard.samples)
        partial.replace(path)
        self.shards.append(ShardIndex(path, shard.dataset, shard.combination, shard.samples))


def index_shard(tar: Path) -> ShardIndex:
    """Scan a tar, whoever wrote it, and write the index beside it.

    Raises:
        DataError: as ``build_index``.
    """
    shard = build_index(tar)
    _write_index(tar, shard.samples)
    return shard


def build_index(tar: Path) -> ShardIndex:
    """Scan an uncompressed tar for its samples; nothing is unpacked.

    Raises:
        DataError: the file is no plain tar, a member is no plain file at the top level, a record
            or its media are not valid, a key comes twice, or datasets or combinations are mixed.
    """
    samples: list[SampleIndex] = []
    datasets: set[str] = set()
    combinations: set[str] = set()
    seen: set[str] = set()
    try:
        with tar.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for key, members in _groups(archive, tar):
                if key in seen:
                    raise DataError(f"{tar}: the members of sample '{key}' are not together")
                seen.add(key)
                record, entry = _index_sample(stream, key, members, tar)
                samples.append(entry)
                datasets.add(record.dataset)
                combinations.add(record.combination)
    except FileNotFoundError as error:
        raise DataError(f"shard {tar} does not exist") from error
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{tar} is no readable, uncompressed tar ({error})") from error
    for name, values in (("dataset", datasets), ("combination", combinations)):
        if len(values) != 1:
            raise DataError(
                f"{tar}: a shard holds one {name}, found {', '.join(sorted(values)) or 'none'}"
            )
    return ShardIndex(tar, datasets.pop(), combinations.pop(), tuple(samples))


def _groups(archive: tarfile.TarFile, tar: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Adjacent members of one key: (key, member name -> place)."""
    key, members = "", dict[str, _Member]()
    for info in archive:
        match = _NAME.fullmatch(info.name)
        if not info.isreg() or match is None:
            raise DataError(
                f"{tar}: member '{info.name}' is refused; a shard holds plain files named "
                "<key>.json and <key>.<number>.<extension>"
            )
        if match[1] != key and members:
            yield key, members
            members = {}
        key = match[1]
        if match[2] in members:
            raise DataError(f"{tar}: member '{info.name}' comes twice")
        members[match[2]] = (info.offset_data, info.size)
    if members:
        yield key, members


def _index_sample(
    stream: IO[bytes], key: str, members: dict[str, _Member], tar: Path
) -> tuple[Sample, SampleIndex]:
    source = f"{tar.name}:{key}.json"
    if "json" not in members:
        raise DataError(f"{tar}: sample '{key}' has no {key}.json")
    offset, size = members["json"]
    if size > MAX_RECORD_BYTES:
        raise DataError(f"{source}: a record of {size} bytes exceeds {MAX_RECORD_BYTES}")
    sample = parse_sample(_bytes_at(stream, offset, size), source)
    if sample.key != key:
        raise DataError(f"{source}: the record's key is '{sample.key}'")
    validate_sample(sample, members, source)
    media = []
    for medium in sample.media:
        place, length = members[medium.member]
        if length > MAX_MEDIUM_BYTES:
            raise DataError(
                f"{tar}: {key}.{medium.member} has {length} bytes, more than {MAX_MEDIUM_BYTES}"
            )
        data = b"" if medium.modality == "image" else _bytes_at(stream, place, length)
        duration_ms, frames = _facts(medium.modality, data)
        media.append(
            MediumIndex(medium.modality, medium.member, place, length, duration_ms, frames)
        )
    return sample, SampleIndex(key, offset, size, tuple(media))


def _facts(modality: str, data: bytes) -> tuple[int, int]:
    """Duration in milliseconds and frames of a medium."""
    if modality == "image":
        return 0, 0
    if modality == "video":
        return video_length(data)
    return sound_duration_ms(data), 0


def _bytes_at(stream: IO[bytes], offset: int, size: int) -> bytes:
    """Bytes of a member; tarfile seeks to where it needs to be before its next header."""
    stream.seek(offset)
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("it is cut off")
    return data


def _write_index(tar: Path, samples: tuple[SampleIndex, ...]) -> None:
    path = index_path(tar)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_bytes(dump_index(samples))
    partial.replace(path)
