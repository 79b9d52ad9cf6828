"""Reading in this process, without workers: what cannot be killed is at least interrupted.

A decoder that returns to Python now and then is interrupted by a timer; only the main thread can
be. One that hangs inside C cannot be interrupted: then the process ends after twice the time and
some seconds, and the note that it leaves (``in_progress``) tells the next start which sample it
was. So does the note of a process that a decoder crashes. A process that runs out of memory is
killed without a trace of why; with workers it is the worker that dies, and the run goes on. A
process that is suspended while it decodes counts as one that hangs; with workers it does not.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from data_pipeline.reading.in_progress import InProgress
from data_pipeline.reading.reader import BrokenSampleError, RawSample, ReadingJob, SampleReader
from data_pipeline.reading.sample import BrokenSample, Sample

_SLACK = 5.0  # seconds
_AGAIN = 0.25  # seconds between interruptions: a decoder's callback may swallow one


class InlineReader:
    """Reads the tasks of a pool that has no workers.

    Args:
        job: what to read and how.
        seconds: longest that decoding one sample may take.
    """

    def __init__(self, job: ReadingJob, seconds: float) -> None:
        self._reader = SampleReader(job)
        self._note = InProgress(job.in_progress)
        self._seconds = seconds
        self._armed = 0.0

    def read(self, task: int, rows: Sequence[int]) -> list[Sample | BrokenSample]:
        """The samples of a task, in order.

        Raises:
            DataError: a shard cannot be read.
        """
        self._armed = 0.0
        # All bytes first: they may be long in coming, and nothing is timed meanwhile.
        fetched = [self._fetch(row) for row in rows]
        with self._note.watched(), _alarms() as interruptible:
            return [
                self._finish(task, raw, interruptible) if isinstance(raw, RawSample) else raw
                for raw in fetched
            ]

    def close(self) -> None:
        """Leave no note: this process was at no sample when it ended."""
        self._note.close()

    def _fetch(self, row: int) -> RawSample | BrokenSample:
        try:
            return self._reader.fetch(row)
        except BrokenSampleError as error:
            return error.sample

    def _finish(self, task: int, raw: RawSample, interruptible: bool) -> Sample | BrokenSample:
        now = time.monotonic()
        if now - self._armed > self._seconds / 2:  # seldom: it starts a thread
            self._note.end_process_after(2 * self._seconds + _SLACK)
            self._armed = now
        self._note.begin(task, raw.shard.dataset, raw.shard.path.name, raw.facts.key)
        try:
            if interruptible:
                signal.setitimer(signal.ITIMER_REAL, self._seconds, _AGAIN)
            return _interruptible(self._reader, raw)
        except BrokenSampleError as error:
            return error.sample
        except _TooSlowError:
            reason = f"decoding it took longer than {self._seconds:g} s"
            return self._reader.broken(raw.row, "slow", reason)
        finally:
            if interruptible:
                signal.setitimer(signal.ITIMER_REAL, 0)
            self._note.end()


class _TooSlowError(BaseException):
    """Not an ``Exception``, which decoders' error handling would take for a broken file."""


def _interruptible(reader: SampleReader, raw: RawSample) -> Sample:
    return reader.finish(raw)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise where a sample is being decoded; an alarm that comes a moment late does nothing."""
    while frame is not None:
        if frame.f_code is _interruptible.__code__:
            raise _TooSlowError
        frame = frame.f_back


@contextmanager
def _alarms() -> Iterator[bool]:
    """Let timers interrupt; whether they can. Somebody else's timer goes on afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    began = time.monotonic()
    delay, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    before = signal.signal(signal.SIGALRM, _interrupt)
    try:
        yield True
    finally:
        signal.signal(signal.SIGALRM, before)
        if delay:
            left = max(delay - (time.monotonic() - began), 1e-6)
            signal.setitimer(signal.ITIMER_REAL, left, interval)
