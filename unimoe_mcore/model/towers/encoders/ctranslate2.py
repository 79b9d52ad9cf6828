"""Reader of CTranslate2's binary model files: named tensors, checked against the file's end.

Layout (version 6, little endian): version u32, specification name, revision u32, number of
tensors u32; each tensor: name, rank u8, rank sizes u32, element type u8, bytes u32, data; then
the number of aliases u32 and pairs of names. A name is u16 length, characters, NUL.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from unimoe_mcore.config.errors import UserError

_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_VERSION = 6


class _Reader:
    """A cursor that never passes the end of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path.read_bytes()
        self.at = 0

    def take(self, length: int) -> memoryview:
        if length > len(self.data) - self.at:
            raise self.broken(f"{length} bytes wanted behind its end")
        piece = memoryview(self.data)[self.at : self.at + length]
        self.at += length
        return piece

    def number(self, kind: str) -> int:
        return struct.unpack("<" + kind, self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        raw = bytes(self.take(self.number("H")))
        if not raw.endswith(b"\0") or not raw[:-1].isascii():
            raise self.broken("a name is not one")
        return raw[:-1].decode("ascii")

    def tensor(self) -> np.ndarray:
        shape = [self.number("I") for _ in range(self.number("B"))]
        code, size = self.number("B"), self.number("I")
        if code not in _TYPES:
            raise self.broken(f"element type {code} is unknown")
        dtype = np.dtype(_TYPES[code])
        count = 1
        for length in shape:  # in Python's integers, which do not overflow
            count *= length
        if count * dtype.itemsize != size:
            raise self.broken(f"shape {shape} does not fill {size} bytes")
        return np.frombuffer(self.take(size), dtype).reshape(shape)

    def broken(self, why: str) -> UserError:
        return UserError(f"{self.path} is not a CTranslate2 model, at byte {self.at}: {why}.")


def read_ctranslate2(path: Path, specification: str) -> dict[str, np.ndarray]:
    """Read all tensors of a CTranslate2 model.

    Args:
        path: the file ``model.bin``.
        specification: the kind of model expected, such as ``WhisperSpec``.

    Returns:
        Read-only arrays by name, aliases included.

    Raises:
        UserError: the file is not a model of that kind, is of another version, or is damaged.
    """
    reader = _Reader(path)
    version, kind = reader.number("I"), reader.text()
    reader.number("I")  # the specification's revision: names and shapes are checked by the caller
    if (version, kind) != (_VERSION, specification):
        raise UserError(
            f"{path} holds a {kind} in version {version} of CTranslate2's format; "
            f"a {specification} in version {_VERSION} is needed."
        )
    tensors: dict[str, np.ndarray] = {}
    for _ in range(reader.number("I")):
        name = reader.text()
        tensors[name] = reader.tensor()
    for _ in range(reader.number("I")):
        alias, target = reader.text(), reader.text()
        if target not in tensors:
            raise reader.broken(f"'{alias}' stands for '{target}', which is missing")
        tensors[alias] = tensors[target]
    if reader.at != len(reader.data):
        raise reader.broken("bytes are left over")
    return tensors
