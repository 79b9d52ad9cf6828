"""A published model written as a base folder, with what stands on it in folders of its own."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from unimoe_mcore.checkpoints.artefact import MANIFEST, TOKENIZER, Manifest, publish, seal
from unimoe_mcore.checkpoints.deferred import Deferred
from unimoe_mcore.checkpoints.importing import Imported
from unimoe_mcore.checkpoints.pieces import Piece
from unimoe_mcore.checkpoints.published import Published
from unimoe_mcore.checkpoints.shard_file import write_one_by_one
from unimoe_mcore.config.errors import UserError

_WRITTEN = {MANIFEST, TOKENIZER, "rank-00000.json", "rank-00000.safetensors"}
_PARTS = ("expert", "moe", "align")
"""Kinds of what stands on a base."""


def write_base(
    folder: Path, published: Published, imported: Imported, dtype: torch.dtype, run: str
) -> None:
    """Write a base folder; it is visible only when it is whole, with all that lies beside it.

    Args:
        dtype: in which the weights are stored.
        run: what the manifests call the run that gave them.

    Raises:
        UserError: if a tensor cannot be read.
    """
    facts = Manifest(
        kind="base",
        hash="",
        stands_on="",
        expert="",
        run=run,
        language=asdict(published.language),
        sources={"published": published.digest},
    )
    with _appearing(folder) as partial:
        published.tokenizer.save(partial / TOKENIZER)
        base = seal(partial, facts, _write(partial, imported.tensors, dtype))
        for part, tensors in imported.parts:
            place = partial / part.folder
            place.mkdir()
            of_part = replace(facts, kind=part.kind, stands_on=base.hash, towers=dict(part.towers))
            seal(place, of_part, _write(place, tensors, dtype))


def write_part(
    folder: Path, facts: Manifest, tensors: Mapping[str, Deferred], dtype: torch.dtype
) -> Manifest:
    """Write an artefact that stands on a base; it is visible only when it is whole.

    Args:
        facts: everything but ``hash`` and ``tensors``.
        dtype: in which the weights are stored.

    Raises:
        UserError: if a tensor cannot be read.
    """
    with _appearing(folder) as partial:
        return seal(partial, facts, _write(partial, tensors, dtype))


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the other's place when all went well."""
    folder = Path(os.path.abspath(folder))
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(folder: Path, kind: str = "base") -> None:
    """Refuse a folder that holds anything but what an earlier conversion of that kind wrote.

    Raises:
        UserError: naming the folder.
    """
    if folder.exists() and not _ours(folder, (kind,)):
        what = {"base": "base", "expert": "expert", "moe": "file of routers"}[kind]
        raise UserError(f"{folder} exists and is no converted {what}: name another folder.")


def _ours(folder: Path, kinds: Sequence[str]) -> bool:
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
        if facts["kind"] not in kinds or not facts["sources"]["published"]:
            return False
        return all(
            path.name in _WRITTEN if not path.is_dir() else _ours(path, _PARTS)
            for path in folder.iterdir()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(
    folder: Path, tensors: Mapping[str, Deferred], dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    pieces = [
        Piece(
            name,
            value.shape,
            (0,) * len(value.shape),
            value.shape,
            0,
            math.prod(value.shape),
            torch.empty(value.shape, dtype=dtype, device="meta"),
            writes=True,
        )
        for name, value in tensors.items()
    ]
    return write_one_by_one(folder, pieces, lambda name: tensors[name].read())
