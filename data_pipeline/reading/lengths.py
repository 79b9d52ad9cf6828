"""Whether a file holds the bytes that its own header promises.

Decoders differ in what they make of a file that was cut off: some give silence, some a shorter
recording. Here the promise itself is looked at, in the containers that make one. Transport and
program streams, and MP3 files without a Xing header, promise nothing: cut between two frames
they are shorter files, and nobody can tell.
"""

from __future__ import annotations

import struct

_MAX_CHUNKS = 1000
_MP3_SLACK = 256  # bytes; some encoders count a tag at the end that was cut away since
_UNKNOWN = 0xFFFFFFFF


def shortfall(data: bytes) -> str:
    """What is wrong with the promised length of a sound or a video; empty if nothing is."""
    checks = {b"RIFF": _riff, b"RF64": _rf64, b"riff": _wave64, b"FORM": _aiff, b".snd": _sun}
    checks |= {b"OggS": _ogg, b"\x1a\x45\xdf\xa3": _matroska}
    check = checks.get(data[:4])
    try:
        if check is not None:
            return check(data)
        return _mp3(data) if data[:3] == b"ID3" or data[:1] == b"\xff" else ""
    except (struct.error, IndexError):
        return "its header is cut off"


def _missing(promised: int, data: bytes) -> str:
    if promised <= len(data):
        return ""
    return f"it is truncated: the header promises {promised} bytes, there are {len(data)}"


def _riff(data: bytes) -> str:
    """An AVI file must be whole; in a WAV file neither may sound be missing nor most of it lie
    outside what is claimed.
    """
    if data[8:12] == b"AVI ":
        return _missing(8 + struct.unpack_from("<I", data, 4)[0], data)
    if data[8:12] != b"WAVE":
        return ""
    place, sound = 12, -1
    for _ in range(_MAX_CHUNKS):
        name = data[place : place + 4]
        if len(data) < place + 8 or not (name.isascii() and name.decode().isprintable()):
            break
        (size,) = struct.unpack_from("<I", data, place + 4)
        end = place + 8 + size
        if end > len(data):
            if sound < 0 and name == b"data":
                return _missing(end, data)
            break
        if sound < 0 and name == b"data":
            sound = size
        place = end + size % 2
    else:
        return f"it has more than {_MAX_CHUNKS} chunks"
    behind = len(data) - place
    if 0 <= sound < behind:
        return f"its header claims {sound} bytes of sound, {behind} more lie behind them"
    return ""


def _rf64(data: bytes) -> str:
    return _missing(8 + struct.unpack_from("<Q", data, 20)[0], data)


def _wave64(data: bytes) -> str:
    return _missing(struct.unpack_from("<Q", data, 16)[0], data)


def _aiff(data: bytes) -> str:
    return _missing(8 + struct.unpack_from(">I", data, 4)[0], data)


def _sun(data: bytes) -> str:
    offset, size = struct.unpack_from(">II", data, 4)
    return "" if size == _UNKNOWN else _missing(offset + size, data)


def _ogg(data: bytes) -> str:
    """The last page must be whole."""
    page = data.rfind(b"OggS")
    segments = data[page + 26]
    table = data[page + 27 : page + 27 + segments]
    if len(table) < segments:
        return "its last page is cut off"
    return _missing(page + 27 + segments + sum(table), data)


def _mp3(data: bytes) -> str:
    start = 0
    if data[:3] == b"ID3":
        # Seven bits of each of four bytes.
        start = 10 + sum((data[9 - i] & 0x7F) << (7 * i) for i in range(4))
    frame = data[start : start + 200]
    tag = max(frame.find(b"Xing"), frame.find(b"Info"))
    if tag < 0 or frame[0] != 0xFF:
        return ""
    (flags,) = struct.unpack_from(">I", frame, tag + 4)
    if not flags & 2:
        return ""
    (size,) = struct.unpack_from(">I", frame, tag + (12 if flags & 1 else 8))
    return _missing(start + size - _MP3_SLACK, data)


def _matroska(data: bytes) -> str:
    header, start = _vint(data, 4)
    segment = start + header
    if data[segment : segment + 4] != b"\x18\x53\x80\x67":
        return ""
    size, start = _vint(data, segment + 4)
    return "" if size < 0 else _missing(start + size, data)


def _vint(data: bytes, place: int) -> tuple[int, int]:
    """EBML's number at a place, -1 if it says "not known", and the place behind it."""
    width = 9 - data[place].bit_length()
    if width > 8 or len(data) < place + width:
        raise IndexError
    bits = (1 << (7 * width)) - 1
    value = int.from_bytes(data[place : place + width], "big") & bits
    return (-1 if value == bits else value), place + width
