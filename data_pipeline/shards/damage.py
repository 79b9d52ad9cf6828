"""What is wrong with a tar, told by its index: which sample's member, and at which byte."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from data_pipeline.modalities import modality
from data_pipeline.shards.index import SampleIndex, ShardIndex
from data_pipeline.shards.tar import BLOCK

_CHUNK = 1024**2


@dataclass(frozen=True, slots=True)
class _Piece:
    """A member as the index has it."""

    key: str
    member: str
    offset: int
    size: int
    crc32: int

    @property
    def name(self) -> str:
        return f"{self.key}.{self.member}"

    @property
    def end(self) -> int:
        return self.offset + self.size


def member_damage(shard: ShardIndex) -> Iterator[str]:
    """Read a tar and tell everything in it that is not what its index says.

    Yields:
        One clause per problem, without the shard's name and without what to do; nothing is
        yielded for bytes between the members, which no reader looks at.

    Raises:
        OSError: the tar cannot be read.
    """
    pieces = sorted(_pieces(shard.samples), key=lambda each: each.offset)
    with shard.path.open("rb") as stream:
        size = stream.seek(0, 2)
        inside = [piece for piece in pieces if piece.end <= size]
        headers = [_header_problem(stream, piece) for piece in inside]
        strange = sum(problem != "" for problem in headers)
        if strange > len(inside) // 2:
            yield (
                f"does not fit its index: {strange} of {len(inside)} members are not where the "
                "index has them"
            )
            return
        for piece, problem in zip(inside, headers, strict=True):
            if problem:
                yield f"sample '{piece.key}': {problem}"
            if _crc32(stream, piece) != piece.crc32:
                yield (
                    f"sample '{piece.key}': member {piece.name} is damaged, bytes {piece.offset} "
                    f"to {piece.end} do not have the CRC-32 of the index"
                )
    if len(inside) < len(pieces):
        yield _loss(shard, pieces[len(inside)], size)


def empty_media(shard: ShardIndex) -> Iterator[str]:
    """Tell which media can never be decoded, by the index alone."""
    columns = shard.columns
    still = np.array([modality(name).length is None for name in shard.modalities], dtype=bool)
    length = still[columns["modality"]] | (columns["duration_ms"] > 0) if len(still) else []
    bad = np.flatnonzero((columns["size"] == 0) | ~np.asarray(length, dtype=bool))
    owners = np.searchsorted(columns["media_end"], bad, side="right")
    for row, owner in zip(bad.tolist(), owners.tolist(), strict=True):
        sample = shard.samples[owner]
        medium = sample.media[row - int(columns["media_end"][owner - 1] if owner else 0)]
        what = "is empty" if not medium.size else "cannot be decoded, its header is broken"
        yield (
            f"sample '{sample.key}': member {sample.key}.{medium.member} at byte {medium.offset} "
            f"{what}"
        )


def _pieces(samples: Sequence[SampleIndex]) -> Iterator[_Piece]:
    for sample in samples:
        yield _Piece(sample.key, "json", sample.json_offset, sample.json_size, sample.json_crc32)
        for medium in sample.media:
            yield _Piece(sample.key, medium.member, medium.offset, medium.size, medium.crc32)


def _header_problem(stream: IO[bytes], piece: _Piece) -> str:
    """What is wrong with a member's tar header, which lies in the block before its bytes."""
    place = piece.offset - BLOCK
    stream.seek(max(0, place))
    try:
        info = tarfile.TarInfo.frombuf(stream.read(BLOCK), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return f"the tar header of {piece.name} at byte {place} is damaged"
    if info.name.removeprefix("./") != piece.name or info.size != piece.size:
        return (
            f"the tar header at byte {place} is of '{info.name[:100]}' with {info.size} bytes, the "
            f"index has {piece.name} with {piece.size} there"
        )
    return ""


def _crc32(stream: IO[bytes], piece: _Piece) -> int:
    stream.seek(piece.offset)
    crc, left = 0, piece.size
    while left:
        data = stream.read(min(left, _CHUNK))
        if not data:
            return -1  # cut off while it is read
        crc = zlib.crc32(data, crc)
        left -= len(data)
    return crc


def _loss(shard: ShardIndex, first: _Piece, size: int) -> str:
    """What a tar that was cut off at ``size`` bytes has lost."""
    lost = sum(any(piece.end > size for piece in _pieces([each])) for each in shard.samples)
    return (
        f"is cut off at byte {size}: {lost} of {len(shard)} samples are lost, the first is "
        f"'{first.key}' whose member {first.name} begins at byte {first.offset}"
    )
