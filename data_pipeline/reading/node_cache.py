"""Files by their SHA-256 in a folder that all processes of a node share, within a bound.

Layout: ``files/<sha256>`` beside ``files/<sha256>.checked``, which says in which boot the file was
found right and how it looked then; the time of the latter is when the file was last asked for.
``files/<sha256>.partial`` has its full size from the start, so that what is being fetched counts.

Locks are the kernel's and end with the process that holds them. A file belongs to the lock of the
first two digits of its name: 256 locks, however many files come and go. Who fetches a file, or
throws it out, holds its lock; so a partial file whose lock is free belongs to nobody any more. A
file that is thrown out stays readable to whoever has it open or mapped.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from data_pipeline.errors import DataError

_WAIT_SECONDS = 0.1
_LOCK_DIGITS = 2


@contextmanager
def node_lock(folder: Path, name: str, wait: bool = True) -> Iterator[bool]:
    """Hold one of the locks of a folder, shared by all names with the same two first letters.

    Yields:
        Whether it is held: always, unless ``wait`` is False and somebody else has it.
    """
    place = folder / "locks"
    place.mkdir(parents=True, exist_ok=True)
    # A lock of another kind would outlive a process that is killed.
    lock = FileLock(place / name[:_LOCK_DIGITS], fallback_to_soft=False)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@cache
def boot() -> str:
    """Names the time since this machine was started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return "unknown"


def identity(status: os.stat_result) -> str:
    """Changes when a file is written to, or the machine is started anew."""
    return f"{boot()} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True)
class NodeCache:
    """A bounded folder of files.

    Attributes:
        folder: the folder, on a file system of this node.
        most_bytes: most bytes of all files together, those being fetched included. Files that
            were thrown out while a process had them open are not counted.
    """

    folder: Path
    most_bytes: int

    def path(self, sha256: str) -> Path:
        """Where a file is if it is there."""
        return self.folder / "files" / sha256

    def open(self, sha256: str, size: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        """Open a file, fetched by this process if no other one is at it.

        A file that this machine has not checked since it was started, or that was written to, is
        read and checked first.

        Args:
            sha256: its checksum, hexadecimal, which is its name.
            size: its size, bytes.
            fetch: writes exactly this file into an open file, or raises.

        Raises:
            DataError: it is larger than the cache, or the cache cannot be written; or what
                ``fetch`` raises.
        """
        found = self._open_known(sha256)
        if found is not None:
            return found
        if size > self.most_bytes:
            raise DataError(
                f"The cache {self.folder} may hold {self.most_bytes} bytes, a single shard has "
                f"{size}; allow it more, or write smaller shards"
            )
        try:
            (self.folder / "files").mkdir(parents=True, exist_ok=True)
            with node_lock(self.folder, sha256):
                return self._open_known(sha256) or self._open_new(sha256, size, fetch)
        except OSError as error:
            raise DataError(
                f"The cache {self.folder} cannot be used ({error.strerror or error}); free some "
                "space or choose another folder"
            ) from error

    def forget(self, sha256: str) -> None:
        """Throw a file out if its bytes are no longer right."""
        with node_lock(self.folder, sha256):
            self._keep_if_right(sha256)

    def _open_known(self, sha256: str) -> BinaryIO | None:
        """The file, if it is as it was when it was found right in this boot."""
        path, note = self.path(sha256), self._note(sha256)
        try:
            file = path.open("rb")
        except OSError:  # missing; if it is worse than that, fetching it will say so
            return None
        with contextlib.suppress(FileNotFoundError):
            if note.read_text("ascii") == identity(os.fstat(file.fileno())):
                os.utime(note)
                return file
        file.close()
        return None

    def _open_new(self, sha256: str, size: int, fetch: Callable[[BinaryIO], None]) -> BinaryIO:
        if not self._keep_if_right(sha256):
            partial = self._reserve(sha256, size)
            try:
                with partial.open("r+b") as file:
                    fetch(file)
                partial.replace(self.path(sha256))
            finally:
                partial.unlink(missing_ok=True)
            self._write_note(sha256)
        return self.path(sha256).open("rb")

    def _keep_if_right(self, sha256: str) -> bool:
        """Check a file's bytes and note the result, or throw it out. Its lock is held."""
        path = self.path(sha256)
        try:
            with path.open("rb") as file:
                right = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        except OSError:  # missing, or its disk gives it no more
            right = False
        if right:
            self._write_note(sha256)
        else:
            _unlink(path, self._partial(sha256), self._note(sha256))
        return right

    def _reserve(self, sha256: str, size: int) -> Path:
        """An empty partial file of full size, once there is room. The file's lock is held."""
        while True:
            with node_lock(self.folder, "room"):
                if self._make_room(sha256, size):
                    partial = self._partial(sha256)
                    _allocate(partial, size)
                    return partial
            # All that is left is being fetched or opened, and will be free to go after that.
            time.sleep(_WAIT_SECONDS)

    def _make_room(self, sha256: str, size: int) -> bool:
        """Throw out what was not asked for the longest, until ``size`` more bytes fit."""
        used = 0
        kept: list[tuple[float, str, int]] = []
        for entry in os.scandir(self.folder / "files"):
            name, _, ending = entry.name.partition(".")
            with contextlib.suppress(FileNotFoundError):  # somebody was faster
                held = entry.stat().st_size
                if ending == "partial":
                    used += 0 if self._remove_if_free(sha256, self._partial(name)) else held
                elif ending == "checked":
                    if not self.path(name).exists():
                        self._remove_if_free(sha256, self._note(name))
                else:
                    kept.append((self._last_asked_for(name), name, held))
                    used += held
        for _, name, held in sorted(kept):
            if used + size <= self.most_bytes:
                break
            if self._remove_if_free(sha256, self.path(name), self._note(name)):
                used -= held
        return used + size <= self.most_bytes

    def _remove_if_free(self, own: str, *paths: Path) -> bool:
        """Remove all that there is of a file, unless another process has its lock."""
        if paths[0].name[:_LOCK_DIGITS] == own[:_LOCK_DIGITS]:  # this process has it
            _unlink(*paths)
            return True
        with node_lock(self.folder, paths[0].name, wait=False) as free:
            if free:
                _unlink(*paths)
            return free

    def _last_asked_for(self, sha256: str) -> float:
        try:
            return self._note(sha256).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _write_note(self, sha256: str) -> None:
        note = self._note(sha256)
        draft = note.with_suffix(".partial")
        draft.write_text(identity(self.path(sha256).stat()), "ascii")
        draft.replace(note)

    def _note(self, sha256: str) -> Path:
        return self.folder / "files" / f"{sha256}.checked"

    def _partial(self, sha256: str) -> Path:
        return self.folder / "files" / f"{sha256}.partial"


def _unlink(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _allocate(path: Path, size: int) -> None:
    """Make a file whose bytes the file system has set aside, where it can."""
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                path.unlink(missing_ok=True)
                raise
            file.truncate(size)
