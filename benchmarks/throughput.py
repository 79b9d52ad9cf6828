"""Our reading beside WebDataset's and Energon's: samples a second, and seconds to a restart.

``tests/data_pipeline/energon.sh`` makes the environment that Energon runs in.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.children import Child
from benchmarks.reading_set import KINDS, SAMPLES, write_set
from benchmarks.reading_work import BATCH, SHUFFLED
from benchmarks.side_by_side import write

ROUNDS = 5
ROOT = Path(__file__).parents[1]
ENERGON = Path(os.environ.get("UNIMOE_ENERGON", ROOT / "cache" / "energon")) / "bin"
READ = {"small": 1024, "large": 512}
"""Samples of a pass: short ones, so that whatever else runs on the machine meets all alike."""
TARGET = 0.95
STEP = 10_000
REACHED = SAMPLES // BATCH
"""The step that Energon is restarted at: it takes too long to get to ours."""
RESTARTS = 3
COLUMNS = (
    *("set", "reader", "workers", "samples/s", "of decode-only", "lowest to highest"),
    *("CPU time of decode-only / of the reader", "first batch after, s", "rounds"),
)

Found = dict[tuple[str, int], list[dict[str, float]]]
"""Reader and workers -> what each of its passes gave."""


def started(python: Path | str, module: str) -> Child:
    """A process that reads when it is told to."""
    return Child(module, python, TOKENIZERS_PARALLELISM="false")


def prepare_for_energon(folder: Path) -> None:
    """Let Energon write its own index into the folder."""
    options = "--non-interactive --no-progress --num-workers 1 --sample-type CrudeWebdataset"
    command = [str(ENERGON / "energon"), "prepare", str(folder), *options.split()]
    subprocess.run([*command, "--split-parts", "train:train/.*"], check=True, capture_output=True)


def passes(readers: dict[str, Child], folder: Path, name: str) -> Found:
    """Everybody in turn, several times."""
    found: Found = {}
    order: dict[str, Any] = {"folder": str(folder), "samples": READ[name]}
    for _ in range(ROUNDS):
        for workers in (0, 1, 2):
            unit = readers["decode"].ask("decode", **order)
            found.setdefault(("decode-only", 0), []).append({**unit, "first": 0.0, "share": 1.0})
            for reader in ("ours", "webdataset", "energon"):
                one = readers[reader].ask(reader, workers=workers, **order)
                one["share"] = one["rate"] / unit["rate"]
                one["cpu_share"] = unit["cpu"] / one["cpu"]
                found.setdefault((reader, workers), []).append(one)
    return found


def outcome(name: str, found: Found) -> str:
    """What came out for a set, against what was promised."""
    share = {
        case: statistics.median([one["share"] for one in measured])
        for case, measured in found.items()
    }
    cpu = statistics.median([one["cpu_share"] for one in found["ours", 0]])
    alone = share["ours", 0]
    said = [
        f"{alone:.2f} of decode-only without workers by the clock and {cpu:.2f} by CPU time, where "
        f"{TARGET} was the target ({'met' if min(alone, cpu) >= TARGET else 'not met by both'})"
    ]
    for workers in (0, 1, 2):
        for other in ("webdataset", "energon"):
            ratio = share["ours", workers] / share[other, workers]
            said.append(f"{ratio:.2f} times {other} with {workers} workers")
    return f"Ours on {name} media: " + "; ".join(said) + "."


def row(name: str, reader: str, workers: int, measured: list[dict[str, float]]) -> str:
    """One row of the table, medians over rounds."""
    middle = {
        key: statistics.median([one[key] for one in measured])
        for key in ("rate", "share", "first")
    }  # fmt: skip
    shares = sorted(one["share"] for one in measured)
    alone = reader == "decode-only"
    cpu = "" if alone or workers else f"{statistics.median([o['cpu_share'] for o in measured]):.2f}"
    cells = [name, reader, "" if alone else str(workers), f"{middle['rate']:,.0f}"]
    cells += [f"{middle['share']:.2f}", "" if alone else f"{shares[0]:.2f} to {shares[-1]:.2f}"]
    cells += [cpu, "" if alone else f"{middle['first']:.2f}", str(len(measured))]
    return "| " + " | ".join(cells) + " |"


def restarts(folder: Path) -> list[str]:
    """Sentences about how long it takes to get from a saved state to a batch."""
    place = str(folder)
    told = []
    with started(sys.executable, "benchmarks.readers") as reader:
        reader.ask("save", folder=place, step=STEP)
    for workers in (0, 2):
        times = fresh(sys.executable, "benchmarks.readers", place, workers)
        told.append(f"ours, step {STEP:,}, {workers} workers: {times}")
    for workers in (0, 2):
        with started(ENERGON / "python", "benchmarks.energon_reader") as reader:
            way = reader.ask("save", folder=place, step=REACHED, workers=workers)
        times = fresh(ENERGON / "python", "benchmarks.energon_reader", place, workers)
        told.append(
            f"Energon, step {REACHED} (reached in {way['seconds']:.0f} s; it must read to get "
            f"there), {workers} workers: {times}"
        )
    return told


def fresh(python: Path | str, module: str, folder: str, workers: int) -> str:
    """Median seconds of restarts, each in a new process."""
    seconds = []
    for _ in range(RESTARTS):
        with started(python, module) as reader:
            seconds.append(reader.ask("restart", folder=folder, workers=workers)["seconds"])
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    rows: list[str] = []
    said: list[str] = []
    energon = (ENERGON / "python", "benchmarks.energon_reader")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        readers = {
            who: stack.enter_context(started(sys.executable, "benchmarks.readers"))
            for who in ("decode", "ours", "webdataset")
        }
        readers["energon"] = stack.enter_context(started(*energon))
        for kind in KINDS:
            folder = write_set(Path(name) / kind, KINDS[kind])
            prepare_for_energon(folder)
            found = passes(readers, folder, kind)
            rows += [row(kind, *case, measured) for case, measured in found.items()]
            said.append(outcome(kind, found))
        told = restarts(Path(name) / "small")
    write(
        "throughput", "Reading beside WebDataset and Energon", rows, COLUMNS, (*said, *notes(told))
    )


def notes(told: list[str]) -> tuple[str, ...]:
    """What is compared, and the restarts."""
    return (
        f"Sets of {SAMPLES:,} samples in 16 tars, each a random mixture: "
        + "; ".join(f"{name}: {kind.about}" for name, kind in KINDS.items())
        + f". A pass reads {READ['small']:,} of the small and {READ['large']:,} of the large ones.",
        "The unit, decode-only, is one thread that parses the JSON, tokenises, decodes and resizes "
        "with the functions that training uses, on bytes in memory; also for rows with workers. "
        f"All readers do that and pack {BATCH} samples with the same `collate`; what counts is "
        "packed batches in the main process, with decoded pictures, frames and samples as arrays. "
        "The consumer does nothing else. The clock starts at the first batch; what comes before "
        "it, workers' start included, is a column of its own. Files are in the page cache.",
        "Ours is `StepLoader` as in training: plan, dealing, CRC-32 of every member, limits, the "
        "time limit and the note of the sample in progress, two steps ahead with workers. "
        f"WebDataset {version('webdataset')} (shards shuffled, a buffer of {SHUFFLED}, `WebLoader` "
        f"with persistent workers) and Energon 7.4.1 (the same buffer, `get_savable_loader` with "
        "its defaults, its snapshots included) check no checksums and drop a file's bytes once it "
        "is decoded; ours keeps them.",
        "CPU time of the process, without workers, depends less than the clock on what else runs "
        "on the machine. With workers the consumer takes a core's share too: there are two.",
        "From a saved state to the first batch, a new process each time, imports not counted: "
        + "; ".join(told)
        + ". Energon's states are restored with `restore_state_rank`; with workers it rewinds to "
        "its last snapshot (every 60 s by default) and reads again from there. WebDataset "
        "saves no state.",
    )


if __name__ == "__main__":
    main()
