"""One sample at a time: rendered as planned, decoded for its encoder, or refused by name."""

import errno
import json
import os
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.reading.decode import LIMITS
from data_pipeline.reading.features import feature_path
from data_pipeline.reading.medium import Medium
from data_pipeline.reading.prepare import SAMPLES_PER_FEATURE, picture_side, prepare
from data_pipeline.reading.reader import BrokenSampleError, SampleReader
from data_pipeline.reading.records import MOST_OPEN, RecordReader
from data_pipeline.reading.remote import ShardStore
from data_pipeline.reading.remote import open_set as open_remote
from data_pipeline.shards.index import load_manifest
from tests.data_pipeline.published import address
from tests.data_pipeline.reading_set import (
    EACH,
    ENCODERS,
    MODALITY,
    ROWS,
    RULE,
    change_index,
    job,
    medium,
    open_set,
    row,
    shard,
    write,
)
from unimoe_mcore.config.towers import EncoderConfig, sound_features
from unimoe_mcore.model.towers.encoders import build_encoder
from unimoe_mcore.model.towers.feature_cache import FeatureCache


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The set; nobody may change it."""
    return write(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy of the set, to be damaged."""
    return shutil.copytree(whole, tmp_path / "set", ignore=shutil.ignore_patterns("cache"))


def refused(reader: SampleReader, key: str) -> BrokenSampleError:
    with pytest.raises(BrokenSampleError) as caught:
        reader.read(row(key))
    found = caught.value.sample
    assert (found.key, found.dataset) == (key, key.partition("-")[0])
    assert found.shard == f"{found.dataset}-00000.tar"
    return caught.value


def test_every_sample_is_as_long_as_planned_and_decoded_for_its_encoder(whole):
    catalogue = open_set(whole)
    reader = SampleReader(job(catalogue))
    for dataset, count in EACH.items():
        for number in range(count):
            sample = reader.read(row(f"{dataset}-{number}"))
            modality = MODALITY.get(dataset, "text")
            assert (sample.key, sample.dataset) == (f"{dataset}-{number}", dataset)
            assert sample.group == modality
            assert len(sample.tokens.ids) == catalogue.tokens[row(sample.key)]
            assert len(sample.tokens.learn) == len(sample.tokens.ids)
            for piece in sample.media:
                assert piece.data == medium(dataset, number)
                alone = Medium(modality, piece.data, "alone")
                assert np.array_equal(piece.content, prepare(alone, ENCODERS[modality]))
    assert len(catalogue) == ROWS


