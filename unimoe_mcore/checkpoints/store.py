"""Sharded tensors on disk: safetensors files and a JSON index, readable under any layout.

Megatron's ``sharded_state_dict`` says which part of which global tensor a rank holds; this file
only stores and finds those parts. Megatron's own storage writes and reads pickle, which a
checkpoint from somewhere else must never be able to run.

A folder holds one ``rank-00000.safetensors`` and one ``rank-00000.json`` per writing rank. The
JSON lists for every part the tensor's name, global shape, dtype, and the part's offset and shape,
and has checksums of the safetensors file and of itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.shards.integrity import file_sha256
from unimoe_mcore.checkpoints.files import flush, write_text
from unimoe_mcore.config.errors import UserError


def sharded_tensors(state: Mapping[str, Any]) -> Iterator[ShardedTensor]:
    """All sharded tensors of a sharded state dict, gated weights split into their halves.

    The tensors' data are views: writing into them writes into the model.
    """
    copied = dict(state)
    apply_factories(copied)
    for value in nested_values(copied):
        if isinstance(value, ShardedTensor):
            yield value


def write_shards(folder: Path, tensors: Iterator[ShardedTensor], rank: int) -> None:
    """Write this rank's parts; a part that several ranks hold is written by one of them."""
    parts: dict[str, Tensor] = {}
    entries = []
    for number, tensor in enumerate(t for t in tensors if is_main_replica(t.replica_id)):
        name = f"{number:06d}"
        assert tensor.data is not None
        parts[name] = tensor.data.detach().contiguous().cpu()
        entries.append(
            {
                "tensor": tensor.key,
                "global_shape": list(tensor.global_shape),
                "offset": list(tensor.global_offset),
                "shape": [1] * tensor.prepend_axis_num + list(tensor.local_shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "part": name,
            }
        )
    path = folder / f"rank-{rank:05d}.safetensors"
    # A view would drag its whole storage into the file: safetensors refuses shared storage.
    save_file({name: part.clone() for name, part in parts.items()}, str(path))
    flush(path)
    index = {"file": path.name, "sha256": file_sha256(path), "parts": entries}
    index["check"] = index_check(index)
    write_text(folder / f"rank-{rank:05d}.json", json.dumps(index))


def index_check(index: Mapping[str, Any]) -> str:
    """Checksum of an index: one that names the wrong part would load, and be wrong."""
    rest = {key: value for key, value in index.items() if key != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
}
"""Element types that an index may name."""


@dataclass(frozen=True)
class _Part:
    file: Path
    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """What is known of a stored tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[_Part, ...]


class ShardReader:
    """Reads any slice of any tensor of a folder, whichever layout wrote it.

    Attributes:
        folder: what is read.
        tensors: name -> shape, dtype, parts.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        """Read the index; with ``verify`` also compare every file with its checksum.

        Raises:
            UserError: if the folder is missing, incomplete or damaged.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._files: dict[Path, Any] = {}
        indexes = sorted(folder.glob("rank-*.json"))
        if not indexes:
            raise UserError(f"There are no weights in {folder}: run the stage that gives them.")
        for path in indexes:
            self._read_index(path, verify)
        for name, stored in self.tensors.items():
            found, wanted = sum(math.prod(p.shape) for p in stored.parts), math.prod(stored.shape)
            if found != wanted:
                raise UserError(
                    f"{folder} has {found} of the {wanted} elements of {name}: files are missing, "
                    f"or lie there that belong to another checkpoint."
                )

    def _read_index(self, path: Path, verify: bool) -> None:
        try:
            index = json.loads(path.read_text(encoding="utf8"))
            if index["check"] != index_check(index):
                raise UserError(f"{path} is damaged: its checksum is not the one written with it.")
            file = self.folder / Path(index["file"]).name  # never outside of the folder
            if not file.is_file():
                raise UserError(f"{file} is missing: the checkpoint is incomplete.")
            if verify and file_sha256(file) != index["sha256"]:
                raise UserError(f"{file} is damaged: its checksum is not the one written with it.")
            for entry in index["parts"]:
                dtype = DTYPES[entry["dtype"]]
                shape = tuple(entry["global_shape"])
                part = _Part(file, entry["part"], tuple(entry["offset"]), tuple(entry["shape"]))
                known = self.tensors.get(entry["tensor"], StoredTensor(shape, dtype, ()))
                if (known.shape, known.dtype) != (shape, dtype):
                    raise ValueError(f"{entry['tensor']} is another tensor in the other files")
                self.tensors[entry["tensor"]] = StoredTensor(shape, dtype, (*known.parts, part))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is no index of a checkpoint: {error}.") from error

    def read(
        self, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """One slice of a tensor (the whole by default), in its stored dtype, on the CPU.

        Raises:
            UserError: if the tensor is not stored or the parts do not cover the slice.
        """
        if name not in self.tensors:
            raise UserError(f"{self.folder} has no tensor {name}.")
        stored = self.tensors[name]
        offset = offset or (0,) * len(stored.shape)
        shape = stored.shape if shape is None else shape
        result = torch.empty(shape, dtype=stored.dtype)
        covered = torch.zeros(shape, dtype=torch.bool)
        for part in stored.parts:
            low = [max(a, b) for a, b in zip(offset, part.offset, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(offset, shape, part.offset, part.shape, strict=True)
            ]
            if any(h <= lo for lo, h in zip(low, high, strict=True)):
                continue
            here = tuple(slice(lo - o, h - o) for lo, h, o in zip(low, high, offset, strict=True))
            there = tuple(
                slice(lo - o, h - o) for lo, h, o in zip(low, high, part.offset, strict=True)
            )
            result[here] = self._part(part, stored.dtype)[there]
            covered[here] = True
        if not covered.all():
            raise UserError(f"{self.folder} lacks {int((~covered).sum())} elements of {name}.")
        return result

    def _part(self, part: _Part, dtype: torch.dtype) -> Tensor:
        try:
            if part.file not in self._files:
                self._files[part.file] = safe_open(str(part.file), framework="pt")
            tensor: Tensor = self._files[part.file].get_tensor(part.name).view(part.shape)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise UserError(f"{part.file} cannot be read: {error}.") from error
        if tensor.dtype != dtype:
            raise UserError(f"{part.file} holds {tensor.dtype}, its index says {dtype}.")
        return tensor

    def fill(self, tensor: ShardedTensor, name: str | None = None) -> None:
        """Copy the stored values into a sharded tensor's data.

        Args:
            name: stored name; by default the tensor's own.

        Raises:
            UserError: if it is not stored or has another shape.
        """
        name = name or tensor.key
        stored = self.tensors.get(name)
        if stored is None:
            raise UserError(f"{self.folder} has no tensor {name}.")
        if stored.shape != tuple(tensor.global_shape):
            raise UserError(
                f"{name} has shape {list(stored.shape)} in {self.folder} but the recipe's model "
                f"needs {list(tensor.global_shape)}."
            )
        assert tensor.data is not None
        shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
        value = self.read(name, tuple(tensor.global_offset), shape)
        with torch.no_grad():
            tensor.data.copy_(value.view(tensor.local_shape))
