"""A process that reads samples for a pool: ``python -m data_pipeline.reading.worker``.

It knows nothing but its job, imports neither torch nor the program that started it, and may be
killed at any moment: it holds nothing that anybody else needs.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import pickle
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence

from data_pipeline.errors import DataError
from data_pipeline.reading.parcel import Failure, Order, Parcel, send_parcel
from data_pipeline.reading.reader import BrokenSampleError, SampleReader
from data_pipeline.reading.sample import BrokenSample, Sample
from data_pipeline.reading.watch import NOWHERE, Watch

_MOST_MESSAGE = 2**20  # bytes; sockets take much less at once
_MOST_WORDS = 2**20  # bytes of a worker's stderr: libraries complain of every broken file


def main(arguments: Sequence[str]) -> None:
    """Read tasks until the pool is gone.

    Args:
        arguments: open files, by number: where results go, where tasks come from, the pickled
            job, the watch, and a pipe that nobody writes to and that the pool holds open.
    """
    result_file, task_file, job, watch_file, lifeline = map(int, arguments)
    _end_with(lifeline)
    faulthandler.enable()
    results, tasks = socket.socket(fileno=result_file), socket.socket(fileno=task_file)
    try:
        reader = SampleReader(pickle.loads(os.pread(job, os.fstat(job).st_size, 0)))
    except Exception as error:
        send_parcel(results, Parcel(NOWHERE, _failure(error)))
        return
    watch = Watch(watch_file)
    while message := tasks.recv(_MOST_MESSAGE):
        order = Order(*pickle.loads(message))
        watch.take(order.task)
        try:
            parcel = Parcel(order.task, _read(reader, order, watch))
        except Exception as error:
            watch.leave()
            parcel = Parcel(order.task, _failure(error))
        send_parcel(results, parcel)
        watch.take(NOWHERE)
        if os.fstat(2).st_size > _MOST_WORDS:
            os.ftruncate(2, 0)


def _read(reader: SampleReader, order: Order, watch: Watch) -> list[Sample | BrokenSample]:
    outcomes: list[Sample | BrokenSample] = []
    for position, row in enumerate(order.rows):
        if position in order.skip:
            outcomes.append(reader.broken(row, *order.skip[position]))
            continue
        watch.arrive(position)
        try:
            raw = reader.fetch(row)
            watch.start_clock()
            outcomes.append(reader.finish(raw))
        except BrokenSampleError as error:
            outcomes.append(error.sample)
        watch.leave()
    return outcomes


def _failure(error: Exception) -> Failure:
    known = isinstance(error, DataError)
    return Failure(known, str(error) if known else traceback.format_exc())


def _end_with(lifeline: int) -> None:
    """Let the kernel end this process when the pool's process is gone, however that went.

    A pipe whose other end closes sends SIGIO, which ends a process even while a decoder hangs and
    nothing of Python runs. (PR_SET_PDEATHSIG would also strike when only the thread ends that
    started this process.)
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGIO})
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    if poll.poll(0):  # it was closed before the kernel knew
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
