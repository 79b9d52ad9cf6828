"""A small set of shards and what tests ask of it when it lies elsewhere."""

import hashlib
import multiprocessing
from pathlib import Path

from data_pipeline.reading.remote import ShardStore, open_set
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.integrity import write_manifest
from data_pipeline.shards.schema import ASSISTANT, HUMAN, MediumRef, Sample, Turn
from data_pipeline.shards.writer import ShardWriter
from tests.media import sound
from tests.server import Server

SHARDS = 12
SPAWN = multiprocessing.get_context("spawn")


def write_set(folder: Path, seed: int = 0) -> Path:
    """Twelve shards of 40 to 60 kB, one sample each."""
    with ShardWriter(folder / "train" / "spk", "spk", "speech+text", max_samples=1) as writer:
        for number in range(SHARDS):
            turns = (Turn(HUMAN, "<speech>\nWhat?"), Turn(ASSISTANT, f"{number}"))
            medium = sound(18_000 + 1000 * number, seed=seed + number)
            sample = Sample(f"s-{number}", "spk", turns, (MediumRef("speech", "0.wav"),))
            writer.write(sample, {"0.wav": medium.data})
    write_manifest(folder, "test")
    return folder


def address(server: Server) -> str:
    """Of the published set."""
    return f"{server.url}/bucket/set"


def opened(server: Server, tmp_path: Path) -> list[ShardIndex]:
    """The shards of the published set, mirrored."""
    return open_set(address(server), tmp_path / "sets").shards("train")


def path_of(shard: ShardIndex) -> str:
    """A shard's path on the server."""
    return "bucket/set/" + shard.url.partition("bucket/set/")[2]


def held(folder: Path) -> int:
    """Bytes that a cache holds of shards, whole or in part."""
    total = 0
    for path in (folder / "files").glob("*"):
        if path.suffix != ".checked":
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total


def same(store: ShardStore, shard: ShardIndex) -> bool:
    """Whether the store gives the shard's bytes."""
    with store.open(shard) as file:
        return hashlib.sha256(file.read()).hexdigest() == shard.sha256


def start(target, *arguments) -> multiprocessing.Process:
    process = SPAWN.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def join(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)
