"""One rank's file of a folder of weights: copied to host memory first, written at leisure.

The file is a safetensors file; it is written here, in large pieces and with its checksum on the
way, because the library's writer holds Python's lock while it writes, and the training loop in the
same process would stand still.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
        name = f"rank-{rank:05d}"
        path = folder / f"{name}.safetensors"
        digest = hashlib.sha256()
        body: Any = memoryview(self.memory.numpy())
        with path.open("wb") as file:
            for chunk in (
                len(self.header).to_bytes(8, "little"),
                self.header,
                *(body[i : i + _CHUNK] for i in range(0, len(body), _CHUNK)),
            ):
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
        index = {"file": path.name, "sha256": digest.hexdigest(), "parts": self.parts}
        index["held"] = self.held
        index["check"] = index_check(index)
        write_text(folder / f"{name}.json", json.dumps(index))


class HostCopy:
    """Host memory that is used again for every snapshot: only one of them is valid at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, pieces: Iterable[Piece]) -> Snapshot:
        """Copy the pieces that this rank writes; what is trained may change afterwards."""
        every = list(pieces)
        # Large elements first, so that each lies at a multiple of its size.
        mine = sorted((p for p in every if p.writes), key=lambda p: -p.data.element_size())
        total = sum(piece.data.nbytes for piece in mine)
        if self._memory.numel() < total:
            self._memory = host_memory(total)
        header: dict[str, Any] = {}
        parts, place = [], 0
        for number, piece in enumerate(mine):
            end = place + piece.data.nbytes
            slot = self._memory[place:end].view(piece.data.dtype)
            slot.view(piece.data.shape).copy_(piece.data)
            header[f"{number:06d}"] = {
                "dtype": DTYPES[piece.data.dtype],
                "shape": list(piece.data.shape),
                "data_offsets": [place, end],
            }
            parts.append(_described(piece, f"{number:06d}"))
            place = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return Snapshot(parts, sorted({p.name for p in every}), text, self._memory[:total])


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
