"""A note on disk of the sample that is being decoded, for the start after a crash.

A process that decodes by itself dies with a decoder that crashes, and hangs with one that hangs.
The note says which sample it was at. It counts only with evidence: what Python's fault handler
wrote behind it while the process died. A process that somebody killed leaves a note too, but none
that speaks against the sample.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.reading.sample import BrokenSample

_BYTES = 4096  # of the note; the evidence lies behind it
_TIMEOUT = b"Timeout"  # how the fault handler begins when the time is over


@dataclass(frozen=True)
class LeftSample:
    """The sample at which an earlier process died.

    Attributes:
        task: number of the task that it was read for.
        sample: the sample, ``crashed`` or ``slow``.
    """

    task: int
    sample: BrokenSample


class InProgress:
    """The note of this process; an older one in the same place is gone.

    Args:
        path: the file; each process needs its own. None: nothing is noted, and what the fault
            handler says goes to stderr.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._note: mmap.mmap | None = None
        self._evidence = 2
        if path is None:
            return
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Appending: the fault handler writes behind the note.
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
            self._evidence = os.open(path, flags, 0o644)
            os.ftruncate(self._evidence, _BYTES)
            self._note = mmap.mmap(self._evidence, _BYTES)
        except OSError as error:
            raise DataError(
                f"{path} cannot be written ({error.strerror}); choose another folder"
            ) from error

    def begin(self, task: int, dataset: str, shard: str, key: str) -> None:
        """Decoding of this sample begins."""
        if self._note is not None:
            # Joined here: JSON of a whole list takes three times as long.
            names = ", ".join(map(json.dumps, (dataset, shard, key)))
            text = f"[{task}, {names}]".encode()[: _BYTES - 1] + b"\n"
            self._note[: len(text)] = text

    def end(self) -> None:
        """It has ended."""
        if self._note is not None:
            self._note[0] = 0

    def close(self) -> None:
        """Take the note away; nothing may be noted any more."""
        if self._note is not None:
            self._note = None
            os.close(self._evidence)
            self._evidence = 2
            with contextlib.suppress(OSError):
                self._path.unlink()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While this lasts, a crash of the process is written behind the note."""
        before = faulthandler.is_enabled()
        if self._note is not None:
            faulthandler.enable(self._evidence)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            if self._note is not None and before:
                faulthandler.enable(2)
            elif self._note is not None:
                faulthandler.disable()

    def end_process_after(self, seconds: float) -> None:
        """End this process, with the evidence, unless this is called again before."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._evidence)


def left_in_progress(path: Path) -> LeftSample | None:
    """What the note of an earlier process says; to be asked before a new one takes its place.

    Returns:
        The sample that the process died of; None if it ended in another way.
    """
    try:
        text = path.read_bytes()
    except OSError:
        return None
    note, evidence = text[:_BYTES], text[_BYTES:].strip()
    if not evidence:
        return None
    try:
        task, dataset, shard, key = json.loads(note.partition(b"\n")[0])
    except (ValueError, TypeError):
        return None
    words = evidence.splitlines()[0].decode("utf-8", "replace")[:200]
    kind = "slow" if evidence.startswith(_TIMEOUT) else "crashed"
    reason = f"decoding it ended the process ({words})"
    return LeftSample(task, BrokenSample(kind, dataset, shard, key, reason))
