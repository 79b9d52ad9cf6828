"""Worker processes that read and decode samples ahead, and can be killed.

Which worker reads a task, and how many there are, changes nothing of what comes out.
"""

from __future__ import annotations

import os
import pickle
import select
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from data_pipeline.errors import DataError
from data_pipeline.reading.inline import InlineReader
from data_pipeline.reading.parcel import Failure, Order, Parcel
from data_pipeline.reading.process import WorkerProcess
from data_pipeline.reading.reader import ReadingJob
from data_pipeline.reading.sample import BrokenSample, Sample
from data_pipeline.reading.watch import NOWHERE, Place

_LOOK_EVERY = 0.2  # seconds between looks at what workers are at
_UNEXPLAINED = 2  # workers in a row that die before they have read anything: one too many

Outcomes = list[Sample | BrokenSample]


@dataclass
class _Task:
    rows: list[int]
    skip: dict[int, tuple[str, str]] = field(default_factory=dict)
    suspects: set[int] = field(default_factory=set)  # positions at which a worker was killed
    sent: bool = False


class ReaderPool:
    """Reads tasks, each the samples of one micro-batch.

    Workers start with the first task. Use it as a context manager; workers also end when this
    process does, however that goes.

    Args:
        job: what to read and how.
        workers: processes; 0 reads in this one, when a result is asked for.
        seconds: longest that decoding one sample may take; its worker is killed then, and the
            sample is ``slow``. Without workers see ``inline``.
    """

    def __init__(self, job: ReadingJob, workers: int, seconds: float) -> None:
        self._job = job
        self._count = workers
        self._seconds = seconds
        self._inline: InlineReader | None = None
        # Workers know tasks by the number of their order, which never comes again.
        self._orders_given = 0
        self._order_of: dict[int, int] = {}
        self._tasks: dict[int, _Task] = {}
        self._queue: deque[int] = deque()
        self._done: dict[int, Outcomes | Failure] = {}
        self._workers: list[WorkerProcess] = []
        self._unexplained = 0
        self._looked = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def submit(self, task: int, rows: Sequence[int]) -> None:
        """Hand over a task.

        Args:
            task: its number, from 0; none may be handed over twice before its result was taken.
            rows: catalogue rows of its samples.
        """
        if task in self._order_of:
            raise ValueError(f"task {task} is under way already")
        number = self._order_of[task] = self._orders_given
        self._orders_given += 1
        self._tasks[number] = _Task([int(row) for row in rows])
        if self._count:
            self._queue.append(number)
            self._start()
            self._send()

    def result(self, task: int) -> Outcomes:
        """The samples of a task, in the order of its rows; waits for them.

        Raises:
            DataError: a shard cannot be read, or workers cannot run.
        """
        number = self._order_of[task]
        if not self._count:
            rows = self._tasks.pop(number).rows
            del self._order_of[task]
            self._inline = self._inline or InlineReader(self._job, self._seconds)
            return self._inline.read(task, rows)
        while number not in self._done:
            self._wait()
        del self._tasks[number], self._order_of[task]
        outcome = self._done.pop(number)
        if isinstance(outcome, Failure):
            raise _error(outcome)
        return outcome

    def close(self) -> None:
        """End the workers; results that were not taken are lost."""
        if self._inline is not None:
            self._inline.close()
            self._inline = None
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.close()
        if self._workers:
            self._orders.close()
            self._offers.close()
            os.close(self._job_file)
        self._workers = []

    def _start(self) -> None:
        if self._workers:
            return
        self._orders, self._offers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._job_file = os.memfd_create("job", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(self._job_file), "wb") as file:
            pickle.dump(self._job, file)
        for _ in range(self._count):
            self._workers.append(WorkerProcess(self._offers, self._job_file))

    def _send(self) -> None:
        """Offer orders as far as the socket takes them; whichever worker is free takes the next.

        So workers go on while the training step runs and nobody asks for results.
        """
        while self._queue:
            number = self._queue[0]
            if not self._is_open(number):  # it was offered again, and somebody had it after all
                self._queue.popleft()
                continue
            task = self._tasks[number]
            order = pickle.dumps(tuple(Order(number, task.rows, task.skip)))
            try:
                self._orders.send(order, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            self._queue.popleft()
            task.sent = True

    def _wait(self) -> None:
        """Take what workers have sent, and see to those that are late or dead."""
        channels = {worker.channel.fileno(): worker for worker in self._workers}
        for number in _readable(list(channels), _LOOK_EVERY):
            worker = channels[number]
            parcel = worker.receive()
            if parcel is None:
                self._bury(worker)
                break  # that has received from the others too
            self._take(parcel)
        if time.monotonic() - self._looked > _LOOK_EVERY:
            self._looked = time.monotonic()
            for worker in list(self._workers):
                place = worker.overdue(self._seconds)
                if place is not None:
                    self._stop(worker, place)
        self._send()

    def _take(self, parcel: Parcel) -> None:
        if parcel.task == NOWHERE and isinstance(parcel.content, Failure):  # it could not start
            raise _error(parcel.content)
        self._unexplained = 0
        # A task can come twice, from a worker that took it up just when another one died.
        if self._is_open(parcel.task):
            self._done[parcel.task] = parcel.content

    def _is_open(self, number: int) -> bool:
        """Whether an order's result is still to come."""
        return number in self._tasks and number not in self._done

    def _stop(self, worker: WorkerProcess, place: Place) -> None:
        """Kill a worker that has been at one sample for too long."""
        worker.kill()
        while (parcel := worker.receive()) is not None:  # what it had sent before
            self._take(parcel)
        if worker.place == place:  # exact now; else it had just moved on
            self._skip(place, "slow", f"decoding it took longer than {self._seconds:g} s")
        self._replace(worker)

    def _bury(self, worker: WorkerProcess) -> None:
        """See to a worker that died by itself."""
        cause, place = worker.cause_of_death(), worker.place
        if place.position != NOWHERE:
            if self._is_to_blame(place, cause):
                self._skip(place, "crashed", f"reading it ended the process ({cause})")
        elif not worker.proven:  # else somebody killed it, or memory was short
            self._unexplained += 1
            if self._unexplained >= _UNEXPLAINED:
                words = worker.last_words().strip() or "it said nothing"
                raise DataError(f"processes that read samples end by themselves ({cause}): {words}")
        self._replace(worker)

    def _is_to_blame(self, place: Place, cause: str) -> bool:
        """Whether a worker's death speaks against the sample that it was at.

        One that was killed from outside, as the system does where memory is short, or that died
        while it fetched bytes and decoded none, does not: unless it happens there again.
        """
        if cause != "SIGKILL" and place.since:
            return True
        if not self._is_open(place.task):
            return False
        suspects = self._tasks[place.task].suspects
        again = place.position in suspects
        suspects.add(place.position)
        return again

    def _skip(self, place: Place, kind: str, reason: str) -> None:
        if self._is_open(place.task):
            self._tasks[place.task].skip[place.position] = (kind, reason)

    def _replace(self, worker: WorkerProcess) -> None:
        """Start another worker and offer again what the dead one may have taken."""
        place = self._workers.index(worker)
        worker.close()
        self._workers[place] = WorkerProcess(self._offers, self._job_file)
        self._withdraw()
        held = {each.place.task for each in self._workers}
        self._receive()  # last: what a worker has left since then, it has sent
        again = [
            number
            for number, task in self._tasks.items()
            if task.sent and number not in self._done and number not in held
        ]
        for number in again:
            self._tasks[number].sent = False
        self._queue.extendleft(reversed(again))

    def _receive(self) -> None:
        """Take what has arrived from workers that live."""
        for worker in self._workers:
            while _readable([worker.channel.fileno()], 0):
                parcel = worker.receive()
                if parcel is None:  # ``_wait`` will see to it
                    break
                self._take(parcel)

    def _withdraw(self) -> None:
        """Take the orders back that no worker has taken."""
        while _readable([self._offers.fileno()], 0):
            try:
                self._offers.recv(1, socket.MSG_DONTWAIT)  # the rest of a message goes with it
            except BlockingIOError:  # a worker was quicker
                break


def _error(failure: Failure) -> Exception:
    return DataError(failure.text) if failure.known else RuntimeError(failure.text)


def _readable(files: Sequence[int], seconds: float) -> list[int]:
    """Those of some open files that there is something to read from, or nothing any more."""
    poll = select.poll()  # ``select`` takes no numbers beyond 1023
    for file in files:
        poll.register(file, select.POLLIN)
    return [file for file, _ in poll.poll(1000 * seconds)]
