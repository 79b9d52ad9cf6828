"""``python -m unimoe_mcore.convert SOURCE FOLDER``: a published model as a base.

SOURCE is a Llama in a GGUF file (``.gguf``). FOLDER then holds what a base stage gives: weights
under our names, tokenizer, manifest; recipes name it in ``stage.base``. The last lines say what
``model.language`` must be, and which tensors were not taken and why.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from unimoe_mcore.runtime.devices import prepare_device

prepare_device()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from data_pipeline.shards.integrity import file_sha256  # noqa: E402
from unimoe_mcore.checkpoints.artefact import TOKENIZER, Manifest, publish, seal  # noqa: E402
from unimoe_mcore.checkpoints.gguf_file import Published, read_gguf  # noqa: E402
from unimoe_mcore.checkpoints.llama import Imported, import_llama  # noqa: E402
from unimoe_mcore.checkpoints.pieces import Piece  # noqa: E402
from unimoe_mcore.checkpoints.shard_file import HostCopy  # noqa: E402
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
            the folder is there and is something else than a base.
        DataError: if its tokenizer does not fit.
    """
    read = READERS.get(source.suffix)
    if read is None:
        raise UserError(f"{source} cannot be converted: sources end in {', '.join(READERS)}.")
    if folder.exists() and not (folder / "manifest.json").is_file():
        raise UserError(f"{folder} exists and is no base: name another folder.")
    published = read(source)
    imported = import_llama(published.tensors, published.language, str(source))
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
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
    return published, imported


def _write(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """All tensors whole, as one rank of one would write them."""
    pieces = (
        Piece(
            name,
            tuple(value.shape),
            (0,) * value.dim(),
            tuple(value.shape),
            0,
            value.numel(),
            value.to(dtype),
            writes=True,
        )
        for name, value in tensors.items()
    )
    HostCopy().take(pieces).write(folder, 0)


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
    total = sum(value.numel() for value in imported.tensors.values())
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
