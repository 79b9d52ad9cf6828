"""Decoding alone, our reading and WebDataset's: ``python -m benchmarks.readers``, see ``serve``.

Each kind of reader runs in a process of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import webdataset

from benchmarks.children import serve
from benchmarks.reading_set import DATASET, ENCODERS, RULE
from benchmarks.reading_work import BATCH, PAD_TO, SHUFFLED, Work, timed
from data_pipeline.planning.catalogue import open_catalogue
from data_pipeline.planning.cost import CostModel
from data_pipeline.planning.dealer import Dealer
from data_pipeline.planning.dealing import Ranks
from data_pipeline.planning.plan import Mixture
from data_pipeline.planning.timeline import PlanState, Timeline
from data_pipeline.reading.collate import MicroBatch, collate
from data_pipeline.reading.loader import StepLoader
from data_pipeline.reading.pool import ReaderPool
from data_pipeline.reading.quarantine import Quarantine
from data_pipeline.reading.reader import ReadingJob
from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.index import load_manifest
from unimoe_mcore.config.data import DataConfig

_FOREVER = 10**9
_MOST_TOKENS = 2**20  # of a micro-batch: a step is one


def decode(folder: str, samples: int) -> dict[str, Any]:
    """The work alone, on bytes that are in memory already: one thread, in the tar's order."""
    work, reader, loaded = Work(Path(folder)), RecordReader(), []
    for shard in load_manifest(Path(folder)).shards("train"):
        for facts in shard.samples:
            media = reader.media(shard, facts)
            members = {each.member: m.data for each, m in zip(facts.media, media, strict=True)}
            members["json"] = reader.record_bytes(shard, facts)
            loaded.append((facts.key, members))
    took = used = 0.0
    loaded = loaded[:samples]
    for start in range(0, len(loaded), BATCH):
        began, before = time.perf_counter(), time.process_time()
        done = [work.sample(*each) for each in loaded[start : start + BATCH]]
        took += time.perf_counter() - began
        used += time.process_time() - before
        work.batch(done)  # outside: decoding alone is the unit
    return {"rate": len(loaded) / took, "cpu": used / len(loaded)}


@contextmanager
def _ours(folder: Path, workers: int, state: PlanState | None = None) -> Iterator[StepLoader]:
    """What training sets up before its first step."""
    defaults = DataConfig()
    tokenizer = Work(folder).tokenizer
    manifest = load_manifest(folder)
    catalogue = open_catalogue(manifest, "train", [DATASET], tokenizer, RULE, folder / "cache")
    timeline = Timeline(catalogue.sources, {0: Mixture({DATASET: 1.0}, BATCH)}, state)
    dealer = Dealer(catalogue, timeline, CostModel(), Ranks(1, 1, _MOST_TOKENS))
    note = folder / "in_progress"
    job = ReadingJob(catalogue.folder, tokenizer.serialised(), RULE, ENCODERS, {}, in_progress=note)
    quarantine = Quarantine(folder / "quarantine.jsonl")
    ahead = defaults.prefetch if workers else 0
    with ReaderPool(job, workers, defaults.sample_seconds) as pool:
        yield StepLoader(dealer, pool, quarantine, 0, _FOREVER, ahead)


def _batches(loader: StepLoader, first: int, pad: int) -> Iterator[MicroBatch]:
    step = first
    while True:
        read = loader.read(step)
        for samples in read.without(loader.quarantine):
            yield collate(samples, pad, PAD_TO)
        step += 1


def ours(folder: str, workers: int, samples: int) -> dict[str, Any]:
    """Our reading as training does it: plan, dealing, checksums, time limit, notes, packing."""
    pad = Work(Path(folder)).tokenizer.pad
    with _ours(Path(folder), workers) as loader:
        return timed(_batches(loader, 0, pad), samples)


def save(folder: str, step: int) -> dict[str, Any]:
    """Write the state at a step, which costs nothing to get to, and compile the catalogue."""
    with _ours(Path(folder), 0) as loader:
        state = loader.dealer.timeline.state(step).to_json()
    (Path(folder) / "state.json").write_text(json.dumps(state))
    return {}


def restart(folder: str, workers: int) -> dict[str, Any]:
    """Seconds from nothing but imported modules to the first batch at the saved state."""
    began = time.perf_counter()
    place = Path(folder)
    state = PlanState.from_json(json.loads((place / "state.json").read_text()))
    with _ours(place, workers, state) as loader:
        batch = next(_batches(loader, state.step, Work(place).tokenizer.pad))
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "keys": [sample.key for sample in batch.samples]}


def _same(batch: MicroBatch) -> MicroBatch:
    return batch


def webdatasets(folder: str, workers: int, samples: int) -> dict[str, Any]:
    """WebDataset: shards shuffled, a shuffle buffer, our work as a map, batches in the workers."""
    work = Work(Path(folder))

    def finish(found: dict[str, Any]) -> Any:
        return work.sample(found["__key__"], found)

    urls = sorted(str(path) for path in Path(folder, "train", DATASET).glob("*.tar"))
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls))
        .shuffle(SHUFFLED)
        .map(finish)
        .batched(BATCH, collation_fn=work.batch)
    )
    # Without a function of its own the loader would look into every batch.
    loader = webdataset.WebLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_same,
    )
    return timed(loader, samples)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(
        {
            "decode": decode,
            "ours": ours,
            "webdataset": webdatasets,
            "save": save,
            "restart": restart,
        }
    )
