"""The columns of an index, in memory or mapped from a file, and the file's bytes.

An index is a safetensors file. It is mapped, never copied: the index of ten million samples costs
no memory of the process's own. Since it may come from anywhere, its header is bounded and every
number in it is checked before one is used.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from safetensors.numpy import save

from data_pipeline.errors import DataError
from data_pipeline.modalities import MODALITIES
from data_pipeline.shards.schema import (
    DATASET_NAME,
    KEY_CHARACTERS,
    MAX_KEY,
    MAX_MEDIUM_BYTES,
    MAX_RECORD_BYTES,
    MEMBER_NAME,
    MIXED,
    modalities_of,
)

FORMAT = "unimoe-index/2"
MAX_HEADER_BYTES = 1024**2
"""Longest header that is parsed, bytes; ours have some hundreds."""

_SAMPLE_COLUMNS: dict[str, np.dtype[Any]] = {
    "json_offset": np.dtype("<u8"),
    "json_size": np.dtype("<u4"),
    "json_crc32": np.dtype("<u4"),
    "key_end": np.dtype("<u8"),
    "media_end": np.dtype("<u4"),
}
_MEDIA_COLUMNS: dict[str, np.dtype[Any]] = {
    "modality": np.dtype("u1"),
    "member": np.dtype("<u2"),
    "offset": np.dtype("<u8"),
    "size": np.dtype("<u8"),
    "crc32": np.dtype("<u4"),
    "duration_ms": np.dtype("<u4"),
    "frames": np.dtype("<u4"),
}
COLUMNS: dict[str, np.dtype[Any]] = {**_SAMPLE_COLUMNS, **_MEDIA_COLUMNS, "keys": np.dtype("u1")}
"""Name and type of every column; ``keys`` holds the characters of all keys, one after another."""
_TYPES = {"u1": "U8", "u2": "U16", "u4": "U32", "u8": "U64"}
_KEY_CHARACTERS = np.array([chr(code) in KEY_CHARACTERS for code in range(256)])


@dataclass(frozen=True, slots=True)
class MediumIndex:
    """Where a medium lies in its tar and how long it is.

    Attributes:
        modality: one of ``MODALITIES``.
        member: member name after ``<key>.``.
        offset: first byte of the medium in the tar.
        size: length, bytes.
        duration_ms: length of a sound or video, milliseconds; 0 for pictures, and where the
            medium's header cannot be read (decoding will find it broken).
        frames: frames of a video; 0 otherwise.
        crc32: CRC-32 of its bytes.
    """

    modality: str
    member: str
    offset: int
    size: int
    duration_ms: int = 0
    frames: int = 0
    crc32: int = 0


@dataclass(frozen=True, slots=True)
class SampleIndex:
    """Where a sample lies in its tar.

    Attributes:
        key: the sample's key.
        json_offset: first byte of its JSON record in the tar.
        json_size: length of the record, bytes.
        media: its media, in the order of the record.
        json_crc32: CRC-32 of the record.
    """

    key: str
    json_offset: int
    json_size: int
    media: tuple[MediumIndex, ...] = ()
    json_crc32: int = 0


@dataclass(frozen=True, eq=False)
class IndexTable:
    """The samples of one shard as columns.

    Attributes:
        dataset: the one dataset whose samples the shard holds.
        combination: the one combination of all its samples, or ``mixed``.
        modalities: names of the codes in the column ``modality``.
        members: names of the codes in the column ``member``.
        tar_bytes: size of the tar.
        columns: the columns by name, see ``COLUMNS``.
    """

    dataset: str
    combination: str
    modalities: tuple[str, ...]
    members: tuple[str, ...]
    tar_bytes: int
    columns: Mapping[str, np.ndarray]

    @property
    def samples(self) -> Sequence[SampleIndex]:
        """The samples in the order of the tar; objects are made on demand."""
        return _Samples(self)

    @classmethod
    def of(
        cls, dataset: str, combination: str, tar_bytes: int, samples: Iterable[SampleIndex]
    ) -> IndexTable:
        """The columns of these samples."""
        rows = list(samples)
        media = [medium for sample in rows for medium in sample.media]
        modalities = tuple(m for m in MODALITIES if any(each.modality == m for each in media))
        members = tuple(sorted({medium.member for medium in media}))
        member_code = {name: code for code, name in enumerate(members)}
        values: dict[str, list[int]] = {
            "json_offset": [each.json_offset for each in rows],
            "json_size": [each.json_size for each in rows],
            "json_crc32": [each.json_crc32 for each in rows],
            "key_end": np.cumsum([len(each.key) for each in rows], dtype=np.int64).tolist(),
            "media_end": np.cumsum([len(each.media) for each in rows], dtype=np.int64).tolist(),
            "keys": list("".join(each.key for each in rows).encode("ascii")),
            "modality": [modalities.index(each.modality) for each in media],
            "member": [member_code[each.member] for each in media],
            "offset": [each.offset for each in media],
            "size": [each.size for each in media],
            "crc32": [each.crc32 for each in media],
            "duration_ms": [each.duration_ms for each in media],
            "frames": [each.frames for each in media],
        }
        columns = {name: np.array(values[name], dtype=kind) for name, kind in COLUMNS.items()}
        return cls(dataset, combination, modalities, members, tar_bytes, columns)

    def to_bytes(self) -> bytes:
        """The index file; the same bytes for the same samples."""
        facts = {
            "format": FORMAT,
            "dataset": self.dataset,
            "combination": self.combination,
            "modalities": json.dumps(self.modalities),
            "members": json.dumps(self.members),
            "tar_bytes": str(self.tar_bytes),
        }
        data = save(dict(self.columns), facts)
        # safetensors writes the facts in an order that differs from process to process.
        end = 8 + int.from_bytes(data[:8], "little")
        header = {**json.loads(data[8:end]), "__metadata__": facts}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the columns begin at a multiple of 8
        return len(text).to_bytes(8, "little") + text + data[end:]


class _Samples(Sequence[SampleIndex]):
    """View of a table's samples."""

    def __init__(self, table: IndexTable):
        self._table = table
        self._columns = table.columns

    def __len__(self) -> int:
        return len(self._columns["json_offset"])

    @overload
    def __getitem__(self, index: int) -> SampleIndex: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SampleIndex]: ...
    def __getitem__(self, index: int | slice) -> SampleIndex | Sequence[SampleIndex]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        row = range(len(self))[index]
        columns = self._columns
        key = slice(*self._span("key_end", row))
        return SampleIndex(
            key=columns["keys"][key].tobytes().decode("ascii"),
            json_offset=columns["json_offset"].item(row),
            json_size=columns["json_size"].item(row),
            media=tuple(map(self._medium, range(*self._span("media_end", row)))),
            json_crc32=columns["json_crc32"].item(row),
        )

    def __iter__(self) -> Iterator[SampleIndex]:
        return (self[row] for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def _span(self, ends: str, row: int) -> tuple[int, int]:
        column = self._columns[ends]
        return (column.item(row - 1) if row else 0), column.item(row)

    def _medium(self, row: int) -> MediumIndex:
        columns = self._columns
        return MediumIndex(
            modality=self._table.modalities[columns["modality"].item(row)],
            member=self._table.members[columns["member"].item(row)],
            offset=columns["offset"].item(row),
            size=columns["size"].item(row),
            duration_ms=columns["duration_ms"].item(row),
            frames=columns["frames"].item(row),
            crc32=columns["crc32"].item(row),
        )


def map_table(path: Path) -> IndexTable:
    """Map an index file and check it.

    Raises:
        DataError: it is missing, or is no index or a damaged one.
    """
    try:
        with path.open("rb") as stream:
            # Python's map holds a file descriptor of its own until the last column is gone.
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; index the shard again") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); index the shard again") from error
    try:
        table = _table(mapped)
        _check_samples(table)
        _check_media(table)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, DataError) as error:
        raise DataError(
            f"{path} is no index or damaged ({error}); index the shard again"
        ) from error
    return table


