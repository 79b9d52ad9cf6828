"""Checksums: what a folder of shards must be, and whether it still is that."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.shards.checksums import file_sha256
from data_pipeline.shards.description import describe_dataset
from data_pipeline.shards.index import (
    MANIFEST_NAME,
    SPLITS,
    Counts,
    DatasetFacts,
    Manifest,
    index_path,
    load_manifest,
)

VERIFIED_NAME = ".verified.json"
"""Remembers which files were found right: path -> size, modification time, SHA-256."""
_REPAIR = "restore it or build the data set again"


def write_manifest(
    folder: Path,
    builder: str,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    packages: Mapping[str, str] | None = None,
    notes: tuple[str, ...] = (),
) -> Manifest:
    """Describe the shards ``<split>/<dataset>/*.tar`` of a folder in its ``manifest.json``.

    Indexes that are missing are made, so shards from elsewhere can be described too.

    Args:
        folder: the folder.
        builder: name and version of what made the shards.
        seed: its seed.
        options: its other options, JSON values.
        packages: package -> version of the sources.
        notes: what was left out and why.

    Raises:
        DataError: there is no shard, or one is not valid.
    """
    found = [
        describe_dataset(folder, split, place)
        for split in SPLITS
        for place in sorted(path for path in (folder / split).glob("*") if path.is_dir())
    ]
    described = [each for each in found if each.entries]
    if not described:
        raise DataError(f"{folder} has no shard named <split>/<dataset>/*.tar")
    datasets: dict[str, dict[str, DatasetFacts]] = {}
    counts: dict[str, dict[str, dict[str, Counts]]] = {}
    for each in described:
        datasets.setdefault(each.split, {})[each.name] = each.facts
        counts.setdefault(each.split, {})[each.name] = each.counts
    manifest = Manifest(
        folder=folder,
        builder=builder,
        seed=seed,
        options=dict(options or {}),
        packages=dict(sorted((packages or {}).items())),
        notes=notes,
        datasets=datasets,
        entries=tuple(entry for each in described for entry in each.entries),
        counts=counts,
    )
    _replace(folder / MANIFEST_NAME, manifest.to_json())
    return manifest


def verify(folder: Path | str) -> Manifest:
    """Check every shard and index of a folder against its manifest; meant for every start.

    Existence and size are always checked. A file is read only if it was not found right before
    with the same size and modification time, so a second call costs one ``stat`` per file. Of a
    set whose shards are elsewhere the indexes are checked; a shard is when it is fetched.

    Raises:
        DataError: names the first shard that is missing, differs or has a wrong index.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    known = _load_verified(folder)
    checked = dict[str, dict[str, Any]]()
    for entry in manifest.entries:
        tar = folder / entry.path
        index = index_path(tar)
        name = index.relative_to(folder).as_posix()
        if not manifest.url:
            checked[entry.path] = _check("shard", tar, entry.bytes, entry.sha256, known, entry.path)
        checked[name] = _check("index", index, entry.index_bytes, entry.index_sha256, known, name)
    if checked != known:
        with contextlib.suppress(OSError):  # a read-only folder is read again at the next start
            _replace(folder / VERIFIED_NAME, json.dumps(checked, indent=1) + "\n")
    return manifest


def _check(
    kind: str, path: Path, size: int, sha256: str, known: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """Check one file; returns what to remember of it."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise DataError(f"{kind} {path} is missing; {_REPAIR}") from error
    if status.st_size != size:
        raise DataError(f"{kind} {path} has {status.st_size} bytes instead of {size}; {_REPAIR}")
    identity = {"size": size, "mtime_ns": status.st_mtime_ns, "sha256": sha256}
    if known.get(name) != identity and file_sha256(path) != sha256:
        raise DataError(f"{kind} {path} is corrupted: its SHA-256 is not the manifest's; {_REPAIR}")
    return identity


def _load_verified(folder: Path) -> dict[str, Any]:
    try:
        known = json.loads((folder / VERIFIED_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
