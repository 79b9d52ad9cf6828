"""Damaged tars and indexes: each ends with a sentence, none hangs, crashes or writes elsewhere."""

from __future__ import annotations

import functools
import json
import os
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.shards.columns import MAX_HEADER_BYTES, IndexTable, map_table
from data_pipeline.shards.index import index_path, load_index
from data_pipeline.shards.integrity import write_manifest
from data_pipeline.shards.scan import build_index, index_shard
from data_pipeline.verify import find_problems
from tests.data_pipeline.shard_samples import ALL, SOUND, foreign, make, members_of, write

BLOCK = 512
Members = list[tuple[str, bytes]]


@contextmanager
def no_more_memory_than(most: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


@functools.cache
def whole() -> tuple[bytes, bytes]:
    """A shard of two samples, and its index."""
    with tempfile.TemporaryDirectory() as folder:
        (path,) = write(Path(folder), [make(key, ("image", "speech")) for key in "ab"])
        return path.read_bytes(), index_path(path).read_bytes()


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """Removed when the tests end."""
    return tempfile.TemporaryDirectory()


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=scratch().name))


def put(data: bytes, name: str = "x.tar") -> Path:
    """A file that is always another one, so that nothing mapped before is touched."""
    path = new_folder() / name
    path.write_bytes(data)
    return path


def samples_or_refused(data: bytes) -> int:
    """Number of samples in a tar; -1 if it is refused with a sentence that names it."""
    path = put(data)
    try:
        found = len(build_index(path).samples)
    except DataError as error:
        return -1 if "x.tar" in str(error) else -2
    finally:
        path.unlink()
    return found


# --- tars -----------------------------------------------------------------------------------


