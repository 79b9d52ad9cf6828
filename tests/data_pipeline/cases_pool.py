"""Programs that read and come to a bad end: ``python -m tests.data_pipeline.cases_pool ...``."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from data_pipeline.reading import inline
from data_pipeline.reading.pool import ReaderPool
from data_pipeline.reading.reader import RawSample, SampleReader
from tests.data_pipeline.reading_set import job, open_set, row, trap


def alone(folder: Path, note: Path, what: str) -> None:
    """Read three samples in this process, the second with a trap."""
    found = job(open_set(folder), rule=trap(talk_3=what), in_progress=note)
    with ReaderPool(found, 0, 0.5) as pool:
        pool.submit(7, [row("talk-2"), row("talk-3"), row("talk-4")])
        print(pool.result(7), flush=True)


def from_far_away(folder: Path, note: Path) -> None:
    """Read samples whose bytes are longer in coming than decoding may take, and say which."""
    inline._SLACK = 0.0
    fetch = SampleReader.fetch

    def slow(reader: SampleReader, row: int) -> RawSample:
        time.sleep(1.0)
        return fetch(reader, row)

    SampleReader.fetch = slow  # type: ignore[method-assign]
    with ReaderPool(job(open_set(folder), in_progress=note), 0, 0.3) as pool:
        pool.submit(0, [row("plain-0"), row("plain-1")])
        print([sample.key for sample in pool.result(0)])


def with_workers(folder: Path) -> None:
    """Start workers in a thread that ends, let them hang, say who they are, and wait."""
    pool = ReaderPool(job(open_set(folder), rule=trap(talk_3="hang", talk_4="hang")), 3, 600)

    def start() -> None:
        for number, key in enumerate(["talk-3", "talk-4"]):
            pool.submit(number, [row(key)])

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    while sum(worker.place.since > 0 for worker in pool._workers) < 2:
        time.sleep(0.01)
    print(*(worker.pid for worker in pool._workers), flush=True)
    time.sleep(600)


if __name__ == "__main__":
    if sys.argv[1] == "workers":
        with_workers(Path(sys.argv[2]))
    elif sys.argv[1] == "far":
        from_far_away(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        alone(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[1])
