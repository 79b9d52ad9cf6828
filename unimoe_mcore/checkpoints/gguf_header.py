"""What a GGUF file says of itself, read within bounds; its tensors' values are read one by one.

The gguf package's reader believes every length that a file declares: 49 bytes keep it busy for
days. Here a length is compared with the bytes that are left before anything is made of it.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

MOST_HEADER = 1 << 26
"""Bytes of the longest header that is read; a vocabulary of 260,000 tokens takes 2 ** 24."""
MOST_ELEMENTS = 1 << 22
"""Elements of all of a header's lists."""
MOST_NAME = 256
"""Bytes of the longest name."""
MOST_AXES = 4
VERSIONS = (2, 3)

_ALIGNMENT = "general.alignment"
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in its file.

    Attributes:
        name: its name there.
        kind: how its values are packed.
        shape: its sizes, the outermost axis first.
        start: its first byte.
        bytes: its length.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """A file's metadata.

    Attributes:
        facts: key -> number, text, or list of numbers or texts.
        tensors: name -> where it is; all of them lie in the file, apart from each other.
    """

    facts: dict[str, Any]
    tensors: dict[str, StoredTensor]


class _Reader:
    """Takes numbers and texts from a file's beginning."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, min(size, MOST_HEADER)
        self._elements = MOST_ELEMENTS

    def take(self, count: int) -> bytes:
        """So many bytes."""
        if count > self._left:
            raise ValueError(f"its header ends early, or is longer than {MOST_HEADER} bytes")
        self._left -= count
        data = self._file.read(count)
        if len(data) < count:
            raise ValueError("it became shorter while it was read")
        return data

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0])

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf8")

    def name(self) -> str:
        """A text that can be shown in a message."""
        name = self.text()
        if not 0 < len(name) <= MOST_NAME or not name.isprintable():
            raise ValueError(f"it has a name that is none: {name[:40]!r}")
        return name

    def value(self) -> Any:
        """A number, a text or a list of either."""
        kind = GGUFValueType(self.number("I"))
        if kind != GGUFValueType.ARRAY:
            return self._several(kind, 1)[0]
        kind, count = GGUFValueType(self.number("I")), self.number("Q")
        if kind == GGUFValueType.ARRAY:
            raise ValueError("it has lists of lists")
        if count > self._elements:
            raise ValueError(f"its lists have more than {MOST_ELEMENTS} elements")
        self._elements -= count
        return self._several(kind, count)

    def _several(self, kind: GGUFValueType, count: int) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        form = np.dtype(_SCALARS[kind])
        listed: list[Any] = np.frombuffer(self.take(count * form.itemsize), form).tolist()
        return listed

    def tensor(self) -> tuple[str, list[int], int, int]:
        """Name, sizes from the innermost axis on, kind, and place among the tensors."""
        name, axes = self.name(), self.number("I")
        if not 1 <= axes <= MOST_AXES:
            raise ValueError(f"{name} has {axes} axes")
        return name, [self.number("Q") for _ in range(axes)], self.number("I"), self.number("Q")

    @property
    def at(self) -> int:
        """Bytes taken."""
        return self._file.tell()


def read_header(path: Path) -> Header:
    """Read what a GGUF file says of itself.

    Raises:
        ValueError: if it is no whole GGUF file, or larger than the bounds.
        OSError: if it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file, size)
        if reader.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := reader.number("I")) not in VERSIONS:
            known = ", ".join(map(str, VERSIONS))
            raise ValueError(f"its version is {version}, known are {known} (little-endian)")
        tensors, keys = reader.number("Q"), reader.number("Q")
        facts: dict[str, Any] = {}
        for _ in range(keys):
            name = reader.name()
            if name in facts:
                raise ValueError(f"it has {name} twice")
            facts[name] = reader.value()
        described = [reader.tensor() for _ in range(tensors)]
        start = _aligned(reader.at, facts.get(_ALIGNMENT, 32))
    return Header(facts, _placed(described, start, size))


def _aligned(at: int, alignment: Any) -> int:
    if not isinstance(alignment, int) or alignment not in (1 << n for n in range(21)):
        raise ValueError(f"{_ALIGNMENT} is no power of two")
    return -(-at // alignment) * alignment


def _placed(
    described: list[tuple[str, list[int], int, int]], start: int, size: int
) -> dict[str, StoredTensor]:
    """The tensors by name, all inside of the file and none over another."""
    tensors: dict[str, StoredTensor] = {}
    for name, sizes, number, offset in described:
        if name in tensors:
            raise ValueError(f"it has {name} twice")
        kind = GGMLQuantizationType(number)
        block, packed = GGML_QUANT_SIZES[kind]
        if not all(sizes) or sizes[0] % block:
            raise ValueError(f"{name} cannot be {sizes} in {kind.name}")
        length = math.prod(sizes) // block * packed
        if start + offset + length > size:
            raise ValueError(f"{name} ends behind the file's end")
        tensors[name] = StoredTensor(name, kind, tuple(sizes[::-1]), start + offset, length)
    in_order = sorted(tensors.values(), key=lambda each: each.start)
    for one, other in pairwise(in_order):
        if one.start + one.bytes > other.start:
            raise ValueError(f"{one.name} and {other.name} share bytes")
    return tensors


def check_kinds(header: Header) -> None:
    """Refuse values that cannot be unpacked.

    Raises:
        ValueError: naming the first tensor of such a kind.
    """
    first = {each.kind: each.name for each in reversed(header.tensors.values())}
    for kind, name in first.items():
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise ValueError(f"{name} is in {kind.name}, which cannot be unpacked here") from None


def read_values(path: Path, tensor: StoredTensor) -> np.ndarray:
    """A tensor's values, fp32, in its shape.

    Raises:
        ValueError: if the file became shorter.
        OSError: if it cannot be read.
    """
    packed = np.fromfile(path, np.uint8, tensor.bytes, offset=tensor.start)
    rows = packed.reshape(math.prod(tensor.shape[:-1]), -1)
    return dequantize(rows, tensor.kind).astype(np.float32, copy=False).reshape(tensor.shape)
