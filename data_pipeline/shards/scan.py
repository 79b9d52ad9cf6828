"""Scans a tar, whoever wrote it, for its index."""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_pipeline.errors import DataError
from data_pipeline.shards.columns import IndexTable, MediumIndex, SampleIndex
from data_pipeline.shards.index import ShardIndex, index_path
from data_pipeline.shards.probe import media_length
from data_pipeline.shards.schema import (
    MAX_MEDIUM_BYTES,
    MAX_RECORD_BYTES,
    MIXED,
    Sample,
    parse_sample,
    validate_sample,
)
from data_pipeline.shards.tar import tar_members

_NAME = re.compile(r"(?:\./)?([A-Za-z0-9_-]+)\.([A-Za-z0-9._-]+)")
_IGNORED = re.compile(r"(?:\./)?(?:\.[^/]*|[^./]+|__[^/]*__)")
"""Hidden files, and names without extension: no WebDataset reader takes them for samples."""

Member = tuple[int, int]
"""Offset and size in the tar, bytes."""


def index_shard(tar: Path) -> ShardIndex:
    """Scan a tar, whoever wrote it, and write the index beside it.

    Raises:
        DataError: as ``build_index``.
    """
    table = build_index(tar)
    write_index(tar, table)
    return ShardIndex(tar, table.dataset, table.combination)


def write_index(tar: Path, table: IndexTable) -> None:
    """Lay the index down beside the tar; it appears by one rename."""
    path = index_path(tar)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_bytes(table.to_bytes())
    partial.replace(path)


def build_index(tar: Path) -> IndexTable:
    """Scan an uncompressed tar for its samples; nothing is unpacked.

    Raises:
        DataError: the file is no plain tar, a member is no plain file at the top level, a record
            or its media are not valid, a key comes twice, or datasets are mixed.
    """
    samples: list[SampleIndex] = []
    datasets: set[str] = set()
    combinations: set[str] = set()
    try:
        with tar.open("rb") as stream:
            for key, members in sample_members(stream, tar):
                record, entry = _index_sample(stream, key, members, tar)
                samples.append(entry)
                datasets.add(record.dataset)
                combinations.add(record.combination)
            size = stream.seek(0, os.SEEK_END)
    except FileNotFoundError as error:
        raise DataError(f"shard {tar} does not exist") from error
    except OSError as error:
        raise DataError(f"{tar} cannot be read: {error}") from error
    if len(datasets) != 1:
        raise DataError(
            f"{tar}: a shard holds one dataset, found {', '.join(sorted(datasets)) or 'none'}; "
            "write each dataset into shards of its own"
        )
    combination = combinations.pop() if len(combinations) == 1 else MIXED
    return IndexTable.of(datasets.pop(), combination, size, samples)


def sample_members(stream: IO[bytes], tar: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples of a tar: (key, member name without the key -> place).

    The stream may be moved between two of them.

    Raises:
        DataError: a member is refused, comes twice, or is apart from its sample.
    """
    seen: set[str] = set()
    key, members = "", dict[str, Member]()
    for info in tar_members(stream, tar):
        if _is_ignored(info, tar):
            continue
        match = _NAME.fullmatch(info.name)
        if match is None:
            raise DataError(
                f"{tar}: member '{info.name[:200]}' is refused; a shard holds plain files "
                "<key>.json and <key>.<number>.<extension> at the top level, where a key is "
                "letters, digits, '_' and '-': name them so"
            )
        if match[1] != key:
            if members:
                yield key, members
            key, members = match[1], {}
            if key in seen:
                raise DataError(
                    f"{tar}: the members of sample '{key}' are not together, or its key comes "
                    "twice; sort the tar's members by name and give each sample a key of its own"
                )
            seen.add(key)
        if match[2] in members:
            raise DataError(f"{tar}: member '{info.name}' comes twice")
        members[match[2]] = (info.offset_data, info.size)
    if members:
        yield key, members


def _is_ignored(info: tarfile.TarInfo, tar: Path) -> bool:
    """Whether a member is no part of a sample and does no harm."""
    if info.name.startswith("/") or ".." in info.name.split("/"):
        raise DataError(
            f"{tar}: member '{info.name[:200]}' is refused; its path climbs out of the tar. Do not "
            "unpack this tar, and ask where it comes from"
        )
    if info.isdir():
        return True
    if not info.isreg() or info.issparse():
        raise DataError(
            f"{tar}: member '{info.name[:200]}' is refused; it is a link, a device or a sparse "
            "file. Write the tar anew with plain files (tar --dereference)"
        )
    return _IGNORED.fullmatch(info.name) is not None


def _index_sample(
    stream: IO[bytes], key: str, members: dict[str, Member], tar: Path
) -> tuple[Sample, SampleIndex]:
    source = f"{tar.name}:{key}.json"
    if "json" not in members:
        raise DataError(f"{tar}: sample '{key}' has no {key}.json")
    offset, size = members["json"]
    if size > MAX_RECORD_BYTES:
        raise DataError(f"{source}: a record of {size} bytes exceeds {MAX_RECORD_BYTES}")
    record = _bytes_at(stream, offset, size)
    sample = parse_sample(record, source)
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
        data = _bytes_at(stream, place, length)
        duration_ms, frames = media_length(medium.modality, data)
        media.append(
            MediumIndex(
                medium.modality, medium.member, place, length, duration_ms, frames, zlib.crc32(data)
            )
        )
    return sample, SampleIndex(key, offset, size, tuple(media), zlib.crc32(record))


def _bytes_at(stream: IO[bytes], offset: int, size: int) -> bytes:
    """Bytes of a member; all of them are there, since ``tar_members`` looked."""
    stream.seek(offset)
    return stream.read(size)
