"""A worker process as the pool holds it: started, looked at, killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time

from data_pipeline.reading.parcel import Parcel, receive_parcel
from data_pipeline.reading.watch import Place, Watch, create_watch

_MODULE = "data_pipeline.reading.worker"
_ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENCV_FOR_THREADS_NUM",
    "RAYON_NUM_THREADS",
)
# What a scheduler or a terminal sends to all processes of a job is for the pool's process.
_FOR_THE_POOL = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
_LAST_WORDS = 4096  # bytes
_MOST_BETWEEN = 0.4  # seconds between two looks that count; the pool looks twice as often


def reading_environment() -> dict[str, str]:
    """The environment of a process that reads or decodes: one thread, and this one's modules."""
    return {
        **os.environ,
        **dict.fromkeys(_ONE_THREAD, "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


class WorkerProcess:
    """One worker and what the pool shares with it.

    Args:
        tasks: the end of the socket that workers take tasks from.
        job: open file with the pickled job.

    Attributes:
        channel: where its parcels arrive.
        pid: its process.
        proven: whether it has delivered anything yet.
    """

    def __init__(self, tasks: socket.socket, job: int) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._words = os.memfd_create("stderr", os.MFD_CLOEXEC)
        fcntl.fcntl(self._words, fcntl.F_SETFL, os.O_APPEND)
        watch = create_watch()
        self._watch = Watch(watch)
        lifeline, self._lifeline = os.pipe()
        shared = [theirs.fileno(), tasks.fileno(), job, watch, lifeline]
        # Blocked signals stay blocked in the child, from its first moment on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_POOL)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, *map(str, shared)],
                pass_fds=shared,
                env=reading_environment(),
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=self._words,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            os.close(watch)
            os.close(lifeline)
        self._seen, self._looked, self._busy = self.place, 0.0, 0.0
        self.pid = self._process.pid
        self.proven = False

    @property
    def place(self) -> Place:
        """What it is at; exact when it is dead."""
        return self._watch.place

    def receive(self) -> Parcel | None:
        """The next parcel; blocks until there is one. None: it is dead, and all was received."""
        try:
            parcel = receive_parcel(self.channel)
        except ConnectionResetError:
            return None
        self.proven = self.proven or parcel is not None
        return parcel

    def overdue(self, seconds: float) -> Place | None:
        """What it is at, if it has been decoding one sample for longer than this.

        To be asked often: of a long time between two looks little counts, as the whole job may
        have been suspended.
        """
        now, place = time.monotonic(), self.place
        passed = min(now - max(self._looked, place.since / 1e9), _MOST_BETWEEN)
        self._busy = passed + (self._busy if place == self._seen else 0.0)
        self._seen, self._looked = place, now
        return place if place.since and self._busy > seconds else None

    def kill(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()
        self._process.wait()

    def cause_of_death(self) -> str:
        """How the process ended; waits for the end."""
        try:
            status = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        if status >= 0:
            return f"exit status {status}"
        with contextlib.suppress(ValueError):
            return signal.Signals(-status).name
        return f"signal {-status}"

    def last_words(self) -> str:
        """The last lines that it wrote to stderr."""
        size = os.fstat(self._words).st_size
        text = os.pread(self._words, _LAST_WORDS, max(0, size - _LAST_WORDS)).decode(
            "utf-8", "backslashreplace"
        )
        return "\n".join(text.splitlines()[-12:])

    def close(self) -> None:
        """Give back what it used; it must be dead."""
        self.channel.close()
        os.close(self._words)
        os.close(self._lifeline)
