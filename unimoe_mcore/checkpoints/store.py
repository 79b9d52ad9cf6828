"""Sharded tensors on disk: safetensors files and a JSON index, readable under any layout.

Megatron's ``sharded_state_dict`` says which part of which global tensor a rank holds; this file
only stores and finds those parts. Megatron's own storage writes and reads pickle, which a
checkpoint from somewhere else must never be able to run.

A folder holds one ``rank-00000.safetensors`` and one ``rank-00000.json`` per writing rank. The
JSON lists for every part the tensor's name, global shape, dtype, and the part's offset and shape -
and, where a rank wrote only a stretch of such a block, first and last element of it - and has
checksums of the safetensors file and of itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.shards.integrity import file_sha256
from unimoe_mcore.checkpoints.pieces import Piece, piece_of
from unimoe_mcore.checkpoints.shard_file import DTYPES, HostCopy, index_check
from unimoe_mcore.config.errors import UserError


def write_shards(folder: Path, tensors: Iterator[ShardedTensor], rank: int) -> None:
    """Write this rank's parts; a part that several ranks hold is written by one of them."""
    HostCopy().take(map(piece_of, tensors)).write(folder, rank)


_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
"""Element types that an index may name."""


@dataclass(frozen=True)
class _Part:
    """A stretch of a block, as a piece is."""

    file: Path
    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    stop: int

    def rows(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Offset and shape of the rows that hold the stretch, and where it begins in them.

        Of a long block only these are looked at.
        """
        axis = next((i for i, size in enumerate(self.shape) if size > 1), 0)
        row = math.prod(self.shape[axis + 1 :])
        first, last = self.start // row, -(-self.stop // row)
        offset, shape = list(self.offset), list(self.shape)
        offset[axis] += first
        shape[axis] = last - first
        return tuple(offset), tuple(shape), self.start - first * row


@dataclass(frozen=True)
class StoredTensor:
    """What is known of a stored tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[_Part, ...]
    step: int | None = None


class ShardReader:
    """Reads any slice of any tensor of a folder, whichever layout wrote it.

    Attributes:
        folder: what is read.
        tensors: name -> shape, dtype, parts.
        held: names of the tensors that the writing ranks held something of.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        """Read the index; with ``verify`` also compare every file with its checksum.

        Raises:
            UserError: if the folder is missing, incomplete or damaged.
        """
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self.held: set[str] = set()
        self._files: dict[Path, Any] = {}
        indexes = sorted(folder.glob("rank-*.json"))
        if not indexes:
            raise UserError(f"There are no weights in {folder}: run the stage that gives them.")
        for path in indexes:
            self._read_index(path, verify)
        for name, stored in self.tensors.items():
            found, wanted = sum(p.stop - p.start for p in stored.parts), math.prod(stored.shape)
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
            self.held.update(index.get("held", ()))
            for entry in index["parts"]:
                self._add(entry, file)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is no index of a checkpoint: {error}.") from error

    def _add(self, entry: dict[str, Any], file: Path) -> None:
        dtype, step = _BY_NAME[entry["dtype"]], entry.get("step")
        shape, block = tuple(entry["global_shape"]), tuple(entry["shape"])
        start, stop = entry.get("stretch", (0, math.prod(block)))
        if not 0 <= start < stop <= math.prod(block):
            raise ValueError(f"{entry['tensor']} has no elements {start} to {stop} in {block}")
        part = _Part(file, entry["part"], tuple(entry["offset"]), block, start, stop)
        known = self.tensors.get(entry["tensor"], StoredTensor(shape, dtype, (), step))
        if (known.shape, known.dtype, known.step) != (shape, dtype, step):
            raise ValueError(f"{entry['tensor']} is another tensor in the other files")
        self.tensors[entry["tensor"]] = StoredTensor(shape, dtype, (*known.parts, part), step)

    def check_complete(self) -> None:
        """Refuse a folder that lacks a tensor some rank held, or has any element twice.

        For who has just written it: afterwards, checksums say whether it is still what it was.

        Raises:
            UserError: naming the tensor.
        """
        missing = sorted(self.held - set(self.tensors))
        if missing:
            raise UserError(f"{self.folder} lacks {missing[0]}: no process wrote any of it.")
        for name, stored in self.tensors.items():
            if _overlap(stored.parts):
                raise UserError(f"{self.folder} has elements of {name} twice.")

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
            there_offset, there_shape, skip = part.rows()
            low = [max(a, b) for a, b in zip(offset, there_offset, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(offset, shape, there_offset, there_shape, strict=True)
            ]
            if any(h <= lo for lo, h in zip(low, high, strict=True)):
                continue
            here = tuple(slice(lo - o, h - o) for lo, h, o in zip(low, high, offset, strict=True))
            there = tuple(
                slice(lo - o, h - o) for lo, h, o in zip(low, high, there_offset, strict=True)
            )
            values, known = _in_rows(self._part(part, stored.dtype), there_shape, skip)
            if known is None:
                result[here] = values[there]
                covered[here] = True
            else:
                result[here] = torch.where(known[there], values[there], result[here])
                covered[here] |= known[there]
        if not covered.all():
            raise UserError(f"{self.folder} lacks {int((~covered).sum())} elements of {name}.")
        return result

    def _part(self, part: _Part, dtype: torch.dtype) -> Tensor:
        try:
            if part.file not in self._files:
                self._files[part.file] = safe_open(str(part.file), framework="pt")
            tensor: Tensor = self._files[part.file].get_tensor(part.name)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise UserError(f"{part.file} cannot be read: {error}.") from error
        if tensor.dtype != dtype:
            raise UserError(f"{part.file} holds {tensor.dtype}, its index says {dtype}.")
        if tensor.numel() != part.stop - part.start:
            raise UserError(f"{part.file} holds another number of elements than its index says.")
        return tensor

    def fill(self, tensor: ShardedTensor | Piece) -> None:
        """Copy the stored values into a piece's data, or a whole sharded tensor's.

        Raises:
            UserError: if it is not stored or has another shape.
        """
        piece = tensor if isinstance(tensor, Piece) else piece_of(tensor)
        stored = self.tensors.get(piece.name)
        if stored is None:
            raise UserError(f"{self.folder} has no tensor {piece.name}.")
        if stored.shape != piece.global_shape:
            raise UserError(
                f"{piece.name} has shape {list(stored.shape)} in {self.folder} but the recipe's "
                f"model needs {list(piece.global_shape)}."
            )
        if not piece.data.numel():
            return
        wanted = _Part(Path(), "", piece.offset, piece.shape, piece.start, piece.stop)
        offset, shape, skip = wanted.rows()
        value = self.read(piece.name, offset, shape).view(-1)[skip : skip + piece.data.numel()]
        with torch.no_grad():
            piece.data.copy_(value.view(piece.data.shape))


def _in_rows(values: Tensor, shape: tuple[int, ...], skip: int) -> tuple[Tensor, Tensor | None]:
    """A stretch laid into the rows that hold it, and which of their elements it has if not all."""
    if values.numel() == math.prod(shape):
        return values.view(shape), None
    rows = values.new_empty(math.prod(shape))
    known = torch.zeros(math.prod(shape), dtype=torch.bool)
    rows[skip : skip + values.numel()] = values.view(-1)
    known[skip : skip + values.numel()] = True
    return rows.view(shape), known.view(shape)


def _overlap(parts: tuple[_Part, ...]) -> bool:
    """Whether any element is in two parts."""
    blocks: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, int]]] = {}
    for part in parts:
        blocks.setdefault((part.offset, part.shape), []).append((part.start, part.stop))
    for stretches in blocks.values():
        if any(stop > start for (_, stop), (start, _) in pairwise(sorted(stretches))):
            return True
    shapes = {shape for _, shape in blocks}
    if len(shapes) == 1:  # the usual cut: equal blocks side by side
        (shape,) = shapes
        if not any(o % n for offset, _ in blocks for o, n in zip(offset, shape, strict=True)):
            return False
    return any(
        all(
            a < b + m and b < a + n
            for a, n, b, m in zip(one[0], one[1], other[0], other[1], strict=True)
        )
        for one, other in combinations(blocks, 2)
    )
