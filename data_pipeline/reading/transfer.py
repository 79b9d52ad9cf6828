"""Bytes from an address: streamed, bounded, checked, and tried again where that can help.

Addresses are fsspec's (``https://``, ``s3://``, ``file://``, ``memory://``, ...), else those that
webdataset's ``gopen`` hands to a program (``ais://``, ``scp://``, ...). Addresses that run
commands or chain file systems (``pipe:``, ``::``) are refused: a manifest from somewhere else
may name them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import select
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

import fsspec

from data_pipeline.errors import DataError
from data_pipeline.reading.overseen import OverseenFile

ATTEMPTS = 4
PAUSE_SECONDS = 0.5
"""Before the second attempt; twice as long before each further one, and up to as much again, so
that nodes that failed together do not come back together."""
CONNECT_SECONDS = 20.0
SILENCE_SECONDS = 30.0
"""Longest time without a byte."""
PATIENCE_SECONDS = 60.0
SLOWEST = 2**17
"""Bytes a second below which a transfer that takes longer than ``PATIENCE_SECONDS`` is given up."""
MOST_UNSIZED_BYTES = 2**28
"""Most bytes of a file whose size nobody has told."""

_PIECE = 2**20
_REFUSED = ("pipe", "data", "reference", "filecache", "blockcache", "simplecache", "cached")
_FOR_GOOD = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
_WORTH_A_RETRY = (408, 425, 429)  # of HTTP's answers that blame who asks

_Read = Callable[[int], bytes]


class _WrongBytesError(Exception):
    """What came is not what was promised; the next attempt may be."""


def is_address(place: str) -> bool:
    """Whether a place is an address rather than a folder of this machine."""
    return "://" in place or place.startswith("pipe:")


def shown(url: str) -> str:
    """An address as it may be printed: without passwords and tokens."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def read_small(url: str) -> bytes:
    """All bytes of a file of at most ``MOST_UNSIZED_BYTES``.

    Raises:
        DataError: it cannot be had, after some attempts, or is larger.
    """

    def attempt() -> bytes:
        held = io.BytesIO()
        for piece in _pieces(url, MOST_UNSIZED_BYTES):
            held.write(piece)
        return held.getvalue()

    return _persist(url, attempt)


def copy_checked(url: str, file: BinaryIO, size: int, sha256: str) -> None:
    """Write a file of known size and checksum into an open file, from its beginning.

    Raises:
        DataError: it cannot be had, after some attempts; it is not the promised file; or ``file``
            cannot be written to.
    """

    def attempt() -> None:
        file.seek(0)
        digest, count = hashlib.sha256(), 0
        for piece in _pieces(url, size):
            digest.update(piece)
            count += len(piece)
            _write(file, piece)
        if count != size:
            raise _WrongBytesError(f"{count} of {size} bytes came")
        if digest.hexdigest() != sha256:
            raise _WrongBytesError("its SHA-256 is not the manifest's")
        file.flush()

    _persist(url, attempt)


def _write(file: BinaryIO, piece: bytes) -> None:
    try:
        file.write(piece)
    except OSError as error:
        raise DataError(
            f"{file.name} cannot be written ({error.strerror}); free some space or choose another "
            "folder for the cache"
        ) from error


def _persist[Result](url: str, attempt: Callable[[], Result]) -> Result:
    """The result of an attempt; failures that may pass are waited out a few times."""
    pause = PAUSE_SECONDS
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except DataError:
            raise
        except ImportError as error:
            raise DataError(
                f"{shown(url)} cannot be fetched: {error}; install what is missing"
            ) from error
        # File systems raise whatever their network libraries raise.
        except Exception as error:
            if number == ATTEMPTS or _is_final(error):
                raise DataError(
                    f"{shown(url)} cannot be fetched ({_reason(error)}; attempt {number} of "
                    f"{ATTEMPTS}); check the address, the network and that the file is still there"
                ) from error
            time.sleep(pause * (1 + random.SystemRandom().random()))
            pause *= 2
    raise AssertionError


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", 0)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in _WORTH_A_RETRY
    return isinstance(error, _FOR_GOOD)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, TimeoutError):
        return str(error) or "no answer in time"
    text = " ".join(str(getattr(error, "message", "") or error).split())[:200]
    status = getattr(error, "status", 0)
    return f"{status} {text}".strip() if status else text or type(error).__name__


def _pieces(url: str, most: int) -> Iterator[bytes]:
    """The bytes of a file; more than ``most``, or too slow ones, end it."""
    began, count = time.monotonic(), 0
    with _open(url) as read:
        while piece := read(_PIECE):
            count += len(piece)
            if count > most:
                raise DataError(
                    f"{shown(url)} is larger than the {most} bytes it should have; it was "
                    "changed or replaced, fetch its manifest again"
                )
            yield piece
            seconds = time.monotonic() - began
            if seconds > PATIENCE_SECONDS + most / SLOWEST:
                raise TimeoutError(f"{count} bytes in {seconds:.0f} s")


@contextmanager
def _open(url: str) -> Iterator[_Read]:
    scheme = urlsplit(url).scheme
    if scheme in _REFUSED or "::" in url:
        raise DataError(
            f"{shown(url)} is refused: an address names one file, it runs no command and "
            "chains no file systems"
        )
    if scheme in fsspec.available_protocols():
        try:
            file = OverseenFile(
                lambda: _fsspec_file(url, scheme), CONNECT_SECONDS + SILENCE_SECONDS, SLOWEST
            )
        except ImportError:
            if not _known_to_gopen(scheme):
                raise
        else:
            with contextlib.closing(file):
                yield file.read
            return
    elif not _known_to_gopen(scheme):
        raise DataError(f"{shown(url)}: nothing here knows addresses that begin '{scheme}:'")
    with _gopen(url) as read:
        yield read


def _fsspec_file(url: str, scheme: str) -> AbstractContextManager[Any]:
    system, path = fsspec.url_to_fs(url, **_options(scheme))
    # A web server is asked for the file at once; the size would be asked for before it.
    streamed = {"block_size": 0, "size": 1} if scheme in ("http", "https") else {}
    file: AbstractContextManager[Any] = system.open(path, "rb", **streamed)
    return file


def _options(scheme: str) -> dict[str, Any]:
    """What a file system can be told: to wait for neither connection nor bytes for ever."""
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS
        )
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    if scheme in ("s3", "s3a"):
        seconds = {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENCE_SECONDS}
        return {"config_kwargs": seconds}
    return {}


def _known_to_gopen(scheme: str) -> bool:
    # Imported here: webdataset imports torch, which reading processes shall not.
    from webdataset.gopen import gopen_schemes

    return scheme in gopen_schemes and not scheme.startswith("_")


@contextmanager
def _gopen(url: str) -> Iterator[_Read]:
    """The output of the program that webdataset starts for an address."""
    from webdataset.gopen import gopen

    pipe = gopen(url, "rb")
    output = pipe.stream.fileno()

    def read(size: int) -> bytes:
        if not select.select([output], [], [], SILENCE_SECONDS)[0]:
            pipe.proc.kill()
            raise TimeoutError(f"{SILENCE_SECONDS:.0f} s without a byte")
        return os.read(output, size)

    try:
        yield read
    except BaseException:
        pipe.ignore_errors = True
        pipe.proc.kill()
        raise
    finally:
        pipe.close()
