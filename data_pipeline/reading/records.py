"""Reading one sample's bytes out of its shard, by the offsets of the index."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.reading.medium import Medium
from data_pipeline.shards.index import SampleIndex, ShardIndex


class RecordReader:
    """Memory-mapped shards; each is opened when it is first needed.

    Not shared between processes or threads.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def _bytes(self, shard: ShardIndex, offset: int, size: int, what: str) -> bytes:
        if shard.path not in self._maps:
            try:
                with shard.path.open("rb") as file:
                    self._maps[shard.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise DataError(f"The shard {shard.path} cannot be read: {error}.") from error
        mapped = self._maps[shard.path]
        if offset < 0 or size < 0 or offset + size > len(mapped):
            raise DataError(
                f"{what} lies outside {shard.path}: the index is not of this shard, build it anew."
            )
        return mapped[offset : offset + size]

    def record(self, shard: ShardIndex, sample: SampleIndex) -> dict[str, Any]:
        """The sample's JSON.

        Raises:
            DataError: naming shard and sample, if it is no JSON object.
        """
        raw = self._bytes(shard, sample.json_offset, sample.json_size, sample.key)
        try:
            record = json.loads(raw)
        except ValueError as error:
            raise DataError(f"{shard.path}: sample {sample.key} is no JSON: {error}.") from error
        if not isinstance(record, dict):
            raise DataError(f"{shard.path}: sample {sample.key} is no JSON object.")
        return record

    def media(self, shard: ShardIndex, sample: SampleIndex) -> tuple[Medium, ...]:
        """The sample's media, undecoded, in the record's order."""
        return tuple(
            Medium(
                facts.modality,
                self._bytes(shard, facts.offset, facts.size, f"{sample.key}.{facts.member}"),
                f"{shard.path.name}:{sample.key}.{facts.member}",
            )
            for facts in sample.media
        )
