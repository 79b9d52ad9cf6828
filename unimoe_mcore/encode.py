"""``python -m unimoe_mcore.encode RECIPE [overrides]``: run the frozen encoders once on all media.

Training then reads their outputs from the cache. It would fill the cache by itself as it goes;
doing it first keeps the steps even and uses every process for encoding. Media that cannot be
decoded are named and left out; training will put their samples in quarantine.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import batched
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from tqdm import tqdm

from data_pipeline.errors import DataError
from data_pipeline.modalities import tower_modalities
from data_pipeline.reading.decode import BrokenMediumError
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.prepare import prepare
from data_pipeline.reading.records import DamagedSampleError, RecordReader
from data_pipeline.reading.remote import ShardStore, open_set
from data_pipeline.shards.index import Manifest, SampleIndex, ShardIndex
from unimoe_mcore.compose import speak
from unimoe_mcore.config.composition import compose_recipe
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.stage import trains
from unimoe_mcore.config.towers import EncoderConfig
from unimoe_mcore.runtime.parent import DIE_WITH_PARENT, die_with_parent

BATCH = 32
"""Media that are held in memory and encoded at a time."""

# Libraries read these when they are imported: they must be set before a process starts.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Share:
    """The media of some modalities that one process encodes: every ``processes``-th sample's.

    Iterating reads the bytes of one sample at a time.
    """

    def __init__(
        self,
        manifest: Manifest,
        modalities: Sequence[str],
        process: int,
        processes: int,
        store: ShardStore | None = None,
    ) -> None:
        """Only the index is looked at.

        Args:
            manifest: of a built set; all its splits are encoded.
            modalities: the modalities to encode.
            process: number of this process, from 0.
            processes: number of processes.
            store: where remote shards are kept.
        """
        self._modalities = tuple(modalities)
        self._reader = RecordReader(store)
        samples = [
            (shard, sample)
            for split in manifest.splits()
            for shard in manifest.shards(split)
            for sample in shard.samples
            if any(facts.modality in modalities for facts in sample.media)
        ]
        self._samples: list[tuple[ShardIndex, SampleIndex]] = samples[process::processes]

    def __len__(self) -> int:
        return sum(
            facts.modality in self._modalities
            for _, sample in self._samples
            for facts in sample.media
        )

    def __iter__(self) -> Iterator[Medium]:
        for shard, sample in self._samples:
            try:
                media = self._reader.media(shard, sample)
            except DamagedSampleError as error:
                _leave_out(f"{shard.path.name}:{sample.key}", error)
                continue
            yield from (medium for medium in media if medium.modality in self._modalities)


def encode_share(recipe: Recipe, process: int, processes: int) -> int:
    """Encode those media of one process that are not in the cache yet.

    Returns:
        Number of media that were encoded.

    Raises:
        UserError, DataError: an encoder, a shard or the cache is not as it must be.
    """
    import torch

    from unimoe_mcore.model.towers.encoders import build_encoder
    from unimoe_mcore.model.towers.feature_cache import FeatureCache

    torch.set_num_threads(1)
    store = ShardStore(Path(recipe.paths.scratch), recipe.data.cache_bytes)
    manifest = open_set(recipe.data.folder, Path(recipe.paths.cache))
    encoded = 0
    for name, tower in recipe.model.towers.items():
        if trains(recipe.stage, f"encoder.{name}"):
            continue  # its features change with every step
        cache = FeatureCache(Path(recipe.paths.cache) / "features", build_encoder(tower.encoder))
        share = Share(manifest, tower_modalities(name), process, processes, store)
        for batch in _shown(share, f"encode {name}", shown=process == 0):
            missing = list(_decoded(cache.missing(batch), tower.encoder))
            cache.features(missing)
            encoded += len(missing)
    return encoded


def _decoded(media: Sequence[Medium], encoder: EncoderConfig) -> Iterator[Medium]:
    """Those media that can be decoded."""
    for medium in media:
        try:
            yield medium.with_content(prepare(medium, encoder))
        except BrokenMediumError as error:
            _leave_out(medium.source, error)


def _leave_out(source: str, error: Exception) -> None:
    print(f"left out: {source}: {error}", file=sys.stderr, flush=True)


def _shown(share: Share, title: str, shown: bool) -> Iterator[list[Medium]]:
    """Batches of media, with progress on a terminal or in plain lines."""
    terminal = sys.stderr.isatty()
    total, done = len(share), 0
    bar = tqdm(total=total, desc=title, unit="media", disable=not (shown and terminal))
    began = told = time.perf_counter()
    for batch in batched(share, BATCH):
        yield list(batch)
        done += len(batch)
        bar.update(len(batch))
        now = time.perf_counter()
        if shown and not terminal and (now - told > 5 or done == total):
            rate = done / (now - began)
            left = (total - done) / rate
            print(f"{title}  {done}/{total}  {rate:.0f} media/s  {left:.0f} s left", flush=True)
            told = now
    bar.close()


def encode(recipe: Recipe) -> None:
    """Fill the feature cache with ``parallel.processes`` processes of one thread each.

    Raises:
        UserError: if a process failed, with what it said; the others are ended.
    """
    count = recipe.parallel.processes
    workers: dict[Connection, SpawnProcess] = {}
    try:
        with _environment({**_ONE_THREAD, DIE_WITH_PARENT: str(os.getpid())}):
            for number in range(count):
                said, say = multiprocessing.Pipe(duplex=False)
                process = multiprocessing.get_context("spawn").Process(
                    target=_encode_in_process, args=(recipe, number, count, say), daemon=True
                )
                process.start()
                workers[said] = process
                say.close()  # the worker's own copy is then the last: its end is seen here
        _wait(dict(workers))
    finally:
        for process in workers.values():
            process.terminate()
            process.join()


def _wait(workers: dict[Connection, SpawnProcess]) -> None:
    """Return when all workers are done, raise when one has failed."""
    while workers:
        for said in wait(list(workers)):
            assert isinstance(said, Connection)
            process = workers.pop(said)
            try:
                sentence = said.recv()
            except EOFError:  # it ended without a word
                process.join()
                if not process.exitcode:
                    continue
                sentence = (
                    f"An encoding process ended with exit code {process.exitcode} (a negative one "
                    "is a signal; -9 is mostly a lack of memory, which parallel.processes=1 eases)."
                )
            raise UserError(sentence)


def _encode_in_process(recipe: Recipe, process: int, processes: int, say: Connection) -> None:
    """Encode a share; say in one sentence why it cannot be done, and end with exit code 2."""
    die_with_parent()
    try:
        encode_share(recipe, process, processes)
    except (UserError, DataError) as error:
        say.send(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes that are started within."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def main(arguments: Sequence[str]) -> int:
    """Compose, encode."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    encode(compose_recipe(arguments[0], arguments[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(speak(main))
