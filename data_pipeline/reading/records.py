"""Reading one sample's bytes out of its shard, by the offsets of the index."""

from __future__ import annotations

import json
import os
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from imagecodecs import deflate_crc32 as crc32  # libdeflate's: several times as fast as zlib's

from data_pipeline.errors import DataError
from data_pipeline.reading.medium import Medium
from data_pipeline.shards.index import MediumIndex, SampleIndex, ShardIndex

if TYPE_CHECKING:
    from data_pipeline.reading.remote import ShardStore

MOST_OPEN = 32
"""Shards that a reader keeps open; each costs a file descriptor."""

_HEADER = 512  # bytes of a tar header, which ends where the member begins


class DamagedSampleError(DataError):
    """The bytes of a sample are not those that were written."""


class _LostBytesError(DataError):
    """A file does not give the bytes that it should have."""


class RecordReader:
    """Open shards; each is opened when it is first needed, the oldest are closed.

    Every piece is checked against the index's CRC-32. Not shared between processes or threads.
    Shards are not mapped: where a mapped file was cut off or its disk fails, the process ends.

    Args:
        store: where shards are that are not on this machine; None: all are.
    """

    def __init__(self, store: ShardStore | None = None) -> None:
        self._store = store
        self._files: OrderedDict[Path, BinaryIO] = OrderedDict()
        weakref.finalize(self, _close, self._files)

    def record(self, shard: ShardIndex, sample: SampleIndex) -> dict[str, Any]:
        """The sample's JSON.

        Raises:
            DamagedSampleError: naming shard and sample, if it is no JSON object.
            DataError: as ``record_bytes``.
        """
        return parse_record(self.record_bytes(shard, sample), shard, sample)

    def record_bytes(self, shard: ShardIndex, sample: SampleIndex) -> bytes:
        """The bytes of the sample's JSON.

        Raises:
            DamagedSampleError: the bytes are not those that were indexed; names shard, sample,
                member and byte.
            DataError: the shard cannot be read, or the index is of another tar.
        """
        return self._checked(
            shard, sample, "json", sample.json_offset, sample.json_size, sample.json_crc32
        )

    def media(self, shard: ShardIndex, sample: SampleIndex) -> tuple[Medium, ...]:
        """The sample's media, undecoded, in the record's order.

        Raises:
            DataError: as ``record_bytes``.
        """
        return tuple(self.medium(shard, sample, facts) for facts in sample.media)

    def medium(self, shard: ShardIndex, sample: SampleIndex, facts: MediumIndex) -> Medium:
        """One medium of a sample, undecoded.

        Raises:
            DataError: as ``record_bytes``.
        """
        return Medium(
            facts.modality,
            self._checked(shard, sample, facts.member, facts.offset, facts.size, facts.crc32),
            f"{shard.path.name}:{sample.key}.{facts.member}",
        )

    def _checked(
        self, shard: ShardIndex, sample: SampleIndex, member: str, offset: int, size: int, crc: int
    ) -> bytes:
        store = self._store if shard.url else None
        try:
            data = self._bytes(shard, offset, size)
            if crc32(data) == crc:
                return data
        except _LostBytesError:
            if store is None:
                raise
        if store is not None:
            # The cached copy may have gone bad on this machine's disk: fetch it once more.
            self._files.pop(shard.path).close()
            store.forget(shard)
            data = self._bytes(shard, offset, size)
            if crc32(data) == crc:
                return data
        if not self._fits(shard):
            raise _other_tar(shard)
        raise DamagedSampleError(
            f"{_name(shard)}: the {size} bytes of {sample.key}.{member} from byte "
            f"{offset} on are damaged (CRC-32 {crc32(data):08x}, the index says {crc:08x}); "
            "restore the shard or build the data set again"
        )

    def _bytes(self, shard: ShardIndex, offset: int, size: int) -> bytes:
        file = self._files.get(shard.path)
        if file is None:
            file = self._open(shard)
        else:
            self._files.move_to_end(shard.path)
        try:
            data = os.pread(file.fileno(), size, offset)
            while len(data) < size:  # a system may give less at once than there is
                more = os.pread(file.fileno(), size - len(data), offset + len(data))
                if not more:
                    raise _LostBytesError(
                        f"The shard {_name(shard)} ends before byte {offset + size}: it was "
                        "truncated, or its index is of another tar; restore it or index it again"
                    )
                data += more
        except OSError as error:
            raise _LostBytesError(_unreadable(shard, error)) from error
        return data

    def _open(self, shard: ShardIndex) -> BinaryIO:
        try:
            file = shard.path.open("rb") if self._store is None else self._store.open(shard)
        except OSError as error:
            raise DataError(_unreadable(shard, error)) from error
        self._files[shard.path] = file
        if len(self._files) > MOST_OPEN:
            self._files.popitem(last=False)[1].close()
        return file

    def _fits(self, shard: ShardIndex) -> bool:
        """Whether the first or the last sample of the index is where the index says."""
        for sample in (shard.samples[0], shard.samples[-1]):
            start = max(0, sample.json_offset - _HEADER)
            header = self._bytes(shard, start, sample.json_offset - start)
            if f"{sample.key}.json".encode() in header:
                return True
        return False


def parse_record(data: bytes, shard: ShardIndex, sample: SampleIndex) -> dict[str, Any]:
    """A sample's JSON from its bytes.

    Raises:
        DamagedSampleError: naming shard and sample, if it is no JSON object.
    """
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedSampleError(
            f"{shard.path}: sample {sample.key} is no JSON ({error}); leave it out"
        ) from error
    if not isinstance(record, dict):
        raise DamagedSampleError(
            f"{shard.path}: sample {sample.key} is no JSON object; leave it out"
        )
    return record


def _close(files: OrderedDict[Path, BinaryIO]) -> None:
    for file in files.values():
        file.close()


def _unreadable(shard: ShardIndex, error: OSError) -> str:
    return (
        f"The shard {_name(shard)} cannot be read ({error.strerror or error}); restore it or build "
        "the data set again"
    )


def _other_tar(shard: ShardIndex) -> DataError:
    return DataError(
        f"The index of {_name(shard)} is of another tar; restore the shard or index it again"
    )


def _name(shard: ShardIndex) -> str:
    if not shard.url:
        return str(shard.path)
    from data_pipeline.reading.transfer import shown  # whoever has addresses has it loaded

    return shown(shard.url)
