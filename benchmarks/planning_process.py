"""A process that does nothing but plan; prints memory and seconds. See ``planning``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.synthetic import UNIMOE_7B
from data_pipeline.planning.catalogue import Catalogue
from data_pipeline.planning.dealer import Dealer
from data_pipeline.planning.dealing import Ranks
from data_pipeline.planning.plan import Mixture
from data_pipeline.planning.timeline import Timeline

FAR = 1_000_000
EACH, CAPACITY, EXPERTS = 8, 4096, 8


def dealer_of(catalogue: Catalogue, ranks: int, deal: str) -> Dealer:
    mixture = Mixture({s.dataset: 1.0 for s in catalogue.sources}, EACH * ranks)
    timeline = Timeline(catalogue.sources, {0: mixture})
    return Dealer(catalogue, timeline, UNIMOE_7B, Ranks(ranks, EXPERTS, CAPACITY), deal)


def anonymous() -> float:
    """Memory of this process that no file is behind, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this kernel does not say")


def main(folder: str) -> None:
    """In a fresh process: memory before and after planning; seconds until a far step is there."""
    before = anonymous()
    began = time.perf_counter()
    dealer = dealer_of(Catalogue.load(Path(folder)), 512, "balanced")
    dealer.catalogue.rows(dealer.timeline.step(FAR))
    opened = time.perf_counter() - began
    began = time.perf_counter()
    dealer.catalogue.rows(dealer.timeline.step(FAR + 7))
    again = time.perf_counter() - began
    for step in range(100):
        dealer.step(step * 9973)
    print(before, anonymous(), opened, again)


if __name__ == "__main__":
    main(sys.argv[1])
