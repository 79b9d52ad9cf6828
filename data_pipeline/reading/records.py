"""Reading one sample's bytes out of its shard, by the offsets of the index."""

from __future__ import annotations

import json
import mmap
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data_pipeline.errors import DataError
from data_pipeline.reading.medium import Medium
from data_pipeline.shards.index import SampleIndex, ShardIndex

if TYPE_CHECKING:
    from data_pipeline.reading.remote import ShardStore

MOST_MAPPED = 32
"""Shards that a reader keeps mapped; each costs a file descriptor."""

_HEADER = 512  # bytes of a tar header, which ends where the member begins


class DamagedSampleError(DataError):
    """The bytes of a sample are not those that were written."""


class RecordReader:
    """Memory-mapped shards; each is opened when it is first needed, the oldest are closed.

    Every piece is checked against the index's CRC-32. Not shared between processes or threads.

    Args:
        store: where shards are that are not on this machine; None: all are.
    """

    def __init__(self, store: ShardStore | None = None) -> None:
        self._store = store
        self._maps: OrderedDict[Path, mmap.mmap] = OrderedDict()

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
        return tuple(
            Medium(
                facts.modality,
                self._checked(shard, sample, facts.member, facts.offset, facts.size, facts.crc32),
                f"{shard.path.name}:{sample.key}.{facts.member}",
            )
            for facts in sample.media
        )

    def _checked(
        self, shard: ShardIndex, sample: SampleIndex, member: str, offset: int, size: int, crc: int
    ) -> bytes:
        data = self._bytes(shard, offset, size)
        if zlib.crc32(data) == crc:
            return data
        if self._store is not None and shard.url:
            # The cached copy may have gone bad on this machine's disk: fetch it once more.
            self._maps.pop(shard.path, None)
            self._store.forget(shard)
            data = self._bytes(shard, offset, size)
            if zlib.crc32(data) == crc:
                return data
        if not self._fits(shard):
            raise _other_tar(shard)
        raise DamagedSampleError(
            f"{_name(shard)}: the {size} bytes of {sample.key}.{member} from byte "
            f"{offset} on are damaged (CRC-32 {zlib.crc32(data):08x}, the index says {crc:08x}); "
            "restore the shard or build the data set again"
        )

    def _bytes(self, shard: ShardIndex, offset: int, size: int) -> bytes:
        mapped = self._maps.get(shard.path)
        if mapped is None:
            mapped = self._map(shard)
        else:
            self._maps.move_to_end(shard.path)
        if offset + size > len(mapped):
            raise _other_tar(shard)
        return mapped[offset : offset + size]

    def _map(self, shard: ShardIndex) -> mmap.mmap:
        try:
            with self._open(shard) as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise DataError(
                f"The shard {_name(shard)} cannot be read ({error}); restore it or build the data "
                "set again"
            ) from error
        self._maps[shard.path] = mapped
        if len(self._maps) > MOST_MAPPED:
            self._maps.popitem(last=False)  # unmapped as nothing else refers to it
        return mapped

    def _open(self, shard: ShardIndex) -> BinaryIO:
        return shard.path.open("rb") if self._store is None else self._store.open(shard)

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


def _other_tar(shard: ShardIndex) -> DataError:
    return DataError(
        f"The index of {_name(shard)} is of another tar; restore the shard or index it again"
    )


def _name(shard: ShardIndex) -> str:
    if not shard.url:
        return str(shard.path)
    from data_pipeline.reading.transfer import shown  # whoever has addresses has it loaded

    return shown(shard.url)
