"""Shards written, scanned, and read back; what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from data_pipeline.errors import DataError
from data_pipeline.modalities import MODALITIES
from data_pipeline.shards import columns
from data_pipeline.shards.columns import COLUMNS
from data_pipeline.shards.index import MOST_MAPPED, index_path, load_index
from data_pipeline.shards.scan import build_index, index_shard
from data_pipeline.shards.schema import (
    PLACEHOLDERS,
    MediumRef,
    Sample,
    Turn,
    combination_of,
    modalities_of,
    parse_sample,
    validate_sample,
)
from data_pipeline.shards.writer import ShardWriter
from tests.data_pipeline.shard_samples import (
    ALL,
    CLIP,
    PICTURE,
    Members,
    foreign,
    make,
    members_of,
    write,
)


def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    samples = [make(f"k{i}", ALL) for i in range(5)]
    (path,) = write(tmp_path, samples)
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [each["__key__"] for each in read] == [f"k{i}" for i in range(5)]
    for (sample, files), found in zip(samples, read, strict=True):
        assert parse_sample(found["json"], "x") == sample
        assert {name: found[name] for name in files} == files


def test_index_points_at_the_same_bytes_and_knows_the_lengths(tmp_path: Path) -> None:
    samples = [make(f"k{i}", ALL) for i in range(3)]
    (path,) = write(tmp_path, samples)
    data = path.read_bytes()
    shard = load_index(path)
    assert shard.samples == build_index(path).samples
    for (sample, files), entry in zip(samples, shard.samples, strict=True):
        assert data[entry.json_offset :][: entry.json_size] == sample.to_json()
        assert [medium.modality for medium in entry.media] == list(ALL)
        assert entry.json_crc32 == zlib.crc32(sample.to_json())
        for medium in entry.media:
            assert data[medium.offset :][: medium.size] == files[medium.member]
            assert medium.crc32 == zlib.crc32(files[medium.member])
        lengths = [(medium.duration_ms, medium.frames) for medium in entry.media]
        assert lengths == [(0, 0), (1000, 8), (1300, 0), (0, 0)]


def test_bytes_depend_on_the_samples_only(tmp_path: Path) -> None:
    samples = [make(f"k{i}", ALL) for i in range(3)]
    (first,) = write(tmp_path / "a", samples)
    (second,) = write(tmp_path / "b", samples)
    assert first.read_bytes() == second.read_bytes()
    assert index_path(first).read_bytes() == index_path(second).read_bytes()
    with tarfile.open(first) as tar:
        assert {(info.mtime, info.uid, info.uname) for info in tar} == {(0, 0, "bigdata")}


def test_shards_are_cut_by_samples_and_by_bytes(tmp_path: Path) -> None:
    samples = [make(f"k{i}", ("image",)) for i in range(5)]
    by_number = write(tmp_path / "a", samples, max_samples=2)
    assert [path.name for path in by_number] == ["d-00000.tar", "d-00001.tar", "d-00002.tar"]
    keys = [entry.key for path in by_number for entry in build_index(path).samples]
    assert keys == [f"k{i}" for i in range(5)]
    assert len(write(tmp_path / "b", samples, max_bytes=3 * len(PICTURE))) == 3


def test_writer_refuses_strangers(tmp_path: Path) -> None:
    sample, files = make("k", ("image",))
    with ShardWriter(tmp_path, "d", "image+text") as writer:
        writer.write(sample, files)
        for other, media, words in [
            (make("t")[0], {}, "holds image\\+text only"),
            (make("u", ("image",), "other")[0], files, "of dataset other"),
            (sample, files, "written twice"),
            (make("v", ("image",))[0], {}, "'v'.*0.jpg is missing"),
            (make("w", ("image",))[0], {**files, "1.jpg": b""}, "unlisted media \\['1.jpg'\\]"),
        ]:
            with pytest.raises(DataError, match=words):
                writer.write(other, media)
    assert len(build_index(writer.shards[0].path).samples) == 1


def test_an_exception_leaves_no_shard(tmp_path: Path) -> None:
    def killed() -> None:
        with ShardWriter(tmp_path, "d", "text") as writer:
            writer.write(*make("k"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_tar_can_be_indexed(tmp_path: Path) -> None:
    path = foreign(tmp_path / "x.tar", members_of("a", ALL) + members_of("b", ALL))
    shard = index_shard(path)
    assert (shard.dataset, shard.combination) == ("d", "image+video+speech+text")
    assert load_index(path) == shard
    entry = shard.samples[1]
    assert path.read_bytes()[entry.media[1].offset :][: entry.media[1].size] == CLIP


def test_the_index_is_a_safetensors_file(tmp_path: Path) -> None:
    (path,) = write(tmp_path, [make("a", ALL), make("bb", ALL)])
    read, shard = load_file(index_path(path)), load_index(path)
    assert set(read) == set(COLUMNS)
    assert read["keys"].tobytes() == b"abb"
    for name, column in read.items():
        np.testing.assert_array_equal(shard.columns[name], column)
        assert not shard.columns[name].flags.writeable
    assert shard.modalities == ("image", "video", "speech")


def test_an_index_makes_objects_on_demand_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"k{i}" for i in range(50)]
    (path,) = write(tmp_path, [make(key) for key in keys])
    made: list[str] = []
    real = columns.SampleIndex
    monkeypatch.setattr(columns, "SampleIndex", lambda **facts: made.append("") or real(**facts))
    shard = load_index(path)
    assert (len(shard), made) == (50, [])
    assert (shard.samples[-1].key, len(made)) == ("k49", 1)
    assert [each.key for each in shard.samples[10:20:3]] == keys[10:20:3]
    with pytest.raises(IndexError):
        shard.samples[50]


def test_many_indexes_travel_as_paths_and_keep_few_files_open(tmp_path: Path) -> None:
    paths = write(tmp_path, [make(f"k{i}") for i in range(MOST_MAPPED + 40)], max_samples=1)
    shards = [load_index(path, bytes=path.stat().st_size, sha256="x") for path in paths]
    assert len(pickle.dumps(shards[0])) < 500
    again = pickle.loads(pickle.dumps(shards))
    assert again == shards
    assert [each.sha256 for each in again] == ["x"] * len(shards)
    assert [each.samples[0].key for each in again] == [f"k{i}" for i in range(len(shards))]
    opened = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
    assert 0 < sum(name.startswith(str(tmp_path)) for name in opened) <= MOST_MAPPED


def test_an_index_that_is_replaced_is_mapped_again(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "a", [make("old")])
    (other,) = write(tmp_path / "b", [make("new")])
    assert load_index(path).samples[0].key == "old"
    other.replace(path)
    index_path(other).replace(index_path(path))
    assert load_index(path).samples[0].key == "new"


def test_an_index_that_does_not_fit_its_tar_is_refused(tmp_path: Path) -> None:
    (path,) = write(tmp_path, [make("a")])
    size = path.stat().st_size
    with pytest.raises(DataError, match=f"a tar of {size} bytes but the manifest says 7"):
        load_index(path, bytes=7)
    with path.open("ab") as stream:
        stream.write(bytes(512))
    with pytest.raises(DataError, match=f"a tar of {size} bytes but the tar has {size + 512}"):
        load_index(path)
    assert load_index(path, url="s3://there/d.tar", bytes=size).samples[0].key == "a"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_what_other_writers_put_into_a_tar(tmp_path: Path, form: int, prefix: str) -> None:
    extras: Members = [
        ("/", b""),
        ("a" * 120 + "/", b""),
        ("README", b"x"),
        ("._a.json", b"x"),
        ("__meta__", b"x"),
    ]
    samples = [*members_of("a", ALL), ("a.cls", b"3"), ("a.CAPS.txt", b"x"), *members_of("b")]
    named = [(prefix + name.lstrip("/"), data) for name, data in extras + samples]
    path = foreign(tmp_path / "x.tar", [(name or "./", data) for name, data in named], form=form)
    shard = index_shard(path)
    assert shard.combination == "mixed"
    first, second = load_index(path).samples
    assert (first.key, second.key) == ("a", "b")
    assert path.read_bytes()[first.media[1].offset :][: first.media[1].size] == CLIP
    assert [medium.member for medium in second.media] == ["0.jpg"]


def test_a_medium_with_a_broken_header_has_length_zero(tmp_path: Path) -> None:
    members = members_of("a", ("speech", "video"))
    members = [(name, b"nonsense" if ".json" not in name else data) for name, data in members]
    (entry,) = build_index(foreign(tmp_path / "x.tar", members)).samples
    assert [(medium.duration_ms, medium.frames, medium.size) for medium in entry.media] == [
        (0, 0, 8),
        (0, 0, 8),
    ]


def renamed(prefix: str) -> Members:
    return [(prefix + name, data) for name, data in members_of("a")]


A, B = members_of("a"), members_of("b")
TEXT = [("t.json", make("t")[0].to_json())]
OTHER = [("o.json", make("o", (), "other")[0].to_json())]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (renamed("../../"), r"'../../a.json' is refused; its path climbs out"),
        (renamed("./x/../../"), "is refused; its path climbs out"),
        (renamed("/tmp/"), "'/tmp/a.json' is refused; its path climbs out"),
        ([*A, ("../", b"")], r"'\.\.' is refused; its path climbs out"),
        (renamed("folder/"), "'folder/a.json' is refused.*at the top level"),
        ([("a b.json", A[0][1])], "'a b.json' is refused.* letters, digits"),
        ([A[0], B[0], B[1], A[1]], "sample 'a'.* is missing"),
        ([*A, *B, *A], "sample 'a' are not together"),
        ([*A, A[1]], "comes twice"),
        (A[1:], "has no a.json"),
        ([("z.json", A[0][1]), ("z.0.jpg", PICTURE)], "the record's key is 'a'"),
        ([("a.json", b'{"key": "a"}')], "not a sample record"),
        ([("a.json", b"[" * 100_000)], "not a sample record"),
        ([("a.json", b" " * 2_000_000)], "2000000 bytes exceeds"),
        (TEXT + OTHER, "one dataset, found d, other"),
        ([], "one dataset, found none"),
    ],
)
def test_foreign_tars_that_are_refused(tmp_path: Path, members: Members, words: str) -> None:
    with pytest.raises(DataError, match=words):
        build_index(foreign(tmp_path / "x.tar", members))


GOOD = make("k", ("image", "speech"))[0]


def turns(*pairs: tuple[str, str]) -> dict:
    return {"turns": tuple(Turn(*pair) for pair in pairs), "media": ()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"media": GOOD.media[:1]}, "1 <speech> placeholders but 0 speech"),
        ({"media": (*GOOD.media, MediumRef("image", "5.jpg"))}, "1 <image> .* but 2 image"),
        ({"media": (MediumRef("smell", "0.jpg"),)}, "unknown modality 'smell'"),
        ({"media": (MediumRef("image", "../0.jpg"),)}, "no member name"),
        ({"media": (MediumRef("image", "json"),)}, "no member name"),
        ({"media": (MediumRef("image", "0.wav"), MediumRef("speech", "0.wav"))}, "same member"),
        (turns(("gpt", "a"), ("human", "b")), "turn 0 is from 'gpt'"),
        (turns(("human", "a"), ("human", "b")), "turn 1 is from 'human'"),
        (turns(("human", "a")), "1 turns"),
        (turns(), "0 turns"),
        (turns(("human", "a"), ("gpt", "")), "empty answer"),
        (turns(("human", "a"), ("gpt", "<video>")), "<video> in an answer"),
        ({"key": "a.b"}, "'a.b': a key is"),
        ({"key": ""}, "a key is"),
        ({"dataset": "a/b"}, "dataset 'a/b'"),
    ],
)
def test_records_that_are_refused(change: dict, words: str) -> None:
    validate_sample(GOOD, {"0.jpg", "1.wav"})
    bad = dataclasses.replace(GOOD, **change)
    with pytest.raises(DataError, match=words):
        validate_sample(bad)
    with pytest.raises(DataError, match=words):
        parse_sample(bad.to_json(), "shard.tar:k.json")


def test_an_empty_human_turn_is_plain_text() -> None:
    sample = Sample("k", "d", (Turn("human", ""), Turn("gpt", "text")))
    assert parse_sample(sample.to_json(), "x") == sample
    assert sample.combination == "text"


@given(st.lists(st.sampled_from(MODALITIES)))
def test_a_combination_names_its_set(modalities: list[str]) -> None:
    name = combination_of(modalities)
    assert set(modalities_of(name)) == set(modalities)
    assert name == combination_of(reversed(modalities))


@pytest.mark.parametrize("name", ["", "image", "text+image", "video+image+text", "a+text", "++"])
def test_what_is_no_combination(name: str) -> None:
    with pytest.raises(DataError, match="is no combination"):
        modalities_of(name)


PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).map(
    lambda text: text.replace("<", "(")
)


@given(
    st.lists(st.sampled_from(MODALITIES), max_size=4),
    st.lists(st.tuples(PLAIN, PLAIN.filter(bool)), min_size=1, max_size=3),
)
def test_every_valid_sample_survives_json(
    modalities: list[str], pairs: list[tuple[str, str]]
) -> None:
    media = tuple(MediumRef(each, f"{i}.bin") for i, each in enumerate(modalities))
    said = [turn for ask, tell in pairs for turn in (Turn("human", ask), Turn("gpt", tell))]
    said[0] = Turn("human", "".join(PLACEHOLDERS[each] for each in modalities) + said[0].text)
    sample = Sample("k-1_A", "d", tuple(said), media)
    assert parse_sample(sample.to_json(), "x") == sample


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    st.binary(max_size=50)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries(
        {"key": JSON, "dataset": JSON, "conversations": JSON, "media": JSON}
    ).map(lambda value: json.dumps(value).encode())
)
def test_nonsense_is_a_data_error(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^s:"):
        parse_sample(data, "s")