def test_features_are_bitwise_those_of_undecoded_media(whole):
    catalogue = open_set(whole)
    decoded, raw = SampleReader(job(catalogue)), SampleReader(job(catalogue, preparations={}))
    for name, datasets in (("random_image", ("pic", "clip")), ("random_sound", ("talk", "hum"))):
        encoder = build_encoder(RULE.tower(MODALITY[datasets[0]]).encoder)
        rows = [row(f"{dataset}-{n}") for dataset in datasets for n in range(EACH[dataset])]
        ready = [m for r in rows for m in decoded.read(r).media]
        late = [m for r in rows for m in raw.read(r).media]
        assert encoder.name == name
        assert all(m.content is not None for m in ready)
        assert all(m.content is None for m in late)
        pairs = zip(encoder.encode(ready), encoder.encode(late), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@given(
    side=st.integers(1, 40),
    frames=st.integers(1, 9),
    seconds=st.floats(0.02, 2),
    silence=st.floats(0, 1),
)
def test_content_has_the_size_that_its_encoder_promises(side, frames, seconds, silence):
    encoder = EncoderConfig("any", "", side, seconds, silence, frames=frames)
    assert picture_side(encoder) == side
    assert picture_side(replace(encoder, name="random_image")) == 16
    picture, clip, talk = (Medium(MODALITY[d], medium(d, 1), d) for d in ("pic", "clip", "talk"))
    assert prepare(picture, encoder).shape == (side, side, 3)
    assert prepare(clip, encoder).shape == (frames, side, side, 3)
    length = round((4000 + 1777) / 16)
    features = sound_features(length, encoder)
    assert prepare(talk, encoder).shape == (features * SAMPLES_PER_FEATURE,)


def test_media_whose_features_are_on_disk_are_not_decoded(whole, tmp_path):
    catalogue = open_set(whole)
    pictures, sounds = (
        FeatureCache(tmp_path, build_encoder(ENCODERS[modality]))
        for modality in ("image", "speech")
    )
    features = {"image": pictures.folder, "video": pictures.folder, "speech": sounds.folder}
    reader = SampleReader(job(catalogue, features=features))
    picture, clip, talk = (reader.read(row(f"{d}-1")).media[0] for d in ("pic", "clip", "talk"))
    assert all(each.content is not None for each in (picture, clip, talk))
    pictures.features([picture, clip])
    sounds.features([talk])
    for dataset in ("pic", "clip", "talk"):
        known, other = (reader.read(row(f"{dataset}-{n}")).media[0] for n in (1, 2))
        assert known.content is None
        assert other.content is not None
    # What the tower does with it: nothing has to be decoded or encoded any more.
    assert not pictures.missing([picture, clip])
    # A damaged file counts as none.
    feature_path(sounds.folder, talk).write_bytes(b"\x93NUMPY\x01\x00nonsense")
    assert reader.read(row("talk-1")).media[0].content is not None


def test_stored_features_of_another_length_than_planned_are_refused(whole, tmp_path):
    catalogue = open_set(whole)
    cache = FeatureCache(tmp_path, build_encoder(ENCODERS["speech"]))
    reader = SampleReader(job(catalogue, features={"speech": cache.folder}))
    cache.features([reader.read(row("talk-2")).media[0]])
    change_index(shard(whole, "talk"), duration_ms={2: 1})
    try:
        lied = SampleReader(job(open_set(whole), features={"speech": cache.folder}))
        # The catalogue was compiled with the true length: the rendered sample is shorter.
        assert refused(lied, "talk-2").sample.kind == "inconsistent"
    finally:
        change_index(shard(whole, "talk"), duration_ms={2: round((4000 + 2 * 1777) / 16)})


def test_a_length_in_the_index_that_is_not_the_decoders(folder):
    lengths = {1: 2000, 2: round((4000 + 2 * 1777) / 16) + 3}
    change_index(shard(folder, "talk"), duration_ms=lengths)
    catalogue = open_set(folder)
    reader = SampleReader(job(catalogue))
    error = refused(reader, "talk-1")
    assert error.sample.kind == "inconsistent"
    assert "361 ms" in error.sample.reason
    assert "2000 ms" in error.sample.reason
    # Three milliseconds more make no other number of tokens, which is all that counts.
    assert len(reader.read(row("talk-2")).tokens.ids) == catalogue.tokens[row("talk-2")]
    # Nobody decodes here, so nobody would see it.
    undecoded = SampleReader(job(catalogue, preparations={}))
    assert undecoded.read(row("talk-1")).media[0].content is None


def patch(tar: Path, place: int, old: bytes, new: bytes) -> None:
    """Change a record in a tar, and its checksum in the index."""
    sample = load_manifest(tar.parents[2]).shards("train", tar.parent.name)[0].samples[place]
    with tar.open("r+b") as file:
        file.seek(sample.json_offset)
        record = file.read(sample.json_size)
        assert old in record
        assert len(old) == len(new)
        record = record.replace(old, new)
        file.seek(sample.json_offset)
        file.write(record)
    change_index(tar, json_crc32={place: zlib.crc32(record)})


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (b"<image>", b"<imago>", "inconsistent"),
        (b"What?", b"#%&~@", "inconsistent"),  # other tokens than were counted
        (b'{"key"', b'["key"', "broken"),
        (b'"conversations"', b'"conversation!"', "broken"),
        (b'"value"', b'"velue"', "broken"),
        (b"It is", b"\\ud9f", "broken"),
    ],
)
def test_a_record_that_does_not_fit(folder, old, new, kind):
    catalogue = open_set(folder)  # counted before: so it is a lie that the plan knows nothing of
    patch(shard(folder, "pic"), 3, old, new)
    reader = SampleReader(job(catalogue))
    assert refused(reader, "pic-3").sample.kind == kind
    assert reader.read(row("pic-2")).key == "pic-2"


def test_too_many_bytes_or_pixels_are_large(whole):
    catalogue = open_set(whole)
    most = len(medium("pic", 0)) - 1
    error = refused(SampleReader(job(catalogue, most_bytes=most)), "pic-0")
    assert error.sample.kind == "large"
    assert "pic-0.0.png" in error.sample.reason
    few = replace(LIMITS, max_pixels=40 * 30, max_duration_ms=300)
    reader = SampleReader(job(catalogue, limits=few))
    assert reader.read(row("pic-0")).key == "pic-0"
    assert refused(reader, "pic-1").sample.kind == "large"
    assert refused(reader, "talk-7").sample.kind == "large"


