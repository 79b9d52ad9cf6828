"""Shards written, scanned, and read back; what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.importers.pictures import jpeg, mp4
from data_pipeline.importers.recording import wav
from data_pipeline.reading.medium import MODALITIES
from data_pipeline.shards.index import index_path, load_index
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
from data_pipeline.shards.writer import ShardWriter, build_index, index_shard

PICTURE = jpeg(Image.new("RGB", (32, 24), (200, 30, 30))).data
SOUND = wav("speech", np.zeros(13_000, dtype=np.int16), 10_000).data
CLIP = mp4([Image.new("RGB", (32, 32), (10 * i, 0, 0)) for i in range(8)]).data
FILES = {"image": ("jpg", PICTURE), "video": ("mp4", CLIP), "speech": ("wav", SOUND)}


def make(key: str, modalities: tuple[str, ...] = (), dataset: str = "d") -> tuple[Sample, dict]:
    media, files, text = [], {}, ""
    for number, modality in enumerate(modalities):
        extension, data = FILES[modality]
        member = f"{number}.{extension}"
        media.append(MediumRef(modality, member))
        files[member] = data
        text += PLACEHOLDERS[modality] + "\n"
    turns = (Turn("human", text + "What?"), Turn("gpt", f"Ünicode {key}"))
    return Sample(key, dataset, turns, tuple(media)), files


def write(folder: Path, samples: list[tuple[Sample, dict]], **limits: int) -> list[Path]:
    first = samples[0][0]
    with ShardWriter(folder, first.dataset, first.combination, **limits) as writer:
        for sample, files in samples:
            writer.write(sample, files)
    return [shard.path for shard in writer.shards]


MIXED = ("image", "video", "speech", "image")


def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    samples = [make(f"k{i}", MIXED) for i in range(5)]
    (path,) = write(tmp_path, samples)
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [each["__key__"] for each in read] == [f"k{i}" for i in range(5)]
    for (sample, files), found in zip(samples, read, strict=True):
        assert parse_sample(found["json"], "x") == sample
        assert {name: found[name] for name in files} == files


def test_index_points_at_the_same_bytes_and_knows_the_lengths(tmp_path: Path) -> None:
    samples = [make(f"k{i}", MIXED) for i in range(3)]
    (path,) = write(tmp_path, samples)
    data = path.read_bytes()
    shard = load_index(path, "d", "image+video+speech+text")
    assert shard.samples == build_index(path).samples
    for (sample, files), entry in zip(samples, shard.samples, strict=True):
        assert data[entry.json_offset :][: entry.json_size] == sample.to_json()
        assert [medium.modality for medium in entry.media] == list(MIXED)
        for medium in entry.media:
            assert data[medium.offset :][: medium.size] == files[medium.member]
        lengths = [(medium.duration_ms, medium.frames) for medium in entry.media]
        assert lengths == [(0, 0), (1000, 8), (1300, 0), (0, 0)]


def test_bytes_depend_on_the_samples_only(tmp_path: Path) -> None:
    samples = [make(f"k{i}", MIXED) for i in range(3)]
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


def foreign(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members_of(key: str, modalities: tuple[str, ...] = ("image",)) -> list[tuple[str, bytes]]:
    sample, files = make(key, modalities)
    media = [(f"{key}.{member}", data) for member, data in files.items()]
    return [(f"{key}.json", sample.to_json()), *media]  # the record first: TarWriter puts it last


def test_a_foreign_tar_can_be_indexed(tmp_path: Path) -> None:
    path = foreign(tmp_path / "x.tar", members_of("a", MIXED) + members_of("b", MIXED))
    shard = index_shard(path)
    assert (shard.dataset, shard.combination) == ("d", "image+video+speech+text")
    assert load_index(path, "d", shard.combination) == shard
    entry = shard.samples[1]
    assert path.read_bytes()[entry.media[1].offset :][: entry.media[1].size] == CLIP


def test_a_medium_with_a_broken_header_has_length_zero(tmp_path: Path) -> None:
    members = members_of("a", ("speech", "video"))
    members = [(name, b"nonsense" if ".json" not in name else data) for name, data in members]
    (entry,) = build_index(foreign(tmp_path / "x.tar", members)).samples
    assert [(medium.duration_ms, medium.frames, medium.size) for medium in entry.media] == [
        (0, 0, 8),
        (0, 0, 8),
    ]


def renamed(prefix: str) -> list[tuple[str, bytes]]:
    return [(prefix + name, data) for name, data in members_of("a")]


A, B = members_of("a"), members_of("b")
TEXT = [("t.json", make("t")[0].to_json())]
OTHER = [("o.json", make("o", (), "other")[0].to_json())]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (renamed("../"), "'../a.json' is refused"),
        (renamed("/tmp/"), "a.json' is refused"),
        (renamed("folder/"), "'folder/a.json' is refused"),
        ([A[0], B[0], B[1], A[1]], "sample 'a'.* is missing"),
        ([*A, *B, *A], "sample 'a' are not together"),
        ([*A, A[1]], "comes twice"),
        (A[1:], "has no a.json"),
        ([("z.json", A[0][1]), ("z.0.jpg", PICTURE)], "the record's key is 'a'"),
        ([("a.json", b'{"key": "a"}')], "not a sample record"),
        ([("a.json", b"[" * 100_000)], "not a sample record"),
        ([("a.json", b" " * 2_000_000)], "2000000 bytes exceeds"),
        (A + TEXT, "one combination, found image\\+text, text"),
        (TEXT + OTHER, "one dataset, found d, other"),
        ([], "one dataset, found none"),
    ],
)
def test_foreign_tars_that_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        build_index(foreign(tmp_path / "x.tar", members))


def test_links_compression_and_cut_off_tars_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        link = tarfile.TarInfo("a.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"'a\.json' is refused"):
        build_index(tmp_path / "link.tar")
    with pytest.raises(DataError, match="uncompressed tar"):
        build_index(foreign(tmp_path / "x.tar", A, "w:gz"))
    whole = foreign(tmp_path / "y.tar", members_of("a", ("speech",))).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:4000])
    with pytest.raises(DataError, match=r"cut\.tar"):
        build_index(tmp_path / "cut.tar")
    with pytest.raises(DataError, match="does not exist"):
        build_index(tmp_path / "none.tar")


def test_a_damaged_index_is_named_with_its_line(tmp_path: Path) -> None:
    (path,) = write(tmp_path, [make(f"k{i}") for i in range(3)])
    index = index_path(path)
    lines = index.read_text().splitlines()
    for bad in ('{"key": 1}', "{", lines[1].replace("[", "[-"), lines[1].replace("[", '["x",')):
        index.write_text("\n".join([lines[0], bad, lines[2]]))
        with pytest.raises(DataError, match="line 2 is damaged"):
            load_index(path, "d", "text")
    index.unlink()
    with pytest.raises(DataError, match="does not exist"):
        load_index(path, "d", "text")


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
