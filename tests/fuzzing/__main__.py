"""``python -m tests.fuzzing``: spoil files and read them for a while; `make fuzz` does it.

Every reader has its turn. What a reader must not do - fail with anything but a sentence, crash,
hang, take much memory - is printed with the spoilt folder's place; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

from tests.fuzzing.campaign import Campaign  # noqa: E402
from tests.fuzzing.readers import READERS  # noqa: E402


def main() -> int:
    """Fuzz, count, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of what is spoilt")
    parser.add_argument("--reader", choices=READERS, action="append", help="these alone")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # of numbers that are none, and names that are there twice
    kept = Path(tempfile.mkdtemp(prefix="fuzzed-"))
    campaign = Campaign(kept, given.seed, given.reader or list(READERS))
    began = time.monotonic()
    counts: dict[str, Counter[str]] = {name: Counter() for name in campaign.names}
    bad, seen = 0, set()
    while time.monotonic() - began < 60 * given.minutes:
        name, found, folder = campaign.next()
        counts[name][found.kind] += 1
        if not found.good:
            bad += 1
            last = found.words.strip().splitlines()[-1:] or [""]
            if (name, found.kind, last[0]) not in seen:
                seen.add((name, found.kind, last[0]))
                print(f"{name}: {found.kind} ({folder})\n{found.words}", flush=True)
    for name, count in counts.items():
        said = ", ".join(f"{kind} {number}" for kind, number in sorted(count.items()))
        print(f"{name}: {sum(count.values())} files, {said}")
    total = sum(sum(count.values()) for count in counts.values())
    print(f"{total} files in {time.monotonic() - began:.0f} s, seed {given.seed}, {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