def test_a_flipped_byte_is_named(folder):
    tar = shard(folder, "pic")
    facts = load_manifest(folder).shards("train", "pic")[0].samples[4].media[0]
    with tar.open("r+b") as file:
        file.seek(facts.offset + 11)
        flipped = bytes([file.read(1)[0] ^ 1])
        file.seek(facts.offset + 11)
        file.write(flipped)
    error = refused(SampleReader(job(open_set(folder))), "pic-4")
    assert error.sample.kind == "broken"
    for word in (str(tar), "pic-4.0.png", f"byte {facts.offset}"):
        assert word in error.sample.reason


def test_a_bad_shard_is_no_bad_sample(folder):
    catalogue = open_set(folder)
    tar = shard(folder, "pic")
    mine = tar.read_bytes()
    # Another tar of the same size: its samples are elsewhere.
    tar.write_bytes(mine[512:] + mine[:512])
    with pytest.raises(DataError, match="of another tar") as caught:
        SampleReader(job(catalogue)).read(row("pic-2"))
    assert not isinstance(caught.value, BrokenSampleError)
    assert str(tar) in str(caught.value)
    tar.unlink()
    with pytest.raises(DataError, match="cannot be read") as caught:
        SampleReader(job(catalogue)).read(row("pic-2"))
    assert not isinstance(caught.value, BrokenSampleError)
    assert str(tar) in str(caught.value)


def test_a_tar_that_is_cut_off_while_it_is_read(folder):
    reader = SampleReader(job(open_set(folder)))
    reader.read(row("plain-0"))
    tar = shard(folder, "pic")
    os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(DataError, match="of another tar|index of a tar of") as caught:
        reader.read(row("pic-7"))
    assert not isinstance(caught.value, BrokenSampleError)


@pytest.mark.parametrize("how", ["truncated", "Input/output error"])
def test_a_shard_that_fails_while_it_is_open_is_no_bad_sample(folder, monkeypatch, how):
    reader, tar = SampleReader(job(open_set(folder))), shard(folder, "pic")
    assert reader.read(row("pic-0")).key == "pic-0"
    if how == "truncated":
        os.truncate(tar, 4096)
    else:
        read = os.pread

        def failing(file: int, size: int, offset: int) -> bytes:
            if offset > 4096:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(file, min(size, 1), offset)  # less than was asked for

        monkeypatch.setattr(os, "pread", failing)
    for key in ("pic-5", "pic-7"):
        with pytest.raises(DataError, match=rf"{tar}.*{how}") as caught:
            reader.read(row(key))
        assert not isinstance(caught.value, BrokenSampleError)
    assert reader.read(row("pic-0")).key == "pic-0"


def test_more_shards_than_are_kept_open(tmp_path, whole):
    shards = []
    for number in range(MOST_OPEN + 9):
        place = tmp_path / f"{number}" / "train" / "plain"
        shutil.copytree(whole / "train" / "plain", place)
        shutil.copy(whole / "manifest.json", place.parents[1])
        shards += load_manifest(place.parents[1]).shards("train", "plain")
    reader = RecordReader()

    def opened() -> list[str]:
        places = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        names = [os.readlink(place) for place in places if os.path.islink(place)]
        return [name for name in names if name.endswith("plain-00000.tar")]

    for _ in range(2):
        for each in shards:
            assert reader.record(each, each.samples[1])["key"] == "plain-1"
    assert len(opened()) == MOST_OPEN
    del reader
    assert not opened()


@pytest.mark.parametrize("harm", ["damaged", "cut off while it is open"])
def test_a_cached_copy_that_went_bad_is_fetched_again(published, server, tmp_path, harm):
    store = ShardStore(tmp_path / "cache", 10**7)
    near = load_manifest(published).shards("train")[2]
    far = open_remote(address(server), tmp_path / "sets").shards("train")[2]
    sample = far.samples[0]
    facts = sample.media[0]
    path = store.path(far)
    path.chmod(0o644)
    reader = RecordReader(store)
    if harm == "damaged":
        with path.open("r+b") as file:
            file.seek(facts.offset + 99)
            file.write(b"damaged on this disk")
    else:
        reader.media(far, sample)
        os.truncate(path, facts.offset)
    assert reader.media(far, sample) == RecordReader().media(near, sample)
    assert reader.record(far, sample) == RecordReader().record(near, sample)


def test_workers_need_no_torch():
    code = (
        "import sys, json, data_pipeline.reading.worker, data_pipeline.reading.remote;"
        "print(json.dumps([m for m in sys.modules if '.' not in m]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert not {"torch", "webdataset", "megatron", "hydra"} & set(json.loads(done.stdout))
