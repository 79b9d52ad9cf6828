"""A file read in a thread of its own, which is left behind when no answer comes.

File systems of fsspec wait for a silent server as long as they please, each in its own way; what
waits inside a library, or in the kernel, cannot be interrupted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from queue import Empty, SimpleQueue
from typing import Any

_CLOSING_SECONDS = 1.0


class OverseenFile:
    """An open file whose answers are waited for only so long.

    Args:
        opened: opens the file; called in the thread.
        seconds: longest wait for the file to open.
        slowest: bytes a second that may be counted on: what a file system asks for at once,
            which only it knows, may take as much longer.

    Raises:
        TimeoutError: it did not open in time; or what ``opened`` raises.
    """

    def __init__(
        self, opened: Callable[[], AbstractContextManager[Any]], seconds: float, slowest: float
    ) -> None:
        self._seconds = seconds
        self._slowest = slowest
        self._wanted: SimpleQueue[int] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._silent = False
        # A daemon, so that the program can end while it waits.
        self._thread = threading.Thread(
            target=self._serve, args=(opened,), name="overseen read", daemon=True
        )
        self._thread.start()
        self._block = self._answer(seconds)

    def read(self, size: int) -> bytes:
        """Up to so many bytes; none at the end.

        Raises:
            TimeoutError: they did not come in time; or what the file raises.
        """
        self._wanted.put(size)
        answer: bytes = self._answer(self._seconds + max(size, self._block) / self._slowest)
        return answer

    def close(self) -> None:
        """Let the thread close the file, as soon as it can."""
        self._wanted.put(0)
        if not self._silent:
            self._thread.join(_CLOSING_SECONDS)

    def _answer(self, seconds: float) -> Any:
        try:
            answer = self._answers.get(timeout=seconds)
        except Empty:
            self._silent = True
            self._wanted.put(0)
            raise TimeoutError(f"{seconds:.0f} s without a byte") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _serve(self, opened: Callable[[], AbstractContextManager[Any]]) -> None:
        try:
            with opened() as file:
                self._answers.put(int(getattr(file, "blocksize", 0) or 0))
                while size := self._wanted.get():
                    self._answers.put(file.read(size))
        except BaseException as error:
            self._answers.put(error)
