"""Speed and memory of planning on an index of ten million samples, one thread."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.planning_process import EACH, FAR, dealer_of
from benchmarks.side_by_side import write
from benchmarks.synthetic import write_catalogue

SAMPLES = 10_000_000
WORLDS = (8, 64, 512, 4096)


def rate(work: Callable[[int], object], samples: int) -> float:
    """Samples a second over many steps; the median of five stretches, the first not counted."""
    steps, taken = max(20, 20_000 // samples), []
    for stretch in range(6):
        began = time.perf_counter()
        for step in range(stretch * steps, (stretch + 1) * steps):
            work(step)
        taken.append(time.perf_counter() - began)
    return samples * steps / statistics.median(taken[1:])


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "catalogue"
        catalogue = write_catalogue(folder, SAMPLES)
        for ranks in WORLDS:
            cells = []
            for deal in ("balanced", "sharded"):
                dealer = dealer_of(catalogue, ranks, deal)
                if deal == "balanced":
                    cells.append(rate(dealer.timeline.step, EACH * ranks))
                cells.append(rate(dealer.step, EACH * ranks))
            shown = " | ".join(f"{n / 1e6:.2f}" for n in cells)
            rows.append(f"| {ranks} | {EACH * ranks} | {shown} |")
        command = [sys.executable, "-m", "benchmarks.planning_process", str(folder)]
        runs = [
            list(map(float, subprocess.check_output(command, text=True).split())) for _ in range(5)
        ]
    before, after, opened, again = (statistics.median(side) for side in zip(*runs, strict=True))
    write(
        "planning",
        f"Planning from an index of {SAMPLES:,} samples, one thread",
        rows,
        ("ranks", "samples a step", "plan, million samples/s",
         "plan and balanced dealing, million samples/s",
         "plan and sharded dealing, million samples/s"),
        (
            f"Anonymous memory of a fresh process: {before:.0f} MB with what planning imports, "
            f"{after:.0f} MB after 101 steps of 4096 samples anywhere in the order.",
            f"Seek: {1e3 * opened:.0f} ms from nothing opened to the samples of step {FAR:,}, "
            f"{1e3 * again:.1f} ms for another far step (4096 samples each; medians of 5).",
            "Small steps are bound by some hundred calls into numpy, not by their samples.",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
