"""Where a worker is, noted in memory that the pool can look at while the worker is busy."""

from __future__ import annotations

import mmap
import os
import time
from typing import NamedTuple

NOWHERE = -1
_BYTES = mmap.PAGESIZE


class Place(NamedTuple):
    """What a worker is at.

    Attributes:
        task: its task; ``NOWHERE`` if it has none.
        position: position of the sample in the task; ``NOWHERE`` if it is at none.
        since: when decoding began, nanoseconds of the monotonic clock, which all processes of a
            machine share; 0 while the sample's bytes are being fetched.
    """

    task: int
    position: int
    since: int


class Watch:
    """The shared memory: the worker writes it, the pool reads it.

    Args:
        file: of ``create_watch``; may be closed afterwards.
    """

    def __init__(self, file: int) -> None:
        self._cells = memoryview(mmap.mmap(file, _BYTES)).cast("q")

    def take(self, task: int) -> None:
        """A task has begun, or with ``NOWHERE``: it has ended."""
        self._note(task, NOWHERE)

    def arrive(self, position: int) -> None:
        """The next sample is being fetched."""
        self._note(self._cells[0], position)

    def start_clock(self) -> None:
        """The sample is being decoded."""
        self._cells[2] = time.monotonic_ns()

    def leave(self) -> None:
        """The sample is done."""
        self._note(self._cells[0], NOWHERE)

    @property
    def place(self) -> Place:
        """What was noted last. Cells may be of two moments unless the worker stands still."""
        return Place(*self._cells[:3])

    def _note(self, task: int, position: int) -> None:
        self._cells[2] = 0  # first, so that no place is ever given another's time
        self._cells[0] = task
        self._cells[1] = position


def create_watch() -> int:
    """An anonymous file for a ``Watch``; holds ``NOWHERE``."""
    file = os.memfd_create("watch", os.MFD_CLOEXEC)
    os.ftruncate(file, _BYTES)
    Watch(file).take(NOWHERE)
    return file
