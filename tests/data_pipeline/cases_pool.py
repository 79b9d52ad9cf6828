"""Programs that read and come to a bad end: ``python -m tests.data_pipeline.cases_pool ...``."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from data_pipeline.reading.pool import ReaderPool
from tests.data_pipeline.reading_set import job, open_set, row, trap


def alone(folder: Path, note: Path, what: str) -> None:
    """Read three samples in this process, the second with a trap."""
    found = job(open_set(folder), rule=trap(talk_3=what), in_progress=note)
    with ReaderPool(found, 0, 0.5) as pool:
        pool.submit(7, [row("talk-2"), row("talk-3"), row("talk-4")])
        print(pool.result(7), flush=True)


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
    else:
        alone(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[1])
