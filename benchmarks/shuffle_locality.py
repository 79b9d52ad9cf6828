"""What ``data.shuffle.block`` and ``window`` trade: reads in sequence against a fair shuffle."""

from __future__ import annotations

import numpy as np

from benchmarks.side_by_side import write
from data_pipeline.planning.permutation import EpochOrder, Shuffle

SAMPLES = 1_000_000
STEP = 512
KIB = 50
"""Bytes of a sample, KiB: a small picture."""
REGION = 1024
"""What a disk or a file system reads at once, KiB."""
CACHED = 8192
"""Samples that are drawn while what was read stays in memory."""
SETTINGS = ((1, 1_000_000), (1, 4096), (16, 256), (64, 256), (256, 256), (4096, 16), (4096, 1))


def read_again(rows: np.ndarray) -> float:
    """Bytes read for a byte used: whole regions, each once while it is remembered."""
    read = 0
    for start in range(0, len(rows), CACHED):
        first = rows[start : start + CACHED] * KIB // REGION
        last = ((rows[start : start + CACHED] + 1) * KIB - 1) // REGION
        read += len(np.unique(np.concatenate([first, last])))
    return read * REGION / (len(rows) * KIB)


def unfairness(rows: np.ndarray) -> float:
    """Spread of the steps' mean place in a set that is sorted, over that of a fair shuffle."""
    steps = rows[: len(rows) // STEP * STEP].reshape(-1, STEP)
    fair = SAMPLES / np.sqrt(12 * STEP)
    return float(steps.mean(1).std() / fair)


def main() -> None:
    lines = []
    for block, window in SETTINGS:
        order = EpochOrder([SAMPLES], ["sorted"], 0, Shuffle(block, window))
        rows, _ = order.samples(np.zeros(SAMPLES, dtype=np.int64), np.arange(SAMPLES))
        name = f"{block} | {window}"
        lines.append(f"| {name} | {read_again(rows):.2f} | {unfairness(rows):.2f} |")
    write(
        "shuffle_locality",
        "Locality of the reads against fairness of the shuffle",
        lines,
        ("block, samples", "window, blocks", "bytes read / bytes used", "spread of a step / fair"),
        (
            f"One epoch of {SAMPLES:,} samples of {KIB} KiB that lie sorted in their shards; "
            f"{REGION} KiB are read at once and remembered for {CACHED:,} samples; steps of {STEP} "
            "samples. 1.00 on the right is a fair shuffle: a step's samples come from all over "
            "the set.",
            "The default, 64 and 256, reads two to three times what it uses where a full shuffle "
            "reads twenty times as much, and about once where a whole window (16,384 samples) is "
            "remembered. Where shards lie sorted by topic or label take smaller blocks; where they "
            "are shuffled already, larger ones.",
        ),
    )


if __name__ == "__main__":
    main()
