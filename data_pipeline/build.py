"""Builds data sets: ``python -m data_pipeline.build quickstart --out DIR --packages CACHE_DIR``.

``index`` describes shards from elsewhere (``DIR/<split>/<dataset>/*.tar``) so that they can be
trained on; with ``--rewrite`` those that mix combinations become one shard per combination.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from data_pipeline.errors import DataError
from data_pipeline.importers.item import Item, Task, generator
from data_pipeline.importers.packages import PackageStore
from data_pipeline.progress import progress
from data_pipeline.quickstart import Quickstart
from data_pipeline.shards.index import (
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    OldManifestError,
    load_manifest,
)
from data_pipeline.shards.integrity import verify, write_manifest
from data_pipeline.shards.rewriting import remove_rewritten, rewrite_mixed
from data_pipeline.shards.schema import (
    ASSISTANT,
    HUMAN,
    MIXED,
    MediumRef,
    Sample,
    Turn,
    combination_of,
)
from data_pipeline.shards.writer import ShardWriter

BUILDER = "quickstart/3"
"""Name and version; a change of what is built changes the version, and old folders are rebuilt."""

INDEXER = "index/2"

Say = Callable[[str], None]


def build_quickstart(
    out: Path | str,
    packages: Path | str,
    seed: int = 0,
    small: bool = False,
    pypi_only: bool = False,
    say: Say = print,
) -> Manifest:
    """Build the quickstart's question set, or return the finished one in ``out``.

    Everything is made in ``<out>.partial`` and appears under its name by one rename. The bytes
    depend on the builder's version, the options and the versions of the packages only.

    Args:
        out: folder of the data set.
        packages: cache folder of unpacked Debian packages.
        seed: seed of splits, pictures and order.
        small: a few items per task, for tests.
        pypi_only: use no Debian package.
        say: where one-line messages go.

    Raises:
        DataError: ``out`` holds something else, or a finished data set there is damaged.
    """
    out = Path(out).absolute()
    options = {"small": small, "pypi_only": pypi_only}
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_name(out.name + ".lock")):
        if _is_finished(out, seed, options):
            manifest = verify(out)
            for note in manifest.notes:
                say(f"built {note} (remove {out} to try again)")
            say(f"{out}: already built, {_summary(manifest)}")
            return manifest
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        start = time.monotonic()
        store = PackageStore(Path(packages), say)
        plan = Quickstart(store, seed, small, pypi_only)
        for note in plan.notes:
            say(note)
        for task in plan.tasks:
            _write_task(task, partial, seed)
        write_manifest(partial, BUILDER, seed, options, store.versions, tuple(plan.notes))
        _put_in_place(partial, out)
        manifest = verify(out)
        say(f"{out}: {_summary(manifest)}, {time.monotonic() - start:.0f} s")
        return manifest


def index_folder(folder: Path, rewrite: bool = False, say: Say = print) -> Manifest:
    """Describe the shards ``<split>/<dataset>/*.tar`` of a folder, whoever wrote them.

    Args:
        folder: the folder; indexes and the manifest are written into it.
        rewrite: make one shard per combination of every shard that holds several.
        say: where one-line messages go.

    Raises:
        DataError: there is no shard, or one is not valid.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    with FileLock(folder.with_name(folder.name + ".lock")):
        for tar in rewrite_mixed(folder) if rewrite else ():
            say(f"{tar}: rewritten, one shard per combination")
        manifest = write_manifest(folder, INDEXER)
        remove_rewritten(folder)
    for entry in manifest.entries:
        if entry.combination == MIXED:
            say(
                f"{entry.path}: holds several combinations, so that it is served under "
                "data.deal=balanced with data.compose=mixed only; --rewrite makes one shard per "
                "combination of it"
            )
    return manifest


def _is_finished(out: Path, seed: int, options: dict[str, Any]) -> bool:
    """Whether ``out`` is what would be built.

    Raises:
        DataError: it is something that this builder did not make.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST_NAME).is_file():
        raise DataError(f"{out} exists and is no data set; choose another folder")
    try:
        manifest = load_manifest(out)
        builder = manifest.builder
    except OldManifestError as error:
        manifest, builder = None, error.builder
    if builder.split("/")[0] != BUILDER.split("/")[0]:
        raise DataError(f"{out} was made by {builder}; choose another folder")
    if manifest is None:
        return False
    return (manifest.builder, manifest.seed, manifest.options) == (BUILDER, seed, options)


def _put_in_place(partial: Path, out: Path) -> None:
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _write_task(task: Task, folder: Path, seed: int) -> None:
    splits = defaultdict[str, list[Item]](list)
    for item in progress(task.items(), task.name, task.expected):
        splits[item.split].append(item)
    taught = {item.answer for item in splits["train"]}
    for split in SPLITS:
        items = splits[split]
        if task.closed:
            _refuse_untaught(task.name, split, items, taught)
        if not items:
            continue
        generator(seed, f"{task.name} {split} order").shuffle(items)
        combination = combination_of(each.modality for each in items[0].media)
        with ShardWriter(folder / split / task.name, task.name, combination) as writer:
            for index, item in enumerate(items):
                sample, media = _sample(item, task.name, f"{task.name}-{split}-{index:06d}")
                writer.write(sample, media)


def _refuse_untaught(name: str, split: str, items: Sequence[Item], taught: set[str]) -> None:
    for item in items:
        if item.answer not in taught:
            raise DataError(
                f"{name}: the {split} answer '{item.answer}' never occurs in train; choose another "
                "seed"
            )


def _sample(item: Item, dataset: str, key: str) -> tuple[Sample, dict[str, bytes]]:
    files = {f"{index}.{each.extension}": each for index, each in enumerate(item.media)}
    sample = Sample(
        key=key,
        dataset=dataset,
        turns=(Turn(HUMAN, item.prompt), Turn(ASSISTANT, item.answer)),
        media=tuple(MediumRef(each.modality, member) for member, each in files.items()),
    )
    return sample, {member: each.data for member, each in files.items()}


def _summary(manifest: Manifest) -> str:
    size = sum(entry.bytes for entry in manifest.entries) / 1e6
    counts = []
    for split in manifest.splits():
        samples = sum(facts.samples for facts in manifest.datasets[split].values())
        counts.append(f"{split} {samples}")
    return f"samples {', '.join(counts)}; {size:.0f} MB in {len(manifest.entries)} shards"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data_pipeline.build", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    quick = commands.add_parser("quickstart", help="build the quickstart's question set")
    quick.add_argument("--out", type=Path, required=True, help="folder of the data set")
    quick.add_argument("--packages", type=Path, required=True, help="cache of Debian packages")
    quick.add_argument("--seed", type=int, default=0)
    quick.add_argument("--small", action="store_true", help="a few items per task")
    quick.add_argument("--pypi-only", action="store_true", help="use no Debian package")
    index = commands.add_parser("index", help="describe shards that were made elsewhere")
    index.add_argument("folder", type=Path, help="holds <split>/<dataset>/*.tar")
    index.add_argument(
        "--rewrite", action="store_true", help="one shard per combination of every mixed one"
    )
    options = parser.parse_args(arguments)
    try:
        if options.command == "index":
            manifest = index_folder(options.folder, options.rewrite)
            print(f"{options.folder}: {_summary(manifest)}")
        else:
            build_quickstart(
                options.out, options.packages, options.seed, options.small, options.pypi_only
            )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
