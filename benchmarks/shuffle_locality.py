"""What ``data.shuffle`` trades: how random an order is against how much of a disk it touches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from benchmarks.side_by_side import write
from data_pipeline.planning.permutation import EpochOrder, Shuffle

SAMPLES = 10_000_000
STEP, STEPS_LONG = 512, 64
STRETCHES, LOOKED_AT = 20, 200
PAGE = 128 * 1024
CACHE = 4 * 1024**3
SIZES = {"4 KB": 4096, "64 KB": 65_536}
NODES = (1, 16)
SHARD, SHARDS_KEPT = 1000, 64
DRAWN = 2**20
SHUFFLES = (
    *(Shuffle(block, 256) for block in (1, 16, 64, 256, 4096)),
    Shuffle(64, 64),
    Shuffle(64, 1024),
    Shuffle(1000, 32),
)


def rows_at(order: EpochOrder, cursor: np.ndarray) -> np.ndarray:
    return order.samples(np.zeros(len(cursor), dtype=np.int64), cursor)[0]


def clumping(order: EpochOrder, drawn: int) -> float:
    """Mean of chi-square over its degrees of freedom; 1 is what a uniform draw has.

    The set is cut into equal stretches of consecutive samples (its classes, if it is sorted), and
    ``drawn`` samples that follow each other in the order are counted by stretch.
    """
    begins = np.random.Generator(np.random.PCG64(7)).integers(0, SAMPLES // drawn, LOOKED_AT)
    found = []
    for begin in begins * drawn:
        stretch = rows_at(order, np.arange(begin, begin + drawn)) * STRETCHES // SAMPLES
        counts, fair = np.bincount(stretch, minlength=STRETCHES), drawn / STRETCHES
        found.append(((counts - fair) ** 2 / fair).sum() / (STRETCHES - 1))
    return float(np.mean(found))


def misses(touched: Iterator[int], kept: int) -> int:
    """How often something is fetched if the ``kept`` things used last are kept."""
    cache: OrderedDict[int, None] = OrderedDict()
    missed = 0
    for thing in touched:
        if thing in cache:
            cache.move_to_end(thing)
            continue
        missed += 1
        cache[thing] = None
        if len(cache) > kept:
            cache.popitem(last=False)
    return missed


def pages(rows: np.ndarray, size: int) -> Iterator[int]:
    """The pages of the samples in turn; consecutive samples lie one behind the other."""
    first, last = rows * size // PAGE, ((rows + 1) * size - 1) // PAGE
    for begin, end in zip(first.tolist(), last.tolist(), strict=True):
        yield from range(begin, end + 1)


def read_per_byte(rows: np.ndarray, size: int) -> float:
    """Bytes that come from the disk for every byte that is used."""
    return misses(pages(rows, size), CACHE // PAGE) * PAGE / (len(rows) * size)


def main() -> None:
    table = []
    # A node of many reads every so manieth sample of a step, by chance.
    mine = np.random.Generator(np.random.PCG64(3)).random(DRAWN) < 1 / NODES[1]
    for shuffle in SHUFFLES:
        order = EpochOrder([SAMPLES], ["set"], 0, shuffle)
        drawn = rows_at(order, np.arange(DRAWN))
        cells = [clumping(order, STEP), clumping(order, STEP * STEPS_LONG)]
        for size in SIZES.values():
            cells += [read_per_byte(rows, size) for rows in (drawn, drawn[mine])]
        fetched = misses(iter((drawn // SHARD).tolist()), SHARDS_KEPT) * SHARD / DRAWN
        shown = " | ".join(f"{cell:.2f}" for cell in cells)
        table.append(f"| {shuffle.block} | {shuffle.window} | {shown} | {fetched:.1f} |")
        print(table[-1], flush=True)
    write(
        "shuffle_locality",
        "data.shuffle: quality of the order, and what reading in it costs",
        table,
        ("block", "window", f"clumping, {STEP} samples", f"clumping, {STEP * STEPS_LONG:,} samples",
         *(f"disk bytes per byte, {size}, nodes: {n}" for size in SIZES for n in NODES),
         "times each shard is fetched"),
        (
            f"An order of {SAMPLES:,} samples. *clumping*: chi-square over its degrees of "
            f"freedom of samples that follow each other, counted by {STRETCHES} equal stretches "
            "of the set; 1 is a uniform draw. It matters only where neighbours in a shard are "
            "alike: the stretches are the classes of a set that is sorted by class, which is the "
            "worst case.",
            f"*disk bytes per byte*: what comes from the disk, in pages of {PAGE // 1024} KB (the "
            f"usual readahead), for a byte of a sample, if {CACHE // 1024**3} GB of pages are "
            "kept, the last used; for samples of two sizes; where one node reads all samples, and "
            f"where it reads every {NODES[1]}th by chance. *times each shard is fetched*: of a "
            f"remote set, an epoch, shards of {SHARD} samples fetched whole, {SHARDS_KEPT} of "
            "them kept.",
            "The default, 64 and 256, reads every byte of a local set about once on one node. "
            "Many nodes that share the samples of a window each read the pages around their own "
            "ones, which costs small samples much and pictures little. Smaller blocks mix better "
            "over long stretches and read more; a larger window mixes better at no cost in reading "
            "as long as its pages fit into memory.",
            "A remote set whose cache holds fewer shards than a window touches is fetched again "
            "and again: there a block should be a shard and the window fewer blocks than the cache "
            "holds shards (the last line), and the shards should be shuffled when they are "
            "written, since such an order mixes little.",
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
