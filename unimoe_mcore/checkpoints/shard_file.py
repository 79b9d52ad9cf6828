"""One rank's file of a folder of weights: copied to host memory first, written at leisure.

The file is a safetensors file; it is written here, in large pieces and with its checksum on the
way, because the library's writer holds Python's lock while it writes, and the training loop in the
same process would stand still.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Buffer, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimoe_mcore.checkpoints.files import write_text
from unimoe_mcore.checkpoints.pieces import Piece
from unimoe_mcore.runtime.devices import host_memory

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Element types that are stored, as safetensors calls them."""

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Snapshot:
    """The values of a rank's pieces at one moment, in host memory.

    Attributes:
        parts: description of every piece that this rank writes.
        held: names of all tensors that it holds a piece of, written by it or not.
        header: head of the safetensors file.
        memory: its body, ``[bytes]`` uint8.
    """

    parts: list[dict[str, Any]]
    held: list[str]
    header: bytes
    memory: Tensor

    def write(self, folder: Path, rank: int) -> None:
        """Write the file, then its index: where there is an index, the file is whole."""
        body: Any = memoryview(self.memory.numpy())
        chunks = (body[i : i + _CHUNK] for i in range(0, len(body), _CHUNK))
        _write(folder, rank, self.header, chunks, self.parts, self.held)


def write_one_by_one(
    folder: Path, pieces: Sequence[Piece], read: Callable[[str], Tensor]
) -> dict[str, dict[str, Any]]:
    """All tensors whole, as one rank of one would write them; one at a time is in memory.

    Args:
        pieces: the tensors; their data are outlines (on the meta device), of the type on disk.
        read: makes a tensor's values by its name.

    Returns:
        Shape, type and digest of each, as a manifest lists them.
    """
    mine, header, parts, _ = _laid_out(pieces)
    listed: dict[str, dict[str, Any]] = {}

    def chunks() -> Iterator[Buffer]:
        for each in mine:
            values = read(each.name).to(each.data.dtype).reshape(-1).view(torch.uint8).numpy()
            listed[each.name] = {
                "shape": list(each.global_shape),
                "dtype": str(each.data.dtype).removeprefix("torch."),
                "sha256": hashlib.sha256(values).hexdigest(),
            }
            yield memoryview(values)

    _write(folder, 0, header, chunks(), parts, sorted(each.name for each in mine))
    return listed


def _write(
    folder: Path,
    rank: int,
    header: bytes,
    chunks: Iterable[Buffer],
    parts: list[dict[str, Any]],
    held: list[str],
) -> None:
    """A rank's file and its checksum on the way, then its index."""
    name = f"rank-{rank:05d}"
    path = folder / f"{name}.safetensors"
    digest = hashlib.sha256()
    with path.open("wb") as file:
        head: tuple[Buffer, ...] = (len(header).to_bytes(8, "little"), header)
        for chunk in chain(head, chunks):
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    index = {"file": path.name, "sha256": digest.hexdigest(), "parts": parts, "held": held}
    index["check"] = index_check(index)
    write_text(folder / f"{name}.json", json.dumps(index))


class HostCopy:
    """Host memory that is used again for every snapshot: only one of them is valid at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, pieces: Iterable[Piece]) -> Snapshot:
        """Copy the pieces that this rank writes; what is trained may change afterwards."""
        every = list(pieces)
        mine, header, parts, total = _laid_out(every)
        if self._memory.numel() < total:
            self._memory = host_memory(total)
        place = 0
        for piece in mine:
            end = place + piece.data.nbytes
            slot = self._memory[place:end].view(piece.data.dtype)
            slot.view(piece.data.shape).copy_(piece.data)
            place = end
        return Snapshot(parts, sorted({p.name for p in every}), header, self._memory[:total])


def _laid_out(pieces: Iterable[Piece]) -> tuple[list[Piece], bytes, list[dict[str, Any]], int]:
    """The pieces that this rank writes, in the order of the file's body.

    Returns:
        Them, the file's head, a description of each, and the body's length.
    """
    # Large elements first, so that each lies at a multiple of its size.
    mine = sorted((p for p in pieces if p.writes), key=lambda p: -p.data.element_size())
    header: dict[str, Any] = {}
    parts, place = [], 0
    for number, piece in enumerate(mine):
        end = place + piece.data.nbytes
        header[f"{number:06d}"] = {
            "dtype": DTYPES[piece.data.dtype],
            "shape": list(piece.data.shape),
            "data_offsets": [place, end],
        }
        parts.append(_described(piece, f"{number:06d}"))
        place = end
    text = json.dumps(header).encode()
    return mine, text + b" " * (-len(text) % 8), parts, place


def _described(piece: Piece, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "tensor": piece.name,
        "global_shape": list(piece.global_shape),
        "offset": list(piece.offset),
        "shape": list(piece.shape),
        "dtype": str(piece.data.dtype).removeprefix("torch."),
        "part": name,
    }
    if not piece.whole:
        entry["stretch"] = [piece.start, piece.stop]
    if piece.step is not None:
        entry["step"] = piece.step
    return entry


def index_check(index: Mapping[str, Any]) -> str:
    """Checksum of an index: one that names the wrong part would load, and be wrong."""
    rest = {key: value for key, value in index.items() if key != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
