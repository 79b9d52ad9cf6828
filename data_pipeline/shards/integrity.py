"""Checksums: what a folder of shards must be, and whether it still is that."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.shards.index import (
    MANIFEST_NAME,
    SPLITS,
    DatasetFacts,
    Manifest,
    ShardEntry,
    index_path,
    load_index,
    load_manifest,
)
from data_pipeline.shards.schema import parse_sample
from data_pipeline.shards.writer import index_shard

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
    entries: list[ShardEntry] = []
    datasets: dict[str, dict[str, DatasetFacts]] = {}
    for split in SPLITS:
        for place in sorted(path for path in (folder / split).glob("*") if path.is_dir()):
            found, facts = _describe(folder, split, place)
            entries += found
            if found:
                datasets.setdefault(split, {})[place.name] = facts
    if not entries:
        raise DataError(f"{folder} has no shard named <split>/<dataset>/*.tar")
    manifest = Manifest(
        folder=folder,
        builder=builder,
        seed=seed,
        options=dict(options or {}),
        packages=dict(sorted((packages or {}).items())),
        notes=notes,
        datasets=datasets,
        entries=tuple(entries),
    )
    _replace(folder / MANIFEST_NAME, manifest.to_json())
    return manifest


def verify(folder: Path | str) -> Manifest:
    """Check every shard and index of a folder against its manifest; meant for every start.

    Existence and size are always checked. A file is read only if it was not found right before
    with the same size and modification time, so a second call costs one ``stat`` per file.

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
        checked[entry.path] = _check("shard", tar, entry.bytes, entry.sha256, known, entry.path)
        checked[name] = _check("index", index, entry.index_bytes, entry.index_sha256, known, name)
    if checked != known:
        with contextlib.suppress(OSError):  # a read-only folder is read again at the next start
            _replace(folder / VERIFIED_NAME, json.dumps(checked, indent=1) + "\n")
    return manifest


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def _describe(folder: Path, split: str, place: Path) -> tuple[list[ShardEntry], DatasetFacts]:
    """The shards of one split of one dataset."""
    entries: list[ShardEntry] = []
    answers = Counter[str]()
    combinations: set[str] = set()
    for tar in sorted(place.glob("*.tar")):
        index = index_path(tar)
        if not index.is_file():
            index_shard(tar)
        shard = load_index(tar, place.name, "")
        combination = ""
        with tar.open("rb") as stream:
            for sample in shard.samples:
                stream.seek(sample.json_offset)
                record = parse_sample(stream.read(sample.json_size), f"{tar.name}:{sample.key}")
                if record.dataset != place.name:
                    raise DataError(
                        f"{tar}: sample '{sample.key}' is of dataset {record.dataset}, the folder "
                        f"is called {place.name}"
                    )
                answers[record.turns[-1].text] += 1
                combination = record.combination
        combinations.add(combination)
        entries.append(
            ShardEntry(
                split=split,
                dataset=place.name,
                combination=combination,
                path=tar.relative_to(folder).as_posix(),
                samples=len(shard.samples),
                bytes=tar.stat().st_size,
                sha256=file_sha256(tar),
                index_bytes=index.stat().st_size,
                index_sha256=file_sha256(index),
            )
        )
    samples = answers.total()
    facts = DatasetFacts(
        combination=" ".join(sorted(combinations)),
        samples=samples,
        answers=len(answers),
        majority=round(max(answers.values(), default=0) / max(1, samples), 4),
    )
    return entries, facts


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
