"""Checks a data set byte by byte: ``python -m data_pipeline.verify DIR``.

Every file is compared with the manifest and the indexes. Each problem is one line that names the
shard, and where it can be told the sample, the member and the byte. The exit code is 1 if there is
any. ``--quick`` looks at sizes only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data_pipeline.errors import DataError
from data_pipeline.shards.checksums import file_sha256
from data_pipeline.shards.columns import map_table
from data_pipeline.shards.damage import empty_media, member_damage
from data_pipeline.shards.description import shard_files
from data_pipeline.shards.index import (
    SPLITS,
    Manifest,
    ShardEntry,
    ShardIndex,
    index_path,
    load_manifest,
)

_CHUNK = 4 * 1024**2
_THREADS = min(4, os.cpu_count() or 1)
"""Shards that are read at once: the checksum of one keeps a core busy, but no fast disk."""
Advance = Callable[[int], object]
"""Told how many bytes were read."""


def find_problems(folder: Path, quick: bool = False, quiet: bool = True) -> Iterator[str]:
    """Everything that is wrong with a data set, one sentence each, in the manifest's order.

    Args:
        folder: of the data set; for one whose shards are elsewhere the indexes are checked.
        quick: look at the files' sizes only.
        quiet: show no progress.
    """
    try:
        manifest = load_manifest(folder)
    except DataError as error:
        yield str(error)
        return
    total = sum(entry.bytes for entry in manifest.entries if not (quick or manifest.url))
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=quiet or None) as shown,
    ):

        def check(entry: ShardEntry) -> list[str]:
            return list(
                _sizes(manifest, entry) if quick else _content(manifest, entry, shown.update)
            )

        try:
            for found in pool.map(check, manifest.entries):
                yield from found
        finally:
            pool.shutdown(cancel_futures=True)
    yield from _strays(manifest)


def _sizes(manifest: Manifest, entry: ShardEntry) -> Iterator[str]:
    """Problems of a shard and its index that their sizes show."""
    for path, size in _files(manifest, entry):
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != size:
            yield f"{path} has {path.stat().st_size} bytes, the manifest says {size}"


def _files(manifest: Manifest, entry: ShardEntry) -> list[tuple[Path, int]]:
    tar = manifest.folder / entry.path
    shards = [] if manifest.url else [(tar, entry.bytes)]
    return [*shards, (index_path(tar), entry.index_bytes)]


def _content(manifest: Manifest, entry: ShardEntry, advance: Advance) -> Iterator[str]:
    """Problems of a shard and its index that their bytes show."""
    tar = manifest.folder / entry.path
    shard, problem = _index(manifest, entry)
    if problem:
        yield problem
    if shard is not None:
        yield from (f"{tar}: {each}" for each in empty_media(shard))
    if manifest.url:
        return
    try:
        size = tar.stat().st_size
        if size != entry.bytes:
            yield f"{tar} has {size} bytes, the manifest says {entry.bytes}"
        sound = _sha256(tar, advance) == entry.sha256
        if sound and not problem:
            return
        found = list(member_damage(shard)) if shard is not None else []
        yield from (f"{tar}: {each}" for each in found)
        if not sound and not found:
            yield f"{tar}: {_unplaced(shard, size, entry)}"
    except FileNotFoundError:
        yield f"{tar} is missing"
    except OSError as error:
        yield f"{tar} cannot be read: {error}"


def _index(manifest: Manifest, entry: ShardEntry) -> tuple[ShardIndex | None, str]:
    """The index as far as it can be used, and what is wrong with it."""
    tar = manifest.folder / entry.path
    path = index_path(tar)
    try:
        table = map_table(path)
    except DataError as error:
        return None, str(error)
    shard = ShardIndex(tar, table.dataset, table.combination)
    found = (len(shard), table.dataset, table.combination, table.tar_bytes)
    expected = (entry.samples, entry.dataset, entry.combination, entry.bytes)
    if found != expected:
        what = "lists {} samples of {} ({}) in a tar of {} bytes, the manifest {} of {} ({}) in {}"
        return shard, f"{path} {what.format(*found, *expected)}"
    if file_sha256(path) != entry.index_sha256:
        return shard, f"{path} is not the index that the manifest names: its SHA-256 differs"
    return shard, ""


def _unplaced(shard: ShardIndex | None, size: int, entry: ShardEntry) -> str:
    """The sentence for a tar whose damage lies in no member."""
    if shard is None:
        return "its SHA-256 is not the manifest's, and without its index the place cannot be told"
    if size < entry.bytes:
        return f"is cut off at byte {size}, after its last sample: no sample is lost"
    return (
        "its SHA-256 is not the manifest's though every member is right: bytes between or after "
        "the members differ, or the manifest is damaged"
    )


def _sha256(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while read := stream.readinto(buffer):
            digest.update(view[:read])
            advance(read)
    return digest.hexdigest()


def _strays(manifest: Manifest) -> Iterator[str]:
    """Shards that lie in the folder and are not in the manifest."""
    known = {manifest.folder / entry.path for entry in manifest.entries}
    for split in SPLITS:
        for place in sorted((manifest.folder / split).glob("*/")):
            try:
                for tar in shard_files(place):
                    if tar not in known:
                        yield f"{tar} is not in the manifest; index the folder again to use it"
            except DataError as error:
                yield str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.verify", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the data set, with its manifest.json")
    parser.add_argument("--quick", action="store_true", help="look at sizes only")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    problems = 0
    for problem in find_problems(options.folder, options.quick, quiet=False):
        problems += 1
        tqdm.write(problem)
    seconds = time.monotonic() - start
    if problems:
        print(f"{options.folder}: {problems} problems, {seconds:.1f} s", file=sys.stderr)
        return 1
    entries = load_manifest(options.folder).entries
    size = sum(entry.bytes for entry in entries)
    what = "sizes are right" if options.quick else "every byte is right"
    print(f"{options.folder}: {what}; {len(entries)} shards, {size / 1e6:.0f} MB, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
