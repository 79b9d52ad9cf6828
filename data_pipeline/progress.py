"""Progress of a long piece of work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

LINE_EVERY_SECONDS = 5.0


def progress[T](things: Iterable[T], name: str, expected: int) -> Iterator[T]:
    """Pass ``things`` on and show how far it is.

    Args:
        things: what is worked through.
        name: what it is called.
        expected: how many there will be, about.
    """
    if sys.stderr.isatty():
        yield from tqdm(things, desc=name, total=expected, unit=" items", leave=True)
        return
    start = last = time.monotonic()
    done = 0
    for done, thing in enumerate(things, start=1):
        yield thing
        now = time.monotonic()
        if now - last >= LINE_EVERY_SECONDS:
            last = now
            rate = done / (now - start)
            left = max(0, expected - done) / rate
            print(
                f"{name}: {done} of {expected}, {rate:.0f} items/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
    seconds = time.monotonic() - start
    rate = done / max(seconds, 1e-9)
    print(
        f"{name}: {done} items in {seconds:.1f} s ({rate:.0f} items/s)",
        file=sys.stderr,
        flush=True,
    )
