"""``python -m unimoe_mcore.encode RECIPE [overrides]``: run the frozen encoders once on all media.

Training then reads their outputs from the cache. It would fill the cache by itself as it goes;
doing it first keeps the steps even and uses every process for encoding.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from data_pipeline.reading.medium import Medium
from data_pipeline.reading.records import RecordReader
from data_pipeline.shards.index import Manifest, load_manifest
from unimoe_mcore.compose import speak
from unimoe_mcore.config.composition import compose_recipe, dump, typed
from unimoe_mcore.config.errors import UserError
from unimoe_mcore.config.recipe import Recipe
from unimoe_mcore.config.towers import tower_modalities

BATCH = 64
"""Media that are read and encoded at a time."""


def all_media(manifest: Manifest, modalities: Sequence[str]) -> Iterator[Medium]:
    """Every medium of some modalities in a built set, split by split."""
    reader = RecordReader()
    for split in manifest.splits():
        for shard in manifest.shards(split):
            for sample in shard.samples:
                if any(facts.modality in modalities for facts in sample.media):
                    yield from (
                        medium
                        for medium in reader.media(shard, sample)
                        if medium.modality in modalities
                    )


def encode_share(recipe: Recipe, process: int, processes: int) -> int:
    """Encode every ``processes``-th medium that is not in the cache yet.

    Returns:
        Number of media that were encoded.
    """
    import torch

    from unimoe_mcore.model.towers.encoders import build_encoder
    from unimoe_mcore.model.towers.feature_cache import FeatureCache

    torch.set_num_threads(1)
    manifest = load_manifest(Path(recipe.data.folder))
    encoded = 0
    for name, tower in recipe.model.towers.items():
        cache = FeatureCache(Path(recipe.paths.cache) / "features", build_encoder(tower.encoder))
        media = list(all_media(manifest, tower_modalities(name)))[process::processes]
        missing = cache.missing(media)
        encoded += len(missing)
        for batch in _shown(missing, f"encode {name}", shown=process == 0):
            cache.features(batch)
    return encoded


def _shown(media: list[Medium], title: str, shown: bool) -> Iterator[list[Medium]]:
    """Batches of media, with progress on a terminal or in plain lines."""
    terminal = sys.stderr.isatty()
    bar = tqdm(total=len(media), desc=title, unit="media", disable=not (shown and terminal))
    began, told = time.perf_counter(), time.perf_counter()
    for start in range(0, len(media), BATCH):
        batch = media[start : start + BATCH]
        yield batch
        bar.update(len(batch))
        now, done = time.perf_counter(), start + len(batch)
        if shown and not terminal and (now - told > 5 or done == len(media)):
            rate = done / (now - began)
            left = (len(media) - done) / rate
            print(
                f"{title}  {done}/{len(media)}  {rate:.0f} media/s  {left:.0f} s left", flush=True
            )
            told = now
    bar.close()


def encode(recipe: Recipe) -> None:
    """Fill the feature cache with ``parallel.processes`` processes.

    Raises:
        UserError: if a process failed (it has said why).
    """
    import multiprocessing

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=_encode_in_process,
            args=(dump(recipe), number, recipe.parallel.processes),
            daemon=True,
        )
        for number in range(recipe.parallel.processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise UserError("Encoding failed: see the message above.")


def _encode_in_process(recipe_text: str, process: int, processes: int) -> None:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.create(recipe_text))
    recipe = typed(plain)  # type: ignore[arg-type]
    sys.exit(speak(lambda _: (encode_share(recipe, process, processes), 0)[1]))


def main(arguments: Sequence[str]) -> int:
    """Compose, encode."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    encode(compose_recipe(arguments[0], arguments[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(speak(main))
