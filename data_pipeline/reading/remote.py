"""Sets of shards that lie elsewhere: their indexes are mirrored, their shards fetched when read."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import DataError
from data_pipeline.reading.node_cache import NodeCache, identity, node_lock
from data_pipeline.reading.transfer import copy_checked, is_address, read_small, shown
from data_pipeline.shards.index import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    ShardIndex,
    index_path,
    load_manifest,
)

_AT_ONCE = 16  # indexes fetched at the same time
_STALE_SECONDS = 30 * 24 * 3600
_CHECKED_NAME = ".checked.json"
# Characters that mean nothing else in an address.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_.+=@-]+(/[A-Za-z0-9_.+=@-]+)*")


@dataclasses.dataclass(frozen=True)
class ShardStore:
    """Where the bytes of shards are on this node. Picklable; any number of processes share one.

    Attributes:
        folder: cache of this node for shards that lie elsewhere; None: there is none.
        most_bytes: most bytes of shards in it, those being fetched included.
    """

    folder: Path | None = None
    most_bytes: int = 0

    def open(self, shard: ShardIndex) -> BinaryIO:
        """Open a shard for reading; one that lies elsewhere is fetched whole, once per node.

        What is open stays readable when the cache throws the shard out.

        Raises:
            DataError: it is missing, cannot be fetched, is not what the manifest says, or does
                not fit into the cache.
        """
        if not shard.url:
            try:
                return shard.path.open("rb")
            except OSError as error:
                raise DataError(
                    f"The shard {shard.path} cannot be read ({error.strerror}); restore it or "
                    "build the data set again"
                ) from error
        return self._cache(shard).open(
            shard.sha256,
            shard.bytes,
            lambda file: copy_checked(shard.url, file, shard.bytes, shard.sha256),
        )

    def path(self, shard: ShardIndex) -> Path:
        """The place of a shard's bytes, fetched as ``open`` does.

        Others may make the cache throw it out before it is opened: ``open`` is the safe way.

        Raises:
            DataError: as ``open``.
        """
        if not shard.url:
            return shard.path
        self.open(shard).close()
        return self._cache(shard).path(shard.sha256)

    def forget(self, shard: ShardIndex) -> None:
        """Drop this node's copy of a shard if it is damaged; it will be fetched again.

        For readers that find a member damaged. A copy that is what the manifest says is kept.
        """
        if shard.url:
            self._cache(shard).forget(shard.sha256)

    def _cache(self, shard: ShardIndex) -> NodeCache:
        if self.folder is None:
            raise DataError(
                f"{shown(shard.url)} lies elsewhere and there is no folder to fetch it to; name one"
            )
        if shard.bytes < 1 or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise DataError(
                f"{shown(shard.url)}: its manifest lacks size or SHA-256; write the manifest again"
            )
        return NodeCache(self.folder, self.most_bytes)


def open_set(place: str, cache: Path) -> Manifest:
    """Open a folder of shards, here or elsewhere.

    Of a set that lies elsewhere the manifest is read at every call; it and the indexes are
    mirrored, each checked against the manifest. A manifest that has changed gets a new mirror.

    Args:
        place: a folder, or the address of one, which holds ``manifest.json``.
        cache: where mirrors are kept; any number of processes may use it at once. Mirrors that
            were replaced are removed a month after their last use.

    Raises:
        DataError: the set is missing, damaged, or cannot be fetched.
    """
    if not is_address(place):
        return load_manifest(Path(place))
    url = place.rstrip("/").removesuffix(f"/{MANIFEST_NAME}")
    content = read_small(f"{url}/{MANIFEST_NAME}")
    origin = hashlib.sha256(url.encode()).hexdigest()[:16]
    sets = Path(cache) / "sets"
    folder = sets / f"{origin}-{hashlib.sha256(content).hexdigest()[:16]}"
    try:
        with node_lock(sets, origin):
            if folder.is_dir():
                _mend(folder, url)
            else:
                _mirror(folder, url, content)
            os.utime(folder)
            _drop_stale(sets, origin, folder)
    except OSError as error:
        raise DataError(
            f"The mirror of {shown(url)} cannot be kept in {sets} ({error.strerror or error}); "
            "free some space or choose another cache folder"
        ) from error
    return load_manifest(folder)


def _mirror(folder: Path, url: str, content: bytes) -> None:
    """Fetch all indexes into a folder that appears by one rename. The lock is held."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    (partial / MANIFEST_NAME).write_bytes(content)
    try:
        manifest = load_manifest(partial)
    except DataError as error:
        raise DataError(f"{shown(url)}: {error}") from error
    for entry in manifest.entries:
        if not _PLAIN_PATH.fullmatch(entry.path):
            raise DataError(f"{shown(url)}: '{entry.path}' is no name for a shard elsewhere")
    _fetch_indexes(partial, url, manifest.entries)
    # Whoever opens the mirror shall know where the shards are, whatever the manifest said.
    mirrored = dataclasses.replace(manifest, url=url)
    (partial / MANIFEST_NAME).write_text(mirrored.to_json(), "utf-8")
    _note(partial, manifest.entries)
    partial.rename(folder)


def _mend(folder: Path, url: str) -> None:
    """Fetch again what is missing from a mirror or damaged. The lock is held."""
    entries = load_manifest(folder).entries
    known = _noted(folder)
    doubtful = [e for e in entries if known.get(e.path) != _look(index_path(folder / e.path))]
    if not doubtful:
        return
    _fetch_indexes(folder, url, [entry for entry in doubtful if not _is_right(folder, entry)])
    _note(folder, entries)


def _fetch_indexes(folder: Path, url: str, entries: Sequence[ShardEntry]) -> None:
    def fetch(entry: ShardEntry) -> None:
        target = index_path(folder / entry.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        with partial.open("wb") as file:
            name = f"{url}/{index_path(Path(entry.path)).as_posix()}"
            copy_checked(name, file, entry.index_bytes, entry.index_sha256)
        partial.replace(target)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        jobs = [pool.submit(fetch, entry) for entry in entries]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _is_right(folder: Path, entry: ShardEntry) -> bool:
    try:
        with index_path(folder / entry.path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry.index_sha256
    except OSError:
        return False


def _look(path: Path) -> str:
    try:
        return identity(path.stat())
    except OSError:
        return ""


def _note(folder: Path, entries: tuple[ShardEntry, ...]) -> None:
    """Remember how the indexes look that were just found right."""
    looks = {entry.path: _look(index_path(folder / entry.path)) for entry in entries}
    draft = folder / f"{_CHECKED_NAME}.partial"
    draft.write_text(json.dumps(looks), "utf-8")
    draft.replace(folder / _CHECKED_NAME)


def _noted(folder: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError):
        noted = json.loads((folder / _CHECKED_NAME).read_text("utf-8"))
        if isinstance(noted, dict):
            return noted
    return {}


def _drop_stale(sets: Path, origin: str, current: Path) -> None:
    """Remove earlier mirrors of the same set that nobody has opened for long."""
    for folder in sets.glob(f"{origin}-*"):
        with contextlib.suppress(OSError):
            if folder != current and time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