def _table(mapped: mmap.mmap) -> IndexTable:
    """The columns of a mapped file, their places and types checked, but not what is in them."""
    length = int.from_bytes(mapped[:8], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(mapped) - 8):
        raise ValueError(f"its header claims {length} bytes")
    header: dict[str, Any] = json.loads(mapped[8 : 8 + length])
    facts = header.pop("__metadata__")
    if facts["format"] != FORMAT:
        raise ValueError(f"its format is {str(facts['format'])[:40]!r}, expected {FORMAT}")
    if set(header) != set(COLUMNS):
        raise ValueError("its columns are not those of an index")
    end = 8 + length
    columns = dict[str, np.ndarray]()
    for name, facts_of_column in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (count,) = facts_of_column["shape"]
        begin, stop = facts_of_column["data_offsets"]
        kind = COLUMNS[name]
        if facts_of_column["dtype"] != _TYPES[kind.str[1:]]:
            raise ValueError(f"column {name} has another type")
        if not (type(count) is int and count >= 0 and 8 + length + begin == end):
            raise ValueError(f"column {name} is not in its place")
        end += count * kind.itemsize
        if 8 + length + stop != end or end > len(mapped):
            raise ValueError(f"column {name} is not in its place")
        columns[name] = np.frombuffer(mapped, kind, count, end - count * kind.itemsize)
    if end != len(mapped):
        raise ValueError("there are bytes after the last column")
    return IndexTable(
        dataset=_fits(DATASET_NAME, facts["dataset"]),
        combination=facts["combination"],
        modalities=_names(facts["modalities"]),
        members=_names(facts["members"]),
        tar_bytes=int(_fits_number(facts["tar_bytes"])),
        columns=columns,
    )


