"""The samples of a data set through the ``webdataset`` package, for who trains with something else.

What is given is what our own reader reads; shuffling and splitting by node and worker are
WebDataset's own, without the plan's promises.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import fsspec
from webdataset import WebDataset
from webdataset.gopen import gopen_schemes

from data_pipeline.errors import DataError
from data_pipeline.reading.remote import open_set
from data_pipeline.shards.index import ShardIndex
from data_pipeline.shards.schema import MEMBER_NAME, parse_sample

_BY_GOPEN = ("http", "https", "file")
_BY_FSSPEC = ("s3",)
"""Addresses that WebDataset itself does not know."""


def as_webdataset(
    place: Path | str,
    split: str,
    datasets: Sequence[str] | None = None,
    cache: Path | str = "cache",
    shardshuffle: int | bool = False,
    **options: Any,
) -> WebDataset:
    """Open a split with ``webdataset``.

    Args:
        place: folder or address of the data set.
        split: ``train``, ``val`` or ``test``.
        datasets: their names; all that the split has if not given.
        cache: folder for the manifest and the indexes of a set that is elsewhere.
        shardshuffle: as ``WebDataset`` takes it.
        options: whatever else ``WebDataset`` takes (``nodesplitter``, ``workersplitter``,
            ``resampled``, ``handler`` ...).

    Returns:
        A pipeline of samples, each a dict: ``__key__`` (the sample's key), ``__url__`` (its
        shard), ``json`` (the record's bytes), and the bytes of each medium under its member's name
        (``0.jpg`` ...). Nothing is decoded.

    Raises:
        DataError: there is no such set, split or dataset, or WebDataset cannot reach it; while
            iterating: a record is not valid.
    """
    manifest = open_set(str(place), Path(cache))
    names = list(datasets) if datasets is not None else [None]
    shards = [shard for name in names for shard in manifest.shards(split, name)]
    return WebDataset(
        [_place(shard) for shard in shards],
        shardshuffle=shardshuffle,
        select_files=_is_ours,
        rename_files=_without_folder,
        **options,
    ).map(_sample)


def _place(shard: ShardIndex) -> str:
    """What WebDataset opens a shard by; nothing that a manifest names may run a command."""
    if not shard.url:
        return str(shard.path.absolute())
    scheme = shard.url.partition(":")[0]
    if scheme not in _BY_GOPEN + _BY_FSSPEC or "::" in shard.url:
        raise DataError(
            f"a set at '{scheme}:' is not read through webdataset, only at "
            f"{', '.join(_BY_GOPEN + _BY_FSSPEC)} or in a folder; copy it to one of these"
        )
    return shard.url


def _open_with_fsspec(url: str, mode: str, bufsize: int) -> IO[bytes]:
    return fsspec.open(url, mode).open()


for _scheme in _BY_FSSPEC:
    gopen_schemes.setdefault(_scheme, _open_with_fsspec)


def _without_folder(name: str) -> str:
    """The key of ``./a.json`` is ``a``, as in the index."""
    return name.removeprefix("./")


def _is_ours(name: str) -> bool:
    member = name.partition(".")[2]
    return member == "json" or MEMBER_NAME.fullmatch(member) is not None


def _sample(found: dict[str, Any]) -> dict[str, Any]:
    """Leave only what the record names."""
    source = f"{found['__url__']}:{found['__key__']}"
    if "json" not in found:
        raise DataError(f"{source}.json is missing; verify the data set")
    record = parse_sample(found["json"], source)
    names = [medium.member for medium in record.media]
    if missing := [name for name in names if name not in found]:
        raise DataError(f"{source}: {', '.join(missing)} is missing; verify the data set")
    return {name: found[name] for name in ("__key__", "__url__", "json", *names)}
