"""``python -m unimoe_mcore.convert SOURCE FOLDER``: a published model as a base.

SOURCE is a Llama in a GGUF file (``.gguf``). FOLDER then holds what a base stage gives: weights
under our names, tokenizer, manifest; recipes name it in ``stage.base``. The last lines say what
``model.language`` must be, and which tensors were not taken and why.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

import torch  # noqa: E402

from data_pipeline.shards.integrity import file_sha256  # noqa: E402
from unimoe_mcore.checkpoints.artefact import (  # noqa: E402
    MANIFEST,
    TOKENIZER,
    Manifest,
    publish,
    seal,
)
from unimoe_mcore.checkpoints.deferred import Deferred  # noqa: E402
from unimoe_mcore.checkpoints.gguf_file import Published, read_gguf  # noqa: E402
from unimoe_mcore.checkpoints.llama import Imported, import_llama  # noqa: E402
from unimoe_mcore.checkpoints.pieces import Piece  # noqa: E402
from unimoe_mcore.checkpoints.shard_file import write_one_by_one  # noqa: E402
from unimoe_mcore.compose import speak  # noqa: E402
from unimoe_mcore.config.errors import UserError  # noqa: E402
from unimoe_mcore.runtime.precision import DTYPES  # noqa: E402

READERS = {".gguf": read_gguf}
"""Ending of a source's name -> what reads it."""


def convert(source: Path, folder: Path, dtype: torch.dtype) -> tuple[Published, Imported]:
    """Write a base folder from a published model; it is visible only when it is whole.

    Args:
        dtype: in which the weights are stored.

    Raises:
        UserError: if the source cannot be read, has tensors without a place here or lacks one, or
            the folder is there and holds something else than a converted base.
        DataError: if its tokenizer does not fit.
    """
    read = READERS.get(source.suffix)
    if read is None:
        raise UserError(f"{source} cannot be converted: sources end in {', '.join(READERS)}.")
    folder = Path(os.path.abspath(folder))
    _check_replaceable(folder)
    published = read(source)
    imported = import_llama(published.tensors, published.language, str(source))
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        published.tokenizer.save(partial / TOKENIZER)
        _write(partial, imported.tensors, dtype)
        facts = Manifest(
            kind="base",
            hash="",
            stands_on="",
            expert="",
            run=source.stem,
            language=asdict(published.language),
            sources={"published": file_sha256(source)},
        )
        seal(partial, facts)
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return published, imported


def _check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything but what an earlier conversion wrote.

    Raises:
        UserError: naming the folder.
    """
    if not folder.exists():
        return
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
        ours = facts["kind"] == "base" and bool(facts["sources"]["published"])
        written = [MANIFEST, TOKENIZER, "rank-00000.json", "rank-00000.safetensors"]
        ours = ours and {path.name for path in folder.iterdir()} <= set(written)
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{folder} exists and is no converted base: name another folder.")


def _write(folder: Path, tensors: Mapping[str, Deferred], dtype: torch.dtype) -> None:
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
    write_one_by_one(folder, pieces, lambda name: tensors[name].read())


def main(arguments: Sequence[str]) -> int:
    """Read, lay out, write, say what was done."""
    parser = argparse.ArgumentParser(
        prog="python -m unimoe_mcore.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="the published model's file")
    parser.add_argument("folder", type=Path, help="folder of the base")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="of the weights")
    given = parser.parse_args(arguments)
    published, imported = convert(given.source, given.folder, DTYPES[given.dtype])
    total = sum(math.prod(value.shape) for value in imported.tensors.values())
    print(
        f"{given.folder}: {total / 1e6:.2f} M parameters in {given.dtype}, {len(imported.used)} "
        f"tensors taken, {len(imported.skipped)} left out, chat template "
        f"{published.tokenizer.template.name}"
    )
    for name, why in imported.skipped.items():
        print(f"  left out: {name}: {why}")
    shape = ", ".join(f"{key}: {value}" for key, value in asdict(published.language).items())
    print(f"model.language: {{{shape}}}")
    return 0


if __name__ == "__main__":
    sys.exit(speak(main))
