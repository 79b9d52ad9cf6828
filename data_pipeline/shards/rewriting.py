"""Rewrites shards that hold several combinations into one shard per combination."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from data_pipeline.errors import DataError
from data_pipeline.shards.description import REWRITTEN, shard_files
from data_pipeline.shards.index import SPLITS, ShardIndex, index_path, load_index
from data_pipeline.shards.scan import build_index, index_shard, write_index
from data_pipeline.shards.schema import MIXED, combination_of


def rewrite_mixed(folder: Path) -> list[Path]:
    """Rewrite the mixed shards ``<split>/<dataset>/*.tar`` of a folder.

    ``X.tar`` becomes ``X.by-combination/X-<combination>.tar``. That folder appears by one rename
    and stands in for ``X.tar`` from then on, so a kill leaves either the one or the other. Keys,
    records and media keep their bytes and their order; members that belong to no sample are left
    behind. The old tars stay, since a manifest may still name them: see ``remove_rewritten``.

    Returns:
        The tars that were rewritten.

    Raises:
        DataError: a shard is not valid or is damaged.
    """
    done = []
    for tar in _all(folder):
        if not index_path(tar).is_file():
            index_shard(tar)
        shard = load_index(tar)
        if shard.combination == MIXED:
            _rewrite(shard)
            done.append(tar)
    return done


def remove_rewritten(folder: Path) -> None:
    """Remove the tars that were rewritten; only when no manifest names them any more."""
    for stand_in in folder.glob(f"*/*/**/*{REWRITTEN}"):
        tar = stand_in.with_suffix(".tar")
        tar.unlink(missing_ok=True)
        index_path(tar).unlink(missing_ok=True)


def _all(folder: Path) -> Iterator[Path]:
    for split in SPLITS:
        for place in sorted(path for path in (folder / split).glob("*") if path.is_dir()):
            yield from shard_files(place)


def _rewrite(shard: ShardIndex) -> None:
    from webdataset import TarWriter  # imports torch, which nobody who only reads needs

    tar = shard.path
    final = tar.with_suffix(REWRITTEN)
    partial = final.with_name(f".{final.name}.partial")  # hidden: no shard is looked for in it
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with ExitStack() as stack:
        stream = stack.enter_context(tar.open("rb"))
        writers: dict[str, TarWriter] = {}
        files: list[IO[bytes]] = []
        for sample in shard.samples:
            combination = combination_of(medium.modality for medium in sample.media)
            if combination not in writers:
                name = f"{tar.stem}-{combination.replace('+', '-')}.tar"
                files.append(stack.enter_context((partial / name).open("wb")))
                writers[combination] = TarWriter(files[-1], encoder=False, mtime=0)
            places = [("json", sample.json_offset, sample.json_size, sample.json_crc32)]
            places += [(each.member, each.offset, each.size, each.crc32) for each in sample.media]
            content = {
                member: _read(stream, tar, f"{sample.key}.{member}", offset, size, crc32)
                for member, offset, size, crc32 in places
            }
            writers[combination].write({"__key__": sample.key, **content})
        for writer in writers.values():
            writer.close()
        for file in files:
            file.flush()
            os.fsync(file.fileno())
    for path in sorted(partial.glob("*.tar")):
        write_index(path, build_index(path))
    partial.rename(final)


def _read(stream: IO[bytes], tar: Path, name: str, offset: int, size: int, crc32: int) -> bytes:
    stream.seek(offset)
    data = stream.read(size)
    if len(data) != size or zlib.crc32(data) != crc32:
        raise DataError(
            f"{tar}: member {name} at byte {offset} is damaged since it was indexed; restore the "
            f"tar, or delete {index_path(tar).name} to index it as it is"
        )
    return data