@given(st.integers(0, len(whole()[0])))
@settings(max_examples=150, deadline=None)
def test_a_cut_off_tar_never_passes_for_a_smaller_one(size: int) -> None:
    data = whole()[0]
    last = max(each.json_offset + each.json_size for each in table().samples)
    end_mark = -(-last // BLOCK) * BLOCK
    found = samples_or_refused(data[:size])
    assert found == (2 if size >= end_mark + BLOCK else -1)


def test_where_a_tar_is_cut_off_or_damaged_is_told() -> None:
    data, medium = whole()[0], table().samples[1].media[1]
    with pytest.raises(DataError, match=f"cut off at byte {medium.offset + 9}, in 'b.1.wav' which"):
        build_index(put(data[: medium.offset + 9]))
    end = data.rstrip(b"\0").rfind(b"}") // BLOCK * BLOCK + BLOCK
    with pytest.raises(DataError, match=f"cut off at byte {end}: its end mark is missing"):
        build_index(put(data[:end]))
    place = medium.offset - BLOCK
    damaged = data[:place] + b"?" + data[place + 1 :]
    with pytest.raises(DataError, match=f"the tar header at byte {place} is damaged"):
        build_index(put(damaged))


@given(st.integers(0, len(whole()[0]) - 1), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_flipped_byte_is_refused_or_changes_a_checksum(place: int, change: int) -> None:
    data = bytearray(whole()[0])
    data[place] ^= change
    assert samples_or_refused(bytes(data)) in (2, -1), "a sample was dropped without a word"
    headers = [each.offset - BLOCK for sample in table().samples for each in sample.media]
    ends_of_checksum = (154, 155)  # blanks that no reader looks at
    if any(place - each in range(500) and place - each not in ends_of_checksum for each in headers):
        assert samples_or_refused(bytes(data)) == -1


def table() -> IndexTable:
    return map_table(put(whole()[1], "x.index"))


def header(name: str, size: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header with a right checksum, whatever its size field says."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    return sealed(block)


def sealed(block: bytearray) -> bytes:
    block[148:156] = b"%06o\0 " % tarfile.calc_chksums(block)[0]  # type: ignore[attr-defined]
    return bytes(block)


HUGE = b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7  # base 256, as GNU tar writes it
NEGATIVE = b"\xff" * 10 + b"\xfe\0"
PAX = b"30 size=99999999999999999999\n\n"


@pytest.mark.parametrize(
    "data",
    [
        header("a.json", HUGE) + bytes(4 * BLOCK),
        header("a.json", NEGATIVE) + bytes(4 * BLOCK),
        header("README", b"0") + header("README", NEGATIVE) + bytes(4 * BLOCK),
        header("a.json", b"77777777777") + bytes(4 * BLOCK),
        header("a.json", b"nonsense") + bytes(4 * BLOCK),
        header("p", HUGE, tarfile.XHDTYPE) + bytes(4 * BLOCK),
        header("p", NEGATIVE, tarfile.XHDTYPE) + bytes(4 * BLOCK),
        header("p", HUGE, tarfile.GNUTYPE_LONGNAME) + bytes(4 * BLOCK),
        header("p", b"30", tarfile.XHDTYPE) + PAX.ljust(BLOCK, b"\0") + whole()[0],
        header("p", b"0", tarfile.XHDTYPE) * 3000 + bytes(2 * BLOCK),
        header("a.json", b"0", tarfile.GNUTYPE_SPARSE) + bytes(4 * BLOCK),
        header("a.json", b"0", tarfile.CHRTYPE) + bytes(4 * BLOCK),
        header("a.json", b"0", tarfile.LNKTYPE) + bytes(4 * BLOCK),
        whole()[0] + whole()[0],
        b"",
        bytes(10 * BLOCK),
        b"no tar at all" * 100,
        b"PK\x03\x04" + bytes(BLOCK),
    ],
)
def test_absurd_tars_are_refused_within_bounds(data: bytes) -> None:
    with no_more_memory_than(32 * 1024**2):
        assert samples_or_refused(data) == -1


@given(st.integers(0, 5), st.integers(0, 499), st.binary(min_size=1, max_size=16))
@settings(max_examples=200, deadline=None)
def test_any_header_with_a_right_checksum_ends(number: int, place: int, change: bytes) -> None:
    data = whole()[0]
    places = [m.offset for sample in table().samples for m in sample.media]
    places += [sample.json_offset for sample in table().samples]
    start = places[number] - BLOCK
    block = bytearray(data[start : start + BLOCK])
    block[place : place + len(change)] = change[: BLOCK - place]
    samples_or_refused(data[:start] + sealed(block[:BLOCK]) + data[start + BLOCK :])


def link(path: Path, kind: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.json")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    return path


def test_what_leaves_the_tar_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    place = tmp_path / "in" / "side"
    place.mkdir(parents=True)
    climbing = [[(f"{up}x.json", b"{}")] for up in ("../../", "/tmp/", "./../", "a/../../")]
    tars = [foreign(place / f"{i}.tar", members) for i, members in enumerate(climbing)]
    tars += [link(place / "s.tar", tarfile.SYMTYPE), link(place / "h.tar", tarfile.LNKTYPE)]
    tars.append(
        foreign(place / "twice.tar", [*members_of("a"), *members_of("b"), *members_of("a")])
    )
    before = sorted(tmp_path.rglob("*"))
    for tar in tars:
        with pytest.raises(DataError, match="refused|its key comes twice"):
            index_shard(tar)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_compressed_tar_is_told_from_a_broken_one(tmp_path: Path) -> None:
    for mode, tool in (("w:gz", "gunzip"), ("w:bz2", "bunzip2"), ("w:xz", "unxz")):
        path = foreign(tmp_path / "x.tar", members_of("a"), mode)
        with pytest.raises(DataError, match=f"x.tar is compressed with .*: {tool} it first"):
            build_index(path)
    with pytest.raises(DataError, match="does not exist"):
        build_index(tmp_path / "none.tar")
    with pytest.raises(DataError, match="cannot be read"):
        build_index(tmp_path)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_verify_sees_every_flipped_byte(data: st.DataObject) -> None:
    folder = new_folder()
    for content, name in zip(whole(), ("x.tar", "x.index"), strict=True):
        (folder / "train" / "d").mkdir(parents=True, exist_ok=True)
        (folder / "train" / "d" / name).write_bytes(content)
    write_manifest(folder, "test/1")
    name = data.draw(st.sampled_from(["x.tar", "x.index"]))
    path = folder / "train" / "d" / name
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    other = path.with_name("other")
    other.write_bytes(content)
    other.replace(path)
    problems = list(find_problems(folder))
    assert problems
    assert all(name in problem for problem in problems)


def test_zero_bytes_are_indexed_as_they_are(tmp_path: Path) -> None:
    members = [(name, b"" if ".wav" in name else data) for name, data in members_of("a", ALL)]
    shard = index_shard(foreign(tmp_path / "x.tar", members))
    medium = load_index(shard.path).samples[0].media[2]
    assert (medium.member, medium.size, medium.duration_ms) == ("2.wav", 0, 0)


def test_a_record_that_is_not_of_its_media_is_refused(tmp_path: Path) -> None:
    record = json.loads(members_of("a")[0][1])
    record["media"][0]["member"] = "../../../etc/x.jpg"
    path = foreign(
        tmp_path / "x.tar", [("a.json", json.dumps(record).encode()), ("a.0.jpg", SOUND)]
    )
    with pytest.raises(DataError, match="is no member name"):
        build_index(path)


# --- indexes --------------------------------------------------------------------------------


def read_or_refused(data: bytes) -> bool:
    """Whether an index is taken; then all that it says can be read."""
    path = put(data, "x.index")
    try:
        table = map_table(path)
    except DataError as error:
        if str(path) in str(error):
            return False
        raise
    finally:
        path.unlink()
    for sample in table.samples:
        assert sample.json_offset + sample.json_size <= table.tar_bytes
        assert all(m.offset + m.size <= table.tar_bytes for m in sample.media)
    return True


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_flipped_bytes_of_an_index(flips: list[tuple[int, int]]) -> None:
    data = bytearray(whole()[1])
    for place, change in flips:
        data[place % len(data)] ^= change
    read_or_refused(bytes(data))


@given(st.integers(0, len(whole()[1]) - 1), st.binary(max_size=40))
@settings(max_examples=150, deadline=None)
def test_an_index_that_was_cut_off_or_grew_is_refused(size: int, tail: bytes) -> None:
    data = whole()[1]
    assert not read_or_refused(data[:size])
    assert not read_or_refused(data + tail + b"\0")


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_nonsense_is_no_index(data: bytes) -> None:
    assert not read_or_refused(data)
    assert not read_or_refused(len(data).to_bytes(8, "little") + data)


def edited(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The index with another header."""
    data = whole()[1]
    end = 8 + int.from_bytes(data[:8], "little")
    facts = json.loads(data[8:end])
    change(facts)
    text = json.dumps(facts).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def fact(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda facts: facts["__metadata__"].update({name: value})


def column(name: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda facts: facts[name].update(values)


@pytest.mark.parametrize(
    "change",
    [
        fact("format", "unimoe-index/1"),
        fact("dataset", "../x"),
        fact("combination", "image+text"),
        fact("combination", ["mixed"]),
        fact("modalities", '["image", "smell"]'),
        fact("modalities", '["image"]'),
        fact("modalities", "3"),
        fact("members", '["0.jpg", "../x"]'),
        fact("members", '["0.jpg"]'),
        fact("members", '["0.jpg", "0.jpg"]'),
        fact("members", "[" * 100_000),
        fact("tar_bytes", "1000"),
        fact("tar_bytes", "9" * 5000),
        fact("tar_bytes", "-1"),
        fact("tar_bytes", 5),
        column("keys", shape=[10**30]),
        column("keys", shape=[2, 1]),
        column("keys", shape=[-2]),
        column("keys", shape=[True]),
        column("keys", shape=[1.5]),
        column("offset", dtype="F64"),
        column("offset", data_offsets=[0, 2**63]),
        column("offset", data_offsets=[-8, 24]),
        column("offset", data_offsets=["0", "24"]),
        column("offset", data_offsets=[]),
        lambda facts: facts.pop("keys"),
        lambda facts: facts.pop("__metadata__"),
        lambda facts: facts.update(more=facts["keys"]),
        lambda facts: facts.update(keys=3),
        lambda facts: facts.update({"pad": "x" * (64 * MAX_HEADER_BYTES)}),
    ],
)
def test_headers_that_lie_are_refused_within_bounds(change: Callable[[dict], Any]) -> None:
    data = edited(change)
    with no_more_memory_than(32 * 1024**2):
        assert not read_or_refused(data)


@pytest.mark.parametrize("length", [0, 1, MAX_HEADER_BYTES + 1, 2**40, 2**64 - 1])
def test_a_header_of_any_length_is_bounded(length: int) -> None:
    with no_more_memory_than(32 * 1024**2):
        assert not read_or_refused(length.to_bytes(8, "little") + whole()[1][8:])


@pytest.mark.parametrize(
    ("name", "row", "value"),
    [
        ("json_offset", 1, 2**64 - 5),
        ("json_offset", 0, 10**9),
        ("json_size", 0, 2**32 - 1),
        ("key_end", 0, 2),
        ("key_end", 1, 2**64 - 1),
        ("key_end", 0, 0),
        ("media_end", 0, 5),
        ("media_end", 1, 3),
        ("modality", 0, 9),
        ("modality", 0, 1),
        ("member", 3, 65535),
        ("offset", 2, 2**63),
        ("size", 2, 2**64 - 1),
        ("keys", 0, ord("/")),
        ("keys", 1, 255),
    ],
)
def test_columns_that_lie_are_refused(name: str, row: int, value: int) -> None:
    good = table()
    columns = {each: values.copy() for each, values in good.columns.items()}
    columns[name][row] = value
    bad = IndexTable(
        good.dataset, good.combination, good.modalities, good.members, good.tar_bytes, columns
    )
    assert read_or_refused(good.to_bytes())
    assert not read_or_refused(bad.to_bytes())


def test_an_index_of_another_shard_is_refused(tmp_path: Path) -> None:
    (mine,) = write(tmp_path / "train" / "d", [make("a", ("image",))])
    (other,) = write(tmp_path / "b", [make("bbb", ("image", "speech"))])
    same_size, _ = (write(tmp_path / name, [make(name, ("image",))])[0] for name in ("c", "e"))
    index_path(mine).write_bytes(index_path(other).read_bytes())
    with pytest.raises(DataError, match=r"is the index of a tar of \d+ bytes but the tar has"):
        write_manifest(tmp_path, "test/1")
    index_path(mine).write_bytes(index_path(same_size).read_bytes())
    os.utime(index_path(mine))
    with pytest.raises(DataError, match="does not fit its index: 2 of 2 members are not where"):
        write_manifest(tmp_path, "test/1")


def test_an_index_of_gigabytes_costs_nothing() -> None:
    path = put(whole()[1], "x.index")
    os.truncate(path, 2**33)
    with no_more_memory_than(32 * 1024**2), pytest.raises(DataError, match="after the last column"):
        map_table(path)
