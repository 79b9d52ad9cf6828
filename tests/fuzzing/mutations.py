"""Ways to spoil the bytes of a file: blindly, or knowing what its numbers and names are."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

HEAD = 4096
"""Half of all changes are made in so many first bytes, where a file says what it holds."""

NUMBERS = (0, 1, 7, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "../../x",
    "\0",
    "\ud800",
    "x" * 10_000,
    [],
    [0],
    [2**62, 2**62],
    {},
    {"a": 1},
    [[[[[]]]]],
)
"""What a value in JSON is replaced by."""


def spoil(data: bytes, name: str, chance: random.Random) -> bytes:
    """Change a file's bytes in one to three ways.

    Args:
        name: of the file; its ending says which ways there are besides the blind ones.
    """
    ways = list(BLIND)
    if name.endswith(".json"):
        ways += [_json] * len(BLIND)
    elif name.endswith(".safetensors"):
        ways += [_safetensors] * len(BLIND)
    elif name.endswith(".bin"):
        ways += [_archive] * len(BLIND)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        data = chance.choice(ways)(data, chance)
    return data


def _place(data: bytes, chance: random.Random) -> int:
    end = min(HEAD, len(data)) if chance.random() < 0.5 else len(data)
    return chance.randrange(end) if end else 0


def _flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8)) if changed else 0):
        changed[_place(data, chance)] = chance.randrange(256)
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: _place(data, chance)]


def _remove(data: bytes, chance: random.Random) -> bytes:
    place = _place(data, chance)
    return data[:place] + data[place + chance.choice((1, 4, 8, 100)) :]


def _insert(data: bytes, chance: random.Random) -> bytes:
    place = _place(data, chance)
    return data[:place] + chance.randbytes(chance.choice((1, 4, 8, 100))) + data[place:]


def _again(data: bytes, chance: random.Random) -> bytes:
    """A piece twice."""
    start, size = _place(data, chance), chance.choice((8, 64, 1000))
    return data[: start + size] + data[start:]


def _number(data: bytes, chance: random.Random) -> bytes:
    """An extreme number of 4 or 8 bytes somewhere."""
    form = chance.choice(("<I", "<Q", ">I", ">Q"))
    place, number = _place(data, chance), chance.choice(NUMBERS)
    packed = struct.pack(form, number & (2 ** (8 * struct.calcsize(form)) - 1))
    return data[:place] + packed + data[place + len(packed) :]


BLIND: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip,
    _cut,
    _remove,
    _insert,
    _again,
    _number,
)


def _json(data: bytes, chance: random.Random) -> bytes:
    """Another value, a key less, a key of another name, a value in another's place."""
    try:
        whole = json.loads(data)
    except ValueError:
        return _flip(data, chance)
    holders = [each for each in _holders(whole) if each]
    if not holders:
        return json.dumps(chance.choice(VALUES)).encode()
    holder = chance.choice(holders)
    key = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    other = chance.choice(holders)
    way = chance.randrange(5)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[chance.choice(("", "__metadata__", "a" * 1000, f"{key} "))] = holder.pop(key)
    elif way == 2:
        taken = chance.choice(list(other.values()) if isinstance(other, dict) else other)
        holder[key] = json.loads(json.dumps(taken))
    else:
        holder[key] = chance.choice(VALUES)
    return json.dumps(whole).encode()


def _holders(value: Any) -> list[Any]:
    """All objects and lists within."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict | list) else []
    return own + [each for part in inner for each in _holders(part)]


def _safetensors(data: bytes, chance: random.Random) -> bytes:
    """Another header, with its length made to fit."""
    if len(data) < 8:
        return data
    (length,) = struct.unpack_from("<Q", data)
    head = _json(data[8 : 8 + length], chance)
    return struct.pack("<Q", len(head)) + head + data[8 + length :]


def _archive(data: bytes, chance: random.Random) -> bytes:
    """A zip archive packed anew: a member spoilt, missing, renamed, twice, compressed or added."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError):
        return _flip(data, chance)
    if not members:
        return data
    number = chance.randrange(len(members))
    name, content = members[number]
    way = chance.randrange(6)
    if way == 0:
        members[number] = name, chance.choice(BLIND)(content, chance)
    elif way == 1:
        del members[number]
    elif way == 2:
        members[number] = chance.choice((f"../{name}", f"/{name}", name.upper(), "x")), content
    elif way == 3:
        members.append((name, content))
    elif way == 4:
        members.append((f"archive/data/{2**20}", bytes(1 << 20)))
    packing = zipfile.ZIP_DEFLATED if way == 5 else zipfile.ZIP_STORED
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for each, value in members:
            archive.writestr(each, value)
    return file.getvalue()
