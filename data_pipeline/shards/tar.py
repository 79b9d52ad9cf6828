"""The members of an uncompressed tar, whoever wrote it; nothing is ever unpacked.

``tarfile`` takes a damaged header for the end of the archive, reads headers of any length, and
believes negative sizes. Here the end has to be the end, and nothing is read that is not bounded.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_pipeline.errors import DataError

BLOCK = 512
"""Unit of a tar, bytes; a member's header is one."""
MAX_EXTENDED_HEADER = 1024**2
"""Longest PAX header or GNU long name that is read, bytes."""

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


class _Headers:
    """What ``tarfile`` reads headers from, a bounded number of bytes at a time."""

    def __init__(self, stream: IO[bytes]):
        self.seek, self.tell = stream.seek, stream.tell
        self._read = stream.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_EXTENDED_HEADER:
            raise tarfile.ReadError(f"an extended header claims {size} bytes")
        return self._read(size)


def tar_members(stream: IO[bytes], tar: Path) -> Iterator[tarfile.TarInfo]:
    """Every member in the order of the tar; the stream may be moved between two of them.

    Args:
        stream: the tar, opened.
        tar: its place, for messages.

    Raises:
        DataError: it is no uncompressed tar, is cut off, or has a damaged header.
    """
    head = stream.read(8)
    for magic, (name, tool) in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                f"{tar} is compressed with {name}; a shard is read by offsets: {tool} it first"
            )
    end = stream.seek(0, 2)
    stream.seek(0)
    last = 0
    try:
        archive = tarfile.TarFile(fileobj=_Headers(stream))  # type: ignore[arg-type]
        while info := archive.next():
            archive.members.clear()  # type: ignore[attr-defined]  # a tar of millions of members is not kept
            if archive.offset <= last or info.size < 0:
                raise DataError(f"{tar}: the tar header at byte {last} is damaged; {_RESTORE}")
            if info.offset_data + info.size > end:
                raise DataError(
                    f"{tar} is cut off at byte {end}, in '{info.name}' which begins at byte "
                    f"{info.offset_data} and has {info.size} bytes; {_RESTORE}"
                )
            last = archive.offset
            yield info
    except (tarfile.TarError, ValueError, RecursionError) as error:
        raise DataError(
            f"{tar} is no readable, uncompressed tar (at byte {last}: {error}); {_RESTORE}"
        ) from error
    _check_end(stream, tar, last, end)


_RESTORE = "restore it from its source"


def _check_end(stream: IO[bytes], tar: Path, place: int, end: int) -> None:
    """From ``place`` to ``end`` there is the end mark, zeros, and nothing else."""
    stream.seek(place)
    block = stream.read(BLOCK)
    if len(block) < BLOCK:
        raise DataError(f"{tar} is cut off at byte {end}: its end mark is missing; {_RESTORE}")
    if block.strip(b"\0"):
        raise DataError(f"{tar}: the tar header at byte {place} is damaged; {_RESTORE}")
    while block := stream.read(MAX_EXTENDED_HEADER):
        if block.strip(b"\0"):
            raise DataError(
                f"{tar} has more data after its end mark at byte {place}; are these several tars "
                "in one file? Write them one by one"
            )
