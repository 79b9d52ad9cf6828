"""What worker and pool send each other: small messages, and memory that changes hands.

Both ends are ours, so that pickle is safe here. The arrays of a task travel in an anonymous file
that the receiver maps: they are not copied again, and the memory is free when they are gone.
"""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.reading.sample import BrokenSample, Sample

_MESSAGE = struct.Struct("=qqq")  # task, buffers, bytes of the pickle
_SIZE = struct.Struct("=q")
_ALIGNMENT = 64
_MOST_PIECES = 512  # of one write; systems allow 1024


class Order(NamedTuple):
    """What a worker is told to do.

    Attributes:
        task: number of the task.
        rows: the samples, rows of the catalogue.
        skip: position -> (kind, reason) of samples that are known to be broken.
    """

    task: int
    rows: Sequence[int]
    skip: Mapping[int, tuple[str, str]]


class Failure(NamedTuple):
    """Why a task, or a worker's start, came to nothing.

    Attributes:
        known: whether it is a ``DataError``; else it is a mistake in a program.
        text: its message, or the traceback.
    """

    known: bool
    text: str


class Parcel(NamedTuple):
    """What came of a task.

    Attributes:
        task: its number.
        content: its samples, or what went wrong.
    """

    task: int
    content: list[Sample | BrokenSample] | Failure


def send_parcel(channel: socket.socket, parcel: Parcel) -> None:
    """Send a parcel through a Unix socket that keeps messages apart.

    Raises:
        OSError: there is no memory for it, or nobody at the other end.
    """
    buffers: list[memoryview] = []
    text = pickle.dumps(
        parcel.content,
        protocol=5,
        buffer_callback=lambda buffer: buffers.append(buffer.raw()),
    )
    sizes = b"".join(_SIZE.pack(len(buffer)) for buffer in buffers)
    pieces: list[bytes | memoryview] = [sizes, text, _padding(len(sizes) + len(text))]
    for buffer in buffers:
        pieces += [buffer, _padding(len(buffer))]
    file = os.memfd_create("samples", os.MFD_CLOEXEC)
    try:
        _write(file, [piece for piece in pieces if len(piece)])
        message = _MESSAGE.pack(parcel.task, len(buffers), len(text))
        socket.send_fds(channel, [message], [file])
    finally:
        os.close(file)


def receive_parcel(channel: socket.socket) -> Parcel | None:
    """Receive a parcel; None where the other end is gone.

    The arrays in its content lie in memory that came with it.

    Raises:
        DataError: this process has too many open files to take it.
    """
    message, files, _, _ = socket.recv_fds(channel, _MESSAGE.size, 1)
    if len(message) < _MESSAGE.size:  # sent whole or not at all, so this is the end
        return None
    if not files:
        raise DataError("no file can be opened for a worker's samples: raise `ulimit -n`")
    task, buffers, length = _MESSAGE.unpack(message)
    try:
        size = os.fstat(files[0]).st_size
        mapped = mmap.mmap(files[0], size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(files[0])
    whole = memoryview(mapped)
    at = buffers * _SIZE.size
    sizes = [each for (each,) in _SIZE.iter_unpack(whole[:at])]
    text = whole[at : at + length]
    at += length
    at += len(_padding(at))
    pieces = []
    for each in sizes:
        pieces.append(whole[at : at + each])
        at += each + len(_padding(each))
    return Parcel(task, pickle.loads(text, buffers=pieces))


def _padding(size: int) -> bytes:
    return bytes(-size % _ALIGNMENT)


def _write(file: int, pieces: list[bytes | memoryview]) -> None:
    """Write all pieces: a single call takes neither many of them nor more than 2 GB."""
    while pieces:
        written = os.writev(file, pieces[:_MOST_PIECES])
        while pieces and written >= len(pieces[0]):
            written -= len(pieces.pop(0))
        if written:
            pieces[0] = memoryview(pieces[0])[written:]