def _names(text: str) -> tuple[str, ...]:
    names = json.loads(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its names are no list of text")
    if len(set(names)) != len(names):
        raise ValueError("a name comes twice")
    return tuple(names)


def _fits(pattern: Any, text: Any) -> str:
    if not isinstance(text, str) or pattern.fullmatch(text) is None:
        raise ValueError(f"{str(text)[:40]!r} is no valid name")
    return text


def _fits_number(text: Any) -> str:
    if not isinstance(text, str) or not text.isdecimal() or len(text) > 18:
        raise ValueError(f"the tar's size {str(text)[:40]!r} is no number of bytes")
    return text


def _check_samples(table: IndexTable) -> None:
    columns = table.columns
    count = len(columns["json_offset"])
    if not count or any(len(columns[name]) != count for name in _SAMPLE_COLUMNS):
        raise ValueError("its columns differ in length")
    lengths = np.diff(columns["key_end"].astype(np.int64), prepend=0)
    if columns["key_end"][-1] != len(columns["keys"]) or not _within(lengths, 1, MAX_KEY):
        raise ValueError("the ends of its keys do not ascend")
    if not _KEY_CHARACTERS[columns["keys"]].all():
        raise ValueError("a key has other characters than letters, digits, '_' and '-'")
    _check_places(table, "json_offset", "json_size", MAX_RECORD_BYTES)


def _check_media(table: IndexTable) -> None:
    columns, combination = table.columns, table.combination
    count = len(columns["offset"])
    if any(len(columns[name]) != count for name in _MEDIA_COLUMNS):
        raise ValueError("its columns differ in length")
    numbers = np.diff(columns["media_end"].astype(np.int64), prepend=0)
    if columns["media_end"][-1] != count or (numbers < 0).any():
        raise ValueError("the ends of its samples' media do not ascend")
    if not set(table.modalities) <= set(MODALITIES):
        raise ValueError("a modality is unknown")
    for name in table.members:
        _fits(MEMBER_NAME, name)
    if count and columns["modality"].max() >= len(table.modalities):
        raise ValueError("a medium has no modality")
    if count and columns["member"].max() >= len(table.members):
        raise ValueError("a medium has no member name")
    _check_places(table, "offset", "size", MAX_MEDIUM_BYTES)
    if combination != MIXED:
        _check_combination(table, modalities_of(combination), numbers)


def _check_places(table: IndexTable, offset: str, size: str, most: int) -> None:
    """Every piece lies in the tar and is not larger than ``most`` bytes."""
    offsets, sizes = table.columns[offset], table.columns[size]
    room = np.uint64(table.tar_bytes)
    # Compared so that nothing can overflow: first the beginning, then what is left after it.
    inside = (offsets <= room) & (sizes <= np.minimum(room - np.minimum(offsets, room), most))
    if not inside.all():
        row = int(np.argmin(inside))
        raise ValueError(
            f"{offset} {int(offsets[row])} with {int(sizes[row])} bytes lies outside the tar of "
            f"{table.tar_bytes} or is too large"
        )


def _check_combination(table: IndexTable, expected: tuple[str, ...], numbers: np.ndarray) -> None:
    """Every sample has media of exactly the modalities that the combination names."""
    sample = np.repeat(np.arange(len(numbers)), numbers)
    have = np.zeros((len(numbers), len(MODALITIES)), dtype=bool)
    places = np.array([MODALITIES.index(name) for name in table.modalities], dtype=np.int64)
    have[sample, places[table.columns["modality"]]] = True
    if (have != [name in expected for name in MODALITIES]).any():
        raise ValueError(f"a sample is not {table.combination}")


def _within(values: np.ndarray, least: int, most: int) -> bool:
    return bool(((values >= least) & (values <= most)).all())
