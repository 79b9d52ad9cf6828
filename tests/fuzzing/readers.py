"""The readers, each with a small right file to be spoilt."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tests.checkpoints import small_gguf
from tests.checkpoints.small_folders import Model
from unimoe_mcore.checkpoints.artefact import read_manifest
from unimoe_mcore.checkpoints.based import write_base
from unimoe_mcore.checkpoints.gguf_file import read_gguf
from unimoe_mcore.checkpoints.hf_folder import read_folder
from unimoe_mcore.checkpoints.importing import import_model
from unimoe_mcore.checkpoints.published import Published
from unimoe_mcore.checkpoints.store import ShardReader


@dataclass(frozen=True)
class Reader:
    """A reader of strangers' files.

    Attributes:
        make: writes what is right into a folder.
        read: reads everything in such a folder.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], None]


def _all_of(published: Published) -> None:
    for tensor in import_model(published, "it").tensors.values():
        tensor.read()


def _folder(folder: Path) -> None:
    _all_of(read_folder(folder))


def _gguf(folder: Path) -> None:
    _all_of(read_gguf(folder / "small.gguf"))


def _base(folder: Path) -> None:
    read_manifest(folder, "The base")
    stored = ShardReader(folder)
    for name in stored.tensors:
        stored.read(name)


def _make(form: str, folder: Path) -> None:
    Model().write(folder, form)


def _make_gguf(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    small_gguf.write(folder / "small.gguf", *small_gguf.small())


def _make_base(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as source:
        published = read_folder(Model().write(Path(source)))
        write_base(folder, published, import_model(published, "it"), torch.bfloat16, "it")


READERS = {
    "safetensors": Reader(partial(_make, "safetensors"), _folder),
    "safetensors in pieces": Reader(partial(_make, "safetensors, sharded"), _folder),
    "torch.save": Reader(partial(_make, "bin"), _folder),
    "torch.save in pieces": Reader(partial(_make, "bin, sharded"), _folder),
    "GGUF": Reader(_make_gguf, _gguf),
    "our own base": Reader(_make_base, _base),
}
